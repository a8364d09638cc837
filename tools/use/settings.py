"""The command lines of sample and export. Imports no torch: run.sh checks them before it finds data."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from script import BadInput

EXPORT_USAGE = "usage: export.py ARTIFACT --out DIR [data_path=DIR] [tokenizer_path=FILE]"
DATA_KEYS = ("data_path", "tokenizer_path")  # what both of them take of the trainer's knobs
SEEDS = 1 << 63


@dataclass(frozen=True)
class Settings:
    """What a caller of sample may set, with the defaults."""

    prompt: str = ""
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 40
    seed: int = 1337
    held_out: int = 0
    data_path: str = ""
    tokenizer_path: str = ""


SAMPLE_KEYS = tuple(field.name for field in fields(Settings))


def read_settings(words: list[str]) -> Settings:
    """Read the key=value words of sample. Raises BadInput for an unknown key or a value out of range."""
    kinds = {field.name: type(field.default) for field in fields(Settings)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in kinds:
            raise BadInput(f"{word[:40]!r} is not a setting of sample: {', '.join(kinds)} are")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise BadInput(f"{key}={text[:40]}: not of type {kinds[key].__name__}") from None
    settings = Settings(**values)
    if not 0 <= settings.temperature < 1000:
        raise BadInput(f"temperature={settings.temperature:g}: give a number from 0 to 1000")
    for key, least in dict(tokens=1, top_k=0, seed=0, held_out=0).items():
        if not least <= getattr(settings, key) < SEEDS:
            raise BadInput(f"{key}={getattr(settings, key)}: give a whole number from {least}")
    try:
        settings.prompt.encode()
    except UnicodeEncodeError:
        raise BadInput(f"prompt={settings.prompt[:40]}: not UTF-8; type it in a terminal of UTF-8") from None
    if settings.held_out and settings.prompt:
        raise BadInput("prompt and held_out exclude each other: leave one out")
    return settings


class Arguments(NamedTuple):
    """A command line of export, read."""

    artifact: str
    out: Path
    data_path: str
    tokenizer_path: str


def read_arguments(argv: list[str]) -> Arguments:
    """Read a command line of export. Raises BadInput with the usage, or if the folder exists."""
    words = [word for word in argv if "=" in word]
    rest = [word for word in argv if "=" not in word]
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    if unknown := given.keys() - set(DATA_KEYS):
        raise BadInput(f"{min(unknown)[:40]!r} is not a setting of export: {', '.join(DATA_KEYS)} are")
    if len(rest) != 3 or rest[1] != "--out":
        raise BadInput(EXPORT_USAGE)
    out = Path(rest[2])
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists; give another folder, or remove it")
    return Arguments(rest[0], out, given.get("data_path", ""), given.get("tokenizer_path", ""))
