"""Messages of the commands of data/: errors of one line, short forms of sizes, progress with an ETA.

data/ imports nothing of tools/, and tools/ nothing of data/: each runs as programs that find only the modules
beside them, and data/ works without the rest of the repository. So BadInput and guard_console stand here and
in tools/script.py; tests/data/test_data_style.py holds that the two guards are the same.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import TextIO

TICK_SECONDS = 1.0  # between two live lines about a library that tells nothing
LINE_SECONDS = 15.0  # between two lines where no terminal shows a live one
LARGEST = 1 << 28  # bytes of a manifest or a tokenizer


class BadInput(Exception):
    """An error the user can fix. The message is the one line that the user sees: file, problem, remedy."""

    status = 2


def one_line(message: object) -> str:
    """Return a message on one line. Line breaks and control characters are shown escaped."""
    line = "\\n".join(str(message).splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def guard_console() -> None:
    """Make the console safe to print on: a closed stream prints nowhere, an odd character is escaped."""
    # Open descriptors 0 to 2 where they are closed, or the next file would get the number of a console.
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may not fit an ASCII terminal


def answer(line: str) -> None:
    """Print a result on stdout. Raises BadInput if that fails, and prints no more there."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's last flush fails
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            return
        raise BadInput(f"standard output: {error.strerror.lower()}; send it elsewhere") from None


def say(line: str) -> None:
    """Print one line on stderr. stdout is for results that scripts read."""
    print(line, file=sys.stderr, flush=True)


def explain(error: OSError, path: str | Path | None = None) -> str:
    """Return an OSError and its remedy as one line. `path` names the file if the error does not."""
    name = path or error.filename or "file"
    reason = (error.strerror or str(error)).lower()
    remedies = {
        errno.ENOSPC: "free some space or choose an --out on a larger disk",
        errno.EDQUOT: "free some of your quota or choose another --out",
        errno.EFBIG: "choose an --out on another file system, or fewer --shard-tokens",
        errno.ENOENT: "check the path",
        errno.EISDIR: "give a file, not a folder",
    }
    remedy = remedies.get(error.errno, "check its permissions or choose another path")
    return f"{name}: {reason}; {remedy}"


def require_file(path: str | Path) -> None:
    """Raise BadInput if there is something else than a file at `path`: reading a pipe might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInput(f"{path}: not a file; give a file, not a folder or a pipe")


def read_whole(path: str | Path) -> bytes:
    """Return the bytes of a manifest or a tokenizer. Raises OSError or, for no file, BadInput."""
    require_file(path)
    with open(path, "rb") as file:
        blob = file.read(LARGEST + 1)
    if len(blob) > LARGEST:
        raise BadInput(f"{path}: more than {LARGEST} bytes, which is not what it should be; make it again")
    return blob


def is_panic(error: BaseException) -> bool:
    """Return whether an exception is a panic of a Rust library: no Exception, but no request to stop."""
    return not isinstance(error, (Exception, KeyboardInterrupt, SystemExit, GeneratorExit))


def describe(error: BaseException) -> str:
    """Return the class of an exception and the beginning of its first line."""
    reason = str(error).split("\n")[0][:100]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def require(module: str) -> ModuleType:
    """Import and return a third-party module that only some verbs need. Raises BadInput if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"Python package {module} is missing ({error}); run: pip install -r requirements.txt"
        ) from None


def megabytes(count: int) -> str:
    """Format a number of bytes as decimal megabytes."""
    return f"{count / 1e6:.1f} MB"


def short(count: float) -> str:
    """Format a count with a decimal prefix, such as 37.2M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{suffix}"
    return str(int(count))


class Progress:
    """Report progress on stderr: one line rewritten in place on a terminal, elsewhere a line every 15 s.

    label: what is being done. total: the final value of `done`, in units of `unit`; 0 if unknown.
    """

    def __init__(self, label: str, total: int, unit: str = "B", stream: TextIO | None = None) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.start = self.last = time.perf_counter()
        self.done = 0

    def advance(self, count: int = 1) -> None:
        """Show that `count` more units are complete."""
        self.done += count
        self.update(self.done)

    def update(self, done: int) -> None:
        """Show that `done` units are complete; at most every 0.2 s on a terminal, else every 15 s."""
        now = time.perf_counter()
        interval = 0.2 if self.live else LINE_SECONDS
        if now - self.last < interval or not done:
            return

        self.last = now
        elapsed = now - self.start
        text = f"{self.label}: {short(done)}{self.unit} {short(done / elapsed)}{self.unit}/s"
        if self.total:
            percent = min(100 * done / self.total, 100)
            remaining = int(elapsed * max(self.total - done, 0) / done)
            text += f" {percent:.0f} % ETA {remaining // 60}:{remaining % 60:02d}"
        self._write(text, end="" if self.live else "\n")

    def close(self, summary: str) -> None:
        """Print the closing line: the label, `summary` and the elapsed time."""
        elapsed = time.perf_counter() - self.start
        self._write(f"{self.label}: {summary}, {elapsed:.1f} s", end="\n")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Tell the seconds, from a thread, while a library works that does not say how far it is."""
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(TICK_SECONDS if self.live else LINE_SECONDS):
                seconds = time.perf_counter() - self.start
                self._write(f"{self.label}: {seconds:.0f} s", end="" if self.live else "\n")

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def erase(self) -> None:
        """Take the live line off the terminal."""
        if self.live:
            self._write("", end="")

    def _write(self, text: str, end: str) -> None:
        """Write a line; on a terminal, over the line before."""
        if self.live:
            text = "\r\x1b[K" + (text if end else text[: self._width() - 1])  # a live line must not wrap
        with contextlib.suppress(OSError):  # the terminal, or the reader of a pipe, may be gone
            self.stream.write(f"{text}{end}")
            self.stream.flush()

    def _width(self) -> int:
        """Return the columns of the terminal, 80 if it does not say."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except OSError:
            return 80
