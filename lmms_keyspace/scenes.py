"""Procedural pictures with one known answer each: the generator of the text bias probe and of the bundled model.

An item is drawn from a named *space* of seeds. The four spaces cannot meet: their random numbers are separated by
sha256, pictures of the ``train`` space have an even background level and all others an odd one, and ``train`` never
draws a (color, shape) pair of `HELD_OUT` while ``heldout`` draws nothing else. ``dev`` and ``probe`` draw every pair.

Questions never name the attribute pair they ask about, so the words of a question say nothing about its answer.
Everything here is Pillow and the standard library: no model, no harness, no download.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from lmms_keyspace.errors import InputError

GENERATOR_VERSION = "1.0.0"
CANVAS = 336  # pixels, square, RGB; the same in every condition
SPACES = ("train", "dev", "probe", "heldout")
CORE_FAMILIES = ("color", "shape", "count", "position", "size")
N_TEMPLATES = 6  # paraphrases of a hint, and as many of the irrelevant sentence

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 222, 45),
    "purple": (145, 60, 190),
    "orange": (242, 136, 25),
    "white": (243, 243, 243),
    "pink": (250, 135, 190),
}
COLORS = tuple(PALETTE)
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "diamond": "diamonds",
    "star": "stars",
}
SHAPES = tuple(PLURALS)
COUNTS = ("one", "two", "three", "four")
POSITIONS = ("left", "right", "top", "bottom")
POOLS: dict[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "count": COUNTS,
    "position": POSITIONS,
    "size": COLORS,
}

# A quarter of the 48 pairs: two of every shape, one or two of every color.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    [(color, SHAPES[i % 6]) for i, color in enumerate(COLORS)] + [(COLORS[i], SHAPES[i + 2]) for i in range(4)]
)

_BACKGROUND = (30, 90)  # gray level of a scene; blank() is the middle of it
_COLOR_JITTER = 12  # per channel, 8-bit levels
_SUPERSAMPLING = 2

_FRAMES = (
    "A note says that {claim}.",
    "According to the caption, {claim}.",
    "Someone wrote that {claim}.",
    "The label says that {claim}.",
    "I was told that {claim}.",
    "It is known that {claim}.",
)
_CLAIMS: dict[str, tuple[str, str]] = {
    "color": ("the {noun} is {value}", "the color of the {noun} is {value}"),
    "shape": ("the {noun} is a {value}", "the shape of the {noun} is a {value}"),
    "count": ("there {verb} {value} {noun}", "the picture has {value} {noun}"),
    "position": ("the {noun} is near the {value} edge", "the {noun} is on the {value} side"),
    "size": ("the larger {noun} is {value}", "the color of the larger {noun} is {value}"),
}
# Things that no picture shows, with words of the same kind as the answers but outside every pool.
_ABSENT: dict[str, tuple[str, ...]] = {
    "color": ("car", "door", "boat", "shirt"),
    "shape": ("sign", "window", "kite", "cake"),
    "count": ("bird", "tree", "cup", "book"),
    "position": ("lamp", "chair", "cat", "clock"),
    "size": ("car", "door", "boat", "shirt"),
}
_OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "color": ("brown", "black"),
    "shape": ("heart", "ring"),
    "count": ("five", "six"),
    "position": ("front", "back"),
    "size": ("brown", "black"),
}


@dataclass(frozen=True)
class Item:
    """One picture with one question.

    ``spec`` holds everything that `render` needs (ints and strings only); ``pool`` all one-word answers to
    ``question``, ``gold`` among them; ``subject`` the noun that the question and its hints speak of.
    """

    family: str
    spec: dict[str, Any]
    question: str
    gold: str
    pool: tuple[str, ...]
    subject: str


def rng(space: str, *key: int | str) -> random.Random:
    """A random stream of its own for every (generator version, space, key). Raises InputError on an unknown space."""
    _check("space", space, SPACES)
    digest = hashlib.sha256(json.dumps([GENERATOR_VERSION, space, *key]).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def draw_item(family: str, r: random.Random, *, space: str, gold: str | None = None) -> Item:
    """Draw an item with the answer ``gold``, by default uniform over the family's pool.

    ``space`` decides which (color, shape) pairs may appear (see the module text); take ``r`` from ``rng(space, ...)``.
    Raises InputError on an unknown family or space, and on a gold that the family does not have.
    """
    _check("family", family, CORE_FAMILIES)
    _check("space", space, SPACES)
    if gold is None:
        gold = r.choice(POOLS[family])
    _check("gold", gold, POOLS[family])
    objects, question, subject = _DRAW[family](gold, r, space)
    level = r.randrange(_BACKGROUND[0], _BACKGROUND[1], 2) + (space != "train")
    spec = {"canvas": CANVAS, "background": level, "objects": objects}
    return Item(family, spec, question, gold, POOLS[family], subject)


def lure(item: Item, r: random.Random) -> str:
    """A wrong answer, uniform over the other words of the pool."""
    return r.choice([word for word in item.pool if word != item.gold])


def render(spec: dict[str, Any]) -> Image.Image:
    """The RGB picture of a spec, ``CANVAS`` pixels square; the same spec gives the same pixels."""
    side = spec["canvas"] * _SUPERSAMPLING
    level = spec["background"]
    image = Image.new("RGB", (side, side), (level, level, level))
    draw = ImageDraw.Draw(image)
    for thing in spec["objects"]:
        x, y, radius = (thing[name] * _SUPERSAMPLING for name in ("x", "y", "radius"))
        fill = tuple(thing["rgb"])
        if thing["shape"] == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            draw.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[thing["shape"]]], fill=fill)
    return image.reduce(_SUPERSAMPLING)


def blank() -> Image.Image:
    """The picture that shows nothing: uniform gray, the size of every other picture."""
    level = sum(_BACKGROUND) // 2
    return Image.new("RGB", (CANVAS, CANVAS), (level, level, level))


def hint(item: Item, value: str, template: int) -> str:
    """A sentence which states that the answer to ``item`` is ``value``, true or false.

    ``template`` is one of ``range(N_TEMPLATES)``; anything else raises InputError.
    """
    return framed(claim(item, value, template), template)


def claim(item: Item, value: str, template: int) -> str:
    """What `hint` states, without the words that say who states it."""
    return _claim(item.family, item.subject, value, template)


def framed(claim: str, template: int) -> str:
    """A claim in the words of `hint`; raises InputError where ``template`` is not one of ``range(N_TEMPLATES)``."""
    if template not in range(N_TEMPLATES):
        raise InputError("template", template, f"take a number from 0 to {N_TEMPLATES - 1}")
    return _FRAMES[template].format(claim=claim)


def irrelevant(item: Item, r: random.Random, template: int, *, avoid: Collection[str] = ()) -> str:
    """The hint's sentence said of a thing that the picture does not show.

    Its word is of the answer's kind but neither gold nor in ``avoid`` (pass the lure and the options).
    """
    words = POOLS[item.family] + _OTHER_WORDS[item.family]
    value = r.choice([word for word in words if word != item.gold and word not in avoid])
    return framed(_claim(item.family, r.choice(_ABSENT[item.family]), value, template), template)


def prompt(question: str, *, context: str = "", options: Sequence[str] | None = None) -> str:
    """The text of a user turn: context sentence, question, and how to answer (one word, or an option's letter)."""
    lines = [f"{context} {question}" if context else question]
    if options is None:
        lines.append("Answer with one word.")
    else:
        lines += [f"{letter}. {option}" for letter, option in zip("ABCDEFGH", options, strict=False)]
        lines.append("Answer with the letter of the option.")
    return "\n".join(lines)


def spec_sha(spec: dict[str, Any]) -> str:
    """sha256 of a spec in canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(argument, value, f"take one of {', '.join(allowed)}")


def _claim(family: str, noun: str, value: str, template: int) -> str:
    claims = _CLAIMS[family]
    if family == "count" and value != "one":
        noun = PLURALS.get(noun, noun + "s")
    return claims[template % len(claims)].format(noun=noun, value=value, verb="is" if value == "one" else "are")


def _allowed(color: str, shape: str, space: str) -> bool:
    if space == "train":
        return (color, shape) not in HELD_OUT
    return space != "heldout" or (color, shape) in HELD_OUT


def _shape_for(color: str, r: random.Random, space: str) -> str:
    return r.choice([shape for shape in SHAPES if _allowed(color, shape, space)])


def _color_for(shape: str, r: random.Random, space: str, but: str = "") -> str:
    return r.choice([color for color in COLORS if color != but and _allowed(color, shape, space)])


def _thing(color: str, shape: str, x: int, y: int, radius: int, r: random.Random) -> dict[str, Any]:
    jitter = [r.randint(-_COLOR_JITTER, _COLOR_JITTER) for _ in range(3)]
    rgb = [min(255, max(0, level + shift)) for level, shift in zip(PALETTE[color], jitter, strict=True)]
    return {"color": color, "shape": shape, "x": x, "y": y, "radius": radius, "rgb": rgb}


def _anywhere(color: str, shape: str, r: random.Random) -> list[dict[str, Any]]:
    radius = r.randint(58, 90)
    x, y = (r.randint(radius + 4, CANVAS - radius - 4) for _ in range(2))
    return [_thing(color, shape, x, y, radius, r)]


_Drawn = tuple[list[dict[str, Any]], str, str]  # objects, question, subject


def _draw_color(gold: str, r: random.Random, space: str) -> _Drawn:
    return _anywhere(gold, _shape_for(gold, r, space), r), "What color is the object?", "object"


def _draw_shape(gold: str, r: random.Random, space: str) -> _Drawn:
    return _anywhere(_color_for(gold, r, space), gold, r), "What shape is the object?", "object"


def _draw_count(gold: str, r: random.Random, space: str) -> _Drawn:
    color = r.choice(COLORS)
    shape = _shape_for(color, r, space)
    radius = r.randint(44, 58)
    cell = CANVAS // 2
    objects: list[dict[str, Any]] = []
    for place in sorted(r.sample(range(4), COUNTS.index(gold) + 1)):  # one object per quadrant: never touching
        x, y = (corner + r.randint(radius + 6, cell - radius - 6) for corner in (place % 2 * cell, place // 2 * cell))
        objects.append(_thing(color, shape, x, y, radius, r) | ({"rgb": objects[0]["rgb"]} if objects else {}))
    return objects, f"How many {PLURALS[shape]} are there?", shape


def _draw_position(gold: str, r: random.Random, space: str) -> _Drawn:
    color = r.choice(COLORS)
    shape = _shape_for(color, r, space)
    radius = r.randint(44, 58)
    near, across = radius + r.randint(3, 18), CANVAS // 2 + r.randint(-40, 40)
    if gold in ("right", "bottom"):
        near = CANVAS - near
    x, y = (near, across) if gold in ("left", "right") else (across, near)
    return [_thing(color, shape, x, y, radius, r)], f"Which edge is the {shape} nearest to?", shape


def _draw_size(gold: str, r: random.Random, space: str) -> _Drawn:
    shape = _shape_for(gold, r, space)
    other = _color_for(shape, r, space, but=gold)
    half, swap, turn = CANVAS // 4, r.random() < 0.5, r.random() < 0.5
    objects: list[dict[str, Any]] = []
    for i, (color, radius) in enumerate(((gold, r.randint(70, 80)), (other, r.randint(30, 38)))):
        along = half if (i == 0) != swap else CANVAS - half
        across = r.randint(radius + 4, CANVAS - radius - 4)
        x, y = (across, along) if turn else (along, across)
        objects.append(_thing(color, shape, x, y, radius, r))
    return objects, "What color is the larger object?", "object"


_DRAW: dict[str, Callable[[str, random.Random, str], _Drawn]] = {
    "color": _draw_color,
    "shape": _draw_shape,
    "count": _draw_count,
    "position": _draw_position,
    "size": _draw_size,
}


def _star() -> list[tuple[float, float]]:
    turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(math.cos(a) * s, math.sin(a) * s) for a, s in zip(turns, (1.0, 0.45) * 5, strict=True)]


# Polygons in the unit square [-1, 1]^2, y downward.
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
    "star": _star(),
}
