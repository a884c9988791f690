"""The divergence table of one task and condition: every layer and KV head, the three contrasts, both estimators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lmms_keyspace import records, stats
from lmms_keyspace.divergence import mmd
from lmms_keyspace.divergence.arrays import Floats, layer_clouds
from lmms_keyspace.divergence.js import js_classifier
from lmms_keyspace.divergence.paper import paper_protocol
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import GramKey, KernelSums

# Split-half MMD^2 is averaged over this many splits; its JS, which costs a fit each, uses the first.
N_SPLITS = 5
N_PERMUTATIONS = 1000

Names = NDArray[np.str_]


def measure(
    keys_visual: Mapping[int, torch.Tensor],
    keys_text: Mapping[int, torch.Tensor],
    *,
    clusters_visual: Sequence[str],
    clusters_text: Sequence[str],
    task: str,
    condition: str,
    space: str,
    bandwidth2: Mapping[int, NDArray[np.float64]],
    bandwidth_source: str,
    connector: str,
    token_filter: str,
    seed: int,
) -> tuple[pd.DataFrame, dict[GramKey, KernelSums]]:
    """Divergence of visual from text keys, and of each modality from itself between halves of the clusters.

    A contrast that cannot be computed has no row: visual-text with a modality in fewer than 4 clusters (a text-only
    condition has none), a split-half baseline in fewer than 6.

    The mmd2 rows of visual-text carry a block permutation test: within every cluster the labels visual and text are
    exchanged or not (`stats.label_flips`), by the same coins in all layers. `null_mean` is the mean of the statistic
    under it, `p` its one-sided p, `p_adjusted` that of max-T over the tests that `test_family` names: all layers and
    KV heads, or for head `all` all layers. Its null, that the two kinds of token are alike, is false in any model, so
    p is at its smallest value wherever there are clusters enough: it guards against reading noise and ranks nothing.
    The question with an answer is the change between two runs (`stats.paired_mmd2_difference`). In all other rows
    these columns are NaN, n_permutations is 0 and test_family is empty.

    The rows paper_mmd and paper_js_histogram are those of `PaperProtocol`: all KV heads together, without interval.
    A contrast most of whose vectors are equal has no such rows, as the pipeline finds no bandwidth there.

    Intervals are 95 %: delete-one-cluster jackknife for mmd2, cluster bootstrap of the held-out losses for
    js_classifier. Those of head `all` belong to the mean statistic over KV heads, not to a mean of intervals.
    For the split halves n_visual and n_text are the tokens of the first and second half of the first split.

    Args:
        keys_visual, keys_text: layer -> [tokens, KV heads, head width]. A layer or modality may be missing or empty.
        clusters_visual, clusters_text: the cluster of each token, the same in all layers.
        task, condition, space, bandwidth_source, connector, token_filter: written into the rows.
        bandwidth2: layer -> squared bandwidth per KV head, see `reference_bandwidths`.
        seed: seed of the split halves, the folds, the bootstrap and the permutations.

    Returns:
        Table with `records.DIVERGENCE_COLUMNS`, and per layer the kernel sums [KV heads, D, D].

    Raises:
        InputError: a layer without bandwidth, keys that are not finite (which layer), shapes that do not agree.
    """
    common = {
        "task": task, "condition": condition, "space": space, "test_family": "", "connector": connector,
        "token_filter": token_filter, "n_permutations": 0, "bandwidth_source": bandwidth_source,
        "null_mean": np.nan, "p": np.nan, "p_adjusted": np.nan,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    gram: dict[GramKey, KernelSums] = {}
    for layer in sorted(keys_visual.keys() | keys_text.keys()):
        if layer not in bandwidth2:
            raise InputError("bandwidth2", sorted(bandwidth2), f"give the bandwidth of layer {layer}, too")
        x, y = layer_clouds(layer, keys_visual, keys_text)
        groups_x, groups_y = (
            np.asarray([str(c) for c in clusters]) if cloud.shape[-2] else np.empty(0, dtype=str)
            for cloud, clusters in ((x, clusters_visual), (y, clusters_text))
        )
        sums = mmd.kernel_sums(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=bandwidth2[layer])
        gram[GramKey(task, condition, space, layer)] = sums
        rows += [
            common | {"layer": layer} | row
            for row in (
                *_mmd2_rows(sums, seed),
                *_js_rows(x, y, groups_x, groups_y, sums, seed),
                *_paper_rows(x, y, groups_x, groups_y, sums, seed),
            )
        ]
    _add_test([row for row in rows if (row["contrast"], row["estimator"]) == (records.VISUAL_TEXT, "mmd2")], gram, seed)
    table = pd.DataFrame(rows, columns=list(records.DIVERGENCE_COLUMNS))
    return table.astype(dict(records.DIVERGENCE_COLUMNS)), gram


def _mmd2_rows(sums: KernelSums, seed: int) -> Iterator[dict[str, Any]]:
    with_mean = replace(sums, vv=_mean_first(sums.vv), tt=_mean_first(sums.tt), vt=_mean_first(sums.vt))
    results: dict[str, stats.ArrayInterval | None] = {}
    if min(np.count_nonzero(sums.n_visual), np.count_nonzero(sums.n_text)) >= stats.MIN_CLUSTERS:
        results[records.VISUAL_TEXT] = stats.mmd2_jackknife(with_mean)
    halves = stats.split_half_mmd2(with_mean, seed, N_SPLITS)
    results |= dict(zip((records.VISUAL_VISUAL, records.TEXT_TEXT), halves, strict=True))
    for contrast, result in results.items():
        if result is not None:
            at_ceiling = np.zeros(result.value.shape, dtype=bool)
            counts = _counts(contrast, sums, seed)
            yield from _rows(contrast, "mmd2", mmd.ESTIMATOR_VERSION, *result, at_ceiling, counts)


def _add_test(rows: Sequence[dict[str, Any]], gram: Mapping[GramKey, KernelSums], seed: int) -> None:
    """Fill null_mean, p and p_adjusted of these rows, which stand in the order of the layers and of their heads."""
    if not rows:
        return
    by_layer = {key.layer: sums for key, sums in gram.items()}
    tested = {layer: by_layer[layer] for layer in dict.fromkeys(row["layer"] for row in rows)}
    first = next(iter(tested.values()))
    signs = stats.label_flips(first.n_visual, first.n_text, N_PERMUTATIONS, seed)
    null = np.concatenate([_mean_first(stats.mmd2_permuted(sums, signs)) for sums in tested.values()])
    value = np.asarray([row["value"] for row in rows], dtype=np.float64)
    is_all = np.asarray([row["head"] == records.ALL_HEADS for row in rows])
    for members, of_what in ((is_all, "layers"), (~is_all, "layers and KV heads")):
        p, adjusted = stats.max_t(value[members], null[members])
        family = f"max-T, {members.sum()} tests: {of_what}"
        for i, index in enumerate(np.flatnonzero(members)):
            rows[int(index)].update(
                null_mean=null[index].mean(), p=p[i], p_adjusted=adjusted[i],
                n_permutations=N_PERMUTATIONS, test_family=family,
            )  # fmt: skip


def _js_rows(
    x: torch.Tensor, y: torch.Tensor, groups_x: Names, groups_y: Names, sums: KernelSums, seed: int
) -> Iterator[dict[str, Any]]:
    for contrast, (a, b, groups_a, groups_b) in _sides(x, y, groups_x, groups_y, seed).items():
        loss = js_classifier.held_out(a, b, groups_x=groups_a, groups_y=groups_b, seed=seed)
        loss = replace(loss, loss_x=_mean_first(loss.loss_x), loss_y=_mean_first(loss.loss_y))
        result = js_classifier.estimate(loss, seed=seed)
        counts = _counts(contrast, sums, seed)
        yield from _rows(contrast, "js_classifier", js_classifier.version, *result, counts)


def _paper_rows(
    x: torch.Tensor, y: torch.Tensor, groups_x: Names, groups_y: Names, sums: KernelSums, seed: int
) -> Iterator[dict[str, Any]]:
    """The projection is fitted once, on both modalities, and serves the baselines, too."""
    if not _sides(x, y, groups_x, groups_y, seed):
        return
    side_by_side = (cloud.transpose(0, 1).flatten(start_dim=1) for cloud in (x, y))
    projected = paper_protocol.project(*side_by_side, seed=seed)
    for contrast, (a, b, _, _) in _sides(projected.x, projected.y, groups_x, groups_y, seed).items():
        try:
            result = paper_protocol.compare(a, b, seed=seed)
        except InputError:  # most vectors are equal: their median distance, this pipeline's bandwidth, is 0
            continue
        counts = _counts(contrast, sums, seed) | {"n_visual": result.tokens, "n_text": result.tokens}
        for estimator, value in (("paper_mmd", result.mmd), ("paper_js_histogram", result.js)):
            yield counts | {
                "head": records.ALL_HEADS, "contrast": contrast, "estimator": estimator,
                "estimator_version": paper_protocol.version, "value": value, "ci_low": np.nan, "ci_high": np.nan,
                "at_ceiling": False, "bandwidth_source": "median of the tokens compared",
            }  # fmt: skip


def _sides(
    x: torch.Tensor, y: torch.Tensor, groups_x: Names, groups_y: Names, seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor, Names, Names]]:
    """The two clouds of every contrast that has clusters enough, with their groups."""
    sides = {records.VISUAL_TEXT: (x, y, groups_x, groups_y)}
    for contrast, cloud, groups in ((records.VISUAL_VISUAL, x, groups_x), (records.TEXT_TEXT, y, groups_y)):
        names = np.unique(groups)
        first = np.isin(groups, names[stats.first_half(names.tolist(), seed)])
        sides[contrast] = (cloud[..., first, :], cloud[..., ~first, :], groups[first], groups[~first])
    fewest = {records.VISUAL_TEXT: stats.MIN_CLUSTERS}
    return {
        contrast: side
        for contrast, side in sides.items()
        if min(len(np.unique(groups)) for groups in side[2:]) >= fewest.get(contrast, stats.MIN_SPLIT_CLUSTERS // 2)
    }


def _rows(
    contrast: str, estimator: str, version: str, value: Floats, low: Floats, high: Floats,
    at_ceiling: NDArray[np.bool_], counts: dict[str, int],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for head `all`, which comes first in the arrays, and one per KV head."""
    for i, head in enumerate((records.ALL_HEADS, *map(str, range(len(value) - 1)))):
        yield counts | {
            "head": head, "contrast": contrast, "estimator": estimator, "estimator_version": version,
            "value": value[i], "ci_low": low[i], "ci_high": high[i], "at_ceiling": at_ceiling[i],
        }  # fmt: skip


def _mean_first(per_head: Floats) -> Floats:
    """[1 + H, ...]: the mean over KV heads, then the heads. All statistics here are linear in what is averaged."""
    return np.concatenate([per_head.mean(axis=0, keepdims=True), per_head])


def _counts(contrast: str, sums: KernelSums, seed: int) -> dict[str, int]:
    """Tokens on both sides of the contrast, and its clusters."""
    if contrast == records.VISUAL_TEXT:
        n_visual, n_text, n_clusters = sums.n_visual.sum(), sums.n_text.sum(), len(sums.clusters)
    else:
        tokens = sums.n_visual if contrast == records.VISUAL_VISUAL else sums.n_text
        present = np.flatnonzero(tokens)
        first = stats.first_half([sums.clusters[i] for i in present], seed)
        n_visual, n_text = tokens[present][first].sum(), tokens[present][~first].sum()
        n_clusters = len(present)
    return {"n_visual": int(n_visual), "n_text": int(n_text), "n_clusters": n_clusters}
