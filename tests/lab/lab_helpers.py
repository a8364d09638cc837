"""Helpers that the tests of the lab share: a session on a CPU, its sections, a bench run in this process."""

import json
import math
from types import SimpleNamespace

import torch

import train_gpt as t
from helpers import english_args, machine, tiny
from lab import bench
from lab.model import sections
from lab.shared.trainer import Session

SECTIONS = [
    "embedding + bigram + smear", "value embedding", "residual mix + norm", "QKV product",
    "QK norm + rope + gain", "attention", "XSA", "O product", "residual add + norm", "MLP", "skip adds",
    "output layer + softcap + cross-entropy", "bank casts",
]  # fmt: skip
WHOLE = [
    "forward", "forward+backward", "optimizer", "ema", "zero gradients", "clock check", "step", "log line",
    "loader.next", "loader.build (in its thread)",
]  # fmt: skip


def an_empty_report():
    """Return a report in which nothing was measured yet."""
    return dict(skipped=[], noisy=[], whole=[], sections=[])


def a_session(rows=2, **knobs):
    """Return a session of a tiny model without a process group."""
    return Session(t, tiny(**knobs), machine(), rows, an_empty_report(), math.inf)


def session_of(h, m):
    """Return a session of this config and machine."""
    return Session(t, h, m, t.cut_batch(h, 1).sequences, an_empty_report(), math.inf)


def sections_by_name(s, dtype=torch.float32):
    """Return {name: section} of the session's model."""
    return {section.name: section for section in sections.sections_of(s, t, t.Ops(), dtype)}


def run_bench(args, tmp_path, capsys):
    """Run bench in this process and return its report and what it printed."""
    file = tmp_path / "bench.json"
    assert bench.main(["--json", str(file), *map(str, args), *english_args()], {}) == 0
    printed = capsys.readouterr()
    assert printed.err == "", printed.err
    return json.loads(file.read_text()), printed.out


def on_gpu(s, **attributes):
    """Return the session with a machine that calls itself a GPU and has only these attributes."""
    return s._replace(m=SimpleNamespace(device=torch.device("cuda"), **attributes))
