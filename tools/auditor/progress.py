"""Says how far a test of the auditor is, and when it ends."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from auditor.protocols import Log

TICK_SECONDS = 1.0  # between two live lines on a terminal
LINE_SECONDS = 15.0  # between two lines elsewhere


class Progress:
    """Tells how far the running test is, from a thread: one pass of a large model may take minutes.

    A test works in stages, each of a number of scores, passes, documents, ... that are to be done.
    """

    def __init__(self, log: Log) -> None:
        self.log = log  # of the script
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.tell_all, daemon=True)
        self.begin("")

    def begin(self, test: str) -> None:
        """Begin a test, of which no stage is known yet."""
        self.test = test
        self.started = time.perf_counter()
        self.expect(0, "")

    def expect(self, total: int, unit: str) -> None:
        """Begin a stage of this many units."""
        self.unit = unit
        self.total = total
        self.done = 0
        self.stage_started = time.perf_counter()

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""
        self.done = min(self.done + count, self.total)

    def text(self) -> str:
        """Return the line about this moment."""
        now = time.perf_counter()
        line = f"auditing {self.test}: {now - self.started:.0f} s"
        if self.total:
            line += f", {self.done}/{self.total} {self.unit}"
        if self.done:
            eta = (now - self.stage_started) / self.done * (self.total - self.done)
            line += f", ETA {eta:.0f} s"
        return line

    def tell_all(self) -> None:
        """Thread body: report progress until the audit ends."""
        told = 0.0
        while not self.ended.wait(TICK_SECONDS):
            if sys.stderr.isatty():
                self.log.status(self.text())
            elif time.perf_counter() - max(told, self.started) >= LINE_SECONDS:
                told = time.perf_counter()
                self.log(self.text())

    def __enter__(self) -> Progress:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()
