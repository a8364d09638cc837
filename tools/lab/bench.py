"""Times a training step and every section of the model on this machine, against what the hardware allows.

    ./run.sh bench [key=value ...]                                      or: python train_gpt.py bench ...
    python tools/lab/bench.py --json bench.json preset=h100x1
    python tools/lab/bench.py --sustain 30 [key=value ...]                steps as warm as training's
    python tools/lab/bench.py --candidates FILE.py [--only NAME,NAME]     plain lines against replacements
    python tools/lab/bench.py --candidates FILE.py --all                  ... and all the rest
    torchrun --nproc_per_node=8 tools/lab/bench.py --timeline FILE.json   what of the communication is seen
    python tools/lab/bench.py --attention [--paths flash,flex]            every attention, tools/lab/attention.py

Columns. ms: one call, median; x: calls in a pass of the model; MB: the least that any implementation must
read and write, each input and output once; GFLOP: 2mkn for each matrix product; floor: the larger of MB over
the copy bandwidth and GFLOP over the rate of that product's shape, both measured in this run; %: floor / ms.
Backward is forward + backward less forward. On a GPU a section is a CUDA graph of several calls, on fresh
inputs where they would fit the L2 cache, so that launches by the host do not count. `zero gradients` is also
a part of `optimizer`, `loader.build` runs in a thread beside the step.

Medians are of bursts: a card that the power cap slows down within seconds was cool in them. Training's
step_avg compares with the sustained lines: its loop for 8 s (--sustain S; on a CPU only with it), in blocks
that alternate between one fixed batch (train_step, ema.update) and all that a step of training does (batch,
step, average, loss and norm fetched a step late, clock, log line), the host ahead as it is there. ms/step is
the mean of the later half, from the end of a step to the end of the next, a block's first left out; the
difference is what loader, log and clock cost that the device does not hide, and next to it is the time from
the end of a step to the first pass of the next, which no clock's wobble blurs. nvidia-smi is read meanwhile.

With --candidates only these are compared and each line is printed when it is known; --all: the rest, too.
FILE.py defines CANDIDATES = {name: (path, function)}: `mlp`, `exclude_self`, `qk_heads`, `layer`,
`GPT.nats`, ...: what to replace in a copy of train_gpt.py, by a function of the same signature. (path,
function) may be a list of such pairs. While the file is loaded `t` is that copy, still plain: a function that
calls the one it replaces keeps it under a name of its own (plain = t.mlp). Errors are relative to float64:
|x - x64| / |x64|, of the loss, of all gradients together and of the parameter with the worst.

Exit status: 0 measured (what failed is listed as skipped); 2 bad input (one line says it).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/, also when a command runs this file

import script  # noqa: E402
from script import BadInput  # noqa: E402

NEEDS = (
    "InputError",
    "GPT",
    "Ops",
    "Optimizer",
    "Ema",
    "TokenLoader",
    "bind_pass",
    "train_step",
    "log_step",
    "hyper_at",
    "Machine.fetch",
)
MODULE = "benched_script"  # its name in sys.modules; copies with a candidate get a suffix
QUARTERS = 4  # documents of a row, where the config keeps documents apart
ROUNDS, REPLAYS = 4, 10  # calls of a big section in a CUDA graph; timed replays of it
FRESH = 20  # calls, each with inputs of its own, where these fit the L2 cache
HOST_SECONDS = 0.3  # on a CPU a section ends after this long, with three repetitions at least
SUSTAIN, BLOCKS = 8.0, 8  # seconds of training's loop on a GPU, cut into so many blocks
SAMPLE_MS, GRACE = 200, 2.0  # between two readings of nvidia-smi; seconds it has to end when asked to
TOP = 25  # kernels listed
ERROR_SLACK = 1.5  # a candidate may be this much less exact than the plain lines,
FEW, CHANCE = 64, 0.1  # and of a tensor of so few numbers this is forgiven: signs may cancel
GAIN, WINS = 0.998, 0.8  # it is faster when it takes less than this of their time, so often


class Work(NamedTuple):
    """Of one call. products: (flops, shape (m, k, n) whose rate counts; None: the best rate)."""

    moved: float = 0.0
    products: tuple = ()

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.products)


class Section(NamedTuple):
    """A piece of the model. inputs: () -> arguments, gradients are made of those that require them.

    count: calls in a pass; 0: a composite, built for candidates only. back: (fn, inputs) where autograd's
    backward of `fn` alone is not what the model's backward does. uses: what a candidate may replace in it.
    """

    name: str
    count: int
    fn: Callable
    inputs: Callable
    forward: Work
    backward: Work
    uses: tuple = ()
    params: tuple = ()
    compiled: bool = True
    back: tuple | None = None


class Bench(NamedTuple):
    """What is measured: the script as a module, its config and machine; sequences of a micro-batch."""

    t: ModuleType
    h: Any
    m: Any
    rows: int
    report: dict
    deadline: float

    @property
    def cuda(self) -> bool:
        return self.m.device.type == "cuda"

    def say(self, line: str = "") -> None:
        if self.m.rank == 0:
            print(line, flush=True)

    def skip(self, what: str, error: Exception | str) -> None:
        """Report what could not be measured, and why; the rest goes on."""
        lines = str(error).strip().splitlines()
        why = error if isinstance(error, str) else f"{type(error).__name__}: {lines[0] if lines else ''}"
        self.report["skipped"].append(dict(what=what, why=why))
        self.say(f"skipped {what}: {why[:300]}")

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline


def load_script(path: Path, name: str = MODULE) -> ModuleType:
    """A fresh copy of the script as a module, with code objects of its own. BadInput: it does not load."""
    return script.load_script(path, name, NEEDS, "bench")


# ---- clocks --------------------------------------------------------------------------------------


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def wall_times(b: Bench, fn: Callable, before: Callable = lambda: None) -> list[float]:
    """ms of 10 calls by the host's clock, the device idle at both ends, after 4 that do not count.

    before: runs ahead of each call, off the clock.
    """
    times = []
    for _ in range(14):
        before()
        b.m.sync()
        start = time.perf_counter()
        fn()
        b.m.sync()
        times.append(1000 * (time.perf_counter() - start))
    return times[4:]


def call_ms(b: Bench, calls: list[Callable]) -> float:
    """Median ms of a call, `calls` in turn: on a GPU all in one CUDA graph, after two rounds outside it."""
    if not b.cuda:
        calls[0]()
        times, end = [], time.perf_counter() + HOST_SECONDS
        while len(times) < 3 or (len(times) < REPLAYS and time.perf_counter() < end):
            start = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(1000 * (time.perf_counter() - start))
        return median(times)

    def run() -> None:
        for call in calls:
            call()

    for _ in range(2):
        with b.m.lanes() as lane, lane():  # off the default stream, as a recording is
            run()
    b.m.sync()
    try:
        launch = b.m.record(run)
    except Exception as error:  # whatever a driver raises: then launches by the host count
        launch = run
        b.skip("a CUDA graph: launched one by one", error)
    try:
        event = lambda: torch.cuda.Event(enable_timing=True)
        events = [(event(), event()) for _ in range(REPLAYS + 1)]
        for start, end in events:
            start.record()
            launch()
            end.record()
        b.m.sync()
        return median([start.elapsed_time(end) for start, end in events[1:]]) / len(calls)
    finally:
        b.m.sync()  # before the graph and its memory go


def fresh_sets(b: Bench, make: Callable) -> list:
    """Several results of make(), a list of tensors, where one would stay in the L2 cache; else one."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first)
    cache = torch.cuda.get_device_properties(b.m.device).L2_cache_size if b.cuda else 0
    return [first] + [make() for _ in range(FRESH - 1 if size < 2 * cache else 0)]


def in_turn(b: Bench, fn: Callable, sets: list) -> list[Callable]:
    """At least ROUNDS calls of fn(set) on a GPU, the sets in turn."""
    rounds = max(len(sets), ROUNDS if b.cuda else 1)
    return [lambda s=sets[i % len(sets)]: fn(s) for i in range(rounds)]


# ---- what the hardware allows --------------------------------------------------------------------


def measure_rates(b: Bench, shapes: list[tuple]) -> tuple[float, dict]:
    """(GB/s read and written by a copy, {(m, k, n): TFLOP/s of one product}); None: the best of them."""
    size = 2**28 if b.cuda else 2**23
    source, target = torch.ones(size, device=b.m.device), torch.empty(size, device=b.m.device)
    gbps = 2 * 4 * size / call_ms(b, [lambda: target.copy_(source)] * (ROUNDS if b.cuda else 1)) / 1e6
    del source, target
    side, rates, listed = 8192 if b.cuda else 512, {}, []
    for m, k, n in dict.fromkeys([*shapes, (side, side, side)]):
        draw = lambda *shape: torch.randn(shape, device=b.m.device, dtype=b.m.dtype)
        sets = fresh_sets(b, lambda: [draw(m, k), draw(k, n)])
        ms = call_ms(b, in_turn(b, lambda s: torch.mm(*s), sets))
        rates[m, k, n] = 2 * m * k * n / ms / 1e9
        listed.append(dict(m=m, k=k, n=n, ms=ms, tflops=rates[m, k, n]))
    rates[None] = max(rates.values())
    b.report["rates"] = dict(copy_gbps=gbps, products=listed)
    b.say(
        f"\nrates: copy {gbps:,.0f} GB/s; products "
        + ", ".join(f"{r['m']}x{r['k']}x{r['n']} {r['tflops']:.4g}" for r in listed)
        + " TFLOP/s"
    )
    return gbps, rates


def floor_of(work: Work, gbps: float, rates: dict) -> tuple[float, str]:
    """(ms that the work takes at least, what bounds it)."""
    copy_ms = work.moved / gbps / 1e6
    product_ms = sum(flops / rates.get(shape, rates[None]) for flops, shape in work.products) / 1e9
    return max(copy_ms, product_ms), "copy" if copy_ms >= product_ms else "product"


# ---- sections ------------------------------------------------------------------------------------


def quick_model(t: ModuleType, h: Any, ops: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A GPT of zeros: initialisation takes seconds and every weight is written afterwards anyway."""
    init, t.init_tensor = t.init_tensor, lambda shape, kind, generator: torch.zeros(shape)
    try:
        return t.GPT(h, ops, dtype).to(device)
    finally:
        t.init_tensor = init


@torch.no_grad()
def scatter(model: Any, seed: int = 0) -> Any:
    """Weights none of which is zero or one, so that no path is switched off."""
    for i, (name, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(seed + i)
        noise = torch.randn(p.shape, generator=generator)
        matrix = "bank" in name or "proj" in name
        other = 0.05 * noise if "emb" in name else 0.5 + 0.1 * noise
        p.copy_(0.7 * noise * p.size(-1) ** -0.5 if matrix else other)
    return model


def product(m: int, k: int, n: int, e: int) -> tuple[Work, Work]:
    """Forward and backward of F.linear on (m, k) and (n, k), e bytes a number."""
    moved, flops, shape = e * (m * k + k * n + m * n), 2.0 * m * k * n, (m, k, n)
    return Work(moved, ((flops, shape),)), Work(moved + e * (m * k + k * n), ((2 * flops, shape),))


def mlp_work(N: int, D: int, hidden: int, e: int, back: bool) -> Work:
    """Of the MLP over N rows: the hidden layer is written and read once, in backward its gradient too."""
    flops, streams = 2.0 * N * D * hidden * (2 if back else 1), 3 if back else 2
    return Work(
        e * (streams * N * (D + hidden) + (4 if back else 2) * D * hidden),
        ((flops, (N, D, hidden)), (flops, (N, hidden, D))),
    )


def one_layer(b: Bench, t: ModuleType, ops: Any, dtype: torch.dtype) -> Any:
    """A model of one layer, with all the tensors that are not of a layer at full size."""
    h = dataclasses.replace(b.h, num_layers=1, xsa_last_n=1, ve_last_n=1)
    return scatter(quick_model(t, h, ops, torch.float32, b.m.device)).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def documents_of(b: Bench) -> Tensor | None:
    """(B, T) numbers of QUARTERS documents of one length a row, where the config keeps documents apart."""
    T = b.h.train_seq_len
    numbers = torch.arange(T, device=b.m.device) * QUARTERS // T
    return numbers.expand(b.rows, T) if b.h.doc_mask else None


def sections_of(b: Bench, t: ModuleType, ops: Any, dtype: torch.dtype) -> list[Section]:
    """The model in pieces, in the order of a forward, then the composites that candidates replace."""
    h, B, T, D, H, Dh = b.h, b.rows, b.h.train_seq_len, b.h.model_dim, b.h.num_heads, b.h.head_dim
    kv, Fm, V, L, N, e = h.kv_dim, h.mlp_dim, h.vocab_size, h.num_layers, B * T, b.m.dtype.itemsize
    small, specs = one_layer(b, t, ops, dtype), t.layer_table(h)
    small.dtype = dtype
    rope = t.rope_tables(T, h.rope_dims, h.rope_base, b.m.device)
    draw = lambda *shape, dtype=dtype: torch.randn(shape, device=b.m.device, dtype=dtype).requires_grad_()
    wide = lambda n, at: lambda x: x[..., at : at + n].view(B, T, n // Dh, Dh).detach().requires_grad_()
    qkv = lambda: torch.randn(B, T, D + 2 * kv, device=b.m.device, dtype=dtype)
    vector = lambda *shape: draw(*shape, dtype=small.tok_emb.dtype)
    tokens = lambda: torch.randint(V, (B, T), device=b.m.device)
    stream, both, tables = e * N * D, e * N * (D + kv), 4 * (V * D + h.bigram_vocab_size * h.bigram_dim)
    linear = lambda name, count, k, n: Section(
        name, count, F.linear, lambda: [draw(B, T, k), draw(n, k)], *product(N, k, n, e), compiled=False
    )

    def value_embedding(ids: Tensor) -> Tensor:
        ve = F.embedding(ids, small.ve_emb).to(dtype)
        return F.linear(ve, (small.ve_scale * small.ve_proj).to(dtype))

    def mix_norm(x, y, x0, mix):  # the layer before ends here: x + y
        mix = mix.to(x.dtype)
        x = mix[0] * (x + y) + mix[1] * x0
        return x, t.rms_norm(x)

    def add_norm(x, y):
        x = x + y
        return x, t.rms_norm(x)

    class Head(t.GPT):  # its trunk is given: only what follows it is timed
        def trunk(self, tokens):
            return t.rms_norm(tokens)

    head = copy.copy(small)
    head.__class__ = Head
    qk_inputs = lambda: [draw(B, T, (D + 2 * kv) // Dh, Dh), vector(H)]
    xsa_inputs = lambda: [draw(B, T, H, Dh), wide(kv, D + kv)(qkv())]
    attend_inputs = lambda: [draw(B, T, H, Dh), draw(B, T, kv // Dh, Dh), wide(kv, D + kv)(qkv())]
    docs, longest = documents_of(b), T // QUARTERS if h.doc_mask else T

    def attention(window: int) -> Section:
        seen, name = min(window or longest, longest), f"attention, window {window}" if window else "attention"
        scores = 4.0 * B * T * D * seen * (1 - seen / longest / 2)  # of both products
        return Section(
            name,
            sum(s.window == window for s in specs),
            lambda q, k, v: ops.attend(q, k, v, window, docs),
            attend_inputs,
            Work(2 * both, ((scores, None),)),
            Work(4 * both, ((2.5 * scores, None),)),
            ("attend_sdpa", "attend_flash4"),
            compiled=h.doc_mask or window > 0,
        )

    parts = [
        Section(
            "embedding + bigram + smear",
            1,
            small.embed,
            lambda: [tokens()],
            Work(8 * N + tables + stream, ((2.0 * N * h.bigram_dim * D, (N, h.bigram_dim, D)),)),
            Work(8 * N + 2 * tables + stream, ((4.0 * N * h.bigram_dim * D, (N, h.bigram_dim, D)),)),
            ("GPT.embed", "rms_norm"),
            (small.tok_emb, small.bigram_emb, small.bigram_proj, small.bigram_scale, small.smear_gate),
        ),
        Section(
            "value embedding",
            1,
            value_embedding,
            lambda: [tokens()],
            Work(8 * N + 4 * V * h.ve_dim + e * N * kv, ((2.0 * N * h.ve_dim * kv, (N, h.ve_dim, kv)),)),
            Work(8 * N + 8 * V * h.ve_dim + e * N * kv, ((4.0 * N * h.ve_dim * kv, (N, h.ve_dim, kv)),)),
            (),
            (small.ve_emb, small.ve_proj, small.ve_scale),
        ),
        Section(
            "residual mix + norm",
            L,
            mix_norm,
            lambda: [*(draw(B, T, D) for _ in range(3)), vector(2, D)],
            Work(5 * stream),
            Work(7 * stream),
            ("rms_norm",),
        ),
        linear("QKV product", L, D, D + 2 * kv),
        # compiled alone, a fused one would get v's gradient outside: v is a view of this section's input
        Section(
            "QK norm + rope + gain",
            L,
            lambda qkv, gain: ops.qk(qkv, gain, *rope),
            qk_inputs,
            Work(2 * both),
            Work(3 * both + 2 * e * N * kv),
            ("qk_heads", "qk_norm_rope", "rms_norm"),
            compiled=ops.qk is getattr(t, "qk_heads", None),
        ),
        *map(attention, sorted({s.window for s in specs})),
        Section(
            "XSA",
            sum(s.xsa for s in specs),
            t.exclude_self,
            xsa_inputs,
            Work(stream + both),
            Work(stream + 2 * both),
            ("exclude_self",),
        ),
        linear("O product", L, D, D),
        Section(
            "residual add + norm",
            L,
            add_norm,
            lambda: [draw(B, T, D), draw(B, T, D)],
            Work(4 * stream),
            Work(4 * stream),
            ("rms_norm",),
        ),
        Section(
            "MLP",
            L,
            ops.mlp,
            lambda: [draw(B, T, D), draw(Fm, D), draw(D, Fm)],
            mlp_work(N, D, Fm, e, False),
            mlp_work(N, D, Fm, e, True),
            ("mlp",),
        ),
        Section(
            "skip adds",
            sum(s.skip >= 0 for s in specs),
            lambda x, kept, w: x + w.to(x.dtype) * kept,
            lambda: [draw(B, T, D), draw(B, T, D), vector(D)],
            Work(3 * stream),
            Work(3 * stream),
        ),
        Section(
            "head + softcap + cross-entropy",
            1,
            lambda x, y: head.loss(x, y),
            lambda: [draw(B, T, D), tokens()],
            Work(8 * N + 4 * V * D + stream, ((2.0 * N * D * V, (N, D, V)),)),
            Work(8 * N + 8 * V * D + 2 * stream, ((4.0 * N * D * V, (N, D, V)),)),
            ("GPT.nats", "GPT.head", "GPT.loss", "rms_norm"),
            (small.tok_emb,),
        ),
    ]
    try:
        blocks = composites(b, t, ops, small, parts)
    except Exception as error:  # a script whose blocks have other parameters still has its sections
        blocks = b.skip("blocks", error) or []
    return parts + [casts(b, dtype)] + blocks


def casts(b: Bench, dtype: torch.dtype) -> Section:
    """Banks to the compute dtype; back: the layers' gradients stacked and added to float32 ones."""
    table = b.t.parameter_table(b.h)
    shapes = [table[spec.name][0] for spec in b.t.MATRICES]
    numel, e = sum(n * r * c for n, r, c in shapes), b.m.dtype.itemsize
    make = lambda shape, kind: torch.randn(shape, device=b.m.device, dtype=kind)

    def accumulate(*tensors: Tensor) -> tuple:
        grads, at = tensors[: len(shapes)], len(shapes)
        for grad in grads:
            grad.add_(torch.stack(tensors[at : at + len(grad)]))
            at += len(grad)
        return grads

    inputs = lambda: [make(shape, torch.float32) for shape in shapes]
    slices = lambda: [make(shape[1:], dtype) for shape in shapes for _ in range(shape[0])]
    none = dtype == torch.float32
    return Section(
        "bank casts",
        1,
        lambda *banks: [bank.to(dtype) for bank in banks],
        inputs,
        Work(0 if none else numel * (4 + e)),
        Work(numel * (8 + e)),
        back=(accumulate, lambda: inputs() + slices()),
    )


def composites(b: Bench, t: ModuleType, ops: Any, small: Any, parts: list[Section]) -> list[Section]:
    """Blocks of several sections, with the work of these: what a candidate for a whole block is timed in."""
    B, T, D, e = b.rows, b.h.train_seq_len, b.h.model_dim, b.m.dtype.itemsize
    rope, names = t.rope_tables(T, b.h.rope_dims, b.h.rope_base, b.m.device), t.LayerWeights._fields
    weights = lambda: [w.detach().clone().requires_grad_() for w in small.layer_weights()[0]]
    draw = lambda: torch.randn(B, T, D, device=b.m.device, dtype=small.dtype).requires_grad_()
    spec = t.layer_table(b.h)[-1]
    spec = dataclasses.replace(spec, ve=-1)
    at = {s.name: s for s in parts}
    size = {"attention": 4 * D * D, "mlp": 2 * D * b.h.mlp_dim}

    def work(streams: int, matrices: int, sections: tuple, back: bool) -> Work:
        works = [at[name].backward if back else at[name].forward for name in sections]
        return Work(
            e * (streams * B * T * D + matrices * (2 if back else 1)),
            tuple(p for w in works for p in w.products),
        )

    def row(name: str, fn: Callable, first: int, sections: tuple, uses: tuple) -> Section:
        matrices = size["attention"] + size["mlp"] * (name == "layer")
        return Section(
            name,
            0,
            lambda *a: fn(*a[:first], t.LayerWeights(*a[first:])),
            lambda: [*(draw() for _ in range(first)), *weights()],
            work(first + 1, matrices, sections, False),
            work(2 * first + 1, matrices, sections, True),
            uses,
        )

    assert names[:4] == ("qkv", "o", "up", "down"), "LayerWeights: the bench knows another order"
    attend = f"attention, window {spec.window}" if spec.window else "attention"
    attention, mlp = ("QKV product", attend, "O product"), ("MLP",)
    block = lambda x, w: t.attention_block(x, w, None, (rope, documents_of(b)), spec, ops)
    return [
        row("attention block", block, 1, attention, ("attention_block",)),
        row(
            "layer",
            lambda x, x0, w: t.layer(x, x0, w, lambda z: block(z, w), ops.mlp),
            2,
            attention + mlp,
            ("layer", "attention_block", "mlp"),
        ),
    ]


def as_list(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def leaves_of(s: Section, args: list[Tensor]) -> list[Tensor]:
    return [x for x in (*args, *s.params) if x.requires_grad]


def time_section(b: Bench, s: Section) -> tuple[float, float]:
    """(forward ms, backward ms) of one call."""
    fn = b.m.compile(s.fn) if s.compiled else s.fn
    if s.back is not None:
        with torch.no_grad():
            times = []
            for call, make in ((fn, s.inputs), (b.m.compile(s.back[0]), s.back[1])):
                times.append(call_ms(b, in_turn(b, lambda a: call(*a), fresh_sets(b, make))))
            return times[0], times[1]
    outs = as_list(fn(*s.inputs()))
    douts = lambda: [
        torch.ones_like(o) if o.dim() == 0 else torch.randn(o.shape, device=o.device, dtype=o.dtype)
        for o in outs
    ]
    sets = [(args, leaves_of(s, args), douts()) for args in fresh_sets(b, s.inputs)]
    del outs

    def both(one: tuple) -> None:
        args, leaves, dout = one
        torch.autograd.grad(as_list(fn(*args)), leaves, dout, allow_unused=True)

    whole = call_ms(b, in_turn(b, both, sets))
    forward = call_ms(b, in_turn(b, lambda one: fn(*one[0]), sets))
    return forward, max(whole - forward, 0.0)


HEADS = ("section", "pass", "x", "ms", "total ms", "MB", "GFLOP", "GB/s", "TFLOP/s", "floor ms", "%", "bound")


def section_row(s: Section, which: str, ms: float, limits: tuple) -> dict:
    """One line of the table: a section's pass. limits: of measure_rates."""
    work = s.forward if which == "forward" else s.backward
    floor, bound = floor_of(work, *limits)
    return dict(
        section=s.name,
        which=which,
        count=s.count,
        ms=ms,
        total_ms=ms * s.count,
        mb=work.moved / 1e6,
        gflop=work.flops / 1e9,
        gbps=work.moved / ms / 1e6 if ms else 0.0,
        tflops=work.flops / ms / 1e9 if ms else 0.0,
        floor_ms=floor,
        floor_total_ms=floor * s.count,
        percent_of_floor=100 * floor / ms if ms else None,
        bound=bound,
    )


def table(heads: tuple, rows: list[tuple]) -> str:
    """Columns, the first two to the left."""
    cells = [tuple(heads)] + [tuple(map(str, row)) for row in rows]
    wide = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    align = lambda row: [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide))]
    return "\n".join("  ".join(align(row)).rstrip() for row in cells)


WIDE = (-32, -8, 3, 10, 9, 9, 9, 7, 8, 9, 5, 8)  # columns of HEADS; negative: to the left


def section_line(cells: tuple) -> str:
    """A line of the sections' table, whose width does not depend on the lines behind it."""
    return "  ".join(f"{c:<{-w}}" if w < 0 else f"{c:>{w}}" for c, w in zip(cells, WIDE)).rstrip()


def section_cells(r: dict) -> tuple:
    percent = "-" if r["percent_of_floor"] is None else f"{r['percent_of_floor']:.0f}"
    return (
        r["section"],
        r["which"],
        str(r["count"] or "-"),
        f"{r['ms']:.4f}",
        f"{r['total_ms']:.3f}",
        f"{r['mb']:.1f}",
        f"{r['gflop']:.2f}",
        f"{r['gbps']:.0f}",
        f"{r['tflops']:.2f}",
        f"{r['floor_ms']:.4f}",
        percent,
        r["bound"],
    )


def time_sections(b: Bench) -> tuple:
    """The table of sections and its sums. Returns the limits."""
    sections = [s for s in sections_of(b, b.t, b.m.ops, b.m.dtype) if s.count]
    shapes = [shape for s in sections for _, shape in s.forward.products if shape]
    limits = measure_rates(b, shapes)
    rows = b.report["sections"]
    b.say("\nsections, each alone\n" + section_line(HEADS))
    for s in sections:
        if b.late:
            b.skip(f"section {s.name}", "out of time (--seconds)")
            continue
        try:
            for which, ms in zip(("forward", "backward"), time_section(b, s)):
                rows.append(section_row(s, which, ms, limits))
                b.say(section_line(section_cells(rows[-1])))
        except Exception as error:  # whatever a compiler, kernel or capture raises
            b.skip(f"section {s.name}", error)
    whole = {w["name"]: w["median_ms"] for w in b.report["whole"]}
    total = {key: sum(r[key] for r in rows) for key in ("total_ms", "floor_total_ms")}
    measured = whole["forward+backward"]
    percent = 100 * total["floor_total_ms"] / measured
    b.report["sums"] = dict(
        sections_ms=total["total_ms"],
        floors_ms=total["floor_total_ms"],
        forward_backward_ms=measured,
        floors_percent=percent,
    )
    b.say(
        f"sum of floors {total['floor_total_ms']:.3f} ms, of sections {total['total_ms']:.3f} ms; "
        f"forward+backward takes {measured:.3f} ms: floors are {percent:.0f} % of it"
    )
    return limits


# ---- the whole step ------------------------------------------------------------------------------


class Trained(NamedTuple):
    """The model and what trains it."""

    model: Any
    loss_fn: Callable
    optimizer: Any
    ema: Any
    batches: list[Tensor]  # (B, T + 1) random tokens

    def fresh(self) -> Tensor:
        return self.batches[int(torch.randint(len(self.batches), ()))]

    def forward(self) -> Tensor:
        x = self.fresh()
        return self.loss_fn(x[:, :-1].contiguous(), x[:, 1:].contiguous())

    def both(self) -> None:
        self.forward().backward()


def build(b: Bench, steps: bool = True) -> Trained:
    """steps=False: no step will be made. The optimizer still says what moves and where gradients add up, but
    its update is neither compiled nor recorded, and the weights are zeros."""
    torch.manual_seed(b.h.seed)
    if steps:
        model, m = b.t.GPT(b.h, b.m.ops, b.m.dtype).to(b.m.device), b.m
    else:
        model = quick_model(b.t, b.h, b.m.ops, b.m.dtype, b.m.device)
        m = dataclasses.replace(b.m, record=None)
    optimizer = b.t.Optimizer(model, b.h, m)
    shape = (b.rows, b.h.train_seq_len + 1)
    batches = [torch.randint(b.h.vocab_size, shape, device=b.m.device) for _ in range(4)]
    return Trained(model, b.m.compile(model.loss), optimizer, b.t.Ema(model, b.h), batches)


def add_whole(b: Bench, name: str, times: list[float]) -> None:
    times = sorted(times)
    b.report["whole"].append(
        dict(name=name, median_ms=median(times), min_ms=times[0], max_ms=times[-1], n=len(times))
    )
    b.say(
        f"bench {name}: median {median(times):.2f} ms, min {times[0]:.2f}, max {times[-1]:.2f} "
        f"(device {b.m.names['device']}, attention {b.m.names['attention']})"
    )


def time_whole(b: Bench, run: Trained, accum: int) -> None:
    """A `bench NAME: median ...` line for everything that a step of training does, and for all of it.

    forward+backward is training's: a graph where the machine records. Its memory goes with this function, for
    a forward launched by the host, as in what follows and in the candidates' pairs, needs as much again.
    """
    t, h, m, hp = b.t, b.h, b.m, b.t.hyper_at(b.h, 0, 0.0)
    grads = [*run.optimizer.bank_grad.values(), run.optimizer.flat_grad]
    numbers = torch.zeros(2, dtype=torch.float64, device=m.device)  # a step's loss and gradient norm

    def clock() -> None:
        fetched = m.fetch(numbers)
        m.agree(time.perf_counter())
        fetched()

    add_whole(b, "forward", wall_times(b, run.forward))
    backward, failure = t.bind_pass(run.loss_fn, run.optimizer)
    if failure:
        b.skip("a CUDA graph of forward+backward: launched one by one", failure)
    cases = {
        "forward+backward": lambda: backward(run.fresh()),
        "optimizer": lambda: run.optimizer.step(hp),
        "ema": lambda: run.ema.update(0.0),
        "zero gradients": lambda: torch._foreach_zero_(grads),
        "clock check": clock,
        "step": lambda: t.train_step(backward, run.optimizer, [run.fresh()] * accum, hp),
    }
    for name, fn in cases.items():
        add_whole(b, name, wall_times(b, fn))
    if m.pin:
        b.report["peak_mib"] = torch.cuda.max_memory_allocated() // 2**20
        b.say(
            f"bench rows:{b.rows} seq_len:{h.train_seq_len} accum:{accum} peak memory allocated: "
            f"{b.report['peak_mib']} MiB"
        )
    loss = backward(run.fresh())
    with quiet_log(b) as logged:
        times = wall_times(b, lambda: t.log_step(logged, 1, loss, 1.0))
    add_whole(b, "log line", times)


@contextlib.contextmanager
def quiet_log(b: Bench) -> Iterator[SimpleNamespace]:
    """What log_step wants of a run; its lines go to a file that does not stay, not to the console."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        log = b.t.Log(os.path.join(folder, "log.txt"), b.m)
        log.live = False
        try:
            yield SimpleNamespace(h=b.h, log=log)
        finally:
            if log.file is not None:
                log.file.close()


def time_loader(b: Bench) -> Any:
    """The loader's lines. Returns it; None: there is no data.

    loader.next: the batch is there. What takes time is to start a thread for the next one (0.2 ms on a CPU, a
    standing thread 0.01) and, behind the copy, to wait for the device: then the interpreter must come back
    from that thread. Training does not wait there: the sustained difference says what it sees of all this."""
    try:
        loader = b.t.TokenLoader(b.h, b.m)
    except b.t.InputError as error:
        return b.skip("loader", error)
    index = iter(range(1 << 30))
    add_whole(b, "loader.next", wall_times(b, loader.next, lambda: loader.pending.result()))
    add_whole(b, "loader.build (in its thread)", wall_times(b, lambda: loader.build(next(index))))
    loader.pending.result()
    return loader


# ---- steps as warm as training's -----------------------------------------------------------------

REASONS = {  # of a clock below its highest: NVML's nvmlClocksEventReason bits
    0x1: "idle",
    0x2: "application clocks",
    0x4: "SW power cap",
    0x8: "HW slowdown",
    0x10: "sync boost",
    0x20: "SW thermal slowdown",
    0x40: "HW thermal slowdown",
    0x80: "HW power brake",
    0x100: "display clocks",
}


def gpu_of(b: Bench) -> str | None:
    """What nvidia-smi calls this process's device, whatever CUDA_VISIBLE_DEVICES made of its number."""
    uuid = getattr(torch.cuda.get_device_properties(b.m.device), "uuid", None) if b.cuda else None
    return f"GPU-{str(uuid).removeprefix('GPU-')}" if uuid else None


class Sample(NamedTuple):
    at: float  # perf_counter
    sm_mhz: float
    power_w: float  # nan: this GPU does not say
    reasons: int  # bits of REASONS


def read_sample(line: str) -> Sample:
    """A line of nvidia-smi. ValueError: it is something else, a complaint perhaps."""
    clock, power, reasons = (x.strip() for x in line.split(","))
    return Sample(
        time.perf_counter(),
        float(clock),
        math.nan if power.startswith("[") else float(power),
        int(reasons, 16),
    )


class Sampler:
    """`with Sampler(gpu) as sampler`: nvidia-smi reads that GPU's clock, power and what holds the clock down,
    and is ended with the block, however that ends. It sets nothing. Should this process be killed, its next
    line finds nobody behind the pipe and ends it."""

    def __init__(self, gpu: str | None) -> None:
        self.samples: list[Sample] = []
        self.process, self.why = None, "" if gpu else "no NVIDIA GPU"
        self.command = [
            "nvidia-smi",
            f"--id={gpu}",
            "-lms",
            f"{SAMPLE_MS}",
            "--format=csv,noheader,nounits",
            "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active",
        ]

    def __enter__(self) -> Sampler:
        if not self.why:
            none, pipe = subprocess.DEVNULL, subprocess.PIPE
            try:  # a group of its own, for whatever it may start
                self.process = subprocess.Popen(
                    self.command,
                    stdin=none,
                    stdout=pipe,
                    text=True,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self.why = f"nvidia-smi: {error.strerror}"
                return self
            self.reader = Thread(target=self.read, daemon=True)
            self.reader.start()
        return self

    def read(self) -> None:
        for line in self.process.stdout:
            try:
                self.samples.append(read_sample(line))
            except ValueError:
                self.why = f"nvidia-smi: {line.strip()}" if line.strip() else self.why

    def __exit__(self, *_: object) -> None:
        if self.process is None:
            return
        if status := self.process.poll():
            self.why = self.why or f"nvidia-smi: status {status}"
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError):  # it is gone
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
                break
        self.reader.join(GRACE)

    def figures(self, since: float) -> dict:
        """Of the readings from this perf_counter on: {samples, sm_mhz, sm_mhz_range, power_w, reasons:
        {name: samples}}, clock and power as medians; or {why} there are none."""
        found = [x for x in self.samples if x.at >= since]
        if not found:
            return dict(why=self.why or "nvidia-smi gave no reading in time")
        clocks, powers = [x.sm_mhz for x in found], [x.power_w for x in found if not math.isnan(x.power_w)]
        counts = {name: sum(bool(x.reasons & bit) for x in found) for bit, name in REASONS.items()}
        return dict(
            samples=len(found),
            sm_mhz=median(clocks),
            sm_mhz_range=[min(clocks), max(clocks)],
            power_w=median(powers) if powers else None,
            reasons={name: n for name, n in counts.items() if n},
        )


def tick(b: Bench) -> Any:
    """Now, in the order of the device's queue."""
    if not b.cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def ms_between(a: Any, z: Any) -> float:
    return 1000 * (z - a) if isinstance(a, float) else a.elapsed_time(z)


def loops(b: Bench, run: Trained, loader: Any, logged: SimpleNamespace) -> dict[str, Callable]:
    """{name: one step -> ticks ahead of its first pass and at its end}. `training` is train()'s loop without
    validations, checkpoints and an end; without a loader there is only `fixed`, which waits for nothing and
    lets the host run ahead. RuntimeError: what is trained has diverged."""
    t, h, m, accum = b.t, b.h, b.m, b.t.cut_batch(b.h, b.m.world_size)[0]
    backward, _ = t.bind_pass(run.loss_fn, run.optimizer)
    batch = loader.next() if loader else [run.fresh()] * accum  # text: random tokens draw other power
    step, clock_ms, start = 0, 0.0, time.perf_counter()
    reached = m.fetch(torch.zeros(2, device=m.device))
    sound = lambda fetched: all(abs(x) < t.DIVERGED for x in fetched()[0].tolist())

    def fixed() -> tuple:
        hp, begin = t.hyper_at(h, step, clock_ms), tick(b)
        t.train_step(backward, run.optimizer, batch, hp)
        run.ema.update(hp.progress)
        return begin, tick(b)

    def training() -> tuple:
        nonlocal step, clock_ms, reached
        hp, batch, begin = t.hyper_at(h, step, clock_ms), loader.next(), tick(b)
        loss = t.train_step(backward, run.optimizer, batch, hp)
        run.ema.update(hp.progress)
        end = tick(b)
        step += 1
        in_flight, reached = reached, m.fetch(torch.stack([loss.double(), run.optimizer.norm]))
        clock_ms, ended = m.agree(1000 * (time.perf_counter() - start), 0 if sound(in_flight) else 2)
        shown = math.nan
        if step % h.train_log_every == 0 or step == 1:
            shown = t.log_step(logged, step, loss, clock_ms)
        eta = clock_ms * (1 / t.hyper_at(h, step, clock_ms).progress - 1) / 1000
        logged.log.status(f"step {step} loss {shown:.4f} {clock_ms / step:.1f} ms/step ETA {eta:.0f} s")
        if ended:
            raise RuntimeError(f"step {step}: loss or gradient norm beyond {t.DIVERGED:g}")
        return begin, end

    return dict(fixed=fixed, training=training) if loader else dict(fixed=fixed)


def run_blocks(b: Bench, steps: dict[str, Callable], seconds: float) -> tuple[list[dict], float]:
    """(BLOCKS blocks [{which, steps, ms: per step, between_ms: of it between steps}], perf_counter at their
    middle). Of two kinds a b b a ...: a drift of clocks and temperature meets both. A block's first step fills
    the queue and is not timed."""
    for fn in (*steps.values(), steps["fixed"]):  # what is compiled or allocated once
        fn()
    b.m.sync()
    start = time.perf_counter()
    steps["fixed"]()
    b.m.sync()
    took, _ = b.m.agree(time.perf_counter() - start)  # ranks must make the same number of steps
    count, blocks, half, names = max(2, round(seconds / BLOCKS / took)), [], 0.0, list(steps)
    for i in range(BLOCKS):
        if i == BLOCKS // 2:
            half = time.perf_counter()
        name = names[(i + 1) // 2 % len(names)]
        begins, ends = zip(*(steps[name]() for _ in range(count)))
        b.m.sync()
        between = sum(map(ms_between, ends, begins[1:]))
        blocks.append(
            dict(
                which=name,
                steps=count - 1,
                ms=ms_between(ends[0], ends[-1]) / (count - 1),
                between_ms=between / (count - 1),
            )
        )
    return blocks, half


def sustained(b: Bench, run: Trained, loader: Any, seconds: float) -> None:
    """The lines `bench sustained ...`: training's loop for so long, what it adds to a step, the clocks."""
    begun = time.perf_counter()
    with quiet_log(b) as logged, Sampler(gpu_of(b) if b.m.rank == 0 else None) as sampler:
        blocks, half = run_blocks(b, loops(b, run, loader, logged), seconds)
    later = blocks[len(blocks) // 2 :]
    of = {x["which"]: [y["ms"] for y in later if y["which"] == x["which"]] for x in blocks}
    row = b.report["sustained"] = dict(
        seconds=time.perf_counter() - begun, blocks=blocks, gpu=sampler.figures(half)
    )
    for name, what in (("fixed", "one batch"), ("training", "all of training")):
        if name in of:
            row[f"{name}_ms"] = sum(of[name]) / len(of[name])
            b.say(
                f"bench sustained step, {what}: {row[f'{name}_ms']:.2f} ms/step (later half of "
                f"{row['seconds']:.1f} s, {len(of[name])} blocks of {later[0]['steps']} steps: "
                f"{min(of[name]):.2f} to {max(of[name]):.2f})"
            )
    if "training" in of:
        pairs = [z - a for a, z in zip(of["fixed"], of["training"])]
        row["loader_log_clock_ms"] = row["training_ms"] - row["fixed_ms"]
        between = [x["between_ms"] for x in later if x["which"] == "training"]
        row["between_steps_ms"] = sum(between) / len(between)
        b.say(
            f"bench sustained loader + log + clock check: {row['loader_log_clock_ms']:.2f} ms/step "
            f"(pairs of blocks: {min(pairs):.2f} to {max(pairs):.2f}); by the device's clock "
            f"{row['between_steps_ms']:.2f} pass between two steps"
        )
    gpu = row["gpu"]
    if "why" in gpu:
        b.say(f"bench sustained clocks: not available ({gpu['why']})")
        return
    low, high = gpu["sm_mhz_range"]
    power = "power not told" if gpu["power_w"] is None else f"power {gpu['power_w']:.0f} W"
    held = ", ".join(f"{name} in {n}" for name, n in gpu["reasons"].items()) or "nothing holds them down"
    b.say(
        f"bench sustained clocks: SM {gpu['sm_mhz']:.0f} MHz ({low:.0f} to {high:.0f}), {power}; "
        f"of {gpu['samples']} readings: {held}"
    )


# ---- kernels of the compiled pass ----------------------------------------------------------------

CLASSES = (
    ("attention", re.compile(r"sdpa|fmha|flash|attention", re.I)),
    ("matrix products", re.compile(r"nvjet|cutlass|gemm|gemv|cublas|xmma|splitK|triton_tem", re.I)),
    ("Inductor reductions", re.compile(r"^triton_(red|per|mix)_")),
    ("Inductor pointwise", re.compile(r"^triton_")),
    ("copies and fills", re.compile(r"^mem(cpy|set)", re.I)),
)


def kernel_class(name: str, own: set[str]) -> str:
    """The class of a kernel by its name. own: the script's Triton kernels."""
    if name in own:
        return "our kernels"
    return next((label for label, pattern in CLASSES if pattern.search(name)), "others (ATen)")


def kernel_tables(events: list[dict], own: set[str], passes: int) -> dict:
    """{classes, kernels} of a chrome trace's events: ms and launches of a pass, largest first."""
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            found.setdefault(event["name"], []).append(event["dur"] / 1000)
    kernels = [
        dict(name=name, which=kernel_class(name, own), ms=sum(ms) / passes, count=len(ms) / passes)
        for name, ms in found.items()
    ]
    kernels.sort(key=lambda k: -k["ms"])
    classes: dict[str, dict] = {}
    for k in kernels:
        row = classes.setdefault(k["which"], dict(which=k["which"], ms=0.0, count=0.0))
        row["ms"], row["count"] = row["ms"] + k["ms"], row["count"] + k["count"]
    return dict(classes=sorted(classes.values(), key=lambda c: -c["ms"]), kernels=kernels)


def own_kernels(path: Path) -> set[str]:
    return set(re.findall(r"^@triton\.jit\s+def (\w+)", path.read_text(encoding="utf-8"), re.M))


def profile(b: Bench, run: Trained, script: Path) -> None:
    """One trace of the compiled forward+backward, its kernels by class and the largest of them."""
    if not b.cuda:
        b.skip("profile", "kernels are traced on a GPU")
        return
    passes, kinds = 3, torch.profiler.ProfilerActivity
    run.both()
    b.m.sync()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as trace:
        for _ in range(passes):
            run.both()
        b.m.sync()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        trace.export_chrome_trace(path)
        with open(path, encoding="utf-8") as f:
            events = json.load(f)["traceEvents"]
    found = b.report["profile"] = kernel_tables(events, own_kernels(script), passes)
    rows = [(c["which"], "", f"{c['ms']:.3f}", f"{c['count']:.0f}") for c in found["classes"]]
    total = sum(c["ms"] for c in found["classes"])
    b.say(f"\nkernels of one forward+backward, {total:.3f} ms in all")
    b.say(table(("class", "", "ms", "launches"), rows))
    rows = [
        (k["name"][:100], k["which"], f"{k['ms']:.3f}", f"{k['count']:.0f}") for k in found["kernels"][:TOP]
    ]
    b.say(f"\nthe {len(rows)} largest kernels\n" + table(("kernel", "class", "ms", "launches"), rows))


# ---- candidates ----------------------------------------------------------------------------------


def read_candidates(path: Path, t: ModuleType) -> dict[str, list[tuple]]:
    """{name: [(path, function), ...]} of a file, run with `t` in its scope. BadInput: it has none."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as e:
        raise BadInput(f"{path}: cannot read the candidates ({e.strerror})") from None
    name = f"{t.__name__}_candidates"  # a module, for torch.compile looks names up there
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update(t=t, __file__=str(path))
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as e:
        raise BadInput(f"{path}: does not run ({type(e).__name__}: {e}); mend it") from None
    given = getattr(module, "CANDIDATES", None)
    if not isinstance(given, dict) or not given:
        raise BadInput(f"{path}: defines no CANDIDATES = {{name: (path, function)}}")
    return {str(key): value if isinstance(value, list) else [value] for key, value in given.items()}


def replace(t: ModuleType, ops: Any, pairs: list[tuple]) -> tuple[Any, set[str]]:
    """Put the functions in their places in the copy `t`. Returns (the machine's ops with them, the paths)."""
    paths = set()
    for path, function in pairs:
        path = path.removeprefix("t.")
        *owners, last = path.split(".")
        owner = t
        for name in owners:
            owner = getattr(owner, name)
        before = getattr(owner, last)
        setattr(owner, last, function)
        for field, default in t.Ops._field_defaults.items():
            if default is before:  # a machine may have bound another in its place
                ops = ops._replace(**{field: function})
        paths.add(path)
    return ops, paths


def visible(docs: Tensor, window: int) -> Tensor:
    """(..., T, T) bool, query down, key across. docs (..., T): numbers of the tokens' documents."""
    T = docs.size(-1)
    seen = torch.ones(T, T, dtype=torch.bool, device=docs.device).tril().triu(1 - (window or T))
    return seen & (docs[..., None] == docs[..., None, :])


def attend_exact(q: Tensor, k: Tensor, v: Tensor, window: int = 0, docs: Tensor | None = None) -> Tensor:
    """attend_sdpa in any dtype, written out: fused kernels know no float64."""
    repeat, docs = q.size(2) // k.size(2), q.new_zeros(1, q.size(1)) if docs is None else docs
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.size(-1) ** -0.5
    scores = scores.masked_fill(~visible(docs, window)[:, None], float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def relative(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()


def forgiven(x: Tensor | None, exact: Tensor) -> float:
    """The relative error of a gradient, less what chance may do where it has few numbers. None: not made."""
    error = 1.0 if x is None else relative(x, exact)
    return max(error - CHANCE, 0.0) if exact.numel() < FEW and error >= 0 else error


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def reference(b: Bench, run: Trained, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the plain lines in float64, a sequence at a time."""
    model = quick_model(b.t, b.h, b.t.Ops(attend=attend_exact), torch.float64, b.m.device).double()
    adopt(model, run.model)
    total = torch.zeros((), dtype=torch.float64, device=b.m.device)
    for one in rows.split(1):
        loss = model.loss(one[:, :-1], one[:, 1:]) / len(rows)
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


@torch.no_grad()
def adopt(model: Any, other: Any) -> None:
    """The other model's weights, and which of them move."""
    for p, source in zip(model.parameters(), other.parameters()):
        p.copy_(source)
        p.requires_grad_(source.requires_grad)


def model_errors(model: Any, loss_fn: Callable, rows: Tensor, exact: tuple) -> dict:
    """Errors of one compiled forward and backward: loss, all gradients together, the worst parameter."""
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad.zero_()
    loss = loss_fn(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    loss.backward()
    found = gradients(model)
    flat = lambda tensors: torch.cat([tensors[name].double().flatten() for name in exact[1]])
    worst = {name: forgiven(found[name], exact[1][name]) for name in found}
    name = max(worst, key=lambda name: math.inf if math.isnan(worst[name]) else worst[name])
    return dict(
        loss=relative(loss.detach(), exact[0]),
        gradients=relative(flat(found), flat(exact[1])),
        worst=worst[name],
        worst_parameter=name,
    )


def section_errors(b: Bench, t: ModuleType, ops: Any, name: str) -> dict:
    """Errors of a section's outputs and gradients on one sequence, uncompiled; exact: plain float64 lines."""
    one = b._replace(rows=1)
    pick = lambda *how: next(s for s in sections_of(one, *how) if s.name == name)
    s, plain = pick(t, ops, b.m.dtype), pick(b.t, b.t.Ops(attend=attend_exact), torch.float64)
    torch.manual_seed(0)  # every candidate meets the numbers that the plain lines met
    args = s.inputs()
    doubles = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in args
    ]
    outs, exact = as_list(s.fn(*args)), as_list(plain.fn(*doubles))
    douts = [torch.randn_like(x) for x in outs]
    got = torch.autograd.grad(outs, leaves_of(s, args), douts, allow_unused=True)
    same = [d.to(x.dtype) for d, x in zip(douts, exact)]
    true = torch.autograd.grad(exact, leaves_of(plain, doubles), same, allow_unused=True)
    worst = [forgiven(x, y) for x, y in zip(got, true) if y is not None]
    largest = lambda errors: max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    return dict(forward=largest([relative(x, y) for x, y in zip(outs, exact)]), gradients=largest(worst))


def in_pairs(b: Bench, plain: Trained, other: Trained) -> list[tuple[float, float]]:
    """ms of forward+backward, (plain, other), one after the other: a drift of the clocks meets both."""
    times = []
    for i in range(12):
        pair = {}
        for one in (plain, other) if i % 2 else (other, plain):
            b.m.sync()
            start = time.perf_counter()
            one.both()
            b.m.sync()
            pair[one is other] = 1000 * (time.perf_counter() - start)
        times.append((pair[False], pair[True]))
    return times[2:]


def judge(b: Bench, run: Trained, pairs: Callable, name: str, exact: tuple, known: dict) -> dict:
    """Figures of one candidate beside the plain lines'. pairs: a copy of the script -> its replacements.

    exact: loss and gradients in float64, the plain lines' errors. known: the plain sections' figures, kept.
    """
    script = Path(b.t.__file__)
    t = load_script(script, f"{MODULE}_{re.sub(r'[^A-Za-z0-9]', '_', name)}")
    ops, paths = replace(t, b.m.ops, pairs(t))
    model = quick_model(t, b.h, ops, b.m.dtype, b.m.device)
    adopt(model, run.model)
    other = run._replace(model=model, loss_fn=b.m.compile(model.loss))
    row = dict(
        name=name,
        paths=sorted(paths),
        plain=exact[2],
        errors=model_errors(model, other.loss_fn, run.batches[0], exact),
        sections=[],
    )
    times = in_pairs(b, run, other)
    row |= dict(
        plain_ms=median([p for p, _ in times]),
        ms=median([c for _, c in times]),
        wins=sum(c < p for p, c in times),
        pairs=len(times),
    )
    e = row["errors"]
    b.say(
        f"candidate {name} ({', '.join(row['paths'])}): forward+backward {row['ms']:.3f} ms, plain "
        f"{row['plain_ms']:.3f}; error of loss {e['loss']:.1e}, of gradients {e['gradients']:.1e}, "
        f"worst {e['worst']:.1e} ({e['worst_parameter']})"
    )
    used = lambda how: [s for s in sections_of(b, *how, b.m.dtype) if paths & set(s.uses)]
    for s, plain in zip(used((t, ops)), used((b.t, b.m.ops))):
        try:
            if s.name not in known:
                known[s.name] = (*time_section(b, plain), section_errors(b, b.t, b.m.ops, s.name))
            (pf, pb, errors), (f, bw) = known[s.name], time_section(b, s)
            row["sections"].append(
                dict(
                    section=s.name,
                    plain_forward_ms=pf,
                    plain_backward_ms=pb,
                    forward_ms=f,
                    backward_ms=bw,
                    plain_errors=errors,
                    errors=section_errors(b, t, ops, s.name),
                )
            )
            b.say(candidate_section(row["sections"][-1]))
        except Exception as error:
            b.skip(f"candidate {name}, section {s.name}", error)
    row["verdict"] = verdict(row)
    b.say(f"candidate {name}: {row['verdict']}")
    return row


def candidate_section(s: dict) -> str:
    return (
        f"  {s['section']}: forward {s['forward_ms']:.4f} ms, plain {s['plain_forward_ms']:.4f}; "
        f"backward {s['backward_ms']:.4f}, plain {s['plain_backward_ms']:.4f}; errors "
        f"{s['errors']['forward']:.1e} {s['errors']['gradients']:.1e}, plain "
        f"{s['plain_errors']['forward']:.1e} {s['plain_errors']['gradients']:.1e}"
    )


def verdict(row: dict) -> str:
    """keep, or drop and why: a suggestion, from one run on one machine. nan is too large an error."""
    figures = [
        (f"{key} error", row["errors"][key], row["plain"][key]) for key in ("loss", "gradients", "worst")
    ]
    for s in row["sections"]:
        figures += [
            (f"{s['section']}, {key} error", s["errors"][key], s["plain_errors"][key]) for key in s["errors"]
        ]
    for what, error, plain in figures:
        one = what == "loss error" or what.startswith("head") and "forward" in what
        if not error <= ERROR_SLACK * plain + (1e-3 if one else 1e-5):  # of one number chance leaves any
            return f"drop ({what} {error:.1e}, plain {plain:.1e})"
    gain, wins = row["ms"] / row["plain_ms"], f"faster in {row['wins']} of {row['pairs']} pairs"
    if gain < GAIN and row["wins"] >= WINS * row["pairs"]:
        return f"keep ({100 * (1 - gain):.1f} % faster, {wins})"
    return f"drop (takes {100 * gain:.1f} % of the time, {wins})"


def judge_candidates(b: Bench, run: Trained, path: Path, names: list[str]) -> None:
    """Plain and every candidate, line by line. One that fails says why, and the others go on."""
    b.say(f"\ncandidates: {', '.join(names)}; first the plain lines, compiled and in float64")
    with torch.no_grad():
        scatter(run.model)
    exact = reference(b, run, run.batches[0])
    plain = model_errors(run.model, run.loss_fn, run.batches[0], exact)
    b.say(
        f"plain lines: error of loss {plain['loss']:.1e}, of gradients {plain['gradients']:.1e}, "
        f"worst {plain['worst']:.1e} ({plain['worst_parameter']})"
    )
    rows, known = b.report["candidates"], {}
    for name in names:
        try:
            row = judge(b, run, lambda t: read_candidates(path, t)[name], name, (*exact, plain), known)
        except Exception as error:
            b.skip(f"candidate {name}", error)
            b.report["skipped"][-1]["trace"] = traceback.format_exc()
            b.say("".join(traceback.format_exception_only(type(error), error)).rstrip())
            continue
        rows.append(row)


# ---- the command ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(f"{message}; --help says what bench takes")


def parse(argv: list[str]) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("knobs", nargs="*", metavar="key=value", help="knobs of Config: preset=h100x1 ...")
    add(
        "--script",
        type=Path,
        default=Path(__file__).resolve().parents[2] / "train_gpt.py",
        metavar="PATH",
        help="the train_gpt.py to time; without it the repository's",
    )
    add("--json", type=Path, metavar="FILE", help="write every figure there, too")
    add("--candidates", type=Path, metavar="FILE.py", help="compare the replacements in its CANDIDATES")
    add("--only", metavar="NAME,NAME", help="of the candidates")
    add("--all", action="store_true", help="with --candidates: all that bench prints without them, too")
    add(
        "--sustain",
        type=float,
        metavar="S",
        help=f"seconds of training's own loop ({SUSTAIN:g} on a GPU, 0 on a CPU; 0: none)",
    )
    add(
        "--timeline",
        type=Path,
        metavar="FILE.json",
        help="instead: trace whole steps: compute, communication, what of it is seen (tools/lab/timeline.py)",
    )
    add("--steps", type=int, default=5, metavar="N", help="that the timeline shows (5)")
    add(
        "--attention",
        action="store_true",
        help="instead: time every attention of this machine on several masks (tools/lab/attention.py)",
    )
    add("--paths", metavar="NAME,NAME", help="of the attention: cudnn, flash, varlen, flex, flash4, ...")
    add(
        "--seconds",
        type=float,
        default=100.0,
        metavar="S",
        help="begin no further section after this long (100; neither --sustain nor candidates count)",
    )
    args = parser.parse_intermixed_args(argv)
    if args.json and not args.json.resolve().parent.is_dir():
        raise BadInput(f"--json {args.json}: no such folder; make it first")
    if args.only and not args.candidates:
        raise BadInput("--only needs --candidates FILE.py")
    if args.all and not args.candidates:
        raise BadInput("--all needs --candidates FILE.py; without them bench measures all anyway")
    if args.sustain is not None and not 0 <= args.sustain < math.inf:
        raise BadInput(f"--sustain {args.sustain:g}: not a number of seconds")
    if args.sustain is not None and (args.attention or args.timeline or args.candidates and not args.all):
        raise BadInput(
            "--sustain is of bench's own lines: leave out --attention and --timeline, and add --all "
            "to --candidates"
        )
    if args.paths is not None and not args.attention:
        raise BadInput("--paths needs --attention")
    return args


def chosen(args: argparse.Namespace, t: ModuleType) -> list[str]:
    """Names of the candidates to compare, known before anything is measured."""
    if args.candidates is None:
        return []
    names = list(read_candidates(args.candidates, t))
    only = args.only.split(",") if args.only else names
    if lost := [name for name in only if name not in names]:
        raise BadInput(f"--only {lost[0]}: not in {args.candidates}, which has {', '.join(names)}")
    return only


def measure_steps(b: Bench, trained: Trained, accum: int, seconds: float | None) -> Bench:
    """Medians of all that a step does, then it for `seconds`, None: as the device wants it. The deadline of
    what follows is later by these."""
    time_whole(b, trained, accum)
    loader, begun = time_loader(b), time.perf_counter()
    if seconds is None and not b.cuda:
        b.skip("sustained steps", "a CPU runs them only with --sustain SECONDS")
    elif seconds != 0:
        try:
            sustained(b, trained, loader, SUSTAIN if seconds is None else seconds)
        except Exception as error:  # whatever a driver raises, or training that diverged
            b.skip("sustained steps", error)
    return b._replace(deadline=b.deadline + time.perf_counter() - begun)


def run_bench(args: argparse.Namespace, t: ModuleType, env: Mapping[str, str]) -> int:
    started = time.perf_counter()
    h, names = t.load_config(args.knobs, env), chosen(args, t)
    m = t.init_machine(h, env)
    accum, rows = t.cut_batch(h, m.world_size)
    source = args.script.read_bytes()
    report = dict(
        schema=1,
        device=m.names["device"],
        machine=m.names,
        torch=torch.__version__,
        dtype=str(m.dtype)[6:],
        script_sha256=hashlib.sha256(source).hexdigest(),
        world_size=m.world_size,
        rows=rows,
        seq_len=h.train_seq_len,
        accum=accum,
        config=dataclasses.asdict(h),
        whole=[],
        sections=[],
        candidates=[],
        skipped=[],
    )
    b = Bench(t, h, m, rows, report, started + args.seconds)
    everything = args.all or not names
    trained, parts = build(b, everything), {}
    if everything:
        b = measure_steps(b, trained, accum, args.sustain)
        parts = {"profile": lambda: profile(b, trained, args.script), "sections": lambda: time_sections(b)}
    if names:
        parts["candidates"] = lambda: judge_candidates(b, trained, args.candidates, names)
    for what, fn in parts.items():
        try:
            fn()
        except Exception as error:
            b.skip(what, error)
    report["seconds"] = time.perf_counter() - started
    if args.json and m.rank == 0:
        args.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        b.say(f"json: {args.json}")
    return 0


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """Measure; what a user can mend is said in one line. Returns the exit status."""
    mendable: tuple[type, ...] = (BadInput,)
    try:
        args = parse(argv)
        if args.attention:
            from lab import attention

            return attention.run(args, env)
        if args.timeline:
            from lab import timeline

            return timeline.run(args, env)
        t = load_script(args.script)
        mendable += (t.InputError,)
        return run_bench(args, t, env)
    except mendable as e:
        print(f"bench.py: {e}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            traceback.clear_frames(sys.exc_info()[2])  # NCCL waits for every graph that holds its work
            gc.collect()
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
