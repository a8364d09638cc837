"""Trains a record again and compares machine, data and score with the recorded ones."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from children import sigterm_reaches
from ledger.files import read_text, sha256_file
from ledger.folders import logs_of
from ledger.read.probe import probe_script, training_command
from ledger.read.runlog import RunLog, parse_log
from ledger.show.board import read_submission
from script import BadInput

ALLOWED_STD = 3  # a new score may differ by this many standard deviations of the recorded ones,
ALLOWED_BPB = 0.003  # or by this, if one seed was recorded and there is no deviation


class Condition(NamedTuple):
    """Something that may explain a different result, as recorded and as it is here."""

    name: str
    recorded: str
    here: str


def local_hardware(wanted: str) -> str:
    """Return `<count> x <name>` of this machine as a log would, with no more devices than `wanted` uses."""
    argv = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = []

    ranks = int(wanted.split(" x ")[0])
    if not names:
        return f"{ranks} x {platform.processor() or platform.machine()}"
    return f"{min(len(names), ranks)} x {names[0].strip()}"


def installed_version(package: str) -> str:
    """Return the version of a package, or `not installed`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def manifest_sha256(data: Path) -> str:
    """Return the hash of the manifest of a data folder, `none` if it has no manifest."""
    manifest = data / "manifest.json"
    return sha256_file(manifest) if manifest.is_file() else "none"


def environment(sub: dict) -> list[Condition]:
    """Return Python, torch and hardware as recorded and here."""
    return [
        Condition("python", sub["python_version"], sys.version.split()[0]),
        Condition("torch", sub["pytorch_version"], installed_version("torch")),
        Condition("hardware", sub["hardware"], local_hardware(sub["hardware"])),
    ]


def print_condition(condition: Condition) -> None:
    """Print one line: whether the condition is the recorded one, and both values."""
    equal = "same" if condition.recorded == condition.here else "differs"
    print(f"  {equal:<8} {condition.name:<9} recorded {condition.recorded}, here {condition.here}")


def with_data(argv: list[str], data: Path, given: bool) -> list[str]:
    """Return the command with its data folder filled in; added if the user gave one and it names none."""
    filled = [f"data_path={data}" if part == "data_path=DIR" else part for part in argv]
    if given and not any(part.startswith("data_path=") for part in filled):
        filled.append(f"data_path={data}")
    return filled


def run_command(argv: list[str], root: Path) -> str:
    """Run a training, pass its output through and return its final_score line.

    Scripts of older records print that line. Newer ones leave it in the log, which a line `log: PATH` names.
    Raises BadInput if the training fails or leaves no such line.
    """
    launcher = [sys.executable]
    if argv[0] == "torchrun":
        launcher += ["-m", "torch.distributed.run"]

    found = ""
    log = None
    command = launcher + argv[1:]
    with (
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process,
        sigterm_reaches(process),
    ):
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("final_score "):
                found = line.strip()
            elif line.startswith("log: "):
                log = root / line.strip().removeprefix("log: ")

    if not found and log is not None:
        found = last_score(log)
    if process.returncode or not found:
        count = "a" if found else "no"
        raise BadInput(
            f"not reproduced: the command ended with status {process.returncode} and {count} final_score line"
        )
    return found


def last_score(log: Path) -> str:
    """Return the final_score line at the end of a log, "" if another line is there."""
    *_, last = ["", *read_text(log).splitlines()]
    return last if last.startswith("final_score ") else ""


def print_outcome(bpb: float, sub: dict) -> bool:
    """Print whether the new score is near enough to the recorded one, and return it."""
    spread = sub["val_bpb_std"]
    if spread is None:
        allowed = ALLOWED_BPB
        reason = "one seed recorded, no std"
    else:
        allowed = ALLOWED_STD * spread
        reason = f"{ALLOWED_STD} std"

    gap = bpb - sub["val_bpb"]
    reproduced = abs(gap) <= allowed
    intro = "reproduced" if reproduced else "not reproduced"
    print(
        f"{intro}: val_bpb {bpb:.5f}, recorded {sub['val_bpb']:.5f}, difference {gap:+.5f}, "
        f"allowed {allowed:.5f} ({reason})"
    )
    return reproduced


def recorded_run(folder: Path) -> RunLog:
    """Return the run of the folder's first log."""
    return parse_log(logs_of(folder)[0])


def reproduce(folder: Path, root: Path, seed: int | None, data: str | None, dry_run: bool) -> int:
    """Compare machine and data with the record, train again unless dry_run, and compare the score.

    Returns 0 when the score is reproduced (or dry_run), else 1. Raises BadInput for other data than recorded.
    """
    sub = read_submission(folder)
    run = recorded_run(folder)
    script = folder / "train_gpt.py"
    answer = probe_script(read_text(script), run.preset)
    if "error" in answer:
        raise BadInput(f"{script}: does not import here: {answer['error']}")

    if data:
        data_path = Path(data).resolve()
    else:
        data_path = root / answer["config"].get("data_path", "data")
    manifest = Condition("data", sub["data_manifest_sha256"], manifest_sha256(data_path))
    for condition in [*environment(sub), manifest]:
        print_condition(condition)

    argv = training_command(run, answer, str(script), sub["seeds"][0] if seed is None else seed)
    argv = with_data(argv, data_path, given=bool(data))
    print(shlex.join(argv), flush=True)
    if dry_run:
        return 0

    if manifest.recorded not in (manifest.here, "none"):
        raise BadInput(
            f"not reproduced: {data_path} is not the data of the record; --data names a folder whose "
            f"manifest.json has sha256 {manifest.recorded}"
        )
    final_score = run_command(argv, root)
    bpb = float(final_score.split("val_bpb:")[1].split()[0])
    return 0 if print_outcome(bpb, sub) else 1
