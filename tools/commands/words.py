"""The words of a command line of run.sh: what each command takes, and the caller's paths and knobs read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

from ledger.read.knobs import knobs_meant, known_knobs, with_trait
from script import ROOT, BadInput


class Takes(Enum):
    """The kind of word that follows an option."""

    NOTHING = "nothing"
    VALUE = "a value"
    FILE = "a file of the caller's"
    SCRIPT = "a train_gpt.py, which must exist"


class Option(NamedTuple):
    """An option of a command, such as --json FILE."""

    name: str
    takes: Takes = Takes.NOTHING
    value: str = ""  # what --help calls the word that follows
    is_needed: bool = False  # else --help shows it in brackets

    def __str__(self) -> str:
        """Return the option as --help prints it."""
        text = f"{self.name} {self.value}".rstrip()
        return text if self.is_needed else f"[{text}]"


class Form(NamedTuple):
    """One way to use a command: some words, then options, then other words."""

    first_words: str  # as --help prints them, "" for none
    summary: str
    example: str
    options: tuple[Option, ...] = ()
    last_words: str = ""  # as --help prints them

    @property
    def arguments(self) -> str:
        """What follows the command's name, as --help prints it."""
        return " ".join(filter(None, [self.first_words, *map(str, self.options), self.last_words]))


class Request(NamedTuple):
    """The parsed words after a command. The caller's paths are rewritten to hold from the repository."""

    words: list[str]  # as they were given
    artifact: str = ""
    options: tuple[str, ...] = ()
    knobs: tuple[str, ...] = ()


class Command(NamedTuple):
    """A row of COMMANDS."""

    run: Callable[[Request], int]
    forms: tuple[Form, ...]
    files: tuple[str, ...] = ()  # files that the command needs
    reads_knobs: bool = True  # if not, its words go to another program as they are
    needs_artifact: bool = False
    runs_attention: bool = True  # of `record`, only some verbs do
    keys: tuple[str, ...] = ()  # keys of its key=value words; (): the knobs of the trainer
    check: Callable[[Request], None] = lambda request: None  # raises BadInput, before data is looked for

    @property
    def options(self) -> dict[str, Takes]:
        """What each option of its forms takes."""
        return {option.name: option.takes for form in self.forms for option in form.options}


def from_caller(path: str) -> str:
    """Return a path of the caller's as seen from the repository, where the trainer runs."""
    caller = os.getcwd()
    return path if caller == str(ROOT) else os.path.join(caller, path)


def read_request(name: str, command: Command, words: list[str]) -> Request:
    """Check the words after a command: [ARTIFACT] [options] [key=value...]. Raises BadInput."""
    for file in command.files:
        if not (ROOT / file).is_file():
            raise BadInput(f"{file} is missing from {ROOT}; get a complete copy of the repository")
    if not command.reads_knobs:
        return Request(words)

    rest = list(words)
    artifact = ""
    if command.needs_artifact:
        artifact = read_artifact(name, rest)
    options = read_options(name, command.options, rest)
    knobs = [read_knob(word) for word in rest]

    nproc = os.environ.get("NPROC") or "1"
    if not nproc.isdecimal() or nproc.startswith("0"):
        raise BadInput(
            f"NPROC={nproc} is not a number of processes; give a whole number, such as 1, 2, 4 or 8"
        )
    return Request(words, artifact, tuple(options), tuple(knobs))


def read_artifact(name: str, rest: list[str]) -> str:
    """Take the artifact's path off the front of `rest`."""
    if not rest or not rest[0] or "=" in rest[0]:
        raise BadInput(f"{name} needs an artifact; write ./run.sh {name} logs/RUN.int6.CODEC")
    path = rest.pop(0)
    if not os.path.isfile(path):
        raise BadInput(f"no artifact at {path}; train writes them as logs/RUN.int6.CODEC")
    return from_caller(path)


def read_options(name: str, known: dict[str, Takes], rest: list[str]) -> list[str]:
    """Take the options, which precede the knobs, off the front of `rest`."""
    options = []
    while rest and rest[0] in known:
        option = rest.pop(0)
        takes = known[option]
        options.append(option)
        if takes is Takes.NOTHING:
            continue

        value = rest.pop(0) if rest else ""
        if takes is Takes.SCRIPT and not os.path.isfile(value):
            raise BadInput(f"no script at {value!r}; {option} takes the path of the train_gpt.py to {name}")
        if not value:
            raise BadInput(f"{name}: {option} needs a value; ./run.sh --help shows how")
        options.append(value if takes is Takes.VALUE else from_caller(value))
    return options


def read_knob(word: str) -> str:
    """Check that a word is a key=value, and return it, a path in it as seen from the repository."""
    key, equals, value = word.partition("=")
    if not equals or not key[:1].islower():
        raise BadInput(f"{word!r} is not a knob; write key=value (./run.sh config lists the keys)")
    if key in with_trait("PATH") and value and (key, value) != ("resume", "auto"):
        value = from_caller(value)
    return f"{key}={value}"


def read_flag(text: str) -> bool:
    """Read a knob of type bool as the trainer does. Raises ValueError for other text."""
    if text.lower() not in ("0", "1", "false", "true"):
        raise ValueError("not a flag")
    return text.lower() in ("1", "true")


READERS = {"str": str, "bool": read_flag, "int": int, "float": float}  # by the type of a knob


def check_knobs(command: Command, knobs: Iterable[str]) -> None:
    """Raise BadInput for a key=value word that the command does not know, or whose value has another type.

    The trainer's knobs are read from its source, since torch may not be installed yet.
    """
    if command.keys:
        types = dict.fromkeys(command.keys, "str")
    else:
        types = {name: knob.type for name, knob in known_knobs().items()}
    for word in knobs:
        key, _, value = word.partition("=")
        if key not in types:
            hint = ", ".join(command.keys) or knobs_meant(key)
            raise BadInput(f"unknown config key {key!r}; {hint}")
        try:
            READERS[types[key]](value)
        except ValueError:
            raise BadInput(f"config key {key}: {value[:40]!r} is not of type {types[key]}") from None


def knob_value(key: str, knobs: tuple[str, ...]) -> str:
    """Return a knob's value from key=value or else from the environment, "" if neither gives it."""
    for word in reversed(knobs):
        if word.startswith(f"{key}="):
            return word.partition("=")[2]
    return os.environ.get(key.upper(), "")


def enter_repository() -> None:
    """Change to the repository. Paths that the environment gives relative to the caller still hold there."""
    for key in with_trait("PATH"):
        value = os.environ.get(key.upper(), "")
        if value and (key, value) != ("resume", "auto"):
            os.environ[key.upper()] = from_caller(value)
    os.chdir(ROOT)
