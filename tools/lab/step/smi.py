"""Reads one GPU's clock, power and throttling reasons with nvidia-smi while something else runs."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from threading import Thread
from typing import NamedTuple

import torch

from lab.shared.timing import median
from lab.shared.trainer import Session

SAMPLE_MS = 200  # between two readings
GRACE = 2.0  # seconds nvidia-smi has to end when asked to
REASONS = {  # why a clock is below its highest: NVML's nvmlClocksEventReason bits
    0x1: "idle", 0x2: "application clocks", 0x4: "SW power cap", 0x8: "HW slowdown", 0x10: "sync boost",
    0x20: "SW thermal slowdown", 0x40: "HW thermal slowdown", 0x80: "HW power brake", 0x100: "display clocks",
}  # fmt: skip


def gpu_of(s: Session) -> str | None:
    """Return nvidia-smi's name of this process's GPU, which CUDA_VISIBLE_DEVICES does not renumber."""
    if not s.cuda:
        return None
    uuid = getattr(torch.cuda.get_device_properties(s.m.device), "uuid", None)
    return f"GPU-{str(uuid).removeprefix('GPU-')}" if uuid else None


class Reading(NamedTuple):
    """A line of nvidia-smi. at: perf_counter(); power_w: nan if not available; reasons: bits of REASONS."""

    at: float
    sm_mhz: float
    power_w: float
    reasons: int


def parse_reading(line: str) -> Reading:
    """Parse a line of nvidia-smi. Raises ValueError if it is anything else, such as an error message."""
    clock, power, reasons = (field.strip() for field in line.split(","))
    watts = math.nan if power.startswith("[") else float(power)
    return Reading(time.perf_counter(), float(clock), watts, int(reasons, 16))


class Sampler:
    """`with Sampler(gpu) as sampler`: nvidia-smi reads that GPU until the block ends, however it ends.

    It sets nothing on the GPU. If this process is killed, nvidia-smi's next line finds the pipe closed and
    nvidia-smi ends.
    """

    def __init__(self, gpu: str | None) -> None:
        self.samples: list[Reading] = []
        self.process: subprocess.Popen | None = None
        self.why = None if gpu else "no NVIDIA GPU"  # there are no readings
        self.command = [
            "nvidia-smi",
            f"--id={gpu}",
            "-lms",
            f"{SAMPLE_MS}",
            "--format=csv,noheader,nounits",
            "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active",
        ]

    def __enter__(self) -> Sampler:
        if self.why is not None:
            return self
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # a group of its own, for whatever it may start
            )
        except OSError as error:
            self.why = f"nvidia-smi: {error.strerror}"
            return self
        self.reader = Thread(target=self.read, daemon=True)
        self.reader.start()
        return self

    def read(self) -> None:
        """Collect readings until nvidia-smi ends."""
        for line in self.process.stdout:
            try:
                self.samples.append(parse_reading(line))
            except ValueError:
                if line.strip():
                    self.why = f"nvidia-smi: {line.strip()}"

    def __exit__(self, *_: object) -> None:
        if self.process is None:
            return
        status = self.process.poll()
        if status and self.why is None:
            self.why = f"nvidia-smi: status {status}"

        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError):  # the group is gone
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
                break
        self.reader.join(GRACE)

    def summary(self, since: float) -> dict:
        """Return a summary of the readings since this perf_counter(), or {why} there are none.

        The summary has {samples, sm_mhz and power_w: medians, sm_mhz_range, reasons: {name: number of
        samples}}
        """
        found = [reading for reading in self.samples if reading.at >= since]
        if not found:
            return dict(why=self.why or "nvidia-smi gave no reading in time")

        clocks = [reading.sm_mhz for reading in found]
        powers = [reading.power_w for reading in found if not math.isnan(reading.power_w)]
        counts = {name: sum(1 for reading in found if reading.reasons & bit) for bit, name in REASONS.items()}
        return dict(
            samples=len(found),
            sm_mhz=median(clocks),
            sm_mhz_range=[min(clocks), max(clocks)],
            power_w=median(powers) if powers else None,
            reasons={name: count for name, count in counts.items() if count},
        )
