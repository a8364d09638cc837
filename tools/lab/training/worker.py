"""A worker of a sweep: trains configurations one after the other, with the model compiled once.

    PYTHONPATH=tools python -m lab.training.worker FOLDER

worker_process.py starts one on each device. Requests arrive on stdin and answers leave on stdout, a JSON
object a line; what the trainer prints goes to stderr. The first request, {"argv"}, opens the device and is
answered with its {"kind"}. The others, {"argv", "line"}, train a configuration and are answered with
{"done": true}. Either may be answered with {"refused": reason}.
"""

from __future__ import annotations

from script import explain_imports

if __name__ == "__main__":
    explain_imports("worker")

import argparse
import dataclasses
import gc
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ledger.files import read_text, sha256
from ledger.make import sweep_table
from ledger.read.runlog import SEPARATOR
from script import TRAINER, load_script

NEEDS = (
    "Diverged", "InputError", "Log", "OneLineError", "STORED_AS", "check_train_split", "conclude",
    "init_machine", "load_config", "load_dataset", "machine_report", "rounding_guide", "start_run", "train",
    "with_kernels",
)  # fmt: skip
# A sweep may be started inside torchrun; its workers are groups of one all the same.
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


# ---- what the log of a configuration says about it -----------------------------------------------


def device_kind(trainer: ModuleType, m: Any) -> str:
    """Return the GPU's name, or the processor's and its cores: clocks of two kinds do not compare."""
    name = m.device_name if m.is_gpu else trainer.machine_report(m).splitlines()[-1]
    return re.sub(r"\s+", " ", name.replace(":", " ")).strip()


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def entropy_bytes(raw: bytes) -> float:
    """Return the order-0 entropy of a byte string in bytes; xz comes close to it on int6 codes."""
    counts = np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
    p = counts[counts > 0] / len(raw)
    return float(-(p * np.log2(p)).sum() * len(raw) / 8)


def int6_codes(trainer: ModuleType, run: Any, trained: Any) -> bytes:
    """Return the int6 codes of the weights that are exported, one byte each."""
    weights = trained.ema.average if trained.artifact_weights == "ema" else trained.ema.params
    names = [name for name, _ in run.model.named_parameters()]
    tensors = dict(zip(names, weights))
    guide = trainer.rounding_guide(tensors, run.h, trained.calibration)
    raw = trainer.raw_artifact(tensors, run.h, guide)
    header, start = trainer.read_header(raw)
    payload = memoryview(raw)[start:]
    entries = [trainer.read_entry(row) for row in header["tensors"]]
    coded = [entry for entry in entries if trainer.STORED_AS[entry.name] == "int6"]
    return b"".join(payload[entry.offset : entry.offset + entry.count] for entry in coded)


def without_source(log: str) -> str:
    """Return a log with the hash of the script in place of its source, which a sweep folder holds only once.

    runlog.parse_log puts the source back.
    """
    _, separator, rest = log.partition(f"\n{SEPARATOR}\n")
    return f"train_gpt.py sha256:{sha256(read_text(TRAINER))}{separator}{rest}"


# ---- the worker ----------------------------------------------------------------------------------


def bound_settings(h: Any) -> list:
    """Return the settings that the machine's bindings and the compiled functions depend on."""
    return [getattr(h, key) for key in sweep_table.model_knobs()]


def allow_recompilation() -> None:
    """Let a function be compiled for as many settings as a sweep has. Imports the compiler, which takes 2 s.

    Each rate and rule is another graph of matrix_update, by four shapes; the default limit is 8.
    """
    torch._dynamo.config.recompile_limit = 100_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000


class Worker:
    """A device, its data, and the model that configurations are trained in until one needs another model."""

    def __init__(self, trainer: ModuleType, h: Any, env: Mapping[str, str]) -> None:
        """Open the device. Raises InputError if it or the data cannot be used."""
        self.trainer = trainer
        self.m = trainer.init_machine(h, env)
        self.dataset = trainer.load_dataset(h)
        trainer.check_train_split(h, self.m)
        self.kind = device_kind(trainer, self.m)
        self.bound_for: list | None = bound_settings(h)  # what self.m is bound for
        self.kept: Any = None  # the first Run of this model
        if self.m.is_gpu:
            allow_recompilation()

    def machine_for(self, h: Any) -> Any:
        """Return the machine bound for a config's model: other heads or windows may take other kernels."""
        if not self.m.is_gpu:
            return self.m
        return self.trainer.with_kernels(self.m, h)

    def prepare(self, h: Any, log: Any) -> Any:
        """Start a run. If its model is that of the run before, reuse the model and its compiled functions.

        A compiled function guards on types, shapes and the settings it reads, not on where parameters lie.
        So neither new contents nor the storage that Optimizer.move gives them compile it again, but new
        settings would. torch 2.13 would accept a new model of the same shapes, too; keeping it is safer.
        """
        if bound_settings(h) != self.bound_for:
            self.change_model(h)
        run = self.trainer.start_run(h, self.m, log, self.dataset, time.perf_counter())
        if self.kept is None:
            self.kept = run
            return run

        model = self.kept.model
        copy_model(run.model, model)
        compiled = {name: getattr(self.kept, name) for name in ("loss_fn", "nats_fn", "plain_loss_fn")}
        return dataclasses.replace(run, model=model, **compiled)

    def change_model(self, h: Any) -> None:
        """Forget the model and all that is compiled for it, and bind the machine for another."""
        self.kept = None
        self.bound_for = None  # if binding fails, the next configuration binds again
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        self.m = self.machine_for(h)
        self.bound_for = bound_settings(h)

    def train(self, request: Mapping, folder: Path) -> None:
        """Train and score one configuration. Its log appears in logs/ when it is complete.

        request: argv, the Config's key=value; line, the pairs of the log's `sweep` line.
        """
        h = self.trainer.load_config(request["argv"], {})
        part = folder / ".work" / f"{h.run_id}.part"
        artifact = folder / ".work" / f"{h.run_id}.int6.{h.codec}"
        part.unlink(missing_ok=True)
        log = self.trainer.Log(str(part), self.m)
        run = self.prepare(h, log)
        pairs = {**request["line"], "kind": self.kind, "init_sha256": weights_sha256(run.model)}
        log("sweep " + " ".join(f"{key}:{value}" for key, value in pairs.items()))

        if self.m.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.train_and_score(run, artifact)

        log.file.close()
        part.write_text(without_source(read_text(part)), encoding="utf-8")
        os.replace(part, folder / "logs" / f"{h.run_id}.txt")
        del run
        gc.collect()  # the loader holds itself in a cycle, and with it two shards

    def train_and_score(self, run: Any, artifact: Path) -> None:
        """Train, export and score a run; a diverged one ends with `sweep_diverged` in place of a score."""
        t = self.trainer
        log_path = run.log.path
        try:
            trained = t.train(run)
        except t.Diverged as end:
            run.log(f"sweep_diverged steps:{end.steps} train_time:{end.train_ms:.0f}ms")
            return
        if not all(bool(p.isfinite().all()) for p in run.model.parameters()):
            run.log(f"sweep_diverged steps:{trained.steps} train_time:{trained.train_ms:.0f}ms")
            return

        codes = int6_codes(t, run, trained)
        bits = 8 * entropy_bytes(codes) / len(codes)
        run.log(f"sweep_codes entropy:{bits:.6f} int6_weights:{len(codes)} int6_step:{run.h.int6_step}")
        t.conclude(run, trained, str(artifact))
        if not artifact.exists() or run.log.path != log_path:
            raise t.InputError(f"{artifact.parent}: artifact or log could not be written there; free space")
        artifact.unlink()


def copy_model(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give `target`, of the same shapes, the weights of `source` and its settings (h, and what follows)."""
    for name, value in vars(source).items():
        if not name.startswith("_") and getattr(target, name) != value:
            setattr(target, name, value)
    fresh = dict(source.named_parameters())
    with torch.no_grad():
        for name, p in target.named_parameters():
            p.copy_(fresh[name])


# ---- the process ---------------------------------------------------------------------------------


def serve(folder: Path) -> int:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # from here on prints go to stderr
    trainer = load_script(TRAINER, "swept_trainer", NEEDS, "sweep")
    env = {key: value for key, value in os.environ.items() if key not in GROUP_VARIABLES}
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(trainer, trainer.load_config(request["argv"], {}), env)
                answer = {"kind": worker.kind}
            else:
                worker.train(request, folder)
                answer = {"done": True}
        except trainer.OneLineError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def main(argv: list[str]) -> int:
    """Serve the sweep whose folder the command line names. Returns the exit status."""
    text = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="lab.training.worker", description=text)
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    return serve(parser.parse_args(argv).folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
