"""Times of the directions and updates, and the floors they are compared with: operations, bytes, products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from lab.update.cases import (
    Bank,
    Part,
    Portion,
    Setup,
    TimedCase,
    banks_of,
    cache_bytes,
    calls_of,
    direction_flops,
    input_sets,
    skipping,
    uncompiled,
)

REPLAYS = 40  # timed repetitions
PRODUCTS = 20  # calls of a floor's products in one CUDA graph, each on inputs of its own
HOST_SECONDS = 2.0  # on a CPU a case ends after this long, with three repetitions at least
# Bytes a number that no implementation can avoid: float32 in and out, bf16 between and as a direction.
MOVED_BYTES = {
    Part.DIRECTION: 4 + 2,  # momentum in, direction out
    Part.UPDATE: 3 * 4 + 2 * 4 + 2,  # gradient, momentum, weights in; momentum, weights out; direction
}


# ---- clocks --------------------------------------------------------------------------------------


def measure(calls: list[Callable], cuda: bool) -> list[float]:
    """Return the ms of each repetition, `calls` in turn, after one round of them that does not count."""
    for call in calls:
        call()
    return device_times(calls) if cuda else host_times(calls)


def host_times(calls: list[Callable]) -> list[float]:
    """Return the ms of up to REPLAYS repetitions on a CPU."""
    times: list[float] = []
    end = time.perf_counter() + HOST_SECONDS
    while len(times) < 3 or (len(times) < REPLAYS and time.perf_counter() < end):
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(1000 * (time.perf_counter() - start))
    return times


def device_times(calls: list[Callable]) -> list[float]:
    """Return the ms of REPLAYS repetitions on a GPU, by its own clock."""
    torch.cuda.synchronize()
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS)]
    for i in range(REPLAYS):
        starts[i].record()
        calls[i % len(calls)]()
        ends[i].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends)]


def quartiles(times: list[float]) -> str:
    """Return a log line's pairs of a list of ms: nearest ranks, so that each is a time that was measured."""
    ranked = sorted(times)
    fractions = dict(median_ms=0.5, min_ms=0, q1_ms=0.25, q3_ms=0.75)
    pairs = {key: ranked[round(fraction * (len(ranked) - 1))] for key, fraction in fractions.items()}
    return " ".join(f"{key}:{ms:.5f}" for key, ms in pairs.items()) + f" n:{len(times)}"


def run_calls(calls: list[Callable], streams: list[torch.cuda.Stream]) -> None:
    """Run the calls, each on its own stream after earlier work, and join the streams; with none, in turn."""
    if not streams:
        for call in calls:
            call()
        return

    main = torch.cuda.current_stream()
    for call, stream in zip(calls, streams):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            call()
    for stream in streams:
        main.wait_stream(stream)


def graphs_of(sets: list[list[Callable]], fork: bool) -> list[torch.cuda.CUDAGraph]:
    """Capture one CUDA graph for each set of inputs: its calls in turn, or (fork) each on its own stream.

    Everything runs once before, on the same streams: nothing may compile or load during a capture.
    """
    streams = [torch.cuda.Stream() for _ in sets[0]] if fork else []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for calls in [sets[0], *sets]:
            run_calls(calls, streams)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    graphs = []
    for calls in sets:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=side):
            run_calls(calls, streams)
    return graphs


def one_by_one(calls: list[Callable]) -> Callable[[], None]:
    """Return a function that makes all the calls and discards their results."""

    def run() -> None:
        for call in calls:
            call()

    return run


# ---- times ---------------------------------------------------------------------------------------


def eager_times(s: Setup, case: TimedCase, sets: list[list[dict]]) -> list[float]:
    """Time the operators one by one."""
    return measure([one_by_one(calls) for calls in calls_of(s, case, sets, uncompiled)], s.cuda)


def graph_times(calls: list[list[Callable]], fork: bool) -> list[float]:
    """Time CUDA graphs of compiled calls."""
    graphs = graphs_of(calls, fork)
    try:
        return measure([graph.replay for graph in graphs], True)
    finally:
        torch.cuda.synchronize()  # before the graphs and their memory go


class Mode(NamedTuple):
    """A way to run a case."""

    name: str
    measure: Callable


def modes_of(s: Setup, case: TimedCase, sets: list[list[dict]]) -> Iterator[Mode]:
    """Yield the modes of a case: eager; on a GPU also compiled, in a graph, on one stream and on four."""
    yield Mode("eager", partial(eager_times, s, case, sets))
    if s.cuda:
        torch._dynamo.reset()  # a function compiles eight times at most, and this is another row
        calls = calls_of(s, case, sets, s.m.compile)
        yield Mode("graph", partial(graph_times, calls, fork=False))
        yield Mode("graph4", partial(graph_times, calls, fork=True))


@torch.no_grad()
def time_cases(s: Setup, cases: list[TimedCase], deadline: float) -> None:
    """Log a `time` line for every case and mode, or a `skip` line that says why there is none."""
    portion: Portion | None = None
    sets: list[list[dict]] = []
    s.progress.begin("directions: times")
    for case in s.progress.each(cases, "cases"):
        if time.perf_counter() > deadline:
            s.log(f"skip {case} | out of time (--seconds)")
            continue
        if case.portion != portion:
            sets = []  # the old ones go before the new ones come
            portion = case.portion
            sets = input_sets(s, portion)
        with skipping(s.log, str(case)):
            for mode in modes_of(s, case, sets):
                with skipping(s.log, f"{case} mode:{mode.name}"):
                    s.log(f"time {case} mode:{mode.name} {quartiles(mode.measure())}")


# ---- floors --------------------------------------------------------------------------------------


def log_work(s: Setup) -> None:
    """Log `moved`, the MB that any implementation moves, and `work`, the GFLOP by row and bank."""
    for portion in Portion:
        banks = banks_of(s, portion)
        numel = sum(bank.numel for bank in banks)
        for part, each in MOVED_BYTES.items():
            s.log(f"moved part:{part} share:{portion} mb:{numel * each / 1e6:.4f}")
        for row in s.t.ORTHO:
            with skipping(s.log, f"work:{row} share:{portion}"):
                gflops = [direction_flops(s.t, row, bank.shape) / 1e9 for bank in banks]
                for bank, gflop in zip(banks, gflops):
                    s.log(f"work row:{row} share:{portion} bank:{bank.name} gflop:{gflop:.6f}")


def products_ms(s: Setup, bank: Bank) -> float:
    """Return the ms of XX' and then AX of a bank: the mean of at least PRODUCTS calls, on fresh inputs.

    On a GPU these are one CUDA graph: launched one by one, the host takes longer than a small product.
    """
    n, long = sorted((bank.rows, bank.columns))
    size = bank.numel * s.m.dtype.itemsize
    rounds = max(PRODUCTS, -(-2 * cache_bytes(s) // size))

    def products(X: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(X, X.mT), X)

    inputs = [torch.randn(bank.count, n, long, device=s.m.device, dtype=s.m.dtype) for _ in range(rounds)]
    calls = [partial(products, X) for X in inputs]
    if s.cuda:
        (graph,) = graphs_of([calls], False)
        times = measure([graph.replay], True)
        torch.cuda.synchronize()  # before the graph and its memory go
    else:
        times = measure([one_by_one(calls)], False)
    return sorted(times)[len(times) // 2] / rounds


def copied_numbers(s: Setup) -> int:
    """Return how many numbers the copy moves: more than any cache holds."""
    if s.tiny:
        return 2**20
    return 2**28 if s.cuda else 2**25


@torch.no_grad()
def log_floors(s: Setup) -> None:
    """Log `copy`, the GB/s that a device copy reads and writes, and `bmm`, the rate of products by bank."""
    size = copied_numbers(s)
    source = torch.ones(size, device=s.m.device)
    target = torch.empty(size, device=s.m.device)
    times = sorted(measure([partial(target.copy_, source)], s.cuda))
    s.log(f"copy gbps:{2 * 4 * size / times[len(times) // 2] / 1e6:.2f} mb:{4 * size / 1e6:.1f}")
    del source, target

    for portion in Portion:
        for bank in banks_of(s, portion):
            ms = products_ms(s, bank)
            n, long = sorted((bank.rows, bank.columns))
            tflops = 4 * bank.count * n * n * long / ms / 1e9
            s.log(
                f"bmm share:{portion} bank:{bank.name} matrices:{bank.count} rows:{bank.rows} "
                f"columns:{bank.columns} ms:{ms:.5f} tflops:{tflops:.6f}"
            )
