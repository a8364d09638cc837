"""Says how far long work is and when it ends: live on a terminal, else a line every 15 s. On stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from script import on_one_line

TICK_SECONDS = 1.0  # between two live lines on a terminal, and before the first
LINE_SECONDS = 15.0  # between two lines elsewhere, and before the first
ERASE = "\r\x1b[K"  # the live line

Item = TypeVar("Item")


def has_live_line() -> bool:
    """Return whether stderr is a terminal that can rewrite a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Return the columns of the terminal that stderr is, 80 if it does not say; stdout may be a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def show_live(text: str) -> None:
    """Replace the live line of the terminal."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(ERASE + text[: terminal_width() - 1], end="", file=sys.stderr, flush=True)


def write_line(text: str) -> None:
    """Write a line on stderr."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Tells from a thread how far the running work is: one piece of it may take minutes.

    Work has stages, each of a number of scores, folders, documents, ... that are to be done.
    """

    def __init__(
        self,
        work: str,
        live: Callable[[str], None] = show_live,
        line: Callable[[str], None] = write_line,
        speaks: bool = True,
    ) -> None:
        """work: what is being done. live: shows a text in place of the one before. line: writes a line.

        speaks: whether anything is told, as on rank 0 alone.
        """
        self.show = live
        self.line = line
        self.speaks = speaks
        self.lock = threading.Lock()  # held while a line is written
        self.shown = False  # whether a live line stands on the terminal
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.tell_all, daemon=True)
        self.begin(work)

    def begin(self, work: str) -> None:
        """Begin some work, of which no stage is known yet."""
        self.work = on_one_line(work)  # it may name a file
        self.started = time.perf_counter()
        self.expect(0, "")

    def expect(self, total: int, unit: str, guess: float = 0.0) -> None:
        """Begin a stage of this many units. guess: the seconds it may take, told until one is done."""
        self.unit = unit
        self.total = total
        self.guess = guess
        self.done = 0
        self.stage_started = self.advanced = time.perf_counter()  # advanced: when the last unit was done

    def advance(self, count: int = 1, left: int | None = None) -> None:
        """Count units that are done. left: how many are to come, where that may have changed."""
        if left is not None:
            self.total = self.done + count + left
        self.done = min(self.done + count, self.total)
        self.advanced = time.perf_counter()

    def each(self, items: Iterable[Item], unit: str) -> Iterator[Item]:
        """Yield the items of a stage, and count each as done when the next is asked for."""
        items = list(items)
        self.expect(len(items), unit)
        for item in items:
            yield item
            self.advance()

    def text(self) -> str:
        """Return the line about this moment."""
        now = time.perf_counter()
        done = self.done  # read once: the next stage may begin meanwhile
        line = f"{self.work}: {now - self.started:.0f} s"
        if self.total:
            line += f", {done}/{self.total} {self.unit}"
        left = self.guess
        if done:
            left = (self.advanced - self.stage_started) / done * (self.total - done)
        if done or self.guess:
            line += f", ETA {max(0.0, left - (now - self.advanced)):.0f} s"
        return line

    def tell_all(self) -> None:
        """Thread body: report progress until the work ends."""
        told = 0.0
        while not self.ended.wait(TICK_SECONDS):
            with self.lock:
                if self.ended.is_set():
                    return
                if has_live_line():
                    self.show(self.text())
                    self.shown = True
                elif time.perf_counter() - max(told, self.started) >= LINE_SECONDS:
                    told = time.perf_counter()
                    self.line(self.text())

    def print(self, text: str = "") -> None:
        """Print a line of the result on stdout, where the live line stood."""
        with self.lock:
            self.erase()
            print(text, flush=True)

    def erase(self) -> None:
        """Take the live line off the terminal."""
        if self.shown:
            self.show("")
            self.shown = False

    def __enter__(self) -> Progress:
        if self.speaks:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        if self.speaks:
            self.thread.join()
        self.erase()
