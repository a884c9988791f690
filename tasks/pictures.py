"""The pictures of the probes, each drawn from a short recipe: the scene itself, and what stands in its place.

Every picture has the scene's size, so that all conditions have equally many image tokens.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lmms_keyspace import scenes
from lmms_keyspace.tasks.rich import rendering

SCENE, GRAY, NOISE, SHUFFLED, NO_IMAGE = KINDS = ("scene", "blank", "noise", "shuffled", "none")
PATCH = 28  # pixels, the side of a patch that SHUFFLED moves: 12 x 12 patches, each two ViT patches wide

_FONT_SIZE = 30  # pixels
_LABEL = (150, 44)  # pixels; as wide as the longest word needs, so that every word has the same label


def picture(kind: str, spec: str) -> Image.Image | None:
    """The picture of a document, or None where the condition takes it away.

    Args:
        kind: one of `KINDS`.
        spec: JSON of the scene; `written`, a word to be written on it, and `seed`, of NOISE and SHUFFLED, are optional.
    """
    if kind == NO_IMAGE:
        return None
    if kind == GRAY:
        return scenes.blank()
    if kind == NOISE:
        return _noise(json.loads(spec)["seed"])
    scene = _rendered(spec).copy()
    return _shuffled(scene, json.loads(spec)["seed"]) if kind == SHUFFLED else scene


def sha(kind: str, spec: dict[str, Any]) -> str:
    """sha256 of what is drawn: of the recipe for a kind of picture; empty without a picture."""
    if kind == NO_IMAGE:
        return ""
    if kind in (GRAY, NOISE):
        spec = {"canvas": scenes.CANVAS, "image": kind} | ({"seed": spec["seed"]} if kind == NOISE else {})
    elif kind == SHUFFLED:
        spec = {**spec, "image": kind}
    return scenes.spec_sha(spec)


@lru_cache(maxsize=16)  # the conditions of a group follow one another and show the same scene
def _rendered(text: str) -> Image.Image:
    spec = json.loads(text)
    if "rich" in spec:
        return rendering.render(spec)
    scene = scenes.render(spec)
    if "written" in spec:
        _write(scene, spec["written"], spec["objects"])
    return scene


def _noise(seed: int) -> Image.Image:
    side = scenes.CANVAS
    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))


def _shuffled(scene: Image.Image, seed: int) -> Image.Image:
    corners = [(x, y) for y in range(0, scenes.CANVAS, PATCH) for x in range(0, scenes.CANVAS, PATCH)]
    taken = random.Random(seed).sample(corners, len(corners))
    out = Image.new("RGB", scene.size)
    for (x, y), corner in zip(taken, corners, strict=True):
        out.paste(scene.crop((x, y, x + PATCH, y + PATCH)), corner)
    return out


def _write(scene: Image.Image, word: str, objects: list[dict[str, Any]]) -> None:
    """Black on a white label, where it hides least of the objects: of one scene the same place for every word."""
    width, height = _LABEL
    places = [
        (x, y)
        for y in range(4, scenes.CANVAS - height - 3, 8)
        for x in (4, (scenes.CANVAS - width) // 2, scenes.CANVAS - width - 4)
    ]
    x, y = min(places, key=lambda place: sum(_overlap(place, thing) for thing in objects))
    draw = ImageDraw.Draw(scene)
    draw.rectangle((x, y, x + width, y + height), fill="white", outline="black", width=2)
    font = ImageFont.load_default(_FONT_SIZE)
    draw.text((x + width / 2, y + height / 2), word, font=font, fill="black", anchor="mm")


def _overlap(corner: tuple[int, int], thing: dict[str, Any]) -> int:
    """Pixels of a label inside the square around an object."""
    across, down = (
        min(start + length, thing[axis] + thing["radius"]) - max(start, thing[axis] - thing["radius"])
        for start, length, axis in zip(corner, _LABEL, "xy", strict=True)
    )
    return int(max(0, across) * max(0, down))
