"""Triton kernels against float64 and their torch lines: in Triton's CPU interpreter here, on the device with one."""
import pytest
import torch

import train_gpt as t

triton = pytest.importorskip("triton", reason="no Triton for this platform")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(fn, x, gain, rope, dy, dtype):
    """Output and gradients of fn in `dtype`, as float64."""
    leaf = x.detach().to(dtype).requires_grad_()
    g = gain.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    y = fn(leaf, g, *(r.to(g.dtype) for r in rope))
    y.backward(dy.to(dtype))
    return [v.detach().double() for v in (y, leaf.grad, g.grad)]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("B,T,H,Dh,dims", [(2, 64, 2, 64, 16), (3, 37, 3, 64, 16), (1, 5, 1, 32, 32), (2, 33, 4, 16, 2)])
def test_qk_forward_and_gradients_match_float64(B, T, H, Dh, dims):
    """Strided input (a slice of a wider product), transposed gradient, sizes that no tile divides."""
    generator = torch.Generator().manual_seed(B * T + H)
    wide = torch.randn(B, T, H * Dh + 32, generator=generator).to(DEVICE)
    x = wide[..., 16: 16 + H * Dh].unflatten(-1, (H, Dh))
    dy = torch.randn(B, H, T, Dh, generator=generator).to(DEVICE).transpose(1, 2)
    gain = (torch.rand(H, generator=generator) + 0.5).to(DEVICE)
    rope = t.rope_tables(T, dims, 1e4, DEVICE)
    exact = run(t.qk_norm_rope, x, gain, rope, dy, torch.float64)
    line = run(t.qk_norm_rope, x, gain, rope, dy, torch.float32)
    kernel = run(t.triton_qk(), x, gain, rope, dy, torch.float32)
    for got, reference, plain in zip(kernel, exact, line):
        assert relative(got, reference) < max(2 * relative(plain, reference), 5e-7)


@pytest.mark.gpu
def test_qk_in_bf16_is_no_worse_than_the_torch_line():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, 8, 64, generator=generator).to(DEVICE).bfloat16()
    dy, gain = torch.randn_like(x), torch.rand(8, generator=generator).to(DEVICE) + 0.5
    rope = t.rope_tables(256, 16, 1e4, DEVICE)
    exact = run(t.qk_norm_rope, x, gain, rope, dy, torch.float64)
    line = run(t.qk_norm_rope, x, gain, rope, dy, torch.bfloat16)
    kernel = run(t.triton_qk(), x, gain, rope, dy, torch.bfloat16)
    for got, reference, plain in zip(kernel, exact, line):
        assert relative(got, reference) <= relative(plain, reference) * 1.01


def test_qk_in_a_compiled_model_trains_like_the_torch_line():
    """One graph with the operator inside (no graph break), same loss, same gradients."""
    h = t.load_config(["preset=cpu", "num_layers=2", "model_dim=64", "num_heads=2"], {})
    models = [t.GPT(h, t.Ops(qk=t.triton_qk())).to(DEVICE), t.GPT(h).to(DEVICE)]
    with torch.no_grad():
        for p, q in zip(*(m.parameters() for m in models)):
            q.copy_(p.add_(0.05 * torch.randn_like(p)))
    x, y = torch.randint(0, h.vocab_size, (2, 2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses = [torch.compile(models[0].loss, dynamic=False, fullgraph=True, backend="aot_eager")(x, y),
              models[1].loss(x, y)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0].item() - losses[1].item()) < 1e-5
    for p, q in zip(*(m.parameters() for m in models)):
        assert relative(p.grad, q.grad) < 1e-4


def test_binding_takes_the_kernel_only_when_it_is_right(monkeypatch):
    h = t.load_config([], {})
    fn, name = t.bind_qk(DEVICE, h)
    assert name == "triton" and fn is t.triton_qk()
    monkeypatch.setattr(t, "triton_qk", lambda: lambda x, gain, cos, sin: t.qk_norm_rope(x, gain * 1.1, cos, sin))
    fn, name = t.bind_qk(DEVICE, h)
    assert fn is t.qk_norm_rope and name.startswith("torch (error 0.")

    def broken():
        raise RuntimeError("no such chip")
    monkeypatch.setattr(t, "triton_qk", broken)
    assert t.bind_qk(DEVICE, h) == (t.qk_norm_rope, "torch (RuntimeError)")
