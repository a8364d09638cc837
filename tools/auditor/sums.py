"""T4, T5: the sum has every target once, over the bytes of the text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from auditor.probability import idle_learner
from auditor.protocols import Run
from auditor.subject import Audit, Verdict
from older_scripts import learns_apart


class Totals(NamedTuple):
    """Whether a split's totals agree with the manifest, and the evidence."""

    agree: bool
    evidence: str


def compare_with_manifest(run: Run, tokens: np.ndarray, size: int) -> Totals:
    """Compare a split's tokens and bytes (size) with those of the manifest, where it has them."""
    split = run.dataset.manifest.get("splits", {}).get("val", {})
    if not split:
        return Totals(True, "no manifest to compare with")
    if run.h.val_tokens:
        return Totals(True, "a part of the split")
    if len(tokens) == split.get("tokens") and split.get("decoded_bytes") in (None, size):
        return Totals(True, "manifest agrees")
    return Totals(False, f"manifest says {split.get('tokens')} tokens, {split.get('decoded_bytes')} bytes")


def count_scores(audit: Audit, tokens: np.ndarray) -> Tensor:
    """Count how often each target is scored, (N - 1,) float64. No model runs and nothing is learned."""
    m = audit.run.m
    scoring = audit.scoring
    audit.progress.expect(-(-(len(tokens) - 1) // m.world_size), "targets")

    def one_nat_each(x: Tensor, y: Tensor, last: int) -> Tensor:
        fresh = audit.chunk if learns_apart(audit.script, scoring) else last  # targets of a full window
        audit.progress.advance(x.size(0) * fresh)
        return torch.ones(x.size(0), last, device=x.device)

    if audit.chunk:
        scoring = scoring._replace(learner=partial(idle_learner, one_nat_each))
    counts_of_scores = audit.script.score_targets(one_nat_each, tokens, scoring, m)[1]
    dist.all_reduce(counts_of_scores)
    return counts_of_scores


def score_is_sum(audit: Audit) -> bool:
    """Return whether the script's evaluate gives the sums of its targets' scores and bytes."""
    counts = audit.run.dataset.counts
    audit.progress.expect(2, "scores")
    nats = audit.nats(audit.piece).sum().item()
    score = audit.script.evaluate(audit.run.nats_fn, audit.piece, counts, audit.scoring, audit.run.m)
    audit.progress.advance()
    targets = len(audit.piece) - 1
    bpb = nats / math.log(2) / int(counts.of(audit.piece).sum())
    pairs = ((score.loss, nats / targets), (score.bpb, bpb), (score.tokens, targets))
    return all(abs(given / wanted - 1) < 1e-9 for given, wanted in pairs)


def audit_coverage(audit: Audit) -> Verdict:
    """T4: every target of the split is scored exactly once, and the totals are the manifest's."""
    run = audit.run
    tokens = run.held_out("val")
    times_scored = count_scores(audit, tokens)
    wrong = int((times_scored != 1).sum())
    size = int(run.dataset.counts.of(tokens).sum())
    totals = compare_with_manifest(run, tokens, size)
    sums = score_is_sum(audit)
    return Verdict(
        "T4 coverage",
        wrong == 0 and totals.agree and sums,
        f"{times_scored.numel()} targets, {wrong} not scored exactly once; {size} bytes; {totals.evidence}; "
        f"the score is {'' if sums else 'not '}the sum over its targets",
    )


class Tokenizer(NamedTuple):
    """The tokenizer of a dataset itself, not what the audited script makes of it."""

    decode: Callable[[list[list[int]]], list[str]]  # documents' token ids -> texts
    unknown: int  # the piece for text that the vocabulary cannot spell; -1: none


def tokenizer_of(run: Run) -> Tokenizer:
    """Return the tokenizer of a run's dataset."""
    named = run.dataset.manifest.get("tokenizer", {})
    if named.get("encoding") and not run.h.tokenizer_path:
        import tiktoken

        return Tokenizer(tiktoken.get_encoding(named["encoding"]).decode_batch, -1)

    import sentencepiece

    path = run.h.tokenizer_path or os.path.join(run.h.data_path, named["file"])
    sp = sentencepiece.SentencePieceProcessor(model_file=path)
    space = "\u2581"
    # decode drops a document's first space if add_dummy_prefix or remove_extra_whitespaces is on. It keeps
    # one that is spelled in bytes, as where the vocabulary has no piece for a space: drop that here.
    byte = sp.piece_to_id("<0xE2>")
    in_bytes = sp.is_unknown(sp.piece_to_id(space)) and sp.is_byte(byte)
    plain = sp.encode("x")
    is_dropped = byte in plain or sp.encode(" x") == plain
    first = " " if in_bytes and is_dropped else ""

    def decode(documents: list[list[int]]) -> list[str]:
        return [text.replace(space, " ").removeprefix(first) for text in sp.decode(documents)]

    return Tokenizer(decode, sp.unk_id())


DECODED_AT_ONCE = 256  # documents


def audit_bytes(audit: Audit) -> Verdict:
    """T5: the denominator is the UTF-8 length of the decoded documents, one by one.

    An unknown piece stands for text that is lost, so that no denominator is right: none may be in the split.
    """
    run = audit.run
    tokenizer = tokenizer_of(run)
    tokens = run.held_out("val")[:2_000_000]
    starts = np.flatnonzero(tokens == run.h.bos_id)
    ends = np.append(starts[1:], len(tokens))
    bytes_before = np.concatenate([[0], np.cumsum(run.dataset.counts.of(tokens))])

    whole = max(len(starts) - 1, 0)  # the last document may be cut inside a character
    audit.progress.expect(whole, "documents")
    wrong = 0
    for first in range(0, whole, DECODED_AT_ONCE):
        some = slice(first, min(first + DECODED_AT_ONCE, whole))
        spans = list(zip(starts[some], ends[some]))
        texts = tokenizer.decode([tokens[start + 1 : end].tolist() for start, end in spans])
        for (start, end), text in zip(spans, texts):
            counted = bytes_before[end - 1] - bytes_before[start]
            wrong += int(counted != len(text.encode()))
        audit.progress.advance(len(spans))
    unknown = int((run.held_out("val") == tokenizer.unknown).sum())
    return Verdict(
        "T5 byte accounting",
        wrong == 0 and unknown == 0,
        f"{whole} documents decoded, {wrong} counted with another length; {unknown} unknown pieces",
    )
