"""The bundled model and its builder: the shipped weights load, answer, and hold the bounds that the card states."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_keyspace import embedded, scenes
from lmms_keyspace.embedded import build, card, data
from lmms_keyspace.embedded.adapters import AdapterRecipe
from lmms_keyspace.embedded.architecture import turn
from lmms_keyspace.embedded.evaluate import CONDITIONS, Figures, answer, evaluate
from lmms_keyspace.errors import InputError

CARD = json.loads((embedded.base_path().parent / "card.json").read_text())


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(embedded.base_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(embedded.base_path(), dtype=torch.float32).eval()


def figures(entry: dict) -> Figures:
    return Figures(**entry)


def perfect(**changes: dict) -> Figures:
    """Figures that hold every bound: hints cost 20 points in every family, chance is 25."""
    row = dict.fromkeys(CONDITIONS, 98.0) | {"conflict": 78.0, "blank": 25.0}
    names = (*scenes.CORE_FAMILIES, "all")
    accuracy = {name: row | changes.get(name, {}) for name in names}
    return Figures(
        100,
        accuracy,
        accuracy,
        dict.fromkeys(names, 25.0),
        dict.fromkeys(names, 20.0),
        dict.fromkeys(names, 95.0),
        100.0,
    )


def test_weights_are_small_and_hold_no_pickle() -> None:
    files = [file for file in embedded.base_path().rglob("*") if file.is_file()]
    assert 500_000 < sum(file.stat().st_size for file in files) <= 8_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize("space", ["dev", "heldout", "probe"])
def test_card_holds_every_bound(space: str) -> None:
    assert card.shortfalls(figures(CARD["base"]["figures"][space])) == []


def test_card_was_written_for_this_generator() -> None:
    assert CARD["generator_version"] == scenes.GENERATOR_VERSION
    assert (embedded.base_path().parent / "CARD.md").read_text() == card.page(CARD)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": {"clean": 94.0}}, "shape: clean accuracy 94.0"),
        ({"count": {"blank": 31.0}}, "count: blank accuracy 31.0"),
        ({"size": {"blank": 19.0}}, "size: blank accuracy 19.0"),
        ({"all": {"conflict": 84.0}}, "a misleading hint costs 14.0"),
        ({name: {"conflict": 90.0} for name in scenes.CORE_FAMILIES[1:]}, "in fewer than 2 families"),
        ({"all": {"match": 96.0}}, "a truthful hint costs 2.0"),
    ],
)
def test_shortfalls_names_what_is_missed(changes: dict, words: str) -> None:
    assert card.shortfalls(perfect()) == []
    missed = card.shortfalls(perfect(**changes))
    assert len(missed) == 1
    assert words in missed[0]


def test_letters_are_missed() -> None:
    missed = card.shortfalls(dataclasses.replace(perfect(), letters=perfect().letters | {"size": 80.0}))
    assert missed == ["size: 80.0 % right by option letter is below 90.0"]


def test_answers_that_are_not_one_word_are_missed() -> None:
    missed = card.shortfalls(dataclasses.replace(perfect(), one_word=90.0))
    assert len(missed) == 1
    assert "90.0 %" in missed[0]


def test_shipped_model_sees_reads_and_answers_in_one_word(model, processor) -> None:
    result = evaluate(model, processor, "dev", 20, key="test", batch=50)
    assert result.accuracy["all"]["clean"] >= 92
    assert result.accuracy["all"]["match"] >= result.accuracy["all"]["clean"] - 2
    assert result.cost("conflict")["all"] >= 10
    assert result.lure["all"]["text_only_conflict"] >= 90
    assert result.letters["all"] >= 85
    assert result.one_word >= 99


def test_left_padding_and_batch_size_do_not_change_answers(model, processor) -> None:
    turns = []
    for i in range(20):
        family = scenes.CORE_FAMILIES[i % 5]
        item = scenes.draw_item(family, scenes.rng("dev", "padding", i), space="dev")
        context = scenes.hint(item, item.gold, i % 6) if i % 2 else ""
        turns.append((scenes.render(item.spec), scenes.prompt(item.question, context=context)))
    assert processor.tokenizer.padding_side == "left"
    batched = answer(model, processor, turns, batch=20)
    assert batched == answer(model, processor, turns, batch=1)
    assert len(set(batched)) >= 8


def test_picture_may_follow_the_text(model, processor) -> None:
    right = 0
    for i in range(20):
        item = scenes.draw_item("color", scenes.rng("dev", "order", i), space="dev")
        content = [{"type": "text", "text": scenes.prompt(item.question)}, {"type": "image"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert text.index("What") < text.index("<image>")
        inputs = processor(images=scenes.render(item.spec), text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        right += processor.tokenizer.decode(new, skip_special_tokens=True).strip() == item.gold
    assert right >= 18


@pytest.mark.parametrize("picture_last", [False, True])
def test_training_prompts_are_what_the_chat_template_makes(processor, picture_last: bool) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "How many?\nAnswer."}]
    content = parts[::-1] if picture_last else parts
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.new("RGB", (100, 60))
    made = processor(images=picture, text=text, return_tensors="pt")["input_ids"][0].tolist()
    assert made == processor.tokenizer(turn("How many?\nAnswer.", picture=True, picture_last=picture_last)).input_ids


def test_chat_template_handles_text_turns_and_history(processor) -> None:
    conversation = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == "Be brief.  USER: Hello. ASSISTANT: Yes. USER: Why? ASSISTANT:"


def test_training_pictures_never_meet_those_of_another_space() -> None:
    trained = {scenes.spec_sha(item.spec) for item in data.train_items(4000, CARD["seed"])}
    for space in ("dev", "heldout", "probe"):
        for i in range(1000):
            family = scenes.CORE_FAMILIES[i % 5]
            spec = scenes.draw_item(family, scenes.rng(space, "apart", i), space=space).spec
            assert scenes.spec_sha(spec) not in trained
    assert len(trained) > 3990


def test_training_scenes_hold_no_held_out_pair() -> None:
    for item in data.train_items(3000, 1):
        for thing in item.spec["objects"]:
            assert (thing["color"], thing["shape"]) not in scenes.HELD_OUT


def test_recolored_training_scenes_wear_no_named_color() -> None:
    items = data.train_items(2000, 2)
    targets = data.patch_targets(items, named_shapes=False)["color"]
    nameless = [i for i, item in enumerate(items) if (targets[i] == -100).any()]
    assert {items[i].family for i in nameless} == {"shape", "count", "position"}
    assert 0.75 < len(nameless) / (0.6 * len(items)) < 0.85
    for i in nameless:
        rgb = items[i].spec["objects"][0]["rgb"]
        for named in scenes.PALETTE.values():
            assert sum((a - b) ** 2 for a, b in zip(rgb, named, strict=True)) >= data.NAMELESS**2


def test_hints_of_training_pictures_are_always_true() -> None:
    items = data.train_items(50, 3)
    mixture = dataclasses.replace(
        build.RECIPE.decoder[-1].mixture, hint=1.0, irrelevant=0.0, picture_last=0.0, letters=0.0
    )
    r = random.Random(0)
    for index, item in enumerate(items):
        sample = data.picture_sample(items, index, mixture, r)
        said = sample.prompt.split("\n")[1].split("? ")[0].split(". ")[0].replace(".", "").split()
        assert [word for word in said if word in item.pool] == [item.gold] == [sample.answer.strip()]


def test_blank_pictures_want_any_word() -> None:
    items = data.train_items(5, 4)
    mixture = dataclasses.replace(build.RECIPE.decoder[-1].mixture, hint=0.0, irrelevant=0.0, letters=0.0, blank=1.0)
    r = random.Random(0)
    for index, item in enumerate(items):
        samples = [data.picture_sample(items, index, mixture, r) for _ in range(200)]
        assert {sample.picture for sample in samples} == {data.BLANK}
        assert {sample.answer.strip() for sample in samples} == set(item.pool)


def test_letter_drill_asks_for_the_letters_it_lists() -> None:
    item = scenes.draw_item("shape", scenes.rng("train", "drill"), space="train")
    drill = data.letter_drill(item, random.Random(0))
    listed = dict(line.split(". ")[::-1] for line in drill.prompt.splitlines()[1:])
    words = drill.answer.split()
    assert len(listed) == 4
    assert sorted(words[::2]) == sorted([*listed, *listed])
    assert words[1::2] == [listed[word] for word in words[::2]]


def test_paths_and_unknown_adapter() -> None:
    assert embedded.base_path().is_dir()
    for name in embedded.ADAPTERS:
        assert (embedded.adapter_path(name) / "adapter_model.safetensors").is_file()
    with pytest.raises(InputError, match=r"adapter='dora'.*malora, lora, malora_no_mmd"):
        embedded.adapter_path("dora")


def test_adapters_have_equal_numbers_of_parameters() -> None:
    counts = [CARD["adapters"][name]["trained_parameters"] for name in embedded.ADAPTERS]
    assert min(counts) >= 0.98 * max(counts)
    assert CARD["adapters"]["malora_no_mmd"]["arm"]["lambda_mmd"] == 0


@pytest.fixture
def short_recipe() -> build.Recipe:
    default = build.RECIPE
    return dataclasses.replace(
        default,
        scenes=60,
        checked=2,
        vision=dataclasses.replace(default.vision, steps=2, batch=4),
        decoder=tuple(dataclasses.replace(stage, steps=2, batch=4) for stage in default.decoder),
        measured=(("dev", 2), ("heldout", 2), ("probe", 2)),
        adapters=AdapterRecipe(steps=2, batch=4, scenes=20, measured=(("probe", 1),), measured_keys=5),
    )


def test_builder_runs_from_end_to_end_and_repeats(tmp_path: Path, short_recipe: build.Recipe) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    record = build.build(first, short_recipe, 1, lambda *words: None)
    assert record["base"]["missed"]["dev"]  # two steps teach nothing, and the card says so
    assert json.loads((first / "card.json").read_text()) == json.loads(json.dumps(record))
    assert (first / "CARD.md").read_text().startswith("# The bundled model")
    build.build(second, short_recipe, 1, lambda *words: None)
    weights = [path.relative_to(first) for path in sorted(first.rglob("*.safetensors"))]
    assert len(weights) == 1 + len(embedded.ADAPTERS)
    for path in weights:
        assert (first / path).read_bytes() == (second / path).read_bytes()


def test_kept_base_is_measured_and_not_trained(tmp_path: Path, short_recipe: build.Recipe) -> None:
    record = build.build(tmp_path, short_recipe, 2, lambda *words: None)
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    other = dataclasses.replace(short_recipe, vision=dataclasses.replace(short_recipe.vision, steps=9))
    again = build.build(tmp_path, other, 2, lambda *words: None, keep_base=True)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    assert again["base"]["figures"] == record["base"]["figures"]
    assert again["recipe"]["vision"]["steps"] == 2
