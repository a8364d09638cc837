"""`record plot`, `diff`, `compare` and `reproduce`."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys

import pytest

from ledger import stats
from ledger.read import runlog
from ledger.show import diff, reproduce, standing
from script import ROOT, BadInput
from tests.ledger import fixtures_records as fx
from tests.ledger.record_helpers import NAME, TRACK, edit, edit_json, log42, make, run


def test_plot(repo, folder, tmp_path, capsys):
    log = tmp_path / "run.txt"
    text = fx.log_text(3)
    log.write_text(text[: text.index("step:700/20000 train_loss") + 20])  # cut in the middle of a line
    assert run(repo, "plot", log) == 0 and log.with_suffix(".png").stat().st_size > 5000
    assert run(repo, "plot", log, NAME) == 2
    assert run(repo, "plot", log, NAME, "--out", tmp_path / "both.png") == 0
    log.write_text(text[: text.index("step:0/20000")])
    assert run(repo, "plot", log) == 2
    assert "nothing to plot" in capsys.readouterr().err
    assert run(repo, "plot", tmp_path / "absent.txt") == 2


def test_diff(repo, folder, tmp_path, capsys):
    source = fx.SCRIPT.replace("return lzma.compress", "return b'' + lzma.compress")
    source = source.replace("# 2. Artifact: what the code weighs.", "# 2. Artifact: its weight.")
    source = source.replace('"""A stand-in trainer.', '"""Another stand-in.')
    other = make(repo, meta={"name": "Other"}, source=source, config={"matrix_lr": 0.01, "eval_stride": 32})
    assert run(repo, "diff", NAME, other) == 0
    out = capsys.readouterr().out
    assert "matrix_lr: 0.03 -> 0.01" in out
    assert "eval_stride: 64 -> 32" in out
    assert "2 of 5 values differ" in out
    assert "== Artifact: +1 -1, 1 comment-only lines not shown" in out
    assert "+    return b'' + lzma" in out
    assert "its weight" not in out
    assert "Another" not in out
    assert "\x1b" not in out
    assert "source: +1 -1 lines, 2 more differ in comments only" in out
    page = tmp_path / "diff.html"
    assert run(repo, "diff", folder / "train_gpt.py", other, "--html", page) == 0
    assert "<table" in page.read_text() and "not compared" in page.read_text()
    assert run(repo, "diff", NAME, NAME) == 0 and "source: +0 -0" in capsys.readouterr().out


def on_terminal(command, cwd, **env):
    """Run a command in a terminal of its own and return its status and what it showed."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    done = subprocess.Popen(command, cwd=cwd, env=os.environ | env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends on Linux
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    return done.wait(timeout=60), shown.decode().replace("\r\n", "\n")


def test_diff_opens_with_the_stat_on_a_terminal(repo, folder, tmp_path):
    """A pager has the stat first and all changes below it; a pipe has the full diff, as scripts expect."""
    source = fx.SCRIPT.replace("return lzma.compress", "return b'' + lzma.compress")
    other = make(repo, meta={"name": "Other"}, source=source)
    command = [sys.executable, "-m", "ledger.record", "--root", str(repo), "diff", NAME, str(other)]
    path = dict(PYTHONPATH=str(ROOT / "tools"))
    stat = "source: +1 -1 lines, 0 more differ in comments only\n  Artifact     +1     -1      0 in comments"
    change = "+    return b'' + lzma.compress"

    pager = tmp_path / "pager"
    pager.write_text('#!/bin/sh\necho "the pager shows"\ncat\n')
    pager.chmod(0o755)
    status, shown = on_terminal(command, repo, PAGER=str(pager), NO_COLOR="1", **path)
    assert status == 0 and shown.startswith("the pager shows\n"), shown
    assert 0 < shown.index(stat) < shown.index("== Artifact: +1 -1\n") < shown.index(change)

    status, shown = on_terminal(command, repo, PAGER="/nowhere/at/all", **path)
    assert status == 0 and stat in shown and change not in shown and "| cat" in shown
    status, shown = on_terminal([*command, "--stat"], repo, PAGER=str(pager), **path)
    assert status == 0 and stat in shown and change not in shown and "pager" not in shown

    piped = subprocess.run(command, cwd=repo, env=os.environ | path, capture_output=True, text=True).stdout
    assert change in piped and stat not in piped and "\x1b" not in piped
    piped = subprocess.run(
        [*command, "--stat"], cwd=repo, env=os.environ | path, capture_output=True, text=True
    )
    assert stat in piped.stdout and change not in piped.stdout


def test_diff_of_sections_that_come_and_go():
    a = "x = 1\n# " + "-" * 77 + "\n# 1. Old: gone.\ny = 1\n"
    b = "x = 1\n# " + "-" * 77 + "\n# 1. New: here.\nz = 1\n"
    diffs = diff.section_diffs(a, b)
    assert diff.source_stat(diffs) == [
        "source: +1 -1 lines, 4 more differ in comments only",
        "  New (new section)     +1     -0      2 in comments",
        "  Old (removed)         +0     -1      2 in comments",
    ]
    out = diff.source_diff(diffs)
    assert "== New (new section): +1 -0, 2 comment-only lines not shown" in out
    assert any(line.startswith("== Old (removed)") for line in out)


def test_compare(repo, capsys):
    make(repo, meta={"name": "Better"}, loss=2.1)
    make(repo, meta={"name": "One"}, seeds=(42,))
    assert run(repo, "compare", NAME, "2026-11-22_Better") == 0
    out = capsys.readouterr().out
    assert "3 shared" in out
    assert "one-sided Welch): yes" in out
    assert out.count("paired") == 3
    assert run(repo, "compare", NAME, NAME) == 0
    assert "one-sided Welch): no" in capsys.readouterr().out
    assert run(repo, "compare", NAME, "2026-11-22_One") == 0
    assert "not checkable" in capsys.readouterr().out


def test_compare_puts_two_vocabularies_of_one_text_into_the_same_unit(repo, capsys):
    half = make(repo, meta={"name": "Half"})
    for log in (half / "logs").glob("*.txt"):
        log.write_text(
            log.read_text().replace(f"val_tokens:{fx.VAL_TOKENS}", f"val_tokens:{fx.VAL_TOKENS * 2}")
        )
    assert run(repo, "compare", NAME, half) == 0
    out = capsys.readouterr().out
    assert out.startswith("A and B have other vocabularies: the nats of B are per token of A\n")
    loss_a, loss_b = re.search(r"^val_loss +([\d.]+) +\S+ +([\d.]+)", out, re.M).groups()
    assert float(loss_b) == pytest.approx(2 * float(loss_a), rel=1e-4)  # measured: 0


def test_compare_says_that_texts_differ(repo, capsys):
    other = make(repo, meta={"name": "Other"})
    for log in (other / "logs").glob("*.txt"):
        log.write_text(log.read_text().replace(f"val_bytes:{fx.VAL_BYTES}", "val_bytes:1000"))
    assert run(repo, "compare", NAME, other) == 0
    assert "A was scored on 151,080,891 bytes of text, B on 1,000: texts differ" in capsys.readouterr().out


def test_statistics():
    assert math.isclose(stats.t_quantile(0.975, 2), 4.302652729749456, rel_tol=1e-9)  # measured: 0
    assert math.isclose(stats.t_cdf(-2.0, 5), 0.05096973941492917, rel_tol=1e-9)  # measured: 0
    assert math.isclose(stats.t_cdf(3.0, 1), 0.5 + math.atan(3.0) / math.pi, rel_tol=1e-12)  # measured: 0
    # Welch's own kind of example, checked by hand: means 3 and 4, variances 2.5 and 10
    test = stats.welch([1, 2, 3, 4, 5], [0, 2, 4, 6, 8])
    assert test.diff == 1.0
    assert math.isclose(test.error, math.sqrt(2.5))
    assert math.isclose(test.df, 100 / 17)
    assert stats.welch([1.0], [2.0, 3.0]) is None and stats.std([1.0]) is None
    same = stats.paired([1.0, 2.0], [1.5, 2.5])
    assert same.error == 0.0
    assert same.p_two_sided() == 0.0
    assert same.interval() == (0.5, 0.5)
    assert stats.paired([1.0, 2.0], [1.0, 2.0]).p_two_sided() == 1.0


def test_reproduce(repo, folder, tmp_path, capfd):
    assert run(repo, "reproduce", NAME, "--dry-run", "--data", tmp_path) == 0
    out = capfd.readouterr().out
    assert f"train preset=h100x1 matrix_lr=0.03 data_path={tmp_path} seed=42" in out
    assert "differs  data" in out
    assert run(repo, "reproduce", NAME, "--data", tmp_path) == 2
    assert "is not the data of the record" in capfd.readouterr().err
    for log in (folder / "logs").iterdir():
        edit(log, "manifest_sha256:a+", "manifest_sha256:none")
    edit_json(folder / "submission.json", lambda sub: sub.update(data_manifest_sha256="none", val_bpb=1.26))
    assert run(repo, "reproduce", NAME, "--seed", "7") == 0
    assert "\nreproduced: val_bpb 1.26007" in capfd.readouterr().out
    edit_json(folder / "submission.json", lambda sub: sub.update(val_bpb=1.2))
    assert run(repo, "reproduce", NAME) == 1
    assert "\nnot reproduced: val_bpb 1.26002, recorded 1.20000" in capfd.readouterr().out


FINISHED = """
from pathlib import Path

Path("out").mkdir()
Path("out/r.txt").write_text("{log}")
print("score: val_bpb 1.2345")
print("log: out/r.txt\\nartifact: out/r.int6.xz")
"""


def test_a_score_that_only_the_log_has_is_found_there(tmp_path):
    script = tmp_path / "quiet.py"
    script.write_text(FINISHED.format(log="step:1/2\\nfinal_score metric:x val_bpb:1.23450000\\n"))
    found = reproduce.run_command(["python", str(script)], tmp_path)
    assert found == "final_score metric:x val_bpb:1.23450000"

    shutil.rmtree(tmp_path / "out")
    script.write_text(FINISHED.format(log="final_score metric:x val_bpb:1.23450000\\nstep:1/2\\n"))
    with pytest.raises(BadInput, match="no final_score line"):
        reproduce.run_command(["python", str(script)], tmp_path)


# ---------------------------------------------------------------- a run beside the board


def test_a_run_is_compared_with_the_best_record_on_its_text(repo, folder):
    """Only scores of the same text compare: the same manifest, and as many of its tokens."""
    make(repo, meta={"name": "Other"}, loss=2.3)
    (repo / "new.txt").write_text(fx.log_text(7, loss=2.2))
    new = runlog.parse_log(repo / "new.txt")
    best = fx.bpb(2.12)
    text = standing.compare_with_board(new, repo / "records")
    gap, words = text.split(" ", 1)
    # Measured: 1.2e-4.
    assert float(gap) == pytest.approx(new.number("final_score", "val_bpb") - best, abs=2e-3)
    assert words.startswith(f"above the best of {TRACK} on this text, 1.2") and "(Base)" in words
    better = runlog.parse_log(log42(folder))
    better.facts["final_score"]["val_bpb"] = "1.00000000"
    assert " below the best of " in standing.compare_with_board(better, repo / "records")

    new.facts["data"]["val_tokens"] = "8192"
    assert "scored on other text: the two do not compare" in standing.compare_with_board(
        new, repo / "records"
    )
    new.preset = "cpu"  # of a track without a record
    assert standing.compare_with_board(new, repo / "records") == ""
    new.preset = "h100x1"
    edit(folder / "submission.json", '"schema": 1', '"schema": 2')
    assert standing.compare_with_board(new, repo / "records") == ""


def one_line_of(repo, capsys, *argv):
    """Return the one line with which a verb refuses its arguments."""
    capsys.readouterr()
    assert run(repo, *argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_a_picture_that_cannot_be_written_is_one_line(repo, folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file/x.png: cannot write" in one_line_of(
        repo, capsys, "plot", NAME, "--out", tmp_path / "file/x.png"
    )
    assert "gone/x.png: cannot write" in one_line_of(
        repo, capsys, "plot", NAME, "--out", tmp_path / "gone/x.png"
    )
    assert "pictures are PNG" in one_line_of(repo, capsys, "plot", NAME, "--out", tmp_path / "x.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "repo"]


def test_a_repository_that_is_not_there_is_one_line(tmp_path, capsys):
    for verb in (["verify"], ["board"], ["compare", "a", "b"]):
        assert "gone: no such folder; give the folder of a repository" in one_line_of(
            tmp_path / "gone", capsys, *verb
        )


@pytest.mark.parametrize("verb", ["verify", "plot", "reproduce"])
def test_an_empty_name_is_no_folder(repo, folder, capsys, monkeypatch, verb):
    """Not the working folder, either."""
    monkeypatch.chdir(folder)
    assert "'': no such folder" in one_line_of(repo, capsys, verb, "")


def test_a_name_with_a_line_break_is_one_line(repo, capsys):
    assert "a\\nb: no such folder" in one_line_of(repo, capsys, "verify", "a\nb")


def test_an_error_of_the_disk_is_one_line(repo, monkeypatch, capsys):
    def fails(root):
        raise PermissionError(13, "Permission denied", f"{root}/README.md")

    monkeypatch.setattr("ledger.record.rewrite_board", fails)
    assert f"record: {repo}/README.md: Permission denied; check the path" in one_line_of(
        repo, capsys, "board"
    )


def test_ctrl_c_is_one_line(repo, monkeypatch, capsys):
    def interrupted(root):
        raise KeyboardInterrupt

    monkeypatch.setattr("ledger.record.rewrite_board", interrupted)
    assert run(repo, "board") == 130
    assert capsys.readouterr().err == "\nrecord: interrupted\n"


def test_a_figure_of_5000_digits_is_shown_by_its_beginning(repo, capsys):
    log = repo / "logs_Base" / "run42.txt"
    edit(log, r" train_time:\d+ms eval", f" train_time:{'9' * 5000}ms eval")
    err = one_line_of(repo, capsys, "compare", log, NAME)
    assert len(err) < 400
    assert "is not finite" in err
