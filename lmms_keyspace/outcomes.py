"""What the text bias probe measures: the one definition of its metrics, for the tasks and for the reports.

A probe asks the same question of one scene (a *group*) under several conditions. Each answer has an outcome: `gold`
(what the image says), `lure` (what the misleading text says), `other` or `parse_fail`. A metric is a ratio of counts
over groups, so that two runs can be compared group by group. numpy, pandas and `stats` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError

GOLD, LURE, OTHER, PARSE_FAIL = OUTCOMES = ("gold", "lure", "other", "parse_fail")
CLEAN, MATCH, CONFLICT, IRRELEVANT, TEXT_ONLY_CONFLICT, BLANK = CONDITIONS = (
    "clean",  # the image and the question
    "match",  # with a true sentence about the image
    "conflict",  # with a false one, which names the lure
    "irrelevant",  # with a sentence about something else
    "text_only_conflict",  # the false sentence and no image
    "blank",  # the question and a gray image
)
# Below these the probe says nothing about text bias: the model cannot see the scene, or does not use the text.
MIN_CLEAN = 0.8
MIN_TEXT_ONLY = 0.8

Floats = NDArray[np.float64]


class Groups(NamedTuple):
    """Outcomes [groups x conditions] of the complete groups, and how many incomplete groups were dropped."""

    outcomes: pd.DataFrame
    dropped: int


class Measured(NamedTuple):
    """A metric with its 95 % interval; `n` is its denominator (for differences of rates, the number of groups)."""

    value: float
    low: float
    high: float
    n: int


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
    counted. Raises InputError for an unknown outcome or for two rows of one group and condition.
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
    return Groups(complete, len(wide) - len(complete))


def measure(metric: Metric, outcomes: pd.DataFrame) -> Measured | None:
    """The metric with its interval, or None where a condition is missing or the denominator is 0.

    A proportion gets the Wilson interval. So does a difference of rates whose groups all differ in one direction, as
    the bootstrap of rare events is too narrow; other differences get the bootstrap over groups.
    """
    if not metric.applies_to(outcomes) or outcomes.empty:
        return None
    numerator, denominator = metric.counts(outcomes)
    total = int(denominator.sum())
    if total == 0:
        return None
    value = float(numerator.sum() / total)
    if metric.signed and not numerator.any():
        bound = stats.wilson(0, total).high
        return Measured(value, -bound, bound, total)
    if (numerator >= 0).all():
        return Measured(value, *stats.wilson(round(numerator.sum()), total), total)
    if (numerator <= 0).all():
        low, high = stats.wilson(round(-numerator.sum()), total)
        return Measured(value, -high, -low, total)
    counted = denominator > 0  # resampling the others could leave nothing to divide by
    groups = list(outcomes.index[counted])
    interval = stats.cluster_bootstrap(numerator[counted], groups, weights=denominator[counted])
    return Measured(value, *interval, total)


def not_valid(outcomes: pd.DataFrame) -> list[str]:
    """Why the probe says nothing about the text bias of this model; empty when it does."""
    checks = ((accuracy_of(CLEAN), MIN_CLEAN), (METRICS["text_only_lure"], MIN_TEXT_ONLY))
    measured = ((metric, measure(metric, outcomes), least) for metric, least in checks)
    return [
        f"{metric.label} is {100 * result.value:.1f} %, below {100 * least:.0f} %"
        for metric, result, least in measured
        if result is not None and result.value < least
    ]


def accuracy_of(condition: str) -> Metric:
    """Share of groups answered with the gold answer in one condition."""
    name = "blind_acc" if condition == BLANK else f"{condition}_acc"
    return Metric(name, f"Accuracy, {condition.replace('_', ' ')}", 1, (condition,), _share(GOLD, condition))


def _share(outcome: str, condition: str) -> Callable[[pd.DataFrame], tuple[Floats, Floats]]:
    def counts(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
        return _is(outcomes, condition, outcome), np.ones(len(outcomes))

    return counts


def _gain(better: str, worse: str) -> Callable[[pd.DataFrame], tuple[Floats, Floats]]:
    def counts(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
        return _is(outcomes, better, GOLD) - _is(outcomes, worse, GOLD), np.ones(len(outcomes))

    return counts


def _flip_to_lure(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
    clean = _is(outcomes, CLEAN, GOLD)
    return clean * _is(outcomes, CONFLICT, LURE), clean


def _flip_by_irrelevant_text(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
    clean = _is(outcomes, CLEAN, GOLD)
    return clean * (1 - _is(outcomes, IRRELEVANT, GOLD)), clean


def _excess_flip(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
    clean = _is(outcomes, CLEAN, GOLD)
    return clean * (_is(outcomes, CONFLICT, LURE) - _is(outcomes, IRRELEVANT, LURE)), clean


def _text_preference(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
    lure = _is(outcomes, CONFLICT, LURE)
    return lure, lure + _is(outcomes, CONFLICT, GOLD)


def _text_preference_gated(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
    passed = _is(outcomes, CLEAN, GOLD) * _is(outcomes, TEXT_ONLY_CONFLICT, LURE)
    lure, either = _text_preference(outcomes)
    return passed * lure, passed * either


def _is(outcomes: pd.DataFrame, condition: str, outcome: str) -> Floats:
    return np.asarray(outcomes[condition] == outcome, dtype=np.float64)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        *(accuracy_of(condition) for condition in (CLEAN, MATCH, CONFLICT, IRRELEVANT, BLANK)),
        Metric("text_flip_rate", "Text flip rate", -1, (CLEAN, CONFLICT), _flip_to_lure),
        Metric("spurious_flip", "Flip rate, irrelevant text", -1, (CLEAN, IRRELEVANT), _flip_by_irrelevant_text),
        Metric(
            "excess_flip", "Flips beyond irrelevant text", -1, (CLEAN, CONFLICT, IRRELEVANT), _excess_flip, signed=True
        ),
        Metric("tpr_label", "Text preference ratio", -1, (CONFLICT,), _text_preference),
        Metric(
            "tpr_gated",
            "Text preference ratio, image and text understood",
            -1,
            (CLEAN, CONFLICT, TEXT_ONLY_CONFLICT),
            _text_preference_gated,
        ),
        Metric("conflict_lure", "Follows the misleading text", -1, (CONFLICT,), _share(LURE, CONFLICT)),
        Metric(
            "conflict_drop",
            "Cost of misleading text (clean - conflict)",
            -1,
            (CLEAN, CONFLICT),
            _gain(CLEAN, CONFLICT),
            signed=True,
        ),
        Metric(
            "irrelevant_drop",
            "Cost of irrelevant text (clean - irrelevant)",
            -1,
            (CLEAN, IRRELEVANT),
            _gain(CLEAN, IRRELEVANT),
            signed=True,
        ),
        Metric("vis_gain", "Blank gap (clean - blank)", 1, (CLEAN, BLANK), _gain(CLEAN, BLANK), signed=True),
        Metric("benefit", "Match benefit (match - clean)", 0, (CLEAN, MATCH), _gain(MATCH, CLEAN), signed=True),
        Metric(
            "text_only_lure",
            "Follows the text without an image",
            0,
            (TEXT_ONLY_CONFLICT,),
            _share(LURE, TEXT_ONLY_CONFLICT),
        ),
    )
}
