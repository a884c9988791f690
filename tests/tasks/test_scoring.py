"""Strict parsing: an answer is read or it is a parse failure, never guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_keyspace import scenes
from lmms_keyspace.tasks import documents, reported, scoring
from lmms_keyspace.tasks.groups import LETTERS

COLORS = scenes.POOLS["color"]
COUNTS = scenes.POOLS["count"]
OPTIONS = ["red", "blue", "green", "white"]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("red", "red"),
        (" Red. ", "red"),
        ("**RED**", "red"),
        ('"red"', "red"),
        ("The object is red.", "red"),
        ("It is red. Not blue, as the note says.", "red"),
        ("Red, dark red", "red"),
        ("red\nblue", "red"),
        ("red or blue", None),
        ("reddish", None),
        ("infrared", None),
        ("brown", None),
        ("I see it. It is red.", None),  # the first sentence gives no answer
        ("", None),
        ("...", None),
    ],
)
def test_words(reply: str, answer: str | None) -> None:
    assert scoring.parse_word(reply, COLORS) == answer


@pytest.mark.parametrize(
    ("reply", "answer"),
    [("3", "three"), ("There are 3 circles.", "three"), ("3 (three)", "three"), ("3 or four", None), ("13", None)],
)
def test_numerals_stand_for_number_words(reply: str, answer: str | None) -> None:
    assert scoring.parse_word(reply, COUNTS) == answer
    assert scoring.parse_word(reply, COLORS) is None


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("A", "red"),
        ("b.", "blue"),
        ("(C)", "green"),
        ("D)", "white"),
        ("B:", "blue"),
        ("**B**", "blue"),
        ("B. blue", "blue"),
        ("(B) blue", "blue"),
        ("B. The object is blue", "blue"),
        ("The answer is B.", "blue"),
        ("Answer: (B)", "blue"),
        ("the answer is B, because it is blue", "blue"),
        ("B. red", None),  # letter and word disagree
        ("A. red\nB. blue", None),
        ("A. B.", None),
        ("A or B", None),
        ("the answer is A or option B", None),
        ("blue", None),  # the word without its letter
        ("A red circle", None),
        ("the answer is a red circle", None),
        ("E", None),
        ("", None),
    ],
)
def test_letters(reply: str, answer: str | None) -> None:
    assert scoring.parse_letter(reply, OPTIONS) == answer


@given(st.text())
def test_any_text_is_scored_without_an_exception(reply: str) -> None:
    assert scoring.parse_word(reply, COLORS) in (None, *COLORS)
    assert scoring.parse_letter(reply, OPTIONS) in (None, *OPTIONS)


@given(st.sampled_from(LETTERS[:4]), st.sampled_from(["{}", "({})", "{}.", "{}: {w}", "({}) {w}", "{}. {w}."]))
def test_every_form_of_a_letter_gives_its_option(letter: str, form: str) -> None:
    word = OPTIONS[LETTERS.index(letter)]
    assert scoring.parse_letter(form.format(letter, w=word), OPTIONS) == word


def test_outcomes() -> None:
    answers = {"red": "gold", "blue": "lure", "green": "other", None: "parse_fail"}
    assert {answer: scoring.outcome(answer, "red", "blue") for answer in answers} == answers


@pytest.mark.parametrize("form", documents.ANSWER_FORMS)
def test_a_scored_document(form: str) -> None:
    docs = documents.build_documents(1, form)
    for doc in docs:
        right, wrong = (
            scoring.textbias_probe(doc, [doc["target"] if word == "gold" else said(doc, doc["lure"])])
            for word in ("gold", "lure")
        )
        assert (right["outcome"], right["correct"], right["score"], right["answer"]) == ("gold", 1.0, 1.0, doc["gold"])
        assert (wrong["outcome"], wrong["correct"], wrong["score"], wrong["answer"]) == ("lure", 0.0, 0.0, doc["lure"])
        assert wrong["response"] == said(doc, doc["lure"])
        keys = reported.PROBES["textbias_probe"].keys
        assert set(keys) <= set(right)
        scored = [key for key in keys if isinstance(right[key], dict)]
        expected = {"text_only_conflict": [], "blank": ["blind_acc"]}.get(doc["condition"], [f"{doc['condition']}_acc"])
        assert scored == expected


def said(doc: dict, word: str) -> str:
    return LETTERS[doc["options"].index(word)] if doc["options"] else word
