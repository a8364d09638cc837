"""Compares small samples of runs: mean, sample std, Student's t, Welch's, the paired and the one-sample test.

Standard library only. Every test of two samples is about the difference mean(b) - mean(a).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple


def mean(values: list[float]) -> float:
    """Return the arithmetic mean. Raises ValueError if the list is empty."""
    if not values:
        raise ValueError("mean of no values")
    return math.fsum(values) / len(values)


def std(values: list[float]) -> float | None:
    """Return the sample standard deviation (n - 1), or None below two values: one run has no spread."""
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


TINY = 1e-300  # stands for a zero denominator in Lentz's method


def fraction_numerator(a: float, b: float, x: float, i: int) -> float:
    """Return numerator i of the continued fraction of the incomplete beta function."""
    if i == 0:
        return 1.0

    m = i // 2
    if i % 2 == 0:
        return m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
    return -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))


def away_from_zero(value: float) -> float:
    """Return the value, or TINY if it is too small to divide by."""
    return value if abs(value) > TINY else TINY


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), with an error below 1e-12.

    Evaluates its continued fraction by Lentz's method.
    """
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only on this side
        return 1.0 - incomplete_beta(b, a, 1.0 - x)

    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
    fraction = 1.0
    c = 1.0
    d = 0.0
    for i in range(500):
        numerator = fraction_numerator(a, b, x, i)
        d = 1.0 / away_from_zero(1.0 + numerator * d)
        c = 1.0 + numerator / away_from_zero(c)
        fraction *= c * d
        if abs(1.0 - c * d) < 1e-14:
            break
    return front * (fraction - 1.0)


def t_cdf(t: float, df: float) -> float:
    """Return P(T <= t) for Student's t with df > 0 degrees of freedom; an infinite t gives 0 or 1."""
    if math.isinf(t):
        return 1.0 if t > 0 else 0.0
    tail = 0.5 * incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return tail if t < 0 else 1.0 - tail


def t_quantile(p: float, df: float) -> float:
    """Return the t with P(T <= t) = p, for 0.5 < p < 1, by bisection."""
    low = 0.0
    high = 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_cdf(middle, df) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """The difference mean(b) - mean(a) with its standard error, in the unit of the samples.

    df: the degrees of freedom of its test.
    """

    diff: float
    error: float
    df: float

    def t(self, null: float = 0.0) -> float:
        """Return the t statistic against the hypothesis that the true difference is `null`."""
        gap = self.diff - null
        if self.error == 0.0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return gap / self.error

    def p_two_sided(self) -> float:
        """Return the probability of a difference at least this far from zero if the true one were zero."""
        return min(1.0, 2.0 * t_cdf(-abs(self.t()), self.df))

    def p_less(self, null: float = 0.0) -> float:
        """Return the one-sided p of the claim that the true difference is below `null`."""
        return t_cdf(self.t(null), self.df)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the two-sided confidence interval of the difference."""
        reach = t_quantile(0.5 + level / 2, self.df) * self.error
        return self.diff - reach, self.diff + reach


def welch(a: list[float], b: list[float]) -> Difference | None:
    """Return the difference by Welch's test: independent runs, unequal variances.

    None if a side has fewer than two runs.
    """
    if len(a) < 2 or len(b) < 2:
        return None

    diff = mean(b) - mean(a)
    variance_a = std(a) ** 2 / len(a)  # how much the mean varies
    variance_b = std(b) ** 2 / len(b)
    variance = variance_a + variance_b
    if variance == 0.0:
        return Difference(diff, error=0.0, df=float(len(a) + len(b) - 2))

    df = variance**2 / (variance_a**2 / (len(a) - 1) + variance_b**2 / (len(b) - 1))
    return Difference(diff, error=math.sqrt(variance), df=df)


def one_sample(values: list[float], null: float) -> Difference | None:
    """Return the difference of the mean from a number, by Student's test. None below two values."""
    if len(values) < 2:
        return None
    return Difference(
        mean(values) - null, error=std(values) / math.sqrt(len(values)), df=float(len(values) - 1)
    )


def paired(a: list[float], b: list[float]) -> Difference | None:
    """Return the difference by the paired test, where run i of a and run i of b share a seed.

    None below two pairs. Raises ValueError if the lists differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"paired test needs equal lengths, got {len(a)} and {len(b)}")
    if len(a) < 2:
        return None

    gaps = [y - x for x, y in zip(a, b)]
    return Difference(mean(gaps), error=std(gaps) / math.sqrt(len(gaps)), df=float(len(gaps) - 1))


class RankCorrelation(NamedTuple):
    """Spearman's rho of two lists.

    p: the probability of a rho at least as far from zero if one list had a random order.
    """

    rho: float
    p: float


MAX_PERMUTED = 8  # values: all 40,320 orders are tried; beyond, Student's t stands for them


def ranks(values: list[float]) -> list[float]:
    """Return the rank of each value, 1 the least; equal values share the mean of their ranks."""
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2
        for value in values
    ]


def pearson(a: list[float], b: list[float]) -> float | None:
    """Return the correlation of two lists of equal length, or None where one of them does not vary."""
    center_a = mean(a)
    center_b = mean(b)
    spread_a = math.fsum((x - center_a) ** 2 for x in a)
    spread_b = math.fsum((y - center_b) ** 2 for y in b)
    if spread_a == 0.0 or spread_b == 0.0:
        return None
    shared = math.fsum((x - center_a) * (y - center_b) for x, y in zip(a, b))
    return shared / math.sqrt(spread_a * spread_b)


def spearman(a: list[float], b: list[float]) -> RankCorrelation | None:
    """Return the rank correlation of two lists of equal length.

    None below three values, or where all values of a list are equal.
    """
    if len(a) != len(b):
        raise ValueError(f"a rank correlation needs equal lengths, got {len(a)} and {len(b)}")

    ranks_a = ranks(a)
    ranks_b = ranks(b)
    rho = pearson(ranks_a, ranks_b) if len(a) > 2 else None
    if rho is None:
        return None
    if len(a) > MAX_PERMUTED:
        df = float(len(a) - 2)
        t = math.copysign(math.inf, rho) if abs(rho) >= 1.0 else rho * math.sqrt(df / (1 - rho * rho))
        return RankCorrelation(rho, 2 * t_cdf(-abs(t), df))

    drawn = [pearson(ranks_a, list(order)) for order in permutations(ranks_b)]
    as_far = sum(abs(value) >= abs(rho) - 1e-12 for value in drawn)
    return RankCorrelation(rho, as_far / len(drawn))
