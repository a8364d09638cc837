"""Times a training step and every section of the model on this machine, against what the hardware allows.

    ./run.sh bench [--json FILE] [key=value ...]                     or: python train_gpt.py bench ...
    ./run.sh bench --sustain 30 [key=value ...]                      steps on a card as warm as in training
    ./run.sh bench --candidates FILE.py [--only NAME,NAME] [--all]   replacements of the model's functions
    NPROC=8 ./run.sh bench --timeline FILE.json                      how much communication is exposed
    ./run.sh bench --attention [--paths flash,flex]                  every attention kernel of this machine
    PYTHONPATH=tools python -m lab.bench --script PATH ...           another train_gpt.py
    PYTHONPATH=tools torchrun --nproc_per_node=8 -m lab.bench --timeline FILE.json

Columns. ms: median of one call; x: calls in a pass of the model; MB: the least that any implementation must
read and write, each input and output once; GFLOP: 2mkn for each matrix product; floor: the larger of MB over
the copy bandwidth and GFLOP over the rate of that product's shape, both measured in this run; %: floor / ms.
Backward is forward + backward less forward. On a GPU a section is a CUDA graph of several calls, on fresh
inputs where they would fit the L2 cache, so that launches by the host do not count. `zero gradients` is also
a part of `optimizer`; `loader.build` runs in a thread beside the step.

Medians come from bursts, in which a card that the power cap slows down within seconds is still cool. Compare
training's step_avg with the sustained lines instead. They run its loop for 8 s (--sustain S; on a CPU only
with that option), in blocks that alternate between steps on one fixed batch (train_step, ema.update) and
steps with all that training does (batch, step, average, loss and norm fetched a step late, clock, log line),
the host running ahead as it does there. ms/step is the mean of the later half, from the end of one step to
the end of the next, without the first step of each block. The difference is the cost of loader, log and clock
that the device does not hide. Next to it is the time from the end of a step to the first pass of the next,
which no change of the clock rate blurs. nvidia-smi reads the clocks meanwhile.

If a median is three times the least of its times or more, something else ran: the last line names them.

With --candidates only these are compared, and each line is printed when it is known; --all measures the rest,
too. FILE.py defines CANDIDATES = {name: (path, function)}. The path names what to replace in a copy of
train_gpt.py (mlp, exclude_self, qk_heads, GPT.nats, ...), the function has the same signature, and a
list of such pairs may stand in place of one. While the file is loaded, `t` is that copy, still plain: a
function that calls the one it replaces keeps it under a name of its own (plain = t.mlp). Errors are relative
to float64, |x - x64| / |x64|: of the loss, of all gradients together and of the parameter with the worst.

Exit status: 0 measured (what failed is listed as skipped); 2 bad input (one line names it).
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: Ctrl-C shows no traceback

from script import explain_imports

if __name__ == "__main__":
    explain_imports("bench.py")

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from lab.model import attention
from lab.model.candidates import chosen_names, compare
from lab.model.floors import measure_sections
from lab.model.kernels import profile
from lab.shared.bench_options import SUSTAIN, read_options
from lab.shared.timing import say_noise
from lab.shared.trainer import (
    TOOL,
    Session,
    TrainingParts,
    build_trained,
    known_errors_of,
    load_trainer,
    open_session,
)
from lab.step import timeline
from lab.step.parts import time_loader, time_step
from lab.step.sustained import measure_sustained
from ledger.files import sha256_file, write_atomic
from progress import Progress
from script import BadInput, guard_console, refuse

# ---- measuring -----------------------------------------------------------------------------------


def attempt(s: Session, what: str, measure: Callable[..., None], *args: Any) -> None:
    """Measure something; if it raises, whatever a driver or compiler raises, report it as skipped."""
    try:
        measure(s, *args)
    except Exception as error:
        s.skip(what, error)


def measure_steps(s: Session, run: TrainingParts, sustain: float | None) -> Session:
    """Measure the parts of a step, the loader and sustained steps. sustain: seconds; None: by the device.

    Returns the session with its deadline later by the time that the sustained steps took.
    """
    time_step(s, run)
    loader = time_loader(s)
    begun = time.perf_counter()
    if sustain is None and not s.cuda:
        s.skip("sustained steps", "a CPU runs them only with --sustain SECONDS")
    elif sustain != 0:
        seconds = SUSTAIN if sustain is None else sustain
        attempt(s, "sustained steps", measure_sustained, run, loader, seconds)
    return s._replace(deadline=s.deadline + time.perf_counter() - begun)


def run_bench(args: argparse.Namespace, env: Mapping[str, str], progress: Progress) -> int:
    """Measure this machine with the script. Returns the exit status."""
    started = time.perf_counter()
    t = load_trainer(args.script)
    names = chosen_names(args.candidates, args.only, t) if args.candidates else []
    with known_errors_of(t):
        s = open_session(t, args.knobs, env, progress)._replace(deadline=started + args.seconds)
        s.report.update(
            torch=torch.__version__,
            script_sha256=sha256_file(args.script),
            accum=s.accum,
            whole=[],
            sections=[],
            candidates=[],
        )

        everything = args.all or not names
        run = build_trained(s, steps=everything)
        if everything:
            s = measure_steps(s, run, args.sustain)
            attempt(s, "profile", profile, run, args.script)
            attempt(s, "sections", measure_sections)
        if names:
            attempt(s, "candidates", compare, run, args.candidates, names)

    say_noise(s)
    s.report["seconds"] = time.perf_counter() - started
    if args.json and s.m.rank == 0:
        write_atomic(args.json, json.dumps(s.report, indent=1, sort_keys=True) + "\n")
        s.say(f"json: {args.json}")
    return 0


# ---- the command ---------------------------------------------------------------------------------


def leave_process_group() -> None:
    """Destroy the process group, if any. Graphs are freed first: NCCL waits for each that holds its work."""
    if dist.is_initialized():
        traceback.clear_frames(sys.exc_info()[2])
        gc.collect()
        dist.destroy_process_group()


def main(argv: list[str], env: Mapping[str, str] = os.environ) -> int:
    """Run the command and return its exit status. Bad input is reported in one line."""
    guard_console()
    try:
        args = read_options(argv, __doc__)
        measure = attention.run if args.attention else timeline.run if args.timeline else run_bench
        with Progress("bench: opening the script", speaks=env.get("RANK", "0") == "0") as progress:
            return measure(args, env, progress)
    except BadInput as error:
        return refuse(TOOL, error)
    finally:
        leave_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
