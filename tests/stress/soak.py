"""Does training leak? python tests/soak.py [SECONDS] [MIB_PER_HOUR]

Trains on the CPU for SECONDS, with checkpoints and validations, and asks for the process's resident memory all the
while. Prints the slope of the least-squares line behind the first third; exit status 1 when it is above MIB_PER_HOUR
(100), or when the run, which a SIGTERM ends, does not end well. Allocators settle late: a run of minutes says little,
and the shorter it is the more MiB per hour a single MiB makes.
"""

import subprocess
import sys
import time

import numpy as np

from helpers import temporary_folder
from kill_runs import began, ended, start, wait_until


def resident(pid):
    """Resident memory of a process in MiB; None when it has just ended."""
    text = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return int(text) / 1024 if text else None


def slope(samples):
    """MiB per hour of [(seconds, MiB), ...] behind the first third."""
    seconds, mib = np.array(samples[len(samples) // 3 :]).T
    return 3600 * np.polyfit(seconds - seconds[0], mib, 1)[0]


def soak(seconds, bound, fault=None):
    """The exit status. fault(rank) breaks something in the trainer first."""
    folder, samples = temporary_folder() / "run", []
    knobs = dict(iterations=10**9, max_wallclock_seconds=0, checkpoint_every=1, val_loss_every=500, resume="")
    (process,) = start(folder, fault=fault, **knobs)
    alive = wait_until(lambda: began(folder, 0) or process.exitcode is not None) and process.exitcode is None
    began_at = time.monotonic()
    while alive and time.monotonic() - began_at < seconds:
        if mib := resident(process.pid):
            samples.append((time.monotonic() - began_at, mib))
        process.join(min(5, seconds / 30))
        alive = process.exitcode is None
    if alive:
        process.terminate()
    statuses, log = ended([process]), (folder / "run.txt").read_text(encoding="utf-8").splitlines()
    if not alive or statuses != [0]:
        print(f"the run ended with status {statuses[0]}: {log[-1]}")
        return 1
    grown, steps = slope(samples), next(x for x in reversed(log) if x.startswith("final_score ")).split(" steps:")[1].split()[0]
    print(f"{steps} steps in {seconds:g} s, {len(samples)} samples, resident {samples[0][1]:.0f} to {samples[-1][1]:.0f} MiB, "
          f"{grown:+.1f} MiB/hour behind the first third, bound {bound:g}")  # fmt: skip
    return int(grown > bound)


if __name__ == "__main__":
    sys.exit(soak(*(float(a) for a in [*sys.argv[1:], *("600", "100")[len(sys.argv) - 1 :]])))
