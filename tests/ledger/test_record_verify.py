"""Every claim of `record verify` catches its fault, and submission.json has a schema."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ledger.prove import claim_table, record_claims
from ledger.read.schema import schema_errors, submission_schema
from tests.ledger import fixtures_records as fx
from tests.ledger.record_helpers import (
    NAME,
    TRACK,
    Fault,
    edit,
    edit_json,
    edit_log,
    failed_claims,
    log42,
    make,
    refuse,
    run,
    verdicts,
    write_logs,
)


def test_a_good_folder_passes(folder):
    assert {verdict for verdict, _ in verdicts(folder).values()} == {"ok"}


def spoil_log(pattern: str, new: str) -> Callable[[Path], None]:
    """Return a fault: a replacement in the log of seed 42."""
    return lambda folder: edit_log(log42(folder), pattern, new)


def spoil_json(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return a fault: a change of submission.json."""
    return lambda folder: edit_json(folder / "submission.json", change)


def lower_bpb(folder: Path) -> None:
    """Lower the final bpb wherever the log prints it, below what its loss allows."""
    text = log42(folder).read_text()
    printed = re.findall(r"^final_score .*val_bpb:(\S+)", text, flags=re.MULTILINE)[-1]
    log42(folder).write_text(text.replace(f"val_bpb:{printed}", f"val_bpb:{float(printed) - 0.01:.8f}"))


def second_log(folder: Path) -> None:
    """Add the log of seed 42 once more, under another name."""
    shutil.copy(log42(folder), folder / "logs" / "seed43.txt")


FAULTS = {
    "key missing": Fault("schema", spoil_json(lambda sub: sub.pop("val_bpb"))),
    "script is not text": Fault(
        "source", lambda folder: (folder / "train_gpt.py").write_bytes(b"x = 1 # \xff\n")
    ),
    "step line garbled": Fault("steps", spoil_log(r"^step:550/", "step:5x0/")),
    "seed not in config": Fault("seeds", spoil_log(r"^  seed: 42\n", "")),
    "triton of one log": Fault("numbers", spoil_log("Triton version 3.7.1", "Triton version 3.6.0")),
    "key unknown": Fault("schema", spoil_json(lambda sub: sub.update(mean_bpb=1.2))),
    "wrong type": Fault("schema", spoil_json(lambda sub: sub.update(bytes_total="15 MB"))),
    "not json": Fault("schema", lambda folder: (folder / "submission.json").write_text("{")),
    "date differs": Fault("name", spoil_json(lambda sub: sub.update(date="2026-11-21"))),
    "no picture": Fault("files", lambda folder: (folder / "loss.png").unlink()),
    "log missing": Fault("files", lambda folder: log42(folder).unlink()),
    "log extra": Fault("files", second_log),
    "helper module": Fault("files", lambda folder: (folder / "helper.py").write_text("x = 1\n")),
    "log cut": Fault("logs", spoil_log(r"^final_score .*\n", "")),
    "log is prose": Fault("logs", lambda folder: log42(folder).write_text("it went well\n")),
    "final_score twice": Fault("logs", spoil_log(r"^(final_score .*\n)", r"\1\1")),
    "line after final_score": Fault(
        "logs",
        lambda folder: log42(folder).write_text(log42(folder).read_text() + "more\n"),
    ),
    "script edited": Fault("source", lambda folder: edit(folder / "train_gpt.py", "0.025", "0.026")),
    "log source edited": Fault("source", lambda folder: edit(log42(folder), "0.025", "0.024")),
    "bpb typed": Fault("numbers", spoil_json(lambda sub: sub.update(val_bpb=sub["val_bpb"] - 0.0001))),
    "seed bpb typed": Fault("numbers", spoil_json(lambda sub: sub["seed_results"]["42"].update(val_bpb=1.0))),
    "steps in log edited": Fault("numbers", spoil_log("steps:1500", "steps:1400")),
    "hardware typed": Fault("numbers", spoil_json(lambda sub: sub.update(hardware="8xH100"))),
    "log config differs": Fault("config", spoil_log("^  matrix_lr: 0.03", "  matrix_lr: 0.04")),
    "config.json edited": Fault("config", lambda folder: edit(folder / "config.json", "0.03", "0.04")),
    "seed twice": Fault("seeds", second_log),
    "config seed differs": Fault("seeds", spoil_log("^  seed: 42", "  seed: 43")),
    "sum of bytes": Fault("bytes", spoil_log(r"bytes_total:\d{8}", "bytes_total:15000000")),
    "size lines disagree": Fault("bytes", spoil_log(r"^(Total submission size \S+) \d{8}", r"\1 15000001")),
    "artifact hash": Fault("artifacts", lambda folder: edit(folder / "artifact.sha256", "^.", "z")),
    "code size": Fault("code", spoil_log(r"bytes_code:\d\d+", "bytes_code:99")),
    "phases disagree": Fault("steps", spoil_log(r"train:2999\d\dms|train:300\d\d\dms", "train:290000ms")),
    "time goes back": Fault(
        "steps", spoil_log(r"^(step:500/20000 val_loss.*train_time:)\d+ms", r"\g<1>10ms")
    ),
    "step goes back": Fault("steps", spoil_log(r"^step:550/", "step:450/")),
    "average is off": Fault(
        "steps", spoil_log(r"^(step:500/20000 train_loss.*step_avg:)\S+", r"\g<1>100.00ms")
    ),
    "another stop": Fault("steps", spoil_log(r"^(stopping_early.*step:)1500", r"\g<1>1490")),
    "no stop": Fault("steps", spoil_log(r"^stopping_early.*\n", "")),
    "eval too long": Fault("clock", spoil_log("decompress:800ms", "decompress:580000ms")),
    "calibration counts": Fault("clock", spoil_log("calibrate:0ms", "calibrate:4700ms")),
    "score is another": Fault(
        "score", spoil_log(r"^(final_int6_sliding_window_exact .*val_bpb:)1", r"\g<1>0")
    ),
    "part of the split": Fault("score", spoil_log("^  val_tokens: 0", "  val_tokens: 1000")),
    "ratio": Fault("ratio", lower_bpb),
    "byte count": Fault("ratio", spoil_log(r"val_bytes:\d+", "val_bytes:157319833")),
    "hardware": Fault("hardware", spoil_log("device:NVIDIA H100", "device:NVIDIA H200")),
    "torch version": Fault(
        "requirements",
        lambda folder: edit(folder / "requirements.txt", "==2.13.0", "==2.9.1"),
    ),
    "FlashAttention-4 not named": Fault(
        "requirements", spoil_log("attention:cudnn", "attention:flash4+cudnn")
    ),
    "readme edited": Fault(
        "readme", lambda folder: edit(folder / "README.md", r"\*\*val_bpb 1", "**val_bpb 0")
    ),
    "readme row lost": Fault("readme", lambda folder: edit(folder / "README.md", r"^\| 1337 .*\n", "")),
    "notes marker lost": Fault("readme", lambda folder: edit(folder / "README.md", "^<!-- notes.*\n", "")),
    "no parent": Fault("parent", spoil_json(lambda sub: sub.update(parent="track_cpu/2020-01-01_None"))),
    "own parent": Fault("parent", spoil_json(lambda sub: sub.update(parent=f"{TRACK}/{NAME}"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_catches(folder, fault):
    planted = FAULTS[fault]
    planted.spoil(folder)
    verdict, evidence = verdicts(folder)[planted.claim]
    assert verdict == "fail", evidence
    assert "\n" not in evidence


@pytest.mark.parametrize(
    "change, claim, reason",
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
def test_verify_catches_consistent_faults(tmp_path, change, claim, reason):
    """The folder agrees with itself but breaks a rule."""
    (tmp_path / "records").mkdir()
    verdict, evidence = verdicts(make(tmp_path, **change))[claim]
    assert verdict == "fail"
    assert reason in evidence


class Replaced(NamedTuple):
    """A replacement in the script, and the claim that fails with it."""

    claim: str
    old: str
    new: str


BROKEN = {
    "no such module": Replaced(
        "import",
        "import dataclasses\n",
        "import dataclasses\nimport flash_attn_of_nowhere\n",
    ),
    "wants the environment": Replaced(
        "import",
        "import dataclasses\n",
        "import dataclasses, os\nos.environ['LOCAL_RANK']\n",
    ),
    "exits": Replaced("import", "import dataclasses\n", "import dataclasses, os\nos._exit(3)\n"),
    "nested f-string": Replaced("syntax", 'log("=" * 100)', "log(f'{\"a\" + f'{1}'}')"),
    "backslash in f-string": Replaced("syntax", 'log("=" * 100)', "log(f\"{'a\\n'.join([])}\")"),
    "generic syntax": Replaced("syntax", "def log_score(log, loss)", "def log_score[T](log: T, loss)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_verify_catches_scripts_that_do_not_import(folder, fault):
    replaced = BROKEN[fault]
    script = folder / "train_gpt.py"
    source = script.read_text()
    assert replaced.old in source
    broken = source.replace(replaced.old, replaced.new, 1)
    script.write_text(broken)
    for log in (folder / "logs").iterdir():
        log.write_text(log.read_text().replace(source, broken))
    assert replaced.claim in failed_claims(folder)


def test_new_refuses_a_script_that_does_not_import(repo, capsys):
    logs = write_logs(repo / "more", source="import nowhere_at_all\n" + fx.SCRIPT)
    refuse(repo, capsys, "does not import", "new", "X", "--logs", *logs, "--track", TRACK)


def test_one_step_over_the_limit_is_allowed_and_reported(tmp_path):
    (tmp_path / "records").mkdir()
    verdict, evidence = verdicts(make(tmp_path, step_ms=200.05))["clock"]
    assert verdict == "ok"
    assert "within one step" in evidence


def test_a_module_this_machine_lacks_is_not_a_fault(folder, monkeypatch):
    monkeypatch.setattr(
        record_claims, "probe_script", lambda *_: {"error": "ModuleNotFoundError: torch", "missing": "torch"}
    )
    found = verdicts(folder)
    assert {found[claim][0] for claim in ("code", "import", "readme")} == {"not checkable"}
    assert not failed_claims(folder)


def test_folder_name(folder):
    renamed = folder.rename(folder.with_name("2026-11-22_two-words"))
    assert "name" in failed_claims(renamed)


def test_every_claim_has_a_planted_fault():
    planted = {fault.claim for fault in [*FAULTS.values(), *BROKEN.values()]}
    assert planted == set(claim_table.RECORD_CLAIMS)


def test_an_edited_curve_is_found(folder):
    assert "every line as hashed" in verdicts(folder)["logs"][1]
    edit_log(log42(folder), r"^(step:\d+/\d+ train_loss:)", r"\g<1>0")
    wanted = ("fail", "seed42.txt: not the log of this record, its log_sha256 differs")
    assert verdicts(folder)["logs"] == wanted


def test_a_record_without_hashes_of_its_logs_says_so(folder):
    def drop_hashes(sub: dict) -> None:
        for result in sub["seed_results"].values():
            del result["log_sha256"]

    edit_json(folder / "submission.json", drop_hashes)
    found = verdicts(folder)
    assert found["logs"][0] == found["numbers"][0] == found["schema"][0] == "ok"
    assert found["logs"][1].endswith("their curves are not covered")


def test_verify_verb(repo, folder, capsys):
    claims = len(claim_table.RECORD_CLAIMS)
    assert run(repo, "verify", NAME, "--quiet") == 0
    assert capsys.readouterr().out == f"1 folder: {claims} ok, 0 fail, 0 not checkable\n"

    edit(folder / "config.json", "0.03", "0.04")
    assert run(repo, "verify", "--quiet") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split()[:2] == ["fail", "config"]

    assert run(repo, "verify", "2020-01-01_Nothing") == 2
    assert run(repo, "verify", "Base") == 1

    make(repo, meta={"name": "Base", "date": "2026-11-23"})
    capsys.readouterr()
    assert run(repo, "verify", "Base") == 2
    assert "more than one folder" in capsys.readouterr().err


def test_schema_checker():
    with pytest.raises(ValueError, match="does not know"):
        schema_errors(1, {"maximum": 3})
    assert schema_errors(True, {"type": "integer"})
    assert not schema_errors(None, {"type": ["null"]})
    assert schema_errors([1, 1], {"uniqueItems": True})
    assert schema_errors({}, {"minProperties": 1})
    assert set(submission_schema()["required"]) == set(submission_schema()["properties"])
