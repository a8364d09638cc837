"""Judges a race: runs of equal settings whose last validations are held against a target loss.

Two rules of significance are in use among the neighbours: modded-nanogpt asks for p < 0.01 in a one-sided
t-test, and its track 3 for (target - mean) * sqrt(runs) >= 0.004, which stands for a known deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ledger import stats
from ledger.files import sha256
from ledger.make.submission import by_distinct_seed, common, common_config
from ledger.read.runlog import RunLog
from script import BadInput

LEVEL = 0.01  # the p that a t-test must stay below
MIN_MARGIN = 0.004  # nats times the square root of the number of runs
METRIC = "time_to_loss"  # what final_score names in a race


@dataclass(frozen=True)
class Outcome:
    """Losses of the last validations of a race, in nats per token, and the target."""

    losses: list[float]
    target: float

    @property
    def mean(self) -> float:
        return stats.mean(self.losses)

    @property
    def std(self) -> float | None:
        return stats.std(self.losses)

    @property
    def p(self) -> float | None:
        """The one-sided p of the claim that the true mean is below the target; None below two runs."""
        test = stats.one_sample(self.losses, self.target)
        return None if test is None else test.p_less()

    @property
    def margin(self) -> float:
        """The distance of the mean below the target times the square root of the number of runs."""
        return (self.target - self.mean) * math.sqrt(len(self.losses))

    def holds(self, rule: str) -> bool:
        """Return whether the target is reached by a rule of RULES."""
        return RULES[rule](self)


def by_t_test(outcome: Outcome) -> bool:
    """Return whether a t-test shows the mean below the target."""
    return outcome.p is not None and outcome.p < LEVEL


def by_margin(outcome: Outcome) -> bool:
    """Return whether the mean is far enough below the target for the number of runs."""
    return outcome.margin >= MIN_MARGIN


RULES = {"t_test": by_t_test, "margin": by_margin}
RULE_TEXTS = {
    "t_test": f"p < {LEVEL} in a one-sided t-test",
    "margin": f"(target - mean) sqrt(runs) >= {MIN_MARGIN}",
}


def is_race(run: RunLog) -> bool:
    """Return whether a finished run was one of a race."""
    return run.has("final_score", "target")


def last_validation(run: RunLog) -> float:
    """Return the loss of a run's last validation, that of its training weights at its end."""
    return run.number("final_live", "val_loss")


def race_steps(run: RunLog) -> int:
    """Return the steps of a run that took all of them. Raises BadInput for one that stopped before."""
    steps = run.count("final_score", "steps")
    total = run.steps[-1].total if run.steps else 0
    if steps != total:
        raise BadInput(f"{run.path}: stopped after {steps} of {total} steps; a run of a race takes them all")
    return steps


def check_race(runs: list[RunLog]) -> None:
    """Check that the runs are those of one race: all of them, seeds 1, 2, 3, ..., alike but for the seed.

    Raises BadInput for another source, other settings, another last step, and a run that is missing or there
    twice: a mean over chosen runs shows nothing.
    """
    common(runs, "source", lambda run: sha256(run.source)[:16])
    common_config(runs)
    common(runs, "the last step", race_steps)
    seeds = set(by_distinct_seed(runs))
    count = len(seeds)
    if missing := set(range(1, count + 1)) - seeds:
        raise BadInput(
            f"{runs[0].path.parent}: seed {min(missing)} is missing: the {count} runs of a race are seeds 1 "
            f"to {count}, none left out"
        )


def outcome_of(runs: list[RunLog], target: float) -> Outcome:
    """Return the outcome of a race against a target."""
    return Outcome([last_validation(run) for run in runs], target)


# ---- what `record target` prints -----------------------------------------------------------------


def spread_text(values: list[float], digits: int) -> str:
    """Return mean and sample standard deviation."""
    spread = stats.std(values)
    shown = "-" if spread is None else f"{spread:.{digits}f}"
    return f"mean {stats.mean(values):.{digits}f}, std {shown}"


def verdict_text(outcome: Outcome, rule: str) -> str:
    """Return a rule and whether it holds."""
    met = "reached" if outcome.holds(rule) else "not shown"
    return f"{met} by {RULE_TEXTS[rule]}"


def describe_race(runs: list[RunLog], target: float, with_time: bool) -> list[str]:
    """Return lines about a race against a target, with the training time if asked.

    Raises BadInput if the runs are not those of one race, or their times do not compare.
    """
    check_race(runs)
    outcome = outcome_of(runs, target)
    p = "-" if outcome.p is None else f"{outcome.p:.4f}"
    lines = [
        f"runs      {len(runs)}, {race_steps(runs[0]):,} steps each",
        f"val_loss  {spread_text(outcome.losses, 5)}, target {target:g}",
        f"t-test    p {p}: {verdict_text(outcome, 't_test')}",
        f"margin    {outcome.margin:+.5f}: {verdict_text(outcome, 'margin')}",
    ]
    if with_time:
        check_times(runs)
        seconds = [run.number("final_score", "train_time") / 1000 for run in runs]
        lines.append(f"time      {spread_text(seconds, 3)} s on {runs[0].hardware}")
    return lines


def check_times(runs: list[RunLog]) -> None:
    """Check that the training times of runs compare. Raises BadInput for other hardware, or a resumed run."""
    common(runs, "hardware", lambda run: run.hardware)
    for run in runs:
        if run.resumed:
            raise BadInput(
                f"{run.path}: was resumed; its clock does not count what was lost, so run it again"
            )
