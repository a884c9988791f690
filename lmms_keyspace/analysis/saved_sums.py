"""The divergence table of one task, condition and space from what every run saves: kernel sums and held-out losses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pandas as pd

from lmms_keyspace.divergence import Measurement
from lmms_keyspace.divergence.measure import add_test
from lmms_keyspace.divergence.rows import Row, computed_or_noted, kernel_rows, loss_rows
from lmms_keyspace.records import CONTRASTS, DIVERGENCE_COLUMNS, VISUAL_TEXT, GramKey, HeldOutLoss, KernelSums, RunData


def from_sums(
    data: RunData, task: str, condition: str, space: str, *, bandwidth_source: str, n_permutations: int, seed: int
) -> Measurement:
    """Rows `mmd2` of every contrast whose sums were saved, with tests, and `js_classifier` where losses were.

    The classifier's split-half baselines, the paper's pipeline and the estimators beside the main ones need keys.

    Args:
        n_permutations, seed: of the tests and of the bootstrap.
    """
    gram: Mapping[GramKey, KernelSums] = {key: data.gram[key] for key in _of(data.gram, task, condition, space)}
    losses: Mapping[GramKey, HeldOutLoss] = {key: data.losses[key] for key in _of(data.losses, task, condition, space)}
    rows: list[Row] = []
    for key, sums in gram.items():
        for contrast in CONTRASTS if key.contrast == VISUAL_TEXT else (key.contrast,):
            found = partial(kernel_rows, contrast, {"mmd2": sums}, seed=seed)
            rows += _placed(key, computed_or_noted(contrast, ["mmd2"], found))
    for contrast in dict.fromkeys(key.contrast for key in gram):
        tested = [row for row in rows if row["contrast"] == contrast and not row["note"]]
        by_layer = {key.layer: sums for key, sums in gram.items() if key.contrast == contrast}
        add_test(tested, by_layer, n_permutations, seed)
    for key, loss in losses.items():
        bounds = partial(loss_rows, key.contrast, loss, seed=seed)
        rows += _placed(key, computed_or_noted(key.contrast, ["js_classifier"], bounds))
    common = {
        "task": task, "condition": condition, "space": space, "connector": data.record.connector,
        "bandwidth_source": bandwidth_source, "token_filter": "as in the run",
    }  # fmt: skip
    table = pd.DataFrame([common | row for row in rows], columns=list(DIVERGENCE_COLUMNS))
    return Measurement(table.astype(dict(DIVERGENCE_COLUMNS)), dict(gram), dict(losses))


def _of(keys: Mapping[GramKey, object], task: str, condition: str, space: str) -> list[GramKey]:
    return sorted(key for key in keys if (key.task, key.condition, key.space) == (task, condition, space))


def _placed(key: GramKey, rows: list[Row]) -> list[Row]:
    return [row | {"layer": key.layer} for row in rows]
