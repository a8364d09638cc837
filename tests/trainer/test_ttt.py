"""Test-time training: each chunk is scored before it is learned from, on every rank alike.

Afterwards the weights are restored. The auditor finds scores that learn otherwise, and the ledger reads them.
"""

import copy
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fixtures_records as fx
import train_gpt as t
from audit_cases import audit_args, by_auditor, changed_script, honest  # noqa: F401
from helpers import (
    OTHER_PARTS,
    ROOT,
    all_equal,
    as_arguments,
    english_args,
    english_dataset,
    group_of_one,
    noisy_model,
    random_tokens,
    run_ranks,
    stop_one_line,
    temporary_folder,
    tiny,
)
from ledger import record, tracks
from ledger.read import dialects, runlog, scores
from record_helpers import TRACK, edit, make, verdicts
from test_windows import ONE_BYTE, SILENT

LEARNS = dict(ttt_lr=0.3, ttt_chunk_tokens=64, ttt_passes=2)


pytestmark = pytest.mark.usefixtures("clean_environment")


def learning_run(h, model, m, **changes):
    """Return a ScoreRun that learns, as Run.score makes it."""
    learner = partial(t.learning, model, model.nats, h, m)
    run = t.ScoreRun(h.eval_seq_len, h.eval_stride, 4, "x", SILENT, chunk=h.ttt_chunk_tokens, learner=learner)
    if h.ttt_form == "lora":
        run = run._replace(layout="documents", bos_id=h.bos_id)
    return run._replace(**changes)


def sequences(first, end, seq_len):
    """Return the windows (n, 3) of disjoint sequences from `first` to `end`, all of whose targets count."""
    starts = torch.arange(first, end, seq_len)
    return torch.stack([starts, starts + seq_len, starts], 1)


def weights_of(model):
    """Copy a model's weights."""
    return [p.detach().clone() for p in model.parameters()]


# ---------------------------------------------------------------- the learner


class Naive:
    """The reference learner, with torch's optimizer.

    Each pass is a step along the gradient of the mean loss of the chunk's sequences, its norm clipped at 1.
    """

    def __init__(self, model, h):
        self.model = copy.deepcopy(model).requires_grad_(True)
        self.h = h
        self.norms = []  # of the gradients, before they are clipped
        self.sgd = torch.optim.SGD(self.model.parameters(), momentum=0.9)

    def learn(self, tokens, progress):
        T = self.h.eval_seq_len
        sequences = [tokens[i : i + T + 1].long() for i in range(0, len(tokens) - 1, T)]
        self.sgd.param_groups[0]["lr"] = self.h.ttt_lr * 0.5 * (1 + np.cos(np.pi * progress))
        for _ in range(self.h.ttt_passes):
            self.sgd.zero_grad()
            losses = [self.model.loss(sequence[None, :-1], sequence[None, 1:]) for sequence in sequences]
            (sum(losses) / len(losses)).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.norms.append(norm.item())
            self.sgd.step()


def assert_close_to(naive, model):
    """Compare all parameters with the reference's."""
    for (name, p), expected in zip(model.named_parameters(), naive.model.parameters()):
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6, msg=message)


# All four sequences of a chunk at once, two batches of two, a batch of three and one of one.
@pytest.mark.parametrize("batch", [64, 32, 48])
@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_a_step_is_that_of_a_naive_loop(batch, scale):
    h = tiny(eval_batch_tokens=batch, **LEARNS)
    model = noisy_model(h, scale=scale)
    tokens = random_tokens(h, (4 * 64 + 1,), 2).int()
    naive = Naive(model, h)
    before = weights_of(model)
    with group_of_one() as m, t.learning(model, model.nats, h, m) as learn:
        for i in range(3):
            learn(tokens, sequences(64 * i, 64 * i + 64, 16))
            naive.learn(tokens[64 * i : 64 * i + 65], i / 4)
            assert_close_to(naive, model)
        assert all((a != b).any() for a, b in zip(weights_of(model), before) if a.dim() > 1)
    assert all_equal(weights_of(model), before)
    assert max(naive.norms) > 1, naive.norms
    assert (min(naive.norms) < 1) == (scale == 0.01), naive.norms  # some are clipped, or all


def test_a_rank_that_is_gone_ends_a_step_before_its_collective(monkeypatch):
    """The host network fails at once; a device collective would wait for the rank that is gone."""
    h = tiny(**LEARNS)
    model = noisy_model(h)
    before = weights_of(model)
    calls = []

    def gone(self, *numbers):
        raise RuntimeError("connection closed by peer")

    with group_of_one() as m, t.learning(model, model.nats, h, m) as learn:
        monkeypatch.setattr(t.dist, "all_reduce", lambda *args, **kwargs: calls.append(args))
        monkeypatch.setattr(t.Machine, "largest_of_each", gone)
        with pytest.raises(RuntimeError, match="closed by peer"):
            learn(random_tokens(h, (65,), 2).int(), sequences(0, 64, 16))
        monkeypatch.undo()
    assert not calls and all_equal(weights_of(model), before)


# ---------------------------------------------------------------- the order of scoring and learning


def naive_scores(model, tokens, h):
    """Return all scores, window by window, with a reference step after every chunk but the last."""
    naive = Naive(model, h)
    chunk = h.ttt_chunk_tokens
    total = len(tokens) - 1
    learned = 0  # tokens
    out = []
    for start, end, score_from in t.score_windows(total, h.eval_seq_len, h.eval_stride):
        while score_from >= learned + chunk:
            naive.learn(torch.from_numpy(tokens[learned : learned + chunk + 1]), learned / total)
            learned += chunk
        x = torch.from_numpy(tokens[start:end])
        y = torch.from_numpy(tokens[start + 1 : end + 1])
        with torch.no_grad():
            each = F.cross_entropy(naive.model.logits(x[None])[0], y, reduction="none")
        out += each[score_from - start :].tolist()
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("total, stride", [(200, 4), (256, 16), (193, 5), (129, 4)])
def test_scores_are_those_of_score_then_learn(total, stride):
    h = tiny(eval_stride=stride, **LEARNS)
    model = noisy_model(h)
    tokens = random_tokens(h, (total + 1,), 3).numpy()
    with group_of_one() as m:
        run = learning_run(h, model, m)
        nats, times_scored = t.score_targets(model.nats, tokens, run, m)
        still = run._replace(chunk=None, learner=nullcontext)
        without_learning, _ = t.score_targets(model.nats, tokens, still, m)
    assert (times_scored == 1).all()
    torch.testing.assert_close(nats, naive_scores(model, tokens, h), rtol=1e-4, atol=1e-5)
    gaps = (nats - without_learning).abs()
    assert not gaps[:64].any() and (gaps > 1e-4)[64 + stride :].float().mean() > 0.9


def sizes(count, seed):
    """Yield random (total, seq_len, stride, chunk): chunks are whole sequences, strides divide nothing."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        seq_len = int(rng.integers(1, 20))
        total = int(rng.integers(1, 200))
        yield total, seq_len, int(rng.integers(1, seq_len + 1)), seq_len * int(rng.integers(1, 6))


class Witness:
    """A scorer and learner that note the order of events. Tokens are their positions; no model runs."""

    def __init__(self, total, chunk):
        self.total = total
        self.chunk = chunk
        self.scored = set()  # padding scores `total`
        self.learned = 0  # chunks

    def nats(self, x, y, last):
        self.scored.update(y[:, -last:].flatten().tolist())
        return torch.zeros(len(x), last)

    def learn(self, tokens, windows, begins):
        """Check that the next chunk comes, and that all of it has been scored."""
        first = self.learned * self.chunk
        end = first + self.chunk
        assert tokens.tolist() == list(range(self.total + 1))
        learned = [target for _, end, first in windows.tolist() for target in range(first, end)]
        assert learned == list(range(first, end))
        assert set(range(1, end + 1)) <= self.scored
        self.learned += 1

    def learner(self):
        return nullcontext(self.learn)


EDGES = [(200, 16, 4, 64), (64, 16, 4, 64), (65, 16, 4, 64)]


def test_what_is_learned_has_been_scored_and_nothing_is_learned_from_the_last_chunk():
    with group_of_one() as m:
        for total, seq_len, stride, chunk in [*EDGES, *sizes(80, 1)]:
            witness = Witness(total, chunk)
            run = t.ScoreRun(seq_len, stride, 3, "x", SILENT, chunk=chunk, learner=witness.learner)
            _, times_scored = t.score_targets(witness.nats, np.arange(total + 1), run, m)
            assert (times_scored == 1).all()
            starts = t.score_windows(total, seq_len, stride)[:, t.SCORE_FROM]
            learned = witness.learned
            assert learned == starts[-1] // chunk <= (total - 1) // chunk, (total, seq_len, stride, chunk)
            assert learned == (total - 1) // chunk or total - learned * chunk - chunk <= stride


def test_chunks_alone_change_no_bit():
    """Score windows that are grouped by chunk, without learning, score what they score ungrouped."""
    h = tiny()
    model = noisy_model(h)
    tokens = random_tokens(h, (301,), 4).numpy()
    run = t.ScoreRun(16, 4, 4, "x", SILENT)
    idle = run._replace(chunk=64, learner=lambda: nullcontext(lambda *_: None))
    with group_of_one() as m:
        plain = t.score_targets(model.nats, tokens, run, m)
        assert all(map(torch.equal, plain, t.score_targets(model.nats, tokens, idle, m)))


def test_no_score_depends_on_a_later_token():
    h = tiny(**LEARNS)
    model = noisy_model(h)
    tokens = random_tokens(h, (231,), 5).numpy()
    rng = np.random.default_rng(0)
    with group_of_one() as m:
        run = learning_run(h, model, m)

        def score(tokens):
            return t.score_targets(model.nats, tokens, run, m).nats

        before = score(tokens)
        assert torch.equal(score(tokens), before)
        for cut in (1, 30, 63, 64, 65, 66, 67, 100, 127, 128, 129, 130, 192, 193, 194, 230):
            changed = tokens.copy()
            if cut < 200:
                changed[cut:] = rng.permutation(tokens[cut:])
            else:
                changed[cut:] = (tokens[cut:] + 1) % h.vocab_size
            after = score(changed)
            assert torch.equal(after[: cut - 1], before[: cut - 1]), cut  # target cut - 2 is token cut - 1
            assert not torch.equal(after[cut - 1 :], before[cut - 1 :]), cut


# ---------------------------------------------------------------- ranks


def ranks_score(rank, knobs):
    """Score on one rank.

    Returns the loss, a digest of the weights after each step, and whether the weights were restored.
    """
    h = tiny(**knobs)
    model = noisy_model(h, scale=0.01)  # so that some steps are not clipped
    tokens = random_tokens(h, (230,), 6).numpy()
    before = weights_of(model)
    digests = []
    env = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE") if key in os.environ}
    m = t.init_machine(h, env, trains=False)

    @contextmanager
    def watched():
        with t.learning(model, model.nats, h, m) as learn:

            def learn_and_digest(*args):
                learn(*args)
                weights = b"".join(p.numpy().tobytes() for p in weights_of(model))
                digests.append(hashlib.sha256(weights).hexdigest())

            yield learn_and_digest

    run = learning_run(h, model, m, learner=watched)
    score = t.evaluate(model.nats, tokens, ONE_BYTE, run, m)
    return score.loss, digests, all_equal(weights_of(model), before)


# With a chunk of one sequence, the other ranks have nothing of their own to learn from.
@pytest.mark.parametrize("chunk", [16, 64])
def test_the_score_does_not_depend_on_the_world_size(chunk):
    knobs = LEARNS | dict(ttt_chunk_tokens=chunk)
    ((loss, steps, _),) = run_ranks(ranks_score, 1, knobs)
    assert len(set(steps)) == len(steps) == 229 // chunk
    for world in (2, 3):
        ranks = run_ranks(ranks_score, world, knobs)
        assert all(rank == ranks[0] for rank in ranks)  # the same bits after every step
        loss_of_several, steps_of_several, restored = ranks[0]
        assert restored
        assert loss_of_several == pytest.approx(loss, rel=1e-6)
        assert len(steps_of_several) == len(steps)


# ---------------------------------------------------------------- the lora form: documents apart

LORA = dict(ttt_form="lora", ttt_lr=0.02, ttt_chunk_tokens=6, ttt_passes=2, ttt_rank=3)


def documents_of(h, lengths, seed):
    """Return random documents of these lengths, BOS included, as arrays."""
    rng = np.random.default_rng(seed)
    bodies = [rng.integers(h.bos_id + 1, h.vocab_size, length - 1) for length in lengths]
    return [np.concatenate([[h.bos_id], body]) for body in bodies]


class NaiveLora:
    """The reference for one document: torch's Adam on changes that are added to the matrices themselves."""

    def __init__(self, model, h):
        self.h = h
        self.changes = []
        rows = t.fresh_factors(h)
        for factors in t.cut_factors(rows, h):
            pair = [part[0].clone().requires_grad_(True) for part in (factors.up, factors.down)]
            self.changes.append(pair)
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.ops = t.Ops(linear=self.linear)
        self.model.unembed = self.unembed
        parameters = [part for pair in self.changes for part in pair]
        self.adam = torch.optim.Adam(parameters, lr=h.ttt_lr, betas=(0.0, 0.99), eps=1e-30)

    def linear(self, x, W):
        """Multiply by W, changed if it makes queries, keys and values."""
        if len(W) == self.h.model_dim + 2 * self.h.kv_dim:
            up, down = self.changes[self.visit]
            W = W + up @ down
            self.visit += 1
        return F.linear(x, W)

    def unembed(self, x):
        up, down = self.changes[-1]
        logits = F.linear(x, self.model.tok_emb + up @ down)
        return self.h.logit_softcap * torch.tanh(logits / self.h.logit_softcap)

    def nats(self, tokens, count):
        """Return the nats of the last `count` targets of one sequence."""
        self.visit = 0
        return self.model.nats(tokens[None, :-1], tokens[None, 1:], count)[0]

    def scores(self, document, following):
        """Score a document and the token that follows, chunk by chunk, learning from each but the last."""
        tokens = torch.from_numpy(np.append(document, following))
        chunk = self.h.ttt_chunk_tokens
        out = []
        for first in range(0, len(document), chunk):
            end = min(first + chunk, len(document))
            begin = max(0, first + chunk - self.h.eval_seq_len)
            for _ in range(self.h.ttt_passes):
                nats = self.nats(tokens[begin : end + 1], end - first)
                if len(out) == first:
                    out += nats.tolist()
                self.adam.zero_grad()
                nats.sum().backward()
                self.adam.step()
        return out


def lora_scores(model, tokens, h, **changes):
    """Return the nats of all targets, with the lora form on one rank."""
    with group_of_one() as m:
        run = learning_run(h, model, m, **changes)
        nats, times_scored = t.score_targets(model.nats, tokens, run, m)
    assert (times_scored == 1).all()
    return nats


def idle():
    """Return the context of a learner that learns nothing."""
    return nullcontext(lambda *_: None)


@pytest.mark.parametrize("other", [{}, OTHER_PARTS], ids=["usual", "other parts"])
def test_documents_are_scored_as_by_a_naive_loop(other):
    """One of each shape: shorter than a chunk, of whole chunks, longer than a window; more than slots."""
    h = tiny(**LORA, **other)
    model = noisy_model(h)
    documents = documents_of(h, [1, 5, 6, 7, 12, 16, 19, 40, 3, 24], 8)
    tokens = np.concatenate([*documents, [7]])
    expected = []
    for i, document in enumerate(documents):
        following = 7 if i == len(documents) - 1 else h.bos_id
        expected += NaiveLora(model, h).scores(document, following)
    nats = lora_scores(model, tokens, h)
    torch.testing.assert_close(nats, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    without = lora_scores(model, tokens, h, learner=idle)
    assert (nats - without).abs().max() > 0.05 and model.factors is None


def test_a_rate_of_almost_zero_scores_as_without_learning():
    h = tiny(**LORA | dict(ttt_lr=1e-30))
    model = noisy_model(h)
    tokens = random_tokens(h, (301,), 4).numpy()
    assert torch.equal(lora_scores(model, tokens, h), lora_scores(model, tokens, h, learner=idle))


def test_nothing_passes_from_one_document_to_another():
    """Documents in another order, and with others in the slots beside them, keep their scores."""
    h = tiny(**LORA)
    model = noisy_model(h)
    documents = documents_of(h, [9, 30, 14, 22, 7, 41, 18, 25], 9)
    order = [5, 2, 7, 0, 6, 1, 4, 3]

    def scores(documents):
        nats = lora_scores(model, np.concatenate([*documents, [h.bos_id]]), h)
        return nats.split([len(document) for document in documents])

    before = scores(documents)
    after = scores([documents[i] for i in order])
    for i, nats in zip(order, after):
        torch.testing.assert_close(nats, before[i], rtol=1e-5, atol=1e-5)
    alone = scores(documents[5:6])[0]
    torch.testing.assert_close(alone, before[5], rtol=1e-5, atol=1e-5)


def test_no_score_of_a_document_depends_on_a_later_token():
    """Not even on where documents begin later, which decides the batches that they share."""
    h = tiny(**LORA)
    model = noisy_model(h)
    tokens = np.concatenate(documents_of(h, [20, 9, 44, 31, 6, 37, 28], 10))
    rng = np.random.default_rng(0)
    before = lora_scores(model, tokens, h)
    for cut in (2, 7, 19, 20, 21, 26, 27, 30, 36, 41, 42, 60, 100, 150, 173):
        changed = tokens.copy()
        changed[cut:] = rng.integers(0, h.vocab_size, len(tokens) - cut)
        changed[cut:][rng.random(len(tokens) - cut) < 0.2] = h.bos_id
        after = lora_scores(model, changed, h)
        assert torch.equal(after[: cut - 1], before[: cut - 1]), cut
        assert not torch.equal(after[cut - 1 :], before[cut - 1 :]), cut


def test_a_document_learns_from_all_its_chunks_but_the_last_once_they_are_scored():
    rng = np.random.default_rng(3)
    for _ in range(60):
        slots = int(rng.integers(1, 6))
        seq_len = int(rng.integers(1, 20))
        chunk = int(rng.integers(1, seq_len + 1))
        tokens = np.where(rng.random(int(rng.integers(2, 200))) < 0.1, 1, 2)
        run = t.ScoreRun(seq_len, 1, slots, "x", SILENT, layout="documents", bos_id=1, chunk=chunk)
        scored = np.zeros(len(tokens) - 1, int)
        learned = np.zeros(len(tokens) - 1, int)
        owner = [-1] * slots  # document that the slot has learned from since it was last reset
        begins = np.maximum.accumulate(np.where(tokens == 1, np.arange(len(tokens)), 0))
        for group in t.document_groups(tokens, run, slots):
            for slot, (_, end, first) in enumerate(group.lesson):
                if group.begins[slot]:
                    owner[slot] = -1
                if end == 0:
                    continue
                assert owner[slot] in (-1, begins[first]) and (scored[first:end] == 1).all()
                owner[slot] = begins[first]
                learned[first:end] += 1
            for slot, (start, end, first) in enumerate(group.windows):
                if end == 0:
                    continue
                assert start == max(begins[first], first + chunk - seq_len) and end - first <= chunk
                assert owner[slot] == (-1 if first == begins[first] else begins[first])
                scored[first:end] += 1
        assert (scored == 1).all()
        ends = np.append(np.flatnonzero(np.diff(begins)) + 1, len(tokens) - 1)
        is_last = np.zeros(len(tokens) - 1, int)
        for begin, end in zip(np.unique(begins[:-1]), ends):
            is_last[begin + (end - begin - 1) // chunk * chunk : end] = 1
        assert (learned == 1 - is_last).all()


def test_the_lora_score_does_not_depend_on_the_world_size():
    ((loss, _, _),) = run_ranks(ranks_score, 1, LORA)
    for world in (2, 3):
        ranks = run_ranks(ranks_score, world, LORA)
        losses = {loss for loss, _, _ in ranks}
        assert len(losses) == 1 and losses.pop() == pytest.approx(loss, rel=1e-6)


def test_the_lora_form_needs_two_graphs_both_compiled_on_text_without_content():
    """One scores and one learns, whatever the documents; a graph that breaks would raise."""
    h = tiny(**LORA, num_layers=2)
    model = noisy_model(h)
    tokens = random_tokens(h, (301,), 4).numpy()
    compiled = torch.compile(model.nats, backend="aot_eager", fullgraph=True, dynamic=False)
    with group_of_one() as m:
        run = learning_run(h, model, m, learner=partial(t.learning, model, compiled, h, m))
        before = t.compiled_graphs()
        t.score_targets(compiled, np.full(13, 2), run, m)
        assert t.compiled_graphs() == before + 2
        nats, _ = t.score_targets(compiled, tokens, run, m)
        assert t.compiled_graphs() == before + 2
    torch.testing.assert_close(nats, lora_scores(model, tokens, h), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- knobs, the artifact's header


@pytest.mark.parametrize(
    "knobs, says",
    [
        (["ttt_lr=0.1", "ttt_chunk_tokens=100"], "eval_seq_len must divide ttt_chunk_tokens"),
        (["ttt_lr=0.1", "ttt_chunk_tokens=0"], "ttt_chunk_tokens: 0"),
        (["ttt_lr=-0.1"], "ttt_lr: -0.1"),
        (["ttt_lr=nan"], "ttt_lr: nan"),
        (["ttt_passes=0"], "ttt_passes: 0"),
        (["ttt_passes=x"], "'x' is not of type int"),
        (["ttt_form=adam"], "ttt_form: 'adam' is not one of sgd, lora"),
        (
            ["ttt_lr=0.1", "ttt_form=lora", "ttt_chunk_tokens=65"],
            "ttt_chunk_tokens must not exceed eval_seq_len",
        ),
        (["ttt_rank=0"], "ttt_rank: 0"),
        (
            ["ttt_lr=1", "ttt_form=lora", "ttt_chunk_tokens=9", "ttt_rank=513"],
            "ttt_rank must not exceed model_dim",
        ),
    ],
)
def test_knobs_are_refused_in_one_line(knobs, says, capsys):
    assert says in stop_one_line(["config", "eval_seq_len=64", *knobs], capsys)


def test_chunks_of_a_score_that_never_learns_may_be_anything():
    assert tiny(ttt_chunk_tokens=100, eval_seq_len=48, eval_batch_tokens=48).ttt_lr == 0


def test_the_header_has_the_knobs_only_of_a_score_that_learns():
    h = tiny()
    tensors = dict(noisy_model(h).named_parameters())
    header, payload = t.open_artifact(t.pack_artifact(tensors, h))
    header_of_learner, same_payload = t.open_artifact(t.pack_artifact(tensors, tiny(**LEARNS)))
    config = header_of_learner["config"]
    assert set(header["config"]) == set(t.MODEL_FIELDS) and payload == same_payload
    assert config == header["config"] | LEARNS

    header_of_lora, _ = t.open_artifact(t.pack_artifact(tensors, tiny(**LORA)))
    assert header_of_lora["config"] == header["config"] | LORA
    without_rank = tiny(**LORA | dict(ttt_rank=t.Config.ttt_rank))  # only what is not the default is written
    header_of_default, _ = t.open_artifact(t.pack_artifact(tensors, without_rank))
    assert set(header_of_lora["config"]) - set(header_of_default["config"]) == {"ttt_rank"}

    without_passes = {key: value for key, value in config.items() if key != "ttt_passes"}
    changes = (dict(ttt_lr=1), dict(ttt_passes=2.0), dict(ttt_more=1))
    for wrong in (without_passes, *(config | change for change in changes)):
        text = json.dumps(
            header_of_learner | {"config": wrong}, sort_keys=True, separators=(",", ":")
        ).encode()
        raw = b"".join([t.MAGIC, len(text).to_bytes(4, "little"), text, payload])
        with pytest.raises(ValueError, match="unexpected keys or a value of another type"):
            t.open_artifact(t.compress(raw))


# ---------------------------------------------------------------- whole runs

RUN = dict(ttt_lr=0.1, ttt_chunk_tokens=512)


@cache
def finished(**knobs):
    """Train on the English dataset. Returns the artifact's `path`, the `log` and its `lines`."""
    folder = temporary_folder() / "out"
    assert t.main(english_args(iterations=24, out_dir=folder, **knobs)) == 0
    log = folder / "run.txt"
    lines = log.read_text(encoding="utf-8").splitlines()
    return SimpleNamespace(path=folder / "run.int6.xz", log=log, lines=lines)


def exact(line):
    """Return the loss and bpb, to eight digits, in a line."""
    return re.search(r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}", line)[0]


def only(lines, label):
    """Return the one line that has this label."""
    (line,) = [line for line in lines if line.startswith(label + " ")]
    return line


def exact_of(lines, label):
    """Return the loss and bpb, to eight digits, in the one line that has this label."""
    return exact(only(lines, label))


def scored(run, folder, *knobs):
    """Run `eval` on a run's artifact, with the batches of its training. Returns the lines of the log."""
    fixed = dict(data_path=english_dataset().path, out_dir=folder, run_id="again", eval_batch_tokens=512)
    assert t.main(["eval", str(run.path), *as_arguments(fixed), *knobs]) == 0
    lines = (folder / "again.txt").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(folder)
    return lines


def eval_time(line):
    return int(re.search(r"eval_time:(\d+)ms", line)[1])


def test_a_run_that_learns_says_so():
    lines = finished(**RUN).lines
    shown = r"final_int6_ttt val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} stride:8 eval_time:\d+ms"
    assert re.fullmatch(shown, only(lines, "final_int6_ttt"))
    assert lines[-1].startswith("final_score metric:int6_lzma_ttt ")
    assert exact(lines[-1]) == exact_of(lines, "final_int6_ttt_exact")
    assert exact_of(lines, "final_int6_ttt_exact") < exact_of(lines, "final_int6_sliding_window_exact")
    times = [eval_time(line) for line in lines if line.startswith("final_int6") and "eval_time" in line]
    assert len(times) == 3 and abs(sum(times) - eval_time(lines[-1])) <= 3


def test_learning_moves_no_other_score_and_no_weight():
    learns = finished(**RUN)
    plain = finished()
    labels = [line.split(" ")[0] for line in plain.lines if line.startswith("final")]
    assert not any("ttt" in label for label in labels)
    assert plain.lines[-1].startswith("final_score metric:int6_lzma_sliding ")
    for label in ("final_live", "final_ema", "final_int6_roundtrip_exact", "final_int6_sliding_window_exact"):
        assert exact_of(learns.lines, label) == exact_of(plain.lines, label)
    of_learner = t.unpack_artifact(learns.path.read_bytes())
    of_plain = t.unpack_artifact(plain.path.read_bytes())
    assert all_equal(of_learner.values(), of_plain.values())


def test_eval_scores_as_the_artifact_was_scored(tmp_path):
    """Knobs override the artifact's header; an artifact without a rate takes the rate of a knob."""
    learns = finished(**RUN)
    plain = finished()
    with_learning = exact_of(learns.lines, "final_int6_ttt_exact")
    without = exact_of(plain.lines, "final_int6_sliding_window_exact")
    rate = as_arguments(RUN)
    for run, knobs, score, metric in (
        (learns, [], with_learning, "ttt"),
        (plain, rate, with_learning, "ttt"),
        (plain, [], without, "sliding"),
        (learns, ["ttt_lr=0"], without, "sliding"),
    ):
        lines = scored(run, tmp_path / "out", *knobs)
        assert lines[-1].startswith(f"eval_score metric:int6_lzma_{metric} ")
        assert exact(lines[-1]) == score

    one_pass = scored(plain, tmp_path / "out", *rate, "ttt_passes=1")
    assert exact(one_pass[-1]) not in (with_learning, without)
    chunked = scored(learns, tmp_path / "out", "eval_stride=32")  # learning on the chunked score
    assert " stride:" not in only(chunked, "final_int6_ttt")
    assert exact(chunked[-1]) not in (with_learning, without)


def test_eval_scores_documents_as_the_artifact_was_scored(tmp_path):
    rates = dict(ttt_form="lora", ttt_lr=0.01, ttt_chunk_tokens=8, ttt_passes=1, ttt_rank=4)
    learns = finished(**rates)
    with_learning = exact_of(learns.lines, "final_int6_ttt_exact")
    assert " stride:8 " in only(learns.lines, "final_int6_ttt")
    assert with_learning < exact_of(learns.lines, "final_int6_sliding_window_exact")
    assert exact(scored(learns, tmp_path / "out")[-1]) == with_learning
    assert exact(scored(finished(), tmp_path / "out", *as_arguments(rates))[-1]) == with_learning
    other_rank = scored(learns, tmp_path / "out", "ttt_rank=5")  # knobs override the header
    assert exact(other_rank[-1]) != with_learning


def test_a_split_of_one_chunk_is_scored_as_it_is(tmp_path, monkeypatch):
    run = finished()
    total = len(english_dataset().val) - 1
    chunk = -(-total // 32) * 32
    monkeypatch.setattr(t, "learning", None)
    lines = scored(run, tmp_path / "out", "ttt_lr=0.1", f"ttt_chunk_tokens={chunk}")
    assert exact(lines[-1]) == exact_of(run.lines, "final_int6_sliding_window_exact")
    lines = scored(run, tmp_path / "out", "ttt_lr=0.1", f"ttt_chunk_tokens={32 * 10**14}")
    assert lines[-1].startswith("eval_score metric:int6_lzma_ttt ")


def test_the_pass_is_compiled_before_the_clock_and_on_no_token_of_the_split(tmp_path, monkeypatch):
    run = finished()  # trained before anything is watched
    events = []
    learning = t.learning
    evaluate = t.evaluate

    @contextmanager
    def watched_learning(*args):
        with learning(*args) as learn:

            def watched_learn(tokens, windows, begins):
                blank = bool((tokens == tokens[0]).all())
                events.append((int((windows[:, t.END] - windows[:, t.SCORE_FROM]).sum()), blank))
                learn(tokens, windows, begins)

            yield watched_learn

    def watched_evaluate(*args):
        events.append("clock")
        return evaluate(*args)

    monkeypatch.setattr(t, "learning", watched_learning)
    monkeypatch.setattr(t, "evaluate", watched_evaluate)
    scored(run, tmp_path / "out", *as_arguments(RUN))
    chunks = (len(english_dataset().val) - 2) // 512
    assert chunks > 1
    assert events == ["clock", "clock", (512, True), "clock", *[(512, False)] * chunks]


# ---------------------------------------------------------------- the auditor

AUDITED = ["ttt_lr=0.2", "ttt_chunk_tokens=64", "ttt_passes=1"]
LESSON = "lesson = as_windows(start=begin, end=begin + seq_len, score_from=begin)"
# A cheat: the tests that must fail, the text of the trainer that is replaced, and the text that replaces it.
CHEATS = {
    "learned before it is scored": (
        "T1 T3",
        LESSON,
        f"{LESSON} + min(chunk_tokens * (len(begin) > 0), total - chunk_start)",
    ),
    "one token too many": ("T3", LESSON, f"{LESSON} + (len(begin) > 0)"),
    "weights are not put back": ("T1 T3 T7", "torch._foreach_copy_(weights, saved)", "pass"),
    "nothing is learned": ("T3", "alpha=-rate)", "alpha=-0.0)"),
    "a chunk is left out": ("T4", "np.split(windows, firsts[1:])", "np.split(windows, firsts[1:])[:2]"),
}
AUDITED_LORA = ["ttt_form=lora", "ttt_lr=0.05", "ttt_chunk_tokens=8", "ttt_passes=1"]
LORA_LESSON = "all_lessons[span, slot][1:] = windows[:-1]"
LORA_CHEATS = {
    "learned before it is scored": ("T1 T3", LORA_LESSON, "all_lessons[span, slot] = windows"),
    "one token too many": ("T3", LORA_LESSON, f"{LORA_LESSON} + [0, 1, 1]"),
    "nothing is learned": ("T3", "factors.sub_(h.ttt_lr", "factors.sub_(0.0"),
    "the model is not put back": ("T3", "model.factors = None", "pass"),
    "a chunk is left out": (
        "T4",
        "all_windows[span, slot] = windows",
        "all_windows[span, slot][:2] = windows[:2]",
    ),
    "a document's end decides where its windows begin": (
        "T1",
        "start = np.maximum(chunk_end - scoring.seq_len, begin)",
        "start = np.maximum(np.minimum(chunk_end, end) - scoring.seq_len, begin)",
    ),
}


class Audited(NamedTuple):
    """The verdicts of the auditor on a script."""

    status: int
    fails: set[str]  # tests, T1 to T9
    lines: list[str]  # one for each test


def audited(honest, folder, script, capsys, knobs=AUDITED):  # noqa: F811
    """Audit the honest artifact, scored with learning by a script."""
    status = by_auditor([*audit_args(honest, folder), *knobs], str(script))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit T")]
    fails = {line.split()[1] for line in lines if "FAIL" in line}
    return Audited(status, fails, lines)


@pytest.mark.parametrize("knobs", [AUDITED, AUDITED_LORA], ids=["sgd", "lora"])
def test_the_audit_passes_an_honest_score_that_learns(knobs, honest, tmp_path, capsys):  # noqa: F811
    result = audited(honest, tmp_path, ROOT / "train_gpt.py", capsys, knobs)
    assert result.status == 0 and not result.fails, result.lines
    evidence = "2 after learning, 0 tokens learned before they are scored, 0 earlier scores moved"
    assert evidence in result.lines[2]


@pytest.mark.parametrize("name", CHEATS)
def test_the_audit_catches_a_cheat(name, honest, tmp_path, capsys):  # noqa: F811
    expected, old, new = CHEATS[name]
    result = audited(honest, tmp_path, changed_script(tmp_path / "x", old, new), capsys)
    assert result.status == 1 and set(expected.split()) <= result.fails, result.lines
    assert not {"T2", "T5"} & result.fails, result.lines


FIRST_CHEAT, *MORE_CHEATS = LORA_CHEATS


@pytest.mark.parametrize(
    "name", [FIRST_CHEAT, *(pytest.param(n, marks=pytest.mark.long) for n in MORE_CHEATS)]
)
def test_the_audit_catches_a_cheat_with_documents(name, honest, tmp_path, capsys):  # noqa: F811
    expected, old, new = LORA_CHEATS[name]
    script = changed_script(tmp_path / "x", old, new)
    result = audited(honest, tmp_path, script, capsys, AUDITED_LORA)
    assert result.status == 1 and set(expected.split()) <= result.fails, result.lines
    assert not {"T2", "T5"} & result.fails, result.lines


@pytest.mark.parametrize(
    "knobs",
    [["ttt_chunk_tokens=32768"], ["ttt_form=lora", "eval_seq_len=256", "ttt_chunk_tokens=256"]],
    ids=["split", "document"],
)
def test_the_audit_needs_three_chunks(knobs, honest, tmp_path, capsys):  # noqa: F811
    args = [*audit_args(honest, tmp_path), "ttt_lr=0.2", *knobs]
    assert by_auditor(args, str(ROOT / "train_gpt.py")) == 2
    err = capsys.readouterr().err
    assert f"{knobs[-1]}: " in err and err.count("\n") == 1


# ---------------------------------------------------------------- the ledger


def with_ttt(text):
    """Add a score with test-time training to a made-up log, 0.01 nats below sliding, as its final score."""
    loss = float(re.search(r"^final_int6_sliding_window_exact val_loss:(\S+)", text, re.M)[1]) - 0.01
    score = f"val_loss:{loss:.8f} val_bpb:{fx.bpb(loss):.8f}"
    lines = f"final_int6_ttt {score} stride:64 eval_time:99000ms\nfinal_int6_ttt_exact {score}\n"
    source, rule, rest = text.rpartition(fx.SEPARATOR)
    rest = re.sub(r"^(final_int6_sliding_window_exact .*\n)", rf"\g<1>{lines}", rest, flags=re.M)
    old = r"^final_score metric:\S+ val_loss:\S+ val_bpb:\S+"
    return source + rule + re.sub(old, f"final_score metric:int6_lzma_ttt {score}", rest, flags=re.M)


def test_a_record_that_learns(tmp_path, monkeypatch):
    real = fx.log_text
    monkeypatch.setattr(fx, "log_text", lambda *args, **kwargs: with_ttt(real(*args, **kwargs)))
    (tmp_path / "requirements.txt").write_text("numpy==2.2.6\n")
    folder = make(tmp_path)
    claims = verdicts(folder)
    assert not [claim for claim, (status, _) in claims.items() if status == "fail"], claims
    assert "int6_lzma_ttt" in claims["score"][1]
    page = (folder / "README.md").read_text()
    assert "| int6 sliding | int6 ttt |" in page
    assert "metric `int6_lzma_ttt`, stride 64" in page
    edit(folder / "logs" / "seed42.txt", r"^(final_int6_ttt_exact .*val_bpb:)1", r"\g<1>0")
    assert verdicts(folder)["score"][0] == "fail"


def test_a_record_is_made_of_a_run_that_learned(tmp_path):
    """`record new` and `record verify` take the log of a real run; its page reproduces it with its rates."""
    root = tmp_path / "repo"
    (root / "records").mkdir(parents=True)
    log = str(finished(**RUN).log)
    argv = ["--root", str(root), "new", "Learns", "--logs", log, "--track", "track_cpu", "--non-record"]
    assert record.main(argv) == 0
    (folder,) = (root / "records" / "track_cpu").iterdir()
    page = (folder / "README.md").read_text()
    assert " ttt_chunk_tokens=512 ttt_lr=0.1 " in page and "| int6 ttt |" in page
    assert record.main(["--root", str(root), "verify", str(folder)]) == 0
    assert TRACK in tracks.TRACKS


def test_the_ledger_has_a_row_for_every_score_of_a_log():
    run = runlog.parse_log(finished(**RUN).log)
    logged = {line.removesuffix("_exact") for line in run.facts if line.startswith("final_")}
    rows = {score.line_of(run).removesuffix("_exact") for score in scores.SCORES}
    assert logged - {"final_score"} == rows


def test_the_published_scripts_label_is_read(tmp_path):
    """Their logs end in a line `legal_ttt_exact`, which is the score that counts."""
    log = next((ROOT / "tests" / "fixtures" / "challenge").glob("*_EarlyDialect/train_seed*.log"))
    lines = (
        "legal_ttt val_loss:1.8900 val_bpb:1.1194 eval_time:409000ms\n"
        "legal_ttt_exact val_loss:1.89000001 val_bpb:1.11940002\n"
    )
    (tmp_path / log.name).write_text(log.read_text(encoding="utf-8") + lines, encoding="utf-8")
    final = dialects.parse_published_log(tmp_path / log.name).facts["final_score"]
    assert (final["metric"], final["val_bpb"]) == ("legal_ttt_exact", "1.11940002")
