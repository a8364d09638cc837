"""The parts of a race's folder that differ from those of an artifact's: submission.json and its page."""

from __future__ import annotations

from ledger import stats
from ledger.files import read_text, sha256
from ledger.make.seed_table import Column
from ledger.make.submission import META_KEYS, SCHEMA_VERSION, by_distinct_seed, common, provenance
from ledger.races import METRIC, RULE_TEXTS, Outcome, check_race, check_times, last_validation, race_steps
from ledger.read.runlog import RunLog
from ledger.tracks import TRACKS


def race_result(run: RunLog) -> dict[str, object]:
    """Return the entry of one run: its last validation, its steps and times in ms, the hash of its log."""
    steps = run.count("final_score", "steps")
    train_ms = run.count("final_score", "train_time")
    return {
        "val_loss": last_validation(run),
        "val_bpb": run.number("final_score", "val_bpb"),
        "ema_val_loss": run.number("final_ema", "val_loss"),
        "steps": steps,
        "train_time_ms": train_ms,
        "step_avg_ms": round(train_ms / max(steps, 1), 2),
        "compile_ms": run.count("phase_times", "compile"),
        "peak_mib": run.sizes.get("peak"),
        "log_sha256": sha256(read_text(run.path)),
    }


def race_submission(runs: list[RunLog], meta: dict[str, object]) -> dict[str, object]:
    """Return submission.json from the logs of a race and a given `meta` (META_KEYS).

    Raises BadInput if the runs are not those of one race.
    """
    check_race(runs)
    check_times(runs)
    by_seed = by_distinct_seed(runs)
    results = {str(seed): race_result(run) for seed, run in by_seed.items()}

    def column(key: str) -> list[float]:
        return [result[key] for result in results.values()]

    def spread(key: str) -> float | None:
        value = stats.std(column(key))
        return None if value is None else round(value, 8)

    outcome = Outcome(column("val_loss"), TRACKS[meta["track"]].target.loss)
    return {
        "schema": SCHEMA_VERSION,
        **{key: meta[key] for key in META_KEYS},
        "metric": METRIC,
        "target": outcome.target,
        "val_loss": round(outcome.mean, 8),
        "val_loss_std": spread("val_loss"),
        "val_bpb": round(stats.mean(column("val_bpb")), 8),
        "val_bpb_std": spread("val_bpb"),
        "p_value": outcome.p,
        "margin": round(outcome.margin, 8),
        "steps": common(runs, "the last step", race_steps),
        "train_time_ms": round(stats.mean(column("train_time_ms")), 2),
        "train_time_ms_std": spread("train_time_ms"),
        "seeds": list(by_seed),
        "seed_results": results,
        **provenance(runs),
    }


def race_headline(runs: list[RunLog], sub: dict) -> str:
    """Return the line below the title: loss, spread, target, significance, steps and time."""
    spread = "" if sub["val_loss_std"] is None else f" (std {sub['val_loss_std']:.5f})"
    p = "" if sub["p_value"] is None else f"p {sub['p_value']:.2g}, "
    noun = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    rule = RULE_TEXTS[TRACKS[sub["track"]].target.rule]
    return (
        f"**val_loss {sub['val_loss']:.5f}**{spread} after {sub['steps']:,} steps and "
        f"{sub['train_time_ms'] / 1000:.2f} s, {noun}; target {sub['target']:g}: {p}"
        f"margin {sub['margin']:+.5f}; the track asks for {rule}."
    )


def race_columns(runs: list[RunLog], sub: dict) -> list[Column]:
    """Return the columns of the table of seeds."""
    return [
        Column("val_loss", 5, lambda run, entry: entry["val_loss"]),
        Column("val_bpb", 4, lambda run, entry: entry["val_bpb"]),
        Column("ema val_loss", 5, lambda run, entry: entry["ema_val_loss"]),
        Column("steps", 0, lambda run, entry: entry["steps"]),
        Column("train s", 2, lambda run, entry: entry["train_time_ms"] / 1000),
        Column("step_avg ms", 2, lambda run, entry: entry["step_avg_ms"]),
        Column("peak MiB", 0, lambda run, entry: entry["peak_mib"]),
        Column("compile s", 1, lambda run, entry: entry["compile_ms"] / 1000),
    ]


def race_legend(runs: list[RunLog]) -> list[str]:
    """Return the sentences that explain the table of seeds."""
    return [
        "val_loss is that of the training weights at the last step, in nats per token; ema is their average,",
        "which does not count. Validation and compilation stand outside the training time.",
    ]
