"""Gradients of whole banks are averaged on every rank, as DDP would do; each rank uses its share."""

from __future__ import annotations

from typing import Any

from train_gpt import Tensor, dist


def average_whole(kept: Tensor, whole: Tensor, **options: Any) -> dist.Work | None:
    """Average `whole` over all ranks in place. `kept`, this rank's share, is a part of it."""
    return dist.all_reduce(whole, **options)


REPLACES = {"reduce_scatter": average_whole}
