"""Reads a profiler's trace of training steps: what computed, what communicated, and when."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import NamedTuple

from lab.model.kernels import DEVICE_EVENTS
from lab.shared.collectives import Collective
from lab.step.intervals import Interval
from script import BadInput

STEP = "training step "  # the host's ranges, numbered
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


class Span(NamedTuple):
    """An event of the trace, in microseconds.

    lane: the stream, or the thread of a CPU; kind: what collective it is, "" for others.
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
        """Return the interval of a step."""
        return (self.bounds[step], self.bounds[step + 1])


def kind_of(name: str) -> str:
    """Return the kind of a NCCL kernel, `collective` if its name does not tell, '' for any other kernel."""
    found = NCCL.search(name)
    return KINDS.get(found[1], "collective") if found else ""


def span_of(event: dict, kind: str, lane: int) -> Span:
    """Return an event of the trace as a span."""
    return Span(event["name"], event["ts"], event["ts"] + event["dur"], lane, kind)


def device_trace(events: list[dict], starts: list[float]) -> RankTrace:
    """Return the trace of a rank with a GPU. starts: when the host's ranges begin.

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
