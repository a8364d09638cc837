"""Score windows tile the split, and the evaluator counts every target exactly once."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import noisy_model, random_tokens, tiny
from tests.rank_cases import group_of_one, run_ranks

SILENT = t.Log("", None)


def sizes(count, seed):
    """Yield random (total, seq_len, stride), including small totals and strides that divide nothing."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        seq_len = int(rng.integers(1, 40))
        yield int(rng.integers(1, 5 * seq_len)), seq_len, int(rng.integers(1, seq_len + 1))


EDGES = [
    (1, 1, 1),
    (1, 16, 4),
    (16, 16, 4),
    (17, 16, 4),
    (15, 16, 16),
    (32, 16, 16),
    (33, 16, 16),
    (20, 16, 5),
]


@pytest.mark.parametrize("seed", range(3))
def test_windows_tile_with_the_promised_context(seed):
    for total, seq_len, stride in [*EDGES, *sizes(150, seed)]:
        case = (total, seq_len, stride)
        windows = list(zip(*t.score_windows(total, seq_len, stride)))
        scored = [i for start, end, score_from in windows for i in range(score_from, end)]
        assert scored == list(range(total)), case
        for i, (start, end, score_from) in enumerate(windows):
            assert 0 <= start <= score_from < end <= total and end - start <= seq_len, case
            if i > 0:
                assert end - start == seq_len, case  # a full window, since the last one is moved back
                assert score_from - start >= seq_len - stride, case
                if i + 1 < len(windows):
                    assert end - score_from == stride, case
        assert windows[0][2] == 0 and windows[0][1] == min(seq_len, total)


class Probe:
    """A nats_fn for tokens = arange(total + 1): its value tells which target it is. It checks its inputs."""

    def __init__(self, total, seq_len):
        self.total = total
        self.seq_len = seq_len
        self.shapes = set()  # of the inputs, with the number of targets

    def __call__(self, x, y, last):
        self.shapes.add((tuple(x.shape), last))
        assert x.shape == y.shape
        assert x.size(1) == self.seq_len
        assert 1 <= last <= self.seq_len
        assert ((y == x + 1) | (y == self.total)).all()  # a target follows its token
        return self.value(y[:, -last:] - 1)

    @staticmethod
    def value(position):
        """Return values of very different sizes: a target counted twice cannot make up for one left out."""
        return 2.0 ** (position % 20) + position


ONE_BYTE = SimpleNamespace(of=lambda tokens: np.ones(len(tokens) - 1, np.int64))


def probe_sum(total, seq_len, stride, batch, m):
    """Evaluate a Probe and return the sum of its values."""
    tokens = np.arange(total + 1)
    probe = Probe(total, seq_len)
    run = t.ScoreSettings(seq_len, stride, batch, "probe", SILENT)
    score = t.evaluate(probe, tokens, ONE_BYTE, run, m)
    assert score.tokens == score.bytes == total
    # Only the two shapes that are compiled.
    assert len(probe.shapes) <= 2
    assert {shape for shape, _ in probe.shapes} <= {(batch, seq_len)}
    return score.loss * total


def cases():
    return [*EDGES, *sizes(60, 9)]


def expected_sum(total):
    """Return the sum of a Probe's values over all targets."""
    return Probe.value(torch.arange(total, dtype=torch.float64)).sum().item()


def test_every_target_is_scored_exactly_once():
    with group_of_one() as m:
        for i, (total, seq_len, stride) in enumerate(cases()):
            got = probe_sum(total, seq_len, stride, 1 + i % 4, m)
            # Measured: 0.
            assert got == pytest.approx(expected_sum(total), rel=1e-12), (total, seq_len, stride)


def ranks_score(rank, world):
    """Score on one of `world` ranks: return the sums of probes, and loss and bpb of a model."""
    h = tiny(train_batch_tokens=16 * 12)
    m = t.init_machine(h, {"WORLD_SIZE": str(world), "RANK": str(rank)})
    sums = []
    for i, (total, seq_len, stride) in enumerate(cases()):
        sums.append(probe_sum(total, seq_len, stride, 1 + i % 4, m))

    tokens = random_tokens(h, (301,), 4).numpy()
    model = noisy_model(h)
    run = t.ScoreSettings(16, 4, 4, "model", SILENT)
    score = t.evaluate(model.nats, tokens, ONE_BYTE, run, m)
    return sums, score.loss, score.bpb


class ProgressLog:
    """A Log that keeps the (done, total) of every progress report."""

    def __init__(self):
        self.reports = []

    def progress(self, what, done, total, started):
        self.reports.append((done, total))


# A stream whose chunks have 8 windows and whose batches have 5; documents of at most 3 chunks, 2 in a batch.
LESSONS = [
    dict(seq_len=16, stride=2, batch=5, chunk=16),
    dict(seq_len=8, stride=8, batch=2, groups=t.document_groups, bos_id=0, chunk=4),
]


@pytest.mark.parametrize("settings", LESSONS)
@pytest.mark.parametrize("is_gpu", [False, True])
def test_progress_counts_the_windows_that_are_scored(settings, is_gpu, monkeypatch):
    monkeypatch.setattr(t.Machine, "is_gpu", property(lambda m: is_gpu))
    monkeypatch.setattr(t.Machine, "sync", lambda m: None)
    log = ProgressLog()
    batches = []

    def nats_fn(x, y, last):
        batches.append(len(x))
        return torch.zeros(len(x), last)

    tokens = np.arange(321) % 9
    run = t.ScoreSettings(label="x", log=log, **settings)
    groups = run.groups(tokens, run, slots=run.batch)
    done = 0
    expected = []
    for group in groups:
        for starts in np.array_split(group.windows.start, range(run.batch, group.windows.n, run.batch)):
            done += len(starts)
            expected.append((done, sum(group.windows.n for group in groups)))

    run = run._replace(learner=lambda: nullcontext(lambda *lesson: nats_fn))
    with group_of_one() as m:
        t.score_targets(nats_fn, tokens, run, m)
    assert len(batches) == len(expected) > 32
    assert log.reports == expected[:: 16 if is_gpu else 1]


def test_a_rank_without_windows_compiles_what_the_others_do():
    """The first window and the second have groups of their own, so rank 1 has no window at all."""
    shapes = []

    def nats_fn(x, y, last):
        shapes.append((*x.shape, last))
        return torch.ones(len(x), last)

    run = t.ScoreSettings(16, 4, 3, "x", SILENT)
    with group_of_one() as m:
        for rank in range(2):
            of_two = dataclasses.replace(m, rank=rank, world_size=2)
            scores = t.score_targets(nats_fn, np.arange(21), run, of_two)
            assert scores.counts.sum() == (20 if rank == 0 else 0)
    assert shapes == [(3, 16, 16), (3, 16, 4)] * 2


def test_the_score_does_not_depend_on_the_world_size():
    (one,) = run_ranks(ranks_score, 1, 1)
    for world in (2, 3):
        ranks = run_ranks(ranks_score, world, world)
        assert ranks[0] == ranks[1] == ranks[-1]  # every rank knows the score
        assert ranks[0][0] == pytest.approx(one[0], rel=1e-12)  # measured: 0
        assert ranks[0][1:] == pytest.approx(one[1:], rel=1e-12)  # measured: 0
    assert one[0] == pytest.approx([expected_sum(total) for total, _, _ in cases()], rel=1e-12)  # measured: 0


def brute_force(model, tokens, seq_len, stride):
    """Return the mean nats of all targets, from one forward pass a score window."""
    total = len(tokens) - 1
    nats = []
    for start, end, score_from in zip(*t.score_windows(total, seq_len, stride)):
        x = torch.from_numpy(tokens[start:end])[None]
        y = torch.from_numpy(tokens[start + 1 : end + 1])
        logits = model.logits(x)[0].double()
        each = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        nats += each[score_from - start :].tolist()
    assert len(nats) == total
    return sum(nats) / total


@pytest.mark.parametrize("total,stride", [(100, 4), (100, 16), (9, 4), (16, 16), (17, 5)])
def test_evaluate_equals_single_forwards(total, stride):
    """Batches, padding on the right and the shorter output of sliding windows change nothing."""
    h = tiny()
    model = noisy_model(h)
    tokens = random_tokens(h, (total + 1,), 5).numpy()
    with group_of_one() as m, torch.no_grad():
        score = t.evaluate(model.nats, tokens, ONE_BYTE, t.ScoreSettings(16, stride, 4, "x", SILENT), m)
        assert score.loss == pytest.approx(brute_force(model, tokens, 16, stride), rel=1e-6)  # measured: 2e-8
        # One byte a token; measured: 1.4e-16.
        assert score.bpb == pytest.approx(score.loss / np.log(2), rel=1e-14, abs=0)


def test_a_stride_of_seq_len_is_the_chunked_score():
    h = tiny()
    model = noisy_model(h)
    tokens = random_tokens(h, (16 * 7 + 1,), 6).numpy()
    ids = torch.from_numpy(tokens)
    x = ids[:-1].view(7, 16)
    y = ids[1:].view(7, 16)
    with group_of_one() as m, torch.no_grad():
        chunked = t.evaluate(model.nats, tokens, ONE_BYTE, t.ScoreSettings(16, 16, 4, "x", SILENT), m)
        assert chunked.loss == pytest.approx(model.loss(x, y).item(), rel=1e-6)  # measured: 6.2e-8
        sliding = t.evaluate(model.nats, tokens, ONE_BYTE, t.ScoreSettings(16, 4, 4, "x", SILENT), m)
        assert sliding.loss != chunked.loss
