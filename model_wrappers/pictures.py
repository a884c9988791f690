"""Pictures of which a run asks several questions: kept once, and made ready for the model once.

Every probe shows a picture under several conditions, and many benchmarks ask several questions about one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
import xxhash
from lmms_eval.protocol import ChatMessages
from PIL import Image
from transformers import BatchFeature

# Pixels that are kept from reading the prompts to answering them (200 MB): drawing or decoding them again takes as long
# as a small model's forward pass.
KEPT_PIXELS = 1 << 26
# Numbers that are kept of pictures that will be shown again: made ready for the model, and the model's features (256 MB
# each in float32).
KEPT_VALUES = 1 << 26


# What was made of one picture: named tensors.
Made = Mapping[str, torch.Tensor]


class Kept:
    """What was made of pictures, kept while requests wait that will show them, as far as there is room.

    Args:
        values: numbers that there is room for.
    """

    def __init__(self, values: int) -> None:
        self._room = values
        self._waiting: Counter[int] = Counter()  # id of a picture -> requests that will still show it
        self._made: dict[int, Made] = {}

    def __len__(self) -> int:
        return len(self._made)

    def expect(self, picture: object) -> None:
        """One request more will show a picture, which must live until then."""
        self._waiting[id(picture)] += 1

    def repeated(self, shown: Iterable[object]) -> bool:
        """Whether a picture of a batch is in it twice, was shown before or will be shown later."""
        return any(self._waiting[name] > 1 or name in self._made for name in map(id, shown))

    def of(self, shown: Sequence[object], make: Callable[[list[Any]], Sequence[Made] | None]) -> list[Made] | None:
        """What was made of each picture of a batch, in order.

        Args:
            make: makes it of the pictures that are not kept, in order; None where it cannot.
        """
        new = list({id(picture): picture for picture in shown if id(picture) not in self._made}.values())
        fresh = make(new) if new else []
        if fresh is None:
            return None
        made = self._made | dict(zip(map(id, new), fresh, strict=True))
        in_order = [made[id(picture)] for picture in shown]
        self._waiting.subtract(map(id, shown))
        for name in set(map(id, shown)):
            if self._waiting[name] > 0:
                self._keep(name, made[name])
            elif name in self._made:
                self._room += _numbers(self._made.pop(name))
        return in_order

    def _keep(self, name: int, made: Made) -> None:
        if name not in self._made and _numbers(made) <= self._room:
            # A part of the batch's tensor would hold all of its memory.
            self._made[name] = {part: values.clone() for part, values in made.items()}
            self._room -= _numbers(made)


def _numbers(made: Made) -> int:
    return sum(values.numel() for values in made.values())


def by_picture(visual: Mapping[str, Any], pictures: int) -> list[Made] | None:
    """An image processor's output for several pictures, apart; None where it is not known which part is of which.

    Known are one entry for each picture and, with `image_grid_thw` `[pictures, 3]`, one for each patch of its grid.
    """
    values, grids = visual.get("pixel_values"), visual.get("image_grid_thw")
    if set(visual) - {"image_grid_thw"} != {"pixel_values"} or not isinstance(values, torch.Tensor):
        return None
    sizes = [1] * pictures if grids is None else grids.prod(-1).tolist()
    if len(sizes) != pictures or sum(sizes) != len(values):
        return None
    parts = [{"pixel_values": part} for part in values.split(sizes)]
    if grids is not None:
        for part, grid in zip(parts, grids.split(1), strict=True):
            part["image_grid_thw"] = grid
    return parts


def joined(parts: Sequence[Made]) -> dict[str, torch.Tensor] | None:
    """What `by_picture` took apart, in any order; None where the pictures do not fit together."""
    if len({part["pixel_values"].shape[1:] for part in parts}) > 1:
        return None
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Pictures:
    """The pictures of one call's requests. Memory is bounded: of a large benchmark only the first are kept.

    Attributes:
        features: what the model makes of them, see `visual_features`.
    """

    def __init__(self, pixels: int = KEPT_PIXELS, values: int = KEPT_VALUES) -> None:
        self._pixels = pixels  # that there is still room for
        self._kept: dict[Hashable, Image.Image] = {}
        self._ready = Kept(values)  # what the image processor makes of them
        self._apart = True  # as far as is known, the image processor's output can be taken apart by picture
        self.features = Kept(values)

    def keep(self, messages: ChatMessages) -> bool:
        """Have equal pictures of several requests be one object; False where there is no room for new ones."""
        parts = [part for message in messages.messages for part in message.content if part.type == "image"]
        shown = [(part, _content(part.url)) for part in parts if isinstance(part.url, Image.Image)]
        new = {content: part.url for part, content in shown if content not in self._kept}
        pixels = sum(picture.width * picture.height for picture in new.values())
        if pixels > self._pixels:
            return False
        self._pixels -= pixels
        self._kept |= new
        for part, content in shown:
            part.url = self._kept[content]
            self._ready.expect(part.url)
            self.features.expect(part.url)
        return True

    @contextlib.contextmanager
    def reused(self, processor: Any) -> Iterator[None]:
        """Inside, the processor takes what its image processor made of a kept picture before."""
        own = processor.image_processor
        if self._apart:
            processor.image_processor = _Reusing(own, self)
        try:
            yield
        finally:
            processor.image_processor = own

    def processed(self, own: Any, images: Any, kwargs: dict[str, Any]) -> Any:
        """`own(images, **kwargs)`, the same numbers, without doing it again for a kept picture.

        Only where the image processor's whole output can be taken apart by picture: no padding to the others of the
        batch, no cutting into tiles.
        """
        shown = [image for row in images for image in (row if isinstance(row, list | tuple) else [row])]
        if not self._apart or not self._ready.repeated(shown):
            return own(images, **kwargs)

        def make(new: list[Any]) -> list[Made] | None:
            return by_picture(own(new, **kwargs), len(new))

        parts = self._ready.of(shown, make)
        self._apart = parts is not None
        together = None if parts is None else joined(parts)
        return own(images, **kwargs) if together is None else BatchFeature(together)


class _Reusing:
    """Stands in for an image processor."""

    def __init__(self, own: Any, pictures: Pictures) -> None:
        self._own, self._pictures = own, pictures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        return self._pictures.processed(self._own, images, kwargs)


def _content(picture: Image.Image) -> Hashable:
    """Equal for pictures that any processor reads alike; a picture in another mode than RGB is equal to itself only."""
    if picture.mode != "RGB":
        return id(picture)
    told = (picture.info.get("exif"), picture.info.get("transparency"))
    return picture.size, xxhash.xxh3_128_digest(_memory(picture)), told


def _memory(picture: Image.Image) -> Any:
    """The picture's pixels where they lie, which is many times faster than writing them out."""
    if hasattr(picture, "__arrow_c_array__"):  # Pillow 11.2.1
        with contextlib.suppress(ValueError):  # a large picture lies in several pieces
            return pa.array(picture).values.buffers()[1]
    return picture.tobytes()
