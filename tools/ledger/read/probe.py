"""Asks a script about itself in a process of its own, and builds the command that runs its training again.

The only part of the ledger in which a train_gpt.py, and so torch, is imported: in the child, never here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from children import output_of
from ledger.read.knobs import run_knobs
from ledger.read.runlog import RunLog

CHILD = Path(__file__).resolve().parent / "probe_child.py"
PATIENCE = 180  # seconds that an import may take


@cache
def probe_script(source: str, preset: str) -> dict[str, object]:
    """Import the source in a clean process (no environment, empty folder, this interpreter) and ask it.

    The answer's keys: bytes_code (length of packed_code), config (values of the preset, as text), preset
    (argv that selects it), printed and files (effects of the import); or, when the import fails, error (one
    line) and missing (the absent module, if that is why).
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "train_gpt.py")
        script.write_bytes(source.encode("utf-8"))
        empty = Path(folder, "empty")
        empty.mkdir()
        argv = [sys.executable, "-I", "-B", str(CHILD), str(script), preset]
        try:
            done = output_of(argv, PATIENCE, cwd=empty, env={}, stderr=subprocess.PIPE)
        except subprocess.TimeoutExpired:
            return {"error": f"importing it takes more than {PATIENCE} s"}
        try:
            return json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            last = (done.stderr.splitlines() or ["no message"])[-1]
            return {"error": f"its import ended the interpreter: {last}"}


def overrides(run: RunLog, answer: dict) -> list[str]:
    """Return the key=value arguments by which a run departs from its preset, apart from seed and output."""
    preset_config = answer["config"]
    free = run_knobs()
    changed = [
        f"{key}={value}"
        for key, value in sorted(run.config.items())
        if key not in free and key != "preset" and preset_config.get(key) != value
    ]
    if run.config.get("data_path") != preset_config.get("data_path"):
        changed.append("data_path=DIR")
    return answer["preset"] + changed


def training_command(run: RunLog, answer: dict, script: str, seed: int) -> list[str]:
    """Return the one command, to be run in the repository's root, that repeats this training."""
    ranks = int(run.text("machine", "world_size"))
    if ranks == 1:
        launcher = ["python"]
    else:
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, script, "train", *overrides(run, answer), f"seed={seed}"]
