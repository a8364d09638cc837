"""Reads how far a run has come, from its log alone, and whether anyone still writes it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from ledger.files import read_text
from ledger.read.runlog import SEPARATOR, RunLog, parse_log
from script import BadInput

LOCKS = Path("/proc/locks")  # of Linux: reading it asks nothing of the programs that hold them
QUIET_SECONDS = 900  # packing on a slow machine has been silent for 217 s, and a run elsewhere shows no lock
FAILURE = re.compile(r"^rank \d+: (?!another rank is gone)(.*)$", re.MULTILINE)


def locked_files() -> set[int]:
    """Return the inodes of locked files, if the system tells them. A trainer locks its log while it runs."""
    try:
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return set()
    places = [word for line in lines for word in line.split() if word.count(":") == 2]
    return {int(place.rpartition(":")[2]) for place in places}


def failure_of(text: str) -> str | None:
    """Return the reason for which the run of a log failed, None if it has told none since it last resumed."""
    lines = text.rpartition(f"\n{SEPARATOR}\n")[2].rpartition("\nresumed step:")[2]
    found = FAILURE.findall(lines)
    if not found:
        return None
    reason = found[0]
    if reason.startswith("Traceback"):
        after = lines.partition(reason)[2].splitlines()[1:]
        reason = next((line for line in after if line and not line.startswith(" ")), reason)
    return reason


@dataclass
class Followed:
    """A log that may still grow. `refresh` reads it; nothing of it is ever written or locked."""

    path: Path
    run: RunLog | None = None  # None: the log has no config yet
    end: str | None = None  # why no more is to come; None: more may
    is_scored: bool = False
    failure: str | None = None
    stamp: tuple[int, int] = (0, 0)  # time and size of what was read
    was_locked: bool = False

    def refresh(self) -> bool:
        """Read the log if it has changed, decide whether it has ended. Returns whether anything changed."""
        if self.end is not None:
            return False
        try:
            is_locked = self.path.stat().st_ino in locked_files()  # first: what is written last is read after
            found = self.path.stat()
        except OSError:
            self.end = "its log is gone"
            return True

        stamp = (found.st_mtime_ns, found.st_size)
        changed = stamp != self.stamp
        if changed:
            self.stamp = stamp
            self.read(is_locked)
        self.was_locked = self.was_locked or is_locked
        if self.is_scored or not is_locked:
            self.end = self.reason_to_end(time.time() - found.st_mtime)
        return changed or self.end is not None

    def read(self, is_locked: bool) -> None:
        """Read the log. Raises BadInput if it is no log, unless it is just beginning."""
        try:
            self.run = parse_log(self.path)
        except BadInput:
            if self.run is None and not is_locked:
                raise
            return  # a part of it is being written
        self.is_scored = self.run.final_scores > 0
        self.failure = failure_of(read_text(self.path))

    def reason_to_end(self, seconds: float) -> str | None:
        """Return why no more is to come, None if more may. seconds: since the log last grew."""
        if self.is_scored:
            return "scored"
        if self.failure is not None:
            return f"failed: {self.failure}"
        if self.was_locked:
            return "stopped without a score"
        if seconds > QUIET_SECONDS:
            return f"stopped without a score: no line for {seconds / 60:.0f} minutes"
        return None


# ---- figures -------------------------------------------------------------------------------------


def setting(run: RunLog, key: str) -> float:
    """Return a setting as a number, 0 if the run has no such setting or it is none."""
    try:
        return float(run.config.get(key, "0"))
    except ValueError:
        return 0.0


def fraction_done(run: RunLog) -> float:
    """Return how much of the training is done, by the clock or by steps, whichever ends first."""
    if run.stopped or run.final_scores:
        return 1.0
    if not run.steps:
        return 0.0
    last = run.steps[-1]
    by_steps = last.step / max(last.total, 1)
    limit = setting(run, "max_wallclock_seconds")
    by_clock = last.time_ms / 1000 / limit if limit else 0.0
    return min(1.0, max(by_steps, by_clock))


def seconds_left(run: RunLog) -> float | None:
    """Return the seconds of training that are left at the pace so far, None before it can be told."""
    fraction = fraction_done(run)
    if not run.steps or not fraction:
        return None
    return run.steps[-1].time_ms / 1000 * (1 - fraction) / fraction
