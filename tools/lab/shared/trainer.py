"""The script that the lab measures: loads it, opens a session with its config and machine, builds its model.

All that the lab reaches inside a train_gpt.py beyond its functions of the model goes through this module.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import script
from older_scripts import (
    Pass,
    capture_pass,
    is_matrix,
    known_fault,
    machine_names,
    micro_batches_of,
    one_layer,
    run_layer,
    shape_of,
    silence_status,
)
from progress import Progress
from script import BadInput

NEEDS = (
    "InputError", "GPT", "Ops", "Optimizer", "Ema", "TokenLoader", "capture_pass", "train_step", "log_step",
    "hyper_at", "Machine.fetch", "PARAM_TABLE",
)  # fmt: skip
TOOL = "bench.py"  # begins its errors
MODULE = "benched_script"  # its name in sys.modules; a copy with a candidate gets a suffix
DOCUMENTS_PER_SEQUENCE = 4  # where the config keeps documents apart
TRAINING_BATCHES = 4  # batches of random tokens; each pass draws one


class Session(NamedTuple):
    """A script under measurement.

    t: the script as a module, with its config h and machine m. sequences: those of a micro-batch. report: the
    JSON report, filled while measuring. progress: tells how far that is. deadline: no section begins after
    this perf_counter().
    """

    t: ModuleType
    h: Any
    m: Any
    sequences: int
    report: dict
    progress: Progress
    deadline: float = math.inf

    @property
    def cuda(self) -> bool:
        return self.m.device.type == "cuda"

    @property
    def accum(self) -> int:
        """Micro-batches of a step on this rank."""
        return micro_batches_of(self.t, self.h, self.m.world_size).accum

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def say(self, line: str = "") -> None:
        """Print a line on rank 0."""
        if self.m.rank == 0:
            self.progress.print(line)

    def skip(self, what: str, error: Exception | str) -> None:
        """Report what could not be measured, and why."""
        why = error if isinstance(error, str) else f"{type(error).__name__}: {first_line(error)}"
        self.report["skipped"].append(dict(what=what, why=why))
        self.say(f"skipped {what}: {why[:300]}")


def first_line(error: Exception) -> str:
    """Return the first line of the error's message, or an empty string."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def load_trainer(path: Path, name: str = MODULE) -> ModuleType:
    """Load a fresh copy of the script, with code objects of its own. Raises BadInput if it does not load."""
    return script.load_script(path, name, NEEDS, "bench")


@contextlib.contextmanager
def known_errors_of(t: ModuleType) -> Iterator[None]:
    """Turn an error that the script knows into BadInput, which the command reports in one line."""
    try:
        yield
    except Exception as error:
        if fault := known_fault(t, error):
            raise BadInput(str(fault)) from None
        script.leave_if_lost(TOOL, t, error, "while measuring")
        raise


def open_session(t: ModuleType, knobs: list[str], env: Mapping[str, str], progress: Progress) -> Session:
    """Resolve the config, bind the machine and begin a report that describes both."""
    h = t.load_config(knobs, env)
    m = t.init_machine(h, env)
    sequences = micro_batches_of(t, h, m.world_size).sequences
    names = machine_names(m)
    report = dict(
        schema=1,
        device=names["device"],
        machine=names,
        dtype=str(m.dtype).removeprefix("torch."),
        world_size=m.world_size,
        sequences=sequences,
        seq_len=h.train_seq_len,
        config=dataclasses.asdict(h),
        skipped=[],
        noisy=[],
    )
    return Session(t, h, m, sequences=sequences, report=report, progress=progress)


# ---- models --------------------------------------------------------------------------------------


def zero_model(s: Session, t: ModuleType, h: Any, ops: Any, dtype: torch.dtype) -> Any:
    """Build t's GPT with zeros for weights, which the caller fills: initialization would take seconds."""

    def zeros(shape: tuple, init: Any, generator: torch.Generator) -> Tensor:
        return torch.zeros(shape)

    own = t.init_tensor
    t.init_tensor = zeros
    try:
        return t.GPT(h, ops, dtype).to(s.m.device)
    finally:
        t.init_tensor = own


@torch.no_grad()
def fill_weights(t: ModuleType, model: Any, seed: int = 0) -> Any:
    """Fill in weights none of which is zero or one, so that no path is switched off. Returns the model.

    A parameter is an embedding by its rate.
    """
    specs = {spec.name: spec for spec in t.PARAM_TABLE}
    for i, (name, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(seed + i)
        noise = torch.randn(p.shape, generator=generator)
        if specs[name].lr == "embed_lr":
            p.copy_(0.05 * noise)
        elif is_matrix(t, specs[name]):
            p.copy_(0.7 * noise * p.size(-1) ** -0.5)
        else:
            p.copy_(0.5 + 0.1 * noise)
    return model


def one_layer_model(s: Session, t: ModuleType, ops: Any, dtype: torch.dtype) -> Any:
    """Build a model of one layer that computes in `dtype`, its tensors outside the layers at full size."""
    h = one_layer(s.h)
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    model = fill_weights(t, zero_model(s, t, h, ops, torch.float32)).to(stored)
    model.dtype = dtype
    return model


@torch.no_grad()
def copy_weights(model: Any, source: Any) -> None:
    """Copy the source's weights, and which of them need gradients, into the model."""
    for p, other in zip(model.parameters(), source.parameters()):
        p.copy_(other)
        p.requires_grad_(other.requires_grad)


def documents_of(s: Session) -> Tensor | None:
    """Number the documents of a micro-batch, (B, T), all of one length; None if the config joins them."""
    if not s.h.doc_mask:
        return None
    T = s.h.train_seq_len
    numbers = torch.arange(T, device=s.m.device) * DOCUMENTS_PER_SEQUENCE // T
    return numbers.expand(s.sequences, T)


def rope_of(s: Session, t: ModuleType) -> Any:
    """Return the rotary tables of a training sequence."""
    return t.rope_tables(s.h.train_seq_len, s.h.rope_dims, s.h.rope_base, s.m.device)


def bank_shapes(s: Session) -> list[tuple[int, int, int]]:
    """Return the shape of every matrix bank."""
    table = s.t.parameter_table(s.h)
    return [shape_of(table, spec.name) for spec in s.t.MATRICES]


def loss_from_trunk(t: ModuleType, model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (x, targets) -> loss: the model's loss with x in place of what its trunk computes."""

    class TrunkGiven(t.GPT):
        def trunk(self, tokens: Tensor, *_: Any) -> Tensor:
            return t.rms_norm(tokens)

    output_layer = copy.copy(model)
    output_layer.__class__ = TrunkGiven
    return lambda x, targets: output_layer.loss(x, targets)


class Blocks(NamedTuple):
    """The script's attention block and whole layer as functions of activations and a LayerWeights tuple.

    attention: (x, *weights) -> (B, T, D); layer: (x, x0, *weights) -> (B, T, D). window: that of both.
    """

    attention: Callable
    layer: Callable
    weights: Callable[[], list[Tensor]]
    window: int


def blocks_of(s: Session, t: ModuleType, ops: Any, model: Any) -> Blocks:
    """Bind the last layer's blocks, without value embeddings. model: its one layer is copied."""
    fields = t.LayerWeights._fields
    if fields[:4] != ("qkv", "o", "up", "down"):
        raise ValueError("LayerWeights: the bench expects qkv, o, up, down first")

    spec = dataclasses.replace(t.layer_table(s.h)[-1], ve=-1)
    parts = model.layer_weights()[0]
    names = [name for name, part in zip(fields, parts) if part is not None]
    positions = t.Positions(*rope_of(s, t), documents_of(s))

    def attention_of(x: Tensor, w: Any) -> Tensor:
        return t.attention_block(x, w, spec, None, positions=positions, ops=ops)

    def named(weights: tuple[Tensor, ...]) -> Any:
        return t.LayerWeights(**dict(zip(names, weights)))

    def attention(x: Tensor, *weights: Tensor) -> Tensor:
        return attention_of(x, named(weights))

    def layer(x: Tensor, x0: Tensor, *weights: Tensor) -> Tensor | tuple[Tensor, ...]:
        return run_layer(t, spec, x, x0, named(weights), attention=attention_of, ops=ops)

    def weights() -> list[Tensor]:
        return [part.detach().clone().requires_grad_() for part in parts if part is not None]

    return Blocks(attention, layer, weights, spec.window)


# ---- training ------------------------------------------------------------------------------------


class TrainingParts(NamedTuple):
    """A model and what trains it. batches: (B, T + 1) random tokens."""

    model: Any
    loss_fn: Callable
    optimizer: Any
    ema: Any
    batches: list[Tensor]

    def fresh(self) -> Tensor:
        """Draw one of the batches."""
        return self.batches[int(torch.randint(len(self.batches), ()))]

    def forward(self) -> Tensor:
        """Return the loss of a fresh batch."""
        tokens = self.fresh()
        return self.loss_fn(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def both(self) -> None:
        """Run forward and backward on a fresh batch."""
        self.forward().backward()


def build_trained(s: Session, steps: bool = True) -> TrainingParts:
    """Build the model, its optimizer and its averaged weights, as training does.

    steps=False: no step will be made. The optimizer still decides which weights move and where gradients
    add up, but its update is neither compiled nor captured, and the weights are zeros.
    """
    torch.manual_seed(s.h.seed)
    if steps:
        machine = s.m
        model = s.t.GPT(s.h, s.m.ops, s.m.dtype).to(s.m.device)
    else:
        machine = dataclasses.replace(s.m, graph_capture=None)
        model = zero_model(s, s.t, s.h, s.m.ops, s.m.dtype)

    optimizer = s.t.Optimizer(model, s.h, machine)
    shape = (s.sequences, s.h.train_seq_len + 1)
    batches = [torch.randint(s.h.vocab_size, shape, device=s.m.device) for _ in range(TRAINING_BATCHES)]
    return TrainingParts(model, s.m.compile(model.loss), optimizer, s.t.Ema(model, s.h), batches)


def capture_backward(s: Session, run: TrainingParts) -> Pass:
    """Capture training's forward+backward of a micro-batch: a CUDA graph where the machine captures."""
    return capture_pass(s.t, run.loss_fn, run.optimizer)


def gradient_buffers(optimizer: Any) -> list[Tensor]:
    """Return the buffers in which a step's gradients add up."""
    return [*optimizer.bank_grad.values(), optimizer.flat_grad]


def capture(m: Any, fn: Callable[[], None]) -> Callable[[], None]:
    """Capture fn's device work as a CUDA graph and return its replay. Raises whatever the driver raises."""
    return m.graph_capture(fn)


@contextlib.contextmanager
def quiet_run(s: Session) -> Iterator[SimpleNamespace]:
    """Yield as much of a Run as log_step needs. Its log is a temporary file and prints nothing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        log = s.t.Log(os.path.join(folder, "log.txt"), s.m)
        silence_status(log)
        try:
            yield SimpleNamespace(h=s.h, log=log)
        finally:
            if log.file is not None:
                log.file.close()
