"""Sends the figures of logs to a tracker: TensorBoard, Trackio or Weights & Biases, after a run or during it.

The trainer knows no tracker: this reads its logs. A tracker's package is imported only here, when it is asked
for. All three write into the folder that the caller names, and none of them needs a network for that.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ledger.read.runlog import RunLog, config_value, parse_log
from script import BadInput

PROJECT = "bankshot"
POLL_SECONDS = 1.0  # between two readings of a log that is followed


class TrackerPoint(NamedTuple):
    """What a line of a log tells."""

    step: int
    seconds: float  # on the training clock
    values: dict[str, float]


class Sink(NamedTuple):
    """One run in a tracker."""

    log: Callable[[TrackerPoint], None]
    close: Callable[[], None]


# ---- trackers ------------------------------------------------------------------------------------


def tensorboard_sink(package: ModuleType, folder: Path, name: str, config: dict[str, object]) -> Sink:
    """Open folder/name for TensorBoard, whose relative time is that of the training clock."""
    if (folder / name).exists():
        raise BadInput(f"{folder / name}: exists; remove it, or give another --dir")
    writer = package.Writer(str(folder / name))
    began = time.time()

    def log(point: TrackerPoint) -> None:
        for tag, value in point.values.items():
            writer.add_scalar(tag, value, step=point.step, wall_time=began + point.seconds)
        writer.flush()

    return Sink(log, writer.close)


def trackio_sink(package: ModuleType, folder: Path, name: str, config: dict[str, object]) -> Sink:
    """Open a run of Trackio, which has its folder from TRACKIO_DIR."""
    run = package.init(
        project=PROJECT, name=name, config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False
    )

    def log(point: TrackerPoint) -> None:
        run.log(point.values | {"seconds": point.seconds}, point.step)

    return Sink(log, run.finish)


def wandb_sink(package: ModuleType, folder: Path, name: str, config: dict[str, object]) -> Sink:
    """Open a run of Weights & Biases, offline unless WANDB_MODE says otherwise."""
    run = package.init(
        project=PROJECT,
        name=name,
        config=config,
        dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),
        reinit="create_new",
    )

    def log(point: TrackerPoint) -> None:
        run.log(point.values | {"seconds": point.seconds}, step=point.step)

    return Sink(log, run.finish)


class Tracker(NamedTuple):
    """A row of TRACKERS."""

    module: str
    install: str  # what pip installs
    sink: Callable[[ModuleType, Path, str, dict[str, object]], Sink]


TRACKERS = {
    "tensorboard": Tracker("tensorboard.summary", "tensorboard==2.21.0", tensorboard_sink),
    "trackio": Tracker("trackio", "trackio==0.43.0", trackio_sink),
    "wandb": Tracker("wandb", "wandb==0.31.0", wandb_sink),
}
ONE_AT_A_TIME = ("trackio",)  # beginning a run ends the one before


def load_package(name: str, folder: Path) -> ModuleType:
    """Import a tracker's package. Raises BadInput with the pip command if it is missing."""
    os.environ["TRACKIO_DIR"] = str(folder.absolute())  # trackio reads it when it is imported
    tracker = TRACKERS[name]
    try:
        return importlib.import_module(tracker.module)
    except ModuleNotFoundError as error:
        raise BadInput(
            f"--to {name} needs the package {error.name}: .venv/bin/pip install {tracker.install}"
        ) from None


# ---- logs ----------------------------------------------------------------------------------------


@dataclass
class Tracked:
    """A log, and how much of it the tracker has."""

    path: Path
    sink: Sink | None = None
    sent: set[tuple[int, str]] = field(default_factory=set)  # step and kind of each line
    is_over: bool = False  # no more is to come, and the sink is closed


def new_points(run: RunLog, sent: set[tuple[int, str]]) -> list[TrackerPoint]:
    """Return what a log tells beyond `sent`.

    sent: step and kind of the lines that are known; those returned are added.
    """
    found = []
    for line in run.steps:
        if (line.step, line.kind) in sent:
            continue
        sent.add((line.step, line.kind))
        values = {f"{line.kind}_loss": line.loss, "step_avg_ms": line.step_avg_ms}
        if line.bpb is not None:
            values[f"{line.kind}_bpb"] = line.bpb
        found.append(TrackerPoint(line.step, line.time_ms / 1000, values))
    return found


def final_point(run: RunLog) -> TrackerPoint:
    """Return the score and the size of a finished run."""
    keys = ("val_loss", "val_bpb", "bytes_total")
    values = {f"final_{key}": run.number("final_score", key) for key in keys if run.has("final_score", key)}
    return TrackerPoint(
        run.count("final_score", "steps"), run.number("final_score", "train_time") / 1000, values
    )


def send(tracked: Tracked, open_sink: Callable[[str, dict[str, object]], Sink], follow: bool) -> int:
    """Send what is new in a log, and close its run if no more is to come. Returns the lines sent."""
    run = parse_log(tracked.path)
    if tracked.sink is None:
        config = {key: config_value(value) for key, value in run.config.items()}
        tracked.sink = open_sink(tracked.path.stem, config)
    found = new_points(run, tracked.sent)
    if run.final_scores:
        found.append(final_point(run))
    for point in found:
        tracked.sink.log(point)
    if run.final_scores or not follow:
        tracked.sink.close()
        tracked.is_over = True
    return len(found)


def track(logs: list[Path], to: str, folder: Path, follow: bool) -> int:
    """Send logs to a tracker, once, or until each has its score if `follow`. Returns the exit status.

    Raises BadInput for a file that is no log, two logs of one name, or a package that is missing.
    """
    names = [log.stem for log in logs]
    if len(set(names)) < len(names):
        raise BadInput(
            f"two logs are called {max(names, key=names.count)}: send them to folders of their own"
        )
    for log in logs:
        parse_log(log)
    if follow and to in ONE_AT_A_TIME and len(logs) > 1:
        raise BadInput(f"--to {to} keeps one run open at a time: follow each log with a command of its own")

    open_sink = partial(TRACKERS[to].sink, load_package(to, folder), folder)
    folder.mkdir(parents=True, exist_ok=True)
    all_tracked = [Tracked(log) for log in logs]
    try:
        send_all(all_tracked, open_sink, follow)
    finally:
        for tracked in all_tracked:
            if tracked.sink is not None and not tracked.is_over:
                tracked.sink.close()
    return 0


def send_all(all_tracked: list[Tracked], open_sink: Callable, follow: bool) -> None:
    """Send what is new in the logs, again and again if `follow`. Prints a line when there was something."""
    while True:
        for tracked in all_tracked:
            if tracked.is_over:
                continue
            if lines := send(tracked, open_sink, follow):
                end = ", the end" if tracked.is_over else ""
                print(f"{tracked.path}: {lines} lines sent{end}", flush=True)
        if all(tracked.is_over for tracked in all_tracked):
            return
        time.sleep(POLL_SECONDS)
