"""Where results go: an empty name is no folder, and a place that cannot be written is named in advance."""

from pathlib import Path

import pytest

from lab import directions, encodings, layouts, sweep, wire
from ledger import record
from ledger.files import check_output
from script import BadInput


@pytest.mark.parametrize(
    "tool, words",
    [
        (record, ["site", "--out"]),
        (record, ["plot", "a", "--out"]),
        (record, ["diff", "a", "b", "--html"]),
        (record, ["track", "a", "--to", "tensorboard", "--dir"]),
        (layouts, ["--out"]),
        (wire, ["--out"]),
        (encodings, ["a", "--json"]),
        (directions, ["--out"]),
        (sweep, ["--out"]),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else given.__name__,
)
def test_an_empty_name_is_refused(tool, words, capsys):
    """As an unset variable of a shell gives it: it would be the working folder."""
    with pytest.raises(SystemExit) as end:
        tool.main([*words, ""])
    assert end.value.code == 2
    assert f"argument {words[-1]}: the name is empty" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    check_output("--out", tmp_path / "new.md")
    check_output("--out", Path("/dev/stdout"))
    for place, reason in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.md", "no such folder")):
        with pytest.raises(BadInput, match=f"^--out {place}: {reason}"):
            check_output("--out", place)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(BadInput, match="no permission to write there; name another file"):
        check_output("--out", tmp_path / "new.md")


def test_a_log_that_is_none_is_named(tmp_path, capsys):
    log = tmp_path / "other.txt"
    log.write_text("nothing\n")
    assert directions.main(["--log", str(log), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"record: {log}: not the log of a finished measurement")
    assert not (tmp_path / "out").exists()
