"""Directions and step rules: float64 references, degenerate inputs, compilation, gloo ranks."""

import hashlib
import itertools
import math
import os
import re
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as t
from tests.helpers import (
    TINY,
    english_args,
    gaussian,
    noisy_model,
    padding_of,
    shard_folder,
    temporary_folder,
    tiny,
)
from tests.rank_cases import group_of_one, run_ranks
from tests.trainer.direction_cases import DIRECTIONS, FIVE, polar_by_hand, poly

RULES = tuple(t.STEP_RULES)
PAIRS = list(itertools.product(t.ORTHO, t.STEP_RULES))

# Polar Express as the paper prints it (arXiv:2505.16932; l = 1e-3, no safety factor).
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


ONE = torch.tensor(1.0)  # the factor of gradients that are not clipped


def scalars(momentum=0.9, matrix_lr=0.025):
    """Return StepScalars for matrix_update, which does not read those of AdamW."""
    values = (momentum, matrix_lr, math.nan, 1.0, math.nan, 1.0, 1.0)
    return t.StepScalars(*(torch.tensor(x) for x in values))


def second_moment(rule, shape):
    """Return the zero state of a step rule, or None for a rule without one."""
    state_shape = t.STEP_RULES[rule].state_shape
    return torch.zeros(state_shape(*shape)) if state_shape else None


def frobenius(x):
    """Return the Frobenius norms of matrices, (..., 1, 1)."""
    return x.square().sum((-2, -1), keepdim=True).sqrt()


# ---------------------------------------------------------------- coefficients


def test_published_polar_express_lists():
    # Measured: 3.6e-15.
    np.testing.assert_allclose(t.polar_express(1e-3, 5, 2e-2, 2e-2), FIVE, rtol=0, atol=1e-13)
    # Measured: 3.6e-15.
    np.testing.assert_allclose(t.polar_express(1e-3, 4, 2e-2, 2e-2)[:3], FIVE[:3], rtol=0, atol=1e-13)
    paper = t.polar_express(1e-3, 8, 0.0, 0.02407327424182761)
    np.testing.assert_allclose(paper[:7], PAPER[:7], rtol=0, atol=1e-9)  # measured: 5.5e-11
    # The last row is printed as the limit; here u = 1 + 1e-9.
    np.testing.assert_allclose(paper[7], PAPER[7], rtol=0, atol=5e-9)  # measured: 3.9e-9
    assert t.PE5 == t.polar_express(1e-3, 5, 2e-2, 2e-2)
    assert t.polar_express(1e-3, 5, 2e-2, 2e-2) is t.polar_express(1e-3, 5, 2e-2, 2e-2)  # computed once


@pytest.mark.parametrize("low,high", [(1e-3, 1.0), (0.02, 1.0), (0.3, 1.7), (0.9, 1.1), (0.99, 1.01)])
def test_the_quintic_is_minimax(low, high):
    """Find four alternations of equal height: by de la Vallee Poussin no odd quintic is nearer to 1."""
    x = np.linspace(low, high, 200_001)
    error = poly(x, [t.minimax_quintic(low, high)]) - 1
    turns = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
    peaks = error[[0, turns[0], turns[-1], -1]]
    # Measured: 3 % of that.
    np.testing.assert_allclose(np.abs(peaks), np.abs(error).max(), rtol=1e-8, atol=1e-11)
    assert np.sign(peaks).tolist() == [-1, 1, -1, 1]


def image(rows, low):
    """Return the least and the largest value that rows of coefficients make of [low, 1]."""
    y = poly(np.geomspace(low, 1, 100_001), rows)
    return y.min(), y.max()


def test_a_narrow_interval_is_newton_schulz():
    a, b, c = t.minimax_quintic(2.0 - 1e-6, 2.0)
    assert (a, b, c) == (15 / 16, -10 / 64, 3 / 256)
    near = t.minimax_quintic(2.0 * (1 - 1e-3), 2.0)  # the limit is continuous
    np.testing.assert_allclose(near, (a, b, c), rtol=5e-3)  # measured: 0.0025


def test_images_of_the_designed_intervals():
    """Compare with known bands: each list reaches its own, and PE4 starts from 3e-3 for that reason."""
    assert image(t.PE5, 1e-3) == pytest.approx((0.859, 1.141), abs=1e-3)  # measured: 1.3e-4
    assert image(t.PE4, 3e-3) == pytest.approx((0.776, 1.224), abs=1e-3)  # measured: 2.3e-4
    # Measured: 4.7e-4.
    assert image(t.polar_express(1e-3, 4, 0.02, 0.02), 1e-3) == pytest.approx((0.424, 1.576), abs=1e-3)
    # Measured: 2.1e-4.
    assert image(t.polar_express(1e-2, 4, 0.02, 0.02), 1e-2) == pytest.approx((0.983, 1.017), abs=1e-3)
    slopes = [math.prod(a for a, _, _ in rows) for rows in (t.PE5, t.PE4, t.TURBO)]
    assert slopes == pytest.approx([989, 283, 147], rel=5e-3)  # measured: 0.0011


# ---------------------------------------------------------------- directions against float64


def test_every_direction_is_described_once():
    assert list(DIRECTIONS) == list(t.ORTHO), "give each row of ORTHO one in DIRECTIONS of direction_cases.py"


@pytest.mark.parametrize("method", t.ORTHO)
@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (2, 32, 32), (2, 1, 7), (2, 7, 1)], ids=str)
def test_a_direction_is_its_formula(method, shape):
    G = gaussian(*shape, seed=4) * torch.logspace(0, -2, shape[-2])[:, None]  # rows of unequal size
    out = t.orthogonalize(G, method).double().numpy()
    for g, u in zip(G.double().numpy(), out):
        np.testing.assert_allclose(u, DIRECTIONS[method].formula(g), atol=5e-5)  # measured: 1.5e-5


SHAPES = dict(wide=(64, 192), square=(128, 128))


@pytest.mark.parametrize("method", t.ORTHO)
@pytest.mark.parametrize("name", SHAPES)
def test_singular_value_bands_on_gaussians(method, name):
    for seed in range(3):
        S = torch.linalg.svdvals(t.orthogonalize(gaussian(*SHAPES[name], seed=seed), method).double())
        low, high = getattr(DIRECTIONS[method], name)
        assert low < S.quantile(0.1) and S.max() < high, (S.quantile(0.1), S.max())


# Relative distance to the polar factor, Gaussian 512 x 512 and 512 x 1536: an independent implementation's.
DISTANCE = {"ns5": (0.191, 0.155), "turbo": (0.094, 0.035), "mud": (0.598, 0.301), "mud2": (0.619, 0.307)}


@pytest.mark.parametrize("columns", [512, 1536])
def test_distance_to_the_polar_factor(columns):
    G = gaussian(512, columns)
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    error = {}
    for method in t.ORTHO:
        distance = t.orthogonalize(G, method).double() - U @ Vh
        error[method] = (distance.norm() / math.sqrt(512)).item()
    for method, (square, wide) in DISTANCE.items():
        # Measured: 0.0013.
        assert error[method] == pytest.approx(wide if columns > 512 else square, abs=0.004), method
    ranking = ["turbo", "polar_express", "polar_express4", "ns5", "mud"]
    distances = [error[method] for method in ranking]
    assert columns > 512 or all(a < b for a, b in zip(distances, distances[1:]))


DEGENERATE = {
    "zero": lambda: torch.zeros(3, 12, 20),
    "padding beside a live matrix": lambda: torch.stack([torch.zeros(12, 20), gaussian(12, 20)]),
    "zero rows": lambda: gaussian(2, 12, 20) * (torch.arange(12) % 3 > 0).float()[:, None],
    "zero columns": lambda: gaussian(2, 12, 20) * (torch.arange(20) % 3 > 0).float(),
    "rank one": lambda: gaussian(2, 12, 1) @ gaussian(2, 1, 20, seed=1),
    "equal rows": lambda: gaussian(1, 20).expand(12, 20).contiguous(),
    "one entry": lambda: torch.zeros(12, 20).index_put(
        (torch.tensor(3), torch.tensor(5)), torch.tensor(1e-30)
    ),
    "1e-20": lambda: 1e-20 * gaussian(2, 12, 20),
    "1e20": lambda: 1e20 * gaussian(2, 12, 20),
    "one tiny row": lambda: gaussian(12, 20) * torch.tensor([1.0] * 11 + [1e-20])[:, None],
    "one row": lambda: gaussian(2, 1, 20),
}


@pytest.mark.parametrize("case", DEGENERATE, ids=lambda x: x.replace(" ", "_"))
@pytest.mark.parametrize("method", t.ORTHO)
def test_degenerate_inputs_give_finite_directions(method, case):
    G = DEGENERATE[case]()
    for x in (G, G.mT):
        out = t.orthogonalize(x, method)
        assert out.shape == x.shape
        assert torch.isfinite(out).all()
        assert out.abs().max() < 10
        assert torch.isfinite(t.orthogonalize(t.equalize_rows(x), method)).all()

    out = t.orthogonalize(G, method)
    dead = G.reshape(-1, *G.shape[-2:]).abs().amax((-2, -1)) == 0
    assert out.reshape(-1, *G.shape[-2:])[dead].abs().sum() == 0  # zero stays zero
    if case.startswith("1e"):
        expected = t.orthogonalize(gaussian(2, 12, 20), method)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)  # measured: 1.6e-6
    if case == "zero rows":
        assert out[:, ::3].abs().max() < 1e-6  # measured: 0


@pytest.mark.parametrize("method", t.ORTHO)
def test_a_batch_is_its_matrices_and_a_transpose_its_transpose(method):
    G = gaussian(3, 20, 12) * torch.tensor([1.0, 1e4, 1e-6])[:, None, None]
    out = t.orthogonalize(G, method)
    for i in range(3):
        torch.testing.assert_close(out[i], t.orthogonalize(G[i], method), atol=1e-6, rtol=0)  # measured: 0
    four = t.orthogonalize(G.reshape(3, 1, 20, 12), method)
    torch.testing.assert_close(four[:, 0], out, atol=1e-6, rtol=0)  # measured: 0
    torch.testing.assert_close(t.orthogonalize(G.mT, method), out.mT, atol=1e-6, rtol=0)  # measured: 0
    torch.testing.assert_close(t.orthogonalize(-G, method), -out)
    assert t.orthogonalize(G.double(), method).dtype == torch.float64


@pytest.mark.parametrize("method", t.ORTHO)
def test_bf16_moves_a_direction_little(method):
    """Compute in bf16, as a GPU does, on well-conditioned matrices; degenerate ones stay finite."""
    ortho = t.ORTHO[method]
    X = gaussian(2, 48, 96)
    X = X / X.norm(dim=(-2, -1), keepdim=True)
    exact = ortho(X)
    got = ortho(X.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() < 0.03 * exact.norm()  # measured: 0.027
    for degenerate in DEGENERATE.values():
        G = degenerate()
        G = G.reshape(-1, *G.shape[-2:])
        G = G / G.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30)
        G = G / G.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
        assert torch.isfinite(ortho(G.bfloat16())).all()


# ---------------------------------------------------------------- rules against float64


def step_by_hand(W, U, lr, h):
    """Return one matrix in float64 after its decay, cautious or not, and its step; or on its sphere."""
    if "hyperball" in h.step_rule:
        R = np.linalg.norm(W)
        moved = W - lr * R * U / np.linalg.norm(U)
        return moved * R / np.linalg.norm(moved)
    mask = (U * W >= 0) if h.cautious_wd else 1.0
    return W - lr * h.muon_wd * mask * W - lr * math.sqrt(max(1.0, W.shape[0] / W.shape[1])) * U


@pytest.mark.parametrize("rule", t.STEP_RULES)
@pytest.mark.parametrize("shape", [(3, 24, 12), (3, 12, 24), (2, 16, 16)], ids=str)
@pytest.mark.parametrize("flags", [{}, dict(cautious_wd=True), dict(equalize_rows=True)], ids=str)
def test_matrix_update_is_a_float64_loop(rule, shape, flags):
    """Take five steps: momentum, rows of unit norm, polar factor, second moment of each neuron, rule."""
    h = tiny(matrix_lr=0.02, muon_wd=0.3, ortho="polar_express", step_rule=rule, normuon_beta2=0.8, **flags)
    W = gaussian(*shape)
    momentum = torch.zeros(shape)
    second = second_moment(rule, shape)
    w = W.double().numpy().copy()
    m = np.zeros(shape)
    v = np.zeros((shape[0], max(shape[1:])))
    by_row = shape[1] >= shape[2]  # neurons are rows; the short side is averaged away
    for step in range(5):
        gradient = gaussian(*shape, seed=10 + step)
        mu = 0.85 + 0.02 * step
        lr = 0.02 * (1 - 0.1 * step)
        matrices = t.OwnedMatrices(W, gradient, momentum, second)
        t.matrix_update(matrices, torch.tensor(0.5), scalars(mu, lr), h)

        clipped = 0.5 * gradient.double().numpy()
        m = mu * m + (1 - mu) * clipped
        for i in range(len(w)):
            nesterov = (1 - mu) * clipped[i] + mu * m[i]
            if h.equalize_rows:
                nesterov /= np.linalg.norm(nesterov, axis=1, keepdims=True)
            direction = polar_by_hand(nesterov, FIVE)
            if second is not None:
                v[i] = 0.8 * v[i] + 0.2 * (direction**2).mean(1 if by_row else 0)
                even = direction / np.sqrt(v[i][:, None] if by_row else v[i][None])
                direction = even * np.linalg.norm(direction) / np.linalg.norm(even)
            w[i] = step_by_hand(w[i], direction, lr, h)
        np.testing.assert_allclose(W.double().numpy(), w, atol=3e-5)  # measured: 1.9e-6
    if second is not None:
        # Measured: 8 % of that.
        np.testing.assert_allclose(second.flatten(1).double().numpy(), v, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_equalized_rows_have_unit_norm_and_their_direction(scale):
    U = gaussian(2, 6, 9) * torch.logspace(0, -4, 6)[:, None]
    U[1, 3] = 0
    out = t.equalize_rows(U * scale).double().numpy()
    u = U.double().numpy()
    norms = np.linalg.norm(u, axis=-1, keepdims=True)
    np.testing.assert_allclose(out, u / np.where(norms > 0, norms, 1), atol=1e-6)  # measured: 5.8e-8
    # Measured: 1.8e-8.
    assert np.linalg.norm(out[1, 3]) == 0 and np.linalg.norm(out[0, 3]) == pytest.approx(1, abs=1e-6)


def test_normuon_evens_out_neurons_and_keeps_the_norm():
    for shape in ((3, 40, 10), (3, 10, 40)):
        tall = shape[1] == 40
        U = gaussian(*shape) * torch.logspace(0, -1.5, 40).view(-1, 1 if tall else 40)
        v = torch.zeros(t.neuron_shape(*shape))
        out = t.normalize_neurons(U, v, 0.95)
        neurons = out.norm(dim=-1 if tall else -2)
        torch.testing.assert_close(neurons, neurons[:, :1].expand_as(neurons))  # the first step: all alike
        torch.testing.assert_close(frobenius(out), frobenius(U))
    v = torch.zeros(t.neuron_shape(2, 6, 4))
    assert torch.equal(t.normalize_neurons(torch.zeros(2, 6, 4), v, 0.95), torch.zeros(2, 6, 4))  # padding


@pytest.mark.parametrize("rule", [r for r in RULES if "hyperball" in r])
@pytest.mark.parametrize("method", t.ORTHO)
def test_hyperball_keeps_every_norm(rule, method):
    h = tiny(matrix_lr=0.05, ortho=method, step_rule=rule)
    W = gaussian(3, 24, 16) * torch.tensor([1.0, 1e-4, 0.0])[:, None, None]
    start = W.clone()
    norms = frobenius(W)
    momentum = torch.zeros_like(W)
    second = second_moment(rule, W.shape)
    for step in range(60):
        matrices = t.OwnedMatrices(W, gaussian(3, 24, 16, seed=step), momentum, second)
        t.matrix_update(matrices, ONE, scalars(matrix_lr=0.05), h)
        torch.testing.assert_close(frobenius(W), norms, rtol=1e-5, atol=0)  # measured: 1.7e-6
        if step == 0:  # tan(angle) is at most the rate
            cosine = (W[:2] * start[:2]).sum((-2, -1)) / norms[:2].flatten() ** 2
            assert (cosine >= math.cos(math.atan(0.0501))).all() and (cosine < 0.9999).all()


# ---------------------------------------------------------------- initialisation


def test_the_default_start_has_zero_outputs():
    h = tiny()
    model = t.GPT(h)
    assert model.mlp_down_bank.abs().max() == 0
    assert model.qo_bank[h.num_layers :].abs().max() == 0


@pytest.mark.parametrize("rule", t.STEP_RULES)
def test_a_rule_that_keeps_norms_starts_from_no_zero_matrix(rule):
    h = tiny(step_rule=rule)
    model = t.GPT(h)
    matrices = [m for s in t.MATRICES for m in getattr(model, s.name)]
    assert all(m.norm() > 0 for m in matrices) == ("hyperball" in rule)
    if "hyperball" in rule:
        # Measured: 0.0057.
        assert model.mlp_down_bank.std().item() == pytest.approx(0.8 / math.sqrt(h.model_dim), rel=0.05)
    given = t.GPT(tiny(step_rule=rule, proj_init_std=0.03))
    assert given.mlp_down_bank.std().item() == pytest.approx(0.03, rel=0.05)  # measured: 0.0057
    assert given.qo_bank[h.num_layers :].std().item() == pytest.approx(0.03, rel=0.05)  # measured: 0.0077
    eye = torch.eye(h.model_dim).expand(h.num_layers, -1, -1)
    # Q as before; measured: 4.2e-7.
    torch.testing.assert_close(t.xxt(given.qo_bank[: h.num_layers])[0], eye, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- compilation


@pytest.mark.parametrize("method,rule", PAIRS)
def test_matrix_update_compiles_into_one_graph(method, rule):
    """Compile with fullgraph and static shapes; a schedule's new values are not a new graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(t.matrix_update, backend=counter, fullgraph=True, dynamic=False)
    h = tiny(ortho=method, step_rule=rule, cautious_wd=rule != "hyperball", equalize_rows=rule == "normuon")
    ends = []
    with torch.no_grad():
        for update in (t.matrix_update, compiled):
            W = gaussian(3, 12, 20)
            momentum = torch.zeros(3, 12, 20)
            second = second_moment(rule, W.shape)
            for step in range(3):
                gradient = gaussian(3, 12, 20, seed=step)
                numbers = scalars(0.8 + 0.05 * step, 0.025 * (1 - 0.2 * step))
                matrices = t.OwnedMatrices(W, gradient, momentum, second)
                update(matrices, torch.tensor(1 - 0.1 * step), numbers, h)
            ends.append([W, momentum] if second is None else [W, momentum, second])
    assert counter.frame_count == 1
    for eager, graph in zip(*ends):
        torch.testing.assert_close(graph, eager, atol=1e-6, rtol=0)  # measured: 0
    torch._dynamo.reset()


class TrainedPair(NamedTuple):
    """A model after some steps with a direction and a step rule, and what trained it."""

    params: dict[str, torch.Tensor]
    optimizer: t.Optimizer
    model: t.GPT
    loader: t.TokenLoader


# ---------------------------------------------------------------- the whole optimizer


def trained(m, steps, pair, **knobs):
    """Train a noisy model (all its gradients are alive) for `steps` steps. Returns a TrainedPair."""
    method, rule = pair
    h = tiny(ortho=method, step_rule=rule, grad_clip=0.3, **knobs)
    model = noisy_model(h, seed=3)
    optimizer = t.Optimizer(model, h, m)
    loader = t.TokenLoader(h, m)
    backward, _ = t.capture_pass(model.loss, optimizer)
    for step in range(steps):
        t.train_step(backward, optimizer, loader.next(), t.hyper_at(h, step, 0.0))
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    return TrainedPair(params, optimizer, model, loader)


STEPS = 2  # the second one meets the momentum and the rule's state that the first one left


class PairResult(NamedTuple):
    """What a rank has after STEPS steps with a pair of direction and rule."""

    params: dict[str, torch.Tensor]
    padding: float  # the sum of its magnitudes
    shapes: dict[str, tuple[int, ...]]  # of the second moments
    owned: list[str]  # parameters that the rank owns part of
    again: bool  # whether a restored step gives the same bits


def every_pair(rank, folder, knobs):
    """Train STEPS steps with every pair of direction and rule on this rank. Returns {pair: PairResult}."""
    knobs = knobs | {"data_path": folder, "micro_batch_tokens": TINY["train_batch_tokens"]}  # a pass a step
    m = t.init_machine(tiny(**knobs), os.environ)
    results = {}
    for pair in PAIRS:
        params, optimizer, model, loader = trained(m, STEPS, pair, **knobs)
        padding = sum(padding_of(optimizer, model, name).abs().sum().item() for name in optimizer.bank)
        saved = optimizer.snapshot()
        ends = []
        for _ in range(2):
            loader.seek(STEPS * loader.shape.accum)
            backward, _ = t.capture_pass(model.loss, optimizer)
            t.train_step(backward, optimizer, loader.next(), t.hyper_at(optimizer.h, STEPS, 0.0))
            ends.append([x.clone() for x in optimizer.state()])
            optimizer.restore(saved)
        again = all(torch.equal(a, b) for a, b in zip(*ends))
        in_state = all(any(x is y for y in optimizer.state()) for x in optimizer.rule_state.values())
        results[pair] = PairResult(
            params=params,
            padding=padding,
            shapes={name: tuple(x.shape) for name, x in optimizer.rule_state.items()},
            owned=[name for name, x in optimizer.momentum.items() if len(x)],
            again=again and in_state,
        )
    return results


CASES = {"three layers": dict(num_layers=3), "one layer": dict(num_layers=1, xsa_last_n=1, ve_last_n=1)}


@cache
def data_folder():
    """Make a folder with two shards of random documents, once."""
    folder = temporary_folder() / "data"
    shard_folder(folder, tiny(), [60, 40], seed=5)
    return str(folder)


# Of a parameter's norm; here the bits are the same, elsewhere batches of another size may round otherwise.
ALONE = 1e-5


def made_up_gradient(W, step, i):
    """Return the gradient of parameter number `i` in a step, rows of unequal size."""
    return gaussian(*W.shape, seed=10 * step + i) * torch.logspace(0, -2, W.size(-2))[:, None]


def updated_alone(h, weights):
    """Return {name: matrix} after STEPS matrix_updates of each by itself, with made-up gradients."""
    updated = {}
    for i, (name, start) in enumerate(weights.items()):
        W = start.clone()
        momentum = torch.zeros_like(W)
        second = second_moment(h.step_rule, W.shape)
        for step in range(STEPS):
            gradient = made_up_gradient(W, step, i)
            matrices = t.OwnedMatrices(W, gradient, momentum, second)
            t.matrix_update(matrices, ONE, scalars(0.9, 0.5 * h.matrix_lr), h)
        updated[name] = W
    return updated


class Together(NamedTuple):
    """A rank's parameters after the optimizer's steps."""

    sha256: str
    distance: float | None  # the largest to updated_alone, of a parameter's norm; only rank 0 measures it


def updated_together(h, m):
    """Let the optimizer make the steps of updated_alone.

    Momentum and second moments carry over, so that a matrix that was given another's state, scale or
    orientation ends elsewhere.
    """
    model = noisy_model(h, seed=3)
    start = {spec.name: getattr(model, spec.name).detach().clone() for spec in t.MATRICES}
    optimizer = t.Optimizer(model, h, m)
    for step in range(STEPS):
        for i, (name, W) in enumerate(start.items()):
            getattr(model, name).grad.copy_(made_up_gradient(W, step, i))
        optimizer.step(t.Hyper(0.0, 0.9, 0.5, 0.5))

    found = {name: getattr(model, name).detach() for name in start}
    digest = hashlib.sha256(b"".join(W.contiguous().numpy().tobytes() for W in found.values())).hexdigest()
    if m.rank != 0:
        return Together(digest, None)
    distances = [(found[name] - W).norm() / W.norm() for name, W in updated_alone(h, start).items()]
    return Together(digest, torch.stack(distances).max().item())


def every_case_together(rank, cases):
    """Return updated_together for every case and pair, by (case, direction, rule)."""
    m = t.init_machine(tiny(), os.environ)
    results = {}
    for case, (method, rule) in itertools.product(cases, PAIRS):
        h = tiny(ortho=method, step_rule=rule, grad_clip=0.0, num_layers=3, **case)
        results[(str(case), method, rule)] = updated_together(h, m)
    return results


# MLP-up and -down are tall and wide; both square (rows still differ from columns); wide and tall.
ORIENTED = [dict(), dict(mlp_mult=1.0, cautious_wd=True), dict(mlp_mult=0.5, equalize_rows=True)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_shared_bank_updates_each_parameter_as_if_alone(world):
    """Cover every orientation of MLP-up and -down, which share a buffer."""
    first, *others = run_ranks(every_case_together, world, ORIENTED, timeout=180)
    assert len(first) == len(ORIENTED) * len(PAIRS)
    for case, found in first.items():
        assert found.distance <= ALONE, (case, found.distance)
        assert all(other[case].sha256 == found.sha256 for other in others), case


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def worlds(request):
    """Return the results of every_pair by world size and rank.

    With one layer on four ranks, two ranks own nothing but padding.
    """
    sizes = (1, 2, 4) if request.param == "three layers" else (1, 4)
    knobs = CASES[request.param]
    return {world: run_ranks(every_pair, world, data_folder(), knobs, timeout=180) for world in sizes}


CLOSE = 3e-5  # of a parameter's norm, as in test_schedule.py; measured after two steps: at most 5e-6


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_on_ranks(worlds, pair):
    alone = worlds[1][0][pair].params
    assert all(torch.isfinite(p).all() for p in alone.values())
    for world, ranks in worlds.items():
        first = ranks[0][pair].params
        for rank in ranks:
            own = rank[pair]
            assert all(torch.equal(p, own.params[name]) for name, p in first.items()), world
            assert own.padding == 0.0 and own.again
            has_state = t.STEP_RULES[pair[1]].state_shape is not None
            assert set(own.shapes) == (set(own.owned) if has_state else set())
        for name, p in first.items():
            assert (p - alone[name]).norm() <= CLOSE * alone[name].norm(), (world, name)


def test_state_is_sharded(worlds):
    """Keep every matrix's second moments on one rank, in the matrix's own orientation; shares are even."""
    neurons = dict(qo_bank=(32, 1), kv_bank=(1, 32), mlp_up_bank=(64, 1), mlp_down_bank=(1, 64))
    for world, ranks in worlds.items():
        params = ranks[0]["ns5", "normuon"].params
        shapes = [rank["ns5", "normuon"].shapes for rank in ranks]
        for name, shape_of_one in neurons.items():
            kept = [shape[name] for shape in shapes if name in shape]
            assert sum(count for count, *_ in kept) == params[name].size(0)
            assert all(tuple(rest) == shape_of_one for _, *rest in kept)
        for bank in (["qo_bank"], ["kv_bank"], ["mlp_up_bank", "mlp_down_bank"]):
            count = sum(params[name].size(0) for name in bank)
            held = [sum(shape[name][0] for name in bank if name in shape) for shape in shapes]
            assert max(held) == -(-count // world)


def test_every_pair_trains_other_parameters(worlds):
    banks = {}
    for pair, result in worlds[1][0].items():
        banks[pair] = torch.cat([result.params[spec.name].flatten() for spec in t.MATRICES])
    for a, b in itertools.combinations(PAIRS, 2):
        assert (banks[a] - banks[b]).norm() > 1e-3 * banks[a].norm(), (a, b)


def trained_qo_bank(m, steps, rule, **knobs):
    """Train with ns5 and a step rule. Returns the bank of Q and O."""
    return trained(m, steps, ("ns5", rule), data_path=data_folder(), **knobs).params["qo_bank"]


@pytest.mark.parametrize(
    "rule,knob",
    [
        ("muon", dict(cautious_wd=True)),
        ("muon", dict(equalize_rows=True)),
        ("hyperball", dict(equalize_rows=True)),
        ("normuon", dict(cautious_wd=True)),
        ("normuon", dict(normuon_beta2=0.5)),
        ("normuon_hyperball", dict(normuon_beta2=0.5)),
        ("muon", dict(proj_init_std=0.1)),
        ("hyperball", dict(proj_init_std=0.1)),
    ],
    ids=str,
)
def test_each_knob_changes_what_is_trained(rule, knob):
    with group_of_one() as m:
        default = trained_qo_bank(m, 4, rule)
        other = trained_qo_bank(m, 4, rule, **knob)
    # Weight decay of 4 steps is 4e-3 of a weight; cautious decay leaves out half of it.
    assert (default - other).norm() > 1e-4 * default.norm()


def test_knobs_that_a_rule_does_not_read_change_nothing():
    with group_of_one() as m:
        muon = trained_qo_bank(m, 3, "muon")
        hyperball = trained_qo_bank(m, 3, "hyperball")
        assert torch.equal(muon, trained_qo_bank(m, 3, "muon", normuon_beta2=0.5))
        without_decay = trained_qo_bank(m, 3, "hyperball", muon_wd=0.5, cautious_wd=True)
        assert torch.equal(hyperball, without_decay)


@pytest.mark.parametrize(
    "pair",
    [
        ("polar_express", "normuon"),
        ("turbo", "hyperball"),
        ("mud2", "muon"),
        ("polar_express4", "normuon_hyperball"),
    ],
    ids="-".join,
)
def test_a_whole_run_learns(pair, tmp_path, capsys):
    method, rule = pair
    argv = english_args(iterations=40, out_dir=tmp_path, ortho=method, step_rule=rule, cautious_wd=True)
    assert t.main(argv) == 0
    losses = re.findall(r"^step:.* train_loss:(\S+)", (tmp_path / "run.txt").read_text(), re.MULTILINE)
    losses = [float(loss) for loss in losses]
    assert np.mean(losses[-5:]) < losses[0] - 0.7
