"""Meet the programs with hostile input, environments, signals and disks.

    PYTHONPATH=.:tools python tests/stress/hostile.py [WORKERS] [WORDS...]

Runs every case of hostile_cases/ over WORKERS threads (one per core). A word that is the name of a group
leaves its cases; any other leaves those whose group and name hold it. Each case starts a real program in a
folder of its own. It behaved if it ended in time with the expected status, its last line said what the case
expects, there was no traceback, every file stayed as it was, and nothing else was left: no half-written file,
no process. Prints a table and, of those that did not behave, the end of the console. Exit status 1 if there
are any.
"""

import compileall
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

from tests.helpers import ROOT, temporary_folder
from tests.stress.hostile_cases import (
    artifacts,
    data,
    disks,
    environments,
    judge,
    ledger,
    paths,
    ranks,
    settings,
    signals,
    texts,
)
from tests.stress.hostile_cases.case import Case, Group
from tests.stress.hostile_cases.judge import Verdict
from tests.stress.hostile_cases.sound_files import SoundFiles

GROUPS = (
    paths.GROUP,
    environments.GROUP,
    data.GROUP,
    texts.GROUP,
    settings.GROUP,
    artifacts.GROUP,
    signals.GROUP,
    ranks.GROUP,
    disks.GROUP,
    ledger.GROUP,
)


class Row(NamedTuple):
    """A case of a group, and its verdict."""

    group: Group
    case: Case
    verdict: Verdict

    @property
    def text(self):
        """A line of the table."""
        name = f"{self.group.name:<12} {self.case.name[:56]:<56} {self.case.expectation[:52]:<52}"
        if self.verdict.skipped is not None:
            return f"{name} skipped: {self.verdict.skipped}"
        faults = "; ".join(self.verdict.faults)
        return f"{name} {faults or 'behaved'} {self.verdict.seconds:.1f} s"


def chosen(words):
    """Return the cases that all words leave, as pairs of group and case."""
    named = {group.name for group in GROUPS} & set(words)
    parts = [word for word in words if word not in named]
    return [
        (group, case)
        for group in GROUPS
        for case in group.cases
        if named <= {group.name} and all(part in f"{group.name} {case.name}" for part in parts)
    ]


def run_cases(cases, workers, progress):
    """Run pairs of group and case and return their Rows, in order. Calls progress(done) after each."""
    sound_files = SoundFiles(temporary_folder())
    rows = {}
    with ThreadPoolExecutor(workers) as pool:
        pending = {
            pool.submit(judge.judge, case, group.parts, sound_files): index
            for index, (group, case) in enumerate(cases)
        }
        for done in as_completed(pending):
            index = pending[done]
            rows[index] = Row(*cases[index], done.result())
            progress(len(rows))
    return [rows[index] for index in sorted(rows)]


class Progress:
    """Show how many cases are done: a live line on a terminal, else a line every 15 s."""

    def __init__(self, cases):
        self.cases = cases
        self.start = self.last = time.monotonic()

    def __call__(self, done):
        now = time.monotonic()
        is_live = sys.stderr.isatty()
        if now - self.last < (0.2 if is_live else 15.0) and done < self.cases:
            return
        self.last = now
        remaining = (now - self.start) / done * (self.cases - done)
        text = f"{done} of {self.cases} cases, ETA {remaining:.0f} s"
        print(
            f"\r\033[K{text}" if is_live else text, end="" if is_live else "\n", file=sys.stderr, flush=True
        )


def print_table(rows):
    """Print the table, the consoles of the cases that did not behave, a line per group and the sum."""
    print(f"\n{'group':<12} {'case':<56} {'expected':<52} verdict")
    for row in rows:
        print(row.text)
    for row in rows:
        if row.verdict.faults:
            print(f"\n---- {row.group.name}: {row.case.name}\n{row.verdict.console.strip()}")

    print()
    for name in dict.fromkeys(row.group.name for row in rows):
        of_group = [row for row in rows if row.group.name == name]
        print(f"{name:<12} {summary(of_group)}")
    print(summary(rows))


def summary(rows):
    """Return how many of the rows behaved, and how many were skipped."""
    run = [row for row in rows if row.verdict.skipped is None]
    skipped = len(rows) - len(run)
    behaved = sum(row.verdict.behaved for row in run)
    seconds = sum(row.verdict.seconds for row in run)
    left_out = f", {skipped} skipped" if skipped else ""
    return f"{behaved} of {len(run)} behaved{left_out}, {seconds:.0f} s of programs"


def stay(number, frame):
    """Handle a signal by doing nothing, which, unlike ignoring it, no program inherits."""


def main(argv):
    """Run the command and return its exit status."""
    workers = os.cpu_count() or 1
    if argv and argv[0].isdecimal():
        workers = int(argv[0])
        argv = argv[1:]
    cases = chosen(argv)
    if not cases:
        print(f"hostile.py: no case holds {' '.join(argv)!r}; without words, all run", file=sys.stderr)
        return 2

    # In the background of a shell or under nohup a signal is ignored, and so it would be by the cases.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, stay)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    start = time.monotonic()
    for folder in ("data", "tools"):  # no case writes bytecode, so each would compile the modules again
        compileall.compile_dir(ROOT / folder, quiet=1)
    rows = run_cases(cases, workers, Progress(len(cases)))
    print_table(rows)
    print(f"{time.monotonic() - start:.0f} s, {workers} at a time")
    return 1 if any(row.verdict.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
