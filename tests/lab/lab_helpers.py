"""Helpers that the tests of the lab share: a session on a CPU, its sections, a bench run in this process."""

import json
from types import SimpleNamespace

import torch

import train_gpt as t
from lab import bench
from lab.model import sections
from lab.shared.trainer import Session
from progress import Progress
from tests.helpers import english_args, machine, tiny

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
    return Session(t, tiny(**knobs), machine(), rows, an_empty_report(), Progress("bench"))


def session_of(h, m):
    """Return a session of this config and machine."""
    return Session(t, h, m, t.cut_batch(h, 1).sequences, an_empty_report(), Progress("bench"))


def sections_by_name(s, dtype=torch.float32):
    """Return {name: section} of the session's model."""
    return {section.name: section for section in sections.sections_of(s, t, t.Ops(), dtype)}


class Counting(Progress):
    """Keeps (work, unit, units expected, units counted) of every stage."""

    stages: list[tuple[str, str, int, int]] = []

    def expect(self, total, unit, guess=0.0):
        self.keep()
        super().expect(total, unit, guess)
        self.counted = 0

    def advance(self, count=1, left=None):
        self.counted += count
        super().advance(count, left)

    def keep(self):
        if getattr(self, "total", 0):
            self.stages.append((self.work, self.unit, self.total, self.counted))

    def __exit__(self, *error):
        self.keep()
        super().__exit__(*error)


def run_bench(args, tmp_path, capsys):
    """Run bench in this process and return its report and what it printed.

    Each of its stages counts as many parts as it expected, or its ETA would be wrong; fewer if one fails.
    """
    file = tmp_path / "bench.json"
    Counting.stages = []
    bench.Progress = Counting
    try:
        assert bench.main(["--json", str(file), *map(str, args), *english_args()], {}) == 0
    finally:
        bench.Progress = Progress
    report = json.loads(file.read_text())
    for work, unit, expected, counted in Counting.stages:
        assert counted == expected or (counted < expected and report["skipped"]), (work, unit)
    assert Counting.stages
    printed = capsys.readouterr()
    assert printed.err == "", printed.err
    return report, printed.out


def on_gpu(s, **attributes):
    """Return the session with a machine that calls itself a GPU and has only these attributes."""
    return s._replace(m=SimpleNamespace(device=torch.device("cuda"), **attributes))
