"""Draws loss curves and the history of a track. The same input gives the same file, byte for byte."""

from __future__ import annotations

import io
import os
import re
from datetime import date, timedelta
from pathlib import Path

from ledger.files import write_atomic
from ledger.read.runlog import RunLog, Step, parse_log
from script import BadInput

MAX_TICKS = 8  # on a time axis; with fewer days, each has a tick


def pyplot():
    """Return matplotlib.pyplot, set up to draw without a display.

    Raises BadInput if matplotlib is not installed, or does not start with the caller's settings.
    """
    os.environ["MPLBACKEND"] = "Agg"  # the caller's may need a display, or be none
    try:
        import matplotlib
        from matplotlib import pyplot as plt
    except ImportError:
        raise BadInput("plots need matplotlib: pip install matplotlib, or run ./run.sh once") from None
    except Exception as error:  # of a matplotlibrc in the working folder or at home
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"matplotlib does not start ({reason}); check the file matplotlibrc") from None

    matplotlib.use("Agg")

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    return plt


def save(plt, figure, out: Path) -> None:
    """Write the figure as PNG, all of it or nothing, without metadata that changes from run to run."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    write_atomic(out, buffer.getvalue())


def label_of(log: Path) -> str:
    """Return a run's name in the legend: folder and seed in a record, else the name of the file."""
    folder = log.parent.parent.name
    in_record = log.parent.name == "logs" and re.match(r"\d{4}-", folder)
    return f"{folder} {log.stem}" if in_record else log.stem


def validations(run: RunLog) -> list[Step]:
    """Return the validations of a run, without that of the untrained model if others show the curve."""
    val = [s for s in run.steps if s.kind == "val" and s.bpb is not None]
    return val[1:] if len(val) > 2 else val


def plot_runs(logs: list[Path], out: Path) -> None:
    """Draw train loss and val bpb, each against step and against time, one color per run.

    If no run was validated before its end there is no curve of bpb: the legend has the bpb instead.
    Unfinished runs are drawn as well. Raises BadInput if a log has no step yet.
    """
    runs = [parse_log(log) for log in logs]
    for run in runs:
        if not any(s.step > 0 for s in run.steps):
            raise BadInput(f"{run.path}: no step: lines yet, nothing to plot")

    has_curve = any(len(validations(run)) > 1 for run in runs)
    rows = 2 if has_curve else 1
    plt = pyplot()
    figure, axes = plt.subplots(
        rows,
        2,
        figsize=(10, 3.2 * rows),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for index, run in enumerate(runs):
        plot_run(run, axes, f"C{index % 10}", label_of(run.path) if has_curve else label_with_bpb(run))
    axes[0][0].set_ylabel("train loss (nats per token)")
    if has_curve:
        axes[1][0].set_ylabel("val bpb (bits per byte)")
    axes[-1][0].set_xlabel("step")
    axes[-1][1].set_xlabel("training time (s)")
    for axis in axes[-1]:
        left, right = axis.get_xlim()
        axis.set_xlim(left=min(left, -0.04 * right))  # zero is in view, also for a single step
    axes[0][1].legend(fontsize=8)
    save(plt, figure, out)


def label_with_bpb(run: RunLog) -> str:
    """Return a run's name in the legend with the bpb of its only validation, if it has one."""
    last = "".join(f", val bpb {s.bpb:.4f} at step {s.step}" for s in validations(run))
    return label_of(run.path) + last


def plot_run(run: RunLog, axes, color: str, label: str) -> None:
    """Draw one run into the panels of plot_runs. Markers: a curve may have a single point."""
    style = {"color": color, "linewidth": 1.2, "marker": ".", "label": label}
    train = [s for s in run.steps if s.kind == "train"]
    losses = [s.loss for s in train]
    axes[0][0].plot([s.step for s in train], losses, markersize=4, **style)
    axes[0][1].plot([s.time_ms / 1000 for s in train], losses, markersize=4, **style)

    for row in axes[1:]:
        val = validations(run)
        bpb = [s.bpb for s in val]
        row[0].plot([s.step for s in val], bpb, **style)
        row[1].plot([s.time_ms / 1000 for s in val], bpb, **style)


def plot_history(tracks: dict[str, list[dict]], out: Path) -> None:
    """Draw the records of {track: submissions} over time, a panel per track; stairs show the best so far."""
    plt = pyplot()
    height = 3.4 * len(tracks)
    figure, axes = plt.subplots(len(tracks), 1, figsize=(9, height), squeeze=False, layout="constrained")
    for axis, (track, submissions) in zip(axes[:, 0], tracks.items()):
        plot_track(axis, track, submissions)
    save(plt, figure, out)


def plot_track(axis, track: str, submissions: list[dict]) -> None:
    """Draw one panel of plot_history."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, DayLocator

    rows = sorted(submissions, key=lambda sub: (sub["date"], -sub["val_bpb"], sub["name"]))
    days = [date.fromisoformat(sub["date"]) for sub in rows]
    bpb = [sub["val_bpb"] for sub in rows]
    best = [min(bpb[: i + 1]) for i in range(len(bpb))]
    spread = [sub["val_bpb_std"] or 0.0 for sub in rows]

    axis.errorbar(days, bpb, yerr=spread, fmt="o", markersize=4, capsize=2)
    axis.step(days, best, where="post", color="C0", alpha=0.5)
    for day, sub in zip(days, rows):
        axis.annotate(sub["name"], (day, sub["val_bpb"]), (5, 4), textcoords="offset points", fontsize=8)

    axis.set_title(track, loc="left")
    axis.set_ylabel("val bpb")
    axis.margins(0.15)
    span = days[-1] - days[0]
    margin = max(0.15 * span, timedelta(days=1))  # matplotlib would show years around a single day
    axis.set_xlim(days[0] - margin, days[-1] + margin)
    few = span + 2 * margin < timedelta(days=MAX_TICKS)
    locator = DayLocator() if few else AutoDateLocator(minticks=1, maxticks=MAX_TICKS)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
