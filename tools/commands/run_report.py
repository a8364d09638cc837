"""What run.sh shows after a training run: text, plot, the board's best and commands to try next."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from children import output_of
from commands.ask_trainer import Resolved
from commands.programs import add_tools_to_path, run
from ledger.read.knobs import with_trait
from script import ROOT, BadInput


def count_scores(log: str) -> int:
    """Count the final_score lines of a log with the ledger's reader; 0 if there is no log."""
    from ledger.read import runlog

    try:
        return runlog.parse_log(Path(log)).final_scores
    except BadInput:
        return 0


def draw_plot(log: str) -> str:
    """Draw the loss curve of a log and return the picture's path, or why there is none.

    In a child process: whatever happens to matplotlib, the run keeps its exit status.
    """
    add_tools_to_path()
    command = [sys.executable, "-m", "ledger.record", "plot", log]
    drawn = output_of(command)
    if drawn.returncode != 0 or not drawn.stdout:
        return "none (./run.sh record plot failed, message above)"
    return drawn.stdout.splitlines()[-1].removeprefix("plot: ")


def report_failure(log: str, artifact: str) -> None:
    """Print what there is of a run without a score."""
    plot = draw_plot(log)
    print("\nscore: none (the log of this run has no final_score line)")
    found = artifact if os.path.exists(artifact) else f"none at {artifact} (the trainer's lines say why)"
    print(f"artifact: {found}")
    print(f"log: {log}")
    print(f"plot: {plot}", flush=True)


def show_writing(artifact: str, knobs: Sequence[str]) -> None:
    """Show how the model goes on with three held-out texts. If it cannot, a line on stderr says why."""
    print("\nwhat it writes, beside what the held-out text says:", flush=True)
    data = [word for word in knobs if word.partition("=")[0] in with_trait("DATA")]
    add_tools_to_path()
    run(["-m", "use.sample", artifact, "held_out=3", "tokens=40", *data])
    print(flush=True)


class NextCommand(NamedTuple):
    """A command to try after a run, as the caller would type it, and the question that it answers."""

    question: str
    command: str


def report(log: str, artifact: str, knobs: Sequence[str], nexts: Sequence[NextCommand]) -> None:
    """Print what the model writes, the plot, a summary, the place on the board and commands to try.

    The trainer has printed the rest.
    """
    from ledger.read import runlog
    from ledger.show import standing, summary

    plot = draw_plot(log)
    if os.path.exists(artifact):  # a race may make none
        show_writing(artifact, knobs)
    print(f"plot: {plot}")
    run_log = runlog.parse_log(Path(log))
    for line in summary.summarize(run_log):
        print(line)
    compared = standing.compare_with_board(run_log, ROOT / "records")
    if compared:
        print(f"board: {compared}")
    if nexts:
        print("next:")
    for question, command in nexts:
        print(f"  {question:<26}{command}")
    sys.stdout.flush()


TRY_SEEDS = (1337, 42)


def next_commands(knobs: Sequence[str], resolved: Resolved, artifact: str, run_sh: str) -> list[NextCommand]:
    """Return what to try after a run with these knobs, preset and data_path among them."""
    nproc = os.environ.get("NPROC")
    prefix = f"NPROC={nproc} " if nproc else ""

    def typed(*words: str) -> str:
        return prefix + shlex.join([run_sh, *words])

    def train_with(word: str) -> str:
        replaced = (word.partition("=")[0] + "=", "run_id=", "resume=")
        return typed("train", *[given for given in knobs if not given.startswith(replaced)], word)

    if resolved.target_loss:
        judge = typed("record", "target", os.path.dirname(artifact), "--loss", f"{resolved.target_loss:g}")
        return [
            NextCommand("the next run of the race?", train_with(f"seed={resolved.seed + 1}")),
            NextCommand("is the target reached?", judge),
        ]
    scoring = [word for word in knobs if word.partition("=")[0] in ("preset", *with_trait("DATA"))]
    other_seed = next(number for number in TRY_SEEDS if number != resolved.seed)
    return [
        NextCommand("is the score legal?", typed("audit", artifact, *scoring)),
        NextCommand("how much is chance?", train_with(f"seed={other_seed}")),
        NextCommand("what does a knob change?", train_with(f"matrix_lr={2 * resolved.matrix_lr:g}")),
    ]


def read_reason(log: str, start: int) -> str | None:
    """Return why the first rank failed, from the log after its first `start` bytes; None: it does not say."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    first = next((i for i, line in enumerate(lines) if re.match(r"rank \d+: ", line)), None)
    if first is None:
        return None
    rank, _, reason = lines[first].partition(": ")
    if reason.startswith("Traceback"):
        ends = (line for line in lines[first + 1 :] if line and not line.startswith(" "))
        reason = next(ends, reason)
    if any(f"{rank}: another rank is gone" in line for line in lines):
        return "a rank was killed without a message (out of memory?)"
    return f"{rank}: {reason}"
