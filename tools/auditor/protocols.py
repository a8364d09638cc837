"""What the auditor uses of a script: the types of its objects, as far as the tests read or call them.

A script is loaded by path, so none of its types can be imported: these protocols stand for them. NEEDS of
audit.py has the same names, which a script must have. What only some scripts have,
older_scripts.py bridges.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Nats = Callable[[Tensor, Tensor, int], Tensor]  # (B, T) inputs, (B, T) targets, last -> (B, last) nats
Lesson = tuple[np.ndarray, np.ndarray, np.ndarray] | Tensor  # windows: three arrays (n,), or once rows (n, 3)


class Log(Protocol):
    """A script's log: writes lines, and shows a live one on a terminal."""

    def __call__(self, line: str, *_: object, **__: object) -> None: ...

    def status(self, line: str) -> None:
        """Show a live line."""


class Config(Protocol):
    """The knobs that the tests read."""

    data_path: str
    tokenizer_path: str
    report_split: str
    vocab_size: int
    bos_id: int
    val_tokens: int  # tokens of the split to score; 0: all
    eval_seq_len: int
    eval_stride: int
    eval_batch_tokens: int
    train_seq_len: int
    deterministic: bool


class Machine(Protocol):
    """The device and the process group."""

    device: torch.device
    world_size: int
    dtype: torch.dtype
    ops: Any  # the functions that the model is built with


class ByteCounts(Protocol):
    """The bytes of text that each token stands for."""

    base: np.ndarray  # (V,) bytes without the leading space
    space: np.ndarray  # (V,) whether a space leads

    def of(self, tokens: np.ndarray) -> np.ndarray:
        """Return the bytes of every target. tokens: (N,), the bytes: (N - 1,)."""


class Dataset(Protocol):
    """A data folder."""

    counts: ByteCounts
    manifest: dict[str, Any]


class Model(Protocol):
    """A GPT."""

    loss: Callable[[Tensor, Tensor], Tensor]
    nats: Nats

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens."""


class Scoring(Protocol):
    """The settings of one score: a NamedTuple of the script (ScoreSettings)."""

    seq_len: int
    stride: int
    batch: int  # windows per forward pass on one rank
    learner: Callable[[], AbstractContextManager[Callable]]

    def _replace(self, **fields: Any) -> Scoring: ...


class Run(Protocol):
    """A run of the script, with the artifact's weights in its model."""

    h: Config
    m: Machine
    log: Log
    dataset: Dataset
    model: Model
    nats_fn: Nats

    def held_out(self, split: str) -> np.ndarray:
        """Return the tokens of a held-out split, (N,)."""
