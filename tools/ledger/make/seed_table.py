"""The table of seeds on the page of a record, whatever its columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ledger import stats
from ledger.make import markdown
from ledger.read.runlog import RunLog


class Column(NamedTuple):
    """A column of the table of seeds: its name, its digits, and its value for a run and its result."""

    name: str
    digits: int
    value: Callable[[RunLog, dict], float | None]


def figure_text(value: float | None, digits: int) -> str:
    """Return a figure with its digits, or `-` for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def seed_table(columns: list[Column], runs: list[RunLog], sub: dict) -> list[str]:
    """Return Markdown lines: a row per seed, then mean and sample std of each column."""
    rows: list[list[str]] = [[str(run.seed)] for run in runs]
    mean_row = ["**mean**"]
    std_row = ["**std**"]
    for column in columns:
        values = [column.value(run, sub["seed_results"][str(run.seed)]) for run in runs]
        for row, value in zip(rows, values):
            row.append(figure_text(value, column.digits))

        complete = None not in values
        mean_row.append(figure_text(stats.mean(values) if complete else None, column.digits))
        std_row.append(figure_text(stats.std(values) if complete else None, column.digits + 1))
    return markdown.table(["seed", *(column.name for column in columns)], [*rows, mean_row, std_row])
