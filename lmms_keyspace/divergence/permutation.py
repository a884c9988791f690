"""The block permutation test of MMD^2 on keys; `stats.permutation_test` is the same on saved sums."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.typing import ArrayLike
from torch import Tensor

from lmms_keyspace import stats
from lmms_keyspace.divergence.arrays import Cloud, Groups, as_clouds, groups_or_tokens
from lmms_keyspace.divergence.bandwidth import median_bandwidth2
from lmms_keyspace.divergence.mmd import SCALES, kernel_sums
from lmms_keyspace.stats import PermutationTest


def block_permutation_test(
    x: Cloud,
    y: Cloud,
    *,
    groups_x: Groups | None,
    groups_y: Groups | None,
    n_permutations: int = 1000,
    seed: int = 0,
    bandwidth2: ArrayLike | Tensor | None = None,
    scales: Sequence[float] = SCALES,
) -> PermutationTest:
    """Test of equal distributions in which the tokens of a group keep together, with max-T over leading dimensions.

    A group with tokens on both sides exchanges its two labels; groups on one side exchange places among each other.
    All permutations come from the block sums, so they cost no kernel. Without groups every token is a block of its own:
    the usual token permutation, which rejects equal distributions nearly always when tokens of an image share an
    effect. It holds one number per pair of tokens.

    Args:
        x, y: [..., n, d] and [..., m, d].
        groups_x, groups_y: [n], [m] names of the groups; None on both sides permutes tokens.
        n_permutations: number of permutations; p is at least 1 / (n_permutations + 1).
        seed: seed of the permutations.
        bandwidth2: squared bandwidth [...] or a scalar; None takes `median_bandwidth2(x, y)`, which does not see the
            labels as long as all tokens enter it (equal sides of at most 500).
        scales: multiples of bandwidth2 over which the kernel is averaged.

    Returns:
        `stats.PermutationTest`: value, null_mean, p and p_adjusted [...].

    Raises:
        InputError: as `mmd2`; n_permutations below 1.
    """
    x, y = as_clouds(x, y)
    groups_x, groups_y = groups_or_tokens(x, y, groups_x, groups_y)
    if bandwidth2 is None:
        bandwidth2 = median_bandwidth2(x, y)
    sums = kernel_sums(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=bandwidth2, scales=scales)
    return stats.permutation_test(sums, n_permutations=n_permutations, seed=seed)
