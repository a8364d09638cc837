"""Helpers of the tests of the auditor: an honest run, made once, and ways to break it.

A fault is a broken scorer, artifact, dataset or training loop that replaces one honest part. One of the tests
named beside it was made for it, the others fail with it for a good reason. Every test that is not named must
still pass.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Set
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import audit
import train_gpt as t
from auditor.subject import Verdict, make_audit
from tests.helpers import BOS, TINY, WORDS, as_arguments, joined, train_tokenizer, write_shard
from tests.rank_cases import group_of_one

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


@pytest.fixture(scope="session")
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


class Outcome(NamedTuple):
    """What the auditor says of a run: the tests that fail, "T1" to "T9", and all verdicts."""

    fails: set[str]
    verdicts: list[Verdict]


def audited(run, blob):
    """Run all tests on a run and its artifact."""
    subject = make_audit(t, run, blob)
    verdicts = [test(subject) for test in audit.AUDIT]
    return Outcome({v.test[:2] for v in verdicts if not v.ok}, verdicts)


class Expected(NamedTuple):
    """The tests that must fail with a fault, and those that may."""

    must: set[str]
    may: Set[str] = frozenset()

    def meets(self, fails):
        """Return whether the tests that fail are expected."""
        return self.must <= fails <= self.must | self.may


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
        # An average: a sum would grow until one token has all probability, and then any sum is one.
        self.bias = 0.9 * self.bias + 0.1 * counts / counts.sum() * self.vocab_size

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


def changed_script(folder, old, new):
    """Write a train_gpt.py in which `old`, which must occur once, is replaced by `new`; return its path."""
    source = Path(t.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in train_gpt.py, not once"
    assert new != old
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_gpt.py").write_text(source.replace(old, new), encoding="utf-8")
    return str(folder / "train_gpt.py")


def by_auditor(args, script):
    """Run tools/audit.py on a script, with the arguments of `train_gpt.py audit`. Returns the exit status."""
    return audit.main([args[1], "--script", script, *args[2:]])
