"""Pictures of which several questions are asked pass through the vision tower once, and the answers stay the same."""

from __future__ import annotations

import functools

import pytest
import torch
from lmms_eval.protocol import ChatMessages
from models import family_model, family_processor, picture, placeholder

from lmms_keyspace.families import FAMILIES
from lmms_keyspace.model_wrappers.encoding import encode
from lmms_keyspace.model_wrappers.pictures import Pictures
from lmms_keyspace.model_wrappers.visual_features import VisualFeatures

QUESTIONS = ("What color is it ?", "What is it ?", "What color is the red circle in it ?")
# Pictures of the questions, batch by batch; None: a question without one.
BATCHES = ((1, 2, 1), (2, None, 3), (1,))
SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def asked(family: str, pictures: Pictures, batches=BATCHES):
    """(inputs, names of the pictures) of each batch, as the wrapper makes them."""
    processor = family_processor(family)
    processor.tokenizer.padding_side = "left"
    shown = []
    for numbers in batches:
        parts = [[] if n is None else [{"type": "image", "url": picture(n)}] for n in numbers]
        messages = [ChatMessages(messages=[{"role": "user", "content": part}]) for part in parts]
        shown.append(([list(one.extract_media()[0]) for one in messages], [pictures.read(one)[0] for one in messages]))
    mark = "" if family == "instructblip" else placeholder(family)
    for images, names in shown:
        texts = [f"{mark if row else ''} USER: {ask}" for row, ask in zip(images, QUESTIONS, strict=False)]
        with pictures.reused(processor, images, names):
            yield encode(processor, texts, images), names


def passes(model, monkeypatch) -> list[int]:
    """Pictures of each pass through the vision tower from now on."""
    encode_images, seen = model.base_model.get_image_features, []

    @functools.wraps(encode_images)
    def counting(*args, **kwargs):
        seen.append(len(kwargs.get("image_grid_thw", kwargs["pixel_values"])))
        return encode_images(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "get_image_features", counting)
    return seen


def takes_features(family: str) -> bool:
    """Whether this transformers takes features in place of pixels for the family."""
    return bool(VisualFeatures(family_model(family))._needs)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_pixels(family):
    model, pictures = family_model(family), Pictures()
    features = VisualFeatures(model)
    batches = ((1, 2, 1), (2, 3, 1)) if family == "instructblip" else BATCHES  # it always shows a picture
    for inputs, names in asked(family, pictures, batches):
        expected = model.generate(**inputs, **SETTINGS)
        found = model.generate(**features.inputs(inputs, names, pictures), **SETTINGS)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_picture_passes_once_and_its_features_are_let_go_after_its_last_question(monkeypatch, family):
    if not takes_features(family):
        pytest.skip("this transformers does not take features in place of pixels")
    model, pictures = family_model(family), Pictures()
    seen = passes(model, monkeypatch)
    features = VisualFeatures(model)
    held = []
    for inputs, names in asked(family, pictures):
        given = features.inputs(inputs, names, pictures)
        held.append(len(pictures.features))
        assert "pixel_values" not in given
        assert "pixel_values" in inputs  # a second pass takes them
    # 1 and 2, of which both are shown again; 3, after which only 1 will be; none.
    assert seen == [2, 1]
    assert held == [2, 1, 0]


def test_features_of_several_layers_are_not_taken_apart():
    """Qwen3-VL's decoder gets them beside those that stand for the image."""
    if not takes_features("qwen3_vl"):
        pytest.skip("this transformers does not take features in place of pixels")
    features, pictures = VisualFeatures(family_model("qwen3_vl")), Pictures()
    for inputs, names in asked("qwen3_vl", pictures):
        assert features.inputs(inputs, names, pictures).keys() == inputs.keys()


def test_features_are_those_of_the_picture_in_any_order():
    if not takes_features("llava"):
        pytest.skip("this transformers does not take features in place of pixels")
    model, pictures = family_model("llava"), Pictures()
    features = VisualFeatures(model)
    alone = {}
    for inputs, names in asked("llava", Pictures(), [(1,), (2,), (3,)]):
        own = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        alone[names[0][0]] = own.pooler_output[0]
    for inputs, names in asked("llava", pictures):
        made = features.inputs(inputs, names, pictures)["mm_encoder_outputs"]["image"].pooler_output
        shown = [name for row in names for name in row]
        for name, own in zip(shown, made, strict=True):
            torch.testing.assert_close(own, alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("numbers", [(1,), (None,), (1, 2)], ids=["one picture", "no picture", "two pictures"])
def test_without_a_repeated_picture_the_model_gets_the_processors_inputs(numbers):
    model, pictures = family_model("llava"), Pictures()
    for inputs, names in asked("llava", pictures, [numbers]):
        assert VisualFeatures(model).inputs(inputs, names, pictures).keys() == inputs.keys()
    assert not len(pictures.features)


def test_without_room_the_features_are_made_again(monkeypatch):
    if not takes_features("llava"):
        pytest.skip("this transformers does not take features in place of pixels")
    model, pictures = family_model("llava"), Pictures(values=0)
    seen = passes(model, monkeypatch)
    features = VisualFeatures(model)
    for inputs, names in asked("llava", pictures, [(1, 2, 1)] * 2):
        features.inputs(inputs, names, pictures)
    assert seen == [2, 2]
    assert not len(pictures.features)
