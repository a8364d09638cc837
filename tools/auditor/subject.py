"""The subject of the tests: a script, a run with the artifact's weights, and the text that they score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from auditor.protocols import Config, Lesson, Nats, Run, Scoring
from older_scripts import (
    chunk_of,
    counted_stride,
    gives_windows,
    learns_apart,
    plan_older_scores,
    takes_rows,
)
from progress import Progress


class Verdict(NamedTuple):
    """The outcome of one test, with its evidence of one line."""

    test: str
    ok: bool
    evidence: str


@dataclass(frozen=True)
class Audit:
    """The subject of the tests: the script, a run with the artifact's weights, and how it is scored."""

    script: ModuleType
    run: Run  # its model holds the artifact's weights
    blob: bytes  # the artifact
    piece: np.ndarray  # (N,) tokens from the middle of the validation split, document starts among them
    scoring: Scoring  # sliding, as in the final score, and learning if that learns
    chunk: int  # targets that are scored before they are learned from; 0: nothing is learned
    progress: Progress

    def nats(self, tokens: np.ndarray, scoring: Scoring | None = None) -> Tensor:
        """Score every target as the final score does, or as another ScoreSettings says: (N - 1,) float64."""
        out = self.script.score_targets(self.run.nats_fn, tokens, scoring or self.scoring, self.run.m)[0]
        dist.all_reduce(out)
        self.progress.advance()
        return out

    @contextmanager
    def learned(self) -> Iterator[Nats]:
        """Yield what scores the piece's second chunk; inside the block the model has the weights for it.

        An older script whose `learn` returns nothing keeps all that it has learned in the model.
        """
        if not self.chunk:
            yield self.run.nats_fn
            return
        tokens = torch.from_numpy(self.piece.astype(np.int32)).to(self.run.m.device)
        with self.scoring.learner() as learn:
            if gives_windows(self.script):
                changed = learn(tokens, self.first_lesson())
            else:
                changed = learn(tokens[: self.chunk + 1], 0.0)
            yield changed or self.run.nats_fn

    def first_lesson(self) -> Lesson:
        """Return the windows of the first chunk: its sequences, or itself for every sequence of a batch."""
        if learns_apart(self.script, self.scoring):
            start = np.zeros(self.scoring.batch * self.run.m.world_size, np.int64)
            end = start + self.chunk
        else:
            start = np.arange(0, self.chunk, self.scoring.seq_len)
            end = start + self.scoring.seq_len
        if takes_rows(self.script):
            return torch.from_numpy(np.stack([start, end, start], 1))
        return self.script.Windows(start=start, end=end, score_from=start)


def make_audit(script: ModuleType, run: Run, blob: bytes) -> Audit:
    """Make the Audit of a run whose model holds the weights of the artifact `blob`.

    Raises the script's InputError if test-time training would not repeat to the bit, or has less than three
    chunks of text.
    """
    h = run.h
    chunk = chunk_of(h)
    if chunk and run.m.device.type == "cuda" and not h.deterministic:
        raise script.InputError(
            "ttt_lr on a GPU: gradients do not repeat to the bit, which T1 and T3 compare; "
            "add deterministic=1, or leave it out of the audit with ttt_lr=0"
        )
    tokens = run.held_out("val")
    if chunk and len(tokens) <= 2 * chunk + 1:
        raise script.InputError(
            f"ttt_chunk_tokens={chunk}: {len(tokens)} tokens of val make fewer than three chunks; "
            "audit on more text or with smaller chunks"
        )

    scoring = plan_scores(script, run, chunk)
    if learns_apart(script, scoring):
        piece = choose_document(script, tokens, h, chunk)
    else:
        piece = choose_piece(tokens, h, chunk)
    return Audit(
        script=script,
        run=run,
        blob=blob,
        piece=piece,
        scoring=scoring,
        chunk=chunk,
        progress=Progress("auditing", run.log.status, run.log),
    )


def plan_scores(script: ModuleType, run: Run, chunk: int) -> Scoring:
    """Return the script's ScoreSettings of the final score, with a log that tells nothing: Progress does."""
    silent = script.Log("", None)
    if gives_windows(script):
        return run.scoring("audit", counted_stride(script, run.h), learns=chunk > 0)._replace(log=silent)
    return plan_older_scores(script, run, chunk, silent)


def size_of_piece(tokens: np.ndarray, h: Config, chunk: int) -> int:
    """Return the number of tokens in two chunks and a few score windows, at most all."""
    windows = 2 * h.eval_seq_len + 4 * h.eval_stride
    tail = h.eval_stride // 2 + 1  # the last window scores less than a stride
    return min(len(tokens), 2 * chunk + windows + tail)


def choose_piece(tokens: np.ndarray, h: Config, chunk: int) -> np.ndarray:
    """Return a piece of a split around a document start in the middle."""
    length = size_of_piece(tokens, h, chunk)
    starts = np.flatnonzero(tokens[: len(tokens) - length + 1] == h.bos_id)
    middle = int(starts[len(starts) // 2]) if len(starts) else 0
    begin = min(middle - h.eval_seq_len // 2, len(tokens) - length)
    begin = max(0, begin)
    return np.array(tokens[begin : begin + length])


def choose_document(script: ModuleType, tokens: np.ndarray, h: Config, chunk: int) -> np.ndarray:
    """Return the shortest document of three chunks and what follows it, so that others are in the piece.

    Raises the script's InputError if there is none.
    """
    starts = np.flatnonzero(tokens == h.bos_id)
    lengths = np.diff(np.append(starts, len(tokens)))
    long = np.flatnonzero(lengths > 2 * chunk + 1)
    if not len(long):
        raise script.InputError(
            f"ttt_chunk_tokens={chunk}: no document of val has three chunks; audit with smaller chunks"
        )
    begin = starts[long[lengths[long].argmin()]]
    return np.array(tokens[begin : begin + size_of_piece(tokens, h, chunk)])
