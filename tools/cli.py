"""The commands of run.sh: their table, their help, and the one that a command line asks for.

run.sh finds Python, installs the requirements and hands over here, in the caller's working directory.
COMMANDS is the list of commands, each a function of commands/ or, if it only passes its words on, of this
file; `./run.sh --help` is printed from it. Notes go to stderr, so that `./run.sh config > file` stays clean.

This process never imports torch, so that help and every refusal are quick. Children of it, `cli.py --resolve`
and `cli.py --vocabulary`, ask the trainer for what only it knows (commands/ask_trainer.py). run.sh asks with
--check and --runs-attention before it installs packages.

The exit status is the program's own (128 + N after signal N), or 2 for bad input, with one line on stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports, Ctrl-C shows no traceback

if __name__ == "__main__" and getattr(sys.flags, "safe_path", False):  # PYTHONSAFEPATH leaves this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from commands.artifacts import audit, check_export, check_sample, evaluate, export, sample
from commands.ask_trainer import print_resolved, print_vocabulary
from commands.bench import bench, check_bench
from commands.machine import MACHINES, MachineDefaults, count_gpus, with_preset
from commands.programs import add_tools_to_path, run
from commands.suite import test
from commands.train import train
from commands.words import Command, Form, Option, Request, Takes, check_knobs, enter_repository, read_request
from ledger.lab_verbs import MEASURED
from script import ROOT, BadInput, describe, guard_console, leave_console, take_ctrl_c
from use.settings import DATA_KEYS, SAMPLE_KEYS


def config(request: Request) -> int:
    """Print the resolved configuration."""
    enter_repository()
    return run(["train_gpt.py", "config", *with_preset(request.knobs, count_gpus())])


DATA_VERBS = {  # with the line of help that data/prepare.py has for each
    "auto": "get FineWeb if it is reachable, else build the offline corpus; prints data_path=DIR",
    "download": "fetch published FineWeb shards from the Hugging Face hub",
    "offline": "build a corpus without a network, from installed documentation",
    "text": "turn documents into shards: .txt (separated by NUL), .jsonl, both also .zst",
    "verify": "check every byte of a dataset folder; one line per problem",
}
DATA_HELP = """\
usage: ./run.sh data VERB ...

{verbs}

./run.sh data VERB --help lists the options of a verb. It needs the packages of requirements.txt.
"""


def check_data(request: Request) -> None:
    """Raise BadInput for an unknown verb: its program needs packages, which may not be installed yet."""
    verb = request.words[:1]
    if verb and not verb[0].startswith("-") and verb[0] not in DATA_VERBS:
        raise BadInput(
            f"unknown verb {verb[0]!r} of data; choose one of {', '.join(DATA_VERBS)} (./run.sh data --help)"
        )


def data(request: Request) -> int:
    """Run a verb of data/prepare.py, in the caller's folder, or list the verbs, which needs no packages."""
    if request.words[:1] in (["-h"], ["--help"]):
        verbs = "\n".join(f"  {verb:<10}{summary}" for verb, summary in DATA_VERBS.items())
        print(DATA_HELP.format(verbs=verbs), end="", flush=True)
        return 0
    return run([str(ROOT / "data/prepare.py"), *request.words])


def is_measured(request: Request) -> bool:
    """Return whether a verb of `record` is one that measures."""
    return bool(request.words) and request.words[0] in MEASURED


def check_record(request: Request) -> None:
    """Exit if a verb of the ledger would refuse its words. Those that measure need torch to tell."""
    from ledger import record as ledger_record

    wants_help = not {"-h", "--help"}.isdisjoint(request.words)
    if not wants_help and not is_measured(request):
        ledger_record.parser().parse_args(request.words)


def record(request: Request) -> int:
    """Run a verb of the ledger, or of the lab if it measures on this machine, with torch."""
    if is_measured(request):
        verb, *words = request.words
        add_tools_to_path()
        return run(["-m", f"lab.{verb}", *words])
    from ledger import record as ledger_record

    return ledger_record.main(request.words)


def runs_attention(name: str, words: list[str]) -> bool:
    """Return whether a command runs the model's attention. run.sh asks, to install what makes it fast."""
    if name == "record":
        measures = [verb for verb, row in MEASURED.items() if row.runs_attention]
        return bool(words) and words[0] in ("reproduce", *measures)
    return COMMANDS[name].runs_attention


def watch(request: Request) -> int:
    """Show runs in progress on a page of this machine."""
    from ledger.show import watch as ledger_watch

    return ledger_watch.main(request.words)


KNOBS = "[key=value...]"  # in the help of a command
JSON = Option("--json", Takes.FILE, "FILE")
SCRIPT = Option("--script", Takes.SCRIPT, "PATH")
OUT = Option("--out", Takes.FILE, "DIR", is_needed=True)
COMMANDS = {
    "train": Command(
        train,
        forms=(
            Form(
                "",
                "Train, export the artifact, score it, draw the plot. The default command.",
                "train seed=42 run_id=first",
                last_words=KNOBS,
            ),
        ),
        files=("train_gpt.py", "tools/ledger/record.py"),
    ),
    "eval": Command(
        evaluate,
        forms=(
            Form(
                "ARTIFACT",
                "Score an artifact from its file.",
                "eval logs/first.int6.xz",
                last_words=KNOBS,
            ),
        ),
        files=("train_gpt.py",),
        needs_artifact=True,
    ),
    "audit": Command(
        audit,
        forms=(
            Form(
                "ARTIFACT",
                "Is the score legal? Nine tests of an artifact and the script that scores it.",
                "audit logs/first.int6.xz",
                options=(SCRIPT,),
                last_words=KNOBS,
            ),
        ),
        files=("train_gpt.py", "tools/audit.py"),
        needs_artifact=True,
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
        check=check_sample,
        keys=SAMPLE_KEYS,
    ),
    "export": Command(
        export,
        forms=(
            Form(
                "ARTIFACT",
                "Write the model as a folder that transformers loads.",
                "export logs/first.int6.xz --out first",
                options=(OUT,),
                last_words="[data_path=DIR]",
            ),
        ),
        files=("train_gpt.py", "tools/use/export.py"),
        needs_artifact=True,
        check=check_export,
        keys=DATA_KEYS,
    ),
    "config": Command(
        config,
        forms=(Form("", "Print the resolved configuration.", "config preset=record", last_words=KNOBS),),
        files=("train_gpt.py",),
        runs_attention=False,
    ),
    "bench": Command(
        bench,
        forms=(
            Form(
                "",
                "Time the training step and its sections.",
                "bench --json bench.json",
                options=(
                    JSON,
                    Option("--sustain", Takes.VALUE, "SECONDS"),
                    Option("--seconds", Takes.VALUE, "SECONDS"),
                    SCRIPT,
                ),
                last_words=KNOBS,
            ),
            Form(
                "",
                "Time replacements against the reference.",
                "bench --candidates tools/lab/model/plain_paths.py",
                options=(
                    Option("--candidates", Takes.FILE, "FILE.py", is_needed=True),
                    Option("--only", Takes.VALUE, "NAME,NAME"),
                    Option("--all"),
                    JSON,
                ),
                last_words=KNOBS,
            ),
            Form(
                "",
                "Measure compute, communication, and how much of it is exposed.",
                "bench --timeline t.json",
                options=(
                    Option("--timeline", Takes.FILE, "FILE.json", is_needed=True),
                    Option("--steps", Takes.VALUE, "N"),
                    JSON,
                ),
                last_words=KNOBS,
            ),
            Form(
                "",
                "Time every attention kernel on several masks.",
                "bench --attention --paths flex",
                options=(
                    Option("--attention", is_needed=True),
                    Option("--paths", Takes.VALUE, "NAME,NAME"),
                    JSON,
                ),
                last_words=KNOBS,
            ),
        ),
        files=("train_gpt.py", "tools/lab/bench.py"),
        check=check_bench,
    ),
    "data": Command(
        data,
        forms=(Form("VERB", "Get or make training data.", "data --help"),),
        files=("data/prepare.py",),
        check=check_data,
        reads_knobs=False,
        runs_attention=False,
    ),
    "record": Command(
        record,
        forms=(
            Form("VERB", "Make, check, compare and list records.", "record verify"),
            Form("sweep PLAN", "Train many configurations and compare them fairly.", "record sweep --help"),
            Form("site", "Show the whole ledger on one page.", "record site --out page", options=(OUT,)),
        ),
        files=("tools/ledger/record.py",),
        check=check_record,
        reads_knobs=False,
    ),
    "watch": Command(
        watch,
        forms=(
            Form(
                "[LOG...]", "Show runs in progress on a page, by default the newest.", "watch logs/first.txt"
            ),
        ),
        files=("tools/ledger/show/watch.py",),
        reads_knobs=False,
        runs_attention=False,
    ),
    "test": Command(
        test,
        forms=(
            Form("[pytest arguments]", "Check format and style, then run the tests.", "test -k style"),
            Form("fast", "The same with the quick tests only: under 90 seconds on two cores.", "test fast"),
            Form("stress", "The same with soak, kill and fuzz tests only.", "test stress"),
            Form("long", "The same with the few tests or files that take over 15 s.", "test long"),
        ),
        reads_knobs=False,
        runs_attention=False,
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


def gpus_of(machine: MachineDefaults, above: MachineDefaults | None) -> str:
    """Return for how many GPUs a row of MACHINES stands. above: the row for more GPUs, if there is one."""
    if above is None:
        return f"{machine.gpus} or more"
    if above.gpus - 1 > machine.gpus:
        return f"{machine.gpus} to {above.gpus - 1}"
    return f"{machine.gpus}"


def help_text() -> str:
    """Return --help, made from COMMANDS and MACHINES."""
    commands = []
    for name, command in COMMANDS.items():
        for form in command.forms:
            commands.append(
                f"  {name} {form.arguments}\n      {form.summary}\n      ./run.sh {form.example}\n"
            )

    machines = []
    for machine, above in zip(MACHINES, [None, *MACHINES]):
        gpus = gpus_of(machine, above)
        machines.append(f"  {gpus:<11}  {machine.preset:<8}  {machine.processes}")
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
        raise BadInput("the current folder is gone; change to one that exists") from None


class Called(NamedTuple):
    """A command of COMMANDS, and the words after it."""

    name: str
    words: list[str]


def split_command(argv: list[str]) -> Called:
    """Return the command of a command line, by default train. Raises BadInput if it is unknown."""
    if not argv or "=" in argv[0]:
        return Called("train", argv)
    if argv[0].startswith("-"):
        raise BadInput(f"unknown option {argv[0]!r}; ./run.sh --help lists the commands")
    if argv[0] not in COMMANDS:
        *most, last = COMMANDS
        raise BadInput(f"unknown command {argv[0]!r}; choose {', '.join(most)} or {last} (./run.sh --help)")
    return Called(argv[0], argv[1:])


QUESTIONS = {  # what run.sh or a parent process asks instead of a command; each returns the exit status
    "--resolve": print_resolved,
    "--vocabulary": lambda words: print_vocabulary(words[0], words[1:]),
    "--runs-attention": lambda words: 0 if runs_attention(*split_command(words)) else 1,
}


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
        if argv and argv[0] in QUESTIONS:
            return QUESTIONS[argv[0]](argv[1:])
        name, words = split_command(argv)
        command = COMMANDS[name]
        if command.reads_knobs and {"-h", "--help"} & set(words):
            return show_help()
        request = read_request(name, command, words)
        command.check(request)
        if only_check:
            check_knobs(command, request.knobs)
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
