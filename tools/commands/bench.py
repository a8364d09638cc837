"""Bench: times this machine on the data that train would take."""

from __future__ import annotations

import os
from collections.abc import Sequence

from commands.ask_trainer import resolve
from commands.datasets import find_training_data
from commands.machine import count_gpus, with_preset
from commands.programs import add_tools_to_path, launch, run
from commands.words import Request, enter_repository, knob_value
from lab.shared.bench_options import read_options


def bench_reads_data(options: Sequence[str]) -> bool:
    """Return whether a bench with these options times the loader, which needs shards."""
    only_candidates = "--candidates" in options and "--all" not in options
    return not (only_candidates or "--attention" in options or "--timeline" in options)


def check_bench(request: Request) -> None:
    """Raise BadInput for an option of bench that it would refuse."""
    read_options([*request.options, *request.knobs])


def bench(request: Request) -> int:
    """Time this machine with one process, or with NPROC of them, on the data that train would take."""
    enter_repository()
    knobs = with_preset(request.knobs, count_gpus())
    processes = int(os.environ.get("NPROC") or 1)
    if bench_reads_data(request.options) and not knob_value("data_path", request.knobs):
        knobs = [f"data_path={find_training_data(resolve(knobs), processes)}", *knobs]
    add_tools_to_path()  # only now: data/prepare.py finds its own modules where PYTHONSAFEPATH is not set
    program = ["-m", "lab.bench", *request.options, *knobs]
    if processes == 1:
        return run(program)
    return launch(processes, program)
