"""Directions and update rules against float64 and torch.optim, matrix by matrix."""

import math

import numpy as np
import pytest
import torch

import train_gpt as t
from helpers import tiny

# Singular values of the result for Gaussian matrices, of the rows that keep singular vectors. Not turbo and mud:
# test_optimizers.py.
BANDS = {"ns5": (0.6, 1.3), "polar_express": (0.85, 1.15), "polar_express4": (0.75, 1.25)}
SHAPES = [(32, 48), (48, 32), (40, 40), (3, 24, 16), (2, 3, 16, 24), (1, 8), (8, 1), (2, 1, 1)]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", BANDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_move_towards_one_and_vectors_stay(method, shape):
    G = gaussian(*shape)
    out = t.orthogonalize(G, method)
    assert out.shape == G.shape and out.dtype == G.dtype
    low, high = BANDS[method]
    flat, got = G.reshape(-1, *shape[-2:]).double(), out.reshape(-1, *shape[-2:]).double()
    for g, u in zip(flat, got):
        U, S, Vh = torch.linalg.svd(g, full_matrices=False)
        inner = U.T @ u @ Vh.T  # in the singular basis of the input: diagonal, positive, near one
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-3
        kept = S / S.norm() > 0.01  # a tiny singular value is not reached in five steps
        values = inner.diagonal()[kept]
        assert low < values.min() and values.max() < high, values
        torch.testing.assert_close(u, U @ inner.diagonal().diag() @ Vh, atol=1e-3, rtol=0)


def test_ns5_is_the_quintic_of_the_singular_values():
    G = gaussian(24, 36, seed=3)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    S = S / S.norm()
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    torch.testing.assert_close(t.orthogonalize(G, "ns5").double(), U @ S.diag() @ Vh, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", t.ORTHO)
def test_the_scale_of_the_input_does_not_matter(method):
    G = gaussian(2, 16, 24)
    out = t.orthogonalize(G, method)
    for scale in (1e-20, 1e-12, 1e12, 1e20):
        torch.testing.assert_close(t.orthogonalize(G * scale, method), out, atol=1e-4, rtol=0)
    torch.testing.assert_close(t.orthogonalize(-G, method), -out)


@pytest.mark.parametrize("method", t.ORTHO)
def test_the_gpus_constant_scale_leaves_room(method):
    """GPU_SCALE before the cast to 16 bits: entries of 1e-20 and of 1e4 whiten alike; powers of two are exact."""
    whiten, G = t.ORTHO[method], gaussian(2, 48, 96)
    outs = [whiten((G * 2.0**k * t.GPU_SCALE).bfloat16()).float() for k in (-66, -10, 0, 14)]
    assert outs[0].norm() > 5 and torch.isfinite(outs[0]).all()
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-2, rtol=0)
    assert not whiten(torch.zeros(1, 16, 24, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("method", BANDS)
def test_zero_and_rank_one(method):
    zero = t.orthogonalize(torch.zeros(2, 16, 24), method)
    assert torch.equal(zero, torch.zeros_like(zero))
    mixed = t.orthogonalize(torch.stack([torch.zeros(16, 24), gaussian(16, 24)]), method)
    assert torch.equal(mixed[0], torch.zeros(16, 24)) and mixed[1].norm() > 1  # padding beside a live matrix
    u, v = gaussian(16, 1), gaussian(1, 24, seed=1)
    out = t.orthogonalize(u @ v, method)
    direction = (u / u.norm()) @ (v / v.norm())
    assert torch.isfinite(out).all()
    scale = (out * direction).sum().item()
    assert 0.6 < scale < 1.3 and (out - scale * direction).norm() < 0.05
    one = torch.zeros(16, 24)
    one[3, 5] = 1e-30
    assert torch.isfinite(t.orthogonalize(one, method)).all()


def test_kernel_lines_are_their_formulas():
    X, A = gaussian(2, 6, 9).double(), gaussian(2, 6, 6, seed=1).double()
    torch.testing.assert_close(t.xxt(X)[0], X @ X.mT)
    torch.testing.assert_close(t.ba_plus_caa(A, 0.0, -4.0, 2.0), -4.0 * A + 2.0 * A @ A)
    r = torch.rand(2, 6, generator=torch.Generator().manual_seed(2)).double() + 0.5
    R, eye = r.diag_embed(), torch.eye(6).double()
    torch.testing.assert_close(t.xxt(X, r)[0], R @ X @ X.mT @ R)
    torch.testing.assert_close(t.xxt(X, r, 2)[1], (R @ X @ X.mT @ R).square().sum(-1), check_dtype=False)
    torch.testing.assert_close(t.ba_plus_caa(A, 3.0, -4.0, 2.0, r), (3.0 * eye - 4.0 * A + 2.0 * A @ A) @ R)
    for Z in (X, X.mT.contiguous().mT):
        got = t.quintic(Z, ((3.0, -4.0, 2.0),), r)
        G = R @ X @ X.mT @ R
        torch.testing.assert_close(got, (3.0 * eye - 4.0 * G + 2.0 * G @ G) @ R @ X)
        assert got.stride() == Z.stride()
    Y, squares = t.lower_solve(A, X, r)
    torch.testing.assert_close((A.tril(-1) + eye) @ Y.double(), R @ X, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(squares, Y.float().square().sum(-1))


# ---------------------------------------------------------------- step rules


def muon_by_hand(W, U, lr, wd):
    rows, columns = W.shape[-2:]
    return (1 - lr * wd) * W - lr * math.sqrt(max(1.0, rows / columns)) * U


def hyperball_by_hand(W, U, lr, wd):
    norm = lambda x: np.sqrt((x**2).sum((-2, -1), keepdims=True))
    moved = W - lr * norm(W) / norm(U) * U
    return norm(W) / norm(moved) * moved


BY_HAND = {
    "muon": muon_by_hand, "normuon": muon_by_hand,  # the second moment divides before the rule
    "hyperball": hyperball_by_hand, "normuon_hyperball": hyperball_by_hand,
}  # fmt: skip


@pytest.mark.parametrize("rule", t.STEP_RULES)
@pytest.mark.parametrize("shape", [(2, 8, 32), (2, 32, 8), (3, 16, 16)], ids=str)
def test_step_rule_is_its_formula(rule, shape):
    W, U = gaussian(*shape), gaussian(*shape, seed=1)
    expected = BY_HAND[rule](W.double().numpy(), U.double().numpy(), 0.03, 0.4)
    out = W.clone()
    assert t.STEP_RULES[rule](out, U, torch.tensor(0.03), 0.4) is None  # in place
    np.testing.assert_allclose(out.double().numpy(), expected, atol=1e-6)


def scalars(clip=1.0, momentum=0.9, matrix=math.nan, adam=math.nan, c1=1.0, c2=1.0):
    """nan: what an update must not read."""
    return t.StepScalars(*(torch.tensor(x) for x in (clip, momentum, matrix, adam, c1, c2)))


def polar_quintic(G):
    """ns5 by its effect on singular values, float64."""
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    S = S / np.linalg.norm(S)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U @ np.diag(S) @ Vh


@pytest.mark.parametrize("shape", [(3, 24, 12), (3, 12, 24)], ids=str)
def test_matrix_update_over_several_steps(shape):
    h = tiny(matrix_lr=0.02, muon_wd=0.3, ortho="ns5", step_rule="muon")
    W, momentum = gaussian(*shape), torch.zeros(shape)
    w, m = W.double().numpy().copy(), np.zeros(shape)
    for step in range(5):
        g, mu, lr_mul, clip = (
            gaussian(*shape, seed=10 + step),
            0.85 + 0.02 * step,
            1 - 0.1 * step,
            [1.0, 0.3][step % 2],
        )
        before = g.clone()
        t.matrix_update(W, g, momentum, scalars(clip, mu, 0.02 * lr_mul), h)
        assert torch.equal(g, before)
        d = clip * before.double().numpy()
        m = mu * m + (1 - mu) * d
        nesterov = (1 - mu) * d + mu * m
        for i in range(len(w)):
            w[i] = muon_by_hand(w[i], polar_quintic(nesterov[i]), 0.02 * lr_mul, 0.3)
        np.testing.assert_allclose(momentum.double().numpy(), m, atol=1e-6)
        np.testing.assert_allclose(W.double().numpy(), w, atol=2e-5)


def test_adam_update_is_adamw():
    """torch.optim.AdamW in float64, two groups of other lr and wd; clipped gradients in some steps."""
    h = tiny(adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6)
    sizes, lrs, wds = (37, 20), (0.03, 0.004), (0.1, 0.0)
    p = gaussian(57)
    reference = [torch.nn.Parameter(x.double().clone()) for x in p.split(sizes)]
    groups = [dict(params=[x], lr=lr, weight_decay=wd) for x, lr, wd in zip(reference, lrs, wds)]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    per_element = lambda values: torch.cat([torch.full((n,), v) for n, v in zip(sizes, values)])
    m, v, lr, wd = torch.zeros(57), torch.zeros(57), per_element(lrs), per_element(wds)
    for step in range(1, 7):
        g, clip, lr_mul = gaussian(57, seed=step), [1.0, 0.2][step % 2], 1.0 - 0.1 * step
        t.adam_update(
            (p, g, m, v, lr, wd), scalars(clip, math.nan, adam=lr_mul, c1=1 - 0.8**step, c2=1 - 0.9**step), h
        )
        for x, part, group, rate in zip(reference, g.split(sizes), adamw.param_groups, lrs):
            x.grad, group["lr"] = clip * part.double(), rate * lr_mul
        adamw.step()
        expected = torch.cat([x.detach() for x in reference])
        torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=0)


def test_adam_leaves_padding_at_zero():
    p, g, m, v = torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(4)
    t.adam_update((p, g, m, v, torch.zeros(4), torch.zeros(4)), scalars(adam=1.0, c1=0.1, c2=0.05), tiny())
    assert torch.equal(p, torch.zeros(4))
