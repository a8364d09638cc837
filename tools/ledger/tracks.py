"""The tracks of the ledger and their limits."""

from __future__ import annotations

from dataclasses import dataclass

CAP_BYTES = 16_000_000  # decimal: artifact + packed code, decided for every seed
RECORD_SEEDS = 3


@dataclass(frozen=True)
class Track:
    """Limits of a track. Seconds that are None are not limited."""

    title: str
    preset: str  # which trains for it
    train_s: float | None
    eval_s: float | None
    ranks: int | None  # processes of a record, one GPU each
    device: str  # part of the device name of a record
    whole_split: bool  # whether a record scores every validation token


TRACKS = {
    "track_10min_16mb": Track(
        title="8xH100, 600 s of training, 600 s of evaluation, 16,000,000 bytes",
        preset="record",
        train_s=600.0,
        eval_s=600.0,
        ranks=8,
        device="H100",
        whole_split=True,
    ),
    "track_h100x1_5min": Track(
        title="one H100, 300 s of training, 16,000,000 bytes",
        preset="h100x1",
        train_s=300.0,
        eval_s=600.0,
        ranks=1,
        device="H100",
        whole_split=True,
    ),
    "track_cpu": Track(
        title="a laptop, no time limit, 16,000,000 bytes",
        preset="cpu",
        train_s=None,
        eval_s=None,
        ranks=None,
        device="",
        whole_split=False,
    ),
}
