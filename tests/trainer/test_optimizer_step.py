"""A step in one process: against float64, snapshot, warm-up, clipping, rates, frozen parameters."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import all_equal, noisy_model, random_tokens, tiny
from tests.rank_cases import group_of_one
from tests.trainer.schedule_cases import data_folder, parameters, setup

# ---------------------------------------------------------------- one process


@pytest.fixture
def one():
    """Yield the Machine of a process group of one."""
    with group_of_one() as m:
        yield m


def gradients_in_float64(h, params, batch):
    """Return the gradients of the mean loss of a batch, by name, for float64 arrays of parameters."""
    model = noisy_model(h, dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(params[name]))
    sequences = torch.cat(batch)
    model.loss(sequences[:, :-1], sequences[:, 1:]).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


class AdamState(NamedTuple):
    """A parameter and the means of its gradient and of its square."""

    p: np.ndarray
    first: np.ndarray
    second: np.ndarray


class MuonState(NamedTuple):
    """A stack of matrices and their momentum."""

    p: np.ndarray
    momentum: np.ndarray


def adam_by_hand(state, gradient, step, *, lr, wd, h):
    """Return the state after AdamW's step number `step`, from 1."""
    first = h.adam_beta1 * state.first + (1 - h.adam_beta1) * gradient
    second = h.adam_beta2 * state.second + (1 - h.adam_beta2) * gradient**2
    mean = first / (1 - h.adam_beta1**step)
    root = np.sqrt(second / (1 - h.adam_beta2**step))
    return AdamState(state.p * (1 - lr * wd) - lr * mean / (root + h.adam_eps), first, second)


def newton_schulz_by_hand(matrix):
    """Return the matrix, of norm 1, after five steps of Newton-Schulz on its singular values."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    S = S / np.linalg.norm(S)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return (U * S) @ Vh


def muon_by_hand(state, gradient, beta, *, lr, wd):
    """Return the state after a step of rule muon. beta: of Nesterov's momentum."""
    momentum = beta * state.momentum + (1 - beta) * gradient
    nesterov = beta * momentum + (1 - beta) * gradient
    direction = np.stack([newton_schulz_by_hand(matrix) for matrix in nesterov])
    rows, columns = direction.shape[1:]
    scale = math.sqrt(max(1.0, rows / columns))
    return MuonState(state.p * (1 - lr * wd) - lr * scale * direction, momentum)


def start_by_hand(model):
    """Return the state of each parameter by name before the first step, in float64."""
    is_flat = {spec.name: spec.buffer == "flat" for spec in t.PARAM_TABLE}
    states = {}
    for name, p in parameters(model).items():
        array = p.double().numpy()
        zero = np.zeros_like(array)
        states[name] = AdamState(array, zero, zero) if is_flat[name] else MuonState(array, zero)
    return states


def step_by_hand(h, hp, states, grads, step):
    """Return the state of each parameter after a step with unclipped gradients, both by name."""
    lr_name = {spec.name: spec.lr for spec in t.PARAM_TABLE}
    adam_wd = {"embed_lr": h.embed_wd, "scalar_lr": h.scalar_wd}
    clip = min(1.0, h.grad_clip / math.sqrt(sum((g**2).sum() for g in grads.values())))
    after = {}
    for name, state in states.items():
        gradient = clip * grads[name]
        lr = getattr(h, lr_name[name])
        if isinstance(state, AdamState):
            wd = adam_wd[lr_name[name]]
            after[name] = adam_by_hand(state, gradient, step, lr=lr * hp.adam_lr_mul, wd=wd, h=h)
        else:
            after[name] = muon_by_hand(state, gradient, hp.momentum, lr=lr * hp.matrix_lr_mul, wd=h.muon_wd)
    return after


def test_a_step_is_the_float64_step(one):
    """Compare three steps with AdamW by hand and with Newton-Schulz on singular values, in float64."""
    model, optimizer, _, loader = setup(one, step_rule="muon", muon_wd=0.3, embed_wd=0.2, scalar_wd=0.1)
    h = optimizer.h
    states = start_by_hand(model)
    backward, _ = t.capture_pass(model.loss, optimizer)
    for step in range(1, 4):
        batch = loader.next()
        hp = t.Hyper(0.0, 0.9, matrix_lr_mul=0.8 / step, adam_lr_mul=0.9 / step)
        grads = gradients_in_float64(h, {name: state.p for name, state in states.items()}, batch)
        states = step_by_hand(h, hp, states, grads, step)

        t.train_step(backward, optimizer, batch, hp)
        for name, p in model.named_parameters():
            error = np.abs(p.detach().double().numpy() - states[name].p)
            if isinstance(states[name], AdamState):
                # Adam divides by sqrt(v): where a gradient is near zero its rounding decides the sign.
                # Measured: none, at most 2.9e-6.
                assert (error > 1e-4).mean() <= 0.002, (step, name, error.max())
            else:
                assert error.max() < 3e-6, (step, name, error.max())  # measured: 1.3e-7


def test_gradients_accumulate_over_micro_batches_and_are_cleared(one):
    losses = []
    ends = []
    for micro in (16, 128):
        model, optimizer, _, loader = setup(one, micro_batch_tokens=micro)
        batch = loader.next()
        assert len(batch) == 128 // micro
        backward, _ = t.capture_pass(model.loss, optimizer)
        loss = t.train_step(backward, optimizer, batch, t.hyper_at(optimizer.h, 0, 0.0))
        losses.append(loss.item())
        ends.append(optimizer.flat.clone())
        assert all(p.grad.abs().max() == 0 for p in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # measured: 1e-7
    torch.testing.assert_close(ends[0], ends[1], atol=2e-6, rtol=0)  # measured: 1.2e-7


def test_parameters_live_in_the_optimizers_buffers(one):
    model, optimizer, _, _ = setup(one)
    names = {spec.name: spec.buffer for spec in t.PARAM_TABLE if hasattr(model, spec.name)}
    for name, p in model.named_parameters():
        buffer = optimizer.bank.get(names[name], optimizer.flat)
        gradients = optimizer.bank_grad.get(names[name], optimizer.flat_grad)
        assert p.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr(), name
        assert p.grad.untyped_storage().data_ptr() == gradients.untyped_storage().data_ptr(), name
        assert p.data_ptr() % 64 == 0
        assert p.is_contiguous()
        assert p.grad.is_contiguous()
    assert names.keys() == dict(model.named_parameters()).keys()
    torch.manual_seed(0)
    before = parameters(noisy_model(optimizer.h, seed=3))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # contents are kept


def test_a_bank_holds_at_most_two_parameters(one):
    _, optimizer, _, _ = setup(one)
    three = {name: torch.nn.Parameter(torch.zeros(2, 4, 4)) for name in ("a", "b", "c")}
    with pytest.raises(ValueError, match="bank 'abc' has 3 parameters"):
        optimizer.make_bank("abc", three)


def test_snapshot_is_exact_and_a_copy(one):
    model, optimizer, _, loader = setup(one)
    backward, _ = t.capture_pass(model.loss, optimizer)
    for step in range(2):
        t.train_step(backward, optimizer, loader.next(), t.hyper_at(optimizer.h, step, 0.0))
    saved = optimizer.snapshot()
    frozen = [x.clone() for x in saved.state]
    t.train_step(backward, optimizer, loader.next(), t.hyper_at(optimizer.h, 2, 0.0))
    assert optimizer.steps == 3 and not all_equal(saved.state, optimizer.state())
    assert all_equal(saved.state, frozen)  # a copy, not a view

    tokens = random_tokens(optimizer.h, (2, 16), 1)
    targets = random_tokens(optimizer.h, (2, 16), 2)
    model.loss(tokens, targets).backward()  # half a step's gradients
    optimizer.restore(saved)
    assert optimizer.steps == 2 and all_equal(frozen, optimizer.state())
    assert all(p.grad.abs().max() == 0 for p in model.parameters())

    # Nothing that a step changes is left out.
    assert optimizer.rule_state
    kept = [
        optimizer.flat,
        optimizer.flat_m,
        optimizer.flat_v,
        *optimizer.bank.values(),
        *optimizer.momentum.values(),
        *optimizer.rule_state.values(),
    ]
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in optimizer.state()}


class Lines(list):
    """A log in memory."""

    def __call__(self, line, console=None):
        self.append(line)

    def progress(self, what, done, total, started):
        """Keep nothing: it is for people."""


def test_warmup_leaves_no_trace(one):
    model, optimizer, ema, loader = setup(one, warmup_steps=3)
    lines = Lines()
    scored = []
    trained = []
    state = [x.clone() for x in optimizer.state()]
    average = [x.clone() for x in ema.average]
    first_batch = [loader.build(a).clone() for a in range(loader.shape.accum)]
    step = optimizer.step

    def nats(tokens, targets, last):
        scored.append(tuple(tokens.shape))
        return model.nats(tokens, targets, last)

    def noted_step(hp):
        step(hp)
        trained.append(not all_equal(state, optimizer.state()))

    optimizer.step = noted_step
    run = t.Run(
        h=optimizer.h,
        m=one,
        log=lines,
        dataset=None,
        model=model,
        loss_fn=model.loss,
        plain_loss_fn=model.loss,
        nats_fn=t.ScoringPass(nats),
        phases={},
        splits={},
    )
    warm = t.warmup(run, optimizer, ema, loader)
    assert warm.calibrate_ms > 0 and run.phases == {}  # the rehearsal counts in no phase of its own
    assert trained == [True] * 3
    assert all_equal(state, optimizer.state()) and optimizer.steps == 0
    assert all_equal(average, ema.average) and ema.progress == 0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())
    assert loader.index == 0 and all_equal(first_batch, loader.next())
    assert scored and scored[0] == (4, 16)  # the scoring forward is warm, too
    assert "warmup_step:3/3" in lines


@pytest.mark.parametrize("clip", [0.05, 1e9])
@pytest.mark.parametrize("knobs", [{}, dict(bigram_vocab_size=600_000)], ids=["tiny", "5 million"])
def test_the_factor_that_clips_gradients(one, clip, knobs):
    """Compare with float64: a float32 sum over millions would be short by more than the tolerance."""
    model, optimizer, _, _ = setup(one, grad_clip=clip, **knobs)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad.copy_(torch.randn(p.shape, generator=generator))
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    factor = optimizer.gradient_factor(optimizer.squared_norms()).item()
    assert factor == pytest.approx(min(1.0, clip / norm), rel=1e-6, abs=0)  # measured: 4.3e-8


# ---------------------------------------------------------------- schedules


def test_hyper_at_is_pure_and_falls_to_the_floor():
    h = tiny(
        iterations=200,
        warmdown_frac=0.4,
        min_lr_frac=0.1,
        muon_momentum_warmup_frac=0.2,
        muon_momentum_start=0.8,
        muon_momentum=0.95,
    )
    points = [t.hyper_at(h, i, 0.0) for i in range(201)]
    assert points == [t.hyper_at(h, i, 0.0) for i in range(201)]

    lr = [p.adam_lr_mul for p in points]
    assert lr == [p.matrix_lr_mul for p in points]
    assert lr[:121] == [1.0] * 121 and lr[200] == 0.1
    assert all(a > b or b == 0.1 for a, b in zip(lr[120:], lr[121:]))
    assert lr[160] == pytest.approx(0.5) and lr[140] == pytest.approx(0.75)  # linear

    momentum = [p.momentum for p in points]
    assert momentum[0] == 0.8 and momentum[20] == pytest.approx(0.875)
    assert momentum[40:] == pytest.approx([0.95] * 161)
    assert all(a < b for a, b in zip(momentum[:40], momentum[1:41]))

    assert t.hyper_at(h, 500, 0.0).progress == 1.0
    assert t.hyper_at(dataclasses.replace(h, min_lr_frac=0.0), 200, 0.0).adam_lr_mul == 0.0
    assert t.hyper_at(dataclasses.replace(h, muon_momentum_warmup_frac=0.0), 0, 0.0).momentum == 0.95


def test_the_rates_of_matrices_rise_and_fall_apart():
    """They rise in the first fifth and fall over the whole run; other rates only fall, in the last 0.4."""
    knobs = dict(iterations=200, warmdown_frac=0.4, min_lr_frac=0.1)
    apart = tiny(**knobs, matrix_warmdown_frac=1.0, matrix_warmup_frac=0.2)
    alike = tiny(**knobs)
    for step in range(201):
        hp = t.hyper_at(apart, step, 0.0)
        x = step / 200
        assert hp.matrix_lr_mul == pytest.approx(min(1.0, x / 0.2) * max(1 - x, 0.1))
        assert hp._replace(matrix_lr_mul=hp.adam_lr_mul) == t.hyper_at(alike, step, 0.0)


@pytest.mark.parametrize("idle", ["matrix", "adam"])
def test_each_multiplier_drives_its_own_parameters(one, idle):
    model, optimizer, _, loader = setup(one)
    before = parameters(model)
    backward, _ = t.capture_pass(model.loss, optimizer)
    rates = dict(matrix_lr_mul=1.0, adam_lr_mul=1.0) | {f"{idle}_lr_mul": 0.0}
    t.train_step(backward, optimizer, loader.next(), t.Hyper(0.0, 0.9, **rates))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    matrices = {spec.name for spec in t.MATRICES}
    assert moved == (before.keys() - matrices if idle == "matrix" else matrices)


def test_the_multiplier_drives_every_parameter(one):
    for lr_mul in (0.0, 1.0):
        model, optimizer, _, loader = setup(one)
        before = parameters(model)
        backward, _ = t.capture_pass(model.loss, optimizer)
        t.train_step(backward, optimizer, loader.next(), t.Hyper(0.0, 0.9, lr_mul, lr_mul))
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == (before.keys() if lr_mul else set())


# ---------------------------------------------------------------- rates of zero


def steps_of(one, count, **knobs):
    """Train `count` steps at full rate. Returns the model and its parameters before and after each step."""
    h = tiny(data_path=data_folder(), **knobs)
    model = t.GPT(h)
    optimizer = t.Optimizer(model, h, one)
    loader = t.TokenLoader(h, one)
    backward, _ = t.capture_pass(model.loss, optimizer)
    states = [parameters(model)]
    for _ in range(count):
        t.train_step(backward, optimizer, loader.next(), t.Hyper(0.0, 0.9, 1.0, 1.0))
        states.append(parameters(model))
    return model, states


@pytest.mark.parametrize("rate", ["embed_lr", "scalar_lr"])
def test_parameters_with_a_rate_of_zero_are_frozen(one, rate):
    """Make no gradient for them and do not decay them, while the others train."""
    model, states = steps_of(one, 4, **{rate: 0.0}, embed_wd=0.5, scalar_wd=0.5, proj_init_std=0.1)
    frozen = {spec.name for spec in t.SMALL if spec.lr == rate and hasattr(model, spec.name)}
    for name in frozen:
        p = getattr(model, name)
        assert not p.requires_grad and p.grad.abs().max() == 0
        assert torch.equal(states[0][name], states[-1][name])
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert frozen and learning == states[0].keys() - frozen
    assert all(not torch.equal(states[0][name], states[-1][name]) for name in learning)


def test_the_tighter_budget_drives():
    h = tiny(iterations=100, max_wallclock_seconds=10.0)
    assert t.hyper_at(h, 10, 5000.0).progress == 0.5  # time is shorter
    assert t.hyper_at(h, 80, 5000.0).progress == 0.8  # iterations are
    assert t.hyper_at(h, 0, 99_000.0) == t.hyper_at(h, 100, 0.0)  # both end at 1
    assert t.hyper_at(h, 10, 5000.0, 8000.0).progress == 0.625  # less time
    unlimited = tiny(iterations=100, max_wallclock_seconds=0.0)
    assert t.hyper_at(unlimited, 10, 1e9).progress == 0.1
