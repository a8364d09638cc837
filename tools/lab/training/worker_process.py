"""A worker process of a sweep, seen from the sweep: started, asked, and what it printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from children import child_environment
from ledger.files import read_text

CONSOLE_WIDTH = 160  # characters of a dead worker's last line that are shown


class Answer(NamedTuple):
    """A worker's answer to a request."""

    kind: str = ""  # what device it opened
    refused: str | None = None  # why it did not do what was asked


class WorkerProcess:
    """The process of worker.py on one device. After one has died, `start` starts another.

    folder: the sweep's. index: the device's place among those that the sweep may use. workers: how many
    processes share this machine.
    """

    def __init__(self, folder: Path, index: int, workers: int) -> None:
        self.folder = folder
        self.index = index
        self.workers = workers
        self.process: subprocess.Popen | None = None

    @property
    def console_file(self) -> Path:
        """The file that holds what the worker prints."""
        return self.folder / ".work" / f"worker{self.index}.txt"

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start a process."""
        allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        device = allowed[self.index % len(allowed)] if allowed else str(self.index)
        env = child_environment(CUDA_VISIBLE_DEVICES=device)
        if self.workers > 1:
            threads = max(1, (os.cpu_count() or 1) // self.workers)
            env.setdefault("OMP_NUM_THREADS", str(threads))
        with open(self.console_file, "a") as console:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lab.training.worker", str(self.folder)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=console,
                text=True,
                bufsize=1,
            )

    def ask(self, request: dict) -> Answer | None:
        """Return the answer to a request of worker.py; None: the worker died instead."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            return None
        return Answer(answer.get("kind", ""), answer.get("refused"))

    def last_words(self) -> str:
        """Return the last line that the worker printed."""
        for line in reversed(read_text(self.console_file).split("\n")):
            if line.strip():
                return line.strip()[:CONSOLE_WIDTH]
        return "it printed nothing"

    def wait(self) -> int:
        """Wait for the end of a process that died, and return its exit status."""
        return self.process.wait()

    def kill(self) -> None:
        """End the process, if there is one, at once."""
        if self.is_alive:
            self.process.kill()

    def finish(self) -> None:
        """Let the process end, if there is one: it gets no more requests."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
