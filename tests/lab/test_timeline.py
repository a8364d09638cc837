"""The timeline: interval arithmetic by hand, planted traces of a GPU and a CPU, two gloo ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from lab import bench
from lab.shared import bench_options
from lab.shared.collectives import Collective, Recorder
from lab.step import timeline, timeline_drawing, timeline_figures, traces
from lab.step.intervals import account, clipped, length, merged, minus
from lab.step.traces import RankTrace, Span, matched
from tests.helpers import TINY, refused_by
from tests.rank_cases import run_ranks

ROOT = Path(__file__).resolve().parents[2]
KNOBS = [f"{k}={v}" for k, v in TINY.items()]

# ---- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], []),
        ([(3, 3)], []),  # empty
        ([(5, 4)], []),  # reversed: a clock that ran backwards has no length
        ([(0, 2), (2, 5)], [(0, 5)]),  # touching
        ([(4, 6), (0, 3)], [(0, 3), (4, 6)]),  # out of order
        ([(0, 10), (2, 3), (4, 5), (9, 12)], [(0, 12)]),  # nested, overlapping
        ([(1, 2), (1, 2), (1, 2)], [(1, 2)]),
    ],
)
def test_merged(given, expected):
    assert merged(given) == expected


@pytest.mark.parametrize(
    "given, others, expected",
    [
        ([], [(0, 9)], []),
        ([(0, 9)], [], [(0, 9)]),
        ([(0, 9)], [(0, 9)], []),
        ([(2, 4)], [(0, 9)], []),  # nested in a hole
        ([(0, 9)], [(3, 4)], [(0, 3), (4, 9)]),  # a hole nested in it
        ([(0, 3)], [(3, 5)], [(0, 3)]),  # touching takes nothing away
        ([(0, 4), (6, 9)], [(3, 7)], [(0, 3), (7, 9)]),  # one hole over two
        ([(0, 4), (5, 6), (8, 9)], [(1, 10)], [(0, 1)]),  # one hole over all that follow
        ([(0, 5), (3, 9)], [(4, 6), (1, 2)], [(0, 1), (2, 4), (6, 9)]),  # overlapping, holes out of order
    ],
)
def test_minus(given, others, expected):
    assert minus(given, others) == expected


def test_the_arithmetic_agrees_with_a_grid():
    rng = random.Random(0)

    def draw():
        starts = [rng.randrange(40) for _ in range(rng.randrange(8))]
        return [(start, start + rng.randrange(6)) for start in starts]

    def points(intervals):
        return {x for start, end in intervals for x in range(start, end)}

    for _ in range(500):
        a = draw()
        b = draw()
        assert points(merged(a)) == points(a) and length(merged(a)) == len(points(a))
        assert points(minus(a, b)) == points(a) - points(b)
        assert length(minus(a, b)) == len(points(a) - points(b))
        assert points(clipped(a, (10, 20))) == points(a) & set(range(10, 20))
        found = account((5, 35), a, b)
        window = set(range(5, 35))
        assert found.times.compute == len(points(a) & window)
        assert found.times.communication == len(points(b) & window)
        assert found.times.exposed == len((points(b) - points(a)) & window)
        assert found.times.idle == len(window - points(a) - points(b))


def test_a_step_by_hand():
    compute = [(10, 40), (30, 60), (95, 130)]  # overlapping; the last reaches into the next step
    collectives = [(50, 80), (70, 90), (75, 76), (20, 30), (98, 99)]  # overlapping, nested, hidden
    found = account((0, 100), compute, collectives)
    assert list(found.times) == [100, 55, 51, 30, 15, 80]
    assert found.exposed_parts == [(60, 90)]
    assert found.exposed_by == [20, 20, 1, 0, 0]  # side by side: each is charged all that it exposes
    empty = account((3, 7), [], [])
    assert list(empty.times) == [4, 0, 0, 0, 4, 0]
    assert empty.exposed_by == []


# ---- traces --------------------------------------------------------------------------------------


def host(name, ts, dur, cat="cpu_op", tid=1, **args):
    """Return an event of a profiler's trace."""
    return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, tid=tid, args=args)


def gpu_trace():
    """Return a trace of two steps and the one after them: a kernel each, then a graph of NCCL and compute.

    A warm step comes first. The device is 100 us late, so that host and device times of different steps
    overlap.
    """
    events = [host("PyTorch Profiler (0)", 0, 9000, "Trace"), dict(ph="i", name="Iteration Start", ts=0)]
    events += [host("cudaLaunchKernel", 5, 1, "cuda_runtime", correlation=1)]
    events += [host("old", 40, 300, "kernel", stream=7, correlation=1)]  # of the warm step
    for i in range(3):
        t0 = 100 + 200 * i
        d0 = 400 + 1000 * i
        events += [
            host(f"{traces.STEP}{i}", t0, 150, "user_annotation"),
            host(f"{traces.STEP}{i}", d0, 900, "gpu_user_annotation", tid=7),
            host("launch", t0 + 10, 1, ("cuda_driver", "cuda_runtime")[i % 2], correlation=10 + i),
            host("cudaGraphLaunch", t0 + 20, 1, "cuda_runtime", correlation=20 + i),
            host("triton_poi_fused_0", d0, 400, "kernel", stream=7, correlation=10 + i),
            host("ncclDevKernel_ReduceScatter_SumPostDiv_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
                 d0 + 400, 100, "kernel", stream=20, correlation=20 + i),
            host("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)",
                 d0 + 490, 20, "kernel", stream=21, correlation=20 + i),
            host("matrix_update", d0 + 500, 200, "kernel", stream=13, correlation=20 + i),
            host("Memset (Device)", d0 + 700, 10, "gpu_memset", stream=13, correlation=20 + i),
            host("ncclDevKernel_AllGather_RING_LL(...)",
                 d0 + 650, 250, "kernel", stream=20, correlation=20 + i),
        ]  # fmt: skip
    return events


CALLS = [
    Collective("reduce-scatter", 8000, (0, 1), "float32"),
    Collective("all-reduce", 400, (0, 1), "float32"),
    Collective("all-gather", 8000, (0, 1), "float32"),
]


def test_a_gpu_trace():
    trace = traces.read_trace(gpu_trace(), cuda=True)
    assert trace.bounds == [400, 1400, 2400]
    for i in range(2):
        found = timeline_figures.step_figures(trace, i, CALLS, True)
        assert [round(1000 * ms) for ms in found.times] == [1000, 610, 360, 290, 100, 600]
        rows = found.collectives
        assert [r.kind for r in rows] == ["reduce-scatter", "all-reduce", "all-gather"]
        assert [r.bytes for r in rows] == [8000, 400, 8000]
        assert [r.wire for r in rows] == [4000, 400, 4000]
        assert [round(1000 * r.exposed_ms) for r in rows] == [100, 10, 190]
        assert [round(1000 * r.start_ms) for r in rows] == [400, 490, 650]


def test_a_step_without_device_work_is_refused():
    events = [e for e in gpu_trace() if e.get("args", {}).get("correlation") not in (11, 21)]
    with pytest.raises(timeline.BadInput, match="no device work"):
        traces.read_trace(events, cuda=True)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather"),
        ("ncclKernel_ReduceScatter_RING_LL_Sum_float(ncclWorkElem)", "reduce-scatter"),
        ("ncclDevKernel_Reduce_Sum_f32_RING_LL(...)", "reduce"),
        ("ncclSymkDevKernel_AllReduce_AGxLL_R_Sum_f32(...)", "all-reduce"),
        ("ncclDevKernel_Generic_4(...)", "collective"),
        ("void at::native::reduce_kernel<512, 1>", ""),
        ("triton_red_fused_all_gather_0", ""),
    ],
)
def test_nccl_kernels_by_name(name, kind):
    assert traces.kind_of(name) == kind


def test_a_cpu_trace():
    """An operator counts once as compute, with all inside it; gloo's threads and calls do not count."""
    events = [host(f"{traces.STEP}{i}", 1000 * i, 900, "user_annotation") for i in range(2)]
    events += [
        host("aten::linear", 100, 300), host("aten::mm", 150, 100), host("aten::add", 400, 50),
        host("c10d::allreduce_", 450, 20), host("gloo:all_reduce", 440, 160, "user_annotation", tid=5),
        host("aten::div_", 590, 5, tid=5), host("aten::mul", 550, 20),
    ]  # fmt: skip
    trace = traces.read_trace(events, cuda=False)
    assert [s.name for s in trace.compute] == ["aten::linear", "aten::add", "aten::mul"]
    found = timeline_figures.step_figures(
        trace, 0, [Collective("reduce-scatter", 800, (0, 1), "float32")], False
    )
    assert [round(1000 * ms) for ms in found.times] == [1000, 370, 160, 130, 500, 560]
    assert found.collectives[0].kind == "reduce-scatter"  # as called; gloo runs an all-reduce


def spans(*kinds):
    return [Span(kind, i, i + 1, 0, kind) for i, kind in enumerate(kinds)]


def test_collectives_find_their_calls():
    calls = [c._replace(payload=i) for i, c in enumerate(2 * CALLS)]  # RS AR AG RS AR AG

    def sizes(*kinds, by_kind=True):
        return [call and call.payload for call in matched(spans(*kinds), calls, by_kind)]

    rs, ar, ag = (c.kind for c in CALLS)
    assert sizes(ar, rs, rs, ag, ar, ag) == [1, 0, 3, 2, 4, 5]  # another order, kind by kind
    assert sizes(ar, ar, ag, ar, ar, ag, by_kind=False) == [0, 1, 2, 3, 4, 5]
    assert sizes(*["collective"] * 6) == [0, 1, 2, 3, 4, 5]  # kernels whose names do not tell
    assert sizes(rs, rs, ar, ag, ag) == [0, 3, None, 2, 5]  # one all-reduce was not traced
    assert sizes() == []


# ---- the figures of all ranks --------------------------------------------------------------------------


def planted_ranks():
    """Return the results of two ranks and three steps, of which rank 1 is 60 us late."""
    ranks = []
    for rank, late in ((0, 0), (1, 60)):
        trace = traces.read_trace(gpu_trace(), cuda=True)
        moved = [
            span._replace(start=span.start + late) if span.kind == "reduce-scatter" else span
            for span in trace.collectives
        ]
        trace = RankTrace(trace.bounds, trace.compute, moved)
        steps = [timeline_figures.step_figures(trace, i, CALLS, True) for i in range(2)]
        ranks.append(timeline_figures.RankFigures(rank, 1.0, trace, CALLS, steps))
    return ranks


def test_bandwidth_is_that_of_the_last_to_come():
    rows = timeline_figures.collective_medians(planted_ranks())
    assert rows[0].ms == pytest.approx(0.07)
    assert rows[0].last_ms == pytest.approx(0.04)
    assert rows[0].bus_gbps == pytest.approx(4000 / 40e-6 / 1e9)
    assert rows[2].last_ms == pytest.approx(0.25)
    assert rows[2].bus_gbps == pytest.approx(4000 / 250e-6 / 1e9)
    ranks = planted_ranks()
    ranks[1].steps[0].collectives.pop()
    assert timeline_figures.collective_medians(ranks) == []
    assert "1.000 " in timeline_figures.step_table(planted_ranks())


def test_the_chrome_trace(tmp_path):
    trace = timeline_drawing.chrome_trace(planted_ranks())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    assert [names[1, line] for line in range(6)] == [
        "steps",
        "exposed communication",
        "communication, 20",
        "communication, 21",
        "compute, 7",
        "compute, 13",
    ]
    for rank in range(2):
        mine = [e for e in trace if e["ph"] == "X" and e["pid"] == rank]
        assert min(e["ts"] for e in mine) == 0 and "old" not in {e["name"] for e in mine}
        lines = {tid: [e for e in mine if e["tid"] == tid] for tid in range(6)}
        exposed_ms = sum(e["args"]["exposed_ms"] for e in lines[0])
        assert sum(e["dur"] for e in lines[1]) == pytest.approx(exposed_ms * 1000)
        assert len(lines[0]) == 2 and len(lines[4]) == 2
    timeline_drawing.picture(planted_ranks(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_calls_of_a_captured_step():
    """A replayed graph makes no calls: those of its capture count, and those that the step makes itself."""
    recorder = Recorder()
    made = []

    class Optimizer:
        def schedule(self):
            recorder.events += made

    watched = timeline.StepWatch(SimpleNamespace(Optimizer=Optimizer), recorder).calls_of
    optimizer = Optimizer()
    made[:] = CALLS[:1]
    optimizer.schedule()
    made[:] = CALLS
    optimizer.schedule()  # the capture
    assert watched(lambda: None) == CALLS
    assert watched(lambda: recorder.events.append(CALLS[0])) == [CALLS[0], *CALLS]
    assert watched(optimizer.schedule) == CALLS  # eager: once, not twice


# ---- the command ---------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How bench ended on a rank."""

    status: int
    stdout: str


def bench_rank(rank, argv):
    """Run bench on this rank."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        status = bench.main(argv, os.environ)
    return Ended(status, stdout.getvalue())


def test_two_ranks(tmp_path):
    """Over gloo, the figures of every rank add up, every byte is known, and all files are whole."""
    files = ["--timeline", str(tmp_path / "t.json"), "--json", str(tmp_path / "r.json")]
    first, second = run_ranks(bench_rank, 2, [*files, "--steps", "3", *KNOBS], timeout=180)
    assert first.status == second.status == 0 and second.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "t.json", "t.png"]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["world_size"] == 2 and [r["rank"] for r in result["ranks"]] == [0, 1]
    kinds = [c["kind"] for c in result["calls"]]
    assert {"reduce-scatter", "all-gather", "all-reduce"} <= set(kinds)
    for r in result["ranks"]:
        assert len(r["steps"]) == 3 and r["plain_ms"] > 0
        for s in r["steps"]:
            assert s["step_ms"] == pytest.approx(s["compute_ms"] + s["exposed_ms"] + s["idle_ms"])
            assert 0 < s["exposed_ms"] <= s["communication_ms"] < s["step_ms"] and s["idle_ms"] >= 0
            assert [c["kind"] for c in s["collectives"]] == kinds
            assert [c["bytes"] for c in s["collectives"]] == [c["payload"] for c in result["calls"]]
            assert s["exposed_ms"] <= sum(c["exposed_ms"] for c in s["collectives"]) + 1e-6
            for c in s["collectives"]:
                assert 0 <= c["exposed_ms"] <= c["ms"] and c["ranks"] == 2
                assert c["wire"] == c["bytes"] * (1 if c["kind"] == "all-reduce" else 0.5)
    assert [c["kind"] for c in result["collectives"]] == kinds
    trace = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    seen = [e for e in trace if e["ph"] == "X"]
    assert {e["pid"] for e in seen} == {0, 1} and min(e["ts"] for e in seen) >= 0
    for r in result["ranks"]:
        line = [e["dur"] for e in seen if (e["pid"], e["tid"]) == (r["rank"], 1)]
        assert sum(line) / 1000 == pytest.approx(sum(s["exposed_ms"] for s in r["steps"]))
    assert "timeline of 3 steps on 2 rank(s)" in first.stdout
    assert "1 reduce-scatter" in first.stdout


def test_bad_input_is_one_line(tmp_path, capsys):
    refused = partial(refused_by, bench.main, capsys)
    at = tmp_path / "t.json"
    assert "a .json file" in refused("--timeline", tmp_path / "t.png", *KNOBS)
    assert "no such folder" in refused("--timeline", tmp_path / "no" / "t.json", *KNOBS)
    assert "choose another" in refused("--timeline", at, "--json", at, *KNOBS)
    assert "--candidates" in refused("--timeline", at, "--candidates", tmp_path / "c.py", *KNOBS)
    assert "1 to 100" in refused("--timeline", at, "--steps", 0, *KNOBS)
    assert "unknown config key" in refused("--timeline", at, *KNOBS, "sed=1")
    assert "cannot read the script" in refused("--timeline", at, "--script", tmp_path / "no.py", *KNOBS)
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written(tmp_path, capsys, monkeypatch):
    """A name that can no longer be written is reported in one line, and no temporary file stays."""
    at = tmp_path / "t.json"
    at.mkdir()
    assert bench.main(["--timeline", str(at), *KNOBS], {}) == 2
    said = capsys.readouterr()
    assert said.err == f"bench.py: --timeline {at}: is a folder; name a file in it\n" and not said.out

    monkeypatch.setattr(bench_options, "check_output", lambda option, path: None)  # it became one later
    assert bench.main(["--timeline", str(at), "--steps", "1", *KNOBS], {}) == 2
    said = capsys.readouterr()
    assert said.err.endswith("cannot write: Is a directory\n")
    assert "steps: median of the ranks" in said.out
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
