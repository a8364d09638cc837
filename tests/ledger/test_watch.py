"""watch: a page of runs in progress, from their logs alone, that ends when they do."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ledger.read import progress
from ledger.read.progress import Followed, failure_of, fraction_done
from ledger.read.runlog import parse_log
from ledger.show import watch
from tests.ledger import fixtures_records as fx
from tests.ledger.page_cases import browser, with_packages  # noqa: F401 - browser is a fixture

ROOT = Path(__file__).resolve().parents[2]
WHOLE = fx.log_text(42, config={"max_wallclock_seconds": "300.0"})
LINES = WHOLE.splitlines(keepends=True)
FIRST_STEP = next(i for i, line in enumerate(LINES) if line.startswith("step:50/"))
LAST_STEP = max(i for i, line in enumerate(LINES) if line.startswith("step:"))
patient = pytest.mark.skipif(not progress.LOCKS.exists(), reason="this system does not tell its locks")


@pytest.fixture
def log(tmp_path) -> Path:
    """A log that ends within training, a moment ago."""
    path = tmp_path / "run.txt"
    path.write_text("".join(LINES[: FIRST_STEP + 4]), encoding="utf-8")
    return path


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


# ---- how far a run has come ----------------------------------------------------------------------


def test_a_log_is_followed_to_its_score(log):
    followed = Followed(log)
    assert followed.refresh() and followed.end is None
    assert watch.phase_of(followed) == "training"
    assert fraction_done(followed.run) == pytest.approx(followed.run.steps[-1].time_ms / 300_000)
    assert not followed.refresh()
    append(log, "".join(LINES[FIRST_STEP + 4 : LAST_STEP + 2]))
    assert followed.refresh() and watch.phase_of(followed) == "making the artifact"
    append(log, "".join(LINES[LAST_STEP + 2 :]))
    assert followed.refresh() and followed.end == "scored" and followed.is_scored
    assert watch.last_words(followed).startswith("scored 1.25") and "after 1,500 steps" in watch.last_words(
        followed
    )


@patient
def test_a_lock_that_is_let_go_without_a_score_ends_a_run(log):
    before = log.read_bytes(), log.stat().st_mtime_ns
    followed = Followed(log)
    with log.open("a") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        os.utime(log, (time.time() - 9999, time.time() - 9999))  # a long phase without a line
        assert followed.refresh() and followed.end is None
        with log.open() as reader, pytest.raises(BlockingIOError):  # the watcher has not taken the lock away
            fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert followed.refresh() and followed.end == "stopped without a score"
    assert log.read_bytes() == before[0]


@patient
def test_a_log_that_is_just_beginning_is_no_error(tmp_path):
    path = tmp_path / "new.txt"
    with path.open("w") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        writer.write("import torch\n")
        writer.flush()
        followed = Followed(path)
        followed.refresh()
        assert followed.end is None and watch.phase_of(followed) == "starting"
        assert watch.run_view(followed)["facts"] == []
        writer.write("".join(LINES[1 : FIRST_STEP - 1]))
        writer.flush()
        followed.refresh()
        assert watch.phase_of(followed) == "loading and compiling"


def test_a_silent_log_that_nobody_locks_ends(log):
    os.utime(log, (time.time() - 1200, time.time() - 1200))
    followed = Followed(log)
    followed.refresh()
    assert followed.end == "stopped without a score: no line for 20 minutes"
    log.unlink()
    gone = Followed(log)
    assert gone.refresh() and gone.end == "its log is gone"


@pytest.mark.parametrize(
    "lines, reason",
    [
        ("rank 1: out of memory; lower micro_batch_tokens\n", "out of memory; lower micro_batch_tokens"),
        ("rank 0: another rank is gone; its reason\nrank 1: no disk\n", "no disk"),
        ("rank 0: Traceback (most recent call last):\n  File x\n    y\nValueError: z\n", "ValueError: z"),
        ("rank 0: no disk\nresumed step:50 of x\nstep:51/9 train_loss:1\n", None),
        ("a line\n", None),
    ],
)
def test_the_reason_of_a_failure_is_read_from_the_log(log, lines, reason):
    assert failure_of(log.read_text()) is None  # whatever the source at its head says
    append(log, lines)
    assert failure_of(log.read_text()) == reason


# ---- the command ---------------------------------------------------------------------------------


class Watching:
    """The command, running in a thread. `address` is what it printed."""

    def __init__(self, monkeypatch, capsys, *logs: Path):
        monkeypatch.setattr(watch, "POLL_SECONDS", 0.05)
        self.status = None
        self.printed = ""
        self.capsys = capsys
        self.thread = threading.Thread(target=self.run, args=(logs,), daemon=True)
        self.thread.start()
        self.wait_for(lambda: "; Ctrl-C" in self.read())
        self.address = re.search(r"http://127\.0\.0\.1:\d+/", self.printed)[0]

    def run(self, logs) -> None:
        self.status = watch.watch(list(logs), 0)

    def read(self) -> str:
        self.printed += self.capsys.readouterr().out
        return self.printed

    def wait_for(self, holds) -> None:
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)

    def get(self, path: str, host: str | None = None) -> tuple[int, bytes]:
        port = int(self.address.split(":")[2].strip("/"))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def state(self) -> dict:
        return json.loads(self.get("/runs.json")[1])


@with_packages
def test_the_page_is_told_what_the_log_tells(log, monkeypatch, capsys):
    monkeypatch.setattr(watch, "LINGER_SECONDS", 300.0)  # not waited for: a page has fetched the end
    watching = Watching(monkeypatch, capsys, log)
    state = watching.state()
    (run,) = state["runs"]
    assert run["train"]["step"] == [50, 100, 150, 200] and run["fraction"] == pytest.approx(0.133, abs=0.001)
    facts = dict(run["facts"])
    assert facts["step"] == "200" and facts["training time"] == "40 s of 5:00 min"
    assert facts["left, about"] == "4:20 min"
    assert watching.get(f"/runs.json?version={state['version']}") == (204, b"")

    append(log, "".join(LINES[FIRST_STEP + 4 :]))
    watching.wait_for(lambda: watching.status is None and watching.state()["over"])
    watching.thread.join(20)
    assert watching.status == 0
    lines = watching.read().splitlines()
    assert lines[1].endswith(" bits per byte after 1,500 steps")
    assert lines[2:] == ["watch: no run is in progress any more"]


@with_packages
def test_the_server_gives_this_machine_the_page_and_nothing_else(log, monkeypatch, capsys):
    monkeypatch.setattr(watch, "LINGER_SECONDS", 0.1)
    watching = Watching(monkeypatch, capsys, log)
    status, page = watching.get("/")
    assert status == 200 and b"Runs in progress" in page
    assert watching.get("/plotly.min.js")[1].startswith(b"/**\n* plotly.js v")
    assert watching.get("/", host="evil.example:80")[0] == 403
    for path in ("/../README.md", "/page.css", "//etc/passwd", "/favicon.ico"):
        assert watching.get(path)[0] == 404
    log.unlink()
    watching.thread.join(20)
    assert watching.status == 0 and "run.txt: its log is gone" in watching.read()


@with_packages
def test_ctrl_c_ends_it_and_leaves_the_run_alone(log):
    before = log.read_bytes()
    argv = [sys.executable, "-m", "ledger.show.watch", str(log)]
    with subprocess.Popen(
        argv,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline().startswith("watch: http://127.0.0.1:")
        child.send_signal(signal.SIGINT)
        try:
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (child.returncode, out, err) == (130, "", "\nwatch: stopped; the runs go on\n")
    assert log.read_bytes() == before


@with_packages
def test_the_newest_log_is_watched_by_default(log, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LOGS", tmp_path)
    (tmp_path / "notes.txt").write_text("no log")
    older = tmp_path / "older.txt"
    older.write_text(WHOLE, encoding="utf-8")
    os.utime(older, (time.time() - 60, time.time() - 60))
    assert watch.newest_log() == log


@with_packages
def test_bad_input_is_one_line(log, tmp_path, monkeypatch, capsys):
    def refusal(*argv: object) -> str:
        assert watch.main([str(word) for word in argv]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("watch: ")
        return printed.err

    monkeypatch.setattr(watch, "LOGS", tmp_path / "empty")
    assert "no log of a run; start one, or name its log" in refusal()
    assert "gone.txt: no such log" in refusal(log, tmp_path / "gone.txt")
    (tmp_path / "no.txt").write_text("no log")
    assert "no.txt: not a training log" in refusal(tmp_path / "no.txt")
    done = tmp_path / "done.txt"
    done.write_text(WHOLE, encoding="utf-8")
    assert "done.txt: this run has ended (scored); ./run.sh record plot" in refusal(done)
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert "pip install -r requirements-page.txt" in refusal(log)
    with pytest.raises(SystemExit):
        watch.main(["--port", "http", str(log)])
    assert "'http' is no port" in capsys.readouterr().err


# ---- in a browser --------------------------------------------------------------------------------

STATE = "document.getElementById('state')?.textContent"
POINTS = "document.querySelector('#curves .plot')?.data?.[0].x.length"


@pytest.mark.slow
@with_packages
def test_the_page_grows_with_the_log_and_says_when_it_ends(browser, log, monkeypatch, capsys):  # noqa: F811
    watching = Watching(monkeypatch, capsys, log)
    browser.size(375, 812, is_phone=True)
    browser.go(watching.address)
    browser.wait_for(f"{POINTS} === 4 && {STATE} === 'One run is in progress.'")
    append(log, "".join(LINES[FIRST_STEP + 4 : FIRST_STEP + 6]))
    browser.wait_for(f"{POINTS} === 6")
    assert browser.run("document.querySelector('progress').value") == pytest.approx(0.2, abs=0.001)
    assert browser.run("document.querySelector('#curves .js-line').getTotalLength()") > 50
    assert browser.run("document.documentElement.scrollWidth") == 375
    append(log, "".join(LINES[FIRST_STEP + 6 :]))
    browser.wait_for(f"{STATE}?.startsWith('All runs have ended.')")
    watching.thread.join(20)
    assert watching.status == 0
    assert "1.25" in browser.run("document.querySelector('.facts').innerText")
    assert browser.errors == []
    assert {url.partition("?")[0] for url in browser.requests} <= {
        watching.address,
        f"{watching.address}plotly.min.js",
        f"{watching.address}runs.json",
        "data:,",
    }
    assert parse_log(log).final_scores == 1


@pytest.mark.slow
@with_packages
def test_the_page_says_when_the_server_has_gone(browser, log, monkeypatch, capsys):  # noqa: F811
    argv = [sys.executable, "-m", "ledger.show.watch", str(log)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as child:
        try:
            browser.go(re.search(r"http://\S+", child.stdout.readline())[0])
            browser.wait_for(f"{STATE} === 'One run is in progress.'")
            # Its patience of five seconds in a tenth of the time.
            browser.run("setTimeout = ((real) => (call, ms) => real(call, ms / 10))(setTimeout)")
        finally:
            child.kill()
    browser.wait_for(f"{STATE}?.startsWith('The server has stopped; the runs may go on.')")
