"""Read damaged and hostile artifacts.

    PYTHONPATH=. python tests/stress/fuzz_artifact.py [CASES] [SEED]

Reads CASES (10,000) mutations of a small artifact and every bomb, and checks the claim of reader.py; bombs
must also need less memory than bombs.MEMORY. Prints tables of mutations and bombs by outcome, and the first
violations. Exit status 1 if there are any.
"""

import collections
import random
import sys
import time
from typing import NamedTuple

from tests.stress.bombs import bomb_reports
from tests.stress.mutations import MUTATIONS, small_artifact
from tests.stress.rans_streams import RANS_MUTATIONS
from tests.stress.reader import VIOLATION, Violation, outcome

ALL = MUTATIONS | RANS_MUTATIONS


class FuzzResult(NamedTuple):
    """counts[mutation][verdict], and a line for each violation."""

    counts: dict
    violations: list[str]


def ignore(done):
    """Report no progress."""


def fuzz(cases, seed, progress=ignore):
    """Read `cases` mutations, all kinds in turn, and return a FuzzResult. Calls progress(done) after each."""
    base = small_artifact()
    counts = collections.defaultdict(collections.Counter)
    violations = []
    names = list(ALL)
    for case in range(cases):
        name = names[case % len(names)]
        blob = ALL[name](random.Random(f"{seed} {case}"), base)
        try:
            verdict, _ = outcome(blob)
        except Violation as error:
            verdict = VIOLATION
            violations.append(f"{name}, case {case}: {error}")
        counts[name][verdict] += 1
        progress(case + 1)
    return FuzzResult(counts, violations)


class CaseCounter:
    """Show on a terminal how many cases are done; print nothing elsewhere."""

    def __init__(self, cases):
        self.cases = cases
        self.start = time.perf_counter()

    def __call__(self, done):
        if sys.stderr.isatty() and (done % 100 == 0 or done == self.cases):
            remaining = (time.perf_counter() - self.start) / done * (self.cases - done)
            self._write(f"{done:,} of {self.cases:,} cases, ETA {remaining:.0f} s")

    def clear(self):
        """Remove the line."""
        if sys.stderr.isatty():
            self._write("")

    def _write(self, text):
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_counts(counts):
    """Print a table of mutations by verdict."""
    print(f"{'mutation':<20} {'refused':>8} {'read':>8} {VIOLATION:>10}")
    for name, row in counts.items():
        print(f"{name:<20} {row['refused']:>8} {row['read']:>8} {row[VIOLATION]:>10}")


def print_bombs(reports):
    """Print a table of bombs."""
    print(f"{'bomb':<28} {'bytes':>10} {'seconds':>8} {'memory MB':>10}  outcome")
    for report in reports:
        print(
            f"{report.bomb:<28} {report.size:>10,} {report.seconds:>8.2f} {report.growth / 1e6:>10.0f}  "
            f"{report.outcome} {report.reason[:70]}",
            flush=True,
        )


def main(argv):
    """Run the command and return its exit status."""
    defaults = ("10000", "0")
    cases, seed = (int(value) for value in [*argv, *defaults[len(argv) :]])
    start = time.perf_counter()
    counter = CaseCounter(cases)
    counts, violations = fuzz(cases, seed, counter)
    counter.clear()
    print_counts(counts)
    print(f"{cases:,} cases in {time.perf_counter() - start:.1f} s, seed {seed}\n")

    reports = bomb_reports()
    print_bombs(reports)
    for report in reports:
        if report.outcome == VIOLATION:
            violations.append(f"bomb, {report.bomb}: {report.reason}")

    for line in violations[:20]:
        print(f"violation: {line}")
    print(f"{len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
