"""The auditor passes an honest run, and fails each planted fault in the tests named beside it.

A fault is a broken scorer, artifact, dataset or training loop that replaces one honest part. The first test
named was made for it, the others fail with it for a good reason (with a question mark: may fail). Every test
that is not named must still pass.
"""

import ast
import dataclasses
import hashlib
import io
import json
import lzma
import math
import os
import py_compile
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from contextlib import suppress
from importlib.util import cache_from_source
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import audit
import train_gpt as t
from helpers import (
    BOS,
    OTHER_PARTS,
    ROOT,
    TINY,
    WORDS,
    as_arguments,
    group_of_one,
    joined,
    machine,
    run_ranks,
    stop_one_line,
    train_tokenizer,
    write_shard,
)

KNOBS = TINY | dict(
    num_layers=2,
    train_seq_len=32,
    eval_seq_len=32,
    eval_stride=8,
    eval_batch_tokens=256,
    train_batch_tokens=512,
    micro_batch_tokens=256,
    iterations=30,
    run_id="run",
)
SPACE = "\u2581"


# ---------------------------------------------------------------- an honest run, made once


def prose(count, seed):
    """Return documents in which half of the words follow from the one before: no long span comes twice."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        word = int(rng.integers(len(WORDS)))
        out = []
        for _ in range(int(rng.integers(30, 70))):
            out.append(WORDS[word])
            if rng.random() < 0.5:
                word = (word * 7 + 3) % len(WORDS)
            else:
                word = int(rng.integers(len(WORDS)))
        documents.append(" ".join(out) + ".")
    return documents


def text_bytes(sp, ids):
    """Return the UTF-8 length of a document's text. A space spelled in bytes is one; at the start, none."""
    text = sp.decode(ids).replace(SPACE, " ")
    if sp.is_unknown(sp.piece_to_id(SPACE)):
        text = text.removeprefix(" ")
    return len(text.encode())


def write_dataset(folder, tokenizer, train, val):
    """Write a data folder and return its path: a shard for each list of documents in `train`, one of val."""
    folder.mkdir(parents=True)
    copied = folder / "tokenizer.model"
    shutil.copy(tokenizer, copied)
    for i, documents in enumerate(train):
        write_shard(folder / f"x_train_{i:06d}.bin", joined(documents))
    write_shard(folder / "x_val_000000.bin", joined(val))

    sp = sentencepiece.SentencePieceProcessor(model_file=str(copied))
    num_bytes = sum(text_bytes(sp, document[1:]) for document in val)
    tokenizer_entry = {
        "kind": "sentencepiece",
        "file": "tokenizer.model",
        "encoding": None,
        "sha256": hashlib.sha256(copied.read_bytes()).hexdigest(),
        "vocab_size": sp.vocab_size(),
    }
    split = {"documents": len(val), "tokens": sum(map(len, val)), "decoded_bytes": num_bytes}
    manifest = {
        "format": 1,
        "name": "x",
        "bos_id": BOS,
        "tokenizer": tokenizer_entry,
        "splits": {"val": split},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def config(path, **knobs):
    """Return the Config of a small run on the data folder `path`."""
    return t.load_config(as_arguments(KNOBS | dict(data_path=path) | knobs), {})


def trained(h):
    """Train and pack. Returns the run, its model with the artifact's weights, and the artifact."""
    with group_of_one() as m:
        run = t.start_run(h, m, t.Log("", None), t.load_dataset(h), time.perf_counter())
        t.train(run)
        blob = t.pack_artifact(dict(run.model.named_parameters()), h)
        run.model.load_state_dict(t.unpack_artifact(blob))
    return run, blob


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Train 30 steps on 60 + 60 documents; 40 are for validation. Returns run, artifact and dataset."""
    folder = tmp_path_factory.mktemp("audit")
    texts = prose(160, 0)
    model = train_tokenizer(folder / "sp.model", texts, 320)
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = [[BOS, *sp.encode(x)] for x in texts]
    train = [ids[:60], ids[60:120]]
    val = ids[120:]
    h = config(write_dataset(folder / "data", model, train, val), vocab_size=sp.vocab_size())
    run, blob = trained(h)
    return SimpleNamespace(run=run, blob=blob, h=h, folder=folder, model=model, train=train, val=val)


@pytest.fixture
def group():
    with group_of_one():
        yield


def failing(run, blob):
    """Run all tests. Returns those that fail, as "T1 T3", and all verdicts."""
    subject = audit.make_audit(t, run, blob)
    verdicts = [test(subject) for test in audit.AUDIT]
    return " ".join(v.test[:2] for v in verdicts if not v.ok), verdicts


def as_expected(fails, expected):
    """Return whether the failing tests are those of "T1 T3?": T1 and perhaps T3."""
    must = {name for name in expected.split() if not name.endswith("?")}
    return must <= set(fails.split()) <= {name.rstrip("?") for name in expected.split()}


def fresh(run, **changes):
    """Return the run with empty caches and fields replaced."""
    return dataclasses.replace(run, **(dict(phases={}, splits={}) | changes))


def on_data(honest, tmp_path, **change):
    """Return the honest run on a copy of its data with other documents in `train` or `val`."""
    parts = dict(train=honest.train, val=honest.val) | change
    h = dataclasses.replace(honest.h, data_path=write_dataset(tmp_path / "data", honest.model, **parts))
    return fresh(honest.run, h=h, dataset=t.load_dataset(h))


def with_nats(run, nats_fn):
    """Return the run with another nats_fn."""
    return fresh(run, nats_fn=nats_fn)


def test_the_run_has_learnt(honest, group):
    """Otherwise, a fault in the scorer would change nothing."""
    start = t.GPT(honest.h)
    for name in ("tok_emb", "qo_bank", "mlp_down_bank", "bigram_emb", "smear_gate"):
        moved = getattr(honest.run.model, name) - getattr(start, name)
        assert moved.abs().max() > 1e-3, name
    score = fresh(honest.run).score("val", honest.h.eval_stride)
    assert score.loss < 0.85 * np.log(honest.h.vocab_size)


def test_nine_tests_pass_on_an_honest_run(honest, group):
    fails, verdicts = failing(fresh(honest.run), honest.blob)
    assert not fails, verdicts
    assert [v.test[:2] for v in verdicts] == [f"T{i}" for i in range(1, 10)]
    assert all(v.evidence for v in verdicts)
    assert "manifest agrees" in verdicts[3].evidence
    assert not verdicts[4].evidence.startswith("0 documents")
    assert " of 0 " not in verdicts[5].evidence and " 0 13-word" not in verdicts[5].evidence


def test_nine_tests_pass_on_a_model_with_every_optional_part(honest):
    run, blob = trained(
        config(honest.h.data_path, vocab_size=honest.h.vocab_size, iterations=6, **OTHER_PARTS)
    )
    with group_of_one():
        fails, verdicts = failing(run, blob)
    assert not fails, verdicts


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


def attend_all(q, k, v, window=0, docs=None):
    """Attend without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def attend_one_ahead(q, k, v, window=0, docs=None):
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


class Learner:
    """Trains a bias on the logits while it scores."""

    def __init__(self, run, update_first):
        self.model = run.model
        self.update_first = update_first
        self.vocab_size = run.h.vocab_size
        self.reset()

    def reset(self):
        self.bias = torch.zeros(self.vocab_size)

    def learn(self, y, last):
        counts = torch.bincount(y[:, -last:].flatten(), minlength=self.vocab_size).float()
        self.bias = self.bias + 0.1 * counts / counts.sum() * self.vocab_size

    def nats(self, x, y, last):
        if self.update_first:
            self.learn(y, last)
        logits = self.model.unembed(self.model.trunk(x)[:, -last:]) + self.bias
        if not self.update_first:
            self.learn(y, last)
        return F.cross_entropy(logits.transpose(1, 2), y[:, -last:], reduction="none")


def learning(run, monkeypatch, update_first=False, reset=True):
    """Return the run with a Learner. reset: whether it forgets everything before each score of a split."""
    learner = Learner(run, update_first)
    score = t.score_targets

    def score_from_the_start(*args):
        if reset:
            learner.reset()
        return score(*args)

    monkeypatch.setattr(t, "score_targets", score_from_the_start)
    return with_nats(run, learner.nats)


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


# A broken scorer: the tests that fail, and the function that plants it with a monkeypatch.
SCORERS = {
    "attention without a mask": ("T1 T3", lambda run, mp: twin(run, ops=t.Ops(attend=attend_all))),
    "mask off by one": ("T1 T3", lambda run, mp: twin(run, ops=t.Ops(attend=attend_one_ahead))),
    "smear across a document start": ("T1", lambda run, mp: twin(run, SmearAcross)),
    "bigram across a document start": ("T1", lambda run, mp: twin(run, BigramAcross)),
    "bigram of the next token": ("T1 T3?", lambda run, mp: twin(run, BigramAhead)),
    "cache in sliding windows only": ("T2", lambda run, mp: in_sliding_windows(run)),
    "cache that is warm after 64 tokens": ("T2", lambda run, mp: after_64(run)),
    "n-gram cache not normalized": ("T2", lambda run, mp: cached(run, gate=False)),
    "gate on whether the target is a hit": ("T2", lambda run, mp: cached(run, gate=True)),
    "best of two temperatures": ("T2", lambda run, mp: best_of_two(run)),
    "no score is a number": ("T1 T2 T3 T4 T7", lambda run, mp: not_a_number(run, lambda c: c >= 0)),
    "the last score of a window is not a number": (
        "T1 T2 T3 T4 T7",
        lambda run, mp: not_a_number(run, lambda c: c == run.h.eval_seq_len - 1),
    ),
    "update before score": ("T1 T2 T3", lambda run, mp: learning(run, mp, update_first=True)),
    "second pass over the split": ("T1 T3 T4? T7", lambda run, mp: learning(run, mp, reset=False)),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_broken_scorer_fails(name, honest, group, monkeypatch):
    expected, plant = SCORERS[name]
    fails, verdicts = failing(plant(honest.run, monkeypatch), honest.blob)
    assert as_expected(fails, expected), (fails, verdicts)


def test_long_windows_pass(honest, group):
    """They are the honest part of a fault above."""
    h = dataclasses.replace(honest.h, eval_seq_len=128, eval_stride=32, eval_batch_tokens=512)
    fails, verdicts = failing(fresh(honest.run, h=h), honest.blob)
    assert not fails, verdicts


def test_windows_and_documents_pass(honest):
    h = config(honest.h.data_path, vocab_size=honest.h.vocab_size, attn_windows="5 0", doc_mask=1)
    run, blob = trained(h)
    with group_of_one():
        fails, verdicts = failing(run, blob)
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
    for start, end, score_from in real_windows(total, seq_len, stride):
        if end - score_from in (seq_len, stride):
            yield start, end, score_from


def skipped_context(total, seq_len, stride):
    """Leave out the first target of every window after the first."""
    for start, end, score_from in real_windows(total, seq_len, stride):
        yield start, end, score_from if start == 0 else score_from + 1


def half_the_split(total, seq_len, stride):
    """Leave out the second half of the split."""
    return real_windows(total // 2, seq_len, stride)


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
        return np.array(list(WINDOWS[name](*sizes)))

    monkeypatch.setattr(t, "score_windows", score_windows)
    fails, verdicts = failing(fresh(honest.run), honest.blob)
    assert fails == "T4", verdicts


def score_of(nats, tokens, counts):
    """Return the Score of a split with this sum of nats."""
    targets = len(tokens) - 1
    num_bytes = int(counts.of(tokens).sum())
    return t.Score(nats / targets, t.bpb(nats, num_bytes), targets, num_bytes, ms=0.0)


def worst_targets_dropped(nats_fn, tokens, counts, run, m):
    """Leave the worst hundredth of the targets out of the sum."""
    nats = t.score_targets(nats_fn, tokens, run, m)[0].sort().values
    kept = nats[: -max(1, len(nats) // 100)]
    return score_of(kept.sum().item(), tokens, counts)


def mean_of_batches(nats_fn, tokens, counts, run, m):
    """Average the means of the score windows, though the last one is shorter than the others."""
    nats = t.score_targets(nats_fn, tokens, run, m)[0]
    mean = torch.stack([part.mean() for part in nats.split(run.stride)]).mean().item()
    return score_of(mean * nats.numel(), tokens, counts)


@pytest.mark.parametrize("evaluate", [worst_targets_dropped, mean_of_batches])
def test_an_evaluator_whose_sum_is_another_fails(evaluate, honest, group, monkeypatch):
    """score_targets is sound, but the sum over its scores is not."""
    monkeypatch.setattr(t, "evaluate", evaluate)
    fails, verdicts = failing(fresh(honest.run), honest.blob)
    assert fails == "T4", verdicts


def test_a_split_cut_short_fails(honest, group, tmp_path):
    """The shard has fewer tokens than the manifest says."""
    run = on_data(honest, tmp_path)
    write_shard(tmp_path / "data" / "x_val_000000.bin", joined(honest.val)[:-40])
    fails, verdicts = failing(run, honest.blob)
    assert fails == "T4", verdicts


def test_another_split_of_the_same_length_fails(honest, group, tmp_path):
    """The shard has as many tokens as the manifest says, but other bytes."""
    run = on_data(honest, tmp_path)
    tokens = np.array(joined(honest.val))
    num_bytes = honest.run.dataset.counts.base
    longest = int(num_bytes.argmax())
    is_longest = num_bytes[tokens[5]] == num_bytes[longest]
    tokens[5] = int(num_bytes.argmin()) if is_longest else longest
    write_shard(tmp_path / "data" / "x_val_000000.bin", tokens)
    fails, verdicts = failing(run, honest.blob)
    assert fails == "T4", verdicts


def test_a_manifest_of_other_totals_fails(honest, group):
    manifest = json.loads(json.dumps(honest.run.dataset.manifest))
    for key in ("tokens", "decoded_bytes"):
        manifest["splits"]["val"][key] += 1
        run = fresh(honest.run, dataset=dataclasses.replace(honest.run.dataset, manifest=manifest))
        assert failing(run, honest.blob)[0] == "T4", key


# ---------------------------------------------------------------- T5: bytes


class SpaceTwice(t.ByteCounts):
    """A leading space is counted twice."""

    def of(self, tokens):
        return super().of(tokens) + self.space[tokens[1:]]


class SpaceAfterStart(t.ByteCounts):
    """A leading space after a document start is counted, though it is no part of the text."""

    def of(self, tokens):
        return super().of(tokens) + (tokens[:-1] == BOS)


class Constant(t.ByteCounts):
    """Bytes per token are a constant: the sum is right, but not that of any document."""

    def of(self, tokens):
        true = super().of(tokens)
        out = np.full(len(true), true.sum() // len(true))
        out[: true.sum() - out.sum()] += 1
        return out


BYTE_FAULTS = {
    "a leading space counts twice": ("T4 T5", SpaceTwice),
    "a space at a document's start counts": ("T4 T5", SpaceAfterStart),
    "bytes per token are a constant": ("T5", Constant),
}


@pytest.mark.parametrize("name", BYTE_FAULTS)
def test_wrong_bytes_fail(name, honest, group):
    expected, kind = BYTE_FAULTS[name]
    true = honest.run.dataset.counts
    counts = kind(true.base, true.space, true.boundary, true.spelled)
    run = fresh(honest.run, dataset=dataclasses.replace(honest.run.dataset, counts=counts))
    fails, verdicts = failing(run, honest.blob)
    assert fails == expected, verdicts


@pytest.mark.parametrize("has_piece", [True, False], ids=["piece", "no_piece"])
def test_a_tokenizer_that_keeps_first_spaces_passes(has_piece, tmp_path, group):
    """With both flags of SentencePiece off, a document's first space is in its text, and so in the score."""
    from test_bytes import edit_pieces, without_space_piece

    texts = ["  " + x for x in prose(60, 5)] + ["a"] * 9 + [" a"] * 9
    flags = dict(add_dummy_prefix=False, remove_extra_whitespaces=False)
    model = train_tokenizer(tmp_path / "with.model", texts, 320, **flags)
    if not has_piece:
        model = edit_pieces(model, tmp_path / "without.model", without_space_piece)
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = [[BOS, *sp.encode(x)] for x in texts]
    path = write_dataset(tmp_path / "data", model, [ids[:40]], ids[40:])
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    manifest["splits"]["val"]["decoded_bytes"] = sum(len(x.encode()) for x in texts[40:])
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    h = config(path, vocab_size=sp.vocab_size(), iterations=1, warmup_steps=0)
    run = t.start_run(h, machine(), t.Log("", None), t.load_dataset(h), time.perf_counter())
    subject = audit.make_audit(t, run, b"")
    for test in (audit.audit_coverage, audit.audit_bytes):
        verdict = test(subject)
        assert verdict.ok, verdict

    counts = dataclasses.replace(run.dataset.counts, keeps_first=False)
    wrong = fresh(run, dataset=dataclasses.replace(run.dataset, counts=counts))
    subject = audit.make_audit(t, wrong, b"")
    assert not audit.audit_coverage(subject).ok and not audit.audit_bytes(subject).ok


def test_unknown_pieces_fail_however_they_are_counted(tmp_path, group, monkeypatch):
    """As no byte, or as the 5 that they decode to: what they stand for is lost. Other scripts let them in."""
    texts = prose(60, 5)
    model = train_tokenizer(tmp_path / "plain.model", texts, 200, byte_fallback=False)
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = [[BOS, *sp.encode(text)] for text in [*texts, "the \u2603 river"]]
    sizes = t.sentencepiece_counts(model)
    path = write_dataset(tmp_path / "data", model, [ids[:40]], ids[40:])
    h = config(path, vocab_size=sp.vocab_size(), iterations=1, warmup_steps=0)
    with pytest.raises(t.InputError, match="1 tokens of val are the unknown piece"):
        t.load_dataset(h)

    monkeypatch.setattr(t, "sentencepiece_counts", lambda path: dataclasses.replace(sizes, unknown=-1))
    run = t.start_run(h, machine(), t.Log("", None), t.load_dataset(h), time.perf_counter())
    as_decoded = sizes.base + 5 * (np.arange(len(sizes.base)) == sp.unk_id())
    for base in (sizes.base, as_decoded):
        counts = dataclasses.replace(sizes, base=base)
        subject = audit.make_audit(
            t, fresh(run, dataset=dataclasses.replace(run.dataset, counts=counts)), b""
        )
        verdict = audit.audit_bytes(subject)
        assert not verdict.ok and "1 unknown pieces" in verdict.evidence, verdict


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    """Train on a vocabulary without a piece U+2581, where a lone space is three byte pieces."""
    from test_bytes import edit_pieces

    folder = tmp_path_factory.mktemp("spelled")
    texts = [x.replace(" ", "  ") for x in prose(60, 5)]

    def rename(text, kind):
        if text == SPACE:
            text = "\u00a4\u00a4"
        return text, kind

    model = edit_pieces(train_tokenizer(folder / "with.model", texts, 320), folder / "sp.model", rename)
    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    ids = [[BOS, *sp.encode(x)] for x in texts]
    path = write_dataset(folder / "data", model, [ids[:40]], ids[40:])
    return trained(config(path, vocab_size=sp.vocab_size(), iterations=2))


def test_a_space_spelled_in_bytes_is_one_byte(spelled, group):
    run, blob = spelled
    assert run.dataset.counts.spelled is not None
    fails, verdicts = failing(fresh(run), blob)
    assert not fails, verdicts
    counts = dataclasses.replace(run.dataset.counts, spelled=None)
    run = fresh(run, dataset=dataclasses.replace(run.dataset, counts=counts))
    assert failing(run, blob)[0] == "T4 T5"


# ---------------------------------------------------------------- T6: leaks


def most_of(document):
    """Return a document without its first eighth."""
    return [BOS, *document[1 + len(document) // 8 :]]


# How documents of val get into the training shards.
LEAKS = {
    "a document at the start of a shard": lambda train, val: [[val[3], *train[0]], train[1]],
    "a document inside a shard": lambda train, val: [train[0], [*train[1][:30], val[0], *train[1][30:]]],
    "the last document of a shard": lambda train, val: [[*train[0], val[3]], train[1]],
    "the last document of the split": lambda train, val: [[val[-1], *train[0]], train[1]],
    "most spans of the split": lambda train, val: [train[0], [*train[1], *map(most_of, val)]],
    "most spans of two documents": lambda train, val: [train[0], [*train[1], *map(most_of, val[4:6])]],
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_fails(name, honest, group, tmp_path):
    train = LEAKS[name](honest.train, honest.val)
    fails, verdicts = failing(on_data(honest, tmp_path, train=train), honest.blob)
    assert fails == "T6", verdicts


def test_a_phrase_in_common_is_no_leak(honest, group, tmp_path):
    """A training document may have forty tokens in common with one of validation."""
    train = [honest.train[0], [*honest.train[1], honest.val[3][:41]]]
    fails, verdicts = failing(on_data(honest, tmp_path, train=train), honest.blob)
    assert not fails, verdicts


def test_an_empty_document_on_both_sides_is_no_leak(honest, group, tmp_path):
    train = [[honest.train[0][0], [BOS], *honest.train[0][1:]], honest.train[1]]
    val = [honest.val[0], [BOS], *honest.val[1:]]
    fails, verdicts = failing(on_data(honest, tmp_path, train=train, val=val), honest.blob)
    assert not fails, verdicts


# ---------------------------------------------------------------- T7: artifact and repetition


def container(text, payload, **xz):
    """Compress a header's text and a payload, with other options of xz."""
    parts = [t.MAGIC, len(text).to_bytes(4, "little"), text, payload]
    return lzma.compress(b"".join(parts), **(t.XZ | xz))


def compact(header):
    """Return the header's text as pack_artifact writes it."""
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def reordered(header):
    """Return the header's text with its keys in another order."""
    return json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode()


def with_time(header):
    """Return the header's text with a key that occurs twice and at first holds the time."""
    return compact(header).replace(b'{"config"', b'{"config":"12:34:56","config"', 1)


OTHER_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 1}]
# How to pack an artifact's header and payload differently.
ARTIFACTS = {
    "another xz preset": lambda header, payload: container(compact(header), payload, filters=OTHER_FILTERS),
    "another xz check": lambda header, payload: container(compact(header), payload, check=lzma.CHECK_CRC64),
    "a header of another layout": lambda header, payload: container(json.dumps(header).encode(), payload),
    "keys in another order": lambda header, payload: container(reordered(header), payload),
    "the time in a key that comes twice": lambda header, payload: container(with_time(header), payload),
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_that_does_not_pack_again_fails(name, honest, group):
    header, payload = t.open_artifact(honest.blob)
    blob = ARTIFACTS[name](header, payload)
    assert blob != honest.blob
    assert t.unpack_artifact(blob).keys() == t.unpack_artifact(honest.blob).keys()
    fails, verdicts = failing(fresh(honest.run), blob)
    assert fails == "T7", verdicts


def with_model(change):
    """Return how to pack a header's text and a payload by rans, with change(model) in place of each model."""

    def packed(text, payload):
        chosen = t.model_codes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(t, "model_codes", lambda codes, limit: change(chosen(codes, limit)))
            return t.pack_rans(b"".join([t.MAGIC, len(text).to_bytes(4, "little"), text, payload]))

    return packed


def as_chosen(model):
    return model


def other_classes(model):
    """Class the rows higher and the columns lower, so that every code keeps its context."""
    return model._replace(rows=model.rows + 1, columns=model.columns - 1)


def other_tables(model):
    """Move a share from the most frequent code to one that never comes, where there is such a code."""
    tables = model.tables.copy()
    unused = np.flatnonzero(tables[16] == 0)
    if len(unused):
        tables[16, tables[16].argmax()] -= 1
        tables[16, unused[0]] += 1
    return model._replace(tables=tables)


def with_side_preset(text, payload):
    """Pack by rans with the side compressed by another preset."""
    blob = with_model(as_chosen)(text, payload)
    end = 16 + int.from_bytes(blob[12:16], "little")
    side = lzma.compress(lzma.decompress(blob[16:end]), **(t.XZ | dict(filters=OTHER_FILTERS)))
    rest = len(side).to_bytes(4, "little") + side + blob[end:]
    return t.RANS_MAGIC + zlib.crc32(rest).to_bytes(4, "little") + rest


RANS_ARTIFACTS = {
    "as pack_rans does it": (with_model(as_chosen), ""),
    "other classes": (with_model(other_classes), "T7"),
    "other tables": (with_model(other_tables), "T7"),
    "another preset for the side": (with_side_preset, "T7"),
}


@pytest.mark.parametrize("name", RANS_ARTIFACTS)
def test_a_rans_artifact_packs_again_by_its_own_codec(name, honest, group):
    header, payload = t.open_artifact(honest.blob)
    pack, expected = RANS_ARTIFACTS[name]
    blob = pack(compact(header), payload)
    assert t.codec_of(blob) == "rans"
    same = t.unpack_artifact(honest.blob)
    assert all(torch.equal(tensor, same[key]) for key, tensor in t.unpack_artifact(blob).items())
    fails, verdicts = failing(fresh(honest.run), blob)
    assert fails == expected, verdicts


def test_a_script_that_knows_no_codecs_is_packed_by_xz(honest, group, monkeypatch):
    """The scripts of old records."""
    open_artifact = t.open_artifact
    codec_of = t.codec_of

    def open_as_before(blob):
        with monkeypatch.context() as patch:
            patch.setattr(t, "codec_of", codec_of, raising=False)
            return open_artifact(blob)

    monkeypatch.setattr(t, "open_artifact", open_as_before)
    monkeypatch.delattr(t, "codec_of")
    fails, verdicts = failing(fresh(honest.run), honest.blob)
    assert not fails, verdicts


def test_dropout_in_the_scorer_fails(honest, group):
    """T1 and T3 fail, too: to them, scores that differ between calls look like scores that move."""
    torch.manual_seed(0)

    def noisy(x, y, last):
        return honest.run.model.nats(x, y, last) + 1e-5 * torch.randn(x.size(0), last)

    fails, verdicts = failing(with_nats(honest.run, noisy), honest.blob)
    assert as_expected(fails, "T1 T3 T4? T7"), (fails, verdicts)


def test_a_scorer_that_forgets_nothing_fails(honest, group):
    """Every call scores a little better than the one before."""
    calls = []

    def nats_fn(x, y, last):
        calls.append(1)
        return honest.run.model.nats(x, y, last) + 1e-4 / len(calls)

    assert as_expected(failing(with_nats(honest.run, nats_fn), honest.blob)[0], "T1 T3 T4? T7")


# ---------------------------------------------------------------- T8: held-out files while training


def val_file(h):
    return t.split_files(h.data_path, "val")[0]


def in_loader(read):
    """Return a loader that reads held-out tokens when it is made."""

    class Loader(t.TokenLoader):
        def __init__(self, h, m):
            super().__init__(h, m)
            read(h)

    return Loader


def read_in_chunks(h):
    with open(val_file(h), "rb") as f:
        f.read(10)


def read_by_descriptor(h):
    os.close(os.open(val_file(h), os.O_RDONLY))


def read_by_bytes_name(h):
    with open(val_file(h).encode(), "rb") as f:
        f.read(10)


def read_by_path(h):
    Path(val_file(h)).read_bytes()


def read_by_roundabout_name(h):
    with open(h.data_path + "/../data/" + val_file(h).rsplit("/", 1)[1], "rb") as f:
        f.read(10)


def read_by_link(h):
    link = Path(h.data_path, "more_tokens.bin")
    if not link.exists():
        link.symlink_to(val_file(h))
    link.read_bytes()


READS = {
    "load_shard": lambda h: t.load_shard(val_file(h)),
    "open": read_in_chunks,
    "a descriptor": read_by_descriptor,
    "a name as bytes": read_by_bytes_name,
    "a pathlib path": read_by_path,
    "a roundabout name": read_by_roundabout_name,
    "a symbolic link": read_by_link,
    "numpy": lambda h: np.fromfile(val_file(h), np.uint16),
}


@pytest.mark.parametrize("how", READS)
def test_a_loader_that_opens_the_split_fails(how, honest, group, monkeypatch, tmp_path):
    run = on_data(honest, tmp_path)
    monkeypatch.setattr(t, "TokenLoader", in_loader(READS[how]))
    fails, verdicts = failing(run, honest.blob)
    assert fails == "T8", verdicts


def test_a_validation_before_the_clock_stops_fails(honest, group, monkeypatch):
    """Warm-up scores real validation tokens."""
    warm = t.warmup

    def warmup(run, *args):
        t.validate(run, 0, 0.0)
        return warm(run, *args)

    monkeypatch.setattr(t, "warmup", warmup)
    fails, verdicts = failing(fresh(honest.run), honest.blob)
    assert fails == "T8", verdicts


def test_training_on_the_report_split_fails(honest, group, monkeypatch, tmp_path):
    """The second held-out split is held out too."""
    run = on_data(honest, tmp_path)
    other = str(tmp_path / "data" / "x_other_000000.bin")
    write_shard(other, honest.val[0])
    run = fresh(run, h=dataclasses.replace(run.h, report_split="other"))
    assert not failing(run, honest.blob)[0]
    monkeypatch.setattr(t, "TokenLoader", in_loader(lambda h: t.load_shard(other)))
    assert failing(fresh(run), honest.blob)[0] == "T8"


# ---------------------------------------------------------------- T9: network while scoring


def connect():
    with socket.socket() as s:
        s.settimeout(1)
        s.connect_ex(("127.0.0.1", 9))


def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", ("127.0.0.1", 9))


def message():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendmsg([b"x"], [], 0, ("127.0.0.1", 9))


def fetch():
    with suppress(OSError):
        urllib.request.urlopen("http://127.0.0.1:9/", timeout=1)


def child():
    subprocess.run([sys.executable, "-S", "-c", ""])


def shell():
    os.system(":")


CALLS = {
    "connect": connect,
    "getaddrinfo": lambda: socket.getaddrinfo("127.0.0.1", 9),
    "gethostbyname": lambda: socket.gethostbyname("127.0.0.1"),
    "a datagram": datagram,
    "a message": message,
    "a URL": fetch,
    "a child process": child,
    "a shell": shell,
}


@pytest.mark.parametrize("how", CALLS)
def test_a_scorer_that_calls_out_fails(how, honest, group):
    def nats_fn(x, y, last):
        CALLS[how]()
        return honest.run.model.nats(x, y, last)

    verdict = audit.audit_network(audit.make_audit(t, with_nats(honest.run, nats_fn), honest.blob))
    assert not verdict.ok, verdict


def test_only_the_network_test_sees_the_network(honest, group):
    def nats_fn(x, y, last):
        connect()
        return honest.run.model.nats(x, y, last)

    assert failing(with_nats(honest.run, nats_fn), honest.blob)[0] == "T9"


# ---------------------------------------------------------------- the command


def audit_args(honest, tmp_path, data=None):
    """Write the artifact and return the arguments of its audit. data: a folder in place of the run's own."""
    file = tmp_path / "x.int6.xz"
    file.write_bytes(honest.blob)
    knobs = dict(
        data_path=data or honest.h.data_path,
        out_dir=tmp_path / "logs",
        run_id="audited",
        eval_seq_len=32,
        eval_stride=8,
        eval_batch_tokens=256,
        train_seq_len=32,
        micro_batch_tokens=256,
        train_batch_tokens=256,
    )
    return ["audit", str(file), *as_arguments(knobs)]


def test_the_command_passes_an_honest_artifact(honest, tmp_path, capfd):
    assert t.main(audit_args(honest, tmp_path)) == 0
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("audit ")]
    assert len(lines) == 10 and lines[-1] == "audit 9 of 9 tests passed"
    assert "FAIL" not in out
    assert all(line.startswith(f"audit T{i} ") for i, line in enumerate(lines[:9], 1))
    log = (tmp_path / "logs" / "audited.txt").read_text().splitlines()
    assert lines == [line for line in log if line in lines]


@pytest.mark.parametrize("learns", [False, True], ids=["plain", "ttt"])
def test_every_test_knows_its_work(learns, honest, group):
    """Each expects as many scores, passes, ... as it does, or its ETA would be wrong."""
    h = honest.h
    if learns:
        h = dataclasses.replace(h, ttt_lr=0.2, ttt_chunk_tokens=64, ttt_passes=1)
    subject = audit.make_audit(t, fresh(honest.run, h=h), honest.blob)
    stages = []

    class Counting(audit.Progress):
        def expect(self, total, unit):
            if stages:
                stages[-1] = (*stages[-1][:3], self.counted)
            stages.append((self.test, total, unit, 0))
            self.counted = 0
            super().expect(total, unit)

        def advance(self, count=1):
            self.counted += count
            super().advance(count)

    progress = Counting(None)
    subject = dataclasses.replace(subject, progress=progress)
    for number, test in enumerate(audit.AUDIT, 1):
        progress.begin(f"T{number}")
        test(subject)
    progress.expect(0, "")
    known = [stage for stage in stages if stage[1]]
    assert {test for test, *_ in known} == {f"T{number}" for number in range(1, 10)}
    for test, total, unit, done in known:
        rounded = unit == "targets"  # windows are padded
        assert done == total or (rounded and total <= done < 2 * total), (test, total, unit, done)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("live", [False, True], ids=["pipe", "terminal"])
def test_a_long_test_says_how_far_it_is(live, honest, tmp_path, monkeypatch, capsys):
    """Before its first part is done it tells the seconds, then also an ETA."""

    def slow(subject):
        subject.progress.expect(4, "parts")
        for _ in range(3):
            time.sleep(0.15)
            subject.progress.advance()
        return audit.Verdict("T1 slow", True, "done")

    monkeypatch.setattr(audit, "AUDIT", (slow,))
    monkeypatch.setattr(audit, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(audit, "LINE_SECONDS", 0.0)
    screen = Terminal() if live else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    assert by_auditor(audit_args(honest, tmp_path), t.__file__) == 0
    out = capsys.readouterr().out
    told = screen.getvalue() if live else out
    for done, eta in ((0, ""), (1, ", ETA 0 s"), (2, ", ETA 0 s")):
        assert f"auditing T1: 0 s, {done}/4 parts{eta}" in told, told
    assert ("auditing T1" in out) == (not live)
    assert "audit T1 slow: ok (done) [" in out


def test_the_command_names_a_leak(honest, tmp_path, capfd):
    train = [[honest.val[3], *honest.train[0]], honest.train[1]]
    data = write_dataset(tmp_path / "data", honest.model, train, honest.val)
    assert t.main(audit_args(honest, tmp_path, data)) == 1
    out = capfd.readouterr().out
    assert "audit T6 leak: FAIL (1 of " in out and "audit 8 of 9 tests passed" in out
    assert out.count("FAIL") == 1


def changed_script(folder, old, new):
    """Write a train_gpt.py in which `old`, which must occur once, is replaced by `new`; return its path."""
    source = Path(t.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in train_gpt.py, not once"
    assert new != old
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_gpt.py").write_text(source.replace(old, new), encoding="utf-8")
    return str(folder / "train_gpt.py")


@pytest.mark.parametrize("old", ["text that is not in the trainer", "import torch"])
def test_a_fault_is_planted_once_or_refused(old, tmp_path):
    with pytest.raises(AssertionError, match=r"occurs \d+ times in train_gpt.py, not once"):
        changed_script(tmp_path, old, "pass")


# Text of the trainer, and the same with a fault before it: an embedding that holds some of the next token's.
LOOKS_AHEAD = (
    "\n# 17. Commands",
    """
real_embed = GPT.embed
GPT.embed = lambda self, x: real_embed(self, x) + 0.1 * F.embedding(F.pad(x[:, 1:], (0, 1)), self.tok_emb)
# 17. Commands""",
)


def by_auditor(args, script):
    """Run tools/audit.py on a script, with the arguments of `train_gpt.py audit`. Returns the exit status."""
    return audit.main([args[1], "--script", script, *args[2:]])


def test_the_audited_code_is_the_code_that_scores(honest, tmp_path, capsys):
    """A fault in the script's GPT is found, though the repository's own GPT has none."""
    script = changed_script(tmp_path, *LOOKS_AHEAD)
    assert by_auditor(audit_args(honest, tmp_path), script) == 1
    out = capsys.readouterr().out
    assert "audit T1 causality: FAIL" in out and out.count("FAIL") <= 2
    digest = hashlib.sha256(Path(script).read_bytes()).hexdigest()
    assert f"auditing {script} sha256:{digest[:16]} with " in out


def test_a_record_folder_audits_its_own_script(honest, tmp_path, capsys):
    """So does the auditor, for an artifact inside the folder, and so does the script's audit command."""
    folder = tmp_path / "records" / "track_cpu" / "2026-01-01_Ahead"
    script = changed_script(folder, *LOOKS_AHEAD)
    (folder / "submission.json").write_text("{}")
    (folder / "logs").mkdir()
    args = audit_args(honest, folder / "logs")
    assert str(audit.default_script(args[1])) == script
    assert audit.default_script(tmp_path / "x.int6.xz") == ROOT / "train_gpt.py"
    assert audit.main(args[1:]) == 1
    assert "audit T1 causality: FAIL" in capsys.readouterr().out
    tools = tmp_path / "tools"  # the repository's, above the folder
    tools.mkdir()
    for name in ("audit.py", "script.py"):
        shutil.copy(ROOT / "tools" / name, tools / name)
    command = [sys.executable, script, *audit_args(honest, tmp_path)]  # of an artifact that lies elsewhere
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1 and done.stderr == "", done
    assert "audit T1 causality: FAIL" in done.stdout and "of 9 tests passed" in done.stdout
    assert f"auditing {script} " in done.stdout
    assert f" with {tools / 'audit.py'} " in done.stdout


def test_a_script_without_the_auditor_says_where_it_is(honest, tmp_path):
    script = shutil.copy(t.__file__, tmp_path / "train_gpt.py")
    args = audit_args(honest, tmp_path)
    done = subprocess.run(
        [sys.executable, script, *args], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert f"./run.sh audit {args[1]} --script {script} KEY=VALUE" in done.stderr
    assert not (tmp_path / "logs").exists()


def audit_rank(rank, args):
    return t.main(args)


def test_two_ranks_audit_together(honest, tmp_path):
    assert run_ranks(audit_rank, 2, audit_args(honest, tmp_path)) == [0, 0]
    lines = (tmp_path / "logs" / "audited.txt").read_text().splitlines()
    verdicts = [line for line in lines if line.startswith("audit ")]
    assert verdicts[-1] == "audit 9 of 9 tests passed" and len(verdicts) == 10


def test_the_status_of_the_command_is_the_auditors(tmp_path, capfd):
    err = stop_one_line(["audit", str(tmp_path / "missing.xz")], capfd)
    assert err.startswith("audit.py: ") and "missing.xz" in err
    argv = list(sys.argv)
    assert t.main(["audit", "--help"]) == 0 and sys.argv == argv
    assert "tools/audit.py ARTIFACT [--script PATH]" in capfd.readouterr().out


# ---------------------------------------------------------------- the script under audit


def refused(capsys, *args):
    """Return the one line with which the auditor refuses these arguments; status 2."""
    capsys.readouterr()
    assert audit.main([str(argument) for argument in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("audit.py: "), (out, err)
    return err


@pytest.mark.parametrize("name", ["score_targets", "load_run", "learning"])
def test_a_script_that_lacks_a_name_is_refused_in_one_line(name, honest, tmp_path, capsys):
    script = changed_script(tmp_path, f"\ndef {name}(", f"\ndef old_{name}(")
    args = audit_args(honest, tmp_path)
    err = refused(capsys, args[1], "--script", script, *args[2:])
    assert f"{script}: this script has no {name}, which audit needs" in err
    assert not (tmp_path / "logs").exists()


def without_member(kind, member):
    """Return an object that has the names of a class but for one method or dataclass field."""
    all_fields = vars(kind).get("__dataclass_fields__", {})
    members = {name: None for name in [*vars(kind), *all_fields] if name != member}
    fields = {name: field for name, field in all_fields.items() if name != member}
    return SimpleNamespace(**(members | {"__dataclass_fields__": fields}))


def test_every_need_is_checked():
    """A script that lacks one function, method or field, or one class with its members, lacks just that."""
    needs = audit.NEEDS + audit.TTT_NEEDS
    assert audit.missing_names(t, needs) == []
    owners = {name: name.partition(".")[0] for name in needs}
    complete = {owner: getattr(t, owner) for owner in owners.values()}
    for name in needs:
        owner, _, member = name.partition(".")
        if member:
            script = complete | {owner: without_member(complete[owner], member)}
            lacking = [name]
        else:
            script = {other: value for other, value in complete.items() if other != owner}
            lacking = [other for other in needs if owners[other] == owner]
        assert audit.missing_names(SimpleNamespace(**script), needs) == lacking


def test_needs_are_what_the_auditor_reaches():
    """They are every script.NAME in the auditor, and every CLASS.NAME of the script's objects it uses."""
    tree = ast.parse(Path(audit.__file__).read_text(encoding="utf-8"))
    reached = set()
    class_of = {"run": "Run", "dataset": "Dataset", "counts": "ByteCounts", "model": "GPT", "small": "GPT"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
        if owner == "script" and not node.attr.startswith("__"):
            reached.add(node.attr)
        if owner in class_of:
            reached.add(f"{class_of[owner]}.{node.attr}")
    assert reached == {*audit.NEEDS, *audit.TTT_NEEDS, *audit.CODEC_NEEDS}


def test_other_scripts_are_refused_in_one_line(honest, tmp_path, capsys):
    artifact = audit_args(honest, tmp_path)[1]
    reasons = {
        "import no_such_module\n": "no_such_module",
        "x = (\n": "SyntaxError",
        "raise SystemExit(3)\n": "SystemExit",
        "x = 1\n": "has no InputError, Log",
    }
    for text, reason in reasons.items():
        (tmp_path / "other.py").write_text(text)
        assert reason in refused(capsys, artifact, "--script", tmp_path / "other.py"), text
    for path in (tmp_path, tmp_path / "missing.py"):
        assert f"{path}: cannot read the script" in refused(capsys, artifact, "--script", path)
    for args in ([], ["--script", t.__file__], ["data_path=x"], [artifact, "--script"]):
        assert "usage: audit.py ARTIFACT [--script PATH] [key=value ...]" in refused(capsys, *args)


def test_bytecode_beside_the_script_is_not_trusted(tmp_path):
    """The text that the log shows is what runs, and not a planted .pyc that python would run."""
    script = changed_script(tmp_path, 'MAGIC = b"GPT6"', 'MAGIC = b"TEXT"')
    evil = tmp_path / "evil.py"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    evil.write_text(Path(script).read_text().replace('b"TEXT"', 'b"EVIL"'))
    py_compile.compile(str(evil), cfile=cache_from_source(script), invalidation_mode=mode)
    command = [sys.executable, "-c", "import train_gpt; print(train_gpt.MAGIC)"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "EVIL" in found.stdout, "the planted file has no effect"
    assert audit.load_audited(Path(script)).MAGIC == b"TEXT"


RECORDS = sorted((ROOT / "records").glob("track_*/*/train_gpt.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", RECORDS, ids=lambda p: p.parent.name)
def test_every_record_can_be_audited(script, honest, tmp_path, capsys):
    """Train an artifact with the record's script, and audit it with that script."""
    before = sorted(script.parent.rglob("*"))
    knobs = KNOBS | dict(
        data_path=honest.h.data_path, vocab_size=honest.h.vocab_size, out_dir=tmp_path, run_id="own"
    )
    known = script.read_text(encoding="utf-8")  # a knob may be younger than the record
    knobs = {key: value for key, value in knobs.items() if f"\n    {key}: " in known}
    command = [sys.executable, str(script), "train", *as_arguments(knobs)]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=env)
    own = SimpleNamespace(blob=(tmp_path / "own.int6.xz").read_bytes(), h=honest.h)
    assert by_auditor(audit_args(own, tmp_path), str(script)) == 0
    assert "audit 9 of 9 tests passed" in capsys.readouterr().out
    assert sorted(script.parent.rglob("*")) == before, "the audit left something in the record's folder"
