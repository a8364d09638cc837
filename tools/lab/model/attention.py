"""Times every attention of this machine, forward and backward, on the masks and head sizes a model may want.

    ./run.sh bench --attention [--paths flash,flex] [--json FILE] [key=value ...]
    ./run.sh bench --attention preset=h100x1_sp1024 train_batch_tokens=98304 micro_batch_tokens=98304

Tensors are those of one layer and one micro-batch: q (B, T, H, Dh), k and v (B, T, Hkv, Dh), contiguous and
random. There are two head shapes: the config's heads, and half as many heads of twice the size.

Masks, all of them causal:

    causal       a token sees itself and all tokens before it
    documents    a token sees its own document. Lengths are seeded and exponential, with mean 1,000, or T / 2
                 if that is less. Every sequence begins a document, and its end cuts the last one.
    window W     a token sees itself and the W - 1 tokens before it. W is 512 and 256, at most T / 2 and
                 T / 4.
    both         documents and a window together

Paths:

    cudnn, flash, efficient, math    the trainer's attend_sdpa with that backend of PyTorch. Only efficient
                                     accepts a mask; the others run on `causal` alone. A GPU runs
                                     math only when --paths names it.
    varlen                           torch.nn.attention.varlen
    flex                             flex_attention, compiled; its block mask is made off the clock. It has no
                                     backward on a CPU.
    flash4                           the trainer's attend_flash4, compiled as there (package flash-attn-4)

A path that needs a mask, or as many k and v heads as q heads, is charged for making them; its row says so.

A path is timed if its output, dq, dk and dv of the first and the last sequence have an error of at most 2 %,
|x - x64| / |x64| against the reference in float64. A path that raises is skipped, with its reason.

    us           the median of a layer by the device's clock. A matrix product is queued before each call, so
                 that launches by the host do not count.
    backward     The backward time is (forward + backward) minus forward.
    TFLOP/s      products of visible pairs only: 4 Dh for each pair and head forward, 2.5 times that backward
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.shared.exact import attend_exact, relative
from lab.shared.timing import call_ms, device_times, fixed_width, say_noise, typical
from lab.shared.trainer import Session, first_line, known_errors_of, load_trainer, open_session
from ledger.files import write_atomic
from progress import Progress
from script import BadInput

MEAN_DOCUMENT = 1000  # tokens, before the end of a sequence cuts its last document
WINDOWS = (512, 256)
WRONG = 0.02  # relative error above which a path is not timed; bfloat16 makes 0.004
WARM = 3  # calls before the timed ones
CALLS = 15  # timed calls
FILLER = 8192  # side of the product before a timed call: 1.7 ms on an H100
BACKWARD = 2.5  # products of a backward over those of a forward: five for two
PACKAGES = ("triton", "flash-attn-4")
COLUMNS = {  # width of each column; a negative width aligns it to the left
    "path": -10, "forward us": 12, "backward us": 13, "both us": 11, "TF/s fwd": 10, "TF/s bwd": 10,
    "err out": 9, "err dq": 9, "err dk": 9, "err dv": 9,
}  # fmt: skip
ERRORS = ("out", "dq", "dk", "dv")


class Unfit(Exception):
    """The reason, in one line, why a path cannot run on this machine or mask."""


# ---- shapes and masks ----------------------------------------------------------------------------


class HeadShape(NamedTuple):
    """The heads of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads} head(s) of {self.head_dim}, {self.kv_heads} KV"


class Mask(NamedTuple):
    """Which keys a token sees. window: their number, itself included; 0: all before it.

    bounds: where documents, or else sequences, begin in the flat batch, and its end.
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
        """Count the visible (query, key) pairs of the batch for one head."""
        total = 0
        for length in self.lengths:
            seen = min(length, self.window or length)
            total += seen * (seen + 1) // 2 + (length - seen) * seen
        return total


def head_shapes_of(h: Any) -> list[HeadShape]:
    """Return the config's heads and, if their number is even, half as many of twice the size."""
    head_shapes = [HeadShape(h.num_heads, h.num_kv_heads, h.head_dim)]
    if h.num_heads % 2 == 0:
        kv_heads = 1 if h.num_kv_heads % 2 else h.num_kv_heads // 2
        head_shapes.append(HeadShape(h.num_heads // 2, kv_heads, 2 * h.head_dim))
    return head_shapes


def document_bounds(rows: int, T: int, seed: int = 0) -> list[int]:
    """Draw the bounds of documents packed into sequences of T tokens, whose ends cut the last document."""
    rng = random.Random(seed)
    mean = max(min(MEAN_DOCUMENT, T // 2), 1)
    bounds = [0]
    for row in range(rows):
        end = (row + 1) * T
        while bounds[-1] < end:
            length = 1 + int(rng.expovariate(1 / mean))
            bounds.append(min(bounds[-1] + length, end))
    return bounds


def masks_of(rows: int, T: int) -> list[Mask]:
    """Return the masks to time. In a short sequence, windows are a half and a quarter of it, not WINDOWS."""
    whole = [*range(0, rows * T + 1, T)]
    cut = document_bounds(rows, T)
    wide = max(min(WINDOWS[0], T // 2), 1)
    narrow = max(min(WINDOWS[1], T // 4), 1)
    return [
        Mask("causal", 0, False, whole),
        Mask("documents", 0, True, cut),
        Mask(f"window {wide}", wide, False, whole),
        Mask(f"window {narrow}", narrow, False, whole),
        Mask(f"documents, window {wide}", wide, True, cut),
    ]


class MaskArguments(NamedTuple):
    """A mask for the attend_ functions, given by place: older scripts call documents docs."""

    window: int
    documents: Tensor | None


class MaskedLayer(NamedTuple):
    """A layer's tensors and a mask. ids (B, T) int32: the number of a token's document or sequence."""

    s: Session
    head_shape: HeadShape
    mask: Mask
    tensors: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    bounds: Tensor
    ids: Tensor

    @property
    def trainer_arguments(self) -> MaskArguments:
        """What the attend_ functions take after q, k and v."""
        documents = self.ids - self.ids[:, :1] if self.mask.documents else None
        return MaskArguments(self.mask.window, documents)


def make_layer(s: Session, head_shape: HeadShape, mask: Mask) -> MaskedLayer:
    """Draw the tensors of a layer."""
    B = s.sequences
    T = s.h.train_seq_len
    device = s.m.device
    torch.manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(B, T, heads, head_shape.head_dim, device=device, dtype=s.m.dtype)

    tensors = tuple(
        draw(n).requires_grad_() for n in (head_shape.heads, head_shape.kv_heads, head_shape.kv_heads)
    )
    numbers = torch.arange(len(mask.lengths), dtype=torch.int32)
    ids = numbers.repeat_interleave(torch.tensor(mask.lengths)).view(B, T).to(device)
    bounds = torch.tensor(mask.bounds, dtype=torch.int32, device=device)
    dout = draw(head_shape.heads)
    return MaskedLayer(s, head_shape, mask, tensors=tensors, dout=dout, bounds=bounds, ids=ids)


# ---- paths ---------------------------------------------------------------------------------------


class BoundPath(NamedTuple):
    """A path on one layer. attend: (q, k, v) -> (B, T, H, Dh); note: what else its time includes."""

    attend: Callable
    note: str = ""
    backward: bool = True


class AttentionPath(NamedTuple):
    """A row of PATHS.

    bind: makes the path for a layer; whatever it raises skips the row. causal_only: other masks are not
    tried.
    """

    bind: Callable[[MaskedLayer], BoundPath]
    causal_only: bool = False


REPEATS = "k, v heads repeated"


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copy k and v heads until there are as many as q heads."""
    group = q.size(2) // k.size(2)
    return q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)


def sdpa(backend: SDPBackend) -> AttentionPath:
    """Return the trainer's attend_sdpa with one backend, which groups heads itself."""

    def bind(c: MaskedLayer) -> BoundPath:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return c.s.t.attend_sdpa(q, k, v, *c.trainer_arguments)

        return BoundPath(attend)

    return AttentionPath(bind, causal_only=True)


def efficient(c: MaskedLayer) -> BoundPath:
    """Bind the backend that accepts a mask but does not group heads.

    With a mask attend_sdpa repeats k and v; without one it has no form for this backend.
    """

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in repeated(q, k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return c.s.t.attend_sdpa(q, k, v, *arguments)

    arguments = c.trainer_arguments
    if c.mask.documents or c.mask.window > 0:
        return BoundPath(masked, f"{REPEATS}, mask made")
    return BoundPath(causal, REPEATS)


def varlen(c: MaskedLayer) -> BoundPath:
    """Bind torch.nn.attention.varlen by its signature: 2.10 has no window, 2.11 does not group heads."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    window = c.mask.window
    longest = max(c.mask.lengths)
    if "window_size" in known:
        options: dict[str, Any] = dict(window_size=(window - 1 if window else -1, 0))
    elif window:
        raise Unfit(f"varlen_attn of torch {torch.__version__} has no window_size")
    else:
        options = dict(is_causal=True)

    grouped = "enable_gqa" in known
    if grouped:
        options["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (q, k, v) if grouped else repeated(q, k, v)
        flat = (x.flatten(0, 1) for x in heads)
        return varlen_attn(*flat, c.bounds, c.bounds, longest, longest, **options).view(q.shape)

    return BoundPath(attend, "" if grouped else REPEATS)


def mask_function(c: MaskedLayer) -> Callable:
    """Return flex_attention's mask function: whether query i of sequence b sees key j."""
    ids = c.ids
    window = c.mask.window

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def windowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (ids[b, i] == ids[b, j])

    def windowed_documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window) & (ids[b, i] == ids[b, j])

    if c.mask.documents:
        return windowed_documents if window else documents
    return windowed if window else causal


def flex(c: MaskedLayer) -> BoundPath:
    """Bind flex_attention, compiled for this mask alone: one function may be recompiled only a few times."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T = c.ids.shape
    batch = B if c.mask.documents else None  # None: one mask for all sequences
    blocks = create_block_mask(mask_function(c), batch, None, T, T, device=c.ids.device)
    torch.compiler.reset()
    compiled = c.s.m.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    if c.s.cuda:
        return BoundPath(attend)
    return BoundPath(attend, "no backward on a CPU", backward=False)


def flash4(c: MaskedLayer) -> BoundPath:
    """Bind the trainer's attend_flash4, compiled as in its model. Its time includes the documents' bounds."""
    import flash_attn.cute.interface  # noqa: F401  # where it is missing nothing is compiled

    window, documents = c.trainer_arguments
    most = c.s.t.MAX_DOCUMENTS
    if documents is not None:
        count = int(documents.max()) + 1
        if count > most:
            raise Unfit(f"{count} documents in a row: attend_flash4 keeps {most} apart")

    torch.compiler.reset()  # one function may be recompiled only a few times
    compiled = c.s.m.compile(c.s.t.attend_flash4)
    return BoundPath(lambda q, k, v: compiled(q, k, v, window, documents))


PATHS = {
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient": AttentionPath(efficient),
    "math": sdpa(SDPBackend.MATH),
    "varlen": AttentionPath(varlen),
    "flex": AttentionPath(flex),
    "flash4": AttentionPath(flash4),
}


# ---- errors --------------------------------------------------------------------------------------


def exact_row(c: MaskedLayer, row: int) -> list[Tensor]:
    """Compute output, dq, dk and dv of one sequence in float64, each (1, T, heads, Dh)."""
    one = slice(row, row + 1)
    leaves = [x[one].detach().double().requires_grad_() for x in c.tensors]
    out = attend_exact(*leaves, c.mask.window, c.ids[one])
    return [out.detach(), *torch.autograd.grad(out, leaves, c.dout[one].double())]


def exact_rows(c: MaskedLayer) -> dict[int, list[Tensor]]:
    """Compute exact_row of the sequences that are compared: the first and the last."""
    return {row: exact_row(c, row) for row in sorted({0, c.s.sequences - 1})}


def errors_of(found: list[Tensor], exact: dict[int, list[Tensor]]) -> dict[str, float]:
    """Return the errors of output, dq, dk and dv, or of as many as were found."""
    rows = list(exact)
    return {
        name: relative(x.detach()[rows], torch.cat([exact[row][i] for row in rows]))
        for i, (name, x) in enumerate(zip(ERRORS, found))
    }


# ---- rows of the report --------------------------------------------------------------------------


class Status(Enum):
    """What came of a path on a layer."""

    MEASURED = "measured"
    WRONG = "wrong"  # an error above WRONG: not timed
    SKIPPED = "skipped"  # it raised


class PathTimes(NamedTuple):
    """us of a layer and TFLOP/s. None: the path has no backward."""

    forward_us: float
    forward_tflops: float
    backward_us: float | None = None
    backward_tflops: float | None = None
    both_us: float | None = None


class PathRow(NamedTuple):
    """A path on a layer. None: a path that raised has no note and no errors, a measured one no reason."""

    head_shape: HeadShape
    mask: str
    path: str
    status: Status
    why: str | None = None
    note: str | None = None
    errors: dict[str, float | None] | None = None  # of ERRORS, as many as there are; None: not finite
    times: PathTimes | None = None
    seconds: float = 0.0  # compilation included


def row_json(row: PathRow) -> dict[str, Any]:
    """Return a row as the JSON report has it: times beside the other fields, and no field that is None."""
    times = row.times._asdict() if row.times is not None else {}
    fields = (
        row._asdict() | times | dict(head_shape=row.head_shape._asdict(), status=row.status.value, times=None)
    )
    return {key: value for key, value in fields.items() if value is not None}


# ---- clocks --------------------------------------------------------------------------------------


def micros(s: Session, what: str, fn: Callable, fill: Callable) -> float:
    """Return the median us of fn(), named `what` if it is noisy.

    fill: queues work that keeps the device busy until fn is launched.
    """
    if not s.cuda:
        return 1000 * call_ms(s, what, [fn])
    for _ in range(WARM):
        fn()
    return 1000 * typical(s, what, device_times(s, fn, CALLS, before=fill))


def filler(s: Session) -> Callable:
    """Return a function that queues one large matrix product, or nothing on a CPU."""
    if not s.cuda:
        return lambda: None
    x = torch.randn(FILLER, FILLER, device=s.m.device, dtype=s.m.dtype)
    y = torch.empty_like(x)
    return lambda: torch.mm(x, x, out=y)


def time_path(
    c: MaskedLayer, name: str, forward: Callable, both: Callable | None, fill: Callable
) -> PathTimes:
    """Time a path's forward and its forward + backward. both: None if it has no backward."""
    flops = 4.0 * c.head_shape.head_dim * c.head_shape.heads * c.mask.pairs
    what = f"{name} on {c.mask.name}, {c.head_shape}"
    forward_us = micros(c.s, f"{what}, forward", forward, fill)
    times = PathTimes(forward_us, flops / forward_us / 1e6)
    if both is None:
        return times

    both_us = micros(c.s, f"{what}, forward + backward", both, fill)
    backward_us = max(both_us - forward_us, 1e-3)  # a difference of medians: noise may make it negative
    backward_tflops = BACKWARD * flops / backward_us / 1e6
    return times._replace(backward_us=backward_us, backward_tflops=backward_tflops, both_us=both_us)


def measure_path(c: MaskedLayer, name: str, exact: dict, fill: Callable) -> PathRow:
    """Return the row of a path: its errors and, if these are small, its times. Raises whatever it raises."""
    bound = PATHS[name].bind(c)
    tensors = c.tensors if bound.backward else [x.detach() for x in c.tensors]

    def forward() -> Tensor:  # as in training, it keeps what a backward needs
        return bound.attend(*tensors)

    def both() -> list[Tensor]:
        out = forward()
        return [out, *torch.autograd.grad(out, tensors, c.dout)]

    errors = errors_of(both() if bound.backward else [forward()], exact)
    finite = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    row = PathRow(c.head_shape, c.mask.name, name, Status.MEASURED, note=bound.note, errors=finite)
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= WRONG]  # nan is wrong
    if wrong:
        return row._replace(status=Status.WRONG, why="error of " + ", ".join(wrong))
    return row._replace(times=time_path(c, name, forward, both if bound.backward else None, fill))


def attempt_path(c: MaskedLayer, name: str, exact: dict, fill: Callable) -> PathRow:
    """Return the row of a path, whatever it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend is not chosen, that flex is not compiled
            return measure_path(c, name, exact, fill)
    except Unfit as error:
        why = first_line(error)
    except Exception as error:  # whatever a kernel, a compiler or an import raises
        why = f"{type(error).__name__}: {first_line(error)}"
    return PathRow(c.head_shape, c.mask.name, name, Status.SKIPPED, why)


# ---- tables --------------------------------------------------------------------------------------


def path_line(values: list[str]) -> str:
    """Format the first columns of a line of the table."""
    return fixed_width(values, tuple(COLUMNS.values()))


def row_line(row: PathRow) -> str:
    """Format a row of the report; '-' stands for a backward it does not have."""
    if row.times is None:
        return path_line([row.path]) + f"{row.status.value}: {row.why[:120]}"

    times = row.times
    us = ["-" if x is None else f"{x:,.1f}" for x in (times.forward_us, times.backward_us, times.both_us)]
    rates = ["-" if x is None else f"{x:.4g}" for x in (times.forward_tflops, times.backward_tflops)]
    errors = [f"{row.errors[name]:.1e}" if name in row.errors else "-" for name in ERRORS]
    return f"{path_line([row.path, *us, *rates, *errors])}  {row.note}".rstrip()


class Fastest(NamedTuple):
    """The rows of least time. None: nothing was measured."""

    forward: PathRow | None
    backward: PathRow | None
    both: PathRow | None


def row_of_least(rows: list[PathRow], field: str) -> PathRow | None:
    """Return the row whose `field` of PathTimes is least; None: no row has it."""
    timed = [row for row in rows if row.times is not None and getattr(row.times, field) is not None]
    return min(timed, key=lambda row: getattr(row.times, field), default=None)


def fastest(rows: list[PathRow]) -> Fastest:
    """Return the fastest row for forward, for backward and for both."""
    return Fastest(*(row_of_least(rows, f"{name}_us") for name in Fastest._fields))


def time_paths(c: MaskedLayer, names: list[str], fill: Callable) -> list[PathRow]:
    """Time all paths on one layer and print each row when it is known."""
    say = c.s.say
    count = len(c.mask.lengths)
    tokens = sum(c.mask.lengths)
    about = f", {count:,} of {tokens / count:,.0f} tokens on average" if c.mask.documents else ""
    say(f"\n{c.head_shape}; {c.mask.name}{about}: {c.mask.pairs / tokens:,.0f} visible keys a query")
    say(path_line(list(COLUMNS)))

    exact = exact_rows(c)
    rows = []
    for name in names:
        if PATHS[name].causal_only and c.mask.name != "causal":
            continue
        started = time.perf_counter()
        row = attempt_path(c, name, exact, fill)
        rows.append(row._replace(seconds=time.perf_counter() - started))
        say(row_line(row))

    best = [f"{name} {row.path}" for name, row in fastest(rows)._asdict().items() if row is not None]
    say(f"fastest: {', '.join(best) or 'none ran'}")
    return rows


def fastest_line(rows: list[PathRow], causal: list[PathRow]) -> str:
    """Format the fastest path of one head shape and mask. causal: the rows of its causal mask."""
    start = f"{rows[0].head_shape!s:<26}{rows[0].mask:<26}"
    best = fastest(rows)
    field = "forward_us" if best.both is None else "both_us"
    row = best.forward if best.both is None else best.both
    if row is None:
        return f"{start}none"

    us = getattr(row.times, field)
    base = row_of_least(causal, field)
    fraction = "-" if base is None else f"{us / getattr(base.times, field):.3f}"
    note = "  forward only" if best.both is None else ""
    return f"{start}{row.path:<10}{us:12,.1f}{fraction:>11}{note}"


def fastest_table(rows: list[PathRow]) -> str:
    """Format the fastest path of each head shape and mask, by forward + backward, else by forward."""
    groups: dict[tuple[HeadShape, str], list[PathRow]] = {}
    for row in rows:
        groups.setdefault((row.head_shape, row.mask), []).append(row)

    lines = [f"{'heads':<26}{'mask':<26}{'fastest':<10}{'us a layer':>12}{'of causal':>11}"]
    for (head_shape, _), group in groups.items():
        lines.append(fastest_line(group, groups[head_shape, "causal"]))
    return "\n".join(lines)


# ---- the command ---------------------------------------------------------------------------------


def check_paths(args: argparse.Namespace) -> list[str] | None:
    """Return the paths asked for; None: all. Raises BadInput before anything runs."""
    if args.timeline or args.candidates:
        other = "--timeline" if args.timeline else "--candidates"
        raise BadInput(f"--attention and {other} measure different things: give one of them")
    if args.paths is None:
        return None

    names = args.paths.split(",")
    for name in names:
        if name not in PATHS:
            raise BadInput(f"--paths {name or '(empty)'}: not one of {', '.join(PATHS)}")
    return list(dict.fromkeys(names))


def versions() -> dict[str, str]:
    """Return the versions of torch, its libraries and the installed packages with kernels."""
    libraries = dict(torch=torch.__version__, CUDA=torch.version.cuda, cuDNN=torch.backends.cudnn.version())
    found = {name: str(version) for name, version in libraries.items() if version is not None}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(s: Session, masks: list[Mask]) -> None:
    """Add to the report what is about to be measured, and print it."""
    head_shapes = head_shapes_of(s.h)
    s.report.update(
        versions=versions(),
        head_shapes=[head_shape._asdict() for head_shape in head_shapes],
        masks=[
            dict(
                name=mask.name,
                window=mask.window,
                documents=mask.documents,
                sequences=len(mask.lengths),
                pairs=mask.pairs,
            )
            for mask in masks
        ],
    )
    software = ", ".join([s.report["device"], *(f"{k} {v}" for k, v in s.report["versions"].items())])
    size = f"{s.sequences} x {s.h.train_seq_len} tokens"
    s.say(f"attention of a layer: {size}, {s.report['dtype']}, device {software}")
    if len(head_shapes) == 1:
        s.skip("the second head shape", f"num_heads={s.h.num_heads} is odd: it cannot be halved")


def write_report(s: Session, path: Path) -> None:
    """Write the JSON report, all of it or nothing. Raises BadInput."""
    write_atomic(path, json.dumps(s.report, indent=1, sort_keys=True) + "\n")
    s.say(f"json: {path}")


def run(args: argparse.Namespace, env: Mapping[str, str], progress: Progress) -> int:
    """Run `bench --attention` and return its exit status. Raises BadInput."""
    started = time.perf_counter()
    names = check_paths(args)
    t = load_trainer(args.script)
    with known_errors_of(t):
        s = open_session(t, args.knobs, env, progress)
    if names is None:
        names = [name for name in PATHS if name != "math" or not s.cuda]

    masks = masks_of(s.sequences, s.h.train_seq_len)
    describe(s, masks)
    fill = filler(s)
    rows = []
    progress.begin("bench: attention")
    for head_shape, mask in progress.each(product(head_shapes_of(s.h), masks), "masks"):
        rows += time_paths(make_layer(s, head_shape, mask), names, fill)

    s.say("\nforward + backward, the fastest path of each\n" + fastest_table(rows))
    s.report["table"] = [row_json(row) for row in rows]
    s.report["seconds"] = time.perf_counter() - started
    say_noise(s)
    s.say(f"\n{s.report['seconds']:.0f} s")
    if args.json and s.m.rank == 0:
        write_report(s, args.json)
    return 0
