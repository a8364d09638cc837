"""Whole runs through main: training, the log, the score of the artifact's file, the cap, files in the way."""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from helpers import (
    OTHER_PARTS,
    ROOT,
    as_arguments,
    english_args,
    english_dataset,
    group_of_one,
    run_ranks,
    stop_one_line,
    temporary_folder,
)

# The exact formats that parsers of modded-nanogpt and parameter-golf logs take.
TRAIN_LINE = re.compile(
    r"^step:(\d+)/(\d+) train_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d{2})ms$"
)
VAL_LINE = re.compile(
    r"^step:(\d+)/(\d+) val_loss:(\d+\.\d{4}) val_bpb:(\d+\.\d{4}) "
    r"train_time:(\d+)ms step_avg:(\d+\.\d{2})ms$"
)
COMMUNITY = [
    re.compile(r"step:(\d+)/(\d+)\s+val_loss:([0-9.]+)"),
    re.compile(r"step:(\d+)/\d+ val_loss:([\d.]+)"),
]
SCORE_LINES = [
    r"^final_int6_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms$",
    r"^final_int6_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    r"^final_int6_sliding_window val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} stride:8 eval_time:\d+ms$",
    r"^final_int6_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    r"^Serialized model int6\+lzma: \d+ bytes$",
    r"^Code size: \d+ bytes$",
    r"^Total submission size int6\+lzma: \d+ bytes$",
    r"^warmup_step:1/2$",
    r"^warmup_step:2/2$",
]
FINAL = re.compile(
    r"^final_score metric:int6_lzma_sliding "
    r"val_loss:(?P<val_loss>\d+\.\d{8}) val_bpb:(?P<val_bpb>\d+\.\d{8}) "
    r"bytes_total:(?P<bytes_total>\d+) bytes_code:(?P<bytes_code>\d+) steps:(?P<steps>\d+) "
    r"train_time:(?P<train_time>\d+)ms eval_time:(?P<eval_time>\d+)ms seed:(?P<seed>\d+) "
    r"sha256:(?P<sha256>[0-9a-f]{64})$"
)
STEPS = 24


pytestmark = pytest.mark.usefixtures("clean_environment")


def read_run(folder, status):
    """Read what a run left in its folder: log, lines, blob of the artifact, match of the final score."""
    log = (folder / "run.txt").read_text(encoding="utf-8")
    lines = log.splitlines()
    return SimpleNamespace(
        folder=folder,
        status=status,
        log=log,
        lines=lines,
        blob=(folder / "run.int6.xz").read_bytes(),
        final=FINAL.match(lines[-1]),
    )


@cache
def finished(**knobs):
    """Train in this process and read the run. The same knobs, in the same order, train once."""
    folder = temporary_folder() / "out"
    argv = english_args(**({"iterations": STEPS, "out_dir": folder} | knobs))
    return read_run(folder, t.main(argv))


def finished_with(**knobs):
    """Train in this process and read the run. The same knobs train once."""
    return finished(**dict(sorted(knobs.items())))


def value(run, pattern):
    """Return the first group of the pattern in the only line of the log that matches it."""
    found = [match for match in (re.match(pattern, line) for line in run.lines) if match]
    assert len(found) == 1, (pattern, len(found))
    return found[0].group(1)


def starting(run, start):
    """Return the lines of the log that start so."""
    return [line for line in run.lines if line.startswith(start)]


def matches(run, pattern):
    """Return the matches of a compiled pattern, line by line."""
    return [match for match in map(pattern.match, run.lines) if match]


# ---------------------------------------------------------------- one run


def test_a_run_ends_well_and_the_loss_falls():
    run = finished_with()
    assert run.status == 0
    losses = [float(m[3]) for m in matches(run, TRAIN_LINE)]
    assert len(losses) == STEPS
    uniform = math.log(english_dataset().vocab_size)
    assert losses[0] == pytest.approx(uniform, abs=0.3)
    assert np.mean(losses[-4:]) < losses[0] - 0.5
    assert run.final is not None
    assert float(run.final["val_loss"]) < uniform - 0.5
    live = float(value(run, r"final_live val_loss:([\d.]+)"))
    unigram = float(value(run, r"unigram val_loss:([\d.]+)"))
    assert live < losses[0] and unigram < uniform


def test_the_steps_that_are_logged():
    """Multiples of train_log_every and, because the loss falls fastest at first, powers of two."""
    run = finished_with(train_log_every=10)
    assert [int(m[1]) for m in matches(run, TRAIN_LINE)] == [1, 2, 4, 8, 10, 16, 20]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("live", [False, True], ids=["pipe", "terminal"])
def test_long_work_shows_progress(live, tmp_path, monkeypatch, capsys):
    """A terminal has a live line with an ETA; a pipe has a line every 15 s, and so has the log of both."""
    clock = [100.0]
    monkeypatch.setattr(t.time, "perf_counter", lambda: clock[0])
    screen = Terminal() if live else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with group_of_one() as m:
        log = t.Log(str(tmp_path / "log.txt"), m)
        for done in range(1, 21):
            clock[0] += 2
            log.progress("work", done, 20, 100.0)
        log.close()
    lines = ["work: 8/20, ETA 24 s", "work: 16/20, ETA 8 s"]
    assert (tmp_path / "log.txt").read_text().splitlines() == lines
    assert capsys.readouterr().out.splitlines() == ([] if live else lines)
    shown = screen.getvalue().split("\r\033[K")[1:]
    assert shown == ([f"work: {done}/20, ETA {2 * (20 - done)} s" for done in range(1, 21)] if live else [])


def test_calibration_and_scores_show_progress(tmp_path, monkeypatch):
    """In warm-up twice, at the end once, and in every score."""
    monkeypatch.setattr(t, "PROGRESS", 0)
    run = read_run(tmp_path, t.main(english_args(iterations=2, gptq_batches=3, out_dir=tmp_path)))
    calibrations = [line.partition(", ETA")[0] for line in starting(run, "calibration")]
    assert calibrations == [f"calibration, batches: {i}/3" for i in (1, 2, 3)] * 3
    for label in ("validation", "ema", "final_int6_roundtrip", "final_int6_sliding_window"):
        assert len(starting(run, f"scoring {label}, windows: ")) > 0


def test_the_unigram_score_by_hand():
    """It takes the frequencies of the first training shard, with one added to each count."""
    run = finished_with()
    data = english_dataset()
    train = np.fromfile(f"{data.path}/tiny_train_000000.bin", dtype="<u2")[512:].tolist()
    targets = data.val[1 : 1 + int(value(run, r".* val_tokens:(\d+)"))]
    nats = 0.0
    for token in set(targets):
        probability = (train.count(token) + 1) / (len(train) + data.vocab_size)
        nats -= targets.count(token) * math.log(probability)
    assert value(run, r"unigram val_loss:([\d.]+)") == f"{nats / len(targets):.4f}"
    num_bytes = int(value(run, r".* val_bytes:(\d+)"))
    assert value(run, r"unigram val_loss:[\d.]+ val_bpb:([\d.]+)") == f"{nats / math.log(2) / num_bytes:.4f}"


def test_the_log_begins_with_the_source():
    run = finished_with()
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    separator = "=" * 100
    assert run.lines.count(separator) == 2 and separator not in source.splitlines()
    parts = run.log.split(f"\n{separator}\n")
    assert len(parts) == 3
    assert parts[0].rstrip("\n") == source.rstrip("\n")
    versions = parts[1].splitlines()
    assert versions[0].startswith(f"Running Python {sys.version.split()[0]}")
    assert versions[1] == f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}"
    assert versions[2].startswith("Running Triton version ") and len(versions) >= 4


def test_the_log_holds_the_resolved_config():
    run = finished_with()
    after = run.log.rsplit("=" * 100 + "\n", 1)[1].splitlines()
    assert after[0] == "config:"
    block = [line[2:] for line in after[1:] if line.startswith("  ")]
    assert block == sorted(block)
    h = t.load_config(english_args(iterations=STEPS, out_dir=run.folder), {})
    expected = {key: str(value) for key, value in dataclasses.asdict(h).items()}
    assert dict(line.split(": ", 1) for line in block) == expected
    assert after[1 + len(block)] == "preset: record"


def test_log_lines_are_the_communitys():
    run = finished_with()
    for pattern in SCORE_LINES:
        assert len(matches(run, re.compile(pattern))) == 1, pattern
    steps = matches(run, TRAIN_LINE)
    assert [int(m[1]) for m in steps] == list(range(1, STEPS + 1))
    assert {m[2] for m in steps} == {str(STEPS)}
    times = [int(m[4]) for m in steps]
    assert times == sorted(times)
    for m in steps:
        assert float(m[5]) == pytest.approx(int(m[4]) / int(m[1]), abs=1.01)
    assert [int(m[1]) for m in matches(run, VAL_LINE)] == [STEPS]
    assert all(len(pattern.findall("\n".join(run.lines))) == 1 for pattern in COMMUNITY)
    assert re.match(r"model_params:\d+$", starting(run, "model_params")[0])


def test_final_score_is_last_and_agrees_with_the_file():
    run = finished_with()
    final = run.final
    assert final and len(starting(run, "final_score")) == 1
    assert final["sha256"] == hashlib.sha256(run.blob).hexdigest()
    code = len(t.packed_code((ROOT / "train_gpt.py").read_text(encoding="utf-8")))
    assert int(final["bytes_code"]) == code == int(value(run, r"Code size: (\d+) bytes$"))
    assert int(final["bytes_total"]) == len(run.blob) + code
    assert int(value(run, r"Serialized model int6\+lzma: (\d+) bytes$")) == len(run.blob)
    assert value(run, r"Total submission size int6\+lzma: (\d+) bytes$") == final["bytes_total"]
    assert (int(final["steps"]), final["seed"]) == (STEPS, "1337")
    exact = starting(run, "final_int6_sliding_window_exact")[0]
    assert exact.endswith(f"val_loss:{final['val_loss']} val_bpb:{final['val_bpb']}")
    phases = starting(run, "phase_times")[0]
    for phase in ("load", "compile", "train", "calibrate", "quantize", "compress", "decompress", "eval"):
        assert re.search(rf"\b{phase}:\d+ms", phases), phase


def score_by_hand(blob, stride):
    """Return mean nats and bpb of an artifact on the English val split, one forward pass a score window."""
    data = english_dataset()
    config = t.open_artifact(blob)[0]["config"]
    free = [argument for argument in english_args() if argument.split("=")[0] not in config]
    h = t.load_config([*free, *as_arguments(config)], {})
    model = t.GPT(h)
    model.load_state_dict(t.unpack_artifact(blob))
    tokens = torch.tensor(data.val)
    total = len(tokens) - 1
    nats = 0.0
    with torch.no_grad():
        for start, end, score_from in t.score_windows(total, h.eval_seq_len, stride):
            logits = model.logits(tokens[None, start:end])[0].double()
            targets = tokens[start + 1 : end + 1, None]
            each = torch.logsumexp(logits, -1) - logits.gather(1, targets)[:, 0]
            nats += each[score_from - start :].sum().item()
    return nats / total, nats / math.log(2) / data.val_bytes


def test_the_score_is_the_files():
    """Both the chunked and the sliding score are those of the bytes on disk, computed by hand."""
    run = finished_with()
    loss, bits = score_by_hand(run.blob, 8)
    assert float(run.final["val_loss"]) == pytest.approx(loss, abs=2e-6)
    assert float(run.final["val_bpb"]) == pytest.approx(bits, abs=2e-6)
    chunked, _ = score_by_hand(run.blob, 32)
    logged = float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    assert logged == pytest.approx(chunked, abs=2e-6)


def test_sliding_beats_chunked_after_training():
    run = finished_with(iterations=120, ema_frac=0.02)
    sliding = float(run.final["val_loss"])
    assert sliding < float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    assert sliding < float(value(run, r"unigram val_loss:([\d.]+)")) - 0.5  # it has learnt which word follows


def eval_again(run, folder, name, *args):
    """Run `eval` on a finished run's artifact. Returns the last line of its log."""
    knobs = dict(data_path=english_dataset().path, out_dir=folder, run_id=name, eval_batch_tokens=2048)
    assert t.main(["eval", str(run.folder / "run.int6.xz"), *as_arguments(knobs), *args]) == 0
    return (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()[-1]


def loss_in(line):
    return float(re.search(r"val_loss:([\d.]+)", line)[1])


def test_eval_gives_the_same_score(tmp_path):
    run = finished_with()
    line = eval_again(run, tmp_path, "again")
    assert line.startswith("eval_score metric:int6_lzma_sliding ")
    assert line.endswith(run.final["sha256"])
    assert loss_in(line) == pytest.approx(float(run.final["val_loss"]), abs=2e-8)  # batches of another size
    assert re.search(r"val_bpb:([\d.]+)", line)[1][:8] == run.final["val_bpb"][:8]
    chunked = float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    assert loss_in(eval_again(run, tmp_path, "chunked", "eval_stride=32")) == pytest.approx(chunked, abs=2e-6)


@pytest.mark.parametrize("knobs,preset", [({}, "cpu_sp8192"), (OTHER_PARTS, "cpu")], ids=["default", "extra"])
def test_eval_builds_the_artifacts_model_whatever_the_preset(tmp_path, knobs, preset):
    run = finished_with(**knobs)
    line = eval_again(run, tmp_path, "preset", f"preset={preset}", "eval_batch_tokens=512")
    assert f"val_loss:{run.final['val_loss']} val_bpb:{run.final['val_bpb']} " in line


def test_eval_refuses_to_change_the_loop(tmp_path, capsys):
    artifact = str(finished_with().folder / "run.int6.xz")
    err = stop_one_line(["eval", artifact, f"data_path={english_dataset().path}", "loop_times=1"], capsys)
    assert "loop_times=1: the artifact fixes this knob" in err


def test_eval_with_the_batch_of_the_training_is_equal_to_the_digit(tmp_path):
    """eval_batch_tokens must fit the artifact's eval_seq_len, not the default's."""
    run = finished_with()
    line = eval_again(run, tmp_path, "batch", "eval_batch_tokens=512")
    assert f"val_loss:{run.final['val_loss']} val_bpb:{run.final['val_bpb']} " in line


def test_a_score_that_is_not_a_number_is_no_success(tmp_path, monkeypatch, capsys):
    """The status is 1 and one line says which score; no score line carries nan."""
    run = finished_with()
    real = t.evaluate

    def without_a_sum(*args):
        return real(*args)._replace(loss=math.nan, bpb=math.nan)

    monkeypatch.setattr(t, "evaluate", without_a_sum)
    capsys.readouterr()
    knobs = as_arguments(dict(data_path=english_dataset().path, out_dir=tmp_path, run_id="nan"))
    assert t.main(["eval", str(run.folder / "run.int6.xz"), *knobs, "eval_batch_tokens=512"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "final_int6_roundtrip: the score of val is nan" in captured.err
    assert "val_bpb:nan" not in captured.out


def test_eval_reads_the_environment_like_arguments(tmp_path, monkeypatch):
    run = finished_with()
    argument = eval_again(run, tmp_path, "argument", "eval_stride=32")
    monkeypatch.setenv("EVAL_STRIDE", "32")
    assert loss_in(eval_again(run, tmp_path, "environment")) == loss_in(argument)


def test_eval_of_something_else_is_one_line(tmp_path, capsys):
    run = finished_with()
    data = f"data_path={english_dataset().path}"
    damaged = {"cut": run.blob[:-9], "empty": b"", "text": b"hello", "tail": run.blob + b"x"}
    for name, blob in damaged.items():
        (tmp_path / name).write_bytes(blob)
        argv = ["eval", str(tmp_path / name), data, f"out_dir={tmp_path}/x"]
        err = stop_one_line(argv, capsys)
        assert str(tmp_path / name) in err
    assert not (tmp_path / "x").exists()
    stop_one_line(["eval", str(tmp_path), data], capsys)  # a folder


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
    assert float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)")) == pytest.approx(live, abs=0.02)
    chosen, of_live, of_average = chosen_weights(run)
    assert chosen == "ema" and of_live == of_average  # equal weights: the knob's


def test_an_average_younger_than_its_horizon_ships_the_better_weights():
    run = finished_with(ema_frac=2.0)
    chosen, of_live, of_average = chosen_weights(run)
    assert chosen == "live" and of_live < of_average - 0.1
    live = float(value(run, r"final_live val_loss:([\d.]+)"))
    assert float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)")) == pytest.approx(live, abs=0.1)
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
        assert gaps[name] == min(gaps.values()) and gaps[name] < 0.05, gaps


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

    def slowed(*args):
        time.sleep(seconds)
        return fn(*args)

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


# ---------------------------------------------------------------- files in the way


def test_a_log_that_exists_is_refused(capsys):
    run = finished_with()
    err = stop_one_line(english_args(iterations=1, out_dir=run.folder), capsys)
    assert "run.txt" in err and "run_id" in err
    assert (run.folder / "run.txt").read_text(encoding="utf-8") == run.log
    assert (run.folder / "run.int6.xz").read_bytes() == run.blob


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/b", "/tmp/x", " ", "a\nb", "x" * 201, "-x"])
def test_a_run_id_that_cannot_name_a_file_is_one_line(name, tmp_path, capsys):
    out_dir = tmp_path / "below" / "out"
    err = stop_one_line(english_args(iterations=1, run_id=name, out_dir=out_dir), capsys)
    assert "config key run_id" in err
    assert ("has control characters" if "\n" in name else "cannot name a file") in err
    assert repr(name)[:40] in err
    assert os.listdir(tmp_path) == []

    blob = finished_with().folder / "run.int6.xz"
    argv = [f"data_path={english_dataset().path}", f"out_dir={out_dir}", f"run_id={name}"]
    assert "config key run_id" in stop_one_line(["eval", str(blob), *argv], capsys)
    assert os.listdir(tmp_path) == []


def test_an_out_dir_below_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    err = stop_one_line(english_args(iterations=1, out_dir=tmp_path / "file" / "below"), capsys)
    assert str(tmp_path / "file" / "below") in err and "out_dir" in err


def test_a_disk_that_fills_up_at_export_is_one_line(tmp_path, capsys, monkeypatch):
    def full(path, blob):
        raise t.InputError(f"{path}: cannot write the artifact (No space left on device); free space")

    monkeypatch.setattr(t, "write_atomic", full)
    err = stop_one_line(english_args(iterations=1, warmup_steps=0, out_dir=tmp_path), capsys)
    assert "run.int6.xz" in err and "No space" in err


def test_without_a_run_id_the_name_tells_what_it_was(tmp_path):
    assert t.main(english_args(iterations=1, warmup_steps=0, run_id="", out_dir=tmp_path, seed=4)) == 0
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 2
    assert all(re.match(r"^\d{8}_\d{6}_record_seed4\.(txt|int6\.xz)$", n) for n in names)


# How the tensors of another script's artifact differ, and the one that the error names.
OTHER_TENSORS = [
    (lambda tensors: tensors.pop("smear_gate"), "smear_gate"),  # it had none
    (lambda tensors: tensors.update(attn_gain=tensors["attn_scale"]), "attn_gain"),  # it had one more
    (lambda tensors: tensors.update(q_gain=tensors["q_gain"][:1]), "q_gain"),  # of another shape
]


@pytest.mark.parametrize("command", ["eval", "audit"])
@pytest.mark.parametrize("change,name", OTHER_TENSORS)
def test_an_artifact_of_another_script_is_one_line(command, change, name, tmp_path, capfd, monkeypatch):
    """The header has this script's config, but the tensors differ: the line names file, tensor and remedy."""
    h = t.load_config(english_args(), {})
    tensors = {k: p.detach() for k, p in t.GPT(h).named_parameters()}
    change(tensors)
    path = tmp_path / "old.int6.xz"
    with monkeypatch.context() as patch:
        patch.setitem(t.STORED_AS, name, t.STORED_AS.get(name, "f16"))
        path.write_bytes(t.pack_artifact(tensors, h))
    err = stop_one_line([command, str(path), f"data_path={english_dataset().path}"], capfd)
    assert str(path) in err
    assert f"{name!r} does not fit" in err
    assert "the script that wrote it" in err


@pytest.mark.parametrize("command", ["eval", "audit"])
@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(num_layers=0), "config key num_layers: 0 must be at least 1"),
        (dict(num_heads=3), "config: num_heads must divide model_dim"),
        (dict(logit_softcap=0.0), "config: logit_softcap must be positive, rope_base at least 1"),
        (dict(model_dim=1 << 40), "parameters"),
    ],
    ids=str,
)
def test_a_header_that_makes_no_config_names_the_file(command, changes, words, tmp_path, capfd):
    header, payload = t.open_artifact(finished_with().blob)
    header["config"] |= changes
    text = json.dumps(header).encode()
    path = tmp_path / "odd.int6.xz"
    path.write_bytes(t.compress(b"".join([t.MAGIC, len(text).to_bytes(4, "little"), text, payload])))
    knobs = [f"data_path={english_dataset().path}", f"out_dir={tmp_path}/out"]
    err = stop_one_line([command, str(path), *knobs], capfd)
    assert f"{path} with the knobs given: config" in err and words in err
    assert not (tmp_path / "out").exists()


def test_a_knob_that_eval_refuses_is_not_blamed_on_the_artifact(capsys):
    artifact = str(finished_with().folder / "run.int6.xz")
    for knob in ("ttt_passes=many", "warp=9", "seed"):
        assert artifact not in stop_one_line(["eval", artifact, knob], capsys)


# ---------------------------------------------------------------- more processes, other ways in


def main_rank(rank, argv):
    return t.main(argv)


def test_two_ranks_train_and_score_like_one(tmp_path):
    one = finished_with()
    status = run_ranks(main_rank, 2, english_args(iterations=STEPS, out_dir=tmp_path))
    assert status == [0, 0] and sorted(os.listdir(tmp_path)) == ["run.int6.xz", "run.txt"]
    two = read_run(tmp_path, 0)
    assert float(two.final["val_loss"]) == pytest.approx(float(one.final["val_loss"]), abs=0.01)
    losses_of_two = [float(m[3]) for m in matches(two, TRAIN_LINE)]
    losses_of_one = [float(m[3]) for m in matches(one, TRAIN_LINE)]
    assert losses_of_two == pytest.approx(losses_of_one, abs=0.005)
    assert len(starting(two, "final_score")) == 1
    assert "world_size:2" in two.log


def visits_of_steps(rank, argv):
    """Train on this rank, with a clock that runs fast on rank 1. Returns Hyper.once of every step."""
    once = []
    train_step = t.train_step
    perf_counter = t.time.perf_counter

    def noted_step(backward, optimizer, batch, hp):
        once.append(hp.once)
        return train_step(backward, optimizer, batch, hp)

    t.train_step = noted_step
    t.time.perf_counter = lambda: (1 + rank) * perf_counter()
    assert t.main(argv) == 0
    return once


def test_all_ranks_loop_from_the_same_step_on(tmp_path):
    """The budget is time, and rank 1's own clock would say that its half is over sooner."""
    knobs = dict(loop_layers="0 1", loop_times=1, warmup_steps=0, gptq_batches=0)
    knobs |= dict(iterations=10_000, max_wallclock_seconds=3, out_dir=tmp_path)
    one, other = run_ranks(visits_of_steps, 2, english_args(**knobs))
    assert one == other
    assert one == sorted(one, reverse=True)
    begins = re.search(r"^loop_begins step:(\d+) ", (tmp_path / "run.txt").read_text(), re.M)
    assert 0 < one.count(True) == int(begins[1]) < len(one)


def test_two_ranks_refuse_bad_input_together(tmp_path):
    (tmp_path / "file").write_text("x")
    argv = english_args(iterations=1, data_path="/nowhere/at/all", out_dir=tmp_path / "out")
    assert run_ranks(main_rank, 2, argv) == [2, 2]
    argv = ["eval", str(tmp_path / "none.xz"), f"data_path={english_dataset().path}"]
    assert run_ranks(main_rank, 2, argv) == [2, 2]


def test_as_a_program(tmp_path):
    """Run it as a shell does: status 0, progress on stdout, no stderr, knobs from the environment.

    The console is for people: `final_score` and the step lines that tools parse are in the log.
    """
    env = os.environ | {"ITERATIONS": "2", "OMP_NUM_THREADS": "1"}
    argv = [a for a in english_args(out_dir="out") if not a.startswith("iterations=")]
    command = [sys.executable, str(ROOT / "train_gpt.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    run = read_run(tmp_path / "out", 0)
    assert run.final["steps"] == "2" and len(starting(run, "final_score")) == 1

    lines = done.stdout.splitlines()
    *_, score, size, times, log, artifact = lines
    loss, bits = (f"{float(run.final[key]):.4f}" for key in ("val_loss", "val_bpb"))
    tokens = len(english_dataset().val) - 1
    unigram = value(run, r"unigram .*val_bpb:(\S+)")
    assert score == (
        f"score: val_bpb {bits}, val_loss {loss} over {tokens:,} tokens; "
        f"token frequencies alone (unigram) give {unigram}"
    )
    total = int(run.final["bytes_total"])
    assert size == (
        f"size: {total:,} bytes with the packed code, {16_000_000 - total:,} left under the cap of 16,000,000"
    )
    seconds = float(value(run, r"phase_times .*\bcompile:(\d+)ms")) / 1000
    assert re.match(r"time: load [\d.]+ s, compile ", times) and f"compile {seconds:.1f} s" in times
    assert [log, artifact] == ["log: out/run.txt", "artifact: out/run.int6.xz"]
    assert "def main" not in done.stdout  # the source goes to the log only

    assert any(re.fullmatch(r"step 2 of 2, ETA 0 s: train_loss \S+, \S+ ms a step", line) for line in lines)
    assert not any(line.startswith(("step:", "final_", "phase_times")) for line in lines)
    assert max(map(len, lines)) <= 120
    assert sorted(p.name for p in Path(tmp_path, "out").iterdir()) == ["run.int6.xz", "run.txt"]


def test_progress_is_that_of_the_budget_which_ends_the_run():
    """A step number out of 100,000 says nothing when the clock ends the run after 500."""

    def said(step, clock_ms, **budgets):
        return t.describe_progress(t.Config(**budgets), step, clock_ms)

    by_time = dict(max_wallclock_seconds=120.0, iterations=100_000)
    assert said(25, 30_000, **by_time) == "step 25, 30 of 120 s, ETA 90 s"
    assert said(1_500, 119_900, **by_time) == "step 1,500, 120 of 120 s, ETA 0 s"
    by_steps = dict(max_wallclock_seconds=120.0, iterations=2_000)
    assert said(500, 10_000, **by_steps) == "step 500 of 2,000, ETA 30 s"
    assert said(500, 10_000, max_wallclock_seconds=0.0, iterations=2_000) == "step 500 of 2,000, ETA 30 s"
    assert said(0, 0.0, max_wallclock_seconds=0.0, iterations=2_000) == "step 0 of 2,000"


def test_a_run_that_the_clock_ends_says_so(tmp_path, capsys):
    argv = english_args(iterations=100_000, max_wallclock_seconds=3, gptq_batches=0, out_dir=tmp_path)
    assert t.main(argv) == 0
    console = capsys.readouterr().out
    assert re.search(r"^step 1, 0 of 3 s, ETA 3 s: train_loss", console, re.M)
    assert re.search(r"^training ends after [\d,]+ steps and [23]\.\d s: the time is up$", console, re.M)
    assert "100000" not in console and "100,000" not in console
    log = (tmp_path / "run.txt").read_text()
    assert re.search(r"^step:1/100000 train_loss", log, re.M) and "\nstopping_early: wallclock_cap " in log


def test_a_score_of_part_of_the_split_says_so(tmp_path, capsys):
    run = finished_with()
    tokens = len(english_dataset().val) - 1
    eval_again(run, tmp_path, "whole")
    assert "only the first" not in capsys.readouterr().out
    eval_again(run, tmp_path, "part", "val_tokens=64")
    console = capsys.readouterr().out
    said = f"only the first 64 of {tokens:,} tokens of val are scored: val_tokens=64; val_tokens=0 scores all"
    assert console.splitlines().count(said) == 1
    assert re.search(r"^score: val_bpb \S+, val_loss \S+ over 64 tokens$", console, re.M)
    assert "eval_score" not in console and f"log: {tmp_path}/part.txt" in console


def test_a_submission_over_the_cap_says_by_how_much():
    assert t.describe_size(101, 100) == "101 bytes with the packed code, 1 over the cap of 100"
    assert t.describe_size(100, 100) == "100 bytes with the packed code, 0 left under the cap of 100"


def test_bench_runs(capfd):
    assert t.main(["bench", *english_args()]) == 0
    out = capfd.readouterr().out
    for name in ("forward+backward", "optimizer", "ema", "step"):
        assert re.search(rf"^bench {re.escape(name)}: median [\d.]+ ms", out, re.M), out


def test_bench_runs_where_a_micro_batch_is_more_than_a_ranks_share():
    assert run_ranks(main_rank, 2, ["bench", *english_args(micro_batch_tokens=512)]) == [0, 0]
