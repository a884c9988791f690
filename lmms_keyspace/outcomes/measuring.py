"""From scored replies to a metric with its interval, one observation per group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes.conditions import OUTCOMES

Floats = NDArray[np.float64]

_Z95 = 1.959964  # half the width of a 95 % interval in standard errors


class Groups(NamedTuple):
    """Outcomes [groups x conditions] of the complete groups, and how many incomplete groups were dropped.

    `clusters` names, by group, what it shares with others (a picture), else the group itself.
    """

    outcomes: pd.DataFrame
    dropped: int
    clusters: pd.Series


class Measured(NamedTuple):
    """A metric with its 95 % interval; `n` is its denominator (for differences of rates, the number of groups).

    `mde`: of a difference, the smallest one that these groups would find with 80 % power; else None.
    """

    value: float
    low: float
    high: float
    n: int
    mde: float | None = None


@dataclass(frozen=True)
class Metric:
    """A ratio of counts over groups.

    `counts` maps outcomes [groups x conditions] to numerator and denominator per group. `direction` is +1 when higher
    means better use of the image, -1 when lower does, 0 when neither. `signed`: a difference of rates, so that the
    numerator of a group is -1, 0 or 1.
    """

    name: str
    label: str
    direction: int
    conditions: tuple[str, ...]
    counts: Callable[[pd.DataFrame], tuple[Floats, Floats]]
    signed: bool = False

    def applies_to(self, outcomes: pd.DataFrame) -> bool:
        """Whether the outcomes hold every condition the metric needs."""
        return set(self.conditions) <= set(outcomes.columns)


def outcomes_by_group(rows: pd.DataFrame) -> Groups:
    """Pivot rows with `group_id`, `condition` and `outcome` to one row per group, sorted by group.

    A group that lacks one of the conditions present in the rows (an evaluation cut by `--limit`) is dropped and
    counted. Where rows have a `cluster`, it names what groups share.

    Raises InputError for an unknown outcome or for two rows of one group and condition.
    """
    unknown = sorted(set(rows["outcome"].map(str)) - set(OUTCOMES))
    if unknown:
        raise InputError("outcome", unknown[0], f"an outcome is one of {', '.join(OUTCOMES)}")
    keys = rows[["group_id", "condition"]].astype(str)
    repeated = keys[keys.duplicated()]
    if len(repeated):
        raise InputError(
            "group_id", tuple(repeated.iloc[0]), "two rows of one group and condition: samples of two runs were mixed"
        )
    wide = keys.assign(outcome=rows["outcome"]).pivot_table(
        index="group_id", columns="condition", values="outcome", aggfunc="first"
    )
    complete = wide.dropna().sort_index()
    clusters = complete.index.to_series()
    if "cluster" in rows:
        shared = rows["cluster"].set_axis(keys["group_id"])
        shared = shared[~shared.index.duplicated()].reindex(complete.index)
        clusters = clusters.where(shared.isna() | (shared == ""), shared.astype(str))
    return Groups(complete, len(wide) - len(complete), clusters)


def measure(metric: Metric, outcomes: pd.DataFrame, clusters: Sequence[object] | None = None) -> Measured | None:
    """The metric with its interval, or None where a condition is missing or the denominator is 0.

    A proportion gets the Wilson interval, a difference of rates that of matched pairs: where few groups differ, the
    bootstrap is too narrow. Other ratios get the bootstrap over groups.

    Args:
        outcomes: [groups x conditions], of `outcomes_by_group`.
        clusters: what groups share (a picture), one per group; where some share one, clusters are resampled.
    """
    if not metric.applies_to(outcomes) or outcomes.empty:
        return None
    numerator, denominator = metric.counts(outcomes)
    total = int(denominator.sum())
    if total == 0:
        return None
    value = float(numerator.sum() / total)
    counted = denominator > 0  # resampling the others could leave nothing to divide by
    names = [name for name, used in zip(outcomes.index if clusters is None else clusters, counted, strict=True) if used]
    if len(set(names)) < len(names):
        interval = share_of_clusters(numerator[counted], names, denominator[counted], signed=metric.signed)
        return Measured(value, *interval, total, mde_of_interval(*interval) if metric.signed else None)
    if metric.signed:
        more, less = int((numerator > 0).sum()), int((numerator < 0).sum())
        return Measured(value, *stats.matched_pairs(more, less, total), total, mde_of_pairs(more + less, total))
    if (numerator >= 0).all():
        return Measured(value, *stats.wilson(round(numerator.sum()), total), total)
    return Measured(value, *stats.cluster_bootstrap(numerator[counted], names, weights=denominator[counted]), total)


def mde_of_pairs(differing: int, n: int) -> float:
    """Minimum detectable difference of two conditions that differ in so many of n groups.

    Where none differs, from the largest rate of differing groups that n equal ones do not rule out (exact binomial).
    """
    rate = differing / n if differing else 1 - 0.025 ** (1 / n)
    return stats.mde_paired(rate, n)


def mde_of_interval(low: float, high: float) -> float:
    """Minimum detectable difference from the standard error that a 95 % interval shows."""
    return float(stats.mde_from_se((high - low) / (2 * _Z95)))


def share_of_clusters(
    values: Floats, clusters: Sequence[object], weights: Floats, *, signed: bool = False
) -> stats.Interval:
    """Bootstrap interval over clusters of sum(values) / sum(weights), each |value| at most its weight.

    Where all groups are alike resampling shows nothing: then that of as many proportions (with `signed`, matched
    pairs) as there are clusters.
    """
    n = len(set(clusters))
    if n > 1 and len(set((values / weights).tolist())) > 1:
        return stats.cluster_bootstrap(values, clusters, weights=weights)
    k = round(n * float(values.sum() / weights.sum()))
    return stats.matched_pairs(max(k, 0), max(-k, 0), n) if signed else stats.wilson(k, n)
