"""The generator's pictures, drawn again from the recipe in the samples file, small enough to be put into a page."""

from __future__ import annotations

import base64
import io
import json

from lmms_keyspace.errors import InputError

SIDE = 168  # pixels
_MOST_OBJECTS = 64
_LARGEST_CANVAS = 1024


def data_uri(kind: str, spec: str) -> str:
    """`data:image/png;base64,...` of a generated picture; empty where the condition shows none.

    Args:
        kind: what is shown, see `lmms_keyspace.tasks.pictures.KINDS`.
        spec: JSON of the scene.

    Raises:
        InputError: not a recipe of the generator. A samples file may come from anywhere, so its size is bounded too.
    """
    from lmms_keyspace.tasks.pictures import KINDS, picture

    try:
        if kind not in KINDS:
            raise ValueError(f"no picture is of the kind {kind[:20]!r}")
        recipe = json.loads(spec)
        if not (0 < recipe["canvas"] <= _LARGEST_CANVAS and len(recipe.get("objects", ())) <= _MOST_OBJECTS):
            raise ValueError("too large")
        image = picture(kind, spec)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("spec", spec[:60], f"not a recipe of the scene generator: {error}") from error
    if image is None:
        return ""
    buffer = io.BytesIO()
    image.resize((SIDE, SIDE)).quantize(64).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
