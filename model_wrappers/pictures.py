"""Pictures of which a run asks several questions: kept once, and made ready for the model once.

Every probe shows a picture under several conditions, and many benchmarks ask several questions about one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import pyarrow as pa
import xxhash
from lmms_eval.protocol import ChatMessages
from PIL import Image
from transformers import BatchFeature

from lmms_keyspace.model_wrappers.kept import Kept, Made, by_picture, joined

# Pixels that are kept from reading the prompts to answering them (200 MB): drawing or decoding them again takes as long
# as a small model's forward pass.
KEPT_PIXELS = 1 << 26
# Numbers that are kept of pictures that will be shown again: made ready for the model, and the model's features (256 MB
# each in float32).
KEPT_VALUES = 1 << 26


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
