"""A scene of the core families in words: what the caption-oracle is told in place of the picture."""

from __future__ import annotations

from typing import Any

from lmms_keyspace import scenes

_LARGE, _SMALL = 60, 42  # pixels of radius


def caption(spec: dict[str, Any]) -> str:
    """Every object with its size, color, shape and nearest edge."""
    described = [
        f"a {size(thing)} {thing['color']} {thing['shape']} near the {edge(thing)} edge" for thing in spec["objects"]
    ]
    return f"The picture shows {', '.join(described[:-1])}{' and ' if len(described) > 1 else ''}{described[-1]}."


def size(thing: dict[str, Any]) -> str:
    """How large an object is: large, medium-sized or small."""
    radius = thing["radius"]
    return "large" if radius >= _LARGE else "small" if radius < _SMALL else "medium-sized"


def edge(thing: dict[str, Any]) -> str:
    """The edge of the canvas that an object is nearest to."""
    side = scenes.CANVAS
    distances = (thing["x"], side - thing["x"], thing["y"], side - thing["y"])
    return min(zip(distances, scenes.POSITIONS, strict=True))[1]
