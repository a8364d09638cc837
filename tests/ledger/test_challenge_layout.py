"""Submissions in the challenge's layout, sound and with the failures that published ones have had.

What `record verify` owes any folder: a line per claim, no traceback, and nothing called ok that was not
looked at. Of the challenge's layout it names the failures that published folders have had, and runs no code.
"""

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest

from ledger import record, runlog
from ledger.challenge_claims import is_challenge_folder
from ledger.dialects import parse_published_log
from ledger.record_claims import CLAIMS
from ledger.schema import schema_errors, submission_schema
from ledger.tracks import CAP_BYTES

ROOT = Path(__file__).resolve().parents[2]

FIXTURES = ROOT / "tests" / "fixtures" / "challenge"
EARLY, SECOND, PHASED = DIALECTS = (
    "2026-03-22_EarlyDialect",
    "2026-04-05_SecondDialect",
    "2026-04-27_PhasedDialect",
)
ROW = re.compile(r"  (ok|fail|not checkable) +(\w+) +(\S.*)")


@pytest.fixture
def place(tmp_path):
    """copy(name): a fixture below a ledger of its own."""

    def copy(name):
        folder = tmp_path / "records" / "track_10min_16mb" / name
        shutil.copytree(FIXTURES / name, folder)
        return folder

    return copy


def verify(folder, capsys):
    """({claim: (status, evidence)}, exit status). Whatever the folder holds: a row per claim, no more."""
    status = record.main(["--root", str(folder.parents[2]), "verify", str(folder)])
    said = capsys.readouterr()
    assert not said.err and "Traceback" not in said.out
    head, *rows, total = said.out.splitlines()
    found = [ROW.fullmatch(row) for row in rows]
    assert all(found), [row for row, match in zip(rows, found) if not match]
    assert [match[2] for match in found] == list(CLAIMS)
    assert total.startswith("1 folder: ")
    return {match[2]: (match[1], match[3]) for match in found}, status


def edit(folder, **changes):
    """submission.json with keys replaced; None removes one."""
    file = folder / "submission.json"
    sub = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in sub.items() if v is not None}))


def edit_logs(folder, pattern, change):
    """Each match of the pattern in every log replaced by change(match)."""
    for log in folder.glob("train_seed*.log"):
        text, count = re.subn(pattern, change, log.read_text())
        assert count, f"{log.name} has nothing like {pattern}"
        log.write_text(text)


# ---------------------------------------------------------------- the faults


def oversize(folder):
    """Artifact and code over the cap, in log and json alike."""
    sub = json.loads((folder / "submission.json").read_text())
    over = 800_000
    edit(
        folder,
        bytes_total=sub["bytes_total"] + over,
        seed_results={
            seed: e | {"artifact_bytes": e["artifact_bytes"] + over}
            for seed, e in sub["seed_results"].items()
        },
    )
    edit_logs(
        folder,
        r"((?:Serialized model|Total submission size) \S+\+\S+: )(\d+)",
        lambda m: m[1] + str(int(m[2]) + over),
    )


def oversize_for_one_seed(folder):
    """Only the log of one seed is over the cap; the json says the size of another."""
    log = folder / "train_seed1337.log"
    text, count = re.subn(r"(Total submission size \S+: )\d+", r"\g<1>16004321", log.read_text())
    assert count == 1
    log.write_text(text)


def seeds_as_dict(folder):
    sub = json.loads((folder / "submission.json").read_text())
    edit(
        folder,
        seeds={
            str(seed): entry["val_bpb"] for seed, entry in zip(sub["seeds"], sub["seed_results"].values())
        },
    )


def bpb_as_loss(folder):
    edit(folder, val_bpb=None, val_loss=json.loads((folder / "submission.json").read_text())["val_bpb"])


def another_script(folder):
    with open(folder / "train_gpt.py", "a") as f:
        f.write("\nLEARNING_RATE = 0.04\n")


def one_seed(folder):
    for seed in (1337, 2024):
        (folder / f"train_seed{seed}.log").unlink()
    entry = json.loads((folder / "submission.json").read_text())["seed_results"]["42"]
    edit(folder, seeds=[42], seed_results={"42": entry}, val_bpb=entry["val_bpb"], val_loss=entry["val_loss"])


def seconds_601(folder):
    edit_logs(folder, r"(wallclock_cap train_time: ?)\d+", lambda m: f"{m[1]}601153")


def other_bpb(folder):
    """The json's figure is better than the logs'."""
    edit(folder, val_bpb=json.loads((folder / "submission.json").read_text())["val_bpb"] - 0.01)


def no_submission(folder):
    (folder / "submission.json").unlink()


def no_logs(folder):
    for log in folder.glob("*.log"):
        log.unlink()


def no_script(folder):
    (folder / "train_gpt.py").unlink()


def nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


FAULTS = {
    f.__name__: f
    for f in (
        oversize,
        oversize_for_one_seed,
        seeds_as_dict,
        bpb_as_loss,
        another_script,
        one_seed,
        seconds_601,
        other_bpb,
        no_submission,
        no_logs,
        no_script,
        nothing,
    )
}


FAILS = {
    "none": set(),
    "oversize": {"bytes"},
    "oversize_for_one_seed": {"bytes"},
    "seeds_as_dict": {"schema"},
    "bpb_as_loss": {"schema", "numbers"},
    "another_script": {"code"},
    "one_seed": {"seeds", "bytes"},
    "seconds_601": {"clock", "numbers"},
    "other_bpb": {"numbers", "readme"},
    "no_submission": {"schema", "files"},
    "no_logs": {"logs"},
    "no_script": {"files"},
}


# ---------------------------------------------------------------- what holds for any folder


def test_the_fixtures_are_sound():
    """Their figures agree, so that a fault planted in a copy is the only one."""
    for name in DIALECTS:
        folder = FIXTURES / name
        sub = json.loads((folder / "submission.json").read_text())
        logs = sorted(folder.glob("train_seed*.log"))
        assert len(logs) == len(sub["seeds"]) == 3 and (folder / "README.md").is_file()
        sizes = [int(re.search(r"Total submission size \S+: (\d+)", log.read_text())[1]) for log in logs]
        assert max(sizes) == sub["bytes_total"] <= CAP_BYTES
        bits = sub["val_loss"] / math.log(2) * 62_021_632 / 151_080_169
        assert bits == pytest.approx(sub["val_bpb"], rel=1e-6)
        for log in logs:
            entry = sub["seed_results"][log.stem.removeprefix("train_seed")]
            assert f"val_bpb:{entry['val_bpb']:.8f}" in log.read_text()
            assert int(re.search(r"wallclock_cap train_time: ?(\d+)ms", log.read_text())[1]) <= 600_100


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_foreign_folder_gets_a_line_per_claim(name, fault, place, capsys):
    """The failed claims are those of the fault, no more; the phased one is over the clock anyway."""
    folder = place(name)
    FAULTS.get(fault, lambda folder: None)(folder)
    rows, status = verify(folder, capsys)
    fails = {claim for claim, (found, _) in rows.items() if found == "fail"}
    assert status == (1 if fails else 0)
    if fault != "nothing":
        wanted = set(FAILS[fault])
        if name == PHASED and fault != "no_logs":
            wanted.add("clock")
        if name == EARLY and fault == "another_script":
            wanted.add("source")
        assert fails == wanted


@pytest.mark.parametrize("name", DIALECTS)
def test_nothing_unread_is_called_ok(name, place, capsys):
    """A claim about figures is ok only where the logs were read."""
    rows, _ = verify(place(name), capsys)
    if rows["logs"][0] != "ok":
        called_ok = {claim for claim, (status, _) in rows.items() if status == "ok"}
        assert called_ok <= {"syntax", "import", "code", "name"}, called_ok


def test_a_missing_submission_is_named(place, capsys):
    folder = place(EARLY)
    no_submission(folder)
    rows, status = verify(folder, capsys)
    assert rows["schema"] == ("fail", "submission.json cannot be read") and status == 1
    assert "submission.json" in rows["files"][1]


def test_missing_files_are_named(place, capsys):
    folder = place(EARLY)
    nothing(folder)
    rows, _ = verify(folder, capsys)
    assert all(name in rows["files"][1] for name in ("README.md", "submission.json", "train_gpt.py"))
    assert rows["logs"] == ("fail", "no logs")


def test_a_seeds_dict_is_named_when_the_rest_is_there(place, capsys):
    """Of many schema errors three are printed; alone, this one is."""
    stored = {"seeds": {"42": 1.2}}
    errors = schema_errors(stored, submission_schema())
    assert any("seeds" in error and "not of type array" in error for error in errors)


SUBMISSIONS = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "text": b'"x"',
    "not json": b"{'a': 1}",
    "not utf-8": b"\xff\xfe{}",
    "nan": b'{"val_bpb": NaN}',
    "infinity": b'{"val_bpb": 1e999}',
    "nul": b"\0" * 50,
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"val_bpb": ' + b"9" * 10_000 + b"}",
    "byte order mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("kind", SUBMISSIONS)
def test_any_submission_json(kind, place, capsys):
    folder = place(PHASED)
    (folder / "submission.json").write_bytes(SUBMISSIONS[kind])
    rows, status = verify(folder, capsys)
    assert rows["schema"][0] == "fail" and status == 1
    assert len(rows["schema"][1]) < 400


SCRIPTS = {
    "empty": b"",
    "not python": b"$$$",
    "not utf-8": b"\xff\xfe",
    "nul": b"x = 1\0",
    "exits": b"import sys; sys.exit(3)",
    "ends the process": b"import os; os._exit(9)",
    "prints": b"print('{}')",
    "no output": b"import sys; sys.stdout = None",
    "raises two lines": b"raise ValueError('a\\nb')",
    "python 2": b"print 'x'",
    "tabs": b"if 1:\n\tx = 1\n        y = 2\n",
    "deep": b"(" * 100_000 + b")" * 100_000,
    "deep sum": b"x = " + b"-" * 100_000 + b"1",
    "many dots": b"x = a" + b".b" * 50_000,
    "packed": b"exec('x = 1')",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_any_script(kind, place, capsys):
    folder = place(PHASED)
    (folder / "train_gpt.py").write_bytes(SCRIPTS[kind])
    rows, status = verify(folder, capsys)
    assert rows["code"][0] != "ok" and status == 1


LOGS = {
    "empty": b"",
    "not utf-8": b"\xff" * 100,
    "separators": b"=" * 100 + b"\nRunning Python 3\n" + b"=" * 100 + b"\n",
    "one line": b"x" * 1_000_000,
    "steps of text": b"=" * 100 + b"\nRunning Python\n" + b"=" * 100 + b"\nstep:1/2 "
    b"train_loss:abc train_time:1ms step_avg:1.00ms\nstep:x\nfinal_score val_loss:nan seed:-1\n",
}


@pytest.mark.parametrize("kind", [*LOGS, "folder", *DIALECTS])
def test_any_log(kind, place, capsys):
    """Logs where this ledger keeps them, of any content."""
    folder = place(EARLY)
    log = folder / "logs" / "seed42.txt"
    log.parent.mkdir()
    if kind == "folder":
        log.mkdir()
    elif kind in DIALECTS:
        shutil.copy(FIXTURES / kind / "train_seed42.log", log)
    else:
        log.write_bytes(LOGS[kind])
    rows, status = verify(folder, capsys)
    assert rows["logs"][0] == "fail"
    assert "seed42.txt" in rows["logs"][1]
    assert status == 1


@pytest.mark.parametrize("verb", ["compare", "plot", "reproduce", "diff"])
@pytest.mark.parametrize("name", DIALECTS)
def test_other_verbs_refuse_in_one_line(verb, name, place, capsys):
    folder = place(name)
    argv = {
        "compare": [str(folder)] * 2,
        "plot": [str(folder)],
        "reproduce": [str(folder)],
        "diff": [str(folder)] * 2,
    }
    status = record.main(["--root", str(folder.parents[2]), verb, *argv[verb]])
    said = capsys.readouterr()
    assert status in ((0, 2) if verb == "diff" else (2,)), said
    assert status == 0 or (said.err.startswith("record: ") and said.err.count("\n") == 1)


# ---------------------------------------------------------------- what verify says of this layout

WANTED = {
    "oversize": ("bytes", "16,"),
    "oversize_for_one_seed": ("bytes", "16,004,321"),
    "seeds_as_dict": ("schema", "seeds"),
    "bpb_as_loss": ("schema", "val_bpb"),
    "one_seed": ("seeds", "1 seed"),
    "seconds_601": ("clock", "601.2"),
    "other_bpb": ("numbers", "val_bpb"),
}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("fault", WANTED)
def test_a_fault_is_named(name, fault, place, capsys):
    """The claim fails with the figure in its evidence, and holds in the sound folder."""
    claim, evidence = WANTED[fault]
    folder = place(name)
    status, told = verify(folder, capsys)[0][claim]
    if (name, claim) == (PHASED, "clock"):  # as published: over the limit by its calibration
        assert status == "fail" and evidence not in told
    else:
        assert status == "ok"
    FAULTS[fault](folder)
    status, told = verify(folder, capsys)[0][claim]
    assert status == "fail" and evidence in told


def test_a_log_of_another_script_is_named(place, capsys):
    """Only the early form of log holds its source."""
    folder = place(EARLY)
    assert verify(folder, capsys)[0]["source"][0] == "ok"
    another_script(folder)
    assert verify(folder, capsys)[0]["source"][0] == "fail"


@pytest.mark.parametrize("name", [SECOND, PHASED])
def test_a_log_without_a_source_proves_none(name, place, capsys):
    assert verify(place(name), capsys)[0]["source"][0] == "not checkable"


@pytest.mark.parametrize("name", [SECOND, PHASED])
def test_calibration_counts_as_training(name, place, capsys):
    """588 s and 11.3 s are within 600 s; 599.6 s and 4.7 s are not."""
    status, told = verify(place(name), capsys)[0]["clock"]
    assert (status, "604.3" in told) == (("ok", False) if name == SECOND else ("fail", True))


def test_untimed_calibration_is_not_called_ok(place, capsys):
    folder = place(SECOND)
    edit_logs(folder, r"(collected 67 Hessians) in 11.3s", lambda m: m[1])
    assert verify(folder, capsys)[0]["clock"][0] == "not checkable"


@pytest.mark.parametrize("name", DIALECTS)
def test_the_facts_of_a_log(name):
    """Sizes, steps, times, score and seed, whichever way they are printed."""
    run = parse_published_log(FIXTURES / name / "train_seed1337.log")
    entry = json.loads((FIXTURES / name / "submission.json").read_text())["seed_results"]["1337"]
    final = {key: run.number("final_score", key) for key in ("val_loss", "val_bpb", "steps", "train_time")}
    final["train_time_s"] = final.pop("train_time") / 1000
    assert final | {"artifact_bytes": run.size("artifact")} == entry and run.seed == 1337
    assert run.steps[-1].step == entry["steps"] and run.steps[0].loss > 6.9
    hessians = {EARLY: None, SECOND: 11.3, PHASED: 4.7}[name]
    timed = run.has("phase_times", "calibrate_s")
    assert (run.number("phase_times", "calibrate_s") if timed else None) == hessians
    assert run.number("phase_times", "eval_s") == {EARLY: 75.0, SECOND: 81.234, PHASED: 508.8}[name]


def test_a_reprinted_label_is_not_believed(place, capsys):
    """The last line of the early logs repeats the sliding score under the label of another."""
    assert verify(place(EARLY), capsys)[0]["score"][1].startswith("final_int6_sliding_window_exact ")


def test_a_source_behind_the_settings_is_found(place, capsys):
    """And its format strings are not read as results."""
    folder = place(SECOND)
    with open(folder / "train_gpt.py", "a") as f:
        f.write("if 0:\n    '''\nquantized val_loss:1.0 val_bpb:0.5\nCode size: 7 bytes\n'''\n")
    source = (folder / "train_gpt.py").read_text()
    edit_logs(folder, rf"(  world_size: 8\n)({runlog.SEPARATOR})", lambda m: f"{m[1]}{source}\n{m[2]}")
    rows, _ = verify(folder, capsys)
    assert rows["source"][0] == "ok" and rows["numbers"][0] == "ok"


PACKED = b"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode('x'),format=L.FORMAT_RAW))\n"


@pytest.mark.parametrize(
    "name, script, convention",
    [
        (EARLY, None, "raw source"),
        (SECOND, PACKED, "packed train_gpt.py"),
        (PHASED, None, "compressed wrapper"),
    ],
)
def test_the_code_convention_is_said(name, script, convention, place, capsys):
    folder = place(name)
    if script:
        (folder / "train_gpt.py").write_bytes(script)
        edit_logs(folder, r"(Code size: )\d+", lambda m: f"{m[1]}{len(script)}")
    status, told = verify(folder, capsys)[0]["code"]
    assert convention in told and status == ("not checkable" if name == PHASED else "ok")


@pytest.mark.parametrize("name", DIALECTS)
def test_a_foreign_script_never_runs(name, place, tmp_path, capsys):
    folder = place(name)
    mark = tmp_path / "ran"
    (folder / "train_gpt.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (folder / "sitecustomize.py").write_text(f"open({str(mark)!r}, 'w')\n")
    rows, _ = verify(folder, capsys)
    assert rows["import"][0] == "not checkable"
    assert rows["syntax"][0] == "ok"
    assert not mark.exists()


def test_code_beside_the_script_is_named(place, capsys):
    folder = place(SECOND)
    (folder / "train_gpt_human.py").write_text("x = 1\n")
    status, told = verify(folder, capsys)[0]["files"]
    assert status == "ok" and "train_gpt_human.py" in told
    (folder / "flash_attn_interface_of_nobody.py").write_text("x = 1\n")
    status, told = verify(folder, capsys)[0]["files"]
    assert status == "fail" and "flash_attn_interface_of_nobody" in told


@pytest.mark.parametrize(
    "changes, claim, evidence",
    [
        ({"val_bpb_std": 0.0009}, "numbers", "val_bpb_std"),
        ({"val_bpb": 1.2}, "numbers", "mean of 3"),
        ({"val_bpb": 1.22366237}, "numbers", "val_bpb"),
        ({"val_loss": 1.22330701}, "schema", "not nats per token"),
        ({"val_loss": 20.655}, "schema", "bytes per token"),
        ({"seeds": [42, 1337]}, "seeds", "42, 1337"),
        ({"bytes_total": 15_700_706}, "bytes", "15700706"),
        ({"bytes_code": 604}, "numbers", "bytes_code"),
        ({"val_bpb": None, "mean_bpb": 1.2233}, "schema", "mean_bpb is there"),
        ({"pytorch_version": "2.8"}, "requirements", "2.9.1"),
        ({"track": "non_record_16mb"}, "seeds", ""),
    ],
)
def test_figures_that_are_not_of_the_logs(changes, claim, evidence, place, capsys):
    folder = place(EARLY)
    edit(folder, **changes)
    status, told = verify(folder, capsys)[0][claim]
    assert (status, evidence in told) == ("fail" if evidence else "ok", True)


def test_rounded_figures_are_of_the_logs(place, capsys):
    """Four digits or more; the spread is the sample's."""
    folder = place(EARLY)
    edit(folder, val_bpb=1.2233, val_loss=2.0655, val_bpb_std=0.00036, val_loss_std=0.0006)
    assert verify(folder, capsys)[0]["numbers"][0] == "ok"


def test_a_non_record_needs_no_three_seeds(place, capsys):
    folder = place(SECOND)
    one_seed(folder)
    edit(folder, track="non_record_16mb", bytes_total=15_700_220)
    rows, status = verify(folder, capsys)
    assert rows["seeds"][0] == "ok" and status == 0


def test_a_lone_train_log(place, capsys):
    """Its seed is in its text; nothing of its name says it."""
    folder = place(SECOND)
    one_seed(folder)
    (folder / "train_seed42.log").rename(folder / "train.log")
    assert verify(folder, capsys)[0]["seeds"] == ("fail", "1 seed, a record needs 3")


@pytest.mark.parametrize(
    "line", ["Serialized model a+b: {} bytes", "seed:{}", "{}/2 train_loss: 1.0", "step:{}/2 x"]
)
def test_figures_of_any_length(line, place, capsys):
    folder = place(SECOND)
    with open(folder / "train_seed42.log", "a") as f:
        f.write(line.format("9" * 900) + "\n" + " " * 500_000 + "\n")
    verify(folder, capsys)


ODD = [None, True, 0, -1, 1.5, 10**400, 1e308, math.nan, math.inf, "", "x\ny", [], [[]], {"a": 1}, "\ud800"]
NOISE = (b"9", b"0", b".", b"-", b"\n", b" ", b"e9", b":", b"nan", b"\xff", b"")


@pytest.mark.parametrize("name", DIALECTS)
def test_damaged_folders_get_a_line_per_claim(name, place, capsys):
    """Any values in submission.json, bytes of a log replaced: never an exception."""
    folder = place(name)
    rng = random.Random(name)
    log = folder / "train_seed42.log"
    text = (folder / "submission.json").read_text()
    sound = log.read_bytes()
    for _ in range(150):
        sub = json.loads(text)
        data = bytearray(sound)
        entry = sub["seed_results"]["42"]
        for at in rng.sample((entry, sub["seed_results"], sub), rng.randrange(4)):
            at[rng.choice(sorted(at))] = rng.choice(ODD)
        (folder / "submission.json").write_text(json.dumps(sub))
        for _ in range(rng.randrange(30)):
            k = rng.randrange(len(data))
            data[k : k + rng.randrange(3)] = rng.choice(NOISE)
        log.write_bytes(data)
        verify(folder, capsys)


def test_folders_of_this_ledger_are_not_foreign(place):
    folder = place(EARLY)
    assert is_challenge_folder(folder)
    (folder / "logs").mkdir()
    edit(folder, schema=1)
    assert not is_challenge_folder(folder)
    no_logs(folder)
    edit(folder, schema=None)
    (folder / "logs" / "seed42.txt").write_text("")
    assert not is_challenge_folder(folder)
