"""Clocks of the lab: calls timed by the host, by the device or in a CUDA graph; tables for the console."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lab.shared.trainer import Session, capture

ROUNDS = 4  # calls of a big section in a CUDA graph
REPLAYS = 10  # timed replays of it
FRESH = 20  # calls, each with inputs of its own, where these fit the L2 cache
HOST_SECONDS = 0.3  # on a CPU a section ends after this long, with three repetitions at least
HOST_WARM = 4  # calls by the host's clock that do not count
HOST_CALLS = 10  # and those that do
NOISE = 3.0  # a median of this many times the least time is that of a machine that does something else, too
SHOWN = 8  # names of noisy timings in the warning


def median(values: list[float]) -> float:
    """Return the middle value, the larger of the two middle ones when their number is even."""
    return sorted(values)[len(values) // 2]


def is_noisy(middle: float, least: float) -> bool:
    """Return whether a median is so far above the least time that it does not stand for the machine."""
    return least > 0 and middle >= NOISE * least


def typical(s: Session, what: str, times: list[float]) -> float:
    """Return the median of some times, and note in the report, under the name `what`, if it is noisy."""
    middle = median(times)
    if is_noisy(middle, min(times)):
        s.report["noisy"].append(what)
    return middle


def noise_warning(names: list[str]) -> str:
    """Return the one line about noisy timings."""
    names = list(dict.fromkeys(names))
    shown = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        shown += f" and {len(names) - SHOWN} more"
    return (
        f"noisy machine: the median is {NOISE:g} times the least or more in {shown}; measure again when "
        "nothing else runs"
    )


def say_noise(s: Session) -> None:
    """Print the warning if a timing of this session is noisy."""
    if s.report["noisy"]:
        s.say(f"\n{noise_warning(s.report['noisy'])}")


# ---- the host's clock ----------------------------------------------------------------------------


def no_preparation() -> None:
    """Prepare nothing before a timed call."""


def wall_ms(s: Session, fn: Callable) -> float:
    """Time one call in ms by the host's clock, the device idle before and after it."""
    s.m.sync()
    start = time.perf_counter()
    fn()
    s.m.sync()
    return 1000 * (time.perf_counter() - start)


def wall_times(s: Session, fn: Callable, before: Callable = no_preparation) -> list[float]:
    """Time HOST_CALLS calls with wall_ms, after HOST_WARM that do not count; `before` runs before each."""
    times = []
    for _ in range(HOST_WARM + HOST_CALLS):
        before()
        times.append(wall_ms(s, fn))
    return times[HOST_WARM:]


def host_times(calls: list[Callable]) -> list[float]:
    """Time calls in ms on a CPU, `calls` in turn, for HOST_SECONDS or REPLAYS calls."""
    calls[0]()
    times: list[float] = []
    end = time.perf_counter() + HOST_SECONDS
    while len(times) < 3 or (len(times) < REPLAYS and time.perf_counter() < end):
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


# ---- the device's clock --------------------------------------------------------------------------


def tick(s: Session) -> Any:
    """Mark this moment in the order of the device's queue."""
    if not s.cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def ms_between(first: Any, second: Any) -> float:
    """Return the ms between two ticks that the device has passed."""
    if isinstance(first, float):
        return 1000 * (second - first)
    return first.elapsed_time(second)


def device_times(s: Session, fn: Callable, count: int, before: Callable = no_preparation) -> list[float]:
    """Time `count` calls in ms by the GPU's clock. before: queues work before each call, off the clock."""
    events = []
    for _ in range(count):
        before()
        start = tick(s)
        fn()
        events.append((start, tick(s)))
    s.m.sync()
    return [ms_between(start, end) for start, end in events]


def graph_times(s: Session, calls: list[Callable]) -> list[float]:
    """Time a call in ms when one CUDA graph holds all `calls`, after two rounds outside it."""

    def run() -> None:
        for call in calls:
            call()

    for _ in range(2):
        with s.m.lanes() as lane, lane():  # off the default stream, as a capture is
            run()
    s.m.sync()

    try:
        launch = capture(s.m, run)
    except Exception as error:  # whatever a driver raises: then launches by the host count
        launch = run
        s.skip("a CUDA graph: launched one by one", error)

    try:
        times = device_times(s, launch, REPLAYS + 1)
        return [ms / len(calls) for ms in times[1:]]
    finally:
        s.m.sync()  # before the graph and its memory go


def call_ms(s: Session, what: str, calls: list[Callable]) -> float:
    """Return the median ms of one of `calls`, which run in turn. what: its name if it is noisy."""
    times = graph_times(s, calls) if s.cuda else host_times(calls)
    return typical(s, what, times)


# ---- inputs --------------------------------------------------------------------------------------


def fresh_sets(s: Session, make: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Make FRESH sets of inputs if one set would stay in the GPU's L2 cache, else one."""
    first = make()
    if not s.cuda:
        return [first]

    size = sum(x.numel() * x.element_size() for x in first)
    cache = torch.cuda.get_device_properties(s.m.device).L2_cache_size
    more = FRESH - 1 if size < 2 * cache else 0
    return [first] + [make() for _ in range(more)]


def in_turn(s: Session, fn: Callable, sets: list) -> list[Callable]:
    """Return calls of fn(set), the sets in turn: at least one for each set, and ROUNDS on a GPU."""
    rounds = max(len(sets), ROUNDS) if s.cuda else len(sets)
    return [partial(fn, sets[i % len(sets)]) for i in range(rounds)]


# ---- tables --------------------------------------------------------------------------------------


def aligned(heads: Sequence[str], rows: list[tuple]) -> str:
    """Format a table for the console, the first two columns to the left, the others to the right."""
    lines = [tuple(heads)] + [tuple(map(str, row)) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]

    def text(line: tuple) -> str:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2])]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]
        return "  ".join(left + right).rstrip()

    return "\n".join(map(text, lines))


def fixed_width(cells: Sequence[str], widths: Sequence[int], gap: str = "") -> str:
    """Format one line whose columns do not depend on later lines. Negative widths align to the left."""
    padded = [f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" for cell, width in zip(cells, widths)]
    return gap.join(padded)
