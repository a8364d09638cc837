"""Triton kernels against float64 and their torch lines: in Triton's CPU interpreter here, on the device with one."""

import re

import pytest
import torch

import train_gpt as t
from helpers import noisy_model

triton = pytest.importorskip("triton", reason="no Triton for this platform")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
in_float32 = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="the interpreter's; 16-bit tests follow for the GPU"
)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def heads_inputs(B, T, H, kv, Dh, dims, dtype=torch.float32):
    """qkv, a slice of a wider product; gain; rotary tables; and the gradients of q, k and v, each laid out in its own
    way: transposed, a slice, and with strided dimensions."""
    generator = torch.Generator().manual_seed(B * T + H)
    make = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)
    qkv = make(B, T, (H + 2 * kv) * Dh + 32)[..., 16:-16].unflatten(-1, (-1, Dh))
    dys = (
        make(B, H, T, Dh).transpose(1, 2),
        make(B, T, kv + 2, 3 * Dh)[:, :, 1:-1, Dh : 2 * Dh],
        make(B, T, kv, 2 * Dh)[..., ::2],
    )
    gain = (torch.rand(H, generator=generator) + 0.5).to(DEVICE)
    return qkv, gain, t.rope_tables(T, dims, 1e4, DEVICE), dys


def heads_results(fn, qkv, gain, rope, dys, dtype):
    """q, k, v, the gradients of the three parts of qkv, and that of gain, in `dtype`, as float64."""
    leaf = qkv.detach().to(dtype).requires_grad_()
    g = gain.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    heads = fn(leaf, g, *(r.to(g.dtype) for r in rope))
    torch.autograd.backward(heads, [dy.to(dtype) for dy in dys])
    parts = leaf.grad.split([dy.size(2) for dy in dys], 2)
    return [x.detach().double() for x in (*heads, *parts, g.grad)]


HEADS = [(2, 64, 2, 1, 64, 16), (3, 37, 3, 3, 64, 16), (1, 5, 1, 1, 32, 32), (2, 33, 4, 2, 16, 2), (2, 41, 6, 3, 128, 16),
         (1, 70, 8, 4, 32, 8), (3, 11, 5, 1, 16, 16)]  # B, T, H, Hkv, Dh, rotated; no tile divides most of them  # fmt: skip


@pytest.mark.parametrize("size", HEADS, ids=str)
def test_fused_heads_and_their_gradients_match_float64(size):
    """Strided input and gradients, sizes that no tile divides, each part of qkv's gradient by itself."""
    inputs = heads_inputs(*size)
    exact, line, fused = (
        heads_results(fn, *inputs, dtype)
        for fn, dtype in (
            (t.qk_heads, torch.float64),
            (t.qk_heads, torch.float32),
            (t.FusedHeads.apply, torch.float32),
        )
    )
    for got, reference, plain in zip(fused, exact, line):
        assert relative(got, reference) < max(2 * relative(plain, reference), 5e-7)
    assert torch.equal(fused[2], line[2]) and torch.equal(
        fused[5], inputs[-1][2].double()
    )  # v is not touched


def test_the_gradient_of_the_heads_is_one_tensor():
    """Whatever its layout, qkv gets a contiguous gradient of its shape, which the product's backward takes as it is; and a
    gradient where only some outputs are used."""
    qkv, gain, rope, dys = heads_inputs(2, 33, 4, 2, 16, 8)
    dqkv, dgain = t.qk_backward_op(qkv, gain, *rope, *dys)
    assert (
        not qkv.is_contiguous()
        and dqkv.is_contiguous()
        and dqkv.shape == qkv.shape
        and dgain.shape == gain.shape
    )
    for used in range(3):
        whole, line = (torch.zeros_like(qkv).copy_(qkv).requires_grad_() for _ in range(2))
        (t.FusedHeads.apply(whole, gain, *rope)[used] * dys[used]).sum().backward()
        (t.qk_heads(line, gain, *rope)[used] * dys[used]).sum().backward()
        torch.testing.assert_close(whole.grad, line.grad, atol=1e-6, rtol=1e-5)


def test_the_fake_heads_are_the_operators():
    checks = ("test_schema", "test_faketensor")
    qkv, gain, rope, dys = heads_inputs(1, 9, 2, 1, 16, 8)
    torch.library.opcheck(t.qk_op, (qkv[:, :, :2], gain, *rope), test_utils=checks)
    torch.library.opcheck(t.qk_backward_op, (qkv, gain, *rope, *dys), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size", [(4, 256, 8, 4, 64, 16), (3, 200, 4, 2, 128, 16), (2, 77, 4, 4, 32, 16)], ids=str
)
def test_fused_heads_in_bf16_are_no_worse_than_the_torch_line(size):
    inputs = heads_inputs(*size, dtype=torch.bfloat16)
    exact, line, fused = (
        heads_results(fn, *inputs, dtype)
        for fn, dtype in (
            (t.qk_heads, torch.float64),
            (t.qk_heads, torch.bfloat16),
            (t.FusedHeads.apply, torch.bfloat16),
        )
    )
    for got, reference, plain in zip(fused, exact, line):
        assert relative(got, reference) <= relative(plain, reference) * 1.01


# ---------------------------------------------------------------- the MLP


def mlp_inputs(B, T, D, hidden, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return make(B, T, D), make(hidden, D) / D**0.5, make(D, hidden) / hidden**0.5


def mlp_results(fn, inputs, dtype):
    """Output and gradients in `dtype`, as float64; the gradient arrives transposed."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = fn(*leaves)
    dy = torch.randn(y.transpose(0, 1).shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    y.backward(dy.transpose(0, 1))
    return [v.detach().double() for v in (y, *(x.grad for x in leaves))]


MLP_SIZES = [(2, 150, 64, 192), (1, 7, 32, 264), (3, 130, 72, 520)]  # no tile divides them


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize(
    "size", MLP_SIZES + [pytest.param((4, 2048, 512, 1536), marks=pytest.mark.gpu)], ids=str
)
def test_fused_mlp_and_its_gradients(size, dtype):
    """Against float64, no worse than the torch line. In float32 the bit that says u < 0 costs one bit of h."""
    if DEVICE.type == "cuda" and dtype == torch.float32:
        pytest.skip("the interpreter's; a float32 product is TF32 on the device")
    inputs = mlp_inputs(*size, dtype)
    exact, line, fused = (
        mlp_results(fn, inputs, kind)
        for fn, kind in ((t.mlp, torch.float64), (t.mlp, dtype), (t.FusedMLP.apply, dtype))
    )
    for got, reference, plain in zip(fused, exact, line):
        assert relative(got, reference) < max(1.05 * relative(plain, reference), 6e-7)


@in_float32
def test_the_hidden_layer_carries_the_sign():
    """h is LeakyReLU(u)^2 to rounding, its last bit is u < 0, zero stays zero; and both are its derivative."""
    x, up, _ = mlp_inputs(1, 40, 32, 96, torch.float32)
    x[0, 3] = 0
    h, u = t.mlp_op(x[0], up, None), x[0].double() @ up.double().T
    bits = h.view(torch.int32)
    clear = u.abs() > 1e-5
    assert torch.equal((bits & 1).bool()[clear], (u < 0)[clear]) and (~clear).sum() == 96
    torch.testing.assert_close(h.double(), torch.where(u > 0, u, 0.5 * u).square(), rtol=2e-6, atol=2e-6)
    assert not bits[3].any()
    du = t.mlp_op(torch.ones(40, 8, device=DEVICE), torch.full((8, 96), 0.125, device=DEVICE), h)
    torch.testing.assert_close(
        du.double()[clear], torch.where(u > 0, 2 * u, 0.5 * u)[clear], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("ops,knobs", [
    (dict(qk=t.FusedHeads.apply), "num_layers=3 xsa_last_n=1 ve_last_n=2"),     # values: plain | embedding | both
    (dict(qk=t.FusedHeads.apply), "num_layers=3 xsa_last_n=2 ve_last_n=1"),     # plain | XSA | both
    (dict(mlp=t.FusedMLP.apply), "num_layers=2")], ids=["embedding", "xsa", "mlp"])  # fmt: skip
def test_a_kernel_in_a_compiled_model_trains_like_the_torch_line(ops, knobs):
    """One graph with the operator inside (no graph break), same loss, same gradients; where the kernel's own
    float32 product is TF32, in bf16 and as near to float64 as the torch line."""
    h = t.load_config(["preset=cpu", *knobs.split(), "model_dim=64", "num_heads=2"], {})
    exact = noisy_model(h, scale=0.05, dtype=torch.float64).to(DEVICE)
    x, y = torch.randint(0, h.vocab_size, (2, 2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dtype = torch.bfloat16 if "mlp" in ops and DEVICE.type == "cuda" else torch.float32
    models = [exact, t.GPT(h, t.Ops(**ops), dtype).to(DEVICE), t.GPT(h, dtype=dtype).to(DEVICE)]
    compiled = torch.compile(models[1].loss, dynamic=False, fullgraph=True, backend="aot_eager")
    losses = []
    for model, loss in zip(models, (exact.loss, compiled, models[2].loss)):
        with torch.no_grad():
            for p, q in zip(model.parameters(), exact.parameters()):
                p.copy_(q)
        losses.append(loss(x, y))
        losses[-1].backward()
    if dtype == torch.float32:
        assert abs(losses[1].item() - losses[2].item()) < 1e-5
    else:
        assert abs(losses[1].item() - losses[0].item()) < abs(losses[2].item() - losses[0].item()) + 1e-3
    for p, q, r in zip(*(m.parameters() for m in models)):
        if dtype == torch.float32:
            assert relative(q.grad, r.grad) < 1e-4
        else:
            assert relative(q.grad.double(), p.grad) < 1.25 * relative(r.grad.double(), p.grad) + 1e-3


def test_the_fake_mlp_is_the_operator():
    checks = ("test_schema", "test_faketensor")
    inputs = mlp_inputs(1, 16, 32, 64, torch.float32)
    hidden = t.mlp_op(inputs[0][0], inputs[1], None)
    torch.library.opcheck(t.mlp_op, (inputs[0][0], inputs[1], None), test_utils=checks)
    torch.library.opcheck(t.mlp_op, (inputs[0][0], inputs[2], hidden), test_utils=checks)


def test_binding_takes_a_kernel_only_when_it_is_right(monkeypatch):
    """The interpreter's bf16 products are wrong, and the MLP is refused there; the binding says by how much."""
    h = t.load_config(["model_dim=64", "num_heads=2", "num_kv_heads=1"], {})
    ops, names = t.bind_ops(h, DEVICE)
    assert ops.qk == t.FusedHeads.apply and names["qk"] == "triton"
    assert (ops.mlp is t.mlp) == names["mlp"].startswith("torch (") == (DEVICE.type == "cpu")
    inputs = [x.requires_grad_() for x in mlp_inputs(2, 8, 32, 64, torch.float32)]
    assert t.bind(t.FusedMLP.apply, t.mlp, inputs) == t.Bound(t.FusedMLP.apply, "triton")

    class Skewed(t.FusedMLP):
        @staticmethod
        def backward(ctx, dy):
            dx, up, down = t.FusedMLP.backward(ctx, dy)
            return dx, 1.1 * up, down

    bound = t.bind(Skewed.apply, t.mlp, inputs)
    line, name = bound.function, bound.label
    if DEVICE.type == "cpu":
        assert (line, name) == (t.mlp, "torch (error 0.100)")
    else:  # a tenth, to TF32's rounding
        assert line is t.mlp and float(re.fullmatch(r"torch \(error ([\d.]+)\)", name)[1]) == pytest.approx(
            0.1, abs=0.005
        )

    def broken(*inputs):
        raise RuntimeError("no such chip")

    assert t.bind(broken, t.mlp, inputs) == t.Bound(t.mlp, "torch", "RuntimeError")

    class Undefined(t.FusedMLP):
        @staticmethod
        def backward(ctx, dy):
            dx, up, down = t.FusedMLP.backward(ctx, dy)
            return dx, up / 0, down * torch.nan

    assert t.bind(Undefined.apply, t.mlp, inputs) == t.Bound(t.mlp, "torch", "error nan")


@pytest.mark.parametrize("part", range(4), ids=["q", "k", "v", "gain"])
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_binding_looks_at_every_gradient_of_the_heads(part, factor):
    class Skewed(t.FusedHeads):
        @staticmethod
        def backward(ctx, *dys):
            dqkv, dgain, *none = t.FusedHeads.backward(ctx, *dys)
            parts = [*dqkv.split([dy.size(2) for dy in dys], 2), dgain]
            parts[part] = factor * parts[part]
            return torch.cat(parts[:3], 2), parts[3], *none

    qkv, gain, rope, _ = heads_inputs(2, 16, 2, 1, 32, 16)
    bound = t.bind(Skewed.apply, t.qk_heads, [qkv.requires_grad_(), gain.requires_grad_(), *rope])
    qk, name = bound.function, bound.label
    if factor == 1:
        assert qk == Skewed.apply and name == "triton"
    else:
        assert qk is t.qk_heads and name.startswith("torch (error 0.")


# ---------------------------------------------------------------- products of a direction

TILES = {"xxt": (64, 64, 4, 2), "ba_plus_caa": (64, 128, 4, 2), "lower_solve": (64, 4, 2)}
SIZES = [(3, 70, 131), (1, 128, 64)]  # batch, sides


def matrices(B, M, N, layout, seed=0):
    """(B, M, N): contiguous, a transposed view, or a slice of a wider and deeper tensor."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)
    if layout == "slice":
        return make(2 * B, M + 3, N + 5)[::2, 2 : 2 + M, 1 : 1 + N]
    return make(B, N, M).mT if layout == "tall" else make(B, M, N)


def assert_no_worse(got, plain, exact, factor=2.0):
    """Error against float64: at most `factor` times the torch line's, or float32 rounding."""
    assert got.shape == exact.shape
    assert relative(got, exact) < max(factor * relative(plain, exact), 3e-7), (
        relative(got, exact),
        relative(plain, exact),
    )


@in_float32
@pytest.mark.parametrize("layout", ["wide", "tall", "slice"])
@pytest.mark.parametrize("B,M,N", SIZES)
@pytest.mark.parametrize("tile", [(32, 128, 4, 2), (64, 64, 4, 3)], ids=str)
def test_symmetric_products_match_float64(B, M, N, layout, tile):
    """Tiles that divide the sizes and that do not; rows scaled or not; both kinds of partial sums."""
    X = matrices(B, M, N, layout)
    r = (torch.rand(B, M, generator=torch.Generator().manual_seed(1)) + 0.5).to(DEVICE)
    for scale, power in ((r, 1), (None, 2)):
        exact = t.xxt(X.double(), None if scale is None else r.double())[0]
        A, sums = t.symmetric_op(X, scale, (), power, torch.float32, tile)
        assert_no_worse(A, t.xxt(X, scale)[0], exact)
        assert_no_worse(sums.sum(1), t.xxt(X, scale, power)[1], exact.abs().pow(power).sum(-1))
        for i in range(0, M, tile[0]):  # off the diagonal tiles the mirror image is exact
            assert torch.equal(A[:, i + tile[0] :, i : i + tile[0]], A[:, i : i + tile[0], i + tile[0] :].mT)
    A = A / 30
    for scale in (r, None):
        line = lambda x: t.ba_plus_caa(x, 3.5, -4.0, 2.5, None if scale is None else r.to(x.dtype))
        C, sums = t.symmetric_op(A, scale, (3.5, -4.0, 2.5), 0, torch.float32, tile)
        assert_no_worse(C, line(A), line(A.double()))
        assert sums.numel() == 0
    zero, sums = t.symmetric_op(torch.zeros_like(X), r, (), 1, torch.float32, tile)
    assert not zero.any() and not sums.any()


CORRELATED = {
    "gaussian": lambda X: X,
    "nearly equal rows": lambda X: X[:, :1] + 1e-3 * X,
    "rank 5 and noise": lambda X: X[:, :, :5] @ X[:, :5] + 1e-2 * X,
    "alternating": lambda X: (
        (X[:, :1] + 0.1 * X) * (1 - 2 * (torch.arange(X.size(1), device=X.device) % 2))[:, None]
    ),
}


def correlated(case, B, M, N, layout):
    X = CORRELATED[case](matrices(B, M, N, "wide"))
    return X.mT.contiguous().mT if layout == "tall" else X


def solve_inputs(X, dtype):
    """X, d, and T with NaN where nothing may be read."""
    d = X.float().norm(dim=-1).reciprocal()
    T = t.xxt(X.double(), d.double())[0].to(dtype)
    return T.masked_fill(torch.ones_like(T, dtype=torch.bool).triu(), torch.nan), d


def solve_exactly(T, X, d):
    """On the host, from the lower triangle alone: a library may read, and multiply by zero, what it does not need."""
    lower, Q = (
        T.double().cpu().masked_fill(torch.ones(T.shape[1:], dtype=torch.bool).triu(), 0),
        X.double() * d.double()[:, :, None],
    )
    return torch.linalg.solve_triangular(lower, Q.cpu(), upper=False, unitriangular=True).to(T.device)


@in_float32
@pytest.mark.parametrize("case", CORRELATED, ids=lambda x: x.replace(" ", "_"))
@pytest.mark.parametrize(
    "B,M,N,layout", [(2, 70, 131, "wide"), (1, 193, 200, "tall"), (1, 64, 64, "wide"), (1, 7, 30, "tall")]
)
def test_substitution_matches_float64_on_any_correlation(case, B, M, N, layout):
    """Also where the powers of T - I that a product formula needs reach 1e30; the upper half holds NaN."""
    X = correlated(case, B, M, N, layout)
    for dtype in (torch.float32, torch.float16):
        T, d = solve_inputs(X, dtype)
        exact = solve_exactly(T, X, d)
        Y, squares = t.lower_solve(T, X, d)
        got, partial = t.solve_op(T, X, d, (128, 4, 2))
        assert got.dtype == Y.dtype == dtype and got.stride() == X.stride()
        if dtype == torch.float32:
            assert_no_worse(got, Y, exact, 4.0)
        else:  # the inverse and every Y_i are rounded on the way; relative to the largest row
            assert (got - exact).norm(dim=-1).max() < 1e-2 * exact.norm(dim=-1).max()
        torch.testing.assert_close(partial.sum(1), got.float().square().sum(-1))
        torch.testing.assert_close(squares, Y.float().square().sum(-1))


@in_float32
def test_substitution_of_zero_rows_and_matrices():
    X = matrices(3, 70, 40, "wide")
    X[0], X[1, ::3] = 0, 0
    d = t.inverse_root(X.square().sum(-1))
    for fn in (t.lower_solve, lambda *args: t.solve_op(*args, (32, 4, 2))):
        Y, squares = fn(t.xxt(X, d)[0], X, d)
        assert not Y[0].any() and not Y[1, ::3].any() and torch.isfinite(Y).all() and Y[2].any(-1).all()
        assert (squares.sum(1) if squares.dim() == 3 else squares)[0].eq(0).all()


def in_kernels(monkeypatch):
    """Every product through its kernel in float32; returns the list of operators called."""
    calls = []
    monkeypatch.setattr(t, "tile_of", lambda product, X: TILES[product])
    for name in ("symmetric_op", "solve_op"):
        op = getattr(t, name)
        monkeypatch.setattr(t, name, lambda *args, op=op, name=name: calls.append(name) or op(*args))
    return calls


@in_float32
@pytest.mark.parametrize("method", t.ORTHO)
@pytest.mark.parametrize("shape", [(2, 70, 90), (1, 90, 70)], ids=str)
def test_a_direction_in_kernels_is_the_direction_in_torch_lines(method, shape, monkeypatch):
    """Scales folded into products, aI into the polynomial, sums from partial sums; rows of unequal size."""
    G = matrices(*shape, "wide") * torch.logspace(0, -2, shape[1], device=DEVICE)[:, None]
    G[0] *= 1e-20
    plain = t.orthogonalize(G, method)
    calls = in_kernels(monkeypatch)
    torch.testing.assert_close(t.orthogonalize(G, method), plain, atol=3e-5, rtol=0)
    steps = {"ns5": 5, "polar_express": 5, "polar_express4": 4, "turbo": 4}
    expected = ["symmetric_op", "symmetric_op"] * steps.get(method, 0) or ["symmetric_op", "solve_op"] * (
        2 if method == "mud2" else 1
    )
    assert calls == expected
    assert not t.orthogonalize(G[:1] * 0, method).any()


@in_float32
@pytest.mark.parametrize("method", ["ns5", "turbo", "mud2"])
def test_kernels_stay_whole_in_a_compiled_update(method, monkeypatch):
    """One graph, the fake results' shapes and strides right, transposed bank included."""
    monkeypatch.setattr(t, "tile_of", lambda product, X: TILES[product])
    compiled = torch.compile(t.orthogonalize, dynamic=False, fullgraph=True, backend="aot_eager")
    for shape in ((2, 40, 70), (2, 70, 40)):
        G = matrices(*shape, "wide")
        torch.testing.assert_close(compiled(G, method), t.orthogonalize(G, method), atol=1e-6, rtol=0)
    for layout in ("wide", "tall"):
        X = matrices(2, 40, 70, layout)
        d = X.norm(dim=-1).reciprocal()
        T = t.xxt(X, d)[0]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(t.symmetric_op, (X, d, [], 1, torch.float32, [64, 64, 4, 2]), test_utils=checks)
        torch.library.opcheck(
            t.symmetric_op, (T, None, [1.0, 2.0, 3.0], 0, torch.float16, [64, 64, 4, 2]), test_utils=checks
        )
        torch.library.opcheck(t.solve_op, (T.half(), X, d, [64, 4, 2]), test_utils=checks)


def test_the_table_of_wins(monkeypatch):
    """Every row is a tile that its operator takes; the first row that fits counts, on Hopper, in 16 bits."""
    lengths = {name: len(tile) for name, tile in TILES.items()}
    for name, short, count, tile in t.WINS:
        *blocks, warps, stages = tile or TILES[name]
        assert len(tile or TILES[name]) == lengths[name] and short >= 64 and count >= 1
        assert all(b in (16, 32, 64, 128, 256) for b in blocks) and warps in (4, 8) and 1 <= stages <= 6

    class Fake:
        is_cuda, dtype, device = True, torch.bfloat16, "cuda"

        def __init__(self, *shape):
            self.shape = shape

        def size(self, i):
            return self.shape[i]

    wins = (("xxt", 256, 4, "a"), ("xxt", 512, 8, "b"), ("xxt", 256, 24, "c"), ("lower_solve", 256, 1, "d"))
    monkeypatch.setattr(t, "WINS", tuple(t.Win(*row) for row in wins))
    capability = type("P", (), {"major": 9})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: capability)
    assert [
        t.tile_of("xxt", Fake(*shape))
        for shape in (
            (3, 256, 512),
            (8, 192, 512),
            (9, 256, 512),
            (9, 320, 512),
            (1, 576, 640),
            (3, 256, 520),
            (3, 200, 512),
        )
    ] == ["a", "b", "c", None, None, None, None]
    assert (
        t.tile_of("lower_solve", Fake(1, 64, 64)) == "d" and t.tile_of("ba_plus_caa", Fake(1, 64, 64)) is None
    )
    for Fake.dtype in (torch.float32, torch.float64):
        assert t.tile_of("xxt", Fake(1, 64, 64)) is None
    Fake.dtype, capability.major = torch.float16, 8
    assert t.tile_of("xxt", Fake(1, 64, 64)) is None
    assert t.tile_of("xxt", torch.zeros(1, 64, 64)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["wide", "tall"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("B,M,N", [(3, 512, 512), (2, 256, 512), (2, 512, 1536), (1, 200, 328), (2, 70, 131)])
def test_products_in_16_bits_are_no_worse_than_the_torch_lines(B, M, N, layout, dtype, monkeypatch):
    monkeypatch.setattr(t, "tile_of", lambda product, X: None)
    X = matrices(B, M, N, layout).to(dtype)
    r = (torch.rand(B, M, device=DEVICE) + 0.5) / N**0.5
    exact = t.xxt(X.double(), r.double())[0]
    for tile in ((64, 64, 4, 4), (128, 64, 8, 3)):
        A, sums = t.symmetric_op(X, r, (), 1, dtype, tile)
        assert_no_worse(A, t.xxt(X, r)[0].to(dtype), exact, 1.05)
        assert_no_worse(sums.sum(1), t.xxt(X, r, 1)[1], exact.abs().sum(-1), 1.05)
        line = lambda x: t.ba_plus_caa(x, 3.5, -0.4, 0.2, r.to(torch.promote_types(x.dtype, r.dtype)))
        C = t.symmetric_op(A, r, (3.5, -0.4, 0.2), 0, dtype, tile)[0]
        assert_no_worse(C, line(A.float()).to(dtype), line(A.double()), 1.05)


@pytest.mark.gpu
@pytest.mark.parametrize("method", t.ORTHO)
@pytest.mark.parametrize("shape", [(3, 512, 512), (2, 1536, 512), (2, 256, 512)], ids=str)
def test_a_direction_on_the_gpu_is_the_direction_in_float32(method, shape, monkeypatch):
    G = matrices(*shape, "wide")
    exact = t.orthogonalize(G.cpu(), method).to(DEVICE)
    kernels = t.orthogonalize(G, method)
    monkeypatch.setattr(t, "tile_of", lambda product, X: None)
    lines = t.orthogonalize(G, method)
    assert_no_worse(kernels, lines, exact.double(), 1.25)
    assert relative(kernels, exact) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("case", CORRELATED, ids=lambda x: x.replace(" ", "_"))
@pytest.mark.parametrize(
    "B,M,N,layout",
    [
        (22, 512, 512, "wide"),
        (3, 512, 1536, "tall"),
        (5, 192, 320, "wide"),
        pytest.param(
            5,
            200,
            328,
            "wide",
            marks=pytest.mark.xfail(strict=True, reason="Triton 3.6 miscompiles the tile (32, 4)"),
        ),
    ],
)
def test_substitution_in_fp16_is_right_and_the_same_every_time(case, B, M, N, layout):
    """tile_of gives it sides of whole 64s only: on an H200 200 x 328 came out wrong from row 16 on, and 200 x 320
    was an illegal access; the interpreter, above, is right at any side."""
    X = correlated(case, B, M, N, layout).bfloat16()
    T, d = solve_inputs(X, torch.half)
    exact = solve_exactly(T, X, d)
    for tile in ((32, 4, 3), (64, 4, 3), (128, 8, 2)):
        Y, squares = t.solve_op(T, X, d, tile)
        assert (Y - exact).norm(dim=-1).max() < 1e-2 * exact.norm(dim=-1).max()
        for _ in range(20):  # a panel reads back its own rows: a race would show
            again = t.solve_op(T, X, d, tile)
            assert torch.equal(again[0], Y) and torch.equal(again[1], squares)
