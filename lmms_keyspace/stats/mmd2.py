"""MMD^2 and its intervals from saved kernel sums: the cluster U-statistic, its jackknife and its bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums
from lmms_keyspace.stats.clusters import resample
from lmms_keyspace.stats.types import ArrayInterval, Floats, check_level

# Fewest clusters from which a cluster U-statistic with a jackknife interval is reported.
MIN_CLUSTERS = 4


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
    value, _ = leave_one_out(sums, delete=False)
    return value


def mmd2_jackknife(sums: KernelSums, level: float = 0.95) -> ArrayInterval:
    """MMD^2 with its delete-one-cluster jackknife interval (Arvesen, Ann. Math. Stat. 40, 1969: U-statistics).

    The naive cluster bootstrap pairs a document with its own copies and hardly ever covers the truth at 24 documents.
    Student's t with (clusters - 1) degrees of freedom.

    Raises:
        InputError: a modality with tokens in fewer than 4 clusters.
    """
    value, deleted = leave_one_out(_occupied(sums))
    se, t = jackknife_se(deleted, level)
    return ArrayInterval(value, value - t * se, value + t * se)


def mmd2_bootstrap(sums: KernelSums, *, n_resamples: int = 1000, level: float = 0.95, seed: int = 0) -> ArrayInterval:
    """MMD^2 with its percentile cluster bootstrap interval: the robustness check of `mmd2_jackknife`.

    A resample that holds a cluster twice leaves out the pairs of the cluster with its copy, as the statistic leaves
    out the pairs within a cluster. With them the interval covers nothing at 24 clusters.

    Raises:
        InputError: a modality with tokens in fewer than 4 clusters.
    """
    sums = _occupied(sums)
    counts = resample(len(sums.clusters), n_resamples, seed)
    n_v, n_t = sums.n_visual.astype(np.float64), sums.n_text.astype(np.float64)
    draws = np.zeros((*sums.vv.shape[:-2], n_resamples))
    for matrix, left, right, sign in ((sums.vv, n_v, n_v, 1.0), (sums.tt, n_t, n_t, 1.0), (sums.vt, n_v, n_t, -2.0)):
        pairs = quadratic(np.outer(left, right), counts)
        draws += sign * np.divide(
            quadratic(matrix, counts), pairs, out=np.full(draws.shape, np.nan), where=pairs > 0
        )  # a draw of clusters that pair no tokens has no value
    low, high = np.nanquantile(draws, (0.5 - check_level(level) / 2, 0.5 + level / 2), axis=-1)
    return ArrayInterval(mmd2_from_sums(sums), low, high)


def leave_one_out(sums: KernelSums, delete: bool = True) -> tuple[Floats, Floats]:
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


def quadratic(matrix: Floats, s: Floats) -> Floats:
    """s' M s without the diagonal of M, for every row s [B, D]; matrix [..., D, D] gives [..., B]."""
    own = np.diagonal(matrix, axis1=-2, axis2=-1)
    form: Floats = ((s @ matrix) * s).sum(axis=-1) - own @ (s * s).T
    return form


def jackknife_se(deleted: Floats, level: float) -> tuple[Floats, float]:
    """Standard error from delete-one values [..., D], and the t quantile that goes with it."""
    d = deleted.shape[-1]
    se = np.sqrt((d - 1) * deleted.var(axis=-1))
    return se, float(stats.t.ppf(0.5 + check_level(level) / 2, d - 1))


def _occupied(sums: KernelSums) -> KernelSums:
    """Without clusters that have no tokens at all, which would count as clusters and carry nothing."""
    for name, counts in (("n_visual", sums.n_visual), ("n_text", sums.n_text)):
        if np.count_nonzero(counts) < MIN_CLUSTERS:
            raise InputError(
                name, f"tokens in {np.count_nonzero(counts)} clusters", f"an interval needs at least {MIN_CLUSTERS}"
            )
    return select(sums, np.flatnonzero(sums.n_visual + sums.n_text))


def select(sums: KernelSums, index: Sequence[int] | NDArray[np.int64]) -> KernelSums:
    """The sums of some clusters."""
    index = np.asarray(index)
    vv, tt, vt = (m[..., index[:, None], index] for m in (sums.vv, sums.tt, sums.vt))
    return KernelSums(vv, tt, vt, sums.n_visual[index], sums.n_text[index], tuple(sums.clusters[i] for i in index))
