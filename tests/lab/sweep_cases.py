"""Helpers of the tests of sweeps: a tiny plan, and the lines of its logs."""

import re

import pytest

import train_gpt as t
from lab.training import planning
from lab.training.worker_process import WorkerProcess
from tests.helpers import english_args

STEPS = 14

LINE = dict(plan="p", row="r", baseline="r", key="matrix_lr", rate="0.02", seed=1, stage=1, workers=1)


def base(**knobs):
    """Return the settings of all rows: a tiny model on the English dataset."""
    args = english_args(iterations=STEPS, val_loss_every=5, warmup_steps=1)
    given = dict(arg.split("=", 1) for arg in args)
    del given["run_id"]
    del given["eval_stride"]
    return given | knobs


def raw_plan(**change):
    """Return the JSON object of a plan: two rows, two rates, two seeds."""
    plan = {
        "name": "tiny",
        "base": base(),
        "rates": [0.02, 0.04],
        "seeds": [1, 2],
        "rows": {"ns5": {}, "turbo": {"ortho": "turbo"}},
    }
    return plan | change


def tiny_plan(**change):
    """Return `raw_plan` as a Plan."""
    return planning.make_plan(t, raw_plan(**change), "plan")


def final(log):
    """Return the pairs of the final_score line of a log."""
    lines = log.read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("final_score ")]
    return dict(re.findall(r"(\w+):(\S+)", line))


def step_lines(log):
    """Return the step lines of a log without their times."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return [line.split(" train_time")[0] for line in lines if line.startswith("step:")]


def no_sweep_starts(monkeypatch):
    """Fail the test if a sweep starts a worker."""
    monkeypatch.setattr(WorkerProcess, "start", lambda *_: pytest.fail("a worker was started"))
