"""What older scripts lack, bridged for the auditor: records are audited with their own scripts.

script.py bridges what other tools meet as well (RENAMED, known_fault, leave_if_lost, one_layer).
"""

from __future__ import annotations

import dataclasses
import lzma
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from auditor.protocols import Config, Lesson, Log, Machine, Model, Run, Scoring
from script import missing_names

SCORING_NEEDS = ("Run.scoring",)  # a script has it if it gives its learners windows
METRIC_NEEDS = ("metrics_of",)  # a script has it if it says by which metrics it scores
WINDOW_NEEDS = ("Windows",)  # a script has it if its windows are three arrays, not rows of three numbers
CODEC_NEEDS = ("CODECS", "codec_of")  # a script has them if its artifacts name their compressor


def can_learn(script: ModuleType) -> bool:
    """Return whether the script has test-time training."""
    return not missing_names(script, ("Config.ttt_lr",))


def chunk_of(h: Config) -> int:
    """Return the targets that are scored before they are learned from; 0: nothing is learned."""
    return h.ttt_chunk_tokens if getattr(h, "ttt_lr", 0) else 0


def gives_windows(script: ModuleType) -> bool:
    """Return whether the script gives its learners windows; older ones give a chunk's tokens."""
    return not missing_names(script, SCORING_NEEDS)


def counted_stride(script: ModuleType, h: Config) -> int:
    """Return the stride of the score that counts; scripts without metrics_of slide by eval_stride."""
    return h.eval_stride if missing_names(script, METRIC_NEEDS) else script.metrics_of(h)[-1].stride


def learns_apart(scoring: Scoring) -> bool:
    """Return whether a ScoreSettings scores every document apart, and forgets what it learned after each.

    Older scripts have no layout: with windows one after the other, their bos_id is -1 or missing.
    """
    if hasattr(scoring, "layout"):
        return scoring.layout == "documents"
    return getattr(scoring, "bos_id", -1) >= 0


def plan_older_scores(script: ModuleType, run: Run, chunk: int, log: Log) -> Scoring:
    """Return the ScoreSettings of the final score of a script that has no Run.scoring to make it."""
    h = run.h
    batch = h.eval_batch_tokens // h.eval_seq_len
    scoring = script.ScoreSettings(h.eval_seq_len, h.eval_stride, batch, "audit", log)
    if chunk:
        learner = partial(script.learning, run.model, run.loss_fn, h, run.m)
        scoring = scoring._replace(chunk=chunk, learner=learner)
    return scoring


def lesson_of(script: ModuleType, start: np.ndarray, end: np.ndarray) -> Lesson:
    """Return windows (n,) that score all their targets, as the script's learners take them.

    Those of older scripts take rows of three numbers: start, end, and the first target scored.
    """
    if missing_names(script, WINDOW_NEEDS):
        return torch.from_numpy(np.stack([start, end, start], 1))
    return script.Windows(start=start, end=end, score_from=start)


def targets_of(tokens: Tensor, lesson: Lesson | float) -> Tensor:
    """Return the targets that a learner is given: those of windows, or of an older script's tokens."""
    if isinstance(lesson, float):
        return tokens[1:]
    windows = lesson.tolist() if isinstance(lesson, Tensor) else zip(*lesson)
    return torch.cat([tokens[first + 1 : end + 1] for _, end, first in windows])


def compressor(script: ModuleType, blob: bytes) -> Callable[[bytes], bytes]:
    """Return what compressed the artifact `blob`: the script's codec, or xz for one that knows no other."""
    if missing_names(script, CODEC_NEEDS):
        return partial(lzma.compress, **script.XZ)
    return script.CODECS[script.codec_of(blob)].pack


def with_own_signals(m: Machine) -> Machine:
    """Return a Machine whose signals are new: a first one ends `train`; the audit leaves at once.

    The first scripts handle no signals, the next ones keep a list of them.
    """
    return dataclasses.replace(m, signals=type(m.signals)()) if hasattr(m, "signals") else m


def passes_of(script: ModuleType, run: Run, model: Model) -> dict[str, Callable]:
    """Return the fields of a Run that hold the passes of a model without a loop, by name.

    Both passes of training are the same there. Scripts from before the loop have only one. Older scripts
    score with a plain function.
    """
    training = {name: model.loss for name in ("loss_fn", "plain_loss_fn") if hasattr(run, name)}
    as_scoring_pass = getattr(script, "ScoringPass", lambda nats: nats)
    return training | {"nats_fn": as_scoring_pass(model.nats)}


def guarded(script: ModuleType, run: Run) -> AbstractContextManager:
    """Return the context in which the script reports a failure; the first records' scripts have none."""
    guard = getattr(script, "guarded", None)
    return guard(run.m, run.log) if guard else nullcontext()
