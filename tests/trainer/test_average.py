"""The exponential average of the weights."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import all_equal, noisy_model, tiny
from tests.trainer.schedule_cases import parameters


def averaged(steps, frac):
    """Return an average at the end of a run whose weights follow one curve over the run's progress."""
    h = tiny(num_layers=1, xsa_last_n=1, ve_last_n=1, ema_frac=frac)
    model = t.GPT(h)
    start = parameters(model)
    ema = t.Ema(model, h)
    for i in range(1, steps + 1):
        x = i / steps
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + 1 + x + math.sin(3 * x))
        ema.update(x)
    return ema.average[0] - start["mlp_up_bank"]


def test_the_average_is_the_weighted_mean_of_the_weights_that_training_made():
    """Compare with a direct sum of every update's weights times its share, at uneven progress."""
    frac = 0.2
    h = tiny(num_layers=1, xsa_last_n=1, ve_last_n=1, ema_frac=frac)
    model = t.GPT(h).double()
    ema = t.Ema(model, h)
    rng = np.random.default_rng(2)
    ends = np.concatenate([[0.0], np.cumsum(rng.uniform(0.0, 0.1, 12))])  # of the span each update stands for
    values = rng.normal(size=len(ends))
    for k, (progress, value) in enumerate(zip(ends.tolist(), values.tolist())):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        ema.update(progress)
        if k == 0:
            expected = value  # the first update copies
        else:
            density = np.exp((ends[: k + 1] - progress) / frac)
            shares = np.diff(density) / (1 - math.exp(-progress / frac))
            assert shares.sum() == pytest.approx(1.0, abs=1e-14)  # measured: 1.1e-16
            expected = (shares * values[1 : k + 1]).sum()
        for average in ema.average:
            assert average.mean().item() == pytest.approx(expected, abs=1e-14)  # measured: 2.2e-16
            assert average.std(correction=0).item() < 1e-14  # measured: 2.2e-16


def test_a_finished_record_run_changes_by_two_in_a_billion():
    """The initial weights had the share exp(-1 / ema_frac) of the average; now they have none."""
    h = t.load_config(["preset=record"], {})
    steps = np.linspace(0.0, 1.0, 6001)
    model = SimpleNamespace(parameters=lambda: [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))])
    ema = t.Ema(model, h)
    old = torch.zeros(1, dtype=torch.float64)
    ema.average[0].fill_(1.0)  # all that an average of zeros can hold is what it started from
    old.fill_(1.0)
    before = 0.0
    for progress in steps.tolist():
        ema.update(progress)
        old *= math.exp((before - progress) / h.ema_frac)
        before = progress
    assert old.item() == pytest.approx(math.exp(-1 / 0.05), rel=1e-11, abs=0)  # measured: 1.5e-13
    assert 2e-9 < old.item() < 2.5e-9 and ema.average[0].item() == 0.0


@pytest.mark.parametrize("progress", [0.4, 0.5])
def test_no_progress_leaves_the_average(progress):
    """A resumed run may hold back less time, so that its first steps are at less progress than its last."""
    model = noisy_model(tiny())
    ema = t.Ema(model, tiny())
    ema.update(0.5)
    before = [x.clone() for x in ema.average]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(progress)
    assert all_equal(before, ema.average) and ema.progress == 0.5


@pytest.mark.parametrize("frac", [0.05, 0.3])
def test_the_horizon_is_a_share_of_the_run(frac):
    """Compare 100 and 1000 steps, which agree to the step length, with the integral of exp(-age / frac)."""
    short = averaged(100, frac).mean().item()
    long = averaged(1000, frac).mean().item()
    x = (np.arange(200_000) + 0.5) / 200_000
    weight = np.exp((x - 1) / frac) / frac / 200_000
    limit = (weight * (1 + x + np.sin(3 * x))).sum() / weight.sum()
    assert long == pytest.approx(limit, abs=0.005)  # measured: 9.2e-4
    assert short == pytest.approx(limit, abs=0.05)  # measured: 0.0089
    assert abs(averaged(100, 2 * frac).mean().item() - short) > 0.01  # another horizon is another average


def test_average_and_reset():
    h = tiny()
    model = noisy_model(h)
    ema = t.Ema(model, h)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    live = parameters(model)
    ema.update(0.5)
    assert all(p is q.data or torch.equal(p, q) for p, q in zip(ema.params, model.parameters()))
    assert all_equal(ema.average, live.values())  # the first update copies
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    live = parameters(model)
    ema.update(0.51)
    assert not any(torch.equal(x, p) for x, p in zip(ema.average, live.values()))
    ema.reset()
    assert ema.progress == 0.0 and all_equal(ema.average, live.values())
