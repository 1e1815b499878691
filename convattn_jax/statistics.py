"""Differences between variants: intervals over paired seeds, and the smallest difference that could be shown."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # of an interval
POWER = 0.8  # of a detectable difference


class Interval(NamedTuple):
    """The mean of n differences and where its true value lies; low and high are None below two of them.

    `smallest` is the smallest true difference that a two-sided t test of the same level on n such differences would
    find with probability 0.8.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    smallest: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is established at the interval's level, without a correction for many comparisons."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_interval(differences: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's t interval of paired differences: mean +- t_{n-1} s / sqrt(n) (Student 1908)."""
    from scipy import stats

    values = np.asarray(differences, np.float64)
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(n, mean)
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half, smallest_difference(deviation, n, 1 - level))


def smallest_difference(deviation: float, n: int, alpha: float = 1 - LEVEL, power: float = POWER) -> float:
    """The true mean that a two-sided t test at `alpha` on n differences of this standard deviation finds with `power`.

    The noncentrality parameter sqrt(n) mean / deviation of Student's t that puts `power` of the statistic's
    distribution beyond the critical values (Cohen 1988, chapter 2).
    """
    from scipy import optimize, stats

    if deviation == 0:
        return 0.0
    critical = stats.t.ppf(1 - alpha / 2, n - 1)

    def missing(noncentrality: float) -> float:
        wrong_side = np.nan_to_num(stats.nct.cdf(-critical, n - 1, noncentrality))  # NaN where it is too small
        return float(stats.nct.sf(critical, n - 1, noncentrality) + wrong_side) - power

    above = 1.0
    while missing(above) < 0:
        above *= 1.5
    return float(optimize.brentq(missing, 0.0, above)) * deviation / math.sqrt(n)  # pyright: ignore[reportArgumentType]
