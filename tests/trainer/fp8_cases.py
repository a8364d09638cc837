"""The MLP's kernels, also in fp8, as plain PyTorch that a CPU runs, too."""

import dataclasses

import torch

import train_gpt as t


def integer_of(dtype):
    """Return the integer type as wide as a floating-point type of 2 or 4 bytes."""
    return {4: torch.int32, 2: torch.int16}[dtype.itemsize]


def hidden_with_sign(u, dtype):
    """Return the MLP's hidden values of `u` as its kernel does: the last bit of each is set if u < 0."""
    integer = integer_of(dtype)
    hidden = t.F.leaky_relu(u, 0.5).square().to(dtype)
    return ((hidden.view(integer) & -2) + (u < 0).to(integer)).view(dtype)


def reference_mlp(x, up):
    """Compute `mlp_op` in plain PyTorch."""
    return hidden_with_sign(x.float() @ up.float().T, x.dtype)


def reference_mlp_backward(dy, down, hidden):
    """Compute `mlp_backward_op` in plain PyTorch."""
    is_negative = hidden.view(integer_of(hidden.dtype)) & 1 == 1
    root = hidden.float().sqrt()
    slope = torch.where(is_negative, -root, 2 * root)
    return (dy.float() @ down.float() * slope).to(hidden.dtype)


def reference_mlp8(x, up, down, steps, dtype):
    """Compute `mlp8_op` in plain PyTorch: hidden values in `dtype` and their fp8 product with `down`."""
    hidden = hidden_with_sign(x.float() @ up.float().T * steps[0], dtype)
    hidden8 = (hidden.float() / steps[1]).clamp(max=448).to(x.dtype)
    return hidden, torch._scaled_mm(hidden8, down.t(), *steps[1:], out_dtype=dtype)


def emulate_fp8(monkeypatch, machine=False):
    """Replace the MLP's kernels by their references, which a CPU runs, too.

    machine: also make init_machine bind the MLP on a CPU as it does on a GPU.
    """
    monkeypatch.setattr(t, "mlp_op", reference_mlp)
    monkeypatch.setattr(t, "mlp_backward_op", reference_mlp_backward)
    monkeypatch.setattr(t, "mlp8_op", reference_mlp8)
    if not machine:
        return

    init_machine = t.init_machine

    def init_machine_with_mlp(h, env, **options):
        m = init_machine(h, env, **options)
        bound = t.bind_mlp(h, torch.device("cpu"))
        return dataclasses.replace(
            m, ops=t.Ops(mlp=bound.function), binding=m.binding._replace(mlp=bound.label)
        )

    monkeypatch.setattr(t, "init_machine", init_machine_with_mlp)
