"""run.sh trains: preset, processes, data, paths, what it says at the end."""

import os
import re
import shlex
import subprocess

import pytest

import cli
from tests.cli.run_sh_tree import LOG_HEAD, refused


@pytest.mark.parametrize(
    "gpus, preset, launcher",
    [
        (0, "cpu", "train_gpt.py"),
        (1, "h100x1", "tools/ranks.py 1 train_gpt.py"),
        (2, "h100x2", "tools/ranks.py 2 train_gpt.py"),
        (3, "h100x2", "tools/ranks.py 2 train_gpt.py"),
        (4, "record", "tools/ranks.py 4 train_gpt.py"),
        (7, "record", "tools/ranks.py 4 train_gpt.py"),
        (8, "record", "tools/ranks.py 8 train_gpt.py"),
        (10, "record", "tools/ranks.py 8 train_gpt.py"),
    ],
)
def test_preset_by_machine(tree, gpus, preset, launcher):
    tree.gpus(gpus)
    done = tree.run()
    assert done.returncode == 0, done.stderr
    settings = rf"preset={preset} data_path=made/here run_id=\d{{8}}_\d{{6}}_{preset}_seed7"
    pattern = rf"{re.escape(launcher)} train {settings}"
    assert re.fullmatch(pattern, tree.train_call()), tree.train_call()
    processes = re.findall(r"ranks.py (\d)", launcher)
    variant = "sp8192" if preset == "h100x1" else "sp1024"
    shards = f" --train-shards {10 * int(processes[0])}" if processes else ""
    assert tree.calls()[0] == f"data/prepare.py auto --variant {variant}{shards}"


@pytest.mark.parametrize(
    "gpus, args, env, launcher",
    [
        (8, ["preset=cpu"], {}, "train_gpt.py"),
        (8, ["preset=cpu_sp8192"], {}, "train_gpt.py"),
        (8, ["preset=h100x1"], {}, "ranks.py 8 train_gpt.py"),
        (3, ["preset=h100x1"], {}, "ranks.py 2 train_gpt.py"),
        (8, ["preset=thirds"], {}, "ranks.py 2 train_gpt.py"),
        (8, ["preset=h100x1"], {"NPROC": "1"}, "ranks.py 1 train_gpt.py"),
        (1, ["preset=record"], {}, "ranks.py 1 train_gpt.py"),
        (4, ["preset=record"], {}, "ranks.py 4 train_gpt.py"),
        (8, [], {"NPROC": "2"}, "ranks.py 2 train_gpt.py"),
        (0, [], {"NPROC": "2"}, "ranks.py 2 train_gpt.py"),
        (8, [], {"CUDA_VISIBLE_DEVICES": "3"}, "ranks.py 1 train_gpt.py"),
        (8, [], {"CUDA_VISIBLE_DEVICES": ""}, "train_gpt.py"),
    ],
)
def test_process_count(tree, gpus, args, env, launcher):
    tree.gpus(gpus)
    assert tree.run(*args, **env).returncode == 0
    call = tree.train_call().split(" train ")[0]
    assert call.endswith(launcher) and ("nproc" in call) == ("nproc" in launcher), call


@pytest.mark.parametrize(
    "args, options",
    [
        (["preset=cpu_sp8192"], " --variant sp8192"),
        (["preset=sp8192"], " --variant sp8192 --train-shards 80"),
        (["preset=h100x1"], " --variant sp8192 --train-shards 80"),
        (["preset=cpu", "vocab_size=8192"], " --variant sp8192"),
        (["eval", "x.int6.xz"], " --variant sp8192"),
        (["bench", "preset=cpu_sp8192"], " --variant sp8192"),
    ],
    ids=" ".join,
)
def test_data_has_the_vocabulary_of_the_run(tree, args, options):
    (tree.root / "x.int6.xz").write_text("8192")
    tree.gpus(8)
    assert tree.run(*args).returncode == 0
    assert tree.calls()[0] == "data/prepare.py auto" + options


def test_the_codec_ends_the_name_of_the_artifact(tree):
    done = tree.run("train", "data_path=d", "run_id=r", "codec=rans")
    assert done.returncode == 0
    assert "./run.sh audit logs/r.int6.rans " in done.stdout
    (tree.root / "logs/r.txt").unlink()
    again = tree.run("train", "data_path=d", "run_id=r", "codec=rans")
    assert again.returncode == 2 and "run_id=r is taken" in again.stderr


def test_arguments_pass_through(tree):
    done = tree.run(
        "train", "seed=3", "note=two words; $HOME", "data_path=d", "run_id=r", "preset=smoke", "out_dir=o"
    )
    assert done.returncode == 0, done.stderr
    assert tree.calls()[0] == (
        "train_gpt.py train preset=smoke data_path=d run_id=r seed=3 note=two words; $HOME out_dir=o"
    )
    assert tree.calls()[1] == "-m ledger.record plot o/r.txt"
    assert done.stdout.splitlines()[-5:-3] == ["plot: o/r.svg", "next:"]  # the trainer gives score and files
    again = tree.run("run_id=r", "out_dir=o", "data_path=d")
    assert again.returncode == 2 and "run_id=r is taken" in again.stderr
    assert "resume=auto" in again.stderr and "did not finish" not in again.stderr
    (tree.root / "o/r.txt").write_text(LOG_HEAD)
    cut = tree.run("run_id=r", "out_dir=o", "data_path=d")
    assert "o/r.* exists, a run that did not finish)" in cut.stderr


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_run_that_resumes_goes_on_with_its_log(tree, tmp_path, how):
    """resume=auto as it is, a file's path as one of the caller's."""
    for number, value in enumerate(["auto", "o/r.step9.0of1.ckpt"]):
        (tree.root / "o").mkdir(exist_ok=True)
        (tree.root / "o/r.txt").write_text("step:9/20\n")
        knobs, env = (
            ([f"resume={value}"], {}) if how == "argument" else ([], dict(RESUME=value, CALLS_RESUME="1"))
        )
        done = tree.run(
            "run_id=r", f"out_dir={tree.root}/o", f"data_path={tmp_path}", *knobs, cwd=tmp_path, **env
        )
        assert done.returncode == 0, done.stderr
        want = value if value == "auto" else f"{tmp_path}/{value}"
        call = [line for line in tree.calls() if "train_gpt.py train " in line][number]
        assert (f" resume={want}" in call) if how == "argument" else ("resume=" not in call)
        noted = [line for line in tree.calls() if line.startswith("RESUME=")]
        assert how == "argument" or noted[number] == f"RESUME={want}"


def test_a_resumed_run_that_fails_shows_no_score_of_before(tree):
    (tree.root / "logs").mkdir()
    (tree.root / "logs/r.txt").write_text(f"{LOG_HEAD}final_score metric:x val_loss:2.0 val_bpb:9.9\n")
    done = tree.run("run_id=r", "data_path=d", "resume=auto", TRAIN_STATUS="2", NO_SCORE="1")
    assert done.returncode == 2 and "9.9" not in done.stdout, done
    assert done.stdout.splitlines()[-4:] == [
        "score: none (the log of this run has no final_score line)",
        "artifact: none at logs/r.int6.xz (the trainer's lines say why)",
        "log: logs/r.txt",
        "plot: logs/r.svg",
    ]
    assert done.stderr.splitlines()[-1].endswith("] the trainer's exit status is 2")
    done = tree.run("run_id=r", "data_path=d", "resume=auto")
    assert done.returncode == 0 and "score: none" not in done.stdout and "\nnext:\n" in done.stdout, done


def next_commands_of(done) -> list:
    """Return the commands that a run names at its end, as lists of words."""
    shown = done.stdout.partition("\nnext:\n")[2].splitlines()
    commands = [shlex.split(line.partition("?")[2]) for line in shown]
    assert len(commands) == 3, done.stdout
    return commands


def test_the_commands_to_try_next_can_be_typed_where_the_run_was_started(tree, tmp_path):
    """They keep the run's knobs but not its name, and begin what they say."""
    audit, seed, knob = next_commands_of(
        tree.run("run_id=r", "data_path=my data", "seed=1337", "grad_clip=1")
    )
    given = ["./run.sh", "train", "preset=cpu", "data_path=my data"]
    assert audit == ["./run.sh", "audit", "logs/r.int6.xz", "preset=cpu", "data_path=my data"]
    assert seed == [*given, "grad_clip=1", "seed=42"]
    assert knob == [*given, "seed=1337", "grad_clip=1", "matrix_lr=0.1"]
    assert cli.main(["--check", *knob[1:]]) == 0  # the trainer has such a knob

    away = tmp_path / "away"
    away.mkdir()
    done = tree.run("run_id=s", "seed=42", "matrix_lr=0.02", cwd=away, NPROC="2")
    prefix = ["NPROC=2", f"{tree.root}/run.sh"]
    found = f"data_path={tree.root}/made/here"  # what prepare.py auto names from the repository
    audit, seed, knob = next_commands_of(done)
    assert audit == [*prefix, "audit", f"{tree.root}/logs/s.int6.xz", "preset=cpu", found]
    assert seed == [*prefix, "train", "preset=cpu", found, "matrix_lr=0.02", "seed=1337"]
    assert knob == [*prefix, "train", "preset=cpu", found, "seed=42", "matrix_lr=0.04"]  # twice the run's
    for command in (seed, knob, audit):
        argv = ["bash", *command[1:]]
        again = subprocess.run(argv, cwd=away, env=tree.env(NPROC="2"), capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    assert f"tools/audit.py {tree.root}/logs/s.int6.xz preset=cpu {found}" in tree.calls()[-1]


def test_a_race_names_its_next_run_and_its_judge(tree, tmp_path):
    """It makes no artifact, so there is nothing to audit and no text to show."""
    done = tree.run("run_id=r", "data_path=d", "seed=3", "target_loss=3.28", "out_dir=races")
    shown = done.stdout.partition("\nnext:\n")[2].splitlines()
    next_run, judge = [shlex.split(line.partition("?")[2]) for line in shown]
    given = ["./run.sh", "train", "preset=cpu", "data_path=d", "target_loss=3.28", "out_dir=races"]
    assert next_run == [*given, "seed=4"]
    assert judge == ["./run.sh", "record", "target", "races", "--loss", "3.28"]
    assert "what it writes" not in done.stdout and done.returncode == 0

    away = tmp_path / "away"
    away.mkdir()
    done = tree.run("run_id=s", "target_loss=3.28", cwd=away)
    assert f"run.sh record target {tree.root}/logs --loss 3.28" in done.stdout


def test_a_run_ends_with_what_the_model_writes(tree):
    done = tree.run("run_id=r", "data_path=d", "tokenizer_path=t.model")
    shown = ["-m use.sample logs/r.int6.xz held_out=3 tokens=40 data_path=d tokenizer_path=t.model"]
    assert [call for call in tree.calls() if "use.sample" in call] == shown
    assert "\nwhat it writes, beside what the held-out text says:\n" in done.stdout


def test_sample_takes_the_tokenizer_of_the_data(tree, tmp_path):
    (tree.root / "x.int6.xz").write_text("1024")
    assert tree.run("sample", "x.int6.xz", "prompt=a river").returncode == 0
    assert tree.calls() == [
        "data/prepare.py auto --variant sp1024",
        "-m use.sample x.int6.xz data_path=made/here prompt=a river",
    ]
    assert tree.run("sample", "x.int6.xz", TOKENIZER_PATH="t.model").returncode == 0
    assert tree.calls()[-1] == "-m use.sample x.int6.xz tokenizer_path=t.model"


def test_export_writes_to_the_callers_folder(tree, tmp_path):
    (tmp_path / "x.int6.xz").write_text("1024")
    assert tree.run("export", "x.int6.xz", "--out", "o", "data_path=d", cwd=tmp_path).returncode == 0
    assert tree.calls() == [f"-m use.export {tmp_path}/x.int6.xz --out {tmp_path}/o data_path={tmp_path}/d"]
    refused(tree.run("export", "x.int6.xz", "--out", "o", "seed=1", cwd=tmp_path), "'seed'")


def test_environment_settings(tree):
    done = tree.run(PRESET="smoke", SEED="5", DATA_PATH="d", OUT_DIR="o")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"train_gpt.py train preset=smoke data_path=d run_id=\w+_smoke_seed5", tree.train_call()
    )
    assert not any("prepare.py" in line for line in tree.calls())


def test_paths_from_another_directory(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert tree.run("data_path=d", "run_id=r", f"out_dir={elsewhere}", cwd=elsewhere).returncode == 0
    assert f"data_path={elsewhere}/d" in tree.train_call()
    done = tree.run("eval", "r.int6.xz", "data_path=d", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert tree.calls()[-1] == f"train_gpt.py eval {elsewhere}/r.int6.xz preset=cpu data_path={elsewhere}/d"
    (elsewhere / "their.py").touch()
    (elsewhere / "c.py").touch()
    args = ("audit", "r.int6.xz", "--script", "their.py", "data_path=d")
    assert tree.run(*args, cwd=elsewhere, NPROC="2").returncode == 0
    assert tree.calls()[-1] == (
        "tools/ranks.py 2 tools/audit.py "
        f"{elsewhere}/r.int6.xz --script {elsewhere}/their.py preset=cpu data_path={elsewhere}/d"
    )
    assert tree.run("bench", "--candidates", "c.py", "--json", "/b.json", cwd=elsewhere).returncode == 0
    assert tree.calls()[-1] == f"-m lab.bench --candidates {elsewhere}/c.py --json /b.json preset=cpu"
    assert tree.run("bench", "--candidates", "c.py", "--all", "--sustain", "9", cwd=elsewhere).returncode == 0
    call = f"-m lab.bench --candidates {elsewhere}/c.py --all --sustain 9 data_path=made/here preset=cpu"
    assert tree.calls()[-1] == call
    assert tree.run("bench", "--timeline", "t.json", cwd=elsewhere, NPROC="2").returncode == 0
    assert tree.calls()[-1] == (f"tools/ranks.py 2 -m lab.bench --timeline {elsewhere}/t.json preset=cpu")
    assert tree.run("record", "verify", "here", cwd=elsewhere).returncode == 0
    assert tree.calls()[-1] == f"ledger.record verify here in {elsewhere}"
    assert tree.run("data", "auto", cwd=elsewhere).returncode == 0
    assert tree.calls()[-1] == f"{tree.root}/data/prepare.py auto"


def test_trainer_status_is_kept_and_the_plot_still_drawn(tree):
    done = tree.run("run_id=big", TRAIN_STATUS="3")
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "plot: logs/big.svg"
    done = tree.run("run_id=bad", TRAIN_STATUS="4", NO_LOG="1")
    assert done.returncode == 4
    assert not any("plot logs/bad" in line for line in tree.calls())
    assert tree.run("run_id=none", NO_LOG="1").returncode != 0  # a trainer that leaves no log did not succeed
    done = tree.run("run_id=noplot", PLOT_STATUS="1")
    assert done.returncode == 0 and "plot: none" in done.stdout


def test_data_that_cannot_be_had(tree):
    done = tree.run(DATA_STATUS="1")
    assert done.returncode == 2 and "data_path=DIR" in done.stderr.splitlines()[-1]
    done = tree.run(DATA_LINE="nothing")
    assert done.returncode == 2 and "'nothing'" in done.stderr.splitlines()[-1]
    assert not any("train_gpt.py" in line for line in tree.calls())


def read_terminal(master):
    """Return all that is written to a pseudo-terminal until its other end is closed."""
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # how Linux reports the end
            return shown
        if not piece:
            return shown
        shown += piece


def test_the_trainer_keeps_the_terminal(tree):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    done = subprocess.Popen(
        ["bash", str(tree.root / "run.sh"), "run_id=tty"],
        env=tree.env(),
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = read_terminal(master)
    os.close(master)
    assert done.wait(timeout=60) == 0, shown
    assert b"stdout is a terminal" in shown
