"""Every metric of the text bias probe from its scored replies, the same for the harness and for a samples file.

The ratios over groups are those of `lmms_keyspace.outcomes`; this module adds what they cannot express (metrics that
compare the model's own answers, or that are no ratio of counts), the accuracy of each family and the validity gate.
Neither torch nor the harness is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lmms_keyspace import outcomes, scenes, stats
from lmms_keyspace.outcomes import CLEAN, CONDITIONS, CONFLICT, GOLD, LURE, MATCH, PARSE_FAIL, TEXT_ONLY_CONFLICT

logger = logging.getLogger(__name__)

# Fewer groups than this tell apart nothing; the two metrics that condition on the model's own answers are then absent.
MIN_DISCRIMINATIVE = 20

# The metric that is the mean score of one condition's documents.
ACCURACY_OF = {
    condition: outcomes.accuracy_of(condition).name for condition in CONDITIONS if condition != TEXT_ONLY_CONFLICT
}

INTERVAL_METRICS: tuple[str, ...] = (
    *outcomes.METRICS,
    "vrs",
    "tpr_model",
    "tpr_model_both",
    "tpr_model_neither",
    "discrimination",
    "parse_fail",
    *(f"clean_acc_{family}" for family in scenes.CORE_FAMILIES),
)
# The facts of a run that have no sampling error.
FACTS: tuple[str, ...] = (
    "chance",
    "groups",
    "groups_dropped",
    "valid",
    *(f"valid_{family}" for family in scenes.CORE_FAMILIES),
)
NOT_VALID_FOR = "not_valid_for"  # the only text among the results: the families that fail the gate
COMPANIONS = ("_ci_lo", "_ci_hi", "_n")
METRIC_KEYS: tuple[str, ...] = (
    *(name + suffix for name in INTERVAL_METRICS for suffix in ("", *COMPANIONS)),
    *FACTS,
    NOT_VALID_FOR,
)

Floats = NDArray[np.float64]


class Metric(NamedTuple):
    """A value with its 95 % interval and the number of groups (documents, for `parse_fail`) in its denominator.

    None: undefined for these rows (no group counts, or fewer than `MIN_DISCRIMINATIVE`), or a fact without interval.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, order=True)
class Row:
    """What the metrics need of one scored reply."""

    group_id: str
    family: str
    condition: str
    outcome: str
    answer: str | None
    n_answers: int

    def __str__(self) -> str:
        # The harness writes every metric's item into the samples file, which holds these fields already.
        return ""

    def fields(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return dict(vars(self))


def row_of(sample: Mapping[str, Any]) -> Row:
    """The row of a line of a samples file, or of any mapping with the fields of `Row`."""
    values = {field.name: sample[field.name] for field in fields(Row)}
    # pandas reads a missing answer as NaN.
    return Row(**values | {"answer": values["answer"] if isinstance(values["answer"], str) else None})


def summarize(rows: Iterable[Row | Mapping[str, Any]]) -> dict[str, Metric]:
    """All metrics of one task.

    Groups that lack a condition are dropped and their number is logged. The order of the rows does not matter.

    Args:
        rows: scored replies; lines of a samples file (`frame.to_dict("records")`) will do.

    Returns:
        One `Metric` per name of `INTERVAL_METRICS` and of `FACTS`.

    Raises:
        InputError: an unknown outcome, or two rows for one group and condition.
    """
    frame = pd.DataFrame(
        [vars(row if isinstance(row, Row) else row_of(row)) for row in rows], columns=[f.name for f in fields(Row)]
    )
    found = outcomes.outcomes_by_group(frame)
    groups, dropped = found.outcomes, found.dropped
    if not set(CONDITIONS) <= set(groups.columns):  # too short for a single whole group
        groups, dropped = pd.DataFrame(columns=list(CONDITIONS)), frame["group_id"].nunique()
    if dropped:
        logger.warning("%d incomplete group(s) left out of the metrics, %d kept", dropped, len(groups))
    first = frame.drop_duplicates("group_id").set_index("group_id").loc[groups.index]
    answers = _answers(frame, groups)

    summary = {name: _metric(outcomes.measure(metric, groups)) for name, metric in outcomes.METRICS.items()}
    summary |= _model_preference(answers, groups)
    summary["vrs"] = _vision_robustness(groups)
    summary["discrimination"] = _discrimination(groups)
    summary["parse_fail"] = _parse_failures(groups)
    summary |= {"chance": _fact(float((1 / first["n_answers"]).mean()) if len(first) else None, len(first))}
    summary |= {"groups": _fact(len(groups), len(groups)), "groups_dropped": _fact(dropped, dropped)}
    summary["valid"] = _validity(groups)
    for family in scenes.CORE_FAMILIES:
        mine = groups[first["family"] == family]
        summary[f"clean_acc_{family}"] = _metric(outcomes.measure(outcomes.METRICS["clean_acc"], mine))
        summary[f"valid_{family}"] = _validity(mine)
    return summary


def not_valid_for(summary: Mapping[str, Metric]) -> list[str]:
    """The families for which the probe is not valid: what it reports there is not the model's text bias."""
    return [family for family in scenes.CORE_FAMILIES if summary[f"valid_{family}"].value == 0]


def _answers(frame: pd.DataFrame, groups: pd.DataFrame) -> dict[str, NDArray[np.object_]]:
    """Per condition the parsed answers, in the order of the groups; None where the reply did not parse."""
    by_condition = {condition: part.set_index("group_id") for condition, part in frame.groupby("condition")}
    return {
        condition: by_condition[condition].loc[groups.index, "answer"].to_numpy(dtype=object)
        if len(groups)
        else np.empty(0, dtype=object)
        for condition in CONDITIONS
    }


def _model_preference(answers: Mapping[str, NDArray[np.object_]], groups: pd.DataFrame) -> dict[str, Metric]:
    """Text preference ratio of "Words or Vision" (arXiv 2503.02199, their notebook): from the model's own answers.

    With image, text and both alone asked, the answer to both follows the text alone, the image alone, both or neither:
    tpr_model = text only / (text only + image only). The denominator is the model's, so it may be small.
    """
    image, text, both = (answers[condition] for condition in (CLEAN, TEXT_ONLY_CONFLICT, CONFLICT))
    parsed = np.array([answer is not None for answer in both], dtype=bool)
    as_text, as_image = parsed & (both == text), parsed & (both == image)
    only_text, only_image = int((as_text & ~as_image).sum()), int((as_image & ~as_text).sum())
    told_apart, n = only_text + only_image, len(groups)
    return {
        "tpr_model": _proportion(only_text, told_apart, at_least=MIN_DISCRIMINATIVE),
        "tpr_model_both": _proportion(int((as_text & as_image).sum()), n),
        "tpr_model_neither": _proportion(int((~as_text & ~as_image).sum()), n),
    }


def _vision_robustness(groups: pd.DataFrame) -> Metric:
    """VRS of V-FAT (arXiv 2601.04897): harmonic mean of accuracy under conflict and of not following the lure."""

    def statistic(sums: Floats) -> Floats:
        gold, not_lure, n = sums.T
        return np.where(gold + not_lure > 0, 2 * gold * not_lure / np.maximum(gold + not_lure, 1), 0) / n

    totals = np.column_stack([groups[CONFLICT] == GOLD, groups[CONFLICT] != LURE, np.ones(len(groups))]).astype(float)
    return _bootstrapped(statistic, totals, len(groups))


def _discrimination(groups: pd.DataFrame) -> Metric:
    """How much more often true text is followed where it helps than false text where it misleads.

    P(gold | match) over groups wrong in clean, minus P(lure | conflict). A model that ignores all text scores about
    0 - 0; one that believes all text 1 - 1. Undefined with fewer than `MIN_DISCRIMINATIVE` groups wrong in clean.
    """
    wrong = groups[CLEAN] != GOLD
    n = int(wrong.sum())
    if n < MIN_DISCRIMINATIVE:
        return Metric(None, None, None, n)

    def statistic(sums: Floats) -> Floats:
        helped, needed, lured, all_groups = sums.T
        return np.divide(helped, needed, out=np.full_like(helped, np.nan), where=needed > 0) - lured / all_groups

    columns = [wrong & (groups[MATCH] == GOLD), wrong, groups[CONFLICT] == LURE, np.ones(len(groups))]
    return _bootstrapped(statistic, np.column_stack(columns).astype(float), n)


def _parse_failures(groups: pd.DataFrame) -> Metric:
    """Share of documents whose reply names no answer, or more than one."""
    failed = (groups == PARSE_FAIL).sum(axis=1).to_numpy(dtype=float)
    if len(groups) and len(set(failed)) == 1 and failed[0] in (0, len(CONDITIONS)):
        # No failure, or nothing else: bounded as if each group were one document, which is cautious.
        return _proportion(len(groups) * int(failed[0] > 0), len(groups))._replace(n=groups.size)
    totals = np.column_stack([failed, np.full(len(groups), len(CONDITIONS))])
    return _bootstrapped(lambda sums: sums[:, 0] / sums[:, 1], totals, groups.size)


def _validity(groups: pd.DataFrame) -> Metric:
    """1 when the model sees these scenes and understands these sentences, 0 when not, None without groups."""
    return _fact(float(not outcomes.not_valid(groups)) if len(groups) else None, len(groups))


def _proportion(k: int, n: int, at_least: int = 1) -> Metric:
    return Metric(k / n, *stats.wilson(k, n), n) if n >= at_least else Metric(None, None, None, n)


def _bootstrapped(statistic: Any, totals: Floats, n: int) -> Metric:
    """A function of sums over groups; without an interval where all groups are alike, as resampling shows nothing."""
    if not len(totals):
        return Metric(None, None, None, n)
    value = float(statistic(totals.sum(axis=0, keepdims=True))[0])
    if (totals == totals[0]).all():
        return Metric(value, None, None, n)
    return Metric(value, *stats.cluster_bootstrap_function(statistic, totals), n)


def _metric(measured: outcomes.Measured | None) -> Metric:
    return Metric(None, None, None, 0) if measured is None else Metric(*measured)


def _fact(value: float | None, n: int) -> Metric:
    return Metric(value, None, None, n)
