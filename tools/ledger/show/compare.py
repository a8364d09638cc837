"""Compares two sets of seeds by t-tests, and holds the second to the challenge's bar."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ledger import stats
from ledger.folders import logs_of
from ledger.races import RULE_TEXTS, RULES, Outcome, is_race
from ledger.read.runlog import parse_log
from script import BadInput

BAR_NATS = 0.005  # the challenge asks for a gain of at least this many nats per token,
BAR_P = 0.01  # shown at a p below this
UNITS = {"val_bpb": "bpb", "val_loss": "nats", "step_avg": "ms"}
RACE_UNITS = UNITS | {"steps": "steps", "train_time": "s"}


class Text(NamedTuple):
    """What one side was scored on. Equal bytes in more tokens are the same text in another vocabulary."""

    size: int  # bytes
    tokens: int


class Samples(NamedTuple):
    """One side of the comparison: as the user named it, and by seed its figures (keys of RACE_UNITS)."""

    name: str
    by_seed: dict[int, dict[str, float]]
    target: float | None  # the loss that a race must reach; None: no race
    text: Text

    def column(self, key: str, seeds: list[int] | None = None) -> list[float]:
        """Return a figure of these seeds, or of all in order."""
        chosen = sorted(self.by_seed) if seeds is None else seeds
        return [self.by_seed[seed][key] for seed in chosen]

    def per_token_of(self, other: Samples) -> Samples:
        """Return these samples with val_loss in nats per token of another vocabulary, on the same text."""
        factor = self.text.tokens / other.text.tokens
        by_seed = {
            seed: figures | {"val_loss": figures["val_loss"] * factor}
            for seed, figures in self.by_seed.items()
        }
        return self._replace(by_seed=by_seed)


def read_samples(name: str, target: Path) -> Samples:
    """Return the figures of the finished logs of a folder. Raises BadInput if two logs share a seed."""
    by_seed: dict[int, dict[str, float]] = {}
    goal = None
    text = Text(0, 0)
    for log in logs_of(target):
        run = parse_log(log)
        goal = run.number("final_score", "target") if is_race(run) else None
        text = Text(run.count("data", "val_bytes"), run.count("data", "val_tokens"))
        if run.seed in by_seed:
            raise BadInput(f"{log}: seed {run.seed} is in two logs of {target}")
        train_ms = run.number("final_score", "train_time")
        steps = run.number("final_score", "steps")
        by_seed[run.seed] = {
            "val_bpb": run.number("final_score", "val_bpb"),
            "val_loss": run.number("final_score", "val_loss"),
            "step_avg": train_ms / max(steps, 1),
            "steps": steps,
            "train_time": train_ms / 1000,
        }
    return Samples(name, by_seed, goal, text)


def summary_text(values: list[float]) -> str:
    """Return mean and sample std as two columns."""
    spread = stats.std(values)
    spread_text = "-" if spread is None else f"{spread:.4f}"
    return f" {stats.mean(values):>10.4f} {spread_text:>8}"


def test_text(name: str, test: stats.Difference | None, unit: str) -> str:
    """Return the columns of one test, or the reason why it needs more seeds."""
    if test is None:
        lacking = "shared seeds" if name == "paired" else "seeds on each side"
        return f"{name:<7} needs two {lacking}"
    low, high = test.interval()
    span = f"[{low:+.4f}, {high:+.4f}]"
    return f"{name:<7} {test.diff:>+9.4f} {span:>20} {test.p_two_sided():>8.2g} {unit}"


def bar_text(a: Samples, b: Samples) -> str:
    """Return whether B beats A by the challenge's bar."""
    test = stats.welch(a.column("val_loss"), b.column("val_loss"))
    if test is None:
        return "bar: not checkable, Welch's test needs two seeds on each side"
    p = test.p_less(-BAR_NATS)
    met = "yes" if p < BAR_P else "no"
    return (
        f"bar (B better by >= {BAR_NATS} nats at p < {BAR_P}, one-sided Welch): {met}, "
        f"{-test.diff:+.4f} nats better, p {p:.2g}; for any gain at all p {test.p_less():.2g}"
    )


def target_text(side: str, samples: Samples) -> str:
    """Return how one side of two races stands to its target."""
    outcome = Outcome(samples.column("val_loss"), samples.target)
    p = "-" if outcome.p is None else f"{outcome.p:.2g}"
    reached = [RULE_TEXTS[rule] for rule in RULES if outcome.holds(rule)]
    shown = f"reached by {' and by '.join(reached)}" if reached else "not shown to be reached"
    return (
        f"{side} to {samples.target:g}: mean {outcome.mean:.5f}, p {p}, margin {outcome.margin:+.5f}, {shown}"
    )


def print_comparison(a: Samples, b: Samples) -> None:
    """Print both tests on every figure, then the challenge's bar on val_loss, or the targets of two races.

    Two vocabularies of one text compare in nats per token of A; of two texts a line says that they differ.
    Raises BadInput if only one side is a race.
    """
    if (a.target is None) != (b.target is None):
        raise BadInput(f"{a.name}, {b.name}: only one of them is a race; their losses do not compare")
    if a.text.size != b.text.size:
        print(f"A was scored on {a.text.size:,} bytes of text, B on {b.text.size:,}: texts differ as well\n")
    elif a.text.tokens != b.text.tokens:
        b = b.per_token_of(a)
        print("A and B have other vocabularies: the nats of B are per token of A\n")
    shared = sorted(set(a.by_seed) & set(b.by_seed))
    print(f"A {a.name}: {len(a.by_seed)} seeds\nB {b.name}: {len(b.by_seed)} seeds, {len(shared)} shared\n")
    print(
        f"{'':<10} {'A mean':>10} {'std':>8} {'B mean':>10} {'std':>8}   {'test':<7} {'B - A':>9} "
        f"{'95 % interval':>20} {'p':>8}"
    )
    units = UNITS if a.target is None else RACE_UNITS
    for key, unit in units.items():
        head = f"{key:<10}{summary_text(a.column(key))}{summary_text(b.column(key))}"
        welch = stats.welch(a.column(key), b.column(key))
        paired = stats.paired(a.column(key, shared), b.column(key, shared))
        print(f"{head}   {test_text('welch', welch, unit)}")
        print(f"{' ' * len(head)}   {test_text('paired', paired, unit)}")
    if a.target is None:
        print(f"\n{bar_text(a, b)}")
    else:
        print(f"\n{target_text('A', a)}\n{target_text('B', b)}")
