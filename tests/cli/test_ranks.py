"""tools/ranks.py: several ranks, and one line for each way to fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANKS = Path(__file__).resolve().parents[2] / "tools/ranks.py"
PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
open(f"{sys.argv[2]}/{rank}", "w").close()
if rank == 1:
    exec(sys.argv[1])
"""
LEAVE_REASON = (
    "import json; extra = dict(py_callstack='', timestamp=str(int(time.time()))); "
    "text = json.dumps(dict(message=dict(message='Traceback:\\n  line\\nOSError: gone', extraInfo=extra))); "
    "open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(text); sys.exit(1)"
)


def command(tmp_path, act):
    """Return the command of two ranks of which rank 1 acts."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return [sys.executable, str(RANKS), "2", str(program), act, str(tmp_path)]


@pytest.mark.parametrize(
    "act,line",
    [
        ("sys.exit(3)", "rank 1: ended with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1: killed without a message (out of memory?)"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "rank 1: killed by SIGBUS"),
        (LEAVE_REASON, "rank 1: OSError: gone"),
    ],
)
def test_a_rank_that_fails_is_named_last(tmp_path, act, line):
    done = subprocess.run(command(tmp_path, act), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"ranks.py: {line}", done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_that_end_well_say_nothing(tmp_path):
    done = subprocess.run(command(tmp_path, "pass"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "ranks.py" not in done.stderr and (tmp_path / "0").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_is_no_traceback(tmp_path, begun):
    """Neither while torch is imported nor once the ranks run."""
    started = subprocess.Popen(
        command(tmp_path, "time.sleep(60)"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while begun and not (tmp_path / "1").exists() and time.monotonic() < end:
        time.sleep(0.05)
    if not begun:
        time.sleep(0.5)
    os.killpg(started.pid, signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert (tmp_path / "1").exists() == begun
    assert "torch/distributed/run.py" not in said and "ranks.py" not in said, said
