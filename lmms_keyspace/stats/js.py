"""The classifier bound on the Jensen-Shannon divergence from saved held-out losses, and its change between runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import HeldOutLoss
from lmms_keyspace.stats.clusters import resample
from lmms_keyspace.stats.mmd2 import MIN_CLUSTERS
from lmms_keyspace.stats.paired import change_from_jackknife
from lmms_keyspace.stats.types import ArrayInterval, Floats, PairedChange, check_level

LN2 = math.log(2)


def js_from_losses(loss: HeldOutLoss) -> Floats:
    """ln 2 minus the balanced held-out log-loss, nats, shape [...].

    Raises:
        InputError: no token on a side.
    """
    _check_sides(loss, 1)
    return _bound(loss, np.ones((1, len(loss.clusters))))[..., 0]


def mean_losses(losses: Sequence[HeldOutLoss]) -> HeldOutLoss:
    """Losses averaged over layers and all leading dimensions: their bound is the mean of the bounds."""
    first = losses[0]
    means = {
        name: np.mean([getattr(loss, name).reshape(-1, len(first.clusters)).mean(axis=0) for loss in losses], axis=0)
        for name in first.ARRAYS
    }
    return replace(first, **means)


def js_bootstrap(loss: HeldOutLoss, *, n_resamples: int = 1000, level: float = 0.95, seed: int = 0) -> ArrayInterval:
    """The bound with its percentile bootstrap over clusters; how a cluster moves the fits counts to first order.

    Raises:
        InputError: a side with tokens in fewer than 2 clusters.
    """
    _check_sides(loss, 2)
    counts = resample(len(loss.clusters), n_resamples, seed)
    # A draw without a token of one side has no balanced loss.
    counts = counts[(counts @ loss.n_visual > 0) & (counts @ loss.n_text > 0)]
    tail = (1 - check_level(level)) / 2
    low, high = np.quantile(_bound(loss, counts), (tail, 1 - tail), axis=-1)
    return ArrayInterval(js_from_losses(loss), low, high)


def paired_js_difference(
    a: HeldOutLoss, b: HeldOutLoss, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> PairedChange:
    """Change of the bound from run a (the base) to run b on the clusters they share, matched by name.

    Delete-one-cluster jackknife of the difference: what makes a cluster easy to tell apart in both runs cancels. What a
    cluster does to the fitted classifiers counts to first order (`HeldOutLoss.fit_influence`; the infinitesimal
    jackknife of Jaeckel 1972 and Efron 1982). A jackknife counts what is of second order twice (Efron and Stein, Ann.
    Stat. 9, 1981), so that intervals are up to a fourth too wide (docs/calibration.md).

    Args:
        a, b: losses of the same layer and heads; leading shapes must be equal.
        level, n_resamples, seed: as `paired_mmd2_difference`.

    Raises:
        InputError: other leading shapes, or fewer than 4 shared clusters with tokens of both modalities.
    """
    if a.loss_visual.shape[:-1] != b.loss_visual.shape[:-1]:
        raise InputError("b", b.loss_visual.shape, f"compare losses of the same heads; a has {a.loss_visual.shape}")
    shared = sorted(set(a.clusters) & set(b.clusters))
    if len(shared) < MIN_CLUSTERS:
        raise InputError("clusters", f"{len(shared)} shared", f"compare runs that share at least {MIN_CLUSTERS}")
    sides = []
    for loss in (a, b):
        place = {name: i for i, name in enumerate(loss.clusters)}
        index = np.asarray([place[name] for name in shared])
        arrays = {name: getattr(loss, name)[..., index] for name in loss.ARRAYS}
        mine = HeldOutLoss(**arrays, n_visual=loss.n_visual[index], n_text=loss.n_text[index], clusters=tuple(shared))
        _check_sides(mine, 2)
        sides.append(mine)
    deleted = [_bound(loss, 1 - np.eye(len(shared))) for loss in sides]
    delta = js_from_losses(sides[1]) - js_from_losses(sides[0])
    return change_from_jackknife(delta, deleted[1] - deleted[0], level=level, n_resamples=n_resamples, seed=seed)


def _bound(loss: HeldOutLoss, counts: Floats) -> Floats:
    """[..., B]: the bound when cluster g is taken counts[b, g] times, in the fits to first order."""
    mean_visual = loss.loss_visual @ counts.T / (counts @ loss.n_visual)
    mean_text = loss.loss_text @ counts.T / (counts @ loss.n_text)
    bound: Floats = LN2 - (mean_visual + mean_text) / 2 + loss.fit_influence @ (1 - counts).T
    return bound


def _check_sides(loss: HeldOutLoss, needed: int) -> None:
    for name, counts in (("n_visual", loss.n_visual), ("n_text", loss.n_text)):
        found = np.count_nonzero(counts)
        if found < needed:
            raise InputError(name, f"tokens in {found} clusters", f"the bound needs at least {needed} a side")
