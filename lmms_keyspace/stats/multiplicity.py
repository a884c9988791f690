"""p values of many tests at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lmms_keyspace.errors import InputError
from lmms_keyspace.stats.types import Floats


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjusted p values (Scand. J. Stat. 6, 1979), in the order and shape given.

    NaN means "no test was done": it stays NaN and does not count among the tests.

    Raises:
        InputError: a p outside 0..1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    tested = ~np.isnan(p)
    values = p[tested]
    if np.any((values < 0) | (values > 1)):
        raise InputError("p_values", values[(values < 0) | (values > 1)].tolist(), "p values lie between 0 and 1")
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.full_like(p, np.nan)
    back = np.empty_like(values)
    back[order] = np.minimum(stepped, 1.0)
    adjusted[tested] = back
    return adjusted


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> list[float]:
    """The level at which Holm's procedure tests each of m hypotheses: alpha / m for the smallest p, alpha / (m - 1) for
    the next, and so on; from the first one that is not rejected, all have its level. A one-sided bound at this level
    lies on the side that the adjusted p says.

    Args:
        p_values: [m] p values, without NaN.
        alpha: family-wise error.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = alpha / np.arange(len(p), 0, -1)
    kept = np.flatnonzero(p[order] > stepped)
    if len(kept):
        stepped[kept[0] :] = stepped[kept[0]]
    levels = np.empty(len(p))
    levels[order] = stepped
    return [float(level) for level in levels]


def max_t(values: ArrayLike, null: ArrayLike) -> tuple[Floats, Floats]:
    """One-sided permutation p of each test, and p adjusted for all of them by the permutation distribution of the
    largest (Westfall and Young 1993; single step).

    Values are put on one scale by the mean and deviation of their own permutation distribution, the observed value
    counted among the draws (Phipson and Smyth, SAGMB 9, 2010), so no p is below 1 / (B + 1).

    Args:
        values: [T] observed statistics.
        null: [T, B] draws, column b under one and the same permutation for all tests.

    Returns:
        (p [T], adjusted p [T]).
    """
    draws = np.concatenate([np.asarray(values, dtype=np.float64)[:, None], np.asarray(null, dtype=np.float64)], axis=1)
    draws -= draws.mean(axis=1, keepdims=True)
    deviation = draws.std(axis=1, keepdims=True)
    # What varies by rounding only does not vary.
    z = np.divide(draws, deviation, out=np.zeros_like(draws), where=deviation > 1e-14)
    # Rounding must not make the observed labelling look rarer than its copies among the permutations.
    observed = z[:, :1] - 1e-9
    return (z >= observed).mean(axis=1), (z.max(axis=0) >= observed).mean(axis=1)
