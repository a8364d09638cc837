"""Broken scorers and splits: T1, T2 and T3 on later tokens and sums, T4 on every target once."""

import dataclasses
import json
import math
from collections.abc import Callable, Set
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.audit.audit_cases import Expected, audited, config, fresh, learning, on_data, trained, with_nats
from tests.helpers import joined, write_shard
from tests.rank_cases import group_of_one

# ---------------------------------------------------------------- T1, T2, T3: the scorer


def nats_of(model):
    """Return the nats_fn of a model."""

    def nats_fn(x, y, last):
        return model.nats(x, y, last)

    return nats_fn


def twin(run, kind=t.GPT, ops=None):
    """Return the run with its weights in a model of another class or with other operations."""
    model = kind(run.h, ops or t.Ops(), run.m.dtype)
    model.load_state_dict(run.model.state_dict())
    return fresh(run, model=model, nats_fn=nats_of(model))


def attend_all(q, k, v, window=0, documents=None):
    """Attend without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def attend_one_ahead(q, k, v, window=0, documents=None):
    """Attend under a mask that is off by one: each position sees the next."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


class SmearAcross(t.GPT):
    """The smear looks across a document start."""

    def embed(self, tokens):
        inside = torch.where(tokens == self.h.bos_id, self.h.bos_id + 1, tokens)
        x = super().embed(tokens)
        y = t.rms_norm(F.embedding(inside, self.tok_emb))
        gate = torch.sigmoid(self.smear_gate) * (tokens == self.h.bos_id)[..., None]
        return torch.lerp(x, F.pad(y[:, :-1], (0, 0, 1, 0)), gate)


class BigramAcross(t.GPT):
    """The hashed bigram of a document's first token holds the last token of the document before."""

    def embed(self, tokens):
        previous = F.pad(tokens[:, :-1], (1, 0))
        bucket = torch.bitwise_xor(36313 * tokens, 27191 * previous) % (self.h.bigram_vocab_size - 1)
        across = F.linear(F.embedding(bucket, self.bigram_emb), self.bigram_scale * self.bigram_proj)
        return super().embed(tokens) + across * (tokens == self.h.bos_id)[..., None]


class BigramAhead(t.GPT):
    """The hashed bigram reads the next token."""

    def embed(self, tokens):
        following = F.pad(tokens[:, 1:], (0, 1))
        bucket = torch.bitwise_xor(36313 * tokens, 27191 * following) % (self.h.bigram_vocab_size - 1)
        ahead = F.linear(F.embedding(bucket, self.bigram_emb), self.bigram_scale * self.bigram_proj)
        return super().embed(tokens) + ahead


def cached(run, gate):
    """Give a bonus to targets that have occurred in the window, for which no other token pays.

    gate: take the better of two experts where the target has occurred.
    """

    def nats_fn(x, y, last):
        nats = run.model.nats(x, y, last)
        seen = []
        for i in range(y.size(1) - last, y.size(1)):
            seen.append((x[:, : i + 1] == y[:, i : i + 1]).any(1))
        hit = torch.stack(seen, 1)
        if gate:
            return torch.where(hit, nats.clamp_max(np.log(x.size(1))), nats)
        return -(0.8 * (-nats).exp() + 0.2 * hit).log()

    return with_nats(run, nats_fn)


def best_of_two(run):
    """Score each target under two temperatures, and keep the lower loss."""

    def nats_fn(x, y, last):
        logits = run.model.unembed(run.model.trunk(x)[:, -last:]).transpose(1, 2)
        scores = [F.cross_entropy(logits / heat, y[:, -last:], reduction="none") for heat in (1.0, 1.5)]
        return torch.minimum(*scores)

    return with_nats(run, nats_fn)


def in_sliding_windows(run):
    """Use the cache only where few targets of a score window are scored, as in the final score."""
    with_cache = cached(run, gate=False)

    def nats_fn(x, y, last):
        scorer = run if last == y.size(1) else with_cache
        return scorer.nats_fn(x, y, last)

    return with_nats(run, nats_fn)


def after_64(run):
    """In longer score windows, give targets after 64 tokens a bonus for which no other token pays."""

    def nats_fn(x, y, last):
        late = torch.arange(x.size(1) - last, x.size(1)) >= 64
        return run.model.nats(x, y, last) - 0.3 * late

    h = dataclasses.replace(run.h, eval_seq_len=128, eval_stride=32, eval_batch_tokens=512)
    return fresh(run, h=h, nats_fn=nats_fn)


def not_a_number(run, where):
    """Return the run with scores that are not numbers where the mask of positions `where`(columns) says."""

    def nats_fn(x, y, last):
        columns = torch.arange(x.size(1) - last, x.size(1))
        return run.model.nats(x, y, last).masked_fill(where(columns), math.nan)

    return with_nats(run, nats_fn)


class BrokenScorer(NamedTuple):
    """The tests that must fail with a broken scorer, and those that may. plant: (run, monkeypatch) -> run."""

    must: set[str]
    plant: Callable
    may: Set[str] = frozenset()


NOT_A_NUMBER = {"T1", "T2", "T3", "T4", "T7"}
SCORERS = {
    "attention without a mask": BrokenScorer(
        {"T1", "T3"}, lambda run, mp: twin(run, ops=t.Ops(attend=attend_all))
    ),
    "mask off by one": BrokenScorer(
        {"T1", "T3"}, lambda run, mp: twin(run, ops=t.Ops(attend=attend_one_ahead))
    ),
    "smear across a document start": BrokenScorer({"T1"}, lambda run, mp: twin(run, SmearAcross)),
    "bigram across a document start": BrokenScorer({"T1"}, lambda run, mp: twin(run, BigramAcross)),
    "bigram of the next token": BrokenScorer({"T1"}, lambda run, mp: twin(run, BigramAhead), may={"T3"}),
    "cache in sliding windows only": BrokenScorer({"T2"}, lambda run, mp: in_sliding_windows(run)),
    "cache that is warm after 64 tokens": BrokenScorer({"T2"}, lambda run, mp: after_64(run)),
    "n-gram cache not normalized": BrokenScorer({"T2"}, lambda run, mp: cached(run, gate=False)),
    "gate on whether the target is a hit": BrokenScorer({"T2"}, lambda run, mp: cached(run, gate=True)),
    "best of two temperatures": BrokenScorer({"T2"}, lambda run, mp: best_of_two(run)),
    "no score is a number": BrokenScorer(NOT_A_NUMBER, lambda run, mp: not_a_number(run, lambda c: c >= 0)),
    "the last score of a window is not a number": BrokenScorer(
        NOT_A_NUMBER, lambda run, mp: not_a_number(run, lambda c: c == run.h.eval_seq_len - 1)
    ),
    "update before score": BrokenScorer(
        {"T1", "T2", "T3"}, lambda run, mp: learning(run, mp, update_first=True)
    ),
    "second pass over the split": BrokenScorer(
        {"T1", "T2", "T3", "T7"}, lambda run, mp: learning(run, mp, reset=False), may={"T4"}
    ),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_broken_scorer_fails(name, honest, group, monkeypatch):
    scorer = SCORERS[name]
    fails, verdicts = audited(scorer.plant(honest.run, monkeypatch), honest.blob)
    assert Expected(scorer.must, scorer.may).meets(fails), (fails, verdicts)


def test_long_windows_pass(honest, group):
    """They are the honest part of a fault above."""
    h = dataclasses.replace(honest.h, eval_seq_len=128, eval_stride=32, eval_batch_tokens=512)
    fails, verdicts = audited(fresh(honest.run, h=h), honest.blob)
    assert not fails, verdicts


def test_windows_and_documents_pass(honest):
    h = config(honest.h.data_path, vocab_size=honest.h.vocab_size, attn_windows="5 0", doc_mask=1)
    run, blob = trained(h)
    with group_of_one():
        fails, verdicts = audited(run, blob)
    assert not fails, verdicts


# ---------------------------------------------------------------- T4: every target once


def rescored_tail(total, seq_len, stride):
    """Yield a window at every stride; those at the end of the split are short and score targets again."""
    for start in range(0, total, stride):
        end = min(start + seq_len, total)
        if start == 0:
            yield start, end, 0
        elif end - start >= stride:
            yield start, end, max(start, end - stride)


def dropped_tail(total, seq_len, stride):
    """Leave out a last window that scores fewer targets than the others."""
    for start, end, score_from in zip(*real_windows(total, seq_len, stride)):
        if end - score_from in (seq_len, stride):
            yield start, end, score_from


def skipped_context(total, seq_len, stride):
    """Leave out the first target of every window after the first."""
    for start, end, score_from in zip(*real_windows(total, seq_len, stride)):
        yield start, end, score_from if start == 0 else score_from + 1


def half_the_split(total, seq_len, stride):
    """Leave out the second half of the split."""
    return zip(*real_windows(total // 2, seq_len, stride))


real_windows = t.score_windows

WINDOWS = {
    "short windows at the end score again": rescored_tail,
    "the tail is dropped": dropped_tail,
    "one target of each window is dropped": skipped_context,
    "half of the split is scored": half_the_split,
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_do_not_tile_fail(name, honest, group, monkeypatch):
    tokens = honest.run.held_out("val")
    assert (len(tokens) - 1 - honest.h.eval_seq_len) % honest.h.eval_stride, "the split has no tail to drop"

    def score_windows(*sizes):
        return t.Windows(*np.array(list(WINDOWS[name](*sizes))).T)

    monkeypatch.setattr(t, "score_windows", score_windows)
    fails, verdicts = audited(fresh(honest.run), honest.blob)
    assert fails == {"T4"}, verdicts


def score_of(nats, tokens, counts):
    """Return the Score of a split with this sum of nats."""
    targets = len(tokens) - 1
    num_bytes = int(counts.of(tokens).sum())
    return t.Score(nats / targets, t.bpb(nats, num_bytes), targets, num_bytes, ms=0.0)


def worst_targets_dropped(nats_fn, tokens, counts, run, m):
    """Leave the worst hundredth of the targets out of the sum."""
    nats = t.score_targets(nats_fn, tokens, run, m).nats.sort().values
    kept = nats[: -max(1, len(nats) // 100)]
    return score_of(kept.sum().item(), tokens, counts)


def mean_of_batches(nats_fn, tokens, counts, run, m):
    """Average the means of the score windows, though the last one is shorter than the others."""
    nats = t.score_targets(nats_fn, tokens, run, m).nats
    mean = torch.stack([part.mean() for part in nats.split(run.stride)]).mean().item()
    return score_of(mean * nats.numel(), tokens, counts)


@pytest.mark.parametrize("evaluate", [worst_targets_dropped, mean_of_batches])
def test_an_evaluator_whose_sum_is_another_fails(evaluate, honest, group, monkeypatch):
    """score_targets is sound, but the sum over its scores is not."""
    monkeypatch.setattr(t, "evaluate", evaluate)
    fails, verdicts = audited(fresh(honest.run), honest.blob)
    assert fails == {"T4"}, verdicts


def test_a_split_cut_short_fails(honest, group, tmp_path):
    """The shard has fewer tokens than the manifest says."""
    run = on_data(honest, tmp_path)
    write_shard(tmp_path / "data" / "x_val_000000.bin", joined(honest.val)[:-40])
    fails, verdicts = audited(run, honest.blob)
    assert fails == {"T4"}, verdicts


def test_another_split_of_the_same_length_fails(honest, group, tmp_path):
    """The shard has as many tokens as the manifest says, but other bytes."""
    run = on_data(honest, tmp_path)
    tokens = np.array(joined(honest.val))
    num_bytes = honest.run.dataset.counts.base
    longest = int(num_bytes.argmax())
    is_longest = num_bytes[tokens[5]] == num_bytes[longest]
    tokens[5] = int(num_bytes.argmin()) if is_longest else longest
    write_shard(tmp_path / "data" / "x_val_000000.bin", tokens)
    fails, verdicts = audited(run, honest.blob)
    assert fails == {"T4"}, verdicts


def test_a_manifest_of_other_totals_fails(honest, group):
    manifest = json.loads(json.dumps(honest.run.dataset.manifest))
    for key in ("tokens", "decoded_bytes"):
        manifest["splits"]["val"][key] += 1
        run = fresh(honest.run, dataset=dataclasses.replace(honest.run.dataset, manifest=manifest))
        assert audited(run, honest.blob).fails == {"T4"}, key
