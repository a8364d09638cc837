"""Shows how the loss falls with compute, for each configuration trained at several depths: `record scaling`.

A run counts if depth= set its size and its log says how much was computed. Its loss is the validation bpb of
the averaged weights, before they are rounded. Everything comes from the logs of sweeps and records.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ledger import stats
from ledger.files import sha256
from ledger.folders import log_files, record_folders, sweep_folders
from ledger.make import markdown, pictures
from ledger.make.ladder import machine_of, settings_of
from ledger.read.knobs import with_trait
from ledger.read.runlog import RunLog, parse_log

BLOCK = markdown.block("scaling")
MIN_POINTS = 3  # as many as a fit has numbers
EXPONENTS = (0.01, 1.0)  # between which b is looked for
RESAMPLES = 1000
BEYOND = 1000.0  # how far past the measured compute a crossing is looked for


class Key(NamedTuple):
    """What the runs of one curve have in common."""

    row: str  # of a sweep; "" in a record
    preset: str
    source: str  # sha256
    machine: str  # device and every bound kernel
    text: str  # bytes of the validation text
    settings: tuple[tuple[str, str], ...]


class Point(NamedTuple):
    """A configuration at one depth: means over its runs, and the loss of each."""

    depth: int
    params: float
    tokens: float
    flops: float
    losses: list[float]

    @property
    def loss(self) -> float:
        return stats.mean(self.losses)


class Curve(NamedTuple):
    """A configuration at several depths, the least compute first."""

    name: str
    preset: str
    text: str  # curves of two texts do not compare
    points: list[Point]


class Fit(NamedTuple):
    """The law loss = floor + scale * (flops / unit)^-exponent."""

    floor: float
    scale: float  # how far above the floor the loss is at `unit` FLOPs
    exponent: float
    unit: float

    def loss(self, flops: float) -> float:
        """Return the loss at a compute."""
        return self.floor + self.scale * (flops / self.unit) ** -self.exponent


# ---- curves from logs ----------------------------------------------------------------------------


def knobs_by_depth() -> tuple[str, ...]:
    """Return the knobs that may differ along a curve, also those that only older scripts have."""
    return (*with_trait("BY_DEPTH"), "copy_lr")


def counts(run: RunLog) -> bool:
    """Return whether a run was sized by depth and has all that a point needs."""
    has_figures = run.has("compute", "flops") and run.has("final_ema", "val_bpb")
    return run.config.get("depth", "0") != "0" and has_figures


def key_of(run: RunLog) -> Key:
    """Return what a run has in common with those of its curve. Raises BadInput for what the log lacks."""
    settings = settings_of(run)
    for knob in knobs_by_depth():
        settings.pop(knob, None)
    return Key(
        row=run.facts.get("sweep", {}).get("row", ""),
        preset=run.preset,
        source=sha256(run.source),
        machine=machine_of(run, but=("world_size",)),
        text=run.text("data", "val_bytes"),
        settings=tuple(sorted(settings.items())),
    )


def point_of(runs: list[RunLog]) -> Point:
    """Return the point of runs that differ in their seeds only."""

    def mean_of(key: str) -> float:
        return stats.mean([run.number("compute", key) for run in runs])

    return Point(
        depth=int(runs[0].config["depth"]),
        params=mean_of("scaling_params"),
        tokens=mean_of("tokens"),
        flops=mean_of("flops"),
        losses=[run.number("final_ema", "val_bpb") for run in runs],
    )


def points_of(runs: list[RunLog]) -> list[Point]:
    """Return a point for each depth: of the rates that were tried there, those with the lowest mean loss."""
    by_depth = knobs_by_depth()
    variants: dict[tuple, list[RunLog]] = {}
    for run in runs:
        variants.setdefault(tuple(run.config.get(knob) for knob in by_depth), []).append(run)
    best: dict[int, Point] = {}
    for group in variants.values():
        point = point_of(group)
        if point.depth not in best or point.loss < best[point.depth].loss:
            best[point.depth] = point
    return sorted(best.values(), key=lambda point: point.flops)


def find_curves(records: Path) -> list[Curve]:
    """Return the configurations that were trained at two depths or more, by preset and name."""
    found: dict[Key, list[RunLog]] = {}
    for folder in record_folders(records) + sweep_folders(records):
        for run in map(parse_log, log_files(folder / "logs")):
            if counts(run):
                found.setdefault(key_of(run), []).append(run)
    curves = [Curve(key.row or key.preset, key.preset, key.text, points_of(g)) for key, g in found.items()]
    several = [curve for curve in curves if len(curve.points) > 1]
    return sorted(several, key=lambda curve: (curve.preset, curve.name))


# ---- the law -------------------------------------------------------------------------------------


def fit_with_exponent(flops: list[float], losses: list[float], unit: float, exponent: float) -> Fit:
    """Return the least-squares fit with a given exponent; its floor and scale are not negative."""
    x = [(c / unit) ** -exponent for c in flops]
    mean_x = stats.mean(x)
    mean_y = stats.mean(losses)
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    scale = math.fsum((a - mean_x) * (y - mean_y) for a, y in zip(x, losses)) / spread
    scale = max(scale, 0.0)
    floor = mean_y - scale * mean_x
    if floor < 0:
        floor = 0.0
        scale = math.fsum(a * y for a, y in zip(x, losses)) / math.fsum(a * a for a in x)
    return Fit(floor, scale, exponent, unit)


def squared_error(fit: Fit, flops: list[float], losses: list[float]) -> float:
    """Return the sum of the squared distances of the losses from a fit."""
    return math.fsum((y - fit.loss(c)) ** 2 for c, y in zip(flops, losses))


def smallest_between(low: float, high: float, f: Callable[[float], float]) -> float:
    """Return where f is smallest between two positive numbers: by a scan, then by golden section."""
    steps = 40
    grid = [low * (high / low) ** (i / steps) for i in range(steps + 1)]
    best = min(range(len(grid)), key=lambda i: f(grid[i]))
    low = grid[max(best - 1, 0)]
    high = grid[min(best + 1, steps)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        a = high - golden * (high - low)
        b = low + golden * (high - low)
        if f(a) < f(b):
            high = b
        else:
            low = a
    return (low + high) / 2


def fit_law(flops: list[float], losses: list[float]) -> Fit | None:
    """Return the least-squares fit, every budget counting alike.

    None if there are fewer than MIN_POINTS budgets, if the loss does not fall, or if the best exponent is
    at an end of EXPONENTS: then the points do not tell the law from a line or from a step.
    """
    if len(set(flops)) < MIN_POINTS:
        return None
    unit = math.exp(stats.mean([math.log(c) for c in flops]))

    def error(exponent: float) -> float:
        return squared_error(fit_with_exponent(flops, losses, unit, exponent), flops, losses)

    exponent = smallest_between(*EXPONENTS, error)
    fit = fit_with_exponent(flops, losses, unit, exponent)
    low, high = EXPONENTS
    if fit.scale == 0 or not 1.01 * low < exponent < 0.99 * high:
        return None
    return fit


class Interval(NamedTuple):
    """The 95 % intervals of a fit's floor and exponent."""

    floor: tuple[float, float]
    exponent: tuple[float, float]


def middle(values: list[float]) -> tuple[float, float]:
    """Return the ends of the middle 95 % of some values."""
    ordered = sorted(values)
    cut = round(0.025 * (len(ordered) - 1))
    return ordered[cut], ordered[-1 - cut]


def drawn_mean(losses: list[float], dice: random.Random) -> float:
    """Return the mean of as many draws from the losses, with the spread that means of new runs would have.

    A mean of n draws varies too little, by sqrt((n - 1) / n).
    """
    center = stats.mean(losses)
    drawn = stats.mean(dice.choices(losses, k=len(losses)))
    return center + (drawn - center) * math.sqrt(len(losses) / (len(losses) - 1))


def interval_of(points: list[Point], resamples: int = RESAMPLES) -> Interval | None:
    """Return the intervals by bootstrap: the seeds of each depth drawn again, with replacement.

    The draws are always the same. None if a depth has one seed, or if one draw in twenty has no fit.
    """
    if any(len(point.losses) < 2 for point in points):
        return None
    dice = random.Random(0)
    flops = [point.flops for point in points]
    fits = []
    for _ in range(resamples):
        fits.append(fit_law(flops, [drawn_mean(point.losses, dice) for point in points]))
    good = [fit for fit in fits if fit is not None]
    if len(good) < 0.95 * resamples:
        return None
    return Interval(middle([fit.floor for fit in good]), middle([fit.exponent for fit in good]))


def crossing(a: Fit, b: Fit, low: float, high: float) -> float | None:
    """Return the least compute between low and high at which two laws give the same loss, else None."""
    steps = 400
    grid = [low * (high / low) ** (i / steps) for i in range(steps + 1)]
    above = [a.loss(c) > b.loss(c) for c in grid]
    for i in range(steps):
        if above[i] == above[i + 1]:
            continue
        left = grid[i]
        right = grid[i + 1]
        for _ in range(60):
            center = math.sqrt(left * right)
            if (a.loss(center) > b.loss(center)) == above[i]:
                left = center
            else:
                right = center
        return math.sqrt(left * right)
    return None


# ---- the page ------------------------------------------------------------------------------------


def fit_of(curve: Curve) -> Fit | None:
    """Return the law of a curve."""
    return fit_law([point.flops for point in curve.points], [point.loss for point in curve.points])


def point_lines(curves: list[Curve]) -> list[str]:
    """Return the table of every configuration at every depth."""
    rows = []
    for curve in curves:
        for point in curve.points:
            spread = stats.std(point.losses)
            deviation = "" if spread is None else f" ± {spread:.4f}"
            rows.append(
                [
                    markdown.cell(curve.name),
                    markdown.cell(curve.preset),
                    str(point.depth),
                    f"{point.params:,.0f}",
                    f"{point.tokens:,.0f}",
                    f"{point.flops:.3g}",
                    f"{point.loss:.4f}{deviation} ({len(point.losses)})",
                ]
            )
    head = ["configuration", "preset", "depth", "parameters", "tokens", "FLOPs", "val bpb"]
    return markdown.table(head, rows, "llrrrrr")


def range_text(ends: tuple[float, float] | None) -> str:
    """Return an interval: ` (0.41 to 0.52)`, or nothing."""
    return "" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})"


def fit_lines(curves: list[Curve]) -> list[str]:
    """Return the table of the laws."""
    rows = []
    for curve in curves:
        fit = fit_of(curve)
        name = [markdown.cell(curve.name), markdown.cell(curve.preset)]
        if fit is None:
            rows.append([*name, "-", "-", "-", "-"])
            continue
        ends = interval_of(curve.points)
        rows.append(
            [
                *name,
                f"{fit.floor:.3f}{range_text(ends.floor if ends else None)}",
                f"{fit.scale:.3f}",
                f"{fit.unit:.3g}",
                f"{fit.exponent:.3f}{range_text(ends.exponent if ends else None)}",
            ]
        )
    head = ["configuration", "preset", "E", "A", "C0 (FLOPs)", "b"]
    return markdown.table(head, rows, "llrrrr")


def crossing_lines(curves: list[Curve]) -> list[str]:
    """Return a line for every two laws of one text: where they cross."""
    fitted = [(curve, fit) for curve in curves if (fit := fit_of(curve)) is not None]
    lines = []
    for (a, fit_a), (b, fit_b) in combinations(fitted, 2):
        if a.text != b.text:
            continue
        low = min(point.flops for point in a.points + b.points)
        high = max(point.flops for point in a.points + b.points)
        names = f"{markdown.one_line(a.name)} ({a.preset}) and {markdown.one_line(b.name)} ({b.preset})"
        at = crossing(fit_a, fit_b, low, BEYOND * high)
        if at is None:
            lines.append(f"- {names}: no crossing up to {BEYOND * high:.3g} FLOPs.")
        else:
            where = "as measured" if at <= high else f"beyond what was measured, {high:.3g}"
            lines.append(f"- {names}: they cross at {at:.3g} FLOPs, {where}.")
    return lines


def lines_of(curves: list[Curve]) -> list[str]:
    """Return the generated part of docs/scaling.md."""
    if not curves:
        return ["No configuration has been trained at two depths yet."]
    crossings = crossing_lines(curves)
    return [
        *point_lines(curves),
        "",
        *fit_lines(curves),
        *(["", *crossings] if crossings else []),
        "",
        "![loss against compute](pictures/scaling.png)",
    ]


def draw(curves: list[Curve], out: Path) -> None:
    """Draw every curve's losses against compute, with their spread over seeds, and its law."""
    plt = pictures.pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for index, curve in enumerate(curves):
        color = f"C{index % 10}"
        flops = [point.flops for point in curve.points]
        axis.errorbar(
            flops,
            [point.loss for point in curve.points],
            yerr=[stats.std(point.losses) or 0.0 for point in curve.points],
            fmt="o",
            markersize=4,
            capsize=2,
            color=color,
            label=f"{curve.name} ({curve.preset})",
        )
        if fit := fit_of(curve):
            grid = [flops[0] * (flops[-1] / flops[0]) ** (i / 100) for i in range(101)]
            axis.plot(grid, [fit.loss(c) for c in grid], linewidth=1.2, color=color)
    axis.set_xscale("log")
    axis.set_xlabel("FLOPs of training")
    axis.set_ylabel("val bpb (bits per byte)")
    axis.legend(fontsize=7)
    pictures.save(plt, figure, out)
