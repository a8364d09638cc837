"""Curves of runs as the charts of a page take them: columns of numbers, one list each."""

from __future__ import annotations

from ledger.make.sweep_table import Point
from ledger.read.runlog import RunLog, Step

SIGNIFICANT = 6  # digits of a computed mean


def columns_of(steps: list[Step]) -> dict[str, list]:
    """Return steps, seconds and losses of `step:` lines, and bits per byte where all of them have it."""
    columns = {
        "step": [line.step for line in steps],
        "time": [line.time_ms / 1000 for line in steps],
        "loss": [line.loss for line in steps],
    }
    if steps and all(line.bpb is not None for line in steps):
        columns["bpb"] = [line.bpb for line in steps]
    return columns


def finite(steps: list[Step]) -> list[Step]:
    """Return the lines whose figures are numbers: JSON has no other, and a chart cannot show them."""
    return [line for line in steps if abs(line.loss) < float("inf") and abs(line.bpb or 0) < float("inf")]


def run_curves(run: RunLog) -> dict[str, dict[str, list]]:
    """Return the training losses and the validations of a run, finished or not."""
    lines = finite(run.steps)
    return {
        "train": columns_of([line for line in lines if line.kind == "train"]),
        "val": columns_of([line for line in lines if line.kind == "val" and line.bpb is not None]),
    }


def rounded(value: float) -> float:
    """Return a number to SIGNIFICANT digits."""
    return float(f"{value:.{SIGNIFICANT}g}")


def mean_columns(points: list[Point]) -> dict[str, list]:
    """Return the columns of a sweep's mean curve, without the untrained model if others show the curve."""
    shown = points[1:] if len(points) > 2 else points
    return {
        "step": [rounded(point.step) for point in shown],
        "time": [rounded(point.seconds) for point in shown],
        "bpb": [rounded(point.bpb) for point in shown],
    }
