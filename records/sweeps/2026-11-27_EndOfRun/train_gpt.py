"""bankshot: the best small language model that ten minutes on 8 GPUs can train, shipped in 16 MB.

Task      minimise bits per byte (bpb) on the FineWeb validation split. Rules of openai/parameter-golf: 600 s
          of training on 8xH100; artifact + packed_code(this source) <= 16,000,000 bytes for every seed; the
          score is read back from that file.
Commands  torchrun --standalone --nproc_per_node=8 train_gpt.py                 the ten-minute attempt
          python train_gpt.py train preset=h100x1 data_path=DIR                 one GPU, 300 s of training
          python train_gpt.py train preset=cpu data_path=DIR                    a laptop, minutes
          python train_gpt.py eval ARTIFACT data_path=DIR                       score a file again
          python train_gpt.py audit ARTIFACT data_path=DIR                      is it legal? records/audit.py
          python train_gpt.py bench | config         time the step, records/bench.py | print the knobs
          Any knob of Config: `key=value` behind the command, or KEY=value in the environment.

Contents
  1. Config            every knob once, with its default; presets
  2. Machine           process group, device and compiler, the plain attention, log
  3. Tokens            shards on disk, the seeded document-aware loader
  4. Bytes             what a token weighs; the definition of bpb
  5. Blocks            norm, rope, attention, mlp as functions of their weights
  6. GPT               the parameter table, banks, one trunk
  7. Kernels           QK, MLP, FlashAttention-4, what is bound of them; the products of a direction
  8. Directions        ORTHO and STEP_RULES: how a momentum becomes a step
  9. Optimizer         sharded state, the schedule of every collective of a step
 10. Schedules         pure functions of progress
 11. Averaging         EMA whose horizon is a fraction of the run
 12. Artifact          quantize, byte layout, pack, unpack, packed source
 13. Score             windows that tile, one evaluator, test-time training
 14. Training          warm-up, clock, loop
 15. Commands          train, eval, audit, bench, config

Invariants (tests/ holds them)
  Importing this file has no effect. After Optimizer.step parameters are bit-equal on all ranks. The result
  depends on the seed, data order included, and not on the world size beyond reduction order. Score windows
  tile the split. The bpb denominator is the UTF-8 length of the text, the score that of the file on disk.
  Nothing compiles after the clock starts. No token's score depends on a later token.
"""
from __future__ import annotations

import base64
import glob
import hashlib
import json
import lzma
import math
import os
import platform
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# torch 2.13 renames these two; 2.11 knows only the old names
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# -----------------------------------------------------------------------------
# 1. Config: every knob once, with its default. The defaults are the eight-GPU attempt.

class InputError(Exception):
    """What a user can mend: one line that names the file, key or value and says what to do."""
    status = 2      # of the process


class Fault(InputError):
    """What went wrong in a run: one line that says where and when."""
    status = 1


@contextmanager
def explained(what: str, remedy: str, *errors: type[Exception]) -> Iterator[None]:
    """An OSError inside, or one of `errors`, becomes an InputError: what (the reason); remedy."""
    try:
        yield
    except (OSError, *errors) as e:
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}".splitlines()[0]
        raise InputError(f"{what} ({reason}); {remedy}") from None


@dataclass(frozen=True)
class Config:
    # the run
    preset: str = "record"
    run_id: str = ""                     # "": UTC time, preset and seed
    seed: int = 1337                     # initialisation and data order
    out_dir: str = "logs"                # OUT_DIR/RUN_ID.txt is the log, OUT_DIR/RUN_ID.int6.xz the artifact
    data_path: str = "data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = ""             # "": the one that DATA_PATH/manifest.json names
    report_split: str = ""               # a second split: scored and reported, never chosen by
    bos_id: int = 1                      # first token of every document
    checkpoint_every: float = 0.0        # seconds of the training clock; 0: none
    resume: str = ""                     # auto: newest checkpoint of RUN_ID, if there is one | its file
    # budget
    max_wallclock_seconds: float = 600.0  # training clock; 0: no limit
    iterations: int = 20000
    warmup_steps: int = 10               # compile and touch every shape, then everything is restored
    val_loss_every: int = 0              # steps; 0: no validation file is opened before the clock stops
    train_log_every: int = 50
    val_tokens: int = 0                  # score only the first this many targets; 0: the whole split
    # batch
    train_batch_tokens: int = 786_432    # per optimizer step, over all ranks
    micro_batch_tokens: int = 98_304     # per forward and rank
    train_seq_len: int = 2048
    mix_tokens: int = 16_777_216         # of training text, whose rows go to batches at random; 0: in order
    eval_seq_len: int = 2048
    eval_stride: int = 64                # sliding score: fresh tokens per window
    eval_batch_tokens: int = 131_072     # per forward and rank
    ttt_lr: float = 0.0                  # of test-time training, at first; 0: the weights stay as they are
    ttt_chunk_tokens: int = 32_768       # scored targets that are then learnt from
    ttt_passes: int = 3                  # over a chunk, an SGD step each
    # model
    vocab_size: int = 1024
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 4
    num_kv_heads: int = 2
    mlp_mult: float = 3.0
    rope_dims: int = 32                  # rotated dimensions of each head; the others are position-free
    rope_base: float = 10_000.0
    attn_windows: str = "256 256 256 0"  # keys that layers see in turn, the own included; 0: all
    doc_mask: bool = False               # no token sees another document
    xsa_last_n: int = 4                  # layers whose attention output drops its own value's direction
    ve_last_n: int = 2                   # layers whose values get a token embedding added
    ve_dim: int = 128
    bigram_vocab_size: int = 1536
    bigram_dim: int = 128
    logit_softcap: float = 30.0
    qk_gain_init: float = 1.5
    tied_embed_init_std: float = 0.005
    # optimizer
    ortho: str = "ns5"                   # row of ORTHO
    step_rule: str = "normuon"           # row of STEP_RULES
    matrix_lr: float = 0.05
    embed_lr: float = 0.035
    scalar_lr: float = 0.025
    muon_wd: float = 0.04
    adam_wd: float = 0.04
    muon_momentum: float = 0.99
    muon_momentum_start: float = 0.92
    muon_momentum_warmup_frac: float = 0.2   # of the run
    cautious_wd: bool = False            # matrices decay only where the step shrinks the weight, too
    normuon_beta2: float = 0.95          # horizon of the normuon rules' second moment
    proj_init_std: float = 0.0           # O and MLP-down; 0: zeros, hyperball 0.8/sqrt(model_dim)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.3               # global norm of the reduced gradients; 0: no clipping
    fp8: bool = True                     # the MLP's forward products in e4m3, in training, where a GPU can
    deterministic: bool = False          # one seed, one result on a GPU too, when iterations end the run
    wire_dtype: str = "float32"          # of gradients between ranks: float32 | bfloat16
    warmdown_frac: float = 0.5           # of the run: lr falls linearly to min_lr_frac
    min_lr_frac: float = 0.0
    # averaging and artifact
    ema_frac: float = 0.045              # horizon of the average, as a fraction of the run
    artifact_weights: str = "ema"        # ema | live
    gptq_batches: int = 1                # whose inputs say how int6 codes are rounded; 0: to the nearest
    int6_step: float = 0.0               # least int6 step, in standard deviations of the row
    fit_cap: bool = True                 # over the cap: raise int6_step until the submission fits
    size_cap: int = 16_000_000           # decimal bytes, packed code included

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)


FEW_STEPS = dict(muon_momentum=0.95, muon_momentum_start=0.85, warmdown_frac=0.6, ema_frac=0.02)
PRESETS: dict[str, dict] = {
    "record": {},
    "h100x1": FEW_STEPS | dict(max_wallclock_seconds=300.0, train_batch_tokens=262_144,
                               micro_batch_tokens=131_072, val_loss_every=500),
    "cpu": FEW_STEPS | dict(
        max_wallclock_seconds=120.0, iterations=100_000, warmup_steps=2, train_log_every=25,
        val_tokens=65_536, train_batch_tokens=2048, micro_batch_tokens=2048, train_seq_len=256,
        eval_seq_len=256, eval_batch_tokens=8192, num_layers=4, model_dim=128, num_heads=2, num_kv_heads=1,
        rope_dims=16, attn_windows="", xsa_last_n=2, ve_last_n=1, ve_dim=64, bigram_vocab_size=512,
        bigram_dim=64, gptq_batches=16),
}

# What an artifact must carry to be scored: its header holds these and, where it is scored so, TTT_FIELDS.
MODEL_FIELDS = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_dims",
                "rope_base", "xsa_last_n", "ve_last_n", "ve_dim", "bigram_vocab_size", "bigram_dim",
                "logit_softcap", "bos_id", "eval_seq_len", "eval_stride", "attn_windows", "doc_mask")
TTT_FIELDS = ("ttt_lr", "ttt_chunk_tokens", "ttt_passes")

FLAGS = {"0": False, "false": False, "1": True, "true": True}
PARSERS = {"int": int, "float": float, "str": str, "bool": lambda text: FLAGS[text.lower()]}


def load_config(argv: list[str], env: Mapping[str, str], artifact: Mapping | None = None) -> Config:
    """Defaults < preset < artifact's header < environment (KEY in capitals) < `key=value`; or InputError."""
    types = {f.name: f.type for f in fields(Config)}
    given = {k: env[k.upper()] for k in types if k.upper() in env}
    for arg in argv:
        key, equals, value = arg.partition("=")
        if not equals:
            raise InputError(f"argument {arg!r}: knobs are given as key=value")
        if key not in types:
            close = [k for k in types if key.lower() in k or k in key.lower()]
            hint = f"did you mean {', '.join(close)}?" if close else "`train_gpt.py config` lists them"
            raise InputError(f"unknown config key {key!r}; {hint}")
        given[key] = value
    values = PRESETS.get(given.get("preset"), {}) | dict(artifact or {})
    for key, text in given.items():
        try:
            values[key] = PARSERS[types[key]](text)
        except (ValueError, KeyError):
            raise InputError(f"config key {key}: {text!r} is not of type {types[key]}") from None
    h = Config(**values)
    check_config(h)
    return h


def check_config(h: Config) -> None:
    """Relations between knobs that the model and the loops rely on. InputError names the knob to change."""
    may_be_zero = ("seed", "bos_id", "warmup_steps", "val_loss_every", "val_tokens", "rope_dims",
                   "mix_tokens", "xsa_last_n", "bigram_vocab_size", "size_cap", "gptq_batches")
    for key, value in asdict(h).items():
        least = 1 if type(value) is int and key not in may_be_zero else 0
        if not isinstance(value, str) and not least <= value < 1 << 53:        # also refuses nan
            raise InputError(f"config key {key}: {str(value)[:40]} must be a number from {least} to 2^53")
    tables = {"preset": PRESETS, "ortho": ORTHO, "step_rule": STEP_RULES, "artifact_weights": ("ema", "live"),
              "wire_dtype": ("float32", "bfloat16")}
    for key, table in tables.items():
        if getattr(h, key) not in table:
            raise InputError(f"config key {key}: {getattr(h, key)!r} is not one of {', '.join(table)}")
    divides = {"micro_batch_tokens": "train_batch_tokens", "train_seq_len": "micro_batch_tokens",
               "eval_seq_len": "eval_batch_tokens", "num_heads": "model_dim", "num_kv_heads": "num_heads"}
    rules = [
        *((getattr(h, whole) % getattr(h, part) == 0, f"{part} must divide {whole}")
          for part, whole in divides.items()),
        (h.eval_stride <= h.eval_seq_len, "eval_stride must not exceed eval_seq_len"),
        (not (h.ttt_lr and h.ttt_chunk_tokens % h.eval_seq_len), "eval_seq_len must divide ttt_chunk_tokens"),
        (h.rope_dims % 2 == 0 and h.rope_dims <= h.head_dim, "rope_dims must be even and at most head_dim"),
        (max(h.xsa_last_n, h.ve_last_n) <= h.num_layers, "xsa_last_n, ve_last_n must not exceed num_layers"),
        (h.mlp_dim >= 1, "mlp_mult * model_dim must be at least 1"),
        (all(w.isdecimal() and len(w) < 10 for w in h.attn_windows.split()),
         f"attn_windows={h.attn_windows!r} must be whole numbers from 0 to 999999999, as in '512 512 0'"),
        (h.bigram_vocab_size >= 2, "bigram_vocab_size must be at least 2"),
        (h.vocab_size <= 65_536, "vocab_size must fit uint16 shards (65,536)"),
        (h.ema_frac > 0 and 0 < h.warmdown_frac <= 1, "ema_frac must be positive, warmdown_frac in (0, 1]"),
        (h.logit_softcap > 0 and h.rope_base > 0, "logit_softcap and rope_base must be positive"),
    ]
    if broken := [rule for holds, rule in rules if not holds]:
        raise InputError(f"config: {broken[0]}")


# -----------------------------------------------------------------------------
# 2. Machine: what differs between a laptop and eight GPUs, bound once. There is always a process group.

def cut_batch(h: Config, world_size: int) -> tuple[int, int]:
    """(accum, B): micro-batches of a step on each rank, sequences in each. InputError when nothing fits."""
    sequences, left = divmod(h.train_batch_tokens, world_size * h.train_seq_len)
    accum = -(-sequences * h.train_seq_len // h.micro_batch_tokens)
    if left or sequences == 0 or sequences % accum:
        raise InputError(f"WORLD_SIZE={world_size} cannot cut train_batch_tokens={h.train_batch_tokens} by "
                         f"micro_batch_tokens={h.micro_batch_tokens} and train_seq_len={h.train_seq_len}; "
                         "change one of them or the number of processes")
    return accum, sequences // accum


PATIENCE = 60       # seconds that a step of the device or a batch from the disk may take
DIVERGED = 1e6      # a loss or gradient norm beyond this ends the run
ECHO = 3            # seconds in which signals are one: torchrun sends again what the terminal sent


def record_graph(stream: torch.cuda.Stream, fn: Callable[[], None]) -> Callable[[], None]:
    """What launches the device work that fn queues; nothing runs now. The outer context brings the current
    stream back when the recording cannot end; thread_local: NCCL's watchdog may go on meanwhile."""
    graph, mode = torch.cuda.CUDAGraph(), "thread_local"
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        fn()
    return graph.replay


@dataclass(frozen=True)
class Machine:
    """This process's place and its bindings; no code below asks which device it runs on."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype                   # of activations and matrix products
    compile: Callable                    # torch.compile or the identity
    ops: Ops                             # attention and the other functions with a faster form here
    pin: bool                            # whether host batches are page-locked
    levels: tuple                        # how ranks share a bank: (group, what of its WORLD_SIZE parts, ours)
    names: dict[str, str]                # for the log: device, attention, qk, mlp, compile, pass, update
    streams: tuple = ()                  # of a GPU: the first for recording, the others as lanes
    record: Callable | None = None       # fn -> what launches its device work
    signals: list[float] = field(default_factory=lambda: [-math.inf])    # `guarded`; train empties it

    def sync(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.pin:
            torch.accelerator.synchronize()

    def fetch(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """What waits for host copies of tensors as they are now, or Fault: NCCL's watchdog sees no graph."""
        copies = [t.clone() for t in tensors]
        if not self.pin:
            return lambda: copies
        side = self.streams[0]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            host = [t.to("cpu", non_blocking=True) for t in copies]     # page-locked, out of torch's cache
            passed = side.record_event()
        for t in copies:
            t.record_stream(side)       # its memory is free when it has crossed
        def arrived() -> list[Tensor]:
            deadline = time.monotonic() + PATIENCE
            while not passed.query():
                if time.monotonic() > deadline:
                    raise Fault(f"the device has been busy for {PATIENCE} s; is another rank gone?")
                time.sleep(1e-4)
            return host
        return arrived

    @contextmanager
    def lanes(self) -> Iterator[Callable]:
        """`with lanes() as lane`: what is queued inside one `with lane()` runs beside the others; all of it
        behind what was queued before and ahead of what is queued after this block. A CPU takes turns."""
        current = torch.cuda.current_stream() if self.streams else None
        free = [s for s in self.streams if s != current]
        for stream in free:
            stream.wait_stream(current)
        yield lambda turns=cycle(free): torch.cuda.stream(next(turns)) if free else nullcontext()
        for stream in free:
            current.wait_stream(stream)

    def replay(self, fn: Callable[[], None]) -> tuple[Callable[[], None], str]:
        """fn, which queues the same work on the same tensors every time, as one launch; or fn, and why not.
        It runs three times before, off the default stream as CUDA asks, to compile. All replay or none."""
        if self.record is None:
            return fn, ""
        for _ in range(3):
            with self.lanes() as lane, lane():
                fn()
        launch, reasons = fn, [""] * self.world_size
        try:
            launch, reason = self.record(fn), ""
        except Exception as e:      # whatever a driver or NCCL raises: fn itself is always right
            reason = f"rank {self.rank}: {type(e).__name__}: {e}".partition("\n")[0]
        dist.all_gather_object(reasons, reason)
        return (fn, max(reasons)) if any(reasons) else (launch, "")

    def agree(self, value: float, flag: float = 0.0) -> tuple[float, float]:
        """Rank 0's `value` >= 0, the highest flag; bit-equal. The host network fails at once if one left."""
        box = torch.tensor([value if self.rank == 0 else 0.0, flag], dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return tuple(box.tolist())


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int = 0, docs: Tensor | None = None) -> Tensor:
    """Causal attention with grouped heads. q (B, T, H, Dh), k and v (B, T, Hkv, Dh) -> (B, T, H, Dh).
    window: keys that a token sees, itself included, 0: all. docs (B, T): it sees those of its own number."""
    T, K, how = q.size(1), k.size(1), dict(is_causal=True, enable_gqa=True)
    if docs is None and 0 < 2 * window < T and T % window == 0:         # blocks, each with the one before
        blocks = lambda x: x.unflatten(1, (-1, window)).flatten(0, 1)
        pairs = [torch.cat([blocks(x[:, window:-window]), blocks(x[:, 2 * window:])], 1) for x in (k, v)]
        head = attend_sdpa(*(x[:, : 2 * window] for x in (q, k, v)), window=window, docs=None)
        rest = attend_sdpa(blocks(q[:, 2 * window:]), *pairs, window=window, docs=None)
        return torch.cat([head, rest.unflatten(0, (len(q), -1)).flatten(1, 2)], 1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if docs is not None or 0 < window < K:
        back = torch.arange(K - T, K, device=q.device)[:, None] - torch.arange(K, device=q.device)
        seen = (back >= 0) & (back < (window or K))
        how = dict(attn_mask=seen if docs is None else seen & (docs[:, None, :, None] == docs[:, None, None]))
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))     # for the efficient kernel
    return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)


def init_machine(h: Config, env: Mapping[str, str], trains: bool = True) -> Machine:
    """Join or make a process group and bind a Machine. InputError when ranks, nodes or a batch do not fit."""
    world, rank = env.get("WORLD_SIZE", "1"), env.get("RANK", "0")
    local, place = env.get("LOCAL_WORLD_SIZE", world), env.get("LOCAL_RANK", "0")
    both, sound = ("RANK" in env) == ("WORLD_SIZE" in env), all(map(str.isdigit, (world, rank, local, place)))
    if not (both and sound and int(rank) < int(world) and int(local)):
        raise InputError(f"WORLD_SIZE={env.get('WORLD_SIZE')} RANK={env.get('RANK')}: not a process group; "
                         "start several processes with torchrun, or unset both")
    if local != world and (int(world) % int(local) or int(rank) % int(local) != int(place)):
        raise InputError(f"RANK={rank} LOCAL_WORLD_SIZE={local}: nodes differ; use one --nproc_per_node")
    world, rank, local, place = map(int, (world, rank, local, place))
    if trains:
        cut_batch(h, world)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS wants it if deterministic
    torch.use_deterministic_algorithms(h.deterministic)
    store = {} if "RANK" in env else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **store)
    levels = ((None, slice(0, world), slice(rank, rank + 1)),)
    if local < world:        # banks are shared out in this node, then by the ranks of one place in every node
        inside, _ = dist.new_subgroups(local)
        across, _ = dist.new_subgroups_by_enumeration([[*range(i, world, local)] for i in range(local)])
        nodes, mine = world // local, place * (world // local) + rank // local
        part = slice(place * nodes, (place + 1) * nodes)
        levels = (inside, slice(0, world), part), (across, part, slice(mine, mine + 1))
    if not cuda:
        names = dict(device=platform.machine(), attention="cpu", qk="torch", mlp="torch", compile="none") | {
            "pass": "eager", "update": "eager"}
        return Machine(rank, world, device, torch.float32, lambda f: f, Ops(), False, levels, names)
    torch.set_float32_matmul_precision("high")
    ops, bound = bind_ops(h, device)
    name, streams = torch.cuda.get_device_name(device), tuple(torch.cuda.Stream() for _ in range(6))
    names = dict(device=name, **bound, compile="inductor") | {"pass": "graph", "update": "graph"}
    compiler = lambda f: torch.compile(f, dynamic=False, fullgraph=True)
    return Machine(rank, world, device, torch.bfloat16, compiler, ops, True, levels, names, streams,
                   partial(record_graph, streams[0]))


class Log:
    """The record: lines to the log file and the console of rank 0, and one live status line on a terminal."""

    def __init__(self, path: str, machine: Machine | None, resume: bool = False) -> None:
        """Open a new `path`, or go on; no machine: silent. InputError when it exists or is read-only."""
        self.path, self.file, self.live, self.goes_on, fault = path, None, False, False, [None]
        if machine and machine.rank == 0:
            self.live = sys.stderr.isatty()
            try:
                with explained(f"{path}: cannot write the log", "change run_id or out_dir, or resume=auto"):
                    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                    if not resume:
                        open(path, "x").close()
                    self.file = open(path, "a", encoding="utf-8")       # other ranks may add lines
                    self.goes_on = self.file.tell() > 0
            except InputError as e:     # every rank's, or the others' ends would go to another run's log
                fault = [e]
        if machine:
            dist.broadcast_object_list(fault, 0, device=torch.device("cpu"))
        if fault[0]:
            raise fault[0]

    def __call__(self, line: str, console: bool = True) -> None:
        if self.file is None:
            return
        with explained(f"{self.path}: cannot write the log", "free space"):
            print(line, file=self.file, flush=True)
        if console:
            print(("\r\033[K" if self.live else "") + line, flush=True)

    def status(self, text: str) -> None:
        if self.live:
            print("\r\033[K" + text[:110], end="", file=sys.stderr, flush=True)


@contextmanager
def guarded(m: Machine, log: Log) -> Iterator[None]:
    """SIGTERM or SIGINT ends training after the step; before it, or ECHO after the first, the process. Why a
    rank fails goes to the log of all; one of several leaves at once: a proper end would wait for the rest."""
    def heed(number: int, frame) -> None:
        m.signals.append(time.monotonic())
        if m.signals[-1] > m.signals[0] + ECHO:
            os._exit(128 + number)
    before = {each: signal.signal(each, heed) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Exception as e:
        told = f"rank {m.rank}: " + (str(e) if isinstance(e, InputError) else traceback.format_exc())
        with suppress(OSError), open(log.path, "a", encoding="utf-8") as f:
            f.write(told + "\n")
        if m.world_size > 1:
            print(f"train_gpt.py: {told}", file=sys.stderr, flush=True)
            os._exit(getattr(e, "status", 1))
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def machine_report(m: Machine) -> str:
    """nvidia-smi's report, or the processor's name where there is none, and the core count."""
    ask = "nvidia-smi || grep -m1 'model name' /proc/cpuinfo || sysctl -n machdep.cpu.brand_string"
    ask += f" || echo {m.names['device']}"
    return subprocess.getoutput(f"({ask}) 2>/dev/null") + f" cores:{os.cpu_count()}"


# -----------------------------------------------------------------------------
# 3. Tokens: shards on disk (the challenge's format) and the seeded document-aware loader.

SHARD_HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION = 1024, 20240520, 1


def load_shard(path: str, vocab_size: int = 65_536) -> np.ndarray:
    """A shard's tokens as a read-only uint16 memory map, (num_tokens,). InputError when the file is not 256
    little-endian int32 (magic, version, num_tokens, zeros) and so many tokens, or one is >= vocab_size."""
    with explained(f"{path}: cannot read the shard", "prepare the data again"):
        header, size = np.fromfile(path, dtype="<i4", count=256), os.path.getsize(path)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path}: not a token shard (magic {SHARD_MAGIC}, version {SHARD_VERSION}); "
                         "make it again")
    if size != (expected := SHARD_HEADER_BYTES + 2 * int(header[2])):
        raise InputError(f"{path}: {size} bytes, its header says {expected}: truncated or damaged; "
                         "fetch or make it again")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(int(header[2]),))
    if len(tokens) and (top := int(tokens.max())) >= vocab_size:
        raise InputError(f"{path}: token {top} >= vocab_size {vocab_size}; set vocab_size or the data_path")
    return tokens


def shard_tokens(path: str) -> int:
    return (os.path.getsize(path) - SHARD_HEADER_BYTES) // 2


def split_files(data_path: str, split: str) -> list[str]:
    """The shards `*_SPLIT_<digits>.bin` of a split, sorted. InputError when there are none."""
    if not os.path.isdir(data_path):
        raise InputError(f"{data_path}: no such data folder; `./run.sh data auto` makes one, "
                         "data_path=DIR names one")
    if files := sorted(glob.glob(os.path.join(glob.escape(data_path), f"*_{split}_[0-9]*.bin"))):
        return files
    raise InputError(f"{data_path}: no *_{split}_*.bin shards; prepare that split or change data_path")


def load_split(h: Config, split: str) -> np.ndarray:
    """A whole evaluation split as one uint16 array, cut to `val_tokens` targets where that is set."""
    tokens = np.concatenate([load_shard(f, h.vocab_size) for f in split_files(h.data_path, split)])
    return tokens[: h.val_tokens + 1] if h.val_tokens else tokens


class TokenLoader:
    """An endless stream of shuffled documents, cut into global batches by index; its state is one integer.
    Epoch e visits the shards, and the documents inside each, in an order drawn from (seed, e). Rows of T + 1
    tokens overlap by one. Batches draw their rows from `mix_tokens` of the stream at a time: in order, a book
    would fill a batch. Global batch n is the same for every world size: rank r's micro-batch a holds its rows
    [(a * world + r) * B, ...). The next batch is built in a thread while the device works on this."""

    def __init__(self, h: Config, m: Machine) -> None:
        self.h, self.m = h, m
        self.files = split_files(h.data_path, "train")
        for f in self.files[m.rank::m.world_size]:           # now, not in the middle of the run
            load_shard(f, h.vocab_size)
        self.sizes = np.array([shard_tokens(f) for f in self.files])
        self.total = int(self.sizes.sum())
        if self.total <= h.train_seq_len:
            raise InputError(f"{h.data_path}: the train split has {self.total} tokens, not one sequence; "
                             "use more text")
        self.accum, self.rows = cut_batch(h, m.world_size)
        self.span = max(1, min(h.mix_tokens, self.total) // h.train_batch_tokens)      # batches of a draw
        self.visits = lru_cache(maxsize=2)(self.shuffle_shards)
        self.shuffled = lru_cache(maxsize=len(self.files) + 1)(self.shuffle_shard)
        self.reading = ""
        self.seek(0)

    def shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """This epoch's order of the shards, and where each comes to end."""
        order = np.random.default_rng([self.h.seed, epoch]).permutation(len(self.files))
        return order, np.cumsum(self.sizes[order])

    def shuffle_shard(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of a shard, its document starts in this epoch's order, and where each comes to lie."""
        tokens = np.asarray(load_shard(self.files[shard], self.h.vocab_size))    # slices of a memmap are slow
        starts = np.flatnonzero(tokens == self.h.bos_id)
        if len(starts) == 0:
            raise InputError(f"{self.files[shard]}: no document start (bos_id={self.h.bos_id}); set bos_id")
        starts = np.union1d(0, starts)
        lengths = np.diff(starts, append=len(tokens))
        order = np.random.default_rng([self.h.seed, epoch, shard]).permutation(len(starts))
        return tokens, starts[order], np.concatenate([[0], np.cumsum(lengths[order])])

    def read(self, position: int, count: int) -> np.ndarray:
        """Tokens [position, position + count) of the endless stream, (count,) int64."""
        out, filled = np.empty(count, np.int64), 0
        while filled < count:
            epoch, offset = divmod(position + filled, self.total)
            order, ends = self.visits(epoch)
            slot = int(np.searchsorted(ends, offset, side="right"))
            self.reading = self.files[order[slot]]
            tokens, starts, bounds = self.shuffled(epoch, int(order[slot]))
            offset -= int(ends[slot] - self.sizes[order[slot]])
            doc = int(np.searchsorted(bounds, offset, side="right")) - 1
            while filled < count and doc < len(starts):
                begin = starts[doc] + offset - bounds[doc]
                take = int(min(bounds[doc + 1] - offset, count - filled))
                out[filled: filled + take] = tokens[begin: begin + take]
                filled, offset, doc = filled + take, offset + take, doc + 1
        return out

    def build(self, index: int) -> list[Tensor]:
        """This rank's micro-batches of global batch `index`: `accum` host tensors (B, T + 1), int64."""
        h, B, T, batch = self.h, self.rows, self.h.train_seq_len, []
        (draw, place), count = divmod(index, self.span), h.train_batch_tokens // T
        drawn = np.arange(self.span * count)
        if self.span > 1:
            np.random.default_rng([h.seed, draw, 0, 1]).shuffle(drawn)
        for a in range(self.accum):
            rows = torch.empty(B, T + 1, dtype=torch.long, pin_memory=self.m.pin)
            first = place * count + (a * self.m.world_size + self.m.rank) * B
            for row, number in zip(rows.numpy(), drawn[first: first + B].tolist()):
                row[:] = self.read((draw * len(drawn) + number) * T, T + 1)
            batch.append(rows)
        return batch

    def seek(self, index: int) -> None:
        """Make global batch `index` the next one, built in a thread that keeps no process from ending."""
        self.index, self.pending = index, Future()
        Thread(target=self.fill, args=(self.pending, index), daemon=True).start()

    def fill(self, pending: Future, index: int) -> None:
        try:
            pending.set_result(self.build(index))
        except Exception as e:
            pending.set_exception(e)

    def next(self) -> list[Tensor]:
        """The next global batch's micro-batches of this rank on the device, and the one after it begun."""
        if wait([self.pending], PATIENCE).not_done:
            raise Fault(f"{self.reading}: not read within {PATIENCE} s; is the disk there?")
        batch = [t.to(self.m.device, non_blocking=True) for t in self.pending.result()]
        self.seek(self.index + 1)               # behind the copies: both want the interpreter
        return batch


# -----------------------------------------------------------------------------
# 4. Bytes: what a token weighs, and the definition of bits per byte.

@dataclass(frozen=True)
class ByteCounts:
    """UTF-8 bytes of the decoded text that each target stands for; arrays (V,). spelled: ids of the byte
    pieces E2 96 81, if there is no piece U+2581: in a row they are a space, one byte of text. Else None."""
    base: np.ndarray            # bytes of the piece without its leading-space mark; 0 for a boundary
    space: np.ndarray           # the piece begins with U+2581, one byte unless it follows a boundary
    boundary: np.ndarray        # control, unknown, unused pieces; a space after one is not part of the text
    spelled: tuple[int, int, int] | None = None

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of every target: tokens (N,) -> (N - 1,) int64 for tokens[1:]."""
        previous, target = tokens[:-1], tokens[1:]
        weights = self.base[target] + (self.space[target] & ~self.boundary[previous])
        if self.spelled is not None:
            e2, b96, b81 = self.spelled
            first = np.flatnonzero((target[:-2] == e2) & (target[1:-1] == b96) & (target[2:] == b81))
            weights[first] = ~self.boundary[previous[first]]
            weights[first + 1] = weights[first + 2] = 0
        return weights


def sentencepiece_counts(path: str) -> ByteCounts:
    """ByteCounts of a SentencePiece model. InputError when the file is missing or is not one."""
    import sentencepiece
    with explained(f"{path}: not a SentencePiece model", "tokenizer_path=FILE names one", RuntimeError):
        sp = sentencepiece.SentencePieceProcessor(model_file=path)
    ids = list(range(sp.vocab_size()))
    pieces = sp.id_to_piece(ids)
    boundary = np.array(sp.is_control(ids)) | sp.is_unknown(ids) | sp.is_unused(ids)
    space = np.array([piece.startswith("\u2581") for piece in pieces]) & ~boundary
    lengths = [len(piece.removeprefix("\u2581").replace("\u2581", " ").encode()) for piece in pieces]
    base = np.where(boundary, 0, np.where(sp.is_byte(ids), 1, lengths))
    spelled = tuple(sp.piece_to_id(f"<0x{b:02X}>") for b in (0xE2, 0x96, 0x81))
    can_spell = sp.is_unknown(sp.piece_to_id("\u2581")) and all(map(sp.is_byte, spelled))
    return ByteCounts(base, space, boundary, spelled if can_spell else None)


def tiktoken_counts(encoding: str) -> ByteCounts:
    """ByteCounts of a tiktoken encoding: a token is its bytes, special tokens are boundaries."""
    import tiktoken
    what, remedy = f"tokenizer {encoding!r}: tiktoken cannot load it", "check the name and the network"
    with explained(what, remedy, Exception):     # unknown name, no network for the vocabulary: it raises many
        enc = tiktoken.get_encoding(encoding)
    base = np.zeros(enc.n_vocab, np.int64)
    base[list(enc._mergeable_ranks.values())] = [len(piece) for piece in enc._mergeable_ranks]
    return ByteCounts(base, np.zeros(enc.n_vocab, bool), base == 0)


def bpb(nats: float, num_bytes: int) -> float:
    """Bits per byte: summed negative log-likelihood in nats over the UTF-8 bytes it explains."""
    return nats / math.log(2) / num_bytes


@dataclass(frozen=True)
class Dataset:
    """Where the tokens came from: tokenizer and manifest, checked against each other."""
    counts: ByteCounts
    manifest: dict
    manifest_sha256: str
    tokenizer_sha256: str


def load_dataset(h: Config) -> Dataset:
    """`data_path`'s tokenizer and manifest; held-out shards are only measured. InputError if any disagree."""
    sha256 = lambda data: hashlib.sha256(data).hexdigest()
    path, file, encoding, manifest = Path(h.data_path, "manifest.json"), h.tokenizer_path, None, {}
    split_files(h.data_path, "val")
    if path.exists():
        with explained(f"{path}: not a manifest", "make it again", ValueError, KeyError, TypeError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            named = manifest["tokenizer"]
            sha, encoding, bos = named["sha256"], named.get("encoding"), manifest["bos_id"]
            file = file or (None if encoding else os.path.join(h.data_path, named["file"]))
        if bos != h.bos_id:
            raise InputError(f"{path}: documents begin with {bos}, not bos_id={h.bos_id}; set bos_id={bos}")
    if file:
        counts, tokenizer_sha = sentencepiece_counts(file), sha256(Path(file).read_bytes())
        if manifest and tokenizer_sha != sha:
            raise InputError(f"{file}: not the tokenizer of {path} (sha256 {tokenizer_sha[:12]}, "
                             f"manifest says {sha[:12]}); use that one or make the shards again")
    elif encoding:
        counts, tokenizer_sha = tiktoken_counts(encoding), sha
    else:
        raise InputError(f"{h.data_path}: no manifest.json; name the tokenizer with tokenizer_path=FILE")
    if len(counts.base) != h.vocab_size:
        raise InputError(f"config key vocab_size: {h.vocab_size}, the tokenizer has {len(counts.base)}; "
                         f"set vocab_size={len(counts.base)}")
    for split in ["val"] + [h.report_split] * bool(h.report_split):
        files = split_files(h.data_path, split)
        known = {s["file"]: s["tokens"] for s in manifest.get("splits", {}).get(split, {}).get("shards", [])}
        for f in files:
            if shard_tokens(f) != known.get(os.path.basename(f), shard_tokens(f)):
                raise InputError(f"{f}: not as long as manifest.json says; fetch or make it again")
        tokens = sum(map(shard_tokens, files))
        tokens = min(tokens, h.val_tokens + 1) if h.val_tokens else tokens
        if tokens <= h.eval_seq_len:
            raise InputError(f"{h.data_path}: {tokens} tokens of {split} to score, less than a sequence "
                             f"of eval_seq_len={h.eval_seq_len}; use more text or a shorter eval_seq_len")
    return Dataset(counts, manifest, sha256(path.read_bytes()) if manifest else "none", tokenizer_sha)


# -----------------------------------------------------------------------------
# 5. Blocks: a layer as functions of its weights. B sequences, T tokens, D model, H heads, Hkv kv heads.

@dataclass(frozen=True)
class LayerSpec:
    """Topology of one layer as data."""
    push: bool              # its input is kept for a skip connection
    skip: int               # row of skip_weights that brings a kept input back in, or -1
    xsa: bool               # exclusive self-attention
    ve: int                 # row of ve_layer_scale, or -1
    window: int             # keys that a token sees, itself included; 0: all
    docs: bool              # it sees its own document only


def layer_table(h: Config) -> tuple[LayerSpec, ...]:
    """A U-Net: the first half of the layers keeps its outputs, the second takes them back, last first."""
    L, half, windows = h.num_layers, h.num_layers // 2, cycle(h.attn_windows.split() or ["0"])
    return tuple(LayerSpec(push=i < half, skip=i - half if half <= i < 2 * half else -1,
                           xsa=i >= L - h.xsa_last_n, ve=max(-1, i - (L - h.ve_last_n)),
                           window=int(next(windows)), docs=h.doc_mask) for i in range(L))


class LayerWeights(NamedTuple):
    """One layer's matrices (compute dtype), what is diagonal folded into them, and its control tensors."""
    qkv: Tensor             # (D + 2 Hkv*Dh, D)
    o: Tensor               # (D, D)
    up: Tensor              # (F, D)
    down: Tensor            # (D, F)
    q_gain: Tensor          # (H,)
    resid_mix: Tensor       # (2, D)


RMS_EPS = 1e-6      # said explicitly: PyTorch's default depends on the dtype
DOCUMENTS = 16      # of a row that can be kept apart; what is behind them stays in the last


def document_starts(tokens: Tensor, bos_id: int) -> Tensor:
    """(B, T) bool: whether a token begins a document; a row's first does."""
    return torch.cat([torch.ones_like(tokens[:, :1], dtype=torch.bool), tokens[:, 1:] == bos_id], dim=1)


def documents(tokens: Tensor, bos_id: int) -> Tensor:
    """(B, T) int: each token's document within its row, DOCUMENTS at most; it depends on no later token."""
    return (document_starts(tokens, bos_id).cumsum(1) - 1).clamp_max(DOCUMENTS - 1)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + RMS_EPS) over the last dimension, no weight."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rope_tables(seq_len: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (T, 1, dims / 2) float32. Su et al., arXiv:2104.09864."""
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequency)
    return angle.cos()[:, None], angle.sin()[:, None]


def qk_norm_rope(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, Dh) normed, pairs (j, j + half) turned by cos, sin (T, 1, half), times gain (H,)."""
    cos, sin, half = cos.to(x.dtype), sin.to(x.dtype), cos.size(-1)
    a, b, rest = rms_norm(x).split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1) * gain.to(x.dtype)[:, None]


def qk_heads(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, normed: Callable = qk_norm_rope) -> tuple:
    """q and k, `normed` with gain (H,) and with ones, and v as it is, of qkv (B, T, H + 2 Hkv, Dh)."""
    H, kv = gain.size(0), (qkv.size(2) - gain.size(0)) // 2
    q, k, v = qkv.split([H, kv, kv], dim=2)
    return normed(q, gain, cos, sin), normed(k, torch.ones(kv, device=gain.device), cos, sin), v


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA (parameter-golf #265): y (B, T, H, Dh) less its part along the token's value, v (B, T, Hkv, Dh)."""
    y = y.unflatten(2, (v.size(2), -1))
    v = F.normalize(v, dim=-1).unsqueeze(3)
    return (y - (y * v).sum(-1, keepdim=True) * v).flatten(2, 3)


def mlp(x: Tensor, up: Tensor, down: Tensor, linear: Callable = F.linear) -> Tensor:
    """LeakyReLU(0.5)^2 between two products (parameter-golf #549). x (B, T, D), up (F, D), down (D, F)."""
    return linear(F.leaky_relu(linear(x, up), 0.5).square(), down)


class Ops(NamedTuple):
    """The functions that a machine may bind to faster ones of the same signature."""
    attend: Callable = attend_sdpa
    qk: Callable = qk_heads
    mlp: Callable = mlp
    linear: Callable = F.linear


def attention_block(x: Tensor, w: LayerWeights, ve: Tensor | None, place: tuple, spec: LayerSpec,
                    ops: Ops) -> Tensor:
    """Causal attention with QK norm, learned query gain and partial rope. x (B, T, D) -> (B, T, D). ve
    (B, T, Hkv*Dh) is added to the values when given. place: rotary tables and documents of the tokens."""
    Dh, (rope, docs) = x.size(-1) // w.q_gain.size(0), place
    q, k, v = ops.qk(ops.linear(x, w.qkv).unflatten(-1, (-1, Dh)), w.q_gain, *rope)       # one product
    v = v if ve is None else v + ve.view(v.shape)
    y = ops.attend(q, k, v, spec.window, docs if spec.docs else None)
    y = exclude_self(y, v) if spec.xsa else y
    return ops.linear(y.flatten(2), w.o)


def layer(x: Tensor, x0: Tensor, w: LayerWeights, attend: Callable, mlp: Callable) -> Tensor:
    """One block: x and the embedding stream x0 mixed, attention added, MLP added. attend: x -> (B, T, D)."""
    mix = w.resid_mix.to(x.dtype)
    x = mix[0] * x + mix[1] * x0
    x = x + attend(rms_norm(x))
    return x + mlp(rms_norm(x), w.up, w.down)


# -----------------------------------------------------------------------------
# 6. GPT: one table of all parameters, banks, one trunk for loss, logits and scoring.

class ParamSpec(NamedTuple):
    """A parameter. Rows are initialised, and reductions of banks launched, in this order: biggest first."""
    name: str
    shape: str       # by parameter_table's letters; banks are of L or 2L matrices
    init: str        # kind and value, by init_tensor and parameter_table's words
    home: str        # its buffer. A bank: sharded by matrix, ORTHO and STEP_RULES | "flat": replicated, AdamW
    lr: str          # Config field
    kind: str        # encoding in the artifact


PARAM_TABLE = (
    ParamSpec("mlp_up_bank", "L F D", "orthogonal", "mlp", "matrix_lr", "int6"),
    ParamSpec("mlp_down_bank", "L D F", "normal OUT", "mlp", "matrix_lr", "int6"),
    ParamSpec("qo_bank", "2L D D", "half_orthogonal OUT", "qo", "matrix_lr", "int6"),    # Q at i, O at L + i
    ParamSpec("kv_bank", "2L KV D", "orthogonal", "kv", "matrix_lr", "int6"),            # K at i, V at L + i
    ParamSpec("tok_emb", "V D", "normal EMBED", "flat", "embed_lr", "int8"),            # the output head, too
    ParamSpec("bigram_emb", "BV BD", "constant 0", "flat", "embed_lr", "int8"),
    ParamSpec("bigram_proj", "D BD", "orthogonal", "flat", "scalar_lr", "int8"),    # 0 twice would not move
    ParamSpec("bigram_scale", "1", "constant 0.05", "flat", "scalar_lr", "f32"),
    ParamSpec("ve_emb", "V VD", "normal 0.01", "flat", "embed_lr", "int8"),
    ParamSpec("ve_proj", "KV VD", "orthogonal", "flat", "scalar_lr", "int8"),
    ParamSpec("ve_scale", "1", "constant 0.1", "flat", "scalar_lr", "f32"),
    ParamSpec("ve_layer_scale", "VL", "constant 1", "flat", "scalar_lr", "f32"),
    ParamSpec("smear_gate", "D", "constant 0", "flat", "scalar_lr", "f16"),
    ParamSpec("skip_weights", "S D", "constant 1", "flat", "scalar_lr", "f16"),
    ParamSpec("resid_mix", "L 2 D", "first_of_two", "flat", "scalar_lr", "f16"),
    ParamSpec("attn_scale", "L D", "constant 1", "flat", "scalar_lr", "f16"),
    ParamSpec("mlp_scale", "L D", "constant 1", "flat", "scalar_lr", "f16"),
    ParamSpec("q_gain", "L H", "constant GAIN", "flat", "scalar_lr", "f32"),
)
MATRICES = tuple(s for s in PARAM_TABLE if s.home != "flat")
SMALL = tuple(s for s in PARAM_TABLE if s.home == "flat")


def parameter_table(h: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, initialisation for init_tensor). OUT: what writes into the residual stream starts at
    zero, or where norms are kept at 0.8 / sqrt(D), modded-nanogpt's mean (O .026, MLP-down .031 at 768)."""
    L, D = h.num_layers, h.model_dim
    hyperball = STEP_RULES[h.step_rule] is step_hyperball
    size = {"1": 1, "2": 2, "L": L, "2L": 2 * L, "S": max(1, L // 2), "D": D, "F": h.mlp_dim, "KV": h.kv_dim,
            "H": h.num_heads, "V": h.vocab_size, "BV": h.bigram_vocab_size, "BD": h.bigram_dim,
            "VD": h.ve_dim, "VL": h.ve_last_n}
    word = {"OUT": h.proj_init_std or (0.8 * D ** -0.5 if hyperball else 0.0), "EMBED": h.tied_embed_init_std,
            "GAIN": h.qk_gain_init}
    return {s.name: (tuple(size[x] for x in s.shape.split()),
                     " ".join(str(word.get(x, x)) for x in s.init.split())) for s in PARAM_TABLE}


def init_tensor(shape: tuple[int, ...], init: str, generator: torch.Generator) -> Tensor:
    """A float32 tensor by a row of parameter_table. ValueError for an unknown initialisation."""
    kind, _, value = init.partition(" ")
    out, value = torch.zeros(shape), float(value or 0)
    orthogonal = {"orthogonal": 1.0, "half_orthogonal": 0.5, "normal": 0.0}    # share; the rest normal
    if kind == "constant":
        out.fill_(value)
    elif kind == "first_of_two":
        out[:, 0] = 1
    elif kind in orthogonal:
        matrices = out.view(-1, *shape[-2:])
        count = int(orthogonal[kind] * len(matrices))
        for matrix in matrices[:count]:
            nn.init.orthogonal_(matrix, generator=generator)
        if value:
            matrices[count:].normal_(0, value, generator=generator)
    else:
        raise ValueError(f"unknown initialisation {init!r}")
    return out


class GPT(nn.Module):
    """The model: 18 float32 masters, a bank for all layers' matrices of a kind. Products run in `dtype`."""

    def __init__(self, h: Config, ops: Ops = Ops(), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.h, self.ops, self.dtype, self.layers = h, ops, dtype, layer_table(h)
        generator = torch.Generator().manual_seed(h.seed)
        for name, (shape, init) in parameter_table(h).items():
            self.register_parameter(name, nn.Parameter(init_tensor(shape, init, generator)))

    def layer_weights(self) -> list[LayerWeights]:
        """A row per layer. What is diagonal in a block goes into its matrices, in float32 before the cast:
        1/sqrt(depth) into columns, output scales into rows: 0.19 ms a layer less at 48 x 2048 (H100)."""
        L, dtype = self.h.num_layers, self.dtype
        depth = torch.arange(1, L + 1, device=self.q_gain.device)[:, None, None] ** -0.5
        q, o = self.qo_bank.unflatten(0, (2, L))
        k, v = self.kv_bank.unflatten(0, (2, L))
        columns = ((torch.cat([q, k, v], dim=1) * depth).to(dtype),
                   (self.attn_scale[..., None] * o).to(dtype),
                   (self.mlp_up_bank * depth).to(dtype),
                   (self.mlp_scale[..., None] * self.mlp_down_bank).to(dtype), self.q_gain, self.resid_mix)
        return [LayerWeights(*row) for row in zip(*(c.unbind(0) for c in columns))]

    def embed(self, tokens: Tensor) -> Tensor:
        """Token + bigram, normed, smeared within documents (parameter-golf #1851). (B, T) -> (B, T, D)."""
        starts, previous = document_starts(tokens, self.h.bos_id), F.pad(tokens[:, :-1], (1, 0))
        buckets = self.h.bigram_vocab_size - 1
        bucket = torch.bitwise_xor(36313 * tokens, 27191 * previous) % buckets
        bigram = F.embedding(torch.where(starts, buckets, bucket), self.bigram_emb).to(self.dtype)
        x = F.embedding(tokens, self.tok_emb).to(self.dtype)
        x = rms_norm(x + F.linear(bigram, (self.bigram_scale * self.bigram_proj).to(self.dtype)))
        gate = torch.sigmoid(self.smear_gate).to(self.dtype) * ~starts[..., None]
        return torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), gate)

    def trunk(self, tokens: Tensor) -> Tensor:
        """The only forward pass. tokens (B, T) -> (B, T, D), normalised."""
        h = self.h
        place = (rope_tables(tokens.size(1), h.rope_dims, h.rope_base, tokens.device),
                 documents(tokens, h.bos_id) if h.doc_mask else None)
        ve = F.embedding(tokens, self.ve_emb).to(self.dtype)      # cast late: gradients add up in float32
        ve = F.linear(ve, (self.ve_scale * self.ve_proj).to(self.dtype))
        x = x0 = self.embed(tokens)
        kept = []
        for spec, w in zip(self.layers, self.layer_weights()):
            if spec.skip >= 0:
                x = x + self.skip_weights[spec.skip].to(self.dtype) * kept.pop()
            values = ve * self.ve_layer_scale[spec.ve].to(self.dtype) if spec.ve >= 0 else None
            attend = lambda z, w=w, s=spec, e=values: attention_block(z, w, e, place, s, self.ops)
            x = layer(x, x0, w, attend, self.ops.mlp)
            if spec.push:
                kept.append(x)
        return rms_norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Softcapped logits of the tied head. (..., D) -> (..., V) float32."""
        logits = F.linear(x, self.tok_emb.to(self.dtype)).float()
        return self.h.logit_softcap * torch.tanh(logits / self.h.logit_softcap)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V) float32."""
        return self.head(self.trunk(tokens))

    def nats(self, tokens: Tensor, targets: Tensor, last: int) -> Tensor:
        """Negative log-likelihood of the last `last` targets of each row. (B, T) x2 -> (B, last) float32."""
        logits = self.head(self.trunk(tokens)[:, -last:])
        nats = F.cross_entropy(logits.flatten(0, 1), targets[:, -last:].flatten(), reduction="none")
        return nats.view(-1, last)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token. (B, T) x2 -> ()."""
        return self.nats(tokens, targets, tokens.size(1)).mean()


# -----------------------------------------------------------------------------
# 7. Kernels: each beside a torch line of the same signature; and the products of a quintic iteration.

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                       # without Triton the kernels are defined and never launched
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=int)


def operator(name: str, schema: str) -> Callable:
    """Registers what changes no input. Operators are global: a second copy of this file has its own."""
    return torch.library.custom_op(f"bankshot_{__name__.strip('_')}::{name}", mutates_args=(), schema=schema)


@triton.jit
def load_head(ptr, n, T, stride_b, stride_t, d, live):
    """Rows n = b * T + t of one head at dimensions d, float32. The pointer is already at the head."""
    address = (n // T).to(tl.int64) * stride_b + (n % T).to(tl.int64) * stride_t
    return tl.load(ptr + address[:, None] + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_angles(cos_ptr, sin_ptr, n, T, d, live, HALF: tl.constexpr):
    """cos and signed sin at dimensions d, and d's partner p: y_d = x_d cos_d + x_p sin_d."""
    rotated = (d < 2 * HALF)[None, :] & live[:, None]
    index = (n % T)[:, None] * HALF + (d % HALF)[None, :]
    cos = tl.load(cos_ptr + index, mask=rotated, other=1.0)
    sin = tl.load(sin_ptr + index, mask=rotated, other=0.0)
    sin = tl.where((d < HALF)[None, :], sin, -sin)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    return cos, sin, partner


@triton.jit
def qk_kernel(x_ptr, dy_ptr, out_ptr, dgain_ptr, gain_ptr, cos_ptr, sin_ptr, N, T, x_b, x_t, x_h, dy_b, dy_t,
              dy_h, out_t, H: tl.constexpr, DH: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
              BLOCK: tl.constexpr):
    """BLOCK tokens of one head, in `out` out_t apart. Forward, without dy: out = g R z, z = rstd x. Backward:
    out = g rstd (R'dy - z mean(z R'dy)), dgain as one partial sum a program and head. No gain: out = x."""
    n, h, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.arange(0, DH)
    live = n < N
    x = load_head(x_ptr + h * x_h, n, T, x_b, x_t, d, live)
    if gain_ptr is not None:
        cos, sin, partner = load_angles(cos_ptr, sin_ptr, n, T, d, live, HALF)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / DH + EPS)[:, None]
        if dy_ptr is None:
            xp = load_head(x_ptr + h * x_h, n, T, x_b, x_t, partner, live)      # same lines, from L1
            x = (x * cos + xp * sin) * rstd
        else:
            dy = load_head(dy_ptr + h * dy_h, n, T, dy_b, dy_t, d, live)
            dyp = load_head(dy_ptr + h * dy_h, n, T, dy_b, dy_t, partner, live)
            z, back = x * rstd, dy * cos - dyp * sin             # the rotation's transpose is its inverse
            dot = tl.sum(z * back, 1)                            # = sum(dy * R z)
            x = rstd * (back - z * (dot / DH)[:, None])
            tl.store(dgain_ptr + tl.program_id(0) * H + h, tl.sum(dot, 0))
        x *= tl.load(gain_ptr + h)
    out = out_ptr + n.to(tl.int64)[:, None] * out_t + (h * DH + d)[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=live[:, None])


@operator("qk", "(Tensor x, Tensor gain, Tensor cos, Tensor sin) -> Tensor")
def qk_op(x, gain, cos, sin):
    """qk_norm_rope in one read and one write. x: contiguous heads of 2^n."""
    (B, T, H, Dh), y = x.shape, x.new_empty(x.shape)
    qk_kernel[(-(-B * T // 32), H)](x, None, y, None, gain, cos, sin, B * T, T, *x.stride()[:3], 0, 0, 0,
                                    H * Dh, H, Dh, cos.size(-1), RMS_EPS, 32)
    return y


@operator("qk_backward", "(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, Tensor dq, Tensor dk, Tensor dv)"
          " -> (Tensor, Tensor)")
def qk_backward_op(qkv, gain, cos, sin, *dys):
    """The gradients of qkv, filled part by part from those of q, k and v, and of gain."""
    dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
    (B, T, H, Dh), parts, dqkv = dys[0].shape, [dy.size(2) for dy in dys], qkv.new_empty(qkv.shape)
    gains, sums = (gain, gain.new_ones(parts[1]), None), [gain.new_empty(-(-B * T // 32), n) for n in parts]
    xs = *qkv.split(parts, 2)[:2], dys[2]
    for x, dy, dx, g, dg in zip(xs, dys, dqkv.split(parts, 2), gains, sums):
        qk_kernel[tuple(dg.shape)](x, dy, dx, dg, g, cos, sin, B * T, T, *x.stride()[:3], *dy.stride()[:3],
                                   dx.stride(1), dg.size(1), Dh, cos.size(-1), RMS_EPS, 32)
    return dqkv, sums[0].sum(0)


class FusedHeads(torch.autograd.Function):
    """qk_heads, whose backward fills one gradient: Inductor's reads through the rotation's slices, 1.2 ms a
    layer at 48 x 2048 against a floor of 0.15 (H100), and copies those of q, k and v together."""

    @staticmethod
    def forward(ctx, qkv, gain, cos, sin):
        ctx.save_for_backward(qkv, gain, cos, sin)
        return qk_heads(qkv, gain, cos, sin, qk_op)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        return *qk_backward_op(*ctx.saved_tensors, dq, dk, dv), None, None


@triton.jit
def mlp_kernel(a_desc, w_desc, h_desc, out_desc, K, BACKWARD: tl.constexpr, SHIFT: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, h8_desc=None, u_ptr=None, step_ptr=None):
    """Forward: out = h = LeakyReLU(u)^2, u = a w', w (N, K). Backward: out = (a w) dh/du, w (K, N).
    h's last bit says u < 0, so h alone gives dh/du = 2 sqrt(h) or -sqrt(h) and u is never written. SHIFT:
    float32 bits h lacks. h8: a, w are e4m3, u their product times u_ptr's, h / step is written in e4m3."""
    m, n = tl.program_id(1) * BM, tl.program_id(0) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if BACKWARD:
            acc = tl.dot(a_desc.load([m, k]), w_desc.load([k, n]), acc)
        else:
            acc = tl.dot(a_desc.load([m, k]), w_desc.load([n, k]).T, acc)
    if BACKWARD:
        h = h_desc.load([m, n]).to(tl.float32)
        root = tl.sqrt(h)
        acc *= tl.where((h.to(tl.int32, bitcast=True) >> SHIFT) & 1 == 1, -root, 2 * root)
    else:
        if h8_desc is not None:
            acc *= tl.load(u_ptr)
        leaky = tl.where(acc > 0, acc, 0.5 * acc)
        negative = (acc < 0).to(tl.int32) << SHIFT
        bits = (leaky * leaky).to(tl.int32, bitcast=True) - negative + (1 << SHIFT)      # to the nearest
        acc = ((bits & -(2 << SHIFT)) + negative).to(tl.float32, bitcast=True)
        if h8_desc is not None:
            h8_desc.store([m, n], tl.minimum(acc * (1.0 / tl.load(step_ptr)), 448.0).to(h8_desc.dtype))
    out_desc.store([m, n], acc.to(out_desc.dtype))


@operator("mlp", "(Tensor a, Tensor w, Tensor? h) -> Tensor")
def mlp_op(a, w, h):
    """mlp_kernel. a (M, K), w (N, K) -> h (M, N); with h: a (M, K), w (K, N) -> the gradient of u (M, N)."""
    (bm, bn, bk), block = (128, 128, 64), TensorDescriptor.from_tensor
    out = a.new_empty(a.size(0), w.size(0 if h is None else 1))
    mlp_kernel[(-(-out.size(1) // bn), -(-out.size(0) // bm))](
        block(a, [bm, bk]), block(w, [bn, bk] if h is None else [bk, bn]),
        block(out if h is None else h, [bm, bn]), block(out, [bm, bn]), a.size(1), h is not None,
        32 - 8 * a.element_size(), bm, bn, bk, num_warps=4, num_stages=3)
    return out


class FusedMLP(torch.autograd.Function):
    """mlp, the hidden layer (M, F) written and read once each way instead of in passes of its own."""

    @staticmethod
    def forward(ctx, x, up, down):
        h = mlp_op(x.flatten(0, -2), up, None)
        ctx.save_for_backward(x, up, down, h)
        return F.linear(h, down).view_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, up, down, h = ctx.saved_tensors
        dy = dy.flatten(0, -2).contiguous()
        du = mlp_op(dy, down, h)
        return (du @ up).view_as(x), du.T @ x.flatten(0, -2), dy.T @ h


def to_fp8(x: Tensor, step: float | None = None) -> tuple[Tensor, Tensor | float]:
    """(x / step in e4m3, step); by default x's largest becomes e4m3's, 448. What is above saturates."""
    step = x.abs().amax().float().clamp(min=1e-12) / 448 if step is None else step
    return (x.float() * (1 / step)).clamp(-448, 448).to(torch.float8_e4m3fn), step


@operator("mlp8", "(Tensor x, Tensor up, Tensor down, Tensor[] steps, ScalarType dtype) -> (Tensor, Tensor)")
def mlp8_op(x, up, down, steps, dtype):
    """mlp of x (M, D), up (F, D) and down (D, F) in e4m3 -> h (M, F), as mlp_op's, and its output (M, D).
    steps: x's times up's, h's and down's; each a tensor of its own, for cuBLASLt wants aligned addresses."""
    (bm, bn, bk), block = (128, 128, 128), TensorDescriptor.from_tensor
    h, h8 = (x.new_empty(len(x), len(up), dtype=kind) for kind in (dtype, x.dtype))
    out = block(h, [bm, bn])
    mlp_kernel[(-(-len(up) // bn), -(-len(x) // bm))](
        block(x, [bm, bk]), block(up, [bn, bk]), out, out, x.size(1), False, 32 - 8 * h.element_size(),
        bm, bn, bk, block(h8, [bm, bn]), *steps[:2], num_warps=4, num_stages=3)
    return h, torch._scaled_mm(h8, down.t(), *steps[1:], out_dtype=dtype, use_fast_accum=True)


class FusedMLP8(FusedMLP):
    """FusedMLP, but forward's products are of e4m3 copies, a step each. x is normed: |x| <= sqrt(D), which
    448 / 8 holds. h's follows an isotropic x's mean u^2, ||up||^2 / F: 42 times its root saturates."""

    @staticmethod
    def forward(ctx, x, up, down):
        (up8, up_step), (down8, down_step) = to_fp8(up), to_fp8(down)
        x8, x_step = to_fp8(x.flatten(0, -2), 1 / 8)
        h_step = 4 / len(up) * up.float().square().sum().clamp(min=1e-12)
        h, y = mlp8_op(x8, up8, down8, [x_step * up_step, h_step, down_step], x.dtype)
        ctx.save_for_backward(x, up, down, h)
        return y.view_as(x)


@operator("flash4", "(Tensor[] qkv, Tensor? bounds, int T, int window, Tensor[] back) -> Tensor[]")
def flash4_op(qkv, bounds, T, window, back):
    """FlashAttention-4 (package flash-attn-4, flash_attn/cute). qkv: (B, T, H, Dh) each, or with bounds of
    sequences (B * T, H, Dh) -> out, log-sum-exps. back: out, its gradient, these -> the gradients of qkv."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    how = dict(causal=True, window_size_left=window - 1 if window else None)
    if bounds is not None:
        how |= dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=T, max_seqlen_k=T)
    if not back:
        return [*_flash_attn_fwd(*qkv, return_lse=True, **how)[:2]]
    return [*_flash_attn_bwd(*qkv, *back, deterministic=torch.are_deterministic_algorithms_enabled(), **how)]


class Flash4(torch.autograd.Function):
    """flash4_op, differentiable. form: T and the window."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, form):
        out, lse = flash4_op([q, k, v], bounds, *form, [])
        ctx.save_for_backward(q, k, v, bounds, out, lse)
        ctx.form = form
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, bounds, out, lse = ctx.saved_tensors
        grads = flash4_op([q, k, v], bounds, *ctx.form, [out, dout.contiguous(), lse])
        return *grads, None, None


def attend_flash4(q: Tensor, k: Tensor, v: Tensor, window: int = 0, docs: Tensor | None = None) -> Tensor:
    """attend_sdpa by FlashAttention-4, which skips what is not seen. A batch with documents is B * DOCUMENTS
    sequences, whatever its tokens are: those that a row does not have are empty, at its end."""
    (B, T), bounds, flat = q.shape[:2], None, (q, k, v)
    if docs is not None:
        first = (docs[..., None] < torch.arange(DOCUMENTS, device=q.device)).sum(1)         # (B, DOCUMENTS)
        first = first + T * torch.arange(B, device=q.device)[:, None]
        bounds, flat = F.pad(first.flatten(), (0, 1), value=B * T).int(), [x.flatten(0, 1) for x in flat]
    return Flash4.apply(*flat, bounds, (T, window if window < T else 0)).view(q.shape)


def bind(fast: Callable, line: Callable, inputs: list[Tensor], name: str = "triton",
         limit: float = 0.01) -> tuple[Callable, str]:
    """`fast` when its output and gradients are within `limit` of the torch line's in float32; else the line.
    And its name for the log, fast's or why not. inputs: bf16 or float32, with requires_grad or without."""
    def results(fn: Callable, wide: bool) -> list[Tensor]:
        leaves = [(x.float() if wide else x).detach().requires_grad_(x.requires_grad) for x in inputs]
        y = torch.cat(y, 2) if isinstance(y := fn(*leaves), tuple) else y        # of heads
        dy = torch.arange(y.numel(), device=y.device).sin().view(y.transpose(0, 1).shape).transpose(0, 1)
        y.backward(dy.to(y.dtype))
        return [t.detach().float() for t in (y, *(x.grad for x in leaves if x.requires_grad))]
    try:
        got, exact = results(fast, False), results(line, True)
        error = torch.stack([(a - b).norm() / b.norm() for a, b in zip(got, exact)]).max().item()   # or nan
        return (fast, name) if error < limit else (line, f"torch (error {error:.3f})")
    except Exception as e:      # whatever a compiler or driver raises: the torch line is always right
        return line, f"torch ({type(e).__name__})"


def bind_attention(h: Config, device: torch.device) -> tuple[Callable, str]:
    """What attends in this model's layers, and its name for the log: FlashAttention-4 if right in all forms,
    or the first of PyTorch's that runs, switched on for good. A mask only the efficient kernel takes."""
    generator, kernels = torch.Generator().manual_seed(0), ("cudnn", "flash", "mem_efficient", "math")
    choose = lambda *on: [getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in on) for name in kernels]
    qkv = [torch.randn(2, 256, n, h.head_dim, generator=generator).to(device).bfloat16().requires_grad_()
           for n in (h.num_heads, h.num_kv_heads, h.num_kv_heads)]
    why, docs = "", documents(torch.arange(512, device=device).view(2, 256) % 90, 0)
    choose(*kernels)
    for windowed, own in (forms := {(s.window > 0, s.docs) for s in layer_table(h)}):
        how = dict(window=50 * windowed, docs=docs if own else None)
        why = max(why, bind(partial(attend_flash4, **how), partial(attend_sdpa, **how), qkv, "")[1])
    if not why:
        return attend_flash4, "flash4"
    told = "" if "ModuleNotFound" in why else f",flash4:{why}".replace(" ", "")      # its absence is no news
    masks = ["mem_efficient"] * any(map(any, forms))
    for name in kernels:
        choose(name)
        with suppress(Exception):       # whatever a compiler or a driver raises
            attend_sdpa(*qkv).sum().backward()
            choose(name, *masks)
            return attend_sdpa, "+".join(dict.fromkeys([name, *masks])) + told
    raise InputError("no attention kernel of this PyTorch runs on this GPU; install a build that supports it")


def bind_ops(h: Config, device: torch.device) -> tuple[Ops, dict[str, str]]:
    """The kernels that are right on this device, and their names for the log."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device).bfloat16()
    x, gain = draw(2, 64, 4, 2 * h.head_dim)[..., : h.head_dim], torch.tensor([1.5, 0.5], device=device)
    qk, qk_name = bind(FusedHeads.apply, qk_heads, [x.requires_grad_(), gain.requires_grad_(),
                                                    *rope_tables(64, h.rope_dims, h.rope_base, device)])
    shapes = (2, 64, h.model_dim), (h.mlp_dim, h.model_dim), (h.model_dim, h.mlp_dim)
    inputs = [draw(*s).requires_grad_() for s in shapes]
    fused, mlp_name = bind(FusedMLP.apply, mlp, inputs)
    fp8, told = bind(FusedMLP8.apply, mlp, inputs, "fp8", 0.1) if h.fp8 else (fused, "")
    chosen = (lambda *args: (fp8 if torch.is_grad_enabled() else fused)(*args)) if told == "fp8" else fused
    mlp_name += "+fp8" if told == "fp8" else told and f",fp8:{told}".replace(" ", "")
    attend, attention = bind_attention(h, device)
    return Ops(attend, qk, chosen), {"attention": attention, "qk": qk_name, "mlp": mlp_name}


@triton.jit
def load_tile(ptr, rows, columns, M, N, stride_m, stride_n, EVEN: tl.constexpr):
    """ptr[rows, columns] of an (M, N) matrix, zero outside. EVEN: no tile reaches outside."""
    at = ptr + rows[:, None] * stride_m + columns[None, :] * stride_n
    if EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(ptr, tile, rows, columns, M, N, stride_m, stride_n):
    at = ptr + rows[:, None] * stride_m + columns[None, :] * stride_n
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def symmetric_kernel(x_ptr, r_ptr, out_ptr, sums_ptr, M, N, stride_b, stride_m, stride_n, a, b, c,
                     POLY: tl.constexpr, SCALED: tl.constexpr, POWER: tl.constexpr, EVEN: tl.constexpr,
                     BLOCK: tl.constexpr, BK: tl.constexpr):
    """One program: a tile (i, j <= i) of XX' and its mirror image; only half of the products are made.
    SCALED: times r_row r_column. POLY: X is symmetric, the tile is of aI + bX + cXX', SCALED: times r_column.
    POWER: the tile's sums of |.|^POWER go to sums[j, rows] and, for the mirror image, to sums[i, columns]."""
    pid, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8 * pid + 1.5) - 1) / 2).to(tl.int32)      # i (i + 1) / 2 <= pid; 1.5, not 1: sqrt rounds
    j = pid - i * (i + 1) // 2
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    x_ptr, out_ptr, r_ptr = x_ptr + batch * stride_b, out_ptr + batch * M * M, r_ptr + batch * M
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, N, BK):
        k = start + tl.arange(0, BK)
        left = load_tile(x_ptr, rows, k, M, N, stride_m, stride_n, EVEN)
        right = load_tile(x_ptr, columns, k, M, N, stride_m, stride_n, EVEN)
        acc = tl.dot(left, tl.trans(right), acc)
    if POLY:
        acc = c * acc + b * load_tile(x_ptr, rows, columns, M, M, stride_m, stride_n, EVEN).to(tl.float32)
        acc += tl.where(rows[:, None] == columns[None, :], a, 0.0)
    mirror = acc
    if SCALED:
        r_rows = tl.load(r_ptr + rows, mask=rows < M, other=0.0)[:, None]
        r_columns = tl.load(r_ptr + columns, mask=columns < M, other=0.0)[None, :]
        if POLY:
            acc, mirror = acc * r_columns, acc * r_rows
        else:
            acc = acc * (r_rows * r_columns)
            mirror = acc
    store_tile(out_ptr, acc, rows, columns, M, M, M, 1)
    if i != j:
        store_tile(out_ptr, tl.trans(mirror), columns, rows, M, M, M, 1)
    if POWER:
        size = tl.abs(acc) if POWER == 1 else acc * acc
        sums_ptr += batch * tl.cdiv(M, BLOCK) * M
        tl.store(sums_ptr + j * M + rows, tl.sum(size, 1), mask=rows < M)
        if i != j:
            tl.store(sums_ptr + i * M + columns, tl.sum(size, 0), mask=columns < M)


@triton.jit
def block_inverse_kernel(t_ptr, out_ptr, M, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
                         PRECISION: tl.constexpr):
    """One program: the inverse of a diagonal block of the unit lower triangle of T, by doubling.
    [P 0; C Q]^-1 has -Q^-1 C P^-1 below P^-1 and Q^-1, whose entries are <= 1: no level loses digits."""
    batch, n = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    at = tl.program_id(0) * BLOCK + n
    T = load_tile(t_ptr + batch * M * M, at, at, M, M, M, 1, False).to(tl.float32)
    row, column = n[:, None], n[None, :]
    inverse = tl.where(row == column, 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        C = tl.where(row >> level == (column >> level) + 1, T, 0.0)
        C = tl.where(row >> (level + 1) == column >> (level + 1), C, 0.0)
        if level > 0:
            C = tl.dot(inverse, tl.dot(C, inverse, input_precision=PRECISION), input_precision=PRECISION)
        inverse -= C
    out_ptr += (batch * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK
    store_tile(out_ptr, inverse, n, n, BLOCK, BLOCK, BLOCK, 1)


@triton.jit
def substitution_kernel(t_ptr, inverse_ptr, x_ptr, d_ptr, y_ptr, squares_ptr, M, N, stride_b, stride_m,
                        stride_n, out_b, out_m, out_n, BLOCK: tl.constexpr, BN: tl.constexpr):
    """One program: BN columns of Y, TY = diag(d) X, by blocks: Y_i = T_ii^-1 (d_i X_i - sum_{k<i} T_ik Y_k).
    Its own Y_k come back through the cache, behind a barrier. Only T's blocks below the diagonal are read."""
    panel, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns, n = panel * BN + tl.arange(0, BN), tl.arange(0, BLOCK)
    t_ptr, x_ptr, y_ptr = t_ptr + batch * M * M, x_ptr + batch * stride_b, y_ptr + batch * out_b
    blocks = tl.cdiv(M, BLOCK)
    for i in range(blocks):
        rows = i * BLOCK + n
        d = tl.load(d_ptr + batch * M + rows, mask=rows < M, other=0.0)[:, None]
        x = load_tile(x_ptr, rows, columns, M, N, stride_m, stride_n, False).to(tl.float32)
        at = inverse_ptr + (batch * blocks + i) * BLOCK * BLOCK
        inverse = load_tile(at, n, n, BLOCK, BLOCK, BLOCK, 1, True)
        acc = tl.zeros((BLOCK, BN), tl.float32)
        for start in range(0, i * BLOCK, BLOCK):
            left = load_tile(t_ptr, rows, start + n, M, M, M, 1, False)
            right = load_tile(y_ptr, start + n, columns, M, N, out_m, out_n, False)
            acc = tl.dot(left, right, acc)
        acc = tl.dot(inverse, (d * x - acc).to(y_ptr.dtype.element_ty))
        y = acc.to(y_ptr.dtype.element_ty)
        store_tile(y_ptr, y, rows, columns, M, N, out_m, out_n)
        squares = squares_ptr + (batch * tl.num_programs(0) + panel) * M + rows
        tl.store(squares, tl.sum(y.to(tl.float32) * y.to(tl.float32), 1), mask=rows < M)
        tl.debug_barrier()


@operator("symmetric",
          "(Tensor X, Tensor? r, float[] poly, int power, ScalarType dtype, int[] tile) -> (Tensor, Tensor)")
def symmetric_op(X, r, poly, power, dtype, tile):
    """symmetric_kernel: (matrices, partial sums). poly: (a, b, c) or (). tile: (BLOCK, BK, warps, stages)."""
    (B, M, N), (block, bk, warps, stages), n = X.shape, tile, -(-X.size(1) // tile[0])
    out, sums = X.new_empty(B, M, M, dtype=dtype), X.new_empty(B, n if power else 0, M, dtype=torch.float32)
    symmetric_kernel[(n * (n + 1) // 2, B)](
        X, X if r is None else r, out, sums, M, N, *X.stride(), *(poly or (0.0, 0.0, 0.0)), len(poly) > 0,
        r is not None, power, M % block == 0 and N % bk == 0, block, bk, num_warps=warps, num_stages=stages)
    return out, sums


@operator("solve", "(Tensor T, Tensor X, Tensor d, int[] tile) -> (Tensor, Tensor)")
def solve_op(T, X, d, tile):
    """Inverses of blocks of 64, then substitution: Y, partial row sums of Y^2. tile: (BN, warps, stages)."""
    (B, M, N), (bn, warps, stages), blocks = X.shape, tile, -(-X.size(1) // 64)
    Y, squares = torch.empty_like(X, dtype=T.dtype), d.new_empty(B, -(-N // bn), M)
    inverses = T.new_empty(B, blocks, 64, 64)
    block_inverse_kernel[(blocks, B)](T, inverses, M, 64, 6, "tf32x3", num_warps=4)
    substitution_kernel[(-(-N // bn), B)](T, inverses, X, d, Y, squares, M, N, *X.stride(), *Y.stride(), 64,
                                          bn, num_warps=warps, num_stages=stages)
    return Y, squares


# What each operator returns, for the compiler.
qk_op.register_fake(lambda x, *_: x.new_empty(x.shape))
qk_backward_op.register_fake(lambda qkv, gain, *_: (qkv.new_empty(qkv.shape), torch.empty_like(gain)))
mlp_op.register_fake(lambda a, w, h: a.new_empty(a.size(0), w.size(0 if h is None else 1)))
mlp8_op.register_fake(lambda x, up, down, steps, dtype: (
    x.new_empty(len(x), len(up), dtype=dtype), x.new_empty(len(x), len(down), dtype=dtype)))
flash4_op.register_fake(lambda qkv, bounds, T, window, back: [x.new_empty(x.shape) for x in qkv] if back else
                        [(q := qkv[0]).new_empty(q.shape), q[..., 0].mT.contiguous().float()])
symmetric_op.register_fake(lambda X, r, poly, power, dtype, tile: (
    X.new_empty(X.size(0), X.size(1), X.size(1), dtype=dtype),
    X.new_empty(X.size(0), -(-X.size(1) // tile[0]) if power else 0, X.size(1), dtype=torch.float32)))
solve_op.register_fake(lambda T, X, d, tile: (
    torch.empty_like(X, dtype=T.dtype), d.new_empty(X.size(0), -(-X.size(2) // tile[0]), X.size(1))))

# Where a kernel wins on an H100: (product, short side at most, matrices at most, its operator's tile). The
# first row that fits counts; without one the torch line does it. us in a CUDA graph, torch line / kernel:
WINS = (
    ("xxt", 256, 24, (64, 64, 4, 4)),              # 22 x 256 x 512: 6.2 / 5.9
    ("xxt", 512, 4, (64, 128, 4, 3)),              # 3 x 512 x 512: 4.9 / 4.3; an eighth of ns5: 221 / 214
    ("xxt", 512, 12, (128, 64, 8, 4)),             # 11 x 512 x 1536: 18.0 (tall), 15.0 (wide) / 14.7, 15.5
    ("xxt", 512, 24, (128, 64, 4, 3)),             # 22 x 512 x 512: 12.4 / 13.5; all of ns5: 868 / 842
    ("ba_plus_caa", 256, 24, (64, 64, 4, 3)),      # 22 x 256: 8.6 / 5.5
    ("ba_plus_caa", 512, 4, (64, 128, 4, 3)),      # 3 x 512: 7.6 / 4.8
    ("ba_plus_caa", 512, 12, (64, 64, 4, 3)),      # 11 x 512: 14.7 / 8.8
    ("ba_plus_caa", 512, 24, (128, 64, 4, 3)),     # 22 x 512: 25.4 / 16.6
    ("lower_solve", 512, 4, (32, 4, 3)),           # 3 x 512 x 512: 197 / 40
    ("lower_solve", 512, 24, (64, 4, 3)),          # 22 x 512 x 512: 449 / 56
)


def tile_of(product: str, X: Tensor) -> tuple[int, ...] | None:
    """The tile of WINS for a product with X (B, M, N); None: the torch line. Measured: sides of whole 64s."""
    hopper = X.is_cuda and torch.cuda.get_device_properties(X.device).major == 9
    if not (hopper and X.dtype.itemsize == 2 and X.size(1) % 64 == 0 == X.size(2) % 64):
        return None
    return next((tile for name, short, matrices, tile in WINS
                 if name == product and X.size(1) <= short and X.size(0) <= matrices), None)


def xxt(X: Tensor, r: Tensor | None = None, power: int = 0, dtype: torch.dtype | None = None) -> tuple:
    """A = diag(r) XX' diag(r) (B, M, M) in `dtype` or X's; sum_j |A_ij|^power (B, M) if power is 1 or 2."""
    if tile := tile_of("xxt", X):
        A, sums = symmetric_op(X, r, (), power, dtype or X.dtype, tile)
        return A, sums.sum(1) if power else None
    A = torch.bmm(X, X.mT)
    A = (A if r is None else A * r[:, :, None] * r[:, None]).to(dtype or X.dtype)
    return A, A.float().abs().pow(power).sum(-1) if power else None


def ba_plus_caa(A: Tensor, a: float, b: float, c: float, r: Tensor | None = None) -> Tensor:
    """(aI + bA + cA^2) diag(r) for a symmetric A. (B, M, M), (B, M) -> (B, M, M)."""
    if tile := tile_of("ba_plus_caa", A):
        return symmetric_op(A, r, (a, b, c), 0, A.dtype, tile)[0]
    X = A.to(torch.promote_types(A.dtype, torch.float32))       # the diagonal must not be rounded twice
    C = torch.baddbmm(X, X, X, beta=b, alpha=c) + a * torch.eye(A.size(-1), dtype=X.dtype, device=A.device)
    return (C if r is None else C * r[:, None]).to(A.dtype)


def lower_solve(T: Tensor, X: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Y (B, M, N) with TY = diag(d) X, its rows' squared norms (B, M). Of T what is below a unit diagonal."""
    if tile := tile_of("lower_solve", X):
        Y, squares = solve_op(T, X, d, tile)
        return Y, squares.sum(1)
    Y = torch.linalg.solve_triangular(T.float(), X.float() * d[:, :, None], upper=False, unitriangular=True)
    return Y.to(T.dtype), Y.to(T.dtype).float().square().sum(-1)


# -----------------------------------------------------------------------------
# 8. Directions: two tables. A row of ORTHO whitens a momentum, a row of STEP_RULES makes a step of it.

NS5 = ((3.4445, -4.7750, 2.0315),) * 5      # Jordan, Muon (2024): five steps end in about [0.68, 1.20]
TURBO = ((4.6051, -9.6552, 5.6769), (4.7505, -6.0861, 2.1790),       # thib-s/flash-newton-schulz, a genetic
         (2.7763, -2.3190, 0.5523), (2.4231, -2.2861, 0.8193))       # search for what AOL leaves; slope 147
GPU_SCALE = 2.0 ** 40                       # squares of entries from 1e-30 to 1e5 then fit float32 and bf16
SAFETY = 2e-2                               # bf16 rounding must not lift a singular value out of [0, 1]


def minimax_quintic(low: float, high: float) -> tuple[float, float, float]:
    """(a, b, c) of the odd quintic of least largest distance E to 1 on [low, high]: Remez, until E stays."""
    if low / high >= 1 - 5e-6:      # the limit, Newton-Schulz
        return 15 / 8 / high, -10 / 8 / high ** 3, 3 / 8 / high ** 5
    q, r, before = (3 * low + high) / 4, (low + 3 * high) / 4, math.inf
    for _ in range(100):
        x = np.array([low, q, r, high])
        nodes = np.stack([x, x ** 3, x ** 5, [1, -1, 1, -1]], 1)
        a, b, c, error = np.linalg.solve(nodes, np.ones(4)).tolist()
        if abs(error - before) <= 1e-15:
            break
        root, before = math.sqrt(9 * b * b - 20 * a * c), error      # extrema: a + 3b x^2 + 5c x^4 = 0
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


@lru_cache(maxsize=None)
def polar_express(low: float, steps: int, safety: float, cushion: float) -> tuple:
    """Coefficients (a, b, c) of each step: Polar Express (Amsel et al., arXiv:2505.16932). Each the minimax
    quintic of what is left of [low, 1] so far, its top u. cushion: it fits [cushion * u, u] at most, which
    bounds slopes, and the image is centred on 1. safety: all but the last read x / (1 + safety)."""
    rows, u = [], 1.0
    for k in range(steps):
        a, b, c = minimax_quintic(max(low, cushion * u), u)
        if cushion * u > low:
            centre = 2 / sum(a * x + b * x ** 3 + c * x ** 5 for x in (low, u))
            a, b, c = a * centre, b * centre, c * centre
        shrink = 1 + safety if k < steps - 1 else 1.0
        rows.append((a / shrink, b / shrink ** 3, c / shrink ** 5))
        low = sum(w * low ** power for w, power in zip(rows[-1], (1, 3, 5)))
        u = 2 - low
    return tuple(rows)


# PE5 ends in [0.86, 1.14], PE4 in [0.78, 1.22], from 1e-3 in [0.42, 1.58]: Schatten-4 makes up for its 3.
PE5 = polar_express(1e-3, 5, SAFETY, 2e-2)
PE4 = polar_express(3e-3, 4, SAFETY, 2e-2)


def inverse_root(x: Tensor) -> Tensor:
    """x^(-1/2), and 0 for 0: a zero row or matrix stays zero."""
    return torch.where(x > 0, x.rsqrt(), 0.0)


def frobenius_scale(X: Tensor) -> Tensor:
    """1 / |X|, for every row of X. (B, M, N) -> (B, M) float32."""
    return inverse_root(X.float().square().sum((-2, -1)))[:, None].repeat(1, X.size(1))


def quintic(X: Tensor, coefficients: tuple, r: Tensor, A: Tensor | None = None) -> Tensor:
    """X <- aX + (bA + cA^2)X with A = XX', once per coefficient row. Singular values move, vectors stay.
    It starts from diag(r) X, which is never written: r (B, M) scales the first A and the columns of the first
    polynomial. X (B, M, N). A: the Gram matrix of diag(r) X, if known. aI inside: 17.8 us, baddbmm 27.3."""
    for a, b, c in coefficients:
        C = ba_plus_caa(xxt(X, r)[0] if A is None else A, a, b, c, r)
        X = torch.bmm(C, X) if X.stride(-1) == 1 else torch.bmm(X.mT, C.mT).mT     # in the layout of X
        r = A = None
    return X


def ortho_polar_express(X: Tensor, coefficients: tuple) -> Tensor:
    """Polar Express from unit Schatten-4 norm |XX'|^(1/2): it bounds the largest singular value like the
    Frobenius norm, 1.7 to 4 times tighter, and is free, as the first step needs the Gram matrix anyway."""
    r = frobenius_scale(X)
    A, sums = xxt(X, r, 2)
    norm = sums.sum(-1).sqrt().sqrt().clamp_min(1e-2)       # it is at least M^(-1/4), or the matrix is zero
    s = (1 / ((1 + SAFETY) * norm))[:, None]
    return quintic(X, coefficients, r * s, (A * (s * s)[:, None]).to(A.dtype))


def ortho_turbo(X: Tensor) -> Tensor:
    """Turbo-Muon (arXiv:2512.04632): rows scaled by (sum_j |A_ij|)^(-1/2) (AOL, arXiv:2208.03160) bound the
    spectrum by 1 but turn singular vectors; the first Gram matrix is scaled, not made again."""
    A, sums = xxt(X, None, 1)
    r = inverse_root(sums)
    return quintic(X, TURBO, r, (A * r[:, :, None] * r[:, None]).to(A.dtype))


def ortho_mud(X: Tensor, passes: int) -> Tensor:
    """Momentum decorrelation (Southworth & Thomas, arXiv:2603.17970, Alg. 2). A pass: unit rows Q, T = lower
    triangle of QQ', solve TY = Q, unit rows, as factors d of the next product. Tends to Gram-Schmidt in row
    order, not to the polar factor. |Y| <= 1 and |T_ij| <= 1 fit fp16, eight times finer than bf16."""
    dtype, fine = X.dtype, torch.half if X.dtype == torch.bfloat16 else X.dtype
    d = inverse_root(X.float().square().sum(-1))
    for _ in range(passes):
        X, squares = lower_solve(xxt(X, d, dtype=fine)[0], X, d)
        d = inverse_root(squares)
    return (X * d[:, :, None]).to(dtype)


# (B, M, N), M <= N, of norms whose squares float32 holds -> the same shape. In bf16 on a GPU.
ORTHO: dict[str, Callable[[Tensor], Tensor]] = {
    "ns5": lambda X: quintic(X, NS5, frobenius_scale(X)),
    "polar_express": lambda X: ortho_polar_express(X, PE5),
    "polar_express4": lambda X: ortho_polar_express(X, PE4),
    "turbo": ortho_turbo,
    "mud": lambda X: ortho_mud(X, 1),
    "mud2": lambda X: ortho_mud(X, 2),
}


def orthogonalize(G: Tensor, method: str) -> Tensor:
    """Replace each matrix by (nearly) its polar factor. (..., M, N) -> the same; method: row of ORTHO. Scale,
    1e-20 too, changes nothing, zero gives zero. Iterates on the short side; on a CPU in float32."""
    tall, X = G.size(-2) > G.size(-1), G.float().reshape(-1, *G.shape[-2:])
    X = (X * GPU_SCALE).bfloat16() if X.is_cuda else X / X.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30)
    X = ORTHO[method](X.mT if tall else X)
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def with_norm(X: Tensor, norm: float | Tensor) -> Tensor:
    """Each matrix of X (b, M, N) scaled to a Frobenius norm, number or (b, 1, 1); zero stays zero."""
    return X * (norm / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1e-10))


def neuron_shape(b: int, M: int, N: int) -> tuple[int, int, int]:
    """One number per line of the long side: rows of tall and square matrices, columns of wide ones."""
    return (b, M, 1) if M >= N else (b, 1, N)


def normalize_neurons(U: Tensor, v: Tensor, beta2: float) -> Tensor:
    """NorMuon (arXiv:2510.05491): lines of U (b, M, N) over the root of their mean square's average v.
    Columns of wide ones, their rows' norm is one, as in modded-nanogpt. Each keeps its norm. v is updated."""
    v.lerp_(U.square().mean(-1 if v.size(-1) == 1 else -2, keepdim=True), 1 - beta2)
    return with_norm(U * v.clamp_min(1e-10).rsqrt(), torch.linalg.matrix_norm(U, keepdim=True))


def step_muon(W: Tensor, U: Tensor, lr: Tensor, wd: float | Tensor) -> None:
    """Decoupled decay, then lr * sqrt(max(1, rows/columns)) along U (Jordan's scale)."""
    W.mul_(1 - lr * wd).sub_(U * (lr * max(1.0, W.size(-2) / W.size(-1)) ** 0.5))


def step_hyperball(W: Tensor, U: Tensor, lr: Tensor, wd: float | Tensor) -> None:
    """MuonH: a step of lr |W| along U / |U|, then back to |W| (Frobenius). lr is an angle; wd is not read.
    After modded-nanogpt track 3, record 5. A zero matrix stays zero, hence parameter_table's other start."""
    R = torch.linalg.matrix_norm(W, keepdim=True)
    W.copy_(with_norm(W - with_norm(U, lr * R), R))


STEP_RULES: dict[str, Callable] = {"muon": step_muon, "hyperball": step_hyperball,
                                   "normuon": step_muon, "normuon_hyperball": step_hyperball}
RULE_STATE: dict[str, Callable] = {"normuon": neuron_shape, "normuon_hyperball": neuron_shape}  # of (b, M, N)

# -----------------------------------------------------------------------------
# 9. Optimizer: sharded state, and the schedule that holds every collective of a step.

class StepScalars(NamedTuple):
    """0-dimensional tensors, so that a new value is not a new compilation."""
    clip: Tensor            # factor on every gradient
    momentum: Tensor
    matrix_lr: Tensor
    adam_lr_mul: Tensor
    correction1: Tensor     # 1 - beta1^t
    correction2: Tensor     # 1 - beta2^t


def matrix_update(W: Tensor, g: Tensor, momentum: Tensor, s: StepScalars, h: Config,
                  second: Tensor | None = None) -> None:
    """Nesterov momentum, direction, step; in place on this rank's matrices W (b, M, N) and their state.
    second: the rule's state, by RULE_STATE. Cautious decay (arXiv:2510.12402): only where U and W agree."""
    g = g.float() * s.clip
    momentum.mul_(s.momentum).add_(g * (1 - s.momentum))
    U = orthogonalize(g * (1 - s.momentum) + momentum * s.momentum, h.ortho)
    if h.step_rule in RULE_STATE:
        U = normalize_neurons(U, second, h.normuon_beta2)
    wd = h.muon_wd * (U * W >= 0) if h.cautious_wd else h.muon_wd
    STEP_RULES[h.step_rule](W, U, s.matrix_lr, wd)


def adam_update(buffers: tuple[Tensor, ...], s: StepScalars, h: Config) -> None:
    """AdamW (arXiv:1711.05101) on flat buffers (parameters, gradients, m, v, lr, wd), decay decoupled."""
    p, g, m, v, lr, wd = buffers
    g = g.float() * s.clip
    m.mul_(h.adam_beta1).add_(g * (1 - h.adam_beta1))
    v.mul_(h.adam_beta2).add_(g.square() * (1 - h.adam_beta2))
    step = (m / s.correction1) / ((v / s.correction2).sqrt() + h.adam_eps)
    p.sub_(s.adam_lr_mul * lr * (wd * p + step))


class Optimizer:
    """The update and its communication. Parameters and gradients are re-homed, so that collectives run in
    place. A bank has a row for each matrix, tall or wide, ceil(n / world) for each rank: on 8, 11 MLP-up, 2
    of padding, which stays zero, 11 MLP-down. Small tensors share one buffer. State: of owned matrices."""

    def __init__(self, model: GPT, h: Config, m: Machine) -> None:
        params = dict(model.named_parameters())
        self.h, self.m, self.steps = h, m, 0
        self.bank, self.bank_grad, self.wire = {}, {}, {}     # home -> (world, per_rank, M * N)
        self.owned, self.momentum, self.second = {}, {}, {}   # home -> updates; name -> (b, M, N), RULE_STATE
        self.rows: dict[str, slice] = {}                      # name -> of its matrices those that are owned
        for home in dict.fromkeys(s.home for s in MATRICES):
            self.make_bank(home, {s.name: params[s.name] for s in MATRICES if s.home == home})
        sizes = [-(-params[s.name].numel() // 64) * 64 for s in SMALL]    # 256-byte alignment of every view
        self.flat, self.flat_grad, self.flat_m, self.flat_v, flat_lr = (
            torch.zeros(sum(sizes), device=m.device) for _ in range(5))
        pieces = (t.split(sizes) for t in (self.flat, self.flat_grad, flat_lr))
        for s, value, grad, lr in zip(SMALL, *pieces):
            p = params[s.name]
            self.rehome(p, value[: p.numel()].view_as(p), grad[: p.numel()].view_as(p))
            lr.fill_(getattr(h, s.lr))
            p.requires_grad_(getattr(h, s.lr) > 0)             # what does not move needs no gradient
        flat_wd = torch.full_like(self.flat, h.adam_wd)
        self.wire["flat"] = self.flat_grad.to(getattr(torch, h.wire_dtype))
        self.adam_buffers = (self.flat, self.wire["flat"], self.flat_m, self.flat_v, flat_lr, flat_wd)
        self.matrix_update, self.adam_update = m.compile(matrix_update), m.compile(adam_update)
        self.numbers = torch.ones(len(StepScalars._fields) - 1, device=m.device)     # all of it but clip
        self.norm = torch.zeros((), dtype=torch.float64, device=m.device)    # of the step's gradients
        saved = self.snapshot()
        self.update, self.failure = m.replay(self.schedule)
        self.restore(saved)                                # a recorder has run it

    def make_bank(self, home: str, members: dict[str, nn.Parameter]) -> None:
        """Buffers of parameters of one matrix size, padding behind the first. wire: gradient in transit."""
        *_, last = members.values()
        world, count = self.m.world_size, sum(map(len, members.values()))
        shape = (world, -(-count // world), last[0].numel())
        self.bank[home], self.bank_grad[home] = (torch.zeros(shape, device=self.m.device) for _ in range(2))
        self.wire[home], self.owned[home] = self.bank_grad[home].to(getattr(torch, self.h.wire_dtype)), []
        bank, grad, wire = (x[home].flatten(0, 1) for x in (self.bank, self.bank_grad, self.wire))
        mine = self.m.levels[-1][2].start * shape[1]
        for (name, p), first in zip(members.items(), (0, len(bank) - len(last))):
            self.rehome(p, *(x[first : first + len(p)].view_as(p) for x in (bank, grad)))
            low, high = (min(max(at, first), first + len(p)) for at in (mine, mine + shape[1]))
            self.rows[name] = slice(low - first, high - first)
            if low < high:
                W, g = (x[low:high].view(-1, *p.shape[1:]) for x in (bank, wire))
                self.momentum[name] = torch.zeros_like(W)
                if self.h.step_rule in RULE_STATE:
                    self.second[name] = W.new_zeros(RULE_STATE[self.h.step_rule](*W.shape))
                self.owned[home].append((W, g, self.momentum[name], self.second.get(name)))

    @staticmethod
    def rehome(p: nn.Parameter, value: Tensor, grad: Tensor) -> None:
        """Make `value` the parameter's storage, contents kept, and `grad` the place its gradients add up."""
        value.copy_(p.data)
        p.data, p.grad = value, grad

    def step(self, hp: Hyper) -> None:
        """The host's part: this step's numbers to the device, then one launch. The pinned memory is new each
        time, for the host may run ahead: its allocator reuses it only when the copy from it has ended."""
        self.steps += 1
        corrections = [1 - beta ** self.steps for beta in (self.h.adam_beta1, self.h.adam_beta2)]
        rates = [self.h.matrix_lr * hp.lr_mul, hp.lr_mul]
        host = torch.tensor([hp.momentum, *rates, *corrections], dtype=torch.float32, pin_memory=self.m.pin)
        self.numbers.copy_(host, non_blocking=True)
        self.update()

    @torch.no_grad()
    def schedule(self) -> None:
        """Every collective of a step is launched from these lines; then all ranks are whole. Gradients go out
        in PARAM_TABLE's order, the biggest first; banks come back in the opposite one, the cheapest first."""
        average, arrivals = dict(op=dist.ReduceOp.AVG, async_op=True), []
        for home, grad in self.bank_grad.items():                   # 1. gradients on the wire, biggest first
            wire = self.wire[home].copy_(grad)                      # onto itself it is not copied
            for i, (group, whole, part) in enumerate(self.m.levels):
                if i:
                    arrivals[-1].wait()                             # between nodes goes what came from inside
                arrivals.append(reduce_scatter(wire[part], wire[whole], group=group, **average))
        for work in [*arrivals, dist.all_reduce(self.wire["flat"].copy_(self.flat_grad), **average)]:
            work.wait()
        scalars = StepScalars(self.clip_factor(), *self.numbers.unbind())     # 2. one norm over all of them
        with self.m.lanes() as lane:                                # side by side:
            with lane():                                            # 3. replicated: every rank does the same
                self.adam_update(self.adam_buffers, scalars, self.h)
                self.flat_grad.zero_()
            for home in reversed(self.bank):                        # 4. update what is owned here, send it
                with lane():
                    for W, g, momentum, second in self.owned[home]:
                        self.matrix_update(W, g, momentum, scalars, self.h, second)
                    self.bank_grad[home].zero_()
                    for group, whole, part in reversed(self.m.levels):
                        all_gather(self.bank[home][whole], self.bank[home][part], group, True).wait()

    def clip_factor(self) -> Tensor:
        """min(1, grad_clip / global norm), (); the same on every rank and for every world size."""
        gradients = [self.wire[home][self.m.levels[-1][2]] for home in self.bank] + [self.wire["flat"]]
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square()  # float32: 2e-4 off
        dist.all_reduce(squares[:-1])                               # the last is whole on every rank
        self.norm.copy_(squares.sum().sqrt())
        return ((self.h.grad_clip or math.inf) / (self.norm + 1e-6)).clamp_max(1.0).float()

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes, parameters included."""
        matrices = [*self.bank.values(), *self.momentum.values(), *self.second.values()]
        return [*matrices, self.flat, self.flat_m, self.flat_v]

    def snapshot(self) -> tuple[int, list[Tensor]]:
        return self.steps, [t.clone() for t in self.state()]

    @torch.no_grad()
    def restore(self, saved: tuple[int, list[Tensor]]) -> None:
        """Back to a snapshot, bit for bit; gradients are cleared."""
        self.steps = saved[0]
        torch._foreach_copy_(self.state(), saved[1])
        torch._foreach_zero_([*self.bank_grad.values(), self.flat_grad])


# -----------------------------------------------------------------------------
# 10. Schedules: pure functions of progress through the run.

class Hyper(NamedTuple):
    progress: float         # in [0, 1]: the larger share of the two budgets, time and iterations
    momentum: float
    lr_mul: float           # on every rate


def hyper_at(h: Config, step: int, elapsed_ms: float) -> Hyper:
    """What a step at this point uses: constant rates, then a linear warmdown; momentum rising at first."""
    time_share = elapsed_ms / (1000 * h.max_wallclock_seconds) if h.max_wallclock_seconds > 0 else 0.0
    progress = min(1.0, max(time_share, step / h.iterations))
    lr_mul = max(min(1.0, (1 - progress) / h.warmdown_frac), h.min_lr_frac)
    ramp = min(1.0, progress / h.muon_momentum_warmup_frac) if h.muon_momentum_warmup_frac > 0 else 1.0
    momentum = h.muon_momentum_start + ramp * (h.muon_momentum - h.muon_momentum_start)
    return Hyper(progress, momentum, lr_mul)


# -----------------------------------------------------------------------------
# 11. Averaging: an exponential average of the weights whose horizon is a fraction of the run.

class Ema:
    """Average with weight exp(-age / ema_frac), age in shares of the run, so that run lengths compare."""

    def __init__(self, model: GPT, h: Config) -> None:
        self.h, self.progress = h, 0.0
        self.params = [p.data for p in model.parameters()]
        self.average = [p.clone() for p in self.params]

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Move towards the current weights, by the progress made since the last call."""
        weight = 1 - math.exp((self.progress - progress) / self.h.ema_frac)
        torch._foreach_lerp_(self.average, self.params, weight)
        self.progress = progress

    @torch.no_grad()
    def reset(self) -> None:
        self.progress = 0.0
        torch._foreach_copy_(self.average, self.params)


# -----------------------------------------------------------------------------
# 12. Artifact: quantize, byte layout, pack, unpack, packed source. No pickle anywhere.
#
#   artifact := xz( MAGIC "GPT6" | u32 header_bytes | header | payload )          little-endian throughout
#   header   := compact sorted JSON {"config": {...}, "tensors": [[name, kind, shape, offset], ...]}, by name
#   int6     := one int8 code per weight in [-31, 31], row-major, then one f16 scale per row; w = code * scale
#   int8     := the same with codes in [-127, 127]          f16, f32 := the values
# One byte per int6 code on purpose: xz models bytes better than packed bits (measured 6.5 % smaller).

MAGIC = b"GPT6"
KINDS = {s.name: s.kind for s in PARAM_TABLE}
CODE_LIMIT = {"int6": 31, "int8": 127}
STORED = {kind: np.dtype(d) for kind, d in (("int6", "i1"), ("int8", "i1"), ("f16", "<f2"), ("f32", "<f4"))}
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)    # of the row's largest magnitude
MAX_RAW_BYTES, MAX_HEADER_BYTES = 1 << 28, 1 << 16
# Codes repeat nothing: the least dictionary takes 1.8 % fewer bytes, a tenth of the time; the rest < 0.05 %.
XZ = dict(format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32,
          filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 4096}])
compress = partial(lzma.compress, **XZ)


def gptq(W: Tensor, scale: Tensor, gram: Tensor, limit: int) -> Tensor:
    """Codes of W (b, M, N) in steps of scale (b, M, 1) that change W x the least, for inputs x of which gram
    (b, N, N) is the sum of x x': columns are rounded in turn, those behind make up for each error.
    Frantar et al., arXiv:2210.17323, Alg. 1, in blocks of one column, its damping of 1 % of the diagonal."""
    damping = 0.01 * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-10)
    H = gram + damping[:, None, None] * torch.eye(W.size(-1), device=W.device)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, codes = W.clone(), torch.empty_like(W)
    for j in range(W.size(-1)):
        at = slice(j, j + 1)
        codes[..., at] = (W[..., at] / scale).round().clamp(-limit, limit)
        error = (W[..., at] - codes[..., at] * scale) / U[:, at, at]
        W[..., j:] -= error * U[:, at, j:]
    return codes


def quantize(W: Tensor, kind: str, least_step: float = 0.0, gram: Tensor | None = None) -> tuple:
    """Per-row symmetric codes with a clip search. W (..., N) -> codes int8 (..., N), scales f16 (..., 1).
    Of the candidate clips the one with the least squared error wins, row by row; the step is never below
    `least_step` standard deviations of the row. Codes are the nearest or, with calibrate's gram, gptq's."""
    limit, W = CODE_LIMIT[kind], W.float()
    peak = W.abs().amax(-1, keepdim=True)
    floor = (W.square().mean(-1, keepdim=True).sqrt() * least_step).clamp_min(2.0 ** -24)     # least f16
    codes = lambda scale: (W / scale).round().clamp(-limit, limit)
    scales = [torch.maximum(clip * peak / limit, floor).half().float() for clip in CLIPS]
    errors = torch.stack([(codes(scale) * scale - W).square().sum(-1, keepdim=True) for scale in scales])
    best = torch.stack(scales).gather(0, errors.argmin(0, keepdim=True))[0]       # the first of equals
    chosen = codes(best) if gram is None else gptq(W, best, gram, limit)
    return chosen.to(torch.int8), best.half()


def raw_artifact(tensors: Mapping[str, Tensor], h: Config, grams: Mapping[str, Tensor] = {}) -> bytes:
    """The artifact ahead of compression. tensors: the model's parameters by name; grams: calibrate's."""
    index, payload = [], []
    for name in sorted(tensors):
        kind, W = KINDS[name], tensors[name].detach()
        index.append([name, kind, list(W.shape), sum(map(len, payload))])
        step = h.int6_step if kind == "int6" else 0.0
        parts = quantize(W, kind, step, grams.get(name)) if kind in CODE_LIMIT else [W.float()]
        payload += [part.cpu().numpy().astype(d).tobytes() for part, d in zip(parts, (STORED[kind], "<f2"))]
    config = {k: getattr(h, k) for k in MODEL_FIELDS + TTT_FIELDS * (h.ttt_lr > 0)}
    header = json.dumps({"config": config, "tensors": index}, sort_keys=True, separators=(",", ":")).encode()
    return b"".join([MAGIC, len(header).to_bytes(4, "little"), header, *payload])


def pack_artifact(tensors: Mapping[str, Tensor], h: Config) -> bytes:
    """Quantize and compress. A function of the tensors: same tensors, same bytes."""
    return compress(raw_artifact(tensors, h))


def fit_artifact(tensors: Mapping[str, Tensor], h: Config, room: int, timed: Callable,
                 grams: Mapping[str, Tensor] = {}) -> tuple[bytes, float]:
    """The artifact of at most `room` bytes and the int6 step it took. timed(phase, fn, *args) calls fn.
    When the configured step does not fit, a coarser one is sought that fills the room to 0.2 %, by Newton's
    method: twice a step is a bit less a code. Without fit_cap, or if none to 1 fits, it is over the cap."""
    codes = sum(t.numel() for name, t in tensors.items() if KINDS[name] == "int6")
    step, best = h.int6_step, None
    for attempt in range(9):
        raw = timed("quantize", raw_artifact, tensors, replace(h, int6_step=step), grams)
        blob = timed("compress", compress, raw)
        if len(blob) <= room and (best is None or len(blob) > len(best[0])):
            best = (blob, step)
        if not h.fit_cap or step == 1.0 or 0.998 * room <= len(blob) <= room or best and not attempt:
            break
        step = max(step, 0.1) * 2 ** (8 * (len(blob) - 0.999 * room) / codes)
        step = min(max(step, h.int6_step, 0.01), 1.0)
    return best or (blob, step)


def open_artifact(blob: bytes) -> tuple[dict, bytes]:
    """Header and payload. ValueError with the reason when the blob is damaged or not an artifact."""
    reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_RAW_BYTES)
    try:
        raw = reader.decompress(blob, max_length=MAX_RAW_BYTES)
    except lzma.LZMAError as e:
        raise ValueError(f"artifact: damaged xz stream ({e})") from None
    end = 8 + int.from_bytes(raw[4:8], "little")
    faults = [(not reader.eof, "truncated, or larger than any model of this format"),
              (reader.unused_data, "bytes after the end of the xz stream"),
              (raw[:4] != MAGIC, f"magic is not {MAGIC!r}"),
              (end > min(len(raw), MAX_HEADER_BYTES), "header is longer than the file or than any header")]
    if found := [reason for wrong, reason in faults if wrong]:
        raise ValueError(f"artifact: {found[0]}")
    try:
        header = json.loads(raw[8:end])
        types = lambda value: type(value) is dict and {k: type(v) for k, v in value.items()}
        if types(header) != {"config": dict, "tensors": list}:
            raise ValueError("not an object of a config and a list of tensors")
        known = MODEL_FIELDS + TTT_FIELDS * ("ttt_lr" in header["config"])
        if types(header["config"]) != types({k: getattr(Config, k) for k in known}):
            raise ValueError("the config has unexpected keys or a value of another type")
    except (ValueError, RecursionError) as e:
        raise ValueError(f"artifact: header is not valid ({e})") from None
    return header, raw[end:]


def read_tensors(header: dict, payload: bytes) -> dict[str, Tensor]:
    """The tensors of an opened artifact. ValueError when header and payload do not fit."""
    out, expected = {}, 0
    for row in header["tensors"]:
        typed = type(row) is list and [type(x) for x in row] == [str, str, list, int] and row[1] in STORED
        name, kind, shape, offset = row if typed else ("", "f32", [], 0)
        if not 0 < len(shape) <= 8 or not all(type(n) is int and 0 < n < 1 << 28 for n in shape):
            raise ValueError(f"artifact: bad tensor entry {str(row)[:80]}, no name, kind, shape and offset")
        count, dtype = math.prod(shape), STORED[kind]
        rows = count // shape[-1] if kind in CODE_LIMIT else 0
        end = offset + count * dtype.itemsize + 2 * rows
        if offset != expected or name in out or end > len(payload):
            raise ValueError(f"artifact: tensor {name[:40]!r} is out of order, repeated or past the end")
        expected, values = end, np.frombuffer(payload, dtype, count, offset)
        tensor = torch.from_numpy(values.astype(np.float32)).view(shape)
        if kind in CODE_LIMIT:
            if max(int(values.max()), -int(values.min())) > CODE_LIMIT[kind]:
                raise ValueError(f"artifact: tensor {name[:40]!r} has a code beyond {CODE_LIMIT[kind]}")
            scales = np.frombuffer(payload, "<f2", rows, offset + count).astype(np.float32)
            tensor *= torch.from_numpy(scales).view(*shape[:-1], 1)
        out[name] = tensor
    if expected != len(payload):
        raise ValueError("artifact: bytes after the last tensor")
    return out


def unpack_artifact(blob: bytes) -> dict[str, Tensor]:
    """Float32 tensors by name. ValueError when anything about the blob is not as pack_artifact writes it.
    No bytes can make it run code or take more than MAX_RAW_BYTES and their float32 values of memory."""
    return read_tensors(*open_artifact(blob))


def packed_code(source: str) -> bytes:
    """The source as a program that unpacks and runs itself: what counts as code. Deterministic."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    raw = lzma.compress(source.encode(), format=lzma.FORMAT_RAW, filters=filters)
    return (b"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode('" + base64.b85encode(raw) +
            b"'),format=L.FORMAT_RAW,filters=[{'id':L.FILTER_LZMA2,'preset':9}]))\n")


def write_atomic(path: str, *chunks: bytes | np.ndarray) -> None:
    """Write under a temporary name, then rename: the old file or the new one, never half. Or InputError."""
    with explained(f"{path}: cannot write it", "free space"):
        try:
            with open(path + ".tmp", "wb") as f:
                for chunk in chunks:
                    f.write(chunk)
                f.flush()
                os.fsync(f.fileno())
            os.replace(path + ".tmp", path)
        finally:
            Path(path + ".tmp").unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# 13. Score: windows that tile the split, one evaluator of every score, and what learns between its chunks.

class Score(NamedTuple):
    loss: float         # mean nats per token
    bpb: float
    tokens: int
    bytes: int
    ms: float

    @property
    def exact(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f}"


class ScoreRun(NamedTuple):
    """How to score: window length, stride, windows per batch; a label and the log for progress. With a chunk,
    `learner() as learn` learns from each but the last, of that many targets, when they have been scored."""
    seq_len: int
    stride: int
    batch: int
    label: str
    log: Log
    chunk: int = 0
    learner: Callable = nullcontext


def score_windows(total: int, seq_len: int, stride: int) -> np.ndarray:
    """(W, 3), start, end, score_from: the ranges [score_from, end) tile the targets [0, total) in order.
    The first window scores all of itself; each later `stride` targets behind seq_len - stride of context."""
    end = np.append(np.arange(min(seq_len, total), total, stride), total)
    return np.stack([np.maximum(end - seq_len, 0), end, np.append(0, end[:-1])], 1)


@torch.no_grad()
def score_targets(nats_fn: Callable, tokens: np.ndarray, run: ScoreRun, m: Machine) -> Tensor:
    """Nats and score count of every target of `tokens` (N,): (2, N - 1) float64, zero where others scored.
    nats_fn(x, y, last) -> (B, last), of the compiled shapes: short windows and batches are padded behind."""
    start_time, total, done, learnt = time.perf_counter(), len(tokens) - 1, 0, 0
    device_tokens, chunk = torch.from_numpy(tokens.astype(np.int32)).to(m.device), run.chunk or total
    windows = score_windows(total, run.seq_len, run.stride)
    start, end, score_from = windows.T
    full = (score_from - start >= run.seq_len - run.stride) & (end - start == run.seq_len)
    lasts = np.where(full, run.stride, run.seq_len)         # one that scores more needs every position
    kinds = np.stack([score_from // chunk, lasts], 1)       # what a batch has in common
    cuts = np.append(0, np.flatnonzero((np.diff(kinds, axis=0) != 0).any(1)) + 1)
    column = torch.arange(run.seq_len, device=m.device)
    out = torch.zeros(2, total, dtype=torch.float64, device=m.device)
    with run.learner() as learn:
        for (number, last), group in zip(kinds[cuts].tolist(), np.split(windows, cuts[1:])):
            if number > learnt:                             # of the chunk before it all is scored
                learn(device_tokens[learnt * chunk : number * chunk + 1], learnt * chunk / total)
                learnt = number
            for i, batch in enumerate(torch.from_numpy(group[m.rank::m.world_size]).split(run.batch)):
                padded = F.pad(batch, (0, 0, 0, run.batch - len(batch))).to(m.device)
                start, end, score_from = padded.unsqueeze(-1).unbind(1)                     # (B, 1) each
                index = (start + column).clamp_max(total - 1)
                nats = nats_fn(device_tokens[index].long(), device_tokens[index + 1].long(), last).double()
                position = start + column[-last:]
                scored = (position >= score_from) & (position < end)
                values = torch.stack([torch.where(scored, nats, 0.0).flatten(), scored.double().flatten()])
                out.index_add_(1, position.clamp_max(total - 1).flatten(), values)
                done = min(done + run.batch * m.world_size, len(windows))
                if i % 16 == 0:
                    m.sync()
                    eta = (time.perf_counter() - start_time) / done * (len(windows) - done)
                    run.log.status(f"scoring {run.label}: {done}/{len(windows)} windows, ETA {eta:.0f} s")
    return out


def evaluate(nats_fn: Callable, tokens: np.ndarray, counts: ByteCounts, run: ScoreRun, m: Machine) -> Score:
    """Score every target of `tokens` (N,) once. All ranks share the work; sums are float64."""
    start_time = time.perf_counter()
    nats = score_targets(nats_fn, tokens, run, m)[0].sum()
    m.agree(0.0)
    dist.all_reduce(nats)
    total, num_bytes = len(tokens) - 1, int(counts.of(tokens).sum())
    return Score(nats.item() / total, bpb(nats.item(), num_bytes), total, num_bytes,
                 1000 * (time.perf_counter() - start_time))


@contextmanager
def learning(model: GPT, loss_fn: Callable, h: Config, m: Machine) -> Iterator[Callable]:
    """Test-time training (parameter-golf #549): learn(tokens (chunk + 1,), progress) of a scored chunk makes
    ttt_passes SGD steps by its mean gradient, of norm 1 at most, alike on all ranks. Weights are put back."""
    params = list(model.parameters())
    weights, sizes = [p.data for p in params], [p.numel() for p in params]
    saved, rows = [w.clone() for w in weights], h.eval_batch_tokens // h.eval_seq_len
    gradient, momentum = (torch.zeros(sum(sizes), device=m.device) for _ in range(2))
    moves = [v.view_as(w) for v, w in zip(momentum.split(sizes), weights)]
    def learn(tokens: Tensor, progress: float) -> None:
        pairs = torch.stack([tokens[:-1], tokens[1:]]).long().view(2, -1, h.eval_seq_len)
        mine, rate = pairs[:, m.rank::m.world_size], h.ttt_lr * (1 + math.cos(math.pi * progress)) / 2
        for _ in range(h.ttt_passes):
            gradient.zero_()
            for first in range(0, mine.size(1), rows):
                x, y = mine[:, first : first + rows].contiguous()
                with torch.enable_grad():
                    loss = loss_fn(x, y) * (len(x) / pairs.size(1))
                parts = torch.autograd.grad(loss, params, materialize_grads=True)
                gradient.add_(torch.cat([g.flatten() for g in parts]))
            m.agree(0.0)                    # fails at once when a rank is gone
            dist.all_reduce(gradient)
            momentum.mul_(0.9).add_(gradient / gradient.norm(dtype=torch.float64).clamp_min(1.0))
            torch._foreach_add_(weights, moves, alpha=-rate)
    yield learn
    torch._foreach_copy_(weights, saved)


# -----------------------------------------------------------------------------
# 14. Training: warm-up, clock, loop. Checkpoints are records/checkpoints.py's.

@dataclass
class Run:
    """Everything a run works with, built once by start_run and passed down."""
    h: Config
    m: Machine
    log: Log
    dataset: Dataset
    model: GPT
    loss_fn: Callable
    nats_fn: Callable
    phases: dict[str, float]         # ms
    splits: dict[str, np.ndarray]    # held-out tokens, opened when first scored
    grams: dict[str, Tensor] = field(default_factory=dict)      # calibrate's, of the trained model

    def timed(self, phase: str, fn: Callable, *args):
        """fn(*args), its time added to a phase."""
        self.m.sync()
        start = time.perf_counter()
        out = fn(*args)
        self.m.sync()
        self.phases[phase] = self.phases.get(phase, 0.0) + 1000 * (time.perf_counter() - start)
        return out

    def held_out(self, split: str) -> np.ndarray:
        """The tokens of a split, (N,) uint16. With val_loss_every=0 the clock has stopped before this."""
        if split not in self.splits:
            tokens = self.splits[split] = self.timed("load", load_split, self.h, split)
            weight = int(self.dataset.counts.of(tokens).sum())
            self.log(f"data split:{split} {split}_tokens:{len(tokens) - 1} {split}_bytes:{weight}")
        return self.splits[split]

    def score(self, label: str, stride: int, split: str = "val", learns: bool = False) -> Score:
        tokens, h, m = self.held_out(split), self.h, self.m
        how = ScoreRun(h.eval_seq_len, stride, h.eval_batch_tokens // h.eval_seq_len, label, self.log)
        if learns and len(tokens) - 1 > h.ttt_chunk_tokens:
            learner = partial(learning, self.model, self.loss_fn, h, m)
            how = how._replace(chunk=h.ttt_chunk_tokens, learner=learner)
            with learner() as learn:            # compiles it, ahead of the clock and on no token of the split
                self.timed("compile", learn, torch.zeros(how.chunk + 1, device=m.device), 0.0)
        return evaluate(self.nats_fn, tokens, self.dataset.counts, how, m)


def start_run(h: Config, m: Machine, log: Log, dataset: Dataset, started: float) -> Run:
    """Write a log's head, only the machine if it goes on, and build the model. started: before loading."""
    bound = " ".join(f"{k}:{m.names[k]}" for k in ("attention", "qk", "mlp", "compile", "pass", "update"))
    place = f"world_size:{m.world_size} device:{m.names['device']} dtype:{str(m.dtype)[6:]} {bound}"
    if log.goes_on:
        log(f"\nmachine {place}")                # behind a line that may have been cut
    elif log.file:
        log(Path(__file__).read_text(encoding="utf-8"), console=False)
        rule = "=" * 100
        lines = [rule, f"Running Python {sys.version}".replace("\n", " "),
                 f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
                 f"Running Triton version {getattr(triton, '__version__', 'none')}", machine_report(m), rule,
                 "config:", *(f"  {k}: {v}" for k, v in sorted(asdict(h).items()))]
        log("\n".join(lines), console=False)
        log(f"preset: {h.preset}\nmachine {place}")
    train_tokens = sum(map(shard_tokens, split_files(h.data_path, "train")))
    log(f"data path:{h.data_path} manifest_sha256:{dataset.manifest_sha256} "
        f"tokenizer_sha256:{dataset.tokenizer_sha256} vocab_size:{h.vocab_size} train_tokens:{train_tokens}")
    torch.manual_seed(h.seed)
    model = GPT(h, m.ops, m.dtype).to(m.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    return Run(h, m, log, dataset, model, m.compile(model.loss), m.compile(model.nats),
               {"load": 1000 * (time.perf_counter() - started)}, {})


def bind_pass(loss_fn: Callable, optimizer: Optimizer) -> tuple[Callable[[Tensor], Tensor], str]:
    """backward: rows (B, T + 1) of a micro-batch -> its share of the step's mean loss, (), overwritten by the
    next call; its gradients are added. And why it is no graph. One stream orders copy, pass and readers."""
    h, m = optimizer.h, optimizer.m
    (accum, B), share = cut_batch(h, m.world_size), torch.zeros((), device=m.device)
    tokens = torch.zeros(B, h.train_seq_len + 1, dtype=torch.long, device=m.device)
    def both_ways() -> None:
        loss = loss_fn(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / accum
        loss.backward()
        share.copy_(loss.detach())
    def backward(rows: Tensor) -> Tensor:
        tokens.copy_(rows)
        launch()
        return share
    launch, failure = m.replay(both_ways)
    torch._foreach_zero_([*optimizer.bank_grad.values(), optimizer.flat_grad])      # of a recorder's passes
    return backward, failure


def train_step(backward: Callable, optimizer: Optimizer, batch: list[Tensor], hp: Hyper) -> Tensor:
    """Every micro-batch through bind_pass's backward, then the update. This rank's mean loss, ()."""
    loss = sum(map(backward, batch))
    optimizer.step(hp)
    return loss


@torch.no_grad()
def calibrate(run: Run, loader: TokenLoader) -> dict[str, Tensor]:
    """What gptq asks of text: the sum of x x' over the inputs x of int6 matrices, float32 (matrices, N, N) by
    name; of all ranks, over the next gptq_batches batches, with the weights as they are."""
    seen, plain, L = [], copy(run.model), run.h.num_layers          # the weights are shared
    def linear(x: Tensor, W: Tensor) -> Tensor:
        flat = x.flatten(0, -2).float()         # of bfloat16, so that TF32 loses nothing
        seen.append(flat.T @ flat)
        return F.linear(x, W)
    plain.ops = Ops(run.model.ops.attend, mlp=partial(mlp, linear=linear), linear=linear)
    for _ in range(run.h.gptq_batches):
        for rows in loader.next():
            plain.trunk(rows[:, :-1])
    qkv, o, up, down = (torch.stack(seen[i::4]).unflatten(0, (-1, L)).sum(0) for i in range(4))
    grams = dict(qo_bank=torch.cat([qkv, o]), kv_bank=qkv.repeat(2, 1, 1), mlp_up_bank=up, mlp_down_bank=down)
    for gram in grams.values():
        dist.all_reduce(gram)
    return grams


def warmup(run: Run, optimizer: Optimizer, ema: Ema, loader: TokenLoader) -> Callable[[Tensor], Tensor]:
    """Compile, record and touch all the clock will see, then put it back. Returns train_step's backward."""
    backward, failure = bind_pass(run.loss_fn, optimizer)
    for what, reason in (("pass", failure), ("update", optimizer.failure)):
        if reason:
            run.log(f"{what}:eager, no graph ({reason})")
    saved = optimizer.snapshot()
    for i in range(run.h.warmup_steps):
        train_step(backward, optimizer, loader.next(), hyper_at(run.h, 0, 0.0))
        ema.update(0.0)
        if i + 1 == run.h.warmup_steps or i < 2:
            run.m.sync()
            run.log(f"warmup_step:{i + 1}/{run.h.warmup_steps}")
    x = torch.zeros(run.h.eval_batch_tokens // run.h.eval_seq_len, run.h.eval_seq_len, dtype=torch.long)
    with torch.no_grad():
        run.nats_fn(x.to(run.m.device), x.to(run.m.device), run.h.eval_seq_len)
    for _ in range(2 * (run.h.gptq_batches > 0)):
        run.phases["calibrate"] = 0.0           # the second time takes what the clock will see
        run.timed("calibrate", calibrate, run, loader)
    optimizer.restore(saved)
    ema.reset()
    loader.seek(0)
    return backward


def repository_file(name: str, instead: str) -> str:
    """The path of what is no part of this file, for a run in the repository. InputError elsewhere."""
    script = Path(__file__).resolve()
    for folder in script.parents:
        if (folder / name).is_file():
            return str(folder / name)
    raise InputError(f"{script}: {name} is of the bankshot repository; there, run {instead}")


def train(run: Run) -> Ema:
    """Training. The clock, rank 0's, stands in validations and sees no compilation. The host is a step ahead
    at most and begins one if the clock should hold it and the one in flight. Fault a step after a bad one."""
    h, m, log = run.h, run.m, run.log
    optimizer = run.timed("compile", Optimizer, run.model, h, m)
    ema, loader, keep = Ema(run.model, h), TokenLoader(h, m), None
    backward = run.timed("compile", warmup, run, optimizer, ema, loader)
    if h.checkpoint_every or h.resume:              # for long runs in the repository, no part of a submission
        tool = runpy.run_path(repository_file("records/checkpoints.py", "this training"))
        keep = tool["Checkpoints"](run, optimizer, ema)
    step, train_ms = keep.resume() if h.resume else (0, 0.0)
    loader.seek(step)
    m.signals.clear()                               # from here on one ends the run, not the process
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]        # so far in this process
    clock_ms, shown, ended, reached = train_ms, math.nan, 0, m.fetch(torch.zeros(2, device=m.device))
    sound = lambda fetched: all(abs(x) < DIVERGED for x in fetched()[0].tolist())
    spare, _ = m.agree(1.5 * run.phases.pop("calibrate", 0.0))    # the clock starts with the last rank
    h = replace(h, max_wallclock_seconds=max(h.max_wallclock_seconds - spare / 1000, 0.0))
    limit_ms = 1000 * h.max_wallclock_seconds if run.h.max_wallclock_seconds else math.inf
    run.phases["validate"], compiled, start = 0.0, graphs(), time.perf_counter() - train_ms / 1000
    clock = lambda: 1000 * (time.perf_counter() - start) - run.phases["validate"]
    while step < h.iterations and not ended and clock_ms * (1 + 2 / max(step, 1)) <= limit_ms:
        if h.val_loss_every and step % h.val_loss_every == 0:
            m.sync()
            run.timed("validate", validate, run, step, clock())
        hp = hyper_at(h, step, clock_ms)
        loss = train_step(backward, optimizer, loader.next(), hp)
        ema.update(hp.progress)
        step += 1
        in_flight, reached = reached, m.fetch(torch.stack([loss.double(), optimizer.norm]))
        clock_ms, ended = m.agree(clock(), bool(m.signals) if sound(in_flight) else 2)     # 1: by a signal
        if step % h.train_log_every == 0 or step == 1:
            shown = log_step(run, step, loss, clock_ms)
        if keep:
            keep.save(step, clock_ms)
        eta = clock_ms * (1 / hyper_at(h, step, clock_ms).progress - 1) / 1000
        log.status(f"step {step} loss {shown:.4f} {clock_ms / step:.1f} ms/step ETA {eta:.0f} s")
    m.sync()
    train_ms = clock()
    run.phases |= {"train": train_ms, "steps": step, "late_graphs": graphs() - compiled}
    if max(ended, m.agree(0.0, 0 if sound(reached) else 2)[1]) == 2:
        bad = next((name for name, p in run.model.named_parameters() if not p.isfinite().all()), "none")
        good, (last, norm) = keep and keep.last_good() or "none", reached()[0].tolist()
        raise Fault(f"step {step}: diverged, loss {last:.4g}, gradient norm {norm:.4g}, "
                    f"first bad tensor {bad}, last good checkpoint {good}")
    run.grams = run.timed("calibrate", calibrate, run, loader) if h.gptq_batches else {}
    if keep:
        keep.save(step, train_ms, last=True)
    if step < h.iterations:
        why = "signal" if ended else "wallclock_cap"
        log(f"stopping_early: {why} train_time:{train_ms:.0f}ms step:{step}/{h.iterations}")
    return ema


def validate(run: Run, step: int, train_ms: float) -> Score:
    """The chunked score of the weights as a step line. Fault when a rank's differ by a bit from most."""
    names, params = zip(*run.model.named_parameters())
    every = [torch.stack([p.detach().view(torch.int32).sum() for p in params]).tolist()] * run.m.world_size
    dist.all_gather_object(every, every[0])
    for rank, sums in enumerate(every):
        if odd := [name for name, a, b in zip(names, sums, max(every, key=every.count)) if a != b]:
            raise Fault(f"step {step}: {odd[0]} of rank {rank} differs from the others; is its memory sound?")
    score = run.score("validation", run.h.eval_seq_len)
    run.log(f"step:{step}/{run.h.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
            f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms")
    return score


def log_step(run: Run, step: int, loss: Tensor, clock_ms: float) -> float:
    """The step's log line. Returns the loss, averaged over the ranks."""
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    run.log(f"step:{step}/{run.h.iterations} train_loss:{loss.item():.4f} train_time:{clock_ms:.0f}ms "
            f"step_avg:{clock_ms / step:.2f}ms")
    return loss.item()


# -----------------------------------------------------------------------------
# 15. Commands: what the command line reaches.

def score_artifact(run: Run) -> str:
    """Score an artifact's weights: chunked, sliding if that differs, learning at ttt_lr. The last counts."""
    log, h, run.phases["eval"] = run.log, run.h, 0.0
    kinds = [("chunked", "roundtrip", h.eval_seq_len)]
    kinds += [("sliding", "sliding_window", h.eval_stride)] * (h.eval_stride < h.eval_seq_len)
    kinds += [("ttt", "ttt", h.eval_stride)] * (h.ttt_lr > 0)
    if h.ttt_lr:
        run.model.requires_grad_(True)              # also what training left alone
    for metric, name, stride in kinds:
        label, how = f"final_int6_{name}", f"stride:{stride} " if stride < h.eval_seq_len else ""
        score = run.score(label, stride, learns=metric == "ttt")
        log(f"{label} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} {how}eval_time:{score.ms:.0f}ms")
        log(f"{label}_exact {score.exact}")
        run.phases["eval"] += score.ms
    if h.report_split:
        extra = run.score(h.report_split, h.eval_seq_len, h.report_split).exact
        log(f"report split:{h.report_split} metric:int6_lzma_chunked {extra}")
    return f"metric:int6_lzma_{metric} {score.exact}"


def conclude(run: Run, ema: Ema, path: str) -> int:
    """What follows training: the artifact at `path`, every score. Exit status 1 when it is over the cap."""
    h, m, log = run.h, run.m, run.log
    if m.pin:
        log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2 ** 20} MiB "
            f"reserved: {torch.cuda.max_memory_reserved() // 2 ** 20} MiB")
    code_bytes = len(packed_code(Path(__file__).read_text(encoding="utf-8")))
    if m.rank == 0:                                # the artifact first: whatever fails later, it is there
        weights = dict(run.model.named_parameters())
        weights = weights if h.artifact_weights == "live" else dict(zip(weights, ema.average))
        blob, step = fit_artifact(weights, h, h.size_cap - code_bytes, run.timed, run.grams)
        write_atomic(path, blob)
        log(f"artifact weights:{h.artifact_weights} int6_step:{step}")
    live = validate(run, run.phases["steps"], run.phases["train"])
    torch._foreach_copy_(ema.params, ema.average)
    for label, score in (("live", live), ("ema", run.score("ema", h.eval_seq_len))):
        log(f"final_{label} {score.exact} eval_time:{score.ms:.0f}ms")
    V, file = h.vocab_size, split_files(h.data_path, "train")[0]
    first = np.bincount(load_shard(file, V), minlength=V) + 1.0
    nats = -np.log(first / first.sum())[run.held_out("val")[1:]].sum()           # by its frequencies alone
    log(f"unigram val_loss:{nats / live.tokens:.4f} val_bpb:{bpb(nats, live.bytes):.4f}")
    box = [Path(path).read_bytes() if m.rank == 0 else b""]
    dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    blob, bytes_total = box[0], len(box[0]) + code_bytes
    log(f"Serialized model int6+lzma: {len(blob)} bytes\nCode size: {code_bytes} bytes\n"
        f"Total submission size int6+lzma: {bytes_total} bytes")
    run.model.load_state_dict(run.timed("decompress", unpack_artifact, blob))
    final = score_artifact(run)
    log("phase_times " + " ".join(f"{k}:{run.phases.get(k, 0):.0f}ms" for k in (
        "load", "compile", "train", "calibrate", "quantize", "compress", "decompress", "eval")))
    if (over := bytes_total - h.size_cap) > 0:
        log(f"artifact over the cap: {bytes_total} bytes, {over} over size_cap={h.size_cap}; file kept")
    if late := int(m.agree(0.0, run.phases["late_graphs"])[1]):
        log(f"late compilation: {late} graphs were compiled on the clock; raise warmup_steps or report it")
    log(f"final_score {final} bytes_total:{bytes_total} bytes_code:{code_bytes} "
        f"steps:{run.phases['steps']} train_time:{run.phases['train']:.0f}ms "
        f"eval_time:{run.phases['eval']:.0f}ms seed:{h.seed} sha256:{hashlib.sha256(blob).hexdigest()}")
    return 1 if over > 0 or late else 0


def command_train(h: Config, env: Mapping[str, str]) -> int:
    started = time.perf_counter()
    m = init_machine(h, env)
    stamp = [h.run_id or time.strftime("%Y%m%d_%H%M%S", time.gmtime()) + f"_{h.preset}_seed{h.seed}"]
    dist.broadcast_object_list(stamp, 0, device=torch.device("cpu"))
    base = os.path.join(h.out_dir, stamp[0])
    dataset = load_dataset(h)                      # bad data ends here, before a log is begun
    log = Log(base + ".txt", m, resume=bool(h.resume))
    with guarded(m, log):
        run = start_run(h, m, log, dataset, started)
        status = conclude(run, train(run), base + ".int6.xz")
    if m.rank == 0:
        print(f"log: {base}.txt\nartifact: {base}.int6.xz", flush=True)
    return status


def load_run(path: str, argv: list[str], env: Mapping[str, str]) -> tuple[Run, bytes]:
    """A run whose model is the artifact's: its header says what the model is, `argv` where the data is."""
    fixed = [k for k in MODEL_FIELDS if not k.startswith("eval_")]
    if given := [arg for arg in argv if arg.split("=")[0] in fixed]:
        raise InputError(f"{given[0]}: fixed by the artifact; only data, eval_ and ttt_ knobs can be set")
    with explained(f"{path}: cannot read the artifact", "name a file that train wrote"):
        blob = Path(path).read_bytes()
    try:
        header, payload = open_artifact(blob)
        tensors = read_tensors(header, payload)          # sound throughout before a model is built from it
        h = load_config(argv, {k: v for k, v in env.items() if k.lower() not in fixed}, header["config"])
        shapes = {name: tuple(shape) for name, _, shape, _ in header["tensors"]}
        if odd := shapes.items() ^ {name: shape for name, (shape, _) in parameter_table(h).items()}.items():
            raise ValueError(f"artifact: {min(odd)[0][:40]!r} does not fit; use the script that wrote it")
    except ValueError as e:
        raise InputError(f"{path}: {e}") from None
    started, dataset = time.perf_counter(), load_dataset(h)
    m = init_machine(h, env, trains=False)
    run_id = h.run_id or time.strftime("%Y%m%d_%H%M%S", time.gmtime()) + f"_eval_{os.getpid()}"
    run = start_run(h, m, Log(os.path.join(h.out_dir, run_id + ".txt"), m), dataset, started)
    run.model.load_state_dict(tensors)
    return run, blob


def command_eval(path: str, argv: list[str], env: Mapping[str, str]) -> int:
    run, blob = load_run(path, argv, env)
    run.log(f"eval_score {score_artifact(run)} "
            f"eval_time:{run.phases['eval']:.0f}ms sha256:{hashlib.sha256(blob).hexdigest()}")
    return 0


def command_tool(name: str, argv: list[str]) -> int:
    """Hand over to the repository's tool, which is no part of what it judges. Its exit status."""
    script = ["--script", os.path.realpath(__file__)]
    files = [os.path.abspath(a) if os.path.isfile(a) else a for a in argv if "=" not in a]
    instead = " ".join([f"python records/{name}.py", *files, *script, "KEY=VALUE"])
    tool = repository_file(f"records/{name}.py", instead)
    outer, sys.argv = sys.argv, [tool, *argv, *script]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = outer


USAGE = "usage: train_gpt.py [train | eval ARTIFACT | audit ARTIFACT | bench | config] [key=value ...]"


def main(argv: list[str]) -> int:
    """Run a command; what a user can mend is said in one line. Returns the exit status."""
    command, rest = ("train", argv) if not argv or "=" in argv[0] else (argv[0], argv[1:])
    try:
        if command in ("-h", "--help"):
            print(USAGE + "\n\n" + __doc__)
            return 0
        if command == "config":
            print("\n".join(f"{k}: {v}" for k, v in sorted(vars(load_config(rest, os.environ)).items())))
            return 0
        if command == "eval" and rest and "=" not in rest[0]:
            return command_eval(rest[0], rest[1:], os.environ)
        if command == "bench" or command == "audit" and rest and "=" not in rest[0]:
            return command_tool(command, rest)
        if command != "train":
            raise InputError(f"{' '.join(argv[:2])!r} is no command. {USAGE}")
        return command_train(load_config(rest, os.environ), os.environ)
    except InputError as e:
        print(f"train_gpt.py: {e}", file=sys.stderr, flush=True)
        return e.status
    finally:
        if dist.is_initialized():
            traceback.clear_frames(sys.exc_info()[2])      # NCCL waits for every graph that holds its work
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
