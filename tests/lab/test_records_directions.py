"""The measurement of directions: figures against hand computations, and a folder that proves itself."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as t
from lab import directions
from lab.update import cases, quality, times
from lab.update.cases import Part, Portion
from ledger import folders, record
from ledger.make import direction_tables
from ledger.prove import direction_claims
from ledger.read import direction_log
from progress import Progress
from script import TRAINER, BadInput
from tests.helpers import english_dataset, machine, tiny

MARKERS = """# R

<!-- board:start -->
<!-- board:end -->

<!-- directions:start -->
old
<!-- directions:end -->
end
"""
SETUP = cases.Setup(t, tiny(), machine(), print, True, Progress("directions"))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)], ids=str)
def test_the_exact_factor_has_no_error(shape):
    u = draw(*shape)
    f = quality.factor_of(u)
    got = quality.quality_of(f.U @ f.Vh, f)
    assert got.polar < 1e-13 and got.orth < 1e-13  # measured: 2.1e-15
    assert math.isclose(got.cosine, 1, abs_tol=1e-12)  # measured: 0
    assert math.isclose(got.efficiency, 1, abs_tol=1e-12)  # measured: 0
    torch.testing.assert_close(got.band, torch.ones(24, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_a_factor_with_known_singular_values(shape):
    u = draw(*shape)
    s = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
    f = quality.factor_of(u)
    got = quality.quality_of(f.U @ s.diag() @ f.Vh, f)
    torch.testing.assert_close(got.band, s)
    by_hand = dict(
        polar=((s - 1).square().sum() / 20).sqrt(), orth=((s.square() - 1).square().sum() / 20).sqrt(),
        cosine=s.sum() / (s.norm() * 20**0.5), efficiency=(f.S * s).sum() / (f.S.sum() * 1.5),
    )  # fmt: skip
    for key, value in by_hand.items():
        assert math.isclose(getattr(got, key), value.item(), rel_tol=1e-9), key  # measured: 0


def test_the_factor_of_another_matrix_is_seen():
    f = quality.factor_of(draw(30, 30))
    other = quality.factor_of(draw(30, 30, seed=1))
    got = quality.quality_of(other.U @ other.Vh, f)
    assert got.orth < 1e-13  # measured: 1.7e-15
    assert abs(got.cosine) < 0.2  # measured: 0.01
    assert got.polar > 1.2


def test_a_line_pools_matrices_and_refuses_nan():
    f = quality.factor_of(draw(8, 8))
    line = quality.quality_line([quality.quality_of(scale * f.U @ f.Vh, f) for scale in (0.5, 2.0)])
    pairs = dict(direction_log.PAIR.findall(line))
    assert pairs["smin"] == "0.500000"
    assert pairs["smax"] == "2.000000"
    assert pairs["s50"] == "1.250000"
    assert pairs["polar"] == "0.750000" and pairs["matrices"] == "2"
    figures = quality.quality_of(f.U @ f.Vh, f)._replace(polar=math.nan)
    with pytest.raises(ArithmeticError):
        quality.quality_line([figures])


def test_families_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)

    def spectrum(name):
        return torch.linalg.svdvals(quality.FAMILIES[name]((20, 30), generator))

    torch.testing.assert_close(spectrum("log1e3").log10(), torch.linspace(0, -3, 20, dtype=torch.float64))
    torch.testing.assert_close(1 / spectrum("harmonic"), torch.arange(1, 21, dtype=torch.float64))
    rows = quality.FAMILIES["heavy_rows"]((400, 30), generator).norm(dim=1)
    assert rows.max() / rows.median() > 5
    seen = [(family, tuple(u.shape)) for family, u in quality.synthetic(SETUP)]
    h = SETUP.h
    assert ("gaussian", (2, h.mlp_dim, h.model_dim)) in seen and len(seen) == 13


def test_flops_by_hand():
    bank = cases.Bank("x", 3, 8, 20)
    step = 3 * (2 * 8 * 8 * 20 * 2 + 2 * 8**3)
    assert cases.direction_flops(t, "ns5", bank.shape) == 5 * step
    assert cases.direction_flops(t, "polar_express4", bank.shape) == 4 * step
    assert cases.direction_flops(t, "ns5", bank._replace(rows=20, columns=8).shape) == 5 * step
    assert cases.direction_flops(t, "mud", bank.shape) == 3 * (2 * 8 * 8 * 20 + 8 * 8 * 20)


def test_an_eighth_is_the_largest_share():
    h = t.load_config([], {})
    setup = SETUP._replace(h=h)
    assert {x.name: x.count for x in cases.banks_of(setup, Portion.EIGHTH)} == {
        "mlp_up_bank": 3, "qo_bank": 3, "kv_bank": 3}  # fmt: skip
    assert {x[1:] for x in cases.banks_of(setup, Portion.ALL)} == {
        (11, 2048, 512), (11, 512, 2048), (22, 512, 512), (22, 256, 512)}  # fmt: skip


@pytest.mark.parametrize("rule", t.STEP_RULES)
def test_the_timed_call_is_the_trainers_update(rule):
    sets = cases.input_sets(SETUP, Portion.ALL)
    assert len(sets) >= 4
    assert len({x["W"].data_ptr() for one in sets for x in one}) == 4 * len(sets)
    case = cases.TimedCase(Part.UPDATE, Portion.ALL, "turbo", rule)
    before = [x["W"].clone() for x in sets[0]]
    with torch.no_grad():
        for call in cases.calls_of(SETUP, case, sets, cases.uncompiled)[0]:
            call()
    for x, old in zip(sets[0], before):
        assert not torch.equal(x["W"], old) and torch.isfinite(x["W"]).all()
    assert [
        call() for call in cases.calls_of(SETUP, case._replace(part="direction"), sets, cases.uncompiled)[0]
    ]


def test_the_state_of_a_rule_is_found_in_older_scripts_as_well():
    """They list it in RULE_STATE, or have rules without state only."""
    for rule, row in t.STEP_RULES.items():
        assert cases.state_shape_of(t, rule) is row.state_shape
    rules = {"muon": t.step_muon, "normuon": t.step_muon}
    older = SimpleNamespace(STEP_RULES=rules, RULE_STATE={"normuon": t.neuron_shape})
    assert cases.state_shape_of(older, "normuon") is t.neuron_shape
    assert cases.state_shape_of(older, "muon") is None
    assert cases.state_shape_of(SimpleNamespace(STEP_RULES=rules), "normuon") is None


def test_each_case_is_its_own():
    weights = {}
    for change in ({}, {"cautious": 1}, {"row": "ns5"}, {"rule": "normuon"}):
        sets = cases.input_sets(SETUP, Portion.ALL)  # seeded: the same numbers each time
        case = cases.TimedCase(Part.UPDATE, Portion.ALL, "turbo")._replace(**change)
        with torch.no_grad():
            cases.calls_of(SETUP, case, sets, cases.uncompiled)[0][0]()
        weights[case] = sets[0][0]["W"]
    changed = list(weights)
    assert not any(torch.equal(weights[a], weights[b]) for i, a in enumerate(changed) for b in changed[:i])


@pytest.mark.parametrize("part", Part)
def test_a_case_compiles_once_per_bank_whatever_the_inputs(part):
    """A CUDA graph needs all of it in one piece, and nothing left to compile for the other sets."""
    compiler = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend="eager")
    sets = cases.input_sets(SETUP, Portion.EIGHTH)
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    with torch.no_grad():
        for calls in cases.calls_of(
            SETUP, cases.TimedCase(part, Portion.EIGHTH, "ns5", "normuon"), sets, compiler
        ):
            [call() for call in calls]
    assert stats["unique_graphs"] - before == 3  # of an eighth: MLP-up stands for both
    torch._dynamo.reset()


def test_children_share_out_every_case():
    every = cases.all_cases(SETUP)
    shared = cases.case_groups(every)
    assert sorted(sum(shared, [])) == sorted(every) and len(set(every)) == len(every)
    assert len(shared) == len(t.ORTHO) + len(t.STEP_RULES)


def test_an_unknown_field_is_named(monkeypatch):
    fields = {name: torch.Tensor for name in (*t.StepScalars._fields, "novelty")}
    monkeypatch.setattr(t, "StepScalars", typing.NamedTuple("StepScalars", fields.items()))
    with pytest.raises(BadInput, match="StepScalars.novelty"):
        cases.step_scalars(SETUP)
    monkeypatch.setattr(t, "matrix_update", lambda W, novelty: None)
    with pytest.raises(BadInput, match=r"matrix_update\(novelty\)"):
        cases.update_arguments(SETUP, {"W": 1})


def test_the_clock_keeps_the_order():
    said = dict(direction_log.PAIR.findall(times.quartiles([4.0, 1.0, 3.0, 2.0, 5.0])))
    assert said == {
        "median_ms": "3.00000",
        "min_ms": "1.00000",
        "q1_ms": "2.00000",
        "q3_ms": "4.00000",
        "n": "5",
    }
    turns = []
    assert len(times.measure([lambda: turns.append(0), lambda: turns.append(1)], False)) >= 30
    assert turns[:6] == [0, 1] * 3


# ---------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Make a repository with one tiny measurement, with real momentum; one row fails on purpose."""
    root = tmp_path_factory.mktemp("measured")
    (root / "records").mkdir()
    (root / "README.md").write_text(MARKERS)
    (root / "records" / "README.md").write_text(MARKERS)
    data = english_dataset()
    knobs = [f"data_path={data.path}", f"vocab_size={data.vocab_size}"]
    patch = pytest.MonkeyPatch()
    patch.setattr(times, "REPLAYS", 3)
    patch.setattr(directions, "load_measured", broken_script)
    try:
        assert directions.main(["--root", str(root), "--tiny", "--steps", "3", *knobs]) == 0
    finally:
        patch.undo()
    return root


LOAD = directions.load_measured


def broken_script(path):
    """Return the repository's script with one more direction, which raises."""
    module = LOAD(path)

    def whiten(X):
        raise RuntimeError("no kernel at /some/where/kernel.py\nsecond line")

    module.ORTHO["broken"] = whiten
    return module


@pytest.fixture
def repo(measured, tmp_path) -> Path:
    shutil.copytree(measured, tmp_path / "repo")
    return tmp_path / "repo"


def folder_of(repo: Path) -> Path:
    (folder,) = (repo / "records" / "directions").iterdir()
    return folder


def run(root: Path, *argv) -> int:
    return record.main(["--root", str(root), *map(str, argv)])


def doctor(path: Path, pattern: str, new: str) -> None:
    """Replace the first match of the pattern, which must be in the file."""
    text = path.read_text()
    assert re.search(pattern, text), pattern
    path.write_text(re.sub(pattern, new, text, count=1))


def log_of(repo: Path) -> dict:
    """Return the log of the measurement, read back."""
    return direction_log.parse((folder_of(repo) / "log.txt").read_text())


def test_every_file_is_there(repo):
    folder = folder_of(repo)
    assert sorted(path.name for path in folder.iterdir()) == list(direction_tables.FILES)
    assert (folder / "spectrum.png").read_bytes()[:4] == b"\x89PNG"


def test_every_direction_and_rule_is_timed(repo):
    log = log_of(repo)
    assert direction_log.names(log, "row") == [*t.ORTHO, "broken"]
    assert direction_log.names(log, "rule") == list(t.STEP_RULES)
    times = [
        (x["part"], x["share"], x["row"]) for x in log["time"] if (x["rule"], x["cautious"]) == ("muon", 0)
    ]
    assert sorted(times) == sorted(
        (*measured, row) for measured in direction_tables.TITLES for row in t.ORTHO
    )
    ruled = {(x["rule"], x["cautious"]) for x in log["time"] if x["row"] == "ns5" and x["part"] == "update"}
    assert ruled == {(rule, 0) for rule in t.STEP_RULES} | {("muon", 1)}


def test_every_direction_has_its_quality_on_every_input(repo):
    log = log_of(repo)
    inputs = {(q["family"], q["shape"]) for q in log["quality"]}
    assert {family for family, _ in inputs} == {*quality.FAMILIES, "momentum"}
    assert len(inputs) == 17
    assert len(log["quality"]) == len(inputs) * len(t.ORTHO)
    assert log["real"][0]["steps"] == 3
    assert log["real"][0]["loss"] < 7

    found = {(q["row"], q["family"], q["shape"]): q for q in log["quality"]}
    ns5 = found["ns5", "gaussian", "32x96"]
    assert 0.65 < ns5["smin"] < ns5["smax"] < 1.22
    assert ns5["cosine"] > 0.98
    assert found["polar_express", "gaussian", "32x96"]["polar"] < 0.15  # measured: 0.092
    assert found["mud", "log1e3", "32x32"]["polar"] > 0.15

    curve = next(curve for curve in log["curve"] if curve["row"] == "polar_express")
    assert curve["input"][0] == 1
    assert math.isclose(curve["input"][-1], 1e-3, rel_tol=1e-9)  # measured: 0
    assert all(0.7 < value < 1.2 for value in curve["along"])


def test_a_direction_that_fails_is_listed_with_its_reason(repo):
    folder = folder_of(repo)
    tables = (folder / "tables.md").read_text()
    assert all(f"\n| {name} |" in tables for name in (*t.ORTHO, *t.STEP_RULES, "broken"))
    assert "no kernel at kernel.py" in tables
    assert "/some" not in (folder / "log.txt").read_text()


def test_a_noisy_measurement_is_said_in_one_line(repo, tmp_path, capsys):
    """Only the time whose median is three times its least is named."""
    log = (folder_of(repo) / "log.txt").read_text()
    calm = re.sub(r"median_ms:\S+ min_ms:\S+", "median_ms:2.0 min_ms:1.0", log)
    noisy = calm.replace("median_ms:2.0", "median_ms:3.0", 1)
    for text, lines in ((calm, 0), (noisy, 1)):
        file = tmp_path / "log.txt"
        file.write_text(text)
        assert directions.main(["--log", str(file), "--out", str(tmp_path / "out")]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "noisy machine" in line]
        assert len(said) == lines
    first = re.search(r"^time part:(\S+) share:(\S+) row:(\S+) rule:(\S+) .*mode:(\S+)", noisy, re.M)
    assert " ".join(first.groups()) in said[0]


def test_derived_figures_by_hand(repo):
    log = log_of(repo)
    row = next(x for x in log["time"] if (x["part"], x["row"]) == ("update", "ns5"))
    work = [w["gflop"] for w in log["work"] if (w["row"], w["share"]) == ("ns5", row["share"])]
    rates = [x["tflops"] for x in log["bmm"] if x["share"] == row["share"]]
    assert math.isclose(row["gflop"], sum(work), abs_tol=1e-3)  # measured: 7.3e-5
    assert math.isclose(row["tflops"], row["gflop"] / row["median_ms"], abs_tol=1e-4)  # measured: 5.6e-6
    # Measured: 4.8e-7.
    assert math.isclose(row["bmm_ms"], sum(w / r for w, r in zip(work, rates)), abs_tol=1e-5)
    numel = sum(x["matrices"] * x["rows"] * x["columns"] for x in log["bmm"] if x["share"] == row["share"])
    # Measured: 2.1e-6.
    assert math.isclose(row["memory_ms"], 22 * numel / 1e6 / log["copy"][0]["gbps"], abs_tol=1e-4)


@pytest.mark.parametrize("cuda", [False, True])
def test_products_are_timed_together_on_fresh_inputs(monkeypatch, cuda):
    """Launches hide small products: on a GPU one graph holds all calls, each on its own input."""
    bank = cases.Bank("b", 3, 8, 4)
    seen = []
    graphs = []
    setup = SimpleNamespace(cuda=cuda, m=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32))
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: seen.append((x, y)) or real(x, y))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(times, "cache_bytes", lambda b: 50 * 96 * 4 if b.cuda else 0)

    def graphs_of(sets, fork):
        graphs.append(sets)
        return [SimpleNamespace(replay=times.one_by_one(one)) for one in sets]

    monkeypatch.setattr(times, "graphs_of", graphs_of)
    monkeypatch.setattr(times, "measure", lambda calls, on: [call() for call in calls] and [9.0, 1.0, 5.0])
    rounds = 100 if cuda else times.PRODUCTS  # twice the cache, 20 calls at least
    assert times.products_ms(setup, bank) == 5.0 / rounds
    assert [len(one) for sets in graphs for one in sets] == [rounds] * cuda
    assert len({y.data_ptr() for _, y in seen[1::2]}) == rounds == len(seen) / 2
    assert all(y.shape == (3, 4, 8) for _, y in seen[1::2])


def test_board_and_verify(repo, capsys):
    folder = folder_of(repo)
    assert run(repo, "verify") == 1 and "record board" in capsys.readouterr().out
    assert run(repo, "board") == 0
    page = (repo / "records" / "README.md").read_text()
    assert "old" not in page
    assert page.endswith("end\n")
    assert f"directions/{folder.name}/tables.md" in page
    assert "| mud2 |" in page and run(repo, "board") == 0
    assert (repo / "records" / "README.md").read_text() == page
    capsys.readouterr()
    assert run(repo, "verify") == 0 and run(repo, "verify", folder) == 0
    assert "6 ok, 0 fail" in capsys.readouterr().out


@pytest.mark.parametrize("file, pattern, new, claim", [
    ("tables.md", r"\| ns5 \| \d", "| ns5 | 9", "tables"),
    ("result.json", r'"cosine": 0', '"cosine": 9', "result"),
    ("log.txt", r"median_ms:\d", "median_ms:9999", "figures"),
    ("log.txt", r"polar:0", "polar:9", "result"),
    ("log.txt", r"time part:direction share:all row:mud .*\n", "", "rows"),
    ("log.txt", r"quality row:mud .*\n", "", "rows"),
    ("log.txt", r"done .*\n", "", "log"),
    ("../../README.md", r"\| turbo \| \d", "| turbo | 9", "board"),
])  # fmt: skip
def test_a_doctored_number_is_caught(repo, capsys, file, pattern, new, claim):
    assert run(repo, "board") == 0
    doctor(folder_of(repo) / file, pattern, new)
    capsys.readouterr()
    assert run(repo, "verify", "--quiet") == 1
    assert any(line.split()[:2] == ["fail", claim] for line in capsys.readouterr().out.splitlines())


def test_missing_and_foreign_files(repo, capsys):
    folder = folder_of(repo)
    (folder / "spectrum.png").unlink()
    assert ("fail", "files") in [row[:2] for row in direction_claims.examine_measurement(folder)]

    # The same log once more gives a second folder, which is complete.
    log = folder / "log.txt"
    assert directions.main(["--root", str(repo), "--log", str(log)]) == 0
    second = folder.with_name(folder.name + "_2")
    device = folders.MEASUREMENT_NAME.match(folder.name)[2]
    assert direction_tables.newest(repo / "records") == {device: second}
    assert run(repo, "board") == 0
    assert {row[0] for row in direction_claims.examine_measurement(second)} == {"ok"}
    log.write_text("nothing")
    assert directions.main(["--root", str(repo), "--log", str(log)]) == 2
    (repo / "records" / "README.md").write_text("<!-- board:start -->\n<!-- board:end -->\n")
    assert run(repo, "board") == 2 and "directions:start" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path, capsys):
    for argv in (
        ["no_such=1"],
        ["data_path=" + str(tmp_path / "absent")],
        ["--script", str(tmp_path / "x.py")],
    ):
        assert directions.main(["--tiny", "--out", str(tmp_path / "out"), *argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("record: ") and err.count("\n") == 1
        assert not list((tmp_path / "out").glob("*"))
        assert not list((tmp_path / "out").glob(".*"))


def test_another_copy_of_the_script_leaves_the_first_its_operators():
    first = sys.modules["train_gpt"]
    again = directions.load_measured(TRAINER)
    assert sys.modules["train_gpt"] is first is t and again is not t
    with FakeTensorMode():
        for copy in (t, again):
            a = torch.empty(8, 16)
            w = torch.empty(24, 16)
            assert copy.mlp_op(a, w).shape == (8, 24)


@pytest.mark.gpu
def test_graphs_on_a_gpu(tmp_path):
    assert directions.main(["--tiny", "--out", str(tmp_path), "--seconds", "0"]) == 0
    (folder,) = tmp_path.iterdir()
    log = direction_log.parse((folder / "log.txt").read_text())
    done = {(x["part"], x["share"], x["row"]) for x in log["time"] if x["mode"] == "graph4"}
    assert len(done) == 4 * len(t.ORTHO), log.get("skip")
    assert log["warm"][0]["failed"] == 0


def test_names_of_devices_and_reasons():
    assert direction_log.device_slug("NVIDIA H100 80GB HBM3") == "H100-80GB-HBM3"
    text = cases.reason(OSError("cannot open /a/b-1/c.so: gone\nmore"))
    assert text == "OSError: cannot open c.so: gone"
    assert json.loads(direction_tables.result_text({"time": []})) == {"schema": 1, "time": []}
