"""Consoles that are closed, full or not UTF-8, and a machine without a network."""

import os
import subprocess
import sys
import time

import pytest

import train_gpt as t
from ledger.read import runlog
from tests.helpers import ROOT, stop_one_line
from tests.rank_cases import group_environment
from tests.trainer.fault_cases import FULL, args, lines, needs_full

pytestmark = pytest.mark.usefixtures("clean_environment")


def run_program(*argv, **env):
    return subprocess.run(
        [sys.executable, t.__file__, *argv], capture_output=True, text=True, env=os.environ | env
    )


def test_an_ascii_console_shows_another_path_escaped(tmp_path):
    folder = tmp_path / "donn\u00e9es"
    done = run_program("config", f"data_path={folder}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "donn\\xe9es" in done.stdout
    assert done.stderr == ""
    done = run_program("train", "preset=cpu", f"data_path={folder}", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "donn\\xe9es" in done.stderr


@pytest.mark.parametrize(
    "program,word,status",
    [("train_gpt.py", "config", 1), ("tools/cli.py", "config", 1), ("tools/audit.py", "--help", 141)],
)
def test_a_reader_that_has_seen_enough_is_no_error(program, word, status):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, ROOT / program, word], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.stderr == "" and done.returncode == status


PRINTING = [
    ["train_gpt.py", "config"],
    ["tools/cli.py", "--help"],
    ["tools/audit.py", "--help"],
    ["tools/cli.py", "record", "--root", "{here}", "verify"],
]


@needs_full
@pytest.mark.parametrize("program", PRINTING, ids=lambda program: program[0] + program[1])
def test_a_console_on_a_full_disk_is_one_line(program, tmp_path):
    command = [sys.executable, ROOT / program[0], *(word.format(here=tmp_path) for word in program[1:])]
    with open(FULL, "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "standard output" in done.stderr


@pytest.mark.parametrize("program", PRINTING, ids=lambda program: program[0] + program[1])
@pytest.mark.parametrize("closed", ["1", "2", "1 2"])
def test_a_closed_console_is_no_error(program, closed, tmp_path):
    script = "".join(f"exec {number}>&-; " for number in closed.split()) + 'exec "$@"'
    command = [sys.executable, str(ROOT / program[0]), *(word.format(here=tmp_path) for word in program[1:])]
    done = subprocess.run(["sh", "-c", script, "-", *command], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert (done.stdout == "") == ("1" in closed)


@pytest.mark.parametrize("console", ["closed", "a pipe that nobody reads", "full"])
def test_training_goes_on_without_a_console(tmp_path, console):
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"closed": "exec >&- 2>&-", "full": "exec >/dev/full"}
    if console == "full" and not FULL.exists():
        pytest.skip("no /dev/full here")
    script = streams.get(console, "") + '\nexec "$@"'
    command = [sys.executable, t.__file__, *args(tmp_path, checkpoint_every=0)]
    done = subprocess.run(
        ["sh", "-c", script, "-", *command], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert lines(tmp_path)[-1].startswith("final_score ")
    assert runlog.parse_log(tmp_path / "run.txt").source == (ROOT / "train_gpt.py").read_text()


@pytest.mark.parametrize("rank, lacking", [(0, "all 2 ranks"), (1, "rank 0, which does not answer")])
def test_a_rank_whose_peer_never_starts_ends_in_one_line(rank, lacking, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(t, "JOIN_S", 0.5)
    for key, value in (group_environment(2) | {"RANK": rank, "LOCAL_RANK": rank}).items():
        monkeypatch.setenv(key, str(value))
    started = time.monotonic()
    err = stop_one_line(args(tmp_path), capfd)  # what PyTorch's C++ prints counts, too
    assert time.monotonic() - started < 10
    assert f"WORLD_SIZE=2 RANK={rank}: waited 0.5 s at MASTER_ADDR=127.0.0.1 MASTER_PORT=" in err
    assert lacking in err
    assert not list(tmp_path.iterdir())


def test_a_machine_without_a_loopback_network_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    err = stop_one_line(args(tmp_path), capsys)
    assert "cannot make the process group" in err
    assert "none0" in err
    assert "ip link set lo up" in err
