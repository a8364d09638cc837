"""Count what one optimizer step puts on the wire, and predict how much of a step that takes.

    ./run.sh record wire                                  the record preset on 8 ranks of one node
    ./run.sh record wire --ranks 8 --nodes 2 ortho=mud --out wire.md

Counted: N processes over gloo take one step with data (network/one_step.py). Wrappers of torch.distributed's
functions see every collective. Bytes that are exactly zero are padding, and a rank's work is the matrices
that it gives to `orthogonalize`. After the step, parameters must be bit-equal on all ranks.

Predicted (network/predict.py): the same step without data, as every rank of one node of 8 and of four such
nodes. The output lists the figures that this rests on; --assume NAME=VALUE changes one.

A group whose ranks lie on one node (rank // ranks per node) is intra, any other inter. Bytes per link are
those of ring algorithms: (n-1)/n of the whole buffer for a reduce-scatter or an all-gather, twice that for
an all-reduce. Beside it, from the same shapes: the schedule of parameter-golf's Parallel Muon record (#399).

The exit status is 0 when done, 1 if the ranks disagree after the step, and 2 for bad input, which one line
names.
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
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from children import unwind_on_sigterm
from lab.network.one_step import DrySteps, RankTask, dry_steps, free_port, in_processes, real_step
from lab.network.predict import (
    FORMULA,
    SOURCES,
    Assumptions,
    Load,
    StepTimes,
    load_of,
    predict,
    published_batches,
    published_schedule,
    work_of,
)
from lab.shared.collectives import (
    Event,
    Scope,
    Totals,
    batches_of,
    collectives_of,
    padding,
    padding_fraction,
    scope,
    totals,
)
from lab.shared.command_line import parse
from ledger.files import check_output, named_path, write_atomic
from ledger.make import markdown
from ledger.run_verb import run_verb
from progress import Progress
from script import ROOT, BadInput

PREDICTED = ((1, 8), (4, 8))  # nodes, ranks on each
MAX_RANKS = 64
PUBLISHED = "Parallel Muon record"


# ---- tables --------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """The figures of one way to take a step."""

    name: str
    totals: Totals
    padding: float
    loads: list[Load]  # one for each rank


class Prediction(NamedTuple):
    """The predicted times of a schedule on this many nodes."""

    name: str
    nodes: int
    node_ranks: int
    times: StepTimes


def with_gap(heads: list[str], rows: list[list]) -> list[str]:
    """Return a table and an empty line."""
    return [*markdown.table(heads, [[str(cell) for cell in cells] for cells in rows]), ""]


def mb(count: float) -> str:
    """Format bytes as decimal megabytes."""
    return f"{count / 1e6:.3f}"


def percent(fraction: float) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * fraction:.1f} %"


def order_table(steps: list[list[Event]], node_ranks: int) -> list[str]:
    """Tabulate every collective of rank 0 in launch order; padding is over all ranks."""
    calls_by_rank = [collectives_of(events) for events in steps]
    rows = []
    for index, call in enumerate(calls_by_rank[0]):
        padded = padding_fraction([calls[index] for calls in calls_by_rank])
        where = scope(call.ranks, node_ranks).value
        size = f"{call.payload:,}"
        label = f"{index + 1} {call.kind}"
        rows.append([label, call.dtype, len(call.ranks), where, size, percent(padded), mb(call.wire)])
    heads = ["collective", "type", "ranks", "scope", "bytes", "padding", "MB per link each way"]
    return with_gap(heads, rows)


def schedule_column(schedule: Schedule, kinds: list[str]) -> dict[str, object]:
    """Return the figures of a schedule by the label of their row."""
    counts, payload, wire = schedule.totals
    matrices = [load.matrices for load in schedule.loads]
    slots = [load.slots for load in schedule.loads]
    flops = [load.flops for load in schedule.loads]
    padded = [load.padded_flops for load in schedule.loads]
    balance = max(flops) / (sum(flops) / len(flops) or 1)
    idle = 1 - sum(flops) / (sum(padded) or 1)
    return {
        **{kind: counts[kind] for kind in kinds},
        "collectives": counts.total(),
        "payload, MB": mb(payload),
        "per link each way within nodes, MB": mb(wire[Scope.WITHIN_NODE]),
        "per link each way across nodes, MB": mb(wire[Scope.ACROSS_NODES]),
        "padding, of the bytes": percent(schedule.padding),
        "matrices of a rank": f"{min(matrices)} to {max(matrices)}",
        "the same with padding": f"{min(slots)} to {max(slots)}",
        "GFLOP of the busiest rank": f"{max(padded) / 1e9:.2f}",
        "busiest over mean, matrices' operations": f"{balance:.3f}",
        "operations on padding": percent(idle),
    }


def totals_table(schedules: list[Schedule]) -> list[str]:
    """Tabulate schedules side by side."""
    kinds = sorted({kind for schedule in schedules for kind in schedule.totals.counts})
    columns = [schedule_column(schedule, kinds) for schedule in schedules]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return with_gap(["a step, one rank", *(schedule.name for schedule in schedules)], rows)


def prediction_table(predictions: list[Prediction]) -> list[str]:
    """Tabulate the predicted milliseconds of each schedule."""
    heads = [
        "schedule", "nodes x GPUs", "communication ms", "update ms", "exposed before", "exposed after",
        "exposed ms",
    ]  # fmt: skip
    rows = []
    for name, nodes, node_ranks, times in predictions:
        after = times.exposed - times.before
        figures = (times.communication, times.update, times.before, after, times.exposed)
        rows.append([name, f"{nodes} x {node_ranks}", *(f"{ms:.3f}" for ms in figures)])
    return with_gap(heads, rows)


def rank_table(loads: list[Load], node_ranks: int) -> list[str]:
    """Tabulate the work of each rank."""
    mean = sum(load.flops for load in loads) / len(loads) or 1
    rows = []
    for rank, load in enumerate(loads):
        gflop = f"{load.flops / 1e9:.2f}"
        balance = f"{load.flops / mean:.3f}"
        rows.append([rank, rank // node_ranks, load.matrices, load.slots, gflop, balance])
    return with_gap(["rank", "node", "matrices", "with padding", "GFLOP", "over mean"], rows)


def assumption_table(a: Assumptions) -> list[str]:
    """Tabulate the assumptions with their sources."""
    rows = []
    for field in dataclasses.fields(a):
        value = getattr(a, field.name)
        source = SOURCES[field.name] if value == field.default else "given"
        rows.append([field.name, f"{value:g}", source])
    return with_gap(["assumption", "value", "source"], rows)


# ---- the report ----------------------------------------------------------------------------------


def predictions_of(dry: DrySteps, a: Assumptions) -> list[Prediction]:
    """Predict the script's step and the published schedule's for PREDICTED. The slowest rank counts."""
    work = work_of(dry.shapes, dry.flops)
    predictions = []
    for (nodes, node_ranks), steps in zip(PREDICTED, dry.steps):
        ranks = [predict(events, node_ranks, work, a) for events in steps]
        slowest = max(ranks, key=lambda times: times.end)
        published = published_schedule(dry.shapes, nodes * node_ranks)
        predictions += [
            Prediction("here", nodes, node_ranks, slowest),
            Prediction(PUBLISHED, nodes, node_ranks, predict(published, node_ranks, work, a)),
        ]
    return predictions


def counted(steps: list[list[Event]], dry: DrySteps, task: RankTask) -> list[Schedule]:
    """Return the figures of the script's step, counted, and of the published schedule."""
    ranks = range(task.world)
    published = published_schedule(dry.shapes, task.world)
    here_loads = [load_of(batches_of(events), dry.flops) for events in steps]
    published_loads = [load_of(published_batches(dry.shapes, task.world, rank), dry.flops) for rank in ranks]
    return [
        Schedule("here", totals(steps[0], task.node_ranks), padding(steps), here_loads),
        Schedule(PUBLISHED, totals(published, task.node_ranks), padding([published]), published_loads),
    ]


def report(steps: list[list[Event]], dry: DrySteps, task: RankTask, a: Assumptions, knobs: str) -> list[str]:
    """Return all tables as lines of Markdown. steps: by rank, with data; knobs: the line below the title."""
    schedules = counted(steps, dry, task)
    return [
        f"# One optimizer step on {task.world} ranks, {task.world // task.node_ranks} node(s)",
        "",
        knobs,
        "",
        "## Counted",
        "",
        *totals_table(schedules),
        "In launch order, rank 0:",
        "",
        *order_table(steps, task.node_ranks),
        "Work of each rank, by its direction:",
        "",
        *rank_table(schedules[0].loads, task.node_ranks),
        "## Predicted",
        "",
        "Not measured. Milliseconds of a step that its communication adds to the update:",
        "",
        *prediction_table(predictions_of(dry, a)),
        "```",
        FORMULA,
        "```",
        "",
        *assumption_table(a),
    ]


# ---- the command ---------------------------------------------------------------------------------


def assumptions_of(given: list[str]) -> Assumptions:
    """Return the assumptions with those of the command line, NAME=VALUE, in place."""
    values = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in SOURCES:
            raise BadInput(f"--assume {text}: give NAME=VALUE, one of {', '.join(SOURCES)}")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = math.nan
        if not 0 < values[name] < 1e9:
            raise BadInput(f"--assume {text}: must be a positive number")
    return Assumptions(**values)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise BadInput before anything runs."""
    if not 1 <= args.ranks <= MAX_RANKS:
        raise BadInput(f"--ranks {args.ranks}: give 1 to {MAX_RANKS} processes of this machine")
    if args.nodes < 1 or args.ranks % args.nodes:
        raise BadInput(f"--nodes {args.nodes}: must divide --ranks {args.ranks}")
    if args.out:
        check_output("--out", args.out)


def command(args: argparse.Namespace) -> int:
    """Print the tables and, with --out, write them to a file. Exit status 1: the ranks disagree."""
    check_arguments(args)
    a = assumptions_of(args.assume)
    script = (args.script or args.root / "train_gpt.py").resolve()
    task = RankTask(script, tuple(args.words), args.ranks, args.ranks // args.nodes)
    dry_tasks = tuple(task._replace(world=nodes * ranks, node_ranks=ranks) for nodes, ranks in PREDICTED)
    port = free_port()
    tasks = [task._replace(rank=rank, port=port) for rank in range(task.world)]
    with Progress("wire: a step without data") as progress:
        dry = in_processes(dry_steps, [dry_tasks])[0]  # first: it is quick and refuses what is wrong
        shared = max(1.0, task.world / (os.cpu_count() or 1))
        guess = shared * (time.perf_counter() - progress.started)  # the same imports, and one rank each
        progress.begin("wire: a step with data")
        progress.expect(task.world, "ranks", guess)
        ranks = in_processes(real_step, tasks, progress)

    given = " ".join(task.knobs) or "nothing"
    knobs = f"preset={ranks[0].preset} ortho={ranks[0].ortho}; given: {given}"
    lines = report([result.events for result in ranks], dry, task, a, knobs)
    agree = len({result.digest for result in ranks}) == 1
    verdict = "bit-equal" if agree else "NOT bit-equal"
    lines.append(f"Parameters after the step: {verdict} on all {task.world} ranks.")
    print("\n".join(lines), flush=True)
    if args.out:
        write_atomic(args.out, "\n".join(lines) + "\n")
    return 0 if agree else 1


def argument_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    text = "count what one optimizer step puts on the wire, and predict how much of a step that takes"
    parser = argparse.ArgumentParser(prog="record wire", description=text)
    add = parser.add_argument
    add("words", nargs="*", metavar="key=value", help="knobs of Config, such as ortho=mud")
    add("--ranks", type=int, default=8, metavar="N", help="processes (default: 8)")
    add("--nodes", type=int, default=1, metavar="M", help="nodes that the ranks lie on (default: 1)")
    add(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another figure for the prediction; the output lists them",
    )
    add("--script", type=Path, metavar="PATH", help="default: the repository's train_gpt.py")
    add("--out", type=named_path, metavar="FILE.md", help="also write the tables there")
    add("--root", type=Path, default=ROOT, help="repository (default: this one)")
    return parser


def main(argv: list[str]) -> int:
    """Run `record wire` and return the exit status."""
    args = parse(argument_parser(), argv)
    return run_verb(lambda: command(args))


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main(sys.argv[1:]))
