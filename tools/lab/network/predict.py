"""Predict how much of a step its communication takes, from the collectives and directions of each rank.

Each collective takes latency + bytes per link / bandwidth on the link that its group needs. Collectives of
one scope run one after the other; each starts when the script launches it and is waited for where the script
waits. The update of a rank takes the time of its part of the products. What the step takes beyond that is
exposed.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from lab.shared.collectives import Collective, Event, MatrixBatch, Scope, Wait, scope

Shapes = dict[str, tuple[int, ...]]  # parameters by name; a bank is (matrices, rows, columns)


@dataclass(frozen=True)
class Assumptions:
    """The figures that a prediction rests on: GB/s each way, and milliseconds."""

    nvlink_gbps: float = 300.0
    nvlink_latency_ms: float = 0.020
    nic_gbps: float = 50.0
    nic_latency_ms: float = 0.060
    update_ms: float = 0.844
    eighth_ms: float = 0.216


SOURCES = {
    "nvlink_gbps": "bus bandwidth within a node: two thirds of the 450 GB/s each way of an H100's NVLink 4 "
    "(NVIDIA's data sheet); assumed, for messages of some MB",
    "nvlink_latency_ms": "of a collective on 8 GPUs of a node; assumed",
    "nic_gbps": "of each GPU's adapter: 400 Gb/s, eight to a node (NVIDIA's data sheet of the DGX H100)",
    "nic_latency_ms": "of a collective across nodes; assumed",
    "update_ms": "all matrices on one H100, ns5, momentum in, weights out: records/README.md, measured",
    "eighth_ms": "ceil(n / 8) matrices of each bank, the same way",
}
FORMULA = """\
collective = latency + bytes per link / bandwidth; intra: nvlink; inter: min(nvlink, nic x k), nic if k = 1,
             k = ranks of the group on one node, whose adapters share the crossing of a ring
update     = a + b x fraction of the operations, through (1, update_ms) and (that of an eighth, eighth_ms)
step       = walked in launch order: collectives of a scope one after the other, each from its launch on;
             directions one after the other, `update` together; a wait holds all that follows
exposed    = end of the last collective or direction - update; before: until the first direction"""


# ---- the load of a rank --------------------------------------------------------------------------


class Load(NamedTuple):
    """The directions that a rank computes in a step."""

    matrices: int
    slots: int  # matrices and padding
    flops: int  # on matrices
    padded_flops: int  # on matrices and padding


def load_of(batches: list[MatrixBatch], flops: dict[tuple[int, ...], int]) -> Load:
    """Add up the batches of a rank. flops: operations on one matrix by shape."""
    return Load(
        matrices=sum(batch.real for batch in batches),
        slots=sum(batch.slots for batch in batches),
        flops=sum(batch.real * flops[batch.shape] for batch in batches),
        padded_flops=sum(batch.slots * flops[batch.shape] for batch in batches),
    )


class Work(NamedTuple):
    """The operations of a model's update."""

    flops: dict[tuple[int, ...], int]  # on one matrix, by shape
    total: int  # on all matrices
    eighth: float  # the fraction of the busiest rank of eight


def work_of(shapes: Shapes, flops: dict[tuple[int, ...], int]) -> Work:
    """Return the operations on a model's banks."""
    total = sum(shape[0] * flops[shape[1:]] for name, shape in shapes.items() if is_bank(name))
    busiest = load_of(published_batches(shapes, 8, 0), flops)
    return Work(flops, total, busiest.padded_flops / total)


# ---- the published schedule ----------------------------------------------------------------------


def is_bank(name: str) -> bool:
    """Return whether a parameter is a bank of matrices."""
    return name.endswith("_bank")


def slots_of(count: int, world: int) -> int:
    """Return how many matrices each rank holds of a bank, padding included."""
    return -(-count // world)


def published_schedule(shapes: Shapes, world: int) -> list[Event]:
    """Return the events of parameter-golf's Parallel Muon record (#399, #549) on the shapes of this model.

    After the backward pass: a reduce-scatter of each bank, bf16, largest first, padded to the world size; an
    all-reduce of each small tensor, float32, one by one. Then for each bank: wait for its gradient and for
    the previous gather, compute its direction, gather the bf16 update. The record clips local gradients, so
    no norm is reduced.
    """
    events: list[Event] = []

    def launch(kind: str, payload: int, zeros: float, dtype: str = "bfloat16") -> int:
        """Append a collective of all ranks and return its index."""
        given = payload // world if kind == "all-gather" else payload
        events.append(
            Collective(
                kind=kind,
                payload=payload,
                ranks=tuple(range(world)),
                dtype=dtype,
                device="cuda",
                given=given,
                zeros=round(zeros),
            )
        )
        return len(events) - 1

    banks = sorted((shape for name, shape in shapes.items() if is_bank(name)), key=math.prod, reverse=True)
    arrivals = []
    for count, *matrix in banks:
        padded = world * slots_of(count, world)
        size = math.prod(matrix)
        arrivals.append(launch("reduce-scatter", 2 * padded * size, 2 * (padded - count) * size))
    for name, shape in shapes.items():
        if not is_bank(name):
            events.append(Wait(launch("all-reduce", 4 * math.prod(shape), 0, "float32")))

    gather = None
    for arrival, (count, *matrix) in zip(arrivals, banks):
        slots = slots_of(count, world)
        size = math.prod(matrix)
        events.append(Wait(arrival))
        if gather is not None:
            events.append(Wait(gather))
        events.append(MatrixBatch(tuple(matrix), slots, slots))
        # The mean over the ranks: all padding lies on the last ones.
        zeros = 2 * (world * slots - count) * size / world
        gather = launch("all-gather", 2 * world * slots * size, zeros)
    if gather is not None:
        events.append(Wait(gather))
    return events


def published_batches(shapes: Shapes, world: int, rank: int) -> list[MatrixBatch]:
    """Return what a rank of that record works on: consecutive matrices of each bank, then padding."""
    batches = []
    for name, (count, *matrix) in shapes.items():
        if is_bank(name):
            slots = slots_of(count, world)
            real = max(0, min(slots, count - rank * slots))
            batches.append(MatrixBatch(tuple(matrix), slots, real))
    return batches


# ---- the prediction ------------------------------------------------------------------------------


class StepTimes(NamedTuple):
    """A step in milliseconds."""

    end: float  # when the last collective or direction ends
    before: float  # until the first direction
    update: float
    exposed: float  # what the step takes beyond the update
    communication: float  # all collectives together


def collective_ms(call: Collective, node_ranks: int, a: Assumptions) -> float:
    """Return the predicted milliseconds of a collective; 0 for a group of one."""
    if len(call.ranks) == 1:
        return 0.0
    if scope(call.ranks, node_ranks) == Scope.WITHIN_NODE:
        return a.nvlink_latency_ms + call.wire / a.nvlink_gbps / 1e6

    ranks_on_a_node = max(Counter(rank // node_ranks for rank in call.ranks).values())
    gbps = a.nic_gbps
    if ranks_on_a_node > 1:
        gbps = min(a.nvlink_gbps, ranks_on_a_node * a.nic_gbps)
    return a.nic_latency_ms + call.wire / gbps / 1e6


def update_ms(fraction: float, eighth: float, a: Assumptions) -> float:
    """Return the milliseconds of a rank's update, linear in its fraction of the operations."""
    slope = (a.update_ms - a.eighth_ms) / (1 - eighth) if eighth < 1 else 0.0
    return a.update_ms + slope * (fraction - 1)


def walk(
    events: list[Event], costs: dict[int, float], scopes: dict[int, Scope], directions: dict[int, float]
) -> StepTimes:
    """Return the times of a step whose events take the given milliseconds.

    costs, scopes: the milliseconds and the scope of each collective, by its index; directions: the
    milliseconds of each batch, by its index.
    """
    now = 0.0
    before = None
    free: dict[Scope, float] = Counter()  # when the links of a scope are free
    ends: dict[int, float] = {}
    for i, event in enumerate(events):
        if isinstance(event, Collective):
            ends[i] = max(now, free[scopes[i]]) + costs[i]
            free[scopes[i]] = ends[i]
        elif isinstance(event, Wait):
            now = max(now, ends[event.of])
        else:
            before = now if before is None else before
            now += directions[i]
    end = max([now, *ends.values()])
    update = sum(directions.values())
    return StepTimes(
        end=end,
        before=end if before is None else before,
        update=update,
        exposed=end - update,
        communication=sum(costs.values()),
    )


def predict(events: list[Event], node_ranks: int, work: Work, a: Assumptions) -> StepTimes:
    """Return the predicted times of one rank's step."""
    calls = {i: event for i, event in enumerate(events) if isinstance(event, Collective)}
    flops = {
        i: event.slots * work.flops[event.shape]
        for i, event in enumerate(events)
        if isinstance(event, MatrixBatch)
    }
    mine = sum(flops.values())
    update = update_ms(mine / work.total, work.eighth, a) if mine else 0.0
    return walk(
        events,
        costs={i: collective_ms(call, node_ranks, a) for i, call in calls.items()},
        scopes={i: scope(call.ranks, node_ranks) for i, call in calls.items()},
        directions={i: update * count / mine for i, count in flops.items()},
    )
