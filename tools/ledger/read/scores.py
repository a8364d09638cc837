"""The scores of a run, one row for each that the trainer logs.

The table of seeds, submission.json and `record verify` follow from this table, so a new score is a new row.
"""

from __future__ import annotations

from typing import NamedTuple

from ledger.read.runlog import RunLog


class Score(NamedTuple):
    """A score that a log may hold.

    column: its heading in the table of seeds. line: the first word of its log line, in which {weights} stands
    for the format of the shipped weights, such as int6. metric: the last word of final_score's metric when
    this score is the one that counts, or None if it never is. key: its key in submission.json's seed_results,
    which ends in _val_bpb, or None. note: the sentence below the table of seeds. A score with a note has a
    column, and a key, only where some run computed it.
    """

    column: str
    line: str
    metric: str | None = None
    key: str | None = None
    note: str | None = None

    def line_of(self, run: RunLog) -> str:
        """Return the first word of the log line that holds this score to eight digits."""
        return self.line.format(weights=run.weights_format)

    def bpb(self, run: RunLog) -> float | None:
        """Return the bits per byte, or None when the run did not compute this score."""
        line = self.line_of(run)
        return run.number(line, "val_bpb") if run.has(line, "val_bpb") else None


CHUNKED = Score("int6 chunked", "final_{weights}_roundtrip_exact", metric="chunked", key="int6_val_bpb")
SCORES = (  # as the columns stand
    Score("live", "final_live", key="live_val_bpb"),
    Score("ema", "final_ema", key="ema_val_bpb"),
    CHUNKED,
    Score("int6 sliding", "final_{weights}_sliding_window_exact", metric="sliding"),
    Score(
        "int6 ttt",
        "final_{weights}_ttt_exact",
        metric="ttt",
        note="int6 ttt is sliding, too, by weights that learn from each chunk of tokens once it is scored.",
    ),
)


def computed_scores(runs: list[RunLog]) -> list[Score]:
    """Return the scores that a table of these runs has columns for."""
    return [
        score for score in SCORES if score.note is None or any(score.bpb(run) is not None for run in runs)
    ]


def counted_score(metric: str) -> Score:
    """Return the score that the last word of a metric such as `int6_lzma_sliding` names.

    Two scores that slide need two last words; of rows with the same one, the first is meant. Any unknown one
    means chunked.
    """
    last_word = metric.rpartition("_")[2]
    return next((score for score in SCORES if score.metric == last_word), CHUNKED)
