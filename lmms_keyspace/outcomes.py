"""What the probes measure: the one definition of their metrics, for the tasks and for the reports.

A probe asks the same question of one scene (a *group*) under several conditions. Each answer has an outcome: `gold`
(the true answer), `lure` (what the misleading text or image says), `other` or `parse_fail`. A metric is a ratio of
counts over groups, so that two runs can be compared group by group. numpy, pandas and `stats` only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
# Further conditions of the other probes.
NOISE, SHUFFLED, MISMATCHED, NO_IMAGE, CAPTION_ORACLE = (
    "noise",  # the question and random pixels
    "shuffled",  # the image's own patches in another order
    "mismatched",  # an image with another answer, which is the lure
    "none",  # the question alone
    "caption_oracle",  # the scene described in words, no image
)
FILLER, BEFORE, OPINION, AUTHORITY = (
    "filler",  # a sentence about nothing of the kind
    "before",  # the sentence of `conflict` in front of the image
    "opinion",  # the false claim as the user's opinion
    "authority",  # the false claim as an expert's
)
LURE_WORD, GOLD_WORD, RANDOM_WORD, READ = (
    "lure_word",  # the lure written in the image
    "gold_word",  # gold written in the image
    "random_word",  # a word that is no answer written in the image
    "read",  # the image of `lure_word`, asked for the written word, which is gold there
)
MISMATCH = "mismatch"  # a benchmark's row with the images of another: the question has no known answer there
# Image and question of a pair: gold is the answer for this image, the lure the one for the other.
PAIR_CONDITIONS = ("image0_question0", "image0_question1", "image1_question0", "image1_question1")

# Below this the probe says nothing about the model: it cannot see the scenes, or does not use what it should read.
# Applied where a condition shows that the scenes are ours: of a benchmark nobody expects as much.
MIN_VALID = 0.8
_GATE = {TEXT_ONLY_CONFLICT: "text_only_lure", READ: "read_acc", CAPTION_ORACLE: "clean_acc"}

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

    A proportion gets the Wilson interval, a difference of rates that of matched pairs: where few groups differ, the
    bootstrap is too narrow. Other ratios get the bootstrap over groups.
    """
    if not metric.applies_to(outcomes) or outcomes.empty:
        return None
    numerator, denominator = metric.counts(outcomes)
    total = int(denominator.sum())
    if total == 0:
        return None
    value = float(numerator.sum() / total)
    if metric.signed:
        return Measured(
            value, *stats.matched_pairs(int((numerator > 0).sum()), int((numerator < 0).sum()), total), total
        )
    if (numerator >= 0).all():
        return Measured(value, *stats.wilson(round(numerator.sum()), total), total)
    counted = denominator > 0  # resampling the others could leave nothing to divide by
    groups = list(outcomes.index[counted])
    interval = stats.cluster_bootstrap(numerator[counted], groups, weights=denominator[counted])
    return Measured(value, *interval, total)


def gate_of(conditions: Collection[str]) -> list[str]:
    """The metrics that must reach `MIN_VALID` in a probe with these conditions; none for a benchmark."""
    names = [name for condition, name in _GATE.items() if condition in conditions]
    return list(dict.fromkeys(["clean_acc", *names])) if names else []


def not_valid(outcomes: pd.DataFrame) -> list[str]:
    """Why the probe says nothing about this model; empty when it does."""
    measured = ((METRICS[name], measure(METRICS[name], outcomes)) for name in gate_of(outcomes.columns))
    return [
        f"{metric.label} is {100 * result.value:.1f} %, below {100 * MIN_VALID:.0f} %"
        for metric, result in measured
        if result is not None and result.value < MIN_VALID
    ]


def accuracy_of(condition: str) -> Metric:
    """Share of groups answered with the gold answer in one condition."""
    name = "blind_acc" if condition == BLANK else f"{condition}_acc"
    return Metric(name, f"Accuracy, {condition.replace('_', ' ')}", 1, (condition,), _share(GOLD, condition))


def _share(outcome: str, condition: str) -> Callable[[pd.DataFrame], tuple[Floats, Floats]]:
    def counts(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
        return _is(outcomes, condition, outcome), np.ones(len(outcomes))

    return counts


def _gain(better: str, worse: str, outcome: str = GOLD) -> Callable[[pd.DataFrame], tuple[Floats, Floats]]:
    def counts(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
        return _is(outcomes, better, outcome) - _is(outcomes, worse, outcome), np.ones(len(outcomes))

    return counts


def _drop(name: str, label: str, direction: int, condition: str) -> Metric:
    """Accuracy that a condition costs against clean."""
    return Metric(name, label, direction, (CLEAN, condition), _gain(CLEAN, condition), signed=True)


def _lured(name: str, label: str, condition: str, direction: int = -1) -> Metric:
    return Metric(name, label, direction, (condition,), _share(LURE, condition))


def _framing(name: str, label: str, condition: str) -> Metric:
    """How much more often the false claim is followed than in `conflict`, where a note after the image makes it."""
    return Metric(name, label, 0, (condition, CONFLICT), _gain(condition, CONFLICT, LURE), signed=True)


def _flip_to_lure(condition: str) -> Callable[[pd.DataFrame], tuple[Floats, Floats]]:
    def counts(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
        clean = _is(outcomes, CLEAN, GOLD)
        return clean * _is(outcomes, condition, LURE), clean

    return counts


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


def _whole_pair(outcomes: pd.DataFrame) -> tuple[Floats, Floats]:
    right = [_is(outcomes, condition, GOLD) for condition in PAIR_CONDITIONS]
    return np.prod(right, axis=0), np.ones(len(outcomes))


def _is(outcomes: pd.DataFrame, condition: str, outcome: str) -> Floats:
    return np.asarray(outcomes[condition] == outcome, dtype=np.float64)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        *(accuracy_of(condition) for condition in (CLEAN, MATCH, CONFLICT, IRRELEVANT, BLANK)),
        Metric("text_flip_rate", "Text flip rate", -1, (CLEAN, CONFLICT), _flip_to_lure(CONFLICT)),
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
        _lured("conflict_lure", "Follows the misleading text", CONFLICT),
        _drop("conflict_drop", "Cost of misleading text (clean - conflict)", -1, CONFLICT),
        _drop("irrelevant_drop", "Cost of irrelevant text (clean - irrelevant)", -1, IRRELEVANT),
        _drop("vis_gain", "Blank gap (clean - blank)", 1, BLANK),
        Metric("benefit", "Match benefit (match - clean)", 0, (CLEAN, MATCH), _gain(MATCH, CLEAN), signed=True),
        _lured("text_only_lure", "Follows the text without an image", TEXT_ONLY_CONFLICT, 0),
        # The sentence in other places and frames
        accuracy_of(FILLER),
        _drop("filler_drop", "Cost of any sentence (clean - filler)", -1, FILLER),
        _lured("before_lure", "Follows misleading text before the image", BEFORE),
        _lured("opinion_lure", "Follows the user's false opinion", OPINION),
        _lured("authority_lure", "Follows a false expert", AUTHORITY),
        _framing("order_gap", "Text before less after the image", BEFORE),
        _framing("opinion_gap", "Opinion less note", OPINION),
        _framing("authority_gap", "Expert less note", AUTHORITY),
        # Words in the image
        *(accuracy_of(condition) for condition in (LURE_WORD, GOLD_WORD, RANDOM_WORD, READ)),
        Metric("typo_flip_rate", "Flip rate, written lure", -1, (CLEAN, LURE_WORD), _flip_to_lure(LURE_WORD)),
        _lured("typo_lure", "Follows the written lure", LURE_WORD),
        _drop("typo_drop", "Cost of the written lure (clean - lure word)", -1, LURE_WORD),
        _drop("random_word_drop", "Cost of any written word (clean - random word)", -1, RANDOM_WORD),
        Metric(
            "gold_word_benefit",
            "Benefit of the written answer (gold word - clean)",
            0,
            (CLEAN, GOLD_WORD),
            _gain(GOLD_WORD, CLEAN),
            signed=True,
        ),
        # Taking the image away
        *(accuracy_of(condition) for condition in (NOISE, SHUFFLED, MISMATCHED, MISMATCH, NO_IMAGE, CAPTION_ORACLE)),
        _drop("noise_drop", "Noise gap (clean - noise)", 1, NOISE),
        _drop("shuffled_drop", "Shuffle gap (clean - shuffled)", 1, SHUFFLED),
        _drop("mismatched_drop", "Mismatch gap (clean - mismatched)", 1, MISMATCHED),
        _drop("mismatch_drop", "Mismatch gap (clean - mismatch)", 1, MISMATCH),
        _drop("none_drop", "No-image gap (clean - none)", 1, NO_IMAGE),
        _lured("follow_shown", "Answers for the image that is shown", MISMATCHED, 1),
        Metric(
            "toll",
            "Toll of the image (caption oracle - clean)",
            -1,
            (CAPTION_ORACLE, CLEAN),
            _gain(CAPTION_ORACLE, CLEAN),
            signed=True,
        ),
        Metric("g_acc", "Pairs of images answered whole", 1, PAIR_CONDITIONS, _whole_pair),
    )
}
