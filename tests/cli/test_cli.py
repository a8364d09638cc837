"""The commands of run.sh without stand-ins: the machine table against the trainer, help, Ctrl-C."""

import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import prepare
import script
import train_gpt as t
from commands import ask_trainer, datasets, machine, programs
from commands.words import Command, Form, Option, Takes
from lab.shared.bench_options import make_parser
from ledger import lab_verbs, record
from ledger.files import named_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("row", machine.MACHINES, ids=lambda row: f"{row.gpus} GPUs")
def test_every_row_of_the_machine_table_can_be_trained(row):
    h = t.load_config([f"preset={row.preset}"], {})
    accum, sequences, _ = t.cut_batch(h, row.processes)
    tokens = accum * sequences * h.train_seq_len * row.processes
    assert tokens == h.train_batch_tokens and row.processes <= max(1, row.gpus)


def test_the_help_of_bench_shows_the_options_of_its_parser():
    kinds = {bool: Takes.NOTHING, Path: Takes.FILE, named_path: Takes.FILE}
    parsed = {}
    for action in make_parser("")._actions:
        for option in action.option_strings:
            kind = bool if action.nargs == 0 else action.type
            parsed[option] = kinds.get(kind, Takes.VALUE)
    del parsed["-h"], parsed["--help"]
    assert cli.COMMANDS["bench"].options == parsed | {"--script": Takes.SCRIPT}


def resolved(*knobs):
    """Return what a child process would answer for these knobs."""
    h = t.load_config(list(knobs), {})
    fields = [name for name in ask_trainer.Resolved._fields if name != "process_counts"]
    return ask_trainer.Resolved(**{name: getattr(h, name) for name in fields}, process_counts=[])


@pytest.fixture
def asked(monkeypatch):
    """The options of data/prepare.py auto, which is not run."""
    options = []
    monkeypatch.setattr(datasets, "find_data", lambda *words: options.extend(words))
    return options


@pytest.mark.parametrize("preset", t.PRESETS)
def test_data_has_the_vocabulary_of_the_run(preset, asked):
    options = {1024: ["--variant", "sp1024"], 8192: ["--variant", "sp8192"], 50_304: ["--variant", "gpt2"]}
    run = resolved(f"preset={preset}")
    datasets.find_training_data(run, 1)
    shards = [] if run.is_for_a_laptop else ["--train-shards", str(datasets.shards_wanted(run, 1))]
    assert asked == [*options[run.vocab_size], *shards]


@pytest.mark.parametrize("preset", t.PRESETS)
def test_a_preset_is_for_a_laptop_or_for_gpus_by_its_settings(preset):
    assert resolved(f"preset={preset}").is_for_a_laptop == preset.startswith("cpu")


@pytest.mark.parametrize("preset", [preset for preset in t.PRESETS if not preset.startswith("cpu")])
def test_presets_for_gpus_are_shared_by_any_count(preset):
    """So preset= on several GPUs uses 8, 4 or 2 of them, at the same tokens a step."""
    h = t.load_config([f"preset={preset}"], {})
    for count in machine.PROCESS_COUNTS:
        accum, sequences, _ = t.cut_batch(h, count)
        assert accum * sequences * h.train_seq_len * count == h.train_batch_tokens


WHOLE_RUNS = [name for name in t.PRESETS if "race" in name or "gpt2" in name]
WHOLE_RUNS += ["h100x1 depth=12", "cpu depth=2", "record tokens_per_param=40", "cpu depth=26"]


@pytest.mark.parametrize("preset", WHOLE_RUNS)
def test_a_run_that_takes_all_its_iterations_sees_no_token_twice(preset, asked):
    run = resolved(*f"preset={preset}".split())
    datasets.find_training_data(run, 1)
    assert asked[-2] == "--train-shards"
    assert 0 <= int(asked[-1]) * 100_000_000 - run.iterations * run.train_batch_tokens < 100_000_000


def test_the_trainer_is_asked_in_a_child_process():
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/cli.py",
            "--resolve",
            "preset=h100x1",
            "seed=5",
            "run_id=r",
            "out_dir=o",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"RESUME": "auto"},
        check=True,
    )
    assert done.stderr == "" and '"process_counts": [8, 4, 2, 1]' in done.stdout
    assert '"seed": 5, "out_dir": "o", "run_id": "r", "resume": "auto"' in done.stdout


def test_the_command_line_is_read_without_torch():
    program = (
        "import cli, sys; status = cli.main(['--check', 'train']); sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT / "tools").returncode == 0


def test_a_misspelt_knob_is_found_before_packages_are_installed(capsys):
    """run.sh asks this with --check, from a Python that may have no torch."""
    assert cli.main(["--check", "train", "seed=3", "iteration=5"]) == 2
    assert capsys.readouterr().err == "run.sh: unknown config key 'iteration'; did you mean iterations?\n"
    assert cli.main(["--check", "train", "seed=3", "zzz=5"]) == 2
    assert capsys.readouterr().err == "run.sh: unknown config key 'zzz'; ./run.sh config lists them\n"
    assert cli.main(["--check", "train", "seed=3", "iterations=5"]) == 0
    assert cli.main(["--check", "data", "verify"]) == 0


def test_the_verbs_of_data_are_those_of_its_program():
    verbs = next(action for action in prepare.make_parser()._actions if action.dest == "verb")
    assert cli.DATA_VERBS == {verb.dest: verb.help for verb in verbs._choices_actions}


@pytest.mark.parametrize("command", ["data", "record"])
def test_the_help_of_a_command_with_verbs_lists_them_without_packages(command):
    program = [sys.executable, "-S", "tools/cli.py", command, "--help"]  # -S: without site-packages
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    verbs = cli.DATA_VERBS if command == "data" else [*lab_verbs.MEASURED, "verify"]
    assert all(re.search(rf"^ +{verb} ", done.stdout, re.M) for verb in verbs), done.stdout


def test_run_sh_asks_which_commands_run_attention():
    """It installs a package for them, and keeps no list of its own."""

    def status(words: str) -> int:
        return cli.main(["--runs-attention", *words.split()])

    for words in ("", "seed=1", "train", "eval x", "audit x", "sample x", "bench", "record reproduce x"):
        assert status(words) == 0, words
    for words in ("config", "data auto", "test fast", "watch", "record", "record verify", "record site"):
        assert status(words) == 1, words
    assert {verb: status(f"record {verb}") for verb in lab_verbs.MEASURED} == {
        verb: int(not row.runs_attention) for verb, row in lab_verbs.MEASURED.items()
    }
    assert status("fly") == 2
    script = (ROOT / "run.sh").read_text(encoding="utf-8")
    assert not [verb for verb in lab_verbs.MEASURED if re.search(rf"\b{verb}\b", script)]


def test_the_help_of_record_lists_the_verbs_that_measure(capsys):
    with pytest.raises(SystemExit):
        record.main(["--help"])
    said = capsys.readouterr().out
    for verb, row in lab_verbs.MEASURED.items():
        assert re.search(rf"^    {verb} +{re.escape(row.summary)}$", said, re.M)
        assert (ROOT / "tools" / "lab" / f"{verb}.py").is_file()


TYPED = {name: kind.type for name, kind in t.kinds_of_knobs().items() if kind.type != "str"}


@pytest.mark.parametrize("key", TYPED)
def test_a_value_of_another_type_is_found_before_packages_are_installed(key, capsys):
    """What the trainer refuses is refused in its words; what it takes passes."""
    default = getattr(t.Config, key)
    for value in ("many", "", "0", "1", "TRUE", "false", "1e3", "2.5", f"{default}"):
        try:
            t.read_knobs([f"{key}={value}"], {})
            refused = ""
        except t.InputError as error:
            refused = f"run.sh: {error}\n"
        assert cli.main(["--check", "train", f"{key}={value}"]) == (2 if refused else 0), value
        assert capsys.readouterr().err == refused


def test_a_misspelt_setting_of_sample_is_found_as_well(tmp_path, capsys):
    artifact = tmp_path / "x.int6.xz"
    artifact.touch()
    assert cli.main(["--check", "sample", str(artifact), "prompt=a", "top_p=0.9"]) == 2
    assert "'top_p=0.9' is not a setting of sample: prompt, tokens, temperature, " in capsys.readouterr().err
    assert cli.main(["--check", "sample", str(artifact), "prompt=a", "top_k=5"]) == 0


USAGE = [
    "train [key=value...]",
    "eval ARTIFACT [key=value...]",
    "audit ARTIFACT [--script PATH] [key=value...]",
    "sample ARTIFACT [prompt=TEXT] [tokens=N] [temperature=T] [top_k=K] [seed=N]",
    "sample ARTIFACT held_out=N [...]",
    "export ARTIFACT --out DIR [data_path=DIR]",
    "config [key=value...]",
    "bench [--json FILE] [--sustain SECONDS] [--seconds SECONDS] [--script PATH] [key=value...]",
    "bench --candidates FILE.py [--only NAME,NAME] [--all] [--json FILE] [key=value...]",
    "bench --timeline FILE.json [--steps N] [--json FILE] [key=value...]",
    "bench --attention [--paths NAME,NAME] [--json FILE] [key=value...]",
    "data VERB",
    "record VERB",
    "record sweep PLAN",
    "record site --out DIR",
    "watch [LOG...]",
    "test [pytest arguments]",
    "test fast",
    "test stress",
    "test long",
]


def test_help_shows_each_form_of_a_command():
    """Byte for byte: first words, options in their order, last words."""
    lines = cli.help_text().splitlines()
    summaries = {form.summary for command in cli.COMMANDS.values() for form in command.forms}
    assert [before for before, line in zip(lines, lines[1:]) if line.strip() in summaries] == [
        f"  {usage}" for usage in USAGE
    ]


def test_what_an_option_takes_does_not_depend_on_the_words_of_its_help():
    text = Option("--json", Takes.FILE, "FILE", is_needed=True)
    path = text._replace(value="PATH", is_needed=False)
    form = Form("ARTIFACT", "", "", options=(text, Option("--all")), last_words="[key=value...]")
    assert form.arguments == "ARTIFACT --json FILE [--all] [key=value...]"
    other = form._replace(first_words="", options=(path,))
    assert other.arguments == "[--json PATH] [key=value...]"
    for one in (form, other):
        assert Command(cli.config, forms=(one,)).options["--json"] is Takes.FILE


def test_an_option_takes_the_same_in_every_form_of_its_command():
    for name, command in cli.COMMANDS.items():
        takes = {(option.name, option.takes) for form in command.forms for option in form.options}
        assert len(takes) == len(command.options), name


def test_help_has_the_machine_table():
    text = cli.help_text()
    for row in ("0            cpu       1", "1            h100x1    1", "2 to 3       h100x2    2"):
        assert f"  {row}\n" in text
    for row in ("4 to 7       record    4", "8 or more    record    8"):
        assert f"  {row}\n" in text


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(5))
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 5)], ids=["SIGINT", "SIGTERM"]
)
def test_signals_do_not_orphan_the_program(number, status):
    """It decides how to end: SIGINT comes to it from the terminal, SIGTERM is passed on."""
    program = f"import sys; from commands import programs; sys.exit(programs.run(['-c', {CHILD!r}]))"
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT / "tools",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(number)
    if number == signal.SIGINT:
        with pytest.raises(subprocess.TimeoutExpired):
            parent.wait(timeout=0.3)
        parent.stdin.write("\n")
        parent.stdin.flush()
    assert parent.wait(timeout=20) == status
    parent.stdin.close()
    parent.stdout.close()


def test_a_program_that_a_signal_ended_has_the_shells_status():
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert programs.run(["-c", program]) == 128 + signal.SIGKILL


CLI = [sys.executable, str(ROOT / "tools/cli.py")]


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    command = ["sh", "-c", script, "-", *CLI, "config", "data_path=x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("run.sh: the current folder is gone; change to one")
    assert "Traceback" not in done.stderr


IMPORTS = "raise SystemExit('a module of the caller was imported')"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
@pytest.mark.parametrize(
    "words", [["record", "sweep"], ["record", "wire", "--ranks", "0"], ["record", "codecs", "gone"]], ids=str
)
def test_modules_of_the_callers_are_not_taken_for_ours(words, tmp_path):
    for name in ("script", "lab", "ledger", "torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(IMPORTS)
    done = subprocess.run([*CLI, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "a module of the caller" not in done.stderr


# Programs that a person may start by name, and what one says of a file that is missing.
BARE = (
    ("data/prepare.py", ["verify", "gone"], "gone/manifest.json"),
    ("tools/audit.py", ["gone"], "gone"),
    ("tools/cli.py", ["eval", "gone"], "gone"),
)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
@pytest.mark.parametrize("program, words, says", BARE, ids=lambda value: str(value)[:20])
def test_pythonsafepath_hides_no_module_of_a_program(program, words, says, tmp_path):
    for name in ("script", "shards", "commands"):
        (tmp_path / f"{name}.py").write_text(IMPORTS)
    command = [sys.executable, str(ROOT / program), *words]
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) in ((1, 1), (2, 1)), done.stderr
    assert says in done.stderr


IMPORTERS = (
    ("train_gpt.py", [str(ROOT / "train_gpt.py"), "config"]),
    ("audit.py", [str(ROOT / "tools/audit.py"), "gone"]),
    ("ranks.py", [str(ROOT / "tools/ranks.py"), "1", "gone.py"]),
    ("record", ["-m", "lab.codecs", "gone"]),  # which loads the trainer
    ("sample.py", ["-m", "use.sample", "gone"]),
)


def import_torch(words, folder=None, **env):
    """Run a program that imports torch, or the stand-in for it in a folder."""
    paths = [str(folder)] if folder else []
    if words[0] == "-m":
        paths.append(str(ROOT / "tools"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | env
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)


NONSENSE = dict(TORCH_LOGS="nonsense", PYTHONSAFEPATH="1")
STAND_IN = "import os; raise ValueError(f'Invalid log settings: {os.environ[\"TORCH_LOGS\"]}')"


def named_variable(done, tool):
    """Return whether a program has ended with its one line about TORCH_LOGS."""
    (line,) = done.stderr.splitlines()
    says = f"{tool}: TORCH_LOGS: PyTorch does not import with this setting (ValueError: "
    return line.startswith(says) and "nonsense" in line and line.endswith("); change or unset it")


@pytest.mark.parametrize("tool, words", IMPORTERS, ids=lambda value: str(value)[:20])
def test_a_variable_with_which_torch_does_not_import_is_named(tool, words, tmp_path):
    """With a stand-in that fails as PyTorch does, which would take two seconds in each program."""
    (tmp_path / "torch.py").write_text(STAND_IN)
    done = import_torch(words, tmp_path, **NONSENSE)
    assert (done.returncode, done.stdout) == (2, "") and named_variable(done, tool), done.stderr


def test_pytorch_fails_as_its_stand_in_does():
    done = import_torch([str(ROOT / "train_gpt.py"), "config"], **NONSENSE)
    assert (done.returncode, done.stdout) == (2, "") and named_variable(done, "train_gpt.py"), done.stderr


@pytest.mark.slow  # together
@pytest.mark.parametrize("tool, words", IMPORTERS, ids=lambda value: str(value)[:20])
def test_torch_that_is_not_installed_is_named(tool, words, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    done = import_torch(words, tmp_path)
    remedy = "torch is not installed; run pip install -r requirements.txt, or use ./run.sh"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{tool}: {remedy}\n")


def error_of(module: str) -> Exception:
    """Return the error of a wrong number, which a module meets as it is imported."""
    with pytest.raises(ValueError) as caught:
        exec(compile("int('x')", module, "exec"), {"__name__": module})
    return caught.value


def test_a_variable_that_torch_reads_late_is_named_too(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "x")
    fault = t.known_fault(error_of("torch._inductor.config"))
    assert fault.status == 2 and str(fault).startswith("TORCHINDUCTOR_COMPILE_THREADS: ")
    assert t.known_fault(error_of("numpy")) is None


def test_the_trainer_and_the_tools_explain_such_errors_alike():
    assert inspect.getsource(t.wrong_setting) == inspect.getsource(script.wrong_setting)


# A module that a program imports while it starts, and the program. Interrupted there, it has done nothing.
STARTING = (
    ("ast", [*CLI, "record", "verify", "--quiet"]),
    ("numpy", [sys.executable, str(ROOT / "data/prepare.py"), "verify", "gone"]),
    ("numpy", [sys.executable, str(ROOT / "tools/audit.py"), "gone"]),
    ("numpy", [sys.executable, "-m", "lab.bench"]),
    ("numpy", [sys.executable, "-m", "lab.codecs"]),
    ("argparse", [sys.executable, "-m", "lab.encodings"]),
    ("numpy", [sys.executable, "-m", "lab.directions"]),
    ("argparse", [sys.executable, "-m", "lab.sweep"]),
    ("argparse", [sys.executable, "-m", "lab.wire"]),
)


@pytest.mark.parametrize("module, command", STARTING, ids=lambda value: str(value)[-30:])
def test_ctrl_c_while_a_program_starts_shows_no_traceback(module, command, tmp_path):
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tools")])
    env = os.environ | {"PYTHONPATH": path}
    if "-m" in command:  # as `command_tool` and cli.py do
        env["PYTHONSAFEPATH"] = "1"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
