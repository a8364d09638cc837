"""Full disks, stuck reads, shards cut while a run reads them, odd paths, and memory that runs out."""

import errno
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

import train_gpt as t
from ledger.read import runlog
from tests.helpers import english_dataset, stop_one_line
from tests.stress import kill_runs
from tests.trainer.fault_cases import FULL, STEPS, args, has_line, lines, needs_full, sets, trained_steps

pytestmark = pytest.mark.usefixtures("clean_environment")

# ---------------------------------------------------------------- disks


@pytest.mark.parametrize(
    "error,reason",
    [
        (t.InputError("x.ckpt: cannot write it (No space left on device); free space"), ".*No space left.*"),
        (MemoryError(), "MemoryError"),  # has no text
    ],
    ids=["full disk", "no memory"],
)
def test_a_failed_write_leaves_the_checkpoint_before(error, reason, tmp_path, monkeypatch):
    write_atomic = t.write_atomic

    def failing_after_step_4(path, *chunks):
        step = re.search(r"step(\d+)", path)  # none in the artifact's path
        if step and int(step[1]) > 4:
            raise error
        write_atomic(path, *chunks)

    monkeypatch.setattr(t, "write_atomic", failing_after_step_4)
    assert t.main(args(tmp_path)) == 0
    good = sets(tmp_path)[-1]
    assert good <= 4
    assert has_line(tmp_path, rf"checkpoint step:12 failed: {reason}; step:{good} stays$")
    assert lines(tmp_path)[-1].startswith("final_score")
    assert (tmp_path / "run.int6.xz").exists()
    assert kill_runs.final_state(tmp_path, step=good)


class FullAtStep3:
    """A log file whose disk is full when the line of step 3 is written."""

    def __init__(self, file):
        self.file = file

    def write(self, line):
        if line.startswith("step:3/"):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(line)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_under_the_log_is_one_line(tmp_path, monkeypatch, capsys):
    class FullLog(t.Log):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.file = FullAtStep3(self.file)

    monkeypatch.setattr(t, "Log", FullLog)
    err = stop_one_line(args(tmp_path), capsys)
    assert "run.txt: cannot write the log (No space left on device)" in err
    assert has_line(tmp_path, "step:2/")


class Device:
    """Folders of which one, with all below it, is full."""

    def __init__(self, monkeypatch, folder, *full):
        self.write_atomic = t.write_atomic
        self.full = [str(path) for path in full]
        monkeypatch.setattr(t, "write_atomic", self.write)
        monkeypatch.setattr(t.tempfile, "tempdir", str(folder / "temporary"))
        monkeypatch.chdir(folder / "working")

    def write(self, path, *chunks):
        if any(path.startswith(full) for full in self.full):
            raise t.InputError(f"{path}: cannot write it (No space left on device); free space")
        self.write_atomic(path, *chunks)


@pytest.fixture
def folders(tmp_path):
    for name in ("temporary", "working"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("full", [("out",), ("out", "temporary")], ids=["temporary", "working"])
def test_a_full_disk_at_the_artifact_keeps_the_weights(undisturbed, folders, monkeypatch, capsys, full):
    """They go to the temporary folder, or else to the working folder, and eval takes them from there."""
    out = folders / "out"
    Device(monkeypatch, folders, *(folders / name for name in full))
    assert t.main(args(out, checkpoint_every=0)) == 1
    console = capsys.readouterr().out.splitlines()
    artifact = Path(console[-1].removeprefix("artifact: "))
    assert artifact.parent.parent == folders / ("working" if "temporary" in full else "temporary")
    assert artifact.read_bytes() == (undisturbed.folder / "run.int6.xz").read_bytes()
    assert has_line(out, rf"artifact file:{artifact}, because {out}/run.int6.xz cannot be written")
    assert lines(out)[-1].startswith("final_score ")

    data = english_dataset().path
    assert t.main(["eval", str(artifact), f"data_path={data}", f"out_dir={folders / 'eval'}"]) == 0


def test_a_disk_that_is_full_everywhere_names_the_folders(folders, monkeypatch, capsys):
    Device(monkeypatch, folders, folders)
    err = stop_one_line(args(folders / "out", checkpoint_every=0), capsys)
    assert "run.int6.xz" in err
    assert "temporary" in err
    assert "working" in err
    assert os.listdir(folders / "temporary") == os.listdir(folders / "working") == []


class FullAtTheEnd(FullAtStep3):
    """A log file whose disk is full once training has ended."""

    def write(self, line):
        if line.startswith("final_live"):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(line)


def test_a_log_that_cannot_be_written_at_the_end_goes_on_elsewhere(undisturbed, folders, monkeypatch, capsys):
    class FullLog(t.Log):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.file = FullAtTheEnd(self.file)

    monkeypatch.setattr(t, "Log", FullLog)
    Device(monkeypatch, folders)
    monkeypatch.setattr(t, "write_atomic", refuse_logs_in(folders / "out"))
    assert t.main(args(folders / "out", checkpoint_every=0)) == 0
    console = capsys.readouterr()
    log = Path(console.out.splitlines()[-2].removeprefix("log: "))
    assert log.parent.parent == folders / "temporary" and log.name == "run.txt"
    assert "cannot write the log (No space left on device)" in console.err
    assert f"; the whole log is {log}\n" in console.err
    run = runlog.parse_log(log)
    assert run.final_scores == 1 and trained_steps(run) == list(range(1, STEPS + 1))
    assert (folders / "out/run.int6.xz").read_bytes() == (undisturbed.folder / "run.int6.xz").read_bytes()


def refuse_logs_in(folder):
    """Return a write_atomic for which the disk of a folder is too full for a log."""
    write_atomic = t.write_atomic

    def full(path, *chunks):
        if path.startswith(str(folder)) and path.endswith(".txt"):
            raise t.InputError(f"{path}: cannot write it (No space left on device); free space")
        write_atomic(path, *chunks)

    return full


def hang_reads(rank):
    """Make the disk hang at batch 6, and the trainer wait for half a second."""
    t.PATIENCE_S = 0.5
    build = t.TokenLoader.build

    def stuck(self, index):
        if index >= 6:
            time.sleep(1000)
        return build(self, index)

    t.TokenLoader.build = stuck


def test_a_stuck_read_names_the_file_and_ends(tmp_path):
    began = time.monotonic()
    assert kill_runs.ended(kill_runs.start(tmp_path, fault=hang_reads)) == [1]
    assert time.monotonic() - began < 40
    shard = rf"{english_dataset().path}/tiny_train_00000\d.bin"
    assert re.search(rf"rank 0: {shard}: not read within 0.5 s", lines(tmp_path)[-1])


def cut_shards(rank):
    """Cut all train shards to their headers at batch 6."""
    build = t.TokenLoader.build

    def cut_first(self, index):
        if index == 6:
            for path in self.files:
                os.truncate(path, t.SHARD_HEADER_BYTES)
        return build(self, index)

    t.TokenLoader.build = cut_first


def test_a_shard_that_is_cut_during_training_ends_it_in_one_line(tmp_path):
    """Its name is in the log. A mapped file would end the process with SIGBUS and no word."""
    shutil.copytree(english_dataset().path, tmp_path / "data")
    knobs = dict(data_path=tmp_path / "data", checkpoint_every=0)
    assert kill_runs.ended(kill_runs.start(tmp_path / "out", fault=cut_shards, **knobs)) == [2]
    shard = re.escape(f"{tmp_path}/data/tiny_train_00000")
    found = re.fullmatch(rf"rank 0: ({shard}\d\.bin: cut during the run; .*)", lines(tmp_path / "out")[-1])
    assert found, lines(tmp_path / "out")[-1]
    console = (tmp_path / "out/console.0").read_text().splitlines()
    assert console[-1] == f"train_gpt.py: {found[1]}" and "Traceback" not in "".join(console)


@needs_full
def test_a_link_where_a_file_is_written_first_leads_nowhere(tmp_path):
    (tmp_path / "precious").write_bytes(b"old")
    os.symlink("precious", tmp_path / "new.tmp")
    t.write_atomic(str(tmp_path / "new"), b"new")
    assert (tmp_path / "precious").read_bytes() == b"old"
    assert (tmp_path / "new").read_bytes() == b"new" and not (tmp_path / "new").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["new", "precious"]


def test_an_artifact_that_is_there_is_not_replaced(tmp_path, capsys):
    (tmp_path / "run.int6.xz").write_bytes(b"weights")
    err = stop_one_line(args(tmp_path), capsys)
    assert "run.int6.xz: exists" in err and "run_id" in err
    assert os.listdir(tmp_path) == ["run.int6.xz"] and (tmp_path / "run.int6.xz").read_bytes() == b"weights"


def test_a_log_that_a_full_disk_has_refused_can_be_closed(tmp_path):
    """Closing writes once more what could not be written."""
    log = t.Log(str(tmp_path / "run.txt"), None)
    log.file = open(FULL, "a", encoding="utf-8")
    with pytest.raises(t.InputError, match="cannot write the log .No space left on device.; free space"):
        log("step:1/2")
    log.close()
    assert log.file is None


def test_a_path_that_is_not_utf8_is_escaped_in_the_log(tmp_path):
    assert t.main(args(tmp_path / "caf\udce9", checkpoint_every=0, iterations=1)) == 0
    log = tmp_path / "caf\udce9" / "run.txt"
    assert f"  out_dir: {tmp_path}/caf\\udce9" in log.read_text(encoding="utf-8").splitlines()


def test_a_path_of_too_many_folders_is_one_line(tmp_path, capsys):
    assert "run.txt: cannot write the log (" in stop_one_line(args(f"{tmp_path}/" + "o/" * 1500), capsys)


# ---------------------------------------------------------------- memory


ALLOCATIONS = {
    "the host": MemoryError("Unable to allocate 8.2 PiB"),
    "the device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore"),
    "torch on a CPU": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "torch's C++": RuntimeError("std::bad_alloc"),
    "the system": OSError(12, "Cannot allocate memory"),
    "a codec": MemoryError(),
    "a thread's stack": RuntimeError("can't start new thread"),
}


@pytest.mark.parametrize("error", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_no_memory_is_one_line_with_the_knob(tmp_path, monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(t, "train_step", fails)
    assert t.main(args(tmp_path, checkpoint_every=0, warmup_steps=0)) == 1
    err = capsys.readouterr().err
    assert err.startswith("train_gpt.py: out of memory (") and "()" not in err
    assert "lower micro_batch_tokens, train_batch_tokens or eval_batch_tokens" in err
    assert err.count("\n") == 1
    assert lines(tmp_path)[-1].startswith("rank 0: out of memory (")


@pytest.mark.parametrize(
    "name, said",
    [
        ("gram_of", "to calibrate (MemoryError); lower micro_batch_tokens, or set gptq_batches=0"),
        ("evaluate", "to score (MemoryError); lower eval_batch_tokens"),
        ("fit_artifact", "to make the artifact (MemoryError); close other programs"),
    ],
)
def test_the_remedy_fits_the_place_where_memory_ran_out(tmp_path, monkeypatch, capsys, name, said):
    def fails(*_, **named):
        raise MemoryError

    monkeypatch.setattr(t, name, fails)
    if name == "gram_of":  # as if training had taken the memory since the trial
        monkeypatch.setattr(t, "fit_micro_batch", lambda run, optimizer: t.cut_batch(run.h, 1))
    assert t.main(args(tmp_path, checkpoint_every=0, warmup_steps=0, gptq_batches=1)) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"train_gpt.py: out of memory {said}")
    assert err.count("\n") == 1
