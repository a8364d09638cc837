"""Whole runs through main: training, the log, the score of the artifact's file, two ranks, other ways in."""

import dataclasses
import hashlib
import io
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from lab.shared import timing
from tests.helpers import OTHER_PARTS, ROOT, as_arguments, english_args, english_dataset, stop_one_line
from tests.rank_cases import group_of_one, run_ranks
from tests.trainer.train_cases import (
    COMMUNITY,
    SCORE_LINES,
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


# ---------------------------------------------------------------- one run


def test_binding_counts_as_compiling_and_not_as_loading(monkeypatch, tmp_path):
    """An hour of binding, which did not pass, is taken from the time of loading."""
    init_machine = t.init_machine
    hour = 3_600_000

    def slow_to_bind(*args, **kwargs):
        return dataclasses.replace(init_machine(*args, **kwargs), bind_ms=float(hour))

    monkeypatch.setattr(t, "init_machine", slow_to_bind)
    assert t.main(["train", *english_args(out_dir=str(tmp_path))]) == 0
    phases = starting(read_run(tmp_path, 0), "phase_times")[0]
    load, compiling = (
        int(ms) for ms in re.match(r"phase_times load:(-?\d+)ms compile:(\d+)ms", phases).groups()
    )
    assert hour <= compiling < 1.5 * hour
    assert -hour <= load < -hour / 2


def test_nothing_is_traced_after_the_warm_up(monkeypatch, tmp_path, capsys):
    """A run that loops, validates, calibrates and scores, traced as a GPU's compiler traces it."""
    init_machine = t.init_machine
    trace = partial(torch.compile, backend="eager", dynamic=False, fullgraph=True)

    def tracing(*args, **kwargs):
        return dataclasses.replace(init_machine(*args, **kwargs), compile=trace)

    monkeypatch.setattr(t, "init_machine", tracing)
    argv = english_args(
        out_dir=str(tmp_path),
        iterations=4,
        val_loss_every=1,
        num_layers=4,
        xsa_last_n=1,
        ve_last_n=0,
        loop_layers="1",
        loop_times=1,
        gptq_batches=1,
    )
    before = t.compiled_graphs()
    assert t.main(["train", *argv]) == 0
    assert t.compiled_graphs() > before
    run = read_run(tmp_path, 0)
    assert starting(run, "loop_begins step:2 ") and not starting(run, "late compilation")

    # Scores loop from the start; the console says when training does not.
    shown = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d: val_loss", line)]
    early = [line.endswith(" with a loop that training has not begun") for line in shown]
    assert early == [True, True, True, False, False]


def test_a_run_ends_well_and_the_loss_falls():
    run = finished_with()
    assert run.status == 0
    losses = [float(m[3]) for m in matches(run, TRAIN_LINE)]
    assert len(losses) == STEPS
    uniform = math.log(english_dataset().vocab_size)
    assert losses[0] == pytest.approx(uniform, abs=0.3)  # measured: 0.005
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
    monkeypatch.setenv("TERM", "xterm")
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


def test_a_live_line_fits_the_terminal_and_its_codes_stay_out_of_stdout(tmp_path, monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(t.os, "get_terminal_size", lambda number: os.terminal_size((number * 5, 24)))
    with group_of_one() as m:
        log = t.Log(str(tmp_path / "log.txt"), m)
        log.status("step 12 of 20")
        log("a line")
        log.close()
    assert screen.getvalue() == "\r\033[Kstep 12 o\r\033[K"
    assert capsys.readouterr().out == "a line\n"


def test_a_dumb_terminal_has_no_live_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with group_of_one() as m:
        log = t.Log(str(tmp_path / "log.txt"), m)
        log.status("step 12 of 20")
        log.close()
    assert sys.stderr.getvalue() == ""


def test_calibration_and_scores_show_progress(tmp_path, monkeypatch):
    """In warm-up twice, at the end once, and in every score."""
    monkeypatch.setattr(t, "PROGRESS_S", 0)
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


def test_the_name_of_a_device_is_never_run_as_a_command(tmp_path, monkeypatch):
    """Where no program tells what the machine is, the report is the device's name as it stands."""
    monkeypatch.setenv("PATH", str(tmp_path))
    name = "GPU (it's $HOME; no command)"
    assert t.machine_report(SimpleNamespace(device_name=name)) == f"{name} cores:{os.cpu_count()}"


def test_the_log_holds_the_resolved_config():
    run = finished_with()
    after = run.log.rsplit("=" * 100 + "\n", 1)[1].splitlines()
    assert after[0] == "config:"
    block = [line[2:] for line in after[1:] if line.startswith("  ")]
    assert block == sorted(block)
    h = t.load_config(english_args(iterations=STEPS, out_dir=run.folder), {})
    expected = {key: str(value) for key, value in dataclasses.asdict(h).items()}
    assert dict(line.split(": ", 1) for line in block) == expected
    assert after[1 + len(block)] == "preset: record_sp1024"


def test_community_parsers_read_the_log_lines():
    run = finished_with()
    for pattern in SCORE_LINES:
        assert len(matches(run, re.compile(pattern))) == 1, pattern
    steps = matches(run, TRAIN_LINE)
    assert [int(m[1]) for m in steps] == list(range(1, STEPS + 1))
    assert {m[2] for m in steps} == {str(STEPS)}
    times = [int(m[4]) for m in steps]
    assert times == sorted(times)
    for m in steps:
        assert float(m[5]) == pytest.approx(int(m[4]) / int(m[1]), abs=1.01)  # measured: 0.42
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
        for start, end, score_from in zip(*t.score_windows(total, h.eval_seq_len, stride)):
            logits = model.logits(tokens[None, start:end])[0].double()
            targets = tokens[start + 1 : end + 1, None]
            each = torch.logsumexp(logits, -1) - logits.gather(1, targets)[:, 0]
            nats += each[score_from - start :].sum().item()
    return nats / total, nats / math.log(2) / data.val_bytes


def test_the_score_is_that_of_the_file():
    """Both the chunked and the sliding score are those of the bytes on disk, computed by hand."""
    run = finished_with()
    loss, bits = score_by_hand(run.blob, 8)
    assert float(run.final["val_loss"]) == pytest.approx(loss, abs=5e-8)  # measured: 8.4e-9
    assert float(run.final["val_bpb"]) == pytest.approx(bits, abs=5e-8)  # measured: 1.4e-9
    chunked, _ = score_by_hand(run.blob, 32)
    logged = float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    assert logged == pytest.approx(chunked, abs=5e-8)  # measured: 2.7e-9


def test_sliding_beats_chunked_after_training():
    run = finished_with(iterations=120, ema_frac=0.02)
    sliding = float(run.final["val_loss"])
    assert sliding < float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    # It has learned which word follows another.
    assert sliding < float(value(run, r"unigram val_loss:([\d.]+)")) - 0.5


def eval_again(run, folder, name, *args):
    """Run `eval` on a finished run's artifact. Returns the last line of its log."""
    knobs = dict(data_path=english_dataset().path, out_dir=folder, run_id=name, eval_batch_tokens=2048)
    assert t.main(["eval", str(run.folder / "run.int6.xz"), *as_arguments(knobs), *args]) == 0
    return (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()[-1]


def test_a_cpu_scores_few_tokens_at_once(tmp_path):
    """The default of a GPU would take gigabytes for logits, and a short split is padded to a batch."""
    run = finished_with()
    data = [f"data_path={english_dataset().path}", f"out_dir={tmp_path}"]
    for name, knobs, tokens in (("default", [], 8192), ("less", ["eval_batch_tokens=512"], 512)):
        assert t.main(["eval", str(run.folder / "run.int6.xz"), *data, f"run_id={name}", *knobs]) == 0
        assert f"\n  eval_batch_tokens: {tokens}\n" in (tmp_path / f"{name}.txt").read_text(encoding="utf-8")


def test_eval_gives_the_same_score(tmp_path):
    run = finished_with()
    line = eval_again(run, tmp_path, "again")
    assert line.startswith("eval_score metric:int6_lzma_sliding ")
    assert line.endswith(run.final["sha256"])
    # Batches of another size; measured: 0.
    assert loss_in(line) == pytest.approx(float(run.final["val_loss"]), abs=2e-8)
    assert re.search(r"val_bpb:([\d.]+)", line)[1][:8] == run.final["val_bpb"][:8]
    chunked = float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)"))
    # Measured: 0.
    assert loss_in(eval_again(run, tmp_path, "chunked", "eval_stride=32")) == pytest.approx(chunked, abs=2e-8)


@pytest.mark.parametrize("knobs,preset", [({}, "cpu_sp8192"), (OTHER_PARTS, "cpu")], ids=["default", "extra"])
def test_eval_builds_the_model_of_the_artifact_whatever_the_preset(tmp_path, knobs, preset):
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


# ---------------------------------------------------------------- more processes, other ways in


def main_rank(rank, argv):
    return t.main(argv)


def test_two_ranks_train_and_score_like_one(tmp_path):
    one = finished_with()
    status = run_ranks(main_rank, 2, english_args(iterations=STEPS, out_dir=tmp_path))
    assert status == [0, 0] and sorted(os.listdir(tmp_path)) == ["run.int6.xz", "run.txt"]
    two = read_run(tmp_path, 0)
    # Measured: 0.
    assert float(two.final["val_loss"]) == pytest.approx(float(one.final["val_loss"]), abs=2e-4)
    losses_of_two = [float(m[3]) for m in matches(two, TRAIN_LINE)]
    losses_of_one = [float(m[3]) for m in matches(one, TRAIN_LINE)]
    assert losses_of_two == pytest.approx(losses_of_one, abs=2e-4)  # measured: 0
    assert len(starting(two, "final_score")) == 1
    assert "world_size:2" in two.log


def visits_of_steps(rank, argv):
    """Train on this rank, with a clock that runs fast on rank 1. Returns Hyper.loops of every step."""
    loops = []
    train_step = t.train_step
    perf_counter = t.time.perf_counter

    def noted_step(backward, optimizer, batch, hp):
        loops.append(hp.loops)
        return train_step(backward, optimizer, batch, hp)

    t.train_step = noted_step
    t.time.perf_counter = lambda: (1 + rank) * perf_counter()
    assert t.main(argv) == 0
    return loops


def test_all_ranks_loop_from_the_same_step_on(tmp_path):
    """The budget is time, and rank 1's own clock would say that its half is over sooner."""
    knobs = dict(loop_layers="0 1", loop_times=1, warmup_steps=0, gptq_batches=0)
    knobs |= dict(iterations=10_000, max_wallclock_seconds=3, out_dir=tmp_path)
    one, other = run_ranks(visits_of_steps, 2, english_args(**knobs))
    assert one == other
    assert one == sorted(one)
    begins = re.search(r"^loop_begins step:(\d+) ", (tmp_path / "run.txt").read_text(), re.M)
    assert 0 < one.count(False) == int(begins[1]) < len(one)


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
    assert re.match(r"time: (load [\d.]+ s, )?compile ", times) and f"compile {seconds:.1f} s" in times
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
    held_back = t.describe_progress(t.Config(**by_time), 25, 30_000, limit_ms=90_000)
    assert held_back == "step 25, 30 of 120 s, ETA 60 s"  # the limit that was given, the end of the steps
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
    h = t.Config(size_cap=100)
    assert t.describe_size(101, h) == "101 bytes with the packed code, 1 over the cap of 100"
    assert t.describe_size(100, h) == "100 bytes with the packed code, 0 left under the cap of 100"


def test_a_cap_may_be_none_and_an_artifact_too():
    limited, free, none = (t.Config(size_cap=cap) for cap in (100, t.NO_CAP, 0))
    assert [h.makes_artifact for h in (limited, free, none)] == [True, True, False]
    assert [h.calibrates for h in (limited, free, none)] == [True, True, False]
    assert limited.has_cap and not free.has_cap
    assert t.describe_size(101, free) == "101 bytes with the packed code"


def test_bench_runs(quick_bench, capfd):
    assert t.main(["bench", *english_args()]) == 0
    out = capfd.readouterr().out
    for name in ("forward+backward", "optimizer", "ema", "step"):
        assert re.search(rf"^bench {re.escape(name)}: median [\d.]+ ms", out, re.M), out


def bench_rank(rank, argv):
    timing.HOST_SECONDS = 0.0  # a section is timed three times
    return t.main(["bench", *argv])


def test_bench_runs_where_a_micro_batch_is_more_than_a_ranks_share():
    assert run_ranks(bench_rank, 2, english_args(micro_batch_tokens=512)) == [0, 0]


def test_a_run_on_a_cpu_does_not_wait_for_the_compiler_s_import(tmp_path):
    program = "import sys, train_gpt; train_gpt.main(sys.argv[1:]); print('torch._dynamo' in sys.modules)"
    args = english_args(out_dir=tmp_path, iterations=1, warmup_steps=1)
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", program, "train", *args], env=env, capture_output=True, text=True
    )
    assert run.stdout.splitlines()[-1] == "False", run.stderr
