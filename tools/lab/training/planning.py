"""The plan of a sweep: its rows, rates and seeds, and which configuration to train next.

No processes, no clock and no torch here; a trainer module (train_gpt.py) says which settings are valid.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ledger.files import read_text
from ledger.make import sweep_table
from ledger.read.knobs import with_trait
from script import BadInput

ROW_KEYS = ("rate_key", "rates", "multipliers")  # keys of a plan that a row may also have
PLAN_KEYS = {*ROW_KEYS, "name", "base", "seeds", "rows"}
FORCED = {"fit_cap": "false"}  # all rows are quantized alike: never fitted to the cap
DEFAULT_SEEDS = [1337]  # when no plan file names others
NEEDS = ("InputError", "load_config")  # the names of the trainer that a plan uses


# ---- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """One training: a row at a rate with a seed. rate: as config lines print it; argv: every key=value."""

    row: str
    rate: str
    seed: int
    stage: int
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.row}_{self.rate}_seed{self.seed}"


@dataclass(frozen=True)
class Row:
    """A row of a plan: its settings, the knob whose values are tried, and those values as text."""

    settings: Mapping[str, str]
    rate_key: str
    rates: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a sweep trains. base: settings of every row; the first row is the baseline."""

    name: str
    base: Mapping[str, str]
    rows: Mapping[str, Row]
    seeds: tuple[int, ...]
    trainer: ModuleType

    @property
    def baseline(self) -> str:
        return next(iter(self.rows))

    @property
    def size(self) -> int:
        """The number of configurations of both stages."""
        return sum(len(row.rates) + len(self.seeds) - 1 for row in self.rows.values())

    @property
    def limit_seconds(self) -> float:
        """The training time of a configuration, which no row may change; 0: no limit."""
        return resolve(self.trainer, "base", self.base).max_wallclock_seconds

    def configuration(self, row: str, rate: str, seed: int) -> Configuration:
        """Return the configuration of a row at a rate with a seed."""
        stage = 1 if seed == self.seeds[0] else 2
        unnamed = Configuration(row, rate, seed, stage, ())
        spec = self.rows[row]
        settings = {**self.base, **spec.settings, spec.rate_key: rate, "seed": seed, "run_id": unnamed.name}
        argv = tuple(f"{key}={value}" for key, value in settings.items())
        return dataclasses.replace(unnamed, argv=argv)

    def first_stage(self) -> list[Configuration]:
        """Return every row at every rate, middle rates first: a sweep cut short has compared all rows."""
        longest = max(len(row.rates) for row in self.rows.values())
        middle = (longest - 1) // 2
        order = sorted(range(longest), key=lambda i: (abs(i - middle), i))
        return [
            self.configuration(name, row.rates[i], self.seeds[0])
            for i in order
            for name, row in self.rows.items()
            if i < len(row.rates)
        ]


def resolve(trainer: ModuleType, where: str, settings: Mapping[str, str]) -> Any:
    """Return the trainer's Config of some settings. Raises BadInput naming the wrong part of the plan."""
    try:
        return trainer.load_config([f"{key}={value}" for key, value in settings.items()], {})
    except trainer.InputError as error:
        raise BadInput(f"{where}: {error}") from None


# ---- reading a plan ------------------------------------------------------------------------------


def row_settings(where: str, given: Mapping) -> dict[str, str]:
    """Return the settings of a row of the plan, as text. Raises BadInput if all rows must share one."""
    settings = {key: str(value) for key, value in given.items() if key not in ROW_KEYS}
    for key in settings:
        if key in (*sweep_table.fixed_knobs(), *with_trait("OWN")):
            raise BadInput(f"{where}: {key} is the same in every row of a table; set it in base")
    check_no_backup(where, settings)
    return settings


def check_no_backup(where: str, keys: Iterable[str]) -> None:
    """Raise BadInput if one of the knobs keeps a run from being lost: a worker resumes none."""
    for key in keys:
        if key in with_trait("BACKUP"):
            raise BadInput(
                f"{where}: {key} has no effect in a sweep, which trains what was cut off from its start; "
                "leave it out"
            )


def check_shared_knobs(where: str, h: Any, base: Any) -> None:
    """Raise BadInput if a Config differs from base's in a knob that may follow from others, as iterations."""
    for key in sweep_table.fixed_knobs():
        value = getattr(h, key)
        value_in_base = getattr(base, key)
        if value != value_in_base:
            raise BadInput(
                f"{where}: makes {key} {value}, and it is {value_in_base} in base: it is the same in every "
                "row of a table; set in base what it follows from"
            )


def row_rates(where: str, given: Mapping, plan: Mapping, rate_key: str, start: float) -> tuple[str, ...]:
    """Return the rates of a row in ascending order: its own or the plan's, values or multiples of `start`."""
    source = given if given.keys() & {"rates", "multipliers"} else plan
    if ("rates" in source) == ("multipliers" in source):
        raise BadInput(
            f"{where}: give either rates (values of {rate_key}) or multipliers (of its {start}), not both"
        )
    try:
        if "rates" in source:
            values = {float(value) for value in source["rates"]}
        else:
            values = {float(factor) * start for factor in source["multipliers"]}
    except (TypeError, ValueError):
        raise BadInput(f"{where}: rates and multipliers are lists of numbers") from None
    if not values:
        raise BadInput(f"{where}: no rates to try")
    return tuple(str(float(f"{value:.6g}")) for value in sorted(values))


def check_name(where: str, what: str, name: Any) -> None:
    """Raise BadInput if a name in the plan cannot be the name of a file. what: the kind of name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise BadInput(
            f"{where}: {what} becomes a file name; use letters, digits and _ . - only, and no . or - first"
        )


def make_row(trainer: ModuleType, name: str, given: Any, plan: Mapping, base: Mapping[str, str]) -> Row:
    """Return a row of the plan with its rates as values. Raises BadInput naming the row and the key."""
    where = "row " + repr(name)[1:-1]
    check_name(where, "a row's name", name)
    if not isinstance(given, dict):
        raise BadInput(f"{where}: must be an object of settings")
    settings = row_settings(where, given)

    rate_key = given.get("rate_key", plan.get("rate_key", "matrix_lr"))
    start = getattr(resolve(trainer, where, {**base, **settings}), str(rate_key), None)
    check_no_backup(where, [rate_key])
    if not isinstance(start, float) or rate_key in (*sweep_table.fixed_knobs(), *sweep_table.model_knobs()):
        raise BadInput(
            f"{where}: rate_key {rate_key!r} must be a knob with a decimal value, such as matrix_lr"
        )

    rates = row_rates(where, given, plan, rate_key, start)
    shared = resolve(trainer, "base", base)
    for rate in rates:
        check_shared_knobs(where, resolve(trainer, where, {**base, **settings, rate_key: rate}), shared)
    return Row(settings, rate_key, rates)


def make_base(trainer: ModuleType, given: Mapping, where: str, sliding: bool) -> dict[str, str]:
    """Return the settings of every row. Unless `sliding`, windows are scored side by side, which is fast."""
    base = {key: str(value) for key, value in given.items()}
    for key in (*FORCED, *with_trait("OWN")):
        if key in base:
            raise BadInput(f"{where}: base sets {key}, which the sweep sets itself")
    check_no_backup(f"{where}: base", base)
    strides = () if sliding else sweep_table.stride_knobs()
    for key in strides:
        if key in base:
            raise BadInput(f"{where}: base sets {key}, which the sweep sets itself unless --sliding is given")

    base |= FORCED
    shortest = dict.fromkeys(strides, "1")  # the preset's stride may be longer than the windows of base
    length = resolve(trainer, f"{where}: base", base | shortest).eval_seq_len
    base |= dict.fromkeys(strides, str(length))
    if resolve(trainer, f"{where}: base", base).target_loss:
        raise BadInput(
            f"{where}: base sets target_loss, and a sweep ranks artifacts; train each run of a race by "
            "itself, then ./run.sh record target"
        )
    return base


def make_plan(trainer: ModuleType, raw: Mapping, where: str, sliding: bool = False) -> Plan:
    """Return the plan of a JSON object. Raises BadInput naming its fault and `where`, its file."""
    unknown = sorted(set(raw) - PLAN_KEYS)
    if unknown:
        raise BadInput(f"{where}: unknown key {unknown[0]!r}; a plan has {', '.join(sorted(PLAN_KEYS))}")
    name = raw.get("name", "sweep")
    check_name(f"{where}: name {name!r}", "it", name)
    base = make_base(trainer, raw.get("base", {}), where, sliding)

    rows = raw.get("rows", {})
    if not isinstance(rows, dict) or not rows:
        raise BadInput(f"{where}: no rows; name some in the plan or with --row NAME:key=value,key=value")
    seeds = raw.get("seeds", [])
    whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise BadInput(f"{where}: seeds must be a list of different whole numbers, got {seeds}")

    made = {name: make_row(trainer, name, given, raw, base) for name, given in rows.items()}
    return Plan(name, base, made, tuple(seeds), trainer)


def named_file(words: list[str]) -> Path | None:
    """Return the plan file or folder among the words of a command line, if there is one."""
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise BadInput(f"{files[1]}: one plan at a time; settings are key=value")
    return Path(files[0]) if files else None


def read_file(path: Path) -> dict:
    """Return the JSON object of a plan file. Raises BadInput if it holds none."""
    try:
        raw = json.loads(read_text(path))
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("base", {}), dict):
        raise BadInput(f"{path}: a plan must be an object, and so must its base")
    return raw


def read_plan(trainer: ModuleType, args: argparse.Namespace) -> Plan:
    """Return the plan of a command line: its file, with the settings and options given over it."""
    path = named_file(args.words)
    raw = read_file(path) if path else {"seeds": DEFAULT_SEEDS}
    raw["base"] = raw.get("base", {}) | dict(word.split("=", 1) for word in args.words if "=" in word)

    for text in args.row:
        name, _, settings = text.partition(":")
        pairs = [pair.partition("=") for pair in settings.split(",") if pair]
        raw["rows"] = raw.get("rows", {}) | {name: {key: value for key, _, value in pairs}}
    for key, number in (("rates", float), ("multipliers", float), ("seeds", int)):
        if text := getattr(args, key):
            try:
                raw[key] = [number(part) for part in text.split(",")]
            except ValueError as error:
                raise BadInput(f"--{key}: {error}; separate numbers with commas") from None
    if args.key:
        raw["rate_key"] = args.key

    raw.setdefault("name", default_name(path))
    return make_plan(trainer, raw, str(path or "command line"), args.sliding)


def default_name(path: Path | None) -> str:
    """Return the name of a plan that does not give one."""
    stem = path.stem if path else "sweep"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).lstrip(".-") or "sweep"


# ---- which configuration is next -----------------------------------------------------------------


class Queue:
    """The configurations of a plan, handed out one by one: outcomes in, configurations out.

    outcomes: name -> val bpb of the finished ones, None for a diverged one. A configuration whose worker
    died twice is failed.
    """

    def __init__(self, plan: Plan, outcomes: Mapping[str, float | None]) -> None:
        self.plan = plan
        self.outcomes = dict(outcomes)
        self.failed: set[str] = set()
        self.deaths: dict[str, int] = {}
        self.running: set[str] = set()

    def needed(self) -> list[Configuration]:
        """Return the configurations known to be needed, the first stage before the second."""
        first = self.plan.first_stage()
        best_rates = {row: self.best_rate(row) for row in self.plan.rows}
        second = [
            self.plan.configuration(row, rate, seed)
            for seed in self.plan.seeds[1:]
            for row, rate in best_rates.items()
            if rate is not None
        ]
        return first + second

    def trials(self, row: str) -> list[Configuration]:
        """Return the first stage of a row."""
        return [trial for trial in self.plan.first_stage() if trial.row == row]

    def best_rate(self, row: str) -> str | None:
        """Return the rate with the lowest bpb; None while a rate is to be trained, or if none has a score."""
        trials = self.trials(row)
        if any(trial.name not in self.outcomes and trial.name not in self.failed for trial in trials):
            return None
        scored = [
            (self.outcomes[trial.name], float(trial.rate), trial.rate)
            for trial in trials
            if self.outcomes.get(trial.name) is not None
        ]
        return min(scored)[2] if scored else None

    def open(self) -> list[Configuration]:
        """Return the needed configurations that have neither ended nor failed and are not running."""
        busy = {*self.outcomes, *self.failed, *self.running}
        return [configuration for configuration in self.needed() if configuration.name not in busy]

    def take(self, row: str = "") -> Configuration | None:
        """Mark the next configuration as running and return it; None when none is open at the moment.

        It has the seed whose turn it is, and `row` if that row is open at this seed.
        """
        waiting = self.open()
        if not waiting:
            return None
        same_row = [c for c in waiting if c.row == row and c.seed == waiting[0].seed]
        chosen = (same_row or waiting)[0]
        self.running.add(chosen.name)
        return chosen

    def finish(self, configuration: Configuration, bpb: float | None) -> None:
        """Record the score of a configuration, None if it diverged."""
        self.running.discard(configuration.name)
        self.outcomes[configuration.name] = bpb

    def fail(self, configuration: Configuration) -> None:
        """Give a configuration up."""
        self.running.discard(configuration.name)
        self.failed.add(configuration.name)

    def died(self, configuration: Configuration) -> bool:
        """Record that its worker died. Returns whether another worker may try: after the first death only."""
        name = configuration.name
        self.running.discard(name)
        self.deaths[name] = self.deaths.get(name, 0) + 1
        if self.deaths[name] > 1:
            self.failed.add(name)
        return self.deaths[name] == 1

    @property
    def over(self) -> bool:
        """Whether nothing is open and nothing is running that could open more."""
        return not self.running and not self.open()

    @property
    def left(self) -> int:
        """How many configurations of the plan are still to be finished, as far as is known."""
        hopeless = sum(self.hopeless(row) for row in self.plan.rows)
        lost = hopeless * (len(self.plan.seeds) - 1)
        return max(0, self.plan.size - lost - len(self.outcomes) - len(self.failed))

    def hopeless(self, row: str) -> bool:
        """Return whether no rate of the row has, or can still get, a score: it has no second stage."""
        return all(
            trial.name in self.failed or self.outcomes.get(trial.name, 0.0) is None
            for trial in self.trials(row)
        )
