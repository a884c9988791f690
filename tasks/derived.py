"""Metrics that are no ratio of counts over groups, or that compare the model's own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmms_keyspace import outcomes, stats
from lmms_keyspace.outcomes import (
    CLEAN,
    CONFLICT,
    GOLD,
    LURE,
    MATCH,
    MISMATCHED,
    PAIR_CONDITIONS,
    PARSE_FAIL,
    TEXT_ONLY_CONFLICT,
)
from lmms_keyspace.tasks.rows import Metric, Replies

# Fewer groups than this tell apart nothing; the two metrics that condition on the model's own answers are then absent.
MIN_DISCRIMINATIVE = 20

Floats = NDArray[np.float64]


def _model_preference(replies: Replies, followed: str) -> Metric:
    """Text preference ratio of "Words or Vision" (arXiv 2503.02199, their notebook): from the model's own answers.

    With image, text and both alone asked, the answer to both follows the text alone, the image alone, both or neither:
    the ratio is text only / (text only + image only). The denominator is the model's, so it may be small.
    """
    image, text, both = (
        replies.answers[condition].to_numpy(dtype=object) for condition in (CLEAN, TEXT_ONLY_CONFLICT, CONFLICT)
    )
    parsed = np.array([isinstance(answer, str) for answer in both], dtype=bool)
    as_text, as_image = parsed & (both == text), parsed & (both == image)
    if followed != "text":
        chosen = as_text & as_image if followed == "both" else ~as_text & ~as_image
        return _proportion(int(chosen.sum()), len(both))
    only_text, only_image = int((as_text & ~as_image).sum()), int((as_image & ~as_text).sum())
    return _proportion(only_text, only_text + only_image, at_least=MIN_DISCRIMINATIVE)


def _vision_robustness(replies: Replies) -> Metric:
    """VRS of V-FAT (arXiv 2601.04897): harmonic mean of accuracy under conflict and of not following the lure."""
    groups = replies.outcomes

    def statistic(sums: Floats) -> Floats:
        gold, not_lure, n = sums.T
        return np.where(gold + not_lure > 0, 2 * gold * not_lure / np.maximum(gold + not_lure, 1), 0) / n

    totals = np.column_stack([groups[CONFLICT] == GOLD, groups[CONFLICT] != LURE, np.ones(len(groups))]).astype(float)
    return _bootstrapped(statistic, totals, len(groups))


def _discrimination(replies: Replies) -> Metric:
    """How much more often true text is followed where it helps than false text where it misleads.

    P(gold | match) over groups wrong in clean, minus P(lure | conflict). A model that ignores all text scores about
    0 - 0; one that believes all text 1 - 1. Undefined with fewer than `MIN_DISCRIMINATIVE` groups wrong in clean.
    """
    groups = replies.outcomes
    wrong = groups[CLEAN] != GOLD
    n = int(wrong.sum())
    if n < MIN_DISCRIMINATIVE:
        return Metric(None, None, None, n)

    def statistic(sums: Floats) -> Floats:
        helped, needed, lured, all_groups = sums.T
        return np.divide(helped, needed, out=np.full_like(helped, np.nan), where=needed > 0) - lured / all_groups

    columns = [wrong & (groups[MATCH] == GOLD), wrong, groups[CONFLICT] == LURE, np.ones(len(groups))]
    return _with_mde(_bootstrapped(statistic, np.column_stack(columns).astype(float), n))


def _perceptual_score(replies: Replies) -> Metric:
    """Share of the accuracy that another image takes away (Gat, Schwartz and Schwing, NeurIPS 2021, arXiv 2110.14375).

    Normalized by the accuracy with the right image; undefined where that is 0.
    """
    groups = replies.outcomes
    clean, mismatched = (np.asarray(groups[condition] == GOLD, dtype=float) for condition in (CLEAN, MISMATCHED))
    if not clean.any():
        return Metric(None, None, None, len(groups))

    def statistic(sums: Floats) -> Floats:
        right, other = sums.T
        return np.divide(right - other, right, out=np.full_like(right, np.nan), where=right > 0)

    if not mismatched.any():  # all of it; resampling would show no doubt
        return Metric(1.0, *stats.wilson(int(clean.sum()), int(clean.sum())), len(groups))
    return _with_mde(_bootstrapped(statistic, np.column_stack([clean, mismatched]), len(groups)))


def _stock_accuracy(replies: Replies) -> Metric:
    """What the stock task would report of the same rows, in clean or in the task's only condition."""
    return _share(replies.stock.iloc[:, 0], 1, replies.clusters)


def _parse_failures(replies: Replies) -> Metric:
    """Share of documents whose reply names no answer, or more than one."""
    groups = replies.outcomes
    return _share((groups == PARSE_FAIL).sum(axis=1), groups.shape[1], replies.clusters)


def _pair_score(replies: Replies, together: tuple[tuple[int, ...], ...]) -> Metric:
    """NaturalBench (arXiv 2410.14669): share of the sets of documents of a pair that are answered right altogether."""
    right = (replies.outcomes[list(PAIR_CONDITIONS)] == GOLD).to_numpy()
    sets = [right[:, list(places)].all(axis=1) for places in together]
    return _share(np.sum(sets, axis=0, initial=0), len(together), replies.clusters)


def _constant_answers(replies: Replies) -> Metric:
    """Share of questions that both images of a pair are given the same answer to; their true answers differ."""
    answers = replies.answers.reindex(columns=list(PAIR_CONDITIONS)).to_numpy(dtype=object)
    # An answer that did not parse is None, or NaN after a round trip: it is the same as nothing.
    parsed = np.vectorize(lambda answer: isinstance(answer, str), otypes=[bool])(answers)
    same = [parsed[:, question] & (answers[:, question] == answers[:, question + 2]) for question in (0, 1)]
    return _share(np.sum(same, axis=0, initial=0), 2, replies.clusters)


def _share(counts: Any, size: int, clusters: Sequence[str]) -> Metric:
    """Share of things of which every group has `size`, from their number in each group and the groups' clusters."""
    counts = np.asarray(counts, dtype=float)
    n = len(counts)
    if len(set(clusters)) < n:
        interval = outcomes.share_of_clusters(counts, clusters, np.full(n, float(size)))
        return Metric(float(counts.mean() / size), *interval, n * size)
    if size == 1:
        return _proportion(int(counts.sum()), n)
    if n and len(set(counts)) == 1 and counts[0] in (0, size):
        # None of them, or nothing else: bounded as if each group were one thing, which is cautious.
        return _proportion(n * int(counts[0] > 0), n)._replace(n=n * size)
    return _bootstrapped(lambda sums: sums[:, 0] / sums[:, 1], np.column_stack([counts, np.full(n, size)]), n * size)


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


def _with_mde(metric: Metric) -> Metric:
    """A difference with the effect that it would find, from the standard error that its interval shows."""
    if metric.low is None or metric.high is None:
        return metric
    return metric._replace(mde=outcomes.mde_of_interval(metric.low, metric.high))


# Those that subtract one rate from another and so have an effect that they could find.
DIFFERENCES = ("discrimination", "perceptual_score")
# Name -> its function, and whether higher is better.
DERIVED: Mapping[str, tuple[Callable[[Replies], Metric], bool | None]] = {
    "vrs": (_vision_robustness, True),
    "tpr_model": (partial(_model_preference, followed="text"), False),
    "tpr_model_both": (partial(_model_preference, followed="both"), None),
    "tpr_model_neither": (partial(_model_preference, followed="neither"), False),
    "discrimination": (_discrimination, True),
    "perceptual_score": (_perceptual_score, True),
    "acc": (partial(_pair_score, together=((0,), (1,), (2,), (3,))), True),
    "q_acc": (partial(_pair_score, together=((0, 2), (1, 3))), True),
    "i_acc": (partial(_pair_score, together=((0, 1), (2, 3))), True),
    "constant_answer_rate": (_constant_answers, False),
    "stock_acc": (_stock_accuracy, True),
    "parse_fail": (_parse_failures, False),
}
