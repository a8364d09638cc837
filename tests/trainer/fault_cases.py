"""Helpers of the tests of faults: a short run with a checkpoint after every step, its log and its files."""

import os
import re
import signal
from pathlib import Path

import pytest

import train_gpt as t
from tests.helpers import english_args
from tests.stress import kill_runs

STEPS = 12


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


def ends_like(undisturbed, folder):
    """Return whether a run ended with the state of the undisturbed one, bit for bit."""
    return kill_runs.same(kill_runs.final_state(folder, step=STEPS), undisturbed.state)


def stop_after(folder, monkeypatch, step, **knobs):
    """Train until a signal ends the run after a step."""
    with monkeypatch.context() as patch:
        after_step(patch, step, lambda optimizer: os.kill(os.getpid(), signal.SIGTERM))
        assert t.main(args(folder, **knobs)) == 0


def trained_steps(run):
    """Return the steps of the training lines of a parsed log."""
    return [step.step for step in run.steps if step.kind == "train"]


FULL = Path("/dev/full")  # whose every write says that the disk is full

needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
