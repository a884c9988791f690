"""Every architecture with its own processor: prompts with no, one and two images, labels, keys and attention."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from models import IMAGE, family_model, family_processor, picture, placeholder
from PIL import Image

from lmms_keyspace.capture import Capture, Row
from lmms_keyspace.families import FAMILIES, decoder_sites
from lmms_keyspace.model_wrappers.encoding import encode
from lmms_keyspace.records import ALL_HEADS, SEGMENTS, SPECIAL, TEMPLATE, TEXT, VISUAL
from lmms_keyspace.sampling import Sampler
from lmms_keyspace.tokens import Labeler, Prompt

SAMPLER = Sampler(seed=3, clusters=100, tokens=3)
# {image} is where an image stands; the words before and after it differ in number, so rows are padded.
TEXTS = {
    "no image": "USER: What color is w1 w2 ? ASSISTANT:",
    "image first": "{image} \n USER: What is it ?",
    "image in the middle": "USER: w1 w2 w3 {image} w4 w5 ?",
    "text before the image": "USER: What color is the red circle in it ? {image}",
    "two images": "USER: {image} \n w1 {image} is w2 ?",
}
# Image tokens of a picture of 12 x 8 and of 8 x 16 pixels (width x height).
IMAGE_TOKENS = {
    "llava": (4, 4),
    "llava_phi3": (4, 4),
    "llava_next": (14, 16),
    "llava_onevision": (14, 16),
    "internvl": (4, 12),
    "gemma3": (4, 4),
    "idefics2": (4, 4),
    "idefics3": (20, 12),
    "smolvlm": (20, 12),
    "instructblip": (4, 4),
}
NAMES = [*FAMILIES, "llava_phi3"]


def documents(family: str) -> tuple[list[Prompt], list[list[Image.Image]]]:
    texts = TEXTS
    if family == "instructblip":  # shows one image, always, before the text
        texts = {"short": "USER: What is it ?", "long": "USER: w1 w2 w3 w4 w5 What is it ?"}
    prompts, images = [], []
    for number, text in enumerate(texts.values()):
        shown = [picture(number + place) for place in range(text.count("{image}") or family == "instructblip")]
        filled = text.format(image=placeholder(family))
        prompts.append(Prompt("toy", number, f"c{number}", "default", filled))
        images.append(shown)
    return prompts, images


def make_rows(family: str, prompts: list[Prompt], images, inputs) -> list[Row]:
    processor, decoder = family_processor(family), decoder_sites(family_model(family))
    labeler = Labeler(processor.tokenizer, decoder.image_token_id, placeholder_id=decoder.placeholder_id).fit(prompts)
    grids, shown, rows = decoder.image_grids(inputs), 0, []
    for line, prompt in enumerate(prompts):
        ids = inputs["input_ids"][line][inputs["attention_mask"][line].bool()].numpy()
        own = None if grids is None else grids[shown : shown + len(images[line])]
        shown += len(images[line])
        labels = labeler.label(prompt, ids, own)
        rows.append(Row(prompt, ids, labels, SAMPLER.choose_positions("toy", prompt.cluster, labels)))
    return rows


@cache
def captured(family: str):
    """Inputs, rows and the finished capture of all documents in one batch."""
    prompts, images = documents(family)
    inputs = encode(family_processor(family), [prompt.text for prompt in prompts], images)
    rows = make_rows(family, prompts, images, inputs)
    model = family_model(family)
    capture = Capture(model, decoder_sites(model), spaces=("k_pre", "k_post", "q", "v"))
    with capture.batch(rows), torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return inputs, rows, capture


@pytest.mark.parametrize("family", NAMES)
def test_image_tokens_are_those_of_the_processors_arithmetic(family):
    """The model itself refuses another number of image tokens than it has features."""
    inputs, rows, _ = captured(family)
    _, images = documents(family)
    assert (inputs["attention_mask"].diff(dim=1) >= 0).all()
    sizes = [(shown.height, shown.width) for row in images for shown in row]
    if family in IMAGE_TOKENS:
        expected = [IMAGE_TOKENS[family][height > width] for height, width in sizes]
    else:  # one token per 8 by 8 pixels, rounded by the processor
        arithmetic = family_processor(family)._get_num_multimodal_tokens(image_sizes=sizes)
        expected = list(arithmetic.num_image_tokens)
        if family == "mistral3":  # counts the break after each row too
            expected = [count - height // 8 for count, (height, _) in zip(expected, sizes, strict=True)]
    for row, shown in zip(rows, images, strict=True):
        own, expected = expected[: len(shown)], expected[len(shown) :]
        if family == "llava_onevision" and len(shown) > 1:  # cuts no tiles then: 4 tokens and a line break each
            own = [5] * len(shown)
        labels = row.labels
        assert labels.counts().get(VISUAL, 0) == sum(own)
        assert np.array_equal(labels.modality == VISUAL, row.input_ids == IMAGE)
        index = labels.image_index[labels.modality == VISUAL]
        assert np.array_equal(index, np.repeat(np.arange(len(shown)), own))


@pytest.mark.parametrize("family", NAMES)
def test_words_are_text_and_what_surrounds_an_image_is_special(family):
    _, rows, _ = captured(family)
    tokenizer = family_processor(family).tokenizer
    for row in rows:
        words = [
            token for token in row.prompt.text.replace("?", " ?").split() if token not in tokenizer.added_tokens_encoder
        ]
        bare = placeholder(family)
        words = [word for word in words if bare not in word]
        tokens = np.array(tokenizer.convert_ids_to_tokens(row.input_ids.tolist()))
        assert tokens[(row.labels.modality == TEXT) & (tokens != "\n")].tolist() == words
        added = np.isin(tokens, [*(set(tokenizer.added_tokens_encoder) - {"<image>", "<s>"})])
        assert (row.labels.modality[added] == SPECIAL).all()


@pytest.mark.parametrize("family", NAMES)
def test_attention_mass_is_that_of_eager_attention(family):
    inputs, rows, capture = captured(family)
    eager = family_model(family, "eager")
    with torch.inference_mode():
        outputs = eager(**inputs, output_attentions=True)
    outputs = getattr(outputs, "language_model_outputs", outputs)
    weights = [layer for layer in outputs.attentions if layer is not None]
    table = capture.attention_table().set_index(["doc_id", "layer", "head_group"])
    width = inputs["input_ids"].shape[1]
    for line, row in enumerate(rows):
        for layer, weight in zip(capture.layers, weights, strict=True):
            last = weight[line, :, -1, width - row.input_ids.size :].numpy()
            for group, heads in ((ALL_HEADS, last), ("0", last[:2]), ("1", last[2:])):  # two query heads a KV head
                for segment in SEGMENTS:
                    expected = heads.mean(0)[row.labels.segment == segment].sum()
                    assert table.loc[(line, layer, group), f"mass_{segment}"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", NAMES)
def test_keys_do_not_depend_on_the_padding(family):
    """Each document alone gives the keys that it gave in the batch; k_post differs where RoPE counts padding."""
    _, _, together = captured(family)
    prompts, images = documents(family)
    model = family_model(family)
    alone = Capture(model, decoder_sites(model), spaces=("k_pre", "v"))
    for prompt, shown in zip(prompts, images, strict=True):
        inputs = encode(family_processor(family), [prompt.text], [shown])
        with alone.batch(make_rows(family, [prompt], [shown], inputs)), torch.inference_mode():
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
    identity = ["doc_id", "position", "modality", "token_id", "position_t", "position_h", "position_w", "image_index"]
    assert alone.token_table()[identity].equals(together.token_table()[identity])
    assert set(together.token_table()["modality"]) - set(TEMPLATE) == {VISUAL, TEXT}
    for layer in together.layers:
        for space in ("k_pre", "v"):
            expected = together.keys("toy", space=space, layer=layer)[0]
            torch.testing.assert_close(alone.keys("toy", space=space, layer=layer)[0], expected, atol=1e-4, rtol=1e-4)
