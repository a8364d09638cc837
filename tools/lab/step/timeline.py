"""Shows where a training step's time goes: compute, hidden communication, exposed communication, idle time.

    NPROC=8 ./run.sh bench --timeline FILE.json [--steps 5] [--json REPORT.json] [key=value ...]
    PYTHONPATH=tools torchrun --standalone --nproc_per_node=8 -m lab.bench --timeline FILE.json preset=record

Whole steps, compiled and warm, run back to back on random tokens under torch.profiler.

    on a GPU     The trace is the device's: NCCL kernels, found by name, are communication; every other
                 kernel, copy and fill is compute. A step begins with the first of its device work to start
                 and ends where the next step begins. A kernel belongs to the step that launched it; the
                 replay of a CUDA graph is one launch.
    on a CPU     The trace is the host's: what gloo's threads run is communication, operators on other threads
                 are compute, and a step is its call.

A step is compute + exposed + idle:

    exposed      A collective runs and no compute does. When collectives run side by side, each is charged all
                 that it exposes, so their figures may add up to more than the step's.
    idle         Neither runs.
    update       from the start of the first collective to the end of the step; forward and backward come
                 before it
    bus GB/s     bytes per link each way, as nccl-tests count them. A rank that arrives early waits inside the
                 collective, so the time is the shortest of the ranks', that of the last rank to arrive.
    bytes        counted by watching torch.distributed's functions, also while a CUDA graph is captured. They
                 are unknown where the number of calls differs from the number of collectives traced.

FILE.json is a Chrome trace (chrome://tracing, Perfetto) with a process for each rank and a line of exposed
communication. FILE.png shows the median step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median, median_low
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lab.model.kernels import DEVICE_EVENTS, trace_events
from lab.shared.collectives import Collective, Recorder, collectives_of
from lab.shared.timing import aligned, say_noise, typical
from lab.shared.trainer import (
    Session,
    build_trained,
    capture_backward,
    known_errors_of,
    load_trainer,
    open_session,
)
from ledger.files import write_atomic
from ledger.make import pictures
from script import BadInput

STEP = "training step "  # the host's ranges, numbered
WARM = 4  # steps before anything is timed: compilation, allocator, communicators
LAUNCHES = ("cuda_runtime", "cuda_driver")
NCCL = re.compile(r"nccl\w*Kernel_?(AllReduce|ReduceScatter|AllGather|AllToAll|Broadcast|Reduce|SendRecv)?")
KINDS = {
    "AllReduce": "all-reduce",
    "ReduceScatter": "reduce-scatter",
    "AllGather": "all-gather",
    "AllToAll": "all-to-all",
    "Broadcast": "broadcast",
    "Reduce": "reduce",
    "SendRecv": "all-to-all",
}
GLOO = "gloo:"
PIXELS = 2000  # a picture's width: narrower gaps are not drawn

Interval = tuple[float, float]


# ---- intervals -----------------------------------------------------------------------------------


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
    """Where the time of a step goes, six lengths in one unit; the module's docstring defines them."""

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


# ---- the trace -----------------------------------------------------------------------------------


class Span(NamedTuple):
    """An event of the trace, in microseconds.

    lane: the stream, or the thread of a CPU; kind: of a collective, else empty.
    """

    name: str
    start: float
    end: float
    lane: int
    kind: str = ""

    @property
    def interval(self) -> Interval:
        return (self.start, self.end)


class RankTrace(NamedTuple):
    """One rank's trace. bounds: where each step begins, and where the last one ends."""

    bounds: list[float]
    compute: list[Span]
    collectives: list[Span]

    def window(self, step: int) -> Interval:
        return (self.bounds[step], self.bounds[step + 1])


def kind_of(name: str) -> str:
    """Return the kind of a NCCL kernel, `collective` if its name does not tell, '' for any other kernel."""
    found = NCCL.search(name)
    return KINDS.get(found[1], "collective") if found else ""


def span_of(event: dict, kind: str, lane: int) -> Span:
    """Return an event of the trace as a span."""
    return Span(event["name"], event["ts"], event["ts"] + event["dur"], lane, kind)


def device_trace(events: list[dict], starts: list[float]) -> RankTrace:
    """Return the trace of a rank with a GPU. starts: of the host's ranges.

    Raises BadInput if a step shows no device work.
    """
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    begins: dict[int, float] = {}
    spans = []
    for event in events:
        if event.get("cat") not in DEVICE_EVENTS:
            continue
        args = event.get("args", {})
        spans.append(span_of(event, kind_of(event["name"]), args.get("stream", 0)))
        launch = launched.get(args.get("correlation"), -1.0)
        step = bisect_right(starts, launch) - 1
        if step >= 0:
            begins[step] = min(event["ts"], begins.get(step, event["ts"]))

    if len(begins) < len(starts):
        raise BadInput("--timeline: the profiler saw no device work in a step; is another using this GPU?")
    bounds = [begins[step] for step in range(len(starts))]
    return RankTrace(bounds, [s for s in spans if not s.kind], [s for s in spans if s.kind])


def host_trace(events: list[dict], starts: list[float]) -> RankTrace:
    """Return the trace of a rank on a CPU. Threads that run collectives do nothing else."""
    gloo = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(GLOO)]
    threads = {event["tid"] for event in gloo}
    compute = []
    ends: dict[int, float] = {}
    for event in sorted(events, key=lambda event: event["ts"]):
        thread = event.get("tid")
        if event.get("cat") != "cpu_op" or thread in threads or event["name"].startswith("c10d::"):
            continue
        if event["ts"] < ends.get(thread, 0.0):  # a part of the operator before
            continue
        compute.append(span_of(event, "", thread))
        ends[thread] = compute[-1].end

    collectives = [
        span_of(event, event["name"].removeprefix(GLOO).replace("_", "-"), event["tid"]) for event in gloo
    ]
    return RankTrace(starts, compute, collectives)


def read_trace(events: list[dict], cuda: bool) -> RankTrace:
    """Return the rank's trace from the events of a Chrome trace."""
    whole = [event for event in events if event.get("ph") == "X"]
    starts = sorted(
        event["ts"]
        for event in whole
        if event.get("cat") == "user_annotation" and event["name"].startswith(STEP)
    )
    return device_trace(whole, starts) if cuda else host_trace(whole, starts)


def matched(collectives: list[Span], calls: list[Collective], by_kind: bool) -> list[Collective | None]:
    """Return the call of each collective of one step, both in order; None where their numbers differ.

    by_kind: a GPU's streams may run collectives of different kinds in another order than they were launched.
    gloo turns a reduce-scatter into an all-reduce, so its names are not compared.
    """
    traced: dict[str, list[int]] = {}
    called: dict[str, list[int]] = {}
    for i, span in enumerate(collectives):
        traced.setdefault(span.kind, []).append(i)
    for i, call in enumerate(calls):
        called.setdefault(call.kind, []).append(i)

    kinds = {*traced, *called}
    same_kinds = all(len(traced.get(kind, [])) == len(called.get(kind, [])) for kind in kinds)
    if len(collectives) == len(calls) and not (by_kind and same_kinds):
        return list(calls)

    out: list[Collective | None] = [None] * len(collectives)
    for kind, indices in traced.items():
        theirs = called.get(kind, [])
        if len(indices) == len(theirs):
            for i, j in zip(indices, theirs):
                out[i] = calls[j]
    return out


class CollectiveFigures(NamedTuple):
    """One collective of a step. start_ms: from the start of the step; bytes and wire: None if unknown."""

    start_ms: float
    ms: float
    exposed_ms: float
    kind: str
    bytes: int | None
    wire: int | float | None
    ranks: int | None


class StepFigures(NamedTuple):
    """One step of one rank. times: in ms; exposed_parts: intervals of the trace, in microseconds."""

    times: Times
    collectives: list[CollectiveFigures]
    exposed_parts: list[Interval]

    @property
    def figures(self) -> dict[str, float]:
        """The times under the names of FIGURES."""
        return dict(zip(FIGURES, self.times))


class RankFigures(NamedTuple):
    """What one rank measured. plain_ms: a step without the profiler; calls: the collectives of one step."""

    rank: int
    plain_ms: float
    trace: RankTrace
    calls: list[Collective]
    steps: list[StepFigures]


def collective_figures(
    span: Span, call: Collective | None, step_start: float, exposed: float
) -> CollectiveFigures:
    """Return the figures of one collective. step_start, exposed: in microseconds, as the span."""
    start_ms = (span.start - step_start) / 1000
    ms = (span.end - span.start) / 1000
    if call is None:
        return CollectiveFigures(start_ms, ms, exposed / 1000, span.kind, None, None, None)
    return CollectiveFigures(
        start_ms, ms, exposed / 1000, call.kind, call.payload, call.wire, len(call.ranks)
    )


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


# ---- measuring -----------------------------------------------------------------------------------


class StepWatch:
    """Watches the collectives of one step of the script's optimizer.

    A step that replays a CUDA graph calls none of those inside it. Their calls are the ones of the last time
    that Optimizer.schedule ran, which was the capture.
    """

    def __init__(self, t: ModuleType, recorder: Recorder) -> None:
        self.recorder = recorder
        self.last: list | None = None  # events of the last schedule
        self.watch(t.Optimizer)

    def watch(self, optimizer_class: Any) -> None:
        """Make every schedule of the class keep its events in `last`."""
        inner = optimizer_class.schedule

        @functools.wraps(inner)
        def schedule(optimizer: Any) -> Any:
            with self.recorder.recording() as events:
                self.last = events
                return inner(optimizer)

        optimizer_class.schedule = schedule

    def calls_of(self, step: Callable[[], Any]) -> list[Collective]:
        """Run the step and return its calls."""
        before = self.last
        with self.recorder.recording() as events:
            step()
        replayed = before is not None and self.last is before
        return collectives_of([*events, *before] if replayed else events)


def trace_steps(s: Session, step: Callable[[], Any], steps: int) -> RankTrace:
    """Trace this many steps and one more, after one that pays for the profiler's start."""

    def run() -> None:
        step()
        for i in range(steps + 1):
            with torch.profiler.record_function(f"{STEP}{i}"):
                step()
        s.m.sync()

    s.m.sync()
    return read_trace(trace_events(s.cuda, run), s.cuda)


def measure_rank(s: Session, steps: int, recorder: Recorder) -> RankFigures:
    """Return one rank's figures and spans."""
    watch = StepWatch(s.t, recorder)
    run = build_trained(s)
    hp = s.t.hyper_at(s.h, 0, 0.0)
    backward, _ = capture_backward(s, run)

    def step() -> None:
        s.t.train_step(backward, run.optimizer, [run.fresh()] * s.accum, hp)

    for _ in range(WARM):
        step()
    calls = [call for call in watch.calls_of(step) if call.device == s.m.device.type]

    s.m.sync()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    s.m.sync()
    plain_ms = 1000 * (time.perf_counter() - start) / steps

    trace = trace_steps(s, step, steps)
    figures = [step_figures(trace, i, calls, s.cuda) for i in range(steps)]
    return RankFigures(s.m.rank, plain_ms, trace, calls, figures)


# ---- tables over all ranks -----------------------------------------------------------------------


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
        start, end = when
        event = dict(ph="X", pid=self.rank.rank, tid=line, name=name)
        self.events.append(event | dict(ts=start - self.zero, dur=end - start, args=args))

    def describe(self, what: str, line: int, **args: Any) -> None:
        self.events.append(dict(ph="M", pid=self.rank.rank, tid=line, name=what, args=args))

    def add_steps(self) -> None:
        """Add the lines of steps and of exposed communication."""
        trace = self.rank.trace
        for i, step in enumerate(self.rank.steps):
            self.add(STEPS_LINE, f"step {i}", trace.window(i), **step.figures)
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


# ---- the command ---------------------------------------------------------------------------------


def check_options(args: argparse.Namespace) -> Path:
    """Return the path of the picture. Raises BadInput before anything runs."""
    trace = args.timeline
    image = trace.with_suffix(".png")
    if trace.suffix != ".json":
        raise BadInput(f"--timeline {trace}: give the name of a .json file; the picture is its .png")
    if not trace.resolve().parent.is_dir():
        raise BadInput(f"--timeline {trace}: no such folder; make it first")
    if args.json and args.json.resolve() in (trace.resolve(), image.resolve()):
        raise BadInput(f"--json {args.json}: --timeline writes that file; choose another")
    if args.candidates:
        raise BadInput("--timeline times the script as it is: leave --candidates out")
    return image


def reported_step(step: StepFigures) -> dict:
    """Return a step as the JSON report has it."""
    return dict(**step.figures, collectives=[collective._asdict() for collective in step.collectives])


def result_of(s: Session, ranks: list[RankFigures], rows: list[CollectiveMedians]) -> dict:
    """Return the JSON report: every figure of every rank and step, and the medians."""
    medians = [median(column) for column in zip(*(medians_of_steps(rank) for rank in ranks))]
    return dict(
        schema=1,
        device=s.m.names["device"],
        machine=s.m.names,
        torch=torch.__version__,
        world_size=s.m.world_size,
        config=dataclasses.asdict(s.h),
        median=dict(zip(FIGURES, medians)),
        plain_step_ms=median([rank.plain_ms for rank in ranks]),
        collectives=[row._asdict() for row in rows],
        calls=[call._asdict() for call in ranks[0].calls],
        ranks=[
            dict(
                rank=rank.rank,
                plain_ms=rank.plain_ms,
                steps=[reported_step(step) for step in rank.steps],
            )
            for rank in ranks
        ],
    )


def say_tables(s: Session, ranks: list[RankFigures], rows: list[CollectiveMedians]) -> None:
    """Print the tables of steps and collectives."""
    plain_ms = median([rank.plain_ms for rank in ranks])
    s.say(
        f"timeline of {len(ranks[0].steps)} steps on {s.m.world_size} rank(s), device "
        f"{s.m.names['device']}, update {s.m.names['update']}; without the profiler a step takes "
        f"{plain_ms:.3f} ms"
    )
    s.say("\nsteps: median of the ranks (least to most)\n" + step_table(ranks))
    if rows:
        s.say(f"\ncollectives of a step, medians over steps and ranks\n{collective_table(rows)}")

    traced = len(ranks[0].steps[0].collectives)
    called = len(ranks[0].calls)
    if traced != called:
        note = " (NCCL runs no kernel for one rank)" if s.m.world_size == 1 else ""
        s.say(
            f"\n{called} collectives were called and {traced} traced in step 0: bytes are unknown where "
            f"their numbers differ{note}"
        )


def conclude(s: Session, ranks: list[RankFigures], args: argparse.Namespace, image: Path) -> None:
    """Print the tables and write the files, on rank 0."""
    rows = collective_medians(ranks)
    say_tables(s, ranks, rows)
    typical(s, "step, under the profiler", [step.times.step for rank in ranks for step in rank.steps])
    say_noise(s)
    write_atomic(args.timeline, json.dumps(chrome_trace(ranks)) + "\n")
    s.say(f"\ntimeline: {args.timeline}")
    if args.json:
        report = result_of(s, ranks, rows)
        write_atomic(args.json, json.dumps(report, indent=1, sort_keys=True) + "\n")
        s.say(f"json: {args.json}")
    try:
        picture(ranks, image)
        s.say(f"picture: {image}")
    except BadInput as error:
        s.skip("picture", str(error))


def run(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """Run `bench --timeline` and return its exit status. Raises BadInput."""
    image = check_options(args)
    recorder = Recorder()
    with recorder.installed():
        t = load_trainer(args.script)
        if not hasattr(t.Optimizer, "schedule"):
            raise BadInput(f"{args.script}: its Optimizer has no schedule(), which --timeline watches")
        with known_errors_of(t):
            s = open_session(t, args.knobs, env)
            mine = measure_rank(s, args.steps, recorder)
        ranks: list = [None] * s.m.world_size
        dist.gather_object(mine, ranks if s.m.rank == 0 else None)

    if s.m.rank == 0:
        conclude(s, ranks, args, image)
    return 0
