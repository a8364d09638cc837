"""Races in the ledger: their statistics, `record target`, and folders of races from `new` to the board."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import train_gpt as t
from ledger import races, stats
from ledger.make import record_folder
from ledger.prove import claim_table
from ledger.read.runlog import parse_log
from ledger.read.schema import submission_schema
from ledger.show.board import LOSS_NOTE
from ledger.show.standing import compare_with_board
from ledger.tracks import TRACKS
from tests.ledger import fixtures_records as fx
from tests.ledger.record_helpers import (
    MARKERS,
    META,
    TRACK,
    Fault,
    edit,
    edit_json,
    edit_log,
    refuse,
    run,
    write_logs,
)

ROOT = Path(__file__).resolve().parents[2]

# The ten runs of Turbo-Muon's submission to modded-nanogpt. The figures are those of scipy.stats:
# ttest_1samp(TURBO_MUON, 3.28, alternative="less").
TURBO_MUON = [3.2779, 3.2782, 3.2782, 3.2788, 3.2814, 3.2807, 3.2780, 3.2780, 3.2795, 3.2802]
T_STATISTIC = -2.244880577947792
P_VALUE = 0.025715806503140023


def write_race(folder, losses, seeds=None, **change):
    """Write a log for each loss, seeds 1, 2, 3, ... by default, and return the folder."""
    folder.mkdir(exist_ok=True)
    for seed, loss in zip(seeds or range(1, len(losses) + 1), losses):
        (folder / f"race{seed}.txt").write_text(fx.race_log_text(seed, loss, **change))
    return folder


def test_the_t_test_is_scipys():
    outcome = races.Outcome(TURBO_MUON, 3.28)
    assert round(outcome.mean, 5) == 3.27909
    assert round(outcome.std, 5) == 0.00128
    assert stats.one_sample(TURBO_MUON, 3.28).t() == pytest.approx(T_STATISTIC, rel=1e-12)  # measured: 0
    assert outcome.p == pytest.approx(P_VALUE, rel=1e-13, abs=0)  # measured: 3.2e-15
    assert not outcome.holds("t_test")
    assert outcome.margin == pytest.approx(0.00091 * math.sqrt(10), rel=1e-11, abs=0)  # measured: 2.8e-13
    assert not outcome.holds("margin")


def test_both_rules_have_two_sides():
    """A mean 0.0013 below the target is enough by track 3's rule for ten runs, not for nine."""
    assert races.Outcome([3.2787] * 10, 3.28).holds("margin")
    assert not races.Outcome([3.2787] * 9, 3.28).holds("margin")
    assert not races.Outcome([3.2813] * 10, 3.28).holds("margin")

    assert races.Outcome([loss - 0.0004 for loss in TURBO_MUON], 3.28).holds("t_test")
    assert not races.Outcome([3.2777, 3.2793, 3.2741], 3.28).holds("t_test")  # spread, and only three runs
    assert races.Outcome([3.27, 3.27], 3.28).p == 0.0 and races.Outcome([3.29, 3.29], 3.28).p == 1.0
    assert races.Outcome([3.27], 3.28).p is None and not races.Outcome([3.27], 3.28).holds("t_test")


def test_target_prints_the_outcome(tmp_path, capsys):
    folder = write_race(tmp_path / "logs", TURBO_MUON)
    assert run(tmp_path, "target", folder, "--loss", "3.28", "--time") == 1
    assert capsys.readouterr().out.splitlines() == [
        "runs      10, 3,250 steps each",
        "val_loss  mean 3.27909, std 0.00128, target 3.28",
        "t-test    p 0.0257: not shown by p < 0.01 in a one-sided t-test",
        "margin    +0.00288: not shown by (target - mean) sqrt(runs) >= 0.004",
        "time      mean 195.065, std 0.049 s on 8 x NVIDIA H100 80GB HBM3",
    ]
    logs = sorted(folder.iterdir())
    assert run(tmp_path, "target", *logs, "--loss", "3.29") == 0
    out = capsys.readouterr().out
    assert "t-test    p 0.0000: reached" in out and "time" not in out


@pytest.mark.parametrize("kept", [[2, 3, 4], [1, 2, 4], [0, 1, 2]])
def test_chosen_runs_are_refused(tmp_path, capsys, kept):
    folder = write_race(tmp_path / "logs", [3.27] * 3, kept)
    assert run(tmp_path, "target", folder, "--loss", "3.28") == 2
    missing = min({1, 2, 3} - set(kept))
    assert f"seed {missing} is missing: the 3 runs of a race are seeds 1 to 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, options, reason",
    [
        ({"steps": 3000}, (), "the last step differs: 3250 in race1.txt and 3000 in race3.txt"),
        ({"steps": 3000, "total": 3250}, (), "race3.txt: stopped after 3000 of 3250 steps"),
        ({"source": fx.SCRIPT + "# changed\n"}, (), "source differs"),
        ({"config": {"matrix_lr": 0.5}}, (), "config differs: matrix_lr"),
        ({"device": "NVIDIA H200"}, ("--time",), "hardware differs"),
    ],
)
def test_runs_of_another_race_are_refused(tmp_path, capsys, change, options, reason):
    folder = write_race(tmp_path / "logs", [3.27, 3.27])
    write_race(folder, [3.27], [3], **change)
    assert run(tmp_path, "target", folder, "--loss", "3.28", *options) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


def test_the_time_of_a_resumed_run_does_not_count(tmp_path, capsys):
    folder = write_race(tmp_path / "logs", [3.27])
    text = (folder / "race1.txt").read_text()
    resumed = text.replace("step:3250/3250 train", "resumed step:0 of race1\nstep:3250/3250 train", 1)
    (folder / "race1.txt").write_text(resumed)
    assert run(tmp_path, "target", folder, "--loss", "3.28") in (0, 1)
    assert run(tmp_path, "target", folder, "--loss", "3.28", "--time") == 2
    assert "was resumed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-3", "nan", "inf", "three"])
def test_what_is_no_loss_is_refused(tmp_path, capsys, text):
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, "target", tmp_path, "--loss", text)
    assert refused.value.code == 2 and "is no loss in nats per token" in capsys.readouterr().err


# ---- folders -------------------------------------------------------------------------------------

RACE_TRACK = "track_gpt2_124m"
RACE_NAME = "2026-11-27_Turbo"
RACE_META = {**META, "name": "Turbo", "date": "2026-11-27", "track": RACE_TRACK, "blurb": "four steps"}
FAST = [loss - 0.0008 for loss in TURBO_MUON]  # reaches 3.28


@pytest.fixture(scope="module")
def pristine_race(tmp_path_factory):
    """Make a repository with one good record of a race."""
    root = tmp_path_factory.mktemp("race")
    (root / "records").mkdir()
    (root / "README.md").write_text(MARKERS)
    (root / "records" / "README.md").write_text(MARKERS)
    make_race(root)
    return root


def make_race(root, losses=FAST, meta=None, **change):
    """Write the folder of a race as `new` does, without examining its claims, and return it."""
    meta = {**RACE_META, **(meta or {})}
    logs = sorted(write_race(root / f"logs_{meta['name']}", losses, **change).iterdir())
    folder = root / "records" / meta["track"] / f"{meta['date']}_{meta['name']}"
    record_folder.build(folder, [parse_log(log) for log in logs], meta, "", root)
    return folder


@pytest.fixture
def race_repo(pristine_race, tmp_path):
    return shutil.copytree(pristine_race, tmp_path / "repo")


@pytest.fixture
def race_folder(race_repo):
    return race_repo / "records" / RACE_TRACK / RACE_NAME


def race_verdicts(folder):
    """Return {claim: (verdict, evidence)} of a race's folder."""
    return {
        claim: (verdict, evidence)
        for verdict, claim, evidence in claim_table.examine_race(folder, folder.parent.parent)
    }


def log2(folder):
    return folder / "logs" / "seed2.txt"


def test_new_makes_the_folder_of_a_race(race_repo, capsys):
    logs = sorted(write_race(race_repo / "more", FAST, step_ms=59.0).iterdir())
    options = ["--track", RACE_TRACK, "--date", "2026-11-28", "--parent", RACE_NAME]
    assert run(race_repo, "new", "Faster", "--logs", *logs, *options) == 0
    folder = race_repo / "records" / RACE_TRACK / "2026-11-28_Faster"
    assert "val_loss 3.27829 after 3,250 steps, 10 runs" in capsys.readouterr().out

    assert not (folder / "artifact.sha256").exists()
    sub = json.loads((folder / "submission.json").read_text())
    assert sub["seeds"] == list(range(1, 11)) and sub["steps"] == 3250
    assert sub["p_value"] == races.Outcome(FAST, 3.28).p and sub["target"] == 3.28
    assert sub["train_time_ms"] == 3250 * 59
    page = (folder / "README.md").read_text()
    assert "**val_loss 3.27829** (std 0.00128) after 3,250 steps and 191.75 s, 10 runs; target 3.28" in page
    assert set(submission_schema(RACE_TRACK)["required"]) == set(sub)

    assert run(race_repo, "verify") == 0
    out = capsys.readouterr().out
    assert " fail " not in out and "2 folders" in out


def spoil(pattern, new):
    return lambda folder: edit_log(log2(folder), pattern, new)


RACE_FAULTS = {
    "key missing": Fault(
        "schema",
        lambda folder: edit_json(folder / "submission.json", lambda sub: sub.pop("p_value")),
    ),
    "p typed": Fault(
        "numbers",
        lambda folder: edit(folder / "submission.json", r'"p_value": .*', '"p_value": 0.001,'),
    ),
    "picture lost": Fault("files", lambda folder: (folder / "loss.png").unlink()),
    "run lost": Fault("race", lambda folder: log2(folder).unlink()),
    "stopped elsewhere": Fault("race", spoil(r"^(final_score .*)steps:3250", r"\1steps:3240")),
    "another target": Fault("race", spoil(r"^(final_score .*)target:3.28", r"\1target:3.3")),
    "another target set": Fault("race", spoil("^  target_loss: 3.28", "  target_loss: 3.3")),
    "fewer tokens": Fault("race", spoil("^  val_tokens: 10485760", "  val_tokens: 65536")),
    "another loss": Fault("validation", spoil(r"^(final_score .*val_loss:3)", r"\g<1>1")),
    "another last line": Fault("validation", spoil(r"^(step:3250/3250 val_loss:)3", r"\g<1>2")),
    "resumed": Fault("times", spoil(r"^(step:3250/3250 train)", r"resumed step:0 of race2\n\1")),
    "hardware": Fault("times", spoil("device:NVIDIA H100", "device:NVIDIA H200")),
}


@pytest.mark.parametrize("fault", RACE_FAULTS)
def test_verify_catches_in_a_race(race_folder, fault):
    planted = RACE_FAULTS[fault]
    assert {verdict for verdict, _ in race_verdicts(race_folder).values()} == {"ok"}
    planted.spoil(race_folder)
    verdict, evidence = race_verdicts(race_folder)[planted.claim]
    assert verdict == "fail", evidence
    assert "\n" not in evidence


def test_a_record_reaches_the_target_and_a_non_record_need_not(tmp_path):
    (tmp_path / "records").mkdir()
    missed = make_race(tmp_path, TURBO_MUON, {"name": "Missed"})
    verdict, evidence = race_verdicts(missed)["significance"]
    assert verdict == "fail" and "p 0.026" in evidence and "not p < 0.01 in a one-sided t-test" in evidence
    tried = make_race(tmp_path, TURBO_MUON, {"name": "Tried", "record": False})
    assert {verdict for verdict, _ in race_verdicts(tried).values()} == {"ok"}


def test_a_track_takes_only_its_kind_of_runs(race_repo, tmp_path, capsys):
    race = sorted(write_race(tmp_path / "race", FAST).iterdir())
    scored = write_logs(tmp_path / "scored")
    refuse(
        race_repo, capsys, "compares the scores of artifacts", "new", "X", "--logs", *race, "--track", TRACK
    )
    refuse(race_repo, capsys, "compares runs of races", "new", "X", "--logs", *scored, "--track", RACE_TRACK)
    chosen = race[:4] + race[5:]
    refuse(race_repo, capsys, "is missing: the 9 runs", "new", "X", "--logs", *chosen, "--track", RACE_TRACK)


def test_the_board_ranks_races_by_time_or_by_steps(race_repo):
    make_race(race_repo, meta={"name": "Slow"}, step_ms=61.0)
    make_race(race_repo, meta={"name": "Quick"}, step_ms=50.0)
    steps = {"track": "track_optimizer_race", "date": "2026-11-26"}
    make_race(race_repo, meta={"name": "Many", **steps}, steps=3300, step_ms=10.0)
    make_race(race_repo, meta={"name": "Few", **steps}, steps=3200, step_ms=90.0)
    assert run(race_repo, "board") == 0
    page = (race_repo / "README.md").read_text()
    places = [page.index(f"[{name}]") for name in ("Quick", "Turbo", "Slow", "Few", "Many")]
    assert places == sorted(places)
    assert "| 1 | 3,250 | 162.50 | 0.00 | 3.27829 | 0.00128 | 10 | 0.0011 | +0.00541 |" in page
    assert LOSS_NOTE not in page  # races of a track have one vocabulary
    assert not (race_repo / "records" / "history.png").exists()


def test_compare_holds_both_races_against_the_target(race_repo, tmp_path, capsys):
    other = write_race(tmp_path / "other", TURBO_MUON, step_ms=50.0)
    assert run(race_repo, "compare", RACE_NAME, other) == 0
    out = capsys.readouterr().out
    assert "A to 3.28: mean 3.27829, p 0.0011, margin +0.00541, reached by p < 0.01" in out
    assert "B to 3.28: mean 3.27909, p 0.026, margin +0.00288, not shown to be reached" in out
    assert "train_time" in out and "bar (B better" not in out

    write_logs(tmp_path / "scored")
    assert run(race_repo, "compare", other, tmp_path / "scored") == 2
    assert "only one of them is a race" in capsys.readouterr().err


def test_reproduce_names_the_command_of_one_run(race_repo, capsys):
    assert run(race_repo, "reproduce", RACE_NAME, "--seed", "4", "--dry-run") == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith("torchrun --standalone --nproc_per_node=8 ")
    assert " target_loss=3.28 " in command and command.endswith(" seed=4")


def test_a_run_is_told_what_the_best_race_took(race_repo, tmp_path):
    log = tmp_path / "run.txt"
    log.write_text(fx.race_log_text(1, config={"preset": "gpt2_124m"}))
    told = compare_with_board(parse_log(log), race_repo / "records")
    assert told == (
        "the best of track_gpt2_124m, Turbo, took 3,250 steps and 195.1 s, 10 runs; one run decides no race"
    )
    assert compare_with_board(parse_log(Path(write_logs(tmp_path / "scored")[0])), ROOT / "records")
    log.write_text(
        fx.race_log_text(1, config={"preset": "h100x1"})
    )  # a race at the settings of another track
    assert compare_with_board(parse_log(log), ROOT / "records") == ""

    log.write_text(fx.race_log_text(1, config={"preset": "gpt2_124m"}).replace("a" * 64, "c" * 64))
    told = compare_with_board(parse_log(log), race_repo / "records")
    assert told.startswith("the best of track_gpt2_124m is 3.2783 (Turbo), scored on other text")


def test_every_track_of_races_has_its_schema_and_preset():
    tracks = {name for name, about in TRACKS.items() if about.target}
    assert set(submission_schema(RACE_TRACK)["properties"]["track"]["enum"]) == tracks
    assert set(submission_schema()["properties"]["track"]["enum"]) == set(TRACKS) - tracks
    for name in tracks:
        about = TRACKS[name].target
        assert about.rule in races.RULES and about.minimizes in ("steps", "time")
        h = t.load_config([f"preset={TRACKS[name].preset}"], {})
        assert (h.target_loss, h.val_tokens) == (about.loss, about.val_tokens)


def test_every_claim_of_a_race_has_a_planted_fault():
    planted = {fault.claim for fault in RACE_FAULTS.values()} | {"significance"}
    assert planted >= set(claim_table.RACE_CLAIMS) - set(claim_table.RECORD_CLAIMS)
