"""A copy of run.sh, .ci/run and tools/ with stand-ins for interpreter, GPUs and tools."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = [
    "train",
    "eval",
    "audit",
    "sample",
    "export",
    "config",
    "bench",
    "data",
    "record",
    "watch",
    "test",
]

# Notes every call, then does as little as tools/cli.py needs to go on. Questions (-c) and tools/cli.py itself
# go to a real interpreter, which takes this stand-in for its own executable.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*version_info*) if [ -n "$FAKE_VERSION" ]; then echo "$FAKE_VERSION"; exit 0; fi ;;
    "-c import venv"*) exit ${VENV_MODULE_STATUS:-0} ;;
    "-c import pip"*) exit 0 ;;
esac
if [ "$1" = -c ]; then exec "@REAL@" "$@"; fi
case "$1" in */tools/cli.py) exec "@REAL@" "@RUN_AS@" "$0" "$@" ;; esac
printf '%s\\n' "$*" >>"$CALLS"
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit ;;
    "-m pip") case "$*" in *flash4*) exit ${FLASH4_STATUS:-0} ;; esac; exit ${PIP_STATUS:-0} ;;
    "-m ruff") exit ${RUFF_STATUS:-0} ;;
    "-m pytest") exit ${PYTEST_STATUS:-0} ;;
    "-m ledger.record") echo "plot: ${4%.txt}.svg"; exit ${PLOT_STATUS:-0} ;;
    "-m lab."*) echo "$PYTHONPATH" >>"$CALLS.path" ;;
    "data/prepare.py auto")
        if [ -n "$PYTHONSAFEPATH" ]; then exit 1; fi    # it would not find its modules
        echo "working"; echo "${DATA_LINE-data_path=made/here}"; exit ${DATA_STATUS:-0} ;;
esac
case "$*" in
    *"train_gpt.py train "*)
        out_dir=${OUT_DIR:-logs}
        for a in "$@"; do case $a in run_id=*) run_id=${a#*=} ;; out_dir=*) out_dir=${a#*=} ;; esac; done
        for a in "$@"; do case $a in codec=*) codec=${a#*=} ;; esac; done
        if [ -n "$CALLS_RESUME" ]; then echo "RESUME=$RESUME" >>"$CALLS"; fi
        if [ -t 1 ]; then echo "stdout is a terminal"; else echo "stdout is no terminal"; fi
        if [ -n "$NO_LOG" ]; then exit ${TRAIN_STATUS:-0}; fi
        mkdir -p "$out_dir"
        if [ -n "$NO_SCORE" ]; then exit ${TRAIN_STATUS:-0}; fi
        if [ ! -e "$out_dir/$run_id.txt" ]; then cp "@LOG_HEAD@" "$out_dir/$run_id.txt"; fi
        echo "final_score metric:x val_loss:2.0 val_bpb:1.5" >>"$out_dir/$run_id.txt"
        case "$*" in *target_loss=*) exit ${TRAIN_STATUS:-0} ;; esac
        echo weights >"$out_dir/$run_id.int6.${codec:-xz}"
        exit ${TRAIN_STATUS:-0} ;;
esac
"""

# run_as.py EXECUTABLE FILE WORDS...: a Python file whose child processes start as EXECUTABLE
RUN_AS = """
import os, runpy, sys

sys.executable, file = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.path[0] = os.path.dirname(file)
runpy.run_path(file, run_name="__main__")
"""

FAKE_TRAINER = """
from types import SimpleNamespace


class InputError(Exception):
    pass


PATH = "path"
DATA = "data"


def knob(default, *traits):
    return default


class Config:
    data_path: str = knob("", PATH, DATA)
    tokenizer_path: str = knob("", PATH, DATA)
    out_dir: str = knob("logs", PATH)
    resume: str = knob("", PATH)
    run_id: str = ""
    seed: int = 7


def Kind(name, parse):
    return name, parse


KINDS = {"str": Kind("str", str), "int": Kind("int", int)}


def load_config(argv, env):
    values = {"preset": "", "seed": 7, "out_dir": "logs", "run_id": "", "resume": "", "codec": "xz"}
    values |= {"matrix_lr": 0.05, "target_loss": 0.0, "max_wallclock_seconds": 600.0}
    given = {key: value for key in values if (value := env.get(key.upper()))}
    given |= dict(word.split("=", 1) for word in argv)
    preset = given.get("preset", "")
    values |= {"vocab_size": 8192 if "sp8192" in preset or preset == "h100x1" else 1024, "iterations": 20000}
    values |= {"train_batch_tokens": 2048 if preset.startswith("cpu") else 786432} | given
    for key in ("seed", "vocab_size", "iterations", "train_batch_tokens"):
        values[key] = int(values[key])
    for key in ("matrix_lr", "target_loss", "max_wallclock_seconds"):
        values[key] = float(values[key])
    if values["preset"] == "wrong":
        raise InputError("config key preset: 'wrong' is not one of record")
    return SimpleNamespace(**values)


def plain_name(key, name):
    if "/" in name:
        raise InputError(f"config key {key}: {name!r} cannot name a file")


def read_knobs(argv, env):
    return dict(word.split("=", 1) for word in argv)


def make_config(knobs, header):
    if knobs.get("eval_stride") == "0":
        raise InputError("config key eval_stride: 0 must be at least 1")


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def open_artifact(blob):
    if blob == b"damaged":
        raise ValueError("artifact: damaged")
    return {"config": {"vocab_size": int(blob or b"1024")}}, b""


def cut_batch(h, world_size):
    if h.preset == "thirds" and world_size > 2:
        raise InputError("no whole micro-batches")
"""

FAKE_RECORD = """
import os


class parser:
    def parse_args(self, words):
        if words[:1] == ["fly"]:
            raise SystemExit(2)


def main(argv):
    with open(os.environ["CALLS"], "a") as calls:
        print("ledger.record", *argv, "in", os.getcwd(), file=calls)
    return int(os.environ.get("RECORD_STATUS", 0))
"""

LOG_HEAD = f"import torch\n{'=' * 100}\nRunning Python 3.11\n{'=' * 100}\n"


def copy_tools(root: Path) -> None:
    """Copy tools/ into another repository."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tools", root / "tools", ignore=ignore)


class Tree:
    """A copy of run.sh's files, with stand-ins for the interpreter, the trainer, the ledger and the GPUs."""

    def __init__(self, folder: Path):
        self.root = folder / "repo"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        for sub in ("data", ".ci"):
            (self.root / sub).mkdir(parents=True)
        self.bin.mkdir()
        for name in ("run.sh", "requirements.txt", "requirements-flash4.txt", ".ci/run"):
            shutil.copy(ROOT / name, self.root / name)
        copy_tools(self.root)
        (self.root / "tools/ledger/record.py").write_text(FAKE_RECORD)
        (self.root / "train_gpt.py").write_text(FAKE_TRAINER)
        (self.root / "data/prepare.py").touch()

        run_as = folder / "run_as.py"
        log_head = folder / "log_head"
        run_as.write_text(RUN_AS)
        log_head.write_text(LOG_HEAD)
        fake = FAKE_PYTHON.replace("@REAL@", sys.executable)
        self.tool("python3", fake.replace("@RUN_AS@", str(run_as)).replace("@LOG_HEAD@", str(log_head)))
        self.gpus(0)

    def tool(self, name: str, text: str) -> None:
        """Put a program on the PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def gpus(self, count: int, capability: str = "8.0") -> None:
        """Let nvidia-smi list so many GPUs."""
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(count))
        numbers = " ".join(map(str, range(count)))
        asked = f'case "$*" in *query-gpu=compute_cap*) printf "{capability}\\n%.0s" {numbers}; exit;; esac\n'
        self.tool("nvidia-smi", f"#!/bin/sh\n{asked if count else ''}{lines}exit {0 if count else 9}\n")

    def env(self, **extra: str) -> dict:
        """Return the environment of run.sh, which is nothing but this and `extra`."""
        base = {"PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin", "CALLS": str(self.calls_file)}
        return base | {"BANKSHOT_PYTHON": str(self.bin / "python3")} | extra

    def run(self, *args: str, cwd: Path | None = None, script: str = "run.sh", **extra: str):
        return subprocess.run(
            ["bash", str(self.root / script), *args],
            cwd=cwd or self.root,
            env=self.env(**extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list:
        """Return the command lines that the stand-ins were called with, in order."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def train_call(self) -> str:
        """Return the one command line that trains."""
        found = [line for line in self.calls() if "train_gpt.py train " in line]
        assert len(found) == 1, self.calls()
        return found[0]


CHECKS = ["-m ruff format --quiet --check .", "-m ruff check --quiet ."]

TESTS = "-m pytest -n auto --maxprocesses 2 --dist loadfile"


def refused(done, *words: str) -> None:
    """Require a non-zero status, nothing on stdout, and one line from run.sh that contains the words."""
    assert done.returncode != 0 and done.stdout == "", done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[run.sh ")]
    assert len(lines) == 1 and lines[0].startswith("run.sh: "), done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
