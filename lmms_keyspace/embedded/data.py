"""What the bundled model is trained on: pictures of the ``train`` space and the sentences said about them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from lmms_keyspace import scenes
from lmms_keyspace.embedded.architecture import EOS_ID, GRID, PAD_ID, turn
from lmms_keyspace.scenes import Item

BLANK = -1  # index of the blank picture
NAMELESS = 40.0  # least RGB distance of a color without a name to every named one


@dataclass(frozen=True)
class Mixture:
    """Shares of what a stage trains on; the rest of the picture samples carry a question alone.

    ``text`` is the share of turns without a picture, ``hint`` and ``irrelevant`` the shares of picture samples with
    such a sentence (hints always name the right answer), ``picture_last`` the share with the text before the picture,
    ``letters`` the share of samples that offer options and want a letter. ``wrong_picture`` is the share of picture
    samples that show another scene of the same family, as noisy pairs of pictures and texts do. ``drill`` is the share
    of the turns without a picture that are a `letter_drill` instead. ``blank`` is the share of plain questions that
    show the blank picture and want any word of the pool, so that the model guesses there and does not say nonsense.
    """

    text: float
    hint: float
    irrelevant: float
    picture_last: float
    letters: float
    wrong_picture: float
    drill: float
    blank: float


@dataclass(frozen=True)
class Sample:
    """One training turn: ``prompt`` up to the answer, ``answer``, and the index of its picture if it has one.

    The last picture of a training set is the blank one, hence index `BLANK`.
    """

    prompt: str
    answer: str
    picture: int | None


def train_items(n: int, seed: int) -> list[Item]:
    """``n`` items of the ``train`` space, the families in turn.

    Four in five of those whose answer is not a color wear a color without a name. The vision encoder learns shapes from
    these alone (see `patch_targets`): named colors go with some shapes only, and it would learn which.
    """
    items = []
    for i in range(n):
        r = scenes.rng("train", "scene", seed, i)
        item = scenes.draw_item(scenes.CORE_FAMILIES[i % len(scenes.CORE_FAMILIES)], r, space="train")
        recolored = item.pool is not scenes.COLORS and r.random() < 0.8
        items.append(_recolored(item, r) if recolored else item)
    return items


def _recolored(item: Item, r: random.Random) -> Item:
    level = item.spec["background"]
    while True:
        rgb = [r.randint(0, 255) for _ in range(3)]
        distance = min(math.dist(rgb, named) for named in scenes.PALETTE.values())
        if distance >= NAMELESS and max(rgb) >= level + 80:
            things = [thing | {"rgb": rgb} for thing in item.spec["objects"]]
            return replace(item, spec=item.spec | {"objects": things})


def pixels(items: list[Item], processor: LlavaProcessor) -> Tensor:
    """Model-ready pictures of the items, [n, 3, 48, 48] float32."""
    chunks = [
        _model_ready([scenes.render(item.spec) for item in items[start : start + 500]], processor)
        for start in range(0, len(items), 500)
    ]
    return torch.cat(chunks)


def with_blank(pixel_values: Tensor, processor: LlavaProcessor) -> Tensor:
    """The pictures and behind them the blank one."""
    return torch.cat([pixel_values, _model_ready([scenes.blank()], processor)])


def _model_ready(pictures: list[Image.Image], processor: LlavaProcessor) -> Tensor:
    values: Tensor = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return values


def caption(item: Item) -> str:
    """A true description of the item's scene that holds the answer to its question."""
    things = item.spec["objects"]
    first = things[0]
    color, shape = first["color"], first["shape"]
    if item.family == "count":
        noun = shape if len(things) == 1 else scenes.PLURALS[shape]
        return f"The picture shows {item.gold} {color} {noun}."
    if item.family == "position":
        return f"The picture shows one {color} {shape} near the {item.gold} edge."
    if item.family == "size":
        return f"The picture shows one larger {color} {shape} and one smaller {things[1]['color']} {shape}."
    return f"The picture shows one {color} {shape}."


def text_sample(item: Item, mixture: Mixture, r: random.Random) -> Sample:
    """A turn without a picture: the answer follows from a caption, or from a hint, which may name any value.

    An irrelevant sentence stands beside some captions, so the decoder learns to read whom a sentence speaks of.
    """
    template = r.randrange(scenes.N_TEMPLATES)
    kind = r.random()
    answer = r.choice(item.pool) if kind < 0.4 else item.gold
    options = _options(item, answer, r) if r.random() < mixture.letters else None
    if kind < 0.4:
        context = scenes.hint(item, answer, template)
    elif kind < 0.6:
        context = caption(item)
    elif kind < 0.8:
        context = f"{caption(item)} {scenes.irrelevant(item, r, template, avoid=options or ())}"
    else:
        context = f"{caption(item)} {scenes.hint(item, item.gold, template)}"
    text = scenes.prompt(item.question, context=context, options=options)
    return Sample(turn(text, picture=False), _reply(answer, options), None)


def picture_sample(items: list[Item], index: int, mixture: Mixture, r: random.Random) -> Sample:
    """A question about picture ``index``, alone or after a true hint or an irrelevant sentence."""
    item = items[index]
    template = r.randrange(scenes.N_TEMPLATES)
    kind = r.random()
    options = _options(item, item.gold, r) if r.random() < mixture.letters else None
    context = ""
    if kind < mixture.hint:
        context = scenes.hint(item, item.gold, template)
    elif kind < mixture.hint + mixture.irrelevant:
        context = scenes.irrelevant(item, r, template, avoid=options or ())
    text = scenes.prompt(item.question, context=context, options=options)
    prompt = turn(text, picture=True, picture_last=r.random() < mixture.picture_last)
    if r.random() < mixture.wrong_picture:
        index = r.randrange(index % len(scenes.CORE_FAMILIES), len(items), len(scenes.CORE_FAMILIES))
    if mixture.blank and not context and options is None and r.random() < mixture.blank:
        return Sample(prompt, _reply(r.choice(item.pool), None), BLANK)
    return Sample(prompt, _reply(item.gold, options), index)


def letter_drill(item: Item, r: random.Random) -> Sample:
    """Options and then each option's word and letter, twice over, in random order.

    Finding the letter before a word takes two attention layers that help only together; a question that pays for it
    once, at its end, does not bring them about in a thousand steps.
    """
    options = r.sample(item.pool, 4)
    asked = options * 2
    r.shuffle(asked)
    listed = scenes.prompt(item.question, options=options).rsplit("\n", 1)[0]
    return Sample(f"{listed}\n", " ".join(f"{word} {'ABCD'[options.index(word)]}" for word in asked), None)


def _options(item: Item, answer: str, r: random.Random) -> list[str]:
    """Four options in random order, ``answer`` among them."""
    options = [answer, *r.sample([word for word in item.pool if word != answer], 3)]
    r.shuffle(options)
    return options


def _reply(answer: str, options: list[str] | None) -> str:
    return f" {answer if options is None else 'ABCD'[options.index(answer)]}"


def batches(items: list[Item], mixture: Mixture, size: int, r: random.Random) -> Iterator[list[Sample]]:
    """Endless batches of ``size``, each all with or all without pictures, of similar length to save padding."""
    while True:
        groups: dict[bool, list[Sample]] = {True: [], False: []}
        for _ in range(size * 16):
            index = r.randrange(len(items))
            if r.random() < mixture.text:
                item = items[index]
                drilled = r.random() < mixture.drill
                groups[False].append(letter_drill(item, r) if drilled else text_sample(item, mixture, r))
            else:
                groups[True].append(picture_sample(items, index, mixture, r))
        ready = []
        for group in groups.values():
            del group[len(group) // size * size :]  # before sorting: after it, the longest would always be lost
            group.sort(key=lambda sample: len(sample.prompt) + len(sample.answer))
            ready += [group[i : i + size] for i in range(0, len(group), size)]
        r.shuffle(ready)
        yield from ready


def encode(samples: list[Sample], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded token ids of prompt and answer, the mask of real tokens, and the mask of answer tokens, all [n, t].

    The end-of-sequence token closes the answer and belongs to it.
    """
    whole = tokenizer([sample.prompt + sample.answer for sample in samples]).input_ids
    prompts = tokenizer([sample.prompt for sample in samples]).input_ids
    longest = max(map(len, whole)) + 1
    ids = torch.full((len(samples), longest), PAD_ID)
    real = torch.zeros(len(samples), longest, dtype=torch.bool)
    answer = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, (tokens, prefix) in enumerate(zip(whole, prompts, strict=True)):
        end = len(tokens) + 1
        ids[row, :end] = torch.tensor([*tokens, EOS_ID])
        real[row, :end] = True
        answer[row, len(prefix) : end] = True
    return ids, real, answer


def nameless_copies(items: list[Item], seed: int) -> list[Item]:
    """The color items once more in colors without a name: more shapes for the vision encoder to learn from."""
    return [
        _recolored(item, scenes.rng("train", "copy", seed, i)) for i, item in enumerate(items) if item.family == "color"
    ]


def patch_targets(items: list[Item], *, named_shapes: bool) -> dict[str, Tensor]:
    """Dense targets of every image patch, each [n, 16]; -100 where a target has no meaning.

    ``color`` and ``size`` belong to the object that covers most of the patch (0 where none covers a twelfth of it).
    ``shape`` (one for all objects of a picture), ``count`` and ``edge`` belong to the whole picture and are asked of
    every patch. Without ``named_shapes`` the shape is asked of pictures in colors without a name only.
    """
    names = ("color", "shape", "size", "count", "edge")
    targets = {name: np.zeros((len(items), GRID * GRID), dtype=np.int64) for name in names}
    side = scenes.CANVAS / GRID
    corner = np.arange(GRID) * side
    for i, item in enumerate(items):
        things = item.spec["objects"]
        named = math.dist(things[0]["rgb"], scenes.PALETTE[things[0]["color"]]) < NAMELESS
        best = np.full(GRID * GRID, side * side / 12)
        for thing in things:
            low = {axis: thing[axis] - thing["radius"] for axis in "xy"}
            high = {axis: thing[axis] + thing["radius"] for axis in "xy"}
            overlap = [
                np.clip(np.minimum(corner + side, high[axis]) - np.maximum(corner, low[axis]), 0, None) for axis in "yx"
            ]
            covered = np.outer(*overlap).ravel()
            mine = covered > best
            best = np.maximum(best, covered)
            targets["color"][i, mine] = 1 + scenes.COLORS.index(thing["color"]) if named else -100
            targets["size"][i, mine] = 1 + (thing["radius"] > 40) + (thing["radius"] > 58)
        targets["shape"][i] = scenes.SHAPES.index(things[0]["shape"]) if named_shapes or not named else -100
        targets["count"][i] = len(things) - 1
        targets["edge"][i] = scenes.POSITIONS.index(item.gold) if item.family == "position" else -100
    return {name: torch.from_numpy(values) for name, values in targets.items()}
