"""Train many configurations on one kind of device under equal conditions and tabulate them.

    ./run.sh record sweep PLAN.json [key=value ...] [options]      a plan, with more settings for every row
    ./run.sh record sweep --row ns5 --row turbo:ortho=turbo --rates 0.01,0.02 preset=cpu data_path=DIR
    ./run.sh record sweep FOLDER                                   write a finished sweep's tables again

Stage 1 trains every row at every rate with the first seed; stage 2 trains the best rate of each row with the
other seeds. Each worker is one process on one device that compiles a model once: a configuration puts new
weights into the same tensors, so that only the update of the matrices is compiled again. A row with another
model (heads, windows, depth, ...) compiles everything, off the clock. Training, clock, export and score are
train_gpt.py's own. Each configuration leaves one log, and a rerun skips those that are there. The environment
sets no knob here: what a sweep trains is in its plan and on its command line.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: Ctrl-C shows no traceback

from script import explain_imports

if __name__ == "__main__":
    explain_imports("record")

import argparse
import dataclasses
import shutil
import sys
import threading
import time
from enum import Enum
from pathlib import Path
from typing import NamedTuple, TextIO

from lab.shared.command_line import parse
from lab.training import planning
from lab.training.planning import Configuration, Plan, Queue
from lab.training.worker_process import WorkerProcess
from ledger.files import named_path
from ledger.make import pictures, sweep_table
from ledger.read.knobs import with_trait
from ledger.read.runlog import RunLog
from ledger.run_verb import run_verb
from progress import Progress
from script import TRAINER, BadInput, load_script


class End(Enum):
    """How a worker's attempt at a configuration ended."""

    TRAINED = "trained"
    DIED = "died"
    REFUSED = "refused"


class Attempt(NamedTuple):
    """The outcome of a worker's attempt at a configuration."""

    end: End
    reason: str | None = None  # why the configuration was refused


def clock(seconds: float) -> str:
    """Format a duration: 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


# ---- the folder ----------------------------------------------------------------------------------


def claim_folder(folder: Path) -> TextIO:
    """Make the folder and lock it until the returned file is closed.

    Raises BadInput if another script or a running sweep owns the folder.
    """
    for part in ("logs", ".work"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".work" / "lock", "w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows: nothing keeps two sweeps apart
    except OSError:
        raise BadInput(f"{folder}: another sweep is writing here; choose another --out") from None

    script = folder / "train_gpt.py"
    if not script.exists():
        shutil.copyfile(TRAINER, script)
    elif script.read_bytes() != TRAINER.read_bytes():
        raise BadInput(f"{script}: train_gpt.py has changed since this sweep began; choose another --out")
    return lock


def configuration_of(plan: Plan, run: RunLog) -> Configuration | None:
    """Return the configuration of the plan that wrote a log, if any."""
    row = run.text("sweep", "row")
    rate = run.text("sweep", "rate")
    seeds = {str(seed): seed for seed in plan.seeds}
    seed = seeds.get(run.text("sweep", "seed"))
    if seed is None or row not in plan.rows or rate not in plan.rows[row].rates:
        return None

    configuration = plan.configuration(row, rate, seed)
    h = plan.trainer.load_config(list(configuration.argv), {})
    paths = with_trait("PATH")  # a sweep that goes on elsewhere is the same sweep
    for key, value in dataclasses.asdict(h).items():
        if key not in paths and run.config.get(key) != str(value):
            return None
    return configuration


class Earlier(NamedTuple):
    """What a sweep's folder holds already.

    outcomes: the bpb of each log, by the name of its configuration, None for one that diverged. kind: what
    kind of device wrote the logs, "" without any.
    """

    outcomes: dict[str, float | None]
    kind: str


def read_earlier(plan: Plan, folder: Path) -> Earlier:
    """Read the logs of the folder. Raises BadInput if one is not of this plan."""
    outcomes = {}
    kind = ""
    for run in sweep_table.read_runs(folder):
        configuration = configuration_of(plan, run)
        if configuration is None or run.text("sweep", "baseline") != plan.baseline:
            raise BadInput(f"{run.path}: not of this plan; choose another --out")
        kind = kind or run.text("sweep", "kind")
        bpb = None if sweep_table.diverged(run) else run.number("final_score", "val_bpb")
        outcomes[configuration.name] = bpb
    return Earlier(outcomes, kind)


# ---- the sweep -----------------------------------------------------------------------------------


class Sweep:
    """A plan, its folder and its workers. A thread serves each worker process, and restarts one that died."""

    def __init__(self, plan: Plan, folder: Path, workers: int = 1, budget: float = 0.0) -> None:
        """Claim the folder and read the logs that are there. budget: in seconds, 0 for none."""
        self.plan = plan
        self.folder = folder
        self.budget = budget
        self.lock = threading.Condition()
        self.workers = [WorkerProcess(folder, index, workers) for index in range(workers)]
        self.cold_seconds: list[float] = []  # the first configuration of each process, its start included
        self.warm_seconds: list[float] = []  # all others
        self.error: str | None = None  # why the sweep ends early
        self.out_of_time = False
        self.began = time.monotonic()
        self.progress = Progress(f"sweep {plan.name}")
        self.folder_lock = claim_folder(folder)
        earlier = read_earlier(plan, folder)
        self.queue = Queue(plan, earlier.outcomes)
        self.kind = earlier.kind  # what kind of device the workers have

    # ---- a configuration -------------------------------------------------------------------------

    def attempt(self, worker: WorkerProcess, configuration: Configuration) -> Attempt:
        """Have a worker train a configuration, starting its process if there is none."""
        began = time.monotonic()
        fresh = not worker.is_alive
        if fresh:
            worker.start()
            opened = worker.ask({"argv": configuration.argv})
            if opened is None:
                return Attempt(End.DIED)
            if opened.refused is not None:
                return Attempt(End.REFUSED, opened.refused)
            fault = self.other_kind(worker, opened.kind)
            if fault is not None:
                return Attempt(End.REFUSED, fault)

        answer = worker.ask({"argv": configuration.argv, "line": self.sweep_line(configuration)})
        if answer is None:
            return Attempt(End.DIED)
        if answer.refused is not None:
            return Attempt(End.REFUSED, answer.refused)
        seconds = self.cold_seconds if fresh else self.warm_seconds
        seconds.append(time.monotonic() - began)
        return Attempt(End.TRAINED)

    def sweep_line(self, configuration: Configuration) -> dict[str, object]:
        """Return the pairs of a log's `sweep` line that the plan knows."""
        return {
            "plan": self.plan.name,
            "row": configuration.row,
            "baseline": self.plan.baseline,
            "key": self.plan.rows[configuration.row].rate_key,
            "rate": configuration.rate,
            "seed": configuration.seed,
            "stage": configuration.stage,
            "workers": len(self.workers),
        }

    def other_kind(self, worker: WorkerProcess, kind: str) -> str | None:
        """Return why a worker's device does not fit into the table, None if it does."""
        with self.lock:
            self.kind = self.kind or kind
            if kind == self.kind:
                return None
            return (
                f"worker {worker.index} runs on {kind}, other rows of this table on {self.kind}; a table "
                "covers one kind of device: choose another --out or fewer --workers"
            )

    # ---- a thread for each worker ----------------------------------------------------------------

    def serve(self, worker: WorkerProcess) -> None:
        """Give a worker configurations until there are none, time is up or the sweep stops."""
        try:
            row = ""  # its model is compiled in this worker
            while (configuration := self.next_configuration(row)) is not None:
                row = configuration.row
                attempt = self.attempt(worker, configuration)
                with self.lock:
                    self.record_end(worker, configuration, attempt)
                    self.lock.notify_all()
        except Exception as error:  # not lost in a thread: the sweep ends with it
            self.stop(f"{type(error).__name__}: {error}")
        worker.finish()

    def next_configuration(self, row: str = "") -> Configuration | None:
        """Return the next configuration, of this row if possible; None: there are no more.

        Waits while none is open but a running one may open more.
        """
        with self.lock:
            while self.error is None and not self.queue.over:
                if self.too_late() and self.queue.open():
                    self.out_of_time = True
                    return None
                configuration = self.queue.take(row)
                if configuration is not None:
                    return configuration
                self.lock.wait(1.0)
            return None

    def too_late(self) -> bool:
        """Return whether a configuration begun now would end after the budget."""
        if not self.budget:
            return False
        return time.monotonic() - self.began + self.estimate() > self.budget

    def record_end(self, worker: WorkerProcess, configuration: Configuration, attempt: Attempt) -> None:
        """Record how an attempt ended, and tell the user."""
        if self.error is not None:
            return
        name = configuration.name
        if attempt.end is End.DIED:
            died = f"worker {worker.index} died (status {worker.wait()}, {worker.last_words()})"
            outlook = "another try" if self.queue.died(configuration) else "failed"
            self.say(f"{name}: {died}: {outlook}")
        elif attempt.end is End.REFUSED:
            self.queue.fail(configuration)
            self.stop(attempt.reason)
        else:
            run = sweep_table.finished(self.folder / "logs" / f"{name}.txt")
            if sweep_table.diverged(run):
                bpb = None
                result = "diverged"
            else:
                figures = sweep_table.run_figures(run)
                bpb = figures.val_bpb
                result = f"val_bpb {bpb:.4f}, {figures.steps} steps of {figures.step_ms:.1f} ms"
            self.queue.finish(configuration, bpb)
            self.progress.advance(left=self.queue.left)
            self.say(f"{name}: {result}; {clock(self.seconds_left())} left")

    def say(self, text: str) -> None:
        """Print a line that begins with how many of all runs have an outcome."""
        self.progress.print(f"[{len(self.queue.outcomes)}/{self.plan.size}] {text}")

    def stop(self, error: str) -> None:
        """End the sweep: kill the workers and hand out nothing more. The first error is the one reported."""
        if self.error is None:
            self.error = error
        for worker in self.workers:
            worker.kill()

    def estimate(self) -> float:
        """Return the seconds that a configuration takes: the longest so far, in a warm worker if possible."""
        return max(self.warm_seconds or self.cold_seconds or [self.plan.limit_seconds])

    def seconds_left(self) -> float:
        """Return the time until the plan is done, with all workers side by side."""
        times = self.warm_seconds or self.cold_seconds
        return self.queue.left * sum(times) / max(len(times), 1) / len(self.workers)

    # ---- all of it -------------------------------------------------------------------------------

    def run(self) -> int:
        """Train what is missing and write the tables. Exit status 1: a configuration failed."""
        workers = len(self.workers)
        print(
            f"sweep {self.plan.name}: {len(self.plan.rows)} rows, {self.plan.size} configurations, "
            f"{len(self.queue.outcomes)} of them there already; {workers} "
            f"worker{'s' if workers > 1 else ''}; {self.folder}",
            flush=True,
        )
        guess = self.queue.left * self.plan.limit_seconds / workers
        self.progress.expect(self.queue.left, "configurations", guess)
        with self.progress:
            self.train()
        if self.error is not None:
            raise BadInput(self.error)
        if self.out_of_time:
            print(
                f"budget of {self.budget:g} s: {self.queue.left} configurations not begun; "
                "the same command continues with them",
                flush=True,
            )
        sweep_table.rewrite(self.folder)
        files = {name: self.folder / name for name in ("README.md", "table.json", "curves.png")}
        print(
            f"tables: {files['README.md']}, {files['table.json']}; picture: {files['curves.png']}", flush=True
        )
        for name in sorted(self.queue.failed):
            print(f"failed: {name} (its output is in {self.folder / '.work'})", flush=True)
        if self.queue.failed:
            return 1
        self.folder_lock.close()
        shutil.rmtree(self.folder / ".work", ignore_errors=True)
        return 0

    def train(self) -> None:
        """Serve all workers until they are done; Ctrl-C and SIGTERM stop them."""
        threads = [
            threading.Thread(target=self.serve, args=(worker,), daemon=True) for worker in self.workers
        ]
        before = signal.getsignal(signal.SIGTERM)
        takes_signals = threading.current_thread() is threading.main_thread()
        if takes_signals:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self.stop("interrupted; the same command continues with what is missing")
        finally:
            if takes_signals:
                signal.signal(signal.SIGTERM, before)


# ---- the command ---------------------------------------------------------------------------------


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    text = "train rows of settings at several rates and seeds, and tabulate them"
    parser = argparse.ArgumentParser(prog="record sweep", description=text)
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="PLAN.json|FOLDER|key=value",
        help="a plan, or a finished sweep to tabulate again; settings of all rows",
    )
    add("--row", action="append", default=[], metavar="NAME:key=value,...", help="one more row")
    add("--key", help="the knob that rates are values of (default: matrix_lr)")
    add("--rates", metavar="X,Y,...", help="values to try")
    add("--multipliers", metavar="X,Y,...", help="instead of rates: factors of a row's own value")
    add("--seeds", metavar="S,T,...", help="the first one chooses the rate (default: 1337)")
    add("--workers", type=int, default=1, metavar="N", help="processes, each on its own GPU (default: 1)")
    add(
        "--budget",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="start no configuration that would end later (default: no limit)",
    )
    add(
        "--out",
        type=named_path,
        metavar="DIR",
        help="folder of logs and tables (default: logs/sweeps/NAME, the plan's)",
    )
    add("--sliding", action="store_true", help="also score with the preset's stride (slow)")
    return parser


def command(args: argparse.Namespace) -> int:
    """Train a plan, or write the tables of a folder again. Raises BadInput if asked for neither."""
    given = planning.named_file(args.words)
    if given and given.is_dir():
        if not (given / "logs").is_dir():
            raise BadInput(f"{given}: no folder of a sweep, which has logs/; give a plan or such a folder")
        sweep_table.rewrite(given)
        return 0
    if args.workers < 1 or args.budget < 0:
        raise BadInput("--workers must be 1 or more, and --budget a number of seconds")
    pictures.pyplot()  # without matplotlib, fail now and not after hours

    trainer = load_script(TRAINER, "swept_trainer", planning.NEEDS, "sweep")
    plan = planning.read_plan(trainer, args)
    folder = args.out or Path("logs", "sweeps", plan.name)
    return Sweep(plan, folder, args.workers, args.budget).run()


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status."""
    args = parse(argument_parser(), argv)
    return run_verb(lambda: command(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
