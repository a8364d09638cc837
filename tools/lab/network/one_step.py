"""Take one optimizer step of a script on several ranks: with data over gloo, or without as each rank in turn.

With data, each rank is a process that builds the optimizer at its real shapes and fills gradients and
parameters with numbers that are never zero (parameters from a seed that all share, gradients from the rank's
own), so whatever is exactly zero on the wire is padding. Without data, one process walks through the step as
each rank, with fake tensors and a process group that exchanges nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.network.predict import Shapes, is_bank
from lab.shared.collectives import Event, Recorder, batches_of
from lab.update.cases import direction_flops
from older_scripts import wait_for_no_rank
from progress import Progress
from script import BadInput, load_script, wrong_setting

NEEDS = (
    "InputError", "GPT", "init_tensor", "Optimizer", "load_config", "init_machine", "hyper_at",
    "orthogonalize",
)  # fmt: skip
SEED = 1
LAST_WORDS_SECONDS = 0.3  # until the exit status of a dead rank is visible


# ---- one step ------------------------------------------------------------------------------------


class RankTask(NamedTuple):
    """One rank of a script's step, or (rank 0) all of them in turn. node_ranks: the ranks of a node."""

    script: Path
    knobs: tuple[str, ...]
    world: int
    node_ranks: int
    rank: int = 0
    port: int = 0


class Step(NamedTuple):
    """The calls and work of one rank in a step, and the model after it."""

    events: list[Event]
    model: Any


class RankResult(NamedTuple):
    """The report of a process on its rank's step. digest: a hash of all parameters after it."""

    events: list[Event]
    digest: str
    ortho: str
    preset: str


class DrySteps(NamedTuple):
    """The findings of steps without data."""

    steps: list[list[list[Event]]]  # [task][rank]
    shapes: Shapes
    flops: dict[tuple[int, ...], int]  # to compute the direction of one matrix, by its shape


def torchrun_environment(task: RankTask) -> dict[str, str]:
    """Return the variables that torchrun would set for a rank."""
    return dict(
        RANK=str(task.rank),
        WORLD_SIZE=str(task.world),
        LOCAL_RANK=str(task.rank % task.node_ranks),
        LOCAL_WORLD_SIZE=str(task.node_ranks),
        GROUP_RANK=str(task.rank // task.node_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(task.port),
    )


class OpenScript(NamedTuple):
    """A script whose directions are watched, and its config with a batch of one sequence a rank."""

    t: ModuleType
    h: Any


def open_script(task: RankTask, recorder: Recorder) -> OpenScript:
    """Load the script and the config of a rank."""
    t = load_script(task.script, "wired_script", NEEDS, "wire")
    recorder.watch_directions(t)
    try:
        h = t.load_config(list(task.knobs), {})
        tokens = h.train_seq_len
        h = dataclasses.replace(h, train_batch_tokens=task.world * tokens, micro_batch_tokens=tokens)
    except t.InputError as error:
        raise BadInput(str(error)) from None
    return OpenScript(t, h)


@torch.no_grad()
def fill(model: Any, rank: int) -> None:
    """Give all ranks the same parameters and each its own gradients, all between 0.5 and 1.5."""
    for i, p in enumerate(model.parameters()):
        p.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(SEED + i))
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(SEED + 1000 * (rank + 1) + i))


def zero_init(shape: tuple[int, ...], init: Any, generator: torch.Generator) -> Tensor:
    """Stand in for the script's init_tensor, whose orthogonal matrices take seconds."""
    return torch.zeros(shape)


def take_step(t: ModuleType, h: Any, task: RankTask, recorder: Recorder, data: bool) -> Step:
    """Take the step of one rank. Raises BadInput if the script refuses the config."""
    try:
        m = t.init_machine(h, torchrun_environment(task))
    except t.InputError as error:
        raise BadInput(str(error)) from None

    t.init_tensor = zero_init
    with contextlib.nullcontext() if data else FakeTensorMode():
        model = t.GPT(h, m.ops, m.dtype)
        optimizer = t.Optimizer(model, h, m)
        if data:
            fill(model, m.rank)
        with recorder.recording() as events:
            optimizer.step(t.hyper_at(h, 0, 0.0))
    return Step(events, model)


def real_step(task: RankTask) -> RankResult:
    """Take the step of one rank that exchanges data with the others."""
    recorder = Recorder(waits=True, zeros=True)
    os.environ.update(torchrun_environment(task))  # torch reads the address there
    with recorder.installed():
        t, h = open_script(task, recorder)
        step = take_step(t, h, task, recorder, data=True)

    digest = hashlib.sha256()
    for p in step.model.parameters():
        digest.update(p.detach().numpy().tobytes())
    return RankResult(step.events, digest.hexdigest(), h.ortho, h.preset)


def dry_step(task: RankTask, recorder: Recorder, t: ModuleType, h: Any) -> Step:
    """Take the step of one rank with fake tensors, in a process group that exchanges nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group = dist.init_process_group
    wait_for_no_rank(t)

    def init_fake_group(*args: Any, **kwargs: Any) -> None:
        init_process_group("fake", rank=task.rank, world_size=task.world, store=FakeStore())

    dist.init_process_group = init_fake_group
    try:
        return take_step(t, h, task, recorder, data=False)
    finally:
        dist.init_process_group = init_process_group
        if dist.is_initialized():
            dist.destroy_process_group()


def dry_steps(tasks: tuple[RankTask, ...]) -> DrySteps:
    """Take the steps of every rank of every task, without data."""
    recorder = Recorder(waits=True)
    steps = []
    for task in tasks:
        with recorder.installed():
            t, h = open_script(task, recorder)
            ranks = [dry_step(task._replace(rank=rank), recorder, t, h) for rank in range(task.world)]
        steps.append([step.events for step in ranks])

    shapes = {name: tuple(p.shape) for name, p in ranks[-1].model.named_parameters()}
    matrices = {shape[1:] for name, shape in shapes.items() if is_bank(name)}
    matrices |= {batch.shape for ranks in steps for events in ranks for batch in batches_of(events)}
    return DrySteps(steps, shapes, {shape: direction_flops(t, h.ortho, shape) for shape in matrices})


# ---- processes -----------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Answer(NamedTuple):
    """What a process sends when it is done."""

    result: Any = None  # of its function, if nothing failed
    failure: str | None = None  # one line


def child_entry(pipe: connection.Connection, fn: Callable, task: Any) -> None:
    """Send the Answer of fn(task) from a process of its own."""
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME=interface)
    torch.set_num_threads(1)
    try:
        pipe.send(Answer(result=fn(task)))
    except BadInput as error:
        pipe.send(Answer(failure=str(error)))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        pipe.send(Answer(failure=wrong_setting(error) or f"the step does not run ({text})"))
    finally:  # after the reason is sent, since leaving the group makes the other ranks fail
        if dist.is_initialized():
            dist.destroy_process_group()


def first_failure(processes: list, rank: int, reason: str) -> str:
    """Return why there is no result: a rank that died is why others fail, even if that shows later."""
    time.sleep(LAST_WORDS_SECONDS)
    dead = [i for i, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if dead:
        rank = dead[0]
        status = processes[rank].exitcode
        reason = f"it ended with status {status}: is there enough memory for all ranks?"
    return f"rank {rank} of {len(processes)}: {reason}" if len(processes) > 1 else reason


def in_processes(fn: Callable, tasks: list, progress: Progress | None = None) -> list:
    """Return [fn(task), ...], each from a process of its own, all at once. progress: counts the answers.

    Raises BadInput with the first failure, after ending the other processes. A fork server imports torch
    once, so that a process costs little time and memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
    processes = []
    waiting = {}  # the pipe of each process that has not answered -> its index
    results = [None] * len(tasks)
    try:
        for i, task in enumerate(tasks):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=child_entry, args=(writer, fn, task), daemon=True)
            process.start()
            writer.close()
            processes.append(process)
            waiting[reader] = i
        while waiting:
            for reader in connection.wait(list(waiting)):
                i = waiting.pop(reader)
                try:
                    answer = reader.recv()
                except EOFError:
                    answer = Answer(failure="it ended without an answer")
                if answer.failure is not None:
                    raise BadInput(first_failure(processes, i, answer.failure))
                results[i] = answer.result
                if progress:
                    progress.advance()
    finally:
        for process in processes:
            if process.is_alive() and waiting:
                process.terminate()
            process.join()
    return results
