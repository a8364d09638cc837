"""Draws loss curves and the history of a track. The same input gives the same file, byte for byte."""

from __future__ import annotations

import io
import re
from datetime import date
from pathlib import Path

from ledger.files import write_atomic
from ledger.runlog import Run, parse_log
from script import BadInput


def pyplot():
    """Return matplotlib.pyplot, set up to draw without a display.

    Raises BadInput when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise BadInput("plots need matplotlib: pip install matplotlib, or run ./run.sh once") from None

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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


def plot_runs(logs: list[Path], out: Path) -> None:
    """Draw train loss and val bpb, each against step and against time, one color per run.

    Unfinished runs are drawn as well. Raises BadInput when a log has no step yet.
    """
    runs = [parse_log(log) for log in logs]
    for run in runs:
        if not any(s.step > 0 for s in run.steps):
            raise BadInput(f"{run.path}: no step: lines yet, nothing to plot")

    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex="col", sharey="row", layout="constrained")
    for index, run in enumerate(runs):
        plot_run(run, axes, f"C{index % 10}")
    axes[0][0].set_ylabel("train loss (nats per token)")
    axes[1][0].set_ylabel("val bpb (bits per byte)")
    axes[1][0].set_xlabel("step")
    axes[1][1].set_xlabel("training time (s)")
    axes[0][1].legend(fontsize=8)
    save(plt, figure, out)


def plot_run(run: Run, axes, color: str) -> None:
    """Draw one run into the four panels of plot_runs."""
    style = {"color": color, "linewidth": 1.2, "label": label_of(run.path)}
    train = [s for s in run.steps if s.kind == "train"]
    val = [s for s in run.steps if s.kind == "val" and s.bpb is not None]
    if len(val) > 2:
        val = val[1:]  # the untrained model would flatten the rest

    losses = [s.loss for s in train]
    axes[0][0].plot([s.step for s in train], losses, **style)
    axes[0][1].plot([s.time_ms / 1000 for s in train], losses, **style)

    bpb = [s.bpb for s in val]
    axes[1][0].plot([s.step for s in val], bpb, marker=".", **style)
    axes[1][1].plot([s.time_ms / 1000 for s in val], bpb, marker=".", **style)


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
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

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
    locator = AutoDateLocator(minticks=1, maxticks=8)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
