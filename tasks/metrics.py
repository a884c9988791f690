"""Every metric of every probe from its scored replies, the same for the harness and for a samples file.

The ratios over groups are those of `lmms_keyspace.outcomes`; this module adds what they cannot express (metrics that
compare the model's own answers, or that are no ratio of counts), the accuracy of each family and the validity gate.
Neither torch nor the harness is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lmms_keyspace import outcomes, scenes, stats
from lmms_keyspace.errors import InputError
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
from lmms_keyspace.tasks.rich.drawing import RICH_FAMILIES

logger = logging.getLogger(__name__)

# Fewer groups than this tell apart nothing; the two metrics that condition on the model's own answers are then absent.
MIN_DISCRIMINATIVE = 20

NOT_VALID_FOR = "not_valid_for"  # the only text among the results: the families that fail the gate
COMPANIONS = ("_ci_lo", "_ci_hi", "_n")

Floats = NDArray[np.float64]


class Metric(NamedTuple):
    """A value with its 95 % interval and the number of groups (documents, for `parse_fail`) in its denominator.

    None: undefined for these rows (no group counts, or fewer than `MIN_DISCRIMINATIVE`), or a fact without interval.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Probe:
    """What a task reports: all ratios that its conditions allow, and `derived`, names of `DERIVED`.

    `by_family`: also the clean accuracy of each family. A probe has a validity gate where `outcomes.gate_of` says so.
    """

    conditions: tuple[str, ...]
    derived: tuple[str, ...] = ("parse_fail",)
    by_family: bool = False
    families: tuple[str, ...] = scenes.CORE_FAMILIES

    @property
    def ratios(self) -> dict[str, outcomes.Metric]:
        """The metrics of `outcomes` whose conditions the probe has."""
        return {k: metric for k, metric in outcomes.METRICS.items() if set(metric.conditions) <= set(self.conditions)}

    @property
    def gate(self) -> list[str]:
        """The metrics that must reach `outcomes.MIN_VALID`."""
        return outcomes.gate_of(self.conditions)

    @property
    def intervals(self) -> dict[str, bool | None]:
        """Metrics with an interval -> whether higher is better (None: neither)."""
        better = {1: True, 0: None, -1: False}
        families = self.families if self.by_family else ()
        return (
            {name: better[metric.direction] for name, metric in self.ratios.items()}
            | {name: DERIVED[name][1] for name in self.derived}
            | {f"clean_acc_{family}": True for family in families}
        )

    @property
    def facts(self) -> dict[str, bool | None]:
        """The facts of a run that have no sampling error, as `intervals`."""
        valid = ("valid", *(f"valid_{family}" for family in self.families)) if self.gate else ()
        return dict.fromkeys(("chance", "groups", "groups_dropped")) | dict.fromkeys(valid, True)

    @property
    def keys(self) -> dict[str, bool | None]:
        """Every key of the results, as `intervals`; the denominators have no better side."""
        values = {
            name + suffix: None if suffix == "_n" else better
            for name, better in self.intervals.items()
            for suffix in ("", *COMPANIONS)
        }
        return values | self.facts | ({NOT_VALID_FOR: None} if self.gate else {})


@dataclass(frozen=True, order=True)
class Row:
    """What the metrics need of one scored reply."""

    group_id: str
    family: str
    condition: str
    outcome: str
    answer: str | None
    n_answers: int
    stock_correct: float | None = None  # of a benchmark's row: what the stock task's scoring makes of the reply

    def __str__(self) -> str:
        # The harness writes every metric's item into the samples file, which holds these fields already.
        return ""

    def fields(self) -> dict[str, Any]:
        """The fields as a dictionary; without `stock_correct` where there is none."""
        return {name: value for name, value in vars(self).items() if name != "stock_correct" or value is not None}


def row_of(sample: Mapping[str, Any]) -> Row:
    """The row of a line of a samples file, or of any mapping with the fields of `Row`."""
    values = {field.name: sample[field.name] for field in fields(Row) if field.name != "stock_correct"}
    # pandas reads a missing answer as NaN.
    answer = values["answer"] if isinstance(values["answer"], str) else None
    return Row(**values | {"answer": answer, "stock_correct": sample.get("stock_correct")})


class Replies(NamedTuple):
    """The complete groups of a task as tables [groups x conditions]: their outcomes, the answers (None: not parsed),
    and whether the stock scoring takes the reply for right (None: there is no stock task)."""

    outcomes: pd.DataFrame
    answers: pd.DataFrame
    stock: pd.DataFrame


def probe_named(name: str) -> Probe:
    """The probe of that name; raises InputError where there is none."""
    if name not in PROBES:
        raise InputError("probe", name, f"take one of {', '.join(PROBES)}")
    return PROBES[name]


def summarize(rows: Iterable[Row | Mapping[str, Any]], probe: str = "textbias_probe") -> dict[str, Metric]:
    """All metrics of one task.

    Groups that lack a condition are dropped and their number is logged. The order of the rows does not matter.

    Args:
        rows: scored replies; lines of a samples file (`frame.to_dict("records")`) will do.
        probe: name of the probe, one of `PROBES`.

    Returns:
        One `Metric` per name of the probe's `intervals` and `facts`.

    Raises:
        InputError: an unknown probe or outcome, or two rows for one group and condition.
    """
    kind = probe_named(probe)
    frame = pd.DataFrame(
        [vars(row if isinstance(row, Row) else row_of(row)) for row in rows], columns=[f.name for f in fields(Row)]
    )
    found = outcomes.outcomes_by_group(frame)
    groups, dropped = found.outcomes, found.dropped
    if not set(kind.conditions) <= set(groups.columns):  # too short for a single whole group
        groups, dropped = pd.DataFrame(columns=list(kind.conditions)), frame["group_id"].nunique()
    if dropped:
        logger.warning("%d incomplete group(s) left out of the metrics, %d kept", dropped, len(groups))
    first = frame.drop_duplicates("group_id").set_index("group_id").loc[groups.index]
    whole = frame[frame["group_id"].isin(groups.index)]
    parts = {name: part.set_index("group_id") for name, part in whole.groupby("condition")}
    answers, stock = (
        pd.DataFrame(
            {name: part[field] for name, part in parts.items()},
            index=groups.index,
            columns=list(kind.conditions),
            dtype=object,
        )
        for field in ("answer", "stock_correct")
    )
    replies = Replies(groups, answers, stock)

    summary = {name: _metric(outcomes.measure(metric, groups)) for name, metric in kind.ratios.items()}
    summary |= {name: DERIVED[name][0](replies) for name in kind.derived}
    # Each document's own number of possible answers: the two questions of a pair differ in it.
    chances = (1 / whole["n_answers"]).groupby(whole["group_id"]).mean()
    summary["chance"] = _fact(float(chances.mean()) if len(first) else None, len(first))
    summary |= {"groups": _fact(len(groups), len(groups)), "groups_dropped": _fact(dropped, dropped)}
    if kind.gate:
        summary["valid"] = _validity(groups)
    for family in kind.families:
        mine = groups[first["family"] == family]
        if kind.by_family:
            summary[f"clean_acc_{family}"] = _metric(outcomes.measure(outcomes.METRICS["clean_acc"], mine))
        if kind.gate:
            summary[f"valid_{family}"] = _validity(mine)
    return summary


def not_valid_for(summary: Mapping[str, Metric]) -> list[str]:
    """The families for which the probe is not valid: what it reports there is not the model's text bias."""
    return [
        name.removeprefix("valid_") for name, fact in summary.items() if name.startswith("valid_") and fact.value == 0
    ]


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
    return _bootstrapped(statistic, np.column_stack(columns).astype(float), n)


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
    return _bootstrapped(statistic, np.column_stack([clean, mismatched]), len(groups))


def _stock_accuracy(replies: Replies) -> Metric:
    """What the stock task would report of the same rows, in clean or in the task's only condition."""
    correct = replies.stock.iloc[:, 0]
    return _proportion(int(correct.sum()), len(correct))


def _parse_failures(replies: Replies) -> Metric:
    """Share of documents whose reply names no answer, or more than one."""
    groups = replies.outcomes
    return _share((groups == PARSE_FAIL).sum(axis=1), groups.shape[1])


def _pair_score(replies: Replies, together: tuple[tuple[int, ...], ...]) -> Metric:
    """NaturalBench (arXiv 2410.14669): share of the sets of documents of a pair that are answered right altogether."""
    right = (replies.outcomes[list(PAIR_CONDITIONS)] == GOLD).to_numpy()
    sets = [right[:, list(places)].all(axis=1) for places in together]
    return _share(np.sum(sets, axis=0, initial=0), len(together))


def _constant_answers(replies: Replies) -> Metric:
    """Share of questions that both images of a pair are given the same answer to; their true answers differ."""
    answers = replies.answers.reindex(columns=list(PAIR_CONDITIONS)).to_numpy(dtype=object)
    # An answer that did not parse is None, or NaN after a round trip: it is the same as nothing.
    parsed = np.vectorize(lambda answer: isinstance(answer, str), otypes=[bool])(answers)
    same = [parsed[:, question] & (answers[:, question] == answers[:, question + 2]) for question in (0, 1)]
    return _share(np.sum(same, axis=0, initial=0), 2)


def _share(counts: Any, size: int) -> Metric:
    """Share of things of which every group has `size`, from their number in each group; clustered by group."""
    counts = np.asarray(counts, dtype=float)
    n = len(counts)
    if size == 1:
        return _proportion(int(counts.sum()), n)
    if n and len(set(counts)) == 1 and counts[0] in (0, size):
        # None of them, or nothing else: bounded as if each group were one thing, which is cautious.
        return _proportion(n * int(counts[0] > 0), n)._replace(n=n * size)
    return _bootstrapped(lambda sums: sums[:, 0] / sums[:, 1], np.column_stack([counts, np.full(n, size)]), n * size)


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
_OF_BENCHMARKS = ("stock_acc", "parse_fail")

_OF_TEXTBIAS = ("vrs", "tpr_model", "tpr_model_both", "tpr_model_neither", "discrimination", "parse_fail")

PROBES: Mapping[str, Probe] = {
    "textbias_probe": Probe(outcomes.CONDITIONS, _OF_TEXTBIAS, by_family=True),
    "textbias_rich": Probe(outcomes.CONDITIONS, _OF_TEXTBIAS, by_family=True, families=RICH_FAMILIES),
    "textbias_order": Probe(
        (
            CLEAN,
            outcomes.FILLER,
            CONFLICT,
            outcomes.BEFORE,
            outcomes.OPINION,
            outcomes.AUTHORITY,
            TEXT_ONLY_CONFLICT,
        )
    ),
    "textbias_typographic": Probe((CLEAN, outcomes.LURE_WORD, outcomes.GOLD_WORD, outcomes.RANDOM_WORD, outcomes.READ)),
    "visreliance_probe": Probe(
        (
            CLEAN,
            outcomes.BLANK,
            outcomes.NOISE,
            outcomes.SHUFFLED,
            MISMATCHED,
            outcomes.NO_IMAGE,
            outcomes.CAPTION_ORACLE,
        ),
        ("perceptual_score", "parse_fail"),
    ),
    "visreliance_pairs": Probe(PAIR_CONDITIONS, ("acc", "q_acc", "i_acc", "constant_answer_rate", "parse_fail")),
    "benchmark": Probe((CLEAN, CONFLICT, outcomes.BLANK), _OF_BENCHMARKS),
    "benchmark_full": Probe(
        (CLEAN, MATCH, CONFLICT, outcomes.IRRELEVANT, outcomes.BLANK, outcomes.MISMATCH, outcomes.NO_IMAGE),
        _OF_BENCHMARKS,
    ),
    # One condition by itself, under the name that it has for a benchmark
    "benchmark_clean": Probe((CLEAN,), _OF_BENCHMARKS),
    "benchmark_hint_right": Probe((MATCH,), _OF_BENCHMARKS),
    "benchmark_hint_wrong": Probe((CONFLICT,), _OF_BENCHMARKS),
    "benchmark_irrelevant": Probe((outcomes.IRRELEVANT,), _OF_BENCHMARKS),
    "benchmark_blank": Probe((outcomes.BLANK,), _OF_BENCHMARKS),
    "benchmark_mismatch": Probe((outcomes.MISMATCH,), _OF_BENCHMARKS),
    "benchmark_none": Probe((outcomes.NO_IMAGE,), _OF_BENCHMARKS),
}
