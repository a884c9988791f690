"""The divergence table of one task, condition and space: every layer and KV head, contrast and estimator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from lmms_keyspace import records, stats
from lmms_keyspace.divergence.contrasts import LayerKeys
from lmms_keyspace.divergence.layer import MMD2, LayerMeasurement
from lmms_keyspace.divergence.rows import Row, with_mean
from lmms_keyspace.records import GramKey, HeldOutLoss, KernelSums

N_PERMUTATIONS = 1000


class Measurement(NamedTuple):
    """The table with `records.DIVERGENCE_COLUMNS`, and what its mmd2 and js_classifier rows follow from."""

    table: pd.DataFrame
    gram: Mapping[GramKey, KernelSums]
    losses: Mapping[GramKey, HeldOutLoss]


def measure(
    layers: Iterable[LayerKeys],
    *,
    task: str,
    condition: str,
    space: str,
    bandwidth_source: str,
    connector: str,
    seed: int,
    n_permutations: int = N_PERMUTATIONS,
) -> Measurement:
    """Divergence of visual from text keys, with its baselines, controls and the estimators beside it.

    What cannot be computed has one row, of head `all`, without a value and with the reason in `note`; the rest is
    computed. Contrasts and estimators are described in docs/divergence.md.

    The mmd2 rows of visual-text and of `text-text:<task>` carry a block permutation test: within every cluster the two
    labels are exchanged or not (`stats.label_flips`), by the same coins in all layers. `null_mean` is the mean of the
    statistic under it, `p` its one-sided p, `p_adjusted` that of max-T over the tests that `test_family` names: all
    layers and KV heads, or for head `all` all layers. For visual-text its null, that the two kinds of token are alike,
    is false in any model, so p is at its smallest value wherever there are clusters enough: it guards against reading
    noise and ranks nothing. The question with an answer is the change between two runs
    (`stats.paired_mmd2_difference`). In all other rows these columns are NaN.

    Intervals are 95 %: delete-one-cluster jackknife for all kernels, cluster bootstrap of the held-out losses for
    js_classifier. Those of head `all` belong to the mean statistic over KV heads, not to a mean of intervals.
    For the split halves n_visual and n_text are the tokens of the first and second half of the first split; for
    `text-text:<task>` those of the other task and of this one.

    Args:
        layers: the keys, one layer at a time.
        task, condition, space, bandwidth_source, connector: written into the rows.
        seed: of the split halves, folds, bootstrap, permutations and draws.
        n_permutations: of the tests.
    """
    common = {
        "task": task, "condition": condition, "space": space, "connector": connector,
        "bandwidth_source": bandwidth_source, "token_filter": f"{records.VISUAL} against {records.TEXT}",
    }  # fmt: skip
    rows: list[Row] = []
    gram: dict[GramKey, KernelSums] = {}
    losses: dict[GramKey, HeldOutLoss] = {}
    for keys in layers:
        one = LayerMeasurement(keys, seed)
        rows += [common | {"layer": keys.layer} | row for row in one.rows()]
        key = partial(GramKey, task, condition, space, keys.layer, records.MULTI_SCALE)
        gram |= {key(contrast): value for contrast, value in one.sums.items()}
        losses |= {key(contrast): value for contrast, value in one.losses.items()}
    for contrast in dict.fromkeys(key.contrast for key in gram):
        of_contrast = (row for row in rows if (row["contrast"], row["estimator"]) == (contrast, MMD2))
        tested = [row for row in of_contrast if not row["note"]]
        by_layer = {key.layer: value for key, value in gram.items() if key.contrast == contrast}
        add_test(tested, by_layer, n_permutations, seed)
    table = pd.DataFrame(rows, columns=list(records.DIVERGENCE_COLUMNS))
    return Measurement(table.astype(dict(records.DIVERGENCE_COLUMNS)), gram, losses)


def add_test(rows: Sequence[Row], sums: Mapping[int, KernelSums], n_permutations: int, seed: int) -> None:
    """Fill null_mean, p and p_adjusted of rows that stand in the order of the layers and of their heads."""
    if not rows:
        return
    tested = {layer: sums[layer] for layer in dict.fromkeys(row["layer"] for row in rows)}
    first = next(iter(tested.values()))
    signs = stats.label_flips(first.n_visual, first.n_text, n_permutations, seed)
    null = np.concatenate([with_mean(stats.mmd2_permuted(one, signs)) for one in tested.values()])
    value = np.asarray([row["value"] for row in rows], dtype=np.float64)
    is_all = np.asarray([row["head"] == records.ALL_HEADS for row in rows])
    for members, of_what in ((is_all, "layers"), (~is_all, "layers and KV heads")):
        p, adjusted = stats.max_t(value[members], null[members])
        family = f"max-T, {members.sum()} tests: {of_what}"
        for i, index in enumerate(np.flatnonzero(members)):
            rows[int(index)].update(
                null_mean=null[index].mean(), p=p[i], p_adjusted=adjusted[i],
                n_permutations=n_permutations, test_family=family,
            )  # fmt: skip
