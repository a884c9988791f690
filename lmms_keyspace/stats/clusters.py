"""Bootstrap and permutation over whole clusters, for means and ratios of what their rows say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmms_keyspace.errors import InputError
from lmms_keyspace.stats.power import mde_from_se
from lmms_keyspace.stats.types import Estimate, Floats, Interval, check_level


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[object],
    *,
    weights: ArrayLike | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean or of a ratio of sums, resampling whole clusters.

    The whole ratio sum(values) / sum(weights) is recomputed in each resample (Cameron, Gelbach and Miller, Rev. Econ.
    Stat. 90, 2008, section 2). A resample in which the weights sum to zero has no ratio and is left out. When every
    row has the same value the interval is a point; for such a proportion use `wilson`.

    Args:
        values: [N] numerators of the rows.
        clusters: [N] cluster label of each row.
        weights: [N] denominators of the rows, not negative; None means 1 each, which gives the mean.
        n_resamples: number of bootstrap draws.
        level: coverage.
        seed: seed of the draws.

    Raises:
        InputError: no rows, unequal lengths, a value that is not finite, fewer than 2 clusters, weights that sum to
            zero, or to zero in more than 5 % of the resamples.
    """
    names, inverse = _cluster_codes(clusters, "clusters")
    numerators, denominators = _cluster_totals(values, weights, inverse, len(names), "values", "weights")
    counts = resample(len(names), n_resamples, seed)
    return _percentile(ratio(counts @ numerators, counts @ denominators), level, "weights")


def cluster_bootstrap_function(
    statistic: Callable[[Floats], Floats],
    totals: ArrayLike,
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile cluster bootstrap of any function of sums over clusters, for what is not a ratio of two sums.

    Args:
        statistic: maps sums [n, K] to values [n]; NaN where it is undefined, and such resamples are left out.
        totals: [D, K] what each of the D clusters adds to the K sums.
        n_resamples, level, seed: as `cluster_bootstrap`.

    Raises:
        InputError: fewer than 2 clusters, or a statistic that is undefined in more than 5 % of the resamples.
    """
    rows = np.asarray(totals, dtype=np.float64)
    return _percentile(statistic(resample(len(rows), n_resamples, seed) @ rows), level, "statistic")


def paired_cluster_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[object],
    clusters_b: Sequence[object] | None = None,
    *,
    weights_a: ArrayLike | None = None,
    weights_b: ArrayLike | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Difference of two means or ratios, b minus a, on the clusters that both have.

    The interval is the paired percentile cluster bootstrap: a resample draws the same clusters on both sides. The p
    is that of the permutation that swaps a and b within whole clusters, which is exact when the two are exchangeable
    (whole-block sign flipping: Winkler et al., NeuroImage 92, 2014), with the observed labelling counted, so p is at
    least 1 / (n_resamples + 1) (Phipson and Smyth, SAGMB 9, 2010).

    Args:
        a, b: [Na], [Nb] numerators of the rows of the two sides.
        clusters: [Na] cluster label of each row of a, and of b where `clusters_b` is None.
        clusters_b: [Nb] cluster label of each row of b.
        weights_a, weights_b: denominators of the rows; None means 1 each.
        n_resamples: number of bootstrap draws and of permutations.
        level: coverage.
        seed: seed of the draws.

    Raises:
        InputError: as `cluster_bootstrap`, and when fewer than 2 clusters are shared.
    """
    names_a, inverse_a = _cluster_codes(clusters, "clusters")
    names_b, inverse_b = (names_a, inverse_a) if clusters_b is None else _cluster_codes(clusters_b, "clusters_b")
    _, rows_a, rows_b = np.intersect1d(names_a, names_b, assume_unique=True, return_indices=True)
    n = len(rows_a)
    if n < 2:
        raise InputError("clusters", f"{n} shared", "compare two sides that share at least 2 clusters")
    num_a, den_a = (t[rows_a] for t in _cluster_totals(a, weights_a, inverse_a, len(names_a), "a", "weights_a"))
    num_b, den_b = (t[rows_b] for t in _cluster_totals(b, weights_b, inverse_b, len(names_b), "b", "weights_b"))
    if den_a.sum() == 0 or den_b.sum() == 0:
        raise InputError("weights", 0.0, "the weights of each side must not sum to zero on the shared clusters")

    value = float(num_b.sum() / den_b.sum() - num_a.sum() / den_a.sum())
    counts = resample(n, n_resamples, seed)
    draws = ratio(counts @ num_b, counts @ den_b) - ratio(counts @ num_a, counts @ den_a)
    low, high = _percentile(draws, level, "weights")
    se = float(np.nanstd(draws, ddof=1))

    # Two-sided: as far from 0 as observed.
    p = swap_p(-np.abs(swap_null(num_a, den_a, num_b, den_b, n_resamples, seed)), -abs(value))
    return Estimate(value, low, high, p, n, float(mde_from_se(se)) if se > 0 else float("nan"))


def _cluster_codes(clusters: Sequence[object], argument: str) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    labels = np.asarray([str(c) for c in clusters])
    if labels.size == 0:
        raise InputError(argument, [], "give at least one row")
    names, inverse = np.unique(labels, return_inverse=True)
    return names, inverse


def _cluster_totals(
    values: ArrayLike,
    weights: ArrayLike | None,
    inverse: NDArray[np.int64],
    n_clusters: int,
    argument: str,
    weight: str,
) -> tuple[Floats, Floats]:
    """Sums of numerators and denominators per cluster."""
    numerators = np.asarray(values, dtype=np.float64)
    denominators = np.ones(len(inverse)) if weights is None else np.asarray(weights, dtype=np.float64)
    for name, array in ((argument, numerators), (weight, denominators)):
        if array.shape != inverse.shape:
            raise InputError(name, array.shape, f"give one number per row: {len(inverse)} rows have a cluster")
        if not np.isfinite(array).all():
            raise InputError(name, "a value that is not finite", "leave such rows out and say how many")
    if (denominators < 0).any():
        raise InputError(weight, float(denominators.min()), "weights are 0 or more")
    return (
        np.bincount(inverse, numerators, minlength=n_clusters).astype(np.float64),
        np.bincount(inverse, denominators, minlength=n_clusters).astype(np.float64),
    )


def swap_null(num_a: Floats, den_a: Floats, num_b: Floats, den_b: Floats, n_resamples: int, seed: int) -> Floats:
    """[n_resamples] differences b - a of two ratios after a and b were swapped within random clusters."""
    swap = np.random.default_rng([seed, 1]).integers(0, 2, size=(n_resamples, len(num_a))).astype(np.float64)
    num_up, den_up = num_a.sum() + swap @ (num_b - num_a), den_a.sum() + swap @ (den_b - den_a)
    num_down, den_down = num_a.sum() + num_b.sum() - num_up, den_a.sum() + den_b.sum() - den_up
    return ratio(num_up, den_up) - ratio(num_down, den_down)


def swap_p(null: Floats, observed: float) -> float:
    """p of a value as low as `observed`, which counts among the permutations; undefined ones are left out."""
    # Rounding must not make the observed labelling look rarer than its copies among the permutations.
    low = np.count_nonzero(null <= observed + 1e-12)
    return float((1 + low) / (1 + np.count_nonzero(np.isfinite(null))))


# A report asks for the same draws for every metric and run, and drawing them is most of its time.
@functools.lru_cache(maxsize=2)
def resample(n_clusters: int, n_resamples: int, seed: int) -> Floats:
    """[n_resamples, n_clusters]: how often each cluster is drawn. Read-only: the draws are shared."""
    if n_clusters < 2:
        raise InputError("clusters", f"{n_clusters} cluster", "resampling needs at least 2 clusters")
    if n_resamples < 1:
        raise InputError("n_resamples", n_resamples, "give a positive number of resamples")
    rng = np.random.default_rng([seed, 0])
    counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise ratio, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _percentile(draws: Floats, level: float, argument: str) -> Interval:
    finite = draws[np.isfinite(draws)]
    if len(finite) < 0.95 * len(draws):
        share = 1 - len(finite) / len(draws)
        raise InputError(
            argument, f"undefined in {share:.0%} of the resamples", "it rests on too few clusters to have an interval"
        )
    tail = (1 - check_level(level)) / 2
    low, high = np.quantile(finite, (tail, 1 - tail))
    return Interval(float(low), float(high))
