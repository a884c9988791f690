"""Every metric that is a ratio of counts over groups: the one definition for tasks and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from lmms_keyspace.outcomes.conditions import (
    AUTHORITY,
    BEFORE,
    BLANK,
    CAPTION_ORACLE,
    CLEAN,
    CONFLICT,
    FILLER,
    GOLD,
    GOLD_WORD,
    IRRELEVANT,
    LURE,
    LURE_WORD,
    MATCH,
    MISMATCH,
    MISMATCHED,
    NO_IMAGE,
    NOISE,
    OPINION,
    PAIR_CONDITIONS,
    RANDOM_WORD,
    READ,
    SHUFFLED,
    TEXT_ONLY_CONFLICT,
)
from lmms_keyspace.outcomes.measuring import Floats, Metric


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
