"""`record target` holds the runs of a race against a loss: its statistics, and what it refuses."""

from __future__ import annotations

import math

import pytest

import fixtures_records as fx
from ledger import races, stats
from record_helpers import run

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
    assert stats.one_sample(TURBO_MUON, 3.28).t() == pytest.approx(T_STATISTIC, rel=1e-10)
    assert outcome.p == pytest.approx(P_VALUE, rel=1e-10)
    assert not outcome.holds("t_test")
    assert outcome.margin == pytest.approx(0.00091 * math.sqrt(10), rel=1e-9)
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
