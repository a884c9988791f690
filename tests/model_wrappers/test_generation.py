"""Generation settings, cutting of answers, and the order of batches."""

from dataclasses import dataclass, field
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_keyspace.model_wrappers.generation import DEFAULT_NEW_TOKENS, batches, cut, longest_first, settings_of


@dataclass
class FakeRequest:
    text: str
    generation_kwargs: dict = field(default_factory=dict)
    counted: bool = True
    shown: tuple[str, ...] = ()

    @property
    def images_shown(self) -> int:
        return len(self.shown)


def test_greedy_is_the_default():
    settings = settings_of({})
    assert settings.arguments["do_sample"] is False
    assert settings.arguments["max_new_tokens"] == DEFAULT_NEW_TOKENS
    assert settings.until == ()


@pytest.mark.parametrize(
    ("kwargs", "sampled"),
    [
        ({"temperature": 0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"do_sample": False}, False),
    ],
)
def test_sampling_needs_a_temperature(kwargs, sampled):
    assert settings_of(kwargs).arguments["do_sample"] is sampled


def test_what_the_task_says_is_passed_on():
    settings = settings_of({"max_new_tokens": 7, "num_beams": 2, "until": "\n", "image_aspect_ratio": "pad"})
    assert settings.arguments["max_new_tokens"] == 7
    assert settings.arguments["num_beams"] == 2
    assert "image_aspect_ratio" not in settings.arguments
    assert settings.until == ("\n",)


def test_an_answer_ends_at_the_first_mark():
    assert cut("red\nblue. green", [".", "\n"]) == "red"
    assert cut("red", ["\n"]) == "red"
    assert cut("red", []) == "red"


REQUESTS = st.lists(
    st.tuples(
        st.text(max_size=9),
        st.sampled_from([{}, {"max_new_tokens": 3}, {"until": ["a"]}]),
        st.booleans(),
        st.lists(st.sampled_from("ab"), max_size=2).map(tuple),
    ),
    max_size=40,
)


@given(REQUESTS, st.integers(1, 7), st.booleans())
def test_batches_hold_every_request_once_with_like_settings(drawn, size, together):
    requests = [FakeRequest(*row) for row in drawn]
    cut_up = list(batches(requests, size, together=together))
    assert sorted(index for _, members in cut_up for index in members) == list(range(len(requests)))
    for settings, members in cut_up:
        assert 1 <= len(members) <= size
        assert all(settings_of(requests[index].generation_kwargs) == settings for index in members)
        assert len({requests[index].counted for index in members}) == 1
        lengths = [(requests[index].images_shown, len(requests[index].text)) for index in members]
        assert [shown for shown, _ in lengths] == sorted((shown for shown, _ in lengths), reverse=True)
        assert together or lengths == sorted(lengths, reverse=True)


@given(REQUESTS)
def test_questions_about_the_same_pictures_follow_the_longest_of_them(drawn):
    requests = [FakeRequest(text, {}, True, shown) for text, _, _, shown in drawn]
    order = [requests[index] for index in longest_first(requests, together=True)]
    runs = [(shown, list(members)) for shown, members in groupby(order, key=lambda request: request.shown)]
    named = [shown for shown, _ in runs if shown]
    assert len(named) == len(set(named))
    for _, members in runs:
        assert [len(one.text) for one in members] == sorted((len(one.text) for one in members), reverse=True)
    longest = [(len(shown), len(members[0].text)) for shown, members in runs]
    assert longest == sorted(longest, reverse=True)
