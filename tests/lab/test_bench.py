"""The bench: work by hand, floors, kernels by class, candidates with planted faults, the command's manners."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]

from lab import bench  # noqa: E402
import train_gpt as t  # noqa: E402
from helpers import english_args, english_dataset, group_of_one, machine, stop_one_line, tiny  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_bench")
SECTIONS = [
    "embedding + bigram + smear", "value embedding", "residual mix + norm", "QKV product", "QK norm + rope + gain",
    "attention", "XSA", "O product", "residual add + norm", "MLP", "skip adds",
    "head + softcap + cross-entropy", "bank casts",
]  # fmt: skip
WHOLE = ["forward", "forward+backward", "optimizer", "ema", "zero gradients", "clock check", "step", "log line",
         "loader.next", "loader.build (in its thread)"]  # fmt: skip


def a_bench(rows=2, **knobs):
    return bench.Bench(t, tiny(**knobs), machine(), rows, dict(skipped=[], whole=[], sections=[]), math.inf)


def sections(b, dtype=torch.float32):
    return {s.name: s for s in bench.sections_of(b, t, t.Ops(), dtype)}


def measured(args, tmp_path, capsys):
    """(report, output) of a bench in this process."""
    file = tmp_path / "bench.json"
    assert bench.main(["--json", str(file), *map(str, args), *english_args()], {}) == 0
    said = capsys.readouterr()
    assert said.err == "", said.err
    return json.loads(file.read_text()), said.out


# ---------------------------------------------------------------- work and floors


def test_the_sections_make_the_models_products():
    """Together they have the products of a forward, counted by torch, and those of a backward are twice that."""
    b = a_bench()
    identity = lambda q, k, v, window, docs: q
    model = t.GPT(b.h, t.Ops(attend=identity))
    tokens = torch.zeros(2, b.h.train_seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        loss = model.loss(tokens, tokens)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    rows = [s for s in sections(b).values() if s.name != "attention"]
    assert sum(s.count * s.forward.flops for s in rows) == forward.get_total_flops()
    assert sum(s.count * s.backward.flops for s in rows) == backward.get_total_flops()


def test_work_by_hand():
    b = a_bench()
    h, N, found = b.h, 2 * b.h.train_seq_len, sections(b)
    assert [s.name for s in found.values() if s.count] == SECTIONS
    assert [s.name for s in found.values() if not s.count] == ["attention block", "layer"]
    D, kv, F = h.model_dim, h.kv_dim, h.mlp_dim
    products = (N, D, F), (N, F, D)
    assert found["MLP"].forward == bench.Work(
        4 * 2 * (N * D + D * F + N * F), tuple((2 * N * D * F, p) for p in products)
    )
    assert found["MLP"].backward.moved == 4 * (3 * N * (D + F) + 4 * D * F)
    assert found["O product"].backward.moved == 4 * (3 * N * D + 2 * D * D)
    qk, both = found["QK norm + rope + gain"], N * (D + kv)  # v is a view, its gradient is copied
    assert qk.forward.moved == 4 * 2 * both and qk.backward.moved == 4 * (3 * both + 2 * N * kv)
    assert found["XSA"].forward.moved == 4 * (2 * N * D + N * kv) and found["XSA"].count == h.xsa_last_n
    pairs = h.train_seq_len**2 / 2  # of a query and a key that it sees
    assert found["attention"].forward.flops == 2 * (2 * 2 * h.num_heads * pairs * h.head_dim)
    assert found["attention"].backward.flops == 2.5 * found["attention"].forward.flops
    parts = ("QKV product", "attention", "O product", "MLP")
    assert found["layer"].forward.flops == sum(found[part].forward.flops for part in parts)
    assert found["skip adds"].count == h.num_layers // 2
    assert found["bank casts"].forward.moved == 0  # float32 to float32


def test_masked_attention_is_counted_by_window():
    """4 layers; documents of a quarter of 16 tokens; 3 of 4 tokens see as many as the window, the first fewer."""
    pairs = lambda **knobs: {
        name.removeprefix("attention"): (s.count, s.forward.flops / (4 * 2 * 32))
        for name, s in sections(a_bench(**knobs)).items()
        if s.name.startswith("attention") and s.count
    }
    assert pairs() == {"": (4, 128)}
    assert pairs(attn_windows="4 0 4") == {"": (1, 128), ", window 4": (3, 4 * 12 + 4 * 4 / 2)}
    assert pairs(doc_mask=1) == {"": (4, 4 * 4 * 4 / 2)}
    assert pairs(doc_mask=1, attn_windows="2") == {", window 2": (4, 4 * (2 * 2 + 2 * 2 / 2))}


@pytest.mark.parametrize("knobs", [{}, dict(attn_windows="4 0", doc_mask=1)], ids=str)
def test_every_section_runs_forward_and_backward(knobs):
    b = a_bench(**knobs)
    for s in sections(b).values():
        assert len(bench.time_section(b, s)) == 2
        leaves = bench.leaves_of(s, s.inputs())
        assert leaves or s.back, s.name


def test_a_floor_is_the_larger_of_copy_and_products():
    rates = {None: 10.0, (2, 3, 4): 5.0}
    assert bench.floor_of(bench.Work(3e9), 1000.0, rates) == (3.0, "copy")
    work = bench.Work(1e9, ((1e10, (2, 3, 4)), (2e10, None)))
    ms, bound = bench.floor_of(work, 1000.0, rates)
    assert bound == "product" and math.isclose(ms, 1e10 / 5e12 * 1e3 + 2e10 / 10e12 * 1e3)
    s = bench.Section("s", 4, None, None, work, bench.Work(1e9))
    row = bench.section_row(s, "forward", 8.0, (1000.0, rates))
    assert row["percent_of_floor"] == 50 and row["total_ms"] == 32 and row["floor_total_ms"] == 16
    assert row["gbps"] == 125 and row["tflops"] == 3.75 and row["mb"] == 1000 and row["gflop"] == 30
    assert bench.section_row(s, "backward", 2.0, (1000.0, rates))["percent_of_floor"] == 50


# ---------------------------------------------------------------- clocks


def test_a_graph_holds_every_call(monkeypatch):
    """ms are of one call of the recorded graph; nothing is recorded before it ran outside."""
    recorded, ran = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, end):
            return 12.0

    @contextlib.contextmanager
    def lanes():
        yield contextlib.nullcontext

    monkeypatch.setattr(torch.cuda, "Event", Event)
    m = SimpleNamespace(device=torch.device("cuda"), lanes=lanes, sync=lambda: None, rank=0)
    m.record = lambda fn: recorded.append(list(ran)) or fn
    b = a_bench()._replace(m=m)
    assert bench.call_ms(b, [lambda: ran.append(0), lambda: ran.append(1), lambda: ran.append(2)]) == 4.0
    assert recorded == [[0, 1, 2] * 2] and ran == [0, 1, 2] * (2 + bench.REPLAYS + 1)
    m.record = lambda fn: fn() or 1 / 0  # what cannot be recorded is launched, and the report says so
    assert bench.call_ms(b, [lambda: None] * 6) == 2.0
    assert b.report["skipped"][0]["why"].startswith("ZeroDivisionError")


@pytest.mark.parametrize("error", [None, OSError("driver")], ids=["recorded", "failed"])
def test_forward_and_backward_and_the_step_are_timed_as_training_launches_them(monkeypatch, error):
    """The pass is a graph where the machine records, gone when all is timed; where it cannot be, the report says so."""
    launches, alive = [], []

    class Launch:
        def __init__(self, fn):
            self.fn = fn

        def __call__(self):
            launches.append(self.fn.__name__)
            self.fn()

    def record(fn):
        if error is not None and "schedule" not in fn.__name__:
            raise error
        launch = Launch(fn)
        alive.append(weakref.ref(launch))
        return launch

    with group_of_one() as m:
        h = tiny(data_path=english_dataset().path, vocab_size=english_dataset().vocab_size)
        b = a_bench()._replace(h=h, m=dataclasses.replace(m, record=record), rows=2)
        run, of, wall = bench.build(b), {}, bench.wall_times

        def wall_times(b, fn, before=lambda: None):
            times = wall(b, fn, before)
            of[len(of)] = list(launches)
            launches.clear()
            return times

        monkeypatch.setattr(bench, "wall_times", wall_times)
        bench.time_whole(b, run, 4)
        bench.sustained(b, run, None, 0.01)
    counts = {
        w["name"]: (of[i].count("both_ways"), of[i].count("schedule"))
        for i, w in enumerate(b.report["whole"])
    }
    each, accumulated = (0, 0) if error else (14, 4 * 14)
    assert counts["forward"] == (0, 0) and counts["forward+backward"] == (each, 0)
    assert counts["optimizer"] == (0, 14) and counts["step"] == (accumulated, 14)
    assert [x() is None for x in alive] == ([False] if error else [False, True, True])
    assert (launches.count("both_ways") > 16) == (not error)  # sustained steps, too
    why = [x["why"] for x in b.report["skipped"] if "forward+backward" in x["what"]]
    assert why == (["rank 0: OSError: driver"] if error else [])


def test_inputs_are_fresh_where_they_would_stay_in_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=100))
    b = a_bench()._replace(m=SimpleNamespace(device=torch.device("cuda")))
    sets = bench.fresh_sets(b, lambda: [torch.zeros(49)])
    assert len({s[0].data_ptr() for s in sets}) == bench.FRESH
    assert len(bench.fresh_sets(b, lambda: [torch.zeros(50)])) == 1
    seen = []
    for call in bench.in_turn(b, seen.append, sets):
        call()
    assert seen == sets and len(bench.in_turn(b, seen.append, sets[:1])) == bench.ROUNDS


# ---------------------------------------------------------------- steps as warm as training's


def trained(h, m):
    return bench.Bench(t, h, m, t.cut_batch(h, 1)[1], dict(skipped=[], whole=[], sections=[]), math.inf)


@pytest.fixture
def calls(monkeypatch):
    """Names of what train() calls, in order, a fetched pair's arrival with its number."""
    seen, fetches = [], []

    def watch(owner, name):
        fn = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **how: (seen.append(name), fn(*args, **how))[1])

    def fetch(self, *tensors):
        arrived, number = real(self, *tensors), len(fetches)
        fetches.append(number)
        seen.append(f"fetch {number}")
        return lambda: (seen.append(f"arrived {number}"), arrived())[1]

    for owner, name in ((t.TokenLoader, "next"), (t, "train_step"), (t.Ema, "update"), (t.Machine, "agree"),
                        (t, "log_step"), (t.Log, "status")):  # fmt: skip
        watch(owner, name)
    real = t.Machine.fetch
    monkeypatch.setattr(t.Machine, "fetch", fetch)
    return seen


def test_the_sustained_loop_is_trainings(tmp_path, calls):
    """The same calls in the same order: batch, step, average, fetch, the step before's arrival, clock, log, status."""
    h = t.load_config(english_args(iterations=6, train_log_every=2), {})
    with group_of_one() as m:
        log = t.Log(str(tmp_path / "log.txt"), m)
        t.train(t.start_run(h, m, log, t.load_dataset(h), time.perf_counter()))
        log.file.close()
        last = [i for i, name in enumerate(calls) if name == "status"][-1]
        first = [i for i, name in enumerate(calls) if name == "next"][-7]  # calibration's is the last
        assert calls[first - 2 : first] == ["fetch 0", "agree"]  # all ranks are ready
        theirs = ["fetch 0", *calls[first : last + 1]]
        assert theirs.count("log_step") == 4  # the first, the second, fourth and sixth
        calls.clear()
        b = trained(h, m)
        run, loader = bench.build(b), t.TokenLoader(h, m)
        with bench.quiet_log(b) as logged:
            step = bench.loops(b, run, loader, logged)["training"]
            assert calls.pop(0) == "next"  # of the fixed batch
            for _ in range(6):
                step()
            loader.pending.result()
    shift = int(calls[0].split()[1])  # fetches are numbered on
    assert [re.sub(r"\d+", lambda n: str(int(n[0]) - shift), name) for name in calls] == theirs


def test_fixed_steps_have_nothing_beside_the_step(tmp_path, calls):
    h = t.load_config(english_args(), {})
    with group_of_one() as m, bench.quiet_log(trained(h, m)) as logged:
        b = trained(h, m)
        run = bench.build(b)
        before = [p.clone() for p in run.model.parameters()]
        steps = bench.loops(b, run, None, logged)
        calls.clear()
        begin, end = steps["fixed"]()
        assert calls == ["train_step", "update"] and [*steps] == ["fixed"] and begin < end
        assert any(not torch.equal(p, q) for p, q in zip(before, run.model.parameters()))


def test_blocks_by_hand(monkeypatch):
    """a b b a a b b a of as many steps as fit; a block's first is not timed; what passes between two steps is told."""
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def runs(name, idle, busy):
        def step():
            order.append(name)
            now[0] += idle
            begin = now[0]
            now[0] += busy
            return begin, now[0]

        return step

    with group_of_one() as m:
        b = a_bench()._replace(m=m)
        blocks, half = bench.run_blocks(
            b, dict(fixed=runs("a", 0.0, 0.25), training=runs("b", 0.125, 0.25)), 8.0
        )
        assert order == list("aba" + "a" + "aaaa" + 8 * "b" + 8 * "a" + 8 * "b" + "aaaa")
        assert half == 4 * 0.25 + 0.125 + 4 * (2 * 0.25 + 2 * 0.375) and [
            x["which"] for x in blocks[4:6]
        ] == ["fixed", "training"]
        assert {(x["which"], x["steps"], x["ms"], x["between_ms"]) for x in blocks} == {
            ("fixed", 3, 250, 0), ("training", 3, 375, 125)}  # fmt: skip
        blocks, _ = bench.run_blocks(b, dict(fixed=runs("a", 0.0, 9.0)), 1.0)
        assert [(x["which"], x["steps"], x["ms"]) for x in blocks] == [("fixed", 1, 9000)] * 8


def test_ticks_of_a_gpu(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = 3.0

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    b = a_bench()._replace(m=SimpleNamespace(device=torch.device("cuda")))
    first, second = bench.tick(b), bench.tick(b)
    second.at = 10.0
    assert bench.ms_between(first, second) == 7.0 and bench.ms_between(1.0, 1.5) == 500


SMI = """#!/bin/sh
echo "$@" > "$0.args"
echo $$ > "$0.pid"
: > "$0.beat"
"""
READINGS = 'while :; do echo "1650, 697.50, 0x0000000000000004"; echo >> "$0.beat"; sleep 0.02; done\n'


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Put a shell script in the place of nvidia-smi; returns whether it, or a child of it, still runs."""
    file = tmp_path / "bin" / "nvidia-smi"
    file.parent.mkdir()

    def put(body):
        file.write_text(SMI + body)
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")

        def alive():  # a process that nobody has waited for yet would count for the system
            beat = Path(f"{file}.beat")
            before = beat.stat().st_size
            time.sleep(0.3)
            return beat.stat().st_size > before

        return alive

    yield put
    with contextlib.suppress(OSError):  # of a test that failed
        os.killpg(int(Path(f"{file}.pid").read_text()), 9)


def until(true):
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_clocks_are_read_by_the_half(smi, tmp_path):
    alive = smi(READINGS)
    with bench.Sampler("GPU-a") as sampler:
        assert until(lambda: len(sampler.samples) > 2) and alive()
        half = time.perf_counter()
        count = len(sampler.samples)
        assert until(lambda: len(sampler.samples) > count + 2)
    assert not alive() and not sampler.reader.is_alive()
    figures = sampler.figures(half)
    assert 2 <= figures["samples"] <= len(sampler.samples) - 2
    assert figures == dict(samples=figures["samples"], sm_mhz=1650, sm_mhz_range=[1650, 1650], power_w=697.5,
                           reasons={"SW power cap": figures["samples"]})  # fmt: skip
    assert sampler.figures(time.perf_counter()) == dict(why="nvidia-smi gave no reading in time")
    asked = Path(tmp_path / "bin" / "nvidia-smi.args").read_text().split()
    assert sorted(asked) == ["--format=csv,noheader,nounits", "--id=GPU-a",
                             "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active", "-lms", "200"]  # fmt: skip


def test_figures_of_clocks_by_hand():
    sampler = bench.Sampler("GPU-a")
    lines = [
        "1515, 690.10, 0x0000000000000004",
        "1830, 704.00, 0x0000000000000000",
        "1700, [N/A], 0x0000000000000024",
    ]
    sampler.samples = [bench.read_sample(line)._replace(at=i) for i, line in enumerate(lines)]
    assert sampler.figures(0) == dict(samples=3, sm_mhz=1700, sm_mhz_range=[1515, 1830], power_w=704.0,
                                      reasons={"SW power cap": 2, "SW thermal slowdown": 1})  # fmt: skip
    assert sampler.figures(2)["power_w"] is None and sampler.figures(1)["sm_mhz_range"] == [1700, 1830]
    for line in ("", "No devices were found", "1, 2", "[N/A], 1, 0x0"):
        with pytest.raises(ValueError):
            bench.read_sample(line)


@pytest.mark.parametrize(
    "body,why",
    [('echo "No devices were found"; exit 6\n', "nvidia-smi: No devices were found"), ("exit 9\n", "nvidia-smi: status 9"),
     ('echo "Field is not valid" >&2; exit 2\n', "nvidia-smi: Field is not valid")],
    ids=["says why", "silent", "on stderr"],
)  # fmt: skip
def test_a_failing_nvidia_smi(smi, body, why):
    alive = smi(body)
    with bench.Sampler("GPU-a") as sampler:
        assert until(lambda: sampler.process.poll() is not None)
    assert sampler.figures(0.0) == dict(why=why) and not alive()


@pytest.mark.parametrize("how", ["its block ends", "the block fails"])
def test_an_nvidia_smi_that_never_ends_is_ended(smi, monkeypatch, how):
    """It is deaf to SIGTERM and so is its child, which holds the pipe, too."""
    monkeypatch.setattr(bench, "GRACE", 0.2)
    alive = smi("trap '' TERM\n(" + READINGS.replace("\n", "") + ") &\n" + READINGS)
    with contextlib.suppress(ZeroDivisionError), bench.Sampler("GPU-a") as sampler:
        assert until(lambda: sampler.samples)
        1 / (how == "its block ends")
    assert not alive() and sampler.figures(0.0)["samples"] >= 1


def test_nvidia_smi_ends_with_a_killed_bench(smi):
    alive = smi(READINGS)
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); from lab import bench\nwith bench.Sampler('GPU-a'): time.sleep(1000)"
    bench_process = subprocess.Popen([sys.executable, "-c", code, str(ROOT / "tools")])
    try:
        assert until(lambda: Path(shutil.which("nvidia-smi") + ".pid").exists())
    finally:
        bench_process.kill()
        bench_process.wait()
    assert until(lambda: not alive())


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with bench.Sampler("GPU-a") as sampler:
        assert sampler.process is None
    assert sampler.figures(0.0) == dict(why="nvidia-smi: No such file or directory")


def test_the_gpu_is_named_by_what_no_variable_renumbers(monkeypatch):
    b = a_bench()
    cuda = b._replace(m=SimpleNamespace(device=torch.device("cuda", 1)))
    for properties, name in ((dict(uuid="5a-b"), "GPU-5a-b"), (dict(uuid="GPU-7"), "GPU-7"), ({}, None)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(**properties))
        assert bench.gpu_of(cuda) == name and bench.gpu_of(b) is None


SUSTAINED = [
    r"bench sustained step, one batch: [\d.]+ ms/step \(later half of [\d.]+ s, 2 blocks of \d+ steps: [\d.]+ to [\d.]+\)",
    r"bench sustained step, all of training: [\d.]+ ms/step \(later half of .*\)",
    r"bench sustained loader \+ log \+ clock check: -?[\d.]+ ms/step \(pairs of blocks: -?[\d.]+ to -?[\d.]+\); "
    r"by the device's clock [\d.]+ pass between two steps",
]  # fmt: skip


def test_sustained_lines(tmp_path, capsys, smi, monkeypatch):
    """Figures are of the later half; all are in the report; the clock's reader ends with them."""
    alive = smi(READINGS)
    monkeypatch.setattr(bench, "gpu_of", lambda b: "GPU-a")
    report, out = measured(["--seconds", 0, "--sustain", 0.6], tmp_path, capsys)
    clocks = r"bench sustained clocks: SM 1650 MHz \(1650 to 1650\), power 698 W; of (\d+) readings: SW power cap in \1"
    found = [re.search(rf"^{line}$", out, re.M).start() for line in [*SUSTAINED, clocks]]
    assert out.index("bench loader.build") < found[0] and found == sorted(found) and not alive()
    row = report["sustained"]
    assert [x["which"] for x in row["blocks"]] == ["fixed", "training", "training", "fixed"] * 2
    later = {name: [x for x in row["blocks"][4:] if x["which"] == name] for name in ("fixed", "training")}
    for name, blocks in later.items():
        assert row[f"{name}_ms"] == sum(x["ms"] for x in blocks) / 2
    assert row["loader_log_clock_ms"] == row["training_ms"] - row["fixed_ms"] and row["gpu"]["sm_mhz"] == 1650
    assert row["between_steps_ms"] == sum(x["between_ms"] for x in later["training"]) / 2 > 0
    assert 0.3 < row["seconds"] < 10 and not [s for s in report["skipped"] if s["what"] == "sustained steps"]
    assert "train_loss" not in out  # the log lines of its steps go nowhere


def test_sustained_steps_without_a_gpu_or_a_wish(tmp_path, capsys):
    report, out = measured(["--seconds", 0, "--sustain", 0], tmp_path, capsys)
    assert "bench sustained" not in out and "skipped sustained" not in out and "sustained" not in report
    report, out = measured(["--seconds", 0], tmp_path, capsys)
    assert "skipped sustained steps: a CPU runs them only with --sustain SECONDS\n" in out


def test_sustained_steps_without_data(capsys):
    h = tiny()
    with group_of_one() as m:
        b = trained(h, m)
        assert bench.time_loader(b) is None and b.report["skipped"][0]["what"] == "loader"
        bench.sustained(b, bench.build(b), None, 0.01)
    out = capsys.readouterr().out
    assert (
        "bench sustained step, one batch: " in out and "all of training" not in out and "loader +" not in out
    )
    assert (
        "bench sustained clocks: not available (no NVIDIA GPU)\n" in out
        and "training_ms" not in b.report["sustained"]
    )


def test_sustained_steps_that_diverge_are_no_figures(tmp_path, capsys):
    report, out = measured(
        ["--seconds", 0, "--sustain", 0.01, "embed_lr=1e15", "grad_clip=0"], tmp_path, capsys
    )
    assert "sustained" not in report and "skipped sustained steps: RuntimeError: step " in out
    assert "beyond 1e+06" in out


def test_what_is_sustained_delays_the_deadline(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench, "time_whole", lambda *_: None)
    monkeypatch.setattr(bench, "time_loader", lambda *_: None)
    asked = []
    monkeypatch.setattr(
        bench, "sustained", lambda b, run, loader, s: (asked.append(s), now.__setitem__(0, now[0] + s))
    )
    b = a_bench()._replace(deadline=100.0)
    gpu = b._replace(m=dataclasses.replace(b.m, device=torch.device("cuda")))
    assert (
        bench.measure_steps(b, None, 1, 3.0).deadline == 103
        and bench.measure_steps(b, None, 1, 0.0).deadline == 100
    )
    assert bench.measure_steps(gpu, None, 1, None).deadline == 108 and asked == [3, 8]


# ---------------------------------------------------------------- kernels


def test_kernels_by_class():
    own = bench.own_kernels(ROOT / "train_gpt.py")
    assert {"qk_kernel", "mlp_kernel", "symmetric_kernel", "substitution_kernel"} <= own
    for name, which in [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>(T1)", "matrix products"),
        ("triton_red_fused__to_copy_mul_sum_12", "Inductor reductions"),
        ("triton_per_fused_add_rsqrt_3", "Inductor reductions"),
        ("triton_poi_fused_leaky_relu_pow_1", "Inductor pointwise"),
        ("qk_kernel", "our kernels"),
        ("Memset (Device)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4>()", "others (ATen)"),
    ]:
        assert bench.kernel_class(name, own) == which, name
    kernel = lambda name, us, cat="kernel": dict(ph="X", cat=cat, name=name, dur=us)
    events = [kernel("nvjet_a", 3000), kernel("nvjet_a", 3000), kernel("triton_poi_x", 900), dict(ph="M", name="p"),
              kernel("Memcpy DtoD", 90, "gpu_memcpy"), kernel("aten::mm", 1e6, "cpu_op"),
              kernel("region", 1e6, "gpu_user_annotation"), kernel("nvjet_b", 300)]  # fmt: skip
    found = bench.kernel_tables(events, own, 2)
    assert [k["name"] for k in found["kernels"]] == ["nvjet_a", "triton_poi_x", "nvjet_b", "Memcpy DtoD"]
    first = found["classes"][0]
    assert first["which"] == "matrix products" and math.isclose(first["ms"], 3.15) and first["count"] == 1.5
    assert math.isclose(sum(c["ms"] for c in found["classes"]), 3.645)


# ---------------------------------------------------------------- candidates

CANDIDATES = """
import torch
import torch.nn.functional as F
plain_xsa, plain_nats, plain_heads = t.exclude_self, t.GPT.nats, t.qk_heads
calls = []

class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, d): return 0.5 * d

def lean(x, up, down): return F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)
def wrong_gradient(y, v): return Half.apply(plain_xsa(y, v))
def wrong_forward(qkv, gain, cos, sin): return [1.01 * x for x in plain_heads(qkv, gain, cos, sin)]
def not_a_number(self, tokens, targets, last): return plain_nats(self, tokens, targets, last) * float("nan")
def broken(*args): raise RuntimeError("no kernel\\nhere")

CANDIDATES = {
    "lean": ("t.mlp", lean), "gradient": ("exclude_self", wrong_gradient), "broken": ("layer", broken),
    "rope": ("qk_heads", wrong_forward), "nan": ("GPT.nats", not_a_number), "absent": ("no_such.thing", lean),
    "two": [("mlp", lean), ("exclude_self", lambda y, v: plain_xsa(y, v))],
}
"""


def test_the_fused_paths_as_candidates(tmp_path, capsys):
    """On a CPU, where nothing is fused: each is the same model."""
    report, out = measured(["--candidates", ROOT / "records" / "candidates.py"], tmp_path, capsys)
    assert not [s for s in report["skipped"] if s["what"].startswith("candidate")], report["skipped"]
    rows = {row["name"]: row for row in report["candidates"]}
    assert list(rows) == ["plain QK", "MLP in bf16", "plain MLP", "PyTorch's attention"]
    for row in rows.values():
        assert max(row["errors"][key] for key in ("loss", "gradients", "worst")) < 1e-3


def test_candidates(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text(CANDIDATES)
    report, out = measured(["--candidates", file], tmp_path, capsys)
    rows = {row["name"]: row for row in report["candidates"]}
    assert list(rows) == ["lean", "gradient", "rope", "nan", "two"]
    for name in ("lean", "two"):
        assert (
            rows[name]["errors"] == rows[name]["plain"]
            and max(list(rows[name]["errors"].values())[:3]) < 1e-3
        )
        assert re.match(r"keep|drop \(takes", rows[name]["verdict"])
    assert [s["section"] for s in rows["lean"]["sections"]] == ["MLP", "layer"]
    assert [s["section"] for s in rows["two"]["sections"]] == ["XSA", "MLP", "layer"]
    xsa = rows["gradient"]["sections"][0]
    assert (
        xsa["section"] == "XSA"
        and xsa["errors"]["forward"] < 1e-5
        and math.isclose(xsa["errors"]["gradients"], 0.5, rel_tol=1e-3)
    )
    assert rows["gradient"]["errors"]["loss"] < 1e-3 and rows["gradient"]["verdict"].startswith(
        "drop (gradients error"
    )
    rope = rows["rope"]["sections"][0]
    assert rope["section"] == "QK norm + rope + gain" and math.isclose(
        rope["errors"]["forward"], 0.01, rel_tol=1e-2
    )
    assert rows["rope"]["verdict"].startswith("drop (")
    assert "nan" in rows["nan"]["verdict"] and rows["nan"]["sections"][0]["section"].startswith("head")
    why = {s["what"]: s["why"] for s in report["skipped"]}
    assert why["candidate broken"] == "RuntimeError: no kernel" and "no_such" in why["candidate absent"]
    assert report["whole"] == report["sections"] == [] and "profile" not in why  # nothing but candidates
    assert "skipped candidate broken: RuntimeError: no kernel" in out
    assert re.search(
        r"^candidate lean \(mlp\): forward\+backward [\d.]+ ms, plain [\d.]+; error of loss", out, re.M
    )
    assert re.search(
        r"^  MLP: forward [\d.]+ ms, plain .*\n  layer: .*\ncandidate lean: (keep|drop) \(", out, re.M
    )
    assert out.startswith(
        "\ncandidates: lean, gradient, broken, rope, nan, absent, two; first the plain lines"
    )
    assert t.mlp(torch.zeros(1, 1, 2), torch.zeros(3, 2), torch.zeros(2, 3)).shape == (1, 1, 2)


def test_candidates_and_all_the_rest(tmp_path, capsys):
    """--all measures what bench measures without candidates; they are not compared first."""
    file = tmp_path / "c.py"
    file.write_text("CANDIDATES = {'same': ('mlp', t.mlp)}\n")
    report, out = measured(
        ["--candidates", file, "--all", "--seconds", 0, "--sustain", 0.01], tmp_path, capsys
    )
    why = {s["what"]: s["why"] for s in report["skipped"]}
    assert [w["name"] for w in report["whole"]] == WHOLE and why["section MLP"] == "out of time (--seconds)"
    assert report["sustained"]["blocks"] and [row["name"] for row in report["candidates"]] == ["same"]
    places = [
        out.index(word) for word in ("bench forward:", "bench sustained", "sum of floors", "candidate same")
    ]
    assert places == sorted(places)


def test_candidates_meet_the_model_that_trains_without_its_optimizers_recording():
    """What moves needs gradients and no other; nothing is recorded or compiled for steps that are not made."""
    b = a_bench(embed_lr=0.0)
    whole = bench.build(b)
    fail = lambda fn: pytest.fail("recorded")
    plain = bench.build(b._replace(m=dataclasses.replace(b.m, record=fail)), steps=False)
    moving = lambda run: {name: p.requires_grad for name, p in run.model.named_parameters()}
    assert moving(plain) == moving(whole) and set(moving(plain).values()) == {True, False}
    assert all(p.grad.shape == p.shape for p in plain.model.parameters())
    assert (
        bench.build(b).model.tok_emb.norm() > 0 == plain.model.tok_emb.norm()
    )  # initialisation takes seconds


def test_lines_come_when_they_are_known(monkeypatch, tmp_path, capsys):
    """A candidate's model ahead of its sections, a section ahead of the next one, in the table too."""
    said, real, file = [], bench.time_section, tmp_path / "c.py"
    file.write_text("CANDIDATES = {'same': ('mlp', t.mlp)}\n")

    def time_section(b, s):
        said.append((s.name, capsys.readouterr().out))
        return real(b, s)

    monkeypatch.setattr(bench, "time_section", time_section)
    assert bench.main(["--candidates", str(file), *english_args()], {}) == 0
    before = dict(reversed(said))  # of each name the first: the plain one
    assert before["MLP"].endswith(")\n") and "\ncandidate same (mlp): forward+backward" in before["MLP"]
    assert before["layer"].startswith("  MLP: forward") and before["layer"].count("\n") == 1
    said.clear()
    assert bench.main(english_args(), {}) == 0
    for (name, _), (_, printed) in zip(said, said[1:]):
        assert re.fullmatch(rf"{re.escape(name)} +forward .*\n{re.escape(name)} +backward .*\n", printed), (
            printed
        )
    columns = {len(line) for _, out in said[1:] for line in out.replace("product", "   copy").splitlines()}
    assert len(columns) == 1 and said[0][1].endswith("bound\n")


def test_verdicts():
    errors = dict(loss=1e-6, gradients=1e-2, worst=2e-2)
    row = dict(errors=errors, plain=errors, sections=[], ms=9.0, plain_ms=10.0, wins=8, pairs=10)
    assert bench.verdict(row) == "keep (10.0 % faster, faster in 8 of 10 pairs)"
    assert bench.verdict(row | dict(ms=9.99)) == "drop (takes 99.9 % of the time, faster in 8 of 10 pairs)"
    assert bench.verdict(row | dict(wins=7)) == "drop (takes 90.0 % of the time, faster in 7 of 10 pairs)"
    assert bench.verdict(row | dict(errors=errors | dict(gradients=1.6e-2))).startswith(
        "drop (gradients error"
    )
    assert bench.verdict(row | dict(errors=errors | dict(worst=math.nan))).startswith("drop (worst error nan")
    part = dict(section="XSA", errors=dict(forward=4e-3), plain_errors=dict(forward=2e-3))
    assert bench.verdict(row | dict(sections=[part])).startswith("drop (XSA, forward error")


def test_pairs_take_turns(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def runs(name, seconds):
        def both():
            order.append(name)
            clock[0] += seconds

        return SimpleNamespace(both=both)

    pairs = bench.in_pairs(a_bench(), runs("plain", 2.0), runs("other", 1.0))
    assert len(pairs) == 10 and all(math.isclose(p, 2000) and math.isclose(c, 1000) for p, c in pairs)
    assert order[:4] == ["other", "plain", "plain", "other"]


def test_the_reference_is_the_model_in_float64():
    b = a_bench()
    model = bench.scatter(t.GPT(b.h))
    rows = torch.randint(b.h.vocab_size, (3, b.h.train_seq_len + 1))
    loss, grads = bench.reference(b, SimpleNamespace(model=model), rows)
    exact = t.GPT(b.h, dtype=torch.float64).double()
    exact.load_state_dict(model.state_dict())
    true = exact.loss(rows[:, :-1], rows[:, 1:])
    true.backward()
    assert (
        math.isclose(loss, true.item(), rel_tol=1e-6) and set(grads) == dict(exact.named_parameters()).keys()
    )
    for name, p in exact.named_parameters():
        assert bench.relative(grads[name], p.grad) < 1e-5 and p.grad.norm() > 0, name


# ---------------------------------------------------------------- the command


def test_the_command_measures_everything(tmp_path, capsys):
    """Through train_gpt.py: summary lines, both passes of every section, sums, a machine-readable copy."""
    file = tmp_path / "b.json"
    argv = list(sys.argv)
    assert t.main(["bench", "--json", str(file), *english_args()]) == 0 and sys.argv == argv
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    assert [w["name"] for w in report["whole"]] == WHOLE
    for name in WHOLE:
        line = rf"^bench {re.escape(name)}: median [\d.]+ ms, min [\d.]+, max [\d.]+ \(device \S+, attention cpu\)$"
        assert re.search(line, out, re.M), name
    rows = report["sections"]
    assert [(r["section"], r["which"]) for r in rows] == [
        (n, w) for n in SECTIONS for w in ("forward", "backward")
    ]
    assert math.isclose(report["sums"]["floors_ms"], sum(r["floor_ms"] * r["count"] for r in rows))
    assert report["rates"]["copy_gbps"] > 0 and all(p["tflops"] > 0 for p in report["rates"]["products"])
    assert [s["what"] for s in report["skipped"]] == ["sustained steps", "profile"] and report["config"][
        "num_layers"
    ] == 2
    assert re.search(r"^MLP +backward +2 ", out, re.M) and "sum of floors" in out


def test_bad_input_is_one_line(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text("CANDIDATES = {}\n")
    named = tmp_path / "d.py"
    named.write_text("CANDIDATES = {'a': ('mlp', t.mlp)}\n")
    for argv, word in [
        (["sead=1"], "sead"), (["--fast"], "--fast"), (["--json", str(tmp_path / "no" / "b.json")], "no such folder"),
        (["--candidates", str(tmp_path / "none.py")], "none.py"), (["--candidates", str(file)], "CANDIDATES"),
        (["--only", "a"], "--candidates"), (["--candidates", str(named), "--only", "b"], "which has a"),
        (["--seconds", "soon"], "--seconds"), (["--all"], "--candidates FILE.py"), (["--sustain", "-1"], "-1"),
        (["--sustain", "nan"], "number of seconds"), (["--sustain", "2", "--attention"], "leave out"),
        (["--sustain", "2", "--timeline", "x"], "leave out"), (["--sustain", "2", "--candidates", "x"], "--all"),
    ]:  # fmt: skip
        said = stop_one_line(["bench", *argv], capsys)
        assert said.startswith("bench.py: ") and word in said, said
    assert t.main(["bench", "--help"]) == 0 and "--candidates FILE.py" in capsys.readouterr().out


def test_a_script_without_the_tool_says_where_it_is(tmp_path):
    script = shutil.copy(t.__file__, tmp_path / "train_gpt.py")
    done = subprocess.run(
        [sys.executable, script, "bench"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert f"python tools/lab/bench.py --script {script} KEY=VALUE" in done.stderr


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    file = tmp_path / "b.json"
    started = time.perf_counter()
    assert (
        bench.main(
            ["--json", str(file), "preset=h100x1", "train_batch_tokens=98304", "micro_batch_tokens=98304"], {}
        )
        == 0
    )
    report = json.loads(file.read_text())
    assert [s["what"] for s in report["skipped"]] in ([], ["loader"]) and time.perf_counter() - started < 120
    row = report["sustained"]
    assert row["fixed_ms"] > 0 and (
        "why" in row["gpu"] or row["gpu"]["sm_mhz"] > 0 and row["gpu"]["samples"] > 5
    )
    assert {c["which"] for c in report["profile"]["classes"]} >= {
        "attention",
        "matrix products",
        "Inductor pointwise",
    }
