"""Sums up a finished run in a few lines for people, from its log: text read, time, what rounding cost."""

from __future__ import annotations

from contextlib import suppress

from ledger.read.runlog import RunLog
from script import BadInput

MIN_FRACTION = 0.02  # a phase is named by itself if it takes this fraction of the time


def summarize(run: RunLog) -> list[str]:
    """Return the lines of a run's summary. What an old or foreign log does not tell is left out."""
    lines = []
    for part in (describe_reading, describe_compute, describe_time, describe_rounding):
        with suppress(BadInput):
            lines.append(part(run))
    return lines


def describe_reading(run: RunLog) -> str:
    """Return the steps of a run, their pace, and how much text they were. Raises BadInput without a score."""
    steps = run.count("final_score", "steps")
    pace = run.count("final_score", "train_time") / max(steps, 1)
    told = f"steps: {steps:,}, {pace:.4g} ms each"
    if run.config.get("start_batch_tokens", "0") != "0" or "train_batch_tokens" not in run.config:
        return told  # batches of several sizes
    tokens = steps * int(run.config["train_batch_tokens"])
    text = run.count("data", "train_tokens")
    return f"{told}; {tokens:,} tokens, {tokens / max(text, 1):.3g} times the training text"


def describe_compute(run: RunLog) -> str:
    """Return the compute of a run, and the fraction of the devices' peak. Raises BadInput without it."""
    told = f"compute: {run.number('compute', 'flops'):.3g} FLOPs"
    told += f", {run.number('compute', 'tokens_per_param'):.3g} tokens for each parameter"
    return told + (f", MFU {run.number('compute', 'mfu'):.1%}" if run.has("compute", "mfu") else "")


def describe_time(run: RunLog) -> str:
    """Return the fractions of the time that the phases of a run took. Raises BadInput without them."""
    phases = {phase: run.number("phase_times", phase) for phase in run.facts.get("phase_times", {})}
    total = sum(phases.values())
    if not total:
        raise BadInput(f"{run.path}: no phase_times line")
    large = {phase: ms for phase, ms in phases.items() if ms >= MIN_FRACTION * total}
    longest_first = sorted(large.items(), key=lambda item: -item[1])
    fractions = [f"{ms / total:.0%} {phase}" for phase, ms in longest_first]
    return f"where {total / 1000:.1f} s went: {', '.join(fractions)}"


def describe_rounding(run: RunLog) -> str:
    """Return what the artifact's codes cost, by scores in disjoint windows. Raises BadInput without them."""
    before = f"final_{run.text('artifact', 'weights')}"
    exact = f"final_{run.weights_format}_roundtrip_exact"
    cost = run.number(exact, "val_bpb") - run.number(before, "val_bpb")
    return f"rounding to {run.weights_format}: {cost:+.4f} bpb"
