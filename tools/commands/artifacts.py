"""The commands on a finished artifact: eval, audit, sample, export."""

from __future__ import annotations

from commands.datasets import data_of
from commands.machine import PROCESS_COUNTS, choose_processes, count_gpus, with_preset
from commands.programs import add_tools_to_path, launch, run
from commands.words import Request, enter_repository, knob_value
from use.settings import DATA_KEYS, read_arguments, read_settings


def score(program: list[str], request: Request) -> int:
    """Run eval or audit on the data that is given or found, with a process on each of 1, 2, 4 or 8 GPUs."""
    enter_repository()
    gpus = count_gpus()
    knobs = with_preset(request.knobs, gpus)
    if not knob_value("data_path", request.knobs):
        with_own_script = "--script" in request.options  # a script of its own may have other knobs
        knobs = [*data_of(request.artifact, [] if with_own_script else request.knobs), *knobs]
    processes = choose_processes(gpus, PROCESS_COUNTS)
    return launch(processes, [*program, request.artifact, *request.options, *knobs])


def evaluate(request: Request) -> int:
    """Score an artifact."""
    return score(["train_gpt.py", "eval"], request)


def audit(request: Request) -> int:
    """Audit an artifact and the script that scores it."""
    return score(["tools/audit.py"], request)


def check_sample(request: Request) -> None:
    """Raise BadInput for a setting that sample would refuse."""
    read_settings(list(request.knobs))


def check_export(request: Request) -> None:
    """Raise BadInput for words that export would refuse."""
    read_arguments([request.artifact, *request.options, *request.knobs])


def use(tool: str, request: Request) -> int:
    """Run a tool of tools/use on an artifact, with the tokenizer of the data that is given or found."""
    enter_repository()
    given = {key: knob_value(key, request.knobs) for key in DATA_KEYS}
    data = [f"{key}={value}" for key, value in given.items() if value] or data_of(request.artifact)
    others = [word for word in request.knobs if word.partition("=")[0] not in DATA_KEYS]
    add_tools_to_path()
    return run(["-m", f"use.{tool}", request.artifact, *request.options, *data, *others])


def sample(request: Request) -> int:
    """Show what an artifact writes."""
    return use("sample", request)


def export(request: Request) -> int:
    """Write a folder that transformers loads."""
    return use("export", request)
