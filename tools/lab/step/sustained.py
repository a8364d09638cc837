"""Times steps on a card as warm as in training, in its own loop, with and without the work between steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from lab.shared.timing import ms_between, tick
from lab.shared.trainer import Session, TrainingParts, capture_backward, quiet_run
from lab.step.smi import Sampler, gpu_of

BLOCKS = 8  # into which the seconds are cut


class Ticks(NamedTuple):
    """Two ticks: when the device reached a step's first pass, and when it reached the step's end."""

    begin: Any
    end: Any


class TimedBlocks(NamedTuple):
    """The blocks of a sustained measurement.

    rows: {which, steps, ms, between_ms}, where ms is of a step and between_ms passes between two. half: the
    perf_counter() at which the later half begins.
    """

    rows: list[dict]
    half: float


class TrainingLoop:
    """The loop of train() without validations, checkpoints and an end, and its step alone, on one batch.

    logged: the part of a run that log_step needs. Without a loader only `fixed` can run.
    """

    def __init__(self, s: Session, run: TrainingParts, loader: Any, logged: SimpleNamespace) -> None:
        self.s = s
        self.run = run
        self.loader = loader
        self.logged = logged
        self.backward = capture_backward(s, run).backward
        # text if there is any: random tokens draw other power
        self.batch = loader.next() if loader else [run.fresh()] * s.accum
        self.step = 0
        self.clock_ms = 0.0
        self.start = time.perf_counter()
        self.in_flight = s.m.fetch(torch.zeros(2, device=s.m.device))

    @property
    def kinds(self) -> dict[str, Callable[[], Ticks]]:
        """The kinds of steps that can run here."""
        if self.loader is None:
            return dict(fixed=self.fixed)
        return dict(fixed=self.fixed, training=self.training)

    def hyper(self) -> Any:
        """Return the hyperparameters of the next step."""
        return self.s.t.hyper_at(self.s.h, self.step, self.clock_ms)

    def update(self, batch: list, hp: Any) -> Any:
        """Take one step on the batch and average the weights. Returns the loss, still on the device."""
        loss = self.s.t.train_step(self.backward, self.run.optimizer, batch, hp)
        self.run.ema.update(hp.progress)
        return loss

    def fixed(self) -> Ticks:
        """Take a step that waits for nothing and lets the host run ahead."""
        hp = self.hyper()
        begin = tick(self.s)
        self.update(self.batch, hp)
        return Ticks(begin, tick(self.s))

    def training(self) -> Ticks:
        """Take a step with all that surrounds it. Raises RuntimeError if training has diverged."""
        hp = self.hyper()
        batch = self.loader.next()
        begin = tick(self.s)
        loss = self.update(batch, hp)
        end = tick(self.s)

        self.step += 1
        diverged = self.check_clock(loss)
        self.log(loss)
        if diverged:
            limit = self.s.t.DIVERGED
            raise RuntimeError(f"step {self.step}: loss or gradient norm beyond {limit:g}")
        return Ticks(begin, end)

    def check_clock(self, loss: Any) -> bool:
        """Advance the clock that all ranks share. Returns whether the step before this one has diverged."""
        arrived = self.in_flight
        self.in_flight = self.s.m.fetch(torch.stack([loss.double(), self.run.optimizer.norm]))
        sound = all(abs(x) < self.s.t.DIVERGED for x in arrived()[0].tolist())
        elapsed = 1000 * (time.perf_counter() - self.start)
        self.clock_ms, flag = self.s.m.agree(elapsed, 0 if sound else 2)
        return flag > 0

    def log(self, loss: Any) -> None:
        """Write the log line where training would, and the status line."""
        shown = math.nan
        if self.step % self.s.h.train_log_every == 0 or self.step.bit_count() == 1:  # a power of two
            shown = self.s.t.log_step(self.logged, self.step, loss, self.clock_ms)
        eta = self.clock_ms * (1 / self.hyper().progress - 1) / 1000
        per_step = self.clock_ms / self.step
        self.logged.log.status(f"step {self.step} loss {shown:.4f} {per_step:.1f} ms/step ETA {eta:.0f} s")


# ---- blocks --------------------------------------------------------------------------------------


def steps_per_block(s: Session, fixed: Callable[[], Ticks], seconds: float) -> int:
    """Time one step and return how many fill a block, the same number on every rank."""
    s.m.sync()
    start = time.perf_counter()
    fixed()
    s.m.sync()
    step_seconds = s.m.agree(time.perf_counter() - start, 0.0)[0]  # older scripts give it no name
    return max(2, round(seconds / BLOCKS / step_seconds))


def run_block(s: Session, which: str, step: Callable[[], Ticks], count: int) -> dict:
    """Run `count` steps and return the block's row. The first fills the queue and is not timed."""
    ticks = [step() for _ in range(count)]
    s.m.sync()
    timed = count - 1
    whole_ms = ms_between(ticks[0].end, ticks[-1].end)
    between_ms = sum(ms_between(one.end, following.begin) for one, following in zip(ticks, ticks[1:]))
    return dict(which=which, steps=timed, ms=whole_ms / timed, between_ms=between_ms / timed)


def run_blocks(s: Session, kinds: dict[str, Callable[[], Ticks]], seconds: float) -> TimedBlocks:
    """Run BLOCKS blocks of steps, which together take about `seconds`.

    Two kinds take turns as a b b a ..., which spreads a drift of clocks and temperature over both.
    """
    for step in (*kinds.values(), kinds["fixed"]):  # compiles and allocates everything
        step()
    count = steps_per_block(s, kinds["fixed"], seconds)

    names = list(kinds)
    rows = []
    half = 0.0
    s.progress.begin("bench: sustained steps")
    for i in s.progress.each(range(BLOCKS), "blocks"):
        if i == BLOCKS // 2:
            half = time.perf_counter()
        name = names[(i + 1) // 2 % len(names)]
        rows.append(run_block(s, name, kinds[name], count))
    return TimedBlocks(rows, half)


# ---- the lines -----------------------------------------------------------------------------------


def say_steps(s: Session, what: str, times: list[float], seconds: float, steps: int) -> None:
    """Print the line of one kind of step; times: ms of its blocks in the later half."""
    mean = sum(times) / len(times)
    s.say(
        f"bench sustained step, {what}: {mean:.2f} ms/step (later half of {seconds:.1f} s, "
        f"{len(times)} blocks of {steps} steps: {min(times):.2f} to {max(times):.2f})"
    )


def say_clocks(s: Session, gpu: dict) -> None:
    """Print the line of the GPU's clocks, from Sampler.summary."""
    if "why" in gpu:
        s.say(f"bench sustained clocks: not available ({gpu['why']})")
        return
    low, high = gpu["sm_mhz_range"]
    power = "power not reported" if gpu["power_w"] is None else f"power {gpu['power_w']:.0f} W"
    held = ", ".join(f"{name} in {count}" for name, count in gpu["reasons"].items())
    s.say(
        f"bench sustained clocks: SM {gpu['sm_mhz']:.0f} MHz ({low:.0f} to {high:.0f}), {power}; "
        f"of {gpu['samples']} readings: {held or 'nothing holds them down'}"
    )


def summarize(s: Session, blocks: list[dict], seconds: float, gpu: dict) -> None:
    """Print and report the figures of the later half of the blocks."""
    later = blocks[len(blocks) // 2 :]
    steps = later[0]["steps"]
    report = dict(seconds=seconds, blocks=blocks, gpu=gpu)
    s.report["sustained"] = report

    fixed = [row["ms"] for row in later if row["which"] == "fixed"]
    report["fixed_ms"] = sum(fixed) / len(fixed)
    say_steps(s, "one batch", fixed, seconds, steps)

    if training := [row["ms"] for row in later if row["which"] == "training"]:
        report["training_ms"] = sum(training) / len(training)
        say_steps(s, "all of training", training, seconds, steps)

        between = [row["between_ms"] for row in later if row["which"] == "training"]
        differences = [whole - step for step, whole in zip(fixed, training)]
        report["loader_log_clock_ms"] = report["training_ms"] - report["fixed_ms"]
        report["between_steps_ms"] = sum(between) / len(between)
        s.say(
            f"bench sustained loader + log + clock check: {report['loader_log_clock_ms']:.2f} ms/step "
            f"(pairs of blocks: {min(differences):.2f} to {max(differences):.2f}); by the device's clock "
            f"{report['between_steps_ms']:.2f} ms pass between two steps"
        )
    say_clocks(s, gpu)


def measure_sustained(s: Session, run: TrainingParts, loader: Any, seconds: float) -> None:
    """Run training's loop for this many seconds; print and report the lines `bench sustained ...`."""
    begun = time.perf_counter()
    gpu = gpu_of(s) if s.m.rank == 0 else None
    with quiet_run(s) as logged, Sampler(gpu) as sampler:
        loop = TrainingLoop(s, run, loader, logged)
        blocks = run_blocks(s, loop.kinds, seconds)
    summarize(s, blocks.rows, time.perf_counter() - begun, sampler.summary(blocks.half))
