"""Make artifacts of one trained model with several settings of the codes, and score each.

    ./run.sh record encodings CHECKPOINT [KNOB=VALUE ...] [--row "KNOB=VALUE ..."] ...

CHECKPOINT is a file of the last set that a run with checkpoint_every > 0 leaves: RUN_ID.stepN.0of1.ckpt. The
first line of the table has the settings of that run; each --row changes some of them, and knobs without --row
change all rows (data_path, val_tokens). With fit_cap, all artifacts fill the same cap, so rows compare bpb at
equal bytes. "loss of codes" is the artifact's bpb minus that of the weights that went into it.
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
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lab.shared.command_line import parse
from lab.shared.trainer import known_errors_of
from ledger.files import check_output, named_path, write_atomic
from ledger.read.knobs import knobs_meant, known_knobs, with_trait
from ledger.run_verb import run_verb
from older_scripts import phase_timer, saved_parts
from progress import Progress
from script import TRAINER, BadInput, load_script

MODULE = "encoding_script"  # the script's name in sys.modules
NEEDS = (
    *("Log", "TokenLoader", "calibrate", "fit_artifact", "init_machine", "load_dataset", "make_config"),
    *("packed_code", "read_checkpoint", "read_knobs", "read_state", "start_run", "unpack_artifact"),
)


class Weights(NamedTuple):
    """The weights of a checkpoint by parameter name, and where in the text training had arrived."""

    live: dict[str, Tensor]
    average: dict[str, Tensor]
    position: int

    def chosen(self, artifact_weights: str) -> dict[str, Tensor]:
        """Return those that the knob artifact_weights names."""
        return self.average if artifact_weights == "ema" else self.live


class Line(NamedTuple):
    """A line of the table."""

    row: str
    weights_bpb: float
    int6_step: float
    num_bytes: int  # size of the artifact
    artifact_bpb: float
    seconds: float  # that making the artifact took

    @property
    def loss(self) -> float:
        """The bits per byte that the codes cost."""
        return self.artifact_bpb - self.weights_bpb


def check_knobs(words: list[str], *traits: str) -> None:
    """Raise BadInput for a knob with none of these traits."""
    allowed = with_trait(*traits)
    for word in words:
        key = word.partition("=")[0]
        if key not in allowed:
            if key not in known_knobs():
                raise BadInput(f"{word[:80]}: {key[:40]!r} is no knob; {knobs_meant(key)}")
            of_a_row = ", ".join(with_trait("CODES"))
            of_all_rows = ", ".join(with_trait("INPUT", "DATA"))
            raise BadInput(
                f"{word[:80]}: cannot change after training; rows may set {of_a_row}, and all rows together "
                f"also {of_all_rows}"
            )


def config_of(t: ModuleType, checkpoint: Path, words: list[str]) -> Any:
    """Return the config of the run that wrote a checkpoint, with `words` changed. Raises BadInput."""
    check_knobs(words, "CODES", "INPUT", "DATA")
    try:
        header, _ = t.read_checkpoint(str(checkpoint))
    except OSError as error:
        raise BadInput(f"{checkpoint}: cannot read the checkpoint ({error.strerror}); name a file") from None
    except ValueError as error:
        raise BadInput(f"{error}; name a file that train wrote with checkpoint_every") from None
    made_by = {key: value for key, value in header["made_by"].items() if key not in ("script", "data")}
    fields = {field.name for field in dataclasses.fields(t.Config)}
    if unknown := sorted(made_by.keys() - fields):
        raise BadInput(f"{checkpoint}: {', '.join(unknown)} are knobs of another script; --script names it")
    return t.make_config({**made_by, **t.read_knobs(words, {}), "resume": str(checkpoint)})


def read_weights(t: ModuleType, run: Any, checkpoint: Path) -> Weights:
    """Return the weights of the whole set that a checkpoint belongs to."""
    trained_with = config_of(t, checkpoint, [])
    trained_with = dataclasses.replace(trained_with, data_path=run.h.data_path)
    saved = saved_parts(t.read_state(trained_with, run.m, "", run.dataset))

    def whole(name: str) -> Tensor:
        parts = [tensors[name] for _, tensors in saved if name in tensors]
        return torch.cat(parts).to(run.m.device)

    names = [name for name, _ in run.model.named_parameters()]
    header, _ = saved[0]
    return Weights(
        live={name: whole(name) for name in names},
        average={name: whole(f"average.{name}") for name in names},
        position=header["position"],
    )


def load_weights(run: Any, weights: dict[str, Tensor]) -> None:
    """Put weights into the model."""
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.copy_(weights[name])


def calibration_of(t: ModuleType, run: Any, weights: Weights, h: Any) -> Any:
    """Calibrate as the run does when training ends: on its next batches, with the live weights."""
    if h.gptq_batches == 0:
        return t.Calibration()
    load_weights(run, weights.live)
    loader = t.TokenLoader(h, run.m)
    loader.seek_sequence(weights.position)
    return t.calibrate(dataclasses.replace(run, h=h), loader)


def measure_row(
    t: ModuleType, run: Any, weights: Weights, row: str, h: Any, code_bytes: int, progress: Progress
) -> Line:
    """Make and score the artifact of a row, in PARTS parts."""
    chosen = weights.chosen(h.artifact_weights)
    load_weights(run, chosen)
    before = run.score("weights", h.eval_seq_len)
    progress.advance()

    calibration = calibration_of(t, run, weights, h)
    progress.advance()
    started = time.perf_counter()
    fitted = t.fit_artifact(chosen, h, h.size_cap - code_bytes, phase_timer(run), calibration)
    seconds = time.perf_counter() - started
    progress.advance()

    load_weights(run, t.unpack_artifact(fitted.blob))
    after = run.score("artifact", h.eval_seq_len)
    progress.advance()
    return Line(
        row=row,
        weights_bpb=before.bpb,
        int6_step=fitted.int6_step,
        num_bytes=len(fitted.blob),
        artifact_bpb=after.bpb,
        seconds=seconds,
    )


PARTS = 4  # of a row: the score of its weights, calibration, packing, the score of its artifact
TITLES = f"{'weights':>8} {'artifact':>9} {'loss of codes':>14} {'int6 step':>10} {'bytes':>11} {'s':>6}  row"


def show(line: Line) -> str:
    """Return a line of the table."""
    return (
        f"{line.weights_bpb:>8.4f} {line.artifact_bpb:>9.4f} {line.loss:>14.4f} {line.int6_step:>10.4f} "
        f"{line.num_bytes:>11,} {line.seconds:>6.1f}  {line.row}"
    )


def measure(t: ModuleType, checkpoint: Path, configs: dict[str, Any], progress: Progress) -> list[Line]:
    """Print the table, a line for each row's config, and return its lines."""
    h = configs["as trained"]
    m = t.init_machine(h, os.environ)
    h = t.for_device(h, m)
    calibrates = any(row.gptq_batches > 0 for row in configs.values())
    dataset = t.load_dataset(h, trains=calibrates)
    run = t.start_run(h, m, t.Log("", None), dataset, time.perf_counter())
    weights = read_weights(t, run, checkpoint)
    code_bytes = len(t.packed_code(Path(t.__file__).read_text(encoding="utf-8")))

    progress.print(TITLES)
    progress.begin("encodings")
    progress.expect(PARTS * len(configs), "parts")
    lines = []
    for row, row_config in configs.items():
        line = measure_row(t, run, weights, row=row, h=row_config, code_bytes=code_bytes, progress=progress)
        lines.append(line)
        progress.print(show(line))
    return lines


def command(args: argparse.Namespace) -> int:
    """Print the table, and write it as JSON with --json."""
    t = load_script(args.script, MODULE, NEEDS, "encode")
    if args.json:
        check_output("--json", args.json)
    checkpoint = Path(args.words[0])
    words = args.words[1:]
    with known_errors_of(t):
        configs = {"as trained": config_of(t, checkpoint, words)}
        for row in args.row:
            check_knobs(row.split(), "CODES")
            configs[row] = config_of(t, checkpoint, words + row.split())
        try:
            with Progress("encodings: reading the checkpoint") as progress:
                lines = measure(t, checkpoint, configs, progress)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    if args.json:
        report = [line._asdict() for line in lines]
        write_atomic(args.json, json.dumps(report, indent=2).encode())
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    text = "make artifacts of a checkpoint with several settings of the codes, and score each"
    parser = argparse.ArgumentParser(prog="record encodings", description=text)
    parser.add_argument("words", nargs="+", metavar="CHECKPOINT KNOB=VALUE", help="and knobs for all rows")
    parser.add_argument("--row", action="append", default=[], help="knobs of one row, in quotes")
    parser.add_argument("--script", type=Path, default=TRAINER, help="the script that wrote the checkpoint")
    parser.add_argument("--json", type=named_path, help="write the table here as well")
    return parser


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status."""
    args = parse(argument_parser(), argv)
    return run_verb(lambda: command(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
