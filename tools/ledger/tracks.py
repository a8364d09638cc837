"""The tracks of the ledger and their limits."""

from __future__ import annotations

from dataclasses import dataclass

CAP_BYTES = 16_000_000  # decimal: artifact + packed code, decided for every seed
RECORD_SEEDS = 3


@dataclass(frozen=True)
class Target:
    """The target of a track of races, and what shows that it is reached."""

    loss: float  # nats per token of the last validation
    minimizes: str  # what its records are ranked by: steps | time
    rule: str  # how significance is decided: a row of RULES in ledger/races.py
    runs: int  # a record has at least this many
    val_tokens: int  # only so many tokens count, from the start of the split; 0: all


@dataclass(frozen=True)
class Track:
    """Limits of a track. Seconds that are None are not limited."""

    title: str
    preset: str  # the preset that trains for the track
    train_s: float | None
    eval_s: float | None
    ranks: int | None  # processes of a record, one GPU each
    device: str  # part of the device name of a record
    whole_split: bool  # whether a record scores every validation token
    target: Target | None = None  # set for races, which make no artifact and end after a number of steps


GPT2_VAL_TOKENS = 10_485_760  # modded-nanogpt's: 20 batches of 524,288

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
    "track_h100x2_10min": Track(
        title="two H100, 600 s of training, 16,000,000 bytes",
        preset="h100x2",
        train_s=600.0,
        eval_s=600.0,
        ranks=2,
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
    "track_gpt2_124m": Track(
        title="8xH100, least time to a loss of 3.28, GPT-2 tokens",
        preset="gpt2_124m",
        train_s=None,
        eval_s=None,
        ranks=8,
        device="H100",
        whole_split=False,
        target=Target(loss=3.28, minimizes="time", rule="t_test", runs=3, val_tokens=GPT2_VAL_TOKENS),
    ),
    "track_gpt2_124m_h100x1": Track(
        title="one H100, least time to a loss of 3.28, GPT-2 tokens",
        preset="gpt2_124m_h100x1",
        train_s=None,
        eval_s=None,
        ranks=1,
        device="H100",
        whole_split=False,
        target=Target(loss=3.28, minimizes="time", rule="t_test", runs=3, val_tokens=GPT2_VAL_TOKENS),
    ),
    "track_optimizer_race": Track(
        title="any machine, fewest steps to a loss of 3.28, GPT-2 tokens",
        preset="optimizer_race",
        train_s=None,
        eval_s=None,
        ranks=None,
        device="",
        whole_split=False,
        target=Target(loss=3.28, minimizes="steps", rule="margin", runs=3, val_tokens=GPT2_VAL_TOKENS),
    ),
    "track_optimizer_race_small": Track(
        title="any machine, fewest steps to a loss of 2.25, 1,024 tokens",
        preset="optimizer_race_small",
        train_s=None,
        eval_s=None,
        ranks=None,
        device="",
        whole_split=False,
        target=Target(loss=2.25, minimizes="steps", rule="t_test", runs=10, val_tokens=0),
    ),
}


def track_of(preset: str) -> str:
    """Return the track that a preset trains for, "" if it is none's."""
    return next((name for name, track in TRACKS.items() if track.preset == preset), "")


def target_of(track: str) -> Target | None:
    """Return the target of a track, None if it has none or there is no such track."""
    return TRACKS[track].target if track in TRACKS else None
