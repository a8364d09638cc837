"""The judge of hostile cases catches each kind of fault, and a few cases of every group behave."""

import collections
import dataclasses
import sys
from typing import NamedTuple

import pytest

import train_gpt as t
from tests.helpers import temporary_folder
from tests.stress import hostile
from tests.stress.hostile_cases import judge
from tests.stress.hostile_cases.case import Case, Group, Rank, Receiver, Signal, shell, written
from tests.stress.hostile_cases.settings import FREE_TEXT, ILLEGAL, illegal_values
from tests.stress.hostile_cases.sound_files import SoundFiles

NAMED = ("file", "remedy")


class Judged(NamedTuple):
    """A program, which should say "file: a remedy", end with 2 and change nothing, and its faults."""

    script: str
    faults: str


PROGRAMS = {
    "as it should": Judged('echo "file: a remedy" >&2; exit 2', ""),
    "another status": Judged('echo "file: a remedy" >&2; exit 1', "status 1"),
    "success": Judged("", "status 0; does not say 'file'; does not say 'remedy'"),
    "killed": Judged('echo "file: a remedy" >&2; kill -9 $$', "status -9"),
    "no remedy": Judged('echo "file: wrong" >&2; exit 2', "does not say 'remedy'"),
    "on stdout": Judged('echo "file: a remedy"; exit 2', "does not say 'file'; does not say 'remedy'"),
    "two lines": Judged('echo "oh" >&2; echo "file: a remedy" >&2; exit 2', "2 lines on stderr"),
    "a note of run.sh": Judged('echo "[run.sh 0s] so" >&2; echo "file: a remedy" >&2; exit 2', ""),
    "a long line": Judged('printf "file remedy%2000s\\n" x >&2; exit 2', "a last line of 2011 characters"),
    "a traceback": Judged(
        'echo "Traceback (most recent call last):"; echo "file: a remedy" >&2; exit 2',
        "a traceback on stdout",
    ),
    "a half-written file": Judged(
        'touch new.tmp out.txt; echo "file: a remedy" >&2; exit 2',
        "left new.tmp; left out.txt",
    ),
    "a changed file": Judged('echo x >old; echo "file: a remedy" >&2; exit 2', "changed old"),
    "a removed file": Judged('rm old; echo "file: a remedy" >&2; exit 2', "removed old"),
    "a file for a folder": Judged('rm -r sub; touch sub; echo "file: a remedy" >&2; exit 2', "changed sub"),
    "a temporary file": Judged('touch "$TMPDIR/x"; echo "file: a remedy" >&2; exit 2', "left TMPDIR/x"),
    "a process": Judged('sleep 60 >&- 2>&- & echo "file: a remedy" >&2; exit 2', "1 processes left"),
    "no end": Judged('echo "file: a remedy" >&2; sleep 60', "did not end within 1 s; status -9"),
}
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.fixture(scope="module")
def sound_files():
    return SoundFiles(temporary_folder())


@needs_proc
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_judge_sees_each_fault(name, sound_files, monkeypatch):
    monkeypatch.setattr(judge, "GRACE", 0.3)
    program = PROGRAMS[name]
    faults = program.faults
    case = Case(name, shell(program.script), NAMED, setup=(written("old"), written("sub/file")), seconds=1)
    if name == "a file for a folder":
        faults += "; removed sub/file"
    assert "; ".join(judge.judge(case, (), sound_files).faults) == faults


# A program that does much that a judge sees, and may be run in a fork.
PROGRAM = """
import atexit, multiprocessing, os, subprocess, sys, tempfile, time
if __name__ == "__main__":
    atexit.register(print, "last")
    print(os.getcwd() == os.environ["HERE"], tempfile.gettempdir() == os.environ["TMPDIR"])
    print(sys.argv[1:], sys.stdin.read() == "", os.getsid(0) == os.getpid(), os.path.basename(__file__))
    left = subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL)
    left.returncode = 0  # else Python would warn of it
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
    open("new", "w").close()
    print("file: a remedy", file=sys.stderr)
    os._exit(3) if sys.argv[1] == "at once" else sys.exit(3)
"""


@needs_proc
@pytest.mark.parametrize("word", ["at once", "in order"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_fork_is_judged_like_a_program(word, fresh, sound_files, monkeypatch):
    monkeypatch.setattr(judge, "GRACE", 0.3)
    case = Case("x", (sys.executable, "p.py", word), NAMED, setup=(written("p.py", PROGRAM),), fresh=fresh)
    assert judge.can_fork(case) is not fresh
    place = temporary_folder()
    here = place / "here"
    for folder in (here, place / "tmp"):
        folder.mkdir()
    case.setup[0](here)
    case = case._replace(env={"HERE": str(here)})
    faults, console = judge.run_case(case, place, here)
    left = 2 if word == "at once" else 1  # multiprocessing ends its own at a proper end
    assert faults == [f"{left} processes left", "status 3", "left new"]
    if word == "in order":
        assert console.splitlines()[:3] == ["True True", "['in order'] True True p.py", "last"]


@needs_proc
@pytest.mark.parametrize("fresh", [True, False])
def test_a_file_that_a_program_leaves_open_is_a_fault(fresh, sound_files):
    script = "left = open(__file__)\nleft = None\n"
    setup = (written("p.py", script),)
    case = Case("x", (sys.executable, "p.py"), status=0, setup=setup, fresh=fresh)
    assert judge.judge(case, (), sound_files).faults == ("a traceback on stderr",)


def test_a_fork_that_a_signal_ends_has_a_program_s_status(sound_files):
    script = "import os; os.kill(os.getpid(), 9)"
    case = Case("x", (sys.executable, "p.py"), status=-9, setup=(written("p.py", script),))
    assert judge.can_fork(case) and judge.judge(case, (), sound_files).behaved


def test_a_fork_that_does_not_end_is_killed(sound_files):
    script = "import time; time.sleep(60)"
    case = Case("x", (sys.executable, "p.py"), seconds=0.5, setup=(written("p.py", script),), lines=0)
    assert judge.judge(case, (), sound_files).faults == ("did not end within 0.5 s", "status -9")


def test_what_a_case_leaves_may_be_there_but_not_half_of_it(sound_files):
    script = "mkdir out; touch out/log out/log.tmp"
    case = Case("leaves", shell(script), status=0, leaves=("out", "out/*"))
    assert judge.judge(case, (), sound_files).faults == ("left out/log.tmp",)


def test_a_signal_comes_after_its_words(sound_files):
    script = 'trap "echo done; exit 5" TERM; echo ready; while :; do sleep 0.05; done'
    case = Case("signal", shell(script), ("done",), 5, lines=0, signals=(Signal(15, "^ready"),))
    assert judge.judge(case, (), sound_files).behaved


# A second of waiting, after which `hit` says whether a SIGTERM came.
WAITS = "hit=0; trap hit=1 TERM; echo ready; for i in $(seq 50); do sleep 0.02; done"


@needs_proc
@pytest.mark.parametrize("receiver, status", [(Receiver.PROGRAM, 1), (Rank(1), 2), (Receiver.TERMINAL, 3)])
def test_a_signal_comes_to_its_receiver(receiver, status, sound_files):
    """The status says which processes were hit: 1 for the program, 2 for the rank that it started."""
    rank = written("rank.sh", f"{WAITS}; exit $((2 * hit))")
    program = shell(f"RANK=1 bash rank.sh & {WAITS}; wait $!; exit $((hit + $?))")
    signals = (Signal(15, "ready\nready", 0.1, receiver),)
    case = Case("signal", program, status=status, lines=0, signals=signals, setup=(rank,))
    assert judge.judge(case, (), sound_files).faults == ()


@needs_proc
def test_a_signal_waits_for_the_rank_that_it_is_for(sound_files):
    late = shell("echo ready; sleep 0.3; RANK=1 sleep 30 & wait $!; exit $(($? == 143 ? 4 : 5))")
    case = Case("signal", late, status=4, lines=0, signals=(Signal(15, "ready", 0.0, Rank(1)),), seconds=5)
    assert judge.judge(case, (), sound_files).faults == ()


def test_a_case_whose_program_is_missing_is_skipped(sound_files):
    verdict = judge.judge(Case("x", shell("exit 1"), under=("no_such_program",)), (), sound_files)
    assert "no_such_program" in verdict.skipped
    assert not verdict.behaved


def test_the_command_prints_a_table_and_fails_if_a_case_does(capsys, monkeypatch):
    cases = (
        Case("good", shell("exit 0"), status=0),
        Case("bad", shell("echo no; exit 1"), status=0),
        Case("skipped", shell("exit 0"), under=("no_such_program",)),
    )
    monkeypatch.setattr(hostile, "GROUPS", (Group("toys", (), cases),))
    assert hostile.main(["2"]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 behaved, 1 skipped" in out
    assert "---- toys: bad\nno" in out
    assert hostile.main(["toys", "good"]) == 0
    assert hostile.main(["toys", "gone"]) == 2


def test_the_name_of_a_group_leaves_its_cases():
    found = hostile.chosen(["data"])
    assert {group.name for group, _ in found} == {"data"}  # other groups have cases "without data"
    assert 0 < len(hostile.chosen(["data", "cut"])) < len(found)


def test_the_cases_have_names_of_their_own():
    names = collections.Counter(
        f"{group.name}: {case.name}" for group in hostile.GROUPS for case in group.cases
    )
    assert len(names) > 500
    assert [name for name, count in names.items() if count > 1] == []


def test_no_knob_takes_an_illegal_value():
    tried = {setting.key for setting in ILLEGAL}
    assert tried == {field.name for field in dataclasses.fields(t.Config)} - FREE_TEXT
    for setting in ILLEGAL:
        with pytest.raises(t.InputError, match=setting.key):
            t.load_config([setting.word], {})


def test_an_illegal_value_lies_beside_each_bound_of_a_kind():
    values = {name: list(illegal_values(kind)) for name, kind in t.KINDS.items()}
    assert "0" in values["int"] and "-1" in values["Count"]
    assert "2" in values["Fraction"] and "1" in values["Decay"]
    assert {"nan", "inf", "-1"} <= set(values["float"])
    assert values["bool"] == ["no such value"]


# A case of each group, and the sound files that it needs.
QUICK = (
    ("paths", "verify of a file", ("docs", "repo")),
    ("paths", "plot --out below a file", ("docs", "repo")),
    ("environments", "BANKSHOT_PYTHON does nothing", ()),
    ("environments", "data verify on an ASCII console", ("data",)),
    ("environments", "data verify with stdout closed", ("data",)),
    ("environments", "record verify with stdout closed", ("repo",)),
    ("data", "verify: the manifest is deep", ("data",)),
    ("data", "train: a shard's tokens are infinite", ("data",)),
    ("texts", "jsonl: a key holds a line break", ("docs",)),
    ("texts", "a million spaces", ("docs",)),
    ("settings", "run.sh: an unknown command", ()),
    ("settings", "seed=-1", ()),
    ("artifacts", "run.sh eval: empty", ("data",)),
    ("signals", "SIGTERM to data text", ("docs",)),
    ("ranks", "WORLD_SIZE is a word", ("data",)),
    ("disks", "data text: no room for shards", ("docs",)),
    ("ledger", "compare: a log binary", ("repo",)),
    ("ledger", "verify: seed_results is a list", ("repo",)),
    ("ledger", "verify: track_h100x1_5min may not be read", ("repo",)),
    ("ledger", "board: track_h100x1_5min may not be read", ("repo",)),
)


@needs_proc
@pytest.mark.parametrize("group, name, parts", QUICK, ids=lambda value: str(value)[:40])
def test_a_case_of_each_group_behaves(group, name, parts, sound_files):
    (case,) = [case for found, case in hostile.chosen([]) if (found.name, case.name) == (group, name)]
    verdict = judge.judge(case, parts, sound_files)
    if verdict.skipped:
        pytest.skip(verdict.skipped)
    assert verdict.faults == (), verdict.console


def test_a_program_that_is_tried_leaves_nothing_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert judge.missing_program(("bash", "-c", 'mkdir here && exec "$@"', "-")) is None
    assert list(tmp_path.iterdir()) == []
