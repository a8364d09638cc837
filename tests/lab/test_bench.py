"""The bench command: everything that it measures, its report, its refusals, its modules' imports."""

from __future__ import annotations

import ast
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import train_gpt as t
from lab import bench
from lab.shared import timing, trainer
from lab.step import parts
from older_scripts import machine_names
from progress import Progress
from tests.helpers import english_args, machine, refused_by, stop_one_line
from tests.lab.lab_helpers import SECTIONS, WHOLE, run_bench

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tools" / "lab"
pytestmark = pytest.mark.usefixtures("quick_bench")


def test_the_command_measures_everything(tmp_path, capfd):
    """Through train_gpt.py: summary lines, both passes of every section, sums, a machine-readable copy."""
    file = tmp_path / "b.json"
    argv = list(sys.argv)
    assert t.main(["bench", "--json", str(file), *english_args()]) == 0
    assert sys.argv == argv
    out = capfd.readouterr().out
    report = json.loads(file.read_text())

    assert [whole["name"] for whole in report["whole"]] == WHOLE
    for name in WHOLE:
        times = r"median [\d.]+ ms, min [\d.]+, max [\d.]+"
        line = rf"^bench {re.escape(name)}: {times} \(device \S+, attention cpu\)$"
        assert re.search(line, out, re.M), name
    rows = report["sections"]
    passes = [(name, which) for name in SECTIONS for which in ("forward", "backward")]
    assert [(row["section"], row["which"]) for row in rows] == passes
    assert math.isclose(report["sums"]["floors_ms"], sum(row["floor_ms"] * row["count"] for row in rows))
    assert report["rates"]["copy_gbps"] > 0
    assert all(product["tflops"] > 0 for product in report["rates"]["products"])
    assert [x["what"] for x in report["skipped"]] == ["sustained steps", "profile"]
    assert report["config"]["num_layers"] == 2
    assert re.search(r"^MLP +backward +2 ", out, re.M)
    assert "sum of floors" in out


@pytest.mark.parametrize("times, noisy", [([1.0, 2.9, 9.0], False), ([1.0, 3.0, 3.1], True)])
def test_a_noisy_machine_is_said_in_one_line(times, noisy, tmp_path, capsys, monkeypatch):
    """A median of three times the least. The line names the timings; the report has all of them."""
    monkeypatch.setattr(parts, "wall_times", lambda s, fn, before=None: times)
    monkeypatch.setattr(timing, "host_times", lambda calls: [1.0, 1.0, 1.0])
    report, out = run_bench([], tmp_path, capsys)
    said = [line for line in out.splitlines() if "noisy machine" in line]
    assert report["noisy"] == (WHOLE if noisy else [])
    assert len(said) == noisy
    if noisy:
        shown = ", ".join(WHOLE[: timing.SHOWN])
        assert f"3 times the least or more in {shown} and {len(WHOLE) - timing.SHOWN} more;" in said[0]


def test_a_noisy_section_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parts, "wall_times", lambda s, fn, before=None: [1.0])
    monkeypatch.setattr(timing, "host_times", lambda calls: [1.0, 5.0, 5.0])
    report, _ = run_bench([], tmp_path, capsys)
    assert report["noisy"][0] == "copy" and report["noisy"][1].startswith("product ")
    assert {"MLP forward", "MLP forward+backward", "bank casts backward"} <= set(report["noisy"])


def test_bad_input_is_one_line(tmp_path, capfd):
    empty = tmp_path / "c.py"
    empty.write_text("CANDIDATES = {}\n")
    named = tmp_path / "d.py"
    named.write_text("CANDIDATES = {'a': ('mlp', t.mlp)}\n")
    for argv, word in [
        (["sead=1"], "sead"),
        (["--fast"], "--fast"),
        (["--json", str(tmp_path / "no" / "b.json")], "no such folder"),
        (["--json", str(tmp_path)], "is a folder"),
        (["--json", ""], "the name is empty"),
        (["--candidates", str(tmp_path / "none.py")], "none.py"),
        (["--candidates", str(empty)], "CANDIDATES"),
        (["--only", "a"], "--candidates"),
        (["--candidates", str(named), "--only", "b"], "which has a"),
        (["--seconds", "soon"], "--seconds"),
        (["--all"], "--candidates FILE.py"),
        (["--sustain", "-1"], "-1"),
        (["--sustain", "nan"], "number of seconds"),
        (["--sustain", "2", "--attention"], "leave out"),
        (["--sustain", "2", "--timeline", "x"], "leave out"),
        (["--sustain", "2", "--candidates", "x"], "--all"),
    ]:
        said = refused_by(bench.main, capfd, *argv)
        assert said.startswith("bench.py: "), said
        assert word in said, said
    assert stop_one_line(["bench", "sead=1"], capfd).startswith("bench.py: ")
    assert t.main(["bench", "--help"]) == 0
    assert "--candidates FILE.py" in capfd.readouterr().out


def test_a_script_without_the_tool_says_where_it_is(tmp_path):
    script = shutil.copy(t.__file__, tmp_path / "train_gpt.py")
    command = [sys.executable, script, "bench"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done
    assert f"run ./run.sh bench --script {script} KEY=VALUE" in done.stderr


def test_a_script_from_before_a_renaming_can_be_measured(monkeypatch):
    path = ROOT / "records" / "track_h100x1_5min" / "2026-11-27_CopyOutput" / "train_gpt.py"
    older = trainer.load_trainer(path, "an_older_script")
    monkeypatch.delitem(sys.modules, "an_older_script")
    assert older.capture_pass is older.bind_pass
    report = trainer.open_session(older, ["preset=cpu"], {}, Progress("opening", speaks=False)).report
    torch.distributed.destroy_process_group()
    ours = machine_names(machine())
    assert report["device"] == report["machine"]["device"] == platform.machine()
    assert set(ours) == {*report["machine"], "times"}
    assert [report["machine"][part] for part in ours if part not in ("device", "times")] == [
        "cpu",
        "torch",
        "torch",
        "none",
        "eager",
        "eager",
    ]


def test_it_runs_as_a_module():
    """Without a path of the caller's: PYTHONPATH=tools python -m lab.bench, from any folder."""
    env = os.environ | dict(PYTHONPATH=str(ROOT / "tools"))
    command = [sys.executable, "-m", "lab.bench", "--all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=env, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bench.py: --all needs --candidates FILE.py"), done.stderr


def lab_modules():
    """Return {dotted name: path} of the lab's modules, those in its rooms included."""
    paths = {path: path.relative_to(LAB.parent).with_suffix("").parts for path in sorted(LAB.rglob("*.py"))}
    return {".".join(parts): path for path, parts in paths.items() if parts[-1] != "__init__"}


def imports_of(path):
    """Return the dotted names that a module of the lab imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_parts_import_in_a_line_and_never_a_command():
    modules = lab_modules()
    imports = {name: imports_of(path) & set(modules) for name, path in modules.items()}
    list(TopologicalSorter(imports).static_order())  # CycleError names a circle
    assert imports["lab.bench"] >= {"lab.model.attention", "lab.step.sustained", "lab.step.timeline"}
    commands = {name for name in modules if name.count(".") == 1}
    assert commands == {
        f"lab.{name}" for name in ("bench", "codecs", "directions", "encodings", "layouts", "sweep", "wire")
    }
    assert not [name for name in modules if imports[name] & commands]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    file = tmp_path / "b.json"
    started = time.perf_counter()
    knobs = ["preset=h100x1_sp1024", "train_batch_tokens=98304", "micro_batch_tokens=98304"]
    assert bench.main(["--json", str(file), *knobs], {}) == 0
    report = json.loads(file.read_text())
    assert [x["what"] for x in report["skipped"]] in ([], ["loader"])
    assert time.perf_counter() - started < 120

    row = report["sustained"]
    assert row["fixed_ms"] > 0
    assert "why" in row["gpu"] or (row["gpu"]["sm_mhz"] > 0 and row["gpu"]["samples"] > 5)
    classes = {row["which"] for row in report["profile"]["classes"]}
    assert classes >= {"attention", "matrix products", "Inductor pointwise"}
