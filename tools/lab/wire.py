"""What one optimizer step puts on the wire, counted; and how long it would be seen, predicted.

    ./run.sh record wire                                  the record preset on 8 ranks of one node
    ./run.sh record wire --ranks 8 --nodes 2 ortho=mud --out wire.md

Counted: N processes over gloo build the optimizer at its real shapes, fill gradients and parameters with
numbers that are never zero (parameters by a seed that all share, gradients by one of the rank's own) and take
one step. Wrappers of torch.distributed's functions see every collective; whatever they carry that is exactly
zero is padding, and what `orthogonalize` is given is what a rank works on. Afterwards parameters must be
bit-equal on all ranks.

Predicted: the same step is walked through without data (fake tensors, a fake process group) as every rank of
one node of 8 and of 4 nodes of 8. Each collective takes LATENCY + bytes per link / BANDWIDTH on the link
that its group needs, one after the other on a link, begins when the script launches it and is waited for
where the script waits; the update of a rank takes the time of its share of the products. What the step takes
beyond the update is exposed. The figures that this rests on stand in the output; --assume NAME=VALUE changes
one.

A group whose ranks lie on one node (rank // ranks per node) is intra, any other inter. Bytes per link are
those of ring algorithms: (n-1)/n of the whole buffer for a reduce-scatter or an all-gather, twice that for
an all-reduce. Beside it, from the same shapes: the schedule of parameter-golf's Parallel Muon record (#399).

Exit status: 0 done; 1 the ranks disagree after the step; 2 bad input (one line says it).
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import math
import multiprocessing
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lab import directions
from script import BadInput, load_script
from ledger.views import write_atomic

NEEDS = ("InputError", "GPT", "init_tensor", "Optimizer", "load_config", "init_machine", "hyper_at",
         "orthogonalize")
PREDICTED = ((1, 8), (4, 8))        # nodes, ranks on each
SEED = 1

# torch.distributed's name -> (kind, the argument that a rank gives, the argument that is the whole buffer).
# 2.11 says *_tensor where 2.13 says *_single.
FUNCTIONS = {
    "all_reduce": ("all-reduce", "tensor", "tensor"),
    "reduce_scatter_single": ("reduce-scatter", "input", "input"),
    "reduce_scatter_tensor": ("reduce-scatter", "input", "input"),
    "reduce_scatter": ("reduce-scatter", "input_list", "input_list"),
    "all_gather_single": ("all-gather", "input_tensor", "output_tensor"),
    "all_gather_into_tensor": ("all-gather", "input_tensor", "output_tensor"),
    "all_gather": ("all-gather", "tensor", "tensor_list"),
    "all_to_all_single": ("all-to-all", "input", "input"),
    "all_to_all": ("all-to-all", "input_tensor_list", "input_tensor_list"),
    "broadcast": ("broadcast", "tensor", "tensor"),
    "reduce": ("reduce", "tensor", "tensor"),
}
PASSES = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1, "all-to-all": 1}     # times (n - 1) / n


class Call(NamedTuple):
    """One collective as one rank launches it. Bytes; payload: of the whole buffer."""
    kind: str
    payload: int
    ranks: tuple[int, ...]
    dtype: str
    device: str = "cpu"
    given: int = 0          # what this rank puts in,
    zeros: int = 0          # and how much of that is exactly zero

    @property
    def wire(self) -> float:
        """Bytes that each rank sends, and receives, in a ring."""
        n = len(self.ranks)
        return self.payload * (PASSES[self.kind] * (n - 1) / n if self.kind in PASSES else float(n > 1))


class Wait(NamedTuple):
    """The script waits for the collective of this index among the events."""
    of: int


class Work(NamedTuple):
    """A direction on a batch of matrices; real: those that are no padding."""
    shape: tuple[int, int]
    slots: int
    real: int


# ---- counting ------------------------------------------------------------------------------------

def tensors_of(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def nbytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


class Waited:
    """A Work of torch.distributed that tells when it is waited for."""

    def __init__(self, work: Any, told: Callable[[], None]) -> None:
        self._work, self._told = work, told

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        self._told()
        return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Recorder:
    """Calls of torch.distributed's functions while `on`, in order; with `closely`, waits, too.

    A script must be loaded and run inside installed(): it may bind the functions to names of its own.
    data: count zeros, too, which reads tensors of a CPU.
    """

    def __init__(self, closely: bool = False, data: bool = False) -> None:
        self.closely, self.data, self.on = closely, data, False
        self.events: list[Call | Wait | Work] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        kept = {name: getattr(dist, name) for name in FUNCTIONS if hasattr(dist, name)}
        for name, fn in kept.items():
            setattr(dist, name, self.wrapped(fn, *FUNCTIONS[name]))
        try:
            yield
        finally:
            for name, fn in kept.items():
                setattr(dist, name, fn)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list]:
        """`with recording() as events`: these, from here on. An outer recording gets them at the end."""
        outer, self.events, self.on = (self.events, self.on), [], True
        try:
            yield self.events
        finally:
            inner, (self.events, self.on) = self.events, outer
            self.events += inner if self.on else []

    def wrapped(self, fn: Callable, kind: str, given: str, whole: str) -> Callable:
        signature = inspect.signature(fn)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return fn(*args, **kwargs)
            named = signature.bind(*args, **kwargs).arguments
            puts, buffer = tensors_of(named[given]), tensors_of(named[whole])
            group = named.get("group") or dist.group.WORLD
            zeros = sum(int((x == 0).sum()) * x.element_size() for x in puts) if self.data else 0
            index = len(self.events)
            self.events.append(Call(kind, nbytes(buffer), tuple(dist.get_process_group_ranks(group)),
                                    str(puts[0].dtype)[6:], puts[0].device.type, nbytes(puts), zeros))
            work = fn(*args, **kwargs)
            if not self.closely:
                return work
            told = lambda: self.events.append(Wait(index))
            return Waited(work, told) if work is not None else told()
        return call

    def watch_directions(self, t: ModuleType) -> None:
        """Every call of the script's `orthogonalize` becomes a Work."""
        inner = t.orthogonalize

        @functools.wraps(inner)
        def orthogonalize(G: Tensor, method: str) -> Tensor:
            if self.on:
                slots = G.numel() // (G.size(-2) * G.size(-1))
                real = int((G != 0).flatten(-2).any(-1).sum()) if self.data else slots
                self.events.append(Work(tuple(G.shape[-2:]), slots, real))
            return inner(G, method)
        t.orthogonalize = orthogonalize


# ---- one step ------------------------------------------------------------------------------------

class Job(NamedTuple):
    """What a process is asked for. node_ranks: ranks of a node."""
    script: Path
    knobs: tuple[str, ...]
    world: int
    node_ranks: int
    rank: int = 0
    port: int = 0


def place(job: Job) -> dict[str, str]:
    """The environment of torchrun for that rank."""
    return dict(RANK=str(job.rank), WORLD_SIZE=str(job.world), LOCAL_RANK=str(job.rank % job.node_ranks),
                LOCAL_WORLD_SIZE=str(job.node_ranks), GROUP_RANK=str(job.rank // job.node_ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port))


def open_script(job: Job, recorder: Recorder) -> tuple[ModuleType, Any]:
    """The script with its directions watched, and its config with a batch that any number of ranks cuts."""
    try:
        t = load_script(job.script, "wired_script", NEEDS, "wire")
    except BadInput as error:
        raise BadInput(str(error)) from None
    recorder.watch_directions(t)
    try:
        h = t.load_config(list(job.knobs), {})
        return t, dataclasses.replace(h, train_batch_tokens=job.world * h.train_seq_len,
                                      micro_batch_tokens=h.train_seq_len)
    except t.InputError as error:
        raise BadInput(str(error)) from None


@torch.no_grad()
def fill(model: Any, rank: int) -> None:
    """Parameters the same on all ranks, gradients each rank's own; 0.5 to 1.5, so a zero is padding."""
    for i, p in enumerate(model.parameters()):
        p.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(SEED + i))
        p.grad = torch.empty_like(p) if p.grad is None else p.grad
        p.grad.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(SEED + 1000 * (rank + 1) + i))


def take_step(t: ModuleType, h: Any, env: dict[str, str], recorder: Recorder) -> tuple[list, Any]:
    """(events of the step, the model behind it) of one rank. BadInput: the script refuses the config."""
    try:
        m = t.init_machine(h, env)
    except t.InputError as error:
        raise BadInput(str(error)) from None
    t.init_tensor = lambda shape, init, generator: torch.zeros(shape)       # orthogonal matrices take seconds
    with contextlib.nullcontext() if recorder.data else FakeTensorMode():
        model = t.GPT(h, m.ops, m.dtype)
        optimizer = t.Optimizer(model, h, m)
        if recorder.data:
            fill(model, m.rank)
        with recorder.recording() as events:
            optimizer.step(t.hyper_at(h, 0, 0.0))
    return events, model


def flops_of(t: ModuleType, ortho: str, shapes: set) -> dict[tuple[int, int], int]:
    """{shape: floating-point operations of the direction on one matrix of it}."""
    count = lambda shape: directions.flops_of(SimpleNamespace(t=t), ortho, directions.Bank("", 1, *shape))
    return {shape: count(shape) for shape in shapes}


def real_step(job: Job) -> dict:
    """One rank of N that really exchange data."""
    recorder = Recorder(closely=True, data=True)
    os.environ.update(place(job))                   # torch looks there for the address
    with recorder.installed():
        t, h = open_script(job, recorder)
        events, model = take_step(t, h, place(job), recorder)
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy().tobytes())
    return dict(events=events, digest=digest.hexdigest(), ortho=h.ortho, preset=h.preset)


def dry_step(job: Job, recorder: Recorder, t: ModuleType, h: Any) -> tuple[list, Any]:
    """take_step without data: fake tensors, and a process group that exchanges nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    fake = dict(backend="fake", rank=job.rank, world_size=job.world, store=FakeStore())
    opened, dist.init_process_group = dist.init_process_group, lambda *a, **k: opened(**fake)
    try:
        return take_step(t, h, place(job), recorder)
    finally:
        dist.init_process_group = opened
        if dist.is_initialized():
            dist.destroy_process_group()


def dry_steps(jobs: tuple[Job, ...]) -> dict:
    """The steps of every rank of every job; shapes of the model, operations on a matrix of each shape."""
    recorder, steps = Recorder(closely=True), []
    for job in jobs:
        with recorder.installed():
            t, h = open_script(job, recorder)
            ranks = [dry_step(job._replace(rank=rank), recorder, t, h) for rank in range(job.world)]
        steps.append([events for events, _ in ranks])
    shapes = {name: tuple(p.shape) for name, p in ranks[-1][1].named_parameters()}
    used = {e.shape for ranks in steps for events in ranks for e in events if isinstance(e, Work)}
    used |= {shape[1:] for name, shape in shapes.items() if is_bank(name)}
    return dict(steps=steps, shapes=shapes, flops=flops_of(t, h.ortho, used))


# ---- processes -----------------------------------------------------------------------------------

def entry(pipe: connection.Connection, fn: Callable, job: Any) -> None:
    """A process: the result of fn(job), or one line that says why there is none."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    try:
        pipe.send((True, fn(job)))
    except BadInput as error:
        pipe.send((False, str(error)))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        pipe.send((False, f"the step does not run ({text})"))
    finally:                            # not before the word is out: then the other ranks fail, too
        if dist.is_initialized():
            dist.destroy_process_group()


def first_failure(processes: list, i: int, text: str) -> str:
    """Why there is no result. A rank that died is the reason why others fail, however late that shows."""
    time.sleep(0.3)
    dead = [j for j, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if dead:
        i, text = dead[0], f"it ended with status {processes[dead[0]].exitcode}: is there memory for all ranks?"
    return f"rank {i} of {len(processes)}: {text}" if len(processes) > 1 else text


def in_processes(fn: Callable, jobs: list) -> list:
    """[fn(job), ...], each in a process of its own, all at once. BadInput: the first failure, the rest ended.

    A fork server imports torch once, so that a process costs little time and memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
    waiting, processes, out = {}, [], [None] * len(jobs)
    try:
        for i, job in enumerate(jobs):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=entry, args=(writer, fn, job), daemon=True)
            process.start()
            writer.close()
            processes.append(process)
            waiting[reader] = i
        while waiting:
            for reader in connection.wait(list(waiting)):
                i = waiting.pop(reader)
                try:
                    done, out[i] = reader.recv()
                except EOFError:
                    done, out[i] = False, "it ended without a word"
                if not done:
                    raise BadInput(first_failure(processes, i, out[i]))
    finally:
        for process in processes:
            if process.is_alive() and waiting:
                process.terminate()
            process.join()
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- the published schedule ----------------------------------------------------------------------

def is_bank(name: str) -> bool:
    return name.endswith("_bank")


def reference_schedule(shapes: dict[str, tuple], world: int) -> list:
    """Events of parameter-golf's Parallel Muon record (#399, #549), on the shapes of this model.

    Behind the backward a reduce-scatter of each bank, bf16, largest first, padded to the world size; an
    all-reduce of each small tensor, float32, one by one; then for each bank: wait for its gradient and for
    the gather before it, direct, gather the bf16 update. It clips local gradients, so no norm is reduced.
    """
    events: list = []
    everyone = tuple(range(world))

    def launch(kind: str, payload: int, zeros: float, dtype: str = "bfloat16") -> int:
        given = payload // world if kind == "all-gather" else payload
        events.append(Call(kind, payload, everyone, dtype, "cuda", given, round(zeros)))
        return len(events) - 1

    size = lambda shape: functools.reduce(lambda a, b: a * b, shape, 1)
    banks = sorted((s for name, s in shapes.items() if is_bank(name)), key=size, reverse=True)
    padded = [-(-s[0] // world) * world for s in banks]
    arrivals = [launch("reduce-scatter", 2 * n * size(s[1:]), 2 * (n - s[0]) * size(s[1:]))
                for n, s in zip(padded, banks)]
    for name, shape in shapes.items():
        if not is_bank(name):
            events.append(Wait(launch("all-reduce", 4 * size(shape), 0, "float32")))
    departures: list[int] = []
    for n, s, arrival in zip(padded, banks, arrivals):
        events += [Wait(arrival), *(Wait(i) for i in departures[-1:]), Work(s[1:], n // world, n // world)]
        zeros = 2 * (n - s[0]) * size(s[1:]) / world          # mean over the ranks: padding lies on the last
        departures.append(launch("all-gather", 2 * n * size(s[1:]), zeros))
    return events + [Wait(i) for i in departures[-1:]]


def reference_matrices(shapes: dict[str, tuple], world: int, rank: int) -> list[Work]:
    """What that rank works on: consecutive matrices of each bank, behind the last one padding."""
    works = []
    for name, (count, *shape) in shapes.items():
        if is_bank(name):
            slots = -(-count // world)
            works.append(Work(tuple(shape), slots, max(0, min(slots, count - rank * slots))))
    return works


# ---- figures -------------------------------------------------------------------------------------

def scope(ranks: tuple[int, ...], node_ranks: int) -> str:
    """intra when all of a group's ranks lie on one node."""
    return "intra" if len({rank // node_ranks for rank in ranks}) == 1 else "inter"


def calls_of(events: list) -> list[Call]:
    return [e for e in events if isinstance(e, Call)]


def works_of(events: list) -> list[Work]:
    return [e for e in events if isinstance(e, Work)]


def totals(events: list, node_ranks: int) -> dict:
    """Of one rank's step: counts by kind, bytes of payload and per link, by scope."""
    calls = calls_of(events)
    wire = {where: sum(c.wire for c in calls if scope(c.ranks, node_ranks) == where)
            for where in ("intra", "inter")}
    return dict(count=Counter(c.kind for c in calls), payload=sum(c.payload for c in calls), wire=wire)


def padding(steps: list[list]) -> float:
    """The share of what all ranks put on the wire that is padding."""
    calls = [c for events in steps for c in calls_of(events)]
    return sum(c.zeros for c in calls) / max(1, sum(c.given for c in calls))


def load(works: list[Work], flops: dict) -> tuple[int, int, int, int]:
    """(matrices, slots, operations on matrices, operations with padding) of a rank."""
    return (sum(w.real for w in works), sum(w.slots for w in works),
            sum(w.real * flops[w.shape] for w in works), sum(w.slots * flops[w.shape] for w in works))


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a prediction rests on. GB/s each way, milliseconds."""
    nvlink_gbps: float = 300.0
    nvlink_latency_ms: float = 0.020
    nic_gbps: float = 50.0
    nic_latency_ms: float = 0.060
    update_ms: float = 0.844
    eighth_ms: float = 0.216


SOURCES = {
    "nvlink_gbps": "bus bandwidth within a node: two thirds of the 450 GB/s each way of an H100's NVLink 4 "
                   "(NVIDIA's data sheet); assumed, for messages of some MB",
    "nvlink_latency_ms": "of a collective on 8 GPUs of a node; assumed",
    "nic_gbps": "of each GPU's adapter: 400 Gb/s, eight to a node (NVIDIA's data sheet of the DGX H100)",
    "nic_latency_ms": "of a collective across nodes; assumed",
    "update_ms": "all matrices on one H100, ns5, momentum in, weights out: records/README.md, measured",
    "eighth_ms": "ceil(n / 8) matrices of each bank, the same way",
}
FORMULA = """\
collective = latency + bytes per link / bandwidth; intra: nvlink; inter: min(nvlink, nic x k), nic if k = 1,
             k = ranks of the group on one node, whose adapters share the crossing of a ring
update     = a + b x share of the operations, through (1, update_ms) and (share of an eighth, eighth_ms)
step       = walked in launch order: collectives of a scope one after the other, each from its launch on;
             directions one after the other, `update` together; a wait holds all that follows
exposed    = end of the last collective or direction - update; before: what is ahead of the first direction"""


def collective_ms(call: Call, node_ranks: int, a: Assumptions) -> float:
    """Predicted milliseconds of one collective; none for a group of one."""
    if len(call.ranks) == 1:
        return 0.0
    if scope(call.ranks, node_ranks) == "intra":
        return a.nvlink_latency_ms + call.wire / a.nvlink_gbps / 1e6
    share = max(Counter(rank // node_ranks for rank in call.ranks).values())
    gbps = a.nic_gbps if share == 1 else min(a.nvlink_gbps, share * a.nic_gbps)
    return a.nic_latency_ms + call.wire / gbps / 1e6


def update_ms(share: float, eighth: float, a: Assumptions) -> float:
    """Milliseconds of a rank's update by its share of the operations: a line through the measured two."""
    slope = (a.update_ms - a.eighth_ms) / (1 - eighth) if eighth < 1 else 0.0
    return a.update_ms + slope * (share - 1)


def walk(events: list, costs: dict[int, float], lanes: dict[int, str], works: dict[int, float]) -> dict:
    """Time of a step: {end, before, update, exposed, communication} in ms.

    costs, lanes: of each collective by its index; works: ms of each direction. before: until the first one.
    """
    now, before, free, ends = 0.0, None, Counter(), {}
    for i, event in enumerate(events):
        if isinstance(event, Call):
            ends[i] = free[lanes[i]] = max(now, free[lanes[i]]) + costs[i]
        elif isinstance(event, Wait):
            now = max(now, ends[event.of])
        else:
            before = now if before is None else before
            now += works[i]
    end, update = max([now, *ends.values()]), sum(works.values())
    return dict(end=end, before=end if before is None else before, update=update, exposed=end - update,
                communication=sum(costs.values()))


def predict(events: list, node_ranks: int, shares: dict, a: Assumptions) -> dict:
    """walk() of one rank's step. shares: {"flops": by shape, "all": operations of all matrices, "eighth"}."""
    operations = {i: e.slots * shares["flops"][e.shape] for i, e in enumerate(events) if isinstance(e, Work)}
    mine = sum(operations.values())
    update = update_ms(mine / shares["all"], shares["eighth"], a) if mine else 0.0
    calls = {i: e for i, e in enumerate(events) if isinstance(e, Call)}
    return walk(events, {i: collective_ms(c, node_ranks, a) for i, c in calls.items()},
                {i: scope(c.ranks, node_ranks) for i, c in calls.items()},
                {i: update * n / mine for i, n in operations.items()})


# ---- tables --------------------------------------------------------------------------------------

def markdown(heads: list[str], rows: list[list]) -> list[str]:
    """A table, every column but the first to the right."""
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return [line(heads), line(["---"] + ["---:"] * (len(heads) - 1)), *map(line, rows), ""]


def mb(count: float) -> str:
    return f"{count / 1e6:.3f}"


def order_table(steps: list[list], node_ranks: int) -> list[str]:
    """Every collective of rank 0 in launch order; padding over all ranks."""
    rows = []
    for index, c in enumerate(calls_of(steps[0])):
        same = [calls_of(events)[index] for events in steps]
        share = sum(x.zeros for x in same) / max(1, sum(x.given for x in same))
        rows.append([f"{index + 1} {c.kind}", c.dtype, len(c.ranks), scope(c.ranks, node_ranks),
                     f"{c.payload:,}", f"{100 * share:.1f} %", mb(c.wire)])
    heads = ["collective", "type", "ranks", "scope", "bytes", "padding", "MB per link each way"]
    return markdown(heads, rows)


def totals_table(columns: list[tuple[str, dict]]) -> list[str]:
    """One column for each schedule."""
    kinds = sorted({kind for _, column in columns for kind in column["count"]})
    ratio = lambda loads, k: max(x[k] for x in loads) / (sum(x[k] for x in loads) / len(loads) or 1)
    idle = lambda loads: 1 - sum(x[2] for x in loads) / (sum(x[3] for x in loads) or 1)
    spread = lambda loads, k: f"{min(x[k] for x in loads)} to {max(x[k] for x in loads)}"
    rows = {kind: lambda c, kind=kind: c["count"][kind] for kind in kinds} | {
        "collectives": lambda c: sum(c["count"].values()),
        "payload, MB": lambda c: mb(c["payload"]),
        "per link each way within nodes, MB": lambda c: mb(c["wire"]["intra"]),
        "per link each way across nodes, MB": lambda c: mb(c["wire"]["inter"]),
        "padding, of the bytes": lambda c: f"{100 * c['padding']:.1f} %",
        "matrices of a rank": lambda c: spread(c["loads"], 0),
        "the same with padding": lambda c: spread(c["loads"], 1),
        "GFLOP of the busiest rank": lambda c: f"{max(x[3] for x in c['loads']) / 1e9:.2f}",
        "busiest over mean, matrices' operations": lambda c: f"{ratio(c['loads'], 2):.3f}",
        "operations on padding": lambda c: f"{100 * idle(c['loads']):.1f} %",
    }
    return markdown(["a step, one rank", *(name for name, _ in columns)],
                    [[name, *(figure(column) for _, column in columns)] for name, figure in rows.items()])


def predicted_rows(rows: list[dict]) -> list[str]:
    """The table of predictions."""
    heads = ["schedule", "nodes x GPUs", "communication ms", "update ms", "exposed before", "exposed behind",
             "exposed ms"]
    return markdown(heads, [
        [r["name"], f"{r['nodes']} x {r['node_ranks']}", *(f"{x:.3f}" for x in (
            r["communication"], r["update"], r["before"], r["exposed"] - r["before"], r["exposed"]))]
        for r in rows])


def rank_table(loads: list[tuple], node_ranks: int) -> list[str]:
    mean = sum(x[2] for x in loads) / len(loads) or 1
    return markdown(["rank", "node", "matrices", "with padding", "GFLOP", "over mean"], [
        [rank, rank // node_ranks, real, slots, f"{flops / 1e9:.2f}", f"{flops / mean:.3f}"]
        for rank, (real, slots, flops, _) in enumerate(loads)])


def predictions(dry: dict, a: Assumptions) -> list[dict]:
    """Of this script and of the published schedule, for PREDICTED. The slowest rank counts."""
    shapes, flops = dry["shapes"], dry["flops"]
    everything = sum(s[0] * flops[s[1:]] for name, s in shapes.items() if is_bank(name))
    eighth = load(reference_matrices(shapes, 8, 0), flops)[3] / everything
    shares, rows = {"flops": flops, "all": everything, "eighth": eighth}, []
    for (nodes, node_ranks), steps in zip(PREDICTED, dry["steps"]):
        walked = [predict(events, node_ranks, shares, a) for events in steps]
        published = predict(reference_schedule(shapes, nodes * node_ranks), node_ranks, shares, a)
        for name, row in (("here", max(walked, key=lambda w: w["end"])), ("Parallel Muon record", published)):
            rows.append(dict(name=name, nodes=nodes, node_ranks=node_ranks, **row))
    return rows


def report(steps: list[list], dry: dict, job: Job, a: Assumptions) -> list[str]:
    """All tables, as lines of markdown."""
    shapes, flops = dry["shapes"], dry["flops"]
    loads = [load(works_of(events), flops) for events in steps]
    schedule = reference_schedule(shapes, job.world)
    theirs = totals(schedule, job.node_ranks) | dict(padding=padding([schedule]), loads=[
        load(reference_matrices(shapes, job.world, rank), flops) for rank in range(job.world)])
    ours = totals(steps[0], job.node_ranks) | dict(padding=padding(steps), loads=loads)
    fields = dataclasses.fields(a)
    return [
        f"# One optimizer step on {job.world} ranks, {job.world // job.node_ranks} node(s)", "",
        "## Counted", "", *totals_table([("here", ours), ("Parallel Muon record", theirs)]),
        "In launch order, rank 0:", "", *order_table(steps, job.node_ranks),
        "Work of each rank, by its direction:", "", *rank_table(loads, job.node_ranks),
        "## Predicted", "",
        "Not measured. Milliseconds of a step that its communication adds to the update:", "",
        *predicted_rows(predictions(dry, a)), "```", FORMULA, "```", "",
        *markdown(["assumption", "value", "source"],
                  [[f.name, f"{getattr(a, f.name):g}", SOURCES[f.name]
                    if getattr(a, f.name) == f.default else "given"] for f in fields])]


# ---- the command ---------------------------------------------------------------------------------

def checked(args: argparse.Namespace) -> Assumptions:
    """The assumptions. BadInput before anything runs."""
    if not 1 <= args.ranks <= 64:
        raise BadInput(f"--ranks {args.ranks}: give 1 to 64 processes of this machine")
    if args.nodes < 1 or args.ranks % args.nodes:
        raise BadInput(f"--nodes {args.nodes}: must divide --ranks {args.ranks}")
    if args.out and not args.out.resolve().parent.is_dir():
        raise BadInput(f"--out {args.out}: no such folder; make it first")
    values = {}
    for text in args.assume:
        name, _, value = text.partition("=")
        if name not in SOURCES:
            raise BadInput(f"--assume {text}: give NAME=VALUE, one of {', '.join(SOURCES)}")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = math.nan
        if not 0 < values[name] < 1e9:
            raise BadInput(f"--assume {text}: must be a positive number")
    return Assumptions(**values)


def run(args: argparse.Namespace, root: Path) -> int:
    """The verb. Tables to the terminal and, with --out, to a file."""
    a = checked(args)
    job = Job((args.script or root / "train_gpt.py").resolve(), tuple(args.words), args.ranks,
              args.ranks // args.nodes)
    asked = tuple(job._replace(world=nodes * ranks, node_ranks=ranks) for nodes, ranks in PREDICTED)
    dry = in_processes(dry_steps, [asked])[0]           # first: it is quick and refuses what is wrong
    port = free_port()
    ranks = in_processes(real_step, [job._replace(rank=rank, port=port) for rank in range(job.world)])
    lines = report([r["events"] for r in ranks], dry, job, a)
    given = " ".join(job.knobs) or "nothing"
    lines[1:1] = ["", f"preset={ranks[0]['preset']} ortho={ranks[0]['ortho']}; given: {given}"]
    whole = len({r["digest"] for r in ranks}) == 1
    lines.append(f"Parameters after the step: {'' if whole else 'NOT '}bit-equal on all {job.world} ranks.")
    print("\n".join(lines), flush=True)
    if args.out:
        write_atomic(args.out, "\n".join(lines) + "\n")
    return 0 if whole else 1
