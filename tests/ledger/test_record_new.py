"""`record new` makes a folder that verifies, or refuses in one line and leaves nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fixtures_records as fx
from ledger import record_folder
from record_helpers import NAME, SEEDS, TRACK, fails, make, refuse, run, verdict, write_logs

ROOT = Path(__file__).resolve().parents[2]


def test_new_builds_a_folder_that_verifies(repo, capsys):
    logs = write_logs(repo / "more", loss=2.1)
    notes = repo / "notes.md"
    notes.write_text("## Why\nbecause\n")
    assert (
        run(
            repo,
            "new",
            "Next.1",
            "--logs",
            *logs,
            "--track",
            TRACK,
            "--parent",
            NAME,
            "--date",
            "2026-11-23",
            "--author",
            "B",
            "--blurb",
            "better",
            "--notes",
            notes,
        )
        == 0
    )
    place = repo / "records" / TRACK / "2026-11-23_Next.1"
    names = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert names == set(record_folder.FILES) | {f"logs/seed{seed}.txt" for seed in SEEDS}
    sub = json.loads((place / "submission.json").read_text())
    assert sub["parent"] == f"{TRACK}/{NAME}"
    assert sub["seeds"] == sorted(SEEDS)
    assert sub["record"] is True
    assert sub["val_loss"] == 2.1 and sub["val_loss_std"] == 0.0
    assert math.isclose(sub["val_bpb"], fx.bpb(2.1), rel_tol=1e-7)
    assert sub["bytes_total"] == 15_200_000 + max(SEEDS) + sub["bytes_code"]
    assert sub["seed_results"]["42"]["report"]["val_fineweb"] > sub["val_bpb"]
    assert (place / "train_gpt.py").read_text() == fx.SCRIPT
    assert json.loads((place / "config.json").read_text())["matrix_lr"] == 0.03
    assert "data_path" not in (place / "config.json").read_text()
    page = (place / "README.md").read_text()
    assert page.endswith("## Why\nbecause\n")
    assert "preset=h100x1 matrix_lr=0.03 data_path=DIR seed=42" in page
    wanted = (place / "requirements.txt").read_text()
    assert "torch==2.13.0  # the build was +cu130" in wanted
    assert "numpy==2.2.6" in wanted
    assert "triton==3.7.1" in wanted
    assert run(repo, "verify") == 0
    out = capsys.readouterr().out
    assert "2 folders" in out
    assert "nats, p" in out
    assert " fail  " not in out


def test_a_run_on_flash_attention_names_its_package(repo, capsys):
    pin = "flash-attn-4[cu13]==4.0.0b36"
    shutil.copy(ROOT / "requirements-flash4.txt", repo)
    place = make(repo, meta={"name": "Flash"}, attention="flash4")
    assert pin in (place / "requirements.txt").read_text()
    assert verdict(place)["requirements"][0] == "ok"
    assert pin not in (make(repo, meta={"name": "Plain"}) / "requirements.txt").read_text()


def test_a_reader_that_leaves_is_no_error():
    argv = [
        sys.executable,
        "-m",
        "ledger.record",
        "diff",
        *2 * [f"{ROOT}/records/track_cpu/2026-11-22_Laptop"],
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    with subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_new_is_deterministic(repo, tmp_path):
    first = {p.name: p.read_bytes() for p in (repo / "records" / TRACK / NAME).rglob("*") if p.is_file()}
    again = make(tmp_path / "again_repo", meta={})
    for path in again.rglob("*"):
        if path.is_file() and path.name != "requirements.txt":
            assert path.read_bytes() == first[path.name], path.name


def test_new_refuses(repo, capsys):
    logs = write_logs(repo / "more")
    track = ("--track", TRACK)
    refuse(repo, capsys, "exists", "new", "Base", "--logs", *logs, *track, "--date", "2026-11-22")
    for name in ("Two words", ".", "..", ".Hidden", "a/b", "Line\n", ""):
        refuse(repo, capsys, "letters, digits and dots", "new", name, "--logs", *logs, *track)
    refuse(repo, capsys, "not a date", "new", "X", "--logs", *logs, *track, "--date", "2026-13-01")
    refuse(repo, capsys, "no such folder", "new", "X", "--logs", *logs, *track, "--parent", "2020-01-01_None")
    refuse(repo, capsys, "cannot read", "new", "X", "--logs", *logs, "absent.txt", *track)
    refuse(repo, capsys, "run42.txt, run42.txt", "new", "X", "--logs", *logs, logs[0], *track)
    refuse(repo, capsys, "a record needs 3", "new", "X", "--logs", *logs[:2], *track)
    Path(logs[1]).write_text(fx.log_text(1337, source=fx.SCRIPT + "# changed\n"))
    refuse(repo, capsys, "source differs", "new", "X", "--logs", *logs, *track)
    Path(logs[1]).write_text(fx.log_text(1337, config={"matrix_lr": 0.5}))
    refuse(
        repo,
        capsys,
        "matrix_lr is 0.03 in run42.txt and 0.5 in run1337.txt",
        "new",
        "X",
        "--logs",
        *logs,
        *track,
    )
    Path(logs[1]).write_text(fx.log_text(1337, device="NVIDIA H200"))
    refuse(repo, capsys, "hardware differs", "new", "X", "--logs", *logs, *track)
    Path(logs[1]).write_text(fx.log_text(1337, artifact=16_000_000))
    refuse(repo, capsys, "over the cap", "new", "X", "--logs", *logs, *track)


def test_a_non_record_needs_one_seed_and_no_clock(repo, capsys):
    logs = write_logs(repo / "more", (7,), step_ms=400.0, device="cpu model")
    assert (
        run(repo, "new", "Slow", "--logs", *logs, "--track", TRACK, "--non-record", "--date", "2026-11-24")
        == 0
    )
    place = repo / "records" / TRACK / "2026-11-24_Slow"
    assert fails(place) == set()
    sub = json.loads((place / "submission.json").read_text())
    assert sub["val_bpb_std"] is None and sub["record"] is False
    assert "| **std** | - |" in (place / "README.md").read_text()
