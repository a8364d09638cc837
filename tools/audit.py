"""The auditor: is an artifact's score legal? Nine tests, T1-T9, of the artifact and the code that scores it.

    ./run.sh audit ARTIFACT [--script PATH] [key=value ...]
    python tools/audit.py ARTIFACT [--script PATH] [key=value ...]

PATH is the train_gpt.py to audit. Without it, an artifact inside a record folder is audited with that
folder's script, any other with the repository's. `key=value` are its knobs, above all data_path=DIR.

The auditor is separate from the script that it audits: a submission may edit train_gpt.py but not its own
audit, and all records face the same tests. It loads the script by path, from its text, and calls what that
script scores and trains with (NEEDS). It finds mistakes; it is not a sandbox. The script runs in this
process, so audit only code that you would run yourself.

The tests answer the challenge's conditions (parameter-golf #1017: causal, normalized, scored before any
update, one pass) and the ways in which published numbers went wrong. tests/audit plants a fault for each.

If ttt_lr is above zero, in the artifact or as a knob, T1 to T4, T7 and T9 examine the score with test-time
training. The piece of text that they score then has three chunks, so that its tokens are learned from twice.
They compare bits, and a GPU's gradients repeat only with deterministic=1.

A test that takes longer says how far it is and when it ends: live on a terminal, else a line every 15 s.

The exit status is 0 if all tests pass, 1 if one fails, and 2 for bad input, which one line names.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the script's `guarded`, Ctrl-C shows no traceback

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):  # PYTHONSAFEPATH leaves this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from script import explain_imports

if __name__ == "__main__":
    explain_imports("audit.py")

import hashlib
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch.distributed as dist

from auditor.effects import audit_files, audit_network, audit_repeat
from auditor.leak import audit_leak
from auditor.probability import audit_causality, audit_normalization, audit_score_before_update
from auditor.protocols import Run
from auditor.subject import make_audit
from auditor.sums import audit_bytes, audit_coverage
from older_scripts import can_learn, guarded, known_fault
from script import (
    TRAINER,
    BadInput,
    guard_console,
    leave_if_lost,
    load_script,
    print_help,
    refuse,
    require_names,
)

USAGE = "usage: audit.py ARTIFACT [--script PATH] [key=value ...]"
TOOL = "audit.py"  # begins its errors
MODULE = "audited_script"  # the script's name in sys.modules

# The names of the script that the tests use; CLASS.NAME is a method or field of its objects. The scripts of
# old records are judged by the same names, so change one only with those records in mind.
NEEDS = (
    *("InputError", "Log", "load_shard", "split_files", "GPT", "MAGIC", "XZ", "open_artifact"),
    *("ScoreSettings", "score_targets", "evaluate", "train", "load_run"),
    *("GPT.embed", "GPT.loss", "GPT.nats"),
    *("Run.h", "Run.m", "Run.log", "Run.dataset", "Run.model", "Run.nats_fn", "Run.held_out"),
    *("Dataset.counts", "Dataset.manifest", "ByteCounts.base", "ByteCounts.space", "ByteCounts.of"),
)
TTT_NEEDS = ("learning", "Run.loss_fn")  # of a script that can train at test time


# ---- the script ----------------------------------------------------------------------------------


def default_script(artifact: str) -> Path:
    """Return the train_gpt.py of the record folder around the artifact, or else the repository's."""
    for folder in Path(os.path.abspath(artifact)).parents:
        if (folder / "submission.json").is_file() and (folder / "train_gpt.py").is_file():
            return folder / "train_gpt.py"
    return TRAINER


def load_audited(path: Path) -> ModuleType:
    """Load the script to audit. Raises BadInput if it lacks a name that the tests use."""
    script = load_script(path, MODULE, NEEDS, "audit")
    if can_learn(script):
        require_names(script, path, TTT_NEEDS, "audit")
    return script


# ---- the command ---------------------------------------------------------------------------------

AUDIT = (
    audit_causality,
    audit_normalization,
    audit_score_before_update,
    audit_coverage,
    audit_bytes,
    audit_leak,
    audit_repeat,
    audit_files,
    audit_network,
)


def fingerprint(path: str, parts: list[Path] = ()) -> str:
    """Return a path with the beginning of the hash of its file, followed by the files that belong to it."""
    digest = hashlib.sha256()
    for file in (Path(path), *parts):
        digest.update(file.read_bytes())
    return f"{path} sha256:{digest.hexdigest()[:16]}"


def run_audit(script: ModuleType, artifact: str, knobs: list[str]) -> int:
    """Run all tests on an artifact and log a line for each. Returns the exit status, 1 if one fails."""
    run, blob = script.load_run(artifact, knobs, os.environ)
    with guarded(script, run):
        return run_tests(script, run, blob)


def run_tests(script: ModuleType, run: Run, blob: bytes) -> int:
    """Run all tests on a run with the weights of the artifact `blob`. Returns the exit status."""
    tools = Path(__file__).parent
    parts = [*sorted((tools / "auditor").glob("*.py")), tools / "older_scripts.py"]
    run.log(f"auditing {fingerprint(script.__file__)} with {fingerprint(__file__, parts)}")
    audit = make_audit(script, run, blob)
    passed = 0
    with audit.progress as progress:
        for number, test in enumerate(AUDIT, 1):
            progress.begin(f"auditing T{number}")
            verdict = test(audit)
            seconds = time.perf_counter() - progress.started
            passed += int(verdict.ok)
            result = "ok" if verdict.ok else "FAIL"
            run.log(f"audit {verdict.test}: {result} ({verdict.evidence}) [{seconds:.1f} s]")
    run.log(f"audit {passed} of {len(AUDIT)} tests passed")
    return 0 if passed == len(AUDIT) else 1


class Arguments(NamedTuple):
    """A command line, read."""

    artifact: str
    script: Path
    knobs: list[str]


def parse(argv: list[str]) -> Arguments:
    """Read a command line. Raises BadInput with the usage."""
    rest = list(argv)
    script = None
    while "--script" in rest[:-1]:
        at = rest.index("--script")
        script = Path(rest[at + 1])
        del rest[at : at + 2]
    if not rest or rest[0].startswith("-") or "=" in rest[0] or "--script" in rest:
        raise BadInput(USAGE)
    artifact, *knobs = rest
    return Arguments(artifact, script or default_script(artifact), knobs)


def main(argv: list[str]) -> int:
    """Audit an artifact and return the exit status. An error that the user can fix is one line."""
    guard_console()
    if argv[:1] in (["-h"], ["--help"]):
        return print_help(TOOL, __doc__ or USAGE)
    try:
        arguments = parse(argv)
        script = load_audited(arguments.script)
    except BadInput as error:
        return refuse(TOOL, error)

    try:
        return run_audit(script, arguments.artifact, arguments.knobs)
    except Exception as error:
        if fault := known_fault(script, error):
            return refuse(TOOL, fault)
        leave_if_lost(TOOL, script, error, "before the audit began")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
