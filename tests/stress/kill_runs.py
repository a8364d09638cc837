"""Runs that are killed and resumed: python tests/kill_runs.py [KILLS] [DEATHS] [SEED]

SIGKILL at random moments of a run on one process, then the same command with resume=auto, until the run ends;
then another run, KILLS in all. SIGKILL of one of two ranks, started without torchrun, DEATHS times. The claim:
every run ends with the state of an undisturbed one, bit for bit; the other rank is gone within SECONDS, status
not 0. Prints fault x outcome; exit status 1 when the claim fails.
"""

import collections
import json
import multiprocessing
import os
import random
import re
import sys
import time
from pathlib import Path

import torch

from helpers import PRELOAD, english_args, free_port, temporary_folder

import train_gpt as t

SECONDS = 60
STEPS = 150


def entry(argv, env, console, fault):
    """One rank in a process of its own: its environment, its console, the fault, main."""
    os.environ.update(env)
    torch.set_num_threads(1)
    file = os.open(console, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    if fault is not None:
        fault(int(env.get("RANK", 0)))
    status = t.main(argv)
    sys.stdout.flush()
    sys.exit(status)


def start(folder, world=1, fault=None, **knobs):
    """The trainer's processes, rank by rank, without torchrun. fault(rank) breaks something in each first.

    A fork server imports torch once.
    """
    knobs = dict(iterations=STEPS, checkpoint_every=0.05, train_log_every=10, resume="auto") | knobs
    argv, processes = english_args(out_dir=folder, **knobs), []
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    env = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    if world > 1:
        env |= dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for rank in range(world):
        own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else env
        args = (argv, own, str(folder / f"console.{rank}"), fault)
        processes.append(context.Process(target=entry, args=args, daemon=True))
        processes[-1].start()
    return processes


def log_lines(folder):
    """Run lines of the log so far: what follows the source and the machine."""
    path = Path(folder) / "run.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text.rsplit("=" * 100 + "\n", 1)[-1].splitlines() if text.count("\n" + "=" * 100) > 1 else []


def wait_until(condition, seconds=SECONDS):
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def final_state(folder, world=1, step=None, name="run"):
    """Every tensor of the last checkpoint, whole, by name; None without one."""
    parts = []
    for rank in range(world):
        path = Path(folder) / f"{name}.step{step or STEPS}.{rank}of{world}.ckpt"
        if not path.exists():
            return None
        blob = path.read_bytes()
        end = 4 + int.from_bytes(blob[:4], "little")
        parts.append(t.read_tensors(json.loads(blob[4:end]), blob[end:-32]))
    return {name: torch.cat([p[name] for p in parts if name in p]) for name in set().union(*parts)}


def same(a, b):
    """Whether two states are equal, bit for bit."""
    return bool(a and b and set(a) == set(b) and all(torch.equal(x, b[name]) for name, x in a.items()))


def ended(processes, seconds=SECONDS):
    """Exit statuses; a process that is still there after that time is killed and has None."""
    wait_until(lambda: all(p.exitcode is not None for p in processes), seconds)
    statuses = [p.exitcode for p in processes]
    for p in processes:
        if p.exitcode is None:
            p.kill()
        p.join()
    return statuses


def began(folder, earlier):
    """Whether the run that was just started has taken a step: a line of the log tells."""
    return any(re.match(r"step:\d+/\d+ train_loss", x) for x in log_lines(folder)[earlier:])


def undisturbed(world):
    """The final state of a run that nobody kills."""
    folder = temporary_folder() / "reference"
    assert ended(start(folder, world)) == [0] * world, (folder / "console.0").read_text()[-2000:]
    return final_state(folder, world)


def killed_run(reference, kills, world, rng):
    """Kill a run `kills` times, resume it each time, and let it end. (outcomes of the kills, of the run)."""
    folder, outcomes = temporary_folder() / "run", []
    for _ in range(kills):
        earlier = len(log_lines(folder))
        processes = start(folder, world)
        wait_until(lambda: began(folder, earlier) or processes[0].exitcode is not None)
        time.sleep(rng.uniform(0, 0.6))
        victim = rng.choice(processes)
        alive, told = victim.exitcode is None, time.monotonic()
        victim.kill()
        statuses = ended(processes)
        took = time.monotonic() - told
        others = [s for p, s in zip(processes, statuses) if p is not victim]
        good = all(s not in (None, 0) for s in others)
        outcomes.append("after its end" if not alive else "as claimed" if good else f"VIOLATION: others {others}")
        if world > 1 and alive and good:
            outcomes[-1] += f", others gone in {'1' if took < 1 else '10' if took < 10 else SECONDS} s"
    statuses = ended(start(folder, world))
    good = statuses == [0] * world and same(final_state(folder, world), reference)
    resumed = sum(bool(re.match(r"resumed step:[1-9]", x)) for x in log_lines(folder))
    return outcomes, "bit-equal" if good else f"VIOLATION: {statuses} {(folder / 'console.0').read_text()[-300:]}", resumed


def main(argv):
    kills, deaths, seed = (int(a) for a in [*argv, *("100", "20", "0")[len(argv) :]])
    start_time, table, rng = time.perf_counter(), collections.Counter(), random.Random(seed)
    resumed = 0
    for fault, world, count, each in (("SIGKILL", 1, kills, 5), ("death of a rank", 2, deaths, 2)):
        reference, done = undisturbed(world), 0
        while done < count:
            outcomes, end, more = killed_run(reference, min(each, count - done), world, rng)
            done, resumed = done + len(outcomes), resumed + more
            table.update((fault, outcome) for outcome in outcomes)
            table[f"run after {fault}", end] += 1
            if sys.stderr.isatty():
                print(f"\r\033[K{fault}: {done} of {count}", end="", file=sys.stderr, flush=True)
    print(f"\n{'fault':<28} {'outcome':<44} {'count':>5}")
    for (fault, outcome), count in sorted(table.items()):
        print(f"{fault:<28} {outcome:<44} {count:>5}")
    bad = sum(count for (_, outcome), count in table.items() if outcome.startswith("VIOLATION"))
    print(f"{resumed} resumed from a checkpoint; {time.perf_counter() - start_time:.0f} s, seed {seed}; "
          f"{bad} violations")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
