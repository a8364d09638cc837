"""Races to a target loss: what ends them, what they leave, and which settings they refuse."""

import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import train_gpt as t
from ledger import record
from tests.helpers import as_arguments
from tests.trainer.train_cases import STEPS, TRAIN_LINE, VAL_LINE, finished_with, matches, starting, value

pytestmark = pytest.mark.usefixtures("clean_environment")

TARGET = 3.5
RACE_SCORE = re.compile(
    r"^final_score metric:time_to_loss (?P<exact>val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}) target:3\.5 "
    r"(?P<bytes>bytes_total:\d+ bytes_code:\d+ )?steps:(?P<steps>\d+) train_time:(?P<train_time>\d+)ms "
    r"eval_time:\d+ms seed:1337(?P<sha256> sha256:[0-9a-f]{64})?$"
)


def race(**knobs):
    """Run a race without an artifact."""
    return finished_with(target_loss=TARGET, **({"size_cap": 0} | knobs))


def test_the_last_validation_decides():
    run = race(val_loss_every=8)
    assert run.status == 0
    final = RACE_SCORE.match(run.lines[-1])
    assert final and final["bytes"] is None and final["sha256"] is None
    assert final["exact"] == value(run, r"final_live (val_loss:\S+ val_bpb:\S+)")

    validations = matches(run, VAL_LINE)
    assert [int(m[1]) for m in validations] == [0, 8, 16, STEPS]
    assert final["steps"] == str(STEPS) and final["train_time"] == validations[-1][5]
    exact = float(re.search(r"val_loss:(\S+)", final["exact"])[1])
    assert exact == pytest.approx(float(validations[-1][3]), abs=5.1e-5)  # measured: 1.2e-5


def test_without_an_artifact_the_log_says_so_once():
    run = race(val_loss_every=8)
    assert run.blob is None and [path.name for path in run.folder.iterdir()] == ["run.txt"]
    assert run.lines.count("no artifact is made: size_cap=0") == 1
    assert not starting(run, "artifact ") and not starting(run, "Serialized model")


def test_without_an_artifact_nothing_is_calibrated(monkeypatch):
    """Neither for int6 codes nor, with an average younger than its horizon, for the choice of weights."""

    def refuse(*args):
        raise AssertionError("calibrated")

    monkeypatch.setattr(t, "calibrate", refuse)
    monkeypatch.setattr(t, "choose_weights", refuse)
    run = race(ema_frac=2.0, gptq_batches=1)
    assert run.status == 0 and " calibrate:0ms " in starting(run, "phase_times")[0]


def test_a_target_changes_no_step():
    losses = [[m[3] for m in matches(run, TRAIN_LINE)] for run in (race(val_loss_every=8), finished_with())]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]


def test_a_race_with_an_artifact_leaves_the_same_file():
    run = race(size_cap=16_000_000)
    plain = finished_with()
    assert run.blob == plain.blob
    final = RACE_SCORE.match(run.lines[-1])
    assert final["exact"] == value(run, r"final_live (val_loss:\S+ val_bpb:\S+)")
    assert final["sha256"] == f" sha256:{plain.final['sha256']}"
    assert final["bytes"].split()[0] == f"bytes_total:{plain.final['bytes_total']}"


@pytest.mark.parametrize("target, side", [(5.7, "below"), (0.5, "above")])
def test_the_console_says_how_far_the_target_is(target, side, capsys):
    run = finished_with(target_loss=target, size_cap=0, iterations=2)
    loss = float(value(run, r"final_score metric:\S+ val_loss:(\S+)"))
    out = capsys.readouterr().out
    assert f"{abs(target - loss):.4f} {side} the target of {target}" in out
    assert "artifact: " not in out


# ---------------------------------------------------------------- ten runs, judged by the ledger


def one_sided_p(losses, target):
    """Return P(T <= t) of Student's test of the mean against the target, by integrating the density."""
    n = len(losses)
    t_value = (np.mean(losses) - target) / (np.std(losses, ddof=1) / math.sqrt(n))
    x = np.linspace(-1, math.atan(t_value) / (math.pi / 2), 200_001)[1:-1] * (math.pi / 2)
    density = (1 + np.tan(x) ** 2 / (n - 1)) ** (-n / 2) / np.cos(x) ** 2
    scale = math.gamma(n / 2) / (math.sqrt((n - 1) * math.pi) * math.gamma((n - 1) / 2))
    return scale * np.trapezoid(density, x)


@pytest.fixture(scope="module")
def ten_runs(tmp_path_factory):
    """Run a race of ten runs and return the folder of their logs."""
    folder = tmp_path_factory.mktemp("race")
    for seed in range(1, 11):
        knobs = {"target_loss": 5.5, "size_cap": 0, "iterations": 3, "warmup_steps": 1, "seed": seed}
        run = finished_with(**knobs)
        shutil.copy(run.folder / "run.txt", folder / f"seed{seed}.txt")
    return folder


def judge(folder, target, capsys):
    """Return the status of `record target`, the losses in the logs, and what it prints."""
    logs = [path.read_text() for path in folder.iterdir()]
    losses = [float(re.search(r"^final_score \S+ val_loss:(\S+)", log, re.M)[1]) for log in logs]
    capsys.readouterr()
    status = record.main(["target", str(folder), "--loss", str(target), "--time"])
    return SimpleNamespace(status=status, losses=losses, out=capsys.readouterr().out)


def test_a_race_of_ten_runs_is_judged(ten_runs, capsys):
    mean = np.mean(judge(ten_runs, 5.5, capsys).losses)
    for target in (round(mean + 0.02, 4), round(mean - 0.02, 4)):
        judged = judge(ten_runs, target, capsys)
        assert judged.status == (0 if target > mean else 1)
        p = one_sided_p(judged.losses, target)
        assert f"t-test    p {p:.4f}: {'reached' if p < 0.01 else 'not shown'}" in judged.out
        assert f"runs      10, 3 steps each\nval_loss  mean {mean:.5f}, std " in judged.out
        assert re.search(r"^time      mean \d+\.\d{3}, std \d+\.\d{3} s on 1 x ", judged.out, re.M)


def test_a_race_without_its_worst_run_is_refused(ten_runs, tmp_path, capsys):
    folder = shutil.copytree(ten_runs, tmp_path / "chosen")
    (folder / "seed7.txt").unlink()
    assert record.main(["target", str(folder), "--loss", "5.5"]) == 2
    assert "seed 7 is missing: the 9 runs of a race are seeds 1 to 9" in capsys.readouterr().err


# ---------------------------------------------------------------- settings


def test_a_target_takes_the_time_limit_away():
    assert t.load_config([], {}).max_wallclock_seconds == 600
    assert t.load_config(["target_loss=3.28"], {}).max_wallclock_seconds == 0
    assert t.load_config([], {"TARGET_LOSS": "3.28"}).max_wallclock_seconds == 0
    assert t.load_config(["target_loss=0"], {}).max_wallclock_seconds == 600


@pytest.mark.parametrize(
    "knobs, words",
    [
        (
            {"target_loss": 3, "max_wallclock_seconds": 60},
            "max_wallclock_seconds=0, not 60: a race takes",
        ),
        ({"size_cap": 0}, "size_cap=0, no artifact, needs target_loss above 0"),
        ({"target_loss": 7, "vocab_size": 1024}, r"target_loss=7 must not exceed ln\(vocab_size=1024\)"),
    ],
)
def test_what_is_no_race_is_refused(knobs, words):
    with pytest.raises(t.InputError, match=words):
        t.load_config(as_arguments(knobs), {})


RACES = [name for name, knobs in t.PRESETS.items() if "target_loss" in knobs]


@pytest.mark.parametrize("preset", RACES)
def test_the_presets_of_races(preset):
    """They take exactly their iterations, make no artifact, and have the sizes that their names promise."""
    h = t.load_config([f"preset={preset}"], {})
    assert (h.max_wallclock_seconds, h.size_cap, h.seed, h.head_dim) == (0, 0, 1, 128)
    assert not h.calibrates
    assert h.val_loss_every and h.iterations % h.val_loss_every == 0

    parameters = sum(math.prod(shape) for shape, _ in t.parameter_table(h).values())
    if preset == "optimizer_race_small":
        plain = t.load_config(["preset=h100x1_sp1024"], {})
        assert t.parameter_table(h) == t.parameter_table(plain)
    else:
        assert parameters == pytest.approx(124e6, rel=0.005)  # measured: 0.0031
        assert (h.vocab_size, h.bos_id, h.target_loss, h.val_tokens) == (50_304, 50_256, 3.28, 20 * 524_288)


def test_the_conditions_of_modded_nanogpts_track_3():
    """524,288 tokens in rows of 1,024, and one forward and backward pass a step on each of 8 ranks."""
    h = t.load_config(["preset=optimizer_race"], {})
    assert t.cut_batch(h, 8)[:2] == (1, 64) and h.train_seq_len == h.eval_seq_len == 1024
    assert h.qk_gain_init / h.head_dim**0.5 == pytest.approx(0.12, rel=1e-3)  # measured: 2.6e-4
    parts = (h.attn_windows, h.xsa_last_n, h.ve_last_n, h.bigram_vocab_size, h.loop_times, h.grad_clip, h.fp8)
    assert not any(parts)
