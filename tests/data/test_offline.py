"""The offline corpus: deterministic, cached, cleaned, and train apart from val."""

import argparse
import io
import itertools
import os
import re
import sys
import time

import pytest
import sentencepiece

import build
import messages
import offline
import prepare
from messages import BadInput
from tests.data.data_cases import content, prose


def test_offline_is_deterministic_and_cached(tmp_path, sources, monkeypatch):
    out = tmp_path / "a"
    a, fresh = offline.build_corpus(out, 1, sources, 400)
    assert fresh
    offline.build_corpus(tmp_path / "b", 2, sources, 400)
    assert content(out) == content(tmp_path / "b")
    assert prepare.main(["verify", str(out)]) == 0

    with monkeypatch.context() as patch:
        patch.setattr(offline, "extract", None)  # cached: reads nothing
        assert offline.build_corpus(out, 1, sources, 400) == (a, False)

    versions, files = sources
    c, fresh = offline.build_corpus(out, 1, ({**versions, "toy": "2"}, files), 400)
    assert fresh and c["source"]["fingerprint"] != a["source"]["fingerprint"]
    assert c["splits"] == a["splits"]

    sp = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert not sp.is_unknown(sp.piece_to_id("\u2581"))
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)


def is_val(text):
    """Return whether the hash of a text assigns it to val."""
    return int.from_bytes(build.fingerprint(text)[:4], "little") % offline.VAL_ONE_IN == 0


def test_offline_cleans_and_separates(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(offline, "VAL_ONE_IN", 8)
    documents = offline.extract(sources[1], 1)
    kept = offline.deduplicate(documents)
    assert len(documents) == 122 and len(kept) == 120  # two copies dropped; n3 is no prose, n4 no Python
    assert not any("secret_doctest" in d or "xyzzy" in d for d in kept)

    train, val = offline.split_documents(kept)
    assert 2 <= len(val) <= 30
    assert len(train) + len(val) == 120
    assert not set(train) & set(val)

    # A train document that contains a val document is no repetition, but the val document must go.
    candidates = (val[0] + "\n" + prose(seed, 300) for seed in range(8000, 8100))
    longer = next(text for text in candidates if not is_val(text))
    assert longer in offline.deduplicate([*kept, longer])
    train, rest = offline.split_documents([*kept, longer])
    assert longer in train and rest == val[1:]


def test_offline_leaves_other_datasets_alone(tmp_path, files, sources, capsys):
    assert prepare.main(files.args) == 0
    before = content(files.out)
    with pytest.raises(BadInput, match="holds another dataset"):
        offline.build_corpus(files.out, 1, sources, 400)
    assert content(files.out) == before


def test_installed_is_sorted_and_readable():
    versions, found = offline.installed()
    assert versions["sentencepiece"]
    assert len(found) > 500
    assert len(found) == len(set(found))
    assert (versions, found) == offline.installed()
    assert offline.documents_of(argparse.__file__)


def test_clean():
    text = (
        "Summary of the :func:`~a.b` call::\n\n    code()\n\nAfter it.\n\n>>> x\n1\n\n"
        ".. note::\n    Kept.\n\n"
        ".. math::\n    dropped words\n======\n``end`` of *it*."
    )
    assert offline.clean(text) == "Summary of the a.b call:\n\nAfter it.\n\n    Kept.\n\nend of *it*."


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Make stderr a terminal on which every update is shown, and return it."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    seconds = itertools.count()
    monkeypatch.setattr(messages.time, "perf_counter", lambda: float(next(seconds)))
    return screen


def test_long_verbs_say_how_far_they_are(files, monkeypatch):
    """verify counts the tokens of every shard, and takes its live line away."""
    assert prepare.main(files.args) == 0
    screen = terminal(monkeypatch)
    assert prepare.main(["verify", str(files.out)]) == 0
    told = screen.getvalue()
    assert re.search(r"\x1b\[Kverify: [\d.]+k? tokens [\d.]+k? tokens/s \d+ % ETA \d+:\d\d", told)
    assert "100 % ETA 0:00" in told and told.endswith("\r\x1b[K")


def test_dropping_duplicates_says_how_far_it_is(monkeypatch):
    screen = terminal(monkeypatch)
    assert offline.deduplicate(["One sentence is here.", "Another one is there."])
    assert "drop duplicates: 1 documents 1 documents/s 50 % ETA 0:01" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")  # what follows may be an error


def test_a_live_line_fits_its_terminal(monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr(screen, "fileno", lambda: 2)
    monkeypatch.setattr(messages.os, "get_terminal_size", lambda number: os.terminal_size((number * 5, 24)))
    progress = messages.Progress("verify", 10)
    progress.advance(5)
    progress.close("all is well")
    assert screen.getvalue() == "\r\x1b[Kverify: 5\r\x1b[Kverify: all is well, 2.0 s\n"


def test_a_dumb_terminal_has_whole_lines(monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(messages, "LINE_SECONDS", 0.5)
    messages.Progress("verify", 10).advance(5)
    assert screen.getvalue() == "verify: 5B 5B/s 50 % ETA 0:01\n"


def test_a_terminal_that_is_gone_ends_no_work(monkeypatch):
    def fail(text):
        raise OSError

    screen = terminal(monkeypatch)
    monkeypatch.setattr(screen, "write", fail)
    messages.Progress("verify", 10).advance(5)


def test_a_library_that_tells_nothing_is_waited_for(monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr(messages, "TICK_SECONDS", 0.001)
    with messages.Progress("train tokenizer", 0).waiting():
        time.sleep(0.05)
    assert re.search(r"train tokenizer: \d+ s", screen.getvalue())
