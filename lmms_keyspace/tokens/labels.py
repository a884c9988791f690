"""The labels of a prompt's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmms_keyspace.records import MODALITIES, SEGMENTS


@dataclass(frozen=True, eq=False)
class TokenLabels:
    """Labels of an unpadded prompt of T tokens; every array is `[T]`.

    Attributes:
        modality_codes: places in `records.MODALITIES`: visual, text, boilerplate, special or bos.
        segment_codes: places in `records.SEGMENTS`. The fixed words inside a declared segment belong to it, so that
            attention to a hint is attention to the whole hint.
        image_index: which image of the prompt, -1 for other tokens. Images side by side whose sizes are unknown all
            carry the first one's index.
        grid_row, grid_column: place in the image's raster of tokens, -1 where unknown.
    """

    modality_codes: np.ndarray
    segment_codes: np.ndarray
    image_index: np.ndarray
    grid_row: np.ndarray
    grid_column: np.ndarray

    @property
    def size(self) -> int:
        """T."""
        return int(self.modality_codes.size)

    @property
    def modality(self) -> np.ndarray:
        """Names of the modalities."""
        return np.asarray(np.array(MODALITIES)[self.modality_codes])

    @property
    def segment(self) -> np.ndarray:
        """Names of the segments."""
        return np.asarray(np.array(SEGMENTS)[self.segment_codes])

    def counts(self) -> dict[str, int]:
        """Tokens by modality."""
        counts = np.bincount(self.modality_codes, minlength=len(MODALITIES)).tolist()
        return {name: count for name, count in zip(MODALITIES, counts, strict=True) if count}
