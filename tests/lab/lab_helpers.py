"""Helpers that the tests of the lab share: a session on a CPU, its sections, a bench run in this process."""

import json
import math
from types import SimpleNamespace

import torch

import train_gpt as t
from helpers import english_args, machine, tiny
from lab import bench, sections
from lab.trainer import Session

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
    return dict(skipped=[], noisy=[], whole=[], sections=[])


def a_session(rows=2, **knobs):
    """A session of a tiny model without a process group."""
    return Session(t, tiny(**knobs), machine(), rows, an_empty_report(), math.inf)


def session_of(h, m):
    """A session of this config and machine."""
    _, rows = t.cut_batch(h, 1)
    return Session(t, h, m, rows, an_empty_report(), math.inf)


def sections_by_name(s, dtype=torch.float32):
    return {section.name: section for section in sections.sections_of(s, t, t.Ops(), dtype)}


def run_bench(args, tmp_path, capsys):
    """(report, output) of a bench in this process."""
    file = tmp_path / "bench.json"
    assert bench.main(["--json", str(file), *map(str, args), *english_args()], {}) == 0
    said = capsys.readouterr()
    assert said.err == "", said.err
    return json.loads(file.read_text()), said.out


def on_gpu(s, **attributes):
    """The session with a machine that calls itself a GPU and has only these attributes."""
    return s._replace(m=SimpleNamespace(device=torch.device("cuda"), **attributes))
