"""run.sh, .ci/run and tools/cli.py in a copy of the tree with stand-ins for interpreter, GPUs and tools."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["train", "eval", "audit", "config", "bench", "data", "record", "test"]

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
    "data/prepare.py auto") echo "working"; echo "${DATA_LINE-data_path=made/here}"; exit ${DATA_STATUS:-0} ;;
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


def load_config(argv, env):
    values = {"preset": "", "seed": 7, "out_dir": "logs", "run_id": "", "resume": "", "codec": "xz"}
    values |= {key: env[key.upper()] for key in values if env.get(key.upper())}
    values |= dict(word.split("=", 1) for word in argv)
    values["seed"] = int(values["seed"])
    if values["preset"] == "wrong":
        raise InputError("config key preset: 'wrong' is not one of record")
    return SimpleNamespace(**values)


def plain_name(key, name):
    if "/" in name:
        raise InputError(f"config key {key}: {name!r} cannot name a file")


def cut_batch(h, world_size):
    if h.preset == "thirds" and world_size > 2:
        raise InputError("no whole micro-batches")
"""

FAKE_RECORD = """
import os


def main(argv):
    with open(os.environ["CALLS"], "a") as calls:
        print("ledger.record", *argv, "in", os.getcwd(), file=calls)
    return int(os.environ.get("RECORD_STATUS", 0))
"""

LOG_HEAD = f"import torch\n{'=' * 100}\nRunning Python 3.11\n{'=' * 100}\n"


class Tree:
    """A copy of run.sh's files, with stand-ins for the interpreter, the trainer, the ledger and the GPUs."""

    def __init__(self, folder: Path):
        self.root = folder / "repo"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        for sub in ("data", "tools/lab", ".ci"):
            (self.root / sub).mkdir(parents=True)
        self.bin.mkdir()
        copied = (
            "run.sh",
            "requirements.txt",
            "requirements-flash4.txt",
            ".ci/run",
            "tools/cli.py",
            "tools/children.py",
            "tools/script.py",
        )
        for name in copied:
            shutil.copy(ROOT / name, self.root / name)
        shutil.copytree(ROOT / "tools/ledger", self.root / "tools/ledger")
        (self.root / "tools/ledger/record.py").write_text(FAKE_RECORD)
        (self.root / "train_gpt.py").write_text(FAKE_TRAINER)
        for name in ("data/prepare.py", "tools/audit.py", "tools/lab/bench.py"):
            (self.root / name).touch()

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


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def refused(done, *words: str) -> None:
    """Require a non-zero status, nothing on stdout, and one line from run.sh that contains the words."""
    assert done.returncode != 0 and done.stdout == "", done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[run.sh ")]
    assert len(lines) == 1 and lines[0].startswith("run.sh: "), done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


# ---------------------------------------------------------------- help, bad commands


def test_bash_accepts_it():
    subprocess.run(["bash", "-n", str(ROOT / "run.sh")], check=True)
    assert os.access(ROOT / "run.sh", os.X_OK) and os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("ask", ["--help", "-h", "help"])
def test_help_lists_every_command_with_an_example(tree, ask):
    done = tree.run(ask)
    assert done.returncode == 0 and tree.calls() == []
    for command in COMMANDS:
        assert re.search(rf"^  {command}\b", done.stdout, re.M), command
        assert re.search(rf"\./run\.sh {command}\b", done.stdout), command
    assert sorted(cli.COMMANDS) == sorted(COMMANDS)


def test_help_needs_no_packages(tree):
    """On a fresh clone help comes before minutes of installing, and so does refusing a misspelt command."""
    for args in (["--help"], ["train", "--help"], ["bench", "--json", "x.json", "-h"]):
        done = tree.run(*args, BANKSHOT_PYTHON="")
        assert done.returncode == 0 and done.stdout.startswith("usage: ./run.sh"), done
    refused(tree.run("fly", BANKSHOT_PYTHON=""), "'fly'")
    refused(tree.run("eval", "gone.int6.xz", BANKSHOT_PYTHON=""), "gone.int6.xz")
    assert tree.calls() == [] and not (tree.root / ".venv").exists()


def test_bad_input_is_one_line(tree):
    refused(tree.run("fly"), "'fly'", "train", "record", "--help")
    refused(tree.run("--fast"), "--fast", "--help")
    refused(tree.run("train", "fast"), "'fast'", "key=value")
    refused(tree.run("eval"), "an artifact", "./run.sh eval")
    refused(tree.run("eval", "gone.int6.xz"), "gone.int6.xz")
    refused(tree.run("audit", "run.sh", "--script"), "no script", "--script")
    refused(tree.run("audit", "run.sh", "--script", "gone.py"), "gone.py", "--script")
    refused(tree.run("eval", "run.sh", "--script", "train_gpt.py"), "--script")
    refused(tree.run("bench", "--json"), "--json needs a value")
    refused(tree.run("bench", "--fast"), "'--fast'", "key=value")
    refused(tree.run(NPROC="two"), "NPROC=two")
    refused(tree.run(NPROC="0"), "NPROC=0")
    refused(tree.run(BANKSHOT_PYTHON="/no/python"), "BANKSHOT_PYTHON=/no/python")
    refused(tree.run(BANKSHOT_PYTHON="/bin/true"), "BANKSHOT_PYTHON=/bin/true", "requirements.txt")
    refused(tree.run("eval", ""), "an artifact", "./run.sh eval")
    assert tree.calls() == []
    (tree.root / "tools/audit.py").unlink()
    refused(tree.run("audit", "run.sh"), "tools/audit.py is missing")
    (tree.root / "tools/lab/bench.py").unlink()
    refused(tree.run("bench"), "tools/lab/bench.py is missing")
    (tree.root / "train_gpt.py").unlink()
    refused(tree.run(), "train_gpt.py is missing")


# ---------------------------------------------------------------- set-up, once


def test_too_old_python(tree):
    for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3.10"):
        shutil.copy(tree.bin / "python3", tree.bin / name)
    refused(tree.run("test", BANKSHOT_PYTHON="", FAKE_VERSION="3.9"), "3.10", "python3 is 3.9", "PYTHON=")
    assert not (tree.root / ".venv").exists()


def test_older_python_is_passed_over_for_a_fit_one(tree):
    shutil.copy(tree.bin / "python3", tree.bin / "python3.12")
    tree.tool("python3", "#!/bin/sh\necho 3.9\n")
    done = tree.run("test", BANKSHOT_PYTHON="")
    assert done.returncode == 0 and "making .venv with python3.12" in done.stderr, done.stderr


def test_venv_module_missing(tree):
    refused(
        tree.run("test", BANKSHOT_PYTHON="", VENV_MODULE_STATUS="1"),
        "python3 has no venv module",
        "python3-venv",
    )


def test_the_seconds_of_notes_go_on_after_an_install(tree):
    """A clock that begins again once the packages are there would hide where the minutes went."""
    slow = (tree.bin / "python3").read_text().replace('"-m pip") case', '"-m pip") sleep 3; case')
    tree.tool("python3", slow)
    done = tree.run("train", "data_path=d", BANKSHOT_PYTHON="")
    assert done.returncode == 0, done.stderr
    seconds = [int(found) for found in re.findall(r"^\[run\.sh (\d+)s\]", done.stderr, re.M)]
    assert seconds == sorted(seconds) and seconds[-1] >= 3 and "installed in" in done.stderr


def test_installs_once_and_again_only_when_needed(tree):
    def pip_calls():
        return sum(line.startswith("-m pip install") for line in tree.calls())

    failed = tree.run("test", BANKSHOT_PYTHON="", PIP_STATUS="1")
    refused(failed, "requirements.txt failed", "again")
    assert pip_calls() == 1 and "-m pytest" not in tree.calls()
    assert tree.run("test", BANKSHOT_PYTHON="").returncode == 0  # the half-finished install is done again
    assert pip_calls() == 2
    done = tree.run("test", BANKSHOT_PYTHON="")  # nothing to do, nothing said
    assert done.returncode == 0
    assert done.stderr == ""
    assert pip_calls() == 2
    with open(tree.root / "requirements.txt", "a") as file:
        file.write("# a new line\n")
    assert tree.run("test", BANKSHOT_PYTHON="").returncode == 0
    assert pip_calls() == 3
    assert sum(line.startswith("-m venv") for line in tree.calls()) == 1
    (tree.root / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")  # its Python went away
    assert tree.run("test", BANKSHOT_PYTHON="").returncode == 0
    assert sum(line.startswith("-m venv") for line in tree.calls()) == 2
    assert pip_calls() == 4


def test_a_symlink_to_it_works(tree, tmp_path):
    link = tmp_path / "links/bankshot"
    link.parent.mkdir()
    (tmp_path / "links/second").symlink_to("bankshot")
    link.symlink_to(os.path.relpath(tree.root / "run.sh", link.parent))
    for name in ("bankshot", "second"):
        done = tree.run("test", script=os.path.relpath(tmp_path / "links" / name, tree.root))
        assert done.returncode == 0, done.stderr


def test_an_interpreter_that_is_named_is_used_or_refused(tree):
    refused(tree.run("test", BANKSHOT_PYTHON="", PYTHON="/nope"), "PYTHON=/nope", "not a Python")
    tree.tool("old", "#!/bin/sh\necho 3.9\n")
    refused(tree.run("test", BANKSHOT_PYTHON="", PYTHON="old"), "PYTHON=old is Python 3.9")
    assert tree.calls() == []


# An interpreter that finds none of the packages.
BARE_PYTHON = """#!/bin/sh
case "$2" in *find_spec*) exit 1 ;; esac
exec "@FAKE@" "$@"
"""


def test_a_prepared_interpreter_without_packages_is_refused(tree):
    tree.tool("bare", BARE_PYTHON.replace("@FAKE@", str(tree.bin / "python3")))
    refused(tree.run("config", BANKSHOT_PYTHON="bare"), "BANKSHOT_PYTHON=bare", "numpy", "requirements.txt")
    assert tree.calls() == []


def test_a_stamped_venv_without_packages_is_filled_again(tree):
    assert tree.run("test", BANKSHOT_PYTHON="").returncode == 0
    python = tree.root / ".venv/bin/python"
    python.write_text(BARE_PYTHON.replace("@FAKE@", str(tree.bin / "python3")))
    done = tree.run("test", BANKSHOT_PYTHON="")
    assert done.returncode == 0 and "installing requirements.txt" in done.stderr
    assert sum(line.startswith("-m pip install -qq ") for line in tree.calls()) == 2


@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link"])
def test_a_venv_of_somebody_elses_is_left_alone(tree, tmp_path, linked):
    venv = tree.root / ".venv"
    if linked:
        (tmp_path / "theirs").mkdir()
        venv.symlink_to(tmp_path / "theirs")
    else:
        venv.mkdir()
    (venv / "precious").touch()
    refused(tree.run("test", BANKSHOT_PYTHON=""), str(venv), "move it", "BANKSHOT_PYTHON")
    assert os.listdir(venv) == ["precious"]


def flash4_calls(tree) -> int:
    return sum("requirements-flash4.txt" in line for line in tree.calls())


@pytest.mark.parametrize("command", [("train",), ("record", "verify")], ids=lambda command: command[0])
@pytest.mark.parametrize(
    "gpus,capability,wanted", [(1, "9.0", 1), (8, "10.0", 1), (1, "8.9", 0), (1, "N/A", 0), (0, "", 0)]
)
def test_flash4_is_installed_where_a_gpu_can_run_it(tree, gpus, capability, wanted, command):
    tree.gpus(gpus, capability)
    for run_id in "ab":  # once
        done = tree.run(*command, BANKSHOT_PYTHON="", RUN_ID=run_id)
        assert done.returncode == 0 and flash4_calls(tree) == wanted, done
    assert ("requirements-flash4" in done.stderr) == 0
    names = [line.split("/")[-1] for line in tree.calls() if line.startswith("-m pip")]
    assert names == ["requirements.txt", "requirements-flash4.txt"][: 1 + wanted]


def test_flash4_is_installed_again_when_its_file_changes(tree):
    tree.gpus(1, "9.0")
    assert tree.run("train", "run_id=a", BANKSHOT_PYTHON="").returncode == 0
    with open(tree.root / "requirements-flash4.txt", "a") as file:
        file.write("# a new line\n")
    assert tree.run("train", "run_id=b", BANKSHOT_PYTHON="").returncode == 0
    assert flash4_calls(tree) == 2


def test_training_goes_on_without_flash4(tree):
    """It is tried once, and one line says what it costs."""
    tree.gpus(1, "9.0")
    done = tree.run("train", "run_id=a", BANKSHOT_PYTHON="", FLASH4_STATUS="1")
    told = [line for line in done.stderr.splitlines() if "no FlashAttention-4" in line]
    assert done.returncode == 0
    assert len(told) == 1
    assert "attn_windows=" in told[0]
    assert "requirements-flash4.txt" in told[0]
    again = tree.run("train", "run_id=b", BANKSHOT_PYTHON="", FLASH4_STATUS="1")
    assert again.returncode == 0
    assert flash4_calls(tree) == 1
    assert "FlashAttention" not in again.stderr


@pytest.mark.parametrize("command", ["config", "test", "data"])
def test_what_trains_nothing_wants_no_flash4(tree, command):
    tree.gpus(1, "9.0")
    assert tree.run(command, BANKSHOT_PYTHON="").returncode == 0 and flash4_calls(tree) == 0


def test_a_prepared_interpreter_installs_nothing(tree):
    assert tree.run("test", "-k", "style").returncode == 0
    assert tree.calls() == [*CHECKS, f"{TESTS} -k style"]
    assert not (tree.root / ".venv").exists()


# ---------------------------------------------------------------- train


@pytest.mark.parametrize(
    "gpus, preset, launcher",
    [
        (0, "cpu", "train_gpt.py"),
        (1, "h100x1", "tools/ranks.py 1 train_gpt.py"),
        (2, "record", "tools/ranks.py 2 train_gpt.py"),
        (3, "record", "tools/ranks.py 2 train_gpt.py"),
        (4, "record", "tools/ranks.py 4 train_gpt.py"),
        (7, "record", "tools/ranks.py 4 train_gpt.py"),
        (8, "record", "tools/ranks.py 8 train_gpt.py"),
        (10, "record", "tools/ranks.py 8 train_gpt.py"),
    ],
)
def test_preset_by_machine(tree, gpus, preset, launcher):
    tree.gpus(gpus)
    done = tree.run()
    assert done.returncode == 0, done.stderr
    settings = rf"preset={preset} data_path=made/here run_id=\d{{8}}_\d{{6}}_{preset}_seed7"
    pattern = rf"{re.escape(launcher)} train {settings}"
    assert re.fullmatch(pattern, tree.train_call()), tree.train_call()
    processes = re.findall(r"ranks.py (\d)", launcher)
    shards = f" --train-shards {10 * int(processes[0])}" if processes else ""
    assert tree.calls()[0] == "data/prepare.py auto" + shards


@pytest.mark.parametrize(
    "gpus, args, env, launcher",
    [
        (8, ["preset=cpu"], {}, "train_gpt.py"),
        (8, ["preset=cpu_sp8192"], {}, "train_gpt.py"),
        (8, ["preset=h100x1"], {}, "ranks.py 8 train_gpt.py"),
        (3, ["preset=h100x1"], {}, "ranks.py 2 train_gpt.py"),
        (8, ["preset=thirds"], {}, "ranks.py 2 train_gpt.py"),
        (8, ["preset=h100x1"], {"NPROC": "1"}, "ranks.py 1 train_gpt.py"),
        (1, ["preset=record"], {}, "ranks.py 1 train_gpt.py"),
        (4, ["preset=record"], {}, "ranks.py 4 train_gpt.py"),
        (8, [], {"NPROC": "2"}, "ranks.py 2 train_gpt.py"),
        (0, [], {"NPROC": "2"}, "ranks.py 2 train_gpt.py"),
        (8, [], {"CUDA_VISIBLE_DEVICES": "3"}, "ranks.py 1 train_gpt.py"),
        (8, [], {"CUDA_VISIBLE_DEVICES": ""}, "train_gpt.py"),
    ],
)
def test_process_count(tree, gpus, args, env, launcher):
    tree.gpus(gpus)
    assert tree.run(*args, **env).returncode == 0
    call = tree.train_call().split(" train ")[0]
    assert call.endswith(launcher) and ("nproc" in call) == ("nproc" in launcher), call


@pytest.mark.parametrize(
    "args, options",
    [
        (["preset=cpu_sp8192"], " --variant sp8192"),
        (["preset=sp8192"], " --variant sp8192 --train-shards 80"),
        (["preset=h100x1_sp8192"], " --variant sp8192 --train-shards 80"),
        (["preset=cpu", "vocab_size=8192"], " --variant sp8192"),
        (["eval", "x.int6.xz", "preset=cpu_sp8192"], " --variant sp8192"),
        (["bench", "preset=cpu_sp8192"], " --variant sp8192"),
    ],
    ids=" ".join,
)
def test_data_has_the_vocabulary_of_the_run(tree, args, options):
    (tree.root / "x.int6.xz").touch()
    tree.gpus(8)
    assert tree.run(*args).returncode == 0
    assert tree.calls()[0] == "data/prepare.py auto" + options


def test_the_codec_ends_the_name_of_the_artifact(tree):
    done = tree.run("train", "data_path=d", "run_id=r", "codec=rans")
    assert done.returncode == 0
    assert "./run.sh audit logs/r.int6.rans " in done.stdout
    (tree.root / "logs/r.txt").unlink()
    again = tree.run("train", "data_path=d", "run_id=r", "codec=rans")
    assert again.returncode == 2 and "run_id=r is taken" in again.stderr


def test_arguments_pass_through(tree):
    done = tree.run(
        "train", "seed=3", "note=two words; $HOME", "data_path=d", "run_id=r", "preset=smoke", "out_dir=o"
    )
    assert done.returncode == 0, done.stderr
    assert tree.calls()[0] == (
        "train_gpt.py train preset=smoke data_path=d run_id=r seed=3 note=two words; $HOME out_dir=o"
    )
    assert tree.calls()[1] == "-m ledger.record plot o/r.txt"
    assert done.stdout.splitlines()[-5:-3] == ["plot: o/r.svg", "next:"]  # the trainer gives score and files
    again = tree.run("run_id=r", "out_dir=o", "data_path=d")
    assert again.returncode == 2 and "run_id=r is taken" in again.stderr
    assert "resume=auto" in again.stderr and "did not finish" not in again.stderr
    (tree.root / "o/r.txt").write_text(LOG_HEAD)
    cut = tree.run("run_id=r", "out_dir=o", "data_path=d")
    assert "o/r.* exists, a run that did not finish)" in cut.stderr


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_run_that_resumes_goes_on_with_its_log(tree, tmp_path, how):
    """resume=auto as it is, a file's path as one of the caller's."""
    for number, value in enumerate(["auto", "o/r.step9.0of1.ckpt"]):
        (tree.root / "o").mkdir(exist_ok=True)
        (tree.root / "o/r.txt").write_text("step:9/20\n")
        knobs, env = (
            ([f"resume={value}"], {}) if how == "argument" else ([], dict(RESUME=value, CALLS_RESUME="1"))
        )
        done = tree.run(
            "run_id=r", f"out_dir={tree.root}/o", f"data_path={tmp_path}", *knobs, cwd=tmp_path, **env
        )
        assert done.returncode == 0, done.stderr
        want = value if value == "auto" else f"{tmp_path}/{value}"
        call = [line for line in tree.calls() if "train_gpt.py train " in line][number]
        assert (f" resume={want}" in call) if how == "argument" else ("resume=" not in call)
        noted = [line for line in tree.calls() if line.startswith("RESUME=")]
        assert how == "argument" or noted[number] == f"RESUME={want}"


def test_a_resumed_run_that_fails_shows_no_score_of_before(tree):
    (tree.root / "logs").mkdir()
    (tree.root / "logs/r.txt").write_text(f"{LOG_HEAD}final_score metric:x val_loss:2.0 val_bpb:9.9\n")
    done = tree.run("run_id=r", "data_path=d", "resume=auto", TRAIN_STATUS="2", NO_SCORE="1")
    assert done.returncode == 2 and "9.9" not in done.stdout, done
    assert done.stdout.splitlines()[-4:] == [
        "score: none (the log of this run has no final_score line)",
        "artifact: none at logs/r.int6.xz (the trainer's lines say why)",
        "log: logs/r.txt",
        "plot: logs/r.svg",
    ]
    assert done.stderr.splitlines()[-1].endswith("] the trainer's exit status is 2")
    done = tree.run("run_id=r", "data_path=d", "resume=auto")
    assert done.returncode == 0 and "score: none" not in done.stdout and "\nnext:\n" in done.stdout, done


def next_commands_of(done) -> list:
    """Return the commands that a run names at its end, as lists of words."""
    shown = done.stdout.partition("\nnext:\n")[2].splitlines()
    commands = [shlex.split(line.partition("?")[2]) for line in shown]
    assert len(commands) == 3, done.stdout
    return commands


def test_the_commands_to_try_next_can_be_typed_where_the_run_was_started(tree, tmp_path):
    """They keep the run's knobs but not its name, and begin what they say."""
    audit, seed, knob = next_commands_of(
        tree.run("run_id=r", "data_path=my data", "seed=1337", "grad_clip=1")
    )
    given = ["./run.sh", "train", "preset=cpu", "data_path=my data"]
    assert audit == ["./run.sh", "audit", "logs/r.int6.xz", "preset=cpu", "data_path=my data"]
    assert seed == [*given, "grad_clip=1", "seed=42"]
    assert knob == [*given, "seed=1337", "grad_clip=1", "matrix_lr=0.1"]
    assert cli.main(["--check", *knob[1:]]) == 0  # the trainer has such a knob

    away = tmp_path / "away"
    away.mkdir()
    done = tree.run("run_id=s", "seed=42", "matrix_lr=0.02", cwd=away, NPROC="2")
    prefix = ["NPROC=2", f"{tree.root}/run.sh"]
    found = f"data_path={tree.root}/made/here"  # what prepare.py auto names from the repository
    audit, seed, knob = next_commands_of(done)
    assert audit == [*prefix, "audit", f"{tree.root}/logs/s.int6.xz", "preset=cpu", found]
    assert seed == [*prefix, "train", "preset=cpu", found, "matrix_lr=0.02", "seed=1337"]
    assert knob == [*prefix, "train", "preset=cpu", found, "seed=42", "matrix_lr=0.1"]
    for command in (seed, knob, audit):
        argv = ["bash", *command[1:]]
        again = subprocess.run(argv, cwd=away, env=tree.env(NPROC="2"), capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    assert f"tools/audit.py {tree.root}/logs/s.int6.xz preset=cpu {found}" in tree.calls()[-1]


def test_environment_settings(tree):
    done = tree.run(PRESET="smoke", SEED="5", DATA_PATH="d", OUT_DIR="o")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"train_gpt.py train preset=smoke data_path=d run_id=\w+_smoke_seed5", tree.train_call()
    )
    assert not any("prepare.py" in line for line in tree.calls())


def test_paths_from_another_directory(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert tree.run("data_path=d", "run_id=r", f"out_dir={elsewhere}", cwd=elsewhere).returncode == 0
    assert f"data_path={elsewhere}/d" in tree.train_call()
    done = tree.run("eval", "r.int6.xz", "data_path=d", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert tree.calls()[-1] == f"train_gpt.py eval {elsewhere}/r.int6.xz preset=cpu data_path={elsewhere}/d"
    (elsewhere / "their.py").touch()
    args = ("audit", "r.int6.xz", "--script", "their.py", "data_path=d")
    assert tree.run(*args, cwd=elsewhere, NPROC="2").returncode == 0
    assert tree.calls()[-1] == (
        "tools/ranks.py 2 tools/audit.py "
        f"{elsewhere}/r.int6.xz --script {elsewhere}/their.py preset=cpu data_path={elsewhere}/d"
    )
    assert tree.run("bench", "--candidates", "c.py", "--json", "/b.json", cwd=elsewhere).returncode == 0
    assert tree.calls()[-1] == f"-m lab.bench --candidates {elsewhere}/c.py --json /b.json preset=cpu"
    assert tree.run("bench", "--candidates", "c.py", "--all", "--sustain", "9", cwd=elsewhere).returncode == 0
    call = f"-m lab.bench --candidates {elsewhere}/c.py --all --sustain 9 data_path=made/here preset=cpu"
    assert tree.calls()[-1] == call
    assert tree.run("bench", "--timeline", "t.json", cwd=elsewhere, NPROC="2").returncode == 0
    assert tree.calls()[-1] == (f"tools/ranks.py 2 -m lab.bench --timeline {elsewhere}/t.json preset=cpu")
    assert tree.run("record", "verify", "here", cwd=elsewhere).returncode == 0
    assert tree.calls()[-1] == f"ledger.record verify here in {elsewhere}"
    assert tree.run("data", "auto", cwd=elsewhere).returncode == 0
    assert tree.calls()[-1] == f"{tree.root}/data/prepare.py auto"


def test_trainer_status_is_kept_and_the_plot_still_drawn(tree):
    done = tree.run("run_id=big", TRAIN_STATUS="3")
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "plot: logs/big.svg"
    done = tree.run("run_id=bad", TRAIN_STATUS="4", NO_LOG="1")
    assert done.returncode == 4
    assert not any("plot logs/bad" in line for line in tree.calls())
    assert tree.run("run_id=none", NO_LOG="1").returncode != 0  # a trainer that leaves no log did not succeed
    done = tree.run("run_id=noplot", PLOT_STATUS="1")
    assert done.returncode == 0 and "plot: none" in done.stdout


def test_data_that_cannot_be_had(tree):
    done = tree.run(DATA_STATUS="1")
    assert done.returncode == 2 and "data_path=DIR" in done.stderr.splitlines()[-1]
    done = tree.run(DATA_LINE="nothing")
    assert done.returncode == 2 and "'nothing'" in done.stderr.splitlines()[-1]
    assert not any("train_gpt.py" in line for line in tree.calls())


def read_terminal(master):
    """Return all that is written to a pseudo-terminal until its other end is closed."""
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # how Linux reports the end
            return shown
        if not piece:
            return shown
        shown += piece


def test_the_trainer_keeps_the_terminal(tree):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    done = subprocess.Popen(
        ["bash", str(tree.root / "run.sh"), "run_id=tty"],
        env=tree.env(),
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = read_terminal(master)
    os.close(master)
    assert done.wait(timeout=60) == 0, shown
    assert b"stdout is a terminal" in shown


# ---------------------------------------------------------------- the other commands


def test_the_other_commands(tree):
    (tree.root / "x.int6.xz").touch()
    for args, call in [
        (["config", "preset=record"], "train_gpt.py config preset=record"),
        (["bench"], "-m lab.bench data_path=made/here preset=cpu"),
        (["bench", "data_path=d"], "-m lab.bench preset=cpu data_path=d"),
        (
            ["bench", "--json", "b c.json", "--only", "a,b", "seed=1"],
            "-m lab.bench --json b c.json --only a,b data_path=made/here preset=cpu seed=1",
        ),
        (
            ["bench", "--candidates", "c.py", "--all"],
            "-m lab.bench --candidates c.py --all data_path=made/here preset=cpu",
        ),
        (["bench", "--candidates", "c.py"], "-m lab.bench --candidates c.py preset=cpu"),
        (
            ["bench", "--timeline", "t.json", "--steps", "3"],
            "-m lab.bench --timeline t.json --steps 3 preset=cpu",
        ),
        (
            ["bench", "--attention", "--paths", "flex,math", "--json", "a.json", "seed=1"],
            "-m lab.bench --attention --paths flex,math --json a.json preset=cpu seed=1",
        ),
        (
            ["eval", "x.int6.xz", "eval_stride=64"],
            "train_gpt.py eval x.int6.xz data_path=made/here preset=cpu eval_stride=64",
        ),
        (["audit", "x.int6.xz"], "tools/audit.py x.int6.xz data_path=made/here preset=cpu"),
        (
            ["audit", "x.int6.xz", "--script", "train_gpt.py", "data_path=d"],
            "tools/audit.py x.int6.xz --script train_gpt.py preset=cpu data_path=d",
        ),
        (["data", "text", "a b.txt"], f"{tree.root}/data/prepare.py text a b.txt"),
        (["record", "verify"], f"ledger.record verify in {tree.root}"),
        (["record", "sweep", "plan.json", "--workers", "2"], "-m lab.sweep plan.json --workers 2"),
        (["record", "wire", "ortho=mud"], "-m lab.wire ortho=mud"),
        (["record", "directions"], "-m lab.directions"),
    ]:
        done = tree.run(*args)
        assert done.returncode == 0 and done.stdout == "" and tree.calls()[-1] == call, (done, tree.calls())


def test_bench_takes_the_data_that_train_takes(tree):
    for gpus, env in ((0, {}), (1, {}), (8, {"NPROC": "8"})):
        tree.gpus(gpus)
        for command in ("train", "bench"):
            assert tree.run(command, **env).returncode == 0
        asked = [line for line in tree.calls() if line.startswith("data/prepare.py auto")]
        assert len(asked) == 2 and asked[0] == asked[1], asked
        tree.calls_file.unlink()


def test_an_artifact_is_scored_on_the_data_of_its_log(tree):
    """Not on what can be had today, which may be another text, nor after asking the hub for it."""
    (tree.root / "logs").mkdir()
    (tree.root / "logs/r.int6.xz").touch()
    log = tree.root / "logs/r.txt"
    log.write_text(f"{LOG_HEAD}config:\n  data_path: my/data\n  tokenizer_path: my/t.model\npreset: cpu\n")
    found = "train_gpt.py eval logs/r.int6.xz data_path=made/here preset=cpu"
    assert tree.run("eval", "logs/r.int6.xz").returncode == 0 and tree.calls()[-1] == found  # it is gone

    (tree.root / "my/data").mkdir(parents=True)
    calls = len(tree.calls())
    for command, program in (("eval", "train_gpt.py eval"), ("audit", "tools/audit.py")):
        done = tree.run(command, "logs/r.int6.xz")
        assert done.stderr.splitlines()[0].endswith("] data_path=my/data, as in logs/r.txt")
        knobs = "data_path=my/data tokenizer_path=my/t.model preset=cpu"
        assert tree.calls()[calls:] == [f"{program} logs/r.int6.xz {knobs}"]
        calls = len(tree.calls())
    tree.run("eval", "logs/r.int6.xz", "data_path=d")
    assert tree.calls()[calls:] == ["train_gpt.py eval logs/r.int6.xz preset=cpu data_path=d"]


def test_ci_keeps_the_exit_status(tree):
    assert tree.run(script=".ci/run", cwd=Path("/")).returncode == 0
    assert tree.run(script=".ci/run", PYTEST_STATUS="3").returncode == 3
    assert tree.calls() == [*CHECKS, TESTS, *CHECKS, TESTS]


def test_tests_fail_on_format_and_style(tree):
    done = tree.run("test", "-k", "style", RUFF_STATUS="1")
    assert done.returncode == 1 and tree.calls() == [*CHECKS, f"{TESTS} -k style"]
    assert "ruff format" in done.stderr and "ruff check" in done.stderr


def test_selections_of_tests(tree):
    for name, selection in (("fast", cli.FAST), ("stress", cli.STRESS)):
        assert tree.run("test", name, "-x").returncode == 0
        assert tree.calls()[-1] == " ".join([TESTS, *selection, "-x"])
        paths = [word.partition("::")[0] for word in selection if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)


def test_lab_commands_find_their_packages(tree):
    for args in (["bench"], ["record", "wire"]):
        assert tree.run(*args, PYTHONPATH="mine").returncode == 0
    paths = Path(f"{tree.calls_file}.path").read_text().splitlines()
    assert paths == [f"{tree.root}/tools{os.pathsep}mine"] * 2


def test_the_status_of_a_tool_is_kept(tree):
    assert tree.run("record", "verify", RECORD_STATUS="1").returncode == 1


def test_a_number_of_processes_that_cannot_share_the_batch_begins_nothing(tree):
    done = tree.run("preset=thirds", NPROC="3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert tree.calls() == []
    assert done.stderr == "train_gpt.py: no whole micro-batches\n"


def test_the_reason_of_the_first_rank_is_last(tmp_path):
    log = tmp_path / "run.txt"
    log.write_text("rank 0: of an earlier run\n")
    size = log.stat().st_size
    gone = f"rank 0: another rank is gone; its reason, if it gave one, is in {log}\n"
    trace = "rank {}: Traceback (most recent call last):\n  File x\n{}: {}\n\n"

    def reason(text):
        log.write_text("rank 0: of an earlier run\n" + text)
        return cli.read_reason(str(log), size)

    assert reason("step:1/2\n") == ""
    assert reason("step:1/2\nrank 1: x.bin: no such shard\n" + gone) == "rank 1: x.bin: no such shard"
    crashed = trace.format(1, "ZeroDivisionError", "ray") + trace.format(0, "RuntimeError", "gloo") + gone
    assert reason(crashed) == "rank 1: ZeroDivisionError: ray"
    assert reason(trace.format(0, "RuntimeError", "gloo") + gone).startswith("a rank was killed")


def test_settings_that_the_trainer_refuses_begin_nothing(tree):
    done = tree.run("preset=wrong")
    assert done.returncode == 2
    assert done.stdout == ""
    assert tree.calls() == []
    assert done.stderr == "train_gpt.py: config key preset: 'wrong' is not one of record\n"
    done = tree.run("run_id=../../x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert tree.calls() == []
    assert done.stderr == "train_gpt.py: config key run_id: '../../x' cannot name a file\n"
