"""Attention in float64, written out, and errors relative to it."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-300  # the least norm to divide by


def visible(documents: Tensor, window: int) -> Tensor:
    """Return the mask (..., T, T) of keys that each query sees, queries down, keys across.

    documents: (..., T), the number of each token's document. window: keys a token sees, itself included; 0:
    all.
    """
    T = documents.size(-1)
    seen = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    seen = seen.triu(1 - (window or T))
    return seen & (documents[..., None] == documents[..., None, :])


def attend_exact(q: Tensor, k: Tensor, v: Tensor, window: int = 0, documents: Tensor | None = None) -> Tensor:
    """Compute the trainer's attend_sdpa in any dtype; fused kernels have no float64."""
    if documents is None:
        documents = q.new_zeros(1, q.size(1))
    repeats = q.size(2) // k.size(2)
    k = k.repeat_interleave(repeats, 2)
    v = v.repeat_interleave(repeats, 2)

    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.size(-1) ** -0.5
    scores = scores.masked_fill(~visible(documents, window)[:, None], float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def relative(x: Tensor, exact: Tensor) -> float:
    """Return |x - exact| / |exact|."""
    difference = (x.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp_min(TINY)).item()
