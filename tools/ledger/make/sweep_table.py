"""Makes the tables of a sweep from its logs only. sweep_claims.py proves them.

A sweep folder: train_gpt.py once, logs/ROW_RATE_seedSEED.txt (or .txt.gz) that name its sha256 in place
of the source, and, made from these, table.json, README.md and curves.png.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ledger import stats
from ledger.files import as_json, read_json, sha256, write_atomic
from ledger.folders import log_files, sweep_folders
from ledger.make import markdown, pictures
from ledger.make.submission import common
from ledger.read.knobs import stored_knobs, with_trait
from ledger.read.runlog import RunLog, parse_log
from script import BadInput

FILES = ("README.md", "table.json", "train_gpt.py", "curves.png")
SWEEP_KEYS = ("row", "baseline", "key", "rate", "seed", "stage", "workers", "kind", "init_sha256")
NOTE = """val bpb is that of the int6 artifact, read back ({metric}); live and averaged are bpb of the
training weights and of their average. At each seed rows start from the same weights unless marked "own init".
n is the number of runs at the row's best rate. That rate was chosen on the first seed, so the first seed's
score is optimistic in every row. ± is the sample standard deviation over seeds. Differences are to
{baseline}; p is two-sided (paired: over shared seeds). "at {equal_step}" is the live bpb at step {equal_step}, the
fewest steps of any run here: a faster row has not finished its warmdown there. Bytes and bits per weight
(order-0 entropy of the int6 codes) are at one int6_step, {int6_step}, not fitted to the cap. A best rate marked
"edge" is the largest or the smallest tried: the row may do better beyond it."""  # noqa: E501


def fixed_knobs() -> tuple[str, ...]:
    """Return the settings that make the rows of a table comparable: equal in all its logs.

    No row may set one of these.
    """
    return with_trait("SHARED", "SCORES")


def stride_knobs() -> tuple[str, ...]:
    """Return the knobs that are strides of score windows, which are disjoint at a stride of eval_seq_len."""
    return with_trait("STRIDE")


def model_knobs() -> tuple[str, ...]:
    """Return the settings that a row may change at the price of a compilation of its own.

    They are those of the model, which scoring depends on, and those that only training does.
    """
    fixed = fixed_knobs()
    return tuple(key for key in (*stored_knobs(), *with_trait("COMPILES")) if key not in fixed)


# ---- the logs ------------------------------------------------------------------------------------


def diverged(run: RunLog) -> bool:
    """Return whether training ended in weights that are not numbers."""
    return "sweep_diverged" in run.facts


def finished(path: Path) -> RunLog:
    """Return the run of a sweep's log that is complete: scored, or diverged.

    Raises BadInput naming what is missing.
    """
    run = parse_log(path)
    for key in SWEEP_KEYS:
        run.text("sweep", key)
    if not diverged(run):
        run_figures(run)
    return run


def read_runs(folder: Path) -> list[RunLog]:
    """Return every run of a sweep folder, by name. Raises BadInput naming a log that is not finished."""
    return [finished(path) for path in log_files(folder / "logs")]


class RunFigures(NamedTuple):
    """What a configuration scored and cost. entropy: bits per int6 weight; the first three are bpb."""

    val_bpb: float
    live: float
    ema: float
    steps: float
    step_ms: float
    bytes: float
    entropy: float


def run_figures(run: RunLog) -> RunFigures:
    """Return the figures of a configuration. Raises BadInput if one is missing."""
    steps = run.count("final_score", "steps")
    return RunFigures(
        val_bpb=run.number("final_score", "val_bpb"),
        live=run.number("final_live", "val_bpb"),
        ema=run.number("final_ema", "val_bpb"),
        steps=steps,
        step_ms=run.number("final_score", "train_time") / max(steps, 1),
        bytes=run.size("artifact"),
        entropy=run.number("sweep_codes", "entropy"),
    )


def seed_of(run: RunLog) -> int:
    """Return the seed of a run, which may have diverged and so have no final_score."""
    return run.count("sweep", "seed")


def rate_of(run: RunLog) -> str:
    """Return the rate of a run, as the config prints it."""
    return run.text("sweep", "rate")


def row_of(run: RunLog) -> str:
    """Return the name of the row that a run belongs to."""
    return run.text("sweep", "row")


def device_of(run: RunLog) -> str:
    """Return device, processes and versions of a run: equal in all logs of a table."""
    versions = " ".join(f"{name} {run.versions[name]}" for name in ("torch", "cuda", "triton"))
    return f"{run.text('machine', 'world_size')} x {run.text('sweep', 'kind')}, {versions}"


class Point(NamedTuple):
    """One validation: the step, the seconds on the clock, and the bpb of the live weights."""

    step: float
    seconds: float
    bpb: float


def curve(run: RunLog) -> list[Point]:
    """Return every validation of a run, in order."""
    return [
        Point(s.step, s.time_ms / 1000, s.bpb) for s in run.steps if s.kind == "val" and s.bpb is not None
    ]


def bpb_at(run: RunLog, step: int) -> float | None:
    """Return the live bpb at a step, interpolated between the validations around it; None outside of them."""
    points = curve(run)
    for a, b in zip(points, points[1:]):
        if a.step <= step <= b.step:
            return a.bpb + (b.bpb - a.bpb) * (step - a.step) / max(b.step - a.step, 1)
    return points[-1].bpb if points and points[-1].step == step else None


# ---- table.json ----------------------------------------------------------------------------------


def is_first_stage(run: RunLog) -> bool:
    """Return whether a run is one of those that choose its row's rate."""
    return run.text("sweep", "stage") == "1"


def best_rate(runs: list[RunLog]) -> str | None:
    """Return the rate, as text, with the lowest val bpb among one row's first-stage runs.

    None when all of them diverged.
    """
    scored = [run for run in runs if is_first_stage(run) and not diverged(run)]
    if not scored:
        return None
    best = min(scored, key=lambda run: (run.number("final_score", "val_bpb"), float(rate_of(run))))
    return rate_of(best)


def runs_at_best_rate(runs: list[RunLog]) -> list[RunLog]:
    """Return the scored runs of one row at its best rate."""
    best = best_rate(runs)
    return [run for run in runs if rate_of(run) == best and not diverged(run)]


class Spread(NamedTuple):
    """Mean and sample standard deviation, None of one value."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of some values."""
        return cls(stats.mean(values), stats.std(values))


class Scores(NamedTuple):
    """The figures of a row at its best rate, over seeds: a Spread for each field of RunFigures, by its name.

    at_step: live bpb; None: a seed has none there.
    """

    val_bpb_by_seed: dict[str, float]
    val_bpb: Spread
    live: Spread
    ema: Spread
    steps: Spread
    step_ms: Spread
    bytes: Spread
    entropy: Spread
    at_step: Spread | None


class Difference(NamedTuple):
    """The val bpb of a row minus the baseline's, with two-sided p of both tests; None: too few seeds."""

    diff: float
    paired_p: float | None
    welch_p: float | None


class RowResult(NamedTuple):
    """A row of the table. scores: None if every run at every rate diverged."""

    name: str
    key: str
    rates: dict[str, float | None]
    best_rate: str | None
    edge: bool
    diverged: int
    seeds: list[int]
    scores: Scores | None
    changes: dict[str, str]
    versus: Difference | None
    own_init: bool

    @property
    def order(self) -> tuple[float, str]:
        return (math.inf if self.scores is None else self.scores.val_bpb.mean, self.name)


def rates_tried(runs: list[RunLog]) -> dict[str, float | None]:
    """Return the val bpb of every first-stage rate of a row, lowest rate first; None where it diverged."""
    first_stage = [run for run in runs if is_first_stage(run)]
    return {
        rate_of(run): None if diverged(run) else run.number("final_score", "val_bpb")
        for run in sorted(first_stage, key=lambda run: float(rate_of(run)))
    }


def scores_of(runs: list[RunLog], step: int) -> Scores | None:
    """Return the scores of a row from all of its runs, with curves compared at `step`."""
    scored = sorted(runs_at_best_rate(runs), key=seed_of)
    if not scored:
        return None
    by_seed = {str(seed_of(run)): run_figures(run) for run in scored}
    at_step = [bpb_at(run, step) for run in scored]
    spreads = {
        name: Spread.of([getattr(found, name) for found in by_seed.values()]) for name in RunFigures._fields
    }
    return Scores(
        val_bpb_by_seed={seed: found.val_bpb for seed, found in by_seed.items()},
        at_step=None if None in at_step else Spread.of(at_step),
        **spreads,
    )


def difference(row: Scores | None, base: Scores | None) -> Difference | None:
    """Return the val bpb of a row minus the baseline's. None where one of them has no score."""
    if row is None or base is None:
        return None

    a = base.val_bpb_by_seed
    b = row.val_bpb_by_seed
    shared = sorted(set(a) & set(b), key=int)
    paired = stats.paired([a[seed] for seed in shared], [b[seed] for seed in shared])
    welch = stats.welch(list(a.values()), list(b.values()))
    return Difference(
        diff=row.val_bpb.mean - base.val_bpb.mean,
        paired_p=None if paired is None else paired.p_two_sided(),
        welch_p=None if welch is None else welch.p_two_sided(),
    )


def initial_weights(runs: list[RunLog]) -> dict[int, str]:
    """Return the hash of the initial weights by seed."""
    return {seed_of(run): run.text("sweep", "init_sha256") for run in runs}


def own_init(runs: list[RunLog], base_runs: list[RunLog]) -> bool:
    """Return whether a row starts from other weights than the baseline at a seed that both have."""
    a = initial_weights(runs)
    b = initial_weights(base_runs)
    return any(a[seed] != b[seed] for seed in a.keys() & b.keys())


def changed_settings(runs: list[RunLog], base_runs: list[RunLog]) -> dict[str, str]:
    """Return the settings of a row that differ from the baseline's, its rate and its names aside."""
    config = runs[0].config
    base = base_runs[0].config
    free = {*with_trait("OWN"), runs[0].text("sweep", "key")}
    return {key: value for key, value in sorted(config.items()) if key not in free and base.get(key) != value}


def shared_config(runs: list[RunLog]) -> dict[str, object]:
    """Return the settings that all rows have in common. Raises BadInput where a fixed one differs."""
    model = [key for key in model_knobs() if len({run.config.get(key) for run in runs}) == 1]
    paths = with_trait("PATH")
    keys = [key for key in (*fixed_knobs(), *model) if key not in paths]

    def setting(key: str) -> object:
        return common(runs, key, lambda run: run.config.get(key))

    # A knob that is younger than all of the logs is in none of them.
    return {key: setting(key) for key in keys if any(key in run.config for run in runs)}


def row_result(
    name: str, by_row: dict[str, list[RunLog]], scores: dict[str, Scores | None], baseline: str
) -> RowResult:
    """Return a row of the table from all runs and the scores of all rows, by row.

    Without a run of the baseline the settings that differ are those that differ from the first row's.
    """
    runs = by_row[name]
    rates = rates_tried(runs)
    best = best_rate(runs)
    first_runs = next(iter(by_row.values()))
    return RowResult(
        name=name,
        key=runs[0].text("sweep", "key"),
        rates=rates,
        best_rate=best,
        edge=len(rates) > 1 and best in (list(rates)[0], list(rates)[-1]),
        diverged=sum(map(diverged, runs)),
        seeds=sorted(map(seed_of, runs_at_best_rate(runs))),
        scores=scores[name],
        changes=changed_settings(runs, by_row.get(baseline, first_runs)),
        versus=None if name == baseline else difference(scores[name], scores.get(baseline)),
        own_init=own_init(runs, by_row.get(baseline, runs)),
    )


def rows_of(by_row: dict[str, list[RunLog]], baseline: str, step: int) -> list[RowResult]:
    """Return the rows of the table, best first; curves are compared at `step`."""
    scores = {name: scores_of(runs, step) for name, runs in by_row.items()}
    rows = [row_result(name, by_row, scores, baseline) for name in by_row]
    return sorted(rows, key=lambda row: row.order)


def row_json(row: RowResult) -> dict[str, Any]:
    """Return a row as table.json has it: its scores, if any, beside the other fields."""
    fields: dict[str, Any] = {}
    for key, value in as_json(row).items():
        fields |= (value or {}) if key == "scores" else {key: value}
    return fields


def build_table(runs: list[RunLog]) -> dict[str, object]:
    """Return table.json of finished runs, rows by val bpb, best first.

    Raises BadInput if there are none or when they are not of one kind.
    """
    if not runs:
        raise BadInput("no finished configuration yet: nothing to tabulate")

    by_row: dict[str, list[RunLog]] = {}
    for run in runs:
        by_row.setdefault(row_of(run), []).append(run)
    baseline = common(runs, "baseline", lambda run: run.text("sweep", "baseline"))
    chosen = [run for group in by_row.values() for run in runs_at_best_rate(group)]
    step = min((run.count("final_score", "steps") for run in chosen), default=0)
    scored = [run for run in runs if not diverged(run)] or runs
    table = {
        "schema": 1,
        "device": common(runs, "device", device_of),
        "workers": sorted({run.count("sweep", "workers") for run in runs}),
        "baseline": baseline,
        "metric": common(scored, "metric", lambda run: run.facts.get("final_score", {}).get("metric")),
        "train_gpt_sha256": common(runs, "source", lambda run: sha256(run.source)),
        "data_manifest_sha256": common(
            runs, "data manifest", lambda run: run.text("data", "manifest_sha256")
        ),
        "config": shared_config(runs),
        "configurations": len(runs),
        "diverged": sum(map(diverged, runs)),
        "equal_step": step,
        "rows": [row_json(row) for row in rows_of(by_row, baseline, step)],
    }
    return rounded(table)


def rounded(value: dict) -> dict:
    """Return the JSON with every float rounded to eight digits, as logs have them."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 8))


# ---- README.md -----------------------------------------------------------------------------------

SPREAD_DIGITS = {"live": 4, "ema": 4, "at_step": 4, "steps": 0, "step_ms": 2, "bytes": 0, "entropy": 3}


def mean_text(value: dict | None, digits: int) -> str:
    """Return the mean of a spread as text, `-` for None."""
    return "-" if value is None else f"{value['mean']:,.{digits}f}"


def row_cells(row: dict) -> list[str]:
    """Return the cells of one row of the main table."""
    rate = row["best_rate"] or "diverged"
    if row["edge"] and row["best_rate"] is not None:
        rate += " (edge)"
    changes = [f"{key}={value}" for key, value in row["changes"].items()]
    if row["own_init"]:
        changes.append("own init")

    score = row.get("val_bpb") or {}
    std = score.get("std")
    return [
        row["name"],
        ", ".join(changes) or "-",
        f"{row['key']} {rate}",
        str(len(row["seeds"])),
        mean_text(row.get("val_bpb"), 4),
        "-" if std is None else f"{std:.4f}",
        *versus_cells(row["versus"]),
        *(mean_text(row.get(name), digits) for name, digits in SPREAD_DIGITS.items()),
    ]


def versus_cells(versus: dict | None) -> list[str]:
    """Return the difference to the baseline and the p of both tests."""
    if versus is None:
        return ["-", "-", "-"]
    tests = [versus["paired_p"], versus["welch_p"]]
    return [f"{versus['diff']:+.4f}", *("-" if p is None else f"{p:.2g}" for p in tests)]


def rate_cells(row: dict) -> str:
    """Return all rates tried at the first seed with their scores, the best in bold."""
    cells = []
    for rate, bpb in row["rates"].items():
        text = f"{rate}: diverged" if bpb is None else f"{rate}: {bpb:.4f}"
        cells.append(f"**{text}**" if rate == row["best_rate"] else text)
    return ", ".join(cells)


def summary(table: dict) -> str:
    """Return the sentence above the tables: device, time, preset, vocabulary, configurations, workers.

    A preset is that of the sweep's own script: today's of the same name may train another model.
    """
    limit = float(table["config"]["max_wallclock_seconds"])
    time = "no time limit" if limit == 0 else f"{limit:g} s of training each"
    diverged_count = f", {table['diverged']} of them diverged" if table["diverged"] else ""
    workers = table["workers"]
    beside = "one at a time" if workers == [1] else f"{' or '.join(map(str, workers))} side by side"
    config = table["config"]
    return (
        f"{table['device']}; {time}, preset {config['preset']} of its script, vocabulary "
        f"{int(config['vocab_size']):,}; {table['configurations']} configurations{diverged_count}, {beside}."
    )


def table_lines(table: dict) -> list[str]:
    """Return the summary and the two tables in Markdown, without a heading."""
    head = [
        "row",
        "what differs",
        "best rate",
        "n",
        "val bpb",
        "±",
        f"to {table['baseline']}",
        "p paired",
        "p Welch",
        "live",
        "averaged",
        f"at {table['equal_step']}",
        "steps",
        "ms/step",
        "bytes",
        "bits/weight",
    ]
    align = "lll" + "r" * (len(head) - 3)
    rates = [[row["name"], f"{row['key']} {rate_cells(row)}"] for row in table["rows"]]
    return [
        summary(table),
        "",
        *markdown.table(head, [row_cells(row) for row in table["rows"]], align),
        "",
        "Rates tried at the first seed, val bpb of each:",
        "",
        *markdown.table(["row", "rates"], rates, "ll"),
        "",
    ]


def page(table: dict, name: str) -> str:
    """Return README.md of a sweep folder."""
    note = NOTE.format(
        int6_step=table["config"]["int6_step"],
        metric=table["metric"],
        baseline=table["baseline"],
        equal_step=table["equal_step"],
    )
    lines = [
        f"# Sweep {name}",
        "",
        *table_lines(table),
        note,
        "",
        f"train_gpt.py sha256 `{table['train_gpt_sha256']}`; data manifest sha256 "
        f"`{table['data_manifest_sha256']}`.",
        "",
        "![bpb against steps and seconds](curves.png)",
        "",
    ]
    return "\n".join(lines)


# ---- curves.png ----------------------------------------------------------------------------------


def mean_curve(runs: list[RunLog]) -> list[Point]:
    """Return the mean over seeds of the validations that all runs have, and of their ends."""
    curves = [curve(run) for run in runs]
    if not curves or not all(curves):
        return []

    by_step = [{point.step: point for point in points[:-1]} for points in curves]
    shared = set.intersection(*(set(points) for points in by_step))
    groups = [[points[step] for points in by_step] for step in sorted(shared)]
    groups.append([points[-1] for points in curves])
    return [Point(*(stats.mean(column) for column in zip(*group))) for group in groups]


def plot(runs: list[RunLog], table: dict, out: Path) -> None:
    """Draw live bpb against steps and seconds, a curve per row: the mean over seeds at its best rate."""
    plt = pictures.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for index, row in enumerate(table["rows"]):
        points = mean_curve(runs_at_best_rate([run for run in runs if row_of(run) == row["name"]]))
        if len(points) > 2:
            points = points[1:]  # the untrained model flattens the rest
        style = {
            "color": f"C{index % 10}",
            "linestyle": "-" if index < 10 else "--",
            "linewidth": 1.0,
            "marker": ".",
            "markersize": 3,
            "label": row["name"],
        }
        bpb = [point.bpb for point in points]
        axes[0].plot([point.step for point in points], bpb, **style)
        axes[1].plot([point.seconds for point in points], bpb, **style)

    axes[0].set_ylabel("live val bpb (bits per byte)")
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("training time (s)")
    axes[1].legend(fontsize=7)
    pictures.save(plt, figure, out)


# ---- the folder and the board --------------------------------------------------------------------


def write_tables(folder: Path) -> dict:
    """Write table.json, README.md and curves.png of a sweep folder from its logs, and return the table."""
    runs = read_runs(folder)
    table = build_table(runs)
    write_atomic(folder / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomic(folder / "README.md", page(table, folder.name))
    plot(runs, table, folder / "curves.png")
    return table


def rewrite(folder: Path) -> None:
    """Write the tables of a finished sweep again and print them: `record sweep FOLDER`, without torch."""
    table = write_tables(folder)
    print("\n".join(table_lines(table)))


def board(records: Path) -> str:
    """Return the tables of every sweep folder, for records/README.md.

    Raises BadInput naming a table.json that is not a sweep's.
    """
    lines = []
    for folder in sweep_folders(records):
        path = folder / "table.json"
        try:
            lines += [f"**[{folder.name}](sweeps/{folder.name}/)**", "", *table_lines(read_json(path))]
        except (BadInput, ValueError, KeyError, TypeError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise BadInput(
                f"{path}: not a sweep's table ({reason}); ./run.sh record sweep {folder} writes it again"
            ) from None
    return "\n".join(lines) or "No sweeps yet.\n"
