"""Kill runs at random moments and resume them.

    PYTHONPATH=. python tests/stress/kill_runs.py [KILLS] [DEATHS] [SEED]

First, runs on one process: each is killed by SIGKILL, started again with resume=auto, and so on, until it may
end; KILLS kills in all. Then runs on two ranks, without torchrun, of which one is killed; DEATHS kills in
all.

The claim: every run ends with the state of an undisturbed one, bit for bit, and the rank that was not killed
ends within SECONDS with a status other than 0. Prints a table of faults and outcomes. Exit status 1 if the
claim fails.
"""

import collections
import json
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt as t
from tests.helpers import PACKED, english_args, packed_once, share_packed_code, temporary_folder
from tests.rank_cases import LOOPBACK_INTERFACE, fork_server, group_environment

SECONDS = 60
STEPS = 150
VIOLATION = "VIOLATION"  # the first word of an outcome that breaks the claim


# ---------------------------------------------------------------- the trainer's processes


def entry(main, argv, env, console, fault, packed):
    """Run one rank in a process of its own: set its environment and console, call the fault, then main.

    packed: the PACKED of the process that starts it.
    """
    os.environ.update(env)
    share_packed_code(packed)
    torch.set_num_threads(1)
    file = os.open(console, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)  # stdout
    os.dup2(file, 2)  # stderr
    if fault is not None:
        fault(int(env.get("RANK", 0)))
    status = main(argv)
    sys.stdout.flush()
    sys.exit(status)


def start(folder, world=1, fault=None, **knobs):
    """Start the trainer without torchrun and return its processes, rank by rank.

    fault(rank), if given, is called in each process first, to break something there.
    """
    run_knobs = {
        "out_dir": folder,
        "iterations": STEPS,
        "checkpoint_every": 0.05,
        "train_log_every": 10,
        "resume": "auto",
        **knobs,
    }
    return start_ranks(folder, english_args(**run_knobs), world, fault)


def start_ranks(folder, argv, world=1, fault=None, main=t.main):
    """Start main(argv), a command of the trainer, on `world` ranks. Returns their processes, as `start`."""
    folder.mkdir(exist_ok=True)
    env = group_environment(world) if world > 1 else {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE}

    packed_once(t.own_source())  # PACKED has it from now on
    context = fork_server()
    processes = []
    for rank in range(world):
        rank_env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else env
        console = str(folder / f"console.{rank}")
        args = (main, argv, rank_env, console, fault, PACKED)
        process = context.Process(target=entry, args=args, daemon=True)
        process.start()
        processes.append(process)
    return processes


def wait_until(condition, seconds=SECONDS):
    """Wait for condition() and return whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def ended(processes, seconds=SECONDS):
    """Wait for processes to end and return their exit statuses; None for one that had to be killed."""
    wait_until(lambda: all(process.exitcode is not None for process in processes), seconds)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()
    return statuses


# ---------------------------------------------------------------- what a run leaves


def log_lines(folder):
    """Return the run lines of the log so far, which follow the script and the machine; [] without them."""
    path = Path(folder) / "run.txt"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    separator = "=" * 100
    if text.count(f"\n{separator}") < 2:
        return []
    return text.rsplit(f"{separator}\n", 1)[-1].splitlines()


def console_tail(folder, chars):
    """Return the end of what rank 0 printed."""
    return (Path(folder) / "console.0").read_text()[-chars:]


def began(folder, earlier):
    """Return whether the log reports a training step after its first `earlier` run lines."""
    return any(re.match(r"step:\d+/\d+ train_loss", line) for line in log_lines(folder)[earlier:])


def final_state(folder, world=1, step=None, name="run"):
    """Return {name: whole tensor} of the checkpoint at the last step, or at `step`; None if there is none."""
    parts = []
    for rank in range(world):
        path = Path(folder) / f"{name}.step{step or STEPS}.{rank}of{world}.ckpt"
        if not path.exists():
            return None
        blob = path.read_bytes()
        header_end = 4 + int.from_bytes(blob[:4], "little")
        parts.append(t.read_tensors(json.loads(blob[4:header_end]), blob[header_end:-32]))

    names = set().union(*parts)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def same(a, b):
    """Return whether two states exist and are equal, bit for bit."""
    if not a or not b or set(a) != set(b):
        return False
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# ---------------------------------------------------------------- kills


class KilledRun(NamedTuple):
    """A run that was killed and resumed. outcomes: one for each kill. end: the outcome of the run.

    resumed: how often it resumed from a checkpoint after a step.
    """

    outcomes: list[str]
    end: str
    resumed: int


def undisturbed(world):
    """Return the final state of a run that nobody kills."""
    folder = temporary_folder() / "reference"
    statuses = ended(start(folder, world))
    assert statuses == [0] * world, console_tail(folder, 2000)
    return final_state(folder, world)


def killed_run(reference, kills, world, rng):
    """Kill a run `kills` times, resume it each time, then let it end. Returns a KilledRun.

    reference: the state that the run must end with.
    """
    folder = temporary_folder() / "run"
    outcomes = [kill_once(folder, world, rng) for _ in range(kills)]

    statuses = ended(start(folder, world))
    if statuses == [0] * world and same(final_state(folder, world), reference):
        end = "bit-equal"
    else:
        end = f"{VIOLATION}: {statuses} {console_tail(folder, 300)}"
    resumed = sum(bool(re.match(r"resumed step:[1-9]", line)) for line in log_lines(folder))
    return KilledRun(outcomes, end, resumed)


def kill_once(folder, world, rng):
    """Start or resume a run, kill a rank within 0.6 s of its first step and return the outcome."""
    earlier = len(log_lines(folder))
    processes = start(folder, world)
    wait_until(lambda: began(folder, earlier) or processes[0].exitcode is not None)
    time.sleep(rng.uniform(0, 0.6))

    victim = rng.choice(processes)
    was_alive = victim.exitcode is None
    killed_at = time.monotonic()
    victim.kill()
    statuses = ended(processes)
    took = time.monotonic() - killed_at
    others = [status for process, status in zip(processes, statuses) if process is not victim]

    if not was_alive:
        return "after its end"
    if any(status in (None, 0) for status in others):
        return f"{VIOLATION}: others {others}"
    if world == 1:
        return "as claimed"
    bound = next((seconds for seconds in (1, 10) if took < seconds), SECONDS)
    return f"as claimed, others gone in {bound} s"


# ---------------------------------------------------------------- the command


class Fault(NamedTuple):
    """A kind of kill: of one of `world` ranks, `count` in all, at most `per_run` in one run."""

    name: str
    world: int
    count: int
    per_run: int


def inflict(fault, rng, table):
    """Do all kills of a Fault, count their outcomes in `table` and return how often runs resumed."""
    reference = undisturbed(fault.world)
    done = 0
    resumed = 0
    while done < fault.count:
        kills = min(fault.per_run, fault.count - done)
        run = killed_run(reference, kills, fault.world, rng)
        done += kills
        resumed += run.resumed
        table.update((fault.name, outcome) for outcome in run.outcomes)
        table[f"run after {fault.name}", run.end] += 1
        if sys.stderr.isatty():
            print(f"\r\033[K{fault.name}: {done} of {fault.count}", end="", file=sys.stderr, flush=True)
    return resumed


def main(argv):
    """Run the command and return its exit status."""
    defaults = ("100", "20", "0")
    kills, deaths, seed = (int(value) for value in [*argv, *defaults[len(argv) :]])
    faults = (
        Fault("SIGKILL", world=1, count=kills, per_run=5),
        Fault("death of a rank", world=2, count=deaths, per_run=2),
    )
    start_time = time.perf_counter()
    rng = random.Random(seed)
    table = collections.Counter()
    resumed = sum(inflict(fault, rng, table) for fault in faults)

    print(f"\n{'fault':<28} {'outcome':<44} {'count':>5}")
    for (fault, outcome), count in sorted(table.items()):
        print(f"{fault:<28} {outcome:<44} {count:>5}")
    violations = sum(count for (_, outcome), count in table.items() if outcome.startswith(VIOLATION))
    seconds = time.perf_counter() - start_time
    print(f"{resumed} resumed from a checkpoint; {seconds:.0f} s, seed {seed}; {violations} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
