"""The pictures have no empty panels, they have markers, and their time axes fit their dates."""

from __future__ import annotations

import re
from datetime import date, timedelta

import pytest

from ledger.make import pictures
from tests.ledger import fixtures_records as fx


@pytest.fixture
def figure(monkeypatch):
    """Return a function that calls a plot function and returns its figure instead of writing it."""
    saved = []
    monkeypatch.setattr(pictures, "save", lambda plt, figure, out: saved.append(figure))

    def draw(plot, *args):
        plot(*args, None)
        return saved.pop()

    yield draw
    pictures.pyplot().close("all")


def log_with(tmp_path, name, *kept):
    """Write a log whose only step lines are those that begin with one of `kept`."""
    lines = fx.log_text(3).splitlines()
    lines = [line for line in lines if not line.startswith("step:") or line.startswith(kept)]
    path = tmp_path / f"{name}.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


LAST = "step:1500/20000 val_loss"


def test_one_validation_is_text_and_leaves_no_panel_empty(figure, tmp_path):
    log = log_with(tmp_path, "run", "step:100/20000 train", "step:700/20000 train", LAST)
    drawn = figure(pictures.plot_runs, [log])
    assert len(drawn.axes) == 2 and all(len(axis.lines) == 1 for axis in drawn.axes)
    bpb = re.search(rf"{LAST}:\S+ val_bpb:(\S+)", log.read_text())[1]
    assert drawn.axes[1].get_legend().get_texts()[0].get_text() == f"run, val bpb {bpb} at step 1500"


def test_two_validations_are_a_curve(figure, tmp_path):
    log = log_with(tmp_path, "run", "step:100/20000 train", "step:500/20000 val", LAST)
    single = log_with(tmp_path, "single", "step:100/20000 train", LAST)
    drawn = figure(pictures.plot_runs, [log, single])
    assert len(drawn.axes) == 4
    assert [[len(line.get_xdata()) for line in axis.lines] for axis in drawn.axes[2:]] == [[2, 1], [2, 1]]
    assert drawn.axes[1].get_legend().get_texts()[0].get_text() == "run"


def test_a_single_logged_step_is_visible(figure, tmp_path):
    """A line through one point shows nothing; its marker does."""
    log = log_with(tmp_path, "run", "step:100/20000 train")
    drawn = figure(pictures.plot_runs, [log])
    for axis in drawn.axes:
        (line,) = axis.lines
        assert len(line.get_xdata()) == 1 and line.get_marker() == "."
        low, high = axis.get_xlim()
        assert low < 0 < line.get_xdata()[0] < high


def submission(day, bpb):
    return {"date": day.isoformat(), "val_bpb": bpb, "val_bpb_std": 0.01, "name": f"N{bpb}"}


@pytest.mark.parametrize("days", [0, 1, 5, 40, 900])
@pytest.mark.parametrize("first", [date(2026, 11, 22), date(2025, 12, 31)], ids=str)
def test_the_time_axis_fits_its_dates(figure, days, first):
    """All records are inside, at most a day or a sixth of the span away from an end, and ticks are days."""
    from matplotlib.dates import num2date

    last = first + timedelta(days=days)
    subs = [submission(first, 2.0), submission(last, 1.9)]
    (axis,) = figure(pictures.plot_history, {"track_cpu": subs}).axes
    low, high = (num2date(x).date() for x in axis.get_xlim())
    margin = timedelta(days=max(1, days / 6))
    assert first - margin <= low < first and last < high <= last + margin
    ticks = [num2date(x) for x in axis.get_xticks()]
    inside = [tick for tick in ticks if low <= tick.date() <= high]
    assert inside and all((tick.hour, tick.minute) == (0, 0) for tick in inside)
