"""Reads, writes and hashes whole files, for the ledger and the lab."""

from __future__ import annotations

import argparse
import errno
import gzip
import hashlib
import json
import os
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from script import BadInput

LARGEST = 1 << 28  # bytes of a text; a log has less than a thousandth of that


def open_file(path: Path) -> BinaryIO:
    """Open a file, or a pipe that another program writes to, such as bash's <(...), for reading.

    A pipe without a writer is at its end at once. Raises OSError for what may never end, or is too large.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(number, "rb")
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISFIFO(found.st_mode):
            raise OSError(errno.EINVAL, "not a file")
        if found.st_size > LARGEST:
            raise OSError(errno.EFBIG, f"more than {LARGEST} bytes")
        os.set_blocking(number, True)
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file, unzipped if it is a .gz. Raises OSError, EOFError or zlib.error."""
    with open_file(path) as raw:
        file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        blob = file.read(LARGEST + 1)
    if len(blob) > LARGEST:
        raise OSError(errno.EFBIG, f"more than {LARGEST} bytes")
    return blob


def read_text(path: Path) -> str:
    """Return the file's UTF-8 text, unzipped if it is a .gz, with newlines as they are.

    Raises BadInput, naming the file, when it cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: cannot read: {reason}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path) -> object:
    """Return the parsed JSON of the file. Raises BadInput if it cannot be read or is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from None


def named_path(text: str) -> Path:
    """Read the path of an option. Raises ArgumentTypeError for "", which would mean the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; leave the option out, or give a name")
    return Path(text)


def check_output(option: str, path: Path) -> None:
    """Raise BadInput if `path` cannot be written as a file: before the work whose result it is to hold.

    option: how the user named it.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise BadInput(f"{option} {path}: is a folder; name a file in it")
    if not folder.is_dir():
        raise BadInput(f"{option} {path}: no such folder; make it first")
    if not os.access(path if path.exists() and not path.is_file() else folder, os.W_OK):
        raise BadInput(f"{option} {path}: no permission to write there; name another file")


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write the whole file or nothing: to a temporary file beside it first, then by renaming it.

    A device or a pipe, such as /dev/stdout, is written to in its place.
    Raises BadInput, naming the file, when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    blob = data.encode("utf-8") if isinstance(data, str) else data
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(blob)
            return
        temporary.write_bytes(blob)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise BadInput(f"{path}: cannot write: {error.strerror}") from None


def sha256(text: str) -> str:
    """Return the hex sha256 of the text as UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file. Raises OSError if it cannot be read."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_json(value: Any) -> Any:
    """Return a value whose named tuples, which json.dumps would write as lists, are dicts, at every depth."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value
