"""The soak command, on runs of seconds."""

import os
import subprocess
import sys

import pytest

import train_gpt as t
from tests.stress import soak


def leak(rank):
    """Keep a MiB with each step."""
    train_step = t.train_step
    kept = []

    def leaking_step(*args):
        kept.append(b"x" * (1 << 20))
        return train_step(*args)

    t.train_step = leaking_step


def crash(rank):
    """Fail after 30 steps."""
    train_step = t.train_step

    def failing_step(*args):
        optimizer = args[1]
        if optimizer.steps == 30:
            raise ZeroDivisionError("cosmic ray")
        return train_step(*args)

    t.train_step = failing_step


def test_the_slope_is_of_the_samples_after_the_first_third():
    climb = [(0.0, 100.0), (1.0, 900.0), (2.0, 500.0), (4.0, 501.0), (6.0, 502.0), (7.0, 502.5)]
    assert abs(soak.slope(climb) - 1800) < 1e-6


def test_a_process_that_has_just_ended_has_no_memory():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert soak.resident(process.pid) is None and soak.resident(os.getpid()) > 10


@pytest.mark.long
def test_a_plain_run_is_within_a_wide_bound(capsys):
    assert soak.soak(5, 30_000) == 0
    assert " MiB/hour after the first third, bound 30000" in capsys.readouterr().out


def test_a_leak_is_beyond_it(capsys):
    assert soak.soak(5, 30_000, leak) == 1
    assert "bound 30000" in capsys.readouterr().out


def test_a_run_that_ends_by_itself_fails(capsys):
    assert soak.soak(5, 30_000, crash) == 1
    assert "the run ended with status 1: " in capsys.readouterr().out
