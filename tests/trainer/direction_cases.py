"""What the tests know of each direction: a row of DIRECTIONS for each row of ORTHO."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import train_gpt as t

# Polar Express, the list of modded-nanogpt, nanochat and dion (l = 1e-3, safety = cushion = 2e-2),
# to the digits that they print.
FIVE = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def poly(x, coefficients):
    """Iterate the odd quintic of each row of coefficients."""
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


def unit_rows(x):
    """Scale the rows of a matrix to length 1."""
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-8)


def ns5_by_hand(G):
    """Apply five quintics of Newton-Schulz to the singular values of a matrix, in float64."""
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    return (U * poly(S / np.linalg.norm(S), [(3.4445, -4.7750, 2.0315)] * 5)) @ Vh


def mud_by_hand(G, rounds):
    """Decorrelate rows by forward substitution, row by row, in float64."""
    x = G.T if G.shape[0] > G.shape[1] else G
    x = x / np.linalg.norm(x)
    for _ in range(rounds):
        q = unit_rows(x)
        gram = q @ q.T
        y = np.zeros_like(q)
        for i in range(len(q)):
            y[i] = (q[i] - sum(gram[i, j] * y[j] for j in range(i))) / gram[i, i]
        x = unit_rows(y)
    return x.T if G.shape[0] > G.shape[1] else x


def turbo_by_hand(G):
    """Scale rows as AOL does, then take Turbo-Muon's four steps, in float64."""
    x = G.T if G.shape[0] > G.shape[1] else G
    x = x / np.linalg.norm(x)
    x = x / np.sqrt(np.abs(x @ x.T).sum(1, keepdims=True))
    assert np.linalg.norm(x, 2) <= 1 + 1e-12  # the bound that AOL promises
    for a, b, c in t.TURBO:
        gram = x @ x.T  # computed again: ortho_turbo reuses and scales the first
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if G.shape[0] > G.shape[1] else x


def polar_by_hand(G, rows):
    """Apply Polar Express to the singular values of a matrix, in float64."""
    U, S, Vh = np.linalg.svd(G, full_matrices=False)
    return (U * poly(S / (1.02 * (S**4).sum() ** 0.25), rows)) @ Vh


class Direction(NamedTuple):
    """A row of ORTHO as its tests see it.

    wide, square: the band of the singular values that Gaussian matrices of that shape end with, measured over
    ten seeds, and some margin. The lowest tenth lies above, all lie below. (A square Gaussian has a few tiny
    singular values that no row lifts.)
    any_shape: the band of every shape, for a row that keeps the singular vectors; None if it turns them.
    """

    formula: Callable[[np.ndarray], np.ndarray]  # in float64, one matrix (M, N) -> (M, N)
    wide: tuple[float, float]
    square: tuple[float, float]
    products: list[str]  # the operators of section 11 that it calls, in order
    any_shape: tuple[float, float] | None = None


STEP = ["symmetric_op", "symmetric_op"]  # of a quintic: X X', then b A + c A A
SOLVE = ["symmetric_op", "solve_op"]

DIRECTIONS = {
    "ns5": Direction(
        ns5_by_hand, wide=(0.66, 1.16), square=(0.66, 1.22), products=STEP * 5, any_shape=(0.6, 1.3)
    ),
    "polar_express": Direction(
        lambda G: polar_by_hand(G, FIVE),
        wide=(0.85, 1.15),
        square=(0.85, 1.15),
        products=STEP * 5,
        any_shape=(0.85, 1.15),
    ),
    "polar_express4": Direction(
        lambda G: polar_by_hand(G, t.polar_express(3e-3, 4, 2e-2, 2e-2)),
        wide=(0.77, 1.23),
        square=(0.77, 1.23),
        products=STEP * 4,
        any_shape=(0.75, 1.25),
    ),
    "turbo": Direction(turbo_by_hand, wide=(0.93, 1.07), square=(0.93, 1.07), products=STEP * 4),
    "mud": Direction(lambda G: mud_by_hand(G, 1), wide=(0.78, 1.20), square=(0.22, 1.55), products=SOLVE),
    "mud2": Direction(
        lambda G: mud_by_hand(G, 2), wide=(0.95, 1.06), square=(0.50, 1.45), products=SOLVE * 2
    ),
}
POLAR = tuple(name for name, row in DIRECTIONS.items() if row.any_shape)  # those that keep singular vectors
