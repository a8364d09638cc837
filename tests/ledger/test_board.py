"""`record board` rewrites both pages and the picture of the records."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ledger.show.board import BOARD, LOSS_NOTE, best_first
from tests.ledger.record_helpers import MARKERS, make, run

ROOT = Path(__file__).resolve().parents[2]


def test_the_front_page_shows_records_best_first(repo):
    make(repo, loss=2.0, meta={"name": "Best", "date": "2026-11-23"})
    make(repo, seeds=(5,), meta={"name": "Idea", "record": False})
    assert run(repo, "board") == 0

    page = (repo / "README.md").read_text()
    best = page.index("[Best](records/track_h100x1_5min/2026-11-23_Best/)")
    base = page.index("[Base](records")
    assert best < base
    assert "a first \\| one" in page
    assert "Idea" not in page  # a non-record

    assert page.startswith("# Title\n")
    assert "old" not in page  # what stood between the markers
    assert page.endswith("last line\n")


def test_both_pages_say_once_which_losses_compare(repo):
    """A larger vocabulary has more nats per token, so that a better record may have the higher loss."""
    make(repo, loss=2.0, meta={"name": "Best", "date": "2026-11-23"})
    assert run(repo, "board") == 0
    for page in (repo / "README.md", repo / "records" / "README.md"):
        text = page.read_text()
        assert text.count(LOSS_NOTE) == 1
        assert text.index("[Base]") < text.index(LOSS_NOTE) < text.index("<!-- board:end -->")


def test_a_score_in_disjoint_windows_comes_after_all_sliding_ones():
    """It is higher for the same artifact, so the two cannot be compared."""
    scores = {"b": ("int6_xz_sliding", 1.2), "a": ("int6_rans_chunked", 1.1), "c": ("int6_xz_ttt", 1.15)}
    subs = [
        {"name": name, "date": "2026-11-22", "metric": metric, "val_bpb": val_bpb}
        for name, (metric, val_bpb) in scores.items()
    ]
    assert [sub["name"] for sub in best_first(subs)] == ["c", "b", "a"]


def test_the_ledgers_page_shows_non_records_and_the_picture(repo):
    make(repo, seeds=(5,), meta={"name": "Idea", "record": False})
    assert run(repo, "board") == 0

    page = (repo / "records" / "README.md").read_text()
    assert "[Idea](track_h100x1_5min/2026-11-22_Idea/)" in page
    assert "history.png" in page
    assert (repo / "records" / "history.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_records_give_the_same_bytes(repo):
    written = [repo / "README.md", repo / "records" / "README.md", repo / "records" / "history.png"]
    assert run(repo, "board") == 0
    first = [path.read_bytes() for path in written]

    assert run(repo, "board") == 0
    assert [path.read_bytes() for path in written] == first


def test_a_page_without_markers_is_named_and_nothing_is_written(repo, capsys):
    front_page = repo / "README.md"
    front_page.write_text("no markers\n")
    assert run(repo, "board") == 2

    error = capsys.readouterr().err
    assert str(front_page) in error
    assert error.count("\n") == 1
    assert (repo / "records" / "README.md").read_text() == MARKERS
    assert not (repo / "records" / "history.png").exists()


def test_a_ledger_without_records_says_so(repo, folder):
    shutil.rmtree(folder)
    assert run(repo, "board") == 0
    assert "No records yet." in (repo / "README.md").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_the_repositorys_own_ledger():
    assert run(ROOT, "verify", "--quiet") == 0
    page = (ROOT / "records" / "README.md").read_text()
    assert page.count(BOARD.start) == 1
    assert page.count(BOARD.end) == 1
