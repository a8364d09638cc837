"""Quality of the directions: how near each comes to the polar factor of synthetic matrices and momentum."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lab.update.cases import Setup, skipping, uncompiled
from ledger.files import sha256_file

LAYERS = 4  # matrices of each bank whose momentum is looked at
POINTS = 96  # singular values in the picture
CURVED = "log1e3"  # the family whose first matrix is in the picture
QUANTILES = dict(smin=0, s05=0.05, s50=0.5, s95=0.95, smax=1)


class Inputs(NamedTuple):
    """Matrices (count, M, N) float32 of one family and shape."""

    family: str
    u: Tensor


# ---- synthetic inputs ----------------------------------------------------------------------------


def gaussian(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a matrix of independent normal numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def with_spectrum(shape: tuple[int, int], values: Tensor, generator: torch.Generator) -> Tensor:
    """Return a float64 matrix with these singular values and random singular vectors."""
    n = min(shape)
    U, V = (torch.linalg.qr(gaussian((size, n), generator))[0] for size in shape)
    return (U * values) @ V.T


def log_spaced(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a matrix with singular values from 1 to 1e-3."""
    return with_spectrum(shape, torch.logspace(0, -3, min(shape)).double(), generator)


def harmonic(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a matrix with singular values 1, 1/2, 1/3, ..."""
    return with_spectrum(shape, 1 / torch.arange(1, min(shape) + 1).double(), generator)


def heavy_rows(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a matrix like a gradient: eight shared patterns and noise, rows scaled log-normally."""
    M, N = shape
    patterns = gaussian((M, 8), generator) @ gaussian((8, N), generator)
    noise = gaussian(shape, generator)
    return (patterns + noise) * gaussian((M, 1), generator).exp()


FAMILIES: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "gaussian": gaussian,
    CURVED: log_spaced,
    "harmonic": harmonic,
    "heavy_rows": heavy_rows,
}


def synthetic(s: Setup) -> Iterator[Inputs]:
    """Yield two matrices of each family and bank's shape; the tall shape for Gaussians only."""
    D = s.h.model_dim
    kv = s.h.kv_dim
    F = s.h.mlp_dim
    for family, make in FAMILIES.items():
        shapes = [(D, D), (kv, D), (D, F)]
        if family == "gaussian":
            shapes.append((F, D))
        for shape in shapes:
            generator = torch.Generator().manual_seed(7)
            yield Inputs(family, torch.stack([make(shape, generator) for _ in range(2)]).float())


# ---- real momentum -------------------------------------------------------------------------------


def train_momentum(s: Setup, steps: int) -> list[Inputs]:
    """Return LAYERS matrices of each bank's momentum after `steps` of the trainer's own step, uncompiled."""
    t = s.t
    h = s.h
    m = dataclasses.replace(s.m, compile=uncompiled)
    torch.manual_seed(h.seed)
    model = t.GPT(h, m.ops, m.dtype).to(m.device)
    optimizer = t.Optimizer(model, h, m)
    loader = t.TokenLoader(h, m)
    backward, _ = t.capture_pass(model.loss, optimizer)
    s.progress.begin("directions: training for momentum")
    for step in s.progress.each(range(steps), "steps"):
        loss = t.train_step(backward, optimizer, loader.next(), t.hyper_at(h, step, 0.0))

    manifest = Path(h.data_path) / "manifest.json"
    data = sha256_file(manifest)[:16] if manifest.is_file() else "none"
    s.log(
        f"real steps:{steps} batch:{h.train_batch_tokens} loss:{loss.item():.4f} data_manifest_sha256:{data}"
    )
    inputs = []
    for spec in t.MATRICES:
        momentum = optimizer.momentum[spec.name].float().cpu()
        count = len(momentum)
        pick = torch.linspace(0, count - 1, min(LAYERS, count)).round().long()
        inputs.append(Inputs("momentum", momentum[pick].clone()))
    return inputs


# ---- quality -------------------------------------------------------------------------------------


class Factor(NamedTuple):
    """The float64 singular value decomposition of an input u (M, N), n = min(M, N)."""

    U: Tensor  # (M, n)
    S: Tensor  # (n,)
    Vh: Tensor  # (n, N)


class DirectionQuality(NamedTuple):
    """The quality of a direction X (M, N) of an input u whose polar factor is P = UV'.

    polar |X - P| / sqrt(n); orth |XX' - I| / sqrt(n) on the short side; cosine <X, P> / (|X| |P|); efficiency
    <u, X> / (|u|_* |X|_op): the fraction of the best decrease that a step of that operator norm can have.
    """

    polar: float
    orth: float
    cosine: float
    efficiency: float
    band: Tensor  # the singular values of X, ascending


def factor_of(u: Tensor) -> Factor:
    """Decompose an input in float64."""
    return Factor(*torch.linalg.svd(u.double(), full_matrices=False))


def quality_of(direction: Tensor, f: Factor) -> DirectionQuality:
    """Compare a direction with the polar factor of its input, in float64."""
    X = direction.double()
    P = f.U @ f.Vh
    n = len(f.S)
    gram = X @ X.T if X.size(0) <= X.size(1) else X.T @ X
    band = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    along = ((f.U.T @ X) * f.Vh).sum(1)  # u_i' X v_i
    return DirectionQuality(
        polar=((X - P).norm() / n**0.5).item(),
        orth=((gram - torch.eye(n, dtype=gram.dtype)).norm() / n**0.5).item(),
        cosine=(along.sum() / (X.norm() * n**0.5)).item(),
        efficiency=((along * f.S).sum() / (f.S.sum() * band[-1])).item(),
        band=band,
    )


def quality_line(found: list[DirectionQuality]) -> str:
    """Return a log line's pairs of several matrices: means, and the band of all their singular values.

    Raises ArithmeticError if one is not finite.
    """
    band = torch.cat([one.band for one in found])
    pairs = {}
    for key in ("polar", "orth", "cosine", "efficiency"):
        pairs[key] = sum(getattr(one, key) for one in found) / len(found)
    quantiles = torch.quantile(band, torch.tensor([*QUANTILES.values()], dtype=band.dtype)).tolist()
    pairs |= zip(QUANTILES, quantiles)
    if not all(math.isfinite(value) for value in pairs.values()):
        raise ArithmeticError("the direction is not finite")
    return " ".join(f"{key}:{value:.6f}" for key, value in pairs.items()) + f" matrices:{len(found)}"


def curve_line(direction: Tensor, f: Factor) -> str:
    """Return POINTS singular values of the input over the largest, and what becomes of their pairs (u, v).

    along: u' X v, the direction X along the pair; length: |X v|.
    """
    count = len(f.S)
    pick = torch.linspace(0, count - 1, min(POINTS, count)).round().long()
    image = direction.double() @ f.Vh[pick].T  # (M, points)
    along = (f.U[:, pick] * image).sum(0)
    columns = dict(input=f.S[pick] / f.S[0], along=along, length=image.norm(dim=0))
    texts = {key: ",".join(f"{value:.5f}" for value in values) for key, values in columns.items()}
    return " ".join(f"{key}:{text}" for key, text in texts.items())


# ---- lines ---------------------------------------------------------------------------------------


class Pending(NamedTuple):
    """A `quality` line that is being computed."""

    where: str
    row: str
    qualities: list[Future]
    curve: Future | None


@torch.no_grad()
def log_quality(s: Setup, momentum: list[Inputs]) -> None:
    """Log a `quality` line for every row, family and shape, and a `curve` line for every row.

    Decompositions go to threads of one core each: at this size they gain little from a second one.
    """
    inputs = [*synthetic(s), *momentum]
    curved = next(i for i, one in enumerate(inputs) if one.family == CURVED)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        s.progress.begin("directions: decomposing")
        factors = [list(pool.map(factor_of, u)) for _, u in s.progress.each(inputs, "inputs")]
        s.progress.begin("directions: quality")
        pending = []
        for (i, (family, u)), row in s.progress.each(product(enumerate(inputs), s.t.ORTHO), "directions"):
            where = f"row:{row} family:{family} shape:{u.size(1)}x{u.size(2)}"
            with skipping(s.log, where):
                directions = s.t.orthogonalize(u.to(s.m.device), row).float().cpu()
                found = [pool.submit(quality_of, *pair) for pair in zip(directions, factors[i])]
                curve = pool.submit(curve_line, directions[0], factors[i][0]) if i == curved else None
                pending.append(Pending(where, row, found, curve))
        for where, row, found, curve in s.progress.each(pending, "lines"):
            with skipping(s.log, where):
                s.log(f"quality {where} {quality_line([future.result() for future in found])}")
                if curve:
                    s.log(f"curve row:{row} {curve.result()}")
    torch.set_num_threads(threads)  # in some libraries the workers' setting holds for the whole process
