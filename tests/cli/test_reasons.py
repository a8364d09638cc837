"""Every command that may run on ranks leaves its reason to torchrun, and knows the errors of its script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import audit
import script
import train_gpt as t
from lab.shared import trainer
from older_scripts import known_fault

ROOT = Path(__file__).resolve().parents[2]
RANKS = [sys.executable, str(ROOT / "tools/ranks.py"), "2"]


class Refused(NamedTuple):
    """The words of a command that every rank refuses, and a part of its reason."""

    words: list[str]
    reason: str


COMMANDS = {
    "train": Refused(["train_gpt.py", "train", "data_path=gone"], "gone: no such data folder"),
    "eval": Refused(["train_gpt.py", "eval", "gone.int6.xz"], "gone.int6.xz: cannot read the artifact"),
    "audit": Refused(["tools/audit.py", "gone.int6.xz"], "gone.int6.xz: cannot read the artifact"),
    "audit of no script": Refused(
        ["tools/audit.py", "x", "--script", "gone.py"], "gone.py: cannot read the script"
    ),
    "bench": Refused(["-m", "lab.bench", "sed=1"], "unknown config key 'sed'"),
    "bench --timeline": Refused(["-m", "lab.bench", "--timeline", "gone/t.json"], "gone"),
}


# One command of each program is always asked: each imports torch three times.
LONG = ("eval", "audit of no script", "bench --timeline")
NAMES = [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_the_last_line_of_two_ranks_is_the_reason(name):
    command = COMMANDS[name]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*RANKS, *command.words], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ranks.py: rank ") and command.reason in last, done.stderr


def test_a_refusal_is_a_line_and_torchruns_reason(tmp_path, monkeypatch, capsys):
    file = tmp_path / "reason"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert script.refuse("tool.py", script.BadInput("file: broken; mend it")) == 2
    assert capsys.readouterr().err == "tool.py: file: broken; mend it\n"
    assert json.loads(file.read_text())["message"]["message"] == "file: broken; mend it"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone/reason"))
    assert script.refuse("tool.py", t.Fault("no memory")) == 1


NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_an_audit_without_memory_is_one_line(monkeypatch, capsys):
    def load_run(*_):
        raise NO_MEMORY

    monkeypatch.setattr(audit, "load_audited", lambda path: t)
    monkeypatch.setattr(t, "load_run", load_run)
    assert audit.main(["x.int6.xz"]) == 1
    assert capsys.readouterr().err.startswith("audit.py: out of memory (DefaultCPUAllocator: ")


def test_a_bench_without_memory_is_bad_input():
    with pytest.raises(script.BadInput, match="out of memory"), trainer.known_errors_of(t):
        raise NO_MEMORY


def test_a_bench_that_lost_a_rank_ends_with_a_line():
    error = "RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer')"
    program = (
        "import train_gpt as t; from lab.shared import trainer\n"
        f"with trainer.known_errors_of(t): raise {error}"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "bench.py: another rank is gone while measuring\n")


def test_a_script_that_knows_only_bad_input_knows_no_other_error():
    class First:
        InputError = t.InputError

    refused = t.InputError("no")
    assert known_fault(First, refused) is refused
    assert known_fault(First, NO_MEMORY) is None
    script.leave_if_lost("audit.py", First, RuntimeError("gloo"), "")
