"""Measure whether training leaks memory.

    PYTHONPATH=. python tests/stress/soak.py [SECONDS] [MIB_PER_HOUR]

Trains on the CPU for SECONDS (600), with checkpoints and validations, and samples the process's resident
memory. Prints the slope of a least-squares line through all samples after the first third. Exit status 1 if
the slope is above MIB_PER_HOUR (100), or if the run does not end well when SIGTERM stops it.

Allocators settle late, so a run of minutes says little: the shorter it is, the more MiB per hour a single MiB
makes.
"""

import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

from tests.helpers import temporary_folder
from tests.stress.kill_runs import began, ended, start, wait_until


class Sample(NamedTuple):
    """Resident memory of a process at a time since the first step."""

    seconds: float
    mib: float


def resident(pid):
    """Return the resident memory of a process in MiB; None if it has just ended."""
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    kib = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return int(kib) / 1024 if kib else None


def slope(samples):
    """Return the slope of the Samples after the first third, in MiB per hour."""
    seconds, mib = np.array(samples[len(samples) // 3 :]).T
    return 3600 * np.polyfit(seconds - seconds[0], mib, 1)[0]


def sample_memory(process, seconds):
    """Return Samples of a running process, taken until `seconds` have passed or it has ended."""
    samples = []
    start_time = time.monotonic()
    while process.exitcode is None and time.monotonic() - start_time < seconds:
        mib = resident(process.pid)
        if mib:
            samples.append(Sample(time.monotonic() - start_time, mib))
        process.join(min(5, seconds / 30))
    return samples


def steps_of(log):
    """Return the number of steps in the last final_score line of a log, as text."""
    score = next(line for line in reversed(log) if line.startswith("final_score "))
    return score.split(" steps:")[1].split()[0]


def soak(seconds, bound, fault=None):
    """Train for `seconds` and return the exit status: 0 if memory grows by at most `bound` MiB per hour.

    fault(rank), if given, is called in the trainer's process first, to break something there.
    """
    folder = temporary_folder() / "run"
    knobs = {
        "iterations": 10**9,
        "max_wallclock_seconds": 0,
        "checkpoint_every": 1,
        "val_loss_every": 500,
        "resume": "",
    }
    (process,) = start(folder, fault=fault, **knobs)
    has_begun = wait_until(lambda: began(folder, 0) or process.exitcode is not None)
    samples = sample_memory(process, seconds) if has_begun else []

    is_alive = has_begun and process.exitcode is None
    if is_alive:
        process.terminate()
    (status,) = ended([process])
    log = (folder / "run.txt").read_text(encoding="utf-8").splitlines()
    if not is_alive or status != 0:
        print(f"the run ended with status {status}: {log[-1]}")
        return 1

    growth = slope(samples)
    print(
        f"{steps_of(log)} steps in {seconds:g} s, {len(samples)} samples, "
        f"resident {samples[0].mib:.0f} to {samples[-1].mib:.0f} MiB, "
        f"{growth:+.1f} MiB/hour after the first third, bound {bound:g}"
    )
    return 1 if growth > bound else 0


def main(argv):
    """Run the command and return its exit status."""
    defaults = ("600", "100")
    seconds, bound = (float(value) for value in [*argv, *defaults[len(argv) :]])
    return soak(seconds, bound)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
