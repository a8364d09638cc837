"""The commands of run.sh: choose preset, data and processes for this machine, then start the right program.

run.sh finds Python, installs the requirements and hands over here, in the caller's working directory.
COMMANDS, at the end, is the list of commands; `./run.sh --help` is printed from it. Notes go to stderr, so
that `./run.sh config > file` stays clean.

This process never imports torch, so that help and every refusal are quick. A child process,
`cli.py --resolve`, asks the trainer for what only it knows: its default seed, and whether its batch divides.
For an artifact without a log another, `cli.py --vocabulary`, asks it for the size of the vocabulary.
Importing the trainer takes 2 to 4 seconds either way, but a child returns its 300 MB before training starts.

The exit status is the program's own (128 + N after signal N), or 2 for bad input, with one line on stderr.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports, Ctrl-C shows no traceback

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from children import output_of, sigterm_reaches
from script import (
    ROOT,
    TRAINER,
    BadInput,
    console_may_be_gone,
    describe,
    guard_console,
    leave_console,
    load_script,
    take_ctrl_c,
)

STARTED = time.monotonic() - int(os.environ.pop("RUN_SH_SECONDS", "0"))  # of run.sh, for the notes
TOOLS = ROOT / "tools"
PATH_KNOBS = ("data_path", "out_dir", "tokenizer_path", "resume")
DATASETS = ROOT / "data/datasets"  # where data/prepare.py puts data, unless told otherwise
GPT2 = ["--variant", "gpt2"]
# Its options for data in a vocabulary of that size
VARIANTS = {1024: [], 8192: ["--variant", "sp8192"], 50_257: GPT2, 50_304: GPT2}
GPT2_PRESETS = ("gpt2_124m", "gpt2_124m_h100x1", "optimizer_race")  # races that take that vocabulary
SHARDS_PER_PROCESS = 10  # of FineWeb, 100 M tokens and 200 MB each
RACE_SHARDS = 18  # for a race of 3,375 steps of 524,288 tokens


class Machine(NamedTuple):
    """Preset and processes of a machine with at least `gpus` NVIDIA GPUs, unless told otherwise."""

    gpus: int
    preset: str
    processes: int


# A preset fixes tokens a step and seconds; fewer processes accumulate more micro-batches for the same step.
MACHINES = (
    Machine(8, "record", 8),
    Machine(4, "record", 4),
    Machine(2, "record", 2),
    Machine(1, "h100x1", 1),
    Machine(0, "cpu", 1),
)
PROCESS_COUNTS = (8, 4, 2, 1)


def say(text: str) -> None:
    """Print a note on stderr, with the seconds since the start."""
    print(f"[run.sh {time.monotonic() - STARTED:.0f}s] {text}", file=sys.stderr, flush=True)


# ---- the command line ----------------------------------------------------------------------------


class Takes(Enum):
    """The kind of word that follows an option."""

    NOTHING = "nothing"
    VALUE = "a value"
    FILE = "a file of the caller's"
    SCRIPT = "a train_gpt.py, which must exist"


class Form(NamedTuple):
    """One way to use a command, for --help."""

    arguments: str
    summary: str
    example: str


class Request(NamedTuple):
    """The parsed words after a command. The caller's paths are rewritten to hold from the repository."""

    words: list[str]  # as they were given
    artifact: str = ""
    options: tuple[str, ...] = ()
    knobs: tuple[str, ...] = ()


class Command(NamedTuple):
    """A row of COMMANDS."""

    run: Callable[[Request], int]
    forms: tuple[Form, ...]
    files: tuple[str, ...] = ()  # that it needs
    reads_knobs: bool = True  # if not, its words go to another program as they are
    needs_artifact: bool = False
    options: Mapping[str, Takes] = MappingProxyType({})
    keys: tuple[str, ...] = ()  # of its key=value words; (): the knobs of the trainer


def from_caller(path: str) -> str:
    """Return a path of the caller's as seen from the repository, where the trainer runs."""
    caller = os.getcwd()
    return path if caller == str(ROOT) else os.path.join(caller, path)


def read_request(name: str, command: Command, words: list[str]) -> Request:
    """Check the words after a command: [ARTIFACT] [options] [key=value...]. Raises BadInput."""
    for file in command.files:
        if not (ROOT / file).is_file():
            raise BadInput(f"{file} is missing from {ROOT}: get a complete copy of the repository")
    if not command.reads_knobs:
        return Request(words)

    rest = list(words)
    artifact = ""
    if command.needs_artifact:
        artifact = read_artifact(name, rest)
    options = read_options(name, command.options, rest)
    knobs = [read_knob(word) for word in rest]

    nproc = os.environ.get("NPROC") or "1"
    if not nproc.isdecimal() or nproc.startswith("0"):
        raise BadInput(f"NPROC={nproc} is not a number of processes: give 1, 2, 4 or 8")
    return Request(words, artifact, tuple(options), tuple(knobs))


def read_artifact(name: str, rest: list[str]) -> str:
    """Take the artifact's path off the front of `rest`."""
    if not rest or not rest[0] or "=" in rest[0]:
        raise BadInput(f"{name} needs an artifact: ./run.sh {name} logs/RUN.int6.xz")
    path = rest.pop(0)
    if not os.path.isfile(path):
        raise BadInput(f"no artifact at {path}: train writes them as logs/RUN.int6.xz")
    return from_caller(path)


def read_options(name: str, known: dict[str, Takes], rest: list[str]) -> list[str]:
    """Take the options, which precede the knobs, off the front of `rest`."""
    options = []
    while rest and rest[0] in known:
        option = rest.pop(0)
        takes = known[option]
        options.append(option)
        if takes is Takes.NOTHING:
            continue

        value = rest.pop(0) if rest else ""
        if takes is Takes.SCRIPT and not os.path.isfile(value):
            raise BadInput(f"no script at {value!r}: {option} takes the path of the train_gpt.py to {name}")
        if not value:
            raise BadInput(f"{name}: {option} needs a value: ./run.sh --help shows how")
        options.append(value if takes is Takes.VALUE else from_caller(value))
    return options


def read_knob(word: str) -> str:
    """Check that a word is a key=value, and return it, a path in it as seen from the repository."""
    key, equals, value = word.partition("=")
    if not equals or not key[:1].islower():
        raise BadInput(f"{word!r} is not a knob: knobs are given as key=value, ./run.sh config lists them")
    if key in PATH_KNOBS and value and (key, value) != ("resume", "auto"):
        value = from_caller(value)
    return f"{key}={value}"


def check_keys(name: str, knobs: tuple[str, ...]) -> None:
    """Raise BadInput for a key=value word of which the command `name` does not know the key."""
    known = COMMANDS[name].keys or (trainer_keys() if knobs else ())
    for word in knobs:
        key = word.partition("=")[0]
        if known and key not in known:
            listed = ", ".join(COMMANDS[name].keys) or "./run.sh config lists them"
            raise BadInput(f"unknown config key {key!r}: {listed}")


def trainer_keys() -> set[str]:
    """Return the knobs of the trainer, from its source: torch may not be installed yet."""
    tree = ast.parse(TRAINER.read_text(encoding="utf-8"))
    return {
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }


def knob_value(key: str, knobs: tuple[str, ...]) -> str:
    """Return a knob's value from key=value or else from the environment, "" if neither gives it."""
    for word in reversed(knobs):
        if word.startswith(f"{key}="):
            return word.partition("=")[2]
    return os.environ.get(key.upper(), "")


def enter_repository() -> None:
    """Change to the repository. Paths that the environment gives relative to the caller still hold there."""
    for key in PATH_KNOBS:
        value = os.environ.get(key.upper(), "")
        if value and (key, value) != ("resume", "auto"):
            os.environ[key.upper()] = from_caller(value)
    os.chdir(ROOT)


# ---- the machine ---------------------------------------------------------------------------------


def count_gpus() -> int:
    """Return how many NVIDIA GPUs torch will see, asking nvidia-smi and CUDA_VISIBLE_DEVICES."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return 0
    count = 0
    if found.returncode == 0:
        count = sum(line.startswith("GPU ") for line in found.stdout.splitlines())

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    if visible.startswith("-1"):
        return 0
    return min(count, sum(bool(name) for name in visible.split(",")))


def machine_preset(gpus: int) -> str:
    """Return the preset of a machine with this many GPUs."""
    return next(machine.preset for machine in MACHINES if gpus >= machine.gpus)


def choose_processes(gpus: int, sharing: Sequence[int]) -> int | None:
    """Return how many processes torchrun should start, or None for one plain process without a GPU.

    sharing: the numbers of processes that can share the work. NPROC, if set, is taken as it is.
    """
    nproc = int(os.environ.get("NPROC") or 0)
    if gpus == 0 and nproc <= 1:
        return None
    return nproc or max((count for count in sharing if count <= gpus), default=1)


class Resolved(NamedTuple):
    """A run's knobs as the trainer resolves them."""

    seed: int
    out_dir: str
    run_id: str
    resume: str
    codec: str  # ends the artifact's name
    matrix_lr: float
    target_loss: float  # of a race; 0: the run is none
    sharing: list[int]  # those of PROCESS_COUNTS that divide its batch


def resolve(knobs: list[str]) -> Resolved:
    """Ask the trainer's load_config and cut_batch in a child process. Exits if they refuse the knobs."""
    command = [sys.executable, str(TOOLS / "cli.py"), "--resolve", *knobs]
    answer = output_of(command)
    if answer.returncode != 0:
        raise SystemExit(answer.returncode)  # its one line is on the terminal
    return Resolved(**json.loads(answer.stdout))


def print_resolved(knobs: list[str]) -> int:
    """Print a Resolved as JSON: the child's side of `resolve`."""
    trainer = load_script(
        TRAINER, "trainer", ("InputError", "load_config", "cut_batch", "plain_name"), "train"
    )
    try:
        h = trainer.load_config(knobs, os.environ)
        if h.run_id:
            trainer.plain_name("run_id", h.run_id)
        if (os.environ.get("NPROC") or "1") != "1":
            trainer.cut_batch(h, int(os.environ["NPROC"]))
    except trainer.InputError as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2

    sharing = []
    for count in PROCESS_COUNTS:
        try:
            trainer.cut_batch(h, count)
        except trainer.InputError:
            continue
        sharing.append(count)
    known = {name: getattr(h, name) for name in Resolved._fields if name != "sharing"}
    print(json.dumps(known | {"sharing": sharing}))
    return 0


# ---- other programs ------------------------------------------------------------------------------


def run(program: list[str]) -> int:
    """Run a Python program in this terminal and return its exit status, 128 + N if signal N ended it.

    The program keeps the terminal as its own, with no pipe in between, so that its status line stays live.
    Ctrl-C reaches it from the terminal; it decides how to end while this process waits. SIGTERM is passed on.
    """
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    child = subprocess.Popen([sys.executable, *program])
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    status = child.wait()

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status


def launch(processes: int | None, program: list[str]) -> int:
    """Run a program of the repository on several processes, or as plain python if None."""
    if processes is not None:
        program = ["tools/ranks.py", str(processes), *program]
    say("running: " + " ".join([sys.executable, *program]))
    return run(program)


def add_tools_to_path() -> None:
    """Let `python -m lab.X` and `python -m ledger.X` find their packages, and not the caller's."""
    paths = [str(TOOLS), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["PYTHONSAFEPATH"] = "1"  # from Python 3.11 on, -m then ignores modules in the working folder


def find_data(*options: str) -> str:
    """Run `data/prepare.py auto`, showing its output on stderr, and return the folder it found or made."""
    say(" ".join(["no data_path given: data/prepare.py auto", *options]))
    command = [sys.executable, "data/prepare.py", "auto", *options]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as auto, sigterm_reaches(auto):
        for line in auto.stdout:
            last = line.decode(errors="replace").rstrip("\n")
            print(last, file=sys.stderr, flush=True)

    if auto.returncode != 0:
        raise BadInput("data/prepare.py auto found no data (message above): give data_path=DIR")
    key, _, folder = last.partition("=")
    if key != "data_path" or not folder:
        raise BadInput(
            f"data/prepare.py auto did not end with data_path=DIR but with {last!r}: give data_path=DIR"
        )
    return folder


# ---- train ---------------------------------------------------------------------------------------


def is_for_a_laptop(preset: str) -> bool:
    """Return whether a preset trains on the CPU, whatever GPUs there are."""
    return preset.startswith("cpu")


def variant_options(preset: str, knobs: Sequence[str]) -> list[str]:
    """Return the options of data/prepare.py for the vocabulary that the knobs set, else for the preset's."""
    vocab_size = knob_value("vocab_size", tuple(knobs))
    if vocab_size:
        return VARIANTS.get(int(vocab_size), []) if vocab_size.isdecimal() else []
    if preset in GPT2_PRESETS:
        return GPT2
    return VARIANTS[8192] if preset.endswith("sp8192") else []


def find_training_data(preset: str, knobs: Sequence[str], processes: int | None) -> str:
    """Return a data folder that suits the preset, with enough FineWeb that no token is seen twice."""
    variant = variant_options(preset, knobs)
    if is_for_a_laptop(preset):
        return find_data(*variant)
    shards = SHARDS_PER_PROCESS * min(processes or 1, MACHINES[0].processes)
    if preset in GPT2_PRESETS:
        shards = RACE_SHARDS
    return find_data(*variant, "--train-shards", str(shards))


def count_scores(log: str) -> int:
    """Count the final_score lines of a log with the ledger's reader; 0 if there is no log."""
    from ledger.read import runlog

    try:
        return runlog.parse_log(Path(log)).final_scores
    except BadInput:
        return 0


def draw_plot(log: str) -> str:
    """Draw the loss curve of a log and return the picture's path, or why there is none.

    In a child process: whatever happens to matplotlib, the run keeps its exit status.
    """
    add_tools_to_path()
    command = [sys.executable, "-m", "ledger.record", "plot", log]
    drawn = output_of(command)
    if drawn.returncode != 0 or not drawn.stdout:
        return "none (./run.sh record plot failed, message above)"
    return drawn.stdout.splitlines()[-1].removeprefix("plot: ")


def report_failure(log: str, artifact: str) -> None:
    """Print what there is of a run without a score."""
    plot = draw_plot(log)
    print("\nscore: none (the log of this run has no final_score line)")
    found = artifact if os.path.exists(artifact) else f"none at {artifact} (the trainer's lines say why)"
    print(f"artifact: {found}")
    print(f"log: {log}")
    print(f"plot: {plot}", flush=True)


def show_writing(artifact: str, knobs: Sequence[str]) -> None:
    """Show how the model goes on with three held-out texts. If it cannot, a line on stderr says why."""
    print("\nwhat it writes, beside what the held-out text says:", flush=True)
    data = [word for word in knobs if word.startswith(("data_path=", "tokenizer_path="))]
    add_tools_to_path()
    run(["-m", "use.sample", artifact, "held_out=3", "tokens=40", *data])
    print(flush=True)


def report(log: str, artifact: str, knobs: Sequence[str], nexts: Sequence[NextCommand]) -> None:
    """Print what the model writes, the plot, a summary, the place on the board and commands to try.

    The trainer has printed the rest.
    """
    from ledger.read import runlog
    from ledger.show import standing, summary

    plot = draw_plot(log)
    if os.path.exists(artifact):  # a race may make none
        show_writing(artifact, knobs)
    print(f"plot: {plot}")
    run_log = runlog.parse_log(Path(log))
    for line in summary.summarize(run_log):
        print(line)
    compared = standing.compare_with_board(run_log, ROOT / "records")
    if compared:
        print(f"board: {compared}")
    if nexts:
        print("next:")
    for question, command in nexts:
        print(f"  {question:<26}{command}")
    sys.stdout.flush()


class NextCommand(NamedTuple):
    """A command to try after a run, as the caller would type it, and the question that it answers."""

    question: str
    command: str


TRY_SEEDS = (1337, 42)


def next_commands(knobs: Sequence[str], resolved: Resolved, artifact: str, run_sh: str) -> list[NextCommand]:
    """Return what to try after a run with these knobs, preset and data_path among them."""
    nproc = os.environ.get("NPROC")
    prefix = f"NPROC={nproc} " if nproc else ""

    def typed(*words: str) -> str:
        return prefix + shlex.join([run_sh, *words])

    def train_with(word: str) -> str:
        replaced = (word.partition("=")[0] + "=", "run_id=", "resume=")
        return typed("train", *[given for given in knobs if not given.startswith(replaced)], word)

    if resolved.target_loss:
        judge = typed("record", "target", os.path.dirname(artifact), "--loss", f"{resolved.target_loss:g}")
        return [
            NextCommand("the next run of the race?", train_with(f"seed={resolved.seed + 1}")),
            NextCommand("is the target reached?", judge),
        ]
    scoring = [word for word in knobs if word.startswith(("preset=", "data_path=", "tokenizer_path="))]
    other_seed = next(number for number in TRY_SEEDS if number != resolved.seed)
    return [
        NextCommand("is the score legal?", typed("audit", artifact, *scoring)),
        NextCommand("how much is chance?", train_with(f"seed={other_seed}")),
        NextCommand("what does a knob change?", train_with(f"matrix_lr={2 * resolved.matrix_lr:g}")),
    ]


def read_reason(log: str, start: int) -> str:
    """Return why the first rank failed, from the log after its first `start` bytes; "" if it does not say."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    first = next((i for i, line in enumerate(lines) if re.match(r"rank \d+: ", line)), None)
    if first is None:
        return ""
    rank, _, reason = lines[first].partition(": ")
    if reason.startswith("Traceback"):
        ends = (line for line in lines[first + 1 :] if line and not line.startswith(" "))
        reason = next(ends, reason)
    if any(f"{rank}: another rank is gone" in line for line in lines):
        return "a rank was killed without a word (no memory left?)"
    return f"{rank}: {reason}"


def train(request: Request) -> int:
    """Train what this machine can, then show the plot, the board's best and what to try next."""
    caller = os.getcwd()
    enter_repository()
    gpus = count_gpus()
    preset = knob_value("preset", request.knobs) or machine_preset(gpus)
    resolved = resolve([f"preset={preset}", *request.knobs])
    stamp = time.strftime("%Y%m%d_%H%M%S", time.gmtime())
    run_id = resolved.run_id or f"{stamp}_{preset}_seed{resolved.seed}"
    log = os.path.join(resolved.out_dir, f"{run_id}.txt")
    artifact = os.path.join(resolved.out_dir, f"{run_id}.int6.{resolved.codec}")
    if not resolved.resume and (os.path.exists(log) or os.path.exists(artifact)):
        unfinished = os.path.exists(log) and not count_scores(log)
        state = ", a run that did not finish" if unfinished else ""
        raise BadInput(
            f"run_id={run_id} is taken ({resolved.out_dir}/{run_id}.* exists{state}): choose another run_id, "
            "go on with resume=auto, or move those files"
        )

    processes = choose_processes(0 if is_for_a_laptop(preset) else gpus, resolved.sharing)
    data_path = knob_value("data_path", request.knobs)
    if not data_path:
        data_path = find_training_data(preset, request.knobs, processes)
    chosen = [f"preset={preset}", f"data_path={data_path}", f"run_id={run_id}"]
    others = [word for word in request.knobs if not word.startswith(("preset=", "data_path=", "run_id="))]
    earlier = count_scores(log)  # a run that resumes may find the score of another there
    size = os.path.getsize(log) if os.path.exists(log) else 0
    say(f"{gpus} NVIDIA GPU(s), preset {preset}, log {log}")
    status = launch(processes, ["train_gpt.py", "train", *chosen, *others])
    if not os.path.exists(log):
        ended = "was interrupted" if status == 128 + signal.SIGINT else f"ended with status {status}"
        say(f"the trainer {ended} and left no log at {log}")
        return status or 1

    scored = count_scores(log) != earlier
    if scored:
        folder = "" if caller == str(ROOT) else str(ROOT)  # what paths of the repository need in front
        knobs = [f"preset={preset}", f"data_path={os.path.join(folder, data_path)}", *others]
        run_sh = os.path.join(folder or ".", "run.sh")
        nexts = next_commands(knobs, resolved, os.path.join(folder, artifact), run_sh)
        with console_may_be_gone():
            report(log, artifact, [f"data_path={data_path}", *others], [] if status else nexts)
    else:
        with console_may_be_gone():
            report_failure(log, artifact)
    reason = read_reason(log, size) if status else ""
    if status or not scored:
        say(f"the trainer's exit status is {status}" + (f": {reason}" if reason else ""))
    return status


# ---- the other commands --------------------------------------------------------------------------


def with_preset(knobs: tuple[str, ...], gpus: int) -> list[str]:
    """Return the knobs with this machine's preset first, unless one is given."""
    if knob_value("preset", knobs):
        return list(knobs)
    return [f"preset={machine_preset(gpus)}", *knobs]


def trained_on(artifact: str) -> list[str]:
    """Return the knobs of the data that an artifact was trained on: its log, if it lies beside it, has them.

    Returns [] if the log or the data is elsewhere.
    """
    from ledger.read import runlog

    log = re.sub(r"\.int6\.\w+$", ".txt", artifact)
    try:
        config = runlog.parse_log(Path(log)).config
    except BadInput:
        return []
    if not os.path.isdir(config.get("data_path", "")):
        return []
    say(f"data_path={config['data_path']}, as in {log}")
    return [f"{key}={config[key]}" for key in ("data_path", "tokenizer_path") if config.get(key)]


def vocabulary_of(artifact: str) -> int:
    """Ask the trainer in a child process how many tokens an artifact knows. Exits if it is damaged."""
    answer = output_of([sys.executable, str(TOOLS / "cli.py"), "--vocabulary", artifact])
    if answer.returncode != 0:
        raise SystemExit(answer.returncode)  # its one line is on the terminal
    return int(answer.stdout)


def print_vocabulary(artifact: str) -> int:
    """Print the size of an artifact's vocabulary: the child's side of `vocabulary_of`."""
    trainer = load_script(TRAINER, "trainer", ("open_artifact",), "score")
    try:
        header, _ = trainer.open_artifact(Path(artifact).read_bytes())
    except ValueError as error:
        raise BadInput(f"{artifact}: {error}") from None
    print(header["config"].get("vocab_size"))
    return 0


def data_in_vocabulary(vocab_size: int) -> str:
    """Return a folder of data in a vocabulary of that size, found or made. Raises BadInput if there is none.

    FineWeb and the offline text have one of the sizes of VARIANTS. Any other is looked for in data/datasets.
    """
    if vocab_size in VARIANTS:
        return find_data(*VARIANTS[vocab_size])
    for manifest in sorted(DATASETS.glob("*/manifest.json")):
        try:
            found = json.loads(manifest.read_bytes())["tokenizer"]["vocab_size"]
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            continue  # `data verify` says what is wrong with it
        if found == vocab_size:
            folder = str(manifest.parent.relative_to(ROOT))
            say(f"data_path={folder}, which has the vocabulary of the artifact")
            return folder
    raise BadInput(
        f"no data in {DATASETS.relative_to(ROOT)} has the artifact's vocabulary of {vocab_size} tokens: give "
        "data_path=DIR, or make such data with ./run.sh data text --tokenizer FILE"
    )


def data_of(artifact: str) -> list[str]:
    """Return the knobs of the data that an artifact was trained on, or of data in its vocabulary."""
    return trained_on(artifact) or [f"data_path={data_in_vocabulary(vocabulary_of(artifact))}"]


def score(program: list[str], request: Request) -> int:
    """Run eval or audit on the data that is given or found, with a process on each of 1, 2, 4 or 8 GPUs."""
    enter_repository()
    gpus = count_gpus()
    knobs = with_preset(request.knobs, gpus)
    if not knob_value("data_path", request.knobs):
        knobs = [*data_of(request.artifact), *knobs]
    processes = choose_processes(gpus, PROCESS_COUNTS)
    return launch(processes, [*program, request.artifact, *request.options, *knobs])


def evaluate(request: Request) -> int:
    """Score an artifact."""
    return score(["train_gpt.py", "eval"], request)


def audit(request: Request) -> int:
    """Audit an artifact and the script that scores it."""
    return score(["tools/audit.py"], request)


def use(tool: str, request: Request) -> int:
    """Run a tool of tools/use on an artifact, with the tokenizer of the data that is given or found."""
    enter_repository()
    keys = ("data_path", "tokenizer_path")
    given = {key: knob_value(key, request.knobs) for key in keys}
    data = [f"{key}={value}" for key, value in given.items() if value] or data_of(request.artifact)
    others = [word for word in request.knobs if word.partition("=")[0] not in keys]
    add_tools_to_path()
    return run(["-m", f"use.{tool}", request.artifact, *request.options, *data, *others])


def sample(request: Request) -> int:
    """Show what an artifact writes."""
    return use("sample", request)


def export(request: Request) -> int:
    """Write a folder that transformers loads."""
    return use("export", request)


def config(request: Request) -> int:
    """Print the resolved configuration."""
    enter_repository()
    return run(["train_gpt.py", "config", *with_preset(request.knobs, count_gpus())])


def bench_reads_data(options: Sequence[str]) -> bool:
    """Return whether a bench with these options times the loader, which needs shards."""
    only_candidates = "--candidates" in options and "--all" not in options
    return not (only_candidates or "--attention" in options or "--timeline" in options)


def bench(request: Request) -> int:
    """Time this machine with one process, or with NPROC of them, on the data that train would take."""
    enter_repository()
    knobs = with_preset(request.knobs, count_gpus())
    processes = int(os.environ.get("NPROC") or 1)
    if bench_reads_data(request.options) and not knob_value("data_path", request.knobs):
        preset = knob_value("preset", tuple(knobs))
        knobs = [f"data_path={find_training_data(preset, knobs, processes)}", *knobs]
    add_tools_to_path()  # only now: data/prepare.py finds its own modules where PYTHONSAFEPATH is not set
    program = ["-m", "lab.bench", *request.options, *knobs]
    if processes == 1:
        return run(program)
    return launch(processes, program)


def data(request: Request) -> int:
    """Run a verb of data/prepare.py, in the caller's folder."""
    return run([str(ROOT / "data/prepare.py"), *request.words])


MEASURED = ("codecs", "directions", "encodings", "sweep", "wire")


def record(request: Request) -> int:
    """Run a verb of the ledger, or of the lab if it measures on this machine, with torch."""
    if request.words[:1] and request.words[0] in MEASURED:
        verb, *words = request.words
        add_tools_to_path()
        return run(["-m", f"lab.{verb}", *words])
    from ledger import record as ledger_record

    return ledger_record.main(request.words)


# `./run.sh test fast` ends in under 90 s on two idle cores. `./run.sh test --durations=0` lists the seconds
# of each test; those over ten are marked slow.
FAST = (
    *("-m", "not slow and not gpu"),
    *("tests/cli", "tests/data", "tests/ledger"),
    *("--ignore=tests/cli/test_reasons.py", "--ignore=tests/cli/test_signals.py"),  # they start many programs
    "tests/audit/test_audit_honest.py::test_nine_tests_pass_on_an_honest_run",
    "tests/trainer/test_artifact.py",
    "tests/trainer/test_bytes.py",
    "tests/trainer/test_config.py",
    "tests/trainer/test_directions.py",
    "tests/trainer/test_masks.py",
    "tests/trainer/test_model.py",
    "tests/trainer/test_style.py",
    "tests/trainer/test_tokens.py",
    "tests/trainer/test_windows.py",
)
STRESS = ("tests/stress",)
MOST = ("-m", "not long")  # without arguments; about ten minutes on two cores
LONG = ("-m", "long")  # the few that take over 20 s each


def test(request: Request) -> int:
    """Check format and style, then run tests: two files at a time, a file's tests in one process."""
    os.chdir(ROOT)
    words = request.words
    selections = {"fast": FAST, "stress": STRESS, "long": LONG}
    if not words:
        words = [*MOST]
    elif words[0] in selections:
        words = [*selections[words[0]], *words[1:]]

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tests = ["-m", "pytest", "-n", "auto", "--maxprocesses", "2", "--dist", "loadfile"]
    format_status = run(["-m", "ruff", "format", "--quiet", "--check", "."])
    style_status = run(["-m", "ruff", "check", "--quiet", "."])
    tests_status = run([*tests, *words])
    if format_status != 0:
        say("ruff would format some files otherwise: .venv/bin/ruff format")
    if style_status != 0:
        say("ruff found faults (listed above the tests): .venv/bin/ruff check")
    return tests_status or format_status or style_status


COMMANDS = {
    "train": Command(
        train,
        forms=(
            Form(
                "[key=value...]",
                "Train, export the artifact, score it, draw the plot. The default command.",
                "train seed=42 run_id=first",
            ),
        ),
        files=("train_gpt.py", "tools/ledger/record.py"),
    ),
    "eval": Command(
        evaluate,
        forms=(
            Form("ARTIFACT [key=value...]", "Score an artifact from its file.", "eval logs/first.int6.xz"),
        ),
        files=("train_gpt.py",),
        needs_artifact=True,
    ),
    "audit": Command(
        audit,
        forms=(
            Form(
                "ARTIFACT [--script PATH] [key=value...]",
                "Is the score legal? Nine tests of an artifact and the script that scores it.",
                "audit logs/first.int6.xz",
            ),
        ),
        files=("train_gpt.py", "tools/audit.py"),
        needs_artifact=True,
        options={"--script": Takes.SCRIPT},
    ),
    "sample": Command(
        sample,
        forms=(
            Form(
                "ARTIFACT [prompt=TEXT] [tokens=N] [temperature=T] [top_k=K] [seed=N]",
                "Show the text that an artifact writes.",
                'sample logs/first.int6.xz prompt="The river"',
            ),
            Form(
                "ARTIFACT held_out=N [...]",
                "Go on with N held-out texts, and show how they really go on.",
                "sample logs/first.int6.xz held_out=3 tokens=40",
            ),
        ),
        files=("train_gpt.py", "tools/use/sample.py"),
        needs_artifact=True,
        keys=("prompt", "tokens", "temperature", "top_k", "seed", "held_out", "data_path", "tokenizer_path"),
    ),
    "export": Command(
        export,
        forms=(
            Form(
                "ARTIFACT --out DIR [data_path=DIR]",
                "Write the model as a folder that transformers loads.",
                "export logs/first.int6.xz --out first",
            ),
        ),
        files=("train_gpt.py", "tools/use/export.py"),
        needs_artifact=True,
        options={"--out": Takes.FILE},
        keys=("data_path", "tokenizer_path"),
    ),
    "config": Command(
        config,
        forms=(Form("[key=value...]", "Print the resolved configuration.", "config preset=record"),),
        files=("train_gpt.py",),
    ),
    "bench": Command(
        bench,
        forms=(
            Form(
                "[--json FILE] [--sustain SECONDS] [--seconds SECONDS] [--script PATH] [key=value...]",
                "Time the training step and its sections.",
                "bench --json bench.json",
            ),
            Form(
                "--candidates FILE.py [--only NAME,NAME] [--all] [--json FILE] [key=value...]",
                "Time replacements against the reference.",
                "bench --candidates tools/lab/model/plain_paths.py",
            ),
            Form(
                "--timeline FILE.json [--steps N] [--json FILE] [key=value...]",
                "Measure compute, communication, and how much of it is exposed.",
                "bench --timeline t.json",
            ),
            Form(
                "--attention [--paths NAME,NAME] [--json FILE] [key=value...]",
                "Time every attention kernel on several masks.",
                "bench --attention --paths flex",
            ),
        ),
        files=("train_gpt.py", "tools/lab/bench.py"),
        options={
            "--attention": Takes.NOTHING,
            "--all": Takes.NOTHING,
            "--json": Takes.FILE,
            "--candidates": Takes.FILE,
            "--timeline": Takes.FILE,
            "--script": Takes.SCRIPT,
            "--only": Takes.VALUE,
            "--paths": Takes.VALUE,
            "--seconds": Takes.VALUE,
            "--steps": Takes.VALUE,
            "--sustain": Takes.VALUE,
        },
    ),
    "data": Command(
        data,
        forms=(Form("VERB", "Get or make training data.", "data --help"),),
        files=("data/prepare.py",),
        reads_knobs=False,
    ),
    "record": Command(
        record,
        forms=(
            Form("VERB", "Make, check, compare and list records.", "record verify"),
            Form("sweep PLAN", "Train many configurations and compare them fairly.", "record sweep --help"),
        ),
        files=("tools/ledger/record.py",),
        reads_knobs=False,
    ),
    "test": Command(
        test,
        forms=(
            Form("[pytest arguments]", "Check format and style, then run the tests.", "test -k style"),
            Form("fast", "The same with the quick tests only: under 90 seconds on two cores.", "test fast"),
            Form("stress", "The same with soak, kill and fuzz tests only.", "test stress"),
            Form("long", "The same with the few tests that take over 20 seconds each.", "test long"),
        ),
        reads_knobs=False,
    ),
}


# ---- help and main -------------------------------------------------------------------------------

HELP = """\
usage: ./run.sh [COMMAND] [ARGUMENTS]          works from any directory
       ./run.sh                                trains what suits this machine, on data that it finds

{commands}
The first use makes .venv and installs requirements.txt into it (once: again only when that file changes), and
requirements-flash4.txt where a GPU is a Hopper or later.

Unless told otherwise, the number of NVIDIA GPUs chooses preset and processes:
  GPUs         preset    processes
{machines}
A preset fixes tokens a step and seconds; fewer processes accumulate more micro-batches for the same step.
With preset= given, train takes the largest of 8, 4, 2 and 1 processes that have a GPU each and divide its
batch. eval and audit take as many as have a GPU each, bench takes one. NPROC overrides.
  data_path=   else what `data/prepare.py auto` finds or makes; eval, audit: first the data of the log beside
               the artifact, then data in its vocabulary
  run_id=      else time, preset and seed; names the log and the artifact in out_dir= (logs)
Any key=value may also be an environment variable in capitals: SEED=42 ./run.sh

environment: NPROC            number of processes for train, eval, audit and bench
             PYTHON           interpreter that makes .venv (3.10 to 3.14); no other is tried
             BANKSHOT_PYTHON  interpreter to use as it is, with the packages: no .venv, nothing is installed
A .venv that run.sh did not make is never deleted.
"""


def help_text() -> str:
    """Return --help, made from COMMANDS and MACHINES."""
    commands = []
    for name, command in COMMANDS.items():
        for form in command.forms:
            commands.append(
                f"  {name} {form.arguments}\n      {form.summary}\n      ./run.sh {form.example}\n"
            )

    machines = []
    upper = None  # of the row before, which is for more GPUs
    for machine in MACHINES:
        gpus = f"{machine.gpus}"
        if upper is None:
            gpus += " or more"
        elif upper > machine.gpus:
            gpus += f" to {upper}"
        machines.append(f"  {gpus:<11}  {machine.preset:<8}  {machine.processes}")
        upper = machine.gpus - 1
    return HELP.format(commands="".join(commands), machines="\n".join(reversed(machines)))


def show_help() -> int:
    """Print the help and return exit status 0."""
    print(help_text(), end="", flush=True)
    return 0


def check_folder() -> None:
    """Raise BadInput if the caller's folder has been removed: paths cannot be read from there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise BadInput("the current folder is gone: change to one that exists") from None


def split_command(argv: list[str]) -> tuple[str, list[str]]:
    """Return the command, by default train, and the words after it. Raises BadInput if it is unknown."""
    if not argv or "=" in argv[0]:
        return "train", argv
    if argv[0].startswith("-"):
        raise BadInput(f"unknown option {argv[0]!r}: ./run.sh --help lists the commands")
    if argv[0] not in COMMANDS:
        *most, last = COMMANDS
        raise BadInput(f"unknown command {argv[0]!r}: {', '.join(most)} or {last} (./run.sh --help)")
    return argv[0], argv[1:]


def main(argv: list[str]) -> int:
    """Run a command line of run.sh and return the exit status. After --check, only read it."""
    guard_console()
    take_ctrl_c()
    only_check = argv[:1] == ["--check"]
    if only_check:
        argv = argv[1:]
    try:
        if argv[:1] in (["-h"], ["--help"], ["help"]):
            return show_help()
        check_folder()
        if argv[:1] == ["--resolve"]:
            return print_resolved(argv[1:])
        if argv[:1] == ["--vocabulary"]:
            return print_vocabulary(argv[1])
        name, words = split_command(argv)
        command = COMMANDS[name]
        if command.reads_knobs and {"-h", "--help"} & set(words):
            return show_help()
        request = read_request(name, command, words)
        if only_check:
            check_keys(name, request.knobs)
            return 0
        return command.run(request)
    except BadInput as error:
        print(f"run.sh: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            print(f"run.sh: {describe(error)}", file=sys.stderr, flush=True)
        if error.filename is None:
            leave_console()
        return 2
    except KeyboardInterrupt:
        print("\nrun.sh: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
