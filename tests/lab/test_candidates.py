"""Candidates: planted faults are found, verdicts by hand, pairs take turns, the reference is float64."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from lab import bench
from lab.model import candidates, floors, sections
from lab.model.candidates import CandidateRow, ModelErrors, SectionErrors, SectionRow
from lab.shared import exact, trainer
from tests.helpers import english_args
from tests.lab.lab_helpers import WHOLE, a_session, run_bench

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("quick_bench")
CANDIDATES = """
import torch
import torch.nn.functional as F
plain_xsa, plain_nats, plain_heads = t.exclude_self, t.GPT.nats, t.qk_heads
calls = []

class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, d): return 0.5 * d

def lean(x, up, down): return F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)
def wrong_gradient(y, v): return Half.apply(plain_xsa(y, v))
def wrong_forward(qkv, gain, cos, sin): return [1.01 * x for x in plain_heads(qkv, gain, cos, sin)]
def not_a_number(self, tokens, targets, last): return plain_nats(self, tokens, targets, last) * float("nan")
def broken(*args, **options): raise RuntimeError("no kernel\\nhere")

CANDIDATES = {
    "lean": ("t.mlp", lean), "gradient": ("exclude_self", wrong_gradient),
    "broken": ("attention_block", broken),
    "rope": ("qk_heads", wrong_forward), "nan": ("GPT.nats", not_a_number), "absent": ("no_such.thing", lean),
    "two": [("mlp", lean), ("exclude_self", lambda y, v: plain_xsa(y, v))],
}
"""
SAME = "CANDIDATES = {'same': ('mlp', t.mlp)}\n"


def write(tmp_path, text):
    file = tmp_path / "c.py"
    file.write_text(text)
    return file


# ---- the command ---------------------------------------------------------------------------------


def test_the_fused_paths_as_candidates(tmp_path, capsys):
    """On a CPU, where nothing is fused: each is the same model."""
    file = ROOT / "tools" / "lab" / "model" / "plain_paths.py"
    report, out = run_bench(["--candidates", file], tmp_path, capsys)
    skipped = [x for x in report["skipped"] if x["what"].startswith("candidate")]
    assert not skipped, report["skipped"]
    rows = {row["name"]: row for row in report["candidates"]}
    assert list(rows) == ["plain QK", "MLP in bf16", "plain MLP", "PyTorch's attention"]
    for row in rows.values():
        assert max(row["errors"][key] for key in ("loss", "gradients", "worst")) < 1e-3  # measured: 4.9e-7


def test_candidates(tmp_path, capsys):
    report, out = run_bench(["--candidates", write(tmp_path, CANDIDATES)], tmp_path, capsys)
    rows = {row["name"]: row for row in report["candidates"]}
    assert list(rows) == ["lean", "gradient", "rope", "nan", "two"]
    # Earlier reports have these keys.
    keys = ("name", "paths", "plain", "errors", "plain_ms", "ms", "wins", "pairs", "sections", "verdict")
    assert {*rows["lean"]} == {*keys}
    keys = ("section", "plain_forward_ms", "plain_backward_ms", "forward_ms", "backward_ms")
    assert {*rows["lean"]["sections"][0]} == {*keys, "plain_errors", "errors"}
    for name in ("lean", "two"):
        errors = rows[name]["errors"]
        assert errors == rows[name]["plain"]
        assert max(list(errors.values())[:3]) < 1e-3  # measured: 4.9e-7
        assert re.match(r"keep|drop \(takes", rows[name]["verdict"])
    assert [x["section"] for x in rows["lean"]["sections"]] == ["MLP", "layer"]
    assert [x["section"] for x in rows["two"]["sections"]] == ["XSA", "MLP", "layer"]

    xsa = rows["gradient"]["sections"][0]
    assert xsa["section"] == "XSA"
    assert xsa["errors"]["forward"] < 1e-5  # measured: 5.2e-8
    assert math.isclose(xsa["errors"]["gradients"], 0.5, rel_tol=1e-3)  # measured: 0
    assert rows["gradient"]["errors"]["loss"] < 1e-3  # measured: 0
    assert rows["gradient"]["verdict"].startswith("drop (gradients error")
    rope = rows["rope"]["sections"][0]
    assert rope["section"] == "QK norm + rope + gain"
    assert math.isclose(rope["errors"]["forward"], 0.01, rel_tol=1e-2)  # measured: 6.5e-7
    assert rows["rope"]["verdict"].startswith("drop (")
    assert "nan" in rows["nan"]["verdict"]
    assert rows["nan"]["sections"][0]["section"].startswith("output layer")

    why = {x["what"]: x["why"] for x in report["skipped"]}
    assert why["candidate broken"] == "RuntimeError: no kernel"
    assert "no_such" in why["candidate absent"]
    assert report["whole"] == report["sections"] == []  # nothing but candidates
    assert "profile" not in why

    assert "skipped candidate broken: RuntimeError: no kernel" in out
    lean = r"^candidate lean \(mlp\): forward\+backward [\d.]+ ms, plain [\d.]+; error of loss"
    assert re.search(lean, out, re.M)
    lean = r"^  MLP: forward [\d.]+ ms, plain .*\n  layer: .*\ncandidate lean: (keep|drop) \("
    assert re.search(lean, out, re.M)
    names = "lean, gradient, broken, rope, nan, absent, two"
    assert out.startswith(f"\ncandidates: {names}; first the plain model")
    assert t.mlp(torch.zeros(1, 1, 2), torch.zeros(3, 2), torch.zeros(2, 3)).shape == (1, 1, 2)


def test_candidates_and_all_the_rest(tmp_path, capsys):
    """--all measures what bench measures without candidates; they are not compared first."""
    args = ["--candidates", write(tmp_path, SAME), "--all", "--seconds", 0, "--sustain", 0.01]
    report, out = run_bench(args, tmp_path, capsys)
    why = {x["what"]: x["why"] for x in report["skipped"]}
    assert [whole["name"] for whole in report["whole"]] == WHOLE
    assert why["section MLP"] == "out of time (--seconds)"
    assert report["sustained"]["blocks"]
    assert [row["name"] for row in report["candidates"]] == ["same"]
    words = ("bench forward:", "bench sustained", "sum of floors", "candidate same")
    positions = [out.index(word) for word in words]
    assert positions == sorted(positions)


def test_lines_come_when_they_are_known(monkeypatch, tmp_path, capsys):
    """A candidate's model before its sections, a section before the next one, in the table too."""
    said = []
    real = sections.time_section
    file = write(tmp_path, SAME)

    def time_section(s, section):
        said.append((section.name, capsys.readouterr().out))
        return real(s, section)

    monkeypatch.setattr(candidates, "time_section", time_section)
    monkeypatch.setattr(floors, "time_section", time_section)
    assert bench.main(["--candidates", str(file), *english_args()], {}) == 0
    before = dict(reversed(said))  # of each name the first: the plain one
    assert before["MLP"].endswith(")\n")
    assert "\ncandidate same (mlp): forward+backward" in before["MLP"]
    assert before["layer"].startswith("  MLP: forward")
    assert before["layer"].count("\n") == 1

    said.clear()
    assert bench.main(english_args(), {}) == 0
    for (name, _), (_, printed) in zip(said, said[1:]):
        section = re.escape(name)
        assert re.fullmatch(rf"{section} +forward .*\n{section} +backward .*\n", printed), printed
    lines = [line for _, out in said[1:] for line in out.replace("product", "   copy").splitlines()]
    assert len({len(line) for line in lines}) == 1  # columns stay where they are
    assert said[0][1].endswith("bound\n")


# ---- by hand -------------------------------------------------------------------------------------


def test_candidates_meet_the_model_that_trains_without_its_optimizers_capture():
    """Only what moves needs gradients; nothing is captured or compiled for steps that are not made."""
    s = a_session(embed_lr=0.0)
    whole = trainer.build_trained(s)

    def fail(fn):
        pytest.fail("captured")

    def moving(run):
        return {name: p.requires_grad for name, p in run.model.named_parameters()}

    capturing = s._replace(m=dataclasses.replace(s.m, graph_capture=fail))
    plain = trainer.build_trained(capturing, steps=False)
    assert moving(plain) == moving(whole)
    assert set(moving(plain).values()) == {True, False}
    assert all(p.grad.shape == p.shape for p in plain.model.parameters())
    assert whole.model.tok_emb.norm() > 0 == plain.model.tok_emb.norm()  # initialisation takes seconds


def test_verdicts():
    errors = ModelErrors(loss=1e-6, gradients=1e-2, worst=2e-2, worst_parameter="tok_emb")
    row = CandidateRow(
        "lean", ["mlp"], plain=errors, errors=errors, plain_ms=10.0, ms=9.0, wins=8, pairs=10, sections=[]
    )

    def verdict(**changes):
        return candidates.verdict(row._replace(**changes))

    assert verdict() == "keep (10.0 % faster, faster in 8 of 10 pairs)"
    assert verdict(ms=9.99) == "drop (takes 99.9 % of the time, faster in 8 of 10 pairs)"
    assert verdict(wins=7) == "drop (takes 90.0 % of the time, faster in 7 of 10 pairs)"
    assert verdict(errors=errors._replace(gradients=1.6e-2)).startswith("drop (gradients error")
    assert verdict(errors=errors._replace(worst=math.nan)).startswith("drop (worst error nan")
    times = dict(plain_forward_ms=1.0, plain_backward_ms=1.0, forward_ms=1.0, backward_ms=1.0)
    plain = SectionErrors(forward=2e-3, gradients=1e-2)
    part = SectionRow("XSA", **times, plain_errors=plain, errors=plain._replace(forward=4e-3))
    assert verdict(sections=[part]).startswith("drop (XSA, forward error")
    nearly_zero = plain._replace(forward=1e-6)
    number = part._replace(plain_errors=nearly_zero, errors=nearly_zero._replace(forward=9e-4))
    assert verdict(sections=[number]).startswith("drop (XSA, forward error")
    assert verdict(sections=[number._replace(section=sections.OUTPUT_LAYER)]).startswith("keep")


def test_pairs_take_turns(monkeypatch):
    clock = [0.0]
    order = []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def runs(name, seconds):
        def both():
            order.append(name)
            clock[0] += seconds

        return SimpleNamespace(both=both)

    pairs = candidates.time_pairs(a_session(), runs("plain", 2.0), runs("other", 1.0))
    assert len(pairs) == 10
    assert all(math.isclose(plain, 2000) and math.isclose(other, 1000) for plain, other in pairs)
    assert order[:4] == ["other", "plain", "plain", "other"]


def test_a_script_says_which_parameters_are_matrices(monkeypatch):
    """A scale lies near 0.5; as a matrix, it would have a mean of zero."""
    model = t.GPT(a_session().h)

    def mean() -> float:
        return trainer.fill_weights(t, model).attn_scale.mean()

    assert mean() > 0.3
    table = [spec._replace(multiplies=True) if spec.name == "attn_scale" else spec for spec in t.PARAM_TABLE]
    monkeypatch.setattr(t, "PARAM_TABLE", table)
    assert abs(mean()) < 0.1  # measured: 0.0017


def test_older_tables_of_parameters_have_the_encoding_under_another_name():
    assert trainer.is_matrix(SimpleNamespace(), SimpleNamespace(name="kv", kind="int6"))
    assert not trainer.is_matrix(SimpleNamespace(), SimpleNamespace(name="kv", kind="f16"))


def test_the_reference_is_the_model_in_float64():
    s = a_session()
    model = trainer.fill_weights(t, t.GPT(s.h))
    tokens = torch.randint(s.h.vocab_size, (3, s.h.train_seq_len + 1))
    loss, grads = candidates.reference_of(s, SimpleNamespace(model=model), tokens)

    double = t.GPT(s.h, dtype=torch.float64).double()
    double.load_state_dict(model.state_dict())
    true = double.loss(tokens[:, :-1], tokens[:, 1:])
    true.backward()
    assert math.isclose(loss, true.item(), rel_tol=1e-6)  # measured: 7.8e-8
    assert set(grads) == dict(double.named_parameters()).keys()
    for name, p in double.named_parameters():
        assert exact.relative(grads[name], p.grad) < 1e-13, name  # measured: 4.2e-15
        assert p.grad.norm() > 0, name
