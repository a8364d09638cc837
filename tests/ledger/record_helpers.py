"""Makes small ledgers out of made-up logs, and asks the ledger about them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fixtures_records as fx
from ledger import record, record_claims, record_folder, runlog

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


def write_logs(folder: Path, seeds=SEEDS, **change) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"run{seed}.txt").write_text(fx.log_text(seed, **change), encoding="utf-8")
    return [str(folder / f"run{seed}.txt") for seed in seeds]


def make(root: Path, seeds=SEEDS, meta=None, **change) -> Path:
    """A folder as `new` writes it, its claims not examined."""
    meta = {**META, **(meta or {})}
    runs = [runlog.parse_log(Path(log)) for log in write_logs(root / f"logs_{meta['name']}", seeds, **change)]
    place = root / "records" / meta["track"] / f"{meta['date']}_{meta['name']}"
    record_folder.build(place, runs, meta, "what changed\n", root)
    return place


def run(root: Path, *argv) -> int:
    return record.main(["--root", str(root), *map(str, argv)])


def verdict(folder: Path) -> dict[str, tuple[str, str]]:
    return {
        claim: (status, evidence)
        for status, claim, evidence in record_claims.examine_record(folder, folder.parent.parent)
    }


def fails(folder: Path) -> set[str]:
    return {claim for claim, (status, _) in verdict(folder).items() if status == "fail"}


def edit(path: Path, pattern: str, new: str, count: int = 1) -> None:
    text, done = re.subn(pattern, new, path.read_text(encoding="utf-8"), count=count, flags=re.MULTILINE)
    assert done, f"{pattern} is not in {path.name}"
    path.write_text(text, encoding="utf-8")


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2) + "\n")


def edit_log(path: Path, pattern: str, new: str) -> None:
    """Edits what the run wrote; the source at the head stays."""
    source, mark, said = path.read_text(encoding="utf-8").partition(fx.SEPARATOR)
    said, done = re.subn(pattern, new, said, count=1, flags=re.MULTILINE)
    assert done, f"{pattern} is not in {path.name}"
    path.write_text(source + mark + said, encoding="utf-8")


def log42(folder: Path) -> Path:
    return folder / "logs" / "seed42.txt"


def refuse(repo, capsys, says, *argv) -> None:
    before = sorted(p.name for p in (repo / "records").rglob("*"))
    assert run(repo, *argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err + captured.out and captured.err.count("\n") == 1
    assert sorted(p.name for p in (repo / "records").rglob("*")) == before
