"""record track: what a log tells reaches a tracker once, during a run or after it."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ledger import record
from ledger.show import track

RULE = "=" * 100
HEAD = [
    "import torch",
    RULE,
    "Running Python 3.11",
    RULE,
    "config:",
    "  seed: 7",
    "  fp8: True",
    "preset: cpu",
]
STEPS = [
    "step:1/9 train_loss:6.5000 train_time:100ms step_avg:100.00ms",
    "step:2/9 train_loss:6.0000 train_time:250ms step_avg:125.00ms",
    "step:2/9 val_loss:5.9000 val_bpb:3.1000 train_time:250ms step_avg:125.00ms",
]
END = "final_score metric:x val_loss:5.80000000 val_bpb:3.05000000 bytes_total:123 steps:2 train_time:250ms"
WANTED = [
    (1, 0.1, {"train_loss": 6.5, "step_avg_ms": 100.0}),
    (2, 0.25, {"train_loss": 6.0, "step_avg_ms": 125.0}),
    (2, 0.25, {"val_loss": 5.9, "val_bpb": 3.1, "step_avg_ms": 125.0}),
    (2, 0.25, {"final_val_loss": 5.8, "final_val_bpb": 3.05, "final_bytes_total": 123.0}),
]


def write_log(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join([*HEAD, *lines]) + "\n")
    return str(path)


@pytest.fixture
def fake(monkeypatch):
    """Trackers whose packages note what they are given: fake.runs is a list of runs."""
    runs = []

    def init(**options):
        run = SimpleNamespace(options=options, lines=[], finished=0)

        def log(values, step):
            run.lines.append((step, values.pop("seconds"), values))

        def finish():
            run.finished += 1

        run.log = log
        run.finish = finish
        runs.append(run)
        return run

    for name in ("trackio", "wandb"):
        package = ModuleType(name)
        package.init = init
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setenv("TRACKIO_DIR", "before")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return SimpleNamespace(runs=runs)


@pytest.mark.parametrize("to", ["trackio", "wandb"])
def test_a_finished_log_is_sent_whole(tmp_path, fake, capsys, to):
    logs = [write_log(tmp_path / f"{name}.txt", [*STEPS, END]) for name in "ab"]
    folder = tmp_path / "tracked"
    assert record.main(["track", *logs, "--to", to, "--dir", str(folder)]) == 0
    assert [run.options["name"] for run in fake.runs] == ["a", "b"]
    for run in fake.runs:
        assert run.lines == WANTED and run.finished == 1
        assert run.options["config"] == {"seed": 7, "fp8": True}
    assert f"{logs[0]}: 4 lines sent, the end" in capsys.readouterr().out
    if to == "wandb":
        assert fake.runs[0].options["mode"] == "offline" and fake.runs[0].options["dir"] == str(folder)
    else:
        assert os.environ["TRACKIO_DIR"] == str(folder)


def test_a_log_that_grows_is_sent_as_it_grows(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(track, "POLL_SECONDS", 0.01)
    log = tmp_path / "a.txt"
    argv = ["track", write_log(log, STEPS[:1]), "--to", "wandb", "--dir", str(tmp_path), "--follow"]
    follower = threading.Thread(target=track.track, args=([log], "wandb", tmp_path, True), daemon=True)
    assert record.parser().parse_args(argv).follow
    follower.start()

    def wait_for(count):
        deadline = time.monotonic() + 20
        while not fake.runs or len(fake.runs[0].lines) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    wait_for(1)
    with log.open("a") as file:
        file.write(f"{STEPS[1]}\n{STEPS[2][:30]}")  # a line that is being written
    wait_for(2)
    with log.open("a") as file:
        file.write(f"{STEPS[2][30:]}\n{END}\n")
    follower.join(20)
    assert not follower.is_alive()
    assert fake.runs[0].lines == WANTED and fake.runs[0].finished == 1


def test_a_log_without_a_score_is_sent_as_far_as_it_goes(tmp_path, fake):
    log = write_log(tmp_path / "a.txt", STEPS)
    assert record.main(["track", log, "--to", "wandb", "--dir", str(tmp_path)]) == 0
    assert fake.runs[0].lines == WANTED[:3] and fake.runs[0].finished == 1


def refusal(capsys, *argv) -> str:
    capsys.readouterr()
    assert record.main(["track", *map(str, argv)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, fake, capsys, monkeypatch):
    log = write_log(tmp_path / "a.txt", STEPS)
    other = write_log(tmp_path / "b.txt", STEPS)
    folder = tmp_path / "tracked"
    where = ["--to", "trackio", "--dir", folder]
    assert "two logs are called a: " in refusal(capsys, log, log, *where)
    assert "trackio keeps one run open at a time" in refusal(capsys, log, other, *where, "--follow")
    (tmp_path / "no.txt").write_text("no log")
    assert f"{tmp_path}/no.txt: not a training log" in refusal(
        capsys, tmp_path / "no.txt", *where, "--follow"
    )
    for tracker in track.TRACKERS:
        monkeypatch.setitem(sys.modules, track.TRACKERS[tracker].module, None)
        told = refusal(capsys, log, "--to", tracker, "--dir", folder)
        assert f"--to {tracker} needs the package " in told
        assert f".venv/bin/pip install {track.TRACKERS[tracker].install}" in told
    assert fake.runs == [] and not folder.exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_sent(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    log = write_log(tmp_path / "a.txt", [*STEPS, END])
    argv = ["track", log, "--to", "tensorboard", "--dir", str(tmp_path / "tracked")]
    assert record.main(argv) == 0
    events = EventAccumulator(str(tmp_path / "tracked" / "a"))
    events.Reload()
    losses = events.Tensors("train_loss")
    assert [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in losses] == [
        (1, 6.5),
        (2, 6.0),
    ]
    assert abs(losses[1].wall_time - losses[0].wall_time - 0.15) < 1e-3
    assert events.Tensors("final_val_bpb")[0].step == 2
    assert "exists; remove it, or give another --dir" in refusal(capsys, *argv[1:])
