"""What run.sh chooses for this machine: a preset and the number of processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from commands.words import knob_value


class MachineDefaults(NamedTuple):
    """Preset and processes of a machine with at least `gpus` NVIDIA GPUs, unless told otherwise."""

    gpus: int
    preset: str
    processes: int


# A preset fixes tokens a step and seconds; fewer processes accumulate more micro-batches for the same step.
MACHINES = (
    MachineDefaults(8, "record", 8),
    MachineDefaults(4, "record", 4),
    MachineDefaults(2, "h100x2", 2),
    MachineDefaults(1, "h100x1", 1),
    MachineDefaults(0, "cpu", 1),
)
PROCESS_COUNTS = (8, 4, 2, 1)


def count_gpus() -> int:
    """Return how many NVIDIA GPUs torch will see, asking nvidia-smi and CUDA_VISIBLE_DEVICES."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return 0
    count = 0
    if found.returncode == 0:
        count = sum(line.startswith("GPU ") for line in found.stdout.splitlines())

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    if visible.startswith("-1"):
        return 0
    return min(count, sum(bool(name) for name in visible.split(",")))


def machine_preset(gpus: int) -> str:
    """Return the preset of a machine with this many GPUs."""
    return next(machine.preset for machine in MACHINES if gpus >= machine.gpus)


def choose_processes(gpus: int, process_counts: Sequence[int]) -> int | None:
    """Return how many processes torchrun should start, or None for one plain process without a GPU.

    process_counts: those that can share the work. NPROC, if set, is taken as it is.
    """
    nproc = int(os.environ.get("NPROC") or 0)
    if gpus == 0 and nproc <= 1:
        return None
    return nproc or max((count for count in process_counts if count <= gpus), default=1)


def with_preset(knobs: tuple[str, ...], gpus: int) -> list[str]:
    """Return the knobs with this machine's preset first, unless one is given."""
    if knob_value("preset", knobs):
        return list(knobs)
    return [f"preset={machine_preset(gpus)}", *knobs]
