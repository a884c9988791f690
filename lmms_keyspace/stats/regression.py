"""Does one number predict another, document by document? Least squares with errors that are robust to clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lmms_keyspace.errors import InputError
from lmms_keyspace.stats.types import Floats, check_level

# With fewer clusters the sandwich is too narrow, whatever the correction.
MIN_REGRESSION_CLUSTERS = 10


class Slopes(NamedTuple):
    """Slopes with confidence limits and two-sided p, arrays of shape [...]; n rows in `clusters` clusters.

    NaN where the predictor does not vary within a stratum, or explains the outcome without rest.
    """

    slope: Floats
    low: Floats
    high: Floats
    p: Floats
    n: int
    clusters: int


def cluster_slopes(
    y: ArrayLike,
    x: ArrayLike,
    clusters: Sequence[object],
    *,
    strata: Sequence[object] | None = None,
    level: float = 0.95,
) -> Slopes:
    """Slope of y on x, one predictor at a time, with the CR1 cluster sandwich.

    Ordinary least squares with an intercept for every stratum; variance by clusters (Liang and Zeger, Biometrika 73,
    1986) with the factor G/(G-1) * (N-1)/(N-K), limits and p by Student's t with G-1 degrees of freedom (Cameron and
    Miller, Journal of Human Resources 50, 2015, sections II and VI). G clusters, N rows, K coefficients.

    Args:
        y: [N] outcome.
        x: [..., N] predictors; each is regressed by itself.
        clusters: [N] cluster label of each row.
        strata: [N] labels whose own level is taken out of x and y; None: one intercept.
        level: coverage.

    Raises:
        InputError: unequal lengths, a value that is not finite, fewer than 10 clusters, too few rows for the strata.
    """
    outcome, predictors = np.asarray(y, dtype=np.float64), np.asarray(x, dtype=np.float64)
    names, cluster = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    labels = np.zeros(len(outcome)) if strata is None else np.asarray([str(s) for s in strata])
    levels, stratum = np.unique(labels, return_inverse=True)
    n, groups, coefficients = len(outcome), len(names), 1 + len(levels)
    if not predictors.shape[-1] == n == len(cluster) == len(stratum):
        raise InputError("x", predictors.shape, f"give one value per row: there are {n} outcomes")
    if not (np.isfinite(outcome).all() and np.isfinite(predictors).all()):
        raise InputError("x, y", "a value that is not finite", "leave such rows out and say how many")
    if groups < MIN_REGRESSION_CLUSTERS or n <= coefficients:
        raise InputError(
            "clusters", f"{groups} clusters, {n} rows", f"a slope needs {MIN_REGRESSION_CLUSTERS} clusters or more"
        )
    centered = _within(predictors, stratum, len(levels))
    rest = _within(outcome, stratum, len(levels))
    spread = (centered**2).sum(axis=-1)
    # What varies by rounding only does not vary.
    varies = spread > 1e-18 * (predictors**2).sum(axis=-1)
    spread = np.where(varies, spread, np.nan)
    slope = (centered @ rest) / spread
    scores = centered * (rest - slope[..., None] * centered)
    totals = _sums(scores, cluster, groups)
    factor = groups / (groups - 1) * (n - 1) / (n - coefficients)
    error = np.sqrt(factor * (totals**2).sum(axis=-1)) / spread
    error = np.where(error > 1e-12 * np.abs(slope), error, np.nan)
    half = float(stats.t.ppf(0.5 + check_level(level) / 2, groups - 1)) * error
    p: Floats = 2 * stats.t.sf(np.abs(slope / error), groups - 1)
    return Slopes(slope, slope - half, slope + half, p, n, groups)


def _within(values: Floats, stratum: np.ndarray, n_strata: int) -> Floats:
    """Values [..., N] less the mean of their stratum."""
    means = _sums(values, stratum, n_strata) / np.bincount(stratum, minlength=n_strata)
    return values - means[..., stratum]


def _sums(values: Floats, labels: np.ndarray, n: int) -> Floats:
    """[..., N] -> [..., n]: sums over the rows of each label."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(n))
    sums: Floats = np.add.reduceat(values[..., order], starts, axis=-1)
    return sums
