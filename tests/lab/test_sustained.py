"""Sustained steps: the loop is training's, blocks by hand, nvidia-smi's readings and end, printed lines."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from lab import bench
from lab.shared import trainer
from lab.step import parts, smi, sustained
from tests.helpers import english_args, tiny
from tests.lab.lab_helpers import a_session, run_bench, session_of
from tests.rank_cases import group_of_one

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("quick_bench")


# ---- the loop ------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Return a list that collects the names of train()'s calls in order, with the arrivals of its fetches."""
    seen = []
    fetches = []

    def watch(owner, name):
        fn = getattr(owner, name)

        def watched(*args, **options):
            seen.append(name)
            return fn(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    def fetch(self, *tensors):
        arrived = real_fetch(self, *tensors)
        number = len(fetches)
        fetches.append(number)
        seen.append(f"fetch {number}")

        def watched():
            seen.append(f"arrived {number}")
            return arrived()

        return watched

    watch(t.TokenLoader, "next")
    watch(t, "train_step")
    watch(t.Ema, "update")
    watch(t.Machine, "agree")
    watch(t.Machine, "number_of_rank_0")
    watch(t, "log_step")
    watch(t.Log, "status")
    real_fetch = t.Machine.fetch
    monkeypatch.setattr(t.Machine, "fetch", fetch)
    return seen


def test_the_sustained_loop_is_trainings(tmp_path, calls):
    """The same calls in the same order: batch, step, average, fetch, arrival, clock, log, status."""
    h = t.load_config(english_args(iterations=6, train_log_every=2), {})
    with group_of_one() as m:
        log = t.Log(str(tmp_path / "log.txt"), m)
        t.train(t.start_run(h, m, log, t.load_dataset(h), time.perf_counter()))
        log.file.close()
        *_, first, _, _, _, _, _, calibration = [i for i, name in enumerate(calls) if name == "next"]
        ended = [i for i, name in enumerate(calls[:calibration]) if name == "number_of_rank_0"][-1]
        assert calls[first - 2 : first] == ["number_of_rank_0", "fetch 0"]  # all ranks are ready
        theirs = ["fetch 0", *calls[first:ended]]
        assert theirs.count("log_step") == 4  # the first, the second, fourth and sixth
        calls.clear()

        s = session_of(h, m)
        run = trainer.build_trained(s)
        loader = t.TokenLoader(h, m)
        with trainer.quiet_run(s) as logged:
            loop = sustained.TrainingLoop(s, run, loader, logged)
            step = loop.kinds["training"]
            assert calls.pop(0) == "next"  # of the fixed batch
            for _ in range(6):
                step()
            loader.pending.result()

    shift = int(calls[0].split()[1])  # fetches are numbered on
    ours = [re.sub(r"\d+", lambda number: str(int(number[0]) - shift), name) for name in calls]
    assert ours == theirs


def test_fixed_steps_have_nothing_beside_the_step(calls):
    h = t.load_config(english_args(), {})
    with group_of_one() as m, trainer.quiet_run(session_of(h, m)) as logged:
        s = session_of(h, m)
        run = trainer.build_trained(s)
        before = [p.clone() for p in run.model.parameters()]
        kinds = sustained.TrainingLoop(s, run, None, logged).kinds
        calls.clear()
        begin, end = kinds["fixed"]()
        assert calls == ["train_step", "update"]
        assert [*kinds] == ["fixed"]
        assert begin < end
        assert any(not torch.equal(p, q) for p, q in zip(before, run.model.parameters()))


def test_blocks_by_hand(monkeypatch):
    """a b b a a b b a of as many steps as fit; a block's first is not timed; between_ms is the gap."""
    now = [0.0]
    order = []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def runs(name, idle, busy):
        def step():
            order.append(name)
            now[0] += idle
            begin = now[0]
            now[0] += busy
            return sustained.Ticks(begin, now[0])

        return step

    with group_of_one() as m:
        s = a_session()._replace(m=m)
        kinds = dict(fixed=runs("a", 0.0, 0.25), training=runs("b", 0.125, 0.25))
        blocks, half = sustained.run_blocks(s, kinds, 8.0)
        assert order == list("aba" + "a" + "aaaa" + 8 * "b" + 8 * "a" + 8 * "b" + "aaaa")
        assert half == 4 * 0.25 + 0.125 + 4 * (2 * 0.25 + 2 * 0.375)
        assert [x["which"] for x in blocks[4:6]] == ["fixed", "training"]
        assert {(x["which"], x["steps"], x["ms"], x["between_ms"]) for x in blocks} == {
            ("fixed", 3, 250, 0), ("training", 3, 375, 125)}  # fmt: skip

        blocks, _ = sustained.run_blocks(s, dict(fixed=runs("a", 0.0, 9.0)), 1.0)
        assert [(x["which"], x["steps"], x["ms"]) for x in blocks] == [("fixed", 1, 9000)] * 8


# ---- nvidia-smi ----------------------------------------------------------------------------------

SMI = """#!/bin/sh
echo "$@" > "$0.args"
echo $$ > "$0.pid"
: > "$0.beat"
"""
READINGS = 'while :; do echo "1650, 697.50, 0x0000000000000004"; echo >> "$0.beat"; sleep 0.02; done\n'


@pytest.fixture
def planted_smi(tmp_path, monkeypatch):
    """Put a shell script in place of nvidia-smi; returns whether it, or a child of it, still runs."""
    file = tmp_path / "bin" / "nvidia-smi"
    file.parent.mkdir()

    def plant(body):
        file.write_text(SMI + body)
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")

        def alive():  # by its heartbeat: the system also counts a process that nobody has waited for yet
            beat = Path(f"{file}.beat")
            before = beat.stat().st_size
            time.sleep(0.3)
            return beat.stat().st_size > before

        return alive

    yield plant
    with contextlib.suppress(OSError):  # of a test that failed
        os.killpg(int(Path(f"{file}.pid").read_text()), 9)


def until(true):
    """Wait up to ten seconds until true() holds, and return whether it does."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_clocks_are_read_by_the_half(planted_smi, tmp_path):
    alive = planted_smi(READINGS)
    with smi.Sampler("GPU-a") as sampler:
        assert until(lambda: len(sampler.samples) > 2)
        assert alive()
        half = time.perf_counter()
        count = len(sampler.samples)
        assert until(lambda: len(sampler.samples) > count + 2)
    assert not alive()
    assert not sampler.reader.is_alive()

    figures = sampler.summary(half)
    assert 2 <= figures["samples"] <= len(sampler.samples) - 2
    assert figures == dict(
        samples=figures["samples"],
        sm_mhz=1650,
        sm_mhz_range=[1650, 1650],
        power_w=697.5,
        reasons={"SW power cap": figures["samples"]},
    )
    assert sampler.summary(time.perf_counter()) == dict(why="nvidia-smi gave no reading in time")
    asked = Path(tmp_path / "bin" / "nvidia-smi.args").read_text().split()
    assert sorted(asked) == [
        "--format=csv,noheader,nounits", "--id=GPU-a",
        "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active", "-lms", "200",
    ]  # fmt: skip


def test_figures_of_clocks_by_hand():
    sampler = smi.Sampler("GPU-a")
    lines = [
        "1515, 690.10, 0x0000000000000004",
        "1830, 704.00, 0x0000000000000000",
        "1700, [N/A], 0x0000000000000024",
    ]
    sampler.samples = [smi.parse_reading(line)._replace(at=i) for i, line in enumerate(lines)]
    assert sampler.summary(0) == dict(
        samples=3,
        sm_mhz=1700,
        sm_mhz_range=[1515, 1830],
        power_w=704.0,
        reasons={"SW power cap": 2, "SW thermal slowdown": 1},
    )
    assert sampler.summary(2)["power_w"] is None
    assert sampler.summary(1)["sm_mhz_range"] == [1700, 1830]
    for line in ("", "No devices were found", "1, 2", "[N/A], 1, 0x0"):
        with pytest.raises(ValueError):
            smi.parse_reading(line)


@pytest.mark.parametrize(
    "body,why",
    [
        ('echo "No devices were found"; exit 6\n', "nvidia-smi: No devices were found"),
        ("exit 9\n", "nvidia-smi: status 9"),
        ('echo "Field is not valid" >&2; exit 2\n', "nvidia-smi: Field is not valid"),
    ],
    ids=["says why", "silent", "on stderr"],
)
def test_a_failing_nvidia_smi(planted_smi, body, why):
    alive = planted_smi(body)
    with smi.Sampler("GPU-a") as sampler:
        assert until(lambda: sampler.process.poll() is not None)
    assert sampler.summary(0.0) == dict(why=why)
    assert not alive()


@pytest.mark.parametrize("how", ["its block ends", "the block fails"])
def test_an_nvidia_smi_that_never_ends_is_ended(planted_smi, monkeypatch, how):
    """It is deaf to SIGTERM and so is its child, which holds the pipe, too."""
    monkeypatch.setattr(smi, "GRACE", 0.2)
    alive = planted_smi("trap '' TERM\n(" + READINGS.replace("\n", "") + ") &\n" + READINGS)
    with contextlib.suppress(ZeroDivisionError), smi.Sampler("GPU-a") as sampler:
        assert until(lambda: sampler.samples)
        1 / (how == "its block ends")
    assert not alive()
    assert sampler.summary(0.0)["samples"] >= 1


def test_nvidia_smi_ends_with_a_killed_bench(planted_smi):
    alive = planted_smi(READINGS)
    code = "import time; from lab.step import smi\nwith smi.Sampler('GPU-a'): time.sleep(1000)"
    env = os.environ | dict(PYTHONPATH=str(ROOT / "tools"))
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        assert until(lambda: Path(shutil.which("nvidia-smi") + ".pid").exists())
    finally:
        process.kill()
        process.wait()
    assert until(lambda: not alive())


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with smi.Sampler("GPU-a") as sampler:
        assert sampler.process is None
    assert sampler.summary(0.0) == dict(why="nvidia-smi: No such file or directory")


def test_the_gpu_is_named_by_what_no_variable_renumbers(monkeypatch):
    s = a_session()
    cuda = s._replace(m=SimpleNamespace(device=torch.device("cuda", 1)))
    for properties, name in ((dict(uuid="5a-b"), "GPU-5a-b"), (dict(uuid="GPU-7"), "GPU-7"), ({}, None)):
        found = SimpleNamespace(**properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, found=found: found)
        assert smi.gpu_of(cuda) == name
        assert smi.gpu_of(s) is None


# ---- the lines -----------------------------------------------------------------------------------

LINES = [
    r"bench sustained step, one batch: [\d.]+ ms/step "
    r"\(later half of [\d.]+ s, 2 blocks of \d+ steps: [\d.]+ to [\d.]+\)",
    r"bench sustained step, all of training: [\d.]+ ms/step \(later half of .*\)",
    r"bench sustained loader \+ log \+ clock check: -?[\d.]+ ms/step "
    r"\(pairs of blocks: -?[\d.]+ to -?[\d.]+\); by the device's clock [\d.]+ ms pass between two steps",
]
CLOCKS = (
    r"bench sustained clocks: SM 1650 MHz \(1650 to 1650\), power 698 W; "
    r"of (\d+) readings: SW power cap in \1"
)


def test_sustained_lines(tmp_path, capsys, planted_smi, monkeypatch):
    """Figures are of the later half; all are in the report; the clock's reader ends with them."""
    alive = planted_smi(READINGS)
    monkeypatch.setattr(sustained, "gpu_of", lambda s: "GPU-a")
    report, out = run_bench(["--seconds", 0, "--sustain", 0.6], tmp_path, capsys)
    found = [re.search(rf"^{line}$", out, re.M).start() for line in [*LINES, CLOCKS]]
    assert out.index("bench loader.build") < found[0]
    assert found == sorted(found)
    assert not alive()

    row = report["sustained"]
    assert [x["which"] for x in row["blocks"]] == ["fixed", "training", "training", "fixed"] * 2
    later = {name: [x for x in row["blocks"][4:] if x["which"] == name] for name in ("fixed", "training")}
    for name, blocks in later.items():
        assert row[f"{name}_ms"] == sum(x["ms"] for x in blocks) / 2
    assert row["loader_log_clock_ms"] == row["training_ms"] - row["fixed_ms"]
    assert row["gpu"]["sm_mhz"] == 1650
    assert row["between_steps_ms"] == sum(x["between_ms"] for x in later["training"]) / 2 > 0
    assert 0.3 < row["seconds"] < 10
    assert not [x for x in report["skipped"] if x["what"] == "sustained steps"]
    assert "train_loss" not in out  # the log lines of its steps go nowhere


def test_sustained_steps_without_a_gpu_or_a_wish(tmp_path, capsys):
    report, out = run_bench(["--seconds", 0, "--sustain", 0], tmp_path, capsys)
    assert "bench sustained" not in out
    assert "skipped sustained" not in out
    assert "sustained" not in report
    report, out = run_bench(["--seconds", 0], tmp_path, capsys)
    assert "skipped sustained steps: a CPU runs them only with --sustain SECONDS\n" in out


def test_sustained_steps_without_data(capsys):
    h = tiny()
    with group_of_one() as m:
        s = session_of(h, m)
        assert parts.time_loader(s) is None
        assert s.report["skipped"][0]["what"] == "loader"
        sustained.measure_sustained(s, trainer.build_trained(s), None, 0.01)
    out = capsys.readouterr().out
    assert "bench sustained step, one batch: " in out
    assert "all of training" not in out
    assert "loader +" not in out
    assert "bench sustained clocks: not available (no NVIDIA GPU)\n" in out
    assert "training_ms" not in s.report["sustained"]


def test_sustained_steps_that_diverge_are_no_figures(tmp_path, capsys):
    args = [
        "--seconds",
        0,
        "--sustain",
        0.01,
        "scalar_lr=1e15",
        "scalar_wd=0",
        "embed_lr=1e15",
        "embed_wd=0",
        "grad_clip=0",
    ]
    report, out = run_bench(args, tmp_path, capsys)
    assert "sustained" not in report
    assert "skipped sustained steps: RuntimeError: step " in out
    assert "beyond 1e+06" in out


def test_what_is_sustained_delays_the_deadline(monkeypatch):
    now = [0.0]
    asked = []

    def measure_sustained(s, run, loader, seconds):
        asked.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench, "time_step", lambda *_: None)
    monkeypatch.setattr(bench, "time_loader", lambda *_: None)
    monkeypatch.setattr(bench, "measure_sustained", measure_sustained)
    s = a_session()._replace(deadline=100.0)
    gpu = s._replace(m=dataclasses.replace(s.m, device=torch.device("cuda")))
    assert bench.measure_steps(s, None, 3.0).deadline == 103
    assert bench.measure_steps(s, None, 0.0).deadline == 100
    assert bench.measure_steps(gpu, None, None).deadline == 108
    assert asked == [3, 8]
