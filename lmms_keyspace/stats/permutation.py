"""The block permutation test of MMD^2 from saved kernel sums."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums
from lmms_keyspace.stats.mmd2 import leave_one_out, mmd2_from_sums, quadratic
from lmms_keyspace.stats.multiplicity import max_t
from lmms_keyspace.stats.types import Floats, PermutationTest


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
    leave_one_out(sums, delete=False)  # the same refusals as the observed statistic
    s = np.asarray(signs, dtype=np.float64)
    n_v, n_t = sums.n_visual.astype(np.float64), sums.n_text.astype(np.float64)
    kernel_visual, kernel_text, kernel_cross = _exchanged(sums.vv, sums.tt, sums.vt, s)
    pairs_visual, pairs_text, pairs_cross = _exchanged(np.outer(n_v, n_v), np.outer(n_t, n_t), np.outer(n_v, n_t), s)
    return kernel_visual / pairs_visual + kernel_text / pairs_text - 2 * kernel_cross / pairs_cross


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


def _exchanged(vv: Floats, tt: Floats, vt: Floats, s: Floats) -> tuple[Floats, Floats, Floats]:
    """Sums over pairs of unlike clusters that are visual-visual, text-text and visual-text after the exchange s."""
    vv, tt, vt = (matrix.astype(np.float64) for matrix in (vv, tt, vt))
    form = quadratic(vv + tt - vt - vt.mT, s)
    linear = _row_sums(vv - tt + vt - vt.mT) @ s.T
    total = _row_sums(vv + tt + vt + vt.mT).sum(axis=-1)[..., None]
    return (total + 2 * linear + form) / 4, (total - 2 * linear + form) / 4, (total - form) / 4


def _row_sums(matrix: Floats) -> Floats:
    """Sum of each row without its diagonal entry."""
    sums: Floats = matrix.sum(axis=-1) - np.diagonal(matrix, axis1=-2, axis2=-1)
    return sums
