"""Every metric of the probe on eight groups whose values are counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from lmms_keyspace import outcomes as o
from lmms_keyspace import stats
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


def test_differences_say_what_they_could_have_found():
    groups = o.outcomes_by_group(rows()).outcomes
    gain = o.measure(o.METRICS["vis_gain"], groups)  # 4 of 8 groups differ
    assert gain.mde == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * (4 / 8 / 8) ** 0.5)
    assert o.measure(o.METRICS["clean_acc"], groups).mde is None
    same = o.outcomes_by_group(rows({"clean": "g" * 100, "blank": "g" * 100})).outcomes
    # 100 equal groups do not rule out that 3.6 % differ: 1 - .025 ** (1 / 100)
    assert o.measure(o.METRICS["vis_gain"], same).mde == pytest.approx(2.8016 * (0.03621 / 100) ** 0.5, rel=1e-3)


def test_groups_that_share_a_picture_are_one_draw():
    """Each of ten groups four times: the interval is about that of ten, not of forty."""
    table = rows({"clean": "ggggggggoo" * 4, "blank": "gggooooooo" * 4})
    groups = o.outcomes_by_group(table).outcomes
    pictures = [int(name[1:]) % 10 for name in groups.index]
    for name in ("clean_acc", "vis_gain"):
        alone = o.measure(o.METRICS[name], groups)
        shared = o.measure(o.METRICS[name], groups, pictures)
        assert shared.value == alone.value
        assert shared.n == alone.n
        assert 1.5 < (shared.high - shared.low) / (alone.high - alone.low) < 2.2
    assert shared.mde > 1.3 * alone.mde
    equal = o.outcomes_by_group(rows({"clean": "gggg", "blank": "oooo"})).outcomes
    two = o.measure(o.METRICS["vis_gain"], equal, ["a", "a", "b", "b"])
    assert (two.value, two.high) == (1, 1)
    assert two[1:3] == stats.matched_pairs(2, 0, 2)
    assert o.measure(o.METRICS["clean_acc"], equal, ["a", "a", "b", "b"])[1:3] == stats.wilson(2, 2)


def options(clean, blank, group="g0"):
    return pd.DataFrame(
        [
            {"group_id": group, "condition": condition, "option": option, "logprob": np.log(p), "gold_option": "A",
             "lure_option": "B"}
            for condition, given in (("clean", clean), ("blank", blank))
            for option, p in zip("ABC", given, strict=True)
        ]
    )  # fmt: skip


def test_information_of_the_picture():
    seen = options((0.4, 0.2, 0.2), (0.1, 0.3, 0.1))  # normalized 1/2, 1/4, 1/4 and 1/5, 3/5, 1/5
    by_group = o.information_by_group(seen)
    expected = {
        "pmi_gold": np.log(4),
        "pmi_lure": np.log(2 / 3),
        "kl_blank": 0.5 * np.log(2.5) + 0.25 * np.log(0.25 / 0.6) + 0.25 * np.log(0.25 / 0.2),
    }
    assert by_group.loc["g0"].to_dict() == pytest.approx(expected)
    assert set(expected) == set(o.INFORMATION)
    nothing = options((0.1, 0.3, 0.1), (0.1, 0.3, 0.1), "g1")
    measured = o.measure_information(o.information_by_group(pd.concat([seen, nothing])))
    assert measured["pmi_gold"].value == pytest.approx(np.log(4) / 2)
    assert measured["pmi_gold"].n == 2
    assert measured["kl_blank"].low == 0
    assert o.information_by_group(nothing[nothing["condition"] == "clean"]).empty
    assert o.measure_information(by_group) == {}


def test_groups_that_share_a_picture_are_one_cluster():
    table = rows()
    assert o.outcomes_by_group(table).clusters.tolist() == o.outcomes_by_group(table).outcomes.index.tolist()
    groups = table["group_id"].unique()
    shared = dict.fromkeys(groups[:2], "one picture") | dict.fromkeys(groups[2:3], "")
    found = o.outcomes_by_group(table.assign(cluster=table["group_id"].map(shared))).clusters
    assert found[groups[0]] == found[groups[1]] == "one picture"
    assert all(found[group] == group for group in groups[2:])
