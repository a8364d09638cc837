"""Rough weather: kills, signals, lost ranks, numbers that are none, full disks, stuck reads. kill_runs.py does more."""

import contextlib
import dataclasses
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import kill_runs
import train_gpt as t
from helpers import (
    english_args,
    english_dataset,
    machine,
    noisy_model,
    random_tokens,
    run_ranks,
    stop_one_line,
    tiny,
)
from ledger import claims, log_claims, record_claims, runlog, tracks  # noqa: E402

STEPS = 12


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for f in dataclasses.fields(t.Config):
        monkeypatch.delenv(f.name.upper(), raising=False)


def args(folder, **knobs):
    """A short run that writes a checkpoint after every step."""
    return english_args(
        **(dict(out_dir=folder, iterations=STEPS, checkpoint_every=1e-6, warmup_steps=1) | knobs)
    )


def lines(folder):
    return (folder / "run.txt").read_text(encoding="utf-8").splitlines()


def sets(folder):
    return sorted(int(re.search(r"step(\d+)", f)[1]) for f in os.listdir(folder) if f.endswith(".ckpt"))


def at_step(monkeypatch, step, what):
    """what(optimizer) is called at the end of a training step, warm-up aside."""
    real = t.train_step

    def patched(backward, optimizer, batch, hp):
        loss = real(backward, optimizer, batch, hp)
        if optimizer.steps == step:
            what(optimizer)
        return loss

    monkeypatch.setattr(t, "train_step", patched)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final state of a run that nothing disturbs, with its folder."""
    folder = tmp_path_factory.mktemp("whole")
    assert t.main(args(folder)) == 0
    return folder, kill_runs.final_state(folder, step=STEPS)


# ---------------------------------------------------------------- checkpoints


def test_two_sets_are_kept_and_a_run_without_writes_none(whole, tmp_path):
    assert len(sets(whole[0])) == 2 and sets(whole[0])[1] == STEPS
    assert f"checkpoint step:{STEPS}" in lines(whole[0])
    assert t.main(args(tmp_path, checkpoint_every=0)) == 0
    assert sorted(os.listdir(tmp_path)) == ["run.int6.xz", "run.txt"]
    assert (tmp_path / "run.int6.xz").read_bytes() == (whole[0] / "run.int6.xz").read_bytes()


@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_is_bit_equal(world, monkeypatch):
    monkeypatch.setattr(kill_runs, "STEPS", 50)
    reference = kill_runs.undisturbed(world)
    outcomes, end, resumed = kill_runs.killed_run(reference, 1, world, random.Random(5))
    assert end == "bit-equal" and outcomes[0].startswith("as claimed"), (outcomes, end)
    assert resumed == 1


def trained(rank, folder, steps, read):
    """Some steps of four-rank-proof training, then a checkpoint; or one that is read and written elsewhere."""
    h = tiny(
        step_rule="normuon", checkpoint_every=1, resume="auto", train_batch_tokens=192, micro_batch_tokens=64
    )
    m = t.init_machine(h, os.environ)
    log = t.Log(f"{folder}/{'run' if not read else read}.txt", None)
    model = noisy_model(h, seed=3 if not read else 5)
    run = t.Run(h, m, log, type("D", (), dict(manifest_sha256="same"))(), model, None, None, {}, {})
    optimizer, ema = t.Optimizer(model, h, m), t.Ema(model, h)
    keep = t.Checkpoints(run, optimizer, ema)
    if read:
        keep.base = f"{folder}/run"
        assert keep.resume() == (steps, 123.0)
        keep.base, keep.good = f"{folder}/{read}", 0
        assert optimizer.steps == steps and ema.progress == 0.25
    else:
        for step in range(steps):
            model.loss(*(random_tokens(h, (2, 16), s + rank) for s in (step, step + 100))).backward()
            optimizer.step(t.hyper_at(h, step, 0.0))
        ema.update(0.25)
    keep.save(steps, 123.0, last=True)


@pytest.mark.parametrize("worlds", [(3, 1), (1, 4), (2, 3)], ids=str)
def test_another_number_of_ranks_reads_the_same_state(worlds, tmp_path):
    run_ranks(trained, worlds[0], str(tmp_path), 3, "")
    run_ranks(trained, worlds[1], str(tmp_path), 3, "again")
    a = kill_runs.final_state(tmp_path, worlds[0], 3)
    b = kill_runs.final_state(tmp_path, worlds[1], 3, "again")
    assert len(a) == 2 + 2 * 18 + 2 * 4 and kill_runs.same(a, b)
    assert all(
        a[f"momentum.{x.name}"].abs().max() > 0 and a[f"second.{x.name}"].min() >= 0 for x in t.MATRICES
    )


def stopped(folder, monkeypatch, step, **knobs):
    """A run that a signal ended after a step."""
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda optimizer: os.kill(os.getpid(), signal.SIGTERM))
        assert t.main(args(folder, **knobs)) == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "lost"])
def test_a_damaged_set_falls_back_to_the_one_before(whole, tmp_path, monkeypatch, damage):
    stopped(tmp_path, monkeypatch, 6)
    before, last = sets(tmp_path)
    path = tmp_path / f"run.step{last}.0of1.ckpt"
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob if damage == "flip" else blob[:-9] if damage == "cut" else b"")
    assert t.main(args(tmp_path, resume="auto")) == 0
    text = lines(tmp_path)
    assert any(x.startswith(f"checkpoint step:{last} skipped: ") and str(path) in x for x in text)
    assert any(x.startswith(f"resumed step:{before} from ") for x in text)
    assert kill_runs.same(kill_runs.final_state(tmp_path, step=STEPS), whole[1])


def test_another_config_script_or_data_is_refused_by_name(tmp_path, monkeypatch, capsys):
    stopped(tmp_path, monkeypatch, 3)
    err = stop_one_line(args(tmp_path, resume="auto", matrix_lr=0.03, seed=7), capsys)
    assert "written with another matrix_lr, seed;" in err and "run.step" in err
    with monkeypatch.context() as patch:
        edited = tmp_path / "repo" / "train_gpt.py"
        edited.parent.mkdir()
        edited.write_text(Path(t.__file__).read_text() + "# another line\n")
        patch.setattr(t, "__file__", str(edited))
        err = stop_one_line(args(tmp_path, resume="auto"), capsys)
    assert "written with another script;" in err
    path = str(tmp_path / "run.step3.0of1.ckpt")
    for other in (path.replace("step3", "step5"), str(tmp_path / "run.txt")):
        err = stop_one_line(args(tmp_path / "b", run_id=len(other), resume=other), capsys)
        assert f"{other}: not of a sound checkpoint" in err
    assert t.main(args(tmp_path / "c", resume=path, checkpoint_every=0)) == 0  # by name, into another folder
    assert f"resumed step:3 from {path[:-9]}*" in "\n".join(lines(tmp_path / "c"))


def test_auto_without_a_checkpoint_is_a_plain_run(whole, tmp_path):
    assert t.main(args(tmp_path, resume="auto")) == 0
    assert not any(x.startswith("resumed") for x in lines(tmp_path))
    assert kill_runs.same(kill_runs.final_state(tmp_path, step=STEPS), whole[1])


# ---------------------------------------------------------------- signals, and the record of a resumed run


def test_a_signal_ends_the_step_saves_and_scores(whole, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    stopped(tmp_path, monkeypatch, 5)
    assert signal.getsignal(signal.SIGTERM) is handler
    text = lines(tmp_path)
    assert sets(tmp_path)[-1] == 5 and any(
        re.match(r"stopping_early: signal train_time:\d+ms step:5/12$", x) for x in text
    )
    assert text[-1].startswith("final_score ") and " steps:5 " in text[-1]
    run = runlog.parse_log(tmp_path / "run.txt")
    assert not run.resumed and log_claims.steps_fault(run) is None
    assert t.main(args(tmp_path, resume="auto")) == 0
    assert kill_runs.same(kill_runs.final_state(tmp_path, step=STEPS), whole[1])
    run = runlog.parse_log(tmp_path / "run.txt")
    assert (
        len(run.resumed) == 1
        and log_claims.steps_fault(run) is None
        and run.final_scores == 1
        and not run.trailing
    )
    assert [s.step for s in run.steps if s.kind == "train"] == list(range(1, STEPS + 1))
    case = type(
        "Case", (), dict(track=tracks.TRACKS["track_h100x1_5min"], stored={"record": True}, runs=[run])
    )
    with pytest.raises(claims.Wrong, match="resumed 1 times: the clock does not count what was lost"):
        record_claims.claim_clock(case)
    case.stored = {"record": False}
    assert "resumed 1 times" in record_claims.claim_clock(case)


def test_steps_that_were_lost_are_void(tmp_path, monkeypatch):
    """A log as kill -9 leaves it: steps beyond the checkpoint, the last line cut."""
    stopped(tmp_path, monkeypatch, 6)
    log, last = tmp_path / "run.txt", sets(tmp_path)[0]
    (tmp_path / f"run.step{sets(tmp_path)[1]}.0of1.ckpt").unlink()
    text = log.read_text().split("stopping_early: signal")[0] + "step:7/12 train_lo"
    log.write_text(text)
    assert t.main(args(tmp_path, resume="auto")) == 0
    run = runlog.parse_log(log)
    assert run.resumed == [x for x in lines(tmp_path) if x.startswith(f"resumed step:{last} ")] != []
    assert log_claims.steps_fault(run) is None
    assert [s.step for s in run.steps if s.kind == "train"] == list(range(1, STEPS + 1))


def stop_twice(rank):
    """A signal and its echo in a step that does not end; then, later, another."""
    real, t.ECHO = t.train_step, 1

    def slow(*a):
        if a[1].steps == 4:
            for pause in (0, 1.2, 60):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(pause)
        return real(*a)

    t.train_step = slow


def test_a_second_signal_leaves_at_once(tmp_path):
    began = time.monotonic()
    assert kill_runs.ended(kill_runs.start(tmp_path, fault=stop_twice)) == [128 + signal.SIGINT]
    assert time.monotonic() - began < 40


def stop_in_warmup(rank):
    """A signal before the first step: of torch.compile's workers, too, when it is a process group's."""

    def slow(*a):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    t.warmup = slow


def test_a_signal_before_training_leaves_at_once(tmp_path):
    """There is nothing to save, and a compilation whose workers it has ended, too, would never end."""
    began = time.monotonic()
    assert kill_runs.ended(kill_runs.start(tmp_path, fault=stop_in_warmup)) == [128 + signal.SIGTERM]
    assert time.monotonic() - began < 40 and not list(tmp_path.glob("*.ckpt"))


def test_the_echo_of_a_signal_ends_training_properly(tmp_path, monkeypatch):
    """torchrun sends its ranks again what the terminal has sent them all."""
    at_step(monkeypatch, 4, lambda optimizer: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert t.main(args(tmp_path)) == 0
    text = "\n".join(lines(tmp_path))
    assert "stopping_early: signal" in text and "checkpoint step:4" in text and "final_score" in text


# ---------------------------------------------------------------- faults


def crash_on_rank_1(rank):
    real = t.train_step

    def broken(*a):
        if rank == 1 and a[1].steps == 4:
            raise ZeroDivisionError("cosmic ray")
        return real(*a)

    t.train_step = broken


def test_a_rank_that_dies_takes_the_other_down_its_traceback_first(tmp_path):
    began = time.monotonic()
    statuses = kill_runs.ended(kill_runs.start(tmp_path, 2, crash_on_rank_1))
    assert statuses == [1, 1] and time.monotonic() - began < 60
    text = lines(tmp_path)
    first, second = (
        next(i for i, x in enumerate(text) if x.startswith(f"rank {r}: Traceback")) for r in (1, 0)
    )
    assert first < second and "ZeroDivisionError: cosmic ray" in text[first:second]


def change_on_rank_1(rank):
    real = t.train_step

    def patched(*a):
        loss = real(*a)
        if rank == 1 and a[1].steps == 4:
            a[1].flat[7] += 1e-3
        return loss

    t.train_step = patched


def test_ranks_that_disagree_are_found_at_the_validation(tmp_path):
    processes = kill_runs.start(tmp_path, 2, change_on_rank_1, val_loss_every=5, checkpoint_every=0)
    assert kill_runs.ended(processes) == [1, 1]
    text = "\n".join(lines(tmp_path))
    assert re.search(r"^rank 0: step 5: tok_emb of rank 1 differs from the others", text, re.M)


@pytest.mark.parametrize("name", ["resid_mix", "kv_bank"])
def test_numbers_that_are_none_end_the_run_with_a_diagnosis(tmp_path, monkeypatch, capsys, name):
    at_step(monkeypatch, 5, lambda o: parameter(o, name).view(-1)[:1].fill_(float("nan")))
    capsys.readouterr()
    assert t.main(args(tmp_path)) == 1
    err = capsys.readouterr().err
    found = re.search(
        r"step (\d+): diverged, loss nan, gradient norm nan, first bad tensor (\w+), last good checkpoint (\d+)",
        err,
    )
    assert found and 5 <= int(found[1]) <= 7 and int(found[3]) <= 5, err
    assert found[0] in "\n".join(lines(tmp_path)) and not (tmp_path / "run.int6.xz").exists()
    for path in (tmp_path / f"run.step{n}.0of1.ckpt" for n in sets(tmp_path)):
        header_end = 4 + int.from_bytes(path.read_bytes()[:4], "little")
        assert (
            torch.frombuffer(bytearray(path.read_bytes()[header_end:-32]), dtype=torch.float32)
            .isfinite()
            .all()
        )
    monkeypatch.undo()
    assert t.main(args(tmp_path, resume="auto")) == 0  # the sound one is there to go on from


def test_a_last_step_that_diverges_is_found_too(tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, STEPS - 1, lambda o: parameter(o, "kv_bank").view(-1)[:1].fill_(float("nan")))
    assert t.main(args(tmp_path)) == 1
    assert (
        f"step {STEPS}: diverged, loss nan" in capsys.readouterr().err
        and not (tmp_path / "run.int6.xz").exists()
    )


def parameter(optimizer, name):
    """The storage of a parameter, from the optimizer's own buffers."""
    if name in ("qo_bank", "kv_bank"):  # alone in their buffers
        return optimizer.bank[name.removesuffix("_bank")]
    shapes, at = t.parameter_table(optimizer.h), 0
    for spec in t.SMALL:
        size = torch.Size(shapes[spec.name][0]).numel()
        if spec.name == name:
            return optimizer.flat[at : at + size]
        at += -(-size // 64) * 64


def test_a_gradient_beyond_reason_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(t, "DIVERGED", 1e-3)
    assert t.main(args(tmp_path, checkpoint_every=0)) == 1
    assert re.search(
        r"step 2: diverged, .* first bad tensor none, last good checkpoint none", capsys.readouterr().err
    )


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    real, sizes = t.write_atomic, {}

    def full(path, *chunks):
        step = int((re.search(r"step(\d+)", path) or [0, 0])[1])
        if step > 4:
            raise t.InputError(f"{path}: cannot write it (No space left on device); free space")
        real(path, *chunks)

    monkeypatch.setattr(t, "write_atomic", full)
    assert t.main(args(tmp_path)) == 0
    text = lines(tmp_path)
    good = sets(tmp_path)[-1]
    assert good <= 4 and any(
        re.match(rf"checkpoint step:12 failed: .*No space left.*; step:{good} stays$", x) for x in text
    )
    assert text[-1].startswith("final_score") and (tmp_path / "run.int6.xz").exists()
    assert kill_runs.final_state(tmp_path, step=good)


def test_a_full_disk_under_the_log_is_one_line(tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, line):
            if line.startswith("step:3/"):
                raise OSError(28, "No space left on device")
            self.file.write(line)

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = t.Log.__init__
    monkeypatch.setattr(
        t.Log, "__init__", lambda self, *a, **k: real(self, *a, **k) or setattr(self, "file", Full(self.file))
    )
    err = stop_one_line(args(tmp_path), capsys)
    assert "run.txt: cannot write the log (No space left on device)" in err
    assert any(x.startswith("step:2/") for x in lines(tmp_path))


def stick(rank):
    t.PATIENCE = 0.5
    real = t.TokenLoader.build

    def build(self, index):
        if index >= 6:
            time.sleep(1000)
        return real(self, index)

    t.TokenLoader.build = build


def test_a_stuck_read_names_the_file_and_ends(tmp_path):
    began = time.monotonic()
    assert kill_runs.ended(kill_runs.start(tmp_path, fault=stick)) == [1]
    assert time.monotonic() - began < 40
    assert re.search(
        rf"rank 0: {english_dataset().path}/tiny_train_00000\d.bin: not read within 0.5 s",
        lines(tmp_path)[-1],
    )


def test_host_copies_are_of_the_moment():
    x = torch.zeros(3)
    fetched = machine().fetch(x)
    x += 1
    assert fetched()[0].tolist() == [0, 0, 0]


class SideStream:
    """A stream and its event, which is passed at the `passes`-th question; both write down what is asked of them."""

    def __init__(self, events, passes):
        self.events, self.passes = events, passes

    def wait_stream(self, other):
        self.events.append(f"waits for {other}")

    def record_event(self):
        self.events.append("event")
        return self

    def query(self):
        self.passes -= 1
        return self.passes <= 0


@pytest.mark.parametrize("passes", [3, 1 << 60], ids=["soon", "never"])
def test_a_gpus_copies_cross_beside_its_queue_and_the_host_asks(monkeypatch, passes):
    events = []
    side = SideStream(events, passes)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(
        torch.cuda,
        "stream",
        lambda stream: contextlib.nullcontext(events.append(f"on side {stream is side}")),
    )
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: events.append(f"held for side {stream is side}")
    )
    monkeypatch.setattr(t, "PATIENCE", 0.3)
    fetched = dataclasses.replace(machine(), pin=True, streams=(side,)).fetch(torch.ones(2), torch.zeros(1))
    assert events == ["waits for main", "on side True", "event", "held for side True", "held for side True"]
    if passes == 3:
        assert [x.tolist() for x in fetched()] == [[1, 1], [0]] and side.passes == 0
    else:
        with pytest.raises(t.Fault, match="the device has been busy for 0.3 s"):
            fetched()


def late(rank):
    """The last rank compiles longer than the others."""
    warmup = t.warmup

    def slow(*args):
        backward = warmup(*args)
        time.sleep(4 * rank)
        return backward

    t.warmup = slow


def test_the_clock_starts_when_the_last_rank_is_ready(tmp_path):
    processes = kill_runs.start(
        tmp_path, 2, late, iterations=3, train_log_every=1, checkpoint_every=0, resume=""
    )
    assert kill_runs.ended(processes) == [0, 0]
    ms = [
        float(x)
        for x in re.findall(
            r"^step:\d/3 train_loss:\S+ train_time:(\d+)ms", (tmp_path / "run.txt").read_text(), re.M
        )
    ]
    assert len(ms) == 3 and ms[-1] < 2000, ms


@pytest.mark.gpu
def test_on_a_gpu_host_copies_are_page_locked_of_the_moment_and_cost_no_allocation():
    streams = tuple(torch.cuda.Stream() for _ in range(2))
    m = dataclasses.replace(machine(), device=torch.device("cuda"), pin=True, streams=streams)
    big, numbers = torch.zeros(1 << 26, device="cuda"), torch.zeros(2, dtype=torch.float64, device="cuda")

    def step(i, earlier):
        numbers.fill_(i)
        fetched = m.fetch(numbers)
        for _ in range(20):  # work behind the copy, which does not wait for it
            big.add_(1)
        numbers.fill_(-1)
        assert earlier is None or earlier()[0].tolist() == [i - 1, i - 1]
        return fetched

    fetched = None
    for i in range(50):
        fetched = step(i, fetched)
    blocks = torch.cuda.host_memory_stats()["num_host_alloc"]
    for i in range(50, 200):
        fetched = step(i, fetched)
    assert fetched()[0].is_pinned() and torch.cuda.host_memory_stats()["num_host_alloc"] <= blocks + 1
