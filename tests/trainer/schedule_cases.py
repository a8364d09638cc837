"""Helpers of the tests of the optimizer: a noisy model on random documents, collectives watched."""

import contextlib
import os
from functools import cache
from typing import NamedTuple

import pytest
import torch

import train_gpt as t
from tests.helpers import (
    noisy_model,
    shard_folder,
    temporary_folder,
    tiny,
)

STEPS = 6

# Ranks and micro-batches sum the same numbers in another order: float32 rounding, 6e-8 a sum. Newton-Schulz
# stretches small singular values of a gradient, and its rounding, by up to 3.4445^5 = 485. Measured after six
# steps: at most 3e-6 of a parameter's norm; a rank that is left out or counted twice changes it by over 1e-2.
TOLERANCE = 3e-5


@cache
def data_folder():
    """Make a folder with two shards of random documents, once."""
    folder = temporary_folder() / "data"
    shard_folder(folder, tiny(), [60, 40], seed=5)
    return str(folder)


def setup(m, **knobs):
    """Return a noisy model (all its gradients are alive), its optimizer, average and loader."""
    if "data_path" not in knobs:  # a rank is told: a folder of its own would outlive it
        knobs["data_path"] = data_folder()
    h = tiny(**({"grad_clip": 0.3} | knobs))
    model = noisy_model(h, seed=3)
    optimizer = t.Optimizer(model, h, m)
    return model, optimizer, t.Ema(model, h), t.TokenLoader(h, m)


def parameters(model):
    """Return copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def env_machine(h, per_node=0):
    """Return the Machine of this process of run_ranks. per_node: ranks on a node; 0: all on one."""
    env = dict(os.environ)
    if per_node:
        env["LOCAL_WORLD_SIZE"] = str(per_node)
        env["LOCAL_RANK"] = str(int(env["RANK"]) % per_node)
    return t.init_machine(h, env)


class Call(NamedTuple):
    """A collective that was called."""

    name: str
    bytes: int  # of the whole buffer
    dtype: torch.dtype
    ranks: int  # that share the buffer


@contextlib.contextmanager
def watch_collectives(trainer=t):
    """Yield a list that gets a Call for each collective that the trainer launches."""
    calls = []

    def watched(name, real):
        def launch(out, *rest, **named):
            whole = rest[0] if name == "reduce_scatter" else out
            group = named.get("group")
            if name == "all_gather" and len(rest) > 1:
                group = rest[1]
            num_bytes = whole.numel() * whole.element_size()
            calls.append(Call(name, num_bytes, whole.dtype, t.dist.get_world_size(group)))
            return real(out, *rest, **named)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (trainer, "reduce_scatter"),
            (trainer, "all_gather"),
            (trainer.dist, "all_reduce"),
        ):
            patch.setattr(module, name, watched(name, getattr(module, name)))
        yield calls
