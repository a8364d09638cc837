"""T1, T2, T3: each score is a probability, and depends on earlier tokens only."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from auditor.protocols import Lesson, Nats
from auditor.subject import Audit, Verdict
from older_scripts import targets_of


class Moved(NamedTuple):
    """How many scores changed, and by how many nats at most."""

    scores: int
    nats: float

    def __str__(self) -> str:
        amount = f", by {self.nats:.2g} nats at most" if self.scores else ""
        return f"{self.scores} earlier scores moved{amount}"


def count_moved(gaps: Tensor) -> Moved:
    """Count the gaps that are not zero. A score that is not a number has moved, by infinitely much."""
    if gaps.numel() == 0:
        return Moved(0, 0.0)
    return Moved(int((gaps != 0).sum()), gaps.nan_to_num(nan=math.inf).max().item())


def total_moved(parts: list[Moved]) -> Moved:
    """Return all scores that moved, and the largest move."""
    return Moved(sum(part.scores for part in parts), max((part.nats for part in parts), default=0.0))


def replace_later_tokens(audit: Audit, cuts: list[int], seed: int) -> Moved:
    """Replace all tokens from each cut on, and count the earlier targets whose scores change.

    Target j is token j + 1: with tokens from `cut` on replaced, targets up to cut - 2 must keep their scores.
    """
    random = np.random.default_rng(seed)
    audit.progress.expect(1 + len(cuts), "scores")
    before = audit.nats(audit.piece)
    parts = []
    for cut in cuts:
        changed = audit.piece.copy()
        changed[cut:] = random.integers(0, audit.run.h.vocab_size, len(changed) - cut)
        gaps = (audit.nats(changed) - before).abs()
        parts.append(count_moved(gaps[: max(0, cut - 1)]))
    return total_moved(parts)


def replace_later_inputs(audit: Audit) -> Moved:
    """Replace a batch's inputs from a column on, keep all targets, and count scores that change before it.

    Replacing a token of the stream also replaces a target; only this finds a model that reads its target.
    """
    scoring = audit.scoring
    device = audit.run.m.device
    random = np.random.default_rng(4)
    piece = torch.from_numpy(audit.piece[: scoring.seq_len + 1].astype(np.int64))
    inputs = piece[:-1].expand(scoring.batch, -1).contiguous()
    targets = piece[1:].expand(scoring.batch, -1).contiguous().to(device)
    cuts = torch.from_numpy(random.integers(1, scoring.seq_len, scoring.batch))[:, None]
    other = torch.from_numpy(random.integers(0, audit.run.h.vocab_size, inputs.shape))
    keep = torch.arange(scoring.seq_len) < cuts
    changed = torch.where(keep, inputs, other)

    with audit.learned() as nats_fn, torch.no_grad():
        before = nats_fn(inputs.to(device), targets, scoring.seq_len)
        after = nats_fn(changed.to(device), targets, scoring.seq_len)
    return count_moved((after - before).abs().cpu()[keep])


def starts_that_see_back(audit: Audit) -> int:
    """Count document starts, of the first eight, whose embedding changes with the token before them."""
    h = audit.run.h
    starts = np.flatnonzero(audit.piece == h.bos_id)
    seeing = 0
    for start in starts[starts > 0][:8]:
        pair = torch.from_numpy(np.stack([audit.piece[start - 1 : start + 1]] * 2).astype(np.int64))
        pair[1, 0] = (pair[1, 0] + 1) % h.vocab_size
        with torch.no_grad():
            first, second = audit.run.model.embed(pair.to(audit.run.m.device))[:, 1]
        seeing += int((first != second).any())
    return seeing


def audit_causality(audit: Audit) -> Verdict:
    """T1: no score depends on a later token, and no embedding of a document start on the document before."""
    size = len(audit.piece)
    stride = audit.scoring.stride
    window = audit.scoring.seq_len
    starts = np.flatnonzero(audit.piece == audit.run.h.bos_id)
    random = np.random.default_rng(1)

    cuts = {2, stride, window, window + 1, window + stride, size - 1}
    cuts.update(random.integers(2, size, 4).tolist())
    cuts.update(int(start) + offset for start in starts[:2] for offset in (0, 1))
    if audit.chunk:  # at and after the first targets of the chunks that are scored after learning
        cuts.update(i * audit.chunk + offset for i in (1, 2) for offset in (0, 1, 2, stride + 1))
    cuts = sorted(cut for cut in cuts if 2 <= cut < size)

    moved = total_moved([replace_later_tokens(audit, cuts, 2), replace_later_inputs(audit)])
    seeing = starts_that_see_back(audit)
    return Verdict(
        "T1 causality",
        moved.scores == 0 and seeing == 0,
        f"{len(cuts)} cuts, {moved}; {seeing} document starts see the token before them",
    )


def audit_normalization(audit: Audit) -> Verdict:
    """T2: at every position exp(-nats) sums to 1 over the vocabulary, in full windows and in sliding ones."""
    h = audit.run.h
    device = audit.run.m.device
    scoring = audit.scoring
    piece = torch.from_numpy(audit.piece[: scoring.seq_len].astype(np.int64))
    x = piece.to(device).expand(scoring.batch, -1).contiguous()
    errors = []
    vocabulary = torch.arange(h.vocab_size, device=device).split(scoring.batch)
    audit.progress.expect(2 * len(vocabulary), "passes")
    with audit.learned() as nats_fn, torch.no_grad():
        for last in (scoring.seq_len, scoring.stride):
            total = torch.zeros(last, dtype=torch.float64, device=device)
            for ids in vocabulary:
                # each sequence of the batch has one token of the vocabulary as all its targets
                padded = F.pad(ids, (0, scoring.batch - len(ids)))
                y = padded[:, None].expand(scoring.batch, scoring.seq_len).contiguous()
                nats = nats_fn(x, y, last)[: len(ids)]
                total += (-nats.double()).exp().sum(0)
                audit.progress.advance()
            errors.append((total - 1).abs().max())
    error = torch.stack(errors).max().item()  # nan if one of them is; Python's max would drop it
    return Verdict(
        "T2 normalization",
        error < 1e-3,
        f"at {scoring.seq_len} + {scoring.stride} positions the largest |sum - 1| is {error:.1e}",
    )


class Learning(NamedTuple):
    """The effect of test-time training on the scores of the piece."""

    has_effect: bool  # on the scores after the first chunk, and only on them
    early: int  # tokens that are learned from before they are scored


def idle_learner(nats_fn: Nats) -> nullcontext:
    """Return the context of a learner that learns nothing, so that nats_fn scores all groups of windows."""
    return nullcontext(lambda *_: nats_fn)


def examine_learning(audit: Audit) -> Learning:
    """Score the piece with and without learning, and watch what the learner is given."""
    audit.progress.expect(2, "scores")
    idle = partial(idle_learner, audit.run.nats_fn)
    without = audit.nats(audit.piece, audit.scoring._replace(learner=idle))
    gaps = audit.nats(audit.piece) - without
    only_later = bool((gaps[: audit.chunk] == 0).all())
    has_effect = only_later and bool(gaps.any() and gaps.isfinite().all())
    return Learning(has_effect, tokens_learned_early(audit))


def tokens_learned_early(audit: Audit) -> int:
    """Count the tokens that the learner is given before they are scored. Tokens are positions; no model runs.

    T1's cuts cannot find this for the first target of a chunk: replacing its token also replaces the target.
    """
    m = audit.run.m
    scored = torch.zeros(len(audit.piece), device=m.device)
    early = 0

    def mark_scored(x: Tensor, y: Tensor, last: int) -> Tensor:
        scored[y[:, -last:]] = 1
        return torch.zeros(len(x), last, device=m.device)

    def learn(tokens: Tensor, lesson: Lesson | float, *_: object) -> Nats:
        nonlocal early
        dist.all_reduce(scored)
        early += int((scored[targets_of(tokens, lesson).long()] == 0).sum())
        return mark_scored

    scoring = audit.scoring._replace(learner=lambda: nullcontext(learn))
    audit.script.score_targets(mark_scored, np.arange(len(audit.piece)), scoring, m)
    return early


def audit_score_before_update(audit: Audit) -> Verdict:
    """T3: each chunk is first scored in a state that has seen nothing of the chunk."""
    stride = audit.scoring.stride
    size = len(audit.piece)
    cuts = {start + 1 for start in range(stride, size - 1, max(stride, size // 6))}
    evidence = f"{len(cuts)} chunk starts"
    ok = True
    if audit.chunk:
        # the first target of a chunk is replaced, or all after it
        cuts.update(i * audit.chunk + offset for i in (1, 2) for offset in (1, 2))
        learning = examine_learning(audit)
        ok = learning.has_effect and learning.early == 0
        evidence += " and 2 after learning"
        if not learning.has_effect:
            evidence += " that changes no score, or changes an earlier one"
        evidence += f", {learning.early} tokens learned before they are scored"

    moved = replace_later_tokens(audit, sorted(cuts), 3)
    return Verdict("T3 score before update", ok and moved.scores == 0, f"{evidence}, {moved}")
