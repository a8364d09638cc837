"""The ledger reads whole texts: files, and pipes that another program writes to; nothing endless or huge."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from ledger import files
from ledger.folders import is_date
from ledger.make.markdown import one_line
from script import BadInput
from tests.ledger.record_helpers import make, run


def test_a_pipe_is_read_to_the_end_of_its_writer(tmp_path):
    read_end, write_end = os.pipe()  # as bash's <(...) makes one
    os.write(write_end, b"a\n")
    os.close(write_end)
    assert files.read_text(Path(f"/dev/fd/{read_end}")) == "a\n"
    os.close(read_end)


def test_a_pipe_without_a_writer_is_empty(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert files.read_text(tmp_path / "pipe") == ""


@pytest.mark.parametrize(
    "name, reason", [("/dev/zero", "not a file"), (".", "Is a directory"), ("gone", "No such")]
)
def test_what_is_no_file_is_refused(name, reason):
    with pytest.raises(BadInput, match=f"{name}: cannot read: .*{reason}"):
        files.read_text(Path(name))


@pytest.mark.parametrize("name", ["log.txt", "log.txt.gz"])
def test_a_text_may_not_be_huge(name, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 100)
    for size in (100, 101):
        blob = b"a" * size
        (tmp_path / name).write_bytes(gzip.compress(blob) if name.endswith("gz") else blob)
        if size == 100:
            assert files.read_text(tmp_path / name) == "a" * 100
    with pytest.raises(BadInput, match="more than 100 bytes"):
        files.read_text(tmp_path / name)


def test_a_pipe_or_device_is_written_to_in_its_place(tmp_path):
    """A renamed file would take the place of /dev/stdout."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read_end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    files.write_atomic(pipe, "a\n")
    assert pipe.is_fifo() and os.read(read_end, 9) == b"a\n"
    os.close(read_end)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_date_is_a_day_of_this_century():
    assert is_date("2026-11-28") and is_date("2000-02-29")
    for text in ("9999-12-31", "0001-01-01", "20261128", "2026-W48-1", "2026-02-30", "yesterday", ""):
        assert not is_date(text), text


def test_a_day_without_room_in_the_picture_is_refused_by_all(repo, capsys):
    folder = make(repo, meta={"name": "Late", "date": "9999-12-31"})
    assert run(repo, "verify", str(folder)) == 1
    assert "9999-12-31 is not a day of this century" in capsys.readouterr().out
    before = (repo / "README.md").read_bytes()
    assert run(repo, "board") == 2
    assert "9999-12-31 is not a day of this century" in capsys.readouterr().err
    assert (repo / "README.md").read_bytes() == before


def test_what_a_terminal_would_obey_is_not_printed():
    assert (
        str(BadInput("a\x1b]0;b\x07\nc \u202ed: \u65e5 \udce9")) == r"a\x1b]0;b\x07\nc \u202ed: "
        "\u65e5 "
        r"\udce9"
    )
    assert one_line("a\x1b[31m\u202e\n b") == "a [31m b"


def test_named_tuples_are_objects_in_json_at_every_depth():
    class Inner(NamedTuple):
        error: float

    class Row(NamedTuple):
        name: str
        errors: list[Inner]
        shape: tuple[int, int]
        worst: Inner | None

    row = Row("qk", [Inner(0.5), Inner(0.25)], (2, 3), None)
    expected = {"name": "qk", "errors": [{"error": 0.5}, {"error": 0.25}], "shape": [2, 3], "worst": None}
    assert files.as_json(row) == expected
    assert files.as_json({"rows": (row,)}) == {"rows": [expected]}
