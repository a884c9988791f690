"""Intervals and tests of proportions and of matched pairs."""

from __future__ import annotations

import numpy as np
from scipy import stats

from lmms_keyspace.errors import InputError
from lmms_keyspace.stats.types import Interval, check_level


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson, JASA 22, 1927).

    Args:
        k: successes.
        n: trials, at least 1.
        level: coverage.

    Raises:
        InputError: n below 1, or k outside 0..n.
    """
    if n < 1:
        raise InputError("n", n, "a proportion needs at least one trial")
    if not 0 <= k <= n:
        raise InputError("k", k, f"give a count between 0 and n={n}")
    z2 = stats.norm.ppf(0.5 + check_level(level) / 2) ** 2
    rate = k / n
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At k = 0 and k = n the limit is exactly 0 or 1; rounding must not leave it beside the rate.
    low = 0.0 if k == 0 else max(0.0, float(center - half))
    high = 1.0 if k == n else min(1.0, float(center + half))
    return Interval(low, high)


def matched_pairs(b: int, c: int, n: int, level: float = 0.95) -> Interval:
    """Interval of a difference of two rates on the same units, (b - c) / n.

    The adjusted Wald interval of Agresti and Min (Statistics in Medicine 24, 2005, section 2): half a unit is added to
    every cell of the 2 x 2 table, which keeps it honest where few units differ or all differ one way.

    Args:
        b, c: units that differ one way and the other.
        n: units.

    Raises:
        InputError: counts below 0 or more differing units than units.
    """
    if min(b, c) < 0 or n < 1 or b + c > n:
        raise InputError("b, c, n", (b, c, n), "give counts of units, of which b + c differ")
    size, difference = n + 2, b - c
    deviation = np.sqrt(b + c + 1 - difference**2 / size)
    half = stats.norm.ppf(0.5 + check_level(level) / 2) * deviation / size
    return Interval(max(-1.0, float(difference / size - half)), min(1.0, float(difference / size + half)))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p of b against c discordant pairs: twice the binomial tail, at most 1.

    Raises:
        InputError: a negative count.
    """
    for name, count in (("b", b), ("c", c)):
        if count < 0:
            raise InputError(name, count, "give a count of discordant pairs, 0 or more")
    return min(1.0, float(2 * stats.binom.cdf(min(b, c), b + c, 0.5)))
