"""The metrics on replies whose values are counted by hand, and their intervals on models with a known rate."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lmms_keyspace import scenes, stats
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import CONDITIONS, OUTCOMES
from lmms_keyspace.tasks import aggregation, metrics, scoring
from lmms_keyspace.tasks.metrics import summarize
from lmms_keyspace.tasks.rows import Row

FAMILIES = scenes.CORE_FAMILIES
OUTCOME = {"g": "gold", "l": "lure", "o": "other", "p": "parse_fail"}
# The answer to each outcome; in group 0 of `other` different conditions may give different words, see below.
ANSWER = {"g": "red", "l": "blue", "o": "green", "p": None}


def rows(**replies: str) -> list[Row]:
    """One row per letter: `clean="ggl"` gives the clean outcomes of groups 0, 1, 2. Unnamed conditions are gold."""
    n = len(next(iter(replies.values())))
    return [
        Row(f"g{i:03d}", FAMILIES[i % 5], condition, OUTCOME[letter], ANSWER[letter], 8)
        for condition in CONDITIONS
        for i, letter in enumerate(replies.get(condition, "g" * n))
    ]


def test_the_models_own_preference() -> None:
    # Per group image | text | both: 24 follow the text only, 6 the image only, 5 agree with both, 5 with neither,
    # of which three did not parse: an absent answer follows nothing, also where another answer is absent.
    image = "g" * 24 + "g" * 6 + "l" * 5 + "gg" + "ppg"
    text = "l" * 24 + "l" * 6 + "l" * 5 + "ll" + "plp"
    both = "l" * 24 + "g" * 6 + "l" * 5 + "oo" + "ppp"
    summary = summarize(rows(clean=image, text_only_conflict=text, conflict=both))
    assert summary["tpr_model"].value == pytest.approx(24 / 30)
    assert summary["tpr_model"].n == 30
    assert summary["tpr_model_both"].value == pytest.approx(5 / 40)
    assert summary["tpr_model_neither"].value == pytest.approx(5 / 40)
    # By label: the lure in 29, gold in 6.
    assert summary["tpr_label"].value == pytest.approx(29 / 35)


def test_the_models_own_preference_compares_words_not_outcomes() -> None:
    other = [Row(r.group_id, r.family, r.condition, "other", f"word-{r.condition}", 8) for r in rows(clean="g" * 30)]
    summary = summarize(other)
    assert summary["tpr_model_neither"].value == 1  # three different wrong words agree with nothing


def test_too_few_discriminative_groups_give_no_ratio() -> None:
    short = summarize(rows(clean="g" * 30, text_only_conflict="l" * 19 + "g" * 11, conflict="l" * 19 + "g" * 11))
    assert short["tpr_model"][:4] == (None, None, None, 19)
    enough = summarize(rows(clean="g" * 30, text_only_conflict="l" * 20 + "g" * 10, conflict="l" * 20 + "g" * 10))
    assert (enough["tpr_model"].value, enough["tpr_model"].n) == (1, 20)


def test_vision_robustness_is_a_harmonic_mean() -> None:
    summary = summarize(rows(conflict="gggggglloo"))  # accuracy .6, not lured .8
    assert summary["vrs"].value == pytest.approx(2 / (1 / 0.6 + 1 / 0.8))
    assert summary["vrs"].low < summary["vrs"].value < summary["vrs"].high
    assert summarize(rows(conflict="llll"))["vrs"][:4] == (0, None, None, 4)


def test_discrimination_rewards_trust_only_where_it_is_due() -> None:
    clean, n = "o" * 20 + "g" * 20, 40
    ignores = summarize(rows(clean=clean, match=clean, conflict=clean))["discrimination"]
    believes = summarize(rows(clean=clean, match="g" * n, conflict="l" * n))["discrimination"]
    ideal = summarize(rows(clean=clean, match="g" * n, conflict=clean))["discrimination"]
    assert [result.value for result in (ignores, believes, ideal)] == [0, 0, 1]
    assert summarize(rows(clean="o" * 19 + "g"))["discrimination"][:4] == (None, None, None, 19)
    mixed = summarize(rows(clean=clean, match="g" * 15 + "o" * 5 + "g" * 20, conflict="l" * 10 + "g" * 30))
    assert mixed["discrimination"].value == pytest.approx(15 / 20 - 10 / 40)
    assert mixed["discrimination"].n == 20


def test_parse_failures_count_documents_and_cluster_by_group() -> None:
    # Two of ten groups fail throughout: 12 of 60 documents, but only ten independent draws.
    bad = {condition: "pp" + "g" * 8 for condition in CONDITIONS}
    result = summarize(rows(**bad))["parse_fail"]
    assert (result.value, result.n) == (12 / 60, 60)
    assert result.high - result.low > 0.35  # ten groups; sixty independent documents would give .20
    assert summarize(rows(clean="g" * 10))["parse_fail"].high == pytest.approx(1 - 10 / (10 + 1.959964**2))


def test_validity_gate() -> None:
    def gate(clean: str, text: str) -> float | None:
        return summarize(rows(clean=clean, text_only_conflict=text))["valid"].value

    assert gate("gggggggggg", "llllllllll") == 1
    assert gate("ggggggggoo", "llllllllgg") == 1  # exactly .8 passes
    assert gate("gggggggooo", "llllllllll") == 0
    assert gate("gggggggggg", "lllllllooo") == 0


def test_validity_is_decided_for_each_family() -> None:
    everyone = rows(clean="g" * 50, text_only_conflict="l" * 50)
    summary = summarize(
        [
            Row(r.group_id, r.family, r.condition, "other", "pink", 8)
            if (r.family, r.condition) == ("size", "clean")
            else r
            for r in everyone
        ]
    )
    assert summary["valid"].value == 1  # clean accuracy is .8 over all
    assert metrics.not_valid_for(summary) == ["size"]
    assert summary["clean_acc_size"].value == 0
    assert summary["clean_acc_color"].value == 1


def test_a_family_that_is_absent_is_neither_valid_nor_invalid() -> None:
    summary = summarize([row for row in rows(clean="g" * 10, text_only_conflict="l" * 10) if row.family == "color"])
    assert summary["valid_size"][:4] == summary["clean_acc_size"][:4] == (None, None, None, 0)
    assert summary["valid_color"].value == 1
    assert metrics.not_valid_for(summary) == []


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 12))
def test_order_does_not_matter(random, n: int) -> None:
    table = [
        Row(f"g{i}", FAMILIES[i % 5], condition, outcome, None if outcome == "parse_fail" else outcome, 4)
        for i in range(n)
        for condition in CONDITIONS
        for outcome in [random.choice(OUTCOMES)]
    ]
    shuffled = random.sample(table, len(table))
    assert summarize(shuffled) == summarize(table)
    as_frame = pd.DataFrame([row.fields() for row in shuffled])  # a missing answer becomes NaN
    assert summarize(as_frame.to_dict("records")) == summarize(table)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("glop"), min_size=1, max_size=40), st.data())
def test_every_value_lies_in_its_interval_and_none_is_nan(conflict: list[str], data: st.DataObject) -> None:
    drawn = {c: "".join(data.draw(st.lists(st.sampled_from("glop"), min_size=len(conflict), max_size=len(conflict))))
             for c in CONDITIONS if c != "conflict"}  # fmt: skip
    for name, (value, low, high, n, mde) in summarize(rows(conflict="".join(conflict), **drawn)).items():
        assert (low is None) == (high is None), name
        assert value is None or np.isfinite(value), name
        if low is not None:
            assert low <= value <= high, name
            assert n > 0
        assert mde is None or 0 < mde < 3, name


def test_incomplete_groups_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    table = rows(clean="ggo")
    with caplog.at_level(logging.WARNING):
        summary = summarize([row for row in table if (row.group_id, row.condition) != ("g002", "blank")])
    assert "1 incomplete group(s) left out of the metrics, 2 kept" in caplog.text
    assert (summary["groups"].value, summary["groups_dropped"].value) == (2, 1)
    assert (summary["clean_acc"].value, summary["clean_acc"].n) == (1, 2)


def test_without_one_whole_group_nothing_is_reported() -> None:
    summary = summarize([row for row in rows(clean="gg") if row.condition in ("clean", "match")])
    assert summary["groups_dropped"].value == 2
    assert {name for name, metric in summary.items() if metric.value is not None} == {"groups", "groups_dropped"}


def test_two_replies_to_one_document_are_refused() -> None:
    with pytest.raises(InputError, match="group_id"):
        summarize(rows(clean="gg") + rows(clean="og")[:1])


def test_one_group_has_an_interval_where_it_can() -> None:
    summary = summarize(rows(conflict="l"))
    assert summary["clean_acc"].value == 1
    assert 0 < summary["clean_acc"].low < 1
    assert summary["vrs"][:4] == (0, None, None, 1)


def test_rare_clean_successes_do_not_break_the_excess() -> None:
    # Two of sixty groups are right in clean: one flips in conflict only, the other in irrelevant only.
    summary = summarize(rows(clean="gg" + "o" * 58, conflict="lg" + "o" * 58, irrelevant="gl" + "o" * 58))
    assert summary["excess_flip"].value == 0
    assert summary["excess_flip"].low < -0.8  # two groups say nothing
    assert summary["excess_flip"].high > 0.8


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_the_interval_of_a_p_follower_covers_p(p: float) -> None:
    """120 models that follow the misleading text with probability p, on 60 groups each; seeds 0 to 119."""
    n, repeats = 60, 120
    flip, drop = [], []
    for seed in range(repeats):
        follows = np.random.default_rng([seed, round(p * 10)]).random(n) < p
        summary = summarize(rows(conflict="".join("l" if lured else "g" for lured in follows)))
        flip.append(summary["text_flip_rate"])
        drop.append(summary["conflict_drop"])
    for measured, interval in ((flip, lambda k: stats.wilson(k, n)), (drop, lambda k: stats.matched_pairs(k, 0, n))):
        covers = [interval(k).low <= p <= interval(k).high for k in range(n + 1)]
        exact = binom.pmf(np.arange(n + 1), n, p)[covers].sum()
        assert exact >= 0.93
        coverage = np.mean([result.low <= p <= result.high for result in measured])
        assert abs(coverage - exact) <= 4 * np.sqrt(exact * (1 - exact) / repeats)


def test_aggregations_agree_with_the_summary_and_compute_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    items = rows(clean="ggggggggoo", conflict="llggggoooo", text_only_conflict="l" * 10)
    expected = summarize(items)
    calls = []
    monkeypatch.setattr(metrics, "summarize", lambda given, probe: calls.append(1) or summarize(given, probe))
    values = {entry["metric"]: entry["aggregation"](reversed(items)) for entry in aggregation.textbias_probe}
    assert len(calls) == 1
    assert values["text_flip_rate"] == expected["text_flip_rate"].value
    assert values["text_flip_rate_ci_lo"] == expected["text_flip_rate"].low
    assert values["text_flip_rate_ci_hi"] == expected["text_flip_rate"].high
    assert values["text_flip_rate_n"] == 8
    assert values["not_valid_for"] == ", ".join(metrics.not_valid_for(expected)) != ""
    for module in (aggregation, scoring):
        with pytest.raises(AttributeError, match="flip_of_text"):
            module.flip_of_text  # noqa: B018
    with pytest.raises(InputError, match="probe='flip_of_text'"):
        summarize(items, "flip_of_text")


def test_an_invalid_run_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        aggregation.Aggregation("textbias_probe", "valid")(rows(clean="ooooo", match="ooooo"))
    assert "not valid for this model in color, shape, count, position, size" in caplog.text
