"""`record board` rewrites both pages and the picture of the records."""

from __future__ import annotations

import shutil
from pathlib import Path

from ledger.board import BOARD
from record_helpers import MARKERS, make, run

ROOT = Path(__file__).resolve().parents[2]


def test_board(repo, capsys):
    make(repo, loss=2.0, meta={"name": "Best", "date": "2026-11-23"})
    make(repo, seeds=(5,), meta={"name": "Idea", "record": False})
    assert run(repo, "board") == 0
    top = (repo / "README.md").read_text()
    all_of_it = (repo / "records" / "README.md").read_text()
    assert top.startswith("# Title\n")
    assert top.endswith("last line\n")
    assert "old" not in top
    assert top.index("[Best](records/track_h100x1_5min/2026-11-23_Best/)") < top.index("[Base](records")
    assert "Idea" not in top and "[Idea](track_h100x1_5min/2026-11-22_Idea/)" in all_of_it
    assert "a first \\| one" in top and "history.png" in all_of_it
    assert (repo / "records" / "history.png").read_bytes()[:4] == b"\x89PNG"
    before = (repo / "records" / "history.png").read_bytes()
    assert run(repo, "board") == 0
    assert (repo / "README.md").read_text() == top
    assert (repo / "records" / "history.png").read_bytes() == before


def test_board_without_markers_or_records(repo, folder, capsys):
    (repo / "README.md").write_text("no markers\n")
    assert run(repo, "board") == 2
    error = capsys.readouterr().err
    assert str(repo / "README.md") in error and error.count("\n") == 1
    assert (repo / "records" / "README.md").read_text() == MARKERS
    assert not (repo / "records" / "history.png").exists()
    shutil.rmtree(folder)
    (repo / "README.md").write_text(MARKERS)
    assert run(repo, "board") == 0 and "No records yet." in (repo / "README.md").read_text()


def test_the_repositorys_own_ledger():
    assert run(ROOT, "verify", "--quiet") == 0
    page = (ROOT / "records" / "README.md").read_text()
    assert page.count(BOARD.start) == 1 and page.count(BOARD.end) == 1
