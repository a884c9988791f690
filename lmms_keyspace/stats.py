"""Intervals, tests and power, and everything that follows from saved kernel sums. numpy and scipy only.

The unit of resampling is always the cluster (an image, a scene, a document), never the row or the token: rows of one
cluster share its luck, and treating them as independent gives intervals that are too narrow.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums

# Fewest clusters from which a cluster U-statistic with a jackknife interval is reported, and for the split-half
# baselines, whose halves must each keep a pair of clusters when one is deleted.
MIN_CLUSTERS = 4
MIN_SPLIT_CLUSTERS = 6

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A difference with its interval, two-sided p, number of clusters and minimum detectable effect.

    `mde` is NaN when no cluster differs: without variation there is no standard error to plan with.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    mde: float


class ArrayInterval(NamedTuple):
    """Point estimates and confidence limits, each of shape [...]."""

    value: Floats
    low: Floats
    high: Floats


class PairedMMD2(NamedTuple):
    """MMD^2 of run b minus run a on the `n` clusters they share; arrays of shape [...]."""

    delta: Floats
    low: Floats
    high: Floats
    p: Floats
    mde: Floats
    n: int


class PermutationTest(NamedTuple):
    """MMD^2, the mean of its permutation null, p and max-T adjusted p; arrays of shape [...]."""

    value: Floats
    null_mean: Floats
    p: Floats
    p_adjusted: Floats
    n_permutations: int


def hash_ranks(names: Sequence[str], *salt: object) -> NDArray[np.int64]:
    """Rank of each name in a seeded order that does not depend on the order in which the names are given.

    Args:
        names: distinct names.
        salt: the seed and what the order is for.
    """
    prefix = "\x1f".join(map(str, salt))
    digests = [hashlib.blake2b(f"{prefix}\x1f{name}".encode(), digest_size=16).digest() for name in names]
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[sorted(range(len(names)), key=digests.__getitem__)] = np.arange(len(names))
    return ranks


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
    z2 = stats.norm.ppf(0.5 + _check_level(level) / 2) ** 2
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
    half = stats.norm.ppf(0.5 + _check_level(level) / 2) * deviation / size
    return Interval(max(-1.0, float(difference / size - half)), min(1.0, float(difference / size + half)))


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
    counts = _resample(len(names), n_resamples, seed)
    return _percentile(_ratio(counts @ numerators, counts @ denominators), level, "weights")


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
    return _percentile(statistic(_resample(len(rows), n_resamples, seed) @ rows), level, "statistic")


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
    counts = _resample(n, n_resamples, seed)
    draws = _ratio(counts @ num_b, counts @ den_b) - _ratio(counts @ num_a, counts @ den_a)
    low, high = _percentile(draws, level, "weights")
    se = float(np.nanstd(draws, ddof=1))

    swap = np.random.default_rng([seed, 1]).integers(0, 2, size=(n_resamples, n)).astype(np.float64)
    num_up, den_up = num_a.sum() + swap @ (num_b - num_a), den_a.sum() + swap @ (den_b - den_a)
    num_down, den_down = num_a.sum() + num_b.sum() - num_up, den_a.sum() + den_b.sum() - den_up
    null = _ratio(num_up, den_up) - _ratio(num_down, den_down)
    # Rounding must not make the observed labelling look rarer than its copies among the permutations.
    extreme = np.abs(null) >= abs(value) - 1e-12
    p = float((1 + np.count_nonzero(extreme)) / (1 + np.count_nonzero(np.isfinite(null))))
    return Estimate(value, low, high, p, n, float(mde_from_se(se)) if se > 0 else float("nan"))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p of b against c discordant pairs: twice the binomial tail, at most 1.

    Raises:
        InputError: a negative count.
    """
    for name, count in (("b", b), ("c", c)):
        if count < 0:
            raise InputError(name, count, "give a count of discordant pairs, 0 or more")
    return min(1.0, float(2 * stats.binom.cdf(min(b, c), b + c, 0.5)))


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


def mde_paired(discordance: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest paired change of a proportion that a two-sided test finds with the given power.

    (z_{1-alpha/2} + z_power) * sqrt(discordance / n): the paired formula of Miller (arXiv 2411.00640) with the
    variance of a paired binary difference bounded by its discordance rate. The exact McNemar test has about two to
    four points less power than `power` at this effect.

    Args:
        discordance: share of pairs in which the two outcomes differ.
        n: number of pairs (clusters, when pairs share one).

    Raises:
        InputError: discordance outside 0..1 or n below 1.
    """
    if not 0 <= discordance <= 1:
        raise InputError("discordance", discordance, "give the share of discordant pairs, between 0 and 1")
    if n < 1:
        raise InputError("n", n, "give at least one pair")
    return float(mde_from_se(np.sqrt(discordance / n), power, alpha))


def mde_from_se(se: ArrayLike, power: float = 0.8, alpha: float = 0.05) -> Floats:
    """Minimum detectable effect of a two-sided normal test from the standard error of a difference, in its unit.

    Raises:
        InputError: alpha or power outside (0, 1).
    """
    for name, value in (("power", power), ("alpha", alpha)):
        if not 0 < value < 1:
            raise InputError(name, value, "give a probability between 0 and 1")
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power))
    return np.asarray(se, dtype=np.float64) * z


def mean_over_heads(sums: KernelSums) -> KernelSums:
    """Sums averaged over all leading dimensions: their MMD^2 is the mean of the heads' MMD^2 (head `all`)."""
    vv, tt, vt = (m.reshape(-1, *m.shape[-2:]).mean(axis=0, dtype=np.float64) for m in (sums.vv, sums.tt, sums.vt))
    return KernelSums(vv, tt, vt, sums.n_visual, sums.n_text, sums.clusters)


def mmd2_from_sums(sums: KernelSums) -> Floats:
    """Cluster U-statistic of MMD^2, shape [...].

    Gretton et al. (JMLR 13, 2012, Lemma 6) with every pair of tokens from one cluster left out, also between the
    modalities. Tokens of one image are not independent, and with those pairs the "unbiased" estimate is not: with a
    unit image effect and equal distributions it reads .03 at 16 images. Unbiased, so it may be negative.

    Raises:
        InputError: a modality with tokens in fewer than 2 clusters.
    """
    value, _ = _leave_one_out(sums, delete=False)
    return value


def mmd2_jackknife(sums: KernelSums, level: float = 0.95) -> ArrayInterval:
    """MMD^2 with its delete-one-cluster jackknife interval (Arvesen, Ann. Math. Stat. 40, 1969: U-statistics).

    The naive cluster bootstrap pairs a document with its own copies and hardly ever covers the truth at 24 documents.
    Student's t with (clusters - 1) degrees of freedom.

    Raises:
        InputError: a modality with tokens in fewer than 4 clusters.
    """
    value, deleted = _leave_one_out(_occupied(sums))
    se, t = _jackknife_se(deleted, level)
    return ArrayInterval(value, value - t * se, value + t * se)


def paired_mmd2_difference(a: KernelSums, b: KernelSums, level: float = 0.95) -> PairedMMD2:
    """Change of MMD^2 from run a (the base) to run b on the clusters they share, matched by name.

    Delete-one-cluster jackknife of the difference: what the two runs share cancels, which makes the interval much
    narrower than that of unpaired runs. Interval and p use Student's t with (shared clusters - 1) degrees of freedom.

    Args:
        a, b: sums of the same layer, heads and bandwidth; leading shapes must be equal.

    Raises:
        InputError: other leading shapes, or fewer than 4 shared clusters with tokens of both modalities.
    """
    if a.vv.shape[:-2] != b.vv.shape[:-2]:
        raise InputError("b", b.vv.shape, f"compare sums of the same heads; a has shape {a.vv.shape}")
    in_a = {name: i for i, name in enumerate(a.clusters) if a.n_visual[i] + a.n_text[i] > 0}
    in_b = {name: i for i, name in enumerate(b.clusters) if b.n_visual[i] + b.n_text[i] > 0}
    shared = sorted(in_a.keys() & in_b.keys())
    if len(shared) < MIN_CLUSTERS:
        raise InputError("clusters", f"{len(shared)} shared", f"compare runs that share at least {MIN_CLUSTERS}")
    value_a, deleted_a = _leave_one_out(_select(a, [in_a[name] for name in shared]))
    value_b, deleted_b = _leave_one_out(_select(b, [in_b[name] for name in shared]))
    delta = value_b - value_a
    se, t = _jackknife_se(deleted_b - deleted_a, level)
    # Two identical runs have delta = se = 0: no evidence of a change, p = 1.
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(se > 0, np.abs(delta) / se, np.where(delta == 0, 0.0, np.inf))
    p = 2 * stats.t.sf(ratio, len(shared) - 1)
    mde = np.where(se > 0, mde_from_se(se), np.nan)
    return PairedMMD2(delta, delta - t * se, delta + t * se, p, mde, len(shared))


def mmd2_bootstrap(sums: KernelSums, *, n_resamples: int = 1000, level: float = 0.95, seed: int = 0) -> ArrayInterval:
    """MMD^2 with its percentile cluster bootstrap interval: the robustness check of `mmd2_jackknife`.

    A resample that holds a cluster twice leaves out the pairs of the cluster with its copy, as the statistic leaves
    out the pairs within a cluster. With them the interval covers nothing at 24 clusters.

    Raises:
        InputError: a modality with tokens in fewer than 4 clusters.
    """
    sums = _occupied(sums)
    counts = _resample(len(sums.clusters), n_resamples, seed)
    n_v, n_t = sums.n_visual.astype(np.float64), sums.n_text.astype(np.float64)
    draws = np.zeros((*sums.vv.shape[:-2], n_resamples))
    for matrix, left, right, sign in ((sums.vv, n_v, n_v, 1.0), (sums.tt, n_t, n_t, 1.0), (sums.vt, n_v, n_t, -2.0)):
        pairs = _quadratic(np.outer(left, right), counts)
        draws += sign * np.divide(
            _quadratic(matrix, counts), pairs, out=np.full(draws.shape, np.nan), where=pairs > 0
        )  # a draw of clusters that pair no tokens has no value
    low, high = np.nanquantile(draws, (0.5 - _check_level(level) / 2, 0.5 + level / 2), axis=-1)
    return ArrayInterval(mmd2_from_sums(sums), low, high)


def label_flips(n_visual: ArrayLike, n_text: ArrayLike, n_permutations: int, seed: int = 0) -> Floats:
    """Signs [n_permutations, D] of a block permutation: -1 where the two labels of a whole cluster are exchanged.

    A cluster with tokens of both modalities exchanges its labels by a fair coin (sign flip within the sample). Clusters
    with one modality only exchange labels among themselves, so that the number of clusters a side stays. Tokens of one
    cluster always move together: under an image effect they are not exchangeable one by one.

    Args:
        n_visual, n_text: [D] tokens of each cluster.
        n_permutations: number of permutations, without the observed labelling.
        seed: of the draws; the same D, counts and seed give the same signs, which is what max-T over layers needs.

    Raises:
        InputError: n_permutations below 1.
    """
    if n_permutations < 1:
        raise InputError("n_permutations", n_permutations, "give a positive number of permutations")
    visual, text = np.asarray(n_visual) > 0, np.asarray(n_text) > 0
    rng = np.random.default_rng([seed, 2])
    signs = np.ones((n_permutations, len(visual)))
    both, one = np.flatnonzero(visual & text), np.flatnonzero(visual ^ text)
    signs[:, both] = 2 * rng.integers(0, 2, size=(n_permutations, len(both))) - 1
    dealt = rng.permuted(np.broadcast_to(visual[one], (n_permutations, len(one))), axis=1)
    signs[:, one] = np.where(dealt == visual[one], 1, -1)
    return signs


def mmd2_permuted(sums: KernelSums, signs: ArrayLike) -> Floats:
    """MMD^2 under exchanged labels, [..., n_permutations], from the sums alone.

    With s the signs, cluster i counts as visual with its visual tokens where s_i = 1 and with its text tokens where
    s_i = -1. Every sum of the statistic is then a quadratic form in s with the one matrix vv + tt - vt - vt', so a
    permutation costs D^2 operations and no kernel.

    Args:
        sums: kernel sums.
        signs: [n_permutations, D], see `label_flips`.

    Raises:
        InputError: a modality with tokens in fewer than 2 clusters.
    """
    _leave_one_out(sums, delete=False)  # the same refusals as the observed statistic
    s = np.asarray(signs, dtype=np.float64)
    n_v, n_t = sums.n_visual.astype(np.float64), sums.n_text.astype(np.float64)
    kernel_visual, kernel_text, kernel_cross = _exchanged(sums.vv, sums.tt, sums.vt, s)
    pairs_visual, pairs_text, pairs_cross = _exchanged(np.outer(n_v, n_v), np.outer(n_t, n_t), np.outer(n_v, n_t), s)
    return kernel_visual / pairs_visual + kernel_text / pairs_text - 2 * kernel_cross / pairs_cross


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


def permutation_test(sums: KernelSums, *, n_permutations: int = 1000, seed: int = 0) -> PermutationTest:
    """Block permutation test of MMD^2 > 0 from saved sums, with max-T over all leading dimensions.

    The null: the labels visual and text of a cluster are exchangeable (`label_flips`). For visual against text in
    one model that is never true, so its p says only that the test ran; it is informative for two samples of one
    modality, and the change between runs has `paired_mmd2_difference`.

    Raises:
        InputError: as `label_flips` and `mmd2_permuted`.
    """
    null = mmd2_permuted(sums, label_flips(sums.n_visual, sums.n_text, n_permutations, seed))
    value = mmd2_from_sums(sums)
    p, adjusted = (a.reshape(value.shape) for a in max_t(value.reshape(-1), null.reshape(-1, n_permutations)))
    return PermutationTest(value, null.mean(axis=-1), p, adjusted, n_permutations)


def split_half_mmd2(
    sums: KernelSums, seed: int = 0, n_splits: int = 5, level: float = 0.95
) -> tuple[ArrayInterval | None, ArrayInterval | None]:
    """Visual-visual and text-text MMD^2 between halves of the clusters, averaged over seeded splits.

    The baseline of the visual-text value: what two samples of one modality give. Its expectation is 0 by construction,
    so the intervals show the noise. They are the jackknife of the averaged statistic.

    Returns:
        (visual-visual, text-text), each of shape [...], or None where fewer than 6 clusters have that modality.
    """
    return (
        _split_half(sums.vv, sums.n_visual, sums.clusters, seed, n_splits, level),
        _split_half(sums.tt, sums.n_text, sums.clusters, seed, n_splits, level),
    )


def first_half(names: Sequence[str], seed: int, split: int = 0) -> NDArray[np.bool_]:
    """Which clusters belong to the first half of a seeded split; the halves differ by at most one cluster."""
    return hash_ranks(names, seed, "split-half", split) < len(names) // 2


def _split_half(
    matrix: Floats, counts: NDArray[np.int64], clusters: tuple[str, ...], seed: int, n_splits: int, level: float
) -> ArrayInterval | None:
    present = np.flatnonzero(counts)
    if len(present) < MIN_SPLIT_CLUSTERS:
        return None
    names = tuple(clusters[i] for i in present)
    block, n = matrix[..., present[:, None], present].astype(np.float64), counts[present]
    results = []
    for split in range(n_splits):
        a = first_half(names, seed, split)
        b = ~a
        halves = KernelSums(
            vv=block * np.outer(a, a), tt=block * np.outer(b, b), vt=block * np.outer(a, b),
            n_visual=n * a, n_text=n * b, clusters=names,
        )  # fmt: skip
        results.append(_leave_one_out(halves))
    value = np.mean([r[0] for r in results], axis=0)
    se, t = _jackknife_se(np.mean([r[1] for r in results], axis=0), level)
    return ArrayInterval(value, value - t * se, value + t * se)


def _leave_one_out(sums: KernelSums, delete: bool = True) -> tuple[Floats, Floats]:
    """The statistic [...] and, with `delete`, its value without each cluster in turn [..., D]."""
    n_v, n_t = sums.n_visual.astype(np.float64), sums.n_text.astype(np.float64)
    needed = 2 if not delete else MIN_CLUSTERS // 2 + 1
    for name, counts in (("n_visual", n_v), ("n_text", n_t)):
        if np.count_nonzero(counts) < needed:
            raise InputError(
                name, f"tokens in {np.count_nonzero(counts)} clusters",
                f"the cluster U-statistic needs tokens of both modalities in at least {MIN_CLUSTERS} clusters",
            )  # fmt: skip
    value = np.zeros(sums.vv.shape[:-2])
    deleted = np.zeros(sums.vv.shape[:-1])
    for matrix, left, right, sign in ((sums.vv, n_v, n_v, 1.0), (sums.tt, n_t, n_t, 1.0), (sums.vt, n_v, n_t, -2.0)):
        matrix = matrix.astype(np.float64)
        own = np.diagonal(matrix, axis1=-2, axis2=-1)
        lost = matrix.sum(axis=-1) + matrix.sum(axis=-2) - 2 * own  # pairs with cluster i on one side only
        total = matrix.sum(axis=(-2, -1)) - own.sum(axis=-1)
        pairs = left.sum() * right.sum() - (left * right).sum()
        lost_pairs = left * right.sum() + right * left.sum() - 2 * left * right
        value += sign * total / pairs
        if delete:
            deleted += sign * (total[..., None] - lost) / (pairs - lost_pairs)
    return value, deleted


def _exchanged(vv: Floats, tt: Floats, vt: Floats, s: Floats) -> tuple[Floats, Floats, Floats]:
    """Sums over pairs of unlike clusters that are visual-visual, text-text and visual-text after the exchange s."""
    vv, tt, vt = (matrix.astype(np.float64) for matrix in (vv, tt, vt))
    form = _quadratic(vv + tt - vt - vt.mT, s)
    linear = _row_sums(vv - tt + vt - vt.mT) @ s.T
    total = _row_sums(vv + tt + vt + vt.mT).sum(axis=-1)[..., None]
    return (total + 2 * linear + form) / 4, (total - 2 * linear + form) / 4, (total - form) / 4


def _row_sums(matrix: Floats) -> Floats:
    """Sum of each row without its diagonal entry."""
    sums: Floats = matrix.sum(axis=-1) - np.diagonal(matrix, axis1=-2, axis2=-1)
    return sums


def _quadratic(matrix: Floats, s: Floats) -> Floats:
    """s' M s without the diagonal of M, for every row s [B, D]; matrix [..., D, D] gives [..., B]."""
    own = np.diagonal(matrix, axis1=-2, axis2=-1)
    form: Floats = ((s @ matrix) * s).sum(axis=-1) - own @ (s * s).T
    return form


def _jackknife_se(deleted: Floats, level: float) -> tuple[Floats, float]:
    """Standard error from delete-one values [..., D], and the t quantile that goes with it."""
    d = deleted.shape[-1]
    se = np.sqrt((d - 1) * deleted.var(axis=-1))
    return se, float(stats.t.ppf(0.5 + _check_level(level) / 2, d - 1))


def _occupied(sums: KernelSums) -> KernelSums:
    """Without clusters that have no tokens at all, which would count as clusters and carry nothing."""
    for name, counts in (("n_visual", sums.n_visual), ("n_text", sums.n_text)):
        if np.count_nonzero(counts) < MIN_CLUSTERS:
            raise InputError(
                name, f"tokens in {np.count_nonzero(counts)} clusters", f"an interval needs at least {MIN_CLUSTERS}"
            )
    return _select(sums, np.flatnonzero(sums.n_visual + sums.n_text))


def _select(sums: KernelSums, index: Sequence[int] | NDArray[np.int64]) -> KernelSums:
    index = np.asarray(index)
    vv, tt, vt = (m[..., index[:, None], index] for m in (sums.vv, sums.tt, sums.vt))
    return KernelSums(vv, tt, vt, sums.n_visual[index], sums.n_text[index], tuple(sums.clusters[i] for i in index))


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


# A report asks for the same draws for every metric and run, and drawing them is most of its time.
@functools.lru_cache(maxsize=2)
def _resample(n_clusters: int, n_resamples: int, seed: int) -> Floats:
    """[n_resamples, n_clusters]: how often each cluster is drawn. Read-only: the draws are shared."""
    if n_clusters < 2:
        raise InputError("clusters", f"{n_clusters} cluster", "resampling needs at least 2 clusters")
    if n_resamples < 1:
        raise InputError("n_resamples", n_resamples, "give a positive number of resamples")
    rng = np.random.default_rng([seed, 0])
    counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise ratio, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _percentile(draws: Floats, level: float, argument: str) -> Interval:
    finite = draws[np.isfinite(draws)]
    if len(finite) < 0.95 * len(draws):
        share = 1 - len(finite) / len(draws)
        raise InputError(
            argument, f"undefined in {share:.0%} of the resamples", "it rests on too few clusters to have an interval"
        )
    tail = (1 - _check_level(level)) / 2
    low, high = np.quantile(finite, (tail, 1 - tail))
    return Interval(float(low), float(high))


def _check_level(level: float) -> float:
    if not 0 < level < 1:
        raise InputError("level", level, "give a coverage between 0 and 1, such as 0.95")
    return level
