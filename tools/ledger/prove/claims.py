"""Parts that every prover of a folder shares: verdicts, the two ways a claim can miss, comparisons with logs.

A claim is a function of a case (a folder under examination). It returns its evidence, or raises Wrong or
NotCheckable. A BadInput that it raises counts as a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Protocol

from ledger.files import read_text
from ledger.read.runlog import RunLog
from ledger.read.schema import is_type
from script import BadInput


class Verdict(str, Enum):
    """How a claim came out. Its text is what `record verify` prints."""

    OK = "ok"
    FAIL = "fail"
    NOT_CHECKABLE = "not checkable"

    __str__ = str.__str__


class Finding(NamedTuple):
    """A claim with its verdict and its evidence of one line."""

    verdict: Verdict
    claim: str
    evidence: str


class Wrong(Exception):
    """The claim does not hold; the message is the evidence."""


class NotCheckable(Exception):
    """The claim cannot be decided here; the message says what is missing."""


class Case(Protocol):
    """A folder under examination."""

    folder: Path


Claim = Callable[[Case], str]


def demand(holds: bool, evidence: str) -> None:
    """Raise Wrong with the evidence unless the condition holds."""
    if not holds:
        raise Wrong(evidence)


def prove(case: Case, claims: Mapping[str, Claim]) -> list[Finding]:
    """Return a finding for every claim about the case."""
    return [prove_claim(case, name, claim) for name, claim in claims.items()]


def prove_claim(case: Case, name: str, claim: Claim) -> Finding:
    """Return the finding of one claim."""
    try:
        return Finding(Verdict.OK, name, claim(case))
    except Wrong as wrong:
        return Finding(Verdict.FAIL, name, str(wrong))
    except NotCheckable as reason:
        return Finding(Verdict.NOT_CHECKABLE, name, str(reason))
    except BadInput as error:
        return Finding(Verdict.FAIL, name, inside(case.folder, error))


def inside(folder: Path, error: BadInput) -> str:
    """Return the error's message with paths below the folder made relative to it."""
    return str(error).replace(f"{folder}/", "")


# ---- a folder of logs ----------------------------------------------------------------------------


@dataclass
class LogFolder:
    """A folder with logs and a script under examination, whatever its form.

    Properties raise NotCheckable where an earlier claim has already failed.
    """

    folder: Path
    log_errors: list[str] = field(default_factory=list, init=False)  # why logs could not be read

    def log_paths(self) -> list[Path]:
        """Return the logs of this form."""
        raise NotImplementedError

    def read_log(self, path: Path) -> RunLog:
        """Return the run of a finished log. Raises BadInput for any other."""
        raise NotImplementedError

    def order(self, run: RunLog) -> object:
        """Return the key by which runs are sorted."""
        return run.seed

    @cached_property
    def readable_runs(self) -> list[RunLog]:
        """The runs of the logs that can be read and are finished; errors of the others go to log_errors."""
        runs = []
        for path in self.log_paths():
            try:
                runs.append(self.read_log(path))
            except BadInput as error:
                self.log_errors.append(inside(self.folder, error))
        return sorted(runs, key=self.order)

    @property
    def complete_runs(self) -> list[RunLog]:
        """The runs of all logs, when all of them are finished."""
        if not self.readable_runs or self.log_errors:
            raise NotCheckable("a log is missing or cannot be read")
        return self.readable_runs

    @property
    def runs(self) -> list[RunLog]:
        """The runs that claims are about."""
        return self.complete_runs

    @cached_property
    def source(self) -> str:
        """The text of train_gpt.py."""
        try:
            return read_text(self.folder / "train_gpt.py")
        except BadInput:
            raise NotCheckable("train_gpt.py cannot be read") from None

    def file(self, name: str) -> str:
        """Return the text of a file of the folder. Raises Wrong if it cannot be read."""
        try:
            return read_text(self.folder / name)
        except BadInput:
            raise Wrong(f"{name} cannot be read") from None


# ---- files and what the logs give ----------------------------------------------------------------


def demand_files(folder: Path, names: tuple[str, ...]) -> None:
    """Raise Wrong naming the files that the folder lacks."""
    missing = [name for name in names if not (folder / name).is_file()]
    demand(not missing, f"missing: {', '.join(missing)}")


def other_code(folder: Path) -> list[str]:
    """Return the Python files of the folder, at any depth, besides its train_gpt.py."""
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    return [name for name in found if name != "train_gpt.py"]


def demand_same_lines(name: str, found: list[str], want: list[str]) -> None:
    """Raise Wrong naming the first line of the file that is not the one the logs give."""
    for number, (line, wanted) in enumerate(zip_longest(found, want, fillvalue=""), 1):
        demand(line == wanted, f"{name} line {number} is {line[:60]!r}, the logs give {wanted[:60]!r}")


def first_difference(found: object, want: object, where: str = "") -> str | None:
    """Return the first place where two JSON values disagree, or None.

    Figures agree to 2e-8, because logs have 8 digits.
    """
    if isinstance(found, dict) and isinstance(want, dict):
        for key in sorted(set(found) | set(want)):
            if key not in found or key not in want:
                return f"{where}{key} is on one side only"
            if inner := first_difference(found[key], want[key], f"{where}{key}."):
                return inner
        return None

    if isinstance(found, list) and isinstance(want, list):
        return first_difference(indexed(found), indexed(want), where)

    both_figures = is_type(found, "number") and is_type(want, "number")
    equal = abs(found - want) <= 2e-8 if both_figures else found == want
    return None if equal else f"{where.rstrip('.')}: {found!r} in the file, {want!r} from the logs"


def indexed(values: list) -> dict[str, object]:
    """Return a list as an object, so that a difference inside it is found and named."""
    return {str(index): value for index, value in enumerate(values)}
