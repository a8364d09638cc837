"""Test-time training of factors, document by document: each chunk is scored before it is learned from."""

import copy
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.helpers import OTHER_PARTS, noisy_model, random_tokens, tiny
from tests.rank_cases import group_of_one, run_ranks
from tests.trainer.test_windows import SILENT
from tests.trainer.ttt_cases import LORA, learning_run, ranks_score

pytestmark = pytest.mark.usefixtures("clean_environment")


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

    def unembed(self, x, change):
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


def idle(nats_fn):
    """Return the context of a learner that learns nothing."""
    return nullcontext(lambda *_: nats_fn)


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
    # Measured: 2.1e-7.
    torch.testing.assert_close(nats, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    without = lora_scores(model, tokens, h, learner=partial(idle, model.nats))
    assert (nats - without).abs().max() > 0.05


def test_a_rate_of_almost_zero_scores_as_without_learning():
    h = tiny(**LORA | dict(ttt_lr=1e-30))
    model = noisy_model(h)
    tokens = random_tokens(h, (301,), 4).numpy()
    without = lora_scores(model, tokens, h, learner=partial(idle, model.nats))
    assert torch.equal(lora_scores(model, tokens, h), without)


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
        torch.testing.assert_close(nats, before[i], rtol=1e-6, atol=1e-6)  # measured: 0
    alone = scores(documents[5:6])[0]
    torch.testing.assert_close(alone, before[5], rtol=1e-6, atol=1e-6)  # measured: 0


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
        run = t.ScoreSettings(seq_len, 1, slots, "x", SILENT, bos_id=1, chunk=chunk)
        scored = np.zeros(len(tokens) - 1, int)
        learned = np.zeros(len(tokens) - 1, int)
        owner = [-1] * slots  # document that the slot has learned from since it was last reset
        begins = np.maximum.accumulate(np.where(tokens == 1, np.arange(len(tokens)), 0))
        for group in t.document_groups(tokens, run, slots):
            for slot, (_, end, first) in enumerate(zip(*group.lesson)):
                if group.begins[slot]:
                    owner[slot] = -1
                if end == 0:
                    continue
                assert owner[slot] in (-1, begins[first]) and (scored[first:end] == 1).all()
                owner[slot] = begins[first]
                learned[first:end] += 1
            for slot, (start, end, first) in enumerate(zip(*group.windows)):
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
        assert len(losses) == 1 and losses.pop() == pytest.approx(loss, rel=1e-6)  # measured: 0


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
    torch.testing.assert_close(nats, lora_scores(model, tokens, h), rtol=1e-6, atol=1e-6)  # measured: 0
