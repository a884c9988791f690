"""Rows of the divergence table: from arrays over KV heads, or from the reason why there is no value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lmms_keyspace import records, stats
from lmms_keyspace.divergence import mmd
from lmms_keyspace.divergence.arrays import Floats
from lmms_keyspace.divergence.contrasts import N_DRAWS, Clouds
from lmms_keyspace.divergence.js import js_classifier
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import TEXT_TEXT, VISUAL_VISUAL, HeldOutLoss, KernelSums

Row = dict[str, Any]

# What a row says unless it says otherwise.
EMPTY: Row = {
    "value": np.nan, "null_mean": np.nan, "ci_low": np.nan, "ci_high": np.nan, "p": np.nan, "p_adjusted": np.nan,
    "test_family": "", "n_visual": 0, "n_text": 0, "n_clusters": 0, "n_permutations": 0, "at_ceiling": False,
    "estimator_version": "", "note": "", "head": records.ALL_HEADS,
}  # fmt: skip


def with_mean(per_head: Floats) -> Floats:
    """[1 + H, ...]: the mean over KV heads, then the heads. All statistics here are linear in what is averaged."""
    return np.concatenate([per_head.mean(axis=0, keepdims=True), per_head])


def head_rows(row: Row, **columns: np.ndarray) -> Iterator[Row]:
    """One row for head `all`, which comes first in the arrays [1 + H] of `columns`, and one per KV head."""
    n_heads = len(next(iter(columns.values()))) - 1
    for i, head in enumerate((records.ALL_HEADS, *map(str, range(n_heads)))):
        yield EMPTY | row | {"head": head} | {name: values[i] for name, values in columns.items()}


def computed_or_noted(contrast: str, estimators: Sequence[str], compute: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows of `compute`, or where bad input stops it, one row per estimator that says why."""
    try:
        return list(compute())
    except InputError as error:
        note = f"not computable: {error}"
        return [EMPTY | {"contrast": contrast, "estimator": estimator, "note": note} for estimator in estimators]


def clouds_row(contrast: str, estimator: str, clouds: Clouds) -> Row:
    """A row with the sizes of these clouds, and no value yet."""
    return EMPTY | {
        "contrast": contrast, "estimator": estimator, "estimator_version": "1", "n_visual": len(clouds.groups_x),
        "n_text": len(clouds.groups_y), "n_clusters": len({*clouds.groups_x, *clouds.groups_y}),
    }  # fmt: skip


def kernel_rows(contrast: str, by_estimator: Mapping[str, KernelSums], *, seed: int) -> Iterator[Row]:
    """Cluster U-statistics of a contrast with jackknife intervals, from the kernel sums [KV heads, D, D] of estimators.

    The split-half contrasts follow from the sums of visual against text.

    Raises:
        InputError: too few clusters.
    """
    sums = next(iter(by_estimator.values()))
    vv, tt, vt = (
        np.stack([with_mean(getattr(one, name)) for one in by_estimator.values()]) for name in ("vv", "tt", "vt")
    )
    together = replace(sums, vv=vv, tt=tt, vt=vt)
    if contrast in (VISUAL_VISUAL, TEXT_TEXT):
        result = stats.split_half_mmd2(together, seed, N_DRAWS)[contrast == TEXT_TEXT]
        tokens = sums.n_text if contrast == TEXT_TEXT else sums.n_visual
        present = np.flatnonzero(tokens)
        if result is None:
            needed = f"halves need at least {stats.MIN_SPLIT_CLUSTERS}"
            raise InputError(contrast, f"tokens in {len(present)} clusters", needed)
        first = stats.first_half([sums.clusters[i] for i in present], seed)
        sizes = tokens[present][first].sum(), tokens[present][~first].sum(), len(present)
    else:
        result = stats.mmd2_jackknife(together)
        sizes = sums.n_visual.sum(), sums.n_text.sum(), len(sums.clusters)
    counts = dict(zip(("n_visual", "n_text", "n_clusters"), map(int, sizes), strict=True))
    for k, estimator in enumerate(by_estimator):
        row = counts | {"contrast": contrast, "estimator": estimator, "estimator_version": mmd.ESTIMATOR_VERSION}
        yield from head_rows(row, value=result.value[k], ci_low=result.low[k], ci_high=result.high[k])


def loss_rows(contrast: str, loss: HeldOutLoss, *, seed: int) -> Iterator[Row]:
    """The classifier bound of a contrast with its bootstrap interval, from held-out losses [KV heads, D].

    Raises:
        InputError: too few clusters.
    """
    averaged: dict[str, Any] = {name: with_mean(getattr(loss, name)) for name in loss.ARRAYS}
    result = js_classifier.estimate(replace(loss, **averaged), seed=seed)
    row = {
        "contrast": contrast, "estimator": "js_classifier", "estimator_version": js_classifier.version,
        "n_visual": int(loss.n_visual.sum()), "n_text": int(loss.n_text.sum()), "n_clusters": len(loss.clusters),
    }  # fmt: skip
    return head_rows(row, value=result.value, ci_low=result.low, ci_high=result.high, at_ceiling=result.at_ceiling)
