"""Models with known answers through the real harness: every metric is what it must be, derived by hand here.

The quick task has 48 groups, the families in turn: ten of color, shape and count, nine of position and size.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_model import Fake, expect, run, said
from lmms_eval.api.instance import Instance

from lmms_keyspace import outcomes, scenes
from lmms_keyspace.tasks import metrics, reported

QUICK_SIZES = {"color": 10, "shape": 10, "count": 10, "position": 9, "size": 9}


def told(doc: dict[str, Any]) -> str:
    """What the sentence of a document claims, if it claims anything about the picture."""
    return {"match": doc["gold"], "conflict": doc["lure"], "text_only_conflict": doc["lure"]}.get(doc["condition"], "")


@pytest.fixture(scope="module")
def always_gold():
    return run(lambda doc: said(doc, doc["gold"]))


def test_always_gold(always_gold) -> None:
    results, samples, _ = always_gold
    expect(
        results,
        clean_acc=1, match_acc=1, conflict_acc=1, irrelevant_acc=1, blind_acc=1,
        text_flip_rate=0, spurious_flip=0, excess_flip=0, tpr_label=0, conflict_lure=0, vrs=1,
        conflict_drop=0, irrelevant_drop=0, benefit=0, vis_gain=0,
        text_only_lure=0,  # it names gold even where there is no image ...
        valid=0, not_valid_for="color, shape, count, position, size",  # ... so the text is not shown to be understood,
        tpr_gated=None, tpr_gated_n=0,  # no group passes the gate,
        tpr_model=None, tpr_model_n=0, tpr_model_both=1, tpr_model_neither=0,  # and all three answers agree
        discrimination=None, discrimination_n=0,  # no group is wrong in clean
        parse_fail=0, parse_fail_n=288, groups=48, groups_dropped=0,
        # 19 color and size groups with 8 words, 10 shape groups with 6, 19 others with 4
        chance=(19 / 8 + 10 / 6 + 19 / 4) / 48,
    )  # fmt: skip
    for family, n in QUICK_SIZES.items():
        expect(results, **{f"clean_acc_{family}": 1, f"clean_acc_{family}_n": n, f"valid_{family}": 0})
    # Wilson at 48 of 48: n / (n + z^2), z = 1.96.
    expect(results, clean_acc_ci_lo=48 / (48 + 1.959964**2), clean_acc_ci_hi=1, clean_acc_n=48)
    expect(results, text_flip_rate_ci_lo=0, text_flip_rate_ci_hi=1 - 48 / (48 + 1.959964**2), text_flip_rate_n=48)
    assert len(samples) == 288


def test_text_follower() -> None:
    results, _, _ = run(lambda doc: told(doc) or (doc["gold"] if doc["image"] == "scene" else "no idea"))
    expect(
        results,
        clean_acc=1, match_acc=1, conflict_acc=0, irrelevant_acc=1, blind_acc=0, text_only_lure=1, valid=1,
        not_valid_for="none", text_flip_rate=1, text_flip_rate_n=48, spurious_flip=0, excess_flip=1, tpr_label=1,
        tpr_gated=1, tpr_gated_n=48, tpr_model=1, tpr_model_n=48, tpr_model_both=0, tpr_model_neither=0,
        conflict_lure=1, conflict_drop=1, irrelevant_drop=0, benefit=0, vis_gain=1, vrs=0,
        parse_fail=1 / 6,  # the 48 blank pictures
    )  # fmt: skip


def test_blind_model_that_believes_the_text() -> None:
    """Without a sentence it says the first word of the pool; gold runs through the pool, so it is right by luck."""
    results, _, _ = run(lambda doc: told(doc) or doc["pool"][0])
    # Gold of a family's i-th group is word i mod n: index 0 in groups 0, 8 (n = 8), 0, 6 (n = 6), 0, 4, 8 (n = 4).
    lucky = {"color": 2, "shape": 2, "count": 3, "position": 3, "size": 2}
    expect(
        results,
        clean_acc=12 / 48, blind_acc=12 / 48, irrelevant_acc=12 / 48, vis_gain=0, match_acc=1, conflict_acc=0,
        text_only_lure=1, text_flip_rate=1, text_flip_rate_n=12, tpr_label=1, tpr_model=1, benefit=36 / 48, valid=0,
        not_valid_for="color, shape, count, position, size",
        discrimination=0, discrimination_n=36,  # follows true text always and false text always: 1 - 1
        parse_fail=0,
        **{f"clean_acc_{family}": lucky[family] / n for family, n in QUICK_SIZES.items()},
    )  # fmt: skip


def test_constant_word() -> None:
    results, samples, _ = run(lambda doc: "Red.")
    # `red` is gold of the color groups 0 and 8 and of the size groups 0 and 8; 29 groups have no such word.
    expect(
        results,
        clean_acc=4 / 48, match_acc=4 / 48, conflict_acc=4 / 48, irrelevant_acc=4 / 48, blind_acc=4 / 48,
        text_flip_rate=0, text_flip_rate_n=4, spurious_flip=0, excess_flip=0, vis_gain=0, benefit=0,
        parse_fail=29 / 48, clean_acc_color=2 / 10, clean_acc_size=2 / 9, clean_acc_shape=0, valid=0,
    )  # fmt: skip
    lured = sum(sample["doc"]["lure"] == "red" for sample in samples if sample["condition"] == "conflict")
    expect(results, tpr_label=lured / (lured + 4), conflict_lure=lured / 48, text_only_lure=lured / 48)


def test_constant_letter() -> None:
    results, samples, _ = run(lambda doc: "(A)", task="textbias_probe_letter", limit=360)
    # The first 60 groups, 12 per family, place gold and lure once in each of the 12 ordered pairs of letters: A holds
    # gold in 3 of 12 and the lure in 3 of 12.
    assert {sample["condition"] for sample in samples} == set(outcomes.CONDITIONS)
    expect(
        results,
        groups=60, chance=1 / 4, clean_acc=1 / 4, conflict_acc=1 / 4, blind_acc=1 / 4, text_only_lure=1 / 4,
        text_flip_rate=0, tpr_label=1 / 2, tpr_model=None, conflict_lure=1 / 4, vis_gain=0, parse_fail=0, valid=0,
        vrs=2 * (1 / 4) * (3 / 4) / (1 / 4 + 3 / 4), **{f"clean_acc_{family}": 1 / 4 for family in QUICK_SIZES},
    )  # fmt: skip


def test_letters_of_gold() -> None:
    results, samples, model = run(lambda doc: said(doc, doc["gold"]), task="textbias_probe_letter", limit=60)
    expect(results, clean_acc=1, conflict_acc=1, parse_fail=0, groups=10)
    assert all(sample["target"] == sample["response"] for sample in samples)
    text = model.turns["color-000/clean"][-1]["text"]
    assert text.startswith("What color is the object?\nA. ")
    assert text.endswith("Answer with the letter of the option.")


def test_garbage() -> None:
    results, _, _ = run(lambda doc: "<unk> lorem")
    expect(
        results,
        parse_fail=1, clean_acc=0, match_acc=0, conflict_acc=0, blind_acc=0, text_only_lure=0, conflict_lure=0,
        text_flip_rate=None, text_flip_rate_ci_lo=None, text_flip_rate_n=0, spurious_flip=None, excess_flip=None,
        tpr_label=None, tpr_gated=None, tpr_model=None, tpr_model_both=0, tpr_model_neither=1, vrs=0, valid=0,
        discrimination=0, discrimination_n=48,
    )  # fmt: skip


def test_what_the_model_is_sent(always_gold) -> None:
    _, samples, model = always_gold
    by_group: dict[str, dict[str, dict]] = {}
    for sample in samples:
        by_group.setdefault(sample["group_id"], {})[sample["condition"]] = sample
    for conditions in by_group.values():
        sent = {name: model.turns[sample["doc"]["item_id"]] for name, sample in conditions.items()}
        kinds = {name: [part["type"] for part in content] for name, content in sent.items()}
        assert kinds.pop("text_only_conflict") == ["text"]
        assert set(map(tuple, kinds.values())) == {("image", "text")}
        pixels = {name: content[0]["url"].tobytes() for name, content in sent.items() if len(content) == 2}
        assert len({pixels[name] for name in ("clean", "match", "conflict", "irrelevant")}) == 1
        assert pixels["blank"] == scenes.blank().tobytes() != pixels["clean"]
        texts = {name: content[-1]["text"] for name, content in sent.items()}
        assert texts["blank"] == texts["clean"]
        assert texts["text_only_conflict"] == texts["conflict"]


class SimpleFake(Fake):
    """A model of the older kind, as the stock llava_hf: it is given the text and a function for the pictures."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[str]:
        replies = []
        for request in requests:
            text, _, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            pictures = [{"type": "image", "url": picture} for picture in doc_to_visual(doc)]
            self.turns[doc["item_id"]] = [*pictures, {"type": "text", "text": text}]
            replies.append(self.reply(doc))
        return replies


def test_simple_models_are_sent_the_same(always_gold) -> None:
    results, _, model = run(lambda doc: doc["gold"], limit=48, fake=SimpleFake)
    expect(results, clean_acc=1, groups=8)
    assert model.turns == {item: always_gold[2].turns[item] for item in model.turns}
    assert len(model.turns) == 48


def test_samples_hold_what_a_report_needs(always_gold) -> None:
    _, samples, _ = always_gold
    assert {
        "doc_id", "group_id", "family", "condition", "image_sha", "gold", "lure", "answer", "response", "outcome",
        "correct", "score", "question", "context", "image", "spec",
    } <= set(samples[0])  # fmt: skip
    # As the harness writes them: without doc and arguments, other objects as text.
    lines = [
        json.dumps({k: v for k, v in sample.items() if k not in ("doc", "arguments")}, default=str)
        for sample in samples
    ]
    again = metrics.summarize(json.loads(line) for line in lines)
    results = always_gold[0]
    for name in reported.PROBES["textbias_probe"].intervals:
        assert again[name][:4] == tuple(results[name + suffix] for suffix in ("", "_ci_lo", "_ci_hi", "_n"))
        assert again[name].mde == results.get(f"{name}_mde")


def test_the_harness_adds_clustered_errors_where_they_are_true() -> None:
    results, _, _ = run(lambda doc: told(doc) or doc["pool"][0])
    p = 12 / 48
    expect(results, clean_acc_stderr_clt=(p * (1 - p) / 47) ** 0.5)
    assert results["clean_acc_stderr_clustered"] == pytest.approx((p * (1 - p) / 48) ** 0.5, rel=0.05)
    assert results["text_flip_rate_stderr_clt"] == results["vrs_stderr_clustered"] == "N/A"


@pytest.mark.parametrize(("limit", "groups", "dropped"), [(3, 0, 1), (7, 1, 1), (12, 2, 0), (48, 8, 0)])
def test_any_limit(limit: int, groups: int, dropped: int) -> None:
    results, samples, _ = run(lambda doc: doc["gold"], limit=limit)
    expect(results, groups=groups, groups_dropped=dropped, clean_acc=1 if groups else None, clean_acc_n=groups)
    assert len(samples) == limit
