"""Ranks that die, hang or disagree while they train or score: one line names the rank and the reason."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import audit
import train_gpt as t
from tests.helpers import english_dataset, write_shard
from tests.stress import kill_runs
from tests.trainer.fault_cases import has_line, lines

pytestmark = pytest.mark.usefixtures("clean_environment")

# ---------------------------------------------------------------- faults of a rank


def crash_on_rank_1(rank):
    """Raise an error on rank 1 before its fifth step."""
    train_step = t.train_step

    def broken(backward, optimizer, batch, hp):
        if rank == 1 and optimizer.steps == 4:
            raise ZeroDivisionError("cosmic ray")
        return train_step(backward, optimizer, batch, hp)

    t.train_step = broken


def test_a_rank_that_dies_takes_the_other_down_its_traceback_first(tmp_path):
    began = time.monotonic()
    statuses = kill_runs.ended(kill_runs.start(tmp_path, 2, crash_on_rank_1))
    assert statuses == [1, 1] and time.monotonic() - began < 60

    text = lines(tmp_path)
    traceback_at = {}
    for rank in (0, 1):
        heads = [i for i, line in enumerate(text) if line.startswith(f"rank {rank}: Traceback")]
        traceback_at[rank] = heads[0]
    assert traceback_at[1] < traceback_at[0]
    assert "ZeroDivisionError: cosmic ray" in text[traceback_at[1] : traceback_at[0]]


def crash_under_torchrun(folder, rank):
    """Crash as above, with the variable by which torchrun names a file for the reason of each rank."""
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/error.{rank}.json"
    crash_on_rank_1(rank)


def test_torchrun_learns_the_reason_of_the_rank_at_fault(tmp_path):
    """It names the first reason as the cause; a rank that only lost another gives none, and ends later."""
    processes = kill_runs.start(tmp_path, 2, functools.partial(crash_under_torchrun, str(tmp_path)))
    assert kill_runs.wait_until(lambda: processes[1].exitcode is not None)
    time.sleep(0.3)  # torchrun looks ten times a second
    assert processes[0].exitcode is None
    assert kill_runs.ended(processes) == [1, 1]
    assert not (tmp_path / "error.0.json").exists()
    error = json.loads((tmp_path / "error.1.json").read_text())["message"]
    assert error["message"].endswith("\nZeroDivisionError: cosmic ray")
    assert error["extraInfo"]["py_callstack"] == error["message"]


def test_torchrun_ends_with_the_reason(tmp_path):
    """Its own lines come last; the block in which they end names the rank and says why."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [t.__file__, "train", "preset=cpu", "data_path=/nowhere/at/all", f"out_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    cause = done.stderr.partition("Root Cause")[2]
    assert done.returncode == 1 and "  traceback : data_path=/nowhere/at/all: no such data folder" in cause, (
        done.stderr
    )


def kill_rank_1(rank):
    """Kill rank 1 before its fifth step."""
    train_step = t.train_step

    def killed(backward, optimizer, batch, hp):
        if rank == 1 and optimizer.steps == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(backward, optimizer, batch, hp)

    t.train_step = killed


def test_a_rank_that_outlives_another_says_so_in_one_line(tmp_path):
    """The console has no traceback; the log has it, and then the same line."""
    assert kill_runs.ended(kill_runs.start(tmp_path, 2, kill_rank_1)) == [1, -signal.SIGKILL]
    console = (tmp_path / "console.0").read_text().splitlines()
    assert console[-1].startswith("train_gpt.py: rank 0: another rank is gone; ")
    assert str(tmp_path / "run.txt") in console[-1]
    assert not any("Traceback" in line for line in console)
    assert lines(tmp_path)[-1] == console[-1].removeprefix("train_gpt.py: ")


def lose_rank_1(rank):
    """Kill rank 1 while it reads the data set."""
    if rank == 1:
        t.load_dataset = leave_at_once


def leave_at_once(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_before_there_is_a_log_leaves_one_line(tmp_path):
    assert kill_runs.ended(kill_runs.start(tmp_path, 2, lose_rank_1)) == [1, -signal.SIGKILL]
    console = (tmp_path / "console.0").read_text().splitlines()
    assert console[-1] == "train_gpt.py: another rank is gone before the run began"
    assert not any("Traceback" in line for line in console)


def test_every_rank_is_gone_soon_after_the_last_line(tmp_path):
    processes = kill_runs.start(tmp_path, 2, iterations=3, checkpoint_every=0)
    log = tmp_path / "run.txt"
    assert kill_runs.wait_until(lambda: log.exists() and "\nfinal_score " in log.read_text())
    began = time.monotonic()
    assert kill_runs.ended(processes) == [0, 0] and time.monotonic() - began < 5


def change_on_rank_1(rank):
    """Change a weight on rank 1 after its fourth step."""
    train_step = t.train_step

    def patched(backward, optimizer, batch, hp):
        loss = train_step(backward, optimizer, batch, hp)
        if rank == 1 and optimizer.steps == 4:
            optimizer.flat[7] += 1e-3
        return loss

    t.train_step = patched


def test_ranks_that_disagree_are_found_at_the_validation(tmp_path):
    processes = kill_runs.start(tmp_path, 2, change_on_rank_1, val_loss_every=5, checkpoint_every=0)
    assert kill_runs.ended(processes) == [1, 1]
    assert has_line(tmp_path, r"rank 0: step 5: tok_emb of rank 1 differs from the others")


def given_otherwise(word, rank):
    """Give rank 1 another knob."""
    load_config = t.load_config
    if rank == 1:
        t.load_config = lambda argv, env: load_config([*argv, word], env)


@pytest.mark.parametrize("word", ["train_batch_tokens=1024", "iterations=3", "model_dim=64", "resume="])
def test_ranks_that_were_given_other_knobs_are_refused_before_there_is_a_log(tmp_path, word):
    """Two batches would train without a word, two models end in gloo's abort, half a resume never."""
    processes = kill_runs.start(tmp_path, 2, functools.partial(given_otherwise, word))
    assert kill_runs.ended(processes) == [2, 2]
    for rank in (0, 1):
        [said] = console(tmp_path, rank)
        assert f"rank 1 has a different {word.partition('=')[0]} from rank 0" in said
    assert not (tmp_path / "run.txt").exists()


def other_artifact(rank):
    """Let rank 1 read other bytes, which are as sound as rank 0's."""
    check = t.check_ranks_agree
    if rank == 1:
        t.check_ranks_agree = lambda h, m, dataset, blob: check(h, m, dataset, blob + b"\0")


def test_ranks_that_score_two_artifacts_are_refused_before_there_is_a_log(undisturbed, tmp_path):
    processes = start_scoring(undisturbed, tmp_path, "eval", other_artifact)
    assert kill_runs.ended(processes) == [2, 2]
    assert any("rank 1 has a different artifact from rank 0" in line for line in console(tmp_path, 0))
    assert not (tmp_path / "out").exists()


def delay_by_rank(rank):
    """Make the warm-up of every rank but the first longer."""
    warmup = t.warmup

    def slow(*args):
        backward = warmup(*args)
        time.sleep(4 * rank)
        return backward

    t.warmup = slow


def test_the_clock_starts_when_the_last_rank_is_ready(tmp_path):
    processes = kill_runs.start(
        tmp_path, 2, delay_by_rank, iterations=3, train_log_every=1, checkpoint_every=0, resume=""
    )
    assert kill_runs.ended(processes) == [0, 0]
    log = (tmp_path / "run.txt").read_text()
    times = re.findall(r"^step:\d/3 train_loss:\S+ train_time:(\d+)ms", log, re.M)
    assert len(times) == 3 and float(times[-1]) < 2000, times


# ---------------------------------------------------------------- ranks that score


def start_scoring(undisturbed, folder, command, fault, world=2):
    """Start `eval` or `audit` of the undisturbed run's artifact on ranks; the log is FOLDER/out/run.txt."""
    argv = [str(undisturbed.folder / "run.int6.xz"), f"data_path={english_dataset().path}", "run_id=run"]
    argv += [f"out_dir={folder}/out", "eval_batch_tokens=512", "train_seq_len=32", "mix_tokens=0"]
    if command == "audit":
        return kill_runs.start_ranks(folder, argv, world, fault, audit.main)
    return kill_runs.start_ranks(folder, ["eval", *argv], world, fault)


def change_on(rank_at_fault, change, rank):
    """On one rank, apply change(script) to the trainer and to the script that the auditor loads."""
    if rank != rank_at_fault:
        return
    change(t)
    load_audited = audit.load_audited

    def load_changed(path):
        script = load_audited(path)
        change(script)
        return script

    audit.load_audited = load_changed


def on_rank_1(change):
    """Return the fault that applies a change on rank 1."""
    return functools.partial(change_on, 1, change)


def console(folder, rank):
    """Return the lines that a rank printed, the log's aside."""
    lines = (folder / f"console.{rank}").read_text().splitlines()
    return [line for line in lines if line.startswith(("train_gpt.py: ", "audit.py: ", "Traceback"))]


def killed_at_score(script):
    script.score_targets = leave_at_once


def killed_at_data(script):
    script.load_dataset = leave_at_once


def refuses_score(script):
    def refuse(*_):
        raise script.InputError("val.bin: cannot read the shard (Input/output error); prepare the data again")

    script.score_targets = refuse


def refuses_data(script):
    def refuse(*_):
        raise script.InputError("manifest.json: not a manifest; make it again")

    script.load_dataset = refuse


def fails_at_score(script):
    def fail(*_):
        raise ZeroDivisionError("cosmic ray")

    script.score_targets = fail


SCORERS = pytest.mark.parametrize("command", ["eval", "audit"])

NAMES = {"eval": "train_gpt.py", "audit": "audit.py"}


@SCORERS
def test_a_rank_that_is_killed_while_scoring_leaves_one_line(undisturbed, tmp_path, command):
    processes = start_scoring(undisturbed, tmp_path, command, on_rank_1(killed_at_score))
    assert kill_runs.ended(processes) == [1, -signal.SIGKILL]
    gone = f"rank 0: another rank is gone; its reason, if it gave one, is in {tmp_path}/out/run.txt"
    assert console(tmp_path, 0) == [f"train_gpt.py: {gone}"] and lines(tmp_path / "out")[-1] == gone


@SCORERS
def test_a_rank_that_cannot_go_on_scoring_says_why_in_the_log(undisturbed, tmp_path, command):
    processes = start_scoring(undisturbed, tmp_path, command, on_rank_1(refuses_score))
    assert kill_runs.ended(processes) == [1, 2]
    reason = "rank 1: val.bin: cannot read the shard (Input/output error); prepare the data again"
    assert console(tmp_path, 1) == [f"train_gpt.py: {reason}"] and reason in lines(tmp_path / "out")
    [gone] = console(tmp_path, 0)
    assert gone.startswith("train_gpt.py: rank 0: another rank is gone; ")


@SCORERS
def test_a_rank_that_breaks_while_scoring_has_its_traceback_in_the_log(undisturbed, tmp_path, command):
    processes = start_scoring(undisturbed, tmp_path, command, on_rank_1(fails_at_score))
    assert kill_runs.ended(processes) == [1, 1]
    text = lines(tmp_path / "out")
    assert "rank 1: Traceback (most recent call last):" in text and "ZeroDivisionError: cosmic ray" in text
    assert len(console(tmp_path, 0)) == 1


@SCORERS
def test_a_rank_that_is_killed_before_there_is_a_score_leaves_one_line(undisturbed, tmp_path, command):
    processes = start_scoring(undisturbed, tmp_path, command, on_rank_1(killed_at_data))
    assert kill_runs.ended(processes) == [1, -signal.SIGKILL]
    what = {"eval": "run", "audit": "audit"}[command]
    assert console(tmp_path, 0) == [f"{NAMES[command]}: another rank is gone before the {what} began"]
    assert not (tmp_path / "out").exists()


@SCORERS
def test_input_that_one_rank_refuses_is_refused_by_all_before_there_is_a_log(undisturbed, tmp_path, command):
    processes = start_scoring(undisturbed, tmp_path, command, on_rank_1(refuses_data))
    assert kill_runs.ended(processes) == [2, 2]
    for rank in (0, 1):
        said = console(tmp_path, rank)
        assert said == [f"{NAMES[command]}: manifest.json: not a manifest; make it again"]
    assert not (tmp_path / "out").exists()


def stopped_at_score(script):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    script.score_targets = stop


@SCORERS
def test_a_signal_while_scoring_leaves_at_once(undisturbed, tmp_path, command):
    fault = functools.partial(change_on, 0, stopped_at_score)
    processes = start_scoring(undisturbed, tmp_path, command, fault, world=1)
    assert kill_runs.ended(processes, 40) == [128 + signal.SIGTERM]
    assert console(tmp_path, 0) == []


def test_a_shard_that_one_rank_refuses_leaves_no_log(tmp_path):
    """Each rank reads its part of the train split before there is a log."""
    shutil.copytree(english_dataset().path, tmp_path / "data")
    write_shard(tmp_path / "data/tiny_train_000001.bin", [1, 2, 60_000] * 99)
    processes = kill_runs.start(tmp_path / "out", 2, data_path=tmp_path / "data", resume="")
    assert kill_runs.ended(processes) == [2, 2]
    for rank in (0, 1):
        [said] = console(tmp_path / "out", rank)
        assert f"{tmp_path}/data/tiny_train_000001.bin: token 60000" in said
    assert not (tmp_path / "out/run.txt").exists()
