"""bankshot: the best small language model that ten minutes on 8 GPUs can train, shipped in 16 MB.

Task      Minimize bits per byte (bpb) on the FineWeb validation split. Rules of openai/parameter-golf:
          600 s of training on 8xH100; artifact + packed_code(this source) <= 16,000,000 bytes for every seed;
          the score is computed from the artifact file, read back from disk.
Commands  torchrun --standalone --nproc_per_node=8 train_gpt.py                 the ten-minute attempt
          python train_gpt.py train preset=h100x1 data_path=DIR                 one GPU, 300 s of training
          python train_gpt.py train preset=cpu data_path=DIR                    a laptop, minutes
          python train_gpt.py eval ARTIFACT preset=cpu data_path=DIR            score a file again
          python train_gpt.py audit ARTIFACT data_path=DIR                      is it legal? (tools/audit.py)
          python train_gpt.py bench | config                    time the step (tools/lab) | print all knobs
          Any knob of Config: `key=value` after the command, or KEY=value in the environment.

Contents
  0. Start-up           closed consoles, imports that fail
  1. Errors and files   one-line errors, atomic writes
  2. Config             every knob once, with its default; presets
  3. Machine            process group, device, CUDA graphs
  4. Log and signals    the log, a failure on one rank or all, what Ctrl-C does
  5. Bytes              the bytes of text that each token stands for; the definition of bpb
  6. Tokens             shards on disk, dataset checks, the seeded document-aware loader
  7. Blocks             norm, rope, attention and MLP as functions of their weights
  8. GPT                the parameter table, the banks, one forward pass
  9. Model kernels      fused QK, fused MLP, FlashAttention-4
 10. Binding            which of them run: those that are right on this machine and, if asked, fast
 11. Matrix kernels     the three products that directions are made of
 12. Directions         ORTHO and STEP_RULES: how a momentum becomes a step
 13. Optimizer          sharded state, and every collective of a step
 14. Schedules          rates as functions of progress; the average of the weights
 15. Rounding           a whole number for every weight: GPTQ, steps that follow the loss
 16. Trellis codes      half steps that the codes above a weight decide
 17. Artifact           byte layout, the fit to the cap, reading, packed source
 18. Codecs             xz, and rans for the codes of each row and column
 19. Score              windows that tile the split, one evaluator, test-time training
 20. Checkpoints        written by a thread, read by any number of ranks
 21. Runs               knobs resolved and checked; what every command works with
 22. Calibration        what training text says about rounding
 23. Training           warm-up, clock, loop
 24. Commands           train, eval, audit, bench, config
"""

# Dimensions in docstrings
#   B sequences   T tokens of a sequence   D model_dim   F mlp_dim       V vocab_size   L num_layers
#   H num_heads   Hkv num_kv_heads         Dh head_dim   r rank of a change
#   W (M, N) a matrix of M outputs and N inputs; b matrices are (b, M, N)
#
# Invariants (tests/ holds them)
#   Importing this file registers operators and has no other effect.
#   After Optimizer.step, all ranks hold bit-identical parameters.
#   For a fixed number of steps the result depends on the seed, which also fixes the order of the data.
#   The number of ranks changes only the order of sums, unless the batch grows (its stages are micro-batches)
#   or row_steps is on (each rank adds a sample).
#   Score windows tile the split.
#   No token's score depends on a later token.
#   The score is computed from the file on disk.
#   The denominator of bpb is the UTF-8 length of the text.
#   Nothing compiles while the training clock runs.

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Until `guarded` takes over, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import ast
import difflib
import errno
import glob
import hashlib
import io
import json
import linecache
import lzma
import math
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from enum import IntEnum
from functools import cache, lru_cache, partial
from itertools import accumulate, chain, cycle, pairwise
from pathlib import Path
from threading import Lock, Thread
from types import SimpleNamespace
from typing import NamedTuple, TypeVar

# -----------------------------------------------------------------------------
# 0. Start-up: closed consoles before any file is opened, and imports that fail in one line.

if __name__ == "__main__":
    # Open descriptors 0 to 2 where they are closed, or the next file would get the number of a console.
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def wrong_setting(error: BaseException) -> str | None:
    """Return one line about an import of PyTorch that failed: it is missing, or a variable is wrong.

    None for any other error. PyTorch itself says only what int() says of a wrong value.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in ("numpy", "torch"):
        return f"{error.name} is not installed; run pip install -r requirements.txt, or use ./run.sh"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    loading = [frame.f_globals["__name__"] for frame in frames if frame.f_code.co_name == "<module>"]
    if not any(name.partition(".")[0] in ("torch", "triton") for name in loading):
        return None
    keys = [key for key in sorted(os.environ) if re.match("TORCH(?!ELASTIC)|PYTORCH|TRITON", key)]
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    if not keys:
        return f"PyTorch does not import ({reason}); run pip install -r requirements.txt"
    keys = [key for key in keys if re.search(rf"(?<!\w){re.escape(os.environ[key])}(?!\w)", reason)] or keys
    return f"{', '.join(keys)}: PyTorch does not import with this setting ({reason}); change or unset it"


try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
except Exception as e:
    if __name__ != "__main__" or not wrong_setting(e):
        raise
    print(f"train_gpt.py: {wrong_setting(e)}", file=sys.stderr)
    sys.exit(2)

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes from resuming one run
    fcntl = None

# torch 2.13 renames these two; 2.11 knows only the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# -----------------------------------------------------------------------------
# 1. Errors and files: errors of one line, and files that are written whole or not at all.


Value = TypeVar("Value")


class OneLineError(Exception):
    """An error that is reported as one line without a traceback. status: the exit status of the process."""

    status = 1

    def __str__(self) -> str:
        """Return the line. Line breaks and control characters are shown escaped."""
        line = "\\n".join(super().__str__().splitlines())
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class InputError(OneLineError):
    """Bad input. The line names the file, key or value, and the remedy."""

    status = 2


class Fault(OneLineError):
    """A failure during a run that no input explains. The line says where and when it happened."""


class Diverged(Fault):
    """A loss or gradient norm is not finite or not below DIVERGED. train_ms: the training clock."""

    def __init__(self, message: str, steps: int, train_ms: float) -> None:
        super().__init__(message)
        self.steps = steps
        self.train_ms = train_ms


@contextmanager
def explained(problem: str, remedy: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn an OSError, a RecursionError or one of `errors` into an InputError: "problem (reason); remedy"."""
    try:
        yield
    except (OSError, RecursionError, *errors) as e:
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}".splitlines()[0]
        raise InputError(f"{problem} ({reason}); {remedy}") from None


def read_file(path: str, limit: int = 1 << 28) -> bytes:
    """Return the first `limit` bytes of a regular file; limit=-1 reads everything, whatever its size.

    Raises OSError for anything else: a pipe may never end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a file", path)
    with open(path, "rb") as f:
        return f.read(limit)


def write_atomic(path: str, *chunks: bytes | np.ndarray) -> None:
    """Write a temporary file, then rename it: the old file or the new one, never half. Raises InputError."""
    temporary = path + ".tmp"
    with explained(f"{path}: cannot write it", "free space or check permissions"):
        try:
            Path(temporary).unlink(missing_ok=True)  # a link would lead elsewhere, a pipe would never end
            with open(temporary, "xb") as f:
                for chunk in chunks:
                    f.write(chunk)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def write_somewhere(path: str, *chunks: bytes | np.ndarray) -> str:
    """Write a file that must not be lost, and return its path.

    The first of these that can be written is taken: `path`, a new folder in the temporary folder, a new
    folder in the working folder. Raises InputError if all three fail.
    """
    try:
        write_atomic(path, *chunks)
        return path
    except InputError as e:
        problem = str(e)

    name = os.path.basename(path)
    others = (tempfile.gettempdir(), os.getcwd())
    for other in others:
        with suppress(OSError, InputError):
            folder = tempfile.mkdtemp(prefix=f"{name}.", dir=other)
            try:
                write_atomic(os.path.join(folder, name), *chunks)
                return os.path.join(folder, name)
            finally:
                with suppress(OSError):
                    os.rmdir(folder)  # only if it is empty
    raise InputError(f"{problem}; also tried {' and '.join(others)}")


def show(text: str) -> None:
    """Print text at once. If that fails, switch printing off and raise BrokenPipeError or InputError."""
    try:
        print(text, flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python's last flush fails
        if isinstance(e, BrokenPipeError):  # the reader, such as `head`, has seen enough
            raise
        raise InputError(f"standard output: cannot write to it ({e.strerror}); send it elsewhere") from None


def has_live_line() -> bool:
    """Return whether stderr is a terminal that can rewrite a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Return the columns of the terminal that stderr is, 80 if it does not say; stdout may be a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def plain_name(key: str, name: str) -> str:
    """Return the name if it can name a file. Raises InputError if it could lead to another folder."""
    if not re.fullmatch(r"\w[\w.,+=@~ -]*", name) or name != name.strip() or len(name.encode()) > 200:
        raise InputError(
            f"config key {key}: {name[:40]!r} cannot name a file; begin with a letter, a digit or _, "
            "go on with these and . , + = @ ~ -, and use at most 200 bytes"
        )
    return name


def first_failure(failures: Iterable[Value | None]) -> Value | None:
    """Return the first failure, or None if nothing failed."""
    return next((failure for failure in failures if failure is not None), None)


def sha256(data: bytes) -> str:
    """Return the hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


# -----------------------------------------------------------------------------
# 2. Config: every knob once, with its default. The defaults are those of `record`; presets change some.


# What a knob may be, by its annotation.
Count = int  # a whole number that may be 0; an int is at least 1
Fraction = float  # in [0, 1]
Decay = float  # in [0, 1)

# The traits of a knob say what it is for. Those that this file reads:
SIZE = "size"  # one of the sizes that the error about too large a model lists
FREE = "free"  # a run that resumes may change it
STORED = "stored"  # the header of every artifact holds it
STORED_IF_LEARNS = "stored if learns"  # only if the artifact's score uses test-time training
STORED_IF_SET = "stored if set"  # only if it differs from its default, as in artifacts older than the knob
RESCORED = "rescored"  # `eval` may change it although the artifact holds it

# Those that tools read, which keep no lists of knobs:
PATH = "path"  # names a file or folder
DATA = "data"  # says where the text lies
OWN = "own"  # each run of a sweep or record has its own
BACKUP = "backup"  # keeps a run from being lost; the runs of a record may differ in it, a sweep takes none
SHARED = "shared"  # equal in all rows of a sweep, which would not compare otherwise
SCORES = "scores"  # only scoring reads it; like a SHARED knob, equal in all rows of a sweep
STRIDE = "stride"  # the stride of a sliding score
COMPILES = "compiles"  # for another value, a sweep compiles training anew, as it does for a STORED knob
CODES = "codes"  # acts after training; each row of `record encodings` may change it
INPUT = "input"  # `record encodings` takes one value for all its rows, as it does for a DATA knob
BUDGET = "budget"  # ends a run
REPORT = "report"  # changes what the log says, never the weights
BY_DEPTH = "by depth"  # may differ along a curve of `record scaling`


def knob(default: object, *traits: str):
    """Return a field of Config with a default and traits."""
    return field(default=default, metadata=dict.fromkeys(traits, True))


NO_CAP = 1 << 40  # bytes: the size_cap of a run whose artifact may have any size


@dataclass(frozen=True)
class Config:
    """Every knob of a run, its default and unit. make_config resolves them; nothing changes them later."""

    # the run
    preset: str = knob("record", SHARED)
    run_id: str = knob("", FREE, OWN)  # "": made of UTC time, preset and seed
    seed: Count = knob(1337, OWN)  # sets the initial weights and the order of the data
    out_dir: str = knob("logs", FREE, PATH, OWN)  # OUT_DIR/RUN_ID.txt, the log; OUT_DIR/RUN_ID.int6.CODEC
    data_path: str = knob("data/datasets/fineweb10B_sp8192", FREE, PATH, DATA, SHARED)
    tokenizer_path: str = knob("", FREE, PATH, DATA, SHARED)  # "": the one in DATA_PATH/manifest.json
    report_split: str = knob("", SHARED, REPORT)  # a second split to score and report, never used to choose
    bos_id: Count = knob(1, STORED, SHARED)  # first token of every document
    checkpoint_every: float = knob(0.0, FREE, BACKUP)  # seconds on the training clock; 0: never
    resume: str = knob("", FREE, PATH, BACKUP)  # auto: RUN_ID's newest checkpoint, if any | a checkpoint file
    memory_limit_gib: float = knob(0.0, FREE)  # of each GPU, for this run's tensors; 0: no limit
    # budget
    max_wallclock_seconds: float = knob(600.0, SHARED, BUDGET)  # limit on the training clock; 0: no limit
    iterations: int = knob(20000, SHARED, BUDGET)
    target_loss: float = knob(0.0, SHARED)  # nats; above 0 the run is a race, decided by its last validation
    warmup_steps: Count = knob(10, SHARED)  # untimed; they compile every shape, then all they did is undone
    val_loss_every: Count = knob(0, SHARED, REPORT)  # steps; 0: training reads no held-out file
    train_log_every: int = knob(50, SHARED, REPORT)  # steps; steps 1, 2, 4, 8, ... are logged as well
    val_tokens: Count = knob(0, SHARED, INPUT)  # score this many targets, the first; 0: the whole split
    # batch
    train_batch_tokens: int = knob(786_432, SHARED, BY_DEPTH)  # per optimizer step, over all ranks
    micro_batch_tokens: int = knob(98_304, SHARED, BY_DEPTH)  # at most, per forward pass on one rank
    start_batch_tokens: Count = 0  # batch at the start of the run; 0: train_batch_tokens throughout
    batch_growth_frac: Fraction = 0.5  # part of the run, at its start, in which the batch grows
    train_seq_len: int = knob(2048, SHARED)
    mix_tokens: Count = 16_777_216  # stretch of text from which a batch draws its sequences; 0: in order
    eval_seq_len: int = knob(2048, STORED, RESCORED, SCORES)
    eval_stride: int = knob(64, STORED, RESCORED, SCORES, STRIDE)  # fresh targets in each sliding window
    eval_batch_tokens: int = knob(131_072, SCORES, INPUT)  # in a pass of a rank; 8,192 at most on a CPU
    ttt_lr: float = knob(0.0, STORED_IF_LEARNS, SCORES)  # initial rate of test-time training; 0: none
    ttt_form: str = knob("sgd", STORED_IF_SET, RESCORED, SCORES)  # a row of TTT_FORMS: how it learns
    ttt_chunk_tokens: int = knob(32_768, STORED_IF_LEARNS, SCORES)  # targets scored, then learned from
    ttt_passes: int = knob(3, STORED_IF_LEARNS, SCORES)  # steps on each chunk
    ttt_rank: int = knob(8, STORED_IF_SET, RESCORED, SCORES)  # rank of the changes that the lora form learns
    # size
    depth: Count = knob(0, BY_DEPTH)  # layers; all else follows (follow_dials); 0: the preset's own model
    tokens_per_param: float = 0.0  # sets iterations: training tokens per parameter of scaling_params; 0: off
    # model
    vocab_size: int = knob(8192, SIZE, STORED, SHARED)  # the tokenizer's, or that up to a multiple of 128
    num_layers: int = knob(11, SIZE, STORED, BY_DEPTH)
    model_dim: int = knob(512, SIZE, STORED, BY_DEPTH)
    num_heads: int = knob(4, SIZE, STORED, BY_DEPTH)
    num_kv_heads: int = knob(2, SIZE, STORED, BY_DEPTH)
    mlp_mult: float = knob(4.0, STORED)
    rope_dims: Count = knob(32, STORED)  # rotated dimensions of each head; the others carry no position
    rope_base: float = knob(10_000.0, STORED)
    # Keys a token sees, itself included; 0: all. The list repeats over the layers.
    attn_windows: str = knob("256 256 256 0", STORED, BY_DEPTH)
    doc_mask: bool = knob(False, STORED)  # no token sees another document
    parallel_last_n: Count = knob(0, STORED_IF_SET, BY_DEPTH)  # layers with attention and MLP side by side
    parallel_form: str = knob("one_stream", STORED_IF_SET)  # one_stream | two_streams, rows of FORMS
    # Neighbouring layers to visit again, counted from 0: "4 5" means 4 5 4 5 ...
    loop_layers: str = knob("", STORED_IF_SET)
    loop_times: Count = knob(0, SIZE, STORED_IF_SET)  # further visits; 0: none
    loop_frac: Fraction = 0.5  # training starts to loop at this fraction of the run; 1: scoring alone loops
    xsa_last_n: Count = knob(11, STORED, BY_DEPTH)  # layers with exclusive self-attention
    attn_gate_dims: Count = knob(0, SIZE, STORED_IF_SET)  # inputs that set the gate of a head; 0: no gates
    skip_gates: bool = knob(False, STORED_IF_SET)  # skips blend by a learned gate instead of adding
    ve_last_n: Count = knob(0, STORED, BY_DEPTH)  # layers that add a token embedding to their values; 0: none
    ve_dim: int = knob(128, SIZE, STORED)
    bigram_vocab_size: Count = knob(0, SIZE, STORED)  # embeddings for hashed pairs of tokens; 0: none
    bigram_dim: int = knob(128, SIZE, STORED)
    logit_softcap: float = knob(30.0, STORED)
    norm_gains: bool = knob(False, STORED_IF_SET)  # learned gains after the norms of attention and MLP
    qk_gain_init: float = 4.0
    out_scale_init: float = 1.0  # start of the scales of what attention and MLP add
    tied_embed_init_std: float = 0.005
    # optimizer
    ortho: str = "ns5"  # a row of ORTHO
    step_rule: str = "muon"  # a row of STEP_RULES
    matrix_lr: float = knob(0.02, BY_DEPTH)
    embed_lr: float = knob(0.03, BY_DEPTH)
    scalar_lr: float = knob(0.02, BY_DEPTH)
    norm_gain_lr: float = knob(0.025, BY_DEPTH)
    depth_lr_power: Fraction = 0.0  # with depth=N, matrix_lr goes as N^-depth_lr_power
    muon_wd: float = knob(0.085, BY_DEPTH)  # weight decay of the matrices
    embed_wd: float = knob(0.085, BY_DEPTH)
    scalar_wd: float = knob(0.02, BY_DEPTH)
    muon_momentum: Decay = 0.95
    muon_momentum_start: Decay = 0.85
    muon_momentum_warmup_frac: Fraction = 0.3  # part of the run, at its start, in which momentum rises
    momentum_spread: float = 1.0  # above 1: mean of two momenta, horizons shorter and longer by this factor
    equalize_rows: bool = True  # scale rows to unit norm before the direction
    cautious_wd: bool = False  # decay only the weights that the step also shrinks
    decay_follows_rate: bool = False  # weight decay falls with the rates
    normuon_beta2: Decay = 0.95  # decay of the second moment in the normuon rules
    proj_init_std: float = 0.0  # for O and MLP-down; 0: zeros, or 0.8 / sqrt(model_dim) with hyperball
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 0.3  # largest global norm of the averaged gradients; 0: no clipping
    bind_by_time: bool = False  # a kernel must also not be slower than what would run without it
    fp8: bool = knob(True, COMPILES)  # MLP forward products in e4m3 when gradients are on, where a GPU can
    deterministic: bool = False  # runs of a seed are bit-identical on a GPU, if iterations end them
    wire_dtype: str = "float32"  # how gradients travel between ranks: float32 | bfloat16
    warmdown_frac: Fraction = 0.6  # part of the run, at its end, in which rates fall linearly
    matrix_warmdown_frac: Fraction = 0.0  # the same for matrix_lr; 0: warmdown_frac
    matrix_warmup_frac: Fraction = 0.0  # part of the run, at its start, in which matrix_lr rises from 0
    min_lr_frac: Fraction = 0.1  # each rate ends at this fraction of its peak
    # averaging and artifact
    ema_frac: float = 0.05  # horizon of the average, as a fraction of the run
    artifact_weights: str = knob("ema", CODES)  # ema | live; if training ended early, ema: the better of both
    gptq_batches: Count = knob(1, CODES)  # training batches that guide int6 rounding; 0: round to nearest
    gptq_embed: bool = knob(True, CODES)  # the output layer's inputs guide the token embedding's rounding
    column_steps: bool = knob(True, CODES)  # int6 steps are finer in columns that matter more; codes to 127
    row_steps: bool = knob(True, CODES)  # int6 steps are finer in rows that the loss depends on more
    trellis: bool = knob(False, CODES)  # earlier codes say which int6 weights lie half a step off their codes
    int6_step: Fraction = knob(0.0, SHARED, CODES)  # the smallest, in root mean squares of the row
    matrix_clip_sd: float = knob(0.0, CODES)  # clip of an int6 row, in the same unit; 0: least squared error
    embed_bits: int = knob(6, CODES)  # bits of an embedding's codes: 6 | 7 | 8
    embed_clip_sd: float = knob(0.0, CODES)  # like matrix_clip_sd, for the embeddings
    codec: str = knob("rans", CODES)  # a row of CODECS
    fit_cap: bool = knob(True, SHARED, CODES)  # over the cap: raise int6_step until the submission fits
    size_cap: Count = knob(16_000_000, SHARED, CODES)  # bytes, packed code too; 0: no artifact; or NO_CAP

    @property
    def head_dim(self) -> int:
        """Dimensions of a query, a key and a value."""
        return self.model_dim // self.num_heads

    @property
    def num_visits(self) -> int:
        """Visits of layers in a forward pass of the looped model."""
        return self.num_layers + self.loop_times * len(self.loop_layers.split())

    @property
    def has_loop(self) -> bool:
        """Whether some layers are visited more than once."""
        return self.num_visits > self.num_layers

    @property
    def trains_loop(self) -> bool:
        """Whether training loops, from the start or later; otherwise scoring alone does, or nothing."""
        return self.has_loop and self.loop_frac < 1

    @property
    def two_stream_layers(self) -> int:
        """How many of the last layers have two residual streams."""
        return self.parallel_last_n if self.parallel_form == "two_streams" else 0

    @property
    def calibrates(self) -> bool:
        """Whether training text guides the rounding of an artifact."""
        return self.gptq_batches > 0 and self.makes_artifact

    @property
    def makes_artifact(self) -> bool:
        """Whether the run ends with an artifact; a race need not."""
        return self.size_cap > 0

    @property
    def has_cap(self) -> bool:
        """Whether the size of the artifact is limited."""
        return self.size_cap < NO_CAP

    @property
    def kv_dim(self) -> int:
        """Outputs of the matrix of all keys, or of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden values of an MLP."""
        return round(self.mlp_mult * self.model_dim)

    @property
    def steps_differ(self) -> bool:
        """Whether steps may come to cost more during the run: the loop begins, or the batch grows."""
        return self.has_loop or self.start_batch_tokens > 0

    @property
    def time_limit_ms(self) -> float:
        """The limit on the training clock; infinite if there is none."""
        return 1000 * self.max_wallclock_seconds if self.max_wallclock_seconds > 0 else math.inf


# Off in Config, because the headers of artifacts older than these knobs leave them out.
LOOPED = dict(skip_gates=True, loop_layers="4 5", loop_times=2)
# Schedule and artifact of the presets that are older than Config's.
EARLIER = dict(
    min_lr_frac=0.0,
    ema_frac=0.02,
    gptq_embed=False,
    column_steps=False,
    row_steps=False,
    embed_bits=8,
    codec="xz",
)
# The model for 1,024 tokens and its rates.
SP1024 = EARLIER | dict(
    data_path="data/datasets/fineweb10B_sp1024",
    vocab_size=1024,
    mlp_mult=3.0,
    xsa_last_n=4,
    ve_last_n=2,
    bigram_vocab_size=1536,
    qk_gain_init=1.5,
    step_rule="normuon",
    equalize_rows=False,
    matrix_lr=0.05,
    embed_lr=0.035,
    scalar_lr=0.025,
    muon_wd=0.04,
    embed_wd=0.04,
    scalar_wd=0.04,
    muon_momentum_warmup_frac=0.2,
)
MANY_STEPS = dict(muon_momentum=0.99, muon_momentum_start=0.92, warmdown_frac=0.5, ema_frac=0.045)
RECORD_SP1024 = SP1024 | MANY_STEPS
ONE_GPU = dict(
    max_wallclock_seconds=300.0,
    train_batch_tokens=262_144,
    micro_batch_tokens=131_072,
    val_loss_every=500,
)
LAPTOP = dict(
    max_wallclock_seconds=120.0,
    iterations=100_000,
    warmup_steps=2,
    val_loss_every=100,
    train_log_every=25,
    val_tokens=65_536,
    train_batch_tokens=2048,
    micro_batch_tokens=2048,
    train_seq_len=256,
    eval_seq_len=256,
    eval_batch_tokens=8192,
    num_layers=4,
    model_dim=128,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=16,
    attn_windows="",
    gptq_batches=16,
)
RACE = dict(max_wallclock_seconds=0.0, size_cap=0, seed=1)  # the runs of a race are seeds 1, 2, 3, ...
# 85 M parameters in 12 layers and 39 M in the embedding; split and target are modded-nanogpt's.
GPT2_RACE = RECORD_SP1024 | dict(
    **RACE,
    data_path="data/datasets/fineweb10B_gpt2",
    vocab_size=50_304,  # 50,257, padded
    bos_id=50_256,
    target_loss=3.28,
    val_tokens=10_485_760,
    val_loss_every=125,
    train_batch_tokens=524_288,
    micro_batch_tokens=65_536,
    eval_batch_tokens=65_536,
    num_layers=12,
    model_dim=768,
    num_heads=6,
    num_kv_heads=6,
    mlp_mult=4.0,
    rope_dims=64,
    ve_last_n=0,
    bigram_vocab_size=0,
)
GPT2_124M = GPT2_RACE | dict(iterations=3250)
# The conditions of modded-nanogpt's track 3 and its Muon baseline; docs/races.md lists what still differs.
OPTIMIZER_RACE = GPT2_RACE | dict(
    iterations=3375,
    train_seq_len=1024,
    mix_tokens=0,
    eval_seq_len=1024,
    eval_stride=1024,
    rope_base=1024.0,
    attn_windows="",
    xsa_last_n=0,
    logit_softcap=15.0,
    qk_gain_init=1.358,  # which makes the scale 0.12 with heads of 128
    step_rule="muon",
    matrix_lr=0.025,
    scalar_lr=0.01,
    muon_wd=0.025,
    embed_wd=0.0,
    scalar_wd=0.0,
    muon_momentum=0.95,
    muon_momentum_start=0.95,
    adam_beta1=0.8,
    adam_eps=1e-10,
    grad_clip=0.0,
    fp8=False,
    warmdown_frac=0.7,
)
# All of MuonH: what nanochat #498 adds to its rule, with a warm-up after modded-nanogpt #343.
MUONH = SP1024 | dict(
    step_rule="hyperball",
    norm_gains=True,
    out_scale_init=0.0,
    matrix_lr=0.02,
    depth_lr_power=1.0,
    muon_wd=0.0,
    embed_wd=0.0,
    scalar_wd=0.0,
    warmdown_frac=0.3,
    ema_frac=0.045,
    matrix_warmdown_frac=1.0,
    matrix_warmup_frac=0.03,
)
PRESETS: dict[str, dict] = {
    "record": LOOPED,  # all else at its default
    "record_sp1024": RECORD_SP1024,
    # No loop: faster steps gain more in 300 s (2026-11-27_Sp8192NoLoop).
    "h100x1": ONE_GPU | dict(skip_gates=True, train_batch_tokens=131_072),
    "h100x1_sp1024": SP1024 | ONE_GPU,
    # In 600 s on two GPUs the loop gains 0.0069 (2026-11-28_TenMinutesLoop).
    "h100x2": ONE_GPU | LOOPED | dict(max_wallclock_seconds=600.0),
    "cpu": SP1024 | LAPTOP | dict(xsa_last_n=2, ve_last_n=1, ve_dim=64, bigram_vocab_size=512, bigram_dim=64),
    "muonh": MUONH,
    # parameter-golf #1394, with heads of 128 dimensions and the attention windows of `record`.
    "sp8192": EARLIER | LOOPED | MANY_STEPS | dict(warmdown_frac=0.667, ema_frac=0.067),
    "cpu_sp8192": EARLIER | LOOPED | LAPTOP | dict(xsa_last_n=4, loop_layers="1 2"),
    # Equal on purpose: times of eight cards and of one do not compare, and a record's preset names its track.
    "gpt2_124m": GPT2_124M,
    "gpt2_124m_h100x1": GPT2_124M,
    "optimizer_race": OPTIMIZER_RACE,
    "optimizer_race_small": SP1024
    | ONE_GPU
    | RACE
    | dict(
        target_loss=2.25, iterations=780, train_batch_tokens=131_072, val_loss_every=130, eval_stride=2048
    ),
}


def knobs_with(trait: str) -> tuple[str, ...]:
    """Return the knobs that have a trait."""
    return tuple(f.name for f in fields(Config) if trait in f.metadata)


STORED_KNOBS = knobs_with(STORED)  # in every artifact's header
LEARNING_KNOBS = knobs_with(STORED_IF_LEARNS)  # in those whose score learns from the text
CHANGED_KNOBS = knobs_with(STORED_IF_SET)  # each where it differs from its default


def parse_flag(text: str) -> bool:
    """Read 0, 1, true or false. Raises KeyError for anything else."""
    return {"0": False, "false": False, "1": True, "true": True}[text.lower()]


# Each rate with the weight decay of its parameters. A step shrinks them by the product of the two.
DECAYS = {
    "matrix_lr": "muon_wd",
    "embed_lr": "embed_wd",
    "scalar_lr": "scalar_wd",
    "norm_gain_lr": "scalar_wd",
}
MAX_TOKENS = 1 << 30  # in a batch
LONGEST_VALUE = 4000  # characters of a knob's value: the system's limit on a path is 4,096 bytes
TRAINING_BYTES = 20  # per parameter: float32 weight, gradient, two moments, average


class Kind(NamedTuple):
    """The values that a knob may have. Numbers lie in [least, 2^53)."""

    type: str  # for messages
    parse: Callable[[str], object]
    least: int = 0
    below: float = math.inf
    most: float = math.inf


# By annotation.
KINDS = {
    "str": Kind("str", str),
    "bool": Kind("bool", parse_flag),
    "int": Kind("int", int, least=1),
    "Count": Kind("int", int),
    "float": Kind("float", float),
    "Fraction": Kind("float", float, most=1),
    "Decay": Kind("float", float, below=1),
}


def kinds_of_knobs() -> dict[str, Kind]:
    """Return the kind of every knob.

    f.type is the text of the annotation, because this file imports annotations from __future__.
    """
    return {f.name: KINDS[f.type] for f in fields(Config)}


def read_knobs(argv: list[str], env: Mapping[str, str]) -> dict[str, object]:
    """Return the values of the knobs that are given: KEY in the environment, or `key=value`, which wins.

    Raises InputError for an unknown key in argv or a value of the wrong type.
    """
    kinds = kinds_of_knobs()
    given = {key: env[key.upper()] for key in kinds if key.upper() in env}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"argument {argument[:40]!r}: knobs are given as key=value")
        if key not in kinds:
            close = difflib.get_close_matches(key.lower(), kinds)
            close = close or [known for known in kinds if key and key.lower() in known][:5]
            hint = f"did you mean {', '.join(close)}?" if close else "`train_gpt.py config` lists them"
            raise InputError(f"unknown config key {key[:40]!r}; {hint}")
        given[key] = value
    for key, text in given.items():
        if any(ord(letter) < 32 for letter in text) or len(text.splitlines()) > 1:
            raise InputError(f"config key {key}: {text[:40]!r} has control characters; leave them out")
        if len(text) > LONGEST_VALUE:
            raise InputError(f"config key {key}: {text[:40]!r}... has more than {LONGEST_VALUE} characters")

    values = {}
    for key, text in given.items():
        try:
            values[key] = kinds[key].parse(text)
        except (ValueError, KeyError):
            raise InputError(f"config key {key}: {text[:40]!r} is not of type {kinds[key].type}") from None
    return values


def check_ranges(h: Config) -> None:
    """Check each knob by itself. Raises InputError with the knob to change."""
    for key, kind in kinds_of_knobs().items():
        value = getattr(h, key)
        if isinstance(value, str):
            continue
        if not kind.least <= value < 1 << 53:  # this also refuses nan
            raise InputError(
                f"config key {key}: {str(value)[:40]} must be at least {kind.least} and below 2^53"
            )
        if value >= kind.below:
            raise InputError(f"config key {key}: {value:g} must be below {kind.below}")
        if value > kind.most:
            raise InputError(f"config key {key}: {value:g} must be at most {kind.most}")


class Relation(NamedTuple):
    """A relation between knobs."""

    holds: bool
    complaint: str  # what to say if the relation does not hold


def divides(part: str, whole: str, h: Config) -> Relation:
    """Return the relation that one knob divides another."""
    size = getattr(h, part)
    total = getattr(h, whole)
    return Relation(total % size == 0, f"{part}={size} must divide {whole}={total}")


def at_most(key: str, limit: str, h: Config) -> Relation:
    """Return the relation that one knob does not exceed another."""
    value = getattr(h, key)
    most = getattr(h, limit)
    return Relation(value <= most, f"{key}={value} must not exceed {limit}={most}")


def above_zero(key: str, h: Config) -> Relation:
    """Return the relation that a knob is above 0; its kind alone would allow 0."""
    value = getattr(h, key)
    return Relation(value > 0, f"{key}={value:g} must be above 0")


def fits_memory(key: str, h: Config) -> Relation:
    """Return the relation that a batch has at most MAX_TOKENS tokens; no machine has room for more."""
    tokens = getattr(h, key)
    return Relation(
        tokens <= MAX_TOKENS,
        f"{key}={tokens} must be at most {MAX_TOKENS}: its ids alone take {8 * tokens / 1e9:.3g} GB",
    )


# -----------------------------------------------------------------------------
# 3. Machine: the differences between a laptop and eight GPUs, bound once. There is always a process group.

PATIENCE_S = 60  # the longest that a step on the device or a batch from the disk may take


class Level(NamedTuple):
    """One level at which a bank is split over ranks. A bank is cut into world_size equal shares.

    Gradients go down the levels by reduce-scatter; updated weights come back up by all-gather. A single node
    has one level: all shares go in, and rank r keeps share r. Several nodes have two levels. With two nodes
    of four ranks, rank 5 (node 1, local rank 1) sees

        shares         0 1 2 3 4 5 6 7
        inside         * * * * * * * *   averaged over the four ranks of node 1: local rank 1 keeps 2 and 3
        across             * *           averaged over ranks 1 and 5, the local ranks 1: node 1 keeps 3

    Each GPU thus sends only an eighth of a bank to the other node.
    """

    group: dist.ProcessGroup | None  # None: all ranks
    whole: slice  # the shares that go in
    kept: slice  # the shares that this rank keeps


class Captured(NamedTuple):
    """Device work with a single entry point: a CUDA graph, or the plain function if capture failed."""

    launch: Callable[[], None]
    failure: str | None  # why capture failed; None for a graph, and on a device without graphs


@dataclass
class Signals:
    """The signals that `guarded` has received in this process."""

    times: list[float] = field(default_factory=list)  # time.monotonic() of each of STOP_SIGNALS
    may_finish: bool = False  # whether the first one ends training and not the process; set by `train`


class Stop(IntEnum):
    """Why training stops before its budgets are spent. Ranks may disagree; the largest value wins."""

    NO = 0
    SIGNAL = 1
    DIVERGED = 2


class Agreed(NamedTuple):
    """What all ranks agree on after a step of training."""

    clock_ms: float  # rank 0's
    stop: Stop  # the largest of all ranks


class Binding(NamedTuple):
    """What each part of a step runs, by the names of the log. The defaults are those of a CPU.

    The launches of a pass and of an update say what is tried, graph or eager; the log of a run says so if a
    capture fails later.
    """

    attention: str = "cpu"
    qk: str = "torch"
    mlp: str = "torch"
    compile: str = "none"
    pass_launch: str = "eager"
    update_launch: str = "eager"

    @property
    def parts(self) -> dict[str, str]:
        """Return part -> name, in the words and the order of the log."""
        return {
            "attention": self.attention,
            "qk": self.qk,
            "mlp": self.mlp,
            "compile": self.compile,
            "pass": self.pass_launch,
            "update": self.update_launch,
        }


@dataclass(frozen=True)
class Machine:
    """This process's rank, and all choices that depend on the device.

    Whatever a compiler, a driver or NCCL raises while something faster is tried, the plain function is always
    correct and takes its place.
    """

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # activations and matrix products have this dtype
    compile: Callable  # torch.compile, or the identity
    ops: Ops  # the model's functions for attention, QK, MLP and linear products
    levels: tuple[Level, ...]
    device_name: str  # the GPU's, or the architecture of the processor
    binding: Binding = Binding()
    side_stream: torch.cuda.Stream | None = None  # on a GPU: captures graphs, and copies to the host
    lane_streams: tuple = ()  # on a GPU: a lane takes the next of them; the side stream is one
    graph_capture: Callable | None = None  # fn -> a function that replays fn's device work
    bind_ms: float = 0.0  # that binding the model's functions took, which mostly compiles them
    bind_times: Mapping[str, tuple] = field(default_factory=dict)  # by part, Bound.times where times decided
    signals: Signals = field(default_factory=Signals)

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU: its work is queued, and host tensors for it are page-locked."""
        return self.device.type == "cuda"

    @property
    def own_share(self) -> int:
        """The index of the share of every bank that this rank updates."""
        return self.levels[-1].kept.start

    def sync(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.is_gpu:
            torch.accelerator.synchronize()

    def fetch(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Start copying tensors to the host and return a function that waits for the copies and returns them.

        The returned function raises Fault after PATIENCE_S: NCCL's watchdog does not cover CUDA graphs.
        """
        copies = [t.clone() for t in tensors]
        if not self.is_gpu:
            return lambda: copies

        side = self.side_stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            host = [t.to("cpu", non_blocking=True) for t in copies]  # page-locked, from torch's cache
            passed = side.record_event()
        for t in copies:
            t.record_stream(side)  # the memory of t must not be reused before the copy ends

        def arrived() -> list[Tensor]:
            deadline = time.monotonic() + PATIENCE_S
            while not passed.query():
                if time.monotonic() > deadline:
                    raise Fault(f"the device has been busy for {PATIENCE_S} s; is another rank gone?")
                time.sleep(1e-4)
            return host

        return arrived

    @contextmanager
    def lanes(self) -> Iterator[Callable]:
        """Run blocks of device work concurrently: `with m.lanes() as lane:`, then `with lane():` per block.

        Blocks start after all earlier work and end before any later work. On a CPU they run in order.
        """
        current = torch.cuda.current_stream() if self.lane_streams else None
        free = [s for s in self.lane_streams if s != current]
        turns = cycle(free)

        def lane():
            return torch.cuda.stream(next(turns)) if free else nullcontext()

        for stream in free:
            stream.wait_stream(current)
        yield lane
        for stream in free:
            current.wait_stream(stream)

    def capture(self, fn: Callable[[], None]) -> Captured:
        """Capture fn as one CUDA graph. fn must queue the same work on the same tensors at every call.

        fn first runs three times on a side stream, as CUDA requires, and is compiled there; callers undo the
        effects. Either all ranks get a graph or none does. Without graph_capture, fn does not run here.
        """
        if self.graph_capture is None:
            return Captured(fn, None)
        for _ in range(3):
            with self.lanes() as lane, lane():
                fn()

        launch = fn
        failure = None
        try:
            launch = self.graph_capture(fn)
        except Exception as e:  # whatever it is, see Machine
            failure = f"rank {self.rank}: {type(e).__name__}: {e}".partition("\n")[0]
        failure = first_failure(self.of_every_rank(failure))
        return Captured(launch if failure is None else fn, failure)

    def largest_of_each(self, *numbers: float) -> list[float]:
        """Return, on every rank, the maximum over all ranks of each number.

        Collective over gloo, which fails at once when a rank has exited.
        """
        box = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.tolist()

    def agree(self, clock_ms: float, stop: Stop) -> Agreed:
        """Return rank 0's clock, which must not be negative, and the largest Stop, by one collective."""
        clock_ms, stop = self.largest_of_each(clock_ms if self.rank == 0 else 0.0, stop)
        return Agreed(clock_ms, Stop(stop))

    def largest(self, number: float) -> float:
        """Return the largest of all ranks' numbers, on every rank."""
        return self.largest_of_each(number)[0]

    def number_of_rank_0(self, number: float) -> float:
        """Return rank 0's number, which must not be negative, on every rank once all have called."""
        return self.largest(number if self.rank == 0 else 0.0)

    def check_ranks(self) -> None:
        """Fail at once if another rank has exited, before a device collective would hang on it."""
        self.largest(0.0)

    def of_rank_0(self, value: Value) -> Value:
        """Return rank 0's value, any object that can be pickled, on every rank. Collective over gloo."""
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def of_every_rank(self, value: Value) -> list[Value]:
        """Return the ranks' values, any objects that can be pickled, in their order. Collective over gloo."""
        values = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """If the block raises a OneLineError on one rank, raise it on every rank. Collective over gloo.

        Otherwise the other ranks would wait for the failed rank, or begin a log. The block must not
        communicate.
        """
        fault = None
        try:
            yield
        except OneLineError as e:
            fault = e
        if first := first_failure(self.of_every_rank(fault)):
            raise first


def capture_graph(stream: torch.cuda.Stream, pool: tuple, fn: Callable[[], None]) -> Callable[[], None]:
    """Capture the device work that fn queues, without running it. Returns the function that launches it.

    Graphs of one pool share memory, so they must run one after another and leave no result in the pool.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the current stream if capture fails; thread_local spares NCCL's watchdog.
    with torch.cuda.stream(stream):
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            fn()
    return graph.replay


class Ranks(NamedTuple):
    """The place of this process among all processes, and among those of its node."""

    world: int
    rank: int
    local_world: int
    local_rank: int


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """Read torchrun's variables; without them this process is alone. Raises InputError for bad ones."""
    world_text = env.get("WORLD_SIZE", "1")
    rank_text = env.get("RANK", "0")
    local_world_text = env.get("LOCAL_WORLD_SIZE", world_text)
    local_rank_text = env.get("LOCAL_RANK", "0")

    texts = (world_text, rank_text, local_world_text, local_rank_text)
    ranks = None
    if ("RANK" in env) == ("WORLD_SIZE" in env) and all(map(str.isdecimal, texts)):
        ranks = Ranks(*map(int, texts))
    if ranks is None or ranks.rank >= ranks.world or ranks.local_world == 0:
        raise InputError(
            f"WORLD_SIZE={env.get('WORLD_SIZE')} RANK={env.get('RANK')}: not a process group; "
            "start several processes with torchrun, or unset both"
        )
    if ranks.local_world != ranks.world:
        uneven = ranks.world % ranks.local_world != 0
        if uneven or ranks.rank % ranks.local_world != ranks.local_rank:
            raise InputError(
                f"RANK={ranks.rank} LOCAL_WORLD_SIZE={ranks.local_world}: nodes differ in size; "
                "use the same --nproc_per_node on all of them"
            )
    return ranks


def share_levels(ranks: Ranks) -> tuple[Level, ...]:
    """Return this rank's levels: one for a single node, else two. Collective: it makes process groups."""
    everything = slice(0, ranks.world)
    if ranks.local_world == ranks.world:
        return (Level(None, everything, slice(ranks.rank, ranks.rank + 1)),)

    nodes = ranks.world // ranks.local_world
    node = ranks.rank // ranks.local_world
    inside, _ = dist.new_subgroups(ranks.local_world)
    same_local_rank = [[*range(i, ranks.world, ranks.local_world)] for i in range(ranks.local_world)]
    across, _ = dist.new_subgroups_by_enumeration(same_local_rank)
    kept = slice(ranks.local_rank * nodes, (ranks.local_rank + 1) * nodes)  # one share per node
    one_share = slice(kept.start + node, kept.start + node + 1)
    return Level(inside, everything, kept), Level(across, kept, one_share)


MIN_TORCH = (2, 11)  # nobody has tried an older one


def check_torch() -> None:
    """Raise InputError if this PyTorch is older than MIN_TORCH."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        least = ".".join(map(str, MIN_TORCH))
        raise InputError(
            f"PyTorch {torch.__version__} is too old: {least} or later is required; "
            "run pip install -r requirements.txt"
        )


JOIN_S = 600  # the longest that a rank waits for the others to start


def meet(ranks: Ranks, env: Mapping[str, str]) -> dict:
    """Return the store in which all ranks meet, and this rank's place, as arguments of init_process_group.

    Raises InputError if a rank does not come within JOIN_S; PyTorch itself refuses wrong variables.
    """
    if "RANK" not in env:
        return dict(store=dist.HashStore(), rank=0, world_size=1)
    address = env.get("MASTER_ADDR")
    port = env.get("MASTER_PORT", "")
    place = f"MASTER_ADDR={address} MASTER_PORT={port}"
    waited = f"WORLD_SIZE={ranks.world} RANK={ranks.rank}: waited {JOIN_S} s at {place} for"
    remedy = "start every rank with the same address, or unset WORLD_SIZE and RANK"

    # PyTorch would wait for rank 0 as well, and then print a trace of its C++ calls.
    deadline = time.monotonic() + JOIN_S
    while ranks.rank and address and port.isdecimal() and not listens(address, int(port)):
        if time.monotonic() > deadline:
            raise InputError(f"{waited} rank 0, which does not answer there; {remedy}")
        time.sleep(0.1)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
    except dist.DistStoreError as e:
        raise InputError(f"{waited} all {ranks.world} ranks ({e}); {remedy}") from None
    return dict(store=store, rank=rank, world_size=world_size)


def listens(address: str, port: int) -> bool:
    """Return whether a program answers at a port."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except (OSError, OverflowError):
        return False
    return True


def init_machine(h: Config, env: Mapping[str, str], trains: bool = True) -> Machine:
    """Join or create the process group, set PyTorch's global switches, and bind a Machine.

    Raises InputError for bad variables of torchrun, a batch that cannot be split, or no attention kernel.
    """
    ranks = read_ranks(env)
    if trains:
        cut_batch(h, ranks.world)

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        limit_memory(h, device)
    elif h.memory_limit_gib:
        raise InputError(
            "config key memory_limit_gib: it limits a GPU's memory, and there is none; leave it out"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    if h.deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler: 1 s
        torch.use_deterministic_algorithms(h.deterministic)

    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **meet(ranks, env))
    except (RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(
            f"cannot make the process group ({reason}); start several processes with torchrun; gloo needs "
            "the loopback network even for one process: `ip link set lo up`, or name an interface with "
            "GLOO_SOCKET_IFNAME"
        ) from None

    levels = share_levels(ranks)

    machine = Machine(
        rank=ranks.rank,
        world_size=ranks.world,
        device=device,
        dtype=torch.float32,
        compile=lambda fn: fn,
        ops=Ops(),
        levels=levels,
        device_name=platform.machine(),
    )
    return with_kernels(with_gpu(machine), h, trains) if cuda else machine


GIB = 1 << 30


def limit_memory(h: Config, device: torch.device) -> None:
    """Let PyTorch take at most memory_limit_gib of a GPU, as if the card had no more. Raises InputError."""
    if h.memory_limit_gib == 0:
        return
    _, total = torch.cuda.mem_get_info(device)
    if h.memory_limit_gib * GIB > total:
        raise InputError(
            f"config key memory_limit_gib: {h.memory_limit_gib:g} is more than the {total / GIB:.1f} GiB of "
            f"{torch.cuda.get_device_name(device)}; lower it, or leave it out"
        )
    torch.cuda.set_per_process_memory_fraction(h.memory_limit_gib * GIB / total, device)


def with_gpu(m: Machine) -> Machine:
    """Return the machine with compiler, streams and graphs bound for its GPU."""
    torch.set_float32_matmul_precision("high")
    side_stream = torch.cuda.Stream()
    return replace(
        m,
        dtype=torch.bfloat16,
        compile=partial(torch.compile, dynamic=False, fullgraph=True),
        device_name=torch.cuda.get_device_name(m.device),
        binding=Binding(compile="inductor", pass_launch="graph", update_launch="graph"),
        side_stream=side_stream,
        lane_streams=(side_stream, *(torch.cuda.Stream() for _ in range(5))),
        graph_capture=partial(capture_graph, side_stream, torch.cuda.graph_pool_handle()),
    )


def machine_report(m: Machine) -> str:
    """Return nvidia-smi's report, else the processor's name, else the device's, and the number of cores."""
    ask = "nvidia-smi || grep -m1 'model name' /proc/cpuinfo || sysctl -n machdep.cpu.brand_string"
    status, report = subprocess.getstatusoutput(f"({ask}) 2>/dev/null")
    if status != 0:
        report = m.device_name
    return f"{report} cores:{os.cpu_count()}"


# -----------------------------------------------------------------------------
# 4. Log and signals: what a run says, how a failure on one rank ends all of them, what Ctrl-C does.

PROGRESS_S = 15  # between two lines about the progress of long work, where no terminal shows it
LINGER_S = 1  # how long a rank waits before it exits after another failed: torchrun blames the first to exit
HANGUP = getattr(signal, "SIGHUP", None)  # sent when a terminal is closed, not on Windows
STOP_SIGNALS = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, HANGUP)))
ECHO_S = 3  # signals this close together count as one: torchrun repeats the terminal's Ctrl-C


class Log:
    """The log file, rank 0's console, and its status line on a terminal. Other ranks are silent."""

    def __init__(self, path: str, machine: Machine | None, resume: bool = False) -> None:
        """Create `path`, or append to it with `resume`. No machine: write nothing at all.

        Raises InputError on every rank when the file exists already or cannot be written.
        """
        self.path = path
        self.file = None
        self.on_terminal = False
        self.goes_on = False  # whether the file holds an earlier part of this run
        self.told_at = 0.0  # perf_counter() at the last line of `progress`
        self.may_move = False  # set once there are trained weights, which must survive a full disk

        if machine is None:
            return
        with machine.raising_together():  # if rank 0 fails, no rank may append its error to another run's log
            if machine.rank == 0:
                self.create(resume)

    def create(self, resume: bool) -> None:
        """On rank 0: create or open the file and keep others from it. Raises InputError."""
        self.on_terminal = has_live_line()
        with explained(f"{self.path}: cannot write the log", "change run_id or out_dir, or resume=auto"):
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            if Path(self.path).is_fifo():  # to open a pipe is to wait for its reader
                raise OSError(errno.EINVAL, "it is a pipe")
            if not resume:
                open(self.path, "x").close()
            # Append, because other ranks may write, too. A path that is not UTF-8 is escaped.
            self.file = open(self.path, "a", encoding="utf-8", errors="backslashreplace")
            self.goes_on = self.file.tell() > 0
        self.lock()

    def lock(self) -> None:
        """Keep other processes from this log until the log is closed or this process ends in any way.

        Raises InputError if another process has the log.
        """
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise InputError(
                f"{self.path}: another process is writing it; wait until it ends, or choose another run_id"
            ) from None
        except OSError:
            pass  # a file system without locks

    def close(self) -> None:
        """End the log and drop any later line. Other processes may lock it from now on."""
        if self.file:
            with suppress(OSError):  # a full disk refuses the rest of the buffer again
                self.file.close()
        self.file = None

    def discard(self) -> None:
        """Remove the log of a run that is refused before it trains, so that its run_id stays free."""
        if self.file and not self.goes_on:
            os.remove(self.path)
        self.close()

    def __call__(self, line: str, console: str | None = None) -> None:
        """Append a line to the file, and print the text for the console; None: the same line.

        The file keeps the formats that tools parse; the console is for people. Raises InputError on failure.
        """
        if self.file is None:
            return
        self.to_file(line)
        with suppress(OSError, InputError):  # a run goes on without a console: the log has everything
            self.status("")
            show(line if console is None else console)

    def to_file(self, line: str) -> None:
        """Append a line to the file and print nothing. Raises InputError on failure."""
        if self.file is None:
            return
        try:
            with explained(f"{self.path}: cannot write the log", "free space or check permissions"):
                print(line, file=self.file, flush=True)
        except InputError as e:
            if not self.may_move:
                self.close()
                raise
            self.move(line, str(e))

    def move(self, line: str, reason: str) -> None:
        """Go on with `line` in a copy of the log elsewhere, and say where on stderr. Raises InputError."""
        old = Path(self.path).read_bytes()
        whole = old[: old.rfind(b"\n") + 1]  # without a line that was cut
        with suppress(OSError):
            self.file.close()
        self.path = write_somewhere(self.path, whole, f"{line}\n".encode())
        self.file = open(self.path, "a", encoding="utf-8", errors="backslashreplace")
        print(f"train_gpt.py: {reason}; the whole log is {self.path}", file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        """Replace the status line of a terminal."""
        if self.on_terminal:
            with suppress(OSError):  # the terminal may be gone
                print("\r\033[K" + text[: terminal_width() - 1], end="", file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int, started: float) -> None:
        """Show how far long work is and when it ends: in the status line, else a line every PROGRESS_S.

        started: perf_counter() when the work began. done: at least 1.
        """
        now = time.perf_counter()
        eta = (now - started) / done * (total - done)
        text = f"{what}: {done}/{total}, ETA {eta:.0f} s"
        self.status(text)
        if now - max(self.told_at, started) > PROGRESS_S:
            self.told_at = now
            if self.on_terminal:
                self.to_file(text)
            else:
                self(text)


def lost_another_rank(error: Exception) -> bool:
    """Return whether an error is merely the consequence of another rank's death."""
    said = ("gloo", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def tell_torchrun(reason: str) -> None:
    """Write the reason of a failure to torchrun's error file: torchrun shows it at the end of its output."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    extra = {"py_callstack": reason, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": reason, "extraInfo": extra}}))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out: PyTorch's, Python's, C++'s or the system's."""
    said = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "start new thread")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def memory_fault(problem: str, error: Exception, remedy: str) -> Fault:
    """Return the Fault for an error that says that memory ran out: "problem (reason); remedy"."""
    return Fault(f"{problem} ({str(error)[:200] or 'MemoryError'}); {remedy}")


@contextmanager
def memory_remedy(doing: str, remedy: str) -> Iterator[None]:
    """Name the remedy if memory runs out in the block or the decorated function. Raises Fault.

    doing: what memory was needed for, such as "to score".
    """
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        raise memory_fault(f"out of memory {doing}", e, remedy) from None


def known_fault(error: Exception) -> OneLineError | None:
    """Return a one-line error for `error`: itself, or one that names the lack of memory or a wrong variable.

    None: no known fault explains it.
    """
    if isinstance(error, OneLineError):
        return error
    if is_out_of_memory(error):
        remedy = (
            "lower micro_batch_tokens, train_batch_tokens or eval_batch_tokens, or make the model smaller"
        )
        return memory_fault("out of memory", error, remedy)
    if line := wrong_setting(error):
        return InputError(line)
    return None


def report_failure(m: Machine, log: Log, error: Exception) -> None:
    """Append to the log the reason why this rank fails. If there are several ranks, exit afterwards.

    The exit skips the proper shutdown, which would wait for the other ranks.
    """
    known = known_fault(error)
    reason = f"rank {m.rank}: {known or traceback.format_exc()}"
    lost = m.world_size > 1 and lost_another_rank(error)
    lines = [reason]
    if lost:
        lines.append(f"rank {m.rank}: another rank is gone; its reason, if it gave one, is in {log.path}")
    with suppress(OSError):  # after `discard` there is no log, and none is made
        file = os.open(log.path, os.O_WRONLY | os.O_APPEND)
        with open(file, "w", encoding="utf-8", errors="backslashreplace") as f:
            f.write("\n".join(lines) + "\n")
    if m.world_size == 1:
        return

    print(f"train_gpt.py: {lines[-1]}", file=sys.stderr, flush=True)
    if lost:
        time.sleep(LINGER_S)
    else:
        tell_torchrun(reason.rstrip())
    os._exit(known.status if known else 1)


@contextmanager
def guarded(m: Machine, log: Log) -> Iterator[None]:
    """Handle STOP_SIGNALS in the block, report its failure, and close the log after it.

    A signal before training exits at once. The first signal during training ends training after the current
    step; after training, it does nothing. A signal more than ECHO_S after the first exits at once.
    """

    def handle(number: int, frame) -> None:
        times = m.signals.times
        times.append(time.monotonic())
        if not m.signals.may_finish or times[-1] > times[0] + ECHO_S:
            os._exit(128 + number)
        # Only a person sends SIGINT: torchrun sends SIGTERM when another rank is gone.
        if m.rank == 0 and number == signal.SIGINT and len(times) == 1:
            text = f"\nstopping: artifact and scores follow; another signal after {ECHO_S} s leaves at once\n"
            with suppress(OSError):
                os.write(2, text.encode())  # not print: the signal may have interrupted one

    hangup_is_ignored = HANGUP and signal.getsignal(HANGUP) == signal.SIG_IGN  # as nohup has it
    numbers = [number for number in STOP_SIGNALS if number != HANGUP or not hangup_is_ignored]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    except Exception as e:
        report_failure(m, log, e)
        raise
    finally:
        log.close()
        for number, handler in before.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# 5. Bytes: the bytes of text that each token stands for, and the definition of bits per byte.


@dataclass(frozen=True)
class ByteCounts:
    """How many UTF-8 bytes of the decoded text each target stands for. Arrays are (V,)."""

    base: np.ndarray  # bytes of the piece without its leading U+2581; 0 for a boundary
    space: np.ndarray  # whether the piece begins with U+2581: one byte more if the text has that space
    boundary: np.ndarray  # whether the piece is a control, unknown or unused one
    # Without a piece U+2581, the byte pieces E2 96 81 spell a space: three tokens stand for one byte.
    spelled: tuple[int, int, int] | None = None
    keeps_first: bool = False  # whether the text has a space that follows a boundary
    # The piece for text that the vocabulary cannot spell; the bytes of that text are unknown. -1: none.
    unknown: int = -1

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Count the bytes of every target: tokens (N,) -> (N - 1,) int64 for tokens[1:]."""
        previous = tokens[:-1]
        target = tokens[1:]
        in_text = ~self.boundary[previous] | self.keeps_first  # whether a space here would be in the text
        counts = self.base[target] + (self.space[target] & in_text)
        if self.spelled is not None:
            e2, b96, b81 = self.spelled
            first = np.flatnonzero((target[:-2] == e2) & (target[1:-1] == b96) & (target[2:] == b81))
            counts[first] = in_text[first]
            counts[first + 1] = 0
            counts[first + 2] = 0
        return counts


def sentencepiece_counts(path: str) -> ByteCounts:
    """Read the ByteCounts of a SentencePiece model. Raises InputError when the file is not one."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor()
    with explained(f"{path}: not a SentencePiece model", "tokenizer_path=FILE names one", RuntimeError):
        sp.LoadFromSerializedProto(read_file(path))  # sp.Load accepts only a path in UTF-8
        ids = list(range(sp.vocab_size()))
    pieces = sp.id_to_piece(ids)
    boundary = np.array(sp.is_control(ids)) | sp.is_unknown(ids) | sp.is_unused(ids)
    space = np.array([piece.startswith("\u2581") for piece in pieces]) & ~boundary

    lengths = [len(piece.removeprefix("\u2581").replace("\u2581", " ").encode()) for piece in pieces]
    base = np.where(boundary, 0, np.where(sp.is_byte(ids), 1, lengths))

    spelled = tuple(sp.piece_to_id(f"<0x{byte:02X}>") for byte in (0xE2, 0x96, 0x81))
    can_spell = sp.is_unknown(sp.piece_to_id("\u2581")) and all(map(sp.is_byte, spelled))

    # add_dummy_prefix adds a first space that is not in the text; remove_extra_whitespaces removes a first
    # space of the text. With either flag, decode drops a first space.
    plain = sp.encode("a")
    prefix = "".join(sp.id_to_piece(plain)).startswith(("\u2581", "<0xE2><0x96><0x81>"))
    keeps_first = not prefix and sp.encode(" a") != plain
    return ByteCounts(
        base,
        space,
        boundary,
        spelled=spelled if can_spell else None,
        keeps_first=keeps_first,
        unknown=sp.unk_id(),
    )


def tiktoken_counts(encoding: str) -> ByteCounts:
    """Read the ByteCounts of a tiktoken encoding. A token is its bytes; special tokens are boundaries.

    Raises InputError for an unknown name, or when the vocabulary cannot be downloaded.
    """
    import tiktoken

    problem = f"tokenizer {encoding!r}: tiktoken cannot load it"
    remedy = "check the name and the network, or set TIKTOKEN_CACHE_DIR to a filled cache"
    with explained(problem, remedy, Exception):  # tiktoken raises many types
        enc = tiktoken.get_encoding(encoding)

    base = np.zeros(enc.n_vocab, np.int64)
    base[list(enc._mergeable_ranks.values())] = [len(piece) for piece in enc._mergeable_ranks]
    return ByteCounts(base, np.zeros(enc.n_vocab, bool), base == 0)


def bpb(nats: float, num_bytes: int) -> float:
    """Return bits per byte for a summed negative log-likelihood in nats and the UTF-8 bytes of the text."""
    return nats / math.log(2) / num_bytes


# -----------------------------------------------------------------------------
# 6. Tokens: shards on disk (the challenge's format), dataset checks, the seeded document-aware loader.

SHARD_HEADER_BYTES = 1024  # 256 little-endian int32: magic, version, number of tokens, zeros
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
OPEN_SHARDS = 64  # how many files a loader keeps open at most; macOS allows 256


def reading_shard(path: str) -> AbstractContextManager[None]:
    """Return a context manager that turns an OSError into an InputError which names the shard."""
    return explained(f"{path}: cannot read the shard", "prepare the data again")


def load_shard(path: str, vocab_size: int = 65_536) -> np.ndarray:
    """Read a shard's tokens, (num_tokens,) uint16, and check them.

    The file is read, not mapped: if a mapped file is cut, the process dies without a message. Raises
    InputError when header and size disagree, or a token is not below vocab_size.
    """
    with reading_shard(path):
        raw_header = read_file(path, limit=SHARD_HEADER_BYTES)
        size = os.path.getsize(path)
    header = np.frombuffer(raw_header.ljust(SHARD_HEADER_BYTES, b"\0"), "<i4")
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(
            f"{path}: not a token shard (magic {SHARD_MAGIC}, version {SHARD_VERSION}); prepare it again"
        )

    expected = SHARD_HEADER_BYTES + 2 * int(header[2])
    raw = b""
    if size == expected:  # a file that is no shard may be larger than the memory
        with reading_shard(path):
            raw = read_file(path, limit=-1)
    if len(raw) != expected or header[2] < 0:
        raise InputError(
            f"{path}: {size} bytes but its header says {expected}; download it or prepare it again"
        )

    tokens = np.frombuffer(raw, "<u2", offset=SHARD_HEADER_BYTES)
    check_tokens(path, tokens, vocab_size)
    return tokens


def check_tokens(path: str, tokens: np.ndarray, vocab_size: int) -> None:
    """Check tokens read from a shard. Raises InputError when one is not below vocab_size."""
    if len(tokens) and (top := int(tokens.max())) >= vocab_size:
        raise InputError(f"{path}: token {top} >= vocab_size {vocab_size}; change vocab_size or data_path")


def shard_tokens(path: str) -> int:
    """Return the number of tokens in a shard, from the size of its file."""
    with reading_shard(path):
        return (os.path.getsize(path) - SHARD_HEADER_BYTES) // 2


def begins_inside(path: str, bos_id: int) -> bool:
    """Return whether a shard's first token is not the start of a document."""
    with reading_shard(path):
        first = np.fromfile(path, "<u2", 1, offset=SHARD_HEADER_BYTES)
    return len(first) > 0 and int(first[0]) != bos_id


def find_shards(data_path: str, split: str) -> list[str]:
    """Return the sorted paths of a split's shards, `*_SPLIT_<digits>.bin`. The list may be empty."""
    pattern = f"*_{glob.escape(split)}_[0-9]*.bin"
    return sorted(glob.glob(os.path.join(glob.escape(data_path), pattern)))


def split_files(data_path: str, split: str) -> list[str]:
    """Return the shards of a split. Raises InputError when there are none."""
    if not os.path.isdir(data_path):
        raise InputError(
            f"data_path={data_path}: no such data folder; `./run.sh data download --variant NAME` makes "
            "data/datasets/fineweb10B_NAME, data_path=DIR names another"
        )
    with explained(f"{data_path}: cannot list its files", "check its permissions"):
        os.scandir(data_path).close()  # glob would hide the error and find nothing
    files = find_shards(data_path, split)
    if not files:
        raise InputError(f"{data_path}: no *_{split}_*.bin shards; prepare that split or change data_path")
    for f in files:
        if not os.path.isfile(f):  # reading a pipe would never end
            raise InputError(f"{f}: not a file, or a link to a missing one; download it or prepare it again")
    return files


def load_split(h: Config, split: str) -> np.ndarray:
    """Read a whole evaluation split, (N,) uint16, cut to `val_tokens` targets where that is set."""
    tokens = np.concatenate([load_shard(f, h.vocab_size) for f in split_files(h.data_path, split)])
    return tokens[: h.val_tokens + 1] if h.val_tokens else tokens


@dataclass(frozen=True)
class Dataset:
    """The tokenizer and the manifest of a data folder, checked against each other."""

    counts: ByteCounts
    manifest: dict  # {} if there is none
    manifest_sha256: str  # "none" if there is none
    tokenizer_sha256: str


class TokenizerEntry(NamedTuple):
    """The tokenizer that a manifest names."""

    bos_id: int = 0
    sha256: str = ""
    encoding: str = ""  # name of a tiktoken encoding
    file: str = ""  # SentencePiece model, beside the manifest


def read_manifest(path: Path) -> tuple[dict, TokenizerEntry]:
    """Read manifest.json and its tokenizer entry. Raises InputError when it is not a manifest."""
    with explained(f"{path}: not a manifest", "make it again", ValueError, KeyError, TypeError):
        manifest = json.loads(read_file(str(path)).decode())
        entry = manifest["tokenizer"]
        texts = (entry["sha256"], entry.get("encoding") or "", entry.get("file") or "")
        named = TokenizerEntry(manifest["bos_id"], *texts)
        types = [type(value) for value in named]
        if types != [int, str, str, str]:
            raise TypeError("bos_id must be a whole number, the tokenizer's sha256, encoding and file text")
    return manifest, named


class ShardEntry(NamedTuple):
    """A shard according to the manifest."""

    tokens: int
    sha256: str = ""  # "": not known


def listed_shards(path: Path, manifest: dict, split: str) -> dict[str, ShardEntry]:
    """Return the shards of a split that a manifest lists, by file; {} if it lists none.

    Raises InputError when the entry is malformed or its total is not the sum of its shards.
    """
    with explained(
        f"{path}: bad entry of split {split}", "make it again", LookupError, TypeError, AttributeError
    ):
        about = manifest.get("splits", {}).get(split, {})
        shards = about.get("shards", [])
        listed = {shard["file"]: ShardEntry(shard["tokens"], shard.get("sha256", "")) for shard in shards}
        total = sum(entry.tokens for entry in listed.values())
    if listed and about.get("tokens", total) != total:
        raise InputError(f"{path}: {split} has {about['tokens']} tokens, its shards {total}; make it again")
    return listed


def check_files(h: Config, manifest: dict, split: str, by_content: bool) -> None:
    """Check names and sizes of a split's files, if the manifest lists any; by_content: hashes, too.

    Raises InputError naming the first file that is missing, not listed, or different from its entry.
    """
    path = Path(h.data_path, "manifest.json")
    files = {os.path.basename(f): f for f in split_files(h.data_path, split)}
    listed = listed_shards(path, manifest, split)
    if not listed:
        return
    if missing := sorted(listed.keys() - files.keys()):
        raise InputError(
            f"{h.data_path}: {missing[0]} is missing ({len(missing)} of {len(listed)} {split} shards that "
            "manifest.json lists); download it or prepare it again"
        )
    if extra := sorted(files.keys() - listed.keys()):
        raise InputError(
            f"{files[extra[0]]}: manifest.json does not list it; remove it or make the manifest again"
        )

    for name, entry in listed.items():
        fault = None
        if os.path.getsize(files[name]) != SHARD_HEADER_BYTES + 2 * entry.tokens:
            fault = "length"
        elif by_content and entry.sha256:
            with explained(f"{files[name]}: cannot read the shard", "check its permissions"):
                if sha256(read_file(files[name], limit=-1)) != entry.sha256:
                    fault = "sha256"
        if fault is not None:
            raise InputError(
                f"{files[name]}: its {fault} disagrees with manifest.json; download it or prepare it again"
            )


def check_split(h: Config, counts: ByteCounts, manifest: dict, split: str) -> None:
    """Check a split to score.

    Raises InputError when it is damaged, the manifest disagrees, the text is too short, or some of its bytes
    are not known.
    """
    check_files(h, manifest, split, by_content=True)
    tokens = load_split(h, split)
    check_tokens(f"{h.data_path}: {split}", tokens, len(counts.base))
    if len(tokens) <= h.eval_seq_len:
        raise InputError(
            f"{h.data_path}: {len(tokens)} tokens of {split} to score, less than a sequence "
            f"of eval_seq_len={h.eval_seq_len}; use more text or a shorter eval_seq_len"
        )
    if unknown := np.count_nonzero(tokens == counts.unknown):
        raise InputError(
            f"{h.data_path}: {unknown} tokens of {split} are the unknown piece, so the bytes of the text are "
            "not known; make the shards again with a tokenizer that has byte_fallback"
        )


def load_dataset(h: Config, trains: bool = False) -> Dataset:
    """Read the tokenizer and manifest of data_path; check them and the shards. Raises InputError if bad.

    Held-out shards are compared with the manifest by name, size and listed hash. Training shards are compared
    by name and size only, and only if this run trains: `check_train_split` reads them. After these checks, a
    run opens no held-out file while its clock runs, unless val_loss_every is set.
    """
    split_files(h.data_path, "val")
    path = Path(h.data_path, "manifest.json")
    manifest = {}
    named = TokenizerEntry()
    if path.exists():
        manifest, named = read_manifest(path)
        if named.bos_id != h.bos_id:
            raise InputError(
                f"{path}: documents begin with {named.bos_id}, not bos_id={h.bos_id}; "
                f"set bos_id={named.bos_id}"
            )

    file = h.tokenizer_path
    if not file and named.file and not named.encoding:
        file = os.path.join(h.data_path, named.file)
    if file:
        counts = sentencepiece_counts(file)
        tokenizer_sha256 = sha256(read_file(file))
        if manifest and tokenizer_sha256 != named.sha256:
            raise InputError(
                f"{file}: not the tokenizer of {path} (sha256 {tokenizer_sha256[:12]}, "
                f"manifest says {named.sha256[:12]}); use that one or make the shards again"
            )
    elif named.encoding:
        counts = tiktoken_counts(named.encoding)
        tokenizer_sha256 = named.sha256
    else:
        raise InputError(f"{h.data_path}: no manifest.json; name the tokenizer with tokenizer_path=FILE")

    size = len(counts.base)
    padded = -(-size // 128) * 128
    if h.vocab_size not in (size, padded):
        raise InputError(
            f"config key vocab_size: {h.vocab_size}, the tokenizer has {size}; set vocab_size={size}, or "
            f"{padded}, a multiple of 128, whose last rows no token uses"
        )
    check_split(h, counts, manifest, "val")
    if trains:
        check_files(h, manifest, "train", by_content=False)
    if h.report_split:
        check_split(h, counts, manifest, h.report_split)
    manifest_sha256 = sha256(path.read_bytes()) if manifest else "none"
    return Dataset(counts, manifest, manifest_sha256, tokenizer_sha256)


def check_train_length(h: Config, tokens: int) -> None:
    """Check that the train split makes a sequence. Raises InputError when it is too short."""
    if tokens <= h.train_seq_len:
        raise InputError(
            f"{h.data_path}: the train split has {tokens} tokens, not one sequence; use more text"
        )


def check_train_split(h: Config, m: Machine) -> None:
    """Read the whole train split, each rank its part of the shards, to find faults before the run begins.

    Raises InputError on every rank when a shard is damaged, the split is too short or has no document start.
    """
    has_start = False
    with m.raising_together():
        files = split_files(h.data_path, "train")
        check_train_length(h, sum(map(shard_tokens, files)))
        for f in files[m.rank :: m.world_size]:
            tokens = load_shard(f, h.vocab_size)
            has_start = has_start or bool((tokens == h.bos_id).any())
    some_start = m.largest(has_start)
    if not some_start:
        raise InputError(
            f"{h.data_path}: no shard of the train split has a document start (bos_id={h.bos_id}); "
            "set bos_id or prepare the data again"
        )


class RandomUse(IntEnum):
    """A use of random numbers in the loader. Each has its own streams."""

    SHARDS = 0  # the order of the shards; a stream per epoch
    DOCUMENTS = 1  # the order of a shard's documents; a stream per epoch and shard
    SEQUENCES = 2  # the order of the sequences; a stream per deal


def random_stream(seed: int, use: RandomUse, *numbers: int) -> np.random.Generator:
    """Return the random stream for a use. Streams for different uses or numbers are independent.

    The spawn key makes the streams independent. A list as seed would be padded with zeros, so [seed, 3] would
    equal [seed, 3, 0].
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(use, *numbers)))


class ShardOrder(NamedTuple):
    """One epoch's order of the shards."""

    shards: np.ndarray  # indices into TokenLoader.files
    ends: np.ndarray  # the position in the epoch at which each shard ends


class ShuffledShard(NamedTuple):
    """One epoch's order of a shard's documents."""

    starts: np.ndarray  # where each document begins in the file, in this epoch's order; -1: the fragment
    bounds: np.ndarray  # document i occupies [bounds[i], bounds[i + 1]) of the shuffled shard


class ShardFile(io.FileIO):
    """An unbuffered file that is closed when nobody holds it any longer: a cache and threads share it."""

    def __del__(self) -> None:
        self.close()


class BatchShape(NamedTuple):
    """The shape of a rank's part of a global batch."""

    accum: int  # micro-batches per step once the batch has grown
    sequences: int  # sequences per micro-batch
    first: int  # micro-batches per step at the start of the run

    def count(self, growth: float) -> int:
        """Return how many micro-batches a step has. The number grows by one, in equal stages of growth."""
        return self.first + int(growth * (self.accum - self.first))

    def split(self, parts: int) -> BatchShape:
        """Return the shape of the same global batch with every micro-batch cut into equal parts."""
        return BatchShape(self.accum * parts, self.sequences // parts, self.first * parts)


def cut_batch(h: Config, world_size: int) -> BatchShape:
    """Cut global batches into equal micro-batches, the same number per rank; InputError if impossible."""
    sequences, left = divmod(h.train_batch_tokens, world_size * h.train_seq_len)
    accum = -(-sequences * h.train_seq_len // h.micro_batch_tokens)
    if left or sequences == 0 or sequences % accum:
        raise InputError(
            f"WORLD_SIZE={world_size} ranks cannot split train_batch_tokens={h.train_batch_tokens} evenly "
            f"(micro_batch_tokens={h.micro_batch_tokens}, train_seq_len={h.train_seq_len}); "
            "change one of them or the number of processes"
        )
    micro_batch = h.train_batch_tokens // accum  # over all ranks
    first, left = divmod(h.start_batch_tokens or h.train_batch_tokens, micro_batch)
    if left or first == 0:
        raise InputError(
            f"config key start_batch_tokens: {h.start_batch_tokens} must be a multiple of {micro_batch}, the "
            f"tokens of a micro-batch on {world_size} ranks; lower micro_batch_tokens for smaller steps"
        )
    return BatchShape(accum, sequences // accum, first)


def relations_of_batches(h: Config) -> Iterator[Relation]:
    """Yield the relations of a batch: micro-batches, sequences and tokens."""
    yield divides("micro_batch_tokens", "train_batch_tokens", h)
    yield divides("train_seq_len", "micro_batch_tokens", h)
    yield fits_memory("train_batch_tokens", h)
    yield at_most("start_batch_tokens", "train_batch_tokens", h)
    yield Relation(
        h.batch_growth_frac > 0, "batch_growth_frac=0 must be above 0; start_batch_tokens=0 has no growth"
    )
    yield Relation(
        h.vocab_size <= 65_536, f"vocab_size={h.vocab_size} must be at most 65536: shards hold uint16"
    )
    yield Relation(h.bos_id < h.vocab_size, f"bos_id={h.bos_id} must be below vocab_size={h.vocab_size}")


class TokenLoader:
    """An endless stream of shuffled documents, cut into micro-batches.

    The only state is the index of the next micro-batch. Epoch e visits the shards, and the documents of each
    shard, in an order drawn from (seed, e). The stream is cut into sequences of T + 1 tokens; neighbours
    share one token. A deal is deal_batches consecutive global batches (mix_tokens of text). The sequences of
    a deal are shuffled, or one long document would fill a batch; with one batch to a deal they stay in order.

    Within the shuffled sequences, micro-batch n of rank r holds [(n * world + r) * B, (n * world + r + 1) *
    B), so a global batch is the same for every world size. A thread builds the next batch while the device
    works on the current batch.

    The fragment of a shard is the text before its first BOS, or the whole shard if there is no BOS: the end
    of a document that began in another shard. A fragment counts as a document of its own. The stream puts a
    BOS in front, which the file lacks, to separate the fragment from the random document before it.
    """

    def __init__(self, h: Config, m: Machine, shape: BatchShape | None = None) -> None:
        """Start at the beginning. shape: the shape of the batches; None: the configured one.

        Raises InputError when the train split is missing or too short.
        """
        self.h = h
        self.m = m
        self.shape = shape or cut_batch(h, m.world_size)

        self.files = split_files(h.data_path, "train")
        # Tokens in the stream, where a shard that begins inside a document gets a BOS.
        self.sizes = np.array([shard_tokens(f) + begins_inside(f, h.bos_id) for f in self.files])
        self.total = int(self.sizes.sum())
        check_train_length(h, self.total)

        self.deal_batches = max(1, min(h.mix_tokens, self.total) // h.train_batch_tokens)
        self.open_file = lru_cache(maxsize=OPEN_SHARDS)(self.open_shard)
        self.shard_order = lru_cache(maxsize=2)(self.shuffle_shards)
        self.document_order = lru_cache(maxsize=len(self.files) + 1)(self.shuffle_documents)
        self.sequence_order = lru_cache(maxsize=2)(self.shuffle_sequences)

        self.lock = Lock()  # guards the files' positions, as `seek` may leave an older thread reading
        self.reading = ""  # the file being read, for messages
        self.seek(0)

    def open_shard(self, shard: int) -> ShardFile:
        """Open a shard's file. An open file stays the same even if another one takes its name."""
        return ShardFile(self.files[shard])

    def shuffle_shards(self, epoch: int) -> ShardOrder:
        """Draw an epoch's order of the shards."""
        order = random_stream(self.h.seed, RandomUse.SHARDS, epoch).permutation(len(self.files))
        return ShardOrder(order, np.cumsum(self.sizes[order]))

    def shuffle_documents(self, epoch: int, shard: int) -> ShuffledShard:
        """Draw an epoch's order of a shard's documents and of the shard's fragment."""
        tokens = load_shard(self.files[shard], self.h.vocab_size)
        starts = np.flatnonzero(tokens == self.h.bos_id)
        if len(tokens) < self.sizes[shard]:
            starts = np.append(-1, starts)  # the fragment, with the BOS that the file lacks
        lengths = np.diff(starts, append=len(tokens))
        if lengths.sum() != self.sizes[shard]:
            raise InputError(f"{self.files[shard]}: changed during the run; begin again with another run_id")
        order = random_stream(self.h.seed, RandomUse.DOCUMENTS, epoch, shard).permutation(len(starts))
        bounds = np.concatenate([[0], np.cumsum(lengths[order])])
        return ShuffledShard(starts[order], bounds)

    def read(self, position: int, count: int) -> np.ndarray:
        """Return tokens [position, position + count) of the endless stream, (count,) int64."""
        out = np.empty(count, "<u2")
        filled = 0
        while filled < count:
            epoch, offset = divmod(position + filled, self.total)
            order = self.shard_order(epoch)
            place = int(np.searchsorted(order.ends, offset, side="right"))
            shard = int(order.shards[place])
            self.reading = self.files[shard]
            begin = int(order.ends[place] - self.sizes[shard])
            filled += self.read_shard(epoch, shard, offset - begin, out[filled:])
        return out.astype(np.int64)

    def read_shard(self, epoch: int, shard: int, offset: int, out: np.ndarray) -> int:
        """Fill `out`, uint16, with a shuffled shard's tokens from `offset` to at most the shard's end.

        Returns how many there were. Raises InputError when the file is damaged.
        """
        path = self.files[shard]
        text = self.document_order(epoch, shard)
        document = int(np.searchsorted(text.bounds, offset, side="right")) - 1
        filled = 0
        with reading_shard(path), self.lock:
            file = self.open_file(shard)
            while filled < len(out) and document < len(text.starts):
                begin = int(text.starts[document] + offset - text.bounds[document])
                end = filled + int(min(text.bounds[document + 1] - offset, len(out) - filled))
                part = out[filled:end]
                if begin < 0:  # a fragment starts at -1, with the BOS that the file lacks
                    part[0] = self.h.bos_id
                    part = part[1:]
                    begin = 0
                file.seek(SHARD_HEADER_BYTES + 2 * begin)
                if file.readinto(part) < part.nbytes:
                    raise InputError(f"{path}: cut during the run; download it or prepare it again")
                offset += end - filled
                filled = end
                document += 1
        check_tokens(path, out[:filled], self.h.vocab_size)
        return filled

    def shuffle_sequences(self, deal: int) -> np.ndarray:
        """Return the shuffled order of a deal's sequences, as their indices within the deal."""
        order = np.arange(self.deal_batches * self.h.train_batch_tokens // self.h.train_seq_len)
        if self.deal_batches > 1:  # otherwise the order changes no batch
            random_stream(self.h.seed, RandomUse.SEQUENCES, deal).shuffle(order)
        return order

    def build(self, index: int) -> Tensor:
        """Build this rank's micro-batch `index`: a host tensor (B, T + 1), int64.

        A deal is cut into deal_batches global batches of `accum` micro-batches. Each rank in turn gets B of
        the shuffled sequences for micro-batch 0 of the deal, then each rank gets B for micro-batch 1, and so
        on.
        """
        B = self.shape.sequences
        T = self.h.train_seq_len
        per_deal = self.deal_batches * self.shape.accum
        deal, micro_batch = divmod(index, per_deal)  # micro_batch: within the deal
        order = self.sequence_order(deal)
        first = (micro_batch * self.m.world_size + self.m.rank) * B
        deal_start = deal * len(order)  # sequences before this deal
        sequences = torch.empty(B, T + 1, dtype=torch.long, pin_memory=self.m.is_gpu)
        for row, sequence in zip(sequences.numpy(), order[first : first + B].tolist()):
            row[:] = self.read((deal_start + sequence) * T, T + 1)
        return sequences

    def seek(self, index: int, count: int | None = None) -> None:
        """Go to micro-batch `index`, and start a thread that builds `count` micro-batches from there on.

        count: None for as many as a fully grown batch has.
        """
        self.index = index
        self.count = count or self.shape.accum
        self.pending = Future()
        Thread(target=self.fill, args=(self.pending, index, self.count), daemon=True).start()

    def fill(self, pending: Future, index: int, count: int) -> None:
        """Run in the thread: build a batch and hand over the batch or the error."""
        try:
            pending.set_result([self.build(index + i) for i in range(count)])
        except Exception as e:
            pending.set_exception(e)

    def next(self, count: int | None = None) -> list[Tensor]:
        """Return this rank's next `count` micro-batches, on the device, and start building as many again.

        count: None for as many as a fully grown batch has. Raises Fault when the batch takes longer than
        PATIENCE_S, or the error that building the batch raised.
        """
        count = count or self.shape.accum
        if count != self.count:
            self.seek(self.index, count)
        if wait([self.pending], PATIENCE_S).not_done:
            raise Fault(f"{self.reading}: not read within {PATIENCE_S} s; is the disk still mounted?")
        batch = [t.to(self.m.device, non_blocking=True) for t in self.pending.result()]
        self.seek(self.index + count, count)  # only now: the thread and the copies compete for the GIL
        return batch

    @property
    def position(self) -> int:
        """The number of sequences that all ranks together have taken."""
        return self.index * self.m.world_size * self.shape.sequences

    def seek_sequence(self, taken: int) -> None:
        """Go on after `taken` sequences of all ranks together, rounded down to whole micro-batches."""
        self.seek(taken // (self.m.world_size * self.shape.sequences))


# -----------------------------------------------------------------------------
# 7. Blocks: a layer as functions of its weights.

RMS_EPS = 1e-6  # explicit, because PyTorch's default depends on the dtype
GATE_SCALE = 0.5  # a larger scale lets the gates, which start at 0.5, learn faster
MAX_DOCUMENTS = 16  # how many documents of a sequence are told apart; the 16th and later ones count as one


@dataclass(frozen=True)
class LayerSpec:
    """The topology of one visit to a layer, as data."""

    layer: int  # the layer whose weights it uses
    push: bool  # whether its output is kept for a skip connection
    skip: int  # row of skip_weights for the kept output that it takes back in; -1: none
    xsa: bool  # whether it uses exclusive self-attention
    ve: int  # row of ve_layer_scale for the value embedding that it adds; -1: none
    window: int  # keys a token sees, itself included; 0: all
    doc_mask: bool  # whether a token sees only its own document
    form: str  # row of FORMS: how attention and MLP are joined to the residual stream


def visit_order(h: Config) -> list[int]:
    """Return the layers in the order of their visits; loop_layers come 1 + loop_times times in a row.

    Depth recurrence: parameter-golf #1204, #1394. With 11 layers, loop_layers "4 5" and loop_times 2, the
    order is 0 1 2 3 4 5 4 5 4 5 6 7 8 9 10.
    """
    layers = [*range(h.num_layers)]
    loop = [int(layer) for layer in h.loop_layers.split()]
    end = loop[-1] + 1 if loop else 0
    return layers[:end] + loop * h.loop_times + layers[end:]


def layer_table(h: Config) -> tuple[LayerSpec, ...]:
    """Lay out a U-Net: visits of the first half keep their outputs; visits of the second half add them.

    The output that was kept last is added first.
    """
    visits = visit_order(h)
    half = len(visits) // 2
    takes_skip = range(half, 2 * half)  # an odd last visit has no skip
    first_ve = h.num_layers - h.ve_last_n
    windows = h.attn_windows.split() or ["0"]
    return tuple(
        LayerSpec(
            layer=i,
            push=visit < half,
            skip=visit - half if visit in takes_skip else -1,
            xsa=i >= h.num_layers - h.xsa_last_n,
            ve=i - first_ve if i >= first_ve else -1,
            window=int(windows[i % len(windows)]),
            doc_mask=h.doc_mask,
            form=h.parallel_form if i >= h.num_layers - h.parallel_last_n else "serial",
        )
        for visit, i in enumerate(visits)
    )


class Factors(NamedTuple):
    """A change of rank r to one matrix (M, D) for each sequence of a batch. Hu et al., arXiv:2106.09685."""

    down: Tensor  # (B, r, D)
    up: Tensor  # (B, M, r)

    def change(self, x: Tensor) -> Tensor:
        """Return the change of the matrix's product with x. (B, T, D) -> (B, T, M)."""
        return x @ self.down.mT.to(x.dtype) @ self.up.mT.to(x.dtype)


def changed_outputs(h: Config) -> list[int]:
    """Return M of each matrix (M, D) that test-time training changes: every visit's qkv, the output layer."""
    return [h.model_dim + 2 * h.kv_dim] * h.num_visits + [h.vocab_size]


def cut_factors(rows: Tensor, h: Config) -> list[Factors]:
    """Cut rows (B, n) into the factors of every visit's qkv, in order, and of the output layer."""
    r = h.ttt_rank
    D = h.model_dim
    outputs = changed_outputs(h)
    sizes = []
    for M in outputs:
        sizes += [r * D, M * r]
    parts = rows.split(sizes, 1)
    downs = [down.unflatten(1, (r, D)) for down in parts[::2]]
    ups = [up.unflatten(1, (M, r)) for M, up in zip(outputs, parts[1::2])]
    return [Factors(down, up) for down, up in zip(downs, ups)]


def fresh_factors(h: Config) -> Tensor:
    """Return factors (1, n) that change nothing: `up` is zero, `down` is random but always the same."""
    D = h.model_dim
    rows = torch.zeros(1, sum(h.ttt_rank * (D + M) for M in changed_outputs(h)))
    generator = torch.Generator().manual_seed(0)
    for factors in cut_factors(rows, h):
        factors.down.uniform_(-(D**-0.5), D**-0.5, generator=generator)
    return rows


PRODUCTS = ("qkv", "o", "up", "down")  # the matrices of LayerWeights


class LayerWeights(NamedTuple):
    """One layer's matrices in the compute dtype, with scales and gains folded in, and its control tensors."""

    qkv: Tensor  # (D + 2 Hkv*Dh, D)
    o: Tensor  # (D, D)
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)
    q_gain: Tensor  # (H,)
    resid_mix: Tensor  # (2, D)
    attn_gate: Tensor | None = None  # (H, GD), GD = attn_gate_dims
    stream_keep: Tensor | None = None  # (2,)
    stream_add: Tensor | None = None  # (2, 2)
    factors: Factors | None = None  # a change to qkv


class Positions(NamedTuple):
    """The positions and documents of the tokens that attention works on."""

    cos: Tensor  # (T, 1, rope_dims / 2) float32
    sin: Tensor  # like cos
    documents: Tensor | None  # (B, T) int; None: attention runs across documents


def document_starts(tokens: Tensor, bos_id: int) -> Tensor:
    """Mark the tokens that begin a document, (B, T) bool. The first token of a sequence always does."""
    return torch.cat([torch.ones_like(tokens[:, :1], dtype=torch.bool), tokens[:, 1:] == bos_id], dim=1)


def number_documents(tokens: Tensor, bos_id: int) -> Tensor:
    """Number each token's document from 0 to MAX_DOCUMENTS - 1, (B, T) int. No later token changes it."""
    return (document_starts(tokens, bos_id).cumsum(1) - 1).clamp_max(MAX_DOCUMENTS - 1)


def rms_norm(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + RMS_EPS) over the last dimension; there is no weight."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rope_tables(seq_len: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each (T, 1, dims / 2) float32. Su et al., arXiv:2104.09864."""
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequency)
    return angle.cos()[:, None], angle.sin()[:, None]


def qk_norm_rope(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalize x (B, T, H, Dh), rotate pairs (j, j + half) by cos, sin (T, 1, half), scale by gain (H,)."""
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    half = cos.size(-1)
    a, b, rest = rms_norm(x).split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1) * gain.to(x.dtype)[:, None]


def qk_heads(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, normed: Callable = qk_norm_rope
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv (B, T, H + 2 Hkv, Dh) into q, k, v; apply `normed` to q with gain (H,) and to k with ones."""
    H = gain.size(0)
    kv = (qkv.size(2) - H) // 2
    q, k, v = qkv.split([H, kv, kv], dim=2)
    ones = torch.ones(kv, device=gain.device)
    return normed(q, gain, cos, sin), normed(k, ones, cos, sin), v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int = 0, documents: Tensor | None = None) -> Tensor:
    """Compute causal attention with grouped heads by PyTorch's kernels.

    q (B, T, H, Dh), k and v (B, T, Hkv, Dh) -> (B, T, H, Dh).
    window: keys a token sees, itself included; 0: all. documents (B, T): a token sees its own.
    """
    T = q.size(1)
    if documents is None and 0 < 2 * window < T and T % window == 0:
        return attend_in_blocks(q, k, v, window)
    if documents is None and not 0 < window < T:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)
    return attend_masked(q, k, v, window, documents)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
    """Attend under an explicit mask. The T queries stand at the last T of the keys' K positions."""
    T = q.size(1)
    K = k.size(1)
    query_at = torch.arange(K - T, K, device=q.device)
    distance = query_at[:, None] - torch.arange(K, device=q.device)
    seen = (distance >= 0) & (distance < (window or K))
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None])

    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    groups = q.size(1) // k.size(1)
    # Masks need the memory-efficient kernel, which does not support grouped heads.
    k = k.repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend within a window that divides T, in blocks, which computes about twice the needed scores.

    A full mask computes T / window times the needed scores. Queries of block i see only keys of blocks i - 1
    and i. With T = 5 windows:

        keys        0 1 2 3 4
        queries 0   x .          blocks 0 and 1 are one call of 2 x 2 blocks;
                1   x x
                2     x x        blocks 2, 3, 4 are a batch of calls of 1 x 2 blocks.
                3       x x
                4         x x
    """

    def blocks(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, window)).flatten(0, 1)

    def pairs(x: Tensor) -> Tensor:
        return torch.cat([blocks(x[:, window:-window]), blocks(x[:, two:])], 1)

    two = 2 * window
    first_two = attend_masked(q[:, :two], k[:, :two], v[:, :two], window, None)
    others = attend_masked(blocks(q[:, two:]), pairs(k), pairs(v), window, None)
    return torch.cat([first_two, others.unflatten(0, (len(q), -1)).flatten(1, 2)], 1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """Remove from y (B, T, H, Dh) its component along v (B, T, Hkv, Dh). XSA, parameter-golf #265."""
    y = y.unflatten(2, (v.size(2), -1))
    v = F.normalize(v, dim=-1).unsqueeze(3)
    return (y - (y * v).sum(-1, keepdim=True) * v).flatten(2, 3)


def gate_heads(y: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Scale the heads of y (B, T, H, Dh) by sigmoid(GATE_SCALE Wz), where z is the first part of x (B, T, D).

    W (H, size of z). The sparse attention gate of parameter-golf #1787, as used in #1855.
    """
    gate = torch.sigmoid(GATE_SCALE * F.linear(x[..., : W.size(1)], W.to(x.dtype)))
    return y * gate[..., None]


def mlp(x: Tensor, up: Tensor, down: Tensor, linear: Callable = F.linear) -> Tensor:
    """Apply up (F, D), LeakyReLU(0.5)^2, then down (D, F) to x (B, T, D). parameter-golf #549."""
    return linear(F.leaky_relu(linear(x, up), 0.5).square(), down)


class Ops(NamedTuple):
    """The model's functions for which a machine may bind faster ones with the same signature."""

    attend: Callable = attend_sdpa
    qk: Callable = qk_heads
    mlp: Callable = mlp
    linear: Callable = F.linear


def attention_block(
    x: Tensor, w: LayerWeights, spec: LayerSpec, values: Tensor | None, positions: Positions, ops: Ops
) -> Tensor:
    """Apply causal attention with QK norm, learned query gain and partial rope. x (B, T, D) -> (B, T, D).

    values (B, T, Hkv*Dh): the value embedding, added to the values where the layer has one.
    """
    head_dim = x.size(-1) // w.q_gain.size(0)
    qkv = ops.linear(x, w.qkv)  # one product for all three
    if w.factors is not None:
        qkv = qkv + w.factors.change(x)
    qkv = qkv.unflatten(-1, (-1, head_dim))
    q, k, v = ops.qk(qkv, w.q_gain, positions.cos, positions.sin)
    if values is not None:
        v = v + values.view(v.shape)
    y = ops.attend(q, k, v, spec.window, positions.documents if spec.doc_mask else None)
    if spec.xsa:
        y = exclude_self(y, v)
    if w.attn_gate is not None:
        y = gate_heads(y, x, w.attn_gate)
    return ops.linear(y.flatten(2), w.o)


def feed_forward(x: Tensor, w: LayerWeights, ops: Ops) -> Tensor:
    """Apply the layer's MLP. x (B, T, D) -> (B, T, D)."""
    return ops.mlp(x, w.up, w.down)


def residual_mix(x: Tensor, x0: Tensor, mix: Tensor) -> Tensor:
    """Mix the residual stream with the embedding stream x0, both (B, T, D), by mix (2, D)."""
    mix = mix.to(x.dtype)
    return mix[0] * x + mix[1] * x0


def join(streams: tuple[Tensor, ...]) -> Tensor:
    """Return the mean of one or two residual streams."""
    if len(streams) == 1:
        return streams[0]
    return (streams[0] + streams[1]) / 2


Branch = Callable[[Tensor], Tensor]  # a normalized input -> the term to add, both (B, T, D)


def serial(
    streams: tuple[Tensor, ...], x0: Tensor, w: LayerWeights, attention_of: Branch, mlp_of: Branch
) -> tuple[Tensor, ...]:
    """Add attention to the residual stream, then the MLP of the sum. streams, x0, the results: (B, T, D)."""
    x = residual_mix(join(streams), x0, w.resid_mix)
    x = x + attention_of(rms_norm(x))
    return (x + mlp_of(rms_norm(x)),)


def one_stream(
    streams: tuple[Tensor, ...], x0: Tensor, w: LayerWeights, attention_of: Branch, mlp_of: Branch
) -> tuple[Tensor, ...]:
    """Add attention and MLP of the same input; arguments as in `serial`. From GPT-J; parameter-golf #1412."""
    x = residual_mix(join(streams), x0, w.resid_mix)
    z = rms_norm(x)
    return (x + attention_of(z) + mlp_of(z),)


def two_streams(
    streams: tuple[Tensor, ...], x0: Tensor, w: LayerWeights, attention_of: Branch, mlp_of: Branch
) -> tuple[Tensor, ...]:
    """Let attention read one stream and the MLP the other; each writes to both streams with learned weights.

    Stream i becomes keep_i stream_i + add_i0 attention + add_i1 MLP. If there is a single stream before, both
    start as copies of it. Arguments as in `serial`. parameter-golf #1204, #1855.
    """
    first = streams[0]
    second = streams[-1]
    attended = attention_of(rms_norm(residual_mix(first, x0, w.resid_mix)))
    fed = mlp_of(rms_norm(second))
    return mix_streams(
        first=first,
        second=second,
        attended=attended,
        fed=fed,
        keep=w.stream_keep,
        add=w.stream_add,
    )


def mix_streams(
    first: Tensor, second: Tensor, attended: Tensor, fed: Tensor, keep: Tensor, add: Tensor
) -> tuple[Tensor, Tensor]:
    """Add attention and MLP to both streams. keep (2,), add (2, 2), the others and the results (B, T, D)."""
    keep = keep.to(first.dtype)
    add = add.to(first.dtype)
    return (
        keep[0] * first + add[0, 0] * attended + add[0, 1] * fed,
        keep[1] * second + add[1, 0] * attended + add[1, 1] * fed,
    )


FORMS: dict[str, Callable] = {"serial": serial, "one_stream": one_stream, "two_streams": two_streams}


def take_skip(x: Tensor, kept: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """Return x + weight * kept or, with a gate, sigmoid(gate) x + (1 - sigmoid(gate)) weight * kept.

    x, kept (B, T, D); weight, gate (D,). The gate comes from parameter-golf #1218.
    """
    skipped = weight.to(x.dtype) * kept
    if gate is None:
        return x + skipped
    return torch.lerp(skipped, x, torch.sigmoid(gate).to(x.dtype))


# -----------------------------------------------------------------------------
# 8. GPT: one table of all parameters, and one forward pass for loss, logits and scoring.


class Init(NamedTuple):
    """How init_tensor fills a parameter."""

    kind: str  # a row of INITS
    value: float = 0.0  # for the row
    knob: str = ""  # whose number is the value; residual_std reads proj_init_std


class ParamSpec(NamedTuple):
    """A parameter. Initialization and reduction follow the order of the table, biggest bank first."""

    name: str
    shape: str  # in the letters of sizes_of; the first of three is the number of matrices
    init: Init
    buffer: str  # a bank, split over ranks, for ORTHO and STEP_RULES | flat, on every rank, for AdamW
    lr: str  # the knob with its rate
    stored_as: str  # how the artifact holds it: a row of ENCODINGS, or embed, for int{embed_bits}
    needs: str = ""  # a field of Config; where the field is 0, the model lacks the parameter
    multiplies: bool = False  # whether its weights multiply each token; others are looked up, or scale


Product = partial(ParamSpec, multiplies=True)

# name, shape, init, buffer, lr, stored_as, needs
PARAM_TABLE = (
    Product("mlp_up_bank", "L F D", Init("orthogonal"), "mlp", "matrix_lr", "int6"),
    Product("mlp_down_bank", "L D F", Init("normal", knob="proj_init_std"), "mlp", "matrix_lr", "int6"),
    # Q of layer i is at i, O at L + i.
    Product("qo_bank", "2L D D", Init("half_orthogonal", knob="proj_init_std"), "qo", "matrix_lr", "int6"),
    # K is at i, V at L + i.
    Product("kv_bank", "2L KV D", Init("orthogonal"), "kv", "matrix_lr", "int6"),
    # Also the output layer.
    Product("tok_emb", "V D", Init("normal", knob="tied_embed_init_std"), "flat", "embed_lr", "embed"),
    ParamSpec("bigram_emb", "BV BD", Init("constant", 0), "flat", "embed_lr", "embed", "bigram_vocab_size"),
    # Not zeros like bigram_emb: if both were zero, neither would ever move.
    Product("bigram_proj", "D BD", Init("orthogonal"), "flat", "scalar_lr", "int8", "bigram_vocab_size"),
    ParamSpec("bigram_scale", "1", Init("constant", 0.05), "flat", "scalar_lr", "f32", "bigram_vocab_size"),
    ParamSpec("ve_emb", "V VD", Init("normal", 0.01), "flat", "embed_lr", "embed", "ve_last_n"),
    Product("ve_proj", "KV VD", Init("orthogonal"), "flat", "scalar_lr", "int8", "ve_last_n"),
    ParamSpec("ve_scale", "1", Init("constant", 0.1), "flat", "scalar_lr", "f32", "ve_last_n"),
    ParamSpec("ve_layer_scale", "VL", Init("constant", 1), "flat", "scalar_lr", "f32", "ve_last_n"),
    ParamSpec("smear_gate", "D", Init("constant", 0), "flat", "scalar_lr", "f16"),
    ParamSpec("skip_weights", "S D", Init("constant", 1), "flat", "scalar_lr", "f16"),
    ParamSpec("skip_gate", "S D", Init("constant", 0), "flat", "scalar_lr", "f16", "skip_gates"),
    ParamSpec("attn_gate", "L H GD", Init("constant", 0), "flat", "scalar_lr", "f16", "attn_gate_dims"),
    ParamSpec("resid_mix", "L 2 D", Init("first_of_two"), "flat", "scalar_lr", "f16"),
    ParamSpec("attn_scale", "L D", Init("constant", knob="out_scale_init"), "flat", "scalar_lr", "f16"),
    ParamSpec("mlp_scale", "L D", Init("constant", knob="out_scale_init"), "flat", "scalar_lr", "f16"),
    # Not zeros like the scales may be: the MLP squares what mlp_gain scales, so its gradient would stay zero.
    ParamSpec("attn_gain", "L D", Init("constant", 1), "flat", "norm_gain_lr", "f16", "norm_gains"),
    ParamSpec("mlp_gain", "L D", Init("constant", 1), "flat", "norm_gain_lr", "f16", "norm_gains"),
    ParamSpec("stream_keep", "TL 2", Init("constant", 1.1), "flat", "scalar_lr", "f32", "two_stream_layers"),
    ParamSpec("stream_add", "TL 2 2", Init("constant", 1), "flat", "scalar_lr", "f32", "two_stream_layers"),
    ParamSpec("q_gain", "L H", Init("constant", knob="qk_gain_init"), "flat", "scalar_lr", "f32"),
)
MATRICES = tuple(spec for spec in PARAM_TABLE if spec.buffer != "flat")
SMALL = tuple(spec for spec in PARAM_TABLE if spec.buffer == "flat")


class Parameter(NamedTuple):
    """A row of PARAM_TABLE in numbers."""

    shape: tuple[int, ...]
    init: Init


def sizes_of(h: Config) -> dict[str, int]:
    """Return the sizes for which the letters and numbers in the shapes of PARAM_TABLE stand."""
    return {
        "1": 1,
        "2": 2,
        "L": h.num_layers,
        "2L": 2 * h.num_layers,
        "TL": h.two_stream_layers,
        "VL": h.ve_last_n,  # layers with a value embedding
        "S": max(1, h.num_visits // 2),  # skips
        "D": h.model_dim,
        "F": h.mlp_dim,
        "H": h.num_heads,
        "KV": h.kv_dim,  # Hkv * Dh
        "V": h.vocab_size,
        "VD": h.ve_dim,
        "BV": h.bigram_vocab_size,
        "BD": h.bigram_dim,
        "GD": h.attn_gate_dims,
    }


def residual_std(h: Config) -> float:
    """Return the standard deviation at which matrices start that write into the residual stream.

    It is proj_init_std. If that knob is 0, step rules that keep norms take 0.8 / sqrt(D) instead, the mean of
    modded-nanogpt's values (O .026, MLP-down .031 at 768).
    """
    if h.proj_init_std == 0 and STEP_RULES[h.step_rule].keeps_norms:
        return 0.8 * h.model_dim**-0.5
    return h.proj_init_std


def init_value(init: Init, h: Config) -> float:
    """Return the value of an initialization, from its knob if it has one."""
    if init.knob == "proj_init_std":
        return residual_std(h)
    return getattr(h, init.knob) if init.knob else init.value


def parameter_table(h: Config) -> dict[str, Parameter]:
    """Return the shape and the initialization of every parameter of a Config's model, by name."""
    sizes = sizes_of(h)
    table = {}
    for spec in PARAM_TABLE:
        if spec.needs and not getattr(h, spec.needs):
            continue
        shape = tuple(sizes[letter] for letter in spec.shape.split())
        table[spec.name] = Parameter(shape, Init(spec.init.kind, init_value(spec.init, h)))
    return table


def relations_of_the_model(h: Config) -> Iterator[Relation]:
    """Yield the relations of the model's sizes and layers."""
    yield divides("num_heads", "model_dim", h)
    yield divides("num_kv_heads", "num_heads", h)
    yield Relation(h.bigram_vocab_size != 1, "bigram_vocab_size=1 must be 0 or at least 2")
    yield Relation(
        h.mlp_dim >= 1,
        f"mlp_mult={h.mlp_mult:g} * model_dim={h.model_dim} must be at least 1",
    )
    yield Relation(
        h.out_scale_init > 0 or residual_std(h) > 0,
        "out_scale_init=0 needs proj_init_std above 0: if scales and matrices are zero, neither ever moves",
    )
    yield Relation(
        h.rope_dims % 2 == 0 and h.rope_dims <= h.head_dim,
        f"rope_dims={h.rope_dims} must be even and at most {h.head_dim}, model_dim / num_heads",
    )
    yield Relation(h.rope_base >= 1, f"rope_base={h.rope_base:g} must be at least 1")
    yield above_zero("logit_softcap", h)
    yield at_most("attn_gate_dims", "model_dim", h)
    for key in ("xsa_last_n", "ve_last_n", "parallel_last_n"):
        yield at_most(key, "num_layers", h)
    yield Relation(
        all(w.isdecimal() and len(w) < 10 for w in h.attn_windows.split()),
        f"attn_windows={h.attn_windows[:40]!r} must be whole numbers from 0 to 999999999, as in '512 512 0'",
    )

    loop = h.loop_layers.split()
    first = int(loop[0]) if loop and loop[0].isdecimal() and len(loop[0]) < 10 else 0
    neighbours = [str(first + i) for i in range(len(loop))]
    yield Relation(
        loop == neighbours and first + len(loop) <= h.num_layers,
        f"loop_layers={h.loop_layers[:40]!r} must be neighbours of the {h.num_layers} layers, as in '4 5'",
    )
    yield Relation(
        h.loop_times == 0 or len(loop) > 0, f"loop_times={h.loop_times} needs loop_layers, as in '4 5'"
    )


def product_weights(h: Config, visits: int) -> int:
    """Return how many weights multiply a token, in a model with this many visits of layers.

    Counted are the layers' matrices, the projections and the output layer. Embeddings are looked up, and
    gates and scales are too small to count.
    """
    shapes = parameter_table(h)
    total = 0
    for spec in PARAM_TABLE:
        if spec.multiplies and spec.name in shapes:
            count = math.prod(shapes[spec.name].shape)
            total += count if spec.buffer == "flat" else count // h.num_layers * visits
    return total


def scaling_params(h: Config) -> int:
    """Return the parameters that tokens_per_param counts: all weights in products, each once.

    nanochat, too, counts the layers' matrices and the output layer: this gave the cleanest scaling laws.
    """
    return product_weights(h, h.num_layers)


def flops_per_token(h: Config, loops: bool = True) -> int:
    """Return the FLOPs of the model, forwards and backwards, for a token of training.

    A weight in a product takes 6, and a key that a token attends to takes 12 D: PaLM's formula
    (arXiv:2204.02311, appendix B), with windows as in nanochat. A causal mask does not halve the keys. loops:
    whether the layers of a loop are visited again.
    """
    visits = layer_table(h if loops else replace(h, loop_times=0))
    keys = sum(min(spec.window or h.train_seq_len, h.train_seq_len) for spec in visits)
    return 6 * product_weights(h, len(visits)) + 12 * h.model_dim * keys


def init_constant(out: Tensor, value: float, generator: torch.Generator) -> None:
    """Fill with the value."""
    out.fill_(value)


def init_first_of_two(out: Tensor, value: float, generator: torch.Generator) -> None:
    """Set the first of two, along dimension 1, to 1 and leave the second one at 0."""
    out[:, 0] = 1


def init_matrices(out: Tensor, value: float, generator: torch.Generator, orthogonal: float) -> None:
    """Make a fraction of the matrices orthogonal, the others normal with standard deviation `value`."""
    matrices = out.view(-1, *out.shape[-2:])
    count = int(orthogonal * len(matrices))
    for matrix in matrices[:count]:
        nn.init.orthogonal_(matrix, generator=generator)
    if value:
        matrices[count:].normal_(0, value, generator=generator)


# Each fills a tensor of zeros in place: (out, Init.value, generator).
INITS: dict[str, Callable[[Tensor, float, torch.Generator], None]] = {
    "constant": init_constant,
    "first_of_two": init_first_of_two,
    "normal": partial(init_matrices, orthogonal=0.0),
    "half_orthogonal": partial(init_matrices, orthogonal=0.5),
    "orthogonal": partial(init_matrices, orthogonal=1.0),
}


def init_tensor(shape: tuple[int, ...], init: Init, generator: torch.Generator) -> Tensor:
    """Make a float32 tensor by a row of parameter_table. Raises ValueError for an unknown kind."""
    if init.kind not in INITS:
        raise ValueError(f"unknown initialization {init.kind!r}")
    out = torch.zeros(shape)
    INITS[init.kind](out, init.value, generator)
    return out


class GPT(nn.Module):
    """The model. Parameters are float32, with the matrices of all layers stacked; products run in `dtype`."""

    def __init__(self, h: Config, ops: Ops | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.h = h
        self.ops = ops or Ops()
        self.dtype = dtype
        self.layers = layer_table(h)
        generator = torch.Generator().manual_seed(h.seed)
        for name, parameter in parameter_table(h).items():
            tensor = init_tensor(parameter.shape, parameter.init, generator)
            self.register_parameter(name, nn.Parameter(tensor))

    def without_loop(self) -> GPT:
        """Return a model with the same parameters that visits every layer once."""
        model = copy(self)
        model.layers = layer_table(replace(self.h, loop_times=0))
        return model

    def row_scales(self) -> dict[str, Tensor]:
        """Return the factors on the rows of each of PRODUCTS, (L, 1 or M, 1) float32.

        Matrices that read the residual stream are scaled by 1/sqrt(number of the layer, from 1); those that
        write to it, by learned scales.
        """
        number = torch.arange(1, self.h.num_layers + 1, device=self.q_gain.device)[:, None, None]
        input_scale = number**-0.5
        output_scales = dict(o=self.attn_scale[..., None], down=self.mlp_scale[..., None])
        return dict(qkv=input_scale, up=input_scale, **output_scales)

    def column_gains(self) -> dict[str, Tensor]:
        """Return the learned gains on the columns of those PRODUCTS that read a norm, (L, 1, D) float32.

        Without norm_gains there are none.
        """
        if not self.h.norm_gains:
            return {}
        return dict(qkv=self.attn_gain[:, None], up=self.mlp_gain[:, None])

    def layer_weights(self) -> list[LayerWeights]:
        """Cut the stacked matrices into one LayerWeights per layer.

        The factors of row_scales and column_gains are folded into the matrices, in float32 before the cast.
        Without that, a pass over the activations would apply them: 0.19 ms more per layer at 48 x 2048
        (H100).
        """
        h = self.h
        L = h.num_layers
        q, o = self.qo_bank.unflatten(0, (2, L))
        k, v = self.kv_bank.unflatten(0, (2, L))
        scales = self.row_scales()
        for product, gains in self.column_gains().items():
            scales[product] = scales[product] * gains

        def by_layer(stacked: Tensor | None) -> list[Tensor | None]:
            """Return an entry for every layer; None for the first layers if only the last ones have one."""
            present = () if stacked is None else stacked.unbind(0)
            return [None] * (L - len(present)) + list(present)

        qkv = by_layer((torch.cat([q, k, v], dim=1) * scales["qkv"]).to(self.dtype))
        o = by_layer((scales["o"] * o).to(self.dtype))
        up = by_layer((self.mlp_up_bank * scales["up"]).to(self.dtype))
        down = by_layer((scales["down"] * self.mlp_down_bank).to(self.dtype))
        q_gain = by_layer(self.q_gain)
        resid_mix = by_layer(self.resid_mix)
        attn_gate = by_layer(self.attn_gate if h.attn_gate_dims else None)
        stream_keep = by_layer(self.stream_keep if h.two_stream_layers else None)
        stream_add = by_layer(self.stream_add if h.two_stream_layers else None)
        return [
            LayerWeights(
                qkv=qkv[i],
                o=o[i],
                up=up[i],
                down=down[i],
                q_gain=q_gain[i],
                resid_mix=resid_mix[i],
                attn_gate=attn_gate[i],
                stream_keep=stream_keep[i],
                stream_add=stream_add[i],
            )
            for i in range(L)
        ]

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens and hashed bigrams, normalize, blend in the previous token. (B, T) -> (B, T, D).

        Nothing crosses a document start. The blend is the smear gate of parameter-golf #1851.
        """
        starts = document_starts(tokens, self.h.bos_id)
        x = F.embedding(tokens, self.tok_emb).to(self.dtype)
        if self.h.bigram_vocab_size:
            x = x + self.embed_bigrams(tokens, starts)
        x = rms_norm(x)

        gate = torch.sigmoid(self.smear_gate).to(self.dtype) * ~starts[..., None]
        return torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), gate)

    def embed_bigrams(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Embed each token together with the one before it, by the hash of the pair. Two (B, T) -> (B, T, D).

        All document starts share the last row. parameter-golf #399.
        """
        previous = F.pad(tokens[:, :-1], (1, 0))
        buckets = self.h.bigram_vocab_size - 1
        bucket = torch.bitwise_xor(36313 * tokens, 27191 * previous) % buckets
        bigram = F.embedding(torch.where(starts, buckets, bucket), self.bigram_emb).to(self.dtype)
        return F.linear(bigram, (self.bigram_scale * self.bigram_proj).to(self.dtype))

    def embed_values(self, tokens: Tensor) -> Tensor:
        """Embed tokens as values for attention. (B, T) -> (B, T, Hkv*Dh)."""
        ve = F.embedding(tokens, self.ve_emb).to(self.dtype)  # cast last, so gradients are summed in float32
        return F.linear(ve, (self.ve_scale * self.ve_proj).to(self.dtype))

    def trunk(
        self,
        tokens: Tensor,
        weights: list[LayerWeights] | None = None,
        changes: list[Factors] | None = None,
    ) -> Tensor:
        """Embed the tokens and run all layers, for every caller. (B, T) -> (B, T, D), normalized.

        weights: what layer_weights returned, if the caller must know the matrices; None: make them here.
        changes: the factors for the qkv of every visit, in order; None: no change.
        """
        h = self.h
        cos, sin = rope_tables(tokens.size(1), h.rope_dims, h.rope_base, tokens.device)
        positions = Positions(cos, sin, number_documents(tokens, h.bos_id) if h.doc_mask else None)
        ve = self.embed_values(tokens) if h.ve_last_n else None

        x0 = self.embed(tokens)
        streams = (x0,)
        kept = []
        if weights is None:
            weights = self.layer_weights()
        if changes is None:
            changes = [None] * len(self.layers)
        for spec, change in zip(self.layers, changes):
            w = weights[spec.layer]._replace(factors=change)
            if spec.skip >= 0:
                gate = self.skip_gate[spec.skip] if h.skip_gates else None
                taken = take_skip(streams[0], kept.pop(), self.skip_weights[spec.skip], gate)
                streams = (taken, *streams[1:])
            values = ve * self.ve_layer_scale[spec.ve].to(self.dtype) if spec.ve >= 0 else None
            attention_of = partial(
                attention_block, w=w, spec=spec, values=values, positions=positions, ops=self.ops
            )
            mlp_of = partial(feed_forward, w=w, ops=self.ops)
            streams = FORMS[spec.form](streams, x0, w, attention_of, mlp_of)
            if spec.push:
                kept.append(join(streams))
        return rms_norm(join(streams))

    def unembed(self, x: Tensor, change: Factors | None = None) -> Tensor:
        """Apply the tied output layer and the softcap. (..., D) -> logits (..., V) float32.

        change: the factors for the output layer; None: no change.
        """
        logits = F.linear(x, self.tok_emb.to(self.dtype))
        if change is not None:
            logits = logits + change.change(x)
        logits = logits.float()
        return self.h.logit_softcap * torch.tanh(logits / self.h.logit_softcap)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits of every next token: (B, T) -> (B, T, V) float32."""
        return self.unembed(self.trunk(tokens))

    def nats(
        self,
        tokens: Tensor,
        targets: Tensor,
        last: int,
        weights: list[LayerWeights] | None = None,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Return the nats of the last `last` targets of each sequence. Two (B, T) -> (B, last) float32.

        weights: as in trunk. factors: the factors of every sequence, (B, n), as cut_factors takes them; None:
        no change.
        """
        changes = None
        output_change = None
        if factors is not None:
            *changes, output_change = cut_factors(factors, self.h)
        x = self.trunk(tokens, weights, changes)
        logits = self.unembed(x[:, -last:], output_change)
        nats = F.cross_entropy(logits.flatten(0, 1), targets[:, -last:].flatten(), reduction="none")
        return nats.view(-1, last)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean nats per target. Two (B, T) -> ()."""
        return self.nats(tokens, targets, tokens.size(1)).mean()


# -----------------------------------------------------------------------------
# 9. Model kernels: fused kernels, each beside a torch reference with the same signature.

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # without Triton the kernels are still defined, but never launched
    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=int)


def operator(name: str, schema: str) -> Callable:
    """Register an operator that changes none of its inputs. Each copy of this file registers its own name."""
    return torch.library.custom_op(f"bankshot_{__name__.strip('_')}::{name}", mutates_args=(), schema=schema)


@triton.jit
def load_head(ptr, n, T, stride_b, stride_t, d, inside):
    """Load rows n = b * T + t of one head at dimensions d as float32. ptr is already at the head."""
    address = (n // T).to(tl.int64) * stride_b + (n % T).to(tl.int64) * stride_t
    return tl.load(ptr + address[:, None] + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_angles(cos_ptr, sin_ptr, n, T, d, inside, HALF: tl.constexpr):
    """Load cos, signed sin and partner p for dimensions d: the rotation is y_d = x_d cos_d + x_p sin_d."""
    rotated = (d < 2 * HALF)[None, :] & inside[:, None]
    index = (n % T)[:, None] * HALF + (d % HALF)[None, :]
    cos = tl.load(cos_ptr + index, mask=rotated, other=1.0)
    sin = tl.load(sin_ptr + index, mask=rotated, other=0.0)
    sin = tl.where((d < HALF)[None, :], sin, -sin)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    return cos, sin, partner


QK_BLOCK = 32  # tokens per program of qk_kernel


@triton.jit
def qk_kernel(
    x_ptr, dy_ptr, out_ptr, dgain_ptr, gain_ptr, cos_ptr, sin_ptr, N, T,
    x_b, x_t, x_h, dy_b, dy_t, dy_h, out_t,
    H: tl.constexpr, DH: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize, rotate and scale BLOCK tokens of one head, or compute the gradient.

    Forward (no dy): out = g R z with z = rstd x. Backward: out = g rstd (R'dy - z mean(z R'dy)), and dgain
    gets one partial sum per program and head. Without gain: out = x. Tokens of `out` are out_t apart.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    d = tl.arange(0, DH)
    inside = n < N

    x = load_head(x_ptr + head * x_h, n, T, x_b, x_t, d, inside)

    if gain_ptr is not None:
        cos, sin, partner = load_angles(cos_ptr, sin_ptr, n, T, d, inside, HALF)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / DH + EPS)[:, None]
        if dy_ptr is None:
            # The partners lie in the cache lines that x was just read from.
            xp = load_head(x_ptr + head * x_h, n, T, x_b, x_t, partner, inside)
            x = (x * cos + xp * sin) * rstd
        else:
            dy = load_head(dy_ptr + head * dy_h, n, T, dy_b, dy_t, d, inside)
            dyp = load_head(dy_ptr + head * dy_h, n, T, dy_b, dy_t, partner, inside)
            z = x * rstd
            back = dy * cos - dyp * sin  # the transpose of a rotation is its inverse
            dot = tl.sum(z * back, 1)  # = sum(dy * R z)
            x = rstd * (back - z * (dot / DH)[:, None])
            tl.store(dgain_ptr + tl.program_id(0) * H + head, tl.sum(dot, 0))
        x *= tl.load(gain_ptr + head)

    out = out_ptr + n.to(tl.int64)[:, None] * out_t + (head * DH + d)[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@operator("qk", "(Tensor x, Tensor gain, Tensor cos, Tensor sin) -> Tensor")
def qk_op(x, gain, cos, sin):
    """Compute qk_norm_rope with one read and one write. x: contiguous heads of 2^n dimensions."""
    B, T, H, Dh = x.shape
    y = x.new_empty(x.shape)
    x_b, x_t, x_h, _ = x.stride()
    qk_kernel[(-(-B * T // QK_BLOCK), H)](
        x_ptr=x, dy_ptr=None, out_ptr=y, dgain_ptr=None,
        gain_ptr=gain, cos_ptr=cos, sin_ptr=sin, N=B * T, T=T,
        x_b=x_b, x_t=x_t, x_h=x_h, dy_b=0, dy_t=0, dy_h=0, out_t=H * Dh,
        H=H, DH=Dh, HALF=cos.size(-1), EPS=RMS_EPS, BLOCK=QK_BLOCK,
    )  # fmt: skip
    return y


@qk_op.register_fake
def _(x, gain, cos, sin):
    return x.new_empty(x.shape)


@operator(
    "qk_backward",
    "(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, Tensor dq, Tensor dk, Tensor dv) -> (Tensor, Tensor)",
)
def qk_backward_op(qkv, gain, cos, sin, *dys):
    """Return the gradients of qkv and of gain, given the gradients of q, k and v."""
    dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
    B, T, _, Dh = dys[0].shape
    parts = [dy.size(2) for dy in dys]
    programs = -(-B * T // QK_BLOCK)

    dqkv = qkv.new_empty(qkv.shape)
    q, k, _ = qkv.split(parts, 2)
    inputs = (q, k, dys[2])  # v passes through, so its gradient is only copied
    gains = (gain, gain.new_ones(parts[1]), None)
    gain_sums = [gain.new_empty(programs, heads) for heads in parts]

    for x, dy, dx, g, dgain in zip(inputs, dys, dqkv.split(parts, 2), gains, gain_sums):
        x_b, x_t, x_h, _ = x.stride()
        dy_b, dy_t, dy_h, _ = dy.stride()
        qk_kernel[tuple(dgain.shape)](
            x_ptr=x, dy_ptr=dy, out_ptr=dx, dgain_ptr=dgain,
            gain_ptr=g, cos_ptr=cos, sin_ptr=sin, N=B * T, T=T,
            x_b=x_b, x_t=x_t, x_h=x_h, dy_b=dy_b, dy_t=dy_t, dy_h=dy_h, out_t=dx.stride(1),
            H=dgain.size(1), DH=Dh, HALF=cos.size(-1), EPS=RMS_EPS, BLOCK=QK_BLOCK,
        )  # fmt: skip
    return dqkv, gain_sums[0].sum(0)


@qk_backward_op.register_fake
def _(qkv, gain, *_):
    return qkv.new_empty(qkv.shape), torch.empty_like(gain)


class FusedHeads(torch.autograd.Function):
    """qk_heads with a backward pass that writes the gradient of qkv once.

    Inductor's backward pass reads through the slices of the rotation and concatenates the gradients of q, k
    and v: 1.2 ms per layer at 48 x 2048 (H100), where the floor is 0.15.
    """

    @staticmethod
    def forward(ctx, qkv, gain, cos, sin):
        ctx.save_for_backward(qkv, gain, cos, sin)
        return qk_heads(qkv, gain, cos, sin, qk_op)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        dqkv, dgain = qk_backward_op(*ctx.saved_tensors, dq, dk, dv)
        return dqkv, dgain, None, None


@triton.jit
def mlp_kernel(
    a_desc, w_desc, hidden_desc, out_desc, K,
    BACKWARD: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    hidden8_desc=None, u_ptr=None, step_ptr=None,
):  # fmt: skip
    """Compute a product u and hidden = LeakyReLU(u)^2, or the gradient of u.

    Forward: out = hidden with u = a w', w (N, K). Backward: out = (a w) times the derivative of hidden by u,
    w (K, N). u is not stored. The last bit of hidden is set where u < 0, which is enough for the derivative:
    -sqrt(hidden) there, 2 sqrt(hidden) elsewhere. SHIFT: how many bits hidden is shorter than float32.

    With hidden8_desc, a and w are e4m3. u is their product times the factor at u_ptr, and hidden divided by
    the step at step_ptr is also stored, in e4m3.
    """
    m = tl.program_id(1) * BM
    n = tl.program_id(0) * BN

    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if BACKWARD:
            acc = tl.dot(a_desc.load([m, k]), w_desc.load([k, n]), acc)
        else:
            acc = tl.dot(a_desc.load([m, k]), w_desc.load([n, k]).T, acc)

    if BACKWARD:
        hidden = hidden_desc.load([m, n]).to(tl.float32)
        root = tl.sqrt(hidden)
        acc *= tl.where((hidden.to(tl.int32, bitcast=True) >> SHIFT) & 1 == 1, -root, 2 * root)
    else:
        if hidden8_desc is not None:
            acc *= tl.load(u_ptr)
        leaky = tl.where(acc > 0, acc, 0.5 * acc)
        negative = (acc < 0).to(tl.int32) << SHIFT
        bits = (leaky * leaky).to(tl.int32, bitcast=True) - negative + (1 << SHIFT)  # rounds to nearest
        acc = ((bits & -(2 << SHIFT)) + negative).to(tl.float32, bitcast=True)
        if hidden8_desc is not None:
            hidden8_desc.store(
                [m, n], tl.minimum(acc * (1.0 / tl.load(step_ptr)), 448.0).to(hidden8_desc.dtype)
            )

    out_desc.store([m, n], acc.to(out_desc.dtype))


def launch_mlp(a: Tensor, w: Tensor, hidden: Tensor, out: Tensor, backward: bool) -> None:
    """Launch mlp_kernel for out (M, N) = a (M, K) times w (N, K)', or backward times w (K, N)."""
    bm = bn = 128
    bk = 64
    block = TensorDescriptor.from_tensor

    mlp_kernel[(-(-out.size(1) // bn), -(-out.size(0) // bm))](
        a_desc=block(a, [bm, bk]),
        w_desc=block(w, [bk, bn] if backward else [bn, bk]),
        hidden_desc=block(hidden, [bm, bn]),
        out_desc=block(out, [bm, bn]),
        K=a.size(1),
        BACKWARD=backward, SHIFT=32 - 8 * a.element_size(), BM=bm, BN=bn, BK=bk,
        num_warps=4, num_stages=3,
    )  # fmt: skip


@operator("mlp", "(Tensor x, Tensor up) -> Tensor")
def mlp_op(x, up):
    """Compute the hidden layer (M, F) of x (M, D) and up (F, D)."""
    hidden = x.new_empty(len(x), len(up))
    launch_mlp(x, up, hidden, hidden, backward=False)
    return hidden


@mlp_op.register_fake
def _(x, up):
    return x.new_empty(len(x), len(up))


@operator("mlp_backward", "(Tensor dy, Tensor down, Tensor hidden) -> Tensor")
def mlp_backward_op(dy, down, hidden):
    """Return the gradient of u (M, F), given that of the output (M, D), down (D, F) and hidden (M, F)."""
    du = dy.new_empty(hidden.shape)
    launch_mlp(dy, down, hidden, du, backward=True)
    return du


@mlp_backward_op.register_fake
def _(dy, down, hidden):
    return dy.new_empty(hidden.shape)


class FusedMLP(torch.autograd.Function):
    """mlp without a separate pass over the hidden layer (M, F) for the activation or its gradient."""

    @staticmethod
    def forward(ctx, x, up, down):
        hidden = mlp_op(x.flatten(0, -2), up)
        ctx.save_for_backward(x, up, down, hidden)
        return F.linear(hidden, down).view_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, up, down, hidden = ctx.saved_tensors
        dy = dy.flatten(0, -2).contiguous()
        du = mlp_backward_op(dy, down, hidden)
        return (du @ up).view_as(x), du.T @ x.flatten(0, -2), dy.T @ hidden


E4M3_MAX = 448


def to_fp8(x: Tensor, step: float | None = None) -> tuple[Tensor, Tensor | float]:
    """Return x / step in e4m3, saturated, and the step. By default the largest |x| becomes E4M3_MAX."""
    if step is None:
        step = x.abs().amax().float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() * (1 / step)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), step


@operator("mlp8", "(Tensor x, Tensor up, Tensor down, Tensor[] steps, ScalarType dtype) -> (Tensor, Tensor)")
def mlp8_op(x, up, down, steps, dtype):
    """Compute mlp of e4m3 x (M, D), up (F, D) and down (D, F) -> hidden (M, F) like mlp_op's, output (M, D).

    steps: [x's step * up's, hidden's, down's], three separate tensors: cuBLASLt needs aligned addresses.
    """
    bm = bn = bk = 128
    block = TensorDescriptor.from_tensor
    u_step, hidden_step, down_step = steps

    hidden = x.new_empty(len(x), len(up), dtype=dtype)
    hidden8 = x.new_empty(len(x), len(up), dtype=x.dtype)
    mlp_kernel[(-(-len(up) // bn), -(-len(x) // bm))](
        a_desc=block(x, [bm, bk]),
        w_desc=block(up, [bn, bk]),
        hidden_desc=block(hidden, [bm, bn]),
        out_desc=block(hidden, [bm, bn]),
        K=x.size(1),
        BACKWARD=False, SHIFT=32 - 8 * hidden.element_size(), BM=bm, BN=bn, BK=bk,
        hidden8_desc=block(hidden8, [bm, bn]), u_ptr=u_step, step_ptr=hidden_step,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return hidden, torch._scaled_mm(
        hidden8, down.t(), hidden_step, down_step, out_dtype=dtype, use_fast_accum=True
    )


@mlp8_op.register_fake
def _(x, up, down, steps, dtype):
    return x.new_empty(len(x), len(up), dtype=dtype), x.new_empty(len(x), len(down), dtype=dtype)


class FusedMLP8(FusedMLP):
    """FusedMLP whose forward products take e4m3 copies, with one quantization step per tensor.

    x is normalized, so |x| <= sqrt(D): a step of 1/8 suffices up to D = 3136. The step of hidden is 4 times
    the mean of u^2 for an isotropic x, ||up||^2 / F, so hidden saturates only where u exceeds 42 times its
    RMS.
    """

    @staticmethod
    def forward(ctx, x, up, down):
        up8, up_step = to_fp8(up)
        down8, down_step = to_fp8(down)
        x8, x_step = to_fp8(x.flatten(0, -2), 1 / 8)
        hidden_step = 4 / len(up) * up.float().square().sum().clamp(min=1e-12)
        hidden, y = mlp8_op(x8, up8, down8, [x_step * up_step, hidden_step, down_step], x.dtype)
        ctx.save_for_backward(x, up, down, hidden)
        return y.view_as(x)


def flash4_options(bounds: Tensor | None, T: int, window: int) -> dict:
    """Return what both passes of FlashAttention-4 (package flash-attn-4, flash_attn/cute) are told."""
    options = dict(causal=True, window_size_left=window - 1 if window else None)
    if bounds is not None:
        options |= dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=T, max_seqlen_k=T)
    return options


@operator("flash4", "(Tensor[] qkv, Tensor? bounds, int T, int window) -> (Tensor, Tensor)")
def flash4_op(qkv, bounds, T, window):
    """Return the output and the log-sum-exps of FlashAttention-4.

    qkv: (B, T, H, Dh) each, or (B * T, H, Dh) with the bounds of documents.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(*qkv, return_lse=True, **flash4_options(bounds, T, window))
    return out, lse


@flash4_op.register_fake
def _(qkv, bounds, T, window):
    q = qkv[0]
    return q.new_empty(q.shape), q[..., 0].mT.contiguous().float()


@operator("flash4_backward", "(Tensor[] qkv, Tensor? bounds, int T, int window, Tensor[] back) -> Tensor[]")
def flash4_backward_op(qkv, bounds, T, window, back):
    """Return the gradients of q, k and v. back: the output, its gradient and the log-sum-exps."""
    from flash_attn.cute.interface import _flash_attn_bwd

    deterministic = torch.are_deterministic_algorithms_enabled()
    options = flash4_options(bounds, T, window)
    return [*_flash_attn_bwd(*qkv, *back, deterministic=deterministic, **options)]


@flash4_backward_op.register_fake
def _(qkv, bounds, T, window, back):
    return [x.new_empty(x.shape) for x in qkv]


class Flash4(torch.autograd.Function):
    """The differentiable form of flash4_op. form: (T, window)."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, form):
        out, lse = flash4_op([q, k, v], bounds, *form)
        ctx.save_for_backward(q, k, v, bounds, out, lse)
        ctx.form = form
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, bounds, out, lse = ctx.saved_tensors
        grads = flash4_backward_op([q, k, v], bounds, *ctx.form, [out, dout.contiguous(), lse])
        return *grads, None, None


def attend_flash4(
    q: Tensor, k: Tensor, v: Tensor, window: int = 0, documents: Tensor | None = None
) -> Tensor:
    """Compute attend_sdpa with FlashAttention-4, which skips the keys that no query sees.

    With `documents`, every batch counts as B * MAX_DOCUMENTS of them, so shapes never change. A sequence with
    fewer documents has empty ones at its end.
    """
    B, T = q.shape[:2]
    bounds = None
    flat = (q, k, v)
    if documents is not None:
        numbers = torch.arange(MAX_DOCUMENTS, device=q.device)
        first = (documents[..., None] < numbers).sum(1)  # (B, MAX_DOCUMENTS)
        first = first + T * torch.arange(B, device=q.device)[:, None]
        bounds = F.pad(first.flatten(), (0, 1), value=B * T).int()
        flat = [x.flatten(0, 1) for x in flat]
    return Flash4.apply(*flat, bounds, (T, window if window < T else 0)).view(q.shape)


# -----------------------------------------------------------------------------
# 10. Binding: a fast function runs where it is right and, with bind_by_time, fast; else its reference does.


class Rejection(NamedTuple):
    """Why a faster function was not bound."""

    name: str  # of the faster function
    reason: str  # without blanks: a log's values end there
    missing: str = ""  # the module that it failed to import, if any


class Bound(NamedTuple):
    """A function as bound on this machine, with its name for the log."""

    function: Callable
    name: str
    rejected: tuple[Rejection, ...] = ()  # the faster functions that were tried
    times: tuple[tuple[str, float], ...] = ()  # the name and the ms of each function that was timed

    @property
    def label(self) -> str:
        """The name to log and, in brackets, the faster functions that were rejected, with their reasons."""
        reasons = ",".join(f"{rejection.name}:{rejection.reason}" for rejection in self.rejected)
        return f"{self.name}({reasons})" if reasons else self.name


def results_of(fn: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Return fn's output and the gradients of the inputs that require one, in float32."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    y = fn(*leaves)
    if isinstance(y, tuple):
        y = torch.cat(y, 2)  # q, k and v along heads
    # Any gradient will do. A transposed gradient shows that the kernel needs no contiguous one.
    dy = torch.arange(y.numel(), device=y.device).sin().view(y.transpose(0, 1).shape).transpose(0, 1)
    y.backward(dy.to(y.dtype))
    gradients = [x.grad for x in leaves if x.requires_grad]
    return [t.detach().float() for t in (y, *gradients)]


def bind_unless(
    fault: Callable[[], str | None], fast: Callable, reference: Callable, name: str = "triton"
) -> Bound:
    """Bind `fast`, unless fault(), which tries it, raises or returns a reason; then bind the reference."""
    missing = ""
    try:
        reason = fault()
    except ModuleNotFoundError as e:
        missing = e.name or ""
        reason = f"missing_{missing}"
    except Exception as e:  # whatever it is, see Machine
        reason = type(e).__name__
    if reason is None:
        return Bound(fast, name)
    return Bound(reference, "torch", (Rejection(name, reason, missing),))


def bind(
    fast: Callable, reference: Callable, inputs: list[Tensor], name: str = "triton", limit: float = 0.01
) -> Bound:
    """Bind `fast` if it agrees with the reference, else the reference.

    `fast` runs on `inputs` as given (bf16 or float32); the reference runs on float32 copies. `fast` is
    accepted if the relative error |a - b| / |b| of its output and of every gradient is below `limit`.
    """

    def fault() -> str | None:
        found = results_of(fast, inputs)
        exact = results_of(reference, [x.detach().float().requires_grad_(x.requires_grad) for x in inputs])
        errors = [(a - b).norm() / b.norm() for a, b in zip(found, exact)]
        error = torch.stack(errors).max().item()  # may be nan
        return None if error < limit else f"error_{error:.3f}"

    return bind_unless(fault, fast, reference, name)


def call_of(function: Callable, inputs: list[Tensor]) -> Callable[[], None]:
    """Return a function of no arguments that runs forward and backward and drops the results."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def call() -> None:
        y = function(*leaves)
        outputs = y if isinstance(y, tuple) else (y,)
        torch.autograd.grad(outputs, wanted, [y.detach() for y in outputs])  # any gradient will do

    return call


def launch_of(m: Machine, call: Callable[[], None]) -> Callable[[], None] | None:
    """Return a function that launches `call` as training would: a CUDA graph, or `call` if capture fails.

    None: `call` itself fails.
    """
    try:
        for _ in range(3):
            with m.lanes() as lane, lane():
                call()
        m.sync()
    except Exception:  # whatever the compiler or driver raises, at a size that results were not compared at
        return None
    with suppress(Exception):
        return capture_graph(m.side_stream, torch.cuda.graph_pool_handle(), call)
    return call


TIMED_S = 0.2  # for the functions that are compared with each other
MIN_TURNS = 5  # timed calls of each


def device_times(m: Machine, calls: list[Callable[[], None]]) -> list[float]:
    """Return the median ms of each call by the device's clock; inf for one that fails.

    The calls take turns, so that a wandering clock rate slows down all of them.
    """
    launches = [launch_of(m, call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    turns = 0
    while turns < MIN_TURNS or time.perf_counter() < began + TIMED_S:
        turns += 1
        for launch, taken in zip(launches, times):
            if launch is None:
                taken.append(math.inf)
                continue
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            launch()
            end.record()
            m.sync()
            taken.append(start.elapsed_time(end))
    return [sorted(taken)[turns // 2] for taken in times]


# A function is preferred unless another one is faster by more than this. Medians of equal work differ by 1 %,
# and a choice that noise could flip would make two runs of a seed differ for nothing.
SLOWER = 1.05


def first_fast_enough(times: Mapping[str, float]) -> str:
    """Return the first name, in order of preference, whose time is at most SLOWER times the least."""
    limit = SLOWER * min(times.values())
    return next(name for name, ms in times.items() if ms <= limit)


def as_trained(m: Machine, function: Callable) -> Callable:
    """Compile a function alone, as it is compiled inside the model. The compiler needs a Python function."""
    return m.compile(lambda *inputs: function(*inputs))


@dataclass(frozen=True)
class Judge:
    """Judges which of several functions is bound, on all ranks of a machine alike.

    Without a machine, on this process alone. times_count: a function must not only be right but also fast.
    The choice then depends on the device's clock; a run that must repeat bit for bit leaves times_count off.
    """

    m: Machine | None = None
    times_count: bool = False

    def of_every_rank(self, value: Value) -> list[Value]:
        """Return every rank's value, in order. Collective."""
        return self.m.of_every_rank(value) if self.m else [value]

    def agree_on(self, bound: Bound, reference: Callable) -> Bound:
        """Return the function that this rank bound, or the reference if any rank rejected it. Collective."""
        if first := next(filter(None, self.of_every_rank(bound.rejected)), None):
            return Bound(reference, "torch", first)
        return bound

    def faster(
        self, bound: Bound, reference: Callable, draw: Callable[[], list[Tensor]], name: str = "torch"
    ) -> Bound:
        """Return `bound`, unless a rank rejected it or the reference is faster on the slowest rank.

        Then return the reference. name: the reference's name in the log. draw: returns inputs of the size
        that training has. Collective.
        """
        bound = self.agree_on(bound, reference)
        if bound.rejected or not self.times_count:
            return bound
        compiled = {bound.name: as_trained(self.m, bound.function), name: as_trained(self.m, reference)}
        times = self.measure(compiled, draw)
        if first_fast_enough(times) != bound.name:
            bound = Bound(reference, name, (Rejection(bound.name, "slower"),))
        return bound._replace(times=tuple(times.items()))

    def measure(
        self, functions: Mapping[str, Callable], draw: Callable[[], list[Tensor]]
    ) -> dict[str, float]:
        """Return the ms of each function, both ways, on the slowest rank; inf if it fails. Collective."""
        found = [math.inf] * len(functions)
        with suppress(Exception):  # no memory for the inputs: then results alone count
            inputs = draw()
            found = device_times(self.m, [call_of(function, inputs) for function in functions.values()])
        return dict(zip(functions, self.m.largest_of_each(*found)))


TIMED_TOKENS = 65_536  # at most, in a timed call: a card of 8 GB has room for them


def timed_shape(h: Config) -> tuple[int, int]:
    """Return (B, T) of a micro-batch of at most TIMED_TOKENS."""
    T = h.train_seq_len
    return max(min(h.micro_batch_tokens, TIMED_TOKENS) // T, 1), T


def draw_normal(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Draw seeded normal tensors in bf16, on the host: they are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(device).bfloat16().requires_grad_() for shape in shapes
    ]


def bind_qk(h: Config, device: torch.device, judge: Judge = Judge()) -> Bound:
    """Bind the fused QK norm, rope and gain if they are correct."""
    (wide,) = draw_normal(device, (2, 64, 4, 2 * h.head_dim))
    heads = wide[..., : h.head_dim]  # strided, as slices of a product are
    gain = torch.tensor([1.5, 0.5], device=device, requires_grad=True)
    rope = rope_tables(64, h.rope_dims, h.rope_base, device)

    def draw_large() -> list[Tensor]:
        B, T = timed_shape(h)
        qkv = draw_normal(device, (B, T, h.num_heads + 2 * h.num_kv_heads, h.head_dim))
        gain = torch.ones(h.num_heads, device=device, requires_grad=True)
        return [*qkv, gain, *rope_tables(T, h.rope_dims, h.rope_base, device)]

    return judge.faster(bind(FusedHeads.apply, qk_heads, [heads, gain, *rope]), qk_heads, draw_large)


def bind_mlp(h: Config, device: torch.device, judge: Judge = Judge()) -> Bound:
    """Bind the fused MLP if it is correct. With fp8, calls with gradients take the e4m3 form, if correct."""

    def draw(B: int, T: int) -> list[Tensor]:
        return draw_normal(device, (B, T, h.model_dim), (h.mlp_dim, h.model_dim), (h.model_dim, h.mlp_dim))

    inputs = draw(2, 64)
    draw_large = partial(draw, *timed_shape(h))
    fused = judge.faster(bind(FusedMLP.apply, mlp, inputs), mlp, draw_large)
    if not h.fp8:
        return fused
    fp8 = judge.faster(
        bind(FusedMLP8.apply, mlp, inputs, "fp8", limit=0.1), fused.function, draw_large, name=fused.name
    )
    times = fused.times + fp8.times
    if fp8.rejected:
        return fused._replace(rejected=fused.rejected + fp8.rejected, times=times)

    def fp8_with_gradients(*args: Tensor) -> Tensor:
        function = fp8.function if torch.is_grad_enabled() else fused.function
        return function(*args)

    return Bound(fp8_with_gradients, f"{fused.name}+fp8", fused.rejected, times)


SDPA_KERNELS = ("cudnn", "flash", "mem_efficient", "math")  # PyTorch's, fastest first


def enable_only(*kernels: str) -> None:
    """Switch PyTorch's attention kernels on or off for the whole process."""
    for name in SDPA_KERNELS:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in kernels)
    # The compiler's cache on disk does not see the switches.
    torch.compiler.config.cache_key_tag = "+".join(kernels)


def sdpa_kernels_that_run(qkv: list[Tensor], judge: Judge) -> list[str]:
    """Return PyTorch's attention kernels that run on every rank, fastest first. Collective.

    Raises InputError if there is none. `math` is among them only if it is the only one.
    """
    running = []
    for name in SDPA_KERNELS:
        enable_only(name)
        with suppress(Exception):  # whatever a compiler or driver raises: try the next kernel
            attend_sdpa(*qkv).sum().backward()
            running.append(name)
    everywhere = set.intersection(*map(set, judge.of_every_rank(running)))
    if not everywhere:
        raise InputError("no attention kernel of this PyTorch runs on this GPU; install one that supports it")
    return [name for name in running if name in everywhere and (name != "math" or len(everywhere) == 1)]


class Mask(NamedTuple):
    """What a layer's attention hides besides later tokens."""

    window: int  # keys that a token sees, as in LayerSpec; 0: all
    doc_mask: bool  # whether no token sees another document

    @property
    def hides(self) -> bool:
        """Whether any earlier token may be hidden."""
        return self.window > 0 or self.doc_mask


def masks_of(h: Config) -> list[Mask]:
    """Return the mask of every visit of a layer."""
    return [Mask(spec.window, spec.doc_mask) for spec in layer_table(h)]


def draw_heads(h: Config, device: torch.device, B: int, T: int) -> list[Tensor]:
    """Draw q, k and v for a layer's attention."""
    heads = (h.num_heads, h.num_kv_heads, h.num_kv_heads)
    return draw_normal(device, *((B, T, n, h.head_dim) for n in heads))


def flash4_trial(h: Config, qkv: list[Tensor], judge: Judge) -> tuple[Rejection, ...]:
    """Compare FlashAttention-4 with attend_sdpa under every kind of mask that a layer uses. Collective.

    qkv: q, k and v of 2 x 256 tokens. Returns why it is wrong; () if it is right.
    """
    enable_only(*SDPA_KERNELS)
    documents = number_documents(torch.arange(512, device=qkv[0].device).view(2, 256) % 90, 0)
    rejected = ()
    kinds = {mask._replace(window=50 if mask.window else 0) for mask in masks_of(h)}
    for mask in sorted(kinds):
        options = dict(window=mask.window, documents=documents if mask.doc_mask else None)
        reference = partial(attend_sdpa, **options)
        bound = bind(partial(attend_flash4, **options), reference, qkv, "flash4")
        rejected += judge.agree_on(bound, reference).rejected
    return rejected


class Attention(NamedTuple):
    """A function that computes attention, and the kernels of PyTorch that it needs switched on."""

    function: Callable
    kernels: tuple[str, ...]

    def attend(self, *qkv: Tensor, **options) -> Tensor:
        """Switch the kernels on and call the function."""
        enable_only(*self.kernels)
        return self.function(*qkv, **options)


def attention_times(
    h: Config, device: torch.device, judge: Judge, candidates: Mapping[str, Attention]
) -> dict[str, float]:
    """Return the mean ms of a layer's attention, both ways, by candidate. Collective.

    Attention is timed as it is, not compiled: it is an operator of its own in a compiled model, too.
    """
    B, T = timed_shape(h)
    documents = number_documents(torch.arange(B * T, device=device).view(B, T) % 1000, 0)
    masks = masks_of(h)
    means = dict.fromkeys(candidates, 0.0)
    for mask in sorted(set(masks)):
        options = dict(window=mask.window, documents=documents if mask.doc_mask else None)
        functions = {name: partial(one.attend, **options) for name, one in candidates.items()}
        for name, ms in judge.measure(functions, partial(draw_heads, h, device, B, T)).items():
            means[name] += ms * masks.count(mask) / len(masks)
    return means


def choose_attention(
    h: Config, device: torch.device, judge: Judge, candidates: Mapping[str, Attention]
) -> Bound:
    """Bind the first candidate, and leave only its kernels switched on. Collective.

    If times count, it is the first whose mean time over all layers is within SLOWER of the least.
    """
    times = attention_times(h, device, judge, candidates) if judge.times_count else {}
    name = first_fast_enough(times) if times else next(iter(candidates))
    enable_only(*candidates[name].kernels)
    return Bound(candidates[name].function, name, times=tuple(times.items()))


def bind_attention(h: Config, device: torch.device, judge: Judge = Judge()) -> Bound:
    """Bind FlashAttention-4 if it is right, else the first of PyTorch's kernels that runs.

    With the latter the memory-efficient kernel stays switched on if a layer needs a mask. If times count, all
    of these are candidates, in this order. The label says why FlashAttention-4 was rejected, unless it is not
    installed. Raises InputError if no kernel runs.
    """
    qkv = draw_heads(h, device, 2, 256)
    rejected = flash4_trial(h, qkv, judge)
    candidates = {} if rejected else {"flash4": Attention(attend_flash4, SDPA_KERNELS)}
    if rejected or judge.times_count:
        for_masks = ["mem_efficient"] if any(mask.hides for mask in masks_of(h)) else []
        for name in sdpa_kernels_that_run(qkv, judge):
            kernels = tuple(dict.fromkeys([name, *for_masks]))
            candidates["+".join(kernels)] = Attention(attend_sdpa, kernels)

    bound = choose_attention(h, device, judge, candidates)
    if bound.name == "flash4" or any(rejection.missing.startswith("flash_attn") for rejection in rejected):
        return bound
    return bound._replace(rejected=rejected[:1] or (Rejection("flash4", "slower"),))


def with_kernels(m: Machine, h: Config, trains: bool = True) -> Machine:
    """Return the machine with kernels bound for a model. Collective: all ranks bind the same."""
    began = time.perf_counter()
    judge = Judge(m, times_count=trains and h.bind_by_time)
    bound = {
        "qk": bind_qk(h, m.device, judge),
        "mlp": bind_mlp(h, m.device, judge),
        "attention": bind_attention(h, m.device, judge),
    }
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the log's peak is that of training
    return replace(
        m,
        ops=Ops(attend=bound["attention"].function, qk=bound["qk"].function, mlp=bound["mlp"].function),
        binding=m.binding._replace(**{part: found.label for part, found in bound.items()}),
        bind_times={part: found.times for part, found in bound.items() if found.times},
        bind_ms=1000 * (time.perf_counter() - began),
    )


# -----------------------------------------------------------------------------
# 11. Matrix kernels: the three products that directions are made of, and the sizes at which kernels win.
#
# Here and in sections 12 and 13, functions take a stack of S matrices (S, M, N). Papers describe one matrix.


@triton.jit
def load_tile(ptr, rows, columns, M, N, stride_m, stride_n, EVEN: tl.constexpr):
    """Load ptr[rows, columns] of an (M, N) matrix, with zeros outside. EVEN: no tile reaches outside."""
    at = ptr + rows[:, None] * stride_m + columns[None, :] * stride_n
    if EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(ptr, tile, rows, columns, M, N, stride_m, stride_n):
    """Store a tile at ptr[rows, columns] of an (M, N) matrix, nothing outside."""
    at = ptr + rows[:, None] * stride_m + columns[None, :] * stride_n
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def symmetric_kernel(
    x_ptr, r_ptr, out_ptr, sums_ptr, M, N, stride_s, stride_m, stride_n, a, b, c,
    POLY: tl.constexpr, SCALED: tl.constexpr, POWER: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute tile (i, j <= i) of XX' and its mirror image: half of the products suffice.

    SCALED: multiply by r_row r_column. POLY: X is symmetric and the result is aI + bX + cXX', which SCALED
    multiplies by r_column only. POWER: write row sums of |.|^POWER to sums[j, rows], and the row sums of the
    mirror image to sums[i, columns].
    """
    pid = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8 * pid + 1.5) - 1) / 2).to(tl.int32)  # i (i + 1) / 2 <= pid; 1.5, not 1: sqrt rounds
    j = pid - i * (i + 1) // 2
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    x_ptr += matrix * stride_s
    out_ptr += matrix * M * M
    r_ptr += matrix * M

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
            mirror = acc * r_rows
            acc = acc * r_columns
        else:
            acc = acc * (r_rows * r_columns)
            mirror = acc
    store_tile(out_ptr, acc, rows, columns, M, M, M, 1)
    if i != j:
        store_tile(out_ptr, tl.trans(mirror), columns, rows, M, M, M, 1)

    if POWER:
        size = tl.abs(acc) if POWER == 1 else acc * acc
        sums_ptr += matrix * tl.cdiv(M, BLOCK) * M
        tl.store(sums_ptr + j * M + rows, tl.sum(size, 1), mask=rows < M)
        if i != j:
            tl.store(sums_ptr + i * M + columns, tl.sum(size, 0), mask=columns < M)


@triton.jit
def block_inverse_kernel(
    t_ptr, out_ptr, M, BLOCK: tl.constexpr, DOUBLINGS: tl.constexpr, PRECISION: tl.constexpr
):
    """Invert a diagonal block of the unit lower triangle of T by doubling, starting from 1 x 1 blocks.

    [P, 0; C, Q]^-1 is [P^-1, 0; -Q^-1 C P^-1, Q^-1]. T is a Gram matrix of unit rows, so no entry of an
    inverse exceeds 1 and no doubling loses digits.
    """
    matrix = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK)
    at = tl.program_id(0) * BLOCK + n
    T = load_tile(t_ptr + matrix * M * M, at, at, M, M, M, 1, False).to(tl.float32)
    row = n[:, None]
    column = n[None, :]

    inverse = tl.where(row == column, 1.0, 0.0)
    for step in tl.static_range(DOUBLINGS):
        C = tl.where(row >> step == (column >> step) + 1, T, 0.0)
        C = tl.where(row >> (step + 1) == column >> (step + 1), C, 0.0)
        if step > 0:
            C = tl.dot(inverse, tl.dot(C, inverse, input_precision=PRECISION), input_precision=PRECISION)
        inverse -= C
    out_ptr += (matrix * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK
    store_tile(out_ptr, inverse, n, n, BLOCK, BLOCK, BLOCK, 1)


@triton.jit
def substitution_kernel(
    t_ptr, inverse_ptr, x_ptr, d_ptr, y_ptr, squares_ptr, M, N,
    stride_s, stride_m, stride_n, out_s, out_m, out_n, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Solve TY = diag(d) X for BN columns of Y, one block of rows after another.

    Y_i = T_ii^-1 (d_i X_i - sum_{k<i} T_ik Y_k). A program reads its earlier Y_k back from memory, after a
    barrier, and only those blocks of T that lie below the diagonal.
    """
    panel = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    columns = panel * BN + tl.arange(0, BN)
    n = tl.arange(0, BLOCK)
    t_ptr += matrix * M * M
    x_ptr += matrix * stride_s
    y_ptr += matrix * out_s

    blocks = tl.cdiv(M, BLOCK)
    for i in range(blocks):
        rows = i * BLOCK + n
        d = tl.load(d_ptr + matrix * M + rows, mask=rows < M, other=0.0)[:, None]
        x = load_tile(x_ptr, rows, columns, M, N, stride_m, stride_n, False).to(tl.float32)
        at = inverse_ptr + (matrix * blocks + i) * BLOCK * BLOCK
        inverse = load_tile(at, n, n, BLOCK, BLOCK, BLOCK, 1, True)

        acc = tl.zeros((BLOCK, BN), tl.float32)
        for start in range(0, i * BLOCK, BLOCK):
            left = load_tile(t_ptr, rows, start + n, M, M, M, 1, False)
            right = load_tile(y_ptr, start + n, columns, M, N, out_m, out_n, False)
            acc = tl.dot(left, right, acc)

        acc = tl.dot(inverse, (d * x - acc).to(y_ptr.dtype.element_ty))
        y = acc.to(y_ptr.dtype.element_ty)
        store_tile(y_ptr, y, rows, columns, M, N, out_m, out_n)

        squares = squares_ptr + (matrix * tl.num_programs(0) + panel) * M + rows
        tl.store(squares, tl.sum(y.to(tl.float32) * y.to(tl.float32), 1), mask=rows < M)
        tl.debug_barrier()


class ProductTile(NamedTuple):
    """How symmetric_kernel cuts a product."""

    block: int  # rows and columns of a program's tile of the result
    bk: int  # columns of X per product
    warps: int
    stages: int  # of the pipeline that loads


class SolveTile(NamedTuple):
    """How substitution_kernel cuts a solve."""

    bn: int  # columns of Y per program
    warps: int
    stages: int


@operator(
    "symmetric",
    "(Tensor X, Tensor? r, float[] poly, int power, ScalarType dtype, int[] tile) -> (Tensor, Tensor)",
)
def symmetric_op(X, r, poly, power, dtype, tile):
    """Launch symmetric_kernel -> (matrices (S, M, M), partial row sums).

    poly: (a, b, c) or (). tile: the numbers of a ProductTile.
    """
    S, M, N = X.shape
    block, bk, warps, stages = tile
    a, b, c = poly or (0.0, 0.0, 0.0)
    tiles = -(-M // block)  # on a side
    stride_s, stride_m, stride_n = X.stride()

    out = X.new_empty(S, M, M, dtype=dtype)
    sums = X.new_empty(S, tiles if power else 0, M, dtype=torch.float32)
    symmetric_kernel[(tiles * (tiles + 1) // 2, S)](
        x_ptr=X, r_ptr=X if r is None else r, out_ptr=out, sums_ptr=sums,
        M=M, N=N, stride_s=stride_s, stride_m=stride_m, stride_n=stride_n, a=a, b=b, c=c,
        POLY=len(poly) > 0, SCALED=r is not None, POWER=power, EVEN=M % block == 0 and N % bk == 0,
        BLOCK=block, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, sums


@symmetric_op.register_fake
def _(X, r, poly, power, dtype, tile):
    S, M, _ = X.shape
    sums = X.new_empty(S, -(-M // tile[0]) if power else 0, M, dtype=torch.float32)
    return X.new_empty(S, M, M, dtype=dtype), sums


SOLVE_BLOCK = 64


@operator("solve", "(Tensor T, Tensor X, Tensor d, int[] tile) -> (Tensor, Tensor)")
def solve_op(T, X, d, tile):
    """Solve TY = diag(d) X: Y (S, M, N), partial row sums of Y^2 (S, panels, M).

    tile: the numbers of a SolveTile.
    """
    S, M, N = X.shape
    bn, warps, stages = tile
    blocks = -(-M // SOLVE_BLOCK)
    panels = -(-N // bn)

    Y = torch.empty_like(X, dtype=T.dtype)
    squares = d.new_empty(S, panels, M)
    inverses = T.new_empty(S, blocks, SOLVE_BLOCK, SOLVE_BLOCK)
    block_inverse_kernel[(blocks, S)](
        t_ptr=T, out_ptr=inverses, M=M, BLOCK=SOLVE_BLOCK, DOUBLINGS=6, PRECISION="tf32x3", num_warps=4
    )

    stride_s, stride_m, stride_n = X.stride()
    out_s, out_m, out_n = Y.stride()
    substitution_kernel[(panels, S)](
        t_ptr=T, inverse_ptr=inverses, x_ptr=X, d_ptr=d, y_ptr=Y, squares_ptr=squares, M=M, N=N,
        stride_s=stride_s, stride_m=stride_m, stride_n=stride_n, out_s=out_s, out_m=out_m, out_n=out_n,
        BLOCK=SOLVE_BLOCK, BN=bn, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return Y, squares


@solve_op.register_fake
def _(T, X, d, tile):
    S, M, N = X.shape
    return torch.empty_like(X, dtype=T.dtype), d.new_empty(S, -(-N // tile[0]), M)


class Win(NamedTuple):
    """Sizes at which a kernel beats the torch reference on an H100."""

    product: str
    short_side: int  # at most
    matrices: int  # at most
    tile: ProductTile | SolveTile


# The first row that fits is used; if none fits, the reference runs. A comment gives a shape of X, then the
# microseconds of the reference and of the kernel, in a CUDA graph. An xxt that is slower alone is still
# faster within ns5, which takes 842 us instead of 868 at 22 x 512 x 512, and 214 instead of 221 at 3.
WINS = (
    Win("xxt", 256, 24, ProductTile(64, 64, 4, 4)),  # 22 x 256 x 512: 6.2, 5.9
    Win("xxt", 512, 4, ProductTile(64, 128, 4, 3)),  # 3 x 512 x 512: 4.9, 4.3
    Win("xxt", 512, 12, ProductTile(128, 64, 8, 4)),  # 11 x 512 x 1536: 15.0, 15.5; transposed: 18.0, 14.7
    Win("xxt", 512, 24, ProductTile(128, 64, 4, 3)),  # 22 x 512 x 512: 12.4, 13.5
    Win("ba_plus_caa", 256, 24, ProductTile(64, 64, 4, 3)),  # 22 x 256 x 256: 8.6, 5.5
    Win("ba_plus_caa", 512, 4, ProductTile(64, 128, 4, 3)),  # 3 x 512 x 512: 7.6, 4.8
    Win("ba_plus_caa", 512, 12, ProductTile(64, 64, 4, 3)),  # 11 x 512 x 512: 14.7, 8.8
    Win("ba_plus_caa", 512, 24, ProductTile(128, 64, 4, 3)),  # 22 x 512 x 512: 25.4, 16.6
    Win("lower_solve", 512, 4, SolveTile(32, 4, 3)),  # 3 x 512 x 512: 197, 40
    Win("lower_solve", 512, 24, SolveTile(64, 4, 3)),  # 22 x 512 x 512: 449, 56
)


def tile_of(product: str, X: Tensor) -> ProductTile | SolveTile | None:
    """Return the tile of WINS for a product with X (S, M, N), or None to run the reference.

    Only 2-byte dtypes and sides that are multiples of 64 were measured, on Hopper.
    """
    S, M, N = X.shape
    hopper = X.is_cuda and torch.cuda.get_device_properties(X.device).major == 9
    if not hopper or X.dtype.itemsize != 2 or M % 64 or N % 64:
        return None
    for win in WINS:
        if win.product == product and M <= win.short_side and S <= win.matrices:
            return win.tile
    return None


def xxt(
    X: Tensor, r: Tensor | None = None, power: int = 0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return A = diag(r) XX' diag(r) (S, M, M) in `dtype` or X's, and the row sums of |A|^power (S, M).

    X (S, M, N). power: 1 or 2; 0: no sums.
    """
    if tile := tile_of("xxt", X):
        A, sums = symmetric_op(X, r, (), power, dtype or X.dtype, [*tile])
        return A, sums.sum(1) if power else None
    A = torch.bmm(X, X.mT)
    if r is not None:
        A = A * r[:, :, None] * r[:, None]
    A = A.to(dtype or X.dtype)
    return A, A.float().abs().pow(power).sum(-1) if power else None


def ba_plus_caa(A: Tensor, a: float, b: float, c: float, r: Tensor | None = None) -> Tensor:
    """Return (aI + bA + cA^2) diag(r) for a symmetric A. (S, M, M), (S, M) -> (S, M, M)."""
    if tile := tile_of("ba_plus_caa", A):
        return symmetric_op(A, r, (a, b, c), 0, A.dtype, [*tile])[0]
    X = A.to(torch.promote_types(A.dtype, torch.float32))  # the diagonal must not be rounded twice
    C = torch.baddbmm(X, X, X, beta=b, alpha=c) + a * torch.eye(A.size(-1), dtype=X.dtype, device=A.device)
    if r is not None:
        C = C * r[:, None]
    return C.to(A.dtype)


def lower_solve(T: Tensor, X: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Solve TY = diag(d) X for Y (S, M, N), where T has a unit diagonal. Also returns the |Y_i|^2 (S, M).

    Only the part of T below its diagonal is read.
    """
    if tile := tile_of("lower_solve", X):
        Y, squares = solve_op(T, X, d, [*tile])
        return Y, squares.sum(1)
    Y = torch.linalg.solve_triangular(T.float(), X.float() * d[:, :, None], upper=False, unitriangular=True)
    return Y.to(T.dtype), Y.to(T.dtype).float().square().sum(-1)


# -----------------------------------------------------------------------------
# 12. Directions: a row of ORTHO turns a momentum into a direction, a row of STEP_RULES makes the step.

NS5 = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan, Muon (2024): five steps map [0.0015, 1] into [0.68, 1.20]
# thib-s/flash-newton-schulz: from a genetic search for the spectra that AOL leaves. The slope at 0 is 147.
TURBO = (
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)
GPU_SCALE = 2.0**40  # with this factor, the square of any entry from 1e-30 to 1e5 fits float32 and bf16
SAFETY = 2e-2  # bf16 rounding must not lift a singular value out of [0, 1]


def minimax_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Return (a, b, c) of the odd quintic with the smallest maximal distance to 1 on [low, high] (Remez)."""
    if low / high >= 1 - 5e-6:  # the limit is Newton-Schulz
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5

    q = (3 * low + high) / 4
    r = (low + 3 * high) / 4
    before = math.inf
    for _ in range(100):
        x = np.array([low, q, r, high])
        nodes = np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1)
        a, b, c, error = np.linalg.solve(nodes, np.ones(4)).tolist()
        if abs(error - before) <= 1e-15:
            break

        before = error
        root = math.sqrt(9 * b * b - 20 * a * c)  # the extrema solve a + 3b x^2 + 5c x^4 = 0
        q = math.sqrt((-3 * b - root) / (10 * c))
        r = math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def odd_quintic(x: float, a: float, b: float, c: float) -> float:
    """Evaluate a x + b x^3 + c x^5."""
    return a * x + b * x**3 + c * x**5


@cache
def polar_express(low: float, steps: int, safety: float, cushion: float) -> tuple:
    """Return coefficients (a, b, c) of each step of Polar Express (Amsel et al., arXiv:2505.16932).

    Each step is the minimax quintic on [low, u], the image of the initial [low, 1] under the steps before.
    cushion: a step is fitted to at most [cushion * u, u], which bounds the slope, and then scaled to centre
    its image on 1. safety: all steps but the last are evaluated at x / (1 + safety).
    """
    rows = []
    u = 1.0
    for k in range(steps):
        a, b, c = minimax_quintic(max(low, cushion * u), u)
        if cushion * u > low:
            centre = 2 / sum(odd_quintic(x, a, b, c) for x in (low, u))
            a *= centre
            b *= centre
            c *= centre

        shrink = 1 + safety if k < steps - 1 else 1.0
        rows.append((a / shrink, b / shrink**3, c / shrink**5))
        low = odd_quintic(low, *rows[-1])
        u = 2 - low
    return tuple(rows)


# PE5 maps [1e-3, 1] into [0.86, 1.14], PE4 maps [3e-3, 1] into [0.78, 1.22]. Four steps from 1e-3 would end
# in [0.42, 1.58]; the Schatten-4 start makes up for the factor of 3.
PE5 = polar_express(1e-3, 5, SAFETY, 2e-2)
PE4 = polar_express(3e-3, 4, SAFETY, 2e-2)


def inverse_root(x: Tensor) -> Tensor:
    """Return x^(-1/2), and 0 for 0: a zero row or matrix stays zero."""
    return torch.where(x > 0, x.rsqrt(), 0.0)


def frobenius_scale(X: Tensor) -> Tensor:
    """Return 1 / |X|, with the Frobenius norm of each matrix, for every row: (S, M, N) -> (S, M) float32."""
    return inverse_root(X.float().square().sum((-2, -1)))[:, None].repeat(1, X.size(1))


def quintic(X: Tensor, coefficients: tuple, r: Tensor, A: Tensor | None = None) -> Tensor:
    """Iterate X <- aX + (bA + cA^2)X with A = XX', once per row of coefficients, starting from diag(r) X.

    X (S, M, N), r (S, M). An iteration changes singular values and keeps singular vectors. diag(r) X is never
    stored: r scales the first A and the columns of the first polynomial instead. A: the Gram matrix of
    diag(r) X, if known. An iteration takes 17.8 us with aI in the polynomial, 27.3 us with baddbmm (H100,
    22 x 512 x 512).
    """
    for a, b, c in coefficients:
        if A is None:
            A, _ = xxt(X, r)
        C = ba_plus_caa(A, a, b, c, r)
        X = torch.bmm(C, X) if X.stride(-1) == 1 else torch.bmm(X.mT, C.mT).mT  # in the layout of X
        r = None
        A = None
    return X


def ortho_ns5(X: Tensor) -> Tensor:
    """Run five steps of Newton-Schulz's quintic as tuned for Muon (Jordan, 2024)."""
    return quintic(X, NS5, frobenius_scale(X))


def ortho_polar_express(X: Tensor, coefficients: tuple) -> Tensor:
    """Run Polar Express from a matrix of unit Schatten-4 norm, |XX'|^(1/2).

    Like the Frobenius norm, this norm bounds the largest singular value, but 1.7 to 4 times more tightly. The
    norm costs nothing: the first step needs the Gram matrix anyway.
    """
    r = frobenius_scale(X)
    A, sums = xxt(X, r, 2)
    norm = sums.sum(-1).sqrt().sqrt().clamp_min(1e-2)  # at least M^(-1/4) unless the matrix is zero

    s = (1 / ((1 + SAFETY) * norm))[:, None]
    return quintic(X, coefficients, r * s, (A * (s * s)[:, None]).to(A.dtype))


def ortho_turbo(X: Tensor) -> Tensor:
    """Run Turbo-Muon (arXiv:2512.04632): four steps from rows scaled by (sum_j |A_ij|)^(-1/2), A = XX'.

    The scaling (AOL, arXiv:2208.03160) bounds the spectrum by 1 but rotates singular vectors. The first Gram
    matrix is rescaled instead of being computed again.
    """
    A, sums = xxt(X, None, 1)
    r = inverse_root(sums)
    return quintic(X, TURBO, r, (A * r[:, :, None] * r[:, None]).to(A.dtype))


def ortho_mud(X: Tensor, rounds: int) -> Tensor:
    """Decorrelate the rows of a momentum (MUD: Southworth & Thomas, arXiv:2603.17970, Alg. 2).

    A round, which the paper calls a pass, scales rows to unit norm, Q = diag(d) X, takes the lower triangle T
    of QQ' and solves TY = Q. The last scaling stays in d. Rounds converge to Gram-Schmidt in row order, not
    to the polar factor. |Y_i| <= 1 and |T_ij| <= 1 fit fp16, which is eight times finer than bf16.
    """
    dtype = X.dtype
    fine = torch.half if dtype == torch.bfloat16 else dtype
    d = inverse_root(X.float().square().sum(-1))
    for _ in range(rounds):
        T, _ = xxt(X, d, dtype=fine)
        X, squares = lower_solve(T, X, d)
        d = inverse_root(squares)
    return (X * d[:, :, None]).to(dtype)


# Each maps X (S, M, N) to the same shape. M <= N, and squared norms fit float32. A GPU runs bf16.
ORTHO: dict[str, Callable[[Tensor], Tensor]] = {
    "ns5": ortho_ns5,
    "polar_express": partial(ortho_polar_express, coefficients=PE5),
    "polar_express4": partial(ortho_polar_express, coefficients=PE4),
    "turbo": ortho_turbo,
    "mud": partial(ortho_mud, rounds=1),
    "mud2": partial(ortho_mud, rounds=2),
}


def orthogonalize(G: Tensor, method: str) -> Tensor:
    """Return the direction of each matrix of G (..., M, N), in the same shape and dtype.

    method: a row of ORTHO. All but mud approximate the polar factor. The scale of G does not matter, down to
    1e-20; zero gives zero. The method works on the short side of G, in float32 on a CPU.
    """
    tall = G.size(-2) > G.size(-1)
    X = G.float().reshape(-1, *G.shape[-2:])
    if X.is_cuda:
        X = (X * GPU_SCALE).bfloat16()
    else:
        X = X / X.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30)

    X = ORTHO[method](X.mT if tall else X)
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def equalize_rows(U: Tensor) -> Tensor:
    """Scale each row of U (S, M, N), as stored, to unit norm; a zero row stays zero. MuonEq-R.

    arXiv:2603.28254; parameter-golf #1285. Entries are first scaled to at most 1, so squares fit float32.
    """
    U = U / U.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return U / torch.linalg.vector_norm(U, dim=-1, keepdim=True).clamp_min(1e-30)


def with_norm(X: Tensor, norm: float | Tensor) -> Tensor:
    """Scale each matrix of X (S, M, N) to Frobenius norm `norm`, a number or (S, 1, 1). Zero stays zero."""
    return X * (norm / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1e-10))


def neuron_shape(S: int, M: int, N: int) -> tuple[int, int, int]:
    """Return the shape that holds one number per neuron: per row if M >= N, else per column."""
    return (S, M, 1) if M >= N else (S, 1, N)


def normalize_neurons(U: Tensor, v: Tensor, beta2: float) -> Tensor:
    """Divide each neuron of U (S, M, N) by the root of v, its running mean square. NorMuon, arXiv:2510.05491.

    Wide matrices are normalized by column, as in modded-nanogpt, since their rows already have unit norm.
    Each matrix keeps its Frobenius norm. v, which has neuron_shape, is updated in place.
    """
    along = -1 if v.size(-1) == 1 else -2
    v.lerp_(U.square().mean(along, keepdim=True), 1 - beta2)
    return with_norm(U * v.clamp_min(1e-10).rsqrt(), torch.linalg.matrix_norm(U, keepdim=True))


def muon_scale(rows: int, columns: int) -> float:
    """Return sqrt(max(1, rows / columns)), the factor on the step of a matrix.

    From Jordan's implementation of Muon (2024), after sqrt(rows / columns) of Bernstein, "Deriving Muon"
    (2025). With this factor, a step of lr changes outputs by about lr times the inputs, in root mean squares.
    """
    return max(1.0, rows / columns) ** 0.5


def step_muon(W: Tensor, U: Tensor, lr: Tensor, wd: float | Tensor) -> None:
    """Decay W (S, M, N) by lr * wd, then subtract lr * muon_scale U, in place."""
    W.mul_(1 - lr * wd).sub_(U * (lr * muon_scale(*W.shape[-2:])))


def step_hyperball(W: Tensor, U: Tensor, lr: Tensor, wd: float | Tensor) -> None:
    """Subtract lr |W| U / |U| from W (S, M, N), then scale W back to its Frobenius norm |W|, in place: MuonH.

    lr is thus an angle, and wd is not used. After modded-nanogpt track 3, record 5. A zero matrix would stay
    zero, so parameter_table starts no matrix at zero.
    """
    R = torch.linalg.matrix_norm(W, keepdim=True)
    W.copy_(with_norm(W - with_norm(U, lr * R), R))


class StepRule(NamedTuple):
    """How a direction U becomes a step of the weights W, both (S, M, N)."""

    step: Callable[[Tensor, Tensor, Tensor, float | Tensor], None]  # (W, U, lr, wd): changes W in place
    keeps_norms: bool = False  # whether W keeps its Frobenius norm, so no matrix may start at zero
    # (U, state, beta2) -> the U for `step`; changes the state in place. None: `step` takes the direction.
    prepare: Callable[[Tensor, Tensor, float], Tensor] | None = None
    state_shape: Callable[[int, int, int], tuple] | None = None  # (S, M, N) -> the shape of prepare's state


STEP_RULES = {
    "muon": StepRule(step_muon),
    "hyperball": StepRule(step_hyperball, keeps_norms=True),
    "normuon": StepRule(step_muon, prepare=normalize_neurons, state_shape=neuron_shape),
    "normuon_hyperball": StepRule(
        step_hyperball, keeps_norms=True, prepare=normalize_neurons, state_shape=neuron_shape
    ),
}


# -----------------------------------------------------------------------------
# 13. Optimizer: sharded state, and the schedule that launches every collective of a step.


class StepScalars(NamedTuple):
    """The scalars of a step: numbers on the host, 0-dimensional tensors on the device.

    A new value of a tensor triggers no recompilation.
    """

    momentum: Tensor | float
    matrix_lr: Tensor | float
    adam_lr_mul: Tensor | float
    matrix_decay_mul: Tensor | float  # factor on the weight decay of the matrices
    adam_decay_mul: Tensor | float  # factor on every other weight decay
    correction1: Tensor | float  # 1 - beta1^t
    correction2: Tensor | float  # 1 - beta2^t


class OwnedMatrices(NamedTuple):
    """The S matrices of one parameter that this rank updates: views of its bank and wire, and their state."""

    weights: Tensor  # (S, M, N)
    gradient: Tensor  # (S, M, N), in wire_dtype
    momentum: Tensor  # (S, M, N), or (S, 2, M, N) with momentum_spread above 1
    rule_state: Tensor | None = None  # of the step rule; None: it has no state


class FlatBuffers(NamedTuple):
    """All small parameters concatenated, (n,), and their gradients, moments and rates, in the same shape."""

    p: Tensor
    g: Tensor  # in wire_dtype
    m: Tensor
    v: Tensor
    lr: Tensor
    wd: Tensor


def nesterov(average: Tensor, g: Tensor, beta: Tensor | float) -> Tensor:
    """Move the average towards g in place. Return what the average would be after one more step with g."""
    average.mul_(beta).add_(g * (1 - beta))
    return g * (1 - beta) + average * beta


def matrix_update(matrices: OwnedMatrices, gradient_factor: Tensor, s: StepScalars, h: Config) -> None:
    """Update matrices and their state in place: Nesterov momentum, direction, step rule.

    With momentum_spread above 1 there are two momenta, and the update takes their mean; their horizons,
    1 / (1 - beta), are momentum_spread times shorter and longer than the horizon of s.momentum. With
    equalize_rows, rows are equalized before the direction. Cautious decay (arXiv:2510.12402) acts only where
    U and W agree in sign.
    """
    W, g, momentum, rule_state = matrices
    g = g.float() * gradient_factor
    if h.momentum_spread == 1:
        U = nesterov(momentum, g, s.momentum)
    else:
        fast, slow = momentum.unbind(1)
        fast_ahead = nesterov(fast, g, 1 - (1 - s.momentum) * h.momentum_spread)
        slow_ahead = nesterov(slow, g, 1 - (1 - s.momentum) / h.momentum_spread)
        U = (fast_ahead + slow_ahead) / 2
    if h.equalize_rows:
        U = equalize_rows(U)
    U = orthogonalize(U, h.ortho)
    rule = STEP_RULES[h.step_rule]
    if rule.prepare is not None:
        U = rule.prepare(U, rule_state, h.normuon_beta2)
    wd = s.matrix_decay_mul * h.muon_wd
    if h.cautious_wd:
        wd = wd * (U * W >= 0)
    rule.step(W, U, s.matrix_lr, wd)


def adam_update(buffers: FlatBuffers, gradient_factor: Tensor, s: StepScalars, h: Config) -> None:
    """Update the flat buffers in place by AdamW (arXiv:1711.05101)."""
    p, g, m, v, lr, wd = buffers
    g = g.float() * gradient_factor
    m.mul_(h.adam_beta1).add_(g * (1 - h.adam_beta1))
    v.mul_(h.adam_beta2).add_(g.square() * (1 - h.adam_beta2))
    step = (m / s.correction1) / ((v / s.correction2).sqrt() + h.adam_eps)
    p.sub_(s.adam_lr_mul * lr * (s.adam_decay_mul * wd * p + step))


class Snapshot(NamedTuple):
    """A copy of what a step of an Optimizer changes."""

    steps: int
    state: list[Tensor]  # as Optimizer.state lists it


class Optimizer:
    """The update of all parameters and its communication. Only a matrix's owner holds the matrix's state.

    Parameters and gradients become views of a few buffers on which collectives run in place. A bank holds one
    or two parameters of equal matrix size and is cut into one share per rank. The flat buffer holds all other
    parameters; every rank has their AdamW state.
    """

    def __init__(self, model: GPT, h: Config, m: Machine) -> None:
        self.h = h
        self.m = m
        self.steps = 0
        self.wire_dtype = getattr(torch, h.wire_dtype)
        # Keyed by buffer name. A bank, its gradient and its wire are (world, rows per rank, M * N).
        self.bank: dict[str, Tensor] = {}
        self.bank_grad: dict[str, Tensor] = {}
        self.wire: dict[str, Tensor] = {}  # gradients to send; bank_grad itself if wire_dtype is float32
        self.owned: dict[str, list[OwnedMatrices]] = {}
        # Keyed by parameter name.
        self.momentum: dict[str, Tensor] = {}
        self.rule_state: dict[str, Tensor] = {}
        self.rows: dict[str, slice] = {}  # which of its matrices this rank owns

        params = dict(model.named_parameters())
        for buffer in dict.fromkeys(spec.buffer for spec in MATRICES):
            self.make_bank(buffer, {s.name: params[s.name] for s in MATRICES if s.buffer == buffer})
        self.make_flat(params)

        self.matrix_update = m.compile(matrix_update)
        self.adam_update = m.compile(adam_update)
        self.scalars = torch.ones(len(StepScalars._fields), device=m.device)  # a StepScalars, as one tensor
        self.norm = torch.zeros((), dtype=torch.float64, device=m.device)  # this step's gradient norm
        saved = self.snapshot()
        self.update, self.graph_failure = m.capture(self.schedule)
        self.restore(saved)  # capture ran the update

    def make_bank(self, buffer: str, members: dict[str, nn.Parameter]) -> None:
        """Make a bank of one or two parameters of equal matrix size, and this rank's state for its part.

        A row holds one matrix, and every rank has the same number of rows. The first parameter starts at the
        first row and a second one ends at the last row. Rows between them are padding, which stays zero.
        11 + 11 matrices on 8 ranks take 24 rows:

            rank     0     1     2     3     4     5     6     7
            rows   u u u u u u u u u u u . . d d d d d d d d d d d

        The padding thus belongs to ranks that would otherwise run two smaller batches, one for each shape.
        Raises ValueError for more than two parameters.
        """
        if len(members) > 2:
            raise ValueError(f"bank {buffer!r} has {len(members)} parameters; at most two are supported")
        last = [*members.values()][-1]
        count = sum(len(p) for p in members.values())
        per_rank = -(-count // self.m.world_size)
        shape = (self.m.world_size, per_rank, last[0].numel())
        self.bank[buffer] = torch.zeros(shape, device=self.m.device)
        self.bank_grad[buffer] = torch.zeros(shape, device=self.m.device)
        self.wire[buffer] = self.bank_grad[buffer].to(self.wire_dtype)
        self.owned[buffer] = []

        bank = self.bank[buffer].flatten(0, 1)
        grad = self.bank_grad[buffer].flatten(0, 1)
        first_rows = (0, len(bank) - len(last))
        for (name, p), first in zip(members.items(), first_rows):
            end = first + len(p)
            self.move(p, bank[first:end].view_as(p), grad[first:end].view_as(p))
            self.own(buffer, name, p, first)

    def own(self, buffer: str, name: str, p: nn.Parameter, first: int) -> None:
        """Allocate state for the matrices of p in this rank's share. p starts at row `first` of the bank."""
        per_rank = self.bank[buffer].size(1)
        end = first + len(p)
        share_start = self.m.own_share * per_rank
        # Rows [low, high) of the bank belong to p and to this rank. There may be none.
        low = min(max(share_start, first), end)
        high = min(max(share_start + per_rank, first), end)
        self.rows[name] = slice(low - first, high - first)
        if low == high:
            return

        W = self.bank[buffer].flatten(0, 1)[low:high].view(-1, *p.shape[1:])
        g = self.wire[buffer].flatten(0, 1)[low:high].view(-1, *p.shape[1:])
        shape = W.shape if self.h.momentum_spread == 1 else (len(W), 2, *W.shape[1:])
        self.momentum[name] = W.new_zeros(shape)
        rule = STEP_RULES[self.h.step_rule]
        if rule.state_shape is not None:
            self.rule_state[name] = W.new_zeros(rule.state_shape(*W.shape))
        self.owned[buffer].append(OwnedMatrices(W, g, self.momentum[name], self.rule_state.get(name)))

    def make_flat(self, params: dict[str, nn.Parameter]) -> None:
        """Make the flat buffers of all small parameters. Every rank holds and updates all of them."""
        specs = [spec for spec in SMALL if spec.name in params]
        # Multiples of 64 elements align every view to 256 bytes.
        sizes = [-(-params[spec.name].numel() // 64) * 64 for spec in specs]
        self.flat = torch.zeros(sum(sizes), device=self.m.device)
        self.flat_grad = torch.zeros_like(self.flat)
        self.flat_m = torch.zeros_like(self.flat)
        self.flat_v = torch.zeros_like(self.flat)
        flat_lr = torch.zeros_like(self.flat)
        flat_wd = torch.zeros_like(self.flat)
        start = 0
        for spec, size in zip(specs, sizes):
            p = params[spec.name]
            end = start + p.numel()  # from there to start + size is padding
            self.move(p, self.flat[start:end].view_as(p), self.flat_grad[start:end].view_as(p))
            lr = getattr(self.h, spec.lr)
            flat_lr[start : start + size] = lr
            flat_wd[start : start + size] = getattr(self.h, DECAYS[spec.lr])
            p.requires_grad_(lr > 0)  # a parameter that never moves needs no gradient
            start += size

        self.wire["flat"] = self.flat_grad.to(self.wire_dtype)
        self.adam_buffers = FlatBuffers(
            p=self.flat, g=self.wire["flat"], m=self.flat_m, v=self.flat_v, lr=flat_lr, wd=flat_wd
        )

    @staticmethod
    def move(p: nn.Parameter, value: Tensor, grad: Tensor) -> None:
        """Copy p into `value`. Make `value` the storage of p, and `grad` the storage of p's gradient."""
        value.copy_(p.data)
        p.data = value
        p.grad = grad

    def step(self, hp: Hyper) -> None:
        """Send this step's scalars to the device, then launch the update.

        The pinned memory is new for every step, because the host may run ahead. The allocator reuses pinned
        memory only after the copy from there has ended.
        """
        self.steps += 1
        follows = self.h.decay_follows_rate
        scalars = StepScalars(
            momentum=hp.momentum,
            matrix_lr=self.h.matrix_lr * hp.matrix_lr_mul,
            adam_lr_mul=hp.adam_lr_mul,
            matrix_decay_mul=hp.matrix_lr_mul if follows else 1.0,
            adam_decay_mul=hp.adam_lr_mul if follows else 1.0,
            correction1=1 - self.h.adam_beta1**self.steps,
            correction2=1 - self.h.adam_beta2**self.steps,
        )
        host = torch.tensor(scalars, dtype=torch.float32, pin_memory=self.m.is_gpu)
        self.scalars.copy_(host, non_blocking=True)
        self.update()

    @torch.no_grad()
    def schedule(self) -> None:
        """Launch every collective of a step, and the updates between them.

        Afterwards every rank holds all weights, and all gradients are zero. Gradients are averaged in the
        order of PARAM_TABLE, the biggest bank first. Banks are updated in the opposite order: the bank with
        the cheapest update is gathered while the other banks are still updated.
        """
        # 1. Average the gradients: reduce-scatter each bank, level by level; all-reduce the flat buffer.
        arrivals = []
        for buffer, grad in self.bank_grad.items():
            # Casts to wire_dtype; a no-op for float32, where the wire is the gradient itself.
            wire = self.wire[buffer].copy_(grad)
            for i, level in enumerate(self.m.levels):
                if i > 0:
                    arrivals[-1].wait()  # the second level sends what the first level has averaged
                arrivals.append(
                    reduce_scatter(
                        wire[level.kept],
                        wire[level.whole],
                        op=dist.ReduceOp.AVG,
                        group=level.group,
                        async_op=True,
                    )
                )
        flat_wire = self.wire["flat"].copy_(self.flat_grad)
        arrivals.append(dist.all_reduce(flat_wire, op=dist.ReduceOp.AVG, async_op=True))
        for work in arrivals:
            work.wait()

        # 2. Take one norm over all gradients. Every rank has a share of each bank, and the whole flat buffer.
        squares = self.squared_norms()
        bank_squares = squares[:-1]  # a view, so the sums over all ranks land in `squares`
        dist.all_reduce(bank_squares)  # without the last one: the flat buffer is equal on every rank
        factor = self.gradient_factor(squares)

        scalars = StepScalars(*self.scalars.unbind())

        with self.m.lanes() as lane:
            # 3. Update the small parameters, identically on every rank.
            with lane():
                self.adam_update(self.adam_buffers, factor, scalars, self.h)
                self.flat_grad.zero_()

            # 4. On a lane per bank, update the matrices that this rank owns, then gather the whole bank.
            for buffer in reversed(self.bank):
                with lane():
                    for matrices in self.owned[buffer]:
                        self.matrix_update(matrices, factor, scalars, self.h)
                    self.bank_grad[buffer].zero_()
                    bank = self.bank[buffer]
                    for level in reversed(self.m.levels):  # .wait() holds the lane, not the host
                        all_gather(bank[level.whole], bank[level.kept], level.group, async_op=True).wait()

    def squared_norms(self) -> Tensor:
        """Return the squared gradient norms of this rank's share of each bank, then of the flat buffer."""
        own_share = self.m.own_share
        gradients = [self.wire[buffer][own_share] for buffer in self.bank] + [self.wire["flat"]]
        norms = torch._foreach_norm(gradients, 2, torch.float64)  # float32 had a relative error of 2e-4
        return torch.stack(norms).square()

    def gradient_factor(self, squares: Tensor) -> Tensor:
        """Return min(1, grad_clip / global norm), (), given squared_norms over all ranks. Sets self.norm."""
        self.norm.copy_(squares.sum().sqrt())
        limit = self.h.grad_clip if self.h.grad_clip > 0 else math.inf
        return (limit / (self.norm + 1e-6)).clamp_max(1.0).float()

    def state(self) -> list[Tensor]:
        """Return every tensor that a step changes, parameters included."""
        matrices = [*self.bank.values(), *self.momentum.values(), *self.rule_state.values()]
        return [*matrices, self.flat, self.flat_m, self.flat_v]

    def snapshot(self) -> Snapshot:
        """Copy the number of steps and the state."""
        return Snapshot(self.steps, [t.clone() for t in self.state()])

    @torch.no_grad()
    def restore(self, saved: Snapshot) -> None:
        """Return to a snapshot, bit for bit, and clear the gradients."""
        self.steps = saved.steps
        torch._foreach_copy_(self.state(), saved.state)
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Zero all gradients."""
        torch._foreach_zero_([*self.bank_grad.values(), self.flat_grad])


# -----------------------------------------------------------------------------
# 14. Schedules: rates as pure functions of progress, and the average of the weights.


class Hyper(NamedTuple):
    """The scheduled values that a step uses."""

    progress: float  # in [0, 1]: the used fraction of the time or of the iterations, whichever is larger
    momentum: float
    matrix_lr_mul: float  # factor on matrix_lr
    adam_lr_mul: float  # factor on every other rate
    loops: bool = False  # whether the step visits the layers of the loop again
    growth: float = 1.0  # how far the batch has grown from start_batch_tokens to train_batch_tokens


def hyper_at(h: Config, step: int, elapsed_ms: float, limit_ms: float | None = None) -> Hyper:
    """Return a step's values. Rates stay constant, then fall linearly; momentum and batch grow at first.

    The rate of the matrices may rise at first, and fall over another part of the run. limit_ms: the time for
    steps; None: as configured.
    """
    progress = min(1.0, max(elapsed_ms / (limit_ms or h.time_limit_ms), step / h.iterations))

    def rise(frac: float) -> float:
        return min(1.0, progress / frac) if frac > 0 else 1.0

    def fall(frac: float) -> float:
        return max(min(1.0, (1 - progress) / frac), h.min_lr_frac)

    matrix_lr_mul = rise(h.matrix_warmup_frac) * fall(h.matrix_warmdown_frac or h.warmdown_frac)
    adam_lr_mul = fall(h.warmdown_frac)
    ramp = rise(h.muon_momentum_warmup_frac)
    momentum = h.muon_momentum_start + ramp * (h.muon_momentum - h.muon_momentum_start)
    loops = h.trains_loop and progress >= h.loop_frac
    growth = min(1.0, progress / h.batch_growth_frac)
    return Hyper(
        progress=progress,
        momentum=momentum,
        matrix_lr_mul=matrix_lr_mul,
        adam_lr_mul=adam_lr_mul,
        loops=loops,
        growth=growth,
    )


class Ema:
    """An average of past weights, weighted by exp(-age / ema_frac), with age as a fraction of the run.

    Let p_k be the progress at the k-th update, and p_0 = 0. The weights of the k-th update stand for the
    stretch from p_{k-1} to p_k. With f = ema_frac, their part of the average at progress P is

        (e^(-(P - p_k) / f) - e^(-(P - p_{k-1}) / f)) / (1 - e^(-P / f)).

    All parts sum to 1; the initial weights have none. At an update from P - d to P, the newest weights get
    the part (1 - e^(-d / f)) / (1 - e^(-P / f)), and older weights keep their proportions.
    """

    def __init__(self, model: GPT, h: Config) -> None:
        self.h = h
        self.progress = 0.0  # at the last update; this and the average are the whole state
        self.params = [p.data for p in model.parameters()]
        self.average = [p.clone() for p in self.params]

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Move towards the current weights by the progress since the last call. At first, copy them."""
        progress = max(progress, self.progress)  # smaller if a resumed run holds back less time
        weight = 1.0
        if self.progress > 0:
            made = math.expm1((self.progress - progress) / self.h.ema_frac)
            weight = made / math.expm1(-progress / self.h.ema_frac)
        torch._foreach_lerp_(self.average, self.params, weight)
        self.progress = progress

    @property
    def is_young(self) -> bool:
        """Whether the average covers less of the run than its horizon."""
        return self.progress < self.h.ema_frac

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the current weights."""
        self.progress = 0.0
        torch._foreach_copy_(self.average, self.params)


def relations_of_training(h: Config) -> Iterator[Relation]:
    """Yield the relations of the optimizer and the schedules."""
    yield above_zero("ema_frac", h)
    yield above_zero("warmdown_frac", h)
    shorter = min(("muon_momentum", "muon_momentum_start"), key=partial(getattr, h))
    momentum = getattr(h, shorter)
    yield Relation(
        h.momentum_spread >= 1 and (1 - momentum) * h.momentum_spread <= 1,
        f"momentum_spread={h.momentum_spread:g} must be at least 1 and at most the horizon of momentum, "
        f"{1 / (1 - momentum):g} steps with {shorter}={momentum:g}",
    )
    yield Relation(
        h.adam_eps >= 1e-37,
        f"adam_eps={h.adam_eps:g} must be at least 1e-37: below, a gradient of zero gives 0 / 0",
    )
    for rate, decay in DECAYS.items():
        lr = getattr(h, rate)
        wd = getattr(h, decay)
        yield Relation(
            lr * wd <= 1, f"{rate}={lr:g} * {decay}={wd:g}, the decay of a step, must be at most 1"
        )


# -----------------------------------------------------------------------------
# 15. Rounding: a whole number for every weight, guided by training text.


class Encoding(NamedTuple):
    """How a tensor's values are stored."""

    dtype: np.dtype
    limit: int = 0  # the largest code; 0: values are stored without codes
    clip_code: int = 0  # the code of a row's clip; 0: the largest code
    has_column_steps: bool = False
    has_shifts: bool = False


ENCODINGS = {
    "int6": Encoding(np.dtype("i1"), 31),
    "int7": Encoding(np.dtype("i1"), 63),
    "int8": Encoding(np.dtype("i1"), 127),
    "columns": Encoding(np.dtype("i1"), 127, clip_code=31, has_column_steps=True),
    "trellis": Encoding(np.dtype("i1"), 127, clip_code=31, has_column_steps=True, has_shifts=True),
    "f16": Encoding(np.dtype("<f2")),
    "f32": Encoding(np.dtype("<f4")),
}
STORED_AS = {spec.name: spec.stored_as for spec in PARAM_TABLE}
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # candidates, times the row's largest magnitude
MIN_SCALE = 2.0**-24  # the smallest f16
COLUMN_STEPS = np.exp2(np.arange(-128, 128) / 4).astype(np.float32)  # of the exponents -128 ... 127
EXPONENT_LIMIT = 12  # column steps lie between 1/8 and 8 times their geometric mean
STEP_FACTOR_LIMIT = 4.0  # row_steps multiplies int6_step by between 1/4 and 4


def nearest_codes(W: Tensor, scale: Tensor, limit: int) -> Tensor:
    """Round W / scale to the nearest whole number in [-limit, limit]."""
    return (W / scale).round().clamp(-limit, limit)


def inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper triangular U such that U'U is the inverse of the damped `gram` (..., N, N).

    To damp is to add 1 % of the diagonal's mean to the diagonal. Raises LinAlgError if gram is not finite.
    """
    damping = 0.01 * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-10)
    damped = gram + damping[..., None, None] * torch.eye(gram.size(-1), device=gram.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def gptq(W: Tensor, scale: Tensor, U: Tensor, limit: int, round_column: Callable = nearest_codes) -> Tensor:
    """Round W (..., M, N) to multiples of `scale` that keep the products Wx with typical inputs x.

    Columns are rounded one at a time. Once column j is rounded, columns j+1.. are shifted to cancel as much
    as possible of its error in Wx: by that error / U_jj times row j of U. This is Alg. 1 of Frantar et al.,
    arXiv:2210.17323, in blocks of one column.

    scale (..., M, 1): the step of each row. U (..., N, N): inverse_factor of the sum of x x' over those
    inputs. Returns the multiples, float32 (..., M, N): whole numbers, or whatever round_column(column, scale,
    limit) gives for a column (..., M, 1).
    """
    W = W.clone()
    multiples = torch.empty_like(W)
    for j in range(W.size(-1)):
        column = slice(j, j + 1)
        multiples[..., column] = round_column(W[..., column], scale, limit)
        scaled_error = (W[..., column] - multiples[..., column] * scale) / U[..., column, column]
        W[..., j:] -= scaled_error * U[..., column, j:]
    return multiples


def column_exponents(U: Tensor) -> Tensor:
    """Return e of the column steps 2^(e/4), int8 (..., 1, N), for inputs with inverse factor U (..., N, N).

    The part of column j's error that later columns cannot cancel adds error^2 / U_jj^2 to the squared error
    of Wx. At a given entropy the total is smallest if every column adds the same, so steps are proportional
    to U_jj: WaterSIC (Lifar et al., arXiv:2603.04956). The geometric mean of the steps is 1.
    """
    octaves = U.diagonal(dim1=-2, dim2=-1).log2()
    octaves = octaves - octaves.mean(-1, keepdim=True)
    return (4 * octaves).round().clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).to(torch.int8).unsqueeze(-2)


def column_sizes(exponents: Tensor) -> Tensor:
    """Return the column steps 2^(e/4) of exponents, float32 of the same shape."""
    return torch.from_numpy(COLUMN_STEPS).to(exponents.device)[exponents.int() + 128]


class ColumnGuide(NamedTuple):
    """What the inputs of matrices (..., M, N) say about rounding, at any weights and any steps of rows."""

    exponents: Tensor | None  # of the column steps, int8 (..., 1, N); None: the columns have no steps
    U: Tensor  # (..., N, N): inverse_factor of the inputs of W divided by its column steps
    widths: Tensor  # (..., 1, N): an error of e column steps in column j adds (e / width_j)^2 to that of Wx


def column_guide(gram: Tensor, has_column_steps: bool) -> ColumnGuide:
    """Return the guide for inputs x with this sum of x x', (..., N, N)."""
    U = inverse_factor(gram)
    widths = U.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    if not has_column_steps:
        return ColumnGuide(None, U, widths)
    exponents = column_exponents(U)
    sizes = column_sizes(exponents)
    return ColumnGuide(exponents, inverse_factor(gram * sizes * sizes.mT), widths / sizes)


class Codes(NamedTuple):
    """A quantized tensor (..., M, N): code * scale, times 2^(exponent / 4) if its columns have steps.

    In the encoding trellis the code is shifted first, by trellis_shifts.
    """

    codes: Tensor  # int8 (..., M, N)
    scales: Tensor  # f16 (..., M, 1)
    exponents: Tensor | None = None  # int8 (..., 1, N)


def choose_scales(W: Tensor, encoding: Encoding, clips: list[Tensor], least: Tensor) -> Tensor:
    """Choose the scale of each row of W (..., M, N): float32 (..., M, 1), each of them an f16.

    It is a clip divided by the clip's code, but at least `least` (..., M, 1). Of the clips, each (..., M, 1),
    the one with the smallest squared error under rounding to nearest is taken.
    """
    clip_code = encoding.clip_code or encoding.limit
    least = least.clamp_min(MIN_SCALE)
    scales = [torch.maximum(clip / clip_code, least).half().float() for clip in clips]
    errors = [(nearest_codes(W, s, encoding.limit) * s - W).square().sum(-1, keepdim=True) for s in scales]
    winner = torch.stack(errors).argmin(0, keepdim=True)  # the first of equals
    return torch.stack(scales).gather(0, winner)[0]


def quantize(
    W: Tensor,
    encoding: str,
    least_step: float | Tensor = 0.0,
    guide: ColumnGuide | None = None,
    clip_sd: float = 0.0,
    round_columns: Callable = gptq,
) -> Codes:
    """Quantize each row of W (..., M, N) symmetrically. rms: the root mean square of a row.

    - Column steps: if the guide has them, they first divide W, so that all columns matter equally. Their
      geometric mean is 1, so the entropy stays as it was.
    - Clip of a row: clip_sd rms or, if clip_sd is 0, the best of CLIPS times the largest magnitude.
    - Scale, the step of a row: the clip divided by the clip's code, but at least least_step rms (a number, or
      (..., M, 1)).
    - Codes: the nearest ones or, with a guide, those of round_columns: gptq, or trellis_gptq if the encoding
      has shifts.
    """
    W = W.float()
    rms = W.square().mean(-1, keepdim=True).sqrt()
    exponents = None if guide is None else guide.exponents
    if exponents is not None:
        W = W / column_sizes(exponents)

    peak = W.abs().amax(-1, keepdim=True)
    clips = [clip_sd * rms] if clip_sd > 0 else [clip * peak for clip in CLIPS]
    scale = choose_scales(W, ENCODINGS[encoding], clips, least_step * rms)

    limit = ENCODINGS[encoding].limit
    if guide is None:
        codes = nearest_codes(W, scale, limit)
    else:
        codes = round_columns(W, scale, guide.U, limit)
    return Codes(codes.to(torch.int8), scale.half(), exponents)


class Calibration(NamedTuple):
    """What training text tells about rounding, by parameter. Any parameter may be missing."""

    grams: Mapping[str, Tensor] = {}  # the sum of x x' over a matrix's inputs x: float32 (matrices, N, N)
    sensitivities: Mapping[str, Tensor] = {}  # of the loss to each row's output: float32 (matrices, M, 1)


class RoundingGuide(NamedTuple):
    """What a calibration says about rounding these tensors at any int6_step, by parameter."""

    columns: Mapping[str, ColumnGuide] = {}
    row_factors: Mapping[str, Tensor] = {}  # on int6_step: (matrices, M, 1)


UNGUIDED = RoundingGuide()


def row_step_factors(
    tensors: Mapping[str, Tensor], columns: Mapping[str, ColumnGuide], sensitivities: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the factor on int6_step in each row, (matrices, M, 1) by parameter.

    A step s in a row adds about s^2 / 12 * sensitivity * the sum of 1 / width^2 over its columns to the loss.
    At a given entropy the total is smallest if every weight adds the same. Like int6_step, the factors are
    relative to the row's root mean square. Their geometric mean over all weights is 1 before they are
    limited.
    """
    importance = {}
    for name, sensitivity in sensitivities.items():
        W = tensors[name].float()
        per_step = sensitivity * columns[name].widths.square().reciprocal().mean(-1, keepdim=True)
        importance[name] = (per_step * W.square().mean(-1, keepdim=True)).clamp_min(1e-30).log()

    weights = sum(tensors[name].numel() for name in importance)
    total = sum(logs.sum() * tensors[name].size(-1) for name, logs in importance.items())
    return {
        name: (-0.5 * (logs - total / weights)).exp().clamp(1 / STEP_FACTOR_LIMIT, STEP_FACTOR_LIMIT)
        for name, logs in importance.items()
    }


def rounding_guide(tensors: Mapping[str, Tensor], h: Config, calibration: Calibration) -> RoundingGuide:
    """Do once what no int6_step changes: every Gram matrix is factorized here."""
    columns = {}
    for name, gram in calibration.grams.items():
        columns[name] = column_guide(gram, h.column_steps and STORED_AS[name] == "int6")
    return RoundingGuide(columns, row_step_factors(tensors, columns, calibration.sensitivities))


# -----------------------------------------------------------------------------
# 16. Trellis codes: a weight may lie half a step off its code, as the codes above it decide.
#
# The weights of a column are read from top to bottom. A state, which the codes above a weight decide, says
# whether the weight lies at its code or is shifted by half a step, up in even rows and down in odd ones. All
# weights together can lie on a finer grid than their codes, and a search finds the sequence of codes with the
# least squared error: Marcellin and Fischer, 1990. At equal entropy, the error of normal weights is 1.2 dB
# smaller with 256 states (measured; 1.0 dB with 8), and no code gains more than 1.53 dB.
#
# A state holds the last 8 bits of a shift register, the newest lowest. The next bit is the parity of the code
# plus the bits in FLIP_TAPS. The shift is the parity of the bits in SHIFT_TAPS. Both are Ungerboeck's code of
# 256 states (1987, part II, table I: h0 = 515, h1 = 362, octal).
TRELLIS_STATES = 256
# Of all tensors in trellis codes, which are decoded row after row: within seconds.
MAX_TRELLIS_ROWS = 1 << 14
MAX_TRELLIS_CODES = 1 << 26
SHIFT_TAPS = 0o362 >> 1
FLIP_TAPS = 0o515 >> 1


def tap_parity(states: np.ndarray, taps: int) -> np.ndarray:
    """Return the parity, 0 or 1, of the bits of each state that `taps` selects."""
    bits = states & taps
    return sum(bits >> k & 1 for k in range(8)) % 2


ALL_STATES = np.arange(TRELLIS_STATES)
IS_SHIFTED = tap_parity(ALL_STATES, SHIFT_TAPS).astype(np.float32)  # by state
NEWEST_BIT = tap_parity(ALL_STATES, FLIP_TAPS)[:, None] ^ np.array([0, 1])  # by state and a code's parity
NEXT_STATE = ((2 * ALL_STATES[:, None] + NEWEST_BIT) % TRELLIS_STATES).astype(np.uint8)

# Which weights may follow a state, by state and newest bit: 2 if they are shifted, plus the code's parity.
GRIDS = 2 * IS_SHIFTED[:, None].astype(np.int64) + NEWEST_BIT


@cache
def grids_on(device: torch.device) -> Tensor:
    """Return GRIDS on a device, int32: it is asked for once a column."""
    return torch.from_numpy(GRIDS.astype(np.int32)).to(device)


def half_steps(rows: int) -> Tensor:
    """Return what a shift adds to the codes of each row: (rows, 1)."""
    return 0.5 - (torch.arange(rows) % 2)[:, None]


def trellis_shifts(codes: np.ndarray) -> np.ndarray:
    """Return the shift of each code, 0 or half a step: int8 (..., M, N) -> float32, same shape."""
    shifts = np.empty(codes.shape, np.float32)
    parity = (codes & 1).view(np.uint8)
    state = np.zeros((*codes.shape[:-2], codes.shape[-1]), np.uint8)
    for row, half in enumerate(half_steps(codes.shape[-2]).flatten().tolist()):
        shifts[..., row, :] = half * IS_SHIFTED[state]
        state = NEXT_STATE[state, parity[..., row, :]]
    return shifts


def trellis_codes(multiples: Tensor) -> Tensor:
    """Return the codes of what trellis_multiples gave: (..., M, N)."""
    half = half_steps(multiples.size(-2)).to(multiples)
    return torch.where(multiples == multiples.floor(), multiples, multiples - half)


def nearest_on_grids(x: Tensor, half: Tensor, limit: int) -> Tensor:
    """Return the nearest weight to each x on each of four grids: (...) -> (..., 4). limit is odd."""
    parity = torch.tensor([0.0, 1.0, 0.0, 1.0], device=x.device)
    shift = torch.stack([torch.zeros_like(half), torch.zeros_like(half), half, half], -1)
    pairs = ((x[..., None] - shift - parity) / 2 + 0.5).floor()
    pairs = torch.minimum(torch.maximum(pairs, -(limit // 2) - parity), torch.full_like(parity, limit // 2))
    return 2 * pairs + parity + shift


def trellis_multiples(W: Tensor, scale: Tensor, limit: int) -> Tensor:
    """Round columns W (..., M, 1) to the multiples of `scale` (..., M, 1) that some sequence of codes gives.

    The squared error, in steps, is the smallest of all sequences (Viterbi's algorithm). Of two ways into a
    state that are equally good, the one from the smaller state is taken.
    """
    x = (W / scale).reshape(-1, W.size(-2))
    matrices, M = x.shape
    states = TRELLIS_STATES
    nearest = nearest_on_grids(x, half_steps(M).squeeze(-1).to(x), limit)
    errors = (nearest - x[..., None]).square()
    grids = grids_on(x.device)

    cost = torch.full((matrices, states), math.inf, device=x.device)  # of the best way into each state
    cost[:, 0] = 0
    from_upper = []  # whether that way comes from the upper half of the states
    for row in range(M):
        # State s and newest bit b lead to state (2 s + b) % states, as does s + states / 2.
        ways = (cost[..., None] + errors[:, row, grids]).view(matrices, 2, states // 2, 2)
        from_upper.append((ways[:, 1] < ways[:, 0]).flatten(1))
        cost = ways.amin(1).flatten(1)

    state = cost.argmin(1)
    multiples = torch.empty_like(x)
    matrix = torch.arange(matrices, device=x.device)
    for row in reversed(range(M)):
        before = state // 2 + from_upper[row][matrix, state] * (states // 2)
        multiples[:, row] = nearest[matrix, row, grids[before, state % 2]]
        state = before
    return multiples.view(W.shape)


@triton.jit
def nearest_on_grid(x, shift, parity, HALF_LIMIT: tl.constexpr):
    """Return the multiple of 2, plus parity and shift, that is nearest to x."""
    pairs = tl.floor((x - shift - parity) / 2 + 0.5)
    return 2 * tl.minimum(tl.maximum(pairs, -HALF_LIMIT - parity), HALF_LIMIT) + parity + shift


@triton.jit
def cost_on_grid(x, grid, half, HALF_LIMIT: tl.constexpr):
    """Return the squared error of x on its grid, a row of states at a time."""
    error = x - nearest_on_grid(x, tl.where(grid >= 2, half, 0.0), (grid % 2).to(tl.float32), HALF_LIMIT)
    return error * error


@triton.jit
def trellis_kernel(
    x_ptr, grids_ptr, from_upper_ptr, out_ptr, M, STATES: tl.constexpr, HALF_LIMIT: tl.constexpr
):
    """Do trellis_multiples for one column of M values. from_upper (M, STATES) is scratch memory."""
    matrix = tl.program_id(0).to(tl.int64)
    x_ptr += matrix * M
    out_ptr += matrix * M
    from_upper_ptr += matrix * M * STATES
    HALF: tl.constexpr = STATES // 2
    n = tl.arange(0, HALF)
    state = tl.arange(0, STATES)
    lower_0 = tl.load(grids_ptr + 2 * n)
    lower_1 = tl.load(grids_ptr + 2 * n + 1)
    upper_0 = tl.load(grids_ptr + STATES + 2 * n)
    upper_1 = tl.load(grids_ptr + STATES + 2 * n + 1)

    cost = tl.where(state == 0, 0.0, float("inf"))
    for row in range(M):
        x = tl.load(x_ptr + row)
        half = 0.5 - row % 2
        lower, upper = tl.split(tl.trans(tl.reshape(cost, (2, HALF))))
        by_lower_0 = lower + cost_on_grid(x, lower_0, half, HALF_LIMIT)
        by_lower_1 = lower + cost_on_grid(x, lower_1, half, HALF_LIMIT)
        by_upper_0 = upper + cost_on_grid(x, upper_0, half, HALF_LIMIT)
        by_upper_1 = upper + cost_on_grid(x, upper_1, half, HALF_LIMIT)
        chosen = tl.join((by_upper_0 < by_lower_0).to(tl.int8), (by_upper_1 < by_lower_1).to(tl.int8))
        tl.store(from_upper_ptr + row * STATES + state, tl.reshape(chosen, (STATES,)))
        best = tl.join(tl.minimum(by_lower_0, by_upper_0), tl.minimum(by_lower_1, by_upper_1))
        cost = tl.reshape(best, (STATES,))

    tl.debug_barrier()
    at = tl.argmin(cost, 0)
    for i in range(M):
        row = M - 1 - i
        before = at // 2 + tl.load(from_upper_ptr + row * STATES + at).to(tl.int32) * HALF
        grid = tl.load(grids_ptr + 2 * before + at % 2)
        shift = tl.where(grid >= 2, 0.5 - row % 2, 0.0)
        x = tl.load(x_ptr + row)
        tl.store(out_ptr + row, nearest_on_grid(x, shift, (grid % 2).to(tl.float32), HALF_LIMIT))
        at = before


def trellis_multiples_fused(W: Tensor, scale: Tensor, limit: int) -> Tensor:
    """Do what trellis_multiples does by one kernel, a program per column."""
    x = (W / scale).contiguous()
    M = x.size(-2)
    matrices = x.numel() // M
    grids = grids_on(x.device)
    from_upper = torch.empty(matrices, M, TRELLIS_STATES, dtype=torch.int8, device=x.device)
    out = torch.empty_like(x)
    trellis_kernel[(matrices,)](
        x_ptr=x, grids_ptr=grids, from_upper_ptr=from_upper, out_ptr=out, M=M,
        STATES=TRELLIS_STATES, HALF_LIMIT=limit // 2, num_warps=1,
    )  # fmt: skip
    return out


def trellis_fault(device: torch.device) -> str | None:
    """Return what is wrong with trellis_multiples_fused on this device, or None."""
    W = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(0)).to(device)
    scale = torch.full_like(W, 0.5)
    found = trellis_multiples_fused(W, scale, 127)
    codes = trellis_codes(found).to(torch.int8).cpu().numpy()
    if not (found.cpu().numpy() == codes + trellis_shifts(codes)).all():
        return "unreadable"

    exact = trellis_multiples(W, scale, 127)
    error, least = ((W - multiples * scale).square().sum().item() for multiples in (found, exact))
    return None if error <= 1.001 * least else f"error_{error:.4f}_for_{least:.4f}"


@cache
def bind_trellis(device: torch.device) -> Bound:
    """Bind the fused trellis_multiples if it is on a GPU and as good as the reference."""
    if device.type != "cuda":
        return Bound(trellis_multiples, "torch")
    return bind_unless(partial(trellis_fault, device), trellis_multiples_fused, trellis_multiples)


def trellis_gptq(W: Tensor, scale: Tensor, U: Tensor, limit: int) -> Tensor:
    """Do gptq with trellis codes. Returns the codes, from which trellis_shifts gives the shifts."""
    return trellis_codes(gptq(W, scale, U, limit, bind_trellis(W.device).function))


# -----------------------------------------------------------------------------
# 17. Artifact: byte layout, the fit to the cap, reading, packed source. No pickle anywhere.
#
#   artifact := raw, compressed by a row of CODECS; the first bytes tell which row
#   raw      := MAGIC "GPT6" | u32 header_bytes | header | payload                little-endian throughout
#   header   := compact sorted JSON {"config": {...}, "tensors": [[name, encoding, shape, offset], ...]}
#   payload  := the tensors in the order of their names, each by its encoding:
#   int6     := one int8 code per weight in [-31, 31], row-major, then one f16 scale per row; w = code * scale
#   int7, int8 := the same with codes in [-63, 63], [-127, 127]       f16, f32 := the values
#   columns := like int8, then one int8 e per column of each matrix; w = code * scale * 2^(e / 4)
#   trellis := like columns, with w = (code + shift) * scale * 2^(e / 4) and the shifts of trellis_shifts
# An int6 code takes a whole byte on purpose: xz models bytes better than packed bits (6.5 % less, measured).

MAGIC = b"GPT6"
MAX_RAW_BYTES = 1 << 28  # raw bytes in a file of up to 64 MiB
MAX_RAW_RATIO = 4  # raw bytes per byte of a larger file; codes pack to between 1/2 and 3/4
MAX_WEIGHTS = 1 << 30
MAX_HEADER_BYTES = 1 << 16


def largest_value(encoding: str) -> float:
    """Return the largest weight that an encoding can hold. With codes, the f16 scale sets the limit."""
    stored = ENCODINGS[encoding]
    if stored.limit:
        return stored.limit * float(np.finfo(np.float16).max)
    return float(np.finfo(stored.dtype).max)


def header_fields(learns: bool, extra: list[str]) -> list[str]:
    """Return the knobs in the header of an artifact. learns: whether test-time training scores it."""
    return [*STORED_KNOBS, *(LEARNING_KNOBS if learns else ()), *extra]


class TensorEntry(NamedTuple):
    """An entry of the header's list of tensors, and the sizes that follow from it."""

    name: str
    encoding: str  # row of ENCODINGS
    shape: list[int]
    offset: int

    @property
    def limit(self) -> int:
        """The largest code; 0: values are stored without codes."""
        return ENCODINGS[self.encoding].limit

    @property
    def count(self) -> int:
        """Values of the tensor."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> list[int]:
        """Rows and columns of each matrix."""
        return [1, *self.shape][-2:]

    @property
    def scales(self) -> int:
        """Scales of rows, two bytes each."""
        return self.count // self.shape[-1] if self.limit else 0

    @property
    def exponents(self) -> int:
        """Exponents of column steps, a byte each."""
        has_column_steps = ENCODINGS[self.encoding].has_column_steps
        return math.prod(self.shape[:-2]) * self.shape[-1] if has_column_steps else 0


def encoding_of(stored_as: str, h: Config, has_column_steps: bool = False) -> str:
    """Return the row of ENCODINGS that holds a parameter. stored_as: as its ParamSpec has it."""
    if has_column_steps:
        return "trellis" if h.trellis else "columns"
    return f"int{h.embed_bits}" if stored_as == "embed" else stored_as


def relations_of_codes(h: Config) -> Iterator[Relation]:
    """Yield the relations of the artifact's codes."""
    yield Relation(6 <= h.embed_bits <= 8, f"embed_bits={h.embed_bits} must be 6, 7 or 8")
    yield Relation(
        h.matrix_clip_sd <= 31,
        f"matrix_clip_sd={h.matrix_clip_sd:g} must be at most 31, a step of one root mean square",
    )
    largest = ENCODINGS[encoding_of("embed", h)].limit
    yield Relation(
        h.embed_clip_sd <= largest,
        f"embed_clip_sd={h.embed_clip_sd:g} must be at most {largest}, a step of one root mean square",
    )
    for key in ("gptq_embed", "column_steps", "row_steps"):
        yield Relation(
            h.gptq_batches > 0 or not getattr(h, key), f"{key}=1 needs gptq_batches of at least 1, not 0"
        )
    yield Relation(h.column_steps or not h.trellis, "trellis=1 needs column_steps=1")


def raw_artifact(tensors: Mapping[str, Tensor], h: Config, guide: RoundingGuide = UNGUIDED) -> bytes:
    """Return the artifact before compression. tensors: the weights by parameter name.

    Raises Fault for a tensor with values that are not finite or too large for its encoding.
    """
    clips_sd = {"int6": h.matrix_clip_sd, "embed": h.embed_clip_sd}  # by ParamSpec.stored_as
    entries = []
    payload = []
    offset = 0
    for name in sorted(tensors):
        stored_as = STORED_AS[name]
        columns = guide.columns.get(name)
        encoding = encoding_of(stored_as, h, columns is not None and columns.exponents is not None)
        W = tensors[name].detach()
        entries.append(TensorEntry(name, encoding, list(W.shape), offset))
        if ENCODINGS[encoding].limit:
            least_step = h.int6_step * guide.row_factors.get(name, 1.0) if stored_as == "int6" else 0.0
            clip_sd = clips_sd.get(stored_as, 0.0)
            round_columns = trellis_gptq if ENCODINGS[encoding].has_shifts else gptq
            quantized = quantize(W, encoding, least_step, columns, clip_sd, round_columns=round_columns)
            arrays = [quantized.codes.cpu().numpy(), quantized.scales.cpu().numpy().astype("<f2")]
            if quantized.exponents is not None:
                arrays.append(quantized.exponents.cpu().numpy())
            floats = arrays[1]
        else:
            with np.errstate(over="ignore"):  # refused below
                floats = W.float().cpu().numpy().astype(ENCODINGS[encoding].dtype)
            arrays = [floats]
        if not np.isfinite(floats).all():
            raise Fault(
                f"artifact: tensor {name} has weights up to {W.abs().max():.3g}, and {encoding} holds at "
                f"most {largest_value(encoding):.3g}; train with lower rates or more weight decay"
            )
        for array in arrays:
            payload.append(array.tobytes())
            offset += array.nbytes

    extra = [key for key in CHANGED_KNOBS if getattr(h, key) != getattr(Config, key)]
    config = {key: getattr(h, key) for key in header_fields(h.ttt_lr > 0, extra)}
    header = {"config": config, "tensors": entries}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return b"".join([MAGIC, len(text).to_bytes(4, "little"), text, *payload])


def pack_artifact(tensors: Mapping[str, Tensor], h: Config, calibration: Calibration | None = None) -> bytes:
    """Quantize and compress. The same tensors and calibration give the same bytes."""
    guide = rounding_guide(tensors, h, calibration or Calibration())
    return CODECS[h.codec].pack(raw_artifact(tensors, h, guide))


# For fit_artifact. Steps are multiples of the row's root mean square, as in int6_step.
ATTEMPTS = 9  # at most, to fill the room
FILLED = 0.998  # attempts end once an artifact takes this fraction of the room
AIM = 0.999  # the fraction that a guess aims at, in the middle between FILLED and 1
FIRST_GUESS = 0.1  # a guess multiplies at least this step: a configured step of 0 would stay 0
MIN_GUESS = 0.01  # the smallest step that a guess may give


class Fitted(NamedTuple):
    """An artifact and its int6 step."""

    blob: bytes
    int6_step: float


def fit_artifact(
    tensors: Mapping[str, Tensor],
    h: Config,
    room: int,
    time_phase: Callable,
    calibration: Calibration | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Fitted:
    """Make an artifact of at most `room` bytes. time_phase(phase, fn, *args) calls fn.

    If the artifact does not fit as configured, up to eight more attempts look for the int6 step that fills
    the room; before each of them, tell(attempts done, ATTEMPTS) is called. Each guess assumes that doubling
    the step saves one bit per code. The step never exceeds 1. If fit_cap is off, or no attempt fits, the
    result may exceed the room.
    """
    pack = CODECS[h.codec].pack
    guide = time_phase("quantize", rounding_guide, tensors, h, calibration or Calibration())
    codes = sum(t.numel() for name, t in tensors.items() if STORED_AS[name] == "int6")
    clip_step = h.matrix_clip_sd / ENCODINGS["int6"].limit
    configured = max(h.int6_step, clip_step)  # the clip's own step is a lower bound as well
    step = configured
    best = None

    for attempt in range(ATTEMPTS):
        raw = time_phase("quantize", raw_artifact, tensors, replace(h, int6_step=step), guide)
        tried = Fitted(time_phase("compress", pack, raw), step)
        size = len(tried.blob)
        if size <= room and (best is None or size > len(best.blob)):
            best = tried

        fits_as_configured = attempt == 0 and best is not None
        fills_the_room = FILLED * room <= size <= room
        coarsest = step == 1.0
        if not h.fit_cap or fits_as_configured or fills_the_room or coarsest:
            break
        tell(attempt + 1, ATTEMPTS)
        step = max(step, FIRST_GUESS) * 2 ** (8 * (size - AIM * room) / codes)
        step = min(max(step, configured, MIN_GUESS), 1.0)
    return best or tried


def types_of(value: object) -> dict | None:
    """Return the type of every value of a dict; None for anything else."""
    return {key: type(v) for key, v in value.items()} if type(value) is dict else None


def check_header(header: object) -> None:
    """Check a header for the keys and types that raw_artifact writes. Raises ValueError if they differ."""
    if types_of(header) != {"config": dict, "tensors": list}:
        raise ValueError("it must be an object with a config and a list of tensors")
    extra = [key for key in CHANGED_KNOBS if key in header["config"]]
    known = header_fields("ttt_lr" in header["config"], extra)
    wanted = {key: type(getattr(Config, key)) for key in known}
    if different := types_of(header["config"]).items() ^ wanted.items():
        name = min(key for key, _ in different)
        raise ValueError(
            f"config key {name[:40]!r} is missing, unknown or of another type; use the script that wrote it"
        )


def read_header(raw: bytes) -> tuple[dict, int]:
    """Return the header at the start of raw, and where it ends. Raises ValueError if it is not valid."""
    end = 8 + int.from_bytes(raw[4:8], "little")
    if raw[:4] != MAGIC:
        raise ValueError(f"artifact: magic is not {MAGIC!r}")
    if end > min(len(raw), MAX_HEADER_BYTES):
        raise ValueError("artifact: header is longer than the file or MAX_HEADER_BYTES")
    try:
        header = json.loads(raw[8:end])
        check_header(header)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"artifact: header is not valid ({e})") from None
    return header, end


def read_entry(row: object) -> TensorEntry:
    """Check one entry of the header's list of tensors. Raises ValueError if it is malformed."""
    if type(row) is list and [type(x) for x in row] == [str, str, list, int] and row[1] in ENCODINGS:
        entry = TensorEntry(*row)
        sizes_fit = all(type(n) is int and 0 < n < 1 << 28 for n in entry.shape)
        if 0 < len(entry.shape) <= 8 and sizes_fit:
            return entry
    raise ValueError(f"artifact: bad tensor entry {str(row)[:80]}; expected [name, encoding, shape, offset]")


class OpenedArtifact(NamedTuple):
    """The two parts of a raw artifact."""

    header: dict
    payload: bytes


def open_artifact(blob: bytes) -> OpenedArtifact:
    """Decompress an artifact and read its header. Raises ValueError for bytes that are no sound artifact."""
    raw = CODECS[codec_of(blob)].unpack(blob)
    header, end = read_header(raw)
    return OpenedArtifact(header, raw[end:])


def read_tensors(header: dict, payload: bytes) -> dict[str, Tensor]:
    """Return float32 tensors by name, of an artifact or a checkpoint. Raises ValueError for a bad payload."""
    out = {}
    expected = 0
    trellis_rows = 0
    trellis_count = 0
    for row in header["tensors"]:
        entry = read_entry(row)
        name = entry.name
        shape = entry.shape
        dtype = ENCODINGS[entry.encoding].dtype
        scales_at = entry.offset + entry.count * dtype.itemsize
        exponents_at = scales_at + 2 * entry.scales
        end = exponents_at + entry.exponents
        if entry.offset != expected or name in out or end > len(payload):
            raise ValueError(f"artifact: tensor {name[:40]!r} is out of order, repeated or past the end")
        expected = end

        values = np.frombuffer(payload, dtype, entry.count, entry.offset)
        tensor = torch.from_numpy(values.astype(np.float32)).view(shape)
        if entry.limit:
            if max(int(values.max()), -int(values.min())) > entry.limit:
                raise ValueError(f"artifact: tensor {name[:40]!r} has a code beyond {entry.limit}")
            if ENCODINGS[entry.encoding].has_shifts:
                matrices = values.reshape(-1, *entry.matrix)
                trellis_rows += matrices.shape[1]
                trellis_count += entry.count
                if trellis_rows > MAX_TRELLIS_ROWS or trellis_count > MAX_TRELLIS_CODES:
                    most = f"{MAX_TRELLIS_ROWS} rows or {MAX_TRELLIS_CODES}"
                    raise ValueError(f"artifact: more than {most} trellis codes")
                tensor += torch.from_numpy(trellis_shifts(matrices)).view(shape)
            scales = np.frombuffer(payload, "<f2", entry.scales, scales_at).astype(np.float32)
            tensor *= torch.from_numpy(scales).view(*shape[:-1], 1)
        if entry.exponents:
            exponents = np.frombuffer(payload, np.int8, entry.exponents, exponents_at)
            tensor *= column_sizes(torch.from_numpy(exponents.copy())).view(*shape[:-2], 1, shape[-1])
        floats = scales if entry.limit else values  # a code times a finite scale is finite
        if not np.isfinite(floats).all():
            raise ValueError(f"artifact: tensor {name[:40]!r} has values that are not finite")
        out[name] = tensor
    if expected != len(payload):
        raise ValueError("artifact: bytes after the last tensor")
    return out


def unpack_artifact(blob: bytes) -> dict[str, Tensor]:
    """Return float32 tensors by name. Raises ValueError for a blob that is not well-formed.

    Names and shapes are not checked. No blob can make this run code from the blob. The memory taken is at
    most a few times MAX_RAW_BYTES, or MAX_RAW_RATIO times the blob, and the float32 values.
    """
    opened = open_artifact(blob)
    return read_tensors(opened.header, opened.payload)


def without_annotations(source: str) -> str:
    """Return the source without the annotations of its functions, except constexpr, which Triton reads."""
    text = source.encode()  # syntax nodes count columns in bytes
    line_starts = [0, *accumulate(map(len, text.splitlines(keepends=True)))]

    def place(row: int, column: int) -> int:
        return line_starts[row - 1] + column

    spans = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg) and node.annotation:
            start = place(node.lineno, node.col_offset) + len(node.arg.encode())
            spans.append((start, place(node.annotation.end_lineno, node.annotation.end_col_offset)))
        elif isinstance(node, ast.FunctionDef) and node.returns:
            start = text.rindex(b" ->", 0, place(node.returns.lineno, node.returns.col_offset))
            spans.append((start, place(node.returns.end_lineno, node.returns.end_col_offset)))
    for start, end in sorted(spans, reverse=True):
        if b"constexpr" not in text[start:end]:
            text = text[:start] + text[end:]
    return text.decode()


def bare_code(source: str) -> str:
    """Return the source without comments, blank lines, and the docstrings and annotations of functions.

    Classes lose their docstrings too; a module keeps its own. What remains is the source's own text, so every
    Python version gives the same bytes.
    """
    lines = source.split("\n")
    inside_strings = set()  # lines whose blanks and ends belong to a string
    starts = []  # rows of the f-strings that are open
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        token_type = tokenize.tok_name[token.type]
        if token_type == "COMMENT":
            lines[row - 1] = lines[row - 1][:column].rstrip()
        elif token_type == "STRING":
            inside_strings.update(range(row, token.end[0] + 1))
        elif token_type == "FSTRING_START":
            starts.append(row)
        elif token_type == "FSTRING_END":
            inside_strings.update(range(starts.pop(), row + 1))

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1] = " " * text.col_offset + ("pass" if len(node.body) == 1 else "")
            for row in range(text.lineno + 1, text.end_lineno + 1):
                lines[row - 1] = ""
            inside_strings.difference_update(range(text.lineno, text.end_lineno + 1))
    kept = [line for row, line in enumerate(lines, 1) if line.strip() or row in inside_strings]
    return without_annotations("\n".join(kept) + "\n")


ESCAPED = str.maketrans({"\0": r"\0", "\r": r"\r", "\\": r"\\"})


def long_literal(data: bytes) -> str:
    """Return bytes as the inside of a Python literal in three double quotes. They must not end with a quote.

    LZMA2 ends with a zero.
    """
    text = data.decode("latin-1")
    text = re.sub("\0(?=[0-7])", "\0" + "00", text)  # \0 before a digit would be another octal number
    return text.translate(ESCAPED).replace('"""', r'""\"')


def packed_code(source: str) -> bytes:
    """Return the source as a program that unpacks and runs itself: the bytes counted as code.

    What bare_code leaves out does not count. The program is a file in Latin-1, where a literal takes one byte
    for a byte; base 85 takes 1.25. Triton compiles kernels from their text, so the program puts the text
    where inspect looks for source. The same source gives the same bytes.
    """
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "pb": 0}]  # bytes of text have no alignment
    raw = lzma.compress(bare_code(source).encode(), format=lzma.FORMAT_RAW, filters=filters)
    program = (
        "# coding: latin-1\nimport lzma as L,linecache as C\n"
        f's=L.decompress("""{long_literal(raw)}""".encode("latin-1"),'
        "format=L.FORMAT_RAW,filters=[{'id':L.FILTER_LZMA2,'preset':9}]).decode()\n"
        "C.cache['<packed>']=len(s),None,s.splitlines(True),'<packed>'\n"
        "exec(compile(s,'<packed>','exec'))\n"
    )
    return program.encode("latin-1")


def own_source() -> str:
    """Return the text of this program, unpacked if it runs packed."""
    return "".join(linecache.getlines("<packed>")) or Path(__file__).read_text(encoding="utf-8")


# -----------------------------------------------------------------------------
# 18. Codecs: xz, and rans, an entropy coder that models how large the codes of each row and column are.

# Codes hardly ever repeat, so the smallest dictionary saves 1.8 % of the bytes and 90 % of the time. No
# other option gains 0.05 %.
XZ = dict(
    format=lzma.FORMAT_XZ,
    check=lzma.CHECK_CRC32,
    filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 4096}],
)
pack_xz = partial(lzma.compress, **XZ)


def unpack_xz(blob: bytes) -> bytes:
    """Return the content of one xz stream. Raises ValueError for anything else.

    The content has at most MAX_RAW_BYTES or, if this is more, MAX_RAW_RATIO times the bytes of the stream.
    """
    reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_RAW_BYTES)
    try:
        raw = reader.decompress(blob, max_length=max(MAX_RAW_BYTES, MAX_RAW_RATIO * len(blob)))
    except lzma.LZMAError as e:
        raise ValueError(f"artifact: damaged xz stream ({e})") from None
    if not reader.eof:
        raise ValueError("artifact: truncated, or larger than any model of this format")
    if reader.unused_data:
        raise ValueError("artifact: bytes after the end of the xz stream")
    return raw


# Codec rans: asymmetric numeral systems (Duda, arXiv:1311.2540) for the codes of tensors, xz for the rest.
#
#   rans     := "GPT6rans" | u32 crc32 of the rest | u32 side_bytes | xz(side) | u16 words
#   side     := MAGIC | u32 header_bytes | header | then for each tensor, if it has codes,
#                 u8 class of each row | u8 class of each column of each matrix | u16 tables | scales
#                 | exponents of column steps, if there are any
#               else its values; numbers of several bytes are stored as planes, highest bytes first
#   tables   := per context half the frequencies of 0, then the frequencies of 1 and -1, of 2 and -2, ...
#   words    := the states at the start of decoding, 3 words each, highest first; then the words taken in
#
# A code's context is the class of its row + the class of its column. A class says how large the codes of the
# row or column are, in quarter octaves around MEAN_CLASS, the mean of the tensor. With S states, state i
# codes the i-th of every S codes, so numpy codes S at a time. All decisions use whole numbers, so all
# machines write the same bytes.

RANS_MAGIC = b"GPT6rans"
FREQUENCY_BITS = 14  # frequencies of a context sum to 2^FREQUENCY_BITS
TABLE_SUM = 1 << (FREQUENCY_BITS - 1)  # of a context's row of CodeModel.tables
SLOT_MASK = (1 << FREQUENCY_BITS) - 1  # the bits of a state that choose a code
MIN_STATE = 1 << 32  # a state lies in [2^32, 2^48) and takes in 16 bits at a time
MEAN_CLASS = 8  # of the mean magnitude; there are as many classes below as above
CLASS_EDGES = np.array([round(4096 * 2 ** ((k + 0.5 - MEAN_CLASS) / 4)) for k in range(2 * MEAN_CLASS)])
CLASS_WEIGHTS = np.array([round(4096 * 2 ** ((MEAN_CLASS - k) / 4)) for k in range(2 * MEAN_CLASS + 1)])
CONTEXTS = 2 * len(CLASS_EDGES) + 1
MAX_RANS_TENSORS = 256
MAX_RANS_CODES = 1 << 26  # decoded in seconds


class CodeModel(NamedTuple):
    """The model of a tensor's codes (m, R, N): classes of rows (m, R) and columns (m, N), and tables."""

    rows: np.ndarray
    columns: np.ndarray
    tables: np.ndarray  # (CONTEXTS, limit + 1) int64; each row sums to TABLE_SUM

    @property
    def contexts(self) -> np.ndarray:
        """The context of each code, uint8 (m * R * N,)."""
        return (self.rows[:, :, None] + self.columns[:, None, :]).ravel()

    @property
    def frequencies(self) -> np.ndarray:
        """The frequencies of the codes -limit ... limit, int64 (CONTEXTS, 2 limit + 1)."""
        positive = self.tables[:, 1:]  # a code and its negative share the table's entry for their magnitude
        negative = positive[:, ::-1]
        zero = 2 * self.tables[:, :1]
        return np.concatenate([negative, zero, positive], axis=1)

    @property
    def starts(self) -> np.ndarray:
        """For each code, the sum of the frequencies of all codes before it, in the same shape."""
        return self.frequencies.cumsum(1) - self.frequencies


def classes_of(sums: np.ndarray) -> np.ndarray:
    """Return the class of each sum of magnitudes, by its ratio to their mean. int64 -> uint8, same shape."""
    mean = max(int(sums.sum()) // sums.size, 1)
    return np.searchsorted(CLASS_EDGES, 4096 * sums // mean, side="right").astype(np.uint8)


def log2_of(numbers: np.ndarray | int) -> np.ndarray:
    """Return the logarithms of whole numbers (0 for 0) in 65,536ths, themselves whole."""
    return np.rint(65536 * np.log2(np.maximum(numbers, 1))).astype(np.int64)


def count_magnitudes(contexts: np.ndarray, magnitudes: np.ndarray, limit: int) -> np.ndarray:
    """Count codes, whose contexts and magnitudes have one shape, by both: int64 (CONTEXTS, limit + 1)."""
    index = contexts.astype(np.int32) * (limit + 1) + magnitudes
    return np.bincount(index.ravel(), minlength=CONTEXTS * (limit + 1)).reshape(CONTEXTS, limit + 1)


def tables_for(counts: np.ndarray) -> np.ndarray:
    """Return a CodeModel's tables for counts of magnitudes. No magnitude that occurs gets frequency 0."""
    totals = np.maximum(counts.sum(1), 1)
    ends = counts.cumsum(1) * TABLE_SUM // totals[:, None]
    tables = np.diff(ends, prepend=0)
    tables[(tables == 0) & (counts > 0)] = 1
    largest = (np.arange(CONTEXTS), tables.argmax(1))  # entry 0 in a context without codes
    tables[largest] += TABLE_SUM - tables.sum(1)
    return tables


def code_bits(counts: np.ndarray, tables: np.ndarray) -> int:
    """Return the bits of codes and tables, in 65,536ths. An entry of a table counts as ten bits."""
    of_codes = counts * ((FREQUENCY_BITS << 16) - log2_of(tables))
    return int(of_codes.sum()) + (10 << 16) * np.count_nonzero(counts)


def class_bits(classes: np.ndarray) -> int:
    """Return the order-0 entropy of classes, in 65,536ths of a bit."""
    counts = np.bincount(classes.ravel())
    return int(classes.size * log2_of(classes.size) - (counts * log2_of(counts)).sum())


def row_classes(magnitudes: np.ndarray) -> np.ndarray:
    """Return the class of each row by the mean magnitude of its codes. (m, R, N) -> uint8 (m, R)."""
    return classes_of(magnitudes.sum(2, dtype=np.int64))


def column_classes(magnitudes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the class of each column, uint8 (m, N), after scaling rows of every class to one size."""
    return classes_of(np.stack([CLASS_WEIGHTS[row] @ matrix for row, matrix in zip(rows, magnitudes)]))


class Candidate(NamedTuple):
    """A CodeModel that may be chosen, and the bits that codes and model would then take, in 65,536ths."""

    bits: int
    model: CodeModel


def model_codes(codes: np.ndarray, limit: int) -> CodeModel:
    """Return the CodeModel of codes (m, R, N) that needs the fewest bits.

    The model has classes for rows, for columns, for both or for neither; without them, all are MEAN_CLASS.
    """
    magnitudes = np.abs(codes.astype(np.int16))
    rows = row_classes(magnitudes)
    columns = column_classes(magnitudes, rows)

    candidates = []
    for tried_rows in (np.full_like(rows, MEAN_CLASS), rows):
        for tried_columns in (np.full_like(columns, MEAN_CLASS), columns):
            contexts = tried_rows[:, :, None] + tried_columns[:, None, :]
            counts = count_magnitudes(contexts, magnitudes, limit)
            model = CodeModel(tried_rows, tried_columns, tables_for(counts))
            bits = code_bits(counts, model.tables) + class_bits(tried_rows) + class_bits(tried_columns)
            candidates.append(Candidate(bits, model))
    return min(candidates, key=lambda candidate: candidate.bits).model


def states_for(codes: int) -> int:
    """Return how many states code this many codes; each costs six bytes."""
    return min(max(codes >> 13, 16), 1024)


def rans_encode(models: list[CodeModel], tensors: list[np.ndarray]) -> np.ndarray:
    """Return the words of the tensors' codes, each a flat int8 array coded by its model.

    Interleaved rANS: code i goes to state i modulo the number of states. A state that would exceed 48 bits
    first gives its lowest 16 to the words. Codes go in from the last to the first: a state is a stack.
    """
    states = np.full(states_for(sum(map(len, tensors))), MIN_STATE)
    step = len(states)
    words = []
    for model, codes in zip(reversed(models), reversed(tensors)):
        frequencies = model.frequencies.ravel()
        starts = model.starts.ravel()
        width = len(starts) // CONTEXTS
        index = model.contexts * np.int32(width) + codes + np.int32(width // 2)
        for start in reversed(range(0, len(codes), step)):
            i = index[start : start + step]
            f = frequencies[i]
            x = states[: len(i)]
            full = x >= f << (48 - FREQUENCY_BITS)
            words.append(x[full] & 0xFFFF)
            x[full] >>= 16
            quotient = x // f
            remainder = x - quotient * f
            x[:] = (quotient << FREQUENCY_BITS) + starts[i] + remainder
    first = np.stack([states >> 32, states >> 16 & 0xFFFF, states & 0xFFFF], axis=1)
    return np.concatenate([first.ravel(), *reversed(words)]).astype("<u2")


def rans_decode(words: np.ndarray, models: list[CodeModel], counts: list[int]) -> list[np.ndarray]:
    """Return each tensor's codes, flat int8. Raises ValueError unless rans_encode wrote the words."""
    step = states_for(sum(counts))
    taken = 3 * step
    if len(words) < taken:
        raise ValueError("artifact: truncated before the first code")
    words = words.astype(np.int64)
    states = words[:taken].reshape(step, 3) @ np.array([1 << 32, 1 << 16, 1])
    tensors = []
    for model, count in zip(models, counts):
        contexts = model.contexts
        frequencies = model.frequencies.ravel()
        starts = model.starts.ravel()
        width = len(starts) // CONTEXTS
        index_at = np.repeat(np.arange(len(frequencies)), frequencies)
        index = np.empty(count, np.int16)
        for start in range(0, count, step):
            context = contexts[start : start + step]
            x = states[: len(context)]
            slot = x & SLOT_MASK
            i = index_at[np.left_shift(context, FREQUENCY_BITS, dtype=np.int64) | slot]
            index[start : start + step] = i
            x[:] = frequencies[i] * (x >> FREQUENCY_BITS) + slot - starts[i]
            low = np.flatnonzero(x < MIN_STATE)
            taken += len(low)
            if taken > len(words):
                raise ValueError("artifact: truncated before the last code")
            x[low] = x[low] << 16 | words[taken - len(low) : taken]
        tensors.append((index - contexts * np.int16(width) - width // 2).astype(np.int8))
    if taken != len(words) or (states != MIN_STATE).any():
        raise ValueError("artifact: the words do not end with the last code")
    return tensors


def to_planes(values: bytes | np.ndarray, size: int) -> bytes:
    """Return little-endian values of `size` bytes as planes, their highest bytes first."""
    return np.frombuffer(values, np.uint8).reshape(-1, size)[:, ::-1].T.tobytes()


def from_planes(planes: bytes, size: int) -> bytes:
    """Undo to_planes."""
    return np.frombuffer(planes, np.uint8).reshape(size, -1)[::-1].T.tobytes()


def pack_rans(raw: bytes) -> bytes:
    """Return a raw artifact, whose codes are within their limits, as codec rans writes it."""
    header, at = read_header(raw)
    side = [raw[:at]]
    models = []
    tensors = []
    for entry in map(read_entry, header["tensors"]):
        plain = entry.count  # numbers stored as planes: all of a tensor without codes, else its scales
        size = ENCODINGS[entry.encoding].dtype.itemsize
        if entry.limit:
            codes = np.frombuffer(raw, np.int8, entry.count, at)
            model = model_codes(codes.reshape(-1, *entry.matrix), entry.limit)
            models.append(model)
            tensors.append(codes)
            side += [model.rows.tobytes(), model.columns.tobytes(), to_planes(model.tables.astype("<u2"), 2)]
            at += entry.count
            plain = entry.scales
            size = 2
        side.append(to_planes(raw[at : at + plain * size], size))
        at += plain * size
        side.append(raw[at : at + entry.exponents])
        at += entry.exponents
    packed = pack_xz(b"".join(side))
    rest = b"".join([len(packed).to_bytes(4, "little"), packed, rans_encode(models, tensors)])
    return RANS_MAGIC + zlib.crc32(rest).to_bytes(4, "little") + rest


class SideReader:
    """Takes parts, one after the other, from the side of a rans artifact."""

    def __init__(self, side: bytes, at: int) -> None:
        self.side = side
        self.at = at

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises ValueError if there are fewer."""
        part = self.side[self.at : self.at + size]
        self.at += size
        if len(part) < size:
            raise ValueError("artifact: a tensor is past the end of the side")
        return part

    def model(self, entry: TensorEntry) -> CodeModel:
        """Read a CodeModel. Raises ValueError if its classes or tables are impossible."""
        rows, columns = entry.matrix
        matrices = entry.count // (rows * columns)
        of_rows = np.frombuffer(self.take(matrices * rows), np.uint8).reshape(matrices, rows)
        of_columns = np.frombuffer(self.take(matrices * columns), np.uint8).reshape(matrices, columns)
        if max(of_rows.max(), of_columns.max()) > len(CLASS_EDGES):
            raise ValueError(f"artifact: tensor {entry.name[:40]!r} has a class beyond {len(CLASS_EDGES)}")
        planes = self.take(2 * CONTEXTS * (entry.limit + 1))
        tables = np.frombuffer(from_planes(planes, 2), "<u2").reshape(CONTEXTS, -1).astype(np.int64)
        if (tables.sum(1) != TABLE_SUM).any():
            raise ValueError(f"artifact: tensor {entry.name[:40]!r} has a table with a wrong sum")
        return CodeModel(of_rows, of_columns, tables)


def unpack_rans(blob: bytes) -> bytes:
    """Undo pack_rans: return the raw artifact. Raises ValueError for bytes that pack_rans did not write."""
    if zlib.crc32(blob[12:]) != int.from_bytes(blob[8:12], "little"):
        raise ValueError("artifact: damaged (its checksum does not match)")
    end = 16 + int.from_bytes(blob[12:16], "little")
    side = unpack_xz(blob[16:end])
    header, at = read_header(side)
    entries = [read_entry(row) for row in header["tensors"]]
    coded = [entry for entry in entries if entry.limit]
    counts = [entry.count for entry in coded]
    if len(coded) > MAX_RANS_TENSORS or sum(counts) > MAX_RANS_CODES:
        raise ValueError(f"artifact: more than {MAX_RANS_TENSORS} tensors or {MAX_RANS_CODES} codes")
    if len(blob) <= end or (len(blob) - end) % 2:
        raise ValueError("artifact: no words, or half a word at the end")

    reader = SideReader(side, at)
    models = []
    values = []
    for entry in entries:
        if entry.limit:
            models.append(reader.model(entry))
            scales = from_planes(reader.take(2 * entry.scales), 2)
            values.append(scales + reader.take(entry.exponents))
        else:
            size = ENCODINGS[entry.encoding].dtype.itemsize
            values.append(from_planes(reader.take(size * entry.count), size))
    if reader.at != len(side):
        raise ValueError("artifact: bytes after the last tensor")

    tensors = iter(rans_decode(np.frombuffer(blob[end:], "<u2"), models, counts))
    payload = []
    for entry, plain in zip(entries, values):
        if entry.limit:
            payload.append(next(tensors).tobytes())
        payload.append(plain)
    return b"".join([side[:at], *payload])


class Codec(NamedTuple):
    """A way to compress a raw artifact. unpack raises ValueError for bytes that pack did not write."""

    magic: bytes  # the first bytes of its artifacts
    label: str  # in logs and metrics
    max_weights: int
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes], bytes]


CODECS = {
    "xz": Codec(b"\xfd7zXZ\0", "lzma", MAX_WEIGHTS, pack_xz, unpack_xz),
    "rans": Codec(RANS_MAGIC, "rans", MAX_RANS_CODES, pack_rans, unpack_rans),
}


def relations_of_the_codec(h: Config) -> Iterator[Relation]:
    """Yield the relations of the model's size to what an artifact holds."""
    table = parameter_table(h)
    parameters = sum(math.prod(parameter.shape) for parameter in table.values())
    most = MAX_TRELLIS_CODES if h.trellis else CODECS[h.codec].max_weights
    holder = "trellis=1" if h.trellis else f"codec={h.codec}"
    sizes = " ".join(f"{key}={getattr(h, key)}" for key in knobs_with(SIZE))
    yield Relation(
        parameters <= most,
        f"mlp_mult={h.mlp_mult:g} {sizes} make {parameters:.3g} parameters, "
        f"{TRAINING_BYTES * parameters / 1e9:.3g} GB to train; an artifact of {holder} holds at "
        f"most {most:.3g}; make the model smaller",
    )
    rows = sum(parameter.shape[-2] for name, parameter in table.items() if STORED_AS[name] == "int6")
    yield Relation(
        not h.trellis or rows <= MAX_TRELLIS_ROWS,
        f"trellis=1 holds at most {MAX_TRELLIS_ROWS} rows of a layer's matrices; model_dim={h.model_dim} and "
        f"mlp_mult={h.mlp_mult:g} make {rows}",
    )


def codec_of(blob: bytes) -> str:
    """Return the row of CODECS that wrote an artifact. Raises ValueError if none did."""
    for name, codec in CODECS.items():
        if blob.startswith(codec.magic):
            return name
    raise ValueError(f"artifact: none of the codecs {', '.join(CODECS)} wrote it")


# -----------------------------------------------------------------------------
# 19. Score: windows that tile the split, one evaluator of every score, test-time training between chunks.


# Inputs and targets (B, T) and `last` -> the nats of the last targets of each sequence, (B, last): GPT.nats.
Nats = Callable[[Tensor, Tensor, int], Tensor]


class Windows(NamedTuple):
    """Score windows: arrays (n,) of whole numbers.

    A window shows the model the tokens of [start, end) and scores the targets of [score_from, end). Target i
    is token i + 1. An empty window, all zeros, scores nothing and only fills a shape.
    """

    start: np.ndarray
    end: np.ndarray
    score_from: np.ndarray

    @classmethod
    def empty(cls, *shape: int) -> Windows:
        """Return empty windows."""
        return cls(*np.zeros((3, *shape), np.int64))

    @property
    def n(self) -> int:
        """How many windows these are."""
        return len(self.start)

    def part(self, which: int | slice) -> Windows:
        """Return the windows at these places."""
        return Windows(*(numbers[which] for numbers in self))

    def put(self, which: slice | tuple, windows: Windows) -> None:
        """Replace the windows at these places."""
        for numbers, new in zip(self, windows):
            numbers[which] = new


class Score(NamedTuple):
    """The score of a split."""

    loss: float  # mean nats per token
    bpb: float
    tokens: int
    bytes: int
    ms: float

    @property
    def exact(self) -> str:
        """Loss and bpb for the log, with eight digits after the point."""
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f}"

    @property
    def sentence(self) -> str:
        """The score for a person, with the number of tokens."""
        return f"val_bpb {self.bpb:.4f}, val_loss {self.loss:.4f} over {self.tokens:,} tokens"


class WindowGroup(NamedTuple):
    """Score windows that share one compiled shape and one state of the weights."""

    last: int  # the model returns nats for the last `last` positions of each window
    windows: Windows
    lesson: Windows  # those whose targets, already scored, are learned from first
    begins: np.ndarray | None = None  # (n,) bool: whether the window begins a document; None in a stream


def score_windows(total: int, seq_len: int, stride: int) -> Windows:
    """Return the score windows of a split: their targets, [score_from, end), tile [0, total).

    The first window scores all its targets. Each later one scores the next `stride`, or the rest, with at
    least seq_len - stride tokens of context.
    """
    end = np.append(np.arange(min(seq_len, total), total, stride), total)
    return Windows(start=np.maximum(end - seq_len, 0), end=end, score_from=np.append(0, end[:-1]))


def stream_groups(tokens: np.ndarray, scoring: ScoreSettings, slots: int) -> list[WindowGroup]:
    """Cut the score windows of `tokens` into groups wherever the chunk or the shape changes.

    The windows follow each other through the tokens, whatever the documents and the number of slots. The
    lesson before a chunk holds all earlier targets that have not been learned from: those of the previous
    chunk and of chunks in which no window begins. A lesson is cut into sequences.
    """
    total = len(tokens) - 1
    seq_len = scoring.seq_len
    windows = score_windows(total, seq_len, scoring.stride)
    start, end, score_from = windows
    # The first window scores more than `stride` targets, and a short one is padded: both need every position.
    regular = (score_from - start >= seq_len - scoring.stride) & (end - start == seq_len)
    last = np.where(regular, scoring.stride, seq_len)  # of each window, as WindowGroup.last
    chunk_tokens = scoring.chunk or total
    chunk = score_from // chunk_tokens  # of each window

    changes = (np.diff(chunk) != 0) | (np.diff(last) != 0)
    bounds = [0, *np.flatnonzero(changes) + 1, windows.n]  # between groups
    groups = []
    learned = 0  # targets before this one have been learned from
    for first, stop in pairwise(bounds):
        chunk_start = chunk[first] * chunk_tokens
        begin = np.arange(learned, chunk_start, seq_len)  # of the sequences to learn from
        lesson = Windows(start=begin, end=begin + seq_len, score_from=begin)
        learned = chunk_start
        groups.append(WindowGroup(int(last[first]), windows.part(slice(first, stop)), lesson))
    return groups


class PlacedDocument(NamedTuple):
    """Where and when a document is scored."""

    slot: int
    groups: slice  # one for each of its windows
    windows: Windows  # a chunk each


def document_groups(tokens: np.ndarray, scoring: ScoreSettings, slots: int) -> list[WindowGroup]:
    """Lay out the documents of `tokens` side by side, chunk after chunk. A group has a window for each slot.

    The slot that is free first takes the next document, so only earlier tokens decide where and when a
    document is scored. A window begins seq_len tokens before the end of its chunk, or at the document's start
    if that is later. The lesson of a slot is the previous window of the slot's document; it is empty if there
    is none.
    """
    total = len(tokens) - 1
    begins = np.union1d(0, np.flatnonzero(tokens[:total] == scoring.bos_id))
    placed = []
    free = np.zeros(slots, np.int64)  # for each slot, the first group in which it is free
    for begin, end in zip(begins, np.append(begins[1:], total)):
        score_from = np.arange(begin, end, scoring.chunk)
        chunk_end = score_from + scoring.chunk
        start = np.maximum(chunk_end - scoring.seq_len, begin)
        slot = free.argmin()
        span = slice(free[slot], free[slot] + len(start))
        windows = Windows(start=start, end=np.minimum(chunk_end, end), score_from=score_from)
        placed.append(PlacedDocument(slot, span, windows))
        free[slot] = span.stop

    count = free.max()
    all_windows = Windows.empty(count, slots)
    all_lessons = Windows.empty(count, slots)
    all_begins = np.zeros((count, slots), bool)
    for slot, span, windows in placed:
        all_windows.put((span, slot), windows)
        later = slice(span.start + 1, span.stop)
        all_lessons.put((later, slot), windows.part(slice(0, -1)))
        all_begins[span.start, slot] = True
    return [
        WindowGroup(scoring.seq_len, all_windows.part(i), all_lessons.part(i), all_begins[i])
        for i in range(count)
    ]


# Tokens (N,), n Windows and begins (n,) -> the Nats that score with what has been learned; see `learning`.
Learn = Callable[[Tensor, Windows, np.ndarray | None], Nats]


class ScoreSettings(NamedTuple):
    """How to score a split."""

    seq_len: int
    stride: int
    batch: int  # windows per forward pass on one rank
    label: str  # for the terminal's status line
    log: Log
    groups: Callable = stream_groups  # (tokens, scoring, slots) -> list of WindowGroup
    bos_id: int | None = None  # first token of every document; stream_groups needs none
    chunk: int | None = None  # targets to score between two lessons of test-time training; None: no lessons
    learner: Callable = nullcontext  # () -> context manager that yields a Learn, as `learning` does


class WindowBatch(NamedTuple):
    """Windows as a batch for the model, (B, T) each. A short window is padded at its end."""

    x: Tensor
    y: Tensor
    index: Tensor  # the position of each target in the split
    scored: Tensor  # whether the window scores the target


def read_windows(tokens: Tensor, windows: Windows, seq_len: int) -> WindowBatch:
    """Read the tokens of B windows. No token is later than the last target that its window scores."""
    start, end, score_from = torch.from_numpy(np.stack(windows)[..., None]).to(tokens.device)  # (B, 1)
    position = start + torch.arange(seq_len, device=tokens.device)
    scored = (position >= score_from) & (position < end)
    index = position.minimum(end - 1).clamp_min(0)  # 0 in an empty window
    return WindowBatch(tokens[index].long(), tokens[index + 1].long(), index, scored)


class Scored(NamedTuple):
    """The scores of targets, (N - 1,) float64 each. A target that other ranks score has zeros."""

    nats: Tensor
    counts: Tensor  # how often each target was scored


def score_batch(
    nats_fn: Nats, tokens: Tensor, windows: Windows, last: int, scoring: ScoreSettings, scores: Scored
) -> None:
    """Add the scores of at most B = scoring.batch windows to `scores`.

    Empty windows fill the compiled shape. A target that its window does not score adds zeros.
    """
    filled = Windows.empty(scoring.batch)
    filled.put(slice(windows.n), windows)
    batch = read_windows(tokens, filled, scoring.seq_len)
    nats = nats_fn(batch.x, batch.y, last).double()
    scored = batch.scored[:, -last:]
    index = batch.index[:, -last:].flatten()
    scores.nats.index_add_(0, index, torch.where(scored, nats, 0.0).flatten())
    scores.counts.index_add_(0, index, scored.double().flatten())


def report_progress(
    scoring: ScoreSettings, m: Machine, batches_before: int, done: int, total: int, started: float
) -> None:
    """Report how many windows all ranks have scored.

    Each report waits for the device. On a GPU that costs time, so only every 16th batch of this rank reports.
    started: perf_counter() when the work began.
    """
    if batches_before % 16 == 0 or not m.is_gpu:
        m.sync()
        scoring.log.progress(f"scoring {scoring.label}, windows", done, total, started)


@torch.no_grad()
def score_targets(nats_fn: Nats, tokens: np.ndarray, scoring: ScoreSettings, m: Machine) -> Scored:
    """Score the targets of `tokens` (N,). Rank r scores windows r, r + world_size, ... of each group.

    If a group has a lesson, all ranks first learn from the lesson together; then each rank scores its windows
    in batches.
    """
    started = time.perf_counter()
    total = len(tokens) - 1
    groups = scoring.groups(tokens, scoring, scoring.batch * m.world_size)
    total_windows = sum(group.windows.n for group in groups)
    on_device = torch.from_numpy(tokens.astype(np.int32)).to(m.device)
    scores = Scored(*torch.zeros(2, total, dtype=torch.float64, device=m.device))
    learned_nats_fn = nats_fn
    batches = 0  # that this rank has scored
    before = 0  # windows of earlier groups
    with scoring.learner() as learn:
        for group in groups:
            if group.lesson.n:
                learned_nats_fn = learn(on_device, group.lesson, group.begins)

            mine = group.windows.part(slice(m.rank, None, m.world_size))
            # A rank without windows still runs one empty batch, to compile the shape: `Run.score` compiles on
            # a text that may have fewer windows than there are ranks.
            for first in range(0, max(1, mine.n), scoring.batch):
                stop = first + scoring.batch
                windows = mine.part(slice(first, stop))
                score_batch(learned_nats_fn, on_device, windows, group.last, scoring, scores=scores)
                done = before + min(group.windows.n, stop * m.world_size)
                report_progress(scoring, m, batches, done=done, total=total_windows, started=started)
                batches += 1
            before += group.windows.n
    return scores


def evaluate(
    nats_fn: Nats, tokens: np.ndarray, counts: ByteCounts, scoring: ScoreSettings, m: Machine
) -> Score:
    """Score every target of `tokens` (N,) once, with the work split over all ranks. Sums are float64."""
    started = time.perf_counter()
    nats = score_targets(nats_fn, tokens, scoring, m).nats.sum()
    m.check_ranks()
    dist.all_reduce(nats)
    total = len(tokens) - 1
    num_bytes = int(counts.of(tokens).sum())
    return Score(
        loss=nats.item() / total,
        bpb=bpb(nats.item(), num_bytes),
        tokens=total,
        bytes=num_bytes,
        ms=1000 * (time.perf_counter() - started),
    )


def lesson_gradient(
    params: list[Tensor], nats_fn: Nats, tokens: Tensor, windows: Windows, h: Config
) -> Tensor:
    """Return the gradient of the summed nats of the targets that the windows score, flat over params."""
    gradient = torch.zeros(sum(p.numel() for p in params), device=tokens.device)
    batch = h.eval_batch_tokens // h.eval_seq_len
    for first in range(0, windows.n, batch):
        b = read_windows(tokens, windows.part(slice(first, first + batch)), h.eval_seq_len)
        with torch.enable_grad():
            nats = torch.where(b.scored, nats_fn(b.x, b.y, h.eval_seq_len), 0.0).sum()
        parts = torch.autograd.grad(nats, params, materialize_grads=True)
        gradient.add_(torch.cat([g.flatten() for g in parts]))
    return gradient


@contextmanager
def sgd_of_weights(model: GPT, nats_fn: Nats, h: Config, m: Machine) -> Iterator[Learn]:
    """Learn with all weights, one chunk of the split after the other. See `learning`.

    Each step follows the mean gradient over the lesson and all ranks, clipped to norm 1, with momentum 0.9.
    The momentum carries over to the next chunk. The rate falls from ttt_lr to 0 along half a cosine over the
    split. Leaves requires_grad on for all parameters. After parameter-golf #549.
    """
    params = list(model.requires_grad_(True).parameters())  # also those with rate 0 in training
    weights = [p.data for p in params]
    saved = [w.clone() for w in weights]
    sizes = [w.numel() for w in weights]
    momentum = torch.zeros(sum(sizes), device=m.device)
    moves = [v.view_as(w) for v, w in zip(momentum.split(sizes), weights)]

    def learn(tokens: Tensor, windows: Windows, begins: np.ndarray | None = None) -> Nats:
        targets = int((windows.end - windows.score_from).sum())
        progress = windows.start[0] / (len(tokens) - 1)
        rate = h.ttt_lr * (1 + math.cos(math.pi * progress)) / 2
        mine = windows.part(slice(m.rank, None, m.world_size))
        for _ in range(h.ttt_passes):
            gradient = lesson_gradient(params, nats_fn, tokens, mine, h) / targets
            m.check_ranks()
            dist.all_reduce(gradient)
            momentum.mul_(0.9).add_(gradient / gradient.norm(dtype=torch.float64).clamp_min(1.0))
            torch._foreach_add_(weights, moves, alpha=-rate)
        return nats_fn

    yield learn
    torch._foreach_copy_(weights, saved)


LORA_BETA2 = 0.99  # decay of the second moment; no first moment, as in the source of lora_of_documents


@contextmanager
def lora_of_documents(model: GPT, nats_fn: Nats, h: Config, m: Machine) -> Iterator[Learn]:
    """Learn a change of rank ttt_rank to every qkv and the output layer for each document. See `learning`.

    Each slot of a batch has its own factors, which are reset at the start of every document: `up` is then
    zero, so the weights are the artifact's. The steps are Adam's. Leaves requires_grad off for all
    parameters. After parameter-golf #77, #1855.
    """
    model.requires_grad_(False)
    slots = h.eval_batch_tokens // h.eval_seq_len
    fresh = fresh_factors(h).to(m.device)
    factors = fresh.repeat(slots, 1)
    second_moment = torch.zeros_like(factors)
    steps = torch.zeros(slots, 1, device=m.device)
    leaf = factors.detach().requires_grad_(True)  # the same memory
    changed_nats_fn = partial(nats_fn, factors=leaf)

    own = slice(m.rank, None, m.world_size)

    def learn(tokens: Tensor, windows: Windows, begins: np.ndarray | None = None) -> Nats:
        mine = windows.part(own)
        for _ in range(h.ttt_passes):
            gradient = lesson_gradient([leaf], changed_nats_fn, tokens, mine, h).view_as(factors)
            steps.add_(1)
            second_moment.lerp_(gradient.square(), 1 - LORA_BETA2)
            spread = (second_moment / (1 - LORA_BETA2**steps)).sqrt()
            factors.sub_(h.ttt_lr * gradient / spread.clamp_min(1e-10))
        if begins is not None:
            reset = torch.from_numpy(begins[own, None]).to(m.device)
            factors.copy_(torch.where(reset, fresh, factors))
            second_moment.masked_fill_(reset, 0)
            steps.masked_fill_(reset, 0)
        return changed_nats_fn

    yield learn


def relations_of_sgd(h: Config) -> Iterator[Relation]:
    """Yield the relations of the knobs of sgd_of_weights: a chunk is cut into sequences."""
    yield divides("eval_seq_len", "ttt_chunk_tokens", h)


def relations_of_lora(h: Config) -> Iterator[Relation]:
    """Yield the relations of the knobs of lora_of_documents."""
    yield Relation(
        h.ttt_chunk_tokens <= h.eval_seq_len,
        f"ttt_form=lora: ttt_chunk_tokens={h.ttt_chunk_tokens} must not exceed eval_seq_len="
        f"{h.eval_seq_len}: one window scores a chunk",
    )
    yield at_most("ttt_rank", "model_dim", h)


class TttForm(NamedTuple):
    """A form of test-time training."""

    learner: Callable  # what `learning` returns, with the same arguments
    groups: Callable  # as in ScoreSettings
    stride: Callable[[Config], int]  # fresh targets in each score window
    relations: Callable[[Config], Iterator[Relation]]  # between its knobs


TTT_FORMS = {
    "sgd": TttForm(sgd_of_weights, stream_groups, lambda h: h.eval_stride, relations_of_sgd),
    "lora": TttForm(lora_of_documents, document_groups, lambda h: h.ttt_chunk_tokens, relations_of_lora),
}


def relations_of_scores(h: Config) -> Iterator[Relation]:
    """Yield the relations of score windows and of test-time training."""
    yield divides("eval_seq_len", "eval_batch_tokens", h)
    yield fits_memory("eval_batch_tokens", h)
    yield at_most("eval_stride", "eval_seq_len", h)
    if h.ttt_lr > 0:
        yield from TTT_FORMS[h.ttt_form].relations(h)


def learning(model: GPT, nats_fn: Nats, h: Config, m: Machine) -> AbstractContextManager[Learn]:
    """Return a context that yields learn(tokens, windows, begins).

    learn trains, in ttt_passes steps, on the targets that n Windows of tokens (N,) score. begins (n,) bool:
    the slots in which a document begins and the weights are reset; None: no slot is reset. learn returns the
    nats_fn that scores with what has been learned. When the block ends without an error, the weights are put
    back.
    """
    return TTT_FORMS[h.ttt_form].learner(model, nats_fn, h, m)


# -----------------------------------------------------------------------------
# 20. Checkpoints: written by a thread, two sets kept, read by any number of ranks. No pickle.
#
#   OUT_DIR/RUN_ID.stepN.RofW.ckpt := u32 header_bytes | header JSON | float32 payload | sha256 of the rest
#
# The W files of step N are a checkpoint set. File R is written by the rank that holds share R of the banks,
# and has that rank's share of every tensor; a tensor is the concatenation of its shares. The header holds the
# step, the training clock in ms, the progress of the average, the position in the text, the config, script
# and data of the run, and a list of tensors as in an artifact. There is no other state: steps draw no random
# numbers, and the text depends only on the position.

CHECKPOINT_NAME = re.compile(r"(?P<base>.*)\.step(?P<step>\d+)\.\d+of(?P<world>[1-9]\d*)\.ckpt(?:\.tmp)?")
DIGEST_BYTES = 32


class CheckpointSet(NamedTuple):
    """The name of a checkpoint set. Sets sort by step."""

    step: int
    world: int  # how many files it has
    base: str  # OUT_DIR/RUN_ID

    def file(self, share: int) -> str:
        """Return the path of the file that holds a share."""
        return f"{self.base}.step{self.step}.{share}of{self.world}.ckpt"


def set_of(path: str) -> CheckpointSet | None:
    """Return the set to which a file belongs by its name, or None if it is not named like a checkpoint."""
    name = CHECKPOINT_NAME.fullmatch(path)
    return CheckpointSet(int(name["step"]), int(name["world"]), name["base"]) if name else None


class SavedPart(NamedTuple):
    """The content of a checkpoint file."""

    header: dict
    tensors: dict[str, Tensor]


class SavedState(NamedTuple):
    """A checkpoint set as read from its files. Step 0 means that there is none."""

    step: int
    pattern: str  # BASE.stepN.*, which matches its files
    parts: list[SavedPart]  # of each file, in order
    skipped: list[str]  # a line for the log about each newer set that is damaged


class Writing(NamedTuple):
    """A set that is being written."""

    step: int
    future: Future  # the end of this rank's writing


class SavedTensor(NamedTuple):
    """A tensor of a checkpoint, for any number of ranks. Either `whole` or `rows` is set."""

    share: Tensor  # what this rank writes
    whole: Tensor | None = None  # every rank holds all of it
    rows: slice | None = None  # this rank's matrices among those of all ranks


def origin(h: Config, dataset: Dataset) -> dict:
    """Return the knobs, script and data that a run must share with the checkpoint from which it resumes."""
    free = knobs_with(FREE)
    shared = {key: value for key, value in asdict(h).items() if key not in free}
    return {**shared, "script": sha256(Path(__file__).read_bytes()), "data": dataset.manifest_sha256}


def check_ranks_agree(h: Config, m: Machine, dataset: Dataset, blob: bytes = b"") -> None:
    """Check that all ranks were given the same knobs, script, data and artifact. Collective over gloo.

    Paths may differ between nodes. Raises InputError on every rank.
    """
    resume = h.resume if h.resume in ("", "auto") else "FILE"
    given = origin(h, dataset) | dict(
        checkpoint_every=h.checkpoint_every, resume=resume, artifact=sha256(blob)
    )
    given_to_rank_0 = m.of_rank_0(given)
    different = sorted(key for key in given if given[key] != given_to_rank_0[key])
    with m.raising_together():
        if different:
            raise InputError(
                f"rank {m.rank} has a different {', '.join(different)} from rank 0; "
                "start all ranks with the same settings"
            )


def checkpoint_files(base: str) -> list[str]:
    """List the checkpoint files of a run, including partial ones that a killed run left."""
    return [f for f in glob.glob(glob.escape(base) + ".step*") if set_of(f)]


def read_checkpoint(path: str) -> SavedPart:
    """Read one file. Raises OSError if it is missing, ValueError if damaged."""
    blob = read_file(path, limit=-1)
    if hashlib.sha256(blob[:-DIGEST_BYTES]).digest() != blob[-DIGEST_BYTES:]:
        raise ValueError(f"{path}: checksum mismatch")
    end = 4 + int.from_bytes(blob[:4], "little")
    header = json.loads(blob[4:end])
    wanted = dict(made_by=dict, step=int, train_ms=float, progress=float, position=int, tensors=list)
    numbers = ("step", "train_ms", "progress", "position")
    if types_of(header) != wanted or not all(0 <= header[key] < 1 << 53 for key in numbers):
        raise ValueError(f"{path}: its header is not that of a checkpoint")
    return SavedPart(header, read_tensors(header, blob[end:-DIGEST_BYTES]))


def read_set(found: CheckpointSet) -> list[SavedPart]:
    """Read all files of a set.

    Raises OSError, ValueError or RecursionError if one is missing, damaged or of another set.
    """
    parts = [read_checkpoint(found.file(share)) for share in range(found.world)]
    expected = {**parts[0].header, "step": found.step, "tensors": []}
    for share, part in enumerate(parts):
        if {**part.header, "tensors": []} != expected:
            raise ValueError(f"{found.file(share)}: it belongs to another set")
    return parts


def check_resume(h: Config) -> None:
    """Check that the files of the set that resume= names exist. Raises InputError."""
    if h.resume in ("", "auto"):
        return
    wanted = set_of(h.resume)
    if not wanted:
        raise InputError(
            f"config key resume: {h.resume} is not named like a checkpoint, RUN_ID.stepN.RofW.ckpt; "
            "resume=auto takes the newest"
        )
    for file in chain([h.resume], map(wanted.file, range(wanted.world))):
        if not os.path.isfile(file):
            raise InputError(f"config key resume: no checkpoint file {file}; resume=auto takes the newest")


def check_origin(state: SavedState, wanted: dict) -> None:
    """Raise an InputError that names every knob or input in which this run differs from a checkpoint."""
    found = state.parts[0].header["made_by"]
    different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if different:
        raise InputError(
            f"{state.pattern}: written with another {', '.join(different)}; resume with what wrote "
            "it, or begin anew with another run_id"
        )


def read_state(h: Config, m: Machine, base: str, dataset: Dataset) -> SavedState:
    """Read the newest set that is intact on all ranks, or the set that resume= names by one of its files.

    base: OUT_DIR/RUN_ID. Raises InputError when the set comes from a run with another config, script or data,
    or when the set that resume= names is damaged.
    """
    with m.raising_together():
        check_resume(h)
    files = checkpoint_files(base) if h.resume == "auto" else [h.resume]
    skipped = []
    for found in sorted(set(map(set_of, files)), reverse=True):  # newest first
        step = found.step
        parts = []
        damage = None
        try:
            parts = read_set(found)
        except (OSError, ValueError, RecursionError) as e:
            damage = str(e)
        damage = first_failure(m.of_every_rank(damage))
        if damage is None:
            state = SavedState(step, f"{found.base}.step{step}.*", parts, skipped)
            with m.raising_together():
                check_origin(state, origin(h, dataset))
            return state
        if h.resume != "auto":
            raise InputError(f"config key resume: {damage}; resume=auto takes the newest intact set")
        skipped.append(f"checkpoint step:{step} skipped: {damage}")
    return SavedState(0, "", [], skipped)


class Start(NamedTuple):
    """The point from which training goes on."""

    step: int  # steps already taken; 0 unless the run resumes
    clock_ms: float  # the training clock


BEGINNING = Start(step=0, clock_ms=0.0)


class WriteOutcome(NamedTuple):
    """How far a rank is with writing its file of a set."""

    is_done: bool
    failure: str | None


class Checkpoints:
    """A run's checkpoints.

    Call `restore` before the first step, `save` after each step, and `last_good` on divergence.
    """

    def __init__(self, run: Run, optimizer: Optimizer, ema: Ema, loader: TokenLoader) -> None:
        self.run = run
        self.m = run.m
        self.optimizer = optimizer
        self.ema = ema
        self.loader = loader
        self.base = run.log.path.removesuffix(".txt")
        self.good = 0  # step of the newest complete set
        self.saved_ms = 0.0

        whole = {"flat_m": optimizer.flat_m, "flat_v": optimizer.flat_v}
        for (name, p), average in zip(run.model.named_parameters(), ema.average):
            whole[name] = p.data
            whole[f"average.{name}"] = average
        self.tensors = {name: SavedTensor(self.share(x), whole=x) for name, x in whole.items()}
        # The step rule's state is called "second" in files.
        for kind, of_matrices in (("momentum", optimizer.momentum), ("second", optimizer.rule_state)):
            for name, x in of_matrices.items():
                self.tensors[f"{kind}.{name}"] = SavedTensor(x, rows=optimizer.rows[name])

        self.made_by = origin(run.h, run.dataset)
        set_device = partial(torch.cuda.set_device, self.m.device) if self.m.is_gpu else None
        self.pool = ThreadPoolExecutor(1, "checkpoint", set_device)  # new threads would start on device 0
        self.pending: Writing | None = None

    def share(self, whole: Tensor) -> Tensor:
        """Return this rank's share of a tensor that every rank holds whole, as a view, possibly empty."""
        rows = -(-len(whole) // self.m.world_size)
        first = rows * self.m.own_share
        return whole[first : first + rows]

    def save(self, step: int, train_ms: float, last: bool = False) -> None:
        """Start writing the state after `step` if a checkpoint is due and no rank is still writing.

        last: write even if none is due, and wait for the end. checkpoint_every=0 writes nothing.
        """
        every_ms = 1000 * self.run.h.checkpoint_every
        due = every_ms > 0 and (last or train_ms >= self.saved_ms + every_ms)
        if due and self.finish_set(wait=last) and self.good != step:
            header = dict(
                made_by=self.made_by,
                step=step,
                train_ms=train_ms,
                progress=self.ema.progress,
                position=self.loader.position,
            )
            fetched = self.m.fetch(*(tensor.share for tensor in self.tensors.values()))
            self.pending = Writing(step, self.pool.submit(self.write, step, header, fetched))
            self.saved_ms = train_ms
        if last:
            self.finish_set(wait=True)

    def write(self, step: int, header: dict, fetched: Callable[[], list[Tensor]]) -> None:
        """Write this rank's file, in the thread. Raises InputError on failure or if a value is not finite."""
        host = {name: x.contiguous().numpy() for name, x in zip(self.tensors, fetched()) if len(x)}
        entries = []
        offset = 0
        for name, x in host.items():
            if not np.isfinite(x).all():
                raise InputError(f"{name} is not finite")
            entries.append(TensorEntry(name, "f32", list(x.shape), offset))
            offset += x.nbytes

        text = json.dumps({**header, "tensors": entries}).encode()
        chunks = [len(text).to_bytes(4, "little"), text, *host.values()]
        digest = hashlib.sha256()
        for chunk in chunks:  # hashing and writing release the GIL
            digest.update(chunk)
        path = CheckpointSet(step, self.m.world_size, self.base).file(self.m.own_share)
        write_atomic(path, *chunks, digest.digest())

    def finish_set(self, wait: bool) -> bool:
        """Finish the set being written. Return True once no write is pending. Collective.

        A set is finished once every rank has written its file. Then the outcome is logged, and all sets but
        the newest two are removed. wait: until all ranks are done. All ranks begin a set at the same step,
        and only after the previous set is known to be complete or to have failed, so no file that a complete
        set needs is ever removed.
        """
        if self.pending is None:
            return True
        step, future = self.pending
        is_done = wait or future.done()
        error = future.exception() if is_done else None
        failure = None if error is None else str(error) or type(error).__name__
        outcomes = self.m.of_every_rank(WriteOutcome(is_done, failure))
        if not all(outcome.is_done for outcome in outcomes):
            return False

        self.pending = None
        failure = first_failure(outcome.failure for outcome in outcomes)
        if failure is not None:
            stays = f"step:{self.good} stays" if self.good else "there is none before it"
            self.run.log(f"checkpoint step:{step} failed: {failure}; {stays}")
            return True
        self.run.log(f"checkpoint step:{step}")
        if self.m.rank == 0:
            for path in checkpoint_files(self.base):
                found = set_of(path).step
                if found < step and found != self.good:
                    os.remove(path)
        self.good = step
        return True

    def last_good(self) -> int:
        """Wait until no rank is writing. Returns the step of the newest complete set, or 0."""
        self.finish_set(wait=True)
        return self.good

    @torch.no_grad()
    def restore(self, state: SavedState) -> Start:
        """Load a set into this rank's parameters, average and optimizer state, and log its step.

        Returns where its training went on, or the beginning if there is no set.
        """
        for line in state.skipped:
            self.run.log(line)
        if not state.parts:
            if self.run.log.goes_on:
                self.run.log("resumed step:0 from the beginning: no intact checkpoint")
            return BEGINNING

        for name, tensor in self.tensors.items():
            saved = [part.tensors[name] for part in state.parts if name in part.tensors]
            with explained(
                f"{state.pattern}: {name} does not fit",
                "begin anew with another run_id",
                *(ValueError, RuntimeError, IndexError),
            ):
                complete = torch.cat(saved)
                if tensor.whole is not None:
                    tensor.whole.copy_(complete.view_as(tensor.whole))
                else:
                    tensor.share.copy_(complete[tensor.rows].view_as(tensor.share))
        header = state.parts[0].header
        self.optimizer.steps = state.step
        self.good = state.step
        self.ema.progress = header["progress"]
        self.loader.seek_sequence(header["position"])
        self.saved_ms = header["train_ms"]
        self.run.log(
            f"resumed step:{state.step} from {state.pattern} train_time:{self.saved_ms:.0f}ms "
            f"written by {len(state.parts)} ranks"
        )
        state.parts.clear()  # frees their memory
        return Start(state.step, self.saved_ms)


# -----------------------------------------------------------------------------
# 21. Runs: the knobs of a run, resolved and checked, and what every command works with, built once.


# The knobs whose value is one of several words.
CHOICES = {
    "preset": PRESETS,
    "ortho": ORTHO,
    "step_rule": STEP_RULES,
    "parallel_form": ("one_stream", "two_streams"),
    "ttt_form": TTT_FORMS,
    "artifact_weights": ("ema", "live"),
    "wire_dtype": ("float32", "bfloat16"),
    "codec": CODECS,
}


def check_choices(h: Config) -> None:
    """Check each knob that is one of several words. Raises InputError with the words to choose from."""
    for key, allowed in CHOICES.items():
        if getattr(h, key) not in allowed:
            raise InputError(f"config key {key}: {getattr(h, key)[:40]!r} is not one of {', '.join(allowed)}")


# The dials assume that a preset's rates and decays were tuned at depth 12, as nanochat's were.
DEPTHS = range(2, 27)
TUNED_DEPTH = 12
TUNED_WIDTH = 768
TUNED_BATCH = 1 << 19  # tokens: nanochat's measured optimum at depth 12


def shape_by_depth(h: Config) -> dict[str, object]:
    """Return the knobs of the model that follow from depth."""
    width = -(-64 * h.depth // 128) * 128  # --aspect-ratio 64, up to whole heads of --head-dim 128
    short = str(-(-h.train_seq_len // 4 // 128) * 128)  # a quarter of the sequence, up to blocks of 128
    pattern = [short, short, short, "0"] * h.depth  # --window-pattern SSSL

    def scaled_layers(layers: int) -> int:
        return -(-layers * h.depth // h.num_layers)  # ours: the preset's fraction of the layers, rounded up

    return dict(
        num_layers=h.depth,
        model_dim=width,
        num_heads=width // 128,
        num_kv_heads=width // 128,  # n_kv_head = n_head
        mlp_mult=4.0,
        attn_windows=" ".join([*pattern[: h.depth - 1], "0"]),  # the last layer always sees everything
        xsa_last_n=scaled_layers(h.xsa_last_n),
        ve_last_n=scaled_layers(h.ve_last_n),
        parallel_last_n=scaled_layers(h.parallel_last_n),
        loop_layers="",  # ours: depth counts all visits
        loop_times=0,
    )


def size_by_depth(h: Config) -> float:
    """Return h's scaling_params divided by those at depth 12; training tokens have the same ratio."""
    tuned = replace(h, **shape_by_depth(replace(h, depth=TUNED_DEPTH)))
    return scaling_params(h) / scaling_params(tuned)


def run_by_depth(h: Config) -> dict[str, object]:
    """Return the knobs of batch, length and score that follow from depth and the model's size."""
    # The best batch grows as tokens^0.383 (arXiv:2505.13738); the nearest power of two.
    batch = 1 << round(math.log2(TUNED_BATCH * size_by_depth(h) ** 0.383))
    return dict(
        train_batch_tokens=batch,
        micro_batch_tokens=min(batch, 1 << h.micro_batch_tokens.bit_length() - 1),  # ours: divides the batch
        start_batch_tokens=0,
        tokens_per_param=12.0,  # --target-param-data-ratio
        max_wallclock_seconds=0.0,
        eval_stride=h.eval_seq_len,  # a sliding score costs 32 times as much
        codec="xz",  # rans decodes at most MAX_RANS_CODES
        size_cap=NO_CAP if h.makes_artifact else 0,
    )


def rates_by_depth(h: Config) -> dict[str, object]:
    """Return the rates and decays that follow from batch, width, size and depth."""
    batch = math.sqrt(h.train_batch_tokens / TUNED_BATCH)  # rates go as batch^0.5
    width = math.sqrt(TUNED_WIDTH / h.model_dim)  # rates of AdamW's matrices go as width^-0.5, too
    # For MuonH, whose rate falls with depth: as depth^-0.5 in HyperP (arXiv:2603.28743).
    depth = (TUNED_DEPTH / h.depth) ** h.depth_lr_power
    # Decay keeps T_epoch = batch / (rate * decay * tokens) constant (arXiv:2405.13698).
    decay = batch / size_by_depth(h)
    return dict(
        matrix_lr=h.matrix_lr * batch * depth,
        embed_lr=h.embed_lr * batch * width,
        scalar_lr=h.scalar_lr * batch,
        norm_gain_lr=h.norm_gain_lr * batch,
        muon_wd=h.muon_wd * decay / depth,
        embed_wd=h.embed_wd * decay,
        scalar_wd=h.scalar_wd * decay,
    )


def length_by_tokens(h: Config) -> dict[str, object]:
    """Return the knobs of a run's length that follow from tokens_per_param."""
    steps = int(h.tokens_per_param * scaling_params(h)) // h.train_batch_tokens
    return dict(iterations=max(1, steps), max_wallclock_seconds=0.0)


def follow_dials(h: Config, given: Mapping[str, object]) -> Config:
    """Return h with every knob that follows from depth and tokens_per_param, except for the knobs given.

    The rules are nanochat's: scripts/base_train.py and nanochat/gpt.py at 00255c1. Each rule sees the given
    knobs and the results of earlier rules. Raises InputError for a dial out of range.
    """
    if h.depth and h.depth not in DEPTHS:
        raise InputError(f"config key depth: {h.depth} must be 0 or from {DEPTHS[0]} to {DEPTHS[-1]}")
    if h.tokens_per_param > 1e6:
        raise InputError(f"config key tokens_per_param: {h.tokens_per_param:g} must be at most 1e6")
    rules = (shape_by_depth, run_by_depth, rates_by_depth) if h.depth else ()
    for rule in rules:
        h = replace(h, **{**rule(h), **given})
    if h.tokens_per_param:
        h = replace(h, **{**length_by_tokens(h), **given})
    return h


def relations_of_runs(h: Config) -> Iterator[Relation]:
    """Yield the relations of the dials and of a race."""
    yield Relation(
        h.depth in (0, h.num_layers), f"depth={h.depth} and num_layers={h.num_layers} differ; leave one out"
    )
    yield Relation(
        h.tokens_per_param == 0 or h.start_batch_tokens == 0,
        f"tokens_per_param={h.tokens_per_param:g} needs start_batch_tokens=0, not {h.start_batch_tokens}: "
        "it assumes that every step has the same batch",
    )
    yield Relation(
        not (h.deterministic and h.bind_by_time),
        "deterministic=1 needs bind_by_time=0: what a clock chooses may differ from run to run",
    )
    yield Relation(
        h.target_loss <= math.log(h.vocab_size),
        f"target_loss={h.target_loss:g} must not exceed ln(vocab_size={h.vocab_size}), which a uniform guess "
        "reaches",
    )
    yield Relation(
        h.target_loss == 0 or h.max_wallclock_seconds == 0,
        f"target_loss={h.target_loss:g} needs max_wallclock_seconds=0, not {h.max_wallclock_seconds:g}: "
        "a race takes all of its iterations",
    )
    yield Relation(
        h.target_loss > 0 or h.makes_artifact,
        "size_cap=0, no artifact, needs target_loss above 0: all other runs are scored by their artifact",
    )


# In this order: a dial explains what follows from it, and only a sound model has a size.
RELATIONS = (
    relations_of_runs,
    relations_of_batches,
    relations_of_the_model,
    relations_of_training,
    relations_of_codes,
    relations_of_scores,
    relations_of_the_codec,
)


def check_relations(h: Config) -> None:
    """Check the relations between knobs. Raises InputError with the first that does not hold."""
    for relations_of in RELATIONS:
        for relation in relations_of(h):
            if not relation.holds:
                raise InputError(f"config: {relation.complaint}")


def make_config(knobs: Mapping[str, object], header: Mapping[str, object] | None = None) -> Config:
    """Resolve every knob: defaults < preset < what its dials imply < an artifact's header < knobs given.

    A given target_loss removes the time limit. Raises InputError for a value out of range, or for knobs that
    contradict each other.
    """
    preset = PRESETS.get(knobs.get("preset", Config.preset), {})
    race = {"max_wallclock_seconds": 0.0} if knobs.get("target_loss") else {}
    # A header leaves out these knobs where they have their defaults, whatever the preset says.
    unchanged = {key: getattr(Config, key) for key in CHANGED_KNOBS} if header else {}
    given = {**unchanged, **(header or {}), **knobs}
    h = Config(**{**preset, **race, **given})
    check_ranges(h)
    check_choices(h)
    h = follow_dials(h, given)
    check_ranges(h)
    check_relations(h)
    return h


def load_config(argv: list[str], env: Mapping[str, str]) -> Config:
    """Resolve every knob of a command line and an environment. Raises InputError."""
    return make_config(read_knobs(argv, env))


Loss = Callable[[Tensor, Tensor], Tensor]  # inputs and targets (B, T) -> mean nats, (): GPT.loss


class ScoringPass:
    """GPT.nats on a whole batch, or on as many of its sequences at once as fit the memory of this rank.

    If memory runs out, half as many are scored at once from then on. A pass for gradients is never cut: all
    its parts would have to be kept at once.
    """

    def __init__(self, nats_fn: Nats) -> None:
        self.nats_fn = nats_fn
        self.most = sys.maxsize  # sequences at once

    def __call__(self, x: Tensor, y: Tensor, last: int, **changes: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.nats_fn(x, y, last, **changes)
        while True:
            try:
                return self.in_parts(x, y, last, **changes)
            except Exception as e:
                if not is_out_of_memory(e) or min(self.most, len(x)) == 1:
                    raise
            self.most = min(self.most, len(x)) // 2
            if x.is_cuda:
                torch.cuda.empty_cache()  # the cached blocks may be too small for the parts

    def in_parts(self, x: Tensor, y: Tensor, last: int, **changes: Tensor) -> Tensor:
        """Score `most` sequences at once. changes: a row for each sequence, as in GPT.nats."""
        if len(x) <= self.most:
            return self.nats_fn(x, y, last, **changes)
        parts = []
        for first in range(0, len(x), self.most):
            part = slice(first, first + self.most)
            parts.append(self.nats_fn(x[part], y[part], last, **{k: v[part] for k, v in changes.items()}))
        return torch.cat(parts)


@dataclass(frozen=True)
class Run:
    """Everything a run works with. start_run builds it."""

    h: Config
    m: Machine
    log: Log
    dataset: Dataset
    model: GPT
    loss_fn: Loss
    plain_loss_fn: Loss  # of the model without its loop; loss_fn itself if it has none
    nats_fn: ScoringPass
    phases: dict[str, float]  # name -> ms
    splits: dict[str, np.ndarray]  # held-out tokens of the splits that have been scored
    resumed: SavedState | None = None  # where training continues if resume= is set

    def time_phase(self, phase: str, fn: Callable, *args):
        """Call fn(*args), add its time to a phase, and return its result."""
        self.m.sync()
        started = time.perf_counter()
        out = fn(*args)
        self.m.sync()
        self.phases[phase] = self.phases.get(phase, 0.0) + 1000 * (time.perf_counter() - started)
        return out

    def held_out(self, split: str) -> np.ndarray:
        """Return the tokens of a split, (N,) uint16. The first call reads and logs them."""
        if split not in self.splits:
            tokens = self.time_phase("load", load_split, self.h, split)
            num_bytes = int(self.dataset.counts.of(tokens).sum())
            self.log(f"data split:{split} {split}_tokens:{len(tokens) - 1} {split}_bytes:{num_bytes}")
            held = sum(map(shard_tokens, split_files(self.h.data_path, split)))
            if len(tokens) < held:
                self.log(
                    f"only the first {len(tokens) - 1:,} of {held - 1:,} tokens of {split} are scored: "
                    f"val_tokens={self.h.val_tokens}; val_tokens=0 scores all"
                )
            self.splits[split] = tokens
        return self.splits[split]

    def scoring(self, label: str, stride: int, learns: bool = False) -> ScoreSettings:
        """Return the settings of a score, which trains on scored chunks if it learns."""
        h = self.h
        scoring = ScoreSettings(
            h.eval_seq_len, stride, h.eval_batch_tokens // h.eval_seq_len, label, self.log
        )
        if not learns:
            return scoring
        learner = partial(learning, self.model, self.nats_fn, h, self.m)
        groups = TTT_FORMS[h.ttt_form].groups
        return scoring._replace(groups=groups, bos_id=h.bos_id, chunk=h.ttt_chunk_tokens, learner=learner)

    @memory_remedy("to score", "lower eval_batch_tokens, or val_tokens if the split does not fit")
    def score(self, label: str, stride: int, split: str = "val", learns: bool = False) -> Score:
        """Score the weights on a split. learns: train on scored chunks, if the split has more than one."""
        h = self.h
        tokens = self.held_out(split)
        scoring = self.scoring(label, stride, learns and len(tokens) - 1 > h.ttt_chunk_tokens)
        if scoring.chunk:  # compile before the score's clock starts, without any token of the split
            blank = np.full(scoring.chunk + scoring.stride + 1, (h.bos_id + 1) % h.vocab_size)
            self.time_phase("compile", score_targets, self.nats_fn, blank, scoring, self.m)
        score = evaluate(self.nats_fn, tokens, self.dataset.counts, scoring, self.m)
        if not math.isfinite(score.bpb):
            raise Fault(
                f"{label}: the score of {split} is {score.bpb}; the weights or the rates are at fault"
            )
        return score


def machine_lines(h: Config, m: Machine) -> str:
    """Return what the log says about the machine: what is bound, the times behind it, a limit on memory."""
    bound = " ".join(f"{part}:{name}" for part, name in m.binding.parts.items())
    dtype = str(m.dtype).removeprefix("torch.")
    lines = [f"machine world_size:{m.world_size} device:{m.device_name} dtype:{dtype} {bound}"]
    for part, times in m.bind_times.items():
        lines.append(f"bind {part} " + " ".join(f"{name}:{ms:.3f}ms" for name, ms in times))
    if h.memory_limit_gib:
        lines.append(f"memory limit: {h.memory_limit_gib:g} GiB of each GPU")
    return "\n".join(lines)


CPU_EVAL_TOKENS = 8192


def for_device(h: Config, m: Machine) -> Config:
    """Return the config with score batches that suit the device.

    A CPU gains nothing from large ones: their logits take gigabytes, and a short split is padded to a batch.
    """
    if m.is_gpu:
        return h
    sequences = max(1, CPU_EVAL_TOKENS // h.eval_seq_len)
    return replace(h, eval_batch_tokens=min(h.eval_batch_tokens, sequences * h.eval_seq_len))


def start_run(
    h: Config, m: Machine, log: Log, dataset: Dataset, started: float, resumed: SavedState | None = None
) -> Run:
    """Write the first part of the log and build the model.

    started: perf_counter() when loading began, plus the time that binding has taken, which counts as
    compiling. resumed: the state to continue from if resume= is set.
    """
    machine = machine_lines(h, m)
    if log.goes_on:
        log(f"\n{machine}")  # after a line that may have been cut
    elif log.file:
        log.to_file(own_source())
        rule = "=" * 100
        lines = [
            rule,
            f"Running Python {sys.version}".replace("\n", " "),
            f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
            f"Running Triton version {getattr(triton, '__version__', 'none')}",
            machine_report(m),
            rule,
            "config:",
            *(f"  {key}: {value}" for key, value in sorted(asdict(h).items())),
        ]
        log.to_file("\n".join(lines))
        log(f"preset: {h.preset}\n{machine}")

    if not m.is_gpu and torch.backends.mps.is_available():
        log("Apple's GPU is not used: it has no Triton and no NCCL; this run takes the CPU")

    train_tokens = sum(map(shard_tokens, find_shards(h.data_path, "train")))
    log(
        f"data path:{h.data_path} manifest_sha256:{dataset.manifest_sha256} "
        f"tokenizer_sha256:{dataset.tokenizer_sha256} vocab_size:{h.vocab_size} train_tokens:{train_tokens}",
        console=f"data {h.data_path}: {train_tokens:,} training tokens, {h.vocab_size:,} in the vocabulary",
    )

    torch.manual_seed(h.seed)
    model = GPT(h, m.ops, m.dtype).to(m.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    loss_fn = m.compile(model.loss)
    return Run(
        h=h,
        m=m,
        log=log,
        dataset=dataset,
        model=model,
        loss_fn=loss_fn,
        plain_loss_fn=m.compile(model.without_loop().loss) if h.has_loop else loss_fn,
        nats_fn=ScoringPass(m.compile(model.nats)),
        phases={"load": 1000 * (time.perf_counter() - started), "compile": m.bind_ms},
        splits={},
        resumed=resumed,
    )


# -----------------------------------------------------------------------------
# 22. Calibration: what training text says about rounding, measured on the live weights.


def gram_of(x: Tensor) -> Tensor:
    """Return the sum of x x' over the inputs x. (..., N) -> (N, N) float32."""
    flat = x.flatten(0, -2).float()  # the values are bfloat16, so TF32 loses nothing
    return flat.T @ flat


class PlacedMatrix(NamedTuple):
    """A matrix with its place in the model."""

    W: Tensor
    product: str  # one of PRODUCTS
    layer: int


class ObservedModel(NamedTuple):
    """A model whose products are observed, and what to pass to its trunk: weights of PlacedMatrix."""

    model: GPT
    weights: list[LayerWeights]


def observe_products(
    model: GPT, weights: list[LayerWeights], observe: Callable[[PlacedMatrix, Tensor, Tensor], None]
) -> ObservedModel:
    """Return a model with the same parameters that calls observe(matrix, x, y) for every product y = Wx.

    weights: what model.layer_weights returned.
    """

    def linear(x: Tensor, matrix: PlacedMatrix) -> Tensor:
        y = F.linear(x, matrix.W)
        observe(matrix, x, y)
        return y

    observed = copy(model)
    observed.ops = Ops(model.ops.attend, mlp=partial(mlp, linear=linear), linear=linear)
    placed = []
    for layer, w in enumerate(weights):
        matrices = {product: PlacedMatrix(getattr(w, product), product, layer) for product in PRODUCTS}
        placed.append(w._replace(**matrices))
    return ObservedModel(observed, placed)


def zeros_for(weights: list[LayerWeights], shape_of: Callable) -> dict[str, Tensor]:
    """Return zeros (layers, *shape_of(W)) float32 for the matrices W of each of PRODUCTS."""
    sums = {}
    for product in PRODUCTS:
        W = getattr(weights[0], product)
        sums[product] = torch.zeros(len(weights), *shape_of(W), device=W.device)
    return sums


def in_banks(*, q: Tensor, k: Tensor, v: Tensor, o: Tensor, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Put what was measured of the matrices, (L, ...) each, in the order in which the banks hold them."""
    return {
        "qo_bank": torch.cat([q, o]),
        "kv_bank": torch.cat([k, v]),
        "mlp_up_bank": up,
        "mlp_down_bank": down,
    }


@torch.no_grad()
def measure_inputs(run: Run, loader: TokenLoader) -> dict[str, Tensor]:
    """Sum x x' over the inputs x of all int6 matrices: float32 (matrices, N, N) by parameter.

    These are the inputs of the banks' own columns, with the factors of column_gains. With gptq_embed, the
    inputs of the output layer give a (D, D) for the embedding that is tied to it.
    """
    h = run.h
    output_layer_sum = torch.zeros(h.model_dim, h.model_dim, device=run.m.device)
    weights = run.model.layer_weights()
    sums = zeros_for(weights, lambda W: (W.size(1), W.size(1)))

    def add_inputs(matrix: PlacedMatrix, x: Tensor, y: Tensor) -> None:
        sums[matrix.product][matrix.layer].add_(gram_of(x))  # every visit of a layer adds to the same sum

    observed = observe_products(run.model, weights, add_inputs)
    started = time.perf_counter()
    for i in range(h.gptq_batches):
        for sequences in loader.next():
            x = observed.model.trunk(sequences[:, :-1], observed.weights)
            if h.gptq_embed:
                output_layer_sum += gram_of(x)
        run.m.sync()
        run.log.progress("calibration, batches", i + 1, h.gptq_batches, started)
    for product, gains in run.model.column_gains().items():
        sums[product] *= gains * gains.mT

    inputs = sums.pop("qkv")  # of queries, keys and values alike
    grams = in_banks(q=inputs, k=inputs, v=inputs, **sums)
    if h.gptq_embed:
        grams["tok_emb"] = output_layer_sum
    return grams


SENSED_TOKENS = 16384  # on each rank: enough for a mean square; the backward pass is slow without a graph


@torch.no_grad()
def measure_sensitivities(run: Run, loader: TokenLoader) -> dict[str, Tensor]:
    """Sum the squared gradients of each output of the int6 matrices: (matrices, M, 1) by parameter.

    The gradients are those of the summed nats of about SENSED_TOKENS targets on each rank, from the loader's
    next batch. The outputs are those of the rows as the banks hold them, without the factors of row_scales.
    """
    h = run.h
    sequences = loader.next()[0][: max(1, SENSED_TOKENS // h.train_seq_len)]
    matrices = []  # of all products, in order
    outputs = []

    def note(matrix: PlacedMatrix, x: Tensor, y: Tensor) -> None:
        matrices.append(matrix)
        outputs.append(y)

    weights = run.model.layer_weights()
    observed = observe_products(run.model, weights, note)
    with torch.enable_grad():
        x = sequences[:, :-1]
        y = sequences[:, 1:]
        nats = observed.model.nats(x, y, h.train_seq_len, observed.weights).sum()
        gradients = torch.autograd.grad(nats, outputs)

    sums = zeros_for(weights, lambda W: (W.size(0), 1))
    for matrix, gradient in zip(matrices, gradients):
        squares = gradient.float().square().flatten(0, -2).sum(0)
        sums[matrix.product][matrix.layer].add_(squares[:, None])
    for product, scale in run.model.row_scales().items():
        sums[product] *= scale.square()

    q, k, v = sums.pop("qkv").split([h.model_dim, h.kv_dim, h.kv_dim], dim=1)
    return in_banks(q=q, k=k, v=v, **sums)


def measure_for_rounding(run: Run, loader: TokenLoader) -> Calibration:
    """Measure the live weights on this rank's part of the loader's next batches.

    gptq_batches batches give the inputs of the matrices. With row_steps, part of one more gives the
    gradients.
    """
    grams = measure_inputs(run, loader)
    sensitivities = measure_sensitivities(run, loader) if run.h.row_steps else {}
    return Calibration(grams, sensitivities)


@memory_remedy("to calibrate", "lower micro_batch_tokens, or set gptq_batches=0")
def calibrate(run: Run, loader: TokenLoader) -> Calibration:
    """Measure the live weights for rounding. Sums run over all ranks."""
    calibration = measure_for_rounding(run, loader)
    for values in [*calibration.grams.values(), *calibration.sensitivities.values()]:
        dist.all_reduce(values)
    return calibration


def check_calibration(calibration: Calibration, step: int, train_ms: float) -> None:
    """Raise Diverged if calibration met values that are not finite: the last update must have diverged."""
    for what, found in (("inputs", calibration.grams), ("gradients", calibration.sensitivities)):
        for name, values in found.items():
            if not values.isfinite().all():
                raise Diverged(
                    f"step {step}: diverged, calibration finds that the {what} of {name} are not finite; "
                    "train with lower rates",
                    step,
                    train_ms,
                )


# -----------------------------------------------------------------------------
# 23. Training: warm-up, clock, loop.

DIVERGED = 1e6  # a loss or gradient norm from here on ends the run


class Vitals(NamedTuple):
    """The two numbers of a step by which a divergence is recognized."""

    loss: float  # this rank's
    norm: float  # of the averaged gradients, equal on all ranks

    @property
    def are_sound(self) -> bool:
        """Whether both are finite and below DIVERGED."""
        return all(abs(x) < DIVERGED for x in self)


def reason_to_stop(m: Machine, vitals: Vitals) -> Stop:
    """Return why this rank should stop: a divergence or a signal that it has received; else NO."""
    if not vitals.are_sound:
        return Stop.DIVERGED
    return Stop.SIGNAL if m.signals.times else Stop.NO


def fits(run: Run, trial: Callable[[], None]) -> bool:
    """Return whether trial() runs within the memory of every rank. Collective."""
    short = False
    try:
        trial()
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        short = True
    if run.m.is_gpu:
        torch.cuda.empty_cache()  # the cached blocks may never fit again, and a graph takes its own memory
        torch.cuda.reset_peak_memory_stats()  # the log's peak is that of training, not of a trial
    return not run.m.largest(short)


Backward = Callable[[Tensor, int], Tensor]  # described in CapturedPass


class CapturedPass(NamedTuple):
    """Forward and backward of a micro-batch.

    backward(sequences (B, T + 1), count) adds the gradients of one of `count` micro-batches and returns its
    loss / count, (). Every call returns the same tensor, so the caller must read the tensor, on the stream of
    the passes, before the next call.
    """

    backward: Backward
    failure: str | None  # why capture failed; None for a graph


def capture_pass(loss_fn: Loss, optimizer: Optimizer, sequences: int | None = None) -> CapturedPass:
    """Capture forward and backward of a micro-batch of `sequences`; None: of as many as configured."""
    h = optimizer.h
    m = optimizer.m
    B = sequences or cut_batch(h, m.world_size).sequences
    result = torch.zeros((), device=m.device)
    divisor = torch.ones((), device=m.device)
    tokens = torch.zeros(B, h.train_seq_len + 1, dtype=torch.long, device=m.device)

    def one_pass() -> None:
        loss = loss_fn(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / divisor
        loss.backward()
        result.copy_(loss.detach())

    launch, failure = m.capture(one_pass)
    optimizer.clear_gradients()  # capture ran the pass

    def backward(sequences: Tensor, count: int) -> Tensor:
        tokens.copy_(sequences)
        divisor.fill_(count)
        launch()
        return result

    return CapturedPass(backward, failure)


def train_step(backward: Backward, optimizer: Optimizer, batch: list[Tensor], hp: Hyper) -> Tensor:
    """Accumulate the gradients of all micro-batches, then update. Returns this rank's mean loss, ()."""
    loss = 0.0
    for sequences in batch:
        loss = loss + backward(sequences, len(batch))  # out of place: the next call overwrites its result
    optimizer.step(hp)
    return loss


class Passes(NamedTuple):
    """The passes of a run, each a CapturedPass.backward. None: no step of the run takes this pass."""

    looped: Backward | None
    plain: Backward | None  # visits every layer once

    def of(self, hp: Hyper) -> Backward:
        """Return the pass of a step."""
        return self.looped if hp.loops else self.plain


def capture_passes(run: Run, optimizer: Optimizer, sequences: int) -> Passes:
    """Capture the passes that the steps of a run take, of `sequences` each. Logs failures."""
    h = run.h

    def capture(loss_fn: Loss) -> Backward:
        captured = capture_pass(loss_fn, optimizer, sequences)
        if captured.failure:
            run.log(f"pass:eager, no graph ({captured.failure})")
        return captured.backward

    looped = capture(run.loss_fn) if h.trains_loop else None
    every_step_loops = h.trains_loop and h.loop_frac == 0
    plain = None if every_step_loops else capture(run.plain_loss_fn)
    return Passes(looped, plain)


def memory_needed(m: Machine, fn: Callable[[], object]) -> int:
    """Call fn. Return how many more bytes of the GPU's memory it held at its peak than before; 0 on a CPU."""
    if not m.is_gpu:
        fn()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    return torch.cuda.max_memory_allocated() - before


def fit_micro_batch(run: Run, optimizer: Optimizer) -> BatchShape:
    """Return the shape of batches whose micro-batches fit the memory of every rank. Collective.

    Beside the pass of a micro-batch, whose graph keeps its memory, calibration must fit. optimizer: its
    buffers take their part of the memory. The global batch stays as configured. Logs every cut of the
    micro-batches. Raises Fault if not even one sequence fits.
    """
    h = run.h
    T = h.train_seq_len

    def try_pass(shape: BatchShape) -> None:
        held = 0
        if h.calibrates:
            held = memory_needed(run.m, lambda: measure_for_rounding(run, TokenLoader(h, run.m, shape)))
            run.log.status("compiling")  # in place of calibration's progress
        beside = torch.empty(held, dtype=torch.uint8, device=run.m.device)  # what calibration will need
        tokens = torch.zeros(shape.sequences, T + 1, dtype=torch.long, device=run.m.device)
        run.loss_fn(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        del beside

    shape = cut_batch(h, run.m.world_size)
    while not fits(run, partial(try_pass, shape)):
        optimizer.clear_gradients()
        B = shape.sequences
        if B == 1:
            remedies = "lower train_seq_len, set gptq_batches=0," if h.calibrates else "lower train_seq_len"
            raise Fault(
                f"no memory to train on one sequence of train_seq_len={T} tokens; {remedies} or make the "
                "model smaller"
            )
        shape = shape.split(min(parts for parts in range(2, B + 1) if B % parts == 0))
        run.log(f"no memory for micro_batch_tokens:{B * T}; going on with {shape.sequences * T}")
    optimizer.clear_gradients()
    return shape


def compiled_graphs() -> int:
    """Return how many graphs this process has compiled."""
    if "torch._dynamo" not in sys.modules:  # the compiler, which takes 1 s to import
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class WarmUp(NamedTuple):
    """The results of the warm-up."""

    passes: Passes
    calibrate_ms: float  # how long the rehearsal of calibration took on this rank; 0: there was none


def compile_scoring(run: Run) -> None:
    """Compile the scoring pass by scoring zeros. Logs it if only part of the batch fits in memory."""
    T = run.h.eval_seq_len
    B = run.h.eval_batch_tokens // T
    # Two tensors: a graph for one that is given twice would not serve any other batch.
    tokens = torch.zeros(B, T, dtype=torch.long, device=run.m.device)
    targets = torch.zeros_like(tokens)
    with torch.no_grad():
        run.nats_fn(tokens, targets, T)
    if run.nats_fn.most < B:
        run.log(f"no memory for eval_batch_tokens:{B * T}; scoring {run.nats_fn.most * T} at once")


def warmup(run: Run, optimizer: Optimizer, ema: Ema, loader: TokenLoader) -> WarmUp:
    """Compile, capture and run everything that the training clock will see, then undo all effects."""
    h = run.h
    passes = capture_passes(run, optimizer, loader.shape.sequences)
    if optimizer.graph_failure:
        run.log(f"update:eager, no graph ({optimizer.graph_failure})")

    saved = optimizer.snapshot()
    for i in range(h.warmup_steps):
        for backward in filter(None, passes):
            train_step(backward, optimizer, loader.next(), hyper_at(h, 0, 0.0))
            ema.update(0.0)
        if i + 1 == h.warmup_steps or i < 2:
            run.m.sync()
            run.log(f"warmup_step:{i + 1}/{h.warmup_steps}")

    compile_scoring(run)
    optimizer.restore(saved)
    del saved  # the rehearsal gets the memory that calibration will have on the clock: no copy of the state
    ema.reset()

    calibrate_ms = 0.0
    if h.calibrates:  # the second run, after fit_micro_batch's, takes as long as the one on the clock
        run.m.sync()
        started = time.perf_counter()
        calibrate(run, loader)
        run.m.sync()
        calibrate_ms = 1000 * (time.perf_counter() - started)

    loader.seek(0)
    return WarmUp(passes, calibrate_ms)


class Pace(NamedTuple):
    """A stretch of steps of equal cost: a new one begins when the loop begins or the batch grows."""

    loops: bool  # Hyper.loops of the steps
    count: int  # micro-batches of each
    step: int = 0  # the first step
    clock_ms: float = 0.0  # the training clock before the first step
    before: Pace | None = None  # the stretch before; a resumed run knows only those since it resumed

    def step_ms(self, step: int, clock_ms: float) -> float:
        """Return the mean time of this pace's steps up to `step`, which ended at clock_ms.

        If no step of this pace has ended yet, return the mean of all steps so far, or 0 if there are none.
        """
        if step == self.step:
            return clock_ms / max(step, 1)
        return (clock_ms - self.clock_ms) / (step - self.step)

    def leaves_time(self, step: int, clock_ms: float, limit_ms: float) -> bool:
        """Return whether the step in flight and another one, each of the mean time, would end in time.

        With no step timed yet the mean is 0, so the first step of a run always begins. The first step of a
        slower pace is judged by the mean of the faster steps.
        """
        return clock_ms + 2 * self.step_ms(step, clock_ms) <= limit_ms


def hold_back(run: Run, calibrate_ms: float) -> float:
    """Return the limit on the training clock for steps, in ms, which leaves time to calibrate. Collective.

    Calibration counts as training time, so 1.5 times calibrate_ms of rank 0, the time of its rehearsal, is
    held back. Logs how much. Schedules and ETAs then end when the steps do. Raises InputError, after
    discarding the log, if it is more than half of the budget.
    """
    held_back_ms = run.m.number_of_rank_0(1.5 * calibrate_ms)
    limit_ms = run.h.time_limit_ms
    if held_back_ms == 0 or limit_ms == math.inf:
        return limit_ms
    seconds = held_back_ms / 1000
    budget = run.h.max_wallclock_seconds
    run.log(
        f"held_back:{seconds:.1f}s of max_wallclock_seconds:{budget:g} for calibration",
        console=f"{seconds:.1f} of the {budget:g} s are kept for calibration",
    )
    if seconds > budget / 2:
        run.log.discard()
        raise InputError(
            f"config key max_wallclock_seconds: {seconds:.1f} of {budget:g} s are held back for calibration, "
            f"more than half; raise it to {4 * seconds:.0f} or lower gptq_batches={run.h.gptq_batches}"
        )
    return limit_ms - held_back_ms


def check_weights_agree(run: Run, step: int) -> None:
    """Raise Fault if a rank's weights differ from those of most ranks. Collective."""
    names, params = zip(*run.model.named_parameters())
    sums = torch.stack([p.detach().view(torch.int32).sum() for p in params]).tolist()
    every = run.m.of_every_rank(sums)
    common = max(every, key=every.count)
    for rank, rank_sums in enumerate(every):
        for name, rank_sum, common_sum in zip(names, rank_sums, common):
            if rank_sum != common_sum:
                raise Fault(
                    f"step {step}: {name} of rank {rank} differs from the others; is its memory faulty?"
                )


def validate(run: Run, step: int, train_ms: float, loops: bool = True) -> Score:
    """Score val in disjoint windows and log it as a step. loops: whether training loops, as scoring does.

    Raises Fault if ranks differ.
    """
    check_weights_agree(run, step)
    score = run.score("validation", run.h.eval_seq_len)
    note = " with a loop that training has not begun" if run.h.has_loop and not loops else ""
    run.log(
        f"step:{step}/{run.h.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
        f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms",
        console=f"step {step:,}: val_loss {score.loss:.4f}, val_bpb {score.bpb:.4f}{note}",
    )
    return score


def describe_progress(h: Config, step: int, clock_ms: float, limit_ms: float | None = None) -> str:
    """Return the ETA and how much is used of the budget, time or iterations, that will end the run.

    limit_ms: the time for steps; None: as configured.
    """
    progress = hyper_at(h, step, clock_ms, limit_ms).progress
    seconds = clock_ms / 1000
    if progress > step / h.iterations:
        used = f"step {step:,}, {seconds:.0f} of {h.max_wallclock_seconds:.0f} s"
    else:
        used = f"step {step:,} of {h.iterations:,}"
    return f"{used}, ETA {seconds * (1 / progress - 1):.0f} s" if progress > 0 else used


def log_step(run: Run, step: int, loss: Tensor, clock_ms: float, limit_ms: float | None = None) -> float:
    """Average a step's loss over the ranks, in place. Log and return the mean.

    limit_ms: the time for steps; None: as configured.
    """
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    run.log(
        f"step:{step}/{run.h.iterations} train_loss:{loss.item():.4f} train_time:{clock_ms:.0f}ms "
        f"step_avg:{clock_ms / step:.2f}ms",
        console=f"{describe_progress(run.h, step, clock_ms, limit_ms)}: train_loss {loss.item():.4f}, "
        f"{clock_ms / step:.1f} ms a step",
    )
    return loss.item()


def log_changes(run: Run, pace: Pace, progress: float, accum: int) -> None:
    """Log which change has begun a pace: the loop begins, the batch grows, or both.

    accum: micro-batches per step once the batch has grown.
    """
    before = pace.before
    at = f"step:{pace.step} progress:{progress:.3f}"
    if pace.loops != before.loops:
        run.log(f"loop_begins {at} visits:{run.h.num_visits}")
    if pace.count != before.count:
        run.log(f"batch_grows {at} tokens:{run.h.train_batch_tokens * pace.count // accum}")


def describe_divergence(run: Run, step: int, newest: Vitals, good: int) -> str:
    """Describe a divergence: the last loss and gradient norm, first bad tensor, last good checkpoint."""
    bad = next((name for name, p in run.model.named_parameters() if not p.isfinite().all()), "none")
    return (
        f"step {step}: diverged, loss {newest.loss:.4g}, gradient norm {newest.norm:.4g}, "
        f"first bad tensor {bad}, last good checkpoint {good or 'none'}"
    )


# Dense bf16 FLOPs a second by a part of the device's name, from NVIDIA's data sheets; the first that fits.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def training_flops(h: Config, pace: Pace | None, step: int, micro_batch: int) -> int:
    """Return the FLOPs of the first `step` steps.

    pace: the last step's, which leads to the earlier ones. micro_batch: its tokens over all ranks.
    """
    total = 0
    while pace:
        tokens = (step - pace.step) * pace.count * micro_batch
        total += tokens * flops_per_token(h, pace.loops)
        step = pace.step
        pace = pace.before
    return total


def log_compute(run: Run, pace: Pace, accum: int, step: int, train_ms: float, tokens: int) -> None:
    """Log the tokens, the model's FLOPs, and MFU, the ratio of these FLOPs to the devices' peak in the time.

    accum: micro-batches per step once the batch has grown. The MLP's fp8 products count like all others,
    against the peak of bf16. A device that is not in PEAKS has no MFU. A resumed run has neither FLOPs nor
    MFU if steps may have cost more or less before.
    """
    h = run.h
    params = scaling_params(h)
    line = f"compute scaling_params:{params} flops_per_token:{flops_per_token(h)} tokens:{tokens} "
    line += f"tokens_per_param:{tokens / params:.4f}"
    shown = f"compute: {tokens:,} tokens, {tokens / params:.3g} for each of {params:,} parameters"
    if not run.resumed or not h.steps_differ:
        micro_batch = h.train_batch_tokens // accum
        flops = training_flops(h, pace, step, micro_batch)
        line += f" flops:{flops:.6e}"
        shown += f", {flops:.3g} FLOPs"
        peak = next((peak for name, peak in PEAKS.items() if name in run.m.device_name), 0.0)
        if peak:
            mfu = flops / (train_ms / 1000 * run.m.world_size * peak)
            line += f" mfu:{mfu:.4f}"
            shown += f", MFU {mfu:.1%}"
    run.log(line, console=shown)


@torch.no_grad()
def choose_weights(run: Run, loader: TokenLoader, ema: Ema) -> str:
    """Return and log which weights, "live" or "ema", have the lower loss on the loader's next training batch.

    This is for a run that ended early: the average may lag far behind. All ranks return the same.
    """
    model = copy(run.model)  # with the same parameters
    model.ops = Ops(run.model.ops.attend)  # nothing that would compile
    nats_fn = ScoringPass(model.nats)  # without a compiler its logits take more memory than calibration
    batch = loader.next()

    def loss_of(sequences: Tensor) -> Tensor:
        return nats_fn(sequences[:, :-1], sequences[:, 1:], run.h.train_seq_len).mean()

    live = [p.clone() for p in ema.params]
    losses = []
    for weights in (live, ema.average):
        torch._foreach_copy_(ema.params, weights)
        losses.append(torch.stack([loss_of(sequences) for sequences in batch]).mean().double())
    torch._foreach_copy_(ema.params, live)

    both = torch.stack(losses)
    dist.all_reduce(both, dist.ReduceOp.AVG)
    live_loss, average_loss = both.tolist()
    average_wins = run.m.number_of_rank_0(average_loss <= live_loss)  # a nan does not win
    chosen = "ema" if average_wins else "live"
    run.log(
        f"ended_early: train_loss live:{live_loss:.4f} ema:{average_loss:.4f} the artifact takes {chosen}"
    )
    return chosen


def log_early_end(run: Run, by_signal: bool, step: int, train_ms: float) -> None:
    """Log that a signal or the clock ends training before all iterations."""
    cause = "signal" if by_signal else "wallclock_cap"
    reason = "a signal" if by_signal else "the time is up"
    run.log(
        f"stopping_early: {cause} train_time:{train_ms:.0f}ms step:{step}/{run.h.iterations}",
        console=f"training ends after {step:,} steps and {train_ms / 1000:.1f} s: {reason}",
    )


class Ready(NamedTuple):
    """The parts of training, compiled and captured, and the point from which training goes on."""

    limit_ms: float  # on the training clock for steps: leaves enough for calibration
    optimizer: Optimizer
    ema: Ema
    loader: TokenLoader  # of micro-batches that fit the memory
    passes: Passes
    checkpoints: Checkpoints
    start: Start


def get_ready(run: Run) -> Ready:
    """Build the parts of training, warm them up, and restore the checkpoint of a run that resumes.

    Once this returns, a signal ends training cleanly. Collective: all ranks leave together.
    """
    optimizer = run.time_phase("compile", Optimizer, run.model, run.h, run.m)
    ema = Ema(run.model, run.h)
    shape = run.time_phase("compile", fit_micro_batch, run, optimizer)
    loader = TokenLoader(run.h, run.m, shape)
    warm = run.time_phase("compile", warmup, run, optimizer, ema, loader)

    checkpoints = Checkpoints(run, optimizer, ema, loader)
    start = checkpoints.restore(run.resumed) if run.resumed else BEGINNING
    run.m.signals.may_finish = True
    return Ready(
        limit_ms=hold_back(run, warm.calibrate_ms),
        optimizer=optimizer,
        ema=ema,
        loader=loader,
        passes=warm.passes,
        checkpoints=checkpoints,
        start=start,
    )


class Trained(NamedTuple):
    """The results of training, besides the weights in the model."""

    ema: Ema
    steps: int
    train_ms: float
    late_graphs: int  # graphs compiled while the clock ran; should be 0
    calibration: Calibration
    artifact_weights: str  # ema | live: the knob, or the better ones if the run ended early


class Ended(NamedTuple):
    """How the steps of training ended."""

    step: int
    train_ms: float
    stop: Stop  # agreed by all ranks
    vitals: Vitals  # of the last step
    late_graphs: int


def finish_training(run: Run, ready: Ready, ended: Ended, pace: Pace) -> Trained:
    """Calibrate, choose the weights for the artifact, write the last checkpoint, and log an early end.

    pace: that of the last step. Raises Diverged if the last step or the calibration of any rank has diverged.
    """
    step = ended.step
    train_ms = ended.train_ms
    run.log.may_move = True
    run.phases["train"] = train_ms
    last_diverged = run.m.largest(not ended.vitals.are_sound)
    if last_diverged or ended.stop == Stop.DIVERGED:
        good = ready.checkpoints.last_good()
        raise Diverged(describe_divergence(run, step, ended.vitals, good), step, train_ms)

    position = ready.loader.position
    accum = ready.loader.shape.accum
    log_compute(run, pace, accum, step, train_ms, tokens=position * run.h.train_seq_len)
    calibration = Calibration()
    if run.h.calibrates:
        calibration = run.time_phase("calibrate", calibrate, run, ready.loader)
    check_calibration(calibration, step, train_ms)
    by_signal = ended.stop == Stop.SIGNAL
    artifact_weights = run.h.artifact_weights
    if run.h.makes_artifact and artifact_weights == "ema" and (by_signal or ready.ema.is_young):
        # Counted as calibration, because it too reads training text after the last step.
        artifact_weights = run.time_phase("calibrate", choose_weights, run, ready.loader, ready.ema)
    ready.loader.seek_sequence(position)  # where a resumed run would calibrate from
    ready.checkpoints.save(step, train_ms, last=True)
    if step < run.h.iterations:
        log_early_end(run, by_signal, step, train_ms)
    return Trained(
        ema=ready.ema,
        steps=step,
        train_ms=train_ms,
        late_graphs=ended.late_graphs,
        calibration=calibration,
        artifact_weights=artifact_weights,
    )


def first_pace(h: Config, ready: Ready) -> Pace:
    """Return the pace of the first step.

    A resumed run counts the steps before its checkpoint into the mean time if all steps cost the same.
    """
    hp = hyper_at(h, ready.start.step, ready.start.clock_ms, ready.limit_ms)
    timed_from = ready.start if h.steps_differ else BEGINNING
    count = ready.loader.shape.count(hp.growth)
    return Pace(hp.loops, count, step=timed_from.step, clock_ms=timed_from.clock_ms)


def train(run: Run) -> Trained:
    """Train until the iterations or the time are spent or a signal arrives. Raises Diverged.

    The training clock is rank 0's; it stands still during validation. The host queues a step while the device
    works on the previous step. The host then waits for the previous step's loss and gradient norm, so it sees
    a divergence one step late.
    """
    ready = get_ready(run)
    h = run.h
    m = run.m
    shape = ready.loader.shape
    limit_ms = ready.limit_ms
    step, clock_ms = ready.start
    fetch_newest = m.fetch(torch.zeros(2, device=m.device))  # the newest step's Vitals; at first zeros
    graphs_before = compiled_graphs()
    # perf_counter() at which the training clock would read 0. Validation moves it, so the clock stands still.
    clock_zero = time.perf_counter() - clock_ms / 1000

    def clock() -> float:
        return 1000 * (time.perf_counter() - clock_zero)

    pace = first_pace(h, ready)
    shown_loss = math.nan
    stop = Stop.NO  # agreed by all ranks
    while step < h.iterations and stop == Stop.NO and pace.leaves_time(step, clock_ms, limit_ms):
        if h.val_loss_every and step % h.val_loss_every == 0:
            m.sync()
            validation_began = time.perf_counter()
            validate(run, step, clock(), loops=pace.loops)
            clock_zero += time.perf_counter() - validation_began

        hp = hyper_at(h, step, clock_ms, limit_ms)
        count = shape.count(hp.growth)
        if (hp.loops, count) != (pace.loops, pace.count):
            pace = Pace(hp.loops, count, step=step, clock_ms=clock_ms, before=pace)
            log_changes(run, pace, hp.progress, shape.accum)
        batch = ready.loader.next(pace.count)
        loss = train_step(ready.passes.of(hp), ready.optimizer, batch, hp)
        ready.ema.update(hp.progress)
        step += 1

        fetch_previous = fetch_newest
        fetch_newest = m.fetch(torch.stack([loss.double(), ready.optimizer.norm]))
        # One step late, so that the device can work on the newest step in the meantime.
        previous_vitals = Vitals(*fetch_previous()[0].tolist())
        clock_ms, stop = m.agree(clock(), reason_to_stop(m, previous_vitals))

        if step % h.train_log_every == 0 or step.bit_count() == 1:  # powers of two: loss falls fast at first
            shown_loss = log_step(run, step, loss, clock_ms, limit_ms)
        ready.checkpoints.save(step, clock_ms)
        run.log.status(f"{describe_progress(h, step, clock_ms, limit_ms)}: train_loss {shown_loss:.4f}")

    m.sync()
    train_ms = m.number_of_rank_0(clock())  # one clock: the files of the last checkpoint must say the same
    late_graphs = compiled_graphs() - graphs_before
    vitals = Vitals(*fetch_newest()[0].tolist())
    return finish_training(run, ready, Ended(step, train_ms, stop, vitals, late_graphs), pace)


# -----------------------------------------------------------------------------
# 24. Commands: what the command line runs.


@memory_remedy("to make the artifact", "close other programs, or make the model smaller")
def write_artifact(run: Run, trained: Trained, path: str, room: int) -> str:
    """Write the artifact of the averaged or live weights to `path`, or elsewhere if `path` cannot be written.

    room: how many bytes the artifact may have. Returns the artifact's path.
    """
    h = run.h
    weights = dict(run.model.named_parameters())
    if trained.artifact_weights == "ema":
        weights = dict(zip(weights, trained.ema.average))
    started = time.perf_counter()

    def tell(done: int, total: int) -> None:
        run.log.progress("packing, attempts at most", done, total, started)

    run.log.status("packing")
    fitted = fit_artifact(weights, h, room, run.time_phase, trained.calibration, tell=tell)
    written = write_somewhere(path, fitted.blob)
    made = f"artifact weights:{trained.artifact_weights} int6_step:{fitted.int6_step}"
    if h.trellis:
        made += f" trellis:{bind_trellis(run.m.device).label}"
    run.log(made)
    if written != path:
        run.log(f"artifact file:{written}, because {path} cannot be written; eval takes it from there")
    return written


def unigram_nats(h: Config, targets: np.ndarray) -> float:
    """Return the nats of targets under the token frequencies of the first training shard alone."""
    first = load_shard(split_files(h.data_path, "train")[0], h.vocab_size)
    counts = np.bincount(first, minlength=h.vocab_size) + 1.0
    return -np.log(counts / counts.sum())[targets].sum()


class Metric(NamedTuple):
    """A way to score an artifact.

    Labels keep the words that the community's parsers look for, `final_int6_*` and `int6_lzma_*` (codec xz),
    whatever the bits of the codes.
    """

    name: str  # chunked | sliding | ttt
    label: str  # names its lines in the log, final_int6_LABEL
    stride: int
    learns: bool = False  # whether test-time training takes part


class FinalScore(NamedTuple):
    """The score that counts for a run."""

    metric: str  # int6_CODER_METRIC, from the codec's label and the metric's name; time_to_loss in a race
    score: Score

    @property
    def exact(self) -> str:
        """Metric, loss and bpb for the log."""
        return f"metric:{self.metric} {self.score.exact}"


def metrics_of(h: Config) -> list[Metric]:
    """Return the metrics by which a run scores its artifact. The last one counts, and the auditor tests it.

    The metrics are disjoint windows, sliding windows if the stride is shorter, and test-time training if it
    is on.
    """
    metrics = [Metric("chunked", "roundtrip", h.eval_seq_len)]
    if h.eval_stride < h.eval_seq_len:
        metrics.append(Metric("sliding", "sliding_window", h.eval_stride))
    if h.ttt_lr > 0:
        metrics.append(Metric("ttt", "ttt", TTT_FORMS[h.ttt_form].stride(h), learns=True))
    return metrics


def score_artifact(run: Run) -> FinalScore:
    """Score the weights by each metric of metrics_of and log each score. Returns the last."""
    h = run.h
    run.phases["eval"] = 0.0
    coder = CODECS[h.codec].label
    for metric in metrics_of(h):
        label = f"final_int6_{metric.label}"
        score = run.score(label, metric.stride, learns=metric.learns)
        shown_stride = f"stride:{metric.stride} " if metric.stride < h.eval_seq_len else ""
        run.log(
            f"{label} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} {shown_stride}"
            f"eval_time:{score.ms:.0f}ms",
            console=f"artifact, {metric.name}: {score.sentence}",
        )
        run.log.to_file(f"{label}_exact {score.exact}")
        run.phases["eval"] += score.ms
        final = FinalScore(f"int6_{coder}_{metric.name}", score)

    if h.report_split:
        reported = run.score(h.report_split, h.eval_seq_len, h.report_split)
        run.log(f"report split:{h.report_split} metric:int6_{coder}_chunked {reported.exact}")
    return final


def describe_size(num_bytes: int, h: Config) -> str:
    """Return a submission's size and its distance from the cap, if there is one."""
    if not h.has_cap:
        return f"{num_bytes:,} bytes with the packed code"
    left = h.size_cap - num_bytes
    distance = f"{left:,} left under" if left >= 0 else f"{-left:,} over"
    return f"{num_bytes:,} bytes with the packed code, {distance} the cap of {h.size_cap:,}"


PHASES = ("load", "compile", "train", "calibrate", "quantize", "compress", "decompress", "eval")


def describe_phases(phases: Mapping[str, float]) -> str:
    """Return the seconds of all phases that took noticeable time. phases: milliseconds by name."""
    took = {phase: phases.get(phase, 0.0) / 1000 for phase in PHASES}
    return ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in took.items() if seconds >= 0.05)


class TrainedScores(NamedTuple):
    """The scores that need no artifact."""

    live: Score  # of the training weights, from the last validation, which decides a race
    unigram: float  # bpb under the token frequencies alone


def score_trained(run: Run, trained: Trained) -> TrainedScores:
    """Score the live weights, then the averaged ones, and log all. The model keeps the averaged ones."""
    h = run.h
    live = validate(run, trained.steps, trained.train_ms)
    torch._foreach_copy_(trained.ema.params, trained.ema.average)
    averaged = run.score("ema", h.eval_seq_len)
    run.log.to_file(f"final_live {live.exact} eval_time:{live.ms:.0f}ms")
    run.log(
        f"final_ema {averaged.exact} eval_time:{averaged.ms:.0f}ms",
        console=f"averaged weights: {averaged.sentence}",
    )
    nats = unigram_nats(h, run.held_out("val")[1:])
    unigram = bpb(nats, live.bytes)
    run.log.to_file(f"unigram val_loss:{nats / live.tokens:.4f} val_bpb:{unigram:.4f}")
    return TrainedScores(live, unigram)


class Submission(NamedTuple):
    """A submission: the score of its artifact, read back from disk, its bytes and its hash."""

    final: FinalScore
    bytes_total: int
    bytes_code: int
    sha256: str


def score_submission(run: Run, written: str, bytes_code: int) -> Submission:
    """Read the artifact that rank 0 has written, load it into the model, score it, and log the results."""
    blob = run.m.of_rank_0(Path(written).read_bytes() if run.m.rank == 0 else b"")
    bytes_total = len(blob) + bytes_code
    coder = CODECS[run.h.codec].label
    run.log.to_file(
        f"Serialized model int6+{coder}: {len(blob)} bytes\nCode size: {bytes_code} bytes\n"
        f"Total submission size int6+{coder}: {bytes_total} bytes"
    )
    run.model.load_state_dict(run.time_phase("decompress", unpack_artifact, blob))
    return Submission(score_artifact(run), bytes_total, bytes_code, sha256(blob))


def describe_outcome(run: Run, final: FinalScore, unigram: float) -> str:
    """Return the outcome of a run in words: its score, or the distance to the target of its race."""
    h = run.h
    if h.target_loss == 0:
        return f"score: {final.score.sentence}; token frequencies alone (unigram) give {unigram:.4f}"
    left = h.target_loss - final.score.loss
    side = "below" if left >= 0 else "above"
    return f"race: {final.score.sentence}, {abs(left):.4f} {side} the target of {h.target_loss}"


def log_final_score(run: Run, trained: Trained, scores: TrainedScores, submission: Submission | None) -> None:
    """Write the last line of the log: the score that counts, a race's last validation or the artifact's."""
    h = run.h
    final = FinalScore("time_to_loss", scores.live) if h.target_loss else submission.final
    line = [f"final_score {final.exact}"]
    shown = ["", describe_outcome(run, final, scores.unigram)]
    if h.target_loss:
        line.append(f"target:{h.target_loss}")
    if submission:
        line.append(f"bytes_total:{submission.bytes_total} bytes_code:{submission.bytes_code}")
        shown.append(f"size: {describe_size(submission.bytes_total, h)}")
    eval_ms = run.phases.get("eval", scores.live.ms)
    line.append(f"steps:{trained.steps} train_time:{trained.train_ms:.0f}ms eval_time:{eval_ms:.0f}ms")
    line.append(f"seed:{h.seed}")
    if submission:
        line.append(f"sha256:{submission.sha256}")
    shown.append(f"time: {describe_phases(run.phases)}")
    run.log(" ".join(line), console="\n".join(shown))


def conclude(run: Run, trained: Trained, path: str) -> int:
    """Write the artifact to `path`, read it back, score it, and log the results. Returns the exit status.

    A run may make no artifact. The status is 1 when the submission is over the cap, a graph was compiled
    while the clock ran, or the artifact had to be written elsewhere; else 0.
    """
    h = run.h
    m = run.m
    log = run.log
    if m.is_gpu:
        log(
            f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB "
            f"reserved: {torch.cuda.max_memory_reserved() // 2**20} MiB"
        )

    code_bytes = len(packed_code(own_source())) if h.makes_artifact else 0
    written = path
    if not h.makes_artifact:
        log("no artifact is made: size_cap=0")
    elif m.rank == 0:  # first, so that the artifact exists whatever fails later
        written = write_artifact(run, trained, path, h.size_cap - code_bytes)

    scores = score_trained(run, trained)
    submission = score_submission(run, written, code_bytes) if h.makes_artifact else None

    log.to_file("phase_times " + " ".join(f"{phase}:{run.phases.get(phase, 0):.0f}ms" for phase in PHASES))
    over = submission.bytes_total - h.size_cap if submission else 0
    if over > 0:
        log(
            f"artifact over the cap: {submission.bytes_total} bytes, {over} over size_cap={h.size_cap}; "
            "file kept"
        )
    late = m.largest(trained.late_graphs)
    if late:
        log(
            f"late compilation: {int(late)} graphs were compiled on the clock; "
            "raise warmup_steps or report it"
        )
    log_final_score(run, trained, scores, submission)
    if m.rank == 0:
        files = [f"log: {log.path}"]
        if submission:
            files.append(f"artifact: {written}")
        with suppress(OSError, InputError):
            show("\n".join(files))
    moved = m.largest(written != path)
    return 1 if over > 0 or late or moved else 0


def utc_stamp() -> str:
    """Return the UTC time, for names of files."""
    return time.strftime("%Y%m%d_%H%M%S", time.gmtime())


def command_train(h: Config, env: Mapping[str, str]) -> int:
    """Train, write the artifact, score it. Returns the exit status."""
    started = time.perf_counter()
    name = plain_name("run_id", h.run_id or f"{utc_stamp()}_{h.preset}_seed{h.seed}")
    m = init_machine(h, env)
    h = for_device(h, m)
    started += m.bind_ms / 1000
    base = os.path.join(h.out_dir, m.of_rank_0(name))

    # All faults of the input are found here: a log would take the run_id.
    artifact = f"{base}.int6.{h.codec}"
    with m.raising_together():
        has_log = os.path.lexists(base + ".txt")  # if so, Log refuses the run or resumes it
        if os.path.lexists(artifact) and not has_log and not h.resume:
            raise InputError(f"{artifact}: exists; choose another run_id, or move it away")
        dataset = load_dataset(h, trains=True)
    check_ranks_agree(h, m, dataset)
    check_train_split(h, m)
    resumed = read_state(h, m, base, dataset) if h.resume else None

    log = Log(base + ".txt", m, resume=bool(h.resume))
    with guarded(m, log):
        run = start_run(h, m, log, dataset, started, resumed=resumed)
        return conclude(run, train(run), artifact)


class StoredModel(NamedTuple):
    """An artifact and its content."""

    blob: bytes
    h: Config  # the model's knobs from the header, the others as given
    tensors: dict[str, Tensor]


def read_model(path: str, argv: list[str], env: Mapping[str, str]) -> StoredModel:
    """Read an artifact. Its header fixes the model's knobs; argv and env set the others.

    Raises InputError when the artifact is damaged or does not fit this script, or argv sets a knob that the
    artifact fixes. Such a knob in env is ignored.
    """
    stored = [key for key in STORED_KNOBS + CHANGED_KNOBS if key not in knobs_with(RESCORED)]
    fixed = ["codec", "depth", *stored]
    for argument in argv:
        if argument.split("=")[0] in fixed:
            raise InputError(f"{argument[:80]}: the artifact fixes this knob; leave it out")
    knobs = read_knobs(argv, {k: v for k, v in env.items() if k.lower() not in fixed})

    with explained(f"{path}: cannot read the artifact", "name a file that train wrote"):
        blob = read_file(path, limit=MAX_WEIGHTS)

    try:
        header, payload = open_artifact(blob)
        tensors = read_tensors(header, payload)  # every byte is checked before a model is built
        h = make_config(knobs, header["config"] | {"codec": codec_of(blob)})
        found = {name: tuple(shape) for name, _, shape, _ in header["tensors"]}
        wanted = {name: parameter.shape for name, parameter in parameter_table(h).items()}
        if different := found.items() ^ wanted.items():
            name, _ = min(different)
            raise ValueError(f"artifact: {name[:40]!r} does not fit; use the script that wrote it")
    except InputError as e:
        raise InputError(f"{path} with the knobs given: {e}") from None
    except ValueError as e:
        raise InputError(f"{path}: {e}") from None
    return StoredModel(blob, h, tensors)


class LoadedRun(NamedTuple):
    """A run whose model holds an artifact's weights, and the artifact's bytes."""

    run: Run
    blob: bytes


def load_run(path: str, argv: list[str], env: Mapping[str, str]) -> LoadedRun:
    """Make a run from an artifact.

    Raises InputError as read_model does, and for data that do not fit the model.
    """
    stored = read_model(path, argv, env)
    h = stored.h
    started = time.perf_counter()
    run_id = plain_name("run_id", h.run_id or f"{utc_stamp()}_eval_{os.getpid()}")
    m = init_machine(h, env, trains=False)
    h = for_device(h, m)
    started += m.bind_ms / 1000
    log_path = os.path.join(h.out_dir, m.of_rank_0(run_id) + ".txt")
    with m.raising_together():
        dataset = load_dataset(h)
    check_ranks_agree(h, m, dataset, stored.blob)
    run = start_run(h, m, Log(log_path, m), dataset, started)
    run.model.load_state_dict(stored.tensors)
    return LoadedRun(run, stored.blob)


def command_eval(path: str, argv: list[str], env: Mapping[str, str]) -> int:
    """Score an artifact from its file. Returns the exit status."""
    run, blob = load_run(path, argv, env)
    with guarded(run.m, run.log):
        final = score_artifact(run)
        run.log(
            f"eval_score {final.exact} eval_time:{run.phases['eval']:.0f}ms sha256:{sha256(blob)}",
            console=f"\nscore: {final.score.sentence}\n"
            f"time: {describe_phases(run.phases)}\nlog: {run.log.path}",
        )
    return 0


class Tool(NamedTuple):
    """A row of TOOLS: a program of the repository, and the module as which Python runs it; "": as a file."""

    file: str
    module: str = ""


TOOLS = {"audit": Tool("tools/audit.py"), "bench": Tool("tools/lab/bench.py", "lab.bench")}


def command_tool(name: str, argv: list[str], env: Mapping[str, str]) -> int:
    """Run a tool of the repository on this script in a subprocess, and return its exit status.

    SIGTERM is passed on to the tool. Tools live outside this file because they judge this file. Raises
    InputError outside the repository.
    """
    script = Path(__file__).resolve()
    tool = TOOLS[name]
    root = next((folder for folder in script.parents if (folder / tool.file).is_file()), None)
    if root is None:
        files = [os.path.abspath(a) if os.path.isfile(a) else a for a in argv if "=" not in a]
        command = " ".join(["./run.sh", name, *files, "--script", str(script), "KEY=VALUE"])
        raise InputError(
            f"{tool.file} not found: it ships with the bankshot repository. From there, run {command}"
        )

    target = ["-m", tool.module] if tool.module else [str(root / tool.file)]
    paths = [str(root / "tools"), *filter(None, [env.get("PYTHONPATH")])]
    # From Python 3.11 on, -m ignores modules in the working folder if this is set.
    env = {**env, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    child = subprocess.Popen([sys.executable, *target, *argv, "--script", str(script)], env=env)
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    status = child.wait()
    signal.signal(signal.SIGTERM, before)
    return status if status >= 0 else 128 - status


def describe_scale(h: Config) -> str:
    """Return a line on what a run of a given length takes: parameters, tokens, FLOPs, memory."""
    tokens = h.iterations * h.train_batch_tokens
    params = sum(math.prod(parameter.shape) for parameter in parameter_table(h).values())
    return (
        f"# {scaling_params(h):,} of {params:,} parameters in products, {tokens:,} tokens, "
        f"{flops_per_token(h):,} FLOPs each, {tokens * flops_per_token(h):.3g} in all; "
        f"{TRAINING_BYTES * params / 1e9:.3g} GB to train, activations aside"
    )


USAGE = "usage: train_gpt.py [train | eval ARTIFACT | audit ARTIFACT | bench | config] [key=value ...]"


def run_command(command: str, rest: list[str], env: Mapping[str, str]) -> int:
    """Run one command and return its exit status. Raises InputError for an unknown command."""
    has_file = bool(rest) and "=" not in rest[0]
    if command in ("-h", "--help"):
        show(f"{USAGE}\n\n{__doc__ or ''}")  # python -OO has no docstrings
        return 0
    if command == "config":
        h = load_config(rest, env)
        show("\n".join(f"{key}: {value}" for key, value in sorted(vars(h).items())))
        if h.tokens_per_param:
            show(describe_scale(h))
        return 0
    check_torch()
    if command == "train":
        return command_train(load_config(rest, env), env)
    if command == "eval" and has_file:
        return command_eval(rest[0], rest[1:], env)
    if command == "bench" or (command == "audit" and has_file):
        return command_tool(command, rest, env)
    raise InputError(f"{' '.join([command, *rest][:2])!r} is not a command. {USAGE}")


def end_with(error: Exception) -> int:
    """Print a known error as one line and return its exit status; raise any other error again."""
    fault = known_fault(error)
    if fault:
        print(f"train_gpt.py: {fault}", file=sys.stderr, flush=True)
        tell_torchrun(str(fault))
        return fault.status
    if not lost_another_rank(error):
        raise error
    print("train_gpt.py: another rank is gone before the run began", file=sys.stderr, flush=True)
    time.sleep(LINGER_S)
    os._exit(Fault.status)  # a proper shutdown would wait for that rank


def main(argv: list[str]) -> int:
    """Run a command and return its exit status. A OneLineError is printed as one line."""
    command = "train"
    rest = argv
    if argv and "=" not in argv[0]:
        command = argv[0]
        rest = argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may not fit an ASCII terminal
    try:
        return run_command(command, rest, os.environ)
    except BrokenPipeError:
        return 1
    except Exception as e:
        return end_with(e)  # end_with must not keep the error: its frames keep CUDA graphs alive
    finally:
        if dist.is_initialized():
            traceback.clear_frames(sys.exc_info()[2])  # drop graphs, or NCCL's shutdown waits for them
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
