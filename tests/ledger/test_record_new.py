"""`record new` makes a folder that verifies, or refuses in one line and leaves nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ledger.make import record_folder, submission
from ledger.read import runlog, scores
from ledger.read.schema import schema_errors, submission_schema
from ledger.read.scores import Score
from tests.ledger import fixtures_records as fx
from tests.ledger.record_helpers import (
    NAME,
    SEEDS,
    TRACK,
    edit,
    failed_claims,
    make,
    refuse,
    run,
    verdicts,
    write_logs,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def next_folder(repo) -> Path:
    """Make the record Next.1, with every option of `new`, and return its folder."""
    logs = write_logs(repo / "more", loss=2.1)
    notes = repo / "notes.md"
    notes.write_text("## Why\nbecause\n")
    options = [
        *("--track", TRACK, "--parent", NAME, "--date", "2026-11-23"),
        *("--author", "B", "--blurb", "better", "--notes", notes),
    ]
    assert run(repo, "new", "Next.1", "--logs", *logs, *options) == 0
    return repo / "records" / TRACK / "2026-11-23_Next.1"


def test_new_makes_a_folder_that_verifies(repo, next_folder, capsys):
    names = {str(path.relative_to(next_folder)) for path in next_folder.rglob("*") if path.is_file()}
    assert names == set(record_folder.FILES) | {f"logs/seed{seed}.txt" for seed in SEEDS}

    assert run(repo, "verify") == 0
    out = capsys.readouterr().out
    assert "2 folders" in out
    assert "nats, p" in out
    assert " fail  " not in out


def test_new_takes_figures_from_the_logs(next_folder):
    sub = json.loads((next_folder / "submission.json").read_text())
    assert sub["parent"] == f"{TRACK}/{NAME}"
    assert sub["seeds"] == sorted(SEEDS)
    assert sub["record"] is True
    assert sub["val_loss"] == 2.1
    assert sub["val_loss_std"] == 0.0
    assert math.isclose(sub["val_bpb"], fx.bpb(2.1), rel_tol=1e-7)  # measured: 0
    assert sub["bytes_total"] == 15_200_000 + max(SEEDS) + sub["bytes_code"]
    assert sub["seed_results"]["42"]["report"]["val_fineweb"] > sub["val_bpb"]


def test_a_new_score_is_one_row_and_leaves_older_records_as_they_are(repo, monkeypatch, tmp_path):
    """The schema takes its key, the page its column, and a record whose runs lack it stays as it was."""
    wide = Score("int6 wide", "final_{weights}_wide_exact", metric="wide", key="wide_val_bpb", note="Wide.")
    monkeypatch.setattr(scores, "SCORES", (*scores.SCORES, wide))
    monkeypatch.setattr(submission, "SCORES", scores.SCORES)
    older = runlog.parse_log(next((repo / "records").rglob("seed42.txt")))
    assert "wide_val_bpb" not in submission.seed_result(older)

    real = fx.log_text
    line = f"final_int6_wide_exact val_loss:2.00000000 val_bpb:{fx.bpb(2.0):.8f}\nfinal_score "

    def log_text(*args, **change):
        source, rule, rest = real(*args, **change).rpartition(fx.SEPARATOR)
        return source + rule + re.sub("^final_score ", line, rest, flags=re.M)

    monkeypatch.setattr(fx, "log_text", log_text)
    (tmp_path / "requirements.txt").write_text("numpy==2.2.6\n")
    folder = make(tmp_path)
    stored = json.loads((folder / "submission.json").read_text())
    assert {result["wide_val_bpb"] for result in stored["seed_results"].values()} == {round(fx.bpb(2.0), 8)}
    assert "| int6 wide |" in (folder / "README.md").read_text()
    assert not [claim for claim in verdicts(folder).values() if claim[0] == "fail"]

    stored["seed_results"]["42"]["wide_bpb"] = 1.19
    errors = schema_errors(stored, submission_schema())
    assert errors == ["submission.seed_results.42: key 'wide_bpb' is not in the schema"]


def test_new_writes_what_it_takes_to_train_again(next_folder):
    assert (next_folder / "train_gpt.py").read_text() == fx.SCRIPT
    config = (next_folder / "config.json").read_text()
    assert json.loads(config)["matrix_lr"] == 0.03
    assert "data_path" not in config

    page = (next_folder / "README.md").read_text()
    assert "preset=h100x1 matrix_lr=0.03 data_path=DIR seed=42" in page
    assert page.endswith("## Why\nbecause\n")

    requirements = (next_folder / "requirements.txt").read_text()
    assert "torch==2.13.0  # the build was +cu130" in requirements
    assert "numpy==2.2.6" in requirements
    assert "triton==3.7.1" in requirements


def test_a_run_on_flash_attention_names_its_package(repo, capsys):
    pin = "flash-attn-4[cu13]==4.0.0b36"
    shutil.copy(ROOT / "requirements-flash4.txt", repo)
    flash = make(repo, meta={"name": "Flash"}, attention="flash4")
    assert pin in (flash / "requirements.txt").read_text()
    assert verdicts(flash)["requirements"][0] == "ok"

    plain = make(repo, meta={"name": "Plain"})
    assert pin not in (plain / "requirements.txt").read_text()


def test_seeds_may_differ_in_how_often_they_were_checkpointed(repo):
    logs = write_logs(repo / "mixed", config={"checkpoint_every": 0.0, "resume": ""})
    edit(Path(logs[1]), "^  checkpoint_every: 0.0", "  checkpoint_every: 60.0")
    edit(Path(logs[2]), "^  resume:.*", "  resume: auto")
    common = submission.common_config([runlog.parse_log(Path(log)) for log in logs])
    assert common["checkpoint_every"] == 0.0 and common["resume"] == ""


def test_a_reader_that_leaves_is_no_error():
    folder = f"{ROOT}/records/track_cpu/2026-11-22_Laptop"
    argv = [sys.executable, "-m", "ledger.record", "diff", folder, folder]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    with subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_new_is_deterministic(repo, tmp_path):
    first = {p.name: p.read_bytes() for p in (repo / "records" / TRACK / NAME).rglob("*") if p.is_file()}
    again = make(tmp_path / "again_repo", meta={})
    for path in again.rglob("*"):
        if path.is_file() and path.name != "requirements.txt":
            assert path.read_bytes() == first[path.name], path.name


@pytest.mark.parametrize("name", ["Two words", ".", "..", ".Hidden", "a/b", "Line\n", "", "n" * 300])
def test_new_refuses_a_name_that_is_no_folder_name(repo, capsys, name):
    logs = write_logs(repo / "more")
    refuse(repo, capsys, "letters, digits and dots", "new", name, "--logs", *logs, "--track", TRACK)


def test_new_refuses_bad_arguments(repo, capsys):
    logs = write_logs(repo / "more")

    def refuse_new(reason, name, logs, *options):
        refuse(repo, capsys, reason, "new", name, "--logs", *logs, "--track", TRACK, *options)

    refuse_new("exists", "Base", logs, "--date", "2026-11-22")
    refuse_new("not a day of this century", "X", logs, "--date", "2026-13-01")
    refuse_new("no such folder", "X", logs, "--parent", "2020-01-01_None")
    refuse_new("cannot read", "X", [*logs, "absent.txt"])
    refuse_new("run42.txt, run42.txt", "X", [*logs, logs[0]])
    refuse_new("a record needs 3", "X", logs[:2])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"source": fx.SCRIPT + "# changed\n"}, "source differs"),
        ({"config": {"matrix_lr": 0.5}}, "matrix_lr is 0.03 in run42.txt and 0.5 in run1337.txt"),
        ({"device": "NVIDIA H200"}, "hardware differs"),
        ({"artifact": 16_000_000}, "over the cap"),
    ],
)
def test_new_refuses_a_log_that_does_not_belong(repo, capsys, change, reason):
    logs = write_logs(repo / "more")
    Path(logs[1]).write_text(fx.log_text(1337, **change))
    refuse(repo, capsys, reason, "new", "X", "--logs", *logs, "--track", TRACK)


def test_a_non_record_needs_one_seed_and_no_clock(repo):
    logs = write_logs(repo / "more", (7,), step_ms=400.0, device="cpu model")
    options = ["--track", TRACK, "--non-record", "--date", "2026-11-24"]
    assert run(repo, "new", "Slow", "--logs", *logs, *options) == 0

    folder = repo / "records" / TRACK / "2026-11-24_Slow"
    assert failed_claims(folder) == set()
    sub = json.loads((folder / "submission.json").read_text())
    assert sub["val_bpb_std"] is None
    assert sub["record"] is False
    assert "| **std** | - |" in (folder / "README.md").read_text()
