"""Times every attention of this machine, forward and backward, on the masks and head sizes a model may want.

    ./run.sh bench --attention [--paths flash,flex] [--json FILE] [key=value ...]
    ./run.sh bench --attention preset=h100x1 train_batch_tokens=98304 micro_batch_tokens=98304

Tensors are a layer's, of one micro-batch: q (B, T, H, Dh), k and v (B, T, Hkv, Dh), contiguous, random. Two
layouts: the config's heads, and half as many of twice the size. Masks, all causal: `causal`; `documents` (a
token sees its own document; lengths are exponential of mean 1,000, or T / 2 if that is less, and seeded;
every row begins a document and its end cuts the last); `window W` (a token sees itself and the W - 1 before
it; 512 and 256, at most T / 2 and T / 4); both together.

Paths. cudnn, flash, efficient, math: the trainer's attend_sdpa with that backend of PyTorch, `causal` only
but for efficient, which takes a mask; math runs on a GPU only when --paths names it. varlen:
torch.nn.attention.varlen. flex: flex_attention, compiled, with a block mask that is made off the clock.
flash4: the trainer's attend_flash4, compiled as there (FlashAttention-4, package flash-attn-4). Where a
kernel wants a mask or as many k and v heads as q heads, making these is part of its time; the row says so.

Before a path is timed, its output, dq, dk and dv in the first and the last row of the batch are compared with
plain float64 lines: |x - x64| / |x64|. Beyond 2 % it is wrong and not timed. A path that raises is skipped,
says why, and the others go on. us: median of a layer by the device's clock, with a product ahead of each call
so that launches by the host do not count; backward is forward + backward less forward. TFLOP/s: products of
visible pairs only, 4 Dh a pair and head forward, 2.5 times that backward. A CPU has no backward of flex.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import inspect
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab import bench
from ledger import runlog
from ledger import views
from script import BadInput

MEAN = 1000  # tokens of a document on average, before rows cut the last one
WRONG = 0.02  # relative error beyond which a path is not timed; bfloat16 makes 0.004
WARM, CALLS = 3, 15  # calls ahead of the timed ones, and those
FILLER = 8192  # side of the product ahead of a timed call: 1.7 ms on an H100
BACKWARD = 2.5  # products of a backward over those of a forward: five for two
PACKAGES = ("triton", "flash-attn-4")
COLUMNS = {
    "path": -10,
    "forward us": 12,
    "backward us": 13,
    "both us": 11,
    "TF/s fwd": 10,
    "TF/s bwd": 10,
    "err out": 9,
    "err dq": 9,
    "err dk": 9,
    "err dv": 9,
}  # and their widths; negative: left
ERRORS = ("out", "dq", "dk", "dv")


class Unfit(Exception):
    """What a path cannot do here, and why: one line."""


# ---- shapes and masks ----------------------------------------------------------------------------


class Layout(NamedTuple):
    """Heads of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads} head(s) of {self.head_dim}, {self.kv_heads} KV"


class Mask(NamedTuple):
    """Who sees whom. window: tokens seen, itself included; 0: all before it.

    bounds: where the sequences begin in the flat batch, and its end: documents, or else rows.
    """

    name: str
    window: int
    documents: bool
    bounds: list[int]

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.bounds)]

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of the batch, of one head."""
        least = [min(n, self.window or n) for n in self.lengths]
        return sum(m * (m + 1) // 2 + (n - m) * m for n, m in zip(self.lengths, least))


def layouts_of(h) -> list[Layout]:
    """The config's heads and, where their number is even, half as many of twice the size."""
    found = [Layout(h.num_heads, h.num_kv_heads, h.head_dim)]
    if h.num_heads % 2 == 0:
        kv = 1 if h.num_kv_heads % 2 else h.num_kv_heads // 2
        found.append(Layout(h.num_heads // 2, kv, 2 * h.head_dim))
    return found


def document_bounds(rows: int, T: int, seed: int = 0) -> list[int]:
    """Bounds of exponential documents packed into rows of T tokens; the end of a row cuts the last one."""
    rng, bounds, mean = random.Random(seed), [0], max(min(MEAN, T // 2), 1)
    for row in range(rows):
        while bounds[-1] < (row + 1) * T:
            bounds.append(min(bounds[-1] + 1 + int(rng.expovariate(1 / mean)), (row + 1) * T))
    return bounds


def masks_of(rows: int, T: int) -> list[Mask]:
    """Windows are 512 and 256 tokens, less where a row has no room for them to matter."""
    whole, cut = [*range(0, rows * T + 1, T)], document_bounds(rows, T)
    wide, narrow = max(min(512, T // 2), 1), max(min(256, T // 4), 1)
    return [
        Mask("causal", 0, False, whole),
        Mask("documents", 0, True, cut),
        Mask(f"window {wide}", wide, False, whole),
        Mask(f"window {narrow}", narrow, False, whole),
        Mask(f"documents, window {wide}", wide, True, cut),
    ]


class Case(NamedTuple):
    """A layer's tensors and a mask. ids (B, T) int32: the number of a token's document or row."""

    b: bench.Bench
    layout: Layout
    mask: Mask
    tensors: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    bounds: Tensor
    ids: Tensor

    @property
    def how(self) -> dict:
        """window and docs of the trainer's attend_ functions."""
        return dict(window=self.mask.window, docs=self.ids - self.ids[:, :1] if self.mask.documents else None)


def make_case(b: bench.Bench, layout: Layout, mask: Mask) -> Case:
    B, T, device = b.rows, b.h.train_seq_len, b.m.device
    torch.manual_seed(0)
    draw = lambda heads: torch.randn(B, T, heads, layout.head_dim, device=device, dtype=b.m.dtype)
    tensors = tuple(draw(n).requires_grad_() for n in (layout.heads, layout.kv_heads, layout.kv_heads))
    numbers = torch.arange(len(mask.lengths), dtype=torch.int32)
    ids = numbers.repeat_interleave(torch.tensor(mask.lengths)).view(B, T).to(device)
    bounds = torch.tensor(mask.bounds, dtype=torch.int32, device=device)
    return Case(b, layout, mask, tensors, draw(layout.heads), bounds, ids)


# ---- paths ---------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """A path on one case: (q, k, v) -> (B, T, H, Dh); what its time includes; whether it has a backward."""

    attend: Callable
    note: str = ""
    backward: bool = True


class Path(NamedTuple):
    """bind: Case -> Bound, whatever it raises skips the row. causal_only: other masks are not tried."""

    bind: Callable
    causal_only: bool = False


REPEATS = "k, v heads repeated"


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As many k and v heads as q heads; a copy."""
    n = q.size(2) // k.size(2)
    return q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2)


def sdpa(backend: SDPBackend) -> Path:
    """The trainer's attend_sdpa by one backend that groups heads."""

    def bind(c: Case) -> Bound:
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return c.b.t.attend_sdpa(q, k, v, **c.how)

        return Bound(attend)

    return Path(bind, causal_only=True)


def efficient(c: Case) -> Bound:
    """The backend that takes a mask but as many k and v heads as q heads: with a mask attend_sdpa repeats them,
    without one it has no form for it."""
    how, masked = c.how, c.mask.documents or c.mask.window > 0

    def causal(q, k, v):
        heads = (x.transpose(1, 2) for x in repeated(q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    def attend(q, k, v):
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return c.b.t.attend_sdpa(q, k, v, **how) if masked else causal(q, k, v)

    return Bound(attend, f"{REPEATS}, mask made" if masked else REPEATS)


def varlen(c: Case) -> Bound:
    """torch.nn.attention.varlen. torch 2.10 knows no window, 2.11 no grouped heads: the signature tells."""
    from torch.nn.attention.varlen import varlen_attn

    known, window, longest = inspect.signature(varlen_attn).parameters, c.mask.window, max(c.mask.lengths)
    if window and "window_size" not in known:
        raise Unfit(f"varlen_attn of torch {torch.__version__} has no window_size")
    how = dict(is_causal=True)
    if "window_size" in known:
        how = dict(window_size=(window - 1 if window else -1, 0))
    if grouped := "enable_gqa" in known:
        how["enable_gqa"] = True

    def attend(q, k, v):
        flat = (x.flatten(0, 1) for x in ((q, k, v) if grouped else repeated(q, k, v)))
        return varlen_attn(*flat, c.bounds, c.bounds, longest, longest, **how).view(q.shape)

    return Bound(attend, "" if grouped else REPEATS)


def flex(c: Case) -> Bound:
    """flex_attention, compiled anew for each mask: one function's recompilations are few."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ids, window, T = c.ids, c.mask.window, c.ids.size(1)
    rules = {
        (False, False): lambda b, h, i, j: i >= j,
        (False, True): lambda b, h, i, j: (i >= j) & (i - j < window),
        (True, False): lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j]),
        (True, True): lambda b, h, i, j: (i >= j) & (i - j < window) & (ids[b, i] == ids[b, j]),
    }
    rule = rules[c.mask.documents, window > 0]
    blocks = create_block_mask(rule, len(ids) if c.mask.documents else None, None, T, T, device=ids.device)
    torch.compiler.reset()
    compiled = c.b.m.compile(flex_attention)

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    return Bound(attend, "" if c.b.cuda else "no backward on a CPU", backward=c.b.cuda)


def flash4(c: Case) -> Bound:
    """The trainer's attend_flash4, compiled as in its model: bounds of documents are part of its time."""
    import flash_attn.cute.interface  # noqa: F401              # where it is missing nothing is compiled

    how, most = c.how, c.b.t.DOCUMENTS
    if how["docs"] is not None and (count := int(how["docs"].max()) + 1) > most:
        raise Unfit(f"{count} documents in a row: attend_flash4 keeps {most} apart")
    torch.compiler.reset()  # one function's recompilations are few
    compiled = c.b.m.compile(c.b.t.attend_flash4)
    return Bound(lambda q, k, v: compiled(q, k, v, **how))


PATHS = {
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient": Path(efficient),
    "math": sdpa(SDPBackend.MATH),
    "varlen": Path(varlen),
    "flex": Path(flex),
    "flash4": Path(flash4),
}


# ---- exact ---------------------------------------------------------------------------------------


def exact_row(c: Case, row: int) -> list[Tensor]:
    """(1, T, heads, Dh) of the output, dq, dk and dv of one row, in float64."""
    leaves = [x[row : row + 1].detach().double().requires_grad_() for x in c.tensors]
    out = bench.attend_exact(*leaves, c.mask.window, c.ids[row : row + 1])
    return [out.detach(), *torch.autograd.grad(out, leaves, c.dout[row : row + 1].double())]


def exact(c: Case) -> dict[int, list[Tensor]]:
    """Of the rows that are compared: the first and the last."""
    return {row: exact_row(c, row) for row in sorted({0, c.b.rows - 1})}


def errors_of(found: list[Tensor], true: dict[int, list[Tensor]]) -> dict[str, float]:
    """Of output, dq, dk, dv, as far as found goes."""
    rows, errors = list(true), {}
    for i, (name, x) in enumerate(zip(ERRORS, found)):
        errors[name] = bench.relative(x.detach()[rows], torch.cat([true[row][i] for row in rows]))
    return errors


# ---- clocks --------------------------------------------------------------------------------------


def micros(b: bench.Bench, fn: Callable, ahead: Callable) -> float:
    """Median us of fn(). ahead: queues device work that keeps the device busy while the host launches fn."""
    if not b.cuda:
        return 1000 * bench.call_ms(b, [fn])
    for _ in range(WARM):
        fn()
    event = lambda: torch.cuda.Event(enable_timing=True)
    events = [(event(), event()) for _ in range(CALLS)]
    for start, end in events:
        ahead()
        start.record()
        fn()
        end.record()
    b.m.sync()
    return 1000 * bench.median([start.elapsed_time(end) for start, end in events])


def filler(b: bench.Bench) -> Callable:
    if not b.cuda:
        return lambda: None
    x = torch.randn(FILLER, FILLER, device=b.m.device, dtype=b.m.dtype)
    y = torch.empty_like(x)
    return lambda: torch.mm(x, x, out=y)


def measured(c: Case, path: Path, true: dict, ahead: Callable) -> dict:
    """Errors and, where these are small, times of a path."""
    bound = path.bind(c)
    tensors = c.tensors if bound.backward else [x.detach() for x in c.tensors]
    forward = lambda: bound.attend(*tensors)  # as in training: what a backward needs is kept

    def both():
        out = forward()
        return [out, *(torch.autograd.grad(out, tensors, c.dout) if bound.backward else ())]

    errors = errors_of(both(), true)
    row = dict(note=bound.note, errors={k: e if math.isfinite(e) else None for k, e in errors.items()})
    if worst := [f"{k} {e:.1e}" for k, e in errors.items() if not e <= WRONG]:
        return row | dict(status="wrong", why="error of " + ", ".join(worst))
    flops = 4.0 * c.layout.head_dim * c.layout.heads * c.mask.pairs
    us = micros(c.b, forward, ahead)
    row |= dict(status="measured", forward_us=us, forward_tflops=flops / us / 1e6)
    if bound.backward:
        whole = micros(c.b, both, ahead)
        back = max(whole - us, 1e-3)  # of two medians: noise may cross zero
        row |= dict(both_us=whole, backward_us=back, backward_tflops=BACKWARD * flops / back / 1e6)
    return row


def attempt(c: Case, name: str, true: dict, ahead: Callable) -> dict:
    """A row of the report, whatever the path raises."""
    row = dict(layout=c.layout._asdict(), mask=c.mask.name, path=name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend is not chosen, that flex is not compiled
            return row | measured(c, PATHS[name], true, ahead)
    except Exception as error:  # whatever a kernel, a compiler or an import raises
        why = (str(error).strip().splitlines() or [""])[0]
        why = why if isinstance(error, Unfit) else f"{type(error).__name__}: {why}"
        return row | dict(status="skipped", why=why)


# ---- tables --------------------------------------------------------------------------------------


def cells(values: list[str]) -> str:
    """A line of the table, after its columns."""
    return "".join(f"{x:<{-w}}" if w < 0 else f"{x:>{w}}" for x, w in zip(values, COLUMNS.values()))


def line_of(row: dict) -> str:
    """A row as printed; '-': it has no backward."""
    if row["status"] != "measured":
        return cells([row["path"]]) + f"{row['status']}: {row['why'][:120]}"
    us = [f"{row[key]:,.1f}" if key in row else "-" for key in ("forward_us", "backward_us", "both_us")]
    rates = [f"{row[key]:.4g}" if key in row else "-" for key in ("forward_tflops", "backward_tflops")]
    errors = [f"{row['errors'][key]:.1e}" if key in row["errors"] else "-" for key in ERRORS]
    return f"{cells([row['path'], *us, *rates, *errors])}  {row['note']}".rstrip()


def fastest(rows: list[dict]) -> dict[str, dict]:
    """Row of least time for forward, backward and both; empty when nothing was measured."""
    found = {}
    for key in ("forward", "backward", "both"):
        if timed := [row for row in rows if f"{key}_us" in row]:
            found[key] = min(timed, key=lambda row: row[f"{key}_us"])
    return found


def group(c: Case, names: list[str], ahead: Callable) -> list[dict]:
    """All paths on one case, each printed when it is there."""
    say, n, tokens = c.b.say, len(c.mask.lengths), sum(c.mask.lengths)
    about = f", {n:,} of {tokens / n:,.0f} tokens on average" if c.mask.documents else ""
    say(f"\n{c.layout}; {c.mask.name}{about}: {c.mask.pairs / tokens:,.0f} visible keys a query")
    say(cells(list(COLUMNS)))
    true, rows = exact(c), []
    for name in names:
        if c.mask.name == "causal" or not PATHS[name].causal_only:
            started = time.perf_counter()
            row = attempt(c, name, true, ahead)
            rows.append(row | dict(seconds=time.perf_counter() - started))  # compilation included
            say(line_of(row))
    best = fastest(rows)
    say("fastest: " + (", ".join(f"{key} {row['path']}" for key, row in best.items()) or "none ran"))
    return rows


def summary(rows: list[dict]) -> str:
    """The fastest path of every layout and mask, by forward + backward or, without one, by forward."""
    lines, groups = [f"{'heads':<26}{'mask':<26}{'fastest':<10}{'us a layer':>12}{'of causal':>11}"], {}
    for row in rows:
        groups.setdefault((Layout(**row["layout"]), row["mask"]), []).append(row)
    for (layout, mask), mine in groups.items():
        best, causal = fastest(mine), fastest(groups[layout, "causal"])
        key = next((key for key in ("both", "forward") if key in best), None)
        if key is None:
            lines.append(f"{layout!s:<26}{mask:<26}none")
            continue
        us = best[key][f"{key}_us"]
        share = f"{us / causal[key][f'{key}_us']:11.3f}" if key in causal else f"{'-':>11}"
        what = "" if key == "both" else "  forward only"
        lines.append(f"{layout!s:<26}{mask:<26}{best[key]['path']:<10}{us:12,.1f}{share}{what}")
    return "\n".join(lines)


# ---- the command ---------------------------------------------------------------------------------


def checked(args: argparse.Namespace) -> list[str] | None:
    """Paths asked for, None: all that the machine should try. BadInput before anything runs."""
    if args.timeline or args.candidates:
        other = "--timeline" if args.timeline else "--candidates"
        raise BadInput(f"--attention and {other} measure different things: give one of them")
    names = args.paths.split(",") if args.paths is not None else None
    if lost := [name for name in names or [] if name not in PATHS]:
        raise BadInput(f"--paths {lost[0] or '(empty)'}: not one of {', '.join(PATHS)}")
    return list(dict.fromkeys(names)) if names else None


def versions() -> dict[str, str]:
    """Of torch, what it brings, and whichever packages with kernels are installed."""
    found = dict(torch=torch.__version__, CUDA=torch.version.cuda, cuDNN=torch.backends.cudnn.version())
    found = {name: str(version) for name, version in found.items() if version is not None}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """The command. BadInput: what a user can mend."""
    started, names, t = time.perf_counter(), checked(args), bench.load_script(args.script)
    try:
        h = t.load_config(args.knobs, env)
        m = t.init_machine(h, env)
        rows = t.cut_batch(h, m.world_size)[1]
    except t.InputError as error:
        raise BadInput(str(error)) from None
    report = dict(
        schema=1,
        device=m.names["device"],
        machine=m.names,
        versions=versions(),
        dtype=str(m.dtype)[6:],
        world_size=m.world_size,
        rows=rows,
        seq_len=h.train_seq_len,
        config=dataclasses.asdict(h),
        layouts=[x._asdict() for x in layouts_of(h)],
        masks=[],
        table=[],
        skipped=[],
    )
    b = bench.Bench(t, h, m, rows, report, math.inf)
    names = names or [name for name in PATHS if name != "math" or not b.cuda]
    b.say(
        f"attention of a layer: {rows} x {h.train_seq_len} tokens, {report['dtype']}, device "
        + ", ".join([report["device"], *(f"{k} {v}" for k, v in report["versions"].items())])
    )
    if len(report["layouts"]) == 1:
        b.skip("the second layout", f"num_heads={h.num_heads} is odd: it cannot be halved")
    masks, ahead = masks_of(rows, h.train_seq_len), filler(b)
    report["masks"] = [
        dict(name=x.name, window=x.window, documents=x.documents, sequences=len(x.lengths), pairs=x.pairs)
        for x in masks
    ]
    for layout in layouts_of(h):
        for mask in masks:
            report["table"] += group(make_case(b, layout, mask), names, ahead)
    b.say("\nforward + backward, the fastest path of each\n" + summary(report["table"]))
    report["seconds"] = time.perf_counter() - started
    b.say(f"\n{report['seconds']:.0f} s")
    if args.json and m.rank == 0:
        try:
            views.write_atomic(args.json, json.dumps(report, indent=1, sort_keys=True) + "\n")
        except runlog.BadInput as error:
            raise BadInput(str(error)) from None
        b.say(f"json: {args.json}")
    return 0
