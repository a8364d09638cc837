"""The cases that `record directions` times, rows of ORTHO and STEP_RULES, with their inputs and calls.

A direction takes momentum and gives a direction; an update takes a gradient and gives new weights.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from older_scripts import OLDER_SCALARS, matrices_of_update, state_shape_of
from progress import Progress
from script import BadInput

SETS = 4  # sets of inputs, timed in turn; more where they fit into the L2 cache
RANKS = 8  # the largest part of one of them is called an eighth
# Any values do: the time of an update does not depend on them.
SCALARS = dict(
    momentum=0.95,
    matrix_lr=0.025,
    adam_lr_mul=1.0,
    matrix_decay_mul=1.0,
    adam_decay_mul=1.0,
    correction1=0.1,
    correction2=0.05,
    **OLDER_SCALARS,
)


class Bank(NamedTuple):
    """A bank of the optimizer: (count, rows, columns)."""

    name: str
    count: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.count, self.rows, self.columns

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.columns


class Word(str, enum.Enum):
    """A choice that is written to the log as its value."""

    __str__ = str.__str__


class Part(Word):
    """What is timed: momentum in and direction out, or gradient in and weights out."""

    DIRECTION = "direction"
    UPDATE = "update"


class Portion(Word):
    """How many matrices of every bank: all, or those of the busiest of eight ranks."""

    ALL = "all"
    EIGHTH = "eighth"


class TimedCase(NamedTuple):
    """A row of the tables of times."""

    part: Part
    portion: Portion
    row: str
    rule: str = "muon"
    cautious: int = 0

    def __str__(self) -> str:
        """The case in a log line; logs call the portion share."""
        return (
            f"part:{self.part} share:{self.portion} row:{self.row} rule:{self.rule} cautious:{self.cautious}"
        )


class Setup(NamedTuple):
    """The trainer as a module, its config and machine, how to log a line, and how to tell how far work is."""

    t: ModuleType
    h: Any
    m: Any
    log: Callable[[str], None]
    tiny: bool
    progress: Progress

    @property
    def cuda(self) -> bool:
        return self.m.device.type == "cuda"


def reason(error: Exception) -> str:
    """Return an exception as a note of one line, without this machine's folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text).replace(" | ", " ")[:200]


@contextmanager
def skipping(log: Callable[[str], None], what: str) -> Iterator[None]:
    """Log whatever a compiler, kernel or capture raises as the reason why `what` is skipped, and go on."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        log(f"skip {what} | {reason(error)}")


# ---- cases ---------------------------------------------------------------------------------------


def banks_of(s: Setup, portion: Portion) -> list[Bank]:
    """Return the banks of matrices in the order of their update.

    An eighth is the part of the busiest of eight ranks: of the matrices that share a buffer, ceil(count / 8),
    all of the first kind.
    """
    table = s.t.parameter_table(s.h)
    buffers: dict[str, list[Bank]] = {}
    for spec in s.t.MATRICES:
        shape, _ = table[spec.name]
        buffers.setdefault(spec.buffer, []).append(Bank(spec.name, *shape))
    if portion is Portion.ALL:
        return [bank for banks in buffers.values() for bank in banks]

    eighth = []
    for banks in buffers.values():
        count = sum(bank.count for bank in banks)
        eighth.append(banks[0]._replace(count=-(-count // RANKS)))
    return eighth


def all_cases(s: Setup) -> list[TimedCase]:
    """Return every case, the most important first: a run may be out of time before the end."""
    rows = list(s.t.ORTHO)
    rules = [rule for rule in s.t.STEP_RULES if rule != "muon"]
    return [
        *(TimedCase(Part.DIRECTION, Portion.ALL, row) for row in rows),
        *(TimedCase(Part.UPDATE, Portion.ALL, row) for row in rows),
        *(TimedCase(Part.UPDATE, Portion.ALL, s.h.ortho, rule) for rule in rules),
        TimedCase(Part.UPDATE, Portion.ALL, s.h.ortho, cautious=1),
        *(TimedCase(Part.UPDATE, Portion.EIGHTH, row) for row in rows),
        *(TimedCase(Part.DIRECTION, Portion.EIGHTH, row) for row in rows),
    ]


def case_groups(cases: list[TimedCase]) -> list[list[TimedCase]]:
    """Group the cases of a direction, or of a rule: one child compiles each group."""
    groups: dict[tuple, list[TimedCase]] = {}
    for case in cases:
        groups.setdefault((case.row, case.rule, case.cautious), []).append(case)
    return list(groups.values())


# ---- inputs and calls ----------------------------------------------------------------------------


def step_scalars(s: Setup) -> tuple:
    """Return StepScalars as tensors on the device. Raises BadInput if SCALARS lacks one of its fields."""
    fields = s.t.StepScalars._fields
    for name in fields:
        if name not in SCALARS:
            raise BadInput(f"StepScalars.{name}: give it a value in SCALARS of tools/lab/update/cases.py")
    return s.t.StepScalars(**{name: torch.tensor(SCALARS[name], device=s.m.device) for name in fields})


def update_arguments(s: Setup, values: dict) -> list:
    """Return `values` in the order of matrix_update's parameters. Raises BadInput if one has no value."""
    arguments = []
    for name, parameter in inspect.signature(s.t.matrix_update).parameters.items():
        if name not in values and parameter.default is inspect.Parameter.empty:
            raise BadInput(f"matrix_update({name}): give it a value in calls_of of tools/lab/update/cases.py")
        arguments.append(values.get(name, parameter.default))
    return arguments


def cache_bytes(s: Setup) -> int:
    """Return the size of the device's L2 cache; 0 on a CPU."""
    return torch.cuda.get_device_properties(s.m.device).L2_cache_size if s.cuda else 0


def input_sets(s: Setup, portion: Portion) -> list[list[dict]]:
    """Return [set][bank] -> W, g, momentum (count, rows, columns) float32; together at least twice the L2."""
    banks = banks_of(s, portion)
    set_bytes = 4 * sum(bank.numel for bank in banks)
    sets = max(SETS, -(-2 * cache_bytes(s) // set_bytes))
    generator = torch.Generator(s.m.device).manual_seed(0)

    def draw(bank: Bank, scale: float) -> Tensor:
        return scale * torch.randn(bank.shape, device=s.m.device, generator=generator)

    def draw_bank(bank: Bank) -> dict[str, Tensor]:
        return dict(W=draw(bank, 0.02), g=draw(bank, 1e-3), momentum=draw(bank, 1e-3))

    return [[draw_bank(bank) for bank in banks] for _ in range(sets)]


def uncompiled(fn: Callable) -> Callable:
    """Return the function as it is, in place of a compiler."""
    return fn


def calls_of(s: Setup, case: TimedCase, sets: list[list[dict]], wrap: Callable) -> list[list[Callable]]:
    """Return [set][bank] -> the call that is timed. wrap: the trainer's compiler, or uncompiled."""
    if case.part is Part.DIRECTION:
        fn = wrap(s.t.orthogonalize)
        return [[partial(fn, inputs["momentum"], case.row) for inputs in banks] for banks in sets]

    fn = wrap(s.t.matrix_update)
    scalars = step_scalars(s)
    one = torch.tensor(1.0, device=s.m.device)
    h = dataclasses.replace(s.h, ortho=case.row, step_rule=case.rule, cautious_wd=bool(case.cautious))
    state_shape = state_shape_of(s.t, case.rule)

    def update(inputs: dict[str, Tensor]) -> Callable:
        state = None
        if state_shape:
            W = inputs["W"]
            state = torch.zeros(state_shape(*W.shape), device=W.device)
        values = {"gradient_factor": one, "s": scalars, "h": h}
        values |= matrices_of_update(s.t, inputs, state)
        return partial(fn, *update_arguments(s, values))

    return [[update(inputs) for inputs in banks] for banks in sets]


# ---- operations ----------------------------------------------------------------------------------


def solve_flops(a: tuple, right: tuple, *args, out_val=None, **kwargs) -> int:
    """Count a triangular solve: n^2 m of a (B, n, n) and a (B, n, m)."""
    return a[0] * a[-1] * right[-2] * right[-1]


@torch.no_grad()
def direction_flops(t: ModuleType, row: str, shape: tuple[int, ...]) -> int:
    """Count the operations of a direction on matrices (..., M, N): 2nmk a product, even of a symmetric one.

    Nothing is computed: the input is on the meta device.
    """
    custom = {torch.ops.aten.linalg_solve_triangular: solve_flops}
    batch = shape if len(shape) > 2 else (1, *shape)
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        t.orthogonalize(torch.empty(batch, device="meta"), row)
    return counter.get_total_flops()
