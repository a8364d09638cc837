"""Directions and step rules against float64 and torch.optim, matrix by matrix."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import gaussian, tiny
from tests.trainer.direction_cases import DIRECTIONS, POLAR

SHAPES = [(32, 48), (48, 32), (40, 40), (3, 24, 16), (2, 3, 16, 24), (1, 8), (8, 1), (2, 1, 1)]


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize("method", POLAR)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_move_towards_one_and_vectors_stay(method, shape):
    G = gaussian(*shape)
    out = t.orthogonalize(G, method)
    assert out.shape == G.shape and out.dtype == G.dtype

    low, high = DIRECTIONS[method].any_shape
    given = G.reshape(-1, *shape[-2:]).double()
    found = out.reshape(-1, *shape[-2:]).double()
    for g, u in zip(given, found):
        U, S, Vh = torch.linalg.svd(g, full_matrices=False)
        inner = U.T @ u @ Vh.T  # in the singular basis of the input: diagonal, positive, near one
        assert (inner - inner.diagonal().diag()).abs().max() < 3e-5  # measured: 2.9e-6
        is_reached = S / S.norm() > 0.01  # five steps do not reach a tiny singular value
        values = inner.diagonal()[is_reached]
        assert low < values.min() and values.max() < high, values
        torch.testing.assert_close(u, U @ inner.diagonal().diag() @ Vh, atol=2e-5, rtol=0)  # measured: 1.6e-6


def ns5_singular_values(S):
    """Apply the five Newton-Schulz steps of ns5 to singular values, divided by their norm first."""
    S = S / (S**2).sum() ** 0.5
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return S


def test_ns5_is_the_quintic_of_the_singular_values():
    G = gaussian(24, 36, seed=3)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    expected = U @ ns5_singular_values(S).diag() @ Vh
    # Measured: 4.7e-7.
    torch.testing.assert_close(t.orthogonalize(G, "ns5").double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", t.ORTHO)
def test_the_scale_of_the_input_does_not_matter(method):
    G = gaussian(2, 16, 24)
    out = t.orthogonalize(G, method)
    for scale in (1e-20, 1e-12, 1e12, 1e20):
        # Measured: 1.8e-6.
        torch.testing.assert_close(t.orthogonalize(G * scale, method), out, atol=1e-4, rtol=0)
    torch.testing.assert_close(t.orthogonalize(-G, method), -out)


@pytest.mark.parametrize("method", t.ORTHO)
def test_the_gpus_constant_scale_leaves_room(method):
    """Scaled by GPU_SCALE before the cast to 16 bits, entries of 1e-20 and of 1e4 give the same direction.

    The scales are powers of two, which are exact.
    """
    direction = t.ORTHO[method]
    G = gaussian(2, 48, 96)
    outs = [direction((G * 2.0**k * t.GPU_SCALE).bfloat16()).float() for k in (-66, -10, 0, 14)]
    assert outs[0].norm() > 5 and torch.isfinite(outs[0]).all()
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-6, rtol=0)  # measured: 0
    assert not direction(torch.zeros(1, 16, 24, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("method", POLAR)
def test_zero_and_rank_one(method):
    zero = t.orthogonalize(torch.zeros(2, 16, 24), method)
    assert torch.equal(zero, torch.zeros_like(zero))
    mixed = t.orthogonalize(torch.stack([torch.zeros(16, 24), gaussian(16, 24)]), method)
    assert torch.equal(mixed[0], torch.zeros(16, 24)) and mixed[1].norm() > 1  # padding beside a live matrix

    u = gaussian(16, 1)
    v = gaussian(1, 24, seed=1)
    out = t.orthogonalize(u @ v, method)
    direction = (u / u.norm()) @ (v / v.norm())
    assert torch.isfinite(out).all()
    scale = (out * direction).sum().item()
    assert 0.6 < scale < 1.3 and (out - scale * direction).norm() < 1e-3  # measured: 4.7e-5

    one = torch.zeros(16, 24)
    one[3, 5] = 1e-30
    assert torch.isfinite(t.orthogonalize(one, method)).all()


def test_matrix_products_match_their_formulas():
    X = gaussian(2, 6, 9).double()
    A = gaussian(2, 6, 6, seed=1).double()
    r = torch.rand(2, 6, generator=torch.Generator().manual_seed(2)).double() + 0.5
    R = r.diag_embed()
    eye = torch.eye(6).double()
    close = torch.testing.assert_close

    close(t.xxt(X)[0], X @ X.mT)
    close(t.xxt(X, r)[0], R @ X @ X.mT @ R)
    close(t.xxt(X, r, 2)[1], (R @ X @ X.mT @ R).square().sum(-1), check_dtype=False)

    close(t.ba_plus_caa(A, 0.0, -4.0, 2.0), -4.0 * A + 2.0 * A @ A)
    close(t.ba_plus_caa(A, 3.0, -4.0, 2.0, r), (3.0 * eye - 4.0 * A + 2.0 * A @ A) @ R)

    G = R @ X @ X.mT @ R
    for layout in (X, X.mT.contiguous().mT):
        found = t.quintic(layout, ((3.0, -4.0, 2.0),), r)
        close(found, (3.0 * eye - 4.0 * G + 2.0 * G @ G) @ R @ X)
        assert found.stride() == layout.stride()

    Y, squares = t.lower_solve(A, X, r)
    close((A.tril(-1) + eye) @ Y.double(), R @ X, atol=1e-5, rtol=1e-5)  # measured: 7 % of that
    close(squares, Y.float().square().sum(-1))


# ---------------------------------------------------------------- step rules


def muon_by_hand(W, U, lr, wd):
    """Return W after a step of muon, in numpy."""
    rows, columns = W.shape[-2:]
    return (1 - lr * wd) * W - lr * math.sqrt(max(1.0, rows / columns)) * U


def frobenius(x):
    """Return the Frobenius norm of each matrix, (..., 1, 1)."""
    return np.sqrt((x**2).sum((-2, -1), keepdims=True))


def hyperball_by_hand(W, U, lr, wd):
    """Return W after a step of hyperball, in numpy."""
    moved = W - lr * frobenius(W) / frobenius(U) * U
    return frobenius(W) / frobenius(moved) * moved


BY_HAND = {
    "muon": muon_by_hand,
    "normuon": muon_by_hand,  # the second moment divides before the rule
    "hyperball": hyperball_by_hand,
    "normuon_hyperball": hyperball_by_hand,
}


@pytest.mark.parametrize("rule", t.STEP_RULES)
@pytest.mark.parametrize("shape", [(2, 8, 32), (2, 32, 8), (3, 16, 16)], ids=str)
def test_step_rule_is_its_formula(rule, shape):
    W = gaussian(*shape)
    U = gaussian(*shape, seed=1)
    expected = BY_HAND[rule](W.double().numpy(), U.double().numpy(), 0.03, 0.4)
    out = W.clone()
    assert t.STEP_RULES[rule].step(out, U, torch.tensor(0.03), 0.4) is None  # in place
    np.testing.assert_allclose(out.double().numpy(), expected, atol=1e-6)  # measured: 6.6e-7


# ---------------------------------------------------------------- updates over several steps


def scalars(**given):
    """Return the scalars of a step. A rate that is not given is nan: an update that read it would show it."""
    values = dict(momentum=0.9, matrix_lr=math.nan, adam_lr_mul=math.nan)
    values |= dict(matrix_decay_mul=1.0, adam_decay_mul=1.0, correction1=1.0, correction2=1.0)
    return t.StepScalars(**{name: torch.tensor(value) for name, value in (values | given).items()})


def polar_quintic(G):
    """Return ns5's direction of one matrix by its effect on singular values, in numpy float64."""
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    return U @ np.diag(ns5_singular_values(S)) @ Vh


@pytest.mark.parametrize("shape", [(3, 24, 12), (3, 12, 24)], ids=str)
def test_matrix_update_over_several_steps(shape):
    h = tiny(matrix_lr=0.02, muon_wd=0.3, ortho="ns5", step_rule="muon")
    W = gaussian(*shape)
    momentum = torch.zeros(shape)
    expected_W = W.double().numpy().copy()
    expected_momentum = np.zeros(shape)
    for step in range(5):
        g = gaussian(*shape, seed=10 + step)
        mu = 0.85 + 0.02 * step
        lr = 0.02 * (1 - 0.1 * step)
        factor = torch.tensor([1.0, 0.3][step % 2])
        before = g.clone()
        matrices = t.OwnedMatrices(W, g, momentum)
        t.matrix_update(matrices, factor, scalars(momentum=mu, matrix_lr=lr), h)
        assert torch.equal(g, before)

        clipped = factor.item() * before.double().numpy()
        expected_momentum = mu * expected_momentum + (1 - mu) * clipped
        nesterov = (1 - mu) * clipped + mu * expected_momentum
        for i in range(len(expected_W)):
            expected_W[i] = muon_by_hand(expected_W[i], polar_quintic(nesterov[i]), lr, 0.3)
        np.testing.assert_allclose(momentum.double().numpy(), expected_momentum, atol=1e-6)  # measured: 1e-7
        np.testing.assert_allclose(W.double().numpy(), expected_W, atol=2e-5)  # measured: 5.8e-7


def flat_buffers(p, lr, wd):
    """Return FlatBuffers of parameters whose gradients and moments are zero."""
    zeros = [torch.zeros_like(p) for _ in range(3)]
    return t.FlatBuffers(p, *zeros, lr, wd)


def test_adam_update_is_adamw():
    """torch.optim.AdamW in float64 agrees, with two groups of other rates, and gradients clipped or not."""
    h = tiny(adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6)
    sizes = (37, 20)
    lrs = (0.03, 0.004)
    wds = (0.1, 0.0)
    p = gaussian(57)
    reference = [torch.nn.Parameter(part.double().clone()) for part in p.split(sizes)]
    groups = [dict(params=[x], lr=lr, weight_decay=wd) for x, lr, wd in zip(reference, lrs, wds)]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)

    def per_element(values):
        return torch.cat([torch.full((size,), value) for size, value in zip(sizes, values)])

    buffers = flat_buffers(p, per_element(lrs), per_element(wds))
    for step in range(1, 7):
        g = gaussian(57, seed=step)
        factor = torch.tensor([1.0, 0.2][step % 2])
        lr_mul = 1.0 - 0.1 * step
        corrections = dict(correction1=1 - 0.8**step, correction2=1 - 0.9**step)
        s = scalars(momentum=math.nan, adam_lr_mul=lr_mul, **corrections)
        t.adam_update(buffers._replace(g=g), factor, s, h)

        for x, part, group, lr in zip(reference, g.split(sizes), adamw.param_groups, lrs):
            x.grad = factor * part.double()
            group["lr"] = lr * lr_mul
        adamw.step()
        expected = torch.cat([x.detach() for x in reference])
        torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=0)  # measured: 1.8e-7


def test_adam_leaves_padding_at_zero():
    p = torch.zeros(4)
    buffers = flat_buffers(p, lr=torch.zeros(4), wd=torch.zeros(4))
    s = scalars(adam_lr_mul=1.0, correction1=0.1, correction2=0.05)
    t.adam_update(buffers, torch.tensor(1.0), s, tiny())
    assert torch.equal(p, torch.zeros(4))


class AfterAol(NamedTuple):
    """Coefficients proposed for use after AOL, and their polar error, in float64, as in docs/claims.md."""

    coefficients: list[tuple[float, float, float]]
    error: float


AFTER_AOL = {
    "turbo": AfterAol(t.TURBO, 0.089),
    "five steps without the first": AfterAol(t.polar_express(1e-3, 5, 2e-2, 2e-2)[1:], 0.131),
    "five steps without the last": AfterAol(t.polar_express(1e-3, 5, 2e-2, 2e-2)[:-1], 0.391),
    "four steps from 2e-2": AfterAol(t.polar_express(2e-2, 4, 2e-2, 2e-2), 0.102),
    "five steps from 2e-2": AfterAol(t.polar_express(2e-2, 5, 2e-2, 2e-2), 0.075),
}


@pytest.mark.parametrize("name", AFTER_AOL)
def test_how_near_lists_of_coefficients_come_to_the_polar_factor_after_aol(name):
    rng = np.random.default_rng(0)
    proposed = AFTER_AOL[name]
    errors = []
    for _ in range(2):
        G = rng.standard_normal((512, 512))
        U, _, Vh = np.linalg.svd(G)
        X = G / np.sqrt(np.abs(G @ G.T).sum(1, keepdims=True))
        for a, b, c in proposed.coefficients:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        errors.append(np.linalg.norm(X - U @ Vh) / np.sqrt(512))
    assert np.mean(errors) == pytest.approx(proposed.error, abs=0.004)  # measured: 0.0024
