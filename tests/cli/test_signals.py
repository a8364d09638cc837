"""A signal to a program that waits for another ends both, within two seconds."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import children
from tests.cli.run_sh_tree import copy_tools

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2

# A program that says its process id on stderr and stays; argv[1] is the signal that ends it, with status 5.
STAYS = """
import os, signal, sys, time
signal.signal(int(sys.argv[1]), lambda number, frame: sys.exit(5))
print(os.getpid(), file=sys.stderr, flush=True)
time.sleep(60)
"""
STARTS = {
    "resolve": "from commands import ask_trainer; ask_trainer.resolve([])",
    "find_data": "from commands import datasets; datasets.find_data()",
    "draw_plot": "from commands import run_report; run_report.draw_plot('log')",
    "reproduce": "from ledger.show import reproduce; reproduce.run_command(['python', 'train_gpt.py'], None)",
    "train_gpt.py": "import train_gpt; sys.exit(train_gpt.main(['bench']))",
}


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


def said(program: subprocess.Popen) -> int:
    """Return the process id that a program or its child says on stderr."""
    return int(next(line for line in program.stderr if line.strip().isdecimal()))


def end_both(parent: subprocess.Popen, child: int, number: int) -> int:
    """Send a signal to the parent and return its status. Both must be gone soon."""
    try:
        sent = time.monotonic()
        parent.send_signal(number)
        status = parent.wait(timeout=20)
        while is_alive(child) and time.monotonic() < sent + SECONDS:
            time.sleep(0.02)
        assert time.monotonic() - sent < SECONDS
        assert not is_alive(child)
        return status
    finally:
        if parent.poll() is None:
            parent.kill()
        parent.stderr.close()
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


def start(program: str) -> subprocess.Popen:
    """Start a Python program of tools/."""
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT / "tools", stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("name", STARTS)
def test_sigterm_ends_what_was_started(name, tmp_path):
    """Every program that starts another."""
    stays = tmp_path / "stays"
    stays.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{STAYS}' {int(signal.SIGTERM)}\n")
    stays.chmod(0o755)
    parent = start(
        f"import sys; sys.path += [{str(ROOT)!r}]; sys.executable = {str(stays)!r}; {STARTS[name]}"
    )
    status = end_both(parent, said(parent), signal.SIGTERM)
    assert status == (5 if name == "train_gpt.py" else 128 + signal.SIGTERM)


def test_sigterm_to_the_ledger_ends_the_script_that_it_asks(tmp_path):
    file = tmp_path / "child"
    script = f"import os, time; open({str(file)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    parent = start(f"from ledger.read import probe; probe.probe_script({script!r}, 'cpu')")
    while not (file.exists() and file.read_text().endswith("\n")):
        assert parent.poll() is None
        time.sleep(0.02)
    assert end_both(parent, int(file.read_text()), signal.SIGTERM) == 128 + signal.SIGTERM


# An interpreter whose pip, or venv, says its process id and stays. Else it does what the real one does.
SLOW_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m $STAYS" ]; then echo "$$" >&2; @FIRST@ sleep 60; exit 5; fi
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit; fi
exec "@REAL@" "$@"
"""
INSTALLS = {"venv": "", "pip": "", "pip that does not listen": "trap '' INT;"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("name", INSTALLS)
def test_a_signal_to_run_sh_ends_its_install(name, number, tmp_path):
    repository = tmp_path / "repo"
    repository.mkdir()
    for file in ("run.sh", "requirements.txt", "train_gpt.py"):
        shutil.copy(ROOT / file, repository / file)
    copy_tools(repository)
    python = tmp_path / "python"
    python.write_text(SLOW_PYTHON.replace("@REAL@", sys.executable).replace("@FIRST@", INSTALLS[name]))
    python.chmod(0o755)

    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "STAYS": name.split()[0]}
    command = ["bash", str(repository / "run.sh"), "config"]
    default = partial(signal.signal, number, signal.SIG_DFL)  # bash keeps ignoring what nohup has it ignore
    run_sh = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    assert end_both(run_sh, said(run_sh), number) == 128 + number
    assert not (repository / ".venv/.requirements.sha256").exists()


def test_a_program_may_be_asked_from_any_thread():
    """Signals can be handled in the main thread only; a program that another thread starts runs without."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(children.output_of, [sys.executable, "-c", "print(1)"]).result()
    assert (done.returncode, done.stdout) == (0, "1\n")
