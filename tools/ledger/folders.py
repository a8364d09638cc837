"""Finds the folders of the ledger (records, sweeps, measurements of directions) and the logs in them."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from script import BadInput

MEASUREMENT_NAME = re.compile(r"^(\d{4}-\d{2}-\d{2})_([A-Za-z0-9.-]+?)(?:_(\d+))?$")  # date, device, number


def is_date(text: str) -> bool:
    """Return whether the text is a day of this century, YYYY-MM-DD. A picture has no room for more."""
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return re.fullmatch(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}", text) is not None


def record_folders(records: Path) -> list[Path]:
    """Return every record folder, by track and date."""
    return sorted(path for path in records.glob("track_*/[!.]*") if path.is_dir())


def sweep_folders(records: Path) -> list[Path]:
    """Return every sweep folder, by name."""
    return sorted(path for path in records.glob("sweeps/[!.]*") if path.is_dir())


def measurement_folders(records: Path) -> list[Path]:
    """Return every measurement of the directions, oldest first."""
    found = []
    for path in (records / "directions").glob("*"):
        match = MEASUREMENT_NAME.match(path.name)
        if match and path.is_dir():
            found.append((match[1], int(match[3] or 1), path))
    return [path for _, _, path in sorted(found)]


def is_sweep(folder: Path) -> bool:
    """Return whether the folder is a sweep's, or lies where sweeps lie."""
    return (folder / "table.json").is_file() or folder.parent.name == "sweeps"


def is_measurement(folder: Path) -> bool:
    """Return whether the folder lies where measurements of the directions lie."""
    return folder.parent.name == "directions"


def find_folder(text: str, records: Path) -> Path:
    """Return the record or sweep folder that `text` names.

    text: a path, `track/folder`, the folder's name, or the part of its name after the date.
    Raises BadInput if there is none, or when several have that name.
    """
    if not text:
        raise BadInput("'': no such folder; give its path or TRACK/NAME as listed in records/README.md")
    for path in (Path(text), records / text):
        if path.is_dir():
            return path.resolve()

    name = Path(text).name
    folders = record_folders(records) + sweep_folders(records)
    found = [path for path in folders if name in (path.name, path.name[11:])]
    if len(found) > 1:
        listed = ", ".join(f"{path.parent.name}/{path.name}" for path in found)
        raise BadInput(f"{text}: more than one folder: {listed}")
    if not found:
        raise BadInput(f"{text}: no such folder; give its path or TRACK/NAME as listed in records/README.md")
    return found[0]


def find_target(text: str, records: Path) -> Path:
    """Return the path `text` if it exists, else the folder of the ledger that it names."""
    path = Path(text)
    return path if text and path.exists() else find_folder(text, records)


def log_files(folder: Path) -> list[Path]:
    """Return the .txt and .txt.gz files of a folder, by name, but not requirements.txt."""
    found = [*folder.glob("*.txt"), *folder.glob("*.txt.gz")]
    return sorted(path for path in found if path.name != "requirements.txt")


def logs_of(target: Path) -> list[Path]:
    """Return the log itself, or those of a folder or of its logs/. Raises BadInput if there is none."""
    if target.is_file():
        return [target]

    inner = target / "logs"
    logs = log_files(inner if inner.is_dir() else target)
    if not logs:
        raise BadInput(f"{target}: no such log, and no folder with logs/*.txt")
    return logs


def shown(path: Path) -> str:
    """Return the path as the user would type it: relative if it lies below the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
