"""Checkpoints: kills and resumes, damaged and missing sets, other worlds, files that a run can do without."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_gpt as t
from tests.helpers import ROOT, english_dataset, noisy_model, random_tokens, stop_one_line, tiny, write_shard
from tests.rank_cases import run_ranks
from tests.stress import kill_runs
from tests.trainer.fault_cases import STEPS, args, checkpoint, ends_like, has_line, lines, sets, stop_after

pytestmark = pytest.mark.usefixtures("clean_environment")

# ---------------------------------------------------------------- checkpoints


def test_two_sets_are_kept_and_a_run_without_writes_none(undisturbed, tmp_path):
    assert len(sets(undisturbed.folder)) == 2 and sets(undisturbed.folder)[1] == STEPS
    assert f"checkpoint step:{STEPS}" in lines(undisturbed.folder)

    assert t.main(args(tmp_path, checkpoint_every=0)) == 0
    assert sorted(os.listdir(tmp_path)) == ["run.int6.xz", "run.txt"]
    assert (tmp_path / "run.int6.xz").read_bytes() == (undisturbed.folder / "run.int6.xz").read_bytes()


@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_is_bit_equal(world, monkeypatch):
    monkeypatch.setattr(kill_runs, "STEPS", 50)
    reference = kill_runs.undisturbed(world)
    outcomes, end, resumed = kill_runs.killed_run(reference, 1, world, random.Random(5))
    assert end == "bit-equal" and outcomes[0].startswith("as claimed"), (outcomes, end)
    assert resumed == 1


def test_two_processes_cannot_have_one_run(tmp_path, capsys):
    """The second one, this one, says so. The first one's death frees the run."""
    knobs = dict(resume="auto", checkpoint_every=0)
    endless = args(tmp_path, iterations=100_000, **knobs)
    first = subprocess.Popen([sys.executable, t.__file__, "train", *endless], stdout=subprocess.DEVNULL)
    try:
        log = tmp_path / "run.txt"
        assert kill_runs.wait_until(lambda: log.exists() and "model_params" in log.read_text())
        err = stop_one_line(endless, capsys)
    finally:
        first.kill()
        first.wait()
    assert "run.txt: another process is writing it" in err
    assert "run_id" in err
    assert t.main(args(tmp_path, iterations=2, **knobs)) == 0


def flipped(blob):
    """Return the bytes with a bit in the middle flipped."""
    damaged = bytearray(blob)
    damaged[len(damaged) // 2] ^= 1
    return bytes(damaged)


def cut(blob):
    """Return a flipped file without its last nine bytes."""
    return flipped(blob)[:-9]


def emptied(blob):
    """Return no bytes."""
    return b""


@pytest.mark.parametrize("missing", ["gone.step4.0of1.ckpt", "run.txt"])
def test_a_checkpoint_that_is_missing_leaves_no_log(tmp_path, capsys, missing):
    err = stop_one_line(args(tmp_path / "out", resume=tmp_path / missing), capsys)
    assert "config key resume" in err
    assert str(tmp_path / missing) in err
    assert "resume=auto" in err
    assert os.listdir(tmp_path) == []


def test_a_set_with_a_missing_part_leaves_no_log(tmp_path, capsys):
    part = tmp_path / "run.step4.0of2.ckpt"
    part.touch()
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert "no checkpoint file" in err and "run.step4.1of2.ckpt" in err
    assert os.listdir(tmp_path) == [part.name]


@pytest.mark.parametrize("damage", [flipped, cut, emptied], ids=["flip", "cut", "lost"])
def test_a_named_set_that_is_damaged_leaves_no_log(undisturbed, tmp_path, capsys, damage):
    part = checkpoint(tmp_path, STEPS)
    part.write_bytes(damage(checkpoint(undisturbed.folder, STEPS).read_bytes()))
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert "config key resume: " in err and f"{part}: checksum mismatch" in err and "resume=auto" in err
    err = stop_one_line(args(tmp_path / "out", resume=part, seed=8), capsys)
    assert os.listdir(tmp_path) == [part.name]


def test_a_named_set_of_another_run_leaves_no_log(undisturbed, tmp_path, capsys):
    part = checkpoint(undisturbed.folder, STEPS)
    err = stop_one_line(args(tmp_path / "out", resume=part, seed=8), capsys)
    assert "written with another seed;" in err
    assert os.listdir(tmp_path) == []


def test_a_file_that_only_has_the_checksum_of_a_checkpoint_is_damaged(tmp_path, capsys):
    part = tmp_path / "run.step4.0of1.ckpt"
    text = b'{"tensors": []}'
    blob = len(text).to_bytes(4, "little") + text
    part.write_bytes(blob + hashlib.sha256(blob).digest())
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert f"{part}: its header is not that of a checkpoint" in err
    assert os.listdir(tmp_path) == [part.name]


def forged(blob, change):
    """Return a checkpoint with change(header, payload) and a checksum that is right."""
    end = 4 + int.from_bytes(blob[:4], "little")
    header, payload = change(json.loads(blob[4:end]), blob[end : -t.DIGEST_BYTES])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = len(text).to_bytes(4, "little") + text + payload
    return body + hashlib.sha256(body).digest()


FORGERIES = {
    "of another step": lambda header, payload: (header | {"step": 2}, payload),
    "of step -1": lambda header, payload: (header | {"step": -1}, payload),
    "of a clock that is no number": lambda header, payload: (header | {"train_ms": math.nan}, payload),
    "of infinite progress": lambda header, payload: (header | {"progress": math.inf}, payload),
    "of position -1": lambda header, payload: (header | {"position": -1}, payload),
    "of a deep header": lambda header, payload: (b"[" * 100_000, payload),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_checkpoint_is_skipped_or_refused_in_one_line(undisturbed, tmp_path, capsys, name):
    part = checkpoint(tmp_path, STEPS)
    part.write_bytes(forged(checkpoint(undisturbed.folder, STEPS).read_bytes(), FORGERIES[name]))
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert "config key resume: " in err and "resume=auto" in err
    assert os.listdir(tmp_path) == [part.name]


def swapped_names(header, payload):
    (first, *first_rest), *others, (last, *last_rest) = header["tensors"]
    return header | {"tensors": [[last, *first_rest], *others, [first, *last_rest]]}, payload


def no_last_tensor(header, payload):
    *kept, (_, _, _, offset) = header["tensors"]
    return header | {"tensors": kept}, payload[:offset]


@pytest.mark.parametrize("change", [swapped_names, no_last_tensor])
def test_a_checkpoint_of_other_tensors_is_refused_in_one_line(undisturbed, tmp_path, capsys, change):
    part = checkpoint(tmp_path, STEPS)
    part.write_bytes(forged(checkpoint(undisturbed.folder, STEPS).read_bytes(), change))
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert "does not fit" in err and "run_id" in err


def test_no_set_has_no_parts_and_a_huge_one_is_not_listed(undisturbed, tmp_path, capsys):
    blob = checkpoint(undisturbed.folder, STEPS).read_bytes()
    assert t.set_of("out/run.step4.0of0.ckpt") is None
    part = tmp_path / f"run.step4.0of{10**15}.ckpt"  # a list of its files would fill the memory
    part.write_bytes(blob)
    err = stop_one_line(args(tmp_path / "out", resume=part), capsys)
    assert f"run.step4.1of{10**15}.ckpt" in err


def test_pipes_in_a_run_s_folder_do_not_stop_it(undisturbed, tmp_path, capsys):
    """A pipe that nobody writes to would be read for ever."""
    part = checkpoint(tmp_path, STEPS)
    part.write_bytes(checkpoint(undisturbed.folder, STEPS).read_bytes())
    os.mkfifo(checkpoint(tmp_path, STEPS + 1))
    os.mkfifo(tmp_path / "run.int6.xz.tmp")
    assert t.main(args(tmp_path, resume="auto")) == 0
    assert has_line(tmp_path, rf"checkpoint step:{STEPS + 1} skipped: .*not a file")
    assert has_line(tmp_path, f"resumed step:{STEPS} ")
    os.mkfifo(tmp_path / "other.txt")
    err = stop_one_line(args(tmp_path, run_id="other", resume="auto"), capsys)
    assert "other.txt: cannot write the log (it is a pipe)" in err


def test_a_train_split_that_is_missing_or_too_small_leaves_no_log(tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(english_dataset().path, data)
    for shard in data.glob("*_train_*.bin"):
        shard.unlink()
    err = stop_one_line(args(tmp_path / "out", data_path=data), capsys)
    assert str(data) in err and "train" in err

    write_shard(data / "tiny_train_000000.bin", [1] * 32)
    err = stop_one_line(args(tmp_path / "out", data_path=data), capsys)
    assert f"{data}: the train split has 32 tokens" in err
    assert not (tmp_path / "out").exists()


class StandingLoader:
    """A loader that only knows its position."""

    position = 0

    def seek_sequence(self, taken):
        self.position = taken


def checkpoints_of(folder, name, model_seed):
    """Return the Checkpoints of a run that logs nothing. Its batch can be cut for 1, 2, 3 or 4 ranks."""
    h = tiny(
        step_rule="normuon", checkpoint_every=1, resume="auto", train_batch_tokens=192, micro_batch_tokens=64
    )
    m = t.init_machine(h, os.environ)
    model = noisy_model(h, seed=model_seed)
    run = t.Run(
        h=h,
        m=m,
        log=t.Log(f"{folder}/{name}.txt", None),
        dataset=SimpleNamespace(manifest_sha256="same"),
        model=model,
        loss_fn=None,
        plain_loss_fn=None,
        nats_fn=None,
        phases={},
        splits={},
    )
    return t.Checkpoints(run, t.Optimizer(model, h, m), t.Ema(model, h), StandingLoader())


def test_a_run_does_not_change_once_it_is_built():
    run = t.Run(*[None] * len(fields(t.Run)))
    with pytest.raises(FrozenInstanceError):
        run.resumed = None


def train_and_save(rank, folder, steps):
    """Train for some steps, then save as "run"."""
    checkpoints = checkpoints_of(folder, "run", model_seed=3)
    model = checkpoints.run.model
    optimizer = checkpoints.optimizer
    for step in range(steps):
        tokens = random_tokens(optimizer.h, (2, 16), step + rank)
        targets = random_tokens(optimizer.h, (2, 16), step + 100 + rank)
        model.loss(tokens, targets).backward()
        optimizer.step(t.hyper_at(optimizer.h, step, 0.0))
    checkpoints.ema.update(0.25)
    checkpoints.loader.seek_sequence(36)
    checkpoints.save(steps, 123.0, last=True)


def resume_and_save(rank, folder, steps, name):
    """Resume from "run" with other initial weights, then save under another name."""
    checkpoints = checkpoints_of(folder, "run", model_seed=5)
    run = checkpoints.run
    state = t.read_state(run.h, run.m, checkpoints.base, run.dataset)
    assert checkpoints.restore(state) == t.Start(steps, 123.0) and state.parts == []
    assert checkpoints.optimizer.steps == steps and checkpoints.ema.progress == 0.25
    assert checkpoints.loader.position == 36
    checkpoints.base = f"{folder}/{name}"
    checkpoints.good = 0
    checkpoints.save(steps, 123.0, last=True)


@pytest.mark.parametrize("worlds", [(3, 1), (1, 4), (2, 3)], ids=str)
def test_another_number_of_ranks_reads_the_same_state(worlds, tmp_path):
    writers, readers = worlds
    run_ranks(train_and_save, writers, str(tmp_path), 3)
    run_ranks(resume_and_save, readers, str(tmp_path), 3, "again")
    written = kill_runs.final_state(tmp_path, writers, 3)
    again = kill_runs.final_state(tmp_path, readers, 3, "again")
    # Two flat moments, all parameters and their averages, momentum and second moment of the matrices.
    expected = {"flat_m", "flat_v"}
    for name in t.parameter_table(tiny()):
        expected |= {name, f"average.{name}"}
    for spec in t.MATRICES:
        expected |= {f"momentum.{spec.name}", f"second.{spec.name}"}
    assert set(written) == expected and kill_runs.same(written, again)
    for spec in t.MATRICES:
        assert written[f"momentum.{spec.name}"].abs().max() > 0
        assert written[f"second.{spec.name}"].min() >= 0


@pytest.mark.parametrize("damage", [flipped, cut, emptied], ids=["flip", "cut", "lost"])
def test_a_damaged_set_falls_back_to_the_one_before(undisturbed, tmp_path, monkeypatch, damage):
    stop_after(tmp_path, monkeypatch, 6)
    before, last = sets(tmp_path)
    path = checkpoint(tmp_path, last)
    path.write_bytes(damage(path.read_bytes()))

    assert t.main(args(tmp_path, resume="auto")) == 0
    assert has_line(tmp_path, rf"checkpoint step:{last} skipped: .*{re.escape(str(path))}")
    assert has_line(tmp_path, rf"resumed step:{before} from ")
    assert ends_like(undisturbed, tmp_path)


LOOP = dict(loop_layers="0 1", loop_times=2, loop_frac=0.5)


@pytest.fixture(scope="module")
def undisturbed_loop(tmp_path_factory):
    """Return the final state of a run whose loop begins in the middle."""
    folder = tmp_path_factory.mktemp("undisturbed_loop")
    assert t.main(args(folder, **LOOP)) == 0
    assert has_line(folder, f"loop_begins step:{STEPS // 2} ")
    return SimpleNamespace(state=kill_runs.final_state(folder, step=STEPS))


@pytest.mark.parametrize("step", [4, STEPS // 2 - 1, STEPS // 2, STEPS // 2 + 2])
def test_resuming_on_either_side_of_the_loops_begin_is_bit_equal(
    undisturbed_loop, tmp_path, monkeypatch, step
):
    stop_after(tmp_path, monkeypatch, step, **LOOP)
    assert t.main(args(tmp_path, resume="auto", **LOOP)) == 0
    assert has_line(tmp_path, f"resumed step:{step} from ")
    assert ends_like(undisturbed_loop, tmp_path)


def test_another_config_script_or_data_is_refused_by_name(tmp_path, monkeypatch, capsys):
    """The log stays as it was."""
    stop_after(tmp_path, monkeypatch, 3)
    log = (tmp_path / "run.txt").read_bytes()
    err = stop_one_line(args(tmp_path, resume="auto", matrix_lr=0.03, seed=7), capsys)
    assert "written with another matrix_lr, seed;" in err and "run.step" in err

    edited = tmp_path / "repo" / "train_gpt.py"
    edited.parent.mkdir()
    edited.write_text(Path(t.__file__).read_text() + "# another line\n")
    with monkeypatch.context() as patch:
        patch.setattr(t, "__file__", str(edited))
        err = stop_one_line(args(tmp_path, resume="auto"), capsys)
    assert "written with another script;" in err
    assert (tmp_path / "run.txt").read_bytes() == log

    path = str(checkpoint(tmp_path, 3))
    for other in (path.replace("step3", "step5"), str(tmp_path / "run.txt")):
        err = stop_one_line(args(tmp_path / "b", run_id=len(other), resume=other), capsys)
        assert "config key resume: " in err
        assert other in err
        assert "resume=auto" in err
    assert t.main(args(tmp_path / "c", resume=path, checkpoint_every=0)) == 0  # by name, into another folder
    assert f"resumed step:3 from {path[:-9]}*" in "\n".join(lines(tmp_path / "c"))


def test_auto_without_a_checkpoint_is_a_plain_run(undisturbed, tmp_path):
    assert t.main(args(tmp_path, resume="auto")) == 0
    assert not has_line(tmp_path, "resumed")
    assert ends_like(undisturbed, tmp_path)


# ---------------------------------------------------------------- files that a run can do without


def test_the_script_alone_in_a_folder_checkpoints_and_resumes(tmp_path):
    """The trainer needs no other file of the repository, and a second run resumes what the first wrote."""
    shutil.copyfile(ROOT / "train_gpt.py", tmp_path / "train_gpt.py")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "train_gpt.py", *args("logs", resume="auto")]
    options = dict(cwd=tmp_path, env=env, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    logs = tmp_path / "logs"
    artifact = logs / "run.int6.xz"
    whole = artifact.read_bytes()
    before, last = sets(logs)
    assert last == STEPS and not has_line(logs, "resumed")

    # As if the run had been killed before its last set.
    checkpoint(logs, last).unlink()
    artifact.unlink()
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert has_line(logs, f"resumed step:{before} from ")
    assert artifact.read_bytes() == whole


def test_eval_needs_no_training_shards(undisturbed, tmp_path):
    held_out = tmp_path / "data"
    shutil.copytree(english_dataset().path, held_out, ignore=shutil.ignore_patterns("*_train_*"))
    assert not t.find_shards(str(held_out), "train") and t.find_shards(str(held_out), "val")

    artifact = str(undisturbed.folder / "run.int6.xz")
    knobs = [f"data_path={held_out}", f"out_dir={tmp_path}", "run_id=run", "eval_batch_tokens=512"]
    assert t.main(["eval", artifact, *knobs]) == 0
    score = r"(metric:\S+ val_loss:\S+ val_bpb:\S+) "
    trained = re.match(f"final_score {score}", lines(undisturbed.folder)[-1])
    evaluated = re.match(f"eval_score {score}", lines(tmp_path)[-1])
    assert evaluated[1] == trained[1]
