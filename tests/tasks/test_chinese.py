"""The Chinese twin: the same groups, Chinese words, strict parsing without word boundaries."""

from __future__ import annotations

import re

import pytest
from fake_model import expect, run
from hypothesis import given
from hypothesis import strategies as st

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.tasks import chinese, chinese_replies, documents

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
    assert chinese_replies.parse(reply, POOLS[family]) == answer


@given(st.text(), st.sampled_from(sorted(POOLS)))
def test_any_text_is_read_without_an_exception(reply: str, family: str) -> None:
    assert chinese_replies.parse(reply, POOLS[family]) in (None, *POOLS[family])


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
    "given_", [{"lang": "fr"}, {"lang": "zh", "answer": "letter"}, {"lang": "zh", "probe": "textbias_typographic"}]
)
def test_what_is_not_translated_is_refused(given_: dict) -> None:
    with pytest.raises(InputError, match=r"^lang="):
        documents.build_documents(1, **given_)


TWINS = ("textbias_order", "visreliance_probe", "visreliance_pairs")


@pytest.mark.parametrize("probe", TWINS)
def test_the_other_twins_are_the_same_groups_in_chinese(probe: str) -> None:
    english, twins = (documents.build_documents(120, probe=probe, lang=lang) for lang in documents.LANGUAGES)
    for before, twin in zip(english, twins, strict=True):
        for field in ("item_id", "family", "image", "spec", "image_sha", "template"):
            assert before[field] == twin[field]
        assert (twin["gold"], twin["lure"]) == (chinese.WORDS[before["gold"]], chinese.WORDS[before["lure"]])
        assert twin["pool"] == [chinese.WORDS[word] for word in before["pool"]]
        assert not re.search("[A-Za-z]", twin["prompt"])
        assert bool(twin["context"]) == bool(before["context"])


def test_who_says_it_in_chinese() -> None:
    said: dict[str, set[str]] = {}
    for doc in documents.build_documents(150, probe="textbias_order", lang="zh"):
        named = {word for word in doc["pool"] if word in doc["context"]}
        assert named == (set() if doc["condition"] in ("clean", "filler") else {doc["lure"]})
        if doc["family"] == "color":
            said.setdefault(doc["condition"], set()).add(doc["context"].replace(doc["lure"], "X"))
        if doc["condition"] == "before":
            content = documents.doc_to_messages(doc)[0]["content"]
            assert [part["type"] for part in content] == ["text", "image", "text"]
            assert content[0]["text"] + content[2]["text"] == doc["prompt"]
    assert [len(said[name]) for name in ("conflict", "opinion", "authority")] == [6, 6, 6]
    assert {len(text) == length for length, texts in chinese.FILLERS.items() for text in texts} == {True}


def test_the_caption_in_chinese_tells_the_answer() -> None:
    for doc in documents.build_documents(100, probe="visreliance_probe", lang="zh"):
        if doc["condition"] == "caption_oracle":
            assert {"color": doc["gold"], "shape": doc["gold"], "position": f"靠近{doc['gold']}"}.get(
                doc["family"], "图中有"
            ) in doc["context"]
            if doc["family"] == "size":
                assert f"大的{doc['gold']}" in doc["context"]


NUMBERS = [*"一二三四五六七八九"]
HOURS = ["一点", "两点", "三点", "十点", "十二点"]


@pytest.mark.parametrize(
    ("pool", "reply", "answer"),
    [
        (NUMBERS, "7", "七"),
        (NUMBERS, "数字是七。", "七"),
        (NUMBERS, "十七", None),
        (NUMBERS, "三或者七", None),
        (HOURS, "两点", "两点"),
        (HOURS, "2点", "两点"),
        (HOURS, "二", "两点"),
        (HOURS, "3:00", "三点"),
        (HOURS, "十二点", "十二点"),
        (["apple", "plum"], "最高的是Plum。", "plum"),
        (["apple", "plum"], "pineapple", None),
        (["K", "M"], "字母是K", "K"),
        (["K", "M"], "OK", None),
    ],
)
def test_numbers_labels_and_letters(pool: list[str], reply: str, answer: str | None) -> None:
    assert chinese_replies.parse(reply, pool) == answer
