"""The soak command, by runs of seconds."""

import os
import subprocess
import sys

import soak
import train_gpt as t


def leak(rank):
    """A MiB that stays, after each step."""
    real, kept = t.train_step, []

    def leaking(*a):
        kept.append(b"x" * (1 << 20))
        return real(*a)

    t.train_step = leaking


def crash(rank):
    real = t.train_step

    def broken(*a):
        if a[1].steps == 30:
            raise ZeroDivisionError("cosmic ray")
        return real(*a)

    t.train_step = broken


def test_the_slope_is_that_behind_the_first_third():
    climb = [(0.0, 100.0), (1.0, 900.0), (2.0, 500.0), (4.0, 501.0), (6.0, 502.0), (7.0, 502.5)]
    assert abs(soak.slope(climb) - 1800) < 1e-6


def test_a_process_that_has_just_ended_has_no_memory():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert soak.resident(process.pid) is None and soak.resident(os.getpid()) > 10


def test_a_plain_run_is_within_a_wide_bound(capsys):
    assert soak.soak(5, 30_000) == 0
    assert " MiB/hour behind the first third, bound 30000" in capsys.readouterr().out


def test_a_leak_is_beyond_it(capsys):
    assert soak.soak(5, 30_000, leak) == 1
    assert "bound 30000" in capsys.readouterr().out


def test_a_run_that_ends_by_itself_is_no_pass(capsys):
    assert soak.soak(5, 30_000, crash) == 1
    assert "the run ended with status 1: " in capsys.readouterr().out
