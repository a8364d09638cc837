"""Arithmetic of intervals, and a step taken apart by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

Interval = tuple[float, float]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same points as disjoint intervals in order; touching ones are joined, empty ones dropped."""
    out: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def minus(intervals: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """Return the parts of `intervals` that none of `others` covers, disjoint and in order."""
    out: list[Interval] = []
    holes = merged(others)
    at = 0
    for start, end in merged(intervals):
        while at and holes[at - 1][1] > start:  # a hole may reach over several intervals
            at -= 1
        left = start  # where the part begins that no hole has been cut from
        while at < len(holes) and holes[at][0] < end:
            if holes[at][0] > left:
                out.append((left, holes[at][0]))
            left = max(left, holes[at][1])
            at += 1
        if left < end:
            out.append((left, end))
    return out


def length(intervals: Iterable[Interval]) -> float:
    """Return the total length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def clipped(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Return the parts of the intervals inside the window."""
    cut = ((max(start, window[0]), min(end, window[1])) for start, end in intervals)
    return [(start, end) for start, end in cut if start < end]


class Times(NamedTuple):
    """Where the time of a step goes, six lengths in one unit, as timeline.py's docstring defines them."""

    step: float
    compute: float
    communication: float
    exposed: float
    idle: float
    update: float


FIGURES = tuple(f"{name}_ms" for name in Times._fields)  # what tables and reports call them


class Account(NamedTuple):
    """A step taken apart. times: in the unit of the intervals, like all lengths here.

    exposed_parts: where a collective runs and no compute does. exposed_by: that length for each collective.
    """

    times: Times
    exposed_parts: list[Interval]
    exposed_by: list[float]


def account(window: Interval, compute: list[Interval], collectives: list[Interval]) -> Account:
    """Take the step that fills the window apart."""
    busy = merged(clipped(compute, window))
    communication = merged(clipped(collectives, window))
    exposed = minus(communication, busy)

    step = window[1] - window[0]
    computing = length(busy)
    uncovered = length(exposed)
    times = Times(
        step=step,
        compute=computing,
        communication=length(communication),
        exposed=uncovered,
        idle=step - computing - uncovered,
        update=window[1] - communication[0][0] if communication else 0,
    )
    return Account(times, exposed, [length(minus([one], busy)) for one in collectives])
