"""Every metric of the probe on eight groups whose values are counted by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from lmms_keyspace import outcomes as o
from lmms_keyspace.errors import InputError

# One letter per group: g(old), l(ure), o(ther), p(arse fail).
ANSWERS = {
    "clean": "ggggggol",
    "match": "gggggggg",
    "conflict": "llggogll",
    "irrelevant": "glgggogl",
    "text_only_conflict": "llllllop",
    "blank": "ggoooool",
}
LETTERS = {"g": "gold", "l": "lure", "o": "other", "p": "parse_fail"}
EXPECTED = {
    "clean_acc": 6 / 8,
    "match_acc": 1.0,
    "conflict_acc": 3 / 8,
    "irrelevant_acc": 5 / 8,
    "blind_acc": 2 / 8,
    "text_flip_rate": 2 / 6,  # groups 0 and 1 of the six that are right in clean
    "spurious_flip": 2 / 6,  # groups 1 and 5
    "excess_flip": 1 / 6,  # two flips to the lure in conflict, one (group 1) in irrelevant
    "tpr_label": 4 / 7,
    "tpr_gated": 2 / 5,  # groups 0 to 5 pass the gate; 0 and 1 take the lure, 4 neither
    "conflict_lure": 4 / 8,
    "conflict_drop": 3 / 8,
    "irrelevant_drop": 1 / 8,
    "vis_gain": 4 / 8,
    "benefit": 2 / 8,
    "text_only_lure": 6 / 8,
}


def rows(answers: dict[str, str] = ANSWERS) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"group_id": f"g{group}", "condition": condition, "outcome": LETTERS[letter]}
            for condition, letters in answers.items()
            for group, letter in enumerate(letters)
        ]
    )


def test_every_metric_has_its_value():
    groups = o.outcomes_by_group(rows().sample(frac=1, random_state=3))
    assert groups.dropped == 0
    values = {
        name: o.measure(metric, groups.outcomes)
        for name, metric in o.METRICS.items()
        if metric.applies_to(groups.outcomes)
    }
    assert {name: result.value for name, result in values.items()} == pytest.approx(EXPECTED)
    for result in values.values():
        assert result.low <= result.value <= result.high
        assert result.low < result.high
    assert values["text_flip_rate"].n == 6


OTHER_ANSWERS = {
    "clean": "ggggggol",
    "conflict": "llggogll",
    "filler": "gggggogl",
    "before": "lllgolll",
    "opinion": "lggggggl",
    "authority": "llllogll",
    "lure_word": "llggggpl",
    "gold_word": "gggggggl",
    "random_word": "gggggoop",
    "read": "ggggggll",
    "noise": "gooooopp",
    "shuffled": "gggoooop",
    "mismatched": "glllllol",
    "mismatch": "goooogol",
    "none": "ggoooool",
    "caption_oracle": "gggggggg",
    "image0_question0": "gggggggo",
    "image0_question1": "gggggglg",
    "image1_question0": "ggggglpg",
    "image1_question1": "ggggoggg",
}
OTHER_EXPECTED = {
    "filler_acc": 6 / 8,
    "filler_drop": 0.0,  # group 5 lost, group 6 won
    "before_lure": 6 / 8,
    "opinion_lure": 2 / 8,
    "authority_lure": 6 / 8,
    "order_gap": 2 / 8,  # four lured after the image
    "opinion_gap": -2 / 8,
    "authority_gap": 2 / 8,
    "lure_word_acc": 4 / 8,
    "gold_word_acc": 7 / 8,
    "random_word_acc": 5 / 8,
    "read_acc": 6 / 8,
    "typo_flip_rate": 2 / 6,
    "typo_lure": 3 / 8,
    "typo_drop": 2 / 8,
    "random_word_drop": 1 / 8,
    "gold_word_benefit": 1 / 8,
    "noise_acc": 1 / 8,
    "shuffled_acc": 3 / 8,
    "mismatched_acc": 1 / 8,
    "mismatch_acc": 2 / 8,
    "mismatch_drop": 4 / 8,
    "none_acc": 2 / 8,
    "caption_oracle_acc": 1.0,
    "noise_drop": 5 / 8,
    "shuffled_drop": 3 / 8,
    "mismatched_drop": 5 / 8,
    "none_drop": 4 / 8,
    "follow_shown": 6 / 8,
    "toll": 2 / 8,
    "g_acc": 4 / 8,
}


def test_every_metric_of_the_other_probes_has_its_value():
    groups = o.outcomes_by_group(rows(OTHER_ANSWERS)).outcomes
    assert {name: o.measure(o.METRICS[name], groups).value for name in OTHER_EXPECTED} == pytest.approx(OTHER_EXPECTED)
    assert set(EXPECTED) | set(OTHER_EXPECTED) == set(o.METRICS)


def test_incomplete_groups_are_dropped_and_counted():
    table = rows()
    cut = table[~((table["group_id"] == "g7") & (table["condition"] == "blank"))]
    groups = o.outcomes_by_group(cut)
    assert groups.dropped == 1
    assert len(groups.outcomes) == 7


def test_a_metric_without_its_condition_or_denominator_is_none():
    only_clean = o.outcomes_by_group(rows({"clean": "oo", "conflict": "ll"})).outcomes
    assert o.measure(o.METRICS["text_flip_rate"], only_clean) is None  # no group is right in clean
    assert o.measure(o.METRICS["vis_gain"], only_clean) is None
    assert o.measure(o.METRICS["clean_acc"], only_clean).value == 0


@pytest.mark.parametrize(("clean", "blank", "value"), [("gggg", "gggg", 0.0), ("oooo", "gggg", -1.0)])
def test_a_difference_without_contradiction_still_has_a_width(clean, blank, value):
    result = o.measure(o.METRICS["vis_gain"], o.outcomes_by_group(rows({"clean": clean, "blank": blank})).outcomes)
    assert result.value == value
    assert result.high - result.low > 0.4
    assert result.low <= value <= result.high


def test_duplicates_and_unknown_outcomes_are_refused():
    table = rows()
    with pytest.raises(InputError, match="two rows of one group"):
        o.outcomes_by_group(pd.concat([table, table.tail(1)]))
    with pytest.raises(InputError, match="outcome='nice'"):
        o.outcomes_by_group(table.replace({"outcome": {"gold": "nice"}}))


def test_the_gate_names_what_is_too_low():
    groups = o.outcomes_by_group(rows()).outcomes
    assert len(o.not_valid(groups)) == 2
    assert "75.0 %, below 80 %" in o.not_valid(groups)[0]
    assert o.not_valid(o.outcomes_by_group(rows({"clean": "ggggg", "text_only_conflict": "llllo"})).outcomes) == []


@pytest.mark.parametrize(
    ("conditions", "gate"),
    [
        ({"clean", "conflict", "blank"}, []),  # a benchmark
        ({"clean", "text_only_conflict"}, ["clean_acc", "text_only_lure"]),
        ({"clean", "read"}, ["clean_acc", "read_acc"]),
        ({"clean", "caption_oracle"}, ["clean_acc"]),
        (set(o.PAIR_CONDITIONS), []),
    ],
)
def test_the_gate_belongs_to_the_probe(conditions, gate):
    assert o.gate_of(conditions) == gate
    wrong = o.outcomes_by_group(rows(dict.fromkeys(conditions, "oo"))).outcomes
    assert len(o.not_valid(wrong)) == len(gate)
