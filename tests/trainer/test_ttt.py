"""Test-time training of all weights: each chunk is scored before it is learned from, on every rank alike.

Afterwards the weights are restored.
"""

import copy
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t
from tests.helpers import all_equal, noisy_model, random_tokens, tiny
from tests.rank_cases import group_of_one, run_ranks
from tests.trainer.test_windows import SILENT
from tests.trainer.ttt_cases import LEARNS, learning_run, ranks_score, weights_of

pytestmark = pytest.mark.usefixtures("clean_environment")


def sequences(first, end, seq_len):
    """Return the windows of disjoint sequences from `first` to `end`, all of whose targets count."""
    starts = np.arange(first, end, seq_len)
    return t.Windows(starts, starts + seq_len, starts)


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
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6, msg=message)  # measured: 5 % of that


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
            assert learn(tokens, sequences(64 * i, 64 * i + 64, 16)) == model.nats
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
    for start, end, score_from in zip(*t.score_windows(total, h.eval_seq_len, h.eval_stride)):
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
    # Measured: 1 % of that.
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
        learned = [target for _, end, first in zip(*windows) for target in range(first, end)]
        assert learned == list(range(first, end))
        assert set(range(1, end + 1)) <= self.scored
        self.learned += 1
        return self.nats

    def learner(self):
        return nullcontext(self.learn)


EDGES = [(200, 16, 4, 64), (64, 16, 4, 64), (65, 16, 4, 64)]


def test_what_is_learned_has_been_scored_and_nothing_is_learned_from_the_last_chunk():
    with group_of_one() as m:
        for total, seq_len, stride, chunk in [*EDGES, *sizes(80, 1)]:
            witness = Witness(total, chunk)
            run = t.ScoreSettings(seq_len, stride, 3, "x", SILENT, chunk=chunk, learner=witness.learner)
            _, times_scored = t.score_targets(witness.nats, np.arange(total + 1), run, m)
            assert (times_scored == 1).all()
            starts = t.score_windows(total, seq_len, stride).score_from
            learned = witness.learned
            assert learned == starts[-1] // chunk <= (total - 1) // chunk, (total, seq_len, stride, chunk)
            assert learned == (total - 1) // chunk or total - learned * chunk - chunk <= stride


def test_chunks_alone_change_no_bit():
    """Score windows that are grouped by chunk, without learning, score what they score ungrouped."""
    h = tiny()
    model = noisy_model(h)
    tokens = random_tokens(h, (301,), 4).numpy()
    run = t.ScoreSettings(16, 4, 4, "x", SILENT)
    idle = run._replace(chunk=64, learner=lambda: nullcontext(lambda *_: model.nats))
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
        assert loss_of_several == pytest.approx(loss, rel=5e-8)  # measured: 2e-9
        assert len(steps_of_several) == len(steps)
