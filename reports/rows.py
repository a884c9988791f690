"""One row of the comparison: a metric of one run, with its interval and its change from the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError

NAN = float("nan")
SHARE, MMD2, NATS, SCORE = "%", "MMD^2", "nats", "score"
# Permutations of a paired test. The smallest p is 1e-4, so that Holm over some hundred rows can still reach .05.
N_RESAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """One metric of one run. `delta` is this run minus the base; NaN where there is nothing to say, with a note why.

    Values of unit "%" are shares between 0 and 1; "score" is a benchmark's own scale. Intervals are 95 %; `mde` is the
    change that would be found with 80 % probability. `direction` is +1 when higher means better use of the image, -1
    when lower does, 0 when neither.
    """

    task: str
    metric: str
    label: str
    unit: str
    direction: int
    run: str
    n: int
    value: float
    low: float = NAN
    high: float = NAN
    delta: float = NAN
    delta_low: float = NAN
    delta_high: float = NAN
    p: float = NAN
    p_adjusted: float = NAN
    mde: float = NAN
    note: str = ""


def interval(values: pd.Series, clusters: pd.Series) -> dict[str, Any]:
    """The interval of a mean, by resampling clusters."""
    low, high = stats.cluster_bootstrap(values.to_numpy(dtype=float), list(clusters))
    return {"low": low, "high": high}


def paired(base: pd.DataFrame, run: pd.DataFrame, column: str, cluster: str) -> dict[str, Any]:
    """The change of the mean of `column` on the clusters that both frames have."""
    a, b = (frame[column].to_numpy(dtype=float) for frame in (base, run))
    return change(
        stats.paired_cluster_difference(a, b, list(base[cluster]), list(run[cluster]), n_resamples=N_RESAMPLES)
    )


def paired_series(base: pd.Series, run: pd.Series) -> dict[str, Any]:
    """The change of a mean over the items that both indices have."""
    return change(
        stats.paired_cluster_difference(
            base.to_numpy(), run.to_numpy(), list(base.index), list(run.index), n_resamples=N_RESAMPLES
        )
    )


def change(result: stats.Estimate) -> dict[str, Any]:
    """An estimate of a difference under the names of `Row`."""
    return {
        "delta": result.value,
        "delta_low": result.low,
        "delta_high": result.high,
        "p": result.p,
        "mde": result.mde,
    }


def extended(row: Row, compute: Callable[..., dict[str, Any]], *arguments: Any) -> Row:
    """The row with what `compute(*arguments)` adds; where the data do not carry it, with the reason instead."""
    try:
        added = compute(*arguments)
    except InputError as error:
        return noted(row, f"not computed: {error}")
    note = added.pop("note", "")
    return noted(replace(row, **added), note)


def noted(row: Row, note: str) -> Row:
    """The row with one more remark."""
    return replace(row, note="; ".join(part for part in (row.note, note) if part))
