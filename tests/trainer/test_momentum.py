"""momentum_spread, two momenta instead of one, and decay_follows_rate, a decay that falls with the rate."""

from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests.helpers import gaussian, stop_one_line, tiny
from tests.rank_cases import group_of_one
from tests.stress import kill_runs
from tests.trainer.fault_cases import STEPS, args, ends_like, has_line, stop_after

SPREAD = dict(momentum_spread=3.0)


def scalars(momentum, decay_mul=1.0):
    """Return the scalars of a step with rate 0.1."""
    values = dict(momentum=momentum, matrix_lr=0.1, adam_lr_mul=1.0)
    values |= dict(matrix_decay_mul=decay_mul, adam_decay_mul=decay_mul, correction1=1.0, correction2=1.0)
    return t.StepScalars(**{name: torch.tensor(value) for name, value in values.items()})


def test_the_mean_of_two_momenta_in_float64(monkeypatch):
    """Their horizons are 10 / 3 and 30 steps where that of one momentum would be 10."""
    monkeypatch.setattr(t, "orthogonalize", lambda U, method: U)
    h = tiny(step_rule="muon", muon_wd=0.0, **SPREAD)
    gradients = gaussian(4, 2, 6, 8)
    W = torch.zeros(2, 6, 8)
    momentum = torch.zeros(2, 2, 6, 8)
    wanted = torch.zeros_like(W, dtype=torch.float64)
    averages = {1 - 0.3: torch.zeros_like(wanted), 1 - 0.1 / 3: torch.zeros_like(wanted)}
    for g in gradients:
        matrices = t.OwnedMatrices(W, g.clone(), momentum)
        t.matrix_update(matrices, torch.tensor(1.0), scalars(0.9), h)
        for beta, average in averages.items():
            average.mul_(beta).add_(g.double(), alpha=1 - beta)
            wanted -= 0.1 * ((1 - beta) * g.double() + beta * average) / 2
    assert torch.allclose(W.double(), wanted, atol=1e-6)  # measured: 5.4e-8


def test_only_a_spread_has_a_second_momentum():
    with group_of_one() as m:
        for knobs, factor in (({}, 1), (SPREAD, 2)):
            h = tiny(**knobs)
            model = t.GPT(h)
            optimizer = t.Optimizer(model, h, m)
            sizes = {name: p.numel() for name, p in model.named_parameters()}
            assert all(x.numel() == factor * sizes[name] for name, x in optimizer.momentum.items())


@pytest.mark.parametrize("small", [False, True], ids=["matrices", "small parameters"])
def test_a_decay_that_follows_the_rate_shrinks_weights_by_its_factor(small):
    """With no gradient only the decay moves a weight: rate 0.1, decay 0.5, factor 0.25."""
    ends = []
    for factor in (1.0, 0.25):
        W = torch.ones(1, 4, 4)
        zeros = torch.zeros_like(W)
        if small:
            buffers = t.FlatBuffers(
                p=W, g=zeros, m=zeros.clone(), v=zeros.clone(), lr=zeros + 0.1, wd=zeros + 0.5
            )
            t.adam_update(buffers, torch.tensor(1.0), scalars(0.9, factor), tiny())
        else:
            h = tiny(step_rule="muon", muon_wd=0.5)
            matrices = t.OwnedMatrices(W, zeros, zeros.clone())
            t.matrix_update(matrices, torch.tensor(1.0), scalars(0.9, factor), h)
        ends.append(W.mean().item())
    assert ends == pytest.approx([1 - 0.1 * 0.5, 1 - 0.1 * 0.5 * 0.25], rel=1e-6)  # measured: 7.5e-8


def test_the_factor_of_the_decay_is_that_of_the_rates(monkeypatch):
    found = []
    with group_of_one() as m:
        for follows in (0, 1):
            h = tiny(decay_follows_rate=follows)
            optimizer = t.Optimizer(t.GPT(h), h, m)
            optimizer.step(t.Hyper(0.9, 0.9, matrix_lr_mul=0.25, adam_lr_mul=0.5))
            s = t.StepScalars(*optimizer.scalars.tolist())
            found.append((s.matrix_decay_mul, s.adam_decay_mul))
    assert found == [(1.0, 1.0), (0.25, 0.5)]


@pytest.mark.parametrize("knobs", [SPREAD, dict(decay_follows_rate=1)], ids=str)
def test_each_changes_the_weights_of_a_run(knobs, tmp_path):
    assert t.main(args(tmp_path / "without")) == 0
    assert t.main(args(tmp_path / "with", **knobs)) == 0
    states = [kill_runs.final_state(tmp_path / name, step=STEPS) for name in ("without", "with")]
    assert not torch.equal(states[0]["qo_bank"], states[1]["qo_bank"])


def test_a_run_with_two_momenta_resumes_bit_equal(tmp_path, monkeypatch):
    assert t.main(args(tmp_path / "whole", **SPREAD)) == 0
    whole = SimpleNamespace(state=kill_runs.final_state(tmp_path / "whole", step=STEPS))
    stop_after(tmp_path / "cut", monkeypatch, 5, **SPREAD)
    assert t.main(args(tmp_path / "cut", resume="auto", **SPREAD)) == 0
    assert has_line(tmp_path / "cut", "resumed step:5 from ")
    assert ends_like(whole, tmp_path / "cut")


@pytest.mark.parametrize("spread", ["0.5", "13"])
def test_a_spread_beyond_its_bounds_is_one_line(spread, capsys):
    """The shortest horizon, that of muon_momentum_start=0.92, has 12.5 steps."""
    err = stop_one_line(["config", "preset=record_sp1024", f"momentum_spread={spread}"], capsys)
    assert f"momentum_spread={spread} must be at least 1 and at most the horizon of momentum" in err
    assert "12.5 steps with muon_momentum_start=0.92" in err
