"""Signals and child processes: no program of the repository leaves one running. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from script import ROOT


@contextmanager
def sigterm_reaches(child: subprocess.Popen) -> Iterator[None]:
    """Pass SIGTERM on to a child while the block waits for its end, then end this process, too.

    Raises SystemExit with the shell's status after the block if the signal came. Ctrl-C needs no help: the
    terminal sends it to both. In a thread that is not the main one it does nothing: Python handles signals in
    the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:
        raise SystemExit(128 + came[0])


def output_of(
    command: list[str], seconds: float | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """Run a program to its end and return its status and stdout, as text. SIGTERM ends both.

    options: of Popen. If it takes more than this many seconds, it is killed, and TimeoutExpired is raised.
    """
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as child,
        sigterm_reaches(child),
    ):
        try:
            printed, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, printed, errors)


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment in which `python -m lab.MODULE` runs from any folder."""
    paths = [str(ROOT / "tools"), str(ROOT)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    # PYTHONSAFEPATH: from Python 3.11 on, -m then ignores modules in the working folder.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", **changes}


def unwind_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit from now on, so that `finally` and `with` end what was started."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, unwind)
