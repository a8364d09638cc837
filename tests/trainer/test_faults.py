"""Runs that meet kills, signals, lost ranks, values that are not finite, full disks and stuck reads.

tests/stress/kill_runs.py kills many more runs.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import audit
import kill_runs
import train_gpt as t
from helpers import (
    ROOT,
    english_args,
    english_dataset,
    machine,
    noisy_model,
    random_tokens,
    run_ranks,
    stop_one_line,
    tiny,
    write_shard,
)
from ledger import tracks
from ledger.prove import claims, log_claims, record_claims
from ledger.read import runlog

STEPS = 12
KNOB_VARIABLES = {f.name.upper() for f in dataclasses.fields(t.Config)}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Keep every knob of the caller's environment from a test."""
    for name in KNOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def args(folder, **knobs):
    """Return the arguments of a short run that writes a checkpoint after every step."""
    short_run = dict(out_dir=folder, iterations=STEPS, checkpoint_every=1e-6, warmup_steps=1)
    return english_args(**(short_run | knobs))


def lines(folder):
    """Return the lines of the log."""
    return (folder / "run.txt").read_text(encoding="utf-8").splitlines()


def has_line(folder, pattern):
    """Return whether a line of the log begins with a match of the pattern."""
    return any(re.match(pattern, line) for line in lines(folder))


def checkpoint(folder, step, rank=0, world=1):
    """Return the path of a rank's file of a set."""
    return folder / f"run.step{step}.{rank}of{world}.ckpt"


def sets(folder):
    """Return the steps of the checkpoint sets in a folder, in order; one rank wrote them."""
    return sorted(
        int(re.search(r"step(\d+)", name)[1]) for name in os.listdir(folder) if name.endswith(".ckpt")
    )


def after_step(monkeypatch, step, action):
    """Call action(optimizer) at the end of a training step, warm-up aside."""
    train_step = t.train_step

    def patched(backward, optimizer, batch, hp):
        loss = train_step(backward, optimizer, batch, hp)
        if optimizer.steps == step:
            action(optimizer)
        return loss

    monkeypatch.setattr(t, "train_step", patched)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of a run that nothing disturbs, and its final state."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert t.main(args(folder)) == 0
    return SimpleNamespace(folder=folder, state=kill_runs.final_state(folder, step=STEPS))


def ends_like(undisturbed, folder):
    """Return whether a run ended with the state of the undisturbed one, bit for bit."""
    return kill_runs.same(kill_runs.final_state(folder, step=STEPS), undisturbed.state)


# ---------------------------------------------------------------- checkpoints


def test_two_sets_are_kept_and_a_run_without_writes_none(undisturbed, tmp_path):
    assert len(sets(undisturbed.folder)) == 2 and sets(undisturbed.folder)[1] == STEPS
    assert f"checkpoint step:{STEPS}" in lines(undisturbed.folder)

    assert t.main(args(tmp_path, checkpoint_every=0)) == 0
    assert sorted(os.listdir(tmp_path)) == ["run.int6.xz", "run.txt"]
    assert (tmp_path / "run.int6.xz").read_bytes() == (undisturbed.folder / "run.int6.xz").read_bytes()


@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_is_bit_equal(world, monkeypatch):
    monkeypatch.setattr(kill_runs, "STEPS", 50)
    reference = kill_runs.undisturbed(world)
    outcomes, end, resumed = kill_runs.killed_run(reference, 1, world, random.Random(5))
    assert end == "bit-equal" and outcomes[0].startswith("as claimed"), (outcomes, end)
    assert resumed == 1


def test_two_processes_cannot_have_one_run(tmp_path):
    """The second one says so. The first one's death frees the run."""
    knobs = dict(resume="auto", checkpoint_every=0)
    argv = [sys.executable, t.__file__, "train", *args(tmp_path, iterations=100_000, **knobs)]
    first = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        log = tmp_path / "run.txt"
        assert kill_runs.wait_until(lambda: log.exists() and "model_params" in log.read_text())
        second = subprocess.run(argv, capture_output=True, text=True)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert "run.txt: another process is writing it" in second.stderr
    assert "run_id" in second.stderr
    assert t.main(args(tmp_path, iterations=2, **knobs)) == 0


def flipped(blob):
    """Return the bytes with a bit in the middle flipped."""
    damaged = bytearray(blob)
    damaged[len(damaged) // 2] ^= 1
    return bytes(damaged)


def cut(blob):
    """Return a flipped file without its last nine bytes."""
    return flipped(blob)[:-9]


def emptied(blob):
    """Return no bytes."""
    return b""


@pytest.mark.parametrize("missing", ["gone.step4.0of1.ckpt", "run.txt"])
def test_a_checkpoint_that_is_missing_leaves_no_log(tmp_path, capsys, missing):
    err = stop_one_line(args(tmp_path / "out", resume=tmp_path / missing), capsys)
    assert "config key resume" in err
    assert str(tmp_path / missing) in err
    assert "resume=auto" in err
    assert os.listdir(tmp_path) == []


def test_a_set_with_a_missing_part_leaves_no_log(tmp_path, capsys):
    part = tmp_path / "run.step4.0of2.ckpt"
    part.touch()
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert "no checkpoint file" in err and "run.step4.1of2.ckpt" in err
    assert os.listdir(tmp_path) == [part.name]


@pytest.mark.parametrize("damage", [flipped, cut, emptied], ids=["flip", "cut", "lost"])
def test_a_named_set_that_is_damaged_leaves_no_log(undisturbed, tmp_path, capsys, damage):
    part = checkpoint(tmp_path, STEPS)
    part.write_bytes(damage(checkpoint(undisturbed.folder, STEPS).read_bytes()))
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert "config key resume: " in err and f"{part}: checksum mismatch" in err and "resume=auto" in err
    err = stop_one_line(args(tmp_path / "out", resume=part, seed=8), capsys)
    assert os.listdir(tmp_path) == [part.name]


def test_a_named_set_of_another_run_leaves_no_log(undisturbed, tmp_path, capsys):
    part = checkpoint(undisturbed.folder, STEPS)
    err = stop_one_line(args(tmp_path / "out", resume=part, seed=8), capsys)
    assert "written with another seed;" in err
    assert os.listdir(tmp_path) == []


def test_a_file_that_only_has_the_checksum_of_a_checkpoint_is_damaged(tmp_path, capsys):
    part = tmp_path / "run.step4.0of1.ckpt"
    text = b'{"tensors": []}'
    blob = len(text).to_bytes(4, "little") + text
    part.write_bytes(blob + hashlib.sha256(blob).digest())
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert f"{part}: its header is not that of a checkpoint" in err
    assert os.listdir(tmp_path) == [part.name]


def test_a_train_split_that_is_missing_or_too_small_leaves_no_log(tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(english_dataset().path, data)
    for shard in data.glob("*_train_*.bin"):
        shard.unlink()
    err = stop_one_line(args(tmp_path / "out", data_path=data), capsys)
    assert str(data) in err and "train" in err

    write_shard(data / "tiny_train_000000.bin", [1] * 32)
    err = stop_one_line(args(tmp_path / "out", data_path=data), capsys)
    assert f"{data}: the train split has 32 tokens" in err
    assert not (tmp_path / "out").exists()


def checkpoints_of(folder, name, model_seed):
    """Return the Checkpoints of a run that logs nothing. Its batch can be cut for 1, 2, 3 or 4 ranks."""
    h = tiny(
        step_rule="normuon", checkpoint_every=1, resume="auto", train_batch_tokens=192, micro_batch_tokens=64
    )
    m = t.init_machine(h, os.environ)
    model = noisy_model(h, seed=model_seed)
    run = t.Run(
        h=h,
        m=m,
        log=t.Log(f"{folder}/{name}.txt", None),
        dataset=SimpleNamespace(manifest_sha256="same"),
        model=model,
        loss_fn=None,
        nats_fn=None,
        phases={},
        splits={},
    )
    return t.Checkpoints(run, t.Optimizer(model, h, m), t.Ema(model, h))


def train_and_save(rank, folder, steps):
    """Train for some steps, then save as "run"."""
    checkpoints = checkpoints_of(folder, "run", model_seed=3)
    model = checkpoints.run.model
    optimizer = checkpoints.optimizer
    for step in range(steps):
        tokens = random_tokens(optimizer.h, (2, 16), step + rank)
        targets = random_tokens(optimizer.h, (2, 16), step + 100 + rank)
        model.loss(tokens, targets).backward()
        optimizer.step(t.hyper_at(optimizer.h, step, 0.0))
    checkpoints.ema.update(0.25)
    checkpoints.save(steps, 123.0, last=True)


def resume_and_save(rank, folder, steps, name):
    """Resume from "run" with other initial weights, then save under another name."""
    checkpoints = checkpoints_of(folder, "run", model_seed=5)
    run = checkpoints.run
    state = t.read_state(run.h, run.m, checkpoints.base, run.dataset)
    assert checkpoints.restore(state) == (steps, 123.0) and state.parts == []
    assert checkpoints.optimizer.steps == steps and checkpoints.ema.progress == 0.25
    checkpoints.base = f"{folder}/{name}"
    checkpoints.good = 0
    checkpoints.save(steps, 123.0, last=True)


@pytest.mark.parametrize("worlds", [(3, 1), (1, 4), (2, 3)], ids=str)
def test_another_number_of_ranks_reads_the_same_state(worlds, tmp_path):
    writers, readers = worlds
    run_ranks(train_and_save, writers, str(tmp_path), 3)
    run_ranks(resume_and_save, readers, str(tmp_path), 3, "again")
    written = kill_runs.final_state(tmp_path, writers, 3)
    again = kill_runs.final_state(tmp_path, readers, 3, "again")
    # Two flat moments, 18 parameters and their averages, momentum and second moment of four matrices.
    assert len(written) == 2 + 2 * 18 + 2 * 4 and kill_runs.same(written, again)
    for spec in t.MATRICES:
        assert written[f"momentum.{spec.name}"].abs().max() > 0
        assert written[f"second.{spec.name}"].min() >= 0


def stop_after(folder, monkeypatch, step, **knobs):
    """Train until a signal ends the run after a step."""
    with monkeypatch.context() as patch:
        after_step(patch, step, lambda optimizer: os.kill(os.getpid(), signal.SIGTERM))
        assert t.main(args(folder, **knobs)) == 0


@pytest.mark.parametrize("damage", [flipped, cut, emptied], ids=["flip", "cut", "lost"])
def test_a_damaged_set_falls_back_to_the_one_before(undisturbed, tmp_path, monkeypatch, damage):
    stop_after(tmp_path, monkeypatch, 6)
    before, last = sets(tmp_path)
    path = checkpoint(tmp_path, last)
    path.write_bytes(damage(path.read_bytes()))

    assert t.main(args(tmp_path, resume="auto")) == 0
    assert has_line(tmp_path, rf"checkpoint step:{last} skipped: .*{re.escape(str(path))}")
    assert has_line(tmp_path, rf"resumed step:{before} from ")
    assert ends_like(undisturbed, tmp_path)


LOOP = dict(loop_layers="0 1", loop_times=2, loop_frac=0.5)


@pytest.fixture(scope="module")
def undisturbed_loop(tmp_path_factory):
    """Return the final state of a run whose loop begins in the middle."""
    folder = tmp_path_factory.mktemp("undisturbed_loop")
    assert t.main(args(folder, **LOOP)) == 0
    assert has_line(folder, f"loop_begins step:{STEPS // 2} ")
    return SimpleNamespace(state=kill_runs.final_state(folder, step=STEPS))


@pytest.mark.parametrize("step", [4, STEPS // 2 - 1, STEPS // 2, STEPS // 2 + 2])
def test_resuming_on_either_side_of_the_loops_begin_is_bit_equal(
    undisturbed_loop, tmp_path, monkeypatch, step
):
    stop_after(tmp_path, monkeypatch, step, **LOOP)
    assert t.main(args(tmp_path, resume="auto", **LOOP)) == 0
    assert has_line(tmp_path, f"resumed step:{step} from ")
    assert ends_like(undisturbed_loop, tmp_path)


def test_another_config_script_or_data_is_refused_by_name(tmp_path, monkeypatch, capsys):
    """The log stays as it was."""
    stop_after(tmp_path, monkeypatch, 3)
    log = (tmp_path / "run.txt").read_bytes()
    err = stop_one_line(args(tmp_path, resume="auto", matrix_lr=0.03, seed=7), capsys)
    assert "written with another matrix_lr, seed;" in err and "run.step" in err

    edited = tmp_path / "repo" / "train_gpt.py"
    edited.parent.mkdir()
    edited.write_text(Path(t.__file__).read_text() + "# another line\n")
    with monkeypatch.context() as patch:
        patch.setattr(t, "__file__", str(edited))
        err = stop_one_line(args(tmp_path, resume="auto"), capsys)
    assert "written with another script;" in err
    assert (tmp_path / "run.txt").read_bytes() == log

    path = str(checkpoint(tmp_path, 3))
    for other in (path.replace("step3", "step5"), str(tmp_path / "run.txt")):
        err = stop_one_line(args(tmp_path / "b", run_id=len(other), resume=other), capsys)
        assert "config key resume: " in err
        assert other in err
        assert "resume=auto" in err
    assert t.main(args(tmp_path / "c", resume=path, checkpoint_every=0)) == 0  # by name, into another folder
    assert f"resumed step:3 from {path[:-9]}*" in "\n".join(lines(tmp_path / "c"))


def test_auto_without_a_checkpoint_is_a_plain_run(undisturbed, tmp_path):
    assert t.main(args(tmp_path, resume="auto")) == 0
    assert not has_line(tmp_path, "resumed")
    assert ends_like(undisturbed, tmp_path)


# ---------------------------------------------------------------- files that a run can do without


def test_the_script_alone_in_a_folder_checkpoints_and_resumes(tmp_path):
    """The trainer needs no other file of the repository, and a second run resumes what the first wrote."""
    shutil.copyfile(ROOT / "train_gpt.py", tmp_path / "train_gpt.py")
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", *KNOB_VARIABLES}}
    command = [sys.executable, "train_gpt.py", *args("logs", resume="auto")]
    options = dict(cwd=tmp_path, env=env, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    logs = tmp_path / "logs"
    artifact = logs / "run.int6.xz"
    whole = artifact.read_bytes()
    before, last = sets(logs)
    assert last == STEPS and not has_line(logs, "resumed")

    # As if the run had been killed before its last set.
    checkpoint(logs, last).unlink()
    artifact.unlink()
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert has_line(logs, f"resumed step:{before} from ")
    assert artifact.read_bytes() == whole


def test_eval_needs_no_training_shards(undisturbed, tmp_path):
    held_out = tmp_path / "data"
    shutil.copytree(english_dataset().path, held_out, ignore=shutil.ignore_patterns("*_train_*"))
    assert not t.find_shards(str(held_out), "train") and t.find_shards(str(held_out), "val")

    artifact = str(undisturbed.folder / "run.int6.xz")
    knobs = [f"data_path={held_out}", f"out_dir={tmp_path}", "run_id=run", "eval_batch_tokens=512"]
    assert t.main(["eval", artifact, *knobs]) == 0
    score = r"(metric:\S+ val_loss:\S+ val_bpb:\S+) "
    trained = re.match(f"final_score {score}", lines(undisturbed.folder)[-1])
    evaluated = re.match(f"eval_score {score}", lines(tmp_path)[-1])
    assert evaluated[1] == trained[1]


# ---------------------------------------------------------------- signals, and the record of a resumed run


def trained_steps(run):
    """Return the steps of the training lines of a parsed log."""
    return [step.step for step in run.steps if step.kind == "train"]


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
    t.ECHO = 1

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
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in output


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


def console(folder, rank):
    """Return the lines that a rank printed, the log's aside."""
    lines = (folder / f"console.{rank}").read_text().splitlines()
    return [line for line in lines if line.startswith(("train_gpt.py: ", "audit.py: ", "Traceback"))]


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


# ---------------------------------------------------------------- divergence


def parameter(optimizer, name):
    """Return the storage of a parameter in the optimizer's buffers."""
    if name in ("qo_bank", "kv_bank"):  # alone in their buffers
        return optimizer.bank[name.removesuffix("_bank")]
    shapes = t.parameter_table(optimizer.h)
    at = 0
    for spec in (spec for spec in t.SMALL if spec.name in shapes):
        shape, _ = shapes[spec.name]
        size = torch.Size(shape).numel()
        if spec.name == name:
            return optimizer.flat[at : at + size]
        at += -(-size // 64) * 64  # each begins at a multiple of 64
    raise KeyError(name)


def corrupt(name):
    """Return an action for after_step: make the first value of a parameter nan."""

    def action(optimizer):
        parameter(optimizer, name).view(-1)[:1].fill_(float("nan"))

    return action


@pytest.mark.parametrize("name", ["resid_mix", "kv_bank"])
def test_values_that_are_not_finite_end_the_run_with_a_diagnosis(tmp_path, monkeypatch, capsys, name):
    after_step(monkeypatch, 5, corrupt(name))
    capsys.readouterr()
    assert t.main(args(tmp_path)) == 1
    err = capsys.readouterr().err
    found = re.search(
        r"step (\d+): diverged, loss nan, gradient norm nan, first bad tensor (\w+), "
        r"last good checkpoint (\d+)",
        err,
    )
    assert found and 5 <= int(found[1]) <= 7 and int(found[3]) <= 5, err
    assert found[0] in "\n".join(lines(tmp_path))
    assert not (tmp_path / "run.int6.xz").exists()

    for step in sets(tmp_path):
        blob = checkpoint(tmp_path, step).read_bytes()
        header_end = 4 + int.from_bytes(blob[:4], "little")
        values = torch.frombuffer(bytearray(blob[header_end:-32]), dtype=torch.float32)
        assert values.isfinite().all()
    monkeypatch.undo()
    assert t.main(args(tmp_path, resume="auto")) == 0  # from the last good checkpoint


def test_a_last_step_that_diverges_is_found_too(tmp_path, monkeypatch, capsys):
    after_step(monkeypatch, STEPS - 1, corrupt("kv_bank"))
    assert t.main(args(tmp_path)) == 1
    assert f"step {STEPS}: diverged, loss nan" in capsys.readouterr().err
    assert not (tmp_path / "run.int6.xz").exists()


def test_a_gradient_beyond_the_bound_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(t, "DIVERGED", 1e-3)
    assert t.main(args(tmp_path, checkpoint_every=0)) == 1
    err = capsys.readouterr().err
    assert re.search(r"step 2: diverged, .* first bad tensor none, last good checkpoint none", err)


# ---------------------------------------------------------------- disks


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    write_atomic = t.write_atomic

    def full_after_step_4(path, *chunks):
        step = re.search(r"step(\d+)", path)  # none in the artifact's path
        if step and int(step[1]) > 4:
            raise t.InputError(f"{path}: cannot write it (No space left on device); free space")
        write_atomic(path, *chunks)

    monkeypatch.setattr(t, "write_atomic", full_after_step_4)
    assert t.main(args(tmp_path)) == 0
    good = sets(tmp_path)[-1]
    assert good <= 4
    assert has_line(tmp_path, rf"checkpoint step:12 failed: .*No space left.*; step:{good} stays$")
    assert lines(tmp_path)[-1].startswith("final_score")
    assert (tmp_path / "run.int6.xz").exists()
    assert kill_runs.final_state(tmp_path, step=good)


class FullAtStep3:
    """A log file whose disk is full when the line of step 3 is written."""

    def __init__(self, file):
        self.file = file

    def write(self, line):
        if line.startswith("step:3/"):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(line)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_under_the_log_is_one_line(tmp_path, monkeypatch, capsys):
    class FullLog(t.Log):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.file = FullAtStep3(self.file)

    monkeypatch.setattr(t, "Log", FullLog)
    err = stop_one_line(args(tmp_path), capsys)
    assert "run.txt: cannot write the log (No space left on device)" in err
    assert has_line(tmp_path, "step:2/")


class Device:
    """Folders of which one, with all below it, is full."""

    def __init__(self, monkeypatch, folder, *full):
        self.write_atomic = t.write_atomic
        self.full = [str(path) for path in full]
        monkeypatch.setattr(t, "write_atomic", self.write)
        monkeypatch.setattr(t.tempfile, "tempdir", str(folder / "temporary"))
        monkeypatch.chdir(folder / "working")

    def write(self, path, *chunks):
        if any(path.startswith(full) for full in self.full):
            raise t.InputError(f"{path}: cannot write it (No space left on device); free space")
        self.write_atomic(path, *chunks)


@pytest.fixture
def folders(tmp_path):
    for name in ("temporary", "working"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("full", [("out",), ("out", "temporary")], ids=["temporary", "working"])
def test_a_full_disk_at_the_artifact_keeps_the_weights(undisturbed, folders, monkeypatch, capsys, full):
    """They go to the temporary folder, or else to the working folder, and eval takes them from there."""
    out = folders / "out"
    Device(monkeypatch, folders, *(folders / name for name in full))
    assert t.main(args(out, checkpoint_every=0)) == 1
    console = capsys.readouterr().out.splitlines()
    artifact = Path(console[-1].removeprefix("artifact: "))
    assert artifact.parent.parent == folders / ("working" if "temporary" in full else "temporary")
    assert artifact.read_bytes() == (undisturbed.folder / "run.int6.xz").read_bytes()
    assert has_line(out, rf"artifact file:{artifact}, because {out}/run.int6.xz cannot be written")
    assert lines(out)[-1].startswith("final_score ")

    data = english_dataset().path
    assert t.main(["eval", str(artifact), f"data_path={data}", f"out_dir={folders / 'eval'}"]) == 0


def test_a_disk_that_is_full_everywhere_names_the_folders(folders, monkeypatch, capsys):
    Device(monkeypatch, folders, folders)
    err = stop_one_line(args(folders / "out", checkpoint_every=0), capsys)
    assert "run.int6.xz" in err
    assert "temporary" in err
    assert "working" in err
    assert os.listdir(folders / "temporary") == os.listdir(folders / "working") == []


class FullAtTheEnd(FullAtStep3):
    """A log file whose disk is full once training has ended."""

    def write(self, line):
        if line.startswith("final_live"):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(line)


def test_a_log_that_cannot_be_written_at_the_end_goes_on_elsewhere(undisturbed, folders, monkeypatch, capsys):
    class FullLog(t.Log):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.file = FullAtTheEnd(self.file)

    monkeypatch.setattr(t, "Log", FullLog)
    Device(monkeypatch, folders)
    monkeypatch.setattr(t, "write_atomic", refuse_logs_in(folders / "out"))
    assert t.main(args(folders / "out", checkpoint_every=0)) == 0
    console = capsys.readouterr()
    log = Path(console.out.splitlines()[-2].removeprefix("log: "))
    assert log.parent.parent == folders / "temporary" and log.name == "run.txt"
    assert "cannot write the log (No space left on device)" in console.err
    assert f"; the whole log is {log}\n" in console.err
    run = runlog.parse_log(log)
    assert run.final_scores == 1 and trained_steps(run) == list(range(1, STEPS + 1))
    assert (folders / "out/run.int6.xz").read_bytes() == (undisturbed.folder / "run.int6.xz").read_bytes()


def refuse_logs_in(folder):
    """Return a write_atomic for which the disk of a folder is too full for a log."""
    write_atomic = t.write_atomic

    def full(path, *chunks):
        if path.startswith(str(folder)) and path.endswith(".txt"):
            raise t.InputError(f"{path}: cannot write it (No space left on device); free space")
        write_atomic(path, *chunks)

    return full


def hang_reads(rank):
    """Make the disk hang at batch 6, and the trainer wait for half a second."""
    t.PATIENCE = 0.5
    build = t.TokenLoader.build

    def stuck(self, index):
        if index >= 6:
            time.sleep(1000)
        return build(self, index)

    t.TokenLoader.build = stuck


def test_a_stuck_read_names_the_file_and_ends(tmp_path):
    began = time.monotonic()
    assert kill_runs.ended(kill_runs.start(tmp_path, fault=hang_reads)) == [1]
    assert time.monotonic() - began < 40
    shard = rf"{english_dataset().path}/tiny_train_00000\d.bin"
    assert re.search(rf"rank 0: {shard}: not read within 0.5 s", lines(tmp_path)[-1])


def cut_shards(rank):
    """Cut all train shards to their headers at batch 6."""
    build = t.TokenLoader.build

    def cut_first(self, index):
        if index == 6:
            for path in self.files:
                os.truncate(path, t.SHARD_HEADER_BYTES)
        return build(self, index)

    t.TokenLoader.build = cut_first


def test_a_shard_that_is_cut_during_training_ends_it_in_one_line(tmp_path):
    """Its name is in the log. A mapped file would end the process with SIGBUS and no word."""
    shutil.copytree(english_dataset().path, tmp_path / "data")
    knobs = dict(data_path=tmp_path / "data", checkpoint_every=0)
    assert kill_runs.ended(kill_runs.start(tmp_path / "out", fault=cut_shards, **knobs)) == [2]
    shard = re.escape(f"{tmp_path}/data/tiny_train_00000")
    found = re.fullmatch(rf"rank 0: ({shard}\d\.bin: cut during the run; .*)", lines(tmp_path / "out")[-1])
    assert found, lines(tmp_path / "out")[-1]
    console = (tmp_path / "out/console.0").read_text().splitlines()
    assert console[-1] == f"train_gpt.py: {found[1]}" and "Traceback" not in "".join(console)


FULL = Path("/dev/full")  # whose every write says that the disk is full
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@needs_full
def test_a_log_that_a_full_disk_has_refused_can_be_closed(tmp_path):
    """Closing writes once more what could not be written."""
    log = t.Log(str(tmp_path / "run.txt"), None)
    log.file = open(FULL, "a", encoding="utf-8")
    with pytest.raises(t.InputError, match="cannot write the log .No space left on device.; free space"):
        log("step:1/2")
    log.close()
    assert log.file is None


def test_a_path_that_is_not_utf8_is_escaped_in_the_log(tmp_path):
    assert t.main(args(tmp_path / "caf\udce9", checkpoint_every=0, iterations=1)) == 0
    log = tmp_path / "caf\udce9" / "run.txt"
    assert f"  out_dir: {tmp_path}/caf\\udce9" in log.read_text(encoding="utf-8").splitlines()


def test_a_path_of_too_many_folders_is_one_line(tmp_path, capsys):
    assert "run.txt: cannot write the log (" in stop_one_line(args(f"{tmp_path}/" + "o/" * 1500), capsys)


# ---------------------------------------------------------------- memory


ALLOCATIONS = {
    "the host": MemoryError("Unable to allocate 8.2 PiB"),
    "the device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore"),
    "torch on a CPU": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
}


@pytest.mark.parametrize("error", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_no_memory_is_one_line_with_the_knob(tmp_path, monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(t, "train_step", fails)
    assert t.main(args(tmp_path, checkpoint_every=0, warmup_steps=0)) == 1
    err = capsys.readouterr().err
    assert err.startswith("train_gpt.py: no memory left (")
    assert "lower micro_batch_tokens" in err
    assert err.count("\n") == 1
    assert lines(tmp_path)[-1].startswith("rank 0: no memory left (")


# ---------------------------------------------------------------- consoles and networks


def run_program(*argv, **env):
    return subprocess.run(
        [sys.executable, t.__file__, *argv], capture_output=True, text=True, env=os.environ | env
    )


def test_an_ascii_console_shows_another_path_escaped(tmp_path):
    folder = tmp_path / "donn\u00e9es"
    done = run_program("config", f"data_path={folder}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "donn\\xe9es" in done.stdout
    assert done.stderr == ""
    done = run_program("train", "preset=cpu", f"data_path={folder}", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "donn\\xe9es" in done.stderr


@pytest.mark.parametrize("program", ["train_gpt.py", "tools/cli.py"])
def test_a_reader_that_has_seen_enough_is_no_error(program):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, ROOT / program, "config"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.stderr == "" and done.returncode == 1


PRINTING = [
    ["train_gpt.py", "config"],
    ["tools/cli.py", "--help"],
    ["tools/cli.py", "record", "--root", "{here}", "verify"],
]


@needs_full
@pytest.mark.parametrize("program", PRINTING, ids=lambda program: program[0] + program[1])
def test_a_console_on_a_full_disk_is_one_line(program, tmp_path):
    command = [sys.executable, ROOT / program[0], *(word.format(here=tmp_path) for word in program[1:])]
    with open(FULL, "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "standard output" in done.stderr


@pytest.mark.parametrize("program", PRINTING, ids=lambda program: program[0] + program[1])
@pytest.mark.parametrize("closed", ["1", "2", "1 2"])
def test_a_closed_console_is_no_error(program, closed, tmp_path):
    script = "".join(f"exec {number}>&-; " for number in closed.split()) + 'exec "$@"'
    command = [sys.executable, str(ROOT / program[0]), *(word.format(here=tmp_path) for word in program[1:])]
    done = subprocess.run(["sh", "-c", script, "-", *command], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert (done.stdout == "") == ("1" in closed)


@pytest.mark.parametrize("console", ["closed", "a pipe that nobody reads", "full"])
def test_training_goes_on_without_a_console(tmp_path, console):
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"closed": "exec >&- 2>&-", "full": "exec >/dev/full"}
    if console == "full" and not FULL.exists():
        pytest.skip("no /dev/full here")
    script = streams.get(console, "") + '\nexec "$@"'
    command = [sys.executable, t.__file__, *args(tmp_path, checkpoint_every=0)]
    done = subprocess.run(
        ["sh", "-c", script, "-", *command], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert lines(tmp_path)[-1].startswith("final_score ")
    assert runlog.parse_log(tmp_path / "run.txt").source == (ROOT / "train_gpt.py").read_text()


def test_a_machine_without_a_loopback_network_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    err = stop_one_line(args(tmp_path), capsys)
    assert "cannot make the process group" in err
    assert "none0" in err
    assert "ip link set lo up" in err


# ---------------------------------------------------------------- copies to the host


def test_host_copies_keep_the_values_of_the_call():
    x = torch.zeros(3)
    fetched = machine().fetch(x)
    x += 1
    assert fetched()[0].tolist() == [0, 0, 0]


class SideStream:
    """A stream that is its own event and notes its calls in `events`. Its query number `passes` is true."""

    def __init__(self, events, passes):
        self.events = events
        self.passes = passes

    def wait_stream(self, other):
        self.events.append(f"waits for {other}")

    def record_event(self):
        self.events.append("event")
        return self

    def query(self):
        self.passes -= 1
        return self.passes <= 0


@pytest.mark.parametrize("passes", [3, 1 << 60], ids=["soon", "never"])
def test_a_gpus_copies_run_on_a_side_stream_and_the_host_polls(monkeypatch, passes):
    events = []
    side = SideStream(events, passes)

    def enter(stream):
        events.append(f"on side {stream is side}")
        return contextlib.nullcontext()

    def hold(tensor, stream):
        events.append(f"held for side {stream is side}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.Tensor, "record_stream", hold)
    monkeypatch.setattr(t, "PATIENCE", 0.3)
    fetched = dataclasses.replace(machine(), pin=True, streams=(side,)).fetch(torch.ones(2), torch.zeros(1))
    assert events == ["waits for main", "on side True", "event", "held for side True", "held for side True"]
    if passes == 3:
        assert [x.tolist() for x in fetched()] == [[1, 1], [0]] and side.passes == 0
    else:
        with pytest.raises(t.Fault, match="the device has been busy for 0.3 s"):
            fetched()


@pytest.mark.gpu
def test_on_a_gpu_host_copies_are_page_locked_and_cost_no_allocation():
    """They also keep the values of the call, whatever is queued after it."""
    streams = tuple(torch.cuda.Stream() for _ in range(2))
    m = dataclasses.replace(machine(), device=torch.device("cuda"), pin=True, streams=streams)
    big = torch.zeros(1 << 26, device="cuda")
    numbers = torch.zeros(2, dtype=torch.float64, device="cuda")

    def step(i, earlier):
        numbers.fill_(i)
        fetched = m.fetch(numbers)
        for _ in range(20):  # work after the copy, which does not wait for it
            big.add_(1)
        numbers.fill_(-1)
        assert earlier is None or earlier()[0].tolist() == [i - 1, i - 1]
        return fetched

    fetched = None
    for i in range(50):
        fetched = step(i, fetched)
    blocks = torch.cuda.host_memory_stats()["num_host_alloc"]
    for i in range(50, 200):
        fetched = step(i, fetched)
    assert fetched()[0].is_pinned()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] <= blocks + 1
