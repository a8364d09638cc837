"""Shows where a training step's time goes: compute, hidden communication, exposed communication, idle time.

    NPROC=8 ./run.sh bench --timeline FILE.json [--steps 5] [--json REPORT.json] [key=value ...]
    PYTHONPATH=tools torchrun --standalone --nproc_per_node=8 -m lab.bench --timeline FILE.json preset=record

Whole steps, compiled and warm, run back to back on random tokens under torch.profiler.

    on a GPU     The trace is the device's: NCCL kernels, found by name, are communication; every other
                 kernel, copy and fill is compute. A step begins with the first of its device work to start
                 and ends where the next step begins. A kernel belongs to the step that launched it; the
                 replay of a CUDA graph is one launch.
    on a CPU     The trace is the host's: what gloo's threads run is communication, operators on other threads
                 are compute, and a step is its call.

A step is compute + exposed + idle:

    exposed      A collective runs and no compute does. When collectives run side by side, each is charged all
                 that it exposes, so their figures may add up to more than the step's.
    idle         Neither runs.
    update       from the start of the first collective to the end of the step; forward and backward come
                 before it
    bus GB/s     bytes per link each way, as nccl-tests count them. A rank that arrives early waits inside the
                 collective, so the time is the shortest of the ranks', that of the last rank to arrive.
    bytes        counted by watching torch.distributed's functions, also while a CUDA graph is captured. They
                 are unknown where the number of calls differs from the number of collectives traced.

FILE.json is a Chrome trace (chrome://tracing, Perfetto) with a process for each rank and a line of exposed
communication. FILE.png shows the median step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from lab.model.kernels import trace_events
from lab.shared.collectives import Collective, Recorder, collectives_of
from lab.shared.timing import say_noise, typical
from lab.shared.trainer import (
    Session,
    build_trained,
    capture_backward,
    known_errors_of,
    load_trainer,
    open_session,
)
from lab.step.intervals import FIGURES
from lab.step.timeline_drawing import chrome_trace, picture
from lab.step.timeline_figures import (
    CollectiveMedians,
    RankFigures,
    StepFigures,
    collective_medians,
    collective_table,
    medians_of_steps,
    step_figures,
    step_table,
)
from lab.step.traces import STEP, RankTrace, read_trace
from ledger.files import check_output, write_atomic
from older_scripts import machine_names, missing_names
from progress import Progress
from script import BadInput

WARM = 4  # steps before anything is timed: compilation, allocator, communicators


# ---- measuring -----------------------------------------------------------------------------------


class StepWatch:
    """Watches the collectives of one step of the script's optimizer.

    A step that replays a CUDA graph calls none of those inside it. Their calls are the ones of the last time
    that Optimizer.schedule ran, which was the capture.
    """

    def __init__(self, t: ModuleType, recorder: Recorder) -> None:
        self.recorder = recorder
        self.last: list | None = None  # events of the last schedule
        self.watch(t.Optimizer)

    def watch(self, optimizer_class: Any) -> None:
        """Make every schedule of the class keep its events in `last`."""
        inner = optimizer_class.schedule

        @functools.wraps(inner)
        def schedule(optimizer: Any) -> Any:
            with self.recorder.recording() as events:
                self.last = events
                return inner(optimizer)

        optimizer_class.schedule = schedule

    def calls_of(self, step: Callable[[], Any]) -> list[Collective]:
        """Run the step and return its calls."""
        before = self.last
        with self.recorder.recording() as events:
            step()
        replayed = before is not None and self.last is before
        return collectives_of([*events, *before] if replayed else events)


def trace_steps(s: Session, step: Callable[[], Any], steps: int) -> RankTrace:
    """Trace this many steps and one more, after one that pays for the profiler's start."""

    def run() -> None:
        step()
        for i in range(steps + 1):
            with torch.profiler.record_function(f"{STEP}{i}"):
                step()
        s.m.sync()

    s.m.sync()
    return read_trace(trace_events(s.cuda, run), s.cuda)


def measure_rank(s: Session, steps: int, recorder: Recorder) -> RankFigures:
    """Return one rank's figures and spans."""
    watch = StepWatch(s.t, recorder)
    run = build_trained(s)
    hp = s.t.hyper_at(s.h, 0, 0.0)
    backward = capture_backward(s, run).backward

    def step() -> None:
        s.t.train_step(backward, run.optimizer, [run.fresh()] * s.accum, hp)
        s.progress.advance()

    s.progress.begin("bench: timeline")
    s.progress.expect(WARM + 1 + steps + steps + 2, "steps")
    for _ in range(WARM):
        step()
    calls = [call for call in watch.calls_of(step) if call.device == s.m.device.type]

    s.m.sync()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    s.m.sync()
    plain_ms = 1000 * (time.perf_counter() - start) / steps

    trace = trace_steps(s, step, steps)
    figures = [step_figures(trace, i, calls, s.cuda) for i in range(steps)]
    return RankFigures(s.m.rank, plain_ms, trace, calls, figures)


# ---- the command ---------------------------------------------------------------------------------


def check_options(args: argparse.Namespace) -> Path:
    """Return the path of the picture. Raises BadInput before anything runs."""
    trace = args.timeline
    image = trace.with_suffix(".png")
    if trace.suffix != ".json":
        raise BadInput(f"--timeline {trace}: give the name of a .json file; the picture is its .png")
    check_output("the picture", image)
    if args.json and args.json.resolve() in (trace.resolve(), image.resolve()):
        raise BadInput(f"--json {args.json}: --timeline writes that file; choose another")
    if args.candidates:
        raise BadInput("--timeline times the script as it is: leave --candidates out")
    return image


def reported_step(step: StepFigures) -> dict:
    """Return a step as the JSON report has it."""
    return dict(**step.named_times, collectives=[collective._asdict() for collective in step.collectives])


def result_of(s: Session, ranks: list[RankFigures], rows: list[CollectiveMedians]) -> dict:
    """Return the JSON report: every figure of every rank and step, and the medians."""
    medians = [median(column) for column in zip(*(medians_of_steps(rank) for rank in ranks))]
    names = machine_names(s.m)
    return dict(
        schema=1,
        device=names["device"],
        machine=names,
        torch=torch.__version__,
        world_size=s.m.world_size,
        config=dataclasses.asdict(s.h),
        median=dict(zip(FIGURES, medians)),
        plain_step_ms=median([rank.plain_ms for rank in ranks]),
        collectives=[row._asdict() for row in rows],
        calls=[call._asdict() for call in ranks[0].calls],
        ranks=[
            dict(
                rank=rank.rank,
                plain_ms=rank.plain_ms,
                steps=[reported_step(step) for step in rank.steps],
            )
            for rank in ranks
        ],
    )


def say_tables(s: Session, ranks: list[RankFigures], rows: list[CollectiveMedians]) -> None:
    """Print the tables of steps and collectives."""
    plain_ms = median([rank.plain_ms for rank in ranks])
    names = machine_names(s.m)
    s.say(
        f"timeline of {len(ranks[0].steps)} steps on {s.m.world_size} rank(s), device "
        f"{names['device']}, update {names['update']}; without the profiler a step takes "
        f"{plain_ms:.3f} ms"
    )
    s.say("\nsteps: median of the ranks (least to most)\n" + step_table(ranks))
    if rows:
        s.say(f"\ncollectives of a step, medians over steps and ranks\n{collective_table(rows)}")

    traced = len(ranks[0].steps[0].collectives)
    called = len(ranks[0].calls)
    if traced != called:
        note = " (NCCL runs no kernel for one rank)" if s.m.world_size == 1 else ""
        s.say(
            f"\n{called} collectives were called and {traced} traced in step 0: bytes are unknown where "
            f"their numbers differ{note}"
        )


def conclude(s: Session, ranks: list[RankFigures], args: argparse.Namespace, image: Path) -> None:
    """Print the tables and write the files, on rank 0."""
    rows = collective_medians(ranks)
    say_tables(s, ranks, rows)
    typical(s, "step, under the profiler", [step.times.step for rank in ranks for step in rank.steps])
    say_noise(s)
    write_atomic(args.timeline, json.dumps(chrome_trace(ranks)) + "\n")
    s.say(f"\ntimeline: {args.timeline}")
    if args.json:
        report = result_of(s, ranks, rows)
        write_atomic(args.json, json.dumps(report, indent=1, sort_keys=True) + "\n")
        s.say(f"json: {args.json}")
    try:
        picture(ranks, image)
        s.say(f"picture: {image}")
    except BadInput as error:
        s.skip("picture", str(error))


def run(args: argparse.Namespace, env: Mapping[str, str], progress: Progress) -> int:
    """Run `bench --timeline` and return its exit status. Raises BadInput."""
    image = check_options(args)
    recorder = Recorder()
    with recorder.installed():
        t = load_trainer(args.script)
        if missing_names(t, ("Optimizer.schedule",)):
            raise BadInput(f"{args.script}: its Optimizer has no schedule(), which --timeline watches")
        with known_errors_of(t):
            s = open_session(t, args.knobs, env, progress)
            mine = measure_rank(s, args.steps, recorder)
        ranks: list = [None] * s.m.world_size
        dist.gather_object(mine, ranks if s.m.rank == 0 else None)

    if s.m.rank == 0:
        conclude(s, ranks, args, image)
    return 0
