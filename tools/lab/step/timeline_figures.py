"""The figures of traced steps: of a rank, of a collective, over all ranks, and their tables."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from lab.shared.collectives import Collective
from lab.shared.timing import aligned
from lab.step.intervals import FIGURES, Interval, Times, account
from lab.step.traces import RankTrace, Span, matched


class CollectiveFigures(NamedTuple):
    """One collective of a step. bytes, wire and ranks are None if they are unknown."""

    start_ms: float  # from the start of the step
    ms: float
    exposed_ms: float
    kind: str
    bytes: int | None = None
    wire: int | float | None = None
    ranks: int | None = None


class StepFigures(NamedTuple):
    """One step of one rank."""

    times: Times  # in ms
    collectives: list[CollectiveFigures]
    exposed_parts: list[Interval]  # of the trace, in microseconds

    @property
    def named_times(self) -> dict[str, float]:
        """The times under the names of FIGURES."""
        return dict(zip(FIGURES, self.times))


class RankFigures(NamedTuple):
    """What one rank measured."""

    rank: int
    plain_ms: float  # of a step without the profiler
    trace: RankTrace
    calls: list[Collective]  # of one step
    steps: list[StepFigures]


def collective_figures(
    span: Span, call: Collective | None, step_start: float, exposed: float
) -> CollectiveFigures:
    """Return the figures of one collective. step_start, exposed: in microseconds, as the span."""
    start_ms = (span.start - step_start) / 1000
    ms = (span.end - span.start) / 1000
    figures = CollectiveFigures(start_ms, ms, exposed / 1000, span.kind)
    if call is None:
        return figures
    return figures._replace(kind=call.kind, bytes=call.payload, wire=call.wire, ranks=len(call.ranks))


def step_figures(trace: RankTrace, step: int, calls: list[Collective], by_kind: bool) -> StepFigures:
    """Return a step's times and its collectives in order."""
    window = trace.window(step)
    mine = [span for span in trace.collectives if window[0] <= span.start < window[1]]
    mine.sort(key=lambda span: span.start)
    found = account(window, [s.interval for s in trace.compute], [s.interval for s in mine])

    triples = zip(mine, matched(mine, calls, by_kind), found.exposed_by)
    collectives = [collective_figures(span, call, window[0], exposed) for span, call, exposed in triples]
    times_ms = Times(*(microseconds / 1000 for microseconds in found.times))
    return StepFigures(times_ms, collectives, found.exposed_parts)


# ---- over all ranks --------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Format the median and, for several values, the least and the largest."""
    middle = f"{median(values):.3f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.3f} to {max(values):.3f})"


def medians_of_steps(rank: RankFigures) -> Times:
    """Return the medians of one rank's steps, in ms."""
    return Times(*(median(column) for column in zip(*(step.times for step in rank.steps))))


def step_table(ranks: list[RankFigures]) -> str:
    """Format a line for each step, with the median and spread over the ranks, and one for the median step."""

    def cells(of_ranks: list[Times]) -> list[str]:
        return [spread(list(column)) for column in zip(*of_ranks)]

    rows = []
    for i in range(len(ranks[0].steps)):
        rows.append((str(i), "", *cells([rank.steps[i].times for rank in ranks])))
    rows.append(("median", "", *cells([medians_of_steps(rank) for rank in ranks])))

    heads = [figure.replace("_", " ") for figure in FIGURES]
    return aligned(("step", "", *heads), rows)


class CollectiveMedians(NamedTuple):
    """One collective over all ranks and steps, times in ms. last_ms: what the last rank to arrive took."""

    kind: str
    bytes: int | None
    wire: int | float | None
    ranks: int | None
    ms: float
    last_ms: float
    exposed_ms: float
    exposed_least: float
    exposed_most: float
    bus_gbps: float | None


def collective_medians(ranks: list[RankFigures]) -> list[CollectiveMedians]:
    """Return each collective of a step over all ranks and steps; none if the steps' collectives differ."""
    steps = [step.collectives for rank in ranks for step in rank.steps]
    if len({tuple(one.kind for one in step) for step in steps}) > 1:
        return []

    rows = []
    for j, first in enumerate(steps[0]):
        exposed = [step[j].exposed_ms for step in steps]
        same_step = zip(*(rank.steps for rank in ranks))
        last_ms = median([min(step.collectives[j].ms for step in same) for same in same_step])
        rows.append(
            CollectiveMedians(
                kind=first.kind,
                bytes=first.bytes,
                wire=first.wire,
                ranks=first.ranks,
                ms=median([step[j].ms for step in steps]),
                last_ms=last_ms,
                exposed_ms=median(exposed),
                exposed_least=min(exposed),
                exposed_most=max(exposed),
                bus_gbps=first.wire / last_ms / 1e6 if first.wire and last_ms else None,
            )
        )
    return rows


def collective_table(rows: list[CollectiveMedians]) -> str:
    """Format collective_medians; '-' is unknown."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    heads = ("collective", "ranks", "bytes", "ms", "last to arrive", "bus GB/s", "exposed ms", "exposed")
    lines = []
    for i, row in enumerate(rows):
        percent = 100 * row.exposed_ms / row.ms if row.ms else 0
        lines.append(
            (
                f"{i + 1} {row.kind}",
                number(row.ranks, "d"),
                number(row.bytes, ",d"),
                f"{row.ms:.3f}",
                f"{row.last_ms:.3f}",
                number(row.bus_gbps, ".3g"),
                f"{row.exposed_ms:.3f}",
                f"{percent:.0f} %",
            )
        )
    return aligned(heads, lines)
