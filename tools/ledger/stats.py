"""Small-sample statistics for run comparisons: mean, sample std, Student's t, Welch and paired tests.

Standard library only. Every test is about the difference mean(b) - mean(a).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def mean(values: list[float]) -> float:
    """Arithmetic mean; ValueError on an empty list."""
    if not values:
        raise ValueError("mean of no values")
    return math.fsum(values) / len(values)


def std(values: list[float]) -> float | None:
    """Sample standard deviation (n - 1); None below two values: one run has no spread to report."""
    if len(values) < 2:
        return None
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (len(values) - 1))


def beta_inc(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function I_x(a, b), by Lentz's continued fraction (error below 1e-12)."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only on this side
        return 1.0 - beta_inc(b, a, 1.0 - x)
    front = (
        math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
        / a
    )
    c, d, value, tiny = 1.0, 0.0, 1.0, 1e-300
    for i in range(500):
        m = i // 2
        if i == 0:
            numerator = 1.0
        elif i % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 + numerator * d
        d = 1.0 / (d if abs(d) > tiny else tiny)
        c = 1.0 + numerator / (c if abs(c) > tiny else tiny)
        value *= c * d
        if abs(1.0 - c * d) < 1e-14:
            break
    return front * (value - 1.0)


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with df > 0 degrees of freedom; infinite t gives 0 or 1."""
    if math.isinf(t):
        return 1.0 if t > 0 else 0.0
    tail = 0.5 * beta_inc(df / 2, 0.5, df / (df + t * t))
    return tail if t < 0 else 1.0 - tail


def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p for 0.5 < p < 1, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """mean(b) - mean(a) with its standard error and degrees of freedom, in the unit of the samples."""

    diff: float
    error: float
    df: float

    def t(self, null: float = 0.0) -> float:
        """t statistic against the hypothesis that the true difference is `null`."""
        gap = self.diff - null
        if self.error == 0.0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return gap / self.error

    def p_two_sided(self) -> float:
        """Probability, were there no difference, of one at least this far from zero."""
        return min(1.0, 2.0 * t_cdf(-abs(self.t()), self.df))

    def p_less(self, null: float = 0.0) -> float:
        """One-sided p for the claim 'the true difference is below null'."""
        return t_cdf(self.t(null), self.df)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided confidence interval of the difference."""
        reach = t_quantile(0.5 + level / 2, self.df) * self.error
        return self.diff - reach, self.diff + reach


def welch(a: list[float], b: list[float]) -> Difference | None:
    """Welch's t: independent runs, unequal variances. None when a side has fewer than two runs."""
    if len(a) < 2 or len(b) < 2:
        return None
    va, vb = std(a) ** 2 / len(a), std(b) ** 2 / len(b)
    if va + vb == 0.0:
        return Difference(mean(b) - mean(a), 0.0, float(len(a) + len(b) - 2))
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Difference(mean(b) - mean(a), math.sqrt(va + vb), df)


def paired(a: list[float], b: list[float]) -> Difference | None:
    """Paired t over equal-length lists (run i of a and of b share a seed). None below two pairs."""
    if len(a) != len(b):
        raise ValueError(f"paired test needs equal lengths, got {len(a)} and {len(b)}")
    if len(a) < 2:
        return None
    gaps = [y - x for x, y in zip(a, b)]
    return Difference(mean(gaps), std(gaps) / math.sqrt(len(gaps)), float(len(gaps) - 1))
