"""Makes small ledgers out of made-up logs, and asks the ledger about them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ledger import record
from ledger.make import record_folder
from ledger.prove import claim_table
from ledger.read import runlog
from tests.ledger import fixtures_records as fx

TRACK = "track_h100x1_5min"
SEEDS = (42, 1337, 2025)
NAME = "2026-11-22_Base"
META = {
    "name": "Base",
    "author": "A. Person",
    "github_id": "aperson",
    "date": "2026-11-22",
    "track": TRACK,
    "record": True,
    "parent": None,
    "blurb": "a first | one",
}
MARKERS = "# Title\n\n<!-- board:start -->\nold\n<!-- board:end -->\n\nlast line\n"


class Fault(NamedTuple):
    """A fault of a record's folder: the claim that fails, and what makes it fail."""

    claim: str
    spoil: Callable[[Path], object]


def write_logs(folder: Path, seeds=SEEDS, **change) -> list[str]:
    """Write a made-up log for each seed and return their paths. change: as for `fx.log_text`."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"run{seed}.txt").write_text(fx.log_text(seed, **change), encoding="utf-8")
    return [str(folder / f"run{seed}.txt") for seed in seeds]


def make(root: Path, seeds=SEEDS, meta=None, **change) -> Path:
    """Write a record folder as `new` does, without examining its claims, and return it."""
    meta = {**META, **(meta or {})}
    runs = [runlog.parse_log(Path(log)) for log in write_logs(root / f"logs_{meta['name']}", seeds, **change)]
    folder = root / "records" / meta["track"] / f"{meta['date']}_{meta['name']}"
    record_folder.build(folder, runs, meta, "what changed\n", root)
    return folder


def run(root: Path, *argv) -> int:
    """Run a verb of `record` on the ledger of `root` and return its exit status."""
    return record.main(["--root", str(root), *map(str, argv)])


def verdicts(folder: Path) -> dict[str, tuple[str, str]]:
    """Return {claim: (verdict, evidence)} of a record folder."""
    return {
        claim: (verdict, evidence)
        for verdict, claim, evidence in claim_table.examine_record(folder, folder.parent.parent)
    }


def failed_claims(folder: Path) -> set[str]:
    """Return the claims of a record folder that fail."""
    return {claim for claim, (verdict, _) in verdicts(folder).items() if verdict == "fail"}


def edit(path: Path, pattern: str, new: str) -> None:
    """Replace the first match of the pattern, which must be in the file."""
    text, count = re.subn(pattern, new, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    assert count, f"{pattern} is not in {path.name}"
    path.write_text(text, encoding="utf-8")


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Let `change` alter the object in a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2) + "\n")


def edit_log(path: Path, pattern: str, new: str) -> None:
    """Replace the first match of the pattern below the source at the head of a log."""
    source, separator, run_text = path.read_text(encoding="utf-8").partition(fx.SEPARATOR)
    run_text, count = re.subn(pattern, new, run_text, count=1, flags=re.MULTILINE)
    assert count, f"{pattern} is not in {path.name}"
    path.write_text(source + separator + run_text, encoding="utf-8")


def log42(folder: Path) -> Path:
    """Return the log of seed 42."""
    return folder / "logs" / "seed42.txt"


def refuse(repo: Path, capsys, reason: str, *argv) -> None:
    """Run a verb that must refuse for this reason, in one line, and leave records/ as it was."""
    before = sorted(path.name for path in (repo / "records").rglob("*"))
    assert run(repo, *argv) == 2
    captured = capsys.readouterr()
    assert reason in captured.err + captured.out
    assert captured.err.count("\n") == 1
    assert sorted(path.name for path in (repo / "records").rglob("*")) == before
