"""The ledger: every verb works on made-up logs, and every claim of `verify` catches its fault."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fixtures_records as fx
import pytest

from ledger import diff, record, record_claims, record_folder, runlog, stats
from ledger.board import BOARD
from ledger.schema import schema_errors, submission_schema

ROOT = Path(__file__).resolve().parents[2]

TRACK, SEEDS, NAME = "track_h100x1_5min", (42, 1337, 2025), "2026-11-22_Base"
META = {
    "name": "Base",
    "author": "A. Person",
    "github_id": "aperson",
    "date": "2026-11-22",
    "track": TRACK,
    "record": True,
    "parent": None,
    "blurb": "a first | one",
}
MARKERS = "# Title\n\n<!-- board:start -->\nold\n<!-- board:end -->\n\nlast line\n"


def write_logs(folder: Path, seeds=SEEDS, **change) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"run{seed}.txt").write_text(fx.log_text(seed, **change), encoding="utf-8")
    return [str(folder / f"run{seed}.txt") for seed in seeds]


def make(root: Path, seeds=SEEDS, meta=None, **change) -> Path:
    """A folder as `new` writes it, its claims not examined."""
    meta = {**META, **(meta or {})}
    runs = [runlog.parse_log(Path(log)) for log in write_logs(root / f"logs_{meta['name']}", seeds, **change)]
    place = root / "records" / meta["track"] / f"{meta['date']}_{meta['name']}"
    record_folder.build(place, runs, meta, "what changed\n", root)
    return place


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """One good record in a repository of its own; tests that change things work on a copy."""
    root = tmp_path_factory.mktemp("pristine")
    (root / "records").mkdir()
    (root / "requirements.txt").write_text("torch==2.13.0\nnumpy==2.2.6\nsentencepiece==0.2.3\n")
    (root / "README.md").write_text(MARKERS)
    (root / "records" / "README.md").write_text(MARKERS)
    make(root)
    return root


@pytest.fixture
def repo(pristine, tmp_path) -> Path:
    shutil.copytree(pristine, tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture
def folder(repo) -> Path:
    return repo / "records" / TRACK / NAME


def run(root: Path, *argv) -> int:
    return record.main(["--root", str(root), *map(str, argv)])


def verdict(folder: Path) -> dict[str, tuple[str, str]]:
    return {
        claim: (status, evidence)
        for status, claim, evidence in record_claims.examine_record(folder, folder.parent.parent)
    }


def fails(folder: Path) -> set[str]:
    return {claim for claim, (status, _) in verdict(folder).items() if status == "fail"}


def edit(path: Path, pattern: str, new: str, count: int = 1) -> None:
    text, done = re.subn(pattern, new, path.read_text(encoding="utf-8"), count=count, flags=re.MULTILINE)
    assert done, f"{pattern} is not in {path.name}"
    path.write_text(text, encoding="utf-8")


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2) + "\n")


# ---- reading logs --------------------------------------------------------------------------------


def test_parse_is_not_fooled_by_the_source(tmp_path):
    parsed = runlog.parse_log(Path(write_logs(tmp_path, (42,))[0]))
    assert parsed.source == fx.SCRIPT
    assert parsed.seed == 42 and parsed.final_scores == 1 and not parsed.over_cap
    assert parsed.steps[0].total == 20000 and parsed.steps[-1].step == 1500
    assert parsed.config["data_path"] == "somewhere/corpus" and parsed.versions["torch"] == "2.13.0+cu130"
    assert parsed.hardware == "1 x NVIDIA H100 80GB HBM3" and parsed.weights_format == "int6"
    assert parsed.sizes["peak"] == 21471 and parsed.text("phase_times", "compile") == "45678ms"


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "not a training log"),
        ("hello\n" * 50, "not a training log"),
        (fx.SCRIPT + fx.SEPARATOR + "\nother\n" + fx.SEPARATOR + "\n", "Running Python"),
    ],
)
def test_no_log(tmp_path, text, says):
    path = tmp_path / "x.txt"
    path.write_text(text)
    with pytest.raises(runlog.BadInput, match=says):
        runlog.parse_log(path)


@pytest.mark.parametrize(
    "pattern, new, says",
    [
        (r"^final_score .*\n", "", "the run did not finish"),
        (r"^(final_score .*)steps:1500", r"\1steps:many", "steps:many is not a number"),
        (r"^(final_score .*val_bpb:)\S+", r"\1nan", "diverged"),
        (r"^Serialized.*\n", "", "artifact size"),
    ],
)
def test_new_names_the_broken_log(repo, capsys, pattern, new, says):
    logs = write_logs(repo / "more")
    edit_log(Path(logs[1]), pattern, new)
    assert run(repo, "new", "Other", "--logs", *logs, "--track", TRACK) == 2
    error = capsys.readouterr().err
    assert says in error and "run1337.txt" in error and error.count("\n") == 1
    assert sorted(p.name for p in (repo / "records" / TRACK).iterdir()) == [NAME]
    assert not list((repo / "records").glob(".new*"))


# ---- new -----------------------------------------------------------------------------------------


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
    assert sub["parent"] == f"{TRACK}/{NAME}" and sub["seeds"] == sorted(SEEDS) and sub["record"] is True
    assert sub["val_loss"] == 2.1 and sub["val_loss_std"] == 0.0
    assert math.isclose(sub["val_bpb"], fx.bpb(2.1), rel_tol=1e-7)
    assert sub["bytes_total"] == 15_200_000 + max(SEEDS) + sub["bytes_code"]
    assert sub["seed_results"]["42"]["report"]["val_fineweb"] > sub["val_bpb"]
    assert (place / "train_gpt.py").read_text() == fx.SCRIPT
    assert json.loads((place / "config.json").read_text())["matrix_lr"] == 0.03
    assert "data_path" not in (place / "config.json").read_text()
    page = (place / "README.md").read_text()
    assert page.endswith("## Why\nbecause\n") and "preset=h100x1 matrix_lr=0.03 data_path=DIR seed=42" in page
    wanted = (place / "requirements.txt").read_text()
    assert (
        "torch==2.13.0  # the build was +cu130" in wanted
        and "numpy==2.2.6" in wanted
        and "triton==3.7.1" in wanted
    )
    assert run(repo, "verify") == 0
    out = capsys.readouterr().out
    assert "2 folders" in out and "nats, p" in out and " fail  " not in out


def test_a_run_on_flash_attention_names_its_package(repo, capsys):
    pin = "flash-attn-4[cu13]==4.0.0b36"
    shutil.copy(ROOT / "requirements-flash4.txt", repo)
    place = make(repo, meta={"name": "Flash"}, attention="flash4")
    assert pin in (place / "requirements.txt").read_text() and verdict(place)["requirements"][0] == "ok"
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


def refuse(repo, capsys, says, *argv) -> None:
    before = sorted(p.name for p in (repo / "records").rglob("*"))
    assert run(repo, *argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err + captured.out and captured.err.count("\n") == 1
    assert sorted(p.name for p in (repo / "records").rglob("*")) == before


def test_new_refuses(repo, capsys):
    logs, track = write_logs(repo / "more"), ("--track", TRACK)
    refuse(repo, capsys, "exists", "new", "Base", "--logs", *logs, *track, "--date", "2026-11-22")
    refuse(repo, capsys, "letters, digits and dots", "new", "Two words", "--logs", *logs, *track)
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


# ---- verify: every claim and its fault -----------------------------------------------------------


def test_a_good_folder_passes(folder):
    assert {status for status, _ in verdict(folder).values()} == {"ok"}


def edit_log(path: Path, pattern: str, new: str) -> None:
    """Edits what the run wrote; the source at the head stays."""
    source, mark, said = path.read_text(encoding="utf-8").partition(fx.SEPARATOR)
    said, done = re.subn(pattern, new, said, count=1, flags=re.MULTILINE)
    assert done, f"{pattern} is not in {path.name}"
    path.write_text(source + mark + said, encoding="utf-8")


def log42(folder: Path) -> Path:
    return folder / "logs" / "seed42.txt"


def spoil_log(pattern: str, new: str):
    return lambda folder: edit_log(log42(folder), pattern, new)


def spoil_json(change):
    return lambda folder: edit_json(folder / "submission.json", change)


def both_scores(folder: Path) -> None:
    """A better bpb than the loss allows, told the same way everywhere in the log."""
    text = log42(folder).read_text()
    told = re.findall(r"^final_score .*val_bpb:(\S+)", text, flags=re.MULTILINE)[-1]
    log42(folder).write_text(text.replace(f"val_bpb:{told}", f"val_bpb:{float(told) - 0.01:.8f}"))


def second_log(folder: Path) -> None:
    shutil.copy(log42(folder), folder / "logs" / "seed43.txt")


def rename(folder: Path, name: str) -> None:
    folder.rename(folder.with_name(name))


FAULTS = {
    "key missing": ("schema", spoil_json(lambda sub: sub.pop("val_bpb"))),
    "script is not text": ("source", lambda folder: (folder / "train_gpt.py").write_bytes(b"x = 1 # \xff\n")),
    "step line garbled": ("steps", spoil_log(r"^step:550/", "step:5x0/")),
    "seed not in config": ("seeds", spoil_log(r"^  seed: 42\n", "")),
    "triton of one log": ("numbers", spoil_log("Triton version 3.7.1", "Triton version 3.6.0")),
    "key unknown": ("schema", spoil_json(lambda sub: sub.update(mean_bpb=1.2))),
    "wrong type": ("schema", spoil_json(lambda sub: sub.update(bytes_total="15 MB"))),
    "not json": ("schema", lambda folder: (folder / "submission.json").write_text("{")),
    "date differs": ("name", spoil_json(lambda sub: sub.update(date="2026-11-21"))),
    "no picture": ("files", lambda folder: (folder / "loss.png").unlink()),
    "log missing": ("files", lambda folder: log42(folder).unlink()),
    "log extra": ("files", second_log),
    "helper module": ("files", lambda folder: (folder / "helper.py").write_text("x = 1\n")),
    "log cut": ("logs", spoil_log(r"^final_score .*\n", "")),
    "log is prose": ("logs", lambda folder: log42(folder).write_text("it went well\n")),
    "final_score twice": ("logs", spoil_log(r"^(final_score .*\n)", r"\1\1")),
    "line after final_score": (
        "logs",
        lambda folder: log42(folder).write_text(log42(folder).read_text() + "more\n"),
    ),
    "script edited": ("source", lambda folder: edit(folder / "train_gpt.py", "0.025", "0.026")),
    "log source edited": ("source", lambda folder: edit(log42(folder), "0.025", "0.024")),
    "bpb typed": ("numbers", spoil_json(lambda sub: sub.update(val_bpb=sub["val_bpb"] - 0.0001))),
    "seed bpb typed": ("numbers", spoil_json(lambda sub: sub["seed_results"]["42"].update(val_bpb=1.0))),
    "steps in log edited": ("numbers", spoil_log("steps:1500", "steps:1400")),
    "hardware typed": ("numbers", spoil_json(lambda sub: sub.update(hardware="8xH100"))),
    "log config differs": ("config", spoil_log("^  matrix_lr: 0.03", "  matrix_lr: 0.04")),
    "config.json edited": ("config", lambda folder: edit(folder / "config.json", "0.03", "0.04")),
    "seed twice": ("seeds", second_log),
    "config seed differs": ("seeds", spoil_log("^  seed: 42", "  seed: 43")),
    "sum of bytes": ("bytes", spoil_log(r"bytes_total:\d{8}", "bytes_total:15000000")),
    "size lines disagree": ("bytes", spoil_log(r"^(Total submission size \S+) \d{8}", r"\1 15000001")),
    "artifact hash": ("artifacts", lambda folder: edit(folder / "artifact.sha256", "^.", "z")),
    "code size": ("code", spoil_log(r"bytes_code:\d\d+", "bytes_code:99")),
    "phases disagree": ("steps", spoil_log(r"train:2999\d\dms|train:300\d\d\dms", "train:290000ms")),
    "time goes back": ("steps", spoil_log(r"^(step:500/20000 val_loss.*train_time:)\d+ms", r"\g<1>10ms")),
    "step goes back": ("steps", spoil_log(r"^step:550/", "step:450/")),
    "average is off": ("steps", spoil_log(r"^(step:500/20000 train_loss.*step_avg:)\S+", r"\g<1>100.00ms")),
    "another stop": ("steps", spoil_log(r"^(stopping_early.*step:)1500", r"\g<1>1490")),
    "no stop": ("steps", spoil_log(r"^stopping_early.*\n", "")),
    "eval too long": ("clock", spoil_log("decompress:800ms", "decompress:580000ms")),
    "calibration counts": ("clock", spoil_log("calibrate:0ms", "calibrate:4700ms")),
    "score is another": ("score", spoil_log(r"^(final_int6_sliding_window_exact .*val_bpb:)1", r"\g<1>0")),
    "part of the split": ("score", spoil_log("^  val_tokens: 0", "  val_tokens: 1000")),
    "ratio": ("ratio", both_scores),
    "byte count": ("ratio", spoil_log(r"val_bytes:\d+", "val_bytes:157319833")),
    "hardware": ("hardware", spoil_log("device:NVIDIA H100", "device:NVIDIA H200")),
    "torch version": (
        "requirements",
        lambda folder: edit(folder / "requirements.txt", "==2.13.0", "==2.9.1"),
    ),
    "FlashAttention-4 not named": ("requirements", spoil_log("attention:cudnn", "attention:flash4+cudnn")),
    "readme edited": ("readme", lambda folder: edit(folder / "README.md", r"\*\*val_bpb 1", "**val_bpb 0")),
    "readme row lost": ("readme", lambda folder: edit(folder / "README.md", r"^\| 1337 .*\n", "")),
    "notes marker lost": ("readme", lambda folder: edit(folder / "README.md", "^<!-- notes.*\n", "")),
    "no parent": ("parent", spoil_json(lambda sub: sub.update(parent="track_cpu/2020-01-01_None"))),
    "own parent": ("parent", spoil_json(lambda sub: sub.update(parent=f"{TRACK}/{NAME}"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_catches(folder, fault):
    claim, spoil = FAULTS[fault]
    spoil(folder)
    got = verdict(folder)
    assert got[claim][0] == "fail", got[claim]
    assert "\n" not in got[claim][1]


@pytest.mark.parametrize(
    "change, claim, says",
    [
        ({"artifact": 15_999_900}, "bytes", "over the cap"),
        ({"step_ms": 200.3}, "clock", "more than one step"),
        ({"world": 8}, "hardware", "needs 1 x H100"),
        ({"seeds": (1, 2)}, "seeds", "a record needs 3"),
        (
            {
                "source": fx.SCRIPT.replace(
                    "import dataclasses\n", "import dataclasses\nopen('x', 'w').close()\n", 1
                )
            },
            "import",
            "writes x",
        ),
        (
            {"source": fx.SCRIPT.replace("import dataclasses\n", "import dataclasses\nprint('hi')\n", 1)},
            "import",
            "prints",
        ),
    ],
)
def test_verify_catches_consistent_faults(tmp_path, change, claim, says):
    """The whole folder agrees with itself, and is still no record."""
    (tmp_path / "records").mkdir()
    status, evidence = verdict(make(tmp_path, **change))[claim]
    assert status == "fail" and says in evidence


BROKEN = {
    "no such module": (
        "import",
        "import dataclasses\n",
        "import dataclasses\nimport flash_attn_of_nowhere\n",
    ),
    "wants the environment": (
        "import",
        "import dataclasses\n",
        "import dataclasses, os\nos.environ['LOCAL_RANK']\n",
    ),
    "exits": ("import", "import dataclasses\n", "import dataclasses, os\nos._exit(3)\n"),
    "nested f-string": ("syntax", 'log("=" * 100)', "log(f'{\"a\" + f'{1}'}')"),
    "backslash in f-string": ("syntax", 'log("=" * 100)', "log(f\"{'a\\n'.join([])}\")"),
    "generic syntax": ("syntax", "def log_score(log, loss)", "def log_score[T](log: T, loss)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_verify_catches_scripts_that_do_not_import(folder, fault):
    claim, old, new = BROKEN[fault]
    script = folder / "train_gpt.py"
    source = script.read_text()
    assert old in source
    broken = source.replace(old, new, 1)
    script.write_text(broken)
    for log in (folder / "logs").iterdir():
        log.write_text(log.read_text().replace(source, broken))
    assert claim in fails(folder)


def test_new_refuses_a_script_that_does_not_import(repo, capsys):
    logs = write_logs(repo / "more", source="import nowhere_at_all\n" + fx.SCRIPT)
    refuse(repo, capsys, "does not import", "new", "X", "--logs", *logs, "--track", TRACK)


def test_one_step_over_the_limit_is_allowed_and_said(tmp_path):
    (tmp_path / "records").mkdir()
    status, evidence = verdict(make(tmp_path, step_ms=200.05))["clock"]
    assert status == "ok" and "within one step" in evidence


def test_a_module_this_machine_lacks_is_not_a_fault(folder, monkeypatch):
    monkeypatch.setattr(
        record_claims, "probe_script", lambda *_: {"error": "ModuleNotFoundError: torch", "missing": "torch"}
    )
    got = verdict(folder)
    assert {got[claim][0] for claim in ("code", "import", "readme")} == {"not checkable"} and not fails(
        folder
    )


def test_folder_name(folder):
    rename(folder, "2026-11-22_two-words")
    assert "name" in fails(folder.with_name("2026-11-22_two-words"))


def test_every_claim_has_a_planted_fault():
    planted = {claim for claim, *_ in [*FAULTS.values(), *BROKEN.values()]}
    assert planted == set(record_claims.CLAIMS)


def test_verify_verb(repo, folder, capsys):
    assert run(repo, "verify", NAME, "--quiet") == 0
    assert capsys.readouterr().out == "1 folder: 21 ok, 0 fail, 0 not checkable\n"
    edit(folder / "config.json", "0.03", "0.04")
    assert run(repo, "verify", "--quiet") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split()[:2] == ["fail", "config"]
    assert run(repo, "verify", "2020-01-01_Nothing") == 2
    assert run(repo, "verify", "Base") == 1
    make(repo, meta={"name": "Base", "date": "2026-11-23"})
    capsys.readouterr()
    assert run(repo, "verify", "Base") == 2 and "more than one folder" in capsys.readouterr().err


# ---- schema --------------------------------------------------------------------------------------


def test_schema_checker():
    with pytest.raises(ValueError, match="does not know"):
        schema_errors(1, {"maximum": 3})
    assert schema_errors(True, {"type": "integer"}) and not schema_errors(None, {"type": ["null"]})
    assert schema_errors([1, 1], {"uniqueItems": True}) and schema_errors({}, {"minProperties": 1})
    assert set(submission_schema()["required"]) == set(submission_schema()["properties"])


# ---- board ---------------------------------------------------------------------------------------


def test_board(repo, capsys):
    make(repo, loss=2.0, meta={"name": "Best", "date": "2026-11-23"})
    make(repo, seeds=(5,), meta={"name": "Idea", "record": False})
    assert run(repo, "board") == 0
    top, all_of_it = (repo / "README.md").read_text(), (repo / "records" / "README.md").read_text()
    assert top.startswith("# Title\n") and top.endswith("last line\n") and "old" not in top
    assert top.index("[Best](records/track_h100x1_5min/2026-11-23_Best/)") < top.index("[Base](records")
    assert "Idea" not in top and "[Idea](track_h100x1_5min/2026-11-22_Idea/)" in all_of_it
    assert "a first \\| one" in top and "history.png" in all_of_it
    assert (repo / "records" / "history.png").read_bytes()[:4] == b"\x89PNG"
    before = (repo / "records" / "history.png").read_bytes()
    assert run(repo, "board") == 0
    assert (repo / "README.md").read_text() == top and (
        repo / "records" / "history.png"
    ).read_bytes() == before


def test_board_without_markers_or_records(repo, folder, capsys):
    (repo / "README.md").write_text("no markers\n")
    assert run(repo, "board") == 2
    error = capsys.readouterr().err
    assert str(repo / "README.md") in error and error.count("\n") == 1
    assert (repo / "records" / "README.md").read_text() == MARKERS and not (
        repo / "records" / "history.png"
    ).exists()
    shutil.rmtree(folder)
    (repo / "README.md").write_text(MARKERS)
    assert run(repo, "board") == 0 and "No records yet." in (repo / "README.md").read_text()


def test_the_repositorys_own_ledger():
    assert run(ROOT, "verify", "--quiet") == 0
    page = (ROOT / "records" / "README.md").read_text()
    assert page.count(BOARD.start) == 1 and page.count(BOARD.end) == 1


# ---- plot, diff, compare, reproduce --------------------------------------------------------------


def test_plot(repo, folder, tmp_path, capsys):
    log = tmp_path / "run.txt"
    text = fx.log_text(3)
    log.write_text(text[: text.index("step:700/20000 train_loss") + 20])  # cut in the middle of a line
    assert run(repo, "plot", log) == 0 and log.with_suffix(".png").stat().st_size > 5000
    assert run(repo, "plot", log, NAME) == 2
    assert run(repo, "plot", log, NAME, "--out", tmp_path / "both.png") == 0
    log.write_text(text[: text.index("step:0/20000")])
    assert run(repo, "plot", log) == 2
    assert "nothing to plot" in capsys.readouterr().err
    assert run(repo, "plot", tmp_path / "absent.txt") == 2


def test_diff(repo, folder, tmp_path, capsys):
    source = fx.SCRIPT.replace("return lzma.compress", "return b'' + lzma.compress")
    source = source.replace("# 2. Artifact: what the code weighs.", "# 2. Artifact: its weight.")
    source = source.replace('"""A stand-in trainer.', '"""Another stand-in.')
    other = make(repo, meta={"name": "Other"}, source=source, config={"matrix_lr": 0.01, "eval_stride": 32})
    assert run(repo, "diff", NAME, other) == 0
    out = capsys.readouterr().out
    assert (
        "matrix_lr: 0.03 -> 0.01" in out and "eval_stride: 64 -> 32" in out and "2 of 5 values differ" in out
    )
    assert "== Artifact: +1 -1, 1 comment-only lines not shown" in out and "+    return b'' + lzma" in out
    assert "its weight" not in out and "Another" not in out and "\x1b" not in out
    assert "source: +1 -1 lines, 2 more differ in comments only" in out
    page = tmp_path / "diff.html"
    assert run(repo, "diff", folder / "train_gpt.py", other, "--html", page) == 0
    assert "<table" in page.read_text() and "not compared" in page.read_text()
    assert run(repo, "diff", NAME, NAME) == 0 and "source: +0 -0" in capsys.readouterr().out


def test_diff_of_sections_that_come_and_go():
    a = "x = 1\n# " + "-" * 77 + "\n# 1. Old: gone.\ny = 1\n"
    b = "x = 1\n# " + "-" * 77 + "\n# 1. New: here.\nz = 1\n"
    out = diff.source_diff(a, b)
    assert "== New (new section): +1 -0, 2 comment-only lines not shown" in out
    assert any(line.startswith("== Old (removed)") for line in out)


def test_compare(repo, capsys):
    make(repo, meta={"name": "Better"}, loss=2.1)
    make(repo, meta={"name": "One"}, seeds=(42,))
    assert run(repo, "compare", NAME, "2026-11-22_Better") == 0
    out = capsys.readouterr().out
    assert "3 shared" in out and "one-sided Welch): yes" in out and out.count("paired") == 3
    assert run(repo, "compare", NAME, NAME) == 0 and "one-sided Welch): no" in capsys.readouterr().out
    assert run(repo, "compare", NAME, "2026-11-22_One") == 0 and "not checkable" in capsys.readouterr().out


def test_statistics():
    assert math.isclose(stats.t_quantile(0.975, 2), 4.302652729749456, rel_tol=1e-9)
    assert math.isclose(stats.t_cdf(-2.0, 5), 0.05096973941492917, rel_tol=1e-9)
    assert math.isclose(stats.t_cdf(3.0, 1), 0.5 + math.atan(3.0) / math.pi, rel_tol=1e-12)
    # Welch's own kind of example, checked by hand: means 3 and 4, variances 2.5 and 10
    test = stats.welch([1, 2, 3, 4, 5], [0, 2, 4, 6, 8])
    assert test.diff == 1.0 and math.isclose(test.error, math.sqrt(2.5)) and math.isclose(test.df, 100 / 17)
    assert stats.welch([1.0], [2.0, 3.0]) is None and stats.std([1.0]) is None
    same = stats.paired([1.0, 2.0], [1.5, 2.5])
    assert same.error == 0.0 and same.p_two_sided() == 0.0 and same.interval() == (0.5, 0.5)
    assert stats.paired([1.0, 2.0], [1.0, 2.0]).p_two_sided() == 1.0


def test_reproduce(repo, folder, tmp_path, capfd):
    assert run(repo, "reproduce", NAME, "--dry-run", "--data", tmp_path) == 0
    out = capfd.readouterr().out
    assert (
        f"train preset=h100x1 matrix_lr=0.03 data_path={tmp_path} seed=42" in out and "differs  data" in out
    )
    assert run(repo, "reproduce", NAME, "--data", tmp_path) == 2
    assert "is not the data of the record" in capfd.readouterr().err
    for log in (folder / "logs").iterdir():
        edit(log, "manifest_sha256:a+", "manifest_sha256:none")
    edit_json(folder / "submission.json", lambda sub: sub.update(data_manifest_sha256="none", val_bpb=1.26))
    assert run(repo, "reproduce", NAME, "--seed", "7") == 0
    assert "\nreproduced: val_bpb 1.26007" in capfd.readouterr().out
    edit_json(folder / "submission.json", lambda sub: sub.update(val_bpb=1.2))
    assert run(repo, "reproduce", NAME) == 1
    assert "\nnot reproduced: val_bpb 1.26002, recorded 1.20000" in capfd.readouterr().out
