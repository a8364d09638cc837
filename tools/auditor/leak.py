"""T6: the validation text is not in the training text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from auditor.protocols import ByteCounts
from auditor.subject import Audit, Verdict


class Hashes(NamedTuple):
    """64-bit hashes of a token stream's text."""

    spans: np.ndarray  # of a number of words each
    documents: np.ndarray


def hash_text(tokens: np.ndarray, counts: ByteCounts, bos_id: int, n: int) -> Hashes:
    """Hash all spans of n words and all documents of a token stream.

    A word begins at a token with a leading space and after a document start. The hash of tokens a to b is
    polynomial modulo 2^64 in a random value per token: a difference of prefix sums times an inverse power.
    """
    base = 0x9E3779B97F4A7C15
    inverse = pow(base, -1, 1 << 64)
    values = np.random.default_rng(13).integers(0, 1 << 64, len(counts.base), dtype=np.uint64)
    power = np.cumprod(np.full(len(tokens), np.uint64(base)), dtype=np.uint64)
    undo = np.cumprod(np.full(len(tokens), np.uint64(inverse)), dtype=np.uint64)
    prefix = np.concatenate([[np.uint64(0)], np.cumsum(values[tokens] * power, dtype=np.uint64)])

    def hashes(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        return (prefix[end] - prefix[begin]) * undo[begin]

    starts = np.flatnonzero(tokens == bos_id)
    first = np.zeros(len(tokens), bool)
    first[np.minimum(starts + 1, len(tokens) - 1)] = True
    words = np.flatnonzero((counts.space[tokens] | first) & (tokens != bos_id))
    begin = words[:-n]
    end = words[n:]
    inside = np.searchsorted(starts, begin) == np.searchsorted(starts, end)  # of one document

    body = starts + 1
    body_end = np.append(starts[1:], len(tokens))
    full = body < body_end
    return Hashes(hashes(begin[inside], end[inside]), hashes(body[full], body_end[full]))


# Limits of T6, as fractions of the validation split.
LEAKED_DOCUMENTS = 0.001  # not zero: the web honestly repeats short documents
LEAKED_SPANS = 0.05  # clean text shares well under 1 % of its spans, a leaked split nearly all
SPAN_WORDS = 13


def audit_leak(audit: Audit) -> Verdict:
    """T6: few validation documents, and few of their 13-word spans, are in the training shards."""
    run = audit.run
    h = run.h
    val = hash_text(run.held_out("val"), run.dataset.counts, h.bos_id, SPAN_WORDS)
    spans = np.unique(val.spans)
    documents = np.unique(val.documents)
    span_found = np.zeros(len(spans), bool)
    document_found = np.zeros(len(documents), bool)
    files = audit.script.split_files(h.data_path, "train")
    audit.progress.expect(len(files), "training shards")
    for file in files:
        tokens = np.asarray(audit.script.load_shard(file, h.vocab_size))
        train = hash_text(tokens, run.dataset.counts, h.bos_id, SPAN_WORDS)
        span_found |= np.isin(spans, train.spans)
        document_found |= np.isin(documents, train.documents)
        audit.progress.advance()

    span_rate = span_found.sum() / max(1, len(spans))
    document_rate = document_found.sum() / max(1, len(documents))
    documents_found = f"{document_found.sum()} of {len(documents)} documents"
    spans_found = f"{100 * span_rate:.3f} % of {len(spans)} {SPAN_WORDS}-word spans"
    return Verdict(
        "T6 leak",
        bool(document_rate <= LEAKED_DOCUMENTS and span_rate < LEAKED_SPANS),
        f"{documents_found} (limit {100 * LEAKED_DOCUMENTS:.1f} %) and {spans_found} "
        f"(limit {100 * LEAKED_SPANS:.0f} %) are in {len(files)} training shards",
    )
