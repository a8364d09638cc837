"""Asks the trainer, in a child process, what only it knows: a run's knobs, an artifact's vocabulary.

Importing the trainer takes 2 to 4 seconds either way, but a child returns its 300 MB before training starts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from children import output_of
from commands.machine import PROCESS_COUNTS
from commands.programs import TOOLS
from script import TRAINER, BadInput, load_script

SMALL_BATCH = 16_384  # tokens: a GPU takes more than that in one micro-batch


class Resolved(NamedTuple):
    """A run's knobs as the trainer resolves them."""

    seed: int
    out_dir: str
    run_id: str
    resume: str
    codec: str  # ends the artifact's name
    matrix_lr: float
    target_loss: float  # what a race must reach; 0: the run is no race
    max_wallclock_seconds: float  # 0: the run takes all of its iterations
    vocab_size: int
    train_batch_tokens: int
    iterations: int
    process_counts: list[int]  # those of PROCESS_COUNTS that divide the batch

    @property
    def is_for_a_laptop(self) -> bool:
        """Whether a step is so small that neither several GPUs nor much data are of use."""
        return self.train_batch_tokens < SMALL_BATCH


def resolve(knobs: list[str]) -> Resolved:
    """Ask the trainer's load_config and cut_batch in a child process. Exits if they refuse the knobs."""
    command = [sys.executable, str(TOOLS / "cli.py"), "--resolve", *knobs]
    answer = output_of(command)
    if answer.returncode != 0:
        raise SystemExit(answer.returncode)  # its one line is on the terminal
    return Resolved(**json.loads(answer.stdout))


def print_resolved(knobs: list[str]) -> int:
    """Print a Resolved as JSON: the child's side of `resolve`."""
    trainer = load_script(
        TRAINER, "trainer", ("InputError", "load_config", "cut_batch", "plain_name"), "train"
    )
    try:
        h = trainer.load_config(knobs, os.environ)
        if h.run_id:
            trainer.plain_name("run_id", h.run_id)
        if (os.environ.get("NPROC") or "1") != "1":
            trainer.cut_batch(h, int(os.environ["NPROC"]))
    except trainer.InputError as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2

    process_counts = []
    for count in PROCESS_COUNTS:
        try:
            trainer.cut_batch(h, count)
        except trainer.InputError:
            continue
        process_counts.append(count)
    known = {name: getattr(h, name) for name in Resolved._fields if name != "process_counts"}
    print(json.dumps(known | {"process_counts": process_counts}))
    return 0


def vocabulary_of(artifact: str, knobs: Sequence[str]) -> int:
    """Ask the trainer in a child process how many tokens an artifact knows.

    Exits if it is damaged, or if the knobs, with which it will be scored, do not fit it.
    """
    answer = output_of([sys.executable, str(TOOLS / "cli.py"), "--vocabulary", artifact, *knobs])
    if answer.returncode != 0:
        raise SystemExit(answer.returncode)  # its one line is on the terminal
    return int(answer.stdout)


def print_vocabulary(artifact: str, knobs: list[str]) -> int:
    """Print the size of an artifact's vocabulary: the child's side of `vocabulary_of`."""
    values = ("Config", "InputError")
    functions = ("make_config", "open_artifact", "read_file", "read_knobs")
    trainer = load_script(TRAINER, "trainer", values + functions, "score")
    try:
        header, _ = trainer.open_artifact(trainer.read_file(artifact))
        trainer.make_config(trainer.read_knobs(knobs, {}), header["config"])
    except (ValueError, trainer.InputError) as error:
        raise BadInput(f"{artifact}: {error}") from None
    print(header["config"].get("vocab_size"))
    return 0
