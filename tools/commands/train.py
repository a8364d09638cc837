"""Train: chooses what this machine can, starts the trainer, shows what came of it."""

from __future__ import annotations

import os
import signal
import time
from typing import NamedTuple

from commands import programs
from commands.ask_trainer import Resolved, resolve
from commands.datasets import find_training_data
from commands.machine import choose_processes, count_gpus, machine_preset
from commands.run_report import count_scores, next_commands, read_reason, report, report_failure
from commands.words import Request, enter_repository, knob_value
from script import ROOT, BadInput, console_may_be_gone


class Launch(NamedTuple):
    """A training run as it will be started."""

    gpus: int
    processes: int | None  # None: one plain process without a GPU
    preset: str
    run_id: str
    resolved: Resolved
    others: list[str]  # the given knobs without preset, data_path and run_id

    @property
    def log(self) -> str:
        return os.path.join(self.resolved.out_dir, f"{self.run_id}.txt")

    @property
    def artifact(self) -> str:
        return os.path.join(self.resolved.out_dir, f"{self.run_id}.int6.{self.resolved.codec}")


def make_launch(knobs: tuple[str, ...]) -> Launch:
    """Choose preset, processes and name of a run with these knobs."""
    gpus = count_gpus()
    preset = knob_value("preset", knobs) or machine_preset(gpus)
    resolved = resolve([f"preset={preset}", *knobs])
    stamp = time.strftime("%Y%m%d_%H%M%S", time.gmtime())
    return Launch(
        gpus=gpus,
        processes=choose_processes(0 if resolved.is_for_a_laptop else gpus, resolved.process_counts),
        preset=preset,
        run_id=resolved.run_id or f"{stamp}_{preset}_seed{resolved.seed}",
        resolved=resolved,
        others=[word for word in knobs if not word.startswith(("preset=", "data_path=", "run_id="))],
    )


def refuse_taken_name(launch: Launch) -> None:
    """Raise BadInput if files of another run have this run's name, unless it resumes."""
    has_log = os.path.exists(launch.log)
    if launch.resolved.resume or not (has_log or os.path.exists(launch.artifact)):
        return
    state = ", a run that did not finish" if has_log and not count_scores(launch.log) else ""
    raise BadInput(
        f"run_id={launch.run_id} is taken ({launch.resolved.out_dir}/{launch.run_id}.* exists{state}); "
        "choose another run_id, go on with resume=auto, or move those files"
    )


def show_result(launch: Launch, data_path: str, caller: str, is_whole: bool) -> None:
    """Show what a run with a score has made and, if it ended well, what to try next.

    caller: the folder in which the next commands must work.
    """
    folder = "" if caller == str(ROOT) else str(ROOT)  # what paths of the repository need in front
    nexts = []
    if is_whole:
        nexts = next_commands(
            [f"preset={launch.preset}", f"data_path={os.path.join(folder, data_path)}", *launch.others],
            launch.resolved,
            artifact=os.path.join(folder, launch.artifact),
            run_sh=os.path.join(folder or ".", "run.sh"),
        )
    report(launch.log, launch.artifact, [f"data_path={data_path}", *launch.others], nexts)


def train(request: Request) -> int:
    """Train what this machine can, then show the plot, the board's best and what to try next."""
    caller = os.getcwd()
    enter_repository()
    launch = make_launch(request.knobs)
    refuse_taken_name(launch)
    data_path = knob_value("data_path", request.knobs)
    if not data_path:
        data_path = find_training_data(launch.resolved, launch.processes)

    log = launch.log
    earlier_scores = count_scores(log)  # a run that resumes may find the score of another there
    earlier_bytes = os.path.getsize(log) if os.path.exists(log) else 0
    programs.say(f"{launch.gpus} NVIDIA GPU(s), preset {launch.preset}, log {log}")
    chosen = [f"preset={launch.preset}", f"data_path={data_path}", f"run_id={launch.run_id}"]
    status = programs.launch(launch.processes, ["train_gpt.py", "train", *chosen, *launch.others])
    if not os.path.exists(log):
        ended = "was interrupted" if status == 128 + signal.SIGINT else f"ended with status {status}"
        programs.say(f"the trainer {ended} and left no log at {log}")
        return status or 1

    scored = count_scores(log) != earlier_scores
    with console_may_be_gone():
        if scored:
            show_result(launch, data_path, caller, is_whole=status == 0)
        else:
            report_failure(log, launch.artifact)
    reason = read_reason(log, earlier_bytes) if status else None
    if status or not scored:
        programs.say(f"the trainer's exit status is {status}" + ("" if reason is None else f": {reason}"))
    return status
