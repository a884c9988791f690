"""The change of a divergence between two runs on the clusters they share: interval, p, band and adjusted p."""

from __future__ import annotations

import numpy as np
from scipy import stats

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums
from lmms_keyspace.stats.mmd2 import MIN_CLUSTERS, jackknife_se, leave_one_out, select
from lmms_keyspace.stats.power import mde_from_se
from lmms_keyspace.stats.types import Floats, PairedChange, check_level


def paired_mmd2_difference(
    a: KernelSums, b: KernelSums, level: float = 0.95, *, n_resamples: int = 2000, seed: int = 0
) -> PairedChange:
    """Change of MMD^2 from run a (the base) to run b on the clusters they share, matched by name.

    Delete-one-cluster jackknife of the difference: what the two runs share cancels, which makes the interval much
    narrower than that of unpaired runs. See `change_from_jackknife` for p, band and adjusted p.

    Args:
        a, b: sums of the same layers, heads and bandwidths; leading shapes must be equal.
        level: coverage.
        n_resamples, seed: of the sign flips behind p_adjusted and the band.

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
    value_a, deleted_a = leave_one_out(select(a, [in_a[name] for name in shared]))
    value_b, deleted_b = leave_one_out(select(b, [in_b[name] for name in shared]))
    return change_from_jackknife(
        value_b - value_a, deleted_b - deleted_a, level=level, n_resamples=n_resamples, seed=seed
    )


def change_from_jackknife(delta: Floats, deleted: Floats, *, level: float, n_resamples: int, seed: int) -> PairedChange:
    """Interval, p and everything adjusted for many tests from delete-one values.

    Interval and p of a single test use Student's t with (clusters - 1) degrees of freedom. The band and p_adjusted hold
    for all leading dimensions together: the pseudo-values of the clusters, centered, change sign by one coin per
    cluster for all tests (the wild bootstrap of max-T: Chernozhukov, Chetverikov and Kato, Ann. Stat. 41, 2013, with
    Rademacher weights; one-sample sign flips in Winkler et al., NeuroImage 92, 2014), and the largest |t| of each draw
    is what the observed ones are set against. Each draw is divided by its own standard error, as the observed change
    is. (By that of the data its tails would be those of a normal: 16 tests on 24 clusters then gave some false alarm in
    12 % of simulations instead of 5 %.) Neither is narrower or smaller than that of the single test.

    Args:
        delta: [...] the change.
        deleted: [..., D] its value without each cluster.
        level: coverage.
        n_resamples, seed: of the sign flips.

    Returns:
        Arrays [...].
    """
    n = deleted.shape[-1]
    se, t = jackknife_se(deleted, level)
    # Two identical runs have delta = se = 0: no evidence of a change, p = 1.
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(se > 0, np.abs(delta) / se, np.where(delta == 0, 0.0, np.inf))
    p = 2 * stats.t.sf(ratio, n - 1)
    influence = (n - 1) * (deleted.mean(axis=-1, keepdims=True) - deleted) / n
    signs = 2.0 * np.random.default_rng([seed, 3]).integers(0, 2, size=(n_resamples, n)) - 1
    ratios = np.divide(
        np.abs(influence @ signs.T), se[..., None], out=np.zeros((*se.shape, n_resamples)), where=se[..., None] > 0
    )
    # |t| of the flipped values from their sum over the standard error before the flip: sum of squares stays the same.
    left = np.maximum(1 - ratios**2 / (n - 1), np.finfo(np.float64).tiny)
    largest = (ratios / np.sqrt(left)).reshape(-1, n_resamples).max(axis=0)
    # The observed labelling is one of the draws (Phipson and Smyth 2010); rounding must not make it look rarer.
    adjusted = (1 + (largest >= ratio[..., None] - 1e-9).sum(axis=-1)) / (1 + n_resamples)
    wide = max(t, float(np.quantile(largest, check_level(level))))
    return PairedChange(
        delta=delta,
        low=delta - t * se,
        high=delta + t * se,
        p=p,
        mde=np.where(se > 0, mde_from_se(se), np.nan),
        n=n,
        p_adjusted=np.maximum(adjusted, p),
        band_low=delta - wide * se,
        band_high=delta + wide * se,
    )
