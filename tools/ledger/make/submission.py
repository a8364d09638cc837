"""Turns the logs of a record into its submission.json and config.json."""

from __future__ import annotations

import math
from collections.abc import Callable

from ledger import stats
from ledger.files import read_text, sha256
from ledger.read.knobs import run_knobs, with_trait
from ledger.read.runlog import RunLog, config_value
from ledger.read.scores import SCORES
from script import BadInput

SCHEMA_VERSION = 1
META_KEYS = ("name", "author", "github_id", "date", "track", "record", "parent", "blurb")


def common(runs: list[RunLog], what: str, value: Callable[[RunLog], object]) -> object:
    """Return value(run), which must be equal for all runs. Raises BadInput naming two logs that disagree."""
    first = value(runs[0])
    for run in runs[1:]:
        if value(run) != first:
            raise BadInput(
                f"{what} differs: {first} in {runs[0].path.name} and {value(run)} in "
                f"{run.path.name}; the seeds of a record share script, machine and data"
            )
    return first


def common_config(runs: list[RunLog]) -> dict[str, object]:
    """Return the resolved config without seed and paths.

    Of knobs that keep a run from being lost, whose values may differ, it has the first run's. Raises BadInput
    naming a log without config, or the first other key on which two logs differ.
    """
    first = runs[0]
    left_out = run_knobs()
    free = (*left_out, *with_trait("BACKUP"))
    for run in runs:
        if not run.config:
            raise BadInput(f"{run.path}: no config: block after the second line of '='")
        for key in sorted(set(first.config) | set(run.config)):
            if key in free:
                continue
            if first.config.get(key) != run.config.get(key):
                raise BadInput(
                    f"config differs: {key} is {first.config.get(key)} in {first.path.name} and "
                    f"{run.config.get(key)} in {run.path.name}; a record has one config"
                )
    return {key: config_value(value) for key, value in sorted(first.config.items()) if key not in left_out}


def keyed_scores(run: RunLog) -> dict[str, float | None]:
    """Return the bpb of the scores that have a key; one with a note only if the run computed it."""
    found = {score: score.bpb(run) for score in SCORES if score.key}
    return {score.key: bpb for score, bpb in found.items() if bpb is not None or score.note is None}


def seed_result(run: RunLog) -> dict[str, object]:
    """Return the entry of one seed: losses in nats per token, bpb, times in ms, sizes in bytes and MiB."""
    steps = run.count("final_score", "steps")
    train_ms = run.count("final_score", "train_time")
    return {
        "val_loss": run.number("final_score", "val_loss"),
        "val_bpb": run.number("final_score", "val_bpb"),
        **keyed_scores(run),
        "steps": steps,
        "train_time_ms": train_ms,
        "step_avg_ms": round(train_ms / max(steps, 1), 2),
        "eval_time_ms": run.count("final_score", "eval_time"),
        "compile_ms": run.count("phase_times", "compile"),
        "peak_mib": run.sizes.get("peak"),
        "artifact_bytes": run.size("artifact"),
        "artifact_sha256": run.text("final_score", "sha256"),
        "log_sha256": sha256(read_text(run.path)),
        "report": {split: float(report["val_bpb"]) for split, report in sorted(run.reports.items())},
    }


def by_distinct_seed(runs: list[RunLog]) -> dict[int, RunLog]:
    """Return the runs by seed, in order. Raises BadInput naming the logs that share a seed."""
    found: dict[int, list[RunLog]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        found.setdefault(run.seed, []).append(run)

    twice = sorted(run.path.name for group in found.values() if len(group) > 1 for run in group)
    if twice:
        raise BadInput(f"one seed, several logs: {', '.join(twice)}; every log needs its own seed")
    return {seed: group[0] for seed, group in found.items()}


def eval_stride(run: RunLog) -> int | None:
    """Return the stride that the sliding score used, or that the config names, or None."""
    printed = [facts["stride"] for facts in run.facts.values() if "stride" in facts]
    stride = printed[0] if printed else run.config.get("eval_stride")
    return int(stride) if stride else None


def submission(runs: list[RunLog], meta: dict[str, object]) -> dict[str, object]:
    """Return submission.json from finished logs of distinct seeds and a given `meta` (META_KEYS).

    Raises BadInput naming the log that lacks a figure or disagrees with the first.
    """
    by_seed = by_distinct_seed(runs)
    results = {str(seed): seed_result(run) for seed, run in by_seed.items()}

    def column(key: str) -> list[float]:
        return [result[key] for result in results.values()]

    def spread(key: str) -> float | None:
        value = stats.std(column(key))
        return None if value is None else round(value, 8)

    bytes_code = common(runs, "bytes_code", lambda run: run.count("final_score", "bytes_code"))
    return {
        "schema": SCHEMA_VERSION,
        **{key: meta[key] for key in META_KEYS},
        "val_bpb": round(stats.mean(column("val_bpb")), 8),
        "val_bpb_std": spread("val_bpb"),
        "val_loss": round(stats.mean(column("val_loss")), 8),
        "val_loss_std": spread("val_loss"),
        "metric": common(runs, "metric", lambda run: run.text("final_score", "metric")),
        "eval_stride": eval_stride(runs[0]),
        "seeds": list(by_seed),
        "seed_results": results,
        "bytes_code": bytes_code,
        "bytes_total": max(column("artifact_bytes")) + bytes_code,
        "artifact_bytes_mean": round(stats.mean(column("artifact_bytes")), 2),
        "artifact_bytes_max": max(column("artifact_bytes")),
        **provenance(runs),
    }


def provenance(runs: list[RunLog]) -> dict[str, object]:
    """Return what ran and on what: hardware, versions, script and data, which the runs share.

    Raises BadInput naming two logs that disagree.
    """

    def version(name: str) -> object:
        return common(runs, f"{name} version", lambda run: run.versions[name])

    def count(line: str, key: str) -> object:
        return common(runs, key, lambda run: run.count(line, key))

    return {
        "hardware": common(runs, "hardware", lambda run: run.hardware),
        "pytorch_version": version("torch"),
        "cuda_version": version("cuda"),
        "triton_version": version("triton"),
        "python_version": version("python"),
        "train_gpt_sha256": common(runs, "source", lambda run: sha256(run.source)),
        "data_manifest_sha256": common(
            runs, "data manifest", lambda run: run.text("data", "manifest_sha256")
        ),
        "tokenizer_sha256": common(runs, "tokenizer", lambda run: run.text("data", "tokenizer_sha256")),
        "val_tokens": count("data", "val_tokens"),
        "val_bytes": count("data", "val_bytes"),
    }


def bits_per_byte(val_loss: float, tokens: int, data_bytes: int) -> float:
    """Return bits per byte of nats per token, over `tokens` tokens that spell `data_bytes` bytes."""
    return val_loss / math.log(2) * tokens / max(data_bytes, 1)
