"""Intervals, tests and power, and everything that follows from saved kernel sums. numpy and scipy only.

The unit of resampling is always the cluster (an image, a scene, a document), never the row or the token: rows of one
cluster share its luck, and treating them as independent gives intervals that are too narrow.
"""

from lmms_keyspace.stats.clusters import cluster_bootstrap, cluster_bootstrap_function, paired_cluster_difference
from lmms_keyspace.stats.hashing import first_half, hash_ranks
from lmms_keyspace.stats.js import js_bootstrap, js_from_losses, mean_losses, paired_js_difference
from lmms_keyspace.stats.mmd2 import (
    MIN_CLUSTERS,
    mean_over_heads,
    mmd2_bootstrap,
    mmd2_from_sums,
    mmd2_jackknife,
)
from lmms_keyspace.stats.multiplicity import holm, holm_levels, max_t
from lmms_keyspace.stats.noninferiority import ROUNDING, Bound, OrientedChange, oriented_change
from lmms_keyspace.stats.paired import paired_mmd2_difference
from lmms_keyspace.stats.permutation import label_flips, mmd2_permuted, permutation_test
from lmms_keyspace.stats.power import mde_from_se, mde_paired
from lmms_keyspace.stats.rates import matched_pairs, mcnemar_exact, wilson
from lmms_keyspace.stats.regression import MIN_REGRESSION_CLUSTERS, Slopes, cluster_slopes
from lmms_keyspace.stats.split_half import MIN_SPLIT_CLUSTERS, split_half_mmd2
from lmms_keyspace.stats.types import ArrayInterval, Estimate, Interval, PairedChange, PermutationTest

__all__ = [
    "MIN_CLUSTERS",
    "MIN_REGRESSION_CLUSTERS",
    "MIN_SPLIT_CLUSTERS",
    "ROUNDING",
    "ArrayInterval",
    "Bound",
    "Estimate",
    "Interval",
    "OrientedChange",
    "PairedChange",
    "PermutationTest",
    "Slopes",
    "cluster_bootstrap",
    "cluster_bootstrap_function",
    "cluster_slopes",
    "first_half",
    "hash_ranks",
    "holm",
    "holm_levels",
    "js_bootstrap",
    "js_from_losses",
    "label_flips",
    "matched_pairs",
    "max_t",
    "mcnemar_exact",
    "mde_from_se",
    "mde_paired",
    "mean_losses",
    "mean_over_heads",
    "mmd2_bootstrap",
    "mmd2_from_sums",
    "mmd2_jackknife",
    "mmd2_permuted",
    "oriented_change",
    "paired_cluster_difference",
    "paired_js_difference",
    "paired_mmd2_difference",
    "permutation_test",
    "split_half_mmd2",
    "wilson",
]
