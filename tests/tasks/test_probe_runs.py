"""Models with known answers through the real harness on the other probes; every value derived by hand here."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from fake_model import FOLDER, expect, run

from lmms_keyspace.tasks import metrics, probes, reported

QUICK = {name: f"{name}_quick" for name in probes.NAMES}


def looker(doc: dict[str, Any]) -> str:
    """Answers for the picture that is shown, or for its description; does not read what is written in it."""
    if doc["condition"] in ("noise", "shuffled") or (doc["image"] != "scene" and doc["condition"] != "caption_oracle"):
        return "I cannot tell."
    shows_lure = doc["condition"] in ("mismatched", "read")
    return doc["lure"] if shows_lure else doc["gold"]


def test_looking() -> None:
    results, samples, _ = run(looker, QUICK["visreliance_probe"])
    expect(
        results,
        clean_acc=1, blind_acc=0, noise_acc=0, shuffled_acc=0, mismatched_acc=0, none_acc=0, caption_oracle_acc=1,
        vis_gain=1, noise_drop=1, shuffled_drop=1, mismatched_drop=1, none_drop=1, toll=0, perceptual_score=1,
        follow_shown=1, follow_shown_n=32, parse_fail=4 / 7, parse_fail_n=224, valid=1, not_valid_for="none", groups=32,
        clean_acc_ci_lo=32 / (32 + 1.959964**2),
    )  # fmt: skip
    assert "clean_acc_color" not in results
    assert len(samples) == 224


def test_not_looking() -> None:
    """The first word of the pool whatever it is shown, but it reads descriptions."""
    results, samples, _ = run(
        lambda doc: doc["gold"] if doc["condition"] == "caption_oracle" else doc["pool"][0], QUICK["visreliance_probe"]
    )
    groups = [sample["doc"] for sample in samples if sample["condition"] == "clean"]
    lucky = sum(doc["gold"] == doc["pool"][0] for doc in groups) / 32
    assert 0 < lucky < 0.4
    expect(
        results,
        clean_acc=lucky, blind_acc=lucky, none_acc=lucky, vis_gain=0, noise_drop=0, mismatched_drop=0,
        perceptual_score=0, follow_shown=sum(doc["lure"] == doc["pool"][0] for doc in groups) / 32,
        caption_oracle_acc=1, toll=1 - lucky, parse_fail=0, valid=0,
        not_valid_for="color, shape, count, position, size",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (lambda doc: doc["gold"], {"acc": 1, "q_acc": 1, "i_acc": 1, "g_acc": 1, "constant_answer_rate": 0}),
        # Answers for the first picture whatever it is shown: half of everything, one whole picture, no whole question.
        (
            lambda doc: doc["gold"] if doc["condition"].startswith("image0") else doc["lure"],
            {"acc": 1 / 2, "q_acc": 0, "i_acc": 1 / 2, "g_acc": 0, "constant_answer_rate": 1},
        ),
        # Sees no color: it answers the second question of both pictures, and the first one alike.
        (
            lambda doc: doc["gold"] if doc["condition"].endswith("question1") else "brown or gray",
            {"acc": 1 / 2, "q_acc": 1 / 2, "i_acc": 0, "g_acc": 0, "constant_answer_rate": 0, "parse_fail": 1 / 2},
        ),
        (lambda doc: "", {"acc": 0, "g_acc": 0, "constant_answer_rate": 0, "parse_fail": 1}),
    ],
)
def test_pairs(reply, expected: dict[str, float]) -> None:
    results, _, _ = run(reply, QUICK["visreliance_pairs"])
    expect(results, **expected, groups=32, acc_n=128, q_acc_n=64, i_acc_n=64, g_acc_n=32, chance=(1 / 8 + 5 / 24) / 2)
    assert results["g_acc_ci_lo"] <= results["g_acc"] <= results["g_acc_ci_hi"]
    assert "valid" not in results


def test_whole_pairs_are_a_proportion_with_its_wilson_interval() -> None:
    missed: list[str] = []

    def all_but_one(doc: dict[str, Any]) -> str:
        missed.append(doc["group_id"])
        return doc["lure"] if doc["group_id"] == missed[0] else doc["gold"]

    results, _, _ = run(all_but_one, QUICK["visreliance_pairs"])
    z2 = 1.959964**2
    half = (z2 * (31 / 32 * 1 / 32 / 32 + z2 / (4 * 32 * 32))) ** 0.5
    expect(results, g_acc=31 / 32, acc=31 / 32, g_acc_ci_lo=(31 / 32 + z2 / 64 - half) / (1 + z2 / 32))


def test_one_word_for_all_pairs() -> None:
    results, _, _ = run(lambda doc: doc["pool"][0], QUICK["visreliance_pairs"])
    expect(results, g_acc=0, q_acc=0, constant_answer_rate=1, parse_fail=0)
    assert 0 < results["acc"] < 1 / 2


def believes(*frames: str):
    return lambda doc: doc["lure"] if doc["condition"] in frames else doc["gold"]


def test_who_is_believed_and_where() -> None:
    results, _, model = run(believes("before", "authority", "text_only_conflict"), QUICK["textbias_order"])
    expect(
        results,
        clean_acc=1, conflict_acc=1, conflict_lure=0, text_flip_rate=0, before_lure=1, opinion_lure=0, authority_lure=1,
        order_gap=1, opinion_gap=0, authority_gap=1, filler_drop=0, text_only_lure=1, tpr_gated=0, valid=1,
        parse_fail=0, groups=24,
    )  # fmt: skip
    sent = model.turns["color-000/before"]
    assert [part["type"] for part in sent] == ["text", "image", "text"]
    results, _, _ = run(believes("conflict", "opinion", "text_only_conflict"), QUICK["textbias_order"])
    expect(results, conflict_lure=1, text_flip_rate=1, order_gap=-1, opinion_gap=0, authority_gap=-1, tpr_gated=1)


def test_reading_what_is_written() -> None:
    def written(doc: dict[str, Any]) -> str:
        return json.loads(doc["spec"]).get("written", doc["gold"])

    results, _, _ = run(written, QUICK["textbias_typographic"])
    expect(
        results,
        clean_acc=1, read_acc=1, valid=1, lure_word_acc=0, typo_lure=1, typo_flip_rate=1, typo_drop=1, gold_word_acc=1,
        random_word_acc=0, random_word_drop=1, gold_word_benefit=0, parse_fail=1 / 5,
    )  # fmt: skip


def test_a_model_that_ignores_all_writing_is_not_the_best() -> None:
    ignores, _, _ = run(looker, QUICK["textbias_typographic"])
    expect(ignores, typo_drop=0, typo_lure=0, clean_acc=1, read_acc=0, valid=0)
    ideal, _, _ = run(lambda doc: doc["gold"], QUICK["textbias_typographic"])
    expect(ideal, typo_drop=0, typo_lure=0, clean_acc=1, read_acc=1, valid=1)


def uncertain(doc: dict[str, Any]) -> bool:
    """Every second group of a family, 25 of 48, is one that the model cannot see."""
    return int(doc["group_id"].split("-")[1]) % 2 == 0


def other(doc: dict[str, Any]) -> str:
    return next(word for word in doc["pool"] if word not in (doc["gold"], doc["lure"]))


def test_a_model_that_ignores_all_text_does_not_come_out_best() -> None:
    """It is never fooled, and neither is one that uses text where it cannot see and the text is true."""

    def ignores(doc: dict[str, Any]) -> str:
        return doc["gold"] if doc["image"] == "scene" and not uncertain(doc) else other(doc)

    def uses(doc: dict[str, Any]) -> str:
        helped = doc["condition"] in ("match", "caption_oracle")
        told = doc["condition"] == "text_only_conflict"
        return doc["gold"] if helped else doc["lure"] if told else ignores(doc)

    ignoring, using = (run(reply, "textbias_probe_quick")[0] for reply in (ignores, uses))
    for results in (ignoring, using):
        expect(results, text_flip_rate=0, conflict_lure=0, clean_acc=23 / 48)
    expect(ignoring, benefit=0, discrimination=0, text_only_lure=0)
    expect(using, benefit=25 / 48, discrimination=1, text_only_lure=1)
    assert using["benefit_ci_lo"] > ignoring["benefit_ci_hi"]
    blind_to_text, reads = (run(reply, QUICK["visreliance_probe"])[0] for reply in (ignores, uses))
    expect(blind_to_text, caption_oracle_acc=0, toll=-blind_to_text["clean_acc"])
    expect(reads, caption_oracle_acc=1, toll=1 - reads["clean_acc"], clean_acc=blind_to_text["clean_acc"])


@pytest.mark.parametrize(
    ("probe", "per_group"), [(name, len(reported.PROBES[name].conditions)) for name in probes.NAMES]
)
def test_any_limit_and_the_samples_hold_every_metric(probe: str, per_group: int) -> None:
    results, samples, _ = run(looker, QUICK[probe], limit=per_group * 5 + 1)
    expect(results, groups=5, groups_dropped=1)
    assert Counter(sample["group_id"] for sample in samples).most_common()[-1][1] == 1
    lines = [
        json.dumps({k: v for k, v in sample.items() if k not in ("doc", "arguments")}, default=str)
        for sample in samples
    ]
    again = metrics.summarize((json.loads(line) for line in reversed(lines)), probe)
    for name in reported.PROBES[probe].intervals:
        assert again[name][:4] == tuple(results[name + suffix] for suffix in ("", "_ci_lo", "_ci_hi", "_n"))
        assert again[name].mde == results.get(f"{name}_mde")
    shortest, _, _ = run(looker, QUICK[probe], limit=1)
    expect(shortest, groups=0, groups_dropped=1, parse_fail=None)


def test_groups_name_their_tasks() -> None:
    import yaml

    for name in ("textbias", "visreliance"):
        group = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert group["group"] == name
        assert group["task"] == [probe for probe in probes.NAMES if probe.startswith(name)]
