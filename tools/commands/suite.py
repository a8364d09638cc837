"""The tests of the repository, and the selections of them that have a name."""

from __future__ import annotations

import os

from commands.programs import run, say
from commands.words import Request
from script import ROOT

# `./run.sh test fast` ends in under 90 s on two idle cores. `./run.sh test --durations=0` lists the seconds
# that each test takes; those over ten are marked slow.
FAST = (
    *("-m", "not slow and not gpu"),
    *("tests/cli", "tests/data", "tests/ledger"),
    # These start many programs.
    *("--ignore=tests/cli/test_ranks.py", "--ignore=tests/cli/test_reasons.py"),
    *("--ignore=tests/cli/test_run_sh.py", "--ignore=tests/cli/test_run_sh_setup.py"),
    *("--ignore=tests/cli/test_run_sh_train.py", "--ignore=tests/cli/test_signals.py"),
    "--ignore=tests/data/test_workers.py",
    "tests/audit/test_audit_honest.py::test_nine_tests_pass_on_an_honest_run",
    "tests/trainer/test_artifact.py",
    "tests/trainer/test_bytes.py",
    "tests/trainer/test_config.py",
    "tests/trainer/test_directions.py",
    "tests/trainer/test_masks.py",
    "tests/trainer/test_model.py",
    "tests/trainer/test_style.py",
    "tests/trainer/test_tokens.py",
    "tests/trainer/test_windows.py",
)
STRESS = ("tests/stress",)
MOST = ("-m", "not long")  # without arguments; about ten minutes on two cores
LONG = ("-m", "long")  # the few tests, and files of tests, that take over 15 s


def test(request: Request) -> int:
    """Check format and style, then run tests: two files at a time, a file's tests in one process."""
    os.chdir(ROOT)
    words = request.words
    selections = {"fast": FAST, "stress": STRESS, "long": LONG}
    if not words:
        words = [*MOST]
    elif words[0] in selections:
        words = [*selections[words[0]], *words[1:]]

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tests = ["-m", "pytest", "-n", "auto", "--maxprocesses", "2", "--dist", "loadfile"]
    format_status = run(["-m", "ruff", "format", "--quiet", "--check", "."])
    style_status = run(["-m", "ruff", "check", "--quiet", "."])
    tests_status = run([*tests, *words])
    if format_status != 0:
        say("ruff would format some files otherwise: .venv/bin/ruff format")
    if style_status != 0:
        say("ruff found faults (listed above the tests): .venv/bin/ruff check")
    return tests_status or format_status or style_status
