"""Starts the programs of the repository: in this terminal, on one process or several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from script import ROOT

STARTED = time.monotonic() - int(os.environ.pop("RUN_SH_SECONDS", "0"))  # when run.sh started, for the notes
TOOLS = ROOT / "tools"


def say(text: str) -> None:
    """Print a note on stderr, with the seconds since the start."""
    print(f"[run.sh {time.monotonic() - STARTED:.0f}s] {text}", file=sys.stderr, flush=True)


def run(program: list[str]) -> int:
    """Run a Python program in this terminal and return its exit status, 128 + N if signal N ended it.

    The program keeps the terminal as its own, with no pipe in between, so that its status line stays live.
    Ctrl-C reaches it from the terminal; it decides how to end while this process waits. SIGTERM is passed on,
    and so is SIGHUP of a terminal that is closed, unless the caller has it ignored, as nohup does.
    """
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None)}
    child = subprocess.Popen([sys.executable, *program])
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, frame: child.send_signal(number))
    status = child.wait()

    for number, handler in before.items():
        signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def launch(processes: int | None, program: list[str]) -> int:
    """Run a program of the repository on several processes, or as plain python if None."""
    if processes is not None:
        program = ["tools/ranks.py", str(processes), *program]
    say("running: " + " ".join([sys.executable, *program]))
    return run(program)


def add_tools_to_path() -> None:
    """Let `python -m lab.X` and `python -m ledger.X` find their packages, and not the caller's."""
    paths = [str(TOOLS), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["PYTHONSAFEPATH"] = "1"  # from Python 3.11 on, -m then ignores modules in the working folder
