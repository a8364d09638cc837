"""Signals that end a run: the step is finished, the state saved, and what is left scored."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest

import train_gpt as t
from ledger import tracks
from ledger.prove import claims, log_claims, record_claims
from ledger.read import runlog
from tests.stress import kill_runs
from tests.trainer.fault_cases import (
    STEPS,
    after_step,
    args,
    checkpoint,
    ends_like,
    has_line,
    lines,
    sets,
    stop_after,
    trained_steps,
)

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_a_signal_ends_the_step_saves_and_scores(undisturbed, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    stop_after(tmp_path, monkeypatch, 5)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert sets(tmp_path)[-1] == 5
    assert has_line(tmp_path, r"stopping_early: signal train_time:\d+ms step:5/12$")
    last_line = lines(tmp_path)[-1]
    assert last_line.startswith("final_score ") and " steps:5 " in last_line
    assert has_line(tmp_path, r"ended_early: train_loss live:\d\.\d{4} ema:\d\.\d{4} the artifact takes ")
    run = runlog.parse_log(tmp_path / "run.txt")
    assert not run.resumed and log_claims.steps_fault(run) is None

    assert t.main(args(tmp_path, resume="auto")) == 0
    assert ends_like(undisturbed, tmp_path)
    run = runlog.parse_log(tmp_path / "run.txt")
    assert len(run.resumed) == 1 and log_claims.steps_fault(run) is None
    assert run.final_scores == 1 and not run.trailing
    assert trained_steps(run) == list(range(1, STEPS + 1))

    case = SimpleNamespace(track=tracks.TRACKS["track_h100x1_5min"], stored={"record": True}, runs=[run])
    with pytest.raises(claims.Wrong, match="resumed 1 times: the clock does not count what was lost"):
        record_claims.claim_clock(case)
    case.stored = {"record": False}
    assert "resumed 1 times" in record_claims.claim_clock(case)


def test_steps_that_were_lost_are_void(tmp_path, monkeypatch):
    """A log as kill -9 leaves it has steps after the last checkpoint, and its last line is cut."""
    stop_after(tmp_path, monkeypatch, 6)
    before, last = sets(tmp_path)
    checkpoint(tmp_path, last).unlink()
    log = tmp_path / "run.txt"
    log.write_text(log.read_text().split("stopping_early: signal")[0] + "step:7/12 train_lo")

    assert t.main(args(tmp_path, resume="auto")) == 0
    run = runlog.parse_log(log)
    resumed = [line for line in lines(tmp_path) if line.startswith(f"resumed step:{before} ")]
    assert run.resumed == resumed != []
    assert log_claims.steps_fault(run) is None
    assert trained_steps(run) == list(range(1, STEPS + 1))


def stop_twice(rank):
    """Send a signal and its echo during a step that does not end; then, later, another signal."""
    train_step = t.train_step
    t.ECHO_S = 1

    def slow(backward, optimizer, batch, hp):
        if optimizer.steps == 4:
            for pause in (0, 1.2, 60):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(pause)
        return train_step(backward, optimizer, batch, hp)

    t.train_step = slow


def test_a_second_signal_leaves_at_once(tmp_path):
    began = time.monotonic()
    assert kill_runs.ended(kill_runs.start(tmp_path, fault=stop_twice)) == [128 + signal.SIGINT]
    assert time.monotonic() - began < 40


def stop_in_warmup(rank):
    """Send a signal during the warm-up, which then takes a minute."""

    def slow(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    t.warmup = slow


def test_a_signal_before_training_leaves_at_once(tmp_path):
    """There is nothing to save, and waiting could take forever.

    A signal to the process group has ended torch.compile's workers, too, so that a compilation may never end.
    """
    began = time.monotonic()
    assert kill_runs.ended(kill_runs.start(tmp_path, fault=stop_in_warmup)) == [128 + signal.SIGTERM]
    assert time.monotonic() - began < 40 and not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("seconds", [0.4, 1.5])
def test_ctrl_c_in_the_first_seconds_shows_no_traceback(tmp_path, seconds):
    process = subprocess.Popen(
        [sys.executable, t.__file__, *args(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=40)
    if process.returncode == 0:  # training had begun, so that the scores follow
        assert has_line(tmp_path, "stopping_early: signal")
    else:
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in output


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_a_run_well_unless_nohup_has_it_ignored(tmp_path, ignored):
    knobs = args(tmp_path, iterations=30 if ignored else 100_000, checkpoint_every=0)
    command = [*(["nohup"] if ignored else []), sys.executable, t.__file__, "train", *knobs]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    # These tests may themselves run under nohup.
    handled = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env, preexec_fn=handled)
    assert kill_runs.wait_until(lambda: (tmp_path / "run.txt").exists() and has_line(tmp_path, "step:4/"))
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert has_line(tmp_path, "stopping_early: signal") is not ignored
    assert lines(tmp_path)[-1].startswith("final_score ")


def test_a_first_signal_says_what_follows(tmp_path):
    folder = tmp_path / "stopped"
    process = kill_runs.start(folder, checkpoint_every=0, iterations=100_000)
    assert kill_runs.wait_until(lambda: kill_runs.began(folder, 0))
    os.kill(process[0].pid, signal.SIGINT)
    os.kill(process[0].pid, signal.SIGINT)
    assert kill_runs.ended(process) == [0]
    console = (folder / "console.0").read_text()
    assert console.count("stopping: artifact and scores follow; another signal") == 1


def test_a_signal_of_a_program_promises_nothing(tmp_path):
    """torchrun sends SIGTERM when another rank is gone: then there will be no artifact and no score."""
    process = kill_runs.start(tmp_path, checkpoint_every=0, iterations=100_000)
    assert kill_runs.wait_until(lambda: kill_runs.began(tmp_path, 0))
    os.kill(process[0].pid, signal.SIGTERM)
    assert kill_runs.ended(process) == [0]
    console = (tmp_path / "console.0").read_text()
    assert "artifact and scores follow" not in console
    assert re.search(r"^training ends after [\d,]+ steps and \S+ s: a signal$", console, re.M)


def test_the_echo_of_a_signal_ends_training_properly(tmp_path, monkeypatch):
    """torchrun repeats to its ranks the signal that the terminal has already sent to all of them."""

    def interrupt_twice(optimizer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_step(monkeypatch, 4, interrupt_twice)
    assert t.main(args(tmp_path)) == 0
    text = "\n".join(lines(tmp_path))
    assert "stopping_early: signal" in text
    assert "checkpoint step:4" in text
    assert "final_score" in text
