"""The Chinese twin: the same groups, Chinese words, strict parsing without word boundaries."""

from __future__ import annotations

import re

import pytest
from fake_model import expect, run
from hypothesis import given
from hypothesis import strategies as st

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.tasks import chinese, documents

ENGLISH, CHINESE = (documents.build_documents(300, lang=lang) for lang in documents.LANGUAGES)
POOLS = {family: [chinese.WORDS[word] for word in pool] for family, pool in scenes.POOLS.items()}


def test_groups_and_pictures_are_those_of_the_english_task() -> None:
    for english, twin in zip(ENGLISH, CHINESE, strict=True):
        for field in ("item_id", "family", "image", "spec", "image_sha", "template"):
            assert english[field] == twin[field]
        assert (twin["gold"], twin["lure"]) == (chinese.WORDS[english["gold"]], chinese.WORDS[english["lure"]])
        assert not re.search("[A-Za-z]", twin["prompt"])
        assert twin["prompt"].startswith(twin["context"] + twin["question"])


def test_sentences_name_what_they_should() -> None:
    for doc in CHINESE:
        named = {word for word in doc["pool"] if word in doc["context"]}
        told = {"match": {doc["gold"]}, "conflict": {doc["lure"]}, "text_only_conflict": {doc["lure"]}}
        assert named == told.get(doc["condition"], set())
        assert bool(doc["context"]) == (doc["condition"] not in ("clean", "blank"))


def test_six_paraphrases() -> None:
    said = {doc["context"].replace(doc["lure"], "X") for doc in CHINESE
            if (doc["family"], doc["condition"]) == ("color", "conflict")}  # fmt: skip
    assert len(said) == 6


@pytest.mark.parametrize(
    ("family", "reply", "answer"),
    [
        ("color", "红色", "红色"),
        ("color", "红", "红色"),
        ("color", "物体是红色的。", "红色"),
        ("color", "是粉红色的", "粉色"),
        ("color", "红色或蓝色", None),
        ("color", "红色。不是蓝色。", "红色"),
        ("color", "棕色", None),
        ("shape", "方形", "正方形"),
        ("shape", "三角形", "三角形"),
        ("count", "3", "三个"),
        ("count", "三", "三个"),
        ("count", "图中一共有3个圆形", "三个"),
        ("count", "有二个", "两个"),
        ("count", "十三", None),
        ("position", "左", "左边"),
        ("position", "靠近左侧", "左边"),
        ("position", "左边和上边", None),
        ("position", "", None),
    ],
)
def test_replies(family: str, reply: str, answer: str | None) -> None:
    assert chinese.parse(reply, POOLS[family]) == answer


@given(st.text(), st.sampled_from(sorted(POOLS)))
def test_any_text_is_read_without_an_exception(reply: str, family: str) -> None:
    assert chinese.parse(reply, POOLS[family]) in (None, *POOLS[family])


def test_a_text_follower_through_the_harness() -> None:
    told = {"match": "gold", "conflict": "lure", "text_only_conflict": "lure"}
    results, _, _ = run(
        lambda doc: f"是{doc[told.get(doc['condition'], 'gold')]}。" if doc["condition"] != "blank" else "不知道",
        "textbias_probe_zh",
        limit=120,
    )
    expect(
        results,
        clean_acc=1,
        conflict_acc=0,
        text_flip_rate=1,
        text_only_lure=1,
        vis_gain=1,
        parse_fail=1 / 6,
        groups=20,
        valid=1,
    )


def test_a_model_without_chinese_is_not_valid() -> None:
    english = {word: name for name, word in chinese.WORDS.items()}
    results, _, _ = run(lambda doc: english[doc["gold"]], "textbias_probe_zh", limit=60)
    expect(results, parse_fail=1, valid=0, not_valid_for="color, shape, count, position, size")


@pytest.mark.parametrize(
    "given_", [{"lang": "fr"}, {"lang": "zh", "answer": "letter"}, {"lang": "zh", "probe": "visreliance_probe"}]
)
def test_what_is_not_translated_is_refused(given_: dict) -> None:
    with pytest.raises(InputError, match=r"^lang="):
        documents.build_documents(1, **given_)
