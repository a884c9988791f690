"""The scene generator: deterministic, its spaces apart, its answers visible in the pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError

SEEN_AS = {  # written down again, so that a slip in the generator's palette shows
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 222, 45),
    "purple": (145, 60, 190),
    "orange": (242, 136, 25),
    "white": (243, 243, 243),
    "pink": (250, 135, 190),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

families = st.sampled_from(scenes.CORE_FAMILIES)
templates = st.integers(0, scenes.N_TEMPLATES - 1)
keys = st.integers(0, 10**6)


def draw(family: str, key: int, space: str = "dev") -> scenes.Item:
    return scenes.draw_item(family, scenes.rng(space, "test", family, key), space=space)


def color_name(pixels: np.ndarray) -> str:
    middle = np.median(pixels, axis=0)
    return min(SEEN_AS, key=lambda name: float(((middle - SEEN_AS[name]) ** 2).sum()))


def shape_name(filled: np.ndarray) -> str:
    """Shape of a tightly cropped boolean mask, from how full it is and how wide three of its rows are."""
    fill = filled.mean()
    top, middle, bottom = (filled[int(at * len(filled))].mean() for at in (0.03, 0.5, 0.97))
    if fill > 0.7:
        return "square" if fill > 0.9 else "circle"
    if bottom > 0.85:
        return "triangle"
    if top > 0.2:
        return "cross"
    return "diamond" if middle > 0.9 else "star"


def answer_from_pixels(family: str, picture: np.ndarray) -> str:
    """The answer, found without the spec: connected components of what differs from the background."""
    level = np.median(np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]), axis=0)
    different = np.abs(picture.astype(float) - level).max(axis=2) > 40
    labels, n = ndimage.label(different, structure=np.ones((3, 3)))
    if family == "count":
        return NUMBERS[n]
    areas = ndimage.sum_labels(different, labels, range(1, n + 1))
    largest = labels == 1 + int(np.argmax(areas))
    rows, columns = ndimage.find_objects(largest.astype(int))[0]
    if family == "shape":
        return shape_name(largest[rows, columns])
    if family == "position":
        side = len(picture)
        gaps = {"left": columns.start, "right": side - columns.stop, "top": rows.start, "bottom": side - rows.stop}
        return min(gaps, key=gaps.__getitem__)
    if family == "size":
        assert n == 2
        assert np.max(areas) > 2 * np.min(areas)
    return color_name(picture[largest])


@pytest.mark.parametrize("space", scenes.SPACES)
@pytest.mark.parametrize("family", scenes.CORE_FAMILIES)
def test_gold_can_be_read_from_the_pixels(family: str, space: str) -> None:
    for key in range(60):
        item = draw(family, key, space)
        assert answer_from_pixels(family, np.asarray(scenes.render(item.spec))) == item.gold, item.spec


@given(families, keys)
def test_same_key_same_item_and_same_pixels(family: str, key: int) -> None:
    first, second = draw(family, key), draw(family, key)
    assert first == second
    assert scenes.render(first.spec).tobytes() == scenes.render(json.loads(json.dumps(second.spec))).tobytes()
    assert scenes.spec_sha(first.spec) == scenes.spec_sha(json.loads(json.dumps(second.spec)))


@given(families, keys)
def test_spec_holds_only_integers_and_strings(family: str, key: int) -> None:
    def leaves(value: object) -> list[object]:
        if isinstance(value, dict):
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]

    assert {type(leaf) for leaf in leaves(draw(family, key).spec)} <= {int, str}


def test_streams_differ_by_space_and_key() -> None:
    firsts = {scenes.rng(space, "k", i).random() for space in scenes.SPACES for i in range(50)}
    assert len(firsts) == 50 * len(scenes.SPACES)


@given(families, keys, st.sampled_from([space for space in scenes.SPACES if space != "train"]))
def test_no_training_picture_can_be_a_test_picture(family: str, key: int, space: str) -> None:
    train, other = draw(family, key, "train").spec, draw(family, key, space).spec
    assert train["background"] % 2 == 0
    assert other["background"] % 2 == 1


def test_held_out_pairs_are_a_quarter_and_spread_over_every_color_and_shape() -> None:
    assert len(scenes.HELD_OUT) == len(scenes.COLORS) * len(scenes.SHAPES) // 4
    assert {color for color, _ in scenes.HELD_OUT} == set(scenes.COLORS)
    assert {shape for _, shape in scenes.HELD_OUT} == set(scenes.SHAPES)


@pytest.mark.parametrize("space", scenes.SPACES)
def test_each_space_draws_the_pairs_it_may(space: str) -> None:
    drawn = {
        (thing["color"], thing["shape"])
        for family in scenes.CORE_FAMILIES
        for key in range(800)
        for thing in draw(family, key, space).spec["objects"]
    }
    every = {(color, shape) for color in scenes.COLORS for shape in scenes.SHAPES}
    expected = {"train": every - scenes.HELD_OUT, "heldout": scenes.HELD_OUT}
    assert drawn == expected.get(space, every)


@pytest.mark.parametrize("space", scenes.SPACES)
@pytest.mark.parametrize("family", scenes.CORE_FAMILIES)
def test_gold_is_balanced_and_the_question_does_not_give_it_away(family: str, space: str) -> None:
    items = [draw(family, key, space) for key in range(1200)]
    for question in {item.question for item in items}:
        golds = [item.gold for item in items if item.question == question]
        share = 1 / len(scenes.POOLS[family])
        slack = 5 * (share * (1 - share) / len(golds)) ** 0.5
        for word in scenes.POOLS[family]:
            assert abs(golds.count(word) / len(golds) - share) < slack, (question, word)


@given(families, keys, st.data())
def test_gold_can_be_asked_for(family: str, key: int, data: st.DataObject) -> None:
    gold = data.draw(st.sampled_from(scenes.POOLS[family]))
    item = scenes.draw_item(family, scenes.rng("dev", key), space="dev", gold=gold)
    assert item.gold == gold
    assert answer_from_pixels(family, np.asarray(scenes.render(item.spec))) == gold


def test_objects_stay_inside_and_apart() -> None:
    for family in scenes.CORE_FAMILIES:
        for key in range(300):
            things = draw(family, key).spec["objects"]
            for thing in things:
                assert all(thing["radius"] < thing[axis] < scenes.CANVAS - thing["radius"] for axis in "xy")
            for i, a in enumerate(things):
                for b in things[:i]:
                    assert max(abs(a["x"] - b["x"]), abs(a["y"] - b["y"])) > a["radius"] + b["radius"]


@pytest.mark.parametrize("family", scenes.CORE_FAMILIES)
def test_templates_and_values_give_distinct_sentences(family: str) -> None:
    item = draw(family, 0)
    sentences = [scenes.hint(item, word, i) for word in item.pool for i in range(scenes.N_TEMPLATES)]
    assert len(set(sentences)) == scenes.N_TEMPLATES * len(item.pool)
    assert all(sentence[0].isupper() and sentence.endswith(".") and "{" not in sentence for sentence in sentences)


@given(families, keys, templates)
def test_hint_names_its_value_and_no_other_answer(family: str, key: int, template: int) -> None:
    item = draw(family, key)
    value = scenes.lure(item, scenes.rng("dev", key))
    assert value != item.gold
    words = scenes.hint(item, value, template).rstrip(".").replace(",", "").split()
    assert [word for word in words if word in item.pool] == [value]
    assert any(word in (item.subject, scenes.PLURALS.get(item.subject)) for word in words)


@given(families, keys, templates)
def test_irrelevant_sentence_speaks_of_something_absent(family: str, key: int, template: int) -> None:
    item = draw(family, key)
    r = scenes.rng("dev", "irrelevant", key)
    lure = scenes.lure(item, r)
    told, other = scenes.hint(item, lure, template), scenes.irrelevant(item, r, template, avoid=[lure])
    words = other.rstrip(".").split()
    assert not {item.gold, lure, item.subject, scenes.PLURALS.get(item.subject)} & set(words)
    assert len(words) == len(told.split())


def test_irrelevant_sentence_finds_a_word_when_every_option_is_taken() -> None:
    item = draw("count", 3)
    words = scenes.irrelevant(item, scenes.rng("dev", 1), 0, avoid=item.pool)
    assert "five" in words or "six" in words


def test_one_is_singular() -> None:
    item = draw("count", 3)
    assert f"there is one {item.subject}." in scenes.hint(item, "one", 0)
    assert f"there are two {scenes.PLURALS[item.subject]}." in scenes.hint(item, "two", 0)


def test_answers_are_single_lower_case_words() -> None:
    for pool in scenes.POOLS.values():
        assert all(word.isalpha() and word.islower() for word in pool)
        assert len(set(pool)) == len(pool)


def test_blank_shows_nothing_on_the_same_canvas() -> None:
    blank = scenes.blank()
    assert blank.size == scenes.render(draw("color", 0).spec).size == (scenes.CANVAS, scenes.CANVAS)
    assert blank.mode == "RGB"
    assert [count for count, _ in blank.getcolors()] == [scenes.CANVAS**2]


def test_prompt_wording() -> None:
    assert scenes.prompt("What?", context="So.") == "So. What?\nAnswer with one word."
    assert (
        scenes.prompt("What?", options=["red", "blue"])
        == "What?\nA. red\nB. blue\nAnswer with the letter of the option."
    )


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: scenes.rng("public", 1), "space"),
        (lambda: scenes.draw_item("weight", scenes.rng("dev", 1), space="dev"), "family"),
        (lambda: scenes.draw_item("color", scenes.rng("dev", 1), space="test"), "space"),
        (lambda: scenes.draw_item("color", scenes.rng("dev", 1), space="dev", gold="one"), "gold"),
        (lambda: scenes.hint(draw("color", 0), "red", scenes.N_TEMPLATES), "template"),
        (lambda: scenes.irrelevant(draw("color", 0), scenes.rng("dev", 1), -1), "template"),
    ],
)
def test_bad_input_names_argument_and_way_out(call, argument: str) -> None:
    with pytest.raises(InputError, match=f"^{argument}=.*take"):
        call()
