"""Says how a run's score compares with the best record of its track."""

from __future__ import annotations

from pathlib import Path

from ledger.folders import record_folders
from ledger.races import is_race
from ledger.read.runlog import RunLog
from ledger.show.board import best_first, read_submission
from ledger.tracks import target_of, track_of
from script import BadInput


def compare_with_board(run: RunLog, records: Path) -> str:
    """Return how a finished run compares with its preset's track, "" if that has no record of its kind.

    Scores compare only on the same text: the same manifest, and as many of its tokens.
    """
    track = track_of(run.preset)
    if is_race(run) != (target_of(track) is not None):
        return ""
    try:
        subs = [read_submission(folder) for folder in record_folders(records) if folder.parent.name == track]
    except BadInput:
        return ""
    subs = best_first([sub for sub in subs if sub["record"]])
    if not subs:
        return ""

    same = [sub for sub in subs if is_same_text(run, sub)]
    if not same:
        best = subs[0]
        figure = best["val_loss"] if "target" in best else best["val_bpb"]
        return (
            f"the best of {track} is {figure:.4f} ({best['name']}), scored on other text: "
            "the two do not compare"
        )

    best = same[0]
    if "target" in best:
        return (
            f"the best of {track}, {best['name']}, took {best['steps']:,} steps and "
            f"{best['train_time_ms'] / 1000:.1f} s, {len(best['seeds'])} runs; one run decides no race"
        )
    gap = run.number("final_score", "val_bpb") - best["val_bpb"]
    side = "above" if gap > 0 else "below"
    return (
        f"{abs(gap):.4f} {side} the best of {track} on this text, {best['val_bpb']:.4f} ({best['name']}); "
        "lower is better"
    )


def is_same_text(run: RunLog, sub: dict) -> bool:
    """Return whether a run was scored on the text of a submission."""
    data = run.facts.get("data", {})
    recorded = (sub["data_manifest_sha256"], sub["val_tokens"])
    return recorded == (data.get("manifest_sha256"), int(data.get("val_tokens", -1)))
