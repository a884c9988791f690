"""What two samples of one modality give: the baseline of every divergence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmms_keyspace.records import KernelSums
from lmms_keyspace.stats.hashing import first_half
from lmms_keyspace.stats.mmd2 import jackknife_se, leave_one_out
from lmms_keyspace.stats.types import ArrayInterval, Floats

# Fewest clusters for the split-half baselines, whose halves must each keep a pair of clusters when one is deleted.
MIN_SPLIT_CLUSTERS = 6


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
        results.append(leave_one_out(halves))
    value = np.mean([r[0] for r in results], axis=0)
    se, t = jackknife_se(np.mean([r[1] for r in results], axis=0), level)
    return ArrayInterval(value, value - t * se, value + t * se)
