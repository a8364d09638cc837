"""Draws traced steps: a Chrome trace with a process for each rank, and a picture of the median step."""

from __future__ import annotations

from pathlib import Path
from statistics import median, median_low
from typing import Any

from lab.step.intervals import Interval, clipped, merged
from lab.step.timeline_figures import RankFigures
from ledger.make import pictures

PIXELS = 2000  # a picture's width: narrower gaps are not drawn


# ---- the Chrome trace ----------------------------------------------------------------------------

STEPS_LINE = 0
EXPOSED_LINE = 1
FIRST_LINE = 2  # of those of streams or threads


class ChromeProcess:
    """Collects the events of one rank's process. zero: the time that the trace begins with."""

    def __init__(self, rank: RankFigures, zero: float) -> None:
        self.rank = rank
        self.zero = zero
        self.names = {STEPS_LINE: "steps", EXPOSED_LINE: "exposed communication"}
        self.events: list[dict] = []

    def add(self, line: int, name: str, when: Interval, **args: Any) -> None:
        """Add a bar to a line. args: what the viewer shows when it is selected."""
        start, end = when
        event = dict(ph="X", pid=self.rank.rank, tid=line, name=name)
        self.events.append(event | dict(ts=start - self.zero, dur=end - start, args=args))

    def describe(self, what: str, line: int, **args: Any) -> None:
        """Add a fact about a line, such as its name."""
        self.events.append(dict(ph="M", pid=self.rank.rank, tid=line, name=what, args=args))

    def add_steps(self) -> None:
        """Add the lines of steps and of exposed communication."""
        trace = self.rank.trace
        for i, step in enumerate(self.rank.steps):
            self.add(STEPS_LINE, f"step {i}", trace.window(i), **step.named_times)
            for part in step.exposed_parts:
                self.add(EXPOSED_LINE, "exposed", part)

    def add_spans(self) -> None:
        """Add a line for each stream or thread."""
        trace = self.rank.trace
        numbers: dict[tuple[str, int], int] = {}
        for label, spans in (("communication", trace.collectives), ("compute", trace.compute)):
            for span in spans:
                if trace.bounds[0] <= span.start < trace.bounds[-1]:
                    line = numbers.setdefault((label, span.lane), FIRST_LINE + len(numbers))
                    self.names[line] = f"{label}, {span.lane}"
                    self.add(line, span.name, span.interval)

    def add_names(self) -> None:
        """Name the process and its lines, and order them."""
        self.describe("process_name", 0, name=f"rank {self.rank.rank}")
        for line, name in self.names.items():
            self.describe("thread_name", line, name=name)
        for line in self.names:
            self.describe("thread_sort_index", line, sort_index=line)


def chrome_trace(ranks: list[RankFigures]) -> dict:
    """Return the ranks' steps as one trace, a process for each rank."""
    zero = min(rank.trace.bounds[0] for rank in ranks)
    events = []
    for rank in ranks:
        process = ChromeProcess(rank, zero)
        process.add_steps()
        process.add_spans()
        process.add_names()
        events += process.events
    return dict(traceEvents=events, displayTimeUnit="ms")


# ---- the picture ---------------------------------------------------------------------------------


def draw_rank(axis: Any, row: int, rank: RankFigures, step: int, zoomed: bool) -> None:
    """Draw a rank's step, compute below and communication above, in ms from its start.

    zoomed: only from the first collective to the last.
    """
    trace = rank.trace
    window = trace.window(step)
    zero = window[0]
    communication = merged(clipped([s.interval for s in trace.collectives], window))
    if zoomed and communication:
        window = (communication[0][0], communication[-1][1])
    gap = (window[1] - window[0]) / PIXELS

    def without_gaps(intervals: list[Interval]) -> list[Interval]:
        return merged((start, end + gap) for start, end in clipped(intervals, window))

    def draw(label: str, color: str, above: float, intervals: list[Interval]) -> None:
        bars = [((start - zero) / 1000, (end - start) / 1000) for start, end in intervals]
        legend = label if row == 0 else None  # one entry for all rows
        axis.broken_barh(bars, (row + above, 0.4), color=color, linewidth=0, label=legend)

    draw("compute", "C0", 0.0, without_gaps([s.interval for s in trace.compute]))
    draw("hidden communication", "C2", 0.45, without_gaps(communication))
    draw("exposed communication", "C3", 0.45, clipped(rank.steps[step].exposed_parts, window))
    axis.grid(axis="y", visible=False)


def median_step(ranks: list[RankFigures]) -> int:
    """Return the index of the step of median length."""
    same_step = zip(*(rank.steps for rank in ranks))
    lengths = [median([step.times.step for step in same]) for same in same_step]
    return lengths.index(median_low(lengths))


def picture(ranks: list[RankFigures], out: Path) -> None:
    """Draw the median step: two lines for each rank, exposed communication in red."""
    plt = pictures.pyplot()
    step = median_step(ranks)
    size = (13, 1.4 + 0.6 * len(ranks))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, zoomed in zip(axes, (False, True)):
        for row, rank in enumerate(reversed(ranks)):
            draw_rank(axis, row, rank, step, zoomed)

    names = [f"rank {rank.rank}" for rank in reversed(ranks)]
    axes[0].set_yticks([row + 0.42 for row in range(len(ranks))], names)
    axes[0].set_xlabel(f"ms of step {step}")
    axes[1].set_xlabel("ms of the same step, from the first collective to the last")
    axes[0].legend(*axes[0].get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    pictures.save(plt, figure, out)
