"""What changed from the reference run to a run, on the clusters that both have: every layer and KV head together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.divergence import Measurement
from lmms_keyspace.divergence.rows import with_mean
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import (
    ALL_HEADS,
    CHANGE_COLUMNS,
    VISUAL_TEXT,
    GramKey,
    HeldOutLoss,
    KernelSums,
    RunData,
    empty_table,
)
from lmms_keyspace.stats import PairedChange


def changes(base: RunData, part: Measurement, task: str, condition: str, space: str, *, seed: int) -> pd.DataFrame:
    """The table `records.CHANGE_COLUMNS` of visual against text in one task, condition and space.

    All layers and KV heads are one family: `p_adjusted` and the band hold for all of them together, those of head
    `all` for all layers. A layer that only one of the runs has gets a row without a value.

    Args:
        base: the reference run.
        part: the run's sums and losses there.
        seed: of the sign flips behind p_adjusted and the band.
    """

    def by_layer(entries: Mapping[GramKey, Any]) -> dict[int, Any]:
        wanted = (task, condition, space, VISUAL_TEXT)
        return {
            key.layer: entries[key] for key in entries if (key.task, key.condition, key.space, key.contrast) == wanted
        }

    place = {"task": task, "condition": condition, "space": space}
    rows = [
        place | {"estimator": estimator} | row
        for estimator, of_base, of_run in (
            ("mmd2", base.gram, part.gram),
            ("js_classifier", base.losses, part.losses),
        )
        for row in _rows(by_layer(of_base), by_layer(of_run), seed)
    ]
    if not rows:
        return empty_table(CHANGE_COLUMNS)
    return pd.DataFrame(rows, columns=list(CHANGE_COLUMNS)).astype(dict(CHANGE_COLUMNS))


def _rows(base: Mapping[int, Any], run: Mapping[int, Any], seed: int) -> list[dict[str, Any]]:
    shared = sorted(base.keys() & run.keys())
    rows = [
        _empty(layer, f"only the {'run' if layer in run else 'reference'} has this layer")
        for layer in sorted(base.keys() ^ run.keys())
    ]
    if not shared:
        return rows
    try:
        for members, of_what in ((slice(0, 1), "layers"), (slice(1, None), "layers and KV heads")):
            change = _change(_stacked(base, shared, members), _stacked(run, shared, members), seed)
            rows += _computed(change, shared, of_what)
    except InputError as error:
        rows += [_empty(layer, str(error)) for layer in shared]
    return rows


def _change(base: KernelSums | HeldOutLoss, run: KernelSums | HeldOutLoss, seed: int) -> PairedChange:
    if isinstance(base, KernelSums) and isinstance(run, KernelSums):
        return stats.paired_mmd2_difference(base, run, seed=seed)
    assert isinstance(base, HeldOutLoss)
    assert isinstance(run, HeldOutLoss)
    return stats.paired_js_difference(base, run, seed=seed)


def _stacked(by_layer: Mapping[int, Any], layers: Sequence[int], members: slice) -> Any:
    """Sums or losses [layers, 1 + KV heads, ...], of which the mean over heads or the heads are taken."""
    first = by_layer[layers[0]]
    if any(by_layer[layer].clusters != first.clusters for layer in layers):
        raise InputError("clusters", "other clusters in other layers", "measure the run again")
    try:
        arrays = {
            name: np.stack([with_mean(getattr(by_layer[layer], name))[members] for layer in layers])
            for name in first.ARRAYS
        }
    except ValueError as error:
        raise InputError("layers", list(layers), "they have unlike numbers of KV heads") from error
    return replace(first, **arrays)


def _computed(change: PairedChange, layers: Sequence[int], of_what: str) -> list[dict[str, Any]]:
    n_tests = change.delta.size
    rows = []
    for i, layer in enumerate(layers):
        for h in range(change.delta.shape[1]):
            columns = {
                name: getattr(change, name)[i, h]
                for name in ("delta", "p", "mde", "p_adjusted", "band_low", "band_high")
            }
            rows.append(
                _empty(layer, "") | columns | {
                    "head": ALL_HEADS if of_what == "layers" else str(h), "ci_low": change.low[i, h],
                    "ci_high": change.high[i, h], "n_clusters": change.n,
                    "test_family": f"max-T, {n_tests} tests: {of_what}",
                }
            )  # fmt: skip
    return rows


def _empty(layer: int, reason: str) -> dict[str, Any]:
    names = ("delta", "ci_low", "ci_high", "band_low", "band_high", "p", "p_adjusted", "mde")
    note = f"not computable: {reason}" if reason else ""
    return dict.fromkeys(names, np.nan) | {
        "layer": layer, "head": ALL_HEADS, "n_clusters": 0, "test_family": "", "note": note,
    }  # fmt: skip
