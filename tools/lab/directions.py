"""Measures the rows of ORTHO and STEP_RULES of train_gpt.py on this machine: time, floors, quality.

    ./run.sh record directions                                    everything but real momentum
    ./run.sh record directions preset=h100x1 data_path=DIR        and the momentum of 100 steps of training
    python tools/lab/directions.py --tiny                           a trial in seconds

Writes records/directions/DATE_DEVICE/: log.txt, and made from it (direction_log.py) result.json, tables.md
and spectrum.png. What fails is logged with its reason and the rest goes on. On a GPU children compile each
row into the on-disk cache while this process trains; they end before anything is timed.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ledger import direction_log
from ledger.runlog import SEPARATOR, read_text
from script import BadInput, load_script

ROOT = Path(__file__).resolve().parents[2]
REPLAYS, SETS = 40, 4               # timed repetitions; sets of inputs in turn, more where they fit the L2
PRODUCTS = 20                       # calls of a floor's products in one CUDA graph, each on inputs of its own
HOST_SECONDS = 2.0                  # on a CPU a case ends after this long, with three repetitions at least
RANKS = 8                           # whose largest share is "an eighth"
LAYERS = 4                          # matrices of each bank whose momentum is looked at
MODULE = "measured_script"          # the script's name in sys.modules
POINTS = 96                         # singular values in the picture
# Momentum needs gradients, not speed: no compilation (a minute), so micro-batches that fit without it.
GPU_KNOBS = ["preset=h100x1", "train_batch_tokens=65536", "micro_batch_tokens=32768"]
CPU_KNOBS = ["preset=cpu"]
TINY_KNOBS = [
    "num_layers=2", "model_dim=32", "num_heads=4", "num_kv_heads=2", "mlp_mult=3.0", "rope_dims=4",
    "xsa_last_n=1", "ve_last_n=1", "ve_dim=8", "bigram_vocab_size=64", "bigram_dim=8", "train_seq_len=32",
    "eval_seq_len=32", "eval_stride=8", "eval_batch_tokens=512", "train_batch_tokens=512",
    "micro_batch_tokens=256"]


class Bank(NamedTuple):
    """A bank of the optimizer: (count, rows, columns)."""
    name: str
    count: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.columns


class Case(NamedTuple):
    """What is timed. part: direction (momentum in, direction out) or update (gradient in, weights out).

    share: all matrices of every bank, or the eighth that one of eight ranks owns.
    """
    part: str
    share: str
    row: str
    rule: str = "muon"
    cautious: int = 0

    def __str__(self) -> str:
        return " ".join(f"{key}:{value}" for key, value in self._asdict().items())


class Bench(NamedTuple):
    """What everything works with: the trainer as a module, its config and machine, and how to log a line."""
    t: ModuleType
    h: object
    m: object
    log: Callable[[str], None]
    tiny: bool

    @property
    def cuda(self) -> bool:
        return self.m.device.type == "cuda"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_measured(path: Path) -> ModuleType:
    """The script whose tables are measured. BadInput when it lacks a name that this file measures by."""
    needs = ("ORTHO", "STEP_RULES", "orthogonalize", "matrix_update", "StepScalars", "Optimizer")
    return load_script(path, MODULE, needs, "directions")


def reason(error: Exception) -> str:
    """An exception as a note of one line, without this machine's folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text).replace(" | ", " ")[:200]


# ---- cases ---------------------------------------------------------------------------------------

def banks_of(b: Bench, share: str) -> list[Bank]:
    """The matrix banks in their work order. An eighth is what the busiest of eight ranks holds: of matrices
    that share a buffer ceil(count / 8), all of the first kind."""
    table, held = b.t.parameter_table(b.h), {}
    for spec in b.t.MATRICES:
        held.setdefault(getattr(spec, "home", spec.name), []).append(Bank(spec.name, *table[spec.name][0]))
    if share == "all":
        return [bank for banks in held.values() for bank in banks]
    return [banks[0]._replace(count=-(-sum(bank.count for bank in banks) // RANKS)) for banks in held.values()]


def all_cases(b: Bench) -> list[Case]:
    """In order of importance, for a run that is out of time before the end."""
    rows, rules = list(b.t.ORTHO), [rule for rule in b.t.STEP_RULES if rule != "muon"]
    return [*(Case("direction", "all", row) for row in rows), *(Case("update", "all", row) for row in rows),
            *(Case("update", "all", b.h.ortho, rule) for rule in rules),
            Case("update", "all", b.h.ortho, "muon", 1),
            *(Case("update", "eighth", row) for row in rows),
            *(Case("direction", "eighth", row) for row in rows)]


def groups(cases: list[Case]) -> list[list[Case]]:
    """Cases that one child compiles: those of a direction, or of a rule."""
    out: dict[tuple, list[Case]] = {}
    for case in cases:
        out.setdefault((case.row, case.rule, case.cautious), []).append(case)
    return list(out.values())


def step_scalars(b: Bench) -> tuple:
    """StepScalars as tensors on the device; BadInput when it has a field that this file does not know."""
    known = dict(clip=1.0, momentum=0.95, matrix_lr=0.025, adam_lr_mul=1.0, correction1=0.1, correction2=0.05)
    fields = b.t.StepScalars._fields
    lost = [name for name in fields if name not in known]
    if lost:
        raise BadInput(f"StepScalars.{lost[0]}: give it a value in step_scalars of tools/lab/directions.py")
    return b.t.StepScalars(**{name: torch.tensor(known[name], device=b.m.device) for name in fields})


def update_arguments(b: Bench, values: dict) -> list:
    """`values` in the order of matrix_update's parameters; BadInput when one of them is not known here."""
    out = []
    for name, parameter in inspect.signature(b.t.matrix_update).parameters.items():
        if name not in values and parameter.default is inspect.Parameter.empty:
            raise BadInput(f"matrix_update({name}): give it a value in calls_of of tools/lab/directions.py")
        out.append(values.get(name, parameter.default))
    return out


def cache_bytes(b: Bench) -> int:
    """Of the device's L2; 0 on a CPU."""
    return torch.cuda.get_device_properties(b.m.device).L2_cache_size if b.cuda else 0


def input_sets(b: Bench, share: str) -> list[list[dict]]:
    """[set][bank] -> W, g, momentum (count, rows, columns) float32; together at least twice the L2 cache."""
    banks = banks_of(b, share)
    sets = max(SETS, -(-2 * cache_bytes(b) // (4 * sum(bank.numel for bank in banks))))
    generator = torch.Generator(b.m.device).manual_seed(0)
    draw = lambda bank: torch.randn(bank[1:], device=b.m.device, generator=generator)
    return [[dict(W=0.02 * draw(bank), g=1e-3 * draw(bank), momentum=1e-3 * draw(bank)) for bank in banks]
            for _ in range(sets)]


def calls_of(b: Bench, case: Case, sets: list[list[dict]], wrap: Callable) -> list[list[Callable]]:
    """[set][bank] -> the call that is timed. wrap: the trainer's compiler, or the identity."""
    if case.part == "direction":
        fn = wrap(b.t.orthogonalize)
        return [[lambda x=x["momentum"]: fn(x, case.row) for x in one] for one in sets]
    fn, s = wrap(b.t.matrix_update), step_scalars(b)
    h = dataclasses.replace(b.h, ortho=case.row, step_rule=case.rule, cautious_wd=bool(case.cautious))
    shape = getattr(b.t, "RULE_STATE", {}).get(case.rule)
    state = lambda W: torch.zeros(shape(*W.shape), device=W.device) if shape else None
    arguments = lambda x: update_arguments(b, {**x, "s": s, "h": h, "second": state(x["W"])})
    rows = [[arguments(x) for x in one] for one in sets]
    return [[lambda row=row: fn(*row) for row in one] for one in rows]


# ---- clocks --------------------------------------------------------------------------------------

def measure(calls: list[Callable], cuda: bool) -> list[float]:
    """ms of each repetition, `calls` in turn, after one round of them that does not count."""
    for call in calls:
        call()
    if not cuda:
        out, end = [], time.perf_counter() + HOST_SECONDS
        while len(out) < 3 or (len(out) < REPLAYS and time.perf_counter() < end):
            start = time.perf_counter()
            calls[len(out) % len(calls)]()
            out.append(1000 * (time.perf_counter() - start))
        return out
    torch.cuda.synchronize()
    event = lambda: torch.cuda.Event(enable_timing=True)
    events = [(event(), event()) for _ in range(REPLAYS)]
    for i, (start, end) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def quartiles(values: list[float]) -> str:
    """The log's pairs of a list of ms: nearest ranks, so that each is a time that was measured."""
    values = sorted(values)
    at = lambda share: values[round(share * (len(values) - 1))]
    pairs = dict(median_ms=at(0.5), min_ms=at(0), q1_ms=at(0.25), q3_ms=at(0.75))
    return " ".join(f"{key}:{value:.5f}" for key, value in pairs.items()) + f" n:{len(values)}"


def on_streams(calls: list[Callable], streams: list[torch.cuda.Stream]) -> None:
    """The calls, each on its stream behind what is queued, joined at the end; without streams one by one."""
    main = torch.cuda.current_stream()
    for i, call in enumerate(calls):
        stream = streams[i] if streams else main
        if streams:
            stream.wait_stream(main)
        with torch.cuda.stream(stream):
            call()
    for stream in streams:
        main.wait_stream(stream)


def graphs_of(sets: list[list[Callable]], fork: bool) -> list[torch.cuda.CUDAGraph]:
    """One CUDA graph per set of inputs: its calls in turn, or (fork) each on a stream of its own.

    First everything runs once on the same streams, outside: nothing may compile or load during a capture.
    """
    streams, side = [torch.cuda.Stream() for _ in sets[0]] if fork else [], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for calls in [sets[0], *sets]:
            on_streams(calls, streams)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graphs = []
    for calls in sets:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=side):
            on_streams(calls, streams)
    return graphs


def one_by_one(calls: list[Callable]) -> Callable[[], None]:
    """A call of all of them; what they return is dropped."""
    def run() -> None:
        for call in calls:
            call()
    return run


def modes_of(b: Bench, case: Case, sets: list[list[dict]]) -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """(mode, its measurement): eager lines; on a GPU its compilation in a graph, one stream and four."""
    yield "eager", lambda: measure([one_by_one(one) for one in calls_of(b, case, sets, lambda f: f)], b.cuda)
    if not b.cuda:
        return
    torch._dynamo.reset()           # one code object compiles eight times at most; this is another row
    calls = calls_of(b, case, sets, b.m.compile)

    def graphed(fork: bool) -> list[float]:
        graphs = graphs_of(calls, fork)
        try:
            return measure([graph.replay for graph in graphs], True)
        finally:
            torch.cuda.synchronize()        # before the graphs and their memory go

    yield "graph", lambda: graphed(False)
    yield "graph4", lambda: graphed(True)


@torch.no_grad()
def time_cases(b: Bench, cases: list[Case], deadline: float) -> None:
    """A `time` line for every case and mode, or a `skip` line that says why there is none."""
    share, sets = "", []
    for case in cases:
        if time.perf_counter() > deadline:
            b.log(f"skip {case} | out of time (--seconds)")
            continue
        if case.share != share:
            del sets
            share, sets = case.share, input_sets(b, case.share)
        try:
            for mode, timed in modes_of(b, case, sets):
                try:
                    b.log(f"time {case} mode:{mode} {quartiles(timed())}")
                except BadInput:
                    raise
                except Exception as error:      # whatever a compiler, kernel or capture raises
                    b.log(f"skip {case} mode:{mode} | {reason(error)}")
        except BadInput:
            raise
        except Exception as error:
            b.log(f"skip {case} | {reason(error)}")


# ---- floors --------------------------------------------------------------------------------------

def solve_flops(a: tuple, right: tuple, *args, out_val=None, **kwargs) -> int:
    """A triangular solve: n^2 m of a (B, n, n) and a (B, n, m)."""
    return a[0] * a[-1] * right[-2] * right[-1]


def flops_of(b: Bench, row: str, bank: Bank) -> int:
    """Products of a direction on a bank, 2nmk each, even of symmetric results; counted, not run."""
    solve = {torch.ops.aten.linalg_solve_triangular: solve_flops}
    with FlopCounterMode(display=False, custom_mapping=solve) as c:
        b.t.orthogonalize(torch.empty(bank[1:], device="meta"), row)
    return c.get_total_flops()


@torch.no_grad()
def log_work(b: Bench) -> None:
    """`work`: GFLOP by row and bank. `moved`: MB that no implementation can avoid, in float32 and bf16."""
    for share in ("all", "eighth"):
        banks = banks_of(b, share)
        numel = sum(bank.numel for bank in banks)
        for part, each in (("direction", 4 + 2), ("update", 3 * 4 + 2 * 4 + 2)):   # g, m, W; m, W; direction
            b.log(f"moved part:{part} share:{share} mb:{numel * each / 1e6:.4f}")
        for row in b.t.ORTHO:
            try:
                for gflop, bank in [(flops_of(b, row, bank) / 1e9, bank) for bank in banks]:
                    b.log(f"work row:{row} share:{share} bank:{bank.name} gflop:{gflop:.6f}")
            except Exception as error:
                b.log(f"skip work:{row} share:{share} | {reason(error)}")


def products_ms(b: Bench, bank: Bank) -> float:
    """ms of XX' and then AX of a bank: the mean of at least PRODUCTS calls in a row, on fresh inputs.

    On a GPU these are one CUDA graph: launched one by one, the host takes longer than a small product.
    """
    n, long = sorted(bank[2:])
    size = bank.numel * b.m.dtype.itemsize
    rounds = max(PRODUCTS, -(-2 * cache_bytes(b) // size))
    X = [torch.randn(bank.count, n, long, device=b.m.device, dtype=b.m.dtype) for _ in range(rounds)]
    calls = [lambda x=x: torch.bmm(torch.bmm(x, x.mT), x) for x in X]
    if not b.cuda:
        took = measure([one_by_one(calls)], False)
    else:
        graph, = graphs_of([calls], False)
        took = measure([graph.replay], True)
        torch.cuda.synchronize()                # before the graph and its memory go
    return sorted(took)[len(took) // 2] / rounds


@torch.no_grad()
def log_floors(b: Bench) -> None:
    """`copy`: GB/s read and written by a device copy. `bmm`: rate of XX' and AX at each bank's shape."""
    size = 2 ** 20 if b.tiny else 2 ** 28 if b.cuda else 2 ** 25
    source, target = torch.ones(size, device=b.m.device), torch.empty(size, device=b.m.device)
    best = sorted(measure([lambda: target.copy_(source)], b.cuda))
    b.log(f"copy gbps:{2 * 4 * size / best[len(best) // 2] / 1e6:.2f} mb:{4 * size / 1e6:.1f}")
    del source, target
    for share in ("all", "eighth"):
        for bank in banks_of(b, share):
            took, (n, long) = products_ms(b, bank), sorted(bank[2:])
            tflops = 4 * bank.count * n * n * long / took / 1e9
            b.log(f"bmm share:{share} bank:{bank.name} matrices:{bank.count} rows:{bank.rows} "
                  f"columns:{bank.columns} ms:{took:.5f} tflops:{tflops:.6f}")


# ---- quality -------------------------------------------------------------------------------------

def with_spectrum(shape: tuple[int, int], values: Tensor, generator: torch.Generator) -> Tensor:
    """A float64 matrix with these singular values and random singular vectors."""
    n = min(shape)
    draw = lambda size: torch.randn(size, n, generator=generator, dtype=torch.float64)
    U, V = (torch.linalg.qr(draw(size))[0] for size in shape)
    return (U * values) @ V.T


def heavy_rows(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Like a gradient: eight shared patterns over noise, rows scaled by a log-normal of deviation 1."""
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    patterns = draw(shape[0], 8) @ draw(8, shape[1])
    return (patterns + draw(*shape)) * draw(shape[0], 1).exp()


FAMILIES: dict[str, Callable] = {
    "gaussian": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64),
    "log1e3": lambda shape, g: with_spectrum(shape, torch.logspace(0, -3, min(shape)).double(), g),
    "harmonic": lambda shape, g: with_spectrum(shape, 1 / torch.arange(1, min(shape) + 1).double(), g),
    "heavy_rows": heavy_rows,
}


def synthetic(b: Bench) -> Iterator[tuple[str, Tensor]]:
    """(family, two matrices (2, M, N) float32) at the banks' shapes; the tall one for Gaussians only."""
    D, kv, F = b.h.model_dim, b.h.kv_dim, b.h.mlp_dim
    for family, make in FAMILIES.items():
        for shape in [(D, D), (kv, D), (D, F)] + [(F, D)] * (family == "gaussian"):
            generator = torch.Generator().manual_seed(7)
            yield family, torch.stack([make(shape, generator) for _ in range(2)]).float()


def train_momentum(b: Bench, steps: int) -> list[tuple[str, Tensor]]:
    """[("momentum", (4, M, N) of a bank)] after `steps` steps of the trainer's own step, uncompiled."""
    t, h = b.t, b.h
    m = dataclasses.replace(b.m, compile=lambda f: f)
    torch.manual_seed(h.seed)
    model = t.GPT(h, m.ops, m.dtype).to(m.device)
    optimizer, loader = t.Optimizer(model, h, m), t.TokenLoader(h, m)
    backward, _ = t.bind_pass(model.loss, optimizer)
    for step in range(steps):
        loss = t.train_step(backward, optimizer, loader.next(), t.hyper_at(h, step, 0.0))
    manifest = Path(h.data_path) / "manifest.json"
    data = sha256_file(manifest)[:16] if manifest.is_file() else "none"
    b.log(f"real steps:{steps} batch:{h.train_batch_tokens} loss:{loss.item():.4f} "
          f"data_manifest_sha256:{data}")
    out = []
    for spec in t.MATRICES:
        momentum = optimizer.momentum[spec.name].float().cpu()
        pick = torch.linspace(0, len(momentum) - 1, min(LAYERS, len(momentum))).round().long()
        out.append(("momentum", momentum[pick].clone()))
    return out


class Factor(NamedTuple):
    """The float64 singular value decomposition of an input u (M, N), n = min(M, N)."""
    U: Tensor       # (M, n)
    S: Tensor       # (n,)
    Vh: Tensor      # (n, N)


def factor_of(u: Tensor) -> Factor:
    return Factor(*torch.linalg.svd(u.double(), full_matrices=False))


def figures(O: Tensor, f: Factor) -> dict:
    """Quality of O (M, N) as the polar factor P = UV' of u; `band` holds its singular values, ascending.

    polar |O - P| / sqrt(n), orth |OO' - I| / sqrt(n) on the short side, cosine <O, P> / (|O| |P|), efficiency
    <u, O> / (|u|_* |O|_op): the share of the best decrease a step of that operator norm can have.
    """
    O, P, n = O.double(), f.U @ f.Vh, len(f.S)
    gram = O @ O.T if O.size(0) <= O.size(1) else O.T @ O
    band = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    inner = ((f.U.T @ O) * f.Vh).sum(1)                         # u_i' O v_i
    return dict(polar=((O - P).norm() / n ** 0.5).item(),
                orth=((gram - torch.eye(n, dtype=gram.dtype)).norm() / n ** 0.5).item(),
                cosine=(inner.sum() / (O.norm() * n ** 0.5)).item(),
                efficiency=((inner * f.S).sum() / (f.S.sum() * band[-1])).item(), band=band)


def quality_line(found: list[dict]) -> str:
    """Pairs of several matrices' figures: means, and the band of all their singular values together."""
    band = torch.cat([one["band"] for one in found])
    average = {key: sum(one[key] for one in found) / len(found)
               for key in ("polar", "orth", "cosine", "efficiency")}
    at = torch.quantile(band, torch.tensor([0, 0.05, 0.5, 0.95, 1], dtype=band.dtype)).tolist()
    pairs = average | dict(zip(("smin", "s05", "s50", "s95", "smax"), at))
    if not all(abs(value) < float("inf") for value in pairs.values()):
        raise ArithmeticError("the direction is not finite")
    return " ".join(f"{key}:{value:.6f}" for key, value in pairs.items()) + f" matrices:{len(found)}"


def curve_line(O: Tensor, f: Factor) -> str:
    """POINTS singular values of the input over the largest, O along their pair (u' O v), and |O v|."""
    pick = torch.linspace(0, len(f.S) - 1, min(POINTS, len(f.S))).round().long()
    image = O.double() @ f.Vh[pick].T                           # (M, points)
    columns = dict(input=f.S[pick] / f.S[0], along=(f.U[:, pick] * image).sum(0), length=image.norm(dim=0))
    return " ".join(f"{key}:" + ",".join(f"{value:.5f}" for value in values)
                    for key, values in columns.items())


@torch.no_grad()
def log_quality(b: Bench, momentum: list[tuple[str, Tensor]]) -> None:
    """A `quality` line for every row, family and shape, a `curve` line for every row, as computed here.

    Decompositions go to one-thread workers: of this size they gain little from a second core.
    """
    inputs, threads, jobs = [*synthetic(b), *momentum], torch.get_num_threads(), []
    curved = next(i for i, (family, _) in enumerate(inputs) if family == "log1e3")
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        factors = [list(pool.map(factor_of, u)) for _, u in inputs]
        for i, (family, u) in enumerate(inputs):
            for row in b.t.ORTHO:
                where = f"row:{row} family:{family} shape:{u.size(1)}x{u.size(2)}"
                try:
                    O = b.t.orthogonalize(u.to(b.m.device), row).float().cpu()
                except Exception as error:
                    b.log(f"skip {where} | {reason(error)}")
                    continue
                curve = [pool.submit(curve_line, O[0], factors[i][0])] * (i == curved)
                jobs.append((where, row, [pool.submit(figures, *pair) for pair in zip(O, factors[i])], curve))
        for where, row, found, curve in jobs:
            try:
                b.log(f"quality {where} {quality_line([one.result() for one in found])}")
                for one in curve:
                    b.log(f"curve row:{row} {one.result()}")
            except Exception as error:
                b.log(f"skip {where} | {reason(error)}")
    torch.set_num_threads(threads)      # in some libraries the workers' setting holds for the whole process


# ---- the run -------------------------------------------------------------------------------------

def open_bench(args: argparse.Namespace, log: Callable) -> Bench:
    """The trainer, its config and its machine: a process group of one, whatever the environment."""
    t = load_measured(args.script or ROOT / "train_gpt.py")
    defaults = (GPU_KNOBS if torch.cuda.is_available() else CPU_KNOBS) + TINY_KNOBS * args.tiny
    try:
        h = t.load_config(defaults + args.knobs, {})
        return Bench(t, h, t.init_machine(h, {}), log, args.tiny)
    except t.InputError as error:
        raise BadInput(str(error)) from None


@torch.no_grad()
def compile_group(b: Bench, index: int) -> None:
    """A child's work: every compilation of a group of cases, for the on-disk cache; nothing is timed."""
    for case in groups(all_cases(b))[index]:
        torch._dynamo.reset()
        for call in calls_of(b, case, input_sets(b, case.share)[:1], b.m.compile)[0]:
            call()
    b.m.sync()


def start_children(b: Bench, args: argparse.Namespace) -> list[subprocess.Popen]:
    """On a GPU one child for each group of cases: compilation is host work, and a host has many cores."""
    if not b.cuda:
        return []
    argv = [*args.knobs, *["--tiny"] * args.tiny, *(["--script", str(args.script)] if args.script else [])]
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--warm"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [subprocess.Popen([*command, str(i)], env=env, **quiet)
            for i in range(len(groups(all_cases(b))))]


def await_children(children: list[subprocess.Popen], deadline: float) -> str:
    """How they ended. One that is not done in time is stopped: what it left is compiled when it is timed."""
    late = failed = 0
    for child in children:
        try:
            failed += child.wait(max(1.0, deadline - time.perf_counter())) != 0
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            late += 1
    return f"children:{len(children)} failed:{failed} late:{late}"


def head_lines(b: Bench, script: Path) -> list[str]:
    """Source, versions, device and config: what a reader needs to judge the figures. Folders are left out."""
    knobs = {key: os.path.basename(value) if isinstance(value, str) else value
             for key, value in sorted(dataclasses.asdict(b.h).items())}
    try:
        what = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        smi = b.t.machine_report(b.m)
    return [f"train_gpt.py sha256 {sha256_file(script)}",
            f"Running Python {sys.version}".replace("\n", " "),
            f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
            f"nvidia-smi: {smi}" if b.cuda else smi,
            "config:", *(f"  {key}: {value}" for key, value in knobs.items()), SEPARATOR]


def facts(b: Bench, script: Path) -> list[str]:
    """The first lines behind the separator: machine, config, and the rows of both tables."""
    try:
        import triton
        version = triton.__version__
    except ImportError:
        version = "none"
    dtype = "bfloat16" if b.cuda else "float32"
    today = time.strftime("%Y-%m-%d", time.gmtime())
    return [f"machine date:{today} tiny:{int(b.tiny)} torch:{torch.__version__} triton:{version} "
            f"source_sha256:{sha256_file(script)} | {b.m.names['device']}",
            f"config preset:{b.h.preset} ortho:{b.h.ortho}",
            *(f"row row:{name} dtype:{dtype}" for name in b.t.ORTHO),
            *(f"rule rule:{name}" for name in b.t.STEP_RULES)]


def measure_all(b: Bench, args: argparse.Namespace, script: Path) -> None:
    """Every line behind the separator. BadInput comes before the long part."""
    began = time.perf_counter()
    deadline = began + args.seconds if args.seconds > 0 else float("inf")
    for line in facts(b, script):
        b.log(line)
    one = [dict(W=torch.zeros(1, 2, 2), g=torch.zeros(1, 2, 2), momentum=torch.zeros(1, 2, 2))]
    calls_of(b, Case("update", "all", b.h.ortho), [one], lambda f: f)       # are all arguments known?
    children = start_children(b, args)
    try:
        momentum = []
        if any(knob.startswith("data_path=") for knob in args.knobs) and args.steps > 0:
            try:
                momentum = train_momentum(b, args.steps)
            except b.t.InputError as error:
                raise BadInput(str(error)) from None
            except Exception as error:
                b.log(f"real | {reason(error)}")
        else:
            b.log("real | no training: give data_path=DIR and --steps")
        log_quality(b, momentum)
        log_work(b)
        ended = await_children(children, began + 0.55 * (args.seconds or 600))
        b.log(f"warm {ended} after_s:{time.perf_counter() - began:.1f}")
    finally:
        for child in children:
            child.kill()
            child.wait()
    if b.cuda:
        torch.cuda.empty_cache()
    log_floors(b)
    time_cases(b, all_cases(b), deadline)
    b.log(f"done seconds:{time.perf_counter() - began:.1f}")


def publish(text: str, out: Path) -> Path:
    """The folder of a log, made beside its place and moved there whole; a second run of a day gets a number.

    Without matplotlib it has no picture: `--log FOLDER/log.txt` makes a complete one where there is.
    """
    log = direction_log.parse(text)
    name = f"{log['machine'][0]['date']}_{direction_log.device_slug(log['machine'][0]['note'])}"
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=out))
    try:
        place = scratch / "folder"
        place.mkdir()
        for file, content in (("log.txt", text), ("result.json", direction_log.result_text(log)),
                              ("tables.md", direction_log.tables_text(log))):
            (place / file).write_bytes(content.encode("utf-8"))
        try:
            direction_log.plot(log, place / "spectrum.png")
        except BadInput as error:
            print(f"directions: no spectrum.png: {error}; then --log {name}/log.txt", file=sys.stderr)
        number = 1
        while (target := out / (name if number == 1 else f"{name}_{number}")).exists():
            number += 1
        os.rename(place, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def measured(args: argparse.Namespace, out: Path) -> str:
    """The text of a new log. While it grows it is `out`/.running-PID.txt, and a failure leaves that there."""
    lines: list[str] = []
    script, running = args.script or ROOT / "train_gpt.py", out / f".running-{os.getpid()}.txt"

    def log(line: str) -> None:
        lines.append(line)
        if args.warm is None:
            print(line[:200], flush=True)
            with open(running, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    b = open_bench(args, log)
    try:
        if args.warm is not None:
            compile_group(b, args.warm)
            return ""
        out.mkdir(parents=True, exist_ok=True)
        for line in head_lines(b, script):
            log(line)
        measure_all(b, args, script)
    except BadInput:
        running.unlink(missing_ok=True)
        raise
    finally:
        torch.distributed.destroy_process_group()
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace, root: Path) -> int:
    """Measures (or reads --log), writes the folder and prints its tables."""
    out = args.out or root / "records" / "directions"
    text = read_text(args.log) if args.log else measured(args, out)
    if args.warm is not None:
        return 0
    target = publish(text, out)
    (out / f".running-{os.getpid()}.txt").unlink(missing_ok=True)
    print(f"\n{read_text(target / 'tables.md')}\n{target}\nnext: ./run.sh record board")
    return 0


def main(argv: list[str]) -> int:
    """The tool by itself; record.py's verb `directions` is the same."""
    parser = argparse.ArgumentParser(prog="directions", description=__doc__.split("\n\n")[0])
    direction_log.arguments(parser)
    try:
        return run(parser.parse_args(argv), ROOT)
    except BadInput as error:
        print(f"directions: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
