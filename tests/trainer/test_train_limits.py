"""What a run depends on and what ends it: seed, weights that it ships, clock, validation, the cap."""

import math
import os
import re
import time
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from tests.helpers import english_args, english_dataset, stop_one_line, tiny
from tests.rank_cases import run_ranks
from tests.trainer.train_cases import (
    STEPS,
    TRAIN_LINE,
    VAL_LINE,
    finished_with,
    loss_in,
    matches,
    read_run,
    starting,
    value,
)

pytestmark = pytest.mark.usefixtures("clean_environment")


# ---------------------------------------------------------------- what runs depend on


def test_the_seed_decides_every_bit():
    first = finished_with()
    again = finished_with(run_id="run", train_log_every=2)
    other = finished_with(seed=7)
    assert again.folder != first.folder
    assert first.final["sha256"] == again.final["sha256"] and first.blob == again.blob
    assert first.final["val_loss"] == again.final["val_loss"]
    assert other.final["sha256"] != first.final["sha256"] and other.final["seed"] == "7"


def test_deterministic_mode_is_torchs(monkeypatch):
    """It is on while the run lasts and off in the next; two runs with it give the same bytes."""
    seen = []
    real = t.train_step

    def watched(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return real(*args)

    monkeypatch.setattr(t, "train_step", watched)
    first = finished_with(deterministic=True)
    again = finished_with(deterministic=True, train_log_every=3)
    assert all(seen)
    assert seen
    assert first.blob == again.blob
    seen.clear()
    finished_with(train_log_every=4)
    assert seen
    assert not any(seen)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def chosen_weights(run):
    """Return the weights that a run which ended early exported, and its loss with each kind of weights."""
    line = starting(run, "ended_early: ")
    assert len(line) == 1, run.lines[-20:]
    losses = re.search(r" train_loss live:([\d.]+) ema:([\d.]+) ", line[0])
    chosen = value(run, r"artifact weights:(\w+) ")
    assert line[0].endswith(f"the artifact takes {chosen}")
    return chosen, float(losses[1]), float(losses[2])


def calibrates_for(seconds, monkeypatch):
    """Make calibration take at least so long."""
    real = t.calibrate

    def slow(*args):
        time.sleep(seconds)
        return real(*args)

    monkeypatch.setattr(t, "calibrate", slow)


def test_the_time_held_back_for_calibration_is_logged(tmp_path, monkeypatch):
    calibrates_for(0.2, monkeypatch)
    argv = english_args(out_dir=tmp_path, iterations=3, max_wallclock_seconds=60)
    run = read_run(tmp_path, t.main(argv))
    seconds = float(value(run, r"held_back:([\d.]+)s of max_wallclock_seconds:60 for calibration"))
    assert 0.3 <= seconds < 5
    assert not starting(finished_with(), "held_back:")  # no limit, nothing to hold back from


@pytest.mark.parametrize(
    "knobs,rehearsal_ms,limit_ms",
    [
        (dict(max_wallclock_seconds=60), 2000.0, 57_000.0),  # 1.5 times the rehearsal
        (dict(max_wallclock_seconds=60, gptq_batches=0), 0.0, 60_000.0),
        (dict(max_wallclock_seconds=0), 2000.0, math.inf),
    ],
)
def test_what_is_held_back_by_hand(knobs, rehearsal_ms, limit_ms):
    """Without calibration, too, every rank waits for rank 0, so that their clocks begin together."""
    asked = []
    lines = []

    def number_of_rank_0(number):
        asked.append(number)
        return number

    m = SimpleNamespace(number_of_rank_0=number_of_rank_0)
    run = SimpleNamespace(h=tiny(**knobs), m=m, log=lambda line, console: lines.append(line))
    assert t.hold_back(run, rehearsal_ms) == limit_ms
    assert len(asked) == 1
    assert len(lines) == (limit_ms == 57_000.0)


def test_more_than_half_of_the_budget_held_back_is_refused(tmp_path, monkeypatch, capsys):
    calibrates_for(0.4, monkeypatch)
    err = stop_one_line(english_args(out_dir=tmp_path, max_wallclock_seconds=1), capsys)
    assert re.search(r"max_wallclock_seconds: 0\.\d of 1 s are held back.*gptq_batches=1", err), err
    assert not (tmp_path / "run.txt").exists()  # its run_id stays free


def test_one_step_ships_trained_weights():
    """With iterations=1 the artifact scores like the live weights, not like the untrained ones."""
    run = finished_with(iterations=1, matrix_lr=0.02)
    live = float(value(run, r"final_live val_loss:([\d.]+)"))
    averaged = float(value(run, r"final_ema val_loss:([\d.]+)"))
    assert averaged == live
    shipped = float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    assert shipped == pytest.approx(live, abs=0.002)  # measured: 1.5e-4
    chosen, of_live, of_average = chosen_weights(run)
    assert chosen == "ema" and of_live == of_average  # equal weights: the knob's


def test_an_average_younger_than_its_horizon_ships_the_better_weights():
    run = finished_with(ema_frac=2.0)
    chosen, of_live, of_average = chosen_weights(run)
    assert chosen == "live" and of_live < of_average - 0.1
    live = float(value(run, r"final_live val_loss:([\d.]+)"))
    shipped = float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    assert shipped == pytest.approx(live, abs=0.005)  # measured: 3.8e-4
    assert not starting(finished_with(), "ended_early: ")  # a run that ends as planned does not choose
    named = finished_with(ema_frac=2.0, artifact_weights="live")
    assert not starting(named, "ended_early: ") and named.blob == run.blob


@pytest.mark.parametrize("world", [1, 2])
def test_the_choice_follows_the_loss_on_all_ranks(world):
    """Live weights and averages are swapped in turn: both are chosen once, and the weights stay."""
    path = english_dataset().path
    for results in run_ranks(choose, world, path):
        assert results == ["live", "ema", "live"]


def choose(rank, path):
    """Return the choices for a bad average, bad live weights, and an average that is not a number."""
    h = t.load_config(english_args(data_path=path), {})
    m = t.init_machine(h, os.environ)
    model = t.GPT(h, m.ops, m.dtype)
    run = SimpleNamespace(h=h, m=m, model=model, log=lambda line: None)
    loader = t.TokenLoader(h, m)
    choices = []
    for live, average in ((0.0, 1.0), (1.0, 0.0), (0.0, math.nan)):
        ema = t.Ema(model, h)
        with torch.no_grad():
            for p, a in zip(ema.params, ema.average):
                a.copy_(p + average * torch.linspace(-1, 1, p.numel()).view_as(p))
                p.add_(live * torch.linspace(-1, 1, p.numel()).view_as(p))
        before = [p.clone() for p in ema.params]
        choices.append(t.choose_weights(run, loader, ema))
        assert all(torch.equal(p, q) for p, q in zip(ema.params, before))
        model = run.model = t.GPT(h, m.ops, m.dtype)
    return choices


def test_ema_and_live_weights_are_different_artifacts():
    ema = finished_with()
    live = finished_with(artifact_weights="live")
    assert ema.blob != live.blob
    assert "artifact weights:ema int6_step:0.0" in ema.lines
    assert "artifact weights:live int6_step:0.0" in live.lines
    for name in ("final_live", "final_ema"):  # the training was the same
        assert value(ema, rf"{name} val_loss:([\d.]+)") == value(live, rf"{name} val_loss:([\d.]+)")
    for run, name in ((ema, "ema"), (live, "live")):  # the artifact is near the weights that it names
        exact = float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
        gaps = {n: abs(exact - float(value(run, rf"final_{n} val_loss:([\d.]+)"))) for n in ("live", "ema")}
        assert gaps[name] == min(gaps.values()) and gaps[name] < 0.05, gaps  # measured: 0.001


def test_validation_during_training_changes_nothing():
    watched = finished_with(val_loss_every=10)
    assert finished_with().blob == watched.blob
    scores = matches(watched, VAL_LINE)
    assert [int(m[1]) for m in scores] == [0, 10, 20, STEPS]
    assert float(scores[0][3]) > float(scores[-1][3])


def test_no_validation_token_before_the_clock_stops():
    run = finished_with()
    opens = next(i for i, line in enumerate(run.lines) if line.startswith("data split:val "))
    last_step = max(i for i, line in enumerate(run.lines) if TRAIN_LINE.match(line))
    assert opens > last_step
    line = run.lines[opens]
    data = english_dataset()
    assert f"val_tokens:{len(data.val) - 1} val_bytes:{data.val_bytes}" in line


def test_the_wall_clock_stops_a_run():
    run = finished_with(iterations=100_000, max_wallclock_seconds=1.0, train_log_every=50)
    stop = starting(run, "stopping_early")
    assert len(stop) == 1
    found = re.match(r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000$", stop[0])
    assert found
    assert found[2] == run.final["steps"]
    assert found[1] == run.final["train_time"]
    assert 300 < int(found[1]) <= 2000  # slack for a busy machine; alone it ends below 1000
    assert 1 < int(run.final["steps"]) < 100_000 and run.status == 0


def slow(fn, seconds):
    """Return fn with a pause before each call."""

    def slowed(*args, **kwargs):
        time.sleep(seconds)
        return fn(*args, **kwargs)

    return slowed


def test_no_step_begins_that_would_end_after_the_limit(monkeypatch):
    """Steps take 0.3 s: none is begun when it and the one in flight would end after 2 s."""
    monkeypatch.setattr(t, "train_step", slow(t.train_step, 0.3))
    run = finished_with(iterations=1000, max_wallclock_seconds=2.0, warmup_steps=1, seed=11)
    assert 1000 < int(run.final["train_time"]) < 2000


def test_the_clock_stands_while_it_validates(monkeypatch):
    monkeypatch.setattr(t, "validate", slow(t.validate, 1.0))
    run = finished_with(iterations=4, val_loss_every=1, seed=11)
    assert int(run.final["train_time"]) < 2500


def test_val_tokens_cuts_the_split():
    run = finished_with(val_tokens=1000)
    assert any(x.startswith("data split:val val_tokens:1000 ") for x in run.lines)


def test_a_stride_of_a_score_window_is_the_chunked_score():
    run = finished_with(eval_stride=32)
    assert run.lines[-1].startswith("final_score metric:int6_lzma_chunked ")
    assert "sliding" not in run.lines[-1]
    assert not starting(run, "final_int6_sliding")
    exact = starting(run, "final_int6_roundtrip_exact ")
    assert len(exact) == 1 and loss_in(exact[0]) == loss_in(run.lines[-1])
    chunked = float(value(finished_with(), r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    assert loss_in(exact[0]) == chunked


def test_a_report_split_is_scored_apart():
    run = finished_with(report_split="other")
    assert run.blob == finished_with().blob
    assert run.final["val_loss"] == finished_with().final["val_loss"]
    lines = starting(run, "report split:other ")
    assert len(lines) == 1 and run.final["val_loss"] not in lines[0]


# ---------------------------------------------------------------- the cap


def test_over_the_cap_is_status_1_and_the_file_is_kept():
    run = finished_with(size_cap=1000)
    assert run.status == 1
    total = int(run.final["bytes_total"])
    assert len(run.blob) > 0 and total > 1000  # still the last line, still scored
    assert f"artifact over the cap: {total} bytes, {total - 1000} over size_cap=1000; file kept" in run.lines


def test_a_cap_in_reach_is_met_by_a_coarser_step():
    plain = finished_with()
    cap = int(plain.final["bytes_total"]) - len(plain.blob) // 20
    run = finished_with(size_cap=cap)
    assert run.status == 0 and int(run.final["bytes_total"]) <= cap
    step = float(value(run, r"artifact weights:ema int6_step:([\d.]+)"))
    assert step > 0
    refused = finished_with(size_cap=cap, fit_cap="false")
    assert refused.status == 1 and refused.blob == plain.blob
