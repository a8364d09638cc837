"""Measure the rows of ORTHO and STEP_RULES of train_gpt.py on this machine: time, floors, quality.

    ./run.sh record directions                                    everything but real momentum
    ./run.sh record directions preset=h100x1 data_path=DIR        and the momentum of 100 steps of training
    ./run.sh record directions --tiny                             a trial in seconds

Writes records/directions/DATE_DEVICE/: log.txt and, made from it by ledger/make/direction_tables.py,
result.json, tables.md and spectrum.png. Whatever fails is logged with its reason, and the rest goes on. On a
GPU, children compile each row into the on-disk cache while this process trains; they end before anything is
timed.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: Ctrl-C shows no traceback

from script import explain_imports

if __name__ == "__main__":
    explain_imports("record")

import argparse
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from children import child_environment, unwind_on_sigterm
from lab.shared.command_line import parse
from lab.shared.timing import is_noisy, noise_warning
from lab.update.cases import (
    Part,
    Portion,
    Setup,
    TimedCase,
    all_cases,
    calls_of,
    case_groups,
    input_sets,
    reason,
    uncompiled,
)
from lab.update.quality import Inputs, log_quality, train_momentum
from lab.update.times import log_floors, log_work, time_cases
from ledger.files import named_path, read_text, sha256_file
from ledger.make import direction_tables
from ledger.read import direction_log
from ledger.read.runlog import SEPARATOR
from ledger.run_verb import run_verb
from older_scripts import machine_names
from progress import Progress
from script import ROOT, TRAINER, BadInput, load_script

MODULE = "measured_script"  # the script's name in sys.modules
NEEDS = ("ORTHO", "STEP_RULES", "orthogonalize", "matrix_update", "StepScalars", "Optimizer")
CONSOLE_WIDTH = 200  # log lines are cut to this on the terminal
WARM_SHARE = 0.55  # of --seconds: children that still compile after it are stopped
WARM_SECONDS = 600.0  # stands in for --seconds when there is no limit

# Momentum needs gradients, not speed: no compilation (a minute), so micro-batches that fit without it.
GPU_KNOBS = ["preset=h100x1", "train_batch_tokens=65536", "micro_batch_tokens=32768"]
CPU_KNOBS = ["preset=cpu"]
TINY_KNOBS = [
    "num_layers=2", "model_dim=32", "num_heads=4", "num_kv_heads=2", "mlp_mult=3.0", "rope_dims=4",
    "xsa_last_n=1", "ve_last_n=1", "ve_dim=8", "bigram_vocab_size=64", "bigram_dim=8", "train_seq_len=32",
    "eval_seq_len=32", "eval_stride=8", "eval_batch_tokens=512", "train_batch_tokens=512",
    "micro_batch_tokens=256",
]  # fmt: skip


# ---- the script and its machine ------------------------------------------------------------------


def load_measured(path: Path) -> ModuleType:
    """Return the script whose tables are measured. Raises BadInput if it lacks a name that this tool uses."""
    return load_script(path, MODULE, NEEDS, "directions")


def script_of(args: argparse.Namespace) -> Path:
    """Return the script that --script names, else the repository's."""
    return args.script or TRAINER


def open_setup(args: argparse.Namespace, log: Callable[[str], None], progress: Progress) -> Setup:
    """Return the script, its config and its machine: a process group of one, whatever the environment."""
    t = load_measured(script_of(args))
    knobs = list(GPU_KNOBS if torch.cuda.is_available() else CPU_KNOBS)
    if args.tiny:
        knobs += TINY_KNOBS
    try:
        h = t.load_config(knobs + args.words, {})
        return Setup(t, h, t.init_machine(h, {}), log=log, tiny=args.tiny, progress=progress)
    except t.InputError as error:
        raise BadInput(str(error)) from None


# ---- children that compile -----------------------------------------------------------------------


def drop(line: str) -> None:
    """Discard a line: the log of a child process."""


@torch.no_grad()
def compile_group(s: Setup, index: int) -> None:
    """Compile a group of cases into the on-disk cache; nothing is timed."""
    for case in case_groups(all_cases(s))[index]:
        torch._dynamo.reset()
        for call in calls_of(s, case, input_sets(s, case.portion)[:1], s.m.compile)[0]:
            call()
    s.m.sync()


def warm(args: argparse.Namespace) -> int:
    """Compile the group of cases that --warm names: the work of a child process."""
    s = open_setup(args, drop, Progress("warm"))
    try:
        compile_group(s, args.warm)
    finally:
        torch.distributed.destroy_process_group()
    return 0


def start_children(s: Setup, args: argparse.Namespace) -> list[subprocess.Popen]:
    """Start a child for each group of cases on a GPU: compiling is host work, and a host has many cores."""
    if not s.cuda:
        return []
    command = [sys.executable, "-m", "lab.directions", *args.words]
    if args.tiny:
        command.append("--tiny")
    if args.script:
        command += ["--script", str(args.script)]
    env = child_environment(TORCHINDUCTOR_COMPILE_THREADS="1", OMP_NUM_THREADS="1")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    groups = len(case_groups(all_cases(s)))
    return [subprocess.Popen([*command, "--warm", str(index)], env=env, **quiet) for index in range(groups)]


def await_children(children: list[subprocess.Popen], deadline: float, progress: Progress) -> str:
    """Wait until the deadline, stop those still compiling, and return how the children ended as pairs.

    What a stopped child did not compile is compiled when it is timed.
    """
    late = 0
    failed = 0
    progress.begin("directions: compiling")
    for child in progress.each(children, "processes"):
        try:
            status = child.wait(max(1.0, deadline - time.perf_counter()))
            failed += status != 0
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            late += 1
    return f"children:{len(children)} failed:{failed} late:{late}"


# ---- the log -------------------------------------------------------------------------------------


class GrowingLog:
    """The lines of a measurement. A file holds them too as they come, and is left there by a failure."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.progress = progress
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self.progress.print(line[:CONSOLE_WIDTH])
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def device_line(s: Setup) -> str:
    """Return nvidia-smi's figures of a GPU, or the trainer's line about the processor."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        smi = s.t.machine_report(s.m)
    return f"nvidia-smi: {smi}" if s.cuda else smi


def head_lines(s: Setup, script: Path) -> list[str]:
    """Return source, versions, device and config, which a reader needs to judge the figures; no folders."""
    knobs = {}
    for key, value in sorted(dataclasses.asdict(s.h).items()):
        knobs[key] = os.path.basename(value) if isinstance(value, str) else value
    return [
        f"train_gpt.py sha256 {sha256_file(script)}",
        f"Running Python {sys.version}".replace("\n", " "),
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
        device_line(s),
        "config:",
        *(f"  {key}: {value}" for key, value in knobs.items()),
        SEPARATOR,
    ]


def fact_lines(s: Setup, script: Path) -> list[str]:
    """Return the first lines after the separator: machine, config, and the rows of both tables."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    dtype = "bfloat16" if s.cuda else "float32"
    today = time.strftime("%Y-%m-%d", time.gmtime())
    return [
        f"machine date:{today} tiny:{int(s.tiny)} torch:{torch.__version__} triton:{version} "
        f"source_sha256:{sha256_file(script)} | {machine_names(s.m)['device']}",
        f"config preset:{s.h.preset} ortho:{s.h.ortho}",
        *(f"row row:{name} dtype:{dtype}" for name in s.t.ORTHO),
        *(f"rule rule:{name}" for name in s.t.STEP_RULES),
    ]


def momentum_of(s: Setup, args: argparse.Namespace) -> list[Inputs]:
    """Train for real momentum if data is given, and log a `real` line. Raises BadInput if it is unusable."""
    given = any(word.startswith("data_path=") for word in args.words)
    if not given or args.steps <= 0:
        s.log("real | no training: give data_path=DIR and --steps")
        return []
    try:
        return train_momentum(s, args.steps)
    except s.t.InputError as error:
        raise BadInput(str(error)) from None
    except Exception as error:
        s.log(f"real | {reason(error)}")
        return []


def check_arguments_known(s: Setup) -> None:
    """Raise BadInput if an update of this script takes an argument that this tool has no value for."""
    inputs = {name: torch.zeros(1, 2, 2) for name in ("W", "g", "momentum")}
    calls_of(s, TimedCase(Part.UPDATE, Portion.ALL, s.h.ortho), [[inputs]], uncompiled)


def measure_all(s: Setup, args: argparse.Namespace) -> None:
    """Log every line after the separator. Raises BadInput, if at all, before the long part."""
    began = time.perf_counter()
    deadline = began + args.seconds if args.seconds > 0 else math.inf
    for line in fact_lines(s, script_of(args)):
        s.log(line)
    check_arguments_known(s)

    children = start_children(s, args)
    try:
        log_quality(s, momentum_of(s, args))
        log_work(s)
        ended = await_children(children, began + WARM_SHARE * (args.seconds or WARM_SECONDS), s.progress)
        s.log(f"warm {ended} after_s:{time.perf_counter() - began:.1f}")
    finally:
        for child in children:
            child.kill()
            child.wait()

    if s.cuda:
        torch.cuda.empty_cache()
    s.progress.begin("directions: floors")
    log_floors(s)
    time_cases(s, all_cases(s), deadline)
    s.log(f"done seconds:{time.perf_counter() - began:.1f}")


def measure_to_log(args: argparse.Namespace, running: Path) -> str:
    """Measure everything and return the text of the log; while it grows it is also in the file `running`."""
    with Progress("directions: opening the script") as progress:
        return measure_with(args, running, progress)


def measure_with(args: argparse.Namespace, running: Path, progress: Progress) -> str:
    """Measure everything as measure_to_log does, and tell how far it is."""
    log = GrowingLog(running, progress)
    s = open_setup(args, log, progress)
    try:
        running.parent.mkdir(parents=True, exist_ok=True)
        for line in head_lines(s, script_of(args)):
            log(line)
        measure_all(s, args)
    except BadInput:
        running.unlink(missing_ok=True)
        raise
    finally:
        torch.distributed.destroy_process_group()
    return "\n".join(log.lines) + "\n"


# ---- the folder ----------------------------------------------------------------------------------


def free_name(out: Path, name: str) -> Path:
    """Return a folder that does not exist: a second measurement of a day gets a number."""
    target = out / name
    number = 2
    while target.exists():
        target = out / f"{name}_{number}"
        number += 1
    return target


def publish(text: str, out: Path, path: Path) -> Path:
    """Make the folder of a log in `out` and return it. It gets its name when it is complete.

    path: where the log lies, for messages.
    Without matplotlib it has no picture: `--log FOLDER/log.txt` makes a complete folder elsewhere.
    """
    log = direction_log.parse(text, path)
    machine = log["machine"][0]
    name = f"{machine['date']}_{direction_log.device_slug(machine['note'])}"
    files = {
        "log.txt": text,
        "result.json": direction_tables.result_text(log),
        "tables.md": direction_tables.tables_text(log),
    }
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=out))
    try:
        folder = scratch / "folder"
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content.encode("utf-8"))
        try:
            direction_tables.plot(log, folder / "spectrum.png")
        except BadInput as error:
            print(f"directions: no spectrum.png: {error}; then --log {name}/log.txt", file=sys.stderr)
        target = free_name(out, name)
        os.rename(folder, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


# ---- the command ---------------------------------------------------------------------------------


def noisy_times(log: dict) -> list[str]:
    """Return the names of the times in a log whose medians are noisy."""
    keys = ("part", "share", "row", "rule", "mode")
    return [
        " ".join(str(row[key]) for key in keys)
        for row in log.get("time", [])
        if is_noisy(row["median_ms"], row["min_ms"])
    ]


def command(args: argparse.Namespace) -> int:
    """Measure (or read --log), write the folder and print its tables."""
    if args.warm is not None:
        return warm(args)
    out = args.out or args.root / "records" / "directions"
    running = out / f".running-{os.getpid()}.txt"
    text = read_text(args.log) if args.log else measure_to_log(args, running)
    target = publish(text, out, args.log or running)
    running.unlink(missing_ok=True)
    print(f"\n{read_text(target / 'tables.md')}\n{target}")
    if noisy := noisy_times(direction_log.parse(text)):
        print(noise_warning(noisy))
    print("next: ./run.sh record board")
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    text = "measure the directions and step rules of train_gpt.py on this machine"
    parser = argparse.ArgumentParser(prog="record directions", description=text)
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="key=value",
        help="settings of train_gpt.py; preset= gives the sizes (default: h100x1 on a GPU, else cpu), "
        "data_path= adds real momentum",
    )
    add("--steps", type=int, default=100, help="steps of training before momentum is read (default: 100)")
    add(
        "--seconds",
        type=float,
        default=145.0,
        help="start no timing after this; 0: no limit (default: 145)",
    )
    add("--tiny", action="store_true", help="small matrices: a trial of the tool")
    add("--out", type=named_path, help="folder of the results (default: records/directions)")
    add("--log", type=Path, help="measure nothing: make the folder of this log.txt")
    add("--script", type=Path, help="the train_gpt.py to measure (default: the one here)")
    add("--root", type=Path, default=ROOT, help="repository whose records/ is written (default: this one)")
    add("--warm", type=int, help=argparse.SUPPRESS)  # a child that only compiles one group
    return parser


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status."""
    args = parse(argument_parser(), argv)
    return run_verb(lambda: command(args))


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main(sys.argv[1:]))
