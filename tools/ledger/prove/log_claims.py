"""Claims about logs that hold for records and sweeps alike: steps, score, and bits per byte."""

from __future__ import annotations

import math

from ledger.make.submission import bits_per_byte
from ledger.prove.claims import Wrong, demand
from ledger.read.runlog import RunLog, Step
from ledger.read.scores import counted_score


def steps_fault(run: RunLog) -> str | None:
    """Return the first contradiction in the step lines of one log, or None."""
    if run.malformed:
        return f"cannot be read: {run.malformed[0][:60]!r}"
    if not run.steps:
        return "no step lines"
    return order_fault(run.steps) or average_fault(run.steps) or end_fault(run)


def order_fault(steps: list[Step]) -> str | None:
    """Return where steps run backwards, or where one kind of line appears twice for a step."""
    for before, after in zip(steps, steps[1:]):
        if after.step < before.step or after.time_ms < before.time_ms or after.total != before.total:
            return (
                f"step:{after.step}/{after.total} at {after.time_ms} ms follows "
                f"step:{before.step}/{before.total} at {before.time_ms} ms"
            )

    for kind in ("train", "val"):
        numbers = [line.step for line in steps if line.kind == kind]
        if len(set(numbers)) < len(numbers):
            return f"a step has two {kind}_loss lines"
    return None


def average_fault(steps: list[Step]) -> str | None:
    """Return a step whose step_avg is not its time divided by its number, within rounding."""
    for line in steps:
        count = max(line.step, 1)
        rounding = 0.006 + 0.5 / count
        if abs(line.step_avg_ms - line.time_ms / count) > rounding:
            return f"step:{line.step} step_avg:{line.step_avg_ms}ms is not {line.time_ms} ms / {line.step}"
    return None


def end_fault(run: RunLog) -> str | None:
    """Return how the end of the steps contradicts final_score, stopping_early or phase_times."""
    steps = run.count("final_score", "steps")
    train_ms = run.count("final_score", "train_time")
    last = run.steps[-1]
    if (last.step, last.time_ms) != (steps, train_ms):
        return (
            f"final_score says {steps} steps in {train_ms} ms, "
            f"the last step line {last.step} in {last.time_ms} ms"
        )

    stop = {"step": f"{steps}/{last.total}", "train_time": f"{train_ms}ms"}
    if run.stopped and any(run.stopped.get(key) != value for key, value in stop.items()):
        return "stopping_early and final_score disagree"
    if not run.stopped and steps != last.total:
        return f"{steps} of {last.total} steps, and no stopping_early line says why"
    if abs(run.number("phase_times", "train") - train_ms) > 1:
        return f"phase_times train:{run.text('phase_times', 'train')} is not train_time:{train_ms}ms"
    return None


def prove_score(runs: list[RunLog], whole_split: bool) -> str:
    """Prove that final_score repeats the score of the artifact as read back.

    whole_split: whether the score must cover all of the validation split.
    """
    for run in runs:
        metric = run.text("final_score", "metric")
        line = counted_score(metric).line_of(run)
        for key in ("val_loss", "val_bpb"):
            demand(run.has(line, key), f"seed {run.seed}: no {line} line for metric {metric}")
            final = run.text("final_score", key)
            exact = run.text(line, key)
            demand(final == exact, f"seed {run.seed}: final_score {key}:{final}, {line} {key}:{exact}")

        part = run.config.get("val_tokens", "0")
        if whole_split and part not in ("0", "None"):
            raise Wrong(
                f"seed {run.seed}: val_tokens={part} scores a part of the split; a record scores all of it"
            )
    return f"final_score repeats the {metric} score of the artifact that was read back"


def prove_ratio(runs: list[RunLog]) -> str:
    """Prove that bits per byte follow from nats per token, tokens and bytes, to one part in a million."""
    worst = 0.0
    for run in runs:
        tokens = run.count("data", "val_tokens")
        data_bytes = run.count("data", "val_bytes")
        scores = [line for line in run.facts if line == "final_score" or line.endswith("_exact")]
        for line in scores:
            want = bits_per_byte(run.number(line, "val_loss"), tokens, data_bytes)
            found = run.number(line, "val_bpb")
            worst = max(worst, abs(found / want - 1) if want else math.inf)
            demand(
                worst <= 1e-6,
                f"seed {run.seed}: {line} val_bpb:{found} but its val_loss over "
                f"{tokens} tokens and {data_bytes} bytes gives {want:.8f}",
            )
    return f"bpb = loss / ln 2 * {tokens} tokens / {data_bytes} bytes, to {worst:.0e}"
