"""run.sh: help, bad commands, and every command but train, with stand-ins for all that they start."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import cli
from commands import run_report, suite
from tests.cli.run_sh_tree import CHECKS, COMMANDS, LOG_HEAD, ROOT, TESTS, refused

# ---------------------------------------------------------------- help, bad commands


def test_bash_accepts_it():
    subprocess.run(["bash", "-n", str(ROOT / "run.sh")], check=True)
    assert os.access(ROOT / "run.sh", os.X_OK) and os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("ask", ["--help", "-h", "help"])
def test_help_lists_every_command_with_an_example(tree, ask):
    done = tree.run(ask)
    assert done.returncode == 0 and tree.calls() == []
    for command in COMMANDS:
        assert re.search(rf"^  {command}\b", done.stdout, re.M), command
        assert re.search(rf"\./run\.sh {command}\b", done.stdout), command
    assert sorted(cli.COMMANDS) == sorted(COMMANDS)


def test_help_needs_no_packages(tree):
    """On a fresh clone help comes before minutes of installing, and so does refusing a misspelt command."""
    for args in (["--help"], ["train", "--help"], ["bench", "--json", "x.json", "-h"]):
        done = tree.run(*args, BANKSHOT_PYTHON="")
        assert done.returncode == 0 and done.stdout.startswith("usage: ./run.sh"), done
    done = tree.run("data", "--help", BANKSHOT_PYTHON="")
    assert done.returncode == 0 and done.stdout.startswith("usage: ./run.sh data VERB"), done
    refused(tree.run("fly", BANKSHOT_PYTHON=""), "'fly'")
    refused(tree.run("eval", "gone.int6.xz", BANKSHOT_PYTHON=""), "gone.int6.xz")
    assert tree.calls() == []

    assert tree.run("record", "-h", BANKSHOT_PYTHON="").returncode == 0
    assert tree.calls() == [f"ledger.record -h in {tree.root}"] and not (tree.root / ".venv").exists()


def test_bad_input_is_one_line(tree):
    refused(tree.run("fly"), "'fly'", "train", "record", "--help")
    refused(tree.run("--fast"), "--fast", "--help")
    refused(tree.run("train", "fast"), "'fast'", "key=value")
    refused(tree.run("eval"), "an artifact", "./run.sh eval")
    refused(tree.run("eval", "gone.int6.xz"), "gone.int6.xz")
    refused(tree.run("audit", "run.sh", "--script"), "no script", "--script")
    refused(tree.run("audit", "run.sh", "--script", "gone.py"), "gone.py", "--script")
    refused(tree.run("eval", "run.sh", "--script", "train_gpt.py"), "--script")
    refused(tree.run("bench", "--json"), "--json needs a value")
    refused(tree.run("bench", "--fast"), "'--fast'", "key=value")
    refused(tree.run(NPROC="two"), "NPROC=two")
    refused(tree.run(NPROC="0"), "NPROC=0")
    refused(tree.run(BANKSHOT_PYTHON="/no/python"), "BANKSHOT_PYTHON=/no/python")
    refused(tree.run(BANKSHOT_PYTHON="/bin/true"), "BANKSHOT_PYTHON=/bin/true", "requirements.txt")
    refused(tree.run("eval", ""), "an artifact", "./run.sh eval")
    assert tree.calls() == []
    (tree.root / "tools/audit.py").unlink()
    refused(tree.run("audit", "run.sh"), "tools/audit.py is missing")
    (tree.root / "tools/lab/bench.py").unlink()
    refused(tree.run("bench"), "tools/lab/bench.py is missing")
    (tree.root / "train_gpt.py").unlink()
    refused(tree.run(), "train_gpt.py is missing")


# Words that a command refuses; what it says. Data that was made first would have taken minutes.
REFUSED_BEFORE_DATA = {
    "bench --seconds x": "--seconds: invalid float value: 'x'",
    "bench --seconds -1": "--seconds -1: give 0 or more",
    "bench --timeline t.json --steps 0": "--steps 0: give 1 to 100",
    "bench --sustain -1": "--sustain -1: not a number of seconds",
    "bench --only a": "--only needs --candidates",
    "bench --candidates gone.py --all": "gone.py: no such file",
    "bench preset=wrong": "'wrong' is not one of record",
    "train preset=wrong": "'wrong' is not one of record",
    "eval x.int6.xz eval_stride=0": "eval_stride: 0 must be at least 1",
    "audit x.int6.xz eval_stride=0": "eval_stride: 0 must be at least 1",
    "sample x.int6.xz tokens=many": "tokens=many: not of type int",
    "sample x.int6.xz top_p=1": "'top_p=1' is not a setting of sample",
    "export x.int6.xz data_path=": "usage: export.py ARTIFACT --out DIR",
    "export x.int6.xz --out data": "data: exists",
    "data fly": "unknown verb 'fly' of data; choose one of auto,",
}


@pytest.mark.parametrize("words", REFUSED_BEFORE_DATA)
def test_a_bad_option_is_found_before_data_is_made(tree, words):
    (tree.root / "x.int6.xz").write_text("1024")
    done = tree.run(*words.split())
    assert (done.returncode, done.stdout, tree.calls()) == (2, "", []), done
    assert len(done.stderr.splitlines()) == 1 and REFUSED_BEFORE_DATA[words] in done.stderr


@pytest.mark.parametrize(
    "words", ["bench --seconds x", "data fly", "record fly", "train seed=x", "eval gone"]
)
def test_a_bad_option_is_found_before_packages_are_installed(tree, words):
    assert tree.run(*words.split(), BANKSHOT_PYTHON="").returncode == 2
    assert tree.calls() == [] and not (tree.root / ".venv").exists()


# ---------------------------------------------------------------- the other commands


def test_the_other_commands(tree):
    (tree.root / "x.int6.xz").touch()
    (tree.root / "c.py").touch()
    for args, call in [
        (["config", "preset=record"], "train_gpt.py config preset=record"),
        (["bench"], "-m lab.bench data_path=made/here preset=cpu"),
        (["bench", "data_path=d"], "-m lab.bench preset=cpu data_path=d"),
        (
            ["bench", "--json", "b c.json", "--seconds", "9", "seed=1"],
            "-m lab.bench --json b c.json --seconds 9 data_path=made/here preset=cpu seed=1",
        ),
        (
            ["bench", "--candidates", "c.py", "--all"],
            "-m lab.bench --candidates c.py --all data_path=made/here preset=cpu",
        ),
        (["bench", "--candidates", "c.py"], "-m lab.bench --candidates c.py preset=cpu"),
        (
            ["bench", "--timeline", "t.json", "--steps", "3"],
            "-m lab.bench --timeline t.json --steps 3 preset=cpu",
        ),
        (
            ["bench", "--attention", "--paths", "flex,math", "--json", "a.json", "seed=1"],
            "-m lab.bench --attention --paths flex,math --json a.json preset=cpu seed=1",
        ),
        (
            ["eval", "x.int6.xz", "eval_stride=64"],
            "train_gpt.py eval x.int6.xz data_path=made/here preset=cpu eval_stride=64",
        ),
        (["audit", "x.int6.xz"], "tools/audit.py x.int6.xz data_path=made/here preset=cpu"),
        (
            ["audit", "x.int6.xz", "--script", "train_gpt.py", "data_path=d"],
            "tools/audit.py x.int6.xz --script train_gpt.py preset=cpu data_path=d",
        ),
        (["data", "text", "a b.txt"], f"{tree.root}/data/prepare.py text a b.txt"),
        (["record", "verify"], f"ledger.record verify in {tree.root}"),
        (["record", "sweep", "plan.json", "--workers", "2"], "-m lab.sweep plan.json --workers 2"),
        (["record", "wire", "ortho=mud"], "-m lab.wire ortho=mud"),
        (["record", "directions"], "-m lab.directions"),
    ]:
        done = tree.run(*args)
        assert done.returncode == 0 and done.stdout == "" and tree.calls()[-1] == call, (done, tree.calls())


def test_bench_takes_the_data_that_train_takes(tree):
    for gpus, env in ((0, {}), (1, {}), (8, {"NPROC": "8"})):
        tree.gpus(gpus)
        for command in ("train", "bench"):
            assert tree.run(command, **env).returncode == 0
        asked = [line for line in tree.calls() if line.startswith("data/prepare.py auto")]
        assert len(asked) == 2 and asked[0] == asked[1], asked
        tree.calls_file.unlink()


def test_a_safe_path_of_the_callers_does_not_hide_our_modules(tree):
    assert tree.run("bench", PYTHONSAFEPATH="1").returncode == 0


def test_an_artifact_is_scored_on_the_data_of_its_log(tree):
    """Not on what can be had today, which may be another text, nor after asking the hub for it."""
    (tree.root / "logs").mkdir()
    (tree.root / "logs/r.int6.xz").touch()
    log = tree.root / "logs/r.txt"
    log.write_text(f"{LOG_HEAD}config:\n  data_path: my/data\n  tokenizer_path: my/t.model\npreset: cpu\n")
    found = "train_gpt.py eval logs/r.int6.xz data_path=made/here preset=cpu"
    assert tree.run("eval", "logs/r.int6.xz").returncode == 0 and tree.calls()[-1] == found  # it is gone

    (tree.root / "my/data").mkdir(parents=True)
    calls = len(tree.calls())
    for command, program in (("eval", "train_gpt.py eval"), ("audit", "tools/audit.py")):
        done = tree.run(command, "logs/r.int6.xz")
        assert done.stderr.splitlines()[0].endswith("] data_path=my/data, as in logs/r.txt")
        knobs = "data_path=my/data tokenizer_path=my/t.model preset=cpu"
        assert tree.calls()[calls:] == [f"{program} logs/r.int6.xz {knobs}"]
        calls = len(tree.calls())
    tree.run("eval", "logs/r.int6.xz", "data_path=d")
    assert tree.calls()[calls:] == ["train_gpt.py eval logs/r.int6.xz preset=cpu data_path=d"]


@pytest.mark.parametrize(
    "vocab_size, call",
    [
        ("1024", "data/prepare.py auto --variant sp1024"),
        ("8192", "data/prepare.py auto --variant sp8192"),
        ("320", None),
    ],
)
@pytest.mark.parametrize("command", ["eval", "audit"])
def test_an_artifact_without_a_log_is_scored_on_data_in_its_vocabulary(tree, command, vocab_size, call):
    (tree.root / "x.int6.xz").write_text(vocab_size)
    datasets = tree.root / "data/datasets"
    manifests = {"a": "[", "b": "[]", "c": '{"tokenizer": {"vocab_size": 512}}', "e": "{}"}
    for name, text in (manifests | {"d": '{"tokenizer": {"vocab_size": 320}}'}).items():
        (datasets / name).mkdir(parents=True)
        (datasets / name / "manifest.json").write_text(text)
    done = tree.run(command, "x.int6.xz")
    assert done.returncode == 0
    assert f"x.int6.xz data_path={'made/here' if call else 'data/datasets/d'} preset=cpu" in tree.calls()[-1]
    if call:
        assert tree.calls()[0] == call
    else:
        assert "data_path=data/datasets/d, which has the vocabulary of the artifact" in done.stderr


def test_data_in_the_vocabulary_of_an_artifact_that_nobody_has_is_one_line(tree):
    (tree.root / "x.int6.xz").write_text("77")
    refused(
        tree.run("eval", "x.int6.xz"), "data/datasets", "77 tokens", "data_path=DIR", "./run.sh data text"
    )
    (tree.root / "x.int6.xz").write_text("damaged")
    refused(tree.run("eval", "x.int6.xz"), "x.int6.xz: artifact: damaged")


def test_ci_keeps_the_exit_status(tree):
    assert tree.run(script=".ci/run", cwd=Path("/")).returncode == 0
    assert tree.run(script=".ci/run", PYTEST_STATUS="3").returncode == 3
    most = f"{TESTS} -m not long"
    assert tree.calls() == [*CHECKS, most, *CHECKS, most]


def test_tests_fail_on_format_and_style(tree):
    done = tree.run("test", "-k", "style", RUFF_STATUS="1")
    assert done.returncode == 1 and tree.calls() == [*CHECKS, f"{TESTS} -k style"]
    assert "ruff format" in done.stderr and "ruff check" in done.stderr


def test_selections_of_tests(tree):
    selections = {"fast": suite.FAST, "stress": suite.STRESS}
    for name, selection in selections.items():
        assert tree.run("test", name, "-x").returncode == 0
        assert tree.calls()[-1] == " ".join([TESTS, *selection, "-x"])
        words = [word.removeprefix("--ignore=") for word in selection]
        paths = [word.partition("::")[0] for word in words if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
    assert tree.run("test", "long").returncode == 0
    assert tree.calls()[-1] == " ".join([TESTS, *suite.LONG])


def test_lab_commands_find_their_packages(tree):
    for args in (["bench"], ["record", "wire"]):
        assert tree.run(*args, PYTHONPATH="mine").returncode == 0
    paths = Path(f"{tree.calls_file}.path").read_text().splitlines()
    assert paths == [f"{tree.root}/tools{os.pathsep}mine"] * 2


def test_the_status_of_a_tool_is_kept(tree):
    assert tree.run("record", "verify", RECORD_STATUS="1").returncode == 1


def test_a_number_of_processes_that_cannot_share_the_batch_begins_nothing(tree):
    done = tree.run("preset=thirds", NPROC="3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert tree.calls() == []
    assert done.stderr == "train_gpt.py: no whole micro-batches\n"


def test_the_reason_of_the_first_rank_is_last(tmp_path):
    log = tmp_path / "run.txt"
    log.write_text("rank 0: of an earlier run\n")
    size = log.stat().st_size
    gone = f"rank 0: another rank is gone; its reason, if it gave one, is in {log}\n"
    trace = "rank {}: Traceback (most recent call last):\n  File x\n{}: {}\n\n"

    def reason(text):
        log.write_text("rank 0: of an earlier run\n" + text)
        return run_report.read_reason(str(log), size)

    assert reason("step:1/2\n") is None
    assert reason("step:1/2\nrank 1: x.bin: no such shard\n" + gone) == "rank 1: x.bin: no such shard"
    crashed = trace.format(1, "ZeroDivisionError", "ray") + trace.format(0, "RuntimeError", "gloo") + gone
    assert reason(crashed) == "rank 1: ZeroDivisionError: ray"
    assert reason(trace.format(0, "RuntimeError", "gloo") + gone).startswith("a rank was killed")


def test_settings_that_the_trainer_refuses_begin_nothing(tree):
    done = tree.run("preset=wrong")
    assert done.returncode == 2
    assert done.stdout == ""
    assert tree.calls() == []
    assert done.stderr == "train_gpt.py: config key preset: 'wrong' is not one of record\n"
    done = tree.run("run_id=../../x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert tree.calls() == []
    assert done.stderr == "train_gpt.py: config key run_id: '../../x' cannot name a file\n"
