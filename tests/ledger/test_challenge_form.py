"""Submissions in the challenge's form, sound and with the failures that published ones have had.

`record verify` owes any folder a line per claim, no traceback, and no ok for what it has not read. It names
the failures that published submissions have had, and it runs none of their code.
"""

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import train_gpt as t
from ledger import record
from ledger.prove.challenge_claims import ChallengeCase, is_challenge_folder
from ledger.prove.claim_table import CHALLENGE_CLAIMS
from ledger.read import runlog
from ledger.read.dialects import parse_published_log
from ledger.read.schema import schema_errors, submission_schema
from ledger.tracks import CAP_BYTES

ROOT = Path(__file__).resolve().parents[2]

FIXTURES = ROOT / "tests" / "fixtures" / "challenge"
EARLY = "2026-03-22_EarlyDialect"
SECOND = "2026-04-05_SecondDialect"
PHASED = "2026-04-27_PhasedDialect"
DIALECTS = (EARLY, SECOND, PHASED)
ROW = re.compile(r"  (ok|fail|not checkable) +(\w+) +(\S.*)")


@pytest.fixture
def published(tmp_path):
    """Return a function that copies a fixture into a ledger of its own and returns the folder."""

    def copy(name):
        folder = tmp_path / "records" / "track_10min_16mb" / name
        shutil.copytree(FIXTURES / name, folder)
        return folder

    return copy


def verify(folder, capsys):
    """Verify a folder and return {claim: (verdict, evidence)} with the exit status.

    Whatever the folder holds, there must be one row per claim and nothing else.
    """
    status = record.main(["--root", str(folder.parents[2]), "verify", str(folder)])
    printed = capsys.readouterr()
    assert not printed.err
    assert "Traceback" not in printed.out

    _, *rows, total = printed.out.splitlines()
    found = [ROW.fullmatch(row) for row in rows]
    assert all(found), [row for row, match in zip(rows, found) if not match]
    assert [match[2] for match in found] == list(CHALLENGE_CLAIMS)
    assert total.startswith("1 folder: ")
    return {match[2]: (match[1], match[3]) for match in found}, status


def claim_of(folder, claim, capsys):
    """Verify a folder and return (verdict, evidence) of one claim."""
    rows, _ = verify(folder, capsys)
    return rows[claim]


def stored(folder):
    """Return submission.json."""
    return json.loads((folder / "submission.json").read_text())


def edit(folder, **changes):
    """Replace keys of submission.json; None removes one."""
    changed = stored(folder) | changes
    kept = {key: value for key, value in changed.items() if value is not None}
    (folder / "submission.json").write_text(json.dumps(kept))


def edit_logs(folder, pattern, change):
    """Replace each match of the pattern in every log by change(match)."""
    for log in folder.glob("train_seed*.log"):
        text, count = re.subn(pattern, change, log.read_text())
        assert count, f"{log.name} has nothing like {pattern}"
        log.write_text(text)


# ---------------------------------------------------------------- the faults


def oversize(folder):
    """Put artifact and code over the cap, in the logs and in submission.json."""
    sub = stored(folder)
    over = 800_000
    results = {
        seed: result | {"artifact_bytes": result["artifact_bytes"] + over}
        for seed, result in sub["seed_results"].items()
    }
    edit(folder, bytes_total=sub["bytes_total"] + over, seed_results=results)
    edit_logs(
        folder,
        r"((?:Serialized model|Total submission size) \S+\+\S+: )(\d+)",
        lambda match: match[1] + str(int(match[2]) + over),
    )


def oversize_for_one_seed(folder):
    """Put the log of one seed over the cap, while submission.json states the size of another."""
    log = folder / "train_seed1337.log"
    text, count = re.subn(r"(Total submission size \S+: )\d+", r"\g<1>16004321", log.read_text())
    assert count == 1
    log.write_text(text)


def seeds_as_dict(folder):
    """Give the seeds as an object with their scores."""
    sub = stored(folder)
    bpb = [result["val_bpb"] for result in sub["seed_results"].values()]
    edit(folder, seeds={str(seed): value for seed, value in zip(sub["seeds"], bpb)})


def bpb_as_loss(folder):
    """Give the bits per byte as the loss."""
    edit(folder, val_bpb=None, val_loss=stored(folder)["val_bpb"])


def another_script(folder):
    """Append a line to the script."""
    with open(folder / "train_gpt.py", "a") as script:
        script.write("\nLEARNING_RATE = 0.04\n")


def one_seed(folder):
    """Leave a single seed, everywhere."""
    for seed in (1337, 2024):
        (folder / f"train_seed{seed}.log").unlink()
    entry = stored(folder)["seed_results"]["42"]
    edit(folder, seeds=[42], seed_results={"42": entry}, val_bpb=entry["val_bpb"], val_loss=entry["val_loss"])


def seconds_601(folder):
    """Let training take 601.2 s."""
    edit_logs(folder, r"(wallclock_cap train_time: ?)\d+", lambda match: f"{match[1]}601153")


def other_bpb(folder):
    """State a better score than the logs."""
    edit(folder, val_bpb=stored(folder)["val_bpb"] - 0.01)


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
    fault.__name__: fault
    for fault in (
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


FAILS = {  # fault -> the claims that fail
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
        sub = stored(folder)
        logs = sorted(folder.glob("train_seed*.log"))
        assert len(logs) == len(sub["seeds"]) == 3
        assert (folder / "README.md").is_file()
        sizes = [int(re.search(r"Total submission size \S+: (\d+)", log.read_text())[1]) for log in logs]
        assert max(sizes) == sub["bytes_total"] <= CAP_BYTES
        bits = sub["val_loss"] / math.log(2) * 62_021_632 / 151_080_169
        assert bits == pytest.approx(sub["val_bpb"], rel=2e-8)  # measured: 3.9e-9
        for log in logs:
            entry = sub["seed_results"][log.stem.removeprefix("train_seed")]
            assert f"val_bpb:{entry['val_bpb']:.8f}" in log.read_text()
            assert int(re.search(r"wallclock_cap train_time: ?(\d+)ms", log.read_text())[1]) <= 600_100


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_foreign_folder_gets_a_line_per_claim(name, fault, published, capsys):
    """The claims that fail are those of the fault, no more."""
    folder = published(name)
    if fault != "none":
        FAULTS[fault](folder)
    rows, status = verify(folder, capsys)
    failed = {claim for claim, (verdict, _) in rows.items() if verdict == "fail"}
    assert status == (1 if failed else 0)
    if fault == "nothing":
        return

    wanted = set(FAILS[fault])
    if name == PHASED and fault != "no_logs":  # as published, it is over the limit
        wanted.add("clock")
    if name == EARLY and fault == "another_script":  # only the early logs hold their source
        wanted.add("source")
    assert failed == wanted


def unreadable_log(folder):
    """Let the log of one seed be of no known dialect."""
    (folder / "train_seed42.log").write_text("the loss fell\n")


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("unread", [no_logs, unreadable_log])
def test_nothing_unread_is_called_ok(unread, name, published, capsys):
    """A claim about figures is ok only where the logs were read."""
    folder = published(name)
    unread(folder)
    rows, _ = verify(folder, capsys)
    assert rows["logs"][0] == "fail"
    called_ok = {claim for claim, (verdict, _) in rows.items() if verdict == "ok"}
    assert called_ok == {"schema", "name", "files", "syntax", "readme"}


def test_a_missing_submission_is_named(published, capsys):
    folder = published(EARLY)
    no_submission(folder)
    rows, status = verify(folder, capsys)
    assert rows["schema"] == ("fail", "submission.json cannot be read") and status == 1
    assert "submission.json" in rows["files"][1]


def test_missing_files_are_named(published, capsys):
    folder = published(EARLY)
    nothing(folder)
    rows, _ = verify(folder, capsys)
    assert all(name in rows["files"][1] for name in ("README.md", "submission.json", "train_gpt.py"))
    assert rows["logs"] == ("fail", "no logs")


def test_seeds_that_are_no_list_are_named():
    """`verify` prints only three of many schema errors, so this one is looked for among all."""
    errors = schema_errors({"seeds": {"42": 1.2}}, submission_schema())
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
def test_any_submission_json(kind, published, capsys):
    folder = published(PHASED)
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
def test_any_script(kind, published, capsys):
    folder = published(PHASED)
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
def test_any_log(kind, published, capsys):
    """A log of any content, where this ledger keeps its own."""
    folder = published(EARLY)
    log = folder / "logs" / "seed42.txt"
    log.parent.mkdir()
    if kind == "folder":
        log.mkdir()
    elif kind in DIALECTS:
        shutil.copy(FIXTURES / kind / "train_seed42.log", log)
    else:
        log.write_bytes(LOGS[kind])
    rows, status = verify(folder, capsys)
    verdict, evidence = rows["logs"]
    assert verdict == "fail"
    assert "seed42.txt" in evidence
    assert status == 1


@pytest.mark.parametrize("verb", ["compare", "plot", "reproduce", "diff"])
@pytest.mark.parametrize("name", DIALECTS)
def test_other_verbs_refuse_in_one_line(verb, name, published, capsys):
    folder = published(name)
    argv = {
        "compare": [str(folder)] * 2,
        "plot": [str(folder)],
        "reproduce": [str(folder)],
        "diff": [str(folder)] * 2,
    }
    status = record.main(["--root", str(folder.parents[2]), verb, *argv[verb]])
    printed = capsys.readouterr()
    if verb == "diff" and status == 0:  # it compares scripts, which these folders have
        return
    assert status == 2, printed
    assert printed.err.startswith("record: ")
    assert printed.err.count("\n") == 1


# ---------------------------------------------------------------- what verify says of this form


class Named(NamedTuple):
    """The claim that fails with a fault of FAULTS, and a part of its evidence."""

    claim: str
    figure: str


NAMED = {
    "oversize": Named("bytes", "16,"),
    "oversize_for_one_seed": Named("bytes", "16,004,321"),
    "seeds_as_dict": Named("schema", "seeds"),
    "bpb_as_loss": Named("schema", "val_bpb"),
    "one_seed": Named("seeds", "1 seed"),
    "seconds_601": Named("clock", "601.2"),
    "other_bpb": Named("numbers", "val_bpb"),
}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("fault", NAMED)
def test_a_fault_is_named(name, fault, published, capsys):
    """The claim fails with the figure in its evidence, and holds in the sound folder."""
    named = NAMED[fault]
    folder = published(name)
    verdict, evidence = claim_of(folder, named.claim, capsys)
    if name == PHASED and named.claim == "clock":  # as published, over the limit by its calibration
        assert verdict == "fail"
        assert named.figure not in evidence
    else:
        assert verdict == "ok"

    FAULTS[fault](folder)
    verdict, evidence = claim_of(folder, named.claim, capsys)
    assert verdict == "fail"
    assert named.figure in evidence


def test_a_log_of_another_script_is_named(published, capsys):
    """Only the early form of log holds its source."""
    folder = published(EARLY)
    assert claim_of(folder, "source", capsys)[0] == "ok"
    another_script(folder)
    assert claim_of(folder, "source", capsys)[0] == "fail"


@pytest.mark.parametrize("name", [SECOND, PHASED])
def test_a_log_without_a_source_proves_none(name, published, capsys):
    assert claim_of(published(name), "source", capsys)[0] == "not checkable"


def test_calibration_counts_as_training(published, capsys):
    """588 s and 11.3 s are within 600 s; 599.6 s and 4.7 s are not."""
    verdict, _ = claim_of(published(SECOND), "clock", capsys)
    assert verdict == "ok"

    verdict, evidence = claim_of(published(PHASED), "clock", capsys)
    assert verdict == "fail"
    assert "604.3" in evidence


def test_untimed_calibration_is_not_called_ok(published, capsys):
    folder = published(SECOND)
    edit_logs(folder, r"(collected 67 Hessians) in 11.3s", lambda match: match[1])
    assert claim_of(folder, "clock", capsys)[0] == "not checkable"


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


def test_a_reprinted_label_is_not_believed(published, capsys):
    """The last line of the early logs repeats the sliding score under the label of another."""
    assert claim_of(published(EARLY), "score", capsys)[1].startswith("final_int6_sliding_window_exact ")


def test_a_source_after_the_settings_is_found(published, capsys):
    """Its format strings are not read as results."""
    folder = published(SECOND)
    with open(folder / "train_gpt.py", "a") as script:
        script.write("if 0:\n    '''\nquantized val_loss:1.0 val_bpb:0.5\nCode size: 7 bytes\n'''\n")
    source = (folder / "train_gpt.py").read_text()
    edit_logs(
        folder, rf"(  world_size: 8\n)({runlog.SEPARATOR})", lambda match: f"{match[1]}{source}\n{match[2]}"
    )
    rows, _ = verify(folder, capsys)
    assert rows["source"][0] == "ok" and rows["numbers"][0] == "ok"


PACKED = b"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode('x'),format=L.FORMAT_RAW))\n"


@pytest.mark.parametrize(
    "name, script, convention",
    [
        (EARLY, None, "raw source"),
        (SECOND, PACKED, "packed train_gpt.py"),
        (SECOND, t.packed_code("print(1)\n"), "packed train_gpt.py"),
        (PHASED, None, "compressed wrapper"),
    ],
)
def test_the_code_convention_is_named(name, script, convention, published, capsys):
    folder = published(name)
    if script:
        (folder / "train_gpt.py").write_bytes(script)
        edit_logs(folder, r"(Code size: )\d+", lambda match: f"{match[1]}{len(script)}")
    verdict, evidence = claim_of(folder, "code", capsys)
    assert convention in evidence
    assert verdict == ("not checkable" if name == PHASED else "ok")


@pytest.mark.parametrize("name", DIALECTS)
def test_a_foreign_script_never_runs(name, published, tmp_path, capsys):
    folder = published(name)
    mark = tmp_path / "ran"
    program = f"open({str(mark)!r}, 'w')\n"
    (folder / "train_gpt.py").write_text(program)
    (folder / "sitecustomize.py").write_text(program)
    rows, _ = verify(folder, capsys)
    assert rows["import"][0] == "not checkable"
    assert rows["syntax"][0] == "ok"
    assert not mark.exists()


def test_code_beside_the_script_is_named(published, capsys):
    folder = published(SECOND)
    (folder / "train_gpt_human.py").write_text("x = 1\n")
    verdict, evidence = claim_of(folder, "files", capsys)
    assert verdict == "ok"
    assert "train_gpt_human.py" in evidence

    (folder / "flash_attn_interface_of_nobody.py").write_text("x = 1\n")
    verdict, evidence = claim_of(folder, "files", capsys)
    assert verdict == "fail"
    assert "flash_attn_interface_of_nobody" in evidence


@pytest.mark.parametrize(
    "changes, claim, reason",
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
    ],
)
def test_figures_that_do_not_follow_from_the_logs(changes, claim, reason, published, capsys):
    folder = published(EARLY)
    edit(folder, **changes)
    verdict, evidence = claim_of(folder, claim, capsys)
    assert verdict == "fail"
    assert reason in evidence


def test_rounded_figures_follow_from_the_logs(published, capsys):
    """Four digits are enough, and the spread is that of the sample."""
    folder = published(EARLY)
    edit(folder, val_bpb=1.2233, val_loss=2.0655, val_bpb_std=0.00036, val_loss_std=0.0006)
    assert claim_of(folder, "numbers", capsys)[0] == "ok"


@pytest.mark.parametrize(
    "track, is_record",
    [
        ("track_10min_16mb", True),
        ("canonical_16mb", True),
        ("anon-record_16mb", True),
        ("non_recorded_16mb", True),
        ("NonRecorded", True),
        ("non_record_16mb", False),
        ("track_non_record_16mb", False),
        ("non-record-unlimited-compute-16mb", False),
        ("NonRecord", False),
        ("trackNonRecord16mb", False),
        ("NON-RECORD", False),
        ("nonrecord_16mb", False),
    ],
)
def test_the_name_of_a_track_says_whether_it_has_records(track, is_record, published, capsys):
    folder = published(EARLY)
    edit(folder, track=track)
    assert ChallengeCase(folder).is_record is is_record
    assert claim_of(folder, "seeds", capsys)[0] == "ok"


def test_a_non_record_needs_no_three_seeds(published, capsys):
    folder = published(SECOND)
    one_seed(folder)
    edit(folder, track="non_record_16mb", bytes_total=15_700_220)
    rows, status = verify(folder, capsys)
    assert rows["seeds"][0] == "ok" and status == 0


def test_a_lone_train_log(published, capsys):
    """Its seed is in its text; its name does not tell."""
    folder = published(SECOND)
    one_seed(folder)
    (folder / "train_seed42.log").rename(folder / "train.log")
    assert claim_of(folder, "seeds", capsys) == ("fail", "1 seed, a record needs 3")


@pytest.mark.parametrize(
    "line", ["Serialized model a+b: {} bytes", "seed:{}", "{}/2 train_loss: 1.0", "step:{}/2 x"]
)
def test_figures_of_any_length(line, published, capsys):
    folder = published(SECOND)
    with open(folder / "train_seed42.log", "a") as log:
        log.write(line.format("9" * 900) + "\n" + " " * 500_000 + "\n")
    verify(folder, capsys)


ODD = [None, True, 0, -1, 1.5, 10**400, 1e308, math.nan, math.inf, "", "x\ny", [], [[]], {"a": 1}, "\ud800"]
NOISE = (b"9", b"0", b".", b"-", b"\n", b" ", b"e9", b":", b"nan", b"\xff", b"")


@pytest.mark.parametrize("name", DIALECTS)
def test_damaged_folders_get_a_line_per_claim(name, published, capsys):
    """Odd values in submission.json and replaced bytes of a log never raise an exception."""
    folder = published(name)
    rng = random.Random(name)
    log = folder / "train_seed42.log"
    text = (folder / "submission.json").read_text()
    sound = log.read_bytes()
    for _ in range(150):
        sub = json.loads(text)
        data = bytearray(sound)
        entry = sub["seed_results"]["42"]
        for table in rng.sample((entry, sub["seed_results"], sub), rng.randrange(4)):
            table[rng.choice(sorted(table))] = rng.choice(ODD)
        (folder / "submission.json").write_text(json.dumps(sub))
        for _ in range(rng.randrange(30)):
            start = rng.randrange(len(data))
            data[start : start + rng.randrange(3)] = rng.choice(NOISE)
        log.write_bytes(data)
        verify(folder, capsys)


def test_folders_of_this_ledger_are_not_foreign(published):
    folder = published(EARLY)
    assert is_challenge_folder(folder)
    (folder / "logs").mkdir()
    edit(folder, schema=1)
    assert not is_challenge_folder(folder)
    no_logs(folder)
    edit(folder, schema=None)
    (folder / "logs" / "seed42.txt").write_text("")
    assert not is_challenge_folder(folder)
