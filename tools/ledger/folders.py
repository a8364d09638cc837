"""Finds the folders of the ledger (records, sweeps, measurements of directions) and the logs in them."""

from __future__ import annotations

import os
import re
from datetime import date
from pathlib import Path

from script import BadInput

MEASUREMENT_NAME = re.compile(r"^(\d{4}-\d{2}-\d{2})_([A-Za-z0-9.-]+?)(?:_(\d+))?$")  # date, device, number
LOG_NAME = re.compile(r"(?!requirements\.txt$).+\.txt(\.gz)?", re.DOTALL)


def is_date(text: str) -> bool:
    """Return whether the text is a day of this century, YYYY-MM-DD. A picture has no room for more."""
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return re.fullmatch(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}", text) is not None


def inner_folders(place: Path) -> list[Path]:
    """Return the folders in a folder, without hidden ones, by name; [] if it is missing.

    A folder that may not be read stands for those in it, so that whoever reads them meets the reason.
    """
    try:
        with os.scandir(place) as entries:
            return sorted(place / entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        return [place]


def record_folders(records: Path) -> list[Path]:
    """Return every record folder, by track and date."""
    tracks = [path for path in inner_folders(records) if path.name.startswith("track_")]
    return [path for track in tracks for path in inner_folders(track)]


def sweep_folders(records: Path) -> list[Path]:
    """Return every sweep folder, by name."""
    return inner_folders(records / "sweeps")


def measurement_folders(records: Path) -> list[Path]:
    """Return every measurement of the directions, oldest first."""
    place = records / "directions"
    found = []
    for path in inner_folders(place):
        if path == place:  # it may not be read
            return [place]
        if match := MEASUREMENT_NAME.match(path.name):
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
    """Return the .txt and .txt.gz files of a folder, by name, but not requirements.txt; [] if it is missing.

    Raises OSError if it may not be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in sorted(names) if LOG_NAME.fullmatch(name)]


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
