"""Where a prompt's image tokens are: runs of them, which image each belongs to, and its place in the image's raster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lmms_keyspace.errors import InputError


class ImageRun(NamedTuple):
    """Image tokens that belong together: `images` images from number `first` on."""

    columns: np.ndarray
    first: int
    images: int


def gaps(words: np.ndarray, size: int, text_words: np.ndarray, text_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Where there is something between two words or at an end: begin and end in the model's input and in the text."""
    edges = np.concatenate([[-1], words, [size]])
    text_edges = np.concatenate([[-1], text_words, [text_size]])
    for gap in np.flatnonzero((np.diff(edges) > 1) | (np.diff(text_edges) > 1)):
        yield edges[gap] + 1, edges[gap + 1], text_edges[gap] + 1, text_edges[gap + 1]


def common(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the common beginning."""
    size = min(left.size, right.size)
    return int(np.append(np.flatnonzero(left[:size] != right[:size]), size)[0])


def image_runs(columns: np.ndarray, first: int, count: int, placeholders: np.ndarray) -> list[ImageRun]:
    """Split the image tokens between two words by image where their runs tell, else keep them together."""
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    counts = placeholders if len(runs) == placeholders.size else np.ones(count, np.int64)
    if len(runs) != len(counts):
        return [ImageRun(columns, first, count)]
    starts = first + np.cumsum(counts) - counts
    return [ImageRun(*run) for run in zip(runs, starts.tolist(), counts.tolist(), strict=True)]


def run_starts(is_image: np.ndarray, owners: np.ndarray | None = None) -> np.ndarray:
    """Indices that remain when each run of image tokens is collapsed to its first one.

    Args:
        owners: prompt of each token, where there are several; runs end with their prompt.
    """
    inside = np.zeros(is_image.size, bool)
    inside[1:] = is_image[1:] & is_image[:-1]
    if owners is not None:
        inside[1:] &= owners[1:] == owners[:-1]
    return np.flatnonzero(~inside)


@lru_cache(maxsize=1024)
def _raster(shapes: tuple[tuple[int, int], ...], first: int) -> np.ndarray:
    """`[3, T]` image, row and column of each token of images side by side, numbered from `first`."""
    areas = [rows * width for rows, width in shapes]
    return np.stack(
        [
            np.repeat(np.arange(first, first + len(shapes)), areas),
            np.concatenate([np.repeat(np.arange(rows), width) for rows, width in shapes]),
            np.concatenate([np.tile(np.arange(width), rows) for rows, width in shapes]),
        ]
    )


def place_images(
    name: str, places: np.ndarray, runs: Sequence[ImageRun], grids: Sequence[tuple[int, int]] | None
) -> None:
    """Write image index, grid row and grid column of a prompt's image tokens into `places` `[3, T]`.

    Args:
        name: the prompt's, for messages.
        runs: its image tokens.
        grids: rows and columns of each image; None where they are unknown.

    Raises:
        InputError: the grids do not account for the image tokens.
    """
    images = sum(run.images for run in runs)
    if grids is not None and len(grids) != images:
        raise InputError("image_grids", name, f"{len(grids)} grids for {images} images; give one per image")
    for columns, first, count in runs:
        if grids is None:
            places[0, columns] = first
            continue
        shapes = tuple(grids[first : first + count])
        if sum(rows * width for rows, width in shapes) != columns.size:
            raise InputError("image_grids", name, f"grids {list(shapes)} do not make the {columns.size} image tokens")
        places[:, columns] = _raster(shapes, first)
