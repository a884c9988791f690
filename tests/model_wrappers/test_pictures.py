"""Pictures of which several questions are asked: one object, preprocessed once, and the same inputs of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lmms_eval.protocol import ChatMessages
from models import family_processor, placeholder
from PIL import Image

from lmms_keyspace.model_wrappers.encoding import encode
from lmms_keyspace.model_wrappers.kept import by_picture, joined
from lmms_keyspace.model_wrappers.pictures import Pictures

# One for every kind of image processor: resized, padded, cut into tiles or into patches.
FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "gemma3", "mistral3"]
FAMILIES += ["idefics2", "idefics3", "instructblip"]


def picture(number: int, mode: str = "RGB", side: int = 12) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def shown(*pictures: Image.Image) -> ChatMessages:
    content = [{"type": "image", "url": one} for one in pictures]
    return ChatMessages(messages=[{"role": "user", "content": [*content, {"type": "text", "text": "red ?"}]}])


def images(messages: ChatMessages) -> list[Image.Image]:
    return list(messages.extract_media()[0])


def counted(processor, monkeypatch) -> list[int]:
    """Pictures of each call of the image processor, from now on."""
    own, calls = processor.image_processor, []

    class Counting(type(own)):
        def __call__(self, images, **kwargs):
            calls.append(sum(len(row) if isinstance(row, list) else 1 for row in images))
            return super().__call__(images, **kwargs)

    monkeypatch.setattr(own, "__class__", Counting)
    return calls


def test_equal_pictures_are_one_object_and_different_ones_are_not():
    pictures = Pictures()
    turned, faded, see_through = picture(1), picture(1, "P"), picture(1, "P")
    turned.info["exif"] = b"Exif"
    faded.putpalette([value // 2 for value in faded.getpalette()])
    see_through.info["transparency"] = 3
    drawn = [picture(1), picture(2), picture(1), turned, picture(1, "L"), picture(1, "L"), picture(1, "RGBA")]
    asked = [shown(one) for one in (*drawn, picture(1, "P"), faded, see_through)]
    names = [pictures.read(messages) for messages in asked]
    assert all(whole for _, whole in names)
    first, second, again, other, gray, same_gray, *more = (images(messages)[0] for messages in asked)
    assert again is first
    assert same_gray is gray
    assert len({id(one) for one in (first, second, other, gray, *more)}) == 8 == len({name for name, _ in names})
    by_path = shown("a path")
    assert pictures.read(by_path) == (("a path",), True)
    assert images(by_path)[0] == "a path"


def test_pictures_too_large_to_lie_in_one_piece_are_compared_too():
    large = [Image.new("RGB", (2200, 2100), color) for color in ("red", "blue")]
    asked = [shown(one) for one in (*large, large[0].copy())]
    pictures = Pictures()
    assert all(pictures.read(messages)[1] for messages in asked)
    assert [images(messages)[0] is large[0] for messages in asked] == [True, False, True]


def test_only_what_there_is_room_for_is_kept_and_all_have_names():
    pictures = Pictures(pixels=2 * 144)
    late = shown(picture(3))
    own = images(late)[0]
    assert [pictures.read(shown(picture(number)))[1] for number in (1, 2)] == [True, True]
    name, whole = pictures.read(late)
    assert not whole
    assert images(late)[0] is own
    assert pictures.read(shown(picture(3)))[0] == name
    assert pictures.read(shown(picture(1), picture(2)))[1]  # needs no room


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inputs_are_those_of_the_processor_alone(family):
    processor = family_processor(family)
    processor.tokenizer.padding_side = "left"
    image = "" if family == "instructblip" else placeholder(family)
    pictures = Pictures()
    # Equal pictures in one batch and in two; one in another mode; several sizes, which some processors pad or cut up.
    drawn = [[picture(n) for n in (1, 2, 1)], [picture(3, side=20), picture(2), picture(4, "L")], [picture(1)]]
    names = [[pictures.read(shown(one))[0] for one in batch] for batch in drawn]
    for batch, named in zip(drawn, names, strict=True):
        texts = [f"{image} USER: What color is the {word} ?" for word in ("red", "blue circle", "square")[: len(batch)]]
        rows = [[one] for one in batch]
        expected = encode(processor, texts, rows)
        with pictures.reused(processor, rows, named):
            found = encode(processor, texts, rows)
        assert set(found) == set(expected)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=0, atol=0)


@pytest.mark.parametrize("pixels", [10_000, 0], ids=["kept", "read again"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_picture_is_preprocessed_once_and_let_go_after_its_last_question(monkeypatch, family, pixels):
    processor = family_processor(family)
    processor.tokenizer.padding_side = "left"
    calls = counted(processor, monkeypatch)
    pictures = Pictures(pixels)
    numbers = (1, 2, 1, 2, 3, 1)
    names = [pictures.read(shown(picture(number)))[0] for number in numbers]
    for start in range(0, 6, 2):
        rows = [[picture(number)] for number in numbers[start : start + 2]]
        with pictures.reused(processor, rows, names[start : start + 2]):
            encode(processor, [f"{placeholder(family)} red ?"] * 2, rows)
    assert calls == [2, 1]  # 1 and 2; nothing; 3
    assert not len(pictures._ready)


@pytest.mark.parametrize(
    ("made", "pictures"),
    [
        ({"pixel_values": torch.zeros(5, 3)}, 4),  # tiles
        ({"pixel_values": torch.zeros(4, 3), "image_sizes": torch.ones(4, 2)}, 4),
        ({"pixel_values": [torch.zeros(3)] * 4}, 4),
        ({"pixel_values": torch.zeros(8, 3), "image_grid_thw": torch.ones(4, 3, dtype=torch.long)}, 4),
        ({"image_grid_thw": torch.ones(4, 3, dtype=torch.long)}, 4),
        ({}, 4),
    ],
)
def test_what_cannot_be_told_apart_by_picture_is_not(made, pictures):
    assert by_picture(made, pictures) is None


def test_taken_apart_and_joined_again_in_another_order():
    grids = torch.tensor([[1, 1, 2], [1, 2, 2], [1, 1, 1]])
    made = {"pixel_values": torch.arange(7.0)[:, None], "image_grid_thw": grids}
    parts = by_picture(made, 3)
    together = joined([parts[2], parts[0], parts[2]])
    assert together["pixel_values"].flatten().tolist() == [6, 0, 1, 6]
    assert torch.equal(together["image_grid_thw"], grids[[2, 0, 2]])


def test_without_room_for_its_values_a_picture_is_preprocessed_again(monkeypatch):
    processor = family_processor("llava")
    processor.tokenizer.padding_side = "left"
    calls = counted(processor, monkeypatch)
    pictures = Pictures(values=0)
    asked = [shown(picture(1)) for _ in range(2)]
    names = [pictures.read(messages)[0] for messages in asked]
    for messages, named in zip(asked, names, strict=True):
        with pictures.reused(processor, [images(messages)], [named]):
            encode(processor, ["<image> red ?"], [images(messages)])
    assert calls == [1, 1]


def test_a_failing_processor_is_left_as_it_was():
    processor = family_processor("llava")
    own = processor.image_processor
    with pytest.raises(ValueError, match="image"), Pictures().reused(processor, [["no picture"]], [("no picture",)]):
        processor(text=["red ?"], images=[["no picture"]])
    assert processor.image_processor is own
