"""Shows what an effect at little compute tells about the same change at more: `record ladder`.

An idea is a change of settings that was trained at two budgets or more, beside the same base. Its effect at a
budget is the int6 bpb with the change minus that without it, over the seeds that both have. Everything comes
from the logs of sweeps (each row at its best rate, against the baseline) and of records (against the parent).
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ledger import stats
from ledger.files import read_json, sha256
from ledger.folders import log_files, record_folders, sweep_folders
from ledger.make import markdown, pictures, sweep_table
from ledger.read.knobs import run_knobs, with_trait
from ledger.read.runlog import RunLog, parse_log
from ledger.read.scores import CHUNKED

BLOCK = markdown.block("ladder")
MAX_SHOWN = 4  # settings of an idea in the table


class Conditions(NamedTuple):
    """What the two sides of an effect have in common.

    text: bytes of the validation text. Two vocabularies of one text compare; two texts do not.
    """

    source: str  # sha256
    machine: str  # device and every bound kernel
    versions: str
    text: str
    seconds: float  # the limit of the clock, on one device
    devices: int

    @property
    def budget(self) -> float:
        """Device-seconds of training."""
        return self.seconds * self.devices


class Side(NamedTuple):
    """One configuration: its settings, and its bpb by seed."""

    name: str
    preset: str
    settings: dict[str, str]
    bpb: dict[int, float]


class Change(NamedTuple):
    """A setting with its value in the base and in the variant."""

    knob: str
    base: str
    variant: str


class Effect(NamedTuple):
    """An idea at one budget: the differences of bpb, one a seed and base. Negative is better."""

    name: str
    budget: float
    gaps: list[float]

    @property
    def mean(self) -> float:
        """The mean difference."""
        return stats.mean(self.gaps)

    @property
    def reach(self) -> float | None:
        """Half the 95 % interval of the mean by Student's t; None for one difference."""
        against_zero = stats.one_sample(self.gaps, 0.0)
        return None if against_zero is None else against_zero.interval()[1] - against_zero.diff


class Idea(NamedTuple):
    """A change beside one base preset, with its effect by budget, the least first."""

    preset: str
    changes: tuple[Change, ...]
    effects: dict[float, Effect]

    @property
    def name(self) -> str:
        """The name at the least budget: that of its row or record."""
        return next(iter(self.effects.values())).name


# ---- effects from logs ---------------------------------------------------------------------------


def settings_of(run: RunLog) -> dict[str, str]:
    """Return the settings that decide which weights a run ends with, its seed and its budget aside.

    Scores that settings change are not compared.
    """
    beside = (*run_knobs(), *with_trait("BUDGET", "REPORT", "SCORES", "FREE"))
    return {knob: value for knob, value in run.config.items() if knob not in beside}


def machine_of(run: RunLog, but: tuple[str, ...] = ()) -> str:
    """Return device and bindings of a run, without the facts named in `but`."""
    facts = sorted(run.facts.get("machine", {}).items())
    return " ".join(f"{key}:{value}" for key, value in facts if key not in but)


def conditions_of(run: RunLog) -> Conditions:
    """Return what a run shares with those it may be compared with. Raises BadInput for what the log lacks."""
    return Conditions(
        source=sha256(run.source),
        machine=machine_of(run),
        versions=" ".join(run.versions.values()),
        text=run.text("data", "val_bytes"),
        seconds=float(run.config.get("max_wallclock_seconds", "0")),
        devices=run.count("machine", "world_size"),
    )


def side_of(name: str, runs: list[RunLog]) -> Side:
    """Return the configuration that these runs, one a seed, have trained."""
    scores = {run.seed: CHUNKED.bpb(run) for run in runs}
    return Side(
        name, runs[0].preset, settings_of(runs[0]), {s: b for s, b in scores.items() if b is not None}
    )


def changes_between(base: Side, variant: Side) -> tuple[Change, ...]:
    """Return the settings that differ, by name."""
    knobs = sorted(base.settings.keys() | variant.settings.keys())
    values = [(knob, base.settings.get(knob, "-"), variant.settings.get(knob, "-")) for knob in knobs]
    return tuple(Change(*value) for value in values if value[1] != value[2])


class Pair(NamedTuple):
    """Two configurations that were trained under the same conditions."""

    conditions: Conditions
    base: Side
    variant: Side

    @property
    def gaps(self) -> list[float]:
        """The differences of bpb over the seeds that both have."""
        shared = sorted(self.base.bpb.keys() & self.variant.bpb.keys())
        return [self.variant.bpb[seed] - self.base.bpb[seed] for seed in shared]


def sweep_pairs(folder: Path) -> list[Pair]:
    """Return every row of a sweep, at its best rate, beside the baseline."""
    by_row: dict[str, list[RunLog]] = {}
    runs = sweep_table.read_runs(folder)
    for run in runs:
        by_row.setdefault(sweep_table.row_of(run), []).append(run)

    chosen = {name: sweep_table.runs_at_best_rate(group) for name, group in by_row.items()}
    baseline = runs[0].text("sweep", "baseline")
    if not chosen.get(baseline):
        return []
    conditions = conditions_of(chosen[baseline][0])  # a row may bind other kernels, on the same device
    base = side_of(baseline, chosen[baseline])
    return [
        Pair(conditions, base, side_of(name, group))
        for name, group in chosen.items()
        if name != baseline and group
    ]


def record_pairs(records: Path) -> list[Pair]:
    """Return every record that was trained under the conditions of its parent, beside it."""
    pairs = []
    for folder in record_folders(records):
        parent = read_json(folder / "submission.json").get("parent")
        if not parent or not (records / parent).is_dir():
            continue

        runs = timed_runs(folder)
        parents = timed_runs(records / parent)
        if runs and parents and conditions_of(runs[0]) == conditions_of(parents[0]):
            base = side_of(Path(parent).name[11:], parents)
            pairs.append(Pair(conditions_of(runs[0]), base, side_of(folder.name[11:], runs)))
    return pairs


def timed_runs(folder: Path) -> list[RunLog]:
    """Return the runs of a record whose length a clock sets, and that scored their artifact."""
    runs = [parse_log(log) for log in log_files(folder / "logs")]
    return [
        run
        for run in runs
        if float(run.config.get("max_wallclock_seconds") or 0) > 0 and CHUNKED.bpb(run) is not None
    ]


def find_ideas(records: Path) -> list[Idea]:
    """Return the ideas that were trained at two budgets or more, by preset and name."""
    pairs = record_pairs(records)
    for folder in sweep_folders(records):
        pairs += sweep_pairs(folder)

    found: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        if pair.gaps:
            key = (pair.base.preset, changes_between(pair.base, pair.variant))
            found.setdefault(key, []).append(pair)
    ideas = [Idea(preset, changes, effects_of(group)) for (preset, changes), group in found.items()]
    several = [idea for idea in ideas if len(idea.effects) > 1]
    return sorted(several, key=lambda idea: (idea.preset, idea.name))


def effects_of(pairs: list[Pair]) -> dict[float, Effect]:
    """Return the effect of one idea by budget, the least first."""
    effects: dict[float, Effect] = {}
    for pair in sorted(pairs, key=lambda pair: pair.conditions.budget):
        budget = pair.conditions.budget
        effect = effects.setdefault(budget, Effect(pair.variant.name, budget, []))
        effect.gaps.extend(pair.gaps)
    return effects


# ---- what one budget tells about another ----------------------------------------------------------


class Agreement(NamedTuple):
    """How the effects of the same ideas at two budgets go together."""

    less: float
    more: float
    ideas: int
    same_sign: int
    correlation: stats.RankCorrelation | None


def agreements(ideas: list[Idea]) -> list[Agreement]:
    """Return the agreement of every two budgets that share an idea, the least first."""
    budgets = sorted({budget for idea in ideas for budget in idea.effects})
    found = []
    for less, more in combinations(budgets, 2):
        both = [idea for idea in ideas if less in idea.effects and more in idea.effects]
        if both:
            a = [idea.effects[less].mean for idea in both]
            b = [idea.effects[more].mean for idea in both]
            same = sum((x < 0) == (y < 0) for x, y in zip(a, b))
            found.append(Agreement(less, more, len(both), same, stats.spearman(a, b)))
    return found


# ---- the page ------------------------------------------------------------------------------------


def effect_text(effect: Effect | None) -> str:
    """Return an effect in thousandths of a bit per byte: `-3.7 ± 1.2 (3)`, seeds in brackets."""
    if effect is None:
        return "-"
    reach = "" if effect.reach is None else f" ± {1000 * effect.reach:.1f}"
    return f"{1000 * effect.mean:+.1f}{reach} ({len(effect.gaps)})"


def changes_text(idea: Idea) -> str:
    """Return the settings of an idea: `knob=base>variant`."""
    shown = [f"{change.knob}={change.base}>{change.variant}" for change in idea.changes[:MAX_SHOWN]]
    more = len(idea.changes) - MAX_SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def idea_lines(ideas: list[Idea]) -> list[str]:
    """Return the table of ideas, a column for each budget."""
    budgets = sorted({budget for idea in ideas for budget in idea.effects})
    head = ["idea", "beside", "settings", *(f"{budget:,.0f} s" for budget in budgets)]
    rows = [
        [
            idea.name,
            idea.preset,
            changes_text(idea),
            *(effect_text(idea.effects.get(budget)) for budget in budgets),
        ]
        for idea in ideas
    ]
    return markdown.table(head, [[markdown.cell(c) for c in row] for row in rows], "lll" + "r" * len(budgets))


def agreement_lines(ideas: list[Idea]) -> list[str]:
    """Return the table of how well budgets agree."""
    rows = []
    for found in agreements(ideas):
        rank = found.correlation
        rows.append(
            [
                f"{found.less:,.0f} s and {found.more:,.0f} s",
                str(found.ideas),
                f"{found.same_sign} of {found.ideas}",
                "-" if rank is None else f"{rank.rho:+.2f}",
                "-" if rank is None else f"{rank.p:.2g}",
            ]
        )
    return markdown.table(["budgets", "ideas", "same sign", "Spearman's rho", "p"], rows)


def lines_of(ideas: list[Idea]) -> list[str]:
    """Return the generated part of docs/ladder.md."""
    if not ideas:
        return ["No idea has been trained at two budgets yet."]
    return [
        "Effects in thousandths of a bit per byte (negative is better), with their 95 % interval and the",
        "number of seeds; budgets in device-seconds of training.",
        "",
        *idea_lines(ideas),
        "",
        *agreement_lines(ideas),
        "",
        "![effects against the budget](pictures/ladder.png)",
    ]


def draw(ideas: list[Idea], out: Path) -> None:
    """Draw every idea's effect against the budget, with its interval."""
    plt = pictures.pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for index, idea in enumerate(ideas):
        effects = list(idea.effects.values())
        axis.errorbar(
            [effect.budget for effect in effects],
            [1000 * effect.mean for effect in effects],
            yerr=[1000 * (effect.reach or 0.0) for effect in effects],
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            color=f"C{index % 10}",
            linestyle="-" if index < 10 else "--",
            label=idea.name,
        )
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    budgets = sorted({budget for idea in ideas for budget in idea.effects})
    axis.set_xticks(budgets, [f"{budget:,.0f}" for budget in budgets])
    axis.minorticks_off()
    axis.set_xlabel("device-seconds of training")
    axis.set_ylabel("effect (0.001 bits per byte)")
    axis.legend(fontsize=7)
    pictures.save(plt, figure, out)
