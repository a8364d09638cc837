"""Proves the claims that only a race's folder makes; claim_table.py lists what it shares with a record."""

from __future__ import annotations

from ledger.prove.claims import demand
from ledger.prove.record_claims import RecordCase
from ledger.races import (
    RULE_TEXTS,
    check_race,
    check_times,
    last_validation,
    outcome_of,
    race_steps,
    spread_text,
)


def claim_race(case: RecordCase) -> str:
    """The runs are those of one race to the target of the track: the same last step, and none left out."""
    check_race(case.runs)
    target = case.track.target
    for run in case.runs:
        for found in (run.config.get("target_loss"), run.text("final_score", "target")):
            demand(
                found == str(target.loss),
                f"seed {run.seed}: a race to {found}; the target of the track is {target.loss}",
            )
        part = run.config.get("val_tokens")
        demand(
            part == str(target.val_tokens),
            f"seed {run.seed}: val_tokens={part}; the track validates val_tokens={target.val_tokens}",
        )
    steps = race_steps(case.runs[0])
    return f"{len(case.runs)} runs to {target.loss}, none left out; {steps:,} steps each, as set before"


def claim_last_validation(case: RecordCase) -> str:
    """final_score repeats the last validation of the training weights."""
    for run in case.runs:
        for key in ("val_loss", "val_bpb"):
            final = run.text("final_score", key)
            live = run.text("final_live", key)
            demand(final == live, f"seed {run.seed}: final_score {key}:{final}, final_live {key}:{live}")
        last = run.steps[-1]
        loss = last_validation(run)
        demand(
            last.kind == "val" and abs(last.loss - loss) < 5.1e-5,
            f"seed {run.seed}: final_live val_loss:{loss} is not that of the last step line, {last.loss}",
        )
    return "final_score repeats the last validation, which the last step line shows"


def claim_significance(case: RecordCase) -> str:
    """The mean loss of a record is below the target by the rule of its track."""
    target = case.track.target
    outcome = outcome_of(case.runs, target.loss)
    p = "-" if outcome.p is None else f"{outcome.p:.2g}"
    evidence = f"mean {outcome.mean:.5f}, target {target.loss}, p {p}, margin {outcome.margin:+.5f}"
    if not case.stored["record"]:
        return f"{evidence}; a non-record need not reach it"
    demand(outcome.holds(target.rule), f"{evidence}: not {RULE_TEXTS[target.rule]}")
    return f"{evidence}: {RULE_TEXTS[target.rule]}"


def claim_times(case: RecordCase) -> str:
    """The training times compare: one kind of machine, and no run was resumed."""
    check_times(case.runs)
    times = [run.number("final_score", "train_time") / 1000 for run in case.runs]
    return f"{spread_text(times, 3)} s on {case.runs[0].hardware}"
