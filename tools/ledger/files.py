"""Reads and writes whole files and hashes text, for the ledger and the lab."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path

from script import BadInput


def read_text(path: Path) -> str:
    """Return the file's UTF-8 text, unzipped if it is a .gz, with newlines as they are.

    Raises BadInput, naming the file, when it cannot be read or is not UTF-8.
    """
    try:
        blob = path.read_bytes()
        if path.suffix == ".gz":
            blob = gzip.decompress(blob)
        return blob.decode("utf-8")
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


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write the whole file or nothing: to a temporary file beside it first, then by renaming it.

    Raises BadInput, naming the file, when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    blob = data.encode("utf-8") if isinstance(data, str) else data
    try:
        temporary.write_bytes(blob)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise BadInput(f"{path}: cannot write: {error.strerror}") from None


def sha256(text: str) -> str:
    """Return the hex sha256 of the text as UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
