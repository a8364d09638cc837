"""start_batch_tokens and batch_growth_frac: the first steps take fewer micro-batches than the last ones."""

import re
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests.helpers import english_args, stop_one_line, tiny
from tests.rank_cases import group_of_one, run_ranks
from tests.stress import kill_runs
from tests.trainer.fault_cases import STEPS, args, ends_like, has_line, stop_after

# Micro-batches of 8 sequences of 32 tokens: 1 in steps 0 to 2, 2 in steps 3 to 5, 3 from step 6 on.
GROWTH = dict(train_batch_tokens=768, micro_batch_tokens=256, start_batch_tokens=256)
COUNTS = [1] * 3 + [2] * 3 + [3] * 6


def noted_run(argv):
    """Train, and return the micro-batches of every step after the warm-up."""
    batches = []
    train_step = t.train_step

    def noted_step(backward, optimizer, batch, hp):
        batches.append([x.clone() for x in batch])
        return train_step(backward, optimizer, batch, hp)

    t.train_step = noted_step
    try:
        assert t.main(argv) == 0
    finally:
        t.train_step = train_step
    return batches[-STEPS:]


def noted_rank(rank, argv):
    """As noted_run, on this rank."""
    return noted_run(argv)


def test_a_batch_grows_by_whole_micro_batches():
    shape = t.BatchShape(accum=3, sequences=8, first=1)
    assert [shape.count(growth) for growth in (0, 0.49, 0.5, 0.99, 1)] == [1, 1, 2, 2, 3]
    constant = t.BatchShape(accum=3, sequences=8, first=3)
    assert [constant.count(growth) for growth in (0, 0.5, 1)] == [3, 3, 3]


def test_a_split_shape_is_that_of_smaller_micro_batches():
    h = tiny(train_batch_tokens=16 * 12, micro_batch_tokens=16 * 6, start_batch_tokens=16 * 6)
    smaller = tiny(train_batch_tokens=16 * 12, micro_batch_tokens=16 * 2, start_batch_tokens=16 * 6)
    assert t.cut_batch(h, 1).split(3) == t.cut_batch(smaller, 1)


def test_growth_ends_where_the_knob_says():
    h = tiny(iterations=100, batch_growth_frac=0.25)
    assert [t.hyper_at(h, step, 0.0).growth for step in (0, 5, 25, 99)] == [0, 0.2, 1, 1]


def test_the_first_steps_take_fewer_micro_batches(tmp_path):
    """And all read the stream on without a gap, in the order of a run whose batch is constant."""
    grown = noted_run(args(tmp_path / "grown", **GROWTH))
    assert [len(batch) for batch in grown] == COUNTS
    assert has_line(tmp_path / "grown", r"batch_grows step:3 progress:0\.250 tokens:512$")
    assert has_line(tmp_path / "grown", r"batch_grows step:6 progress:0\.500 tokens:768$")

    constant = noted_run(args(tmp_path / "constant", **(GROWTH | dict(start_batch_tokens=0))))
    assert [len(batch) for batch in constant] == [3] * STEPS
    assert not has_line(tmp_path / "constant", "batch_grows")
    read = torch.cat([x for batch in grown for x in batch])
    assert torch.equal(read, torch.cat([x for batch in constant for x in batch])[: len(read)])

    scores = [(tmp_path / name / "run.int6.xz").read_bytes() for name in ("grown", "constant")]
    assert scores[0] != scores[1]


def test_a_step_has_the_mean_gradient_of_the_micro_batches_it_takes():
    h = tiny(train_batch_tokens=16 * 12, micro_batch_tokens=16 * 4, start_batch_tokens=16 * 4)
    with group_of_one() as m:
        model = t.GPT(h)
        optimizer = t.Optimizer(model, h, m)
        backward, _ = t.capture_pass(model.loss, optimizer)
        batch = [torch.randint(0, h.vocab_size, (4, 17)) for _ in range(2)]
        losses = [backward(x, 2).item() for x in batch]
        found = model.tok_emb.grad.clone()

        optimizer.clear_gradients()
        loss = torch.stack([model.loss(x[:, :-1], x[:, 1:]) for x in batch]).mean()
        loss.backward()
        assert sum(losses) == pytest.approx(loss.item(), rel=1e-6)  # measured: 5.2e-8
        assert torch.allclose(found, model.tok_emb.grad, rtol=1e-5, atol=1e-8)  # measured: 7 % of that


def test_two_ranks_share_every_grown_batch(tmp_path):
    """Micro-batches of 4 sequences on each of two ranks hold the text of one rank's micro-batch of 8."""
    knobs = GROWTH | dict(iterations=STEPS, max_wallclock_seconds=0, warmup_steps=1)
    alone = noted_run(english_args(out_dir=tmp_path / "one", **knobs))
    argv = english_args(out_dir=tmp_path / "two", **(knobs | dict(micro_batch_tokens=128)))
    ranks = run_ranks(noted_rank, 2, argv)
    for step, batch in enumerate(alone):
        shared = [torch.cat(parts) for parts in zip(ranks[0][step], ranks[1][step])]
        assert torch.equal(torch.cat(batch), torch.cat(shared))


@pytest.fixture(scope="module")
def undisturbed_growth(tmp_path_factory):
    """Return the final state of a run whose batch grows."""
    folder = tmp_path_factory.mktemp("undisturbed_growth")
    assert t.main(args(folder, **GROWTH)) == 0
    return SimpleNamespace(state=kill_runs.final_state(folder, step=STEPS))


@pytest.mark.parametrize("step", [3, 5])
def test_resuming_anywhere_in_the_growth_is_bit_equal(undisturbed_growth, tmp_path, monkeypatch, step):
    stop_after(tmp_path, monkeypatch, step, **GROWTH)
    assert t.main(args(tmp_path, resume="auto", **GROWTH)) == 0
    assert has_line(tmp_path, f"resumed step:{step} from ")
    assert ends_like(undisturbed_growth, tmp_path)


@pytest.mark.parametrize("start", [128, 300, 700])
def test_a_start_that_is_no_number_of_micro_batches_is_one_line(start, tmp_path, capsys):
    err = stop_one_line(args(tmp_path / "out", **(GROWTH | dict(start_batch_tokens=start))), capsys)
    assert f"config key start_batch_tokens: {start} must be a multiple of 256" in err
    assert not (tmp_path / "out").exists()


def test_a_growth_of_no_time_is_one_line(capsys):
    err = stop_one_line(["config", "batch_growth_frac=0"], capsys)
    assert re.search("batch_growth_frac=0 must be above 0", err)
