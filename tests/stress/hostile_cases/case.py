"""A hostile case is a row: what is broken, the command that meets it, and what must hold then."""

import enum
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.helpers import ROOT, english_args

PYTHON = sys.executable
TRAINER = str(ROOT / "train_gpt.py")


class Receiver(enum.Enum):
    """Which processes of a case get a signal, if not one Rank."""

    PROGRAM = "the program that the case starts"
    TERMINAL = "all processes of the case, as with Ctrl-C"


class Rank(NamedTuple):
    """The process of a run that has this rank."""

    number: int


class Signal(NamedTuple):
    """A signal that a case sends. after: a pattern that the console shows first."""

    number: int
    after: str = ""
    seconds: float = 0.0  # after that
    to: Receiver | Rank = Receiver.PROGRAM


class Case(NamedTuple):
    """A row of a group. It runs in a folder of its own, with copies of its group's sound files."""

    name: str
    command: tuple[str, ...]
    says: tuple[str, ...] = ()  # in the last line of the console; on success, anywhere on it
    status: int = 2
    setup: tuple[Callable[[Path], None], ...] = ()  # each breaks something in the folder of the case
    env: Mapping[str, str | None] = {}  # None: not set
    under: tuple[str, ...] = ()  # a program that runs the command; without it, the case is skipped
    signals: tuple[Signal, ...] = ()
    leaves: tuple[str, ...] = ()  # patterns of paths that may be new or changed
    lines: int = 1  # most lines of a refusal, notes of run.sh aside; 0: any number
    seconds: float = 90.0
    holds: Callable[[Path], str | None] | None = None  # returns what else is wrong
    fresh: bool = False  # whether an interpreter of its own must start, because that is the subject

    @property
    def expectation(self) -> str:
        """What must hold, in a few words."""
        return " ".join([f"status {self.status}", *(repr(words) for words in self.says)])


class Group(NamedTuple):
    """Cases with one subject. parts: the sound files that each case gets a copy of."""

    name: str
    parts: tuple[str, ...]
    cases: tuple[Case, ...]


# ---------------------------------------------------------------- commands


def knobs(**changed) -> tuple[str, ...]:
    """Return the knobs of a run of three steps on data/, which writes to out/."""
    short_run = dict(data_path="data", out_dir="out", iterations=3, warmup_steps=1)
    return tuple(english_args(**(short_run | changed)))


def train(*more: str) -> tuple[str, ...]:
    """Return the command that trains for three steps. more: knobs, which win over those of the run."""
    return (PYTHON, TRAINER, "train", *knobs(), *more)


def evaluate(artifact: str, *more: str) -> tuple[str, ...]:
    """Return the command that scores an artifact on data/."""
    return (PYTHON, TRAINER, "eval", artifact, *scoring(*more))


def audit(artifact: str, *more: str) -> tuple[str, ...]:
    """Return the command that audits an artifact on data/."""
    return (PYTHON, str(ROOT / "tools/audit.py"), artifact, *scoring(*more))


def scoring(*more: str) -> tuple[str, ...]:
    """Return the knobs of eval and audit."""
    return ("data_path=data", "out_dir=out", "run_id=scored", "eval_batch_tokens=512", *more)


def config(*given: str) -> tuple[str, ...]:
    """Return the command that prints the configuration."""
    return (PYTHON, TRAINER, "config", *given)


def run_sh(*words: str) -> tuple[str, ...]:
    """Return a command of run.sh."""
    return (str(ROOT / "run.sh"), *words)


def sample(*words: str) -> tuple[str, ...]:
    """Return the command that lets the artifact of run/ write three tokens."""
    return run_sh("sample", "run/run.int6.xz", "data_path=data", "tokens=3", *words)


def export(out: str) -> tuple[str, ...]:
    """Return the command that exports the artifact of run/."""
    return run_sh("export", "run/run.int6.xz", "--out", out, "data_path=data")


# Without the package that export needs, a case is skipped.
WITH_SAFETENSORS = (PYTHON, "-c", "import os, safetensors, sys; os.execvp(sys.argv[1], sys.argv[1:])")


def data(*words: str) -> tuple[str, ...]:
    """Return a command of data/prepare.py."""
    return (PYTHON, str(ROOT / "data/prepare.py"), *words)


def text(*more: str, **changed: str) -> tuple[str, ...]:
    """Return the command that builds made/ from docs/. changed: other values of its options."""
    options = {"train": "docs/train.txt", "val": "docs/val.txt", "tokenizer": "docs/tokenizer.model"}
    options |= {"out": "made", "workers": "1"} | changed
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    return data("text", *words, *more)


def record(*words: str) -> tuple[str, ...]:
    """Return a verb of the ledger in repo/."""
    return (PYTHON, str(ROOT / "tools/cli.py"), "record", "--root", "repo", *words)


def lab(*words: str) -> tuple[str, ...]:
    """Return a verb of `record` that measures."""
    return (PYTHON, str(ROOT / "tools/cli.py"), "record", *words)


def shell(script: str, *command: str) -> tuple[str, ...]:
    """Return a bash script as a command; "$@" in it is `command`."""
    return ("bash", "-c", script, "-", *command)


def with_huge(path: str, command: tuple[str, ...]) -> tuple[str, ...]:
    """Return a command that meets a file of 9 GB, which takes no room, in 4 GB of memory."""
    return shell(
        f'ulimit -v 4000000; truncate -s 9G {path}; "$@"; status=$?; rm {path}; exit $status', *command
    )


# ---------------------------------------------------------------- ways to break a folder


def written(path: str, content: bytes | str = b"") -> Callable[[Path], None]:
    """Write a file, and the folders it needs."""
    blob = content.encode() if isinstance(content, str) else content

    def setup(here: Path) -> None:
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(blob)

    return setup


def edited(path: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replace the bytes of a file by change(bytes)."""

    def setup(here: Path) -> None:
        (here / path).write_bytes(change((here / path).read_bytes()))

    return setup


def removed(*paths: str) -> Callable[[Path], None]:
    """Remove files and folders; a path may be a pattern."""

    def setup(here: Path) -> None:
        for pattern in paths:
            for path in sorted(here.glob(pattern)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    return setup


def moved(old: str, new: str) -> Callable[[Path], None]:
    """Move a file or folder."""

    def setup(here: Path) -> None:
        (here / new).parent.mkdir(parents=True, exist_ok=True)
        (here / old).rename(here / new)

    return setup


def copied(old: str, new: str) -> Callable[[Path], None]:
    """Copy a file."""

    def setup(here: Path) -> None:
        (here / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / old, here / new)

    return setup


def linked(path: str, target: str) -> Callable[[Path], None]:
    """Put a symbolic link to `target` at a path, in place of what is there."""

    def setup(here: Path) -> None:
        if (here / path).is_file() or (here / path).is_symlink():
            (here / path).unlink()
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).symlink_to(target)

    return setup


def pipe(path: str) -> Callable[[Path], None]:
    """Make a named pipe that nobody writes to or reads, in place of the file that is there."""

    def setup(here: Path) -> None:
        (here / path).unlink(missing_ok=True)
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(here / path)

    return setup


def folder(path: str) -> Callable[[Path], None]:
    """Make a folder in place of the file that is there, if there is one."""

    def setup(here: Path) -> None:
        if (here / path).is_file():
            (here / path).unlink()
        (here / path).mkdir(parents=True)

    return setup


def cut(count: int) -> Callable[[bytes], bytes]:
    """Return a change: keep the first bytes, or drop the last if `count` is negative."""
    return lambda blob: blob[:count]


def put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    """Return a change: overwrite bytes at a place, from the end if negative."""

    def change(blob: bytes) -> bytes:
        start = at % len(blob)
        return blob[:start] + new + blob[start + len(new) :]

    return change


def flip(at: int) -> Callable[[bytes], bytes]:
    """Return a change: flip a bit of one byte."""
    return lambda blob: put(at, bytes([blob[at] ^ 16]))(blob)


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    """Return a change of text: put `new` in place of the first `old`, which must be there."""

    def change(blob: bytes) -> bytes:
        whole = blob.decode()
        assert old in whole, f"{old!r} is not there"
        return whole.replace(old, new, 1).encode()

    return change
