"""Broken data: T5 on the bytes of the text, T6 on documents that leak into training."""

import dataclasses
import json
import time
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece

import train_gpt as t
from auditor import sums
from auditor.subject import make_audit
from tests.audit.audit_cases import SPACE, audited, config, fresh, on_data, prose, trained, write_dataset
from tests.helpers import BOS, machine, train_tokenizer

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


class ByteFault(NamedTuple):
    """A wrong count of bytes, and the tests that fail with it."""

    counts: type[t.ByteCounts]
    fails: set[str]


BYTE_FAULTS = {
    "a leading space counts twice": ByteFault(SpaceTwice, {"T4", "T5"}),
    "a space at a document's start counts": ByteFault(SpaceAfterStart, {"T4", "T5"}),
    "bytes per token are a constant": ByteFault(Constant, {"T5"}),
}


@pytest.mark.parametrize("name", BYTE_FAULTS)
def test_wrong_bytes_fail(name, honest, group):
    fault = BYTE_FAULTS[name]
    true = honest.run.dataset.counts
    counts = fault.counts(true.base, true.space, true.boundary, true.spelled)
    run = fresh(honest.run, dataset=dataclasses.replace(honest.run.dataset, counts=counts))
    fails, verdicts = audited(run, honest.blob)
    assert fails == fault.fails, verdicts


@pytest.mark.parametrize("has_piece", [True, False], ids=["piece", "no_piece"])
def test_a_tokenizer_that_keeps_first_spaces_passes(has_piece, tmp_path, group):
    """With both flags of SentencePiece off, a document's first space is in its text, and so in the score."""
    from tests.trainer.test_bytes import edit_pieces, without_space_piece

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
    subject = make_audit(t, run, b"")
    for test in (sums.audit_coverage, sums.audit_bytes):
        verdict = test(subject)
        assert verdict.ok, verdict

    counts = dataclasses.replace(run.dataset.counts, keeps_first=False)
    wrong = fresh(run, dataset=dataclasses.replace(run.dataset, counts=counts))
    subject = make_audit(t, wrong, b"")
    assert not sums.audit_coverage(subject).ok and not sums.audit_bytes(subject).ok


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
        subject = make_audit(t, fresh(run, dataset=dataclasses.replace(run.dataset, counts=counts)), b"")
        verdict = sums.audit_bytes(subject)
        assert not verdict.ok and "1 unknown pieces" in verdict.evidence, verdict


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    """Train on a vocabulary without a piece U+2581, where a lone space is three byte pieces."""
    from tests.trainer.test_bytes import edit_pieces

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
    fails, verdicts = audited(fresh(run), blob)
    assert not fails, verdicts
    counts = dataclasses.replace(run.dataset.counts, spelled=None)
    run = fresh(run, dataset=dataclasses.replace(run.dataset, counts=counts))
    assert audited(run, blob).fails == {"T4", "T5"}


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
    fails, verdicts = audited(on_data(honest, tmp_path, train=train), honest.blob)
    assert fails == {"T6"}, verdicts


def test_a_phrase_in_common_is_no_leak(honest, group, tmp_path):
    """A training document may have forty tokens in common with one of validation."""
    train = [honest.train[0], [*honest.train[1], honest.val[3][:41]]]
    fails, verdicts = audited(on_data(honest, tmp_path, train=train), honest.blob)
    assert not fails, verdicts


def test_an_empty_document_on_both_sides_is_no_leak(honest, group, tmp_path):
    train = [[honest.train[0][0], [BOS], *honest.train[0][1:]], honest.train[1]]
    val = [honest.val[0], [BOS], *honest.val[1:]]
    fails, verdicts = audited(on_data(honest, tmp_path, train=train, val=val), honest.blob)
    assert not fails, verdicts
