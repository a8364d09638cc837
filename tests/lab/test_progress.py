"""Long commands say how far they are and when they end: live on a terminal, in a pipe a line now and then."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import progress
import train_gpt as t
from lab import bench, codecs, directions, encodings, sweep, wire
from lab.update import cases, times
from ledger import record
from ledger.make import sweep_table
from ledger.show.web import facts
from progress import ERASE, Progress
from script import BadInput
from tests.helpers import machine, tiny
from tests.lab.sweep_cases import raw_plan
from use import export

PIECE = 0.05  # seconds that a piece of work takes here


class Screen(io.StringIO):
    """What is written on stderr, a terminal or a pipe."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


@pytest.fixture
def screen(monkeypatch):
    """Return a function that makes stderr a terminal or a pipe, and lets time fly."""

    def show(live: bool = True) -> Screen:
        shown = Screen(live)
        monkeypatch.setattr(sys, "stderr", shown)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(progress, "TICK_SECONDS", PIECE / 10)
        monkeypatch.setattr(progress, "LINE_SECONDS", PIECE / 10)
        return shown

    return show


def tells(screen, line: str) -> bool:
    """Whether a line was shown, in which # stands for any number of seconds."""
    return re.search(re.escape(line).replace(r"\#", r"\d+"), screen.getvalue()) is not None


def work_on(items):
    """Take PIECE for each of the items."""
    for _ in items:
        time.sleep(PIECE)


# ---- the helper ----------------------------------------------------------------------------------


def test_a_terminal_has_one_live_line(screen, capsys):
    """Results are printed where it stood, and in the end it is gone."""
    shown = screen()
    with Progress("counting") as telling:
        for number in telling.each(range(3), "numbers"):
            time.sleep(PIECE)
            telling.print(f"number {number}")
    told = shown.getvalue()
    assert told.startswith(f"{ERASE}counting: ")
    assert tells(shown, f"{ERASE}counting: # s, 2/3 numbers, ETA # s")
    assert told.endswith(ERASE) and "\n" not in told
    assert capsys.readouterr().out == "number 0\nnumber 1\nnumber 2\n"


def test_a_pipe_has_whole_lines(screen):
    shown = screen(live=False)
    with Progress("counting") as telling:
        work_on(telling.each("ab", "letters"))
    lines = shown.getvalue().splitlines()
    assert tells(shown, "counting: # s, 1/2 letters, ETA # s\n")
    assert all(re.fullmatch(r"counting: \d+ s(, \d/2 letters(, ETA \d+ s)?)?", line) for line in lines)


def test_quick_work_says_nothing(monkeypatch):
    shown = Screen(live=True)
    monkeypatch.setattr(sys, "stderr", shown)
    with Progress("counting") as telling:
        telling.print("done")
    assert shown.getvalue() == ""


def test_a_dumb_terminal_has_whole_lines(screen, monkeypatch):
    """It would show the codes that rewrite a line."""
    shown = screen()
    monkeypatch.setenv("TERM", "dumb")
    with Progress("counting") as telling:
        work_on(telling.each("ab", "letters"))
    assert ERASE not in shown.getvalue() and shown.getvalue().endswith("\n")


def test_a_live_line_fits_the_terminal_of_stderr(screen, monkeypatch):
    """Stdout may be a file, which has no width, and COLUMNS may be that of another window."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = screen()
    monkeypatch.setattr(shown, "fileno", lambda: 2)
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda number: os.terminal_size((number * 5, 24)))
    progress.show_live("counting: 12 s")
    assert shown.getvalue() == f"{ERASE}counting:"


def test_a_file_with_a_line_break_in_its_name_is_told_on_one_line():
    assert Progress("reading a\nb\x1b[31m").text() == "reading a\\nb\\x1b[31m: 0 s"


def test_a_stage_may_begin_while_the_line_about_the_last_is_made():
    class Moving(Progress):
        values = [1]  # then 0, as expect() leaves it

        @property
        def done(self):
            return self.values.pop() if self.values else 0

        @done.setter
        def done(self, value):
            pass

    telling = Moving("counting")
    telling.total = 4
    assert telling.text() == "counting: 0 s, 1/4 , ETA 0 s"


def test_one_rank_of_several_speaks(screen):
    shown = screen()
    with Progress("counting", speaks=False) as telling:
        work_on(telling.each("ab", "letters"))
    assert shown.getvalue() == ""


def test_the_eta_follows_what_is_done(monkeypatch):
    """Before a unit is done it is the guess, and the number of units may change."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    telling = Progress("training")
    telling.expect(4, "runs", guess=80.0)
    now[0] += 30
    assert telling.text() == "training: 30 s, 0/4 runs, ETA 50 s"
    now[0] += 60
    assert telling.text() == "training: 90 s, 0/4 runs, ETA 0 s"
    telling.advance(left=5)
    assert telling.text() == "training: 90 s, 1/6 runs, ETA 450 s"
    now[0] += 20
    assert telling.text() == "training: 110 s, 1/6 runs, ETA 430 s"  # and not more than before
    telling.begin("writing")
    assert telling.text() == "writing: 0 s"


# ---- the commands --------------------------------------------------------------------------------


def test_record_verify(screen, monkeypatch, tmp_path, capsys):
    shown = screen()
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(record, "record_folders", lambda records: [records / "a", records / "b"])
    monkeypatch.setattr(record, "examine", lambda folder, records: work_on("a") or [])
    assert record.main(["--root", str(tmp_path), "verify"]) == 0
    assert tells(shown, "verifying: # s, 1/2 folders, ETA # s")
    assert capsys.readouterr().out == "2 folders: 0 ok, 0 fail, 0 not checkable\n"


def test_record_site(screen, monkeypatch, tmp_path):
    shown = screen()
    records = tmp_path / "records"
    records.mkdir()
    monkeypatch.setattr(facts, "record_folders", lambda records: [records / "a", records / "b"])
    monkeypatch.setattr(facts, "read_entry", lambda folder, findings: folder.name)
    monkeypatch.setattr(facts, "find_ideas", lambda records: [])
    with Progress("site") as telling:
        ledger = facts.read_ledger(tmp_path, lambda folder: work_on("a"), telling)
    assert ledger.entries == ["a", "b"]
    assert tells(shown, "site: proving: # s, 1/2 records, ETA # s")


def test_record_codecs(screen, monkeypatch, tmp_path):
    shown = screen()
    monkeypatch.setattr(codecs, "codec_line", lambda *_: work_on("a") or "line")
    path = tmp_path / "x.int6.xz"
    h = tiny()
    tensors = {name: p.detach() for name, p in t.GPT(h).named_parameters()}
    raw = t.raw_artifact(tensors, h, t.rounding_guide(tensors, h, t.Calibration()))
    path.write_bytes(t.CODECS["xz"].pack(raw))
    assert codecs.main([str(path)]) == 0
    total = 1 + len(t.CODECS)
    assert tells(shown, f"codecs: packing: # s, 1/{total} codecs, ETA # s")


def test_record_wire(screen, monkeypatch):
    """The step without data tells how long the other may take; then its ranks are counted."""
    shown = screen()

    def slow(fn, tasks, telling=None):
        for _ in tasks:
            time.sleep(PIECE)
            if telling:
                telling.advance()
        if telling:
            raise BadInput("enough")
        return [None]

    monkeypatch.setattr(wire, "in_processes", slow)
    assert wire.main(["--ranks", "2"]) == 2
    for line in ("a step without data: # s", "a step with data: # s, 0/2 ranks, ETA # s", "1/2 ranks, ETA #"):
        assert tells(shown, line)


def test_record_encodings(screen, monkeypatch):
    """Each row has PARTS parts."""
    shown = screen()

    def slow_row(t, run, weights, row, h, code_bytes, progress):
        for _ in range(encodings.PARTS):
            time.sleep(PIECE)
            progress.advance()
        return encodings.Line(row, 1.0, 0.5, 1000, 1.1, 0.1)

    monkeypatch.setattr(encodings, "measure_row", slow_row)
    monkeypatch.setattr(encodings, "read_weights", lambda *_: None)
    fake = SimpleNamespace(
        init_machine=lambda h, env: None,
        for_device=lambda h, m: h,
        load_dataset=lambda h, trains: None,
        start_run=lambda *_: None,
        Log=lambda *_: None,
        packed_code=lambda text: b"",
        __file__=__file__,
    )
    configs = dict.fromkeys(["as trained", "codec=rans"], SimpleNamespace(gptq_batches=0))
    with Progress("encodings") as telling:
        encodings.measure(fake, Path("x"), configs, telling)
    assert tells(shown, f"encodings: # s, 3/{2 * encodings.PARTS} parts, ETA # s")


def test_record_sweep(screen, monkeypatch, tmp_path):
    """Configurations are counted as they end; rows that cannot win are left out."""
    shown = screen()

    def train(self):
        self.queue.finish(self.queue.take(), 1.0)
        self.progress.advance(left=self.queue.left)
        time.sleep(PIECE)

    monkeypatch.setattr(sweep.Sweep, "train", train)
    monkeypatch.setattr(sweep_table, "rewrite", lambda folder: None)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(raw_plan()))
    assert sweep.main([str(plan), "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"sweep \w+: \d+ s, 1/\d+ configurations, ETA \d+ s", shown.getvalue())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_bench(screen, monkeypatch, rank):
    """Only rank 0 tells. Whether each part counts what it does is seen in lab_helpers.run_bench."""
    shown = screen()
    monkeypatch.setattr(bench, "run_bench", lambda args, env, telling: work_on(telling.each("ab", "x")) or 0)
    assert bench.main(["preset=cpu"], {"RANK": rank}) == 0
    assert tells(shown, "bench: opening the script: # s, 1/2 x, ETA # s") == (rank == "0")


def test_export(screen, monkeypatch, tmp_path):
    """The artifact, its tokenizer and the files are its parts."""
    shown = screen()
    stored = SimpleNamespace(h=SimpleNamespace(ttt_lr=0))
    monkeypatch.setattr(export, "read_artifact", lambda *_: work_on("a") or stored)
    monkeypatch.setattr(export, "find_tokenizer", lambda *_: work_on("a"))
    monkeypatch.setattr(export, "write_folder", lambda *_: work_on("a"))
    argv = ["x.int6.xz", "--out", str(tmp_path / "out"), "data_path=d"]
    assert export.export(t, argv) == 0
    for line in ("export: # s, 0/3 parts", "export: # s, 1/3 parts, ETA # s", "2/3 parts, ETA # s"):
        assert tells(shown, line)


def test_record_directions(screen, monkeypatch):
    shown = screen()
    monkeypatch.setattr(times, "modes_of", lambda s, case, sets: work_on("a") or ())
    monkeypatch.setattr(times, "input_sets", lambda s, share: [])
    with Progress("directions") as telling:
        setup = cases.Setup(t, tiny(), machine(), print, True, telling)
        times.time_cases(setup, cases.all_cases(setup)[:2], deadline=float("inf"))
    assert tells(shown, "directions: times: # s, 1/2 cases, ETA # s")


def test_the_lines_of_directions_stand_where_the_live_line_stood(screen, tmp_path, capsys):
    shown = screen()
    with Progress("directions") as telling:
        log = directions.GrowingLog(tmp_path / "log.txt", telling)
        time.sleep(PIECE)
        log("a line")
    assert shown.getvalue().endswith(ERASE) and capsys.readouterr().out == "a line\n"
