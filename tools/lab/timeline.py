"""Where a training step's time goes: compute, communication that compute hides, communication seen, nothing.

    ./run.sh bench --timeline FILE.json [--steps 5] [--json REPORT.json] [key=value ...]
    torchrun --standalone --nproc_per_node=8 tools/lab/bench.py --timeline FILE.json preset=record

Whole steps, compiled and warm, run back to back on random tokens under torch.profiler. On a GPU the lanes
are the device's: NCCL kernels by name are communication, every other kernel, copy and fill is compute. A step
begins with the first of its device work to start (launches tell which step that is; a recorded graph is a
launch, too) and ends where the next one begins. On a CPU the lanes are the host's: what gloo's threads run is
communication, operators on other threads are compute, and a step is its call.

step = compute + exposed + idle. Exposed: a collective runs and no compute does; idle: neither does. update:
from the first collective's begin to the step's end; what is before it is forward and backward. Of
collectives side by side each is charged all that it exposes, so their figures may add up to more than the
lane's. A rank that comes early waits inside the collective, so bus GB/s (bytes per link each way, as
nccl-tests count them) is that of the last to come: the shortest of the ranks' times.

Bytes come from watching torch.distributed's functions, inside a recorded graph too; where their number is not
the number of collectives traced, they are unknown. FILE.json is a Chrome trace (chrome://tracing, Perfetto),
process = rank, with a lane of exposed communication; FILE.png shows the median step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median, median_low
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lab import bench
from ledger import runlog
from ledger import views
from lab import wire
from script import BadInput

STEP = "training step "  # the host's ranges, numbered
WARM = 4  # steps before anything is timed: compilation, allocator, communicators
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
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
FIGURES = ("step_ms", "compute_ms", "communication_ms", "exposed_ms", "idle_ms", "update_ms")
PIXELS = 2000  # of a picture: narrower gaps are not drawn

Interval = tuple[float, float]


# ---- intervals -----------------------------------------------------------------------------------


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order; touching ones become one, empty ones none."""
    out: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def minus(intervals: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """What of `intervals` none of `others` covers, disjoint and in order."""
    out, holes, at = [], merged(others), 0
    for start, end in merged(intervals):
        while at and holes[at - 1][1] > start:  # a hole may reach over several intervals
            at -= 1
        while at < len(holes) and holes[at][0] < end:
            if holes[at][0] > start:
                out.append((start, holes[at][0]))
            start = max(start, holes[at][1])
            at += 1
        if start < end:
            out.append((start, end))
    return out


def length(intervals: Iterable[Interval]) -> float:
    """Of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def clipped(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """What lies in the window, empty ones left out."""
    cut = ((max(start, window[0]), min(end, window[1])) for start, end in intervals)
    return [(start, end) for start, end in cut if start < end]


def account(window: Interval, compute: list[Interval], collectives: list[Interval]) -> dict:
    """FIGURES of a step in the unit of the intervals, its exposed parts, how much each collective exposes."""
    busy, talk = merged(clipped(compute, window)), merged(clipped(collectives, window))
    exposed = minus(talk, busy)
    step = window[1] - window[0]
    update = window[1] - talk[0][0] if talk else 0
    values = (
        step,
        length(busy),
        length(talk),
        length(exposed),
        step - length(busy) - length(exposed),
        update,
    )
    return dict(zip(FIGURES, values), exposed=exposed, each=[length(minus([c], busy)) for c in collectives])


# ---- the trace -----------------------------------------------------------------------------------


class Span(NamedTuple):
    """An event of the trace; microseconds. lane: the stream or thread. kind: of a collective, else ''."""

    name: str
    start: float
    end: float
    lane: int
    kind: str = ""


class Lanes(NamedTuple):
    """bounds: where each step begins, and where the last one ends."""

    bounds: list[float]
    compute: list[Span]
    collectives: list[Span]


def kind_of(name: str) -> str:
    """Of a NCCL kernel by its name; '' of any other, `collective` of one that its name does not tell."""
    found = NCCL.search(name)
    return KINDS.get(found[1], "collective") if found else ""


def span(event: dict, kind: str, lane: int) -> Span:
    return Span(event["name"], event["ts"], event["ts"] + event["dur"], lane, kind)


def device_lanes(events: list[dict], starts: list[float]) -> Lanes:
    """Lanes of a GPU's trace. starts: of the host's ranges. BadInput when a step shows no device work."""
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
    }
    bounds: list[float | None] = [None] * len(starts)
    spans = []
    for e in events:
        if e.get("cat") in DEVICE:
            args = e.get("args", {})
            spans.append(span(e, kind_of(e["name"]), args.get("stream", 0)))
            step = bisect_right(starts, launched.get(args.get("correlation"), -1.0)) - 1
            if step >= 0 and (bounds[step] is None or e["ts"] < bounds[step]):
                bounds[step] = e["ts"]
    if None in bounds:
        raise BadInput("--timeline: the profiler saw no device work in a step; does another use this GPU?")
    return Lanes(bounds, [s for s in spans if not s.kind], [s for s in spans if s.kind])


def host_lanes(events: list[dict], starts: list[float]) -> Lanes:
    """Lanes of a CPU's trace. The threads that run collectives do nothing else: theirs is no compute."""
    gloo = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("gloo:")]
    threads, compute, ends = {e["tid"] for e in gloo}, [], {}
    for e in sorted(events, key=lambda e: e["ts"]):
        if e.get("cat") == "cpu_op" and e["tid"] not in threads and not e["name"].startswith("c10d::"):
            if e["ts"] >= ends.get(e["tid"], 0.0):  # else a part of the one before
                compute.append(span(e, "", e["tid"]))
                ends[e["tid"]] = compute[-1].end
    return Lanes(starts, compute, [span(e, e["name"][5:].replace("_", "-"), e["tid"]) for e in gloo])


def read_lanes(events: list[dict], cuda: bool) -> Lanes:
    """Compute, collectives and the steps of a Chrome trace's events."""
    whole = [e for e in events if e.get("ph") == "X"]
    starts = sorted(
        e["ts"] for e in whole if e.get("cat") == "user_annotation" and e["name"].startswith(STEP)
    )
    return (device_lanes if cuda else host_lanes)(whole, starts)


def matched(collectives: list[Span], calls: list[wire.Call], by_kind: bool) -> list[wire.Call | None]:
    """The call behind each collective of one step, both in order; None where their numbers differ.

    by_kind: a GPU's streams may run collectives of different kinds in another order than they were launched.
    gloo makes a reduce-scatter of an all-reduce, so its names are not compared.
    """
    of = lambda items, kind: [i for i, item in enumerate(items) if item.kind == kind]
    kinds = {item.kind for item in (*collectives, *calls)}
    pairs = [(of(collectives, kind), of(calls, kind)) for kind in kinds]
    if len(collectives) == len(calls) and not (by_kind and all(len(a) == len(b) for a, b in pairs)):
        return list(calls)
    out: list[wire.Call | None] = [None] * len(collectives)
    for mine, theirs in pairs:
        for i, j in zip(mine, theirs) if len(mine) == len(theirs) else ():
            out[i] = calls[j]
    return out


def one_step(lanes: Lanes, index: int, calls: list[wire.Call], by_kind: bool) -> dict:
    """FIGURES in ms, collectives in order, and exposed parts (us) of a step."""
    window = (lanes.bounds[index], lanes.bounds[index + 1])
    mine = sorted((s for s in lanes.collectives if window[0] <= s.start < window[1]), key=lambda s: s.start)
    spans = [(s.start, s.end) for s in mine]
    found = account(window, [(s.start, s.end) for s in lanes.compute], spans)
    rows = [
        dict(
            kind=call.kind if call else s.kind,
            bytes=call.payload if call else None,
            wire=call.wire if call else None,
            ranks=len(call.ranks) if call else None,
            start_ms=(s.start - window[0]) / 1000,
            ms=(s.end - s.start) / 1000,
            exposed_ms=exposed / 1000,
        )
        for s, call, exposed in zip(mine, matched(mine, calls, by_kind), found["each"])
    ]
    return {name: found[name] / 1000 for name in FIGURES} | dict(collectives=rows, exposed=found["exposed"])


# ---- measuring -----------------------------------------------------------------------------------


def calls_of_a_step(t: ModuleType, recorder: wire.Recorder) -> Callable[[Callable], list[wire.Call]]:
    """Watch the collectives of the script's optimizer. Returns step -> the calls in one of them.

    A step that replays a recorded graph calls nothing in it: these calls are those of the last time that
    Optimizer.schedule ran, which was the recording.
    """
    inner, last = t.Optimizer.schedule, []

    @functools.wraps(inner)
    def schedule(self: Any) -> Any:
        with recorder.recording() as events:
            last[:] = [events]
            return inner(self)

    def watched(step: Callable) -> list[wire.Call]:
        before = [*last]
        with recorder.recording() as events:
            step()
        replayed = [] if last and before and last[0] is not before[0] else last
        return wire.calls_of([e for some in (events, *replayed) for e in some])

    t.Optimizer.schedule = schedule
    return watched


def traced(b: bench.Bench, step: Callable, steps: int) -> Lanes:
    """That many steps and one more under the profiler, behind one that pays for its start."""
    kinds = torch.profiler.ProfilerActivity
    b.m.sync()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if b.cuda else [kinds.CPU]) as trace:
        step()
        for i in range(steps + 1):
            with torch.profiler.record_function(f"{STEP}{i}"):
                step()
        b.m.sync()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        trace.export_chrome_trace(path)
        with open(path, encoding="utf-8") as f:
            return read_lanes(json.load(f)["traceEvents"], b.cuda)


def measure(b: bench.Bench, accum: int, steps: int, recorder: wire.Recorder) -> dict:
    """One rank's figures and spans."""
    watched = calls_of_a_step(b.t, recorder)
    run, hp = bench.build(b), b.t.hyper_at(b.h, 0, 0.0)
    backward, _ = b.t.bind_pass(run.loss_fn, run.optimizer)
    step = lambda: b.t.train_step(backward, run.optimizer, [run.fresh()] * accum, hp)
    for _ in range(WARM):
        step()
    calls = [c for c in watched(step) if c.device == b.m.device.type]
    b.m.sync()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    b.m.sync()
    plain_ms = 1000 * (time.perf_counter() - start) / steps
    lanes = traced(b, step, steps)
    return dict(
        rank=b.m.rank,
        plain_ms=plain_ms,
        lanes=lanes,
        calls=[c._asdict() for c in calls],
        steps=[one_step(lanes, i, calls, b.cuda) for i in range(steps)],
    )


# ---- what all ranks say --------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Median, and the least and the largest where they differ."""
    low, high = min(values), max(values)
    return f"{median(values):.3f}" + (f" ({low:.3f} to {high:.3f})" if len(values) > 1 else "")


def step_table(ranks: list[dict]) -> str:
    """A line for each step, its median and spread over the ranks, and the median of the steps."""
    count = len(ranks[0]["steps"])
    cell = lambda i, name: spread([r["steps"][i][name] for r in ranks])
    rows = [(str(i), "", *(cell(i, name) for name in FIGURES)) for i in range(count)]
    middle = lambda r, name: median([s[name] for s in r["steps"]])
    rows.append(("median", "", *(spread([middle(r, name) for r in ranks]) for name in FIGURES)))
    return bench.table(("step", "", *(name.replace("_", " ") for name in FIGURES)), rows)


def collective_rows(ranks: list[dict]) -> list[dict]:
    """Each collective of a step over all ranks and steps; none when steps differ in what they hold."""
    steps = [s["collectives"] for r in ranks for s in r["steps"]]
    if len({tuple(c["kind"] for c in s) for s in steps}) > 1:
        return []
    rows = []
    for j, one in enumerate(steps[0]):
        ms, exposed = ([s[j][key] for s in steps] for key in ("ms", "exposed_ms"))
        last = [min(s["collectives"][j]["ms"] for s in same) for same in zip(*(r["steps"] for r in ranks))]
        row = {key: one[key] for key in ("kind", "bytes", "wire", "ranks")}
        row |= dict(
            ms=median(ms),
            last_ms=median(last),
            exposed_ms=median(exposed),
            exposed_least=min(exposed),
            exposed_most=max(exposed),
        )
        row["bus_gbps"] = one["wire"] / row["last_ms"] / 1e6 if one["wire"] and row["last_ms"] else None
        rows.append(row)
    return rows


def collective_table(rows: list[dict]) -> str:
    number = lambda value, form: "-" if value is None else format(value, form)
    return bench.table(
        ("collective", "ranks", "bytes", "ms", "last to come", "bus GB/s", "exposed ms", "exposed"),
        [
            (
                f"{i + 1} {r['kind']}",
                number(r["ranks"], "d"),
                number(r["bytes"], ",d"),
                f"{r['ms']:.3f}",
                f"{r['last_ms']:.3f}",
                number(r["bus_gbps"], ".3g"),
                f"{r['exposed_ms']:.3f}",
                f"{100 * r['exposed_ms'] / r['ms'] if r['ms'] else 0:.0f} %",
            )
            for i, r in enumerate(rows)
        ],
    )


# ---- files ---------------------------------------------------------------------------------------


def chrome_trace(ranks: list[dict]) -> dict:
    """The ranks' steps as one trace. Processes are ranks; lanes: steps, exposed, then streams or threads."""
    zero = min(r["lanes"].bounds[0] for r in ranks)
    events = []

    def event(r: dict, lane: int, name: str, when: Interval, **args: Any) -> None:
        events.append(
            dict(
                ph="X",
                pid=r["rank"],
                tid=lane,
                name=name,
                ts=when[0] - zero,
                dur=when[1] - when[0],
                args=args,
            )
        )

    for r in ranks:
        lanes = r["lanes"]
        window = (lanes.bounds[0], lanes.bounds[-1])
        names = {0: "steps", 1: "exposed communication"}
        for i, s in enumerate(r["steps"]):
            event(r, 0, f"step {i}", (lanes.bounds[i], lanes.bounds[i + 1]), **{k: s[k] for k in FIGURES})
            for part in s["exposed"]:
                event(r, 1, "exposed", part)
        tracks: dict[tuple[str, int], int] = {}
        for label, spans in (("communication", lanes.collectives), ("compute", lanes.compute)):
            for s in spans:
                if window[0] <= s.start < window[1]:
                    lane = tracks.setdefault((label, s.lane), 2 + len(tracks))
                    names[lane] = f"{label}, {s.lane}"
                    event(r, lane, s.name, (s.start, s.end))
        about = lambda what, lane, **args: dict(ph="M", pid=r["rank"], tid=lane, name=what, args=args)
        events.append(about("process_name", 0, name=f"rank {r['rank']}"))
        events += [about("thread_name", lane, name=name) for lane, name in names.items()]
        events += [about("thread_sort_index", lane, sort_index=lane) for lane in names]
    return dict(traceEvents=events, displayTimeUnit="ms")


def draw_lanes(axis: Any, row: int, r: dict, index: int, zoomed: bool) -> None:
    """Compute below, communication above. zoomed: only while there are collectives; times stay the step's."""
    lanes, zero = r["lanes"], r["lanes"].bounds[index]
    window, pairs = (zero, lanes.bounds[index + 1]), lambda spans: [(s.start, s.end) for s in spans]
    communication = merged(clipped(pairs(lanes.collectives), window))
    if zoomed and communication:
        window = (communication[0][0], communication[-1][1])
    gap = (window[1] - window[0]) / PIXELS
    drawn = lambda spans: merged((a, b + gap) for a, b in clipped(spans, window))
    bars = lambda spans: [((a - zero) / 1000, (b - a) / 1000) for a, b in spans]
    for label, color, above, spans in (
        ("compute", "C0", 0.0, drawn(pairs(lanes.compute))),
        ("hidden communication", "C2", 0.45, drawn(communication)),
        ("exposed communication", "C3", 0.45, clipped(r["steps"][index]["exposed"], window)),
    ):
        axis.broken_barh(
            bars(spans), (row + above, 0.4), color=color, linewidth=0, label=None if row else label
        )
    axis.grid(axis="y", visible=False)


def picture(ranks: list[dict], out: Path) -> None:
    """The step of median length: two lanes for each rank, exposed communication in red."""
    plt = views.pyplot()
    times = [median([r["steps"][i]["step_ms"] for r in ranks]) for i in range(len(ranks[0]["steps"]))]
    index = times.index(median_low(times))
    figure, axes = plt.subplots(1, 2, figsize=(13, 1.4 + 0.6 * len(ranks)), sharey=True, layout="constrained")
    for axis, zoomed in zip(axes, (False, True)):
        for row, r in enumerate(reversed(ranks)):
            draw_lanes(axis, row, r, index, zoomed)
    names = [f"rank {r['rank']}" for r in reversed(ranks)]
    axes[0].set_yticks([row + 0.42 for row in range(len(ranks))], names)
    axes[0].set_xlabel(f"ms of step {index}")
    axes[1].set_xlabel("ms of the same, from the first collective to the last")
    axes[0].legend(*axes[0].get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    views.save(plt, figure, out)


def checked(args: argparse.Namespace) -> Path:
    """Where the picture goes. BadInput before anything runs."""
    image = args.timeline.with_suffix(".png")
    if args.timeline.suffix != ".json":
        raise BadInput(f"--timeline {args.timeline}: give the name of a .json file; the picture is its .png")
    if not args.timeline.resolve().parent.is_dir():
        raise BadInput(f"--timeline {args.timeline}: no such folder; make it first")
    if args.json and args.json.resolve() in (args.timeline.resolve(), image.resolve()):
        raise BadInput(f"--json {args.json}: --timeline writes that file; choose another")
    if args.candidates:
        raise BadInput("--timeline times the plain lines: leave --candidates out")
    if not 1 <= args.steps <= 100:
        raise BadInput(f"--steps {args.steps}: give 1 to 100")
    return image


def summary(b: bench.Bench, ranks: list[dict], rows: list[dict]) -> dict:
    """The machine readable result: every figure of every rank and step, and the medians."""
    figures = {name: median([median([s[name] for s in r["steps"]]) for r in ranks]) for name in FIGURES}
    plain = [r["plain_ms"] for r in ranks]
    return dict(
        schema=1,
        device=b.m.names["device"],
        machine=b.m.names,
        torch=torch.__version__,
        world_size=b.m.world_size,
        config=dataclasses.asdict(b.h),
        median=figures,
        plain_step_ms=median(plain),
        collectives=rows,
        calls=ranks[0]["calls"],
        ranks=[
            dict(
                rank=r["rank"],
                plain_ms=r["plain_ms"],
                steps=[{k: v for k, v in s.items() if k != "exposed"} for s in r["steps"]],
            )
            for r in ranks
        ],
    )


def conclude(b: bench.Bench, ranks: list[dict], args: argparse.Namespace, image: Path) -> None:
    """Tables and files, by rank 0."""
    rows = collective_rows(ranks)
    result = summary(b, ranks, rows)
    b.say(
        f"timeline of {len(ranks[0]['steps'])} steps on {b.m.world_size} rank(s), device "
        f"{b.m.names['device']}, update {b.m.names['update']}; without the profiler a step takes "
        f"{result['plain_step_ms']:.3f} ms"
    )
    b.say("\nsteps: median of the ranks (least to most)\n" + step_table(ranks))
    traces, calls = len(ranks[0]["steps"][0]["collectives"]), len(ranks[0]["calls"])
    if rows:
        b.say("\ncollectives of a step, medians over steps and ranks\n" + collective_table(rows))
    if traces != calls:
        b.say(
            f"\n{calls} collectives were called and {traces} traced in step 0: bytes are unknown where "
            "their numbers differ" + (" (NCCL runs no kernel for one rank)" if b.m.world_size == 1 else "")
        )
    views.write_atomic(args.timeline, json.dumps(chrome_trace(ranks)) + "\n")
    b.say(f"\ntimeline: {args.timeline}")
    if args.json:
        views.write_atomic(args.json, json.dumps(result, indent=1, sort_keys=True) + "\n")
        b.say(f"json: {args.json}")
    try:
        picture(ranks, image)
        b.say(f"picture: {image}")
    except runlog.BadInput as error:
        b.skip("picture", str(error))


def run(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    """The command. BadInput: what a user can mend."""
    image, recorder = checked(args), wire.Recorder()
    with recorder.installed():
        t = bench.load_script(args.script)
        if not hasattr(t.Optimizer, "schedule"):
            raise BadInput(f"{args.script}: its Optimizer has no schedule(), which --timeline watches")
        try:
            h = t.load_config(args.knobs, env)
            m = t.init_machine(h, env)
            accum, rows = t.cut_batch(h, m.world_size)
            b = bench.Bench(t, h, m, rows, dict(skipped=[]), 0.0)
            mine = measure(b, accum, args.steps, recorder)
        except t.InputError as error:
            raise BadInput(str(error)) from None
        ranks: list = [None] * m.world_size
        dist.gather_object(mine, ranks if m.rank == 0 else None)
    if m.rank == 0:
        try:
            conclude(b, ranks, args, image)
        except runlog.BadInput as error:
            raise BadInput(str(error)) from None
    return 0
