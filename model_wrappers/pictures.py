"""Pictures of which a run asks several questions: kept once, and made ready for the model once.

Every probe shows a picture under several conditions, and many benchmarks ask several questions about one. A picture is
named by its content, so that it is known again when a task reads it anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
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
    """The pictures of one call's requests. Memory is bounded.

    Attributes:
        features: what the model makes of them, see `visual_features`.
    """

    def __init__(self, pixels: int = KEPT_PIXELS, values: int = KEPT_VALUES) -> None:
        self._pixels = pixels  # that there is still room for
        self._kept: dict[Hashable, Image.Image] = {}
        self._ready = Kept(values)  # what the image processor makes of them
        self._apart = True  # as far as is known, the image processor's output can be taken apart by picture
        self.features = Kept(values)

    def read(self, messages: ChatMessages) -> tuple[tuple[Hashable, ...], bool]:
        """Names of a request's pictures, in order, and whether all are kept: then those of equal requests are one
        object. Of a large benchmark there is only room for the first."""
        parts = [part for message in messages.messages for part in message.content if part.type == "image"]
        names = tuple(_name(part.url) for part in parts)
        self.expect(names)
        drawn = [(part, name) for part, name in zip(parts, names, strict=True) if isinstance(part.url, Image.Image)]
        new = {name: part.url for part, name in drawn if name not in self._kept}
        pixels = sum(picture.width * picture.height for picture in new.values())
        if pixels > self._pixels:
            return names, False
        self._pixels -= pixels
        self._kept |= new
        for part, name in drawn:
            part.url = self._kept[name]
        return names, True

    def expect(self, names: Sequence[Hashable]) -> None:
        """One request more will show these."""
        for name in names:
            self._ready.expect(name)
            self.features.expect(name)

    @contextlib.contextmanager
    def reused(
        self, processor: Any, images: Sequence[Sequence[Any]], names: Sequence[Sequence[Hashable]]
    ) -> Iterator[None]:
        """Inside, the processor takes what its image processor made of a picture before.

        Args:
            images: that it will get, per prompt.
            names: theirs.
        """
        own = processor.image_processor
        if self._apart:
            pairs = (pair for row in zip(images, names, strict=True) for pair in zip(*row, strict=True))
            processor.image_processor = _Reusing(own, self, {id(image): name for image, name in pairs})
        try:
            yield
        finally:
            processor.image_processor = own

    def processed(self, own: Any, images: Any, names: dict[int, Hashable], kwargs: dict[str, Any]) -> Any:
        """`own(images, **kwargs)`, the same numbers, without doing it again for a picture that is kept.

        Only where the image processor's whole output can be taken apart by picture: no padding to the others of the
        batch, no cutting into tiles.
        """
        flat = [image for row in images for image in (row if isinstance(row, list | tuple) else [row])]
        shown = [names.get(id(image)) for image in flat]  # None: the processor has read a path, or copied
        if not self._apart or None in shown or not self._ready.repeated(shown):
            return own(images, **kwargs)
        by_name = dict(zip(shown, flat, strict=True))

        def make(new: list[Hashable]) -> list[Made] | None:
            return by_picture(own([by_name[name] for name in new], **kwargs), len(new))

        parts = self._ready.of(shown, make)
        self._apart = parts is not None
        together = None if parts is None else joined(parts)
        return own(images, **kwargs) if together is None else BatchFeature(together)


class _Reusing:
    """Stands in for an image processor; `names` are those of the images, by their ids."""

    def __init__(self, own: Any, pictures: Pictures, names: dict[int, Hashable]) -> None:
        self._own, self._pictures, self._names = own, pictures, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        return self._pictures.processed(self._own, images, self._names, kwargs)


def _name(picture: Any) -> Hashable:
    """Equal for pictures that any processor reads alike; a path or an address is its own name."""
    if not isinstance(picture, Image.Image):
        return str(picture)
    content = xxhash.xxh3_128_digest(_memory(picture))
    palette = bytes(picture.getpalette("RGBA") or ()) if picture.mode in ("P", "PA") else b""
    return picture.mode, picture.size, content, palette, picture.info.get("exif"), picture.info.get("transparency")


def _memory(picture: Image.Image) -> Any:
    """The picture's pixels where they lie, which is many times faster than writing them out."""
    if picture.mode == "RGB" and hasattr(picture, "__arrow_c_array__"):  # Pillow 11.2.1
        with contextlib.suppress(ValueError):  # a large picture lies in several pieces
            return pa.array(picture).values.buffers()[1]
    return picture.tobytes()
