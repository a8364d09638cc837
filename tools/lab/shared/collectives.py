"""Record the collectives of a script with wrappers around torch.distributed's functions, and add them up."""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Function(NamedTuple):
    """A function of torch.distributed: its kind, and the names of two of its arguments."""

    kind: str
    given: str  # the tensor that a rank puts in
    whole: str  # the whole buffer


# torch 2.11 says *_tensor where 2.13 says *_single.
FUNCTIONS = {
    "all_reduce": Function("all-reduce", "tensor", "tensor"),
    "reduce_scatter_single": Function("reduce-scatter", "input", "input"),
    "reduce_scatter_tensor": Function("reduce-scatter", "input", "input"),
    "reduce_scatter": Function("reduce-scatter", "input_list", "input_list"),
    "all_gather_single": Function("all-gather", "input_tensor", "output_tensor"),
    "all_gather_into_tensor": Function("all-gather", "input_tensor", "output_tensor"),
    "all_gather": Function("all-gather", "tensor", "tensor_list"),
    "all_to_all_single": Function("all-to-all", "input", "input"),
    "all_to_all": Function("all-to-all", "input_tensor_list", "input_tensor_list"),
    "broadcast": Function("broadcast", "tensor", "tensor"),
    "reduce": Function("reduce", "tensor", "tensor"),
}
# How often (n - 1) / n of the whole buffer passes over each link of a ring of n.
RING_PASSES = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1, "all-to-all": 1}


# ---- events --------------------------------------------------------------------------------------


class Collective(NamedTuple):
    """A collective as one rank launches it. Sizes in bytes; payload: the size of the whole buffer."""

    kind: str
    payload: int
    ranks: tuple[int, ...]
    dtype: str
    device: str = "cpu"
    given: int = 0  # bytes that this rank puts in,
    zeros: int = 0  # and how many of them are exactly zero

    @property
    def wire(self) -> float:
        """Bytes that each rank sends, and receives, in a ring."""
        n = len(self.ranks)
        if self.kind in RING_PASSES:
            return self.payload * (RING_PASSES[self.kind] * (n - 1) / n)
        return self.payload * float(n > 1)


class Wait(NamedTuple):
    """The script waits for the collective with this index among the events."""

    of: int


class MatrixBatch(NamedTuple):
    """A batch of matrices whose direction is computed; real: those that are not padding."""

    shape: tuple[int, int]
    slots: int
    real: int


Event = Collective | Wait | MatrixBatch


def collectives_of(events: list[Event]) -> list[Collective]:
    """Return the collectives among the events."""
    return [event for event in events if isinstance(event, Collective)]


def batches_of(events: list[Event]) -> list[MatrixBatch]:
    """Return the batches of matrices among the events."""
    return [event for event in events if isinstance(event, MatrixBatch)]


# ---- recording -----------------------------------------------------------------------------------


def tensors_of(value: Any) -> list[Tensor]:
    """Return an argument that is a tensor or a list of them as a list."""
    return [value] if isinstance(value, Tensor) else list(value)


def nbytes(tensors: list[Tensor]) -> int:
    """Return the bytes of the tensors together."""
    return sum(x.numel() * x.element_size() for x in tensors)


class Waited:
    """A Work of torch.distributed that calls `notify` when it is waited for."""

    def __init__(self, work: Any, notify: Callable[[], None]) -> None:
        self._work = work
        self._notify = notify

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Call `notify`, then wait."""
        self._notify()
        return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Recorder:
    """Records calls of torch.distributed's functions in order, while `recording`.

    A script must be loaded and run inside installed(), since it may bind the functions to names of its own.
    waits: also record which collectives the script waits for. zeros: also count zeros, which reads the
    tensors and so needs a CPU.
    """

    def __init__(self, waits: bool = False, zeros: bool = False) -> None:
        self.waits = waits
        self.zeros = zeros
        self.on = False
        self.events: list[Event] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replace torch.distributed's functions by wrappers that record."""
        originals = {name: getattr(dist, name) for name in FUNCTIONS if hasattr(dist, name)}
        for name, fn in originals.items():
            setattr(dist, name, self.wrapped(fn, FUNCTIONS[name]))
        try:
            yield
        finally:
            for name, fn in originals.items():
                setattr(dist, name, fn)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """Yield a list that receives the events of the block. An outer recording gets them at the end."""
        outer_events = self.events
        outer_on = self.on
        events: list[Event] = []
        self.events = events
        self.on = True
        try:
            yield events
        finally:
            self.events = outer_events
            self.on = outer_on
            if outer_on:
                outer_events.extend(events)

    def wrapped(self, fn: Callable, function: Function) -> Callable:
        """Return a function that records its call and does what fn does."""
        signature = inspect.signature(fn)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return fn(*args, **kwargs)
            index = len(self.events)
            self.events.append(self.collective(function, signature.bind(*args, **kwargs).arguments))
            work = fn(*args, **kwargs)
            if not self.waits:
                return work

            def notify() -> None:
                self.events.append(Wait(index))

            if work is None:  # not asynchronous: fn has waited
                notify()
                return None
            return Waited(work, notify)

        return call

    def collective(self, function: Function, arguments: dict[str, Any]) -> Collective:
        """Return the description of a call that is about to be made."""
        given = tensors_of(arguments[function.given])
        whole = tensors_of(arguments[function.whole])
        group = arguments.get("group") or dist.group.WORLD
        zeros = 0
        if self.zeros:
            zeros = sum(int((x == 0).sum()) * x.element_size() for x in given)
        return Collective(
            kind=function.kind,
            payload=nbytes(whole),
            ranks=tuple(dist.get_process_group_ranks(group)),
            dtype=str(given[0].dtype).removeprefix("torch."),
            device=given[0].device.type,
            given=nbytes(given),
            zeros=zeros,
        )

    def watch_directions(self, t: ModuleType) -> None:
        """Make every call of the script's `orthogonalize` record a MatrixBatch, too."""
        inner = t.orthogonalize

        @functools.wraps(inner)
        def orthogonalize(G: Tensor, method: str) -> Tensor:
            if self.on:
                slots = G.numel() // (G.size(-2) * G.size(-1))
                real = int((G != 0).flatten(-2).any(-1).sum()) if self.zeros else slots
                self.events.append(MatrixBatch(tuple(G.shape[-2:]), slots, real))
            return inner(G, method)

        t.orthogonalize = orthogonalize


# ---- figures -------------------------------------------------------------------------------------


class Scope(enum.Enum):
    """Which links a group of ranks uses. The values are the words of the tables."""

    WITHIN_NODE = "intra"
    ACROSS_NODES = "inter"


def scope(ranks: tuple[int, ...], node_ranks: int) -> Scope:
    """Return the scope of a group; a rank lies on node rank // node_ranks."""
    nodes = {rank // node_ranks for rank in ranks}
    return Scope.WITHIN_NODE if len(nodes) == 1 else Scope.ACROSS_NODES


class Totals(NamedTuple):
    """The collectives of one rank's step."""

    counts: Counter[str]  # calls of each kind
    payload: int  # bytes
    wire: dict[Scope, float]  # bytes per link


def totals(events: list[Event], node_ranks: int) -> Totals:
    """Add up the collectives of one rank's step."""
    calls = collectives_of(events)
    wire = {
        where: sum(call.wire for call in calls if scope(call.ranks, node_ranks) == where) for where in Scope
    }
    return Totals(Counter(call.kind for call in calls), sum(call.payload for call in calls), wire)


def padding_fraction(calls: list[Collective]) -> float:
    """Return the fraction of the bytes given that is padding, that is, exactly zero."""
    return sum(call.zeros for call in calls) / max(1, sum(call.given for call in calls))


def padding(steps: list[list[Event]]) -> float:
    """Return the fraction of the bytes that all ranks give in their steps that is padding."""
    return padding_fraction([call for events in steps for call in collectives_of(events)])
