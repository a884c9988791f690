"""What is known of each captured token but its vectors, as arrays. Used by `token_store` alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmms_keyspace.capture.rows import Row
from lmms_keyspace.sampling import hash64, mix64, mixed_positions

Columns = dict[str, np.ndarray]
COLUMNS = {
    "document": np.int64,
    "image": np.int64,
    "prefix": np.int64,
    "modality": np.int8,
    "segment": np.int8,
    "position": np.int32,
    "position_t": np.int32,
    "position_h": np.int32,
    "position_w": np.int32,
    "image_index": np.int32,
    "grid_row": np.int32,
    "grid_column": np.int32,
    "token_id": np.int64,
    "sink": np.bool_,
}


def token_columns(rows: Sequence[Row], rotary: np.ndarray, sinks: np.ndarray) -> Columns:
    """`COLUMNS` of the captured tokens of some rows, in the order of their vectors.

    `document` is the place of the row; `image` counts the rows' images from 1, 0 is none, and a text token carries the
    first image of its prompt.
    """
    row = np.repeat(np.arange(len(rows)), [row.positions.size for row in rows])
    position = np.concatenate([row.positions for row in rows])
    starts = np.cumsum([0, *(row.input_ids.size for row in rows)])[:-1]
    flat = starts[row] + position
    shown = np.array([len(row.prompt.image_shas) for row in rows])
    image_index = np.concatenate([row.labels.image_index for row in rows])[flat]
    first_image = np.cumsum(shown) - shown + 1
    columns = {
        "document": row,
        "image": np.where(shown[row] > 0, first_image[row] + np.maximum(image_index, 0), 0),
        "prefix": prefix_hashes(rows)[flat].view(np.int64),
        "modality": np.concatenate([row.labels.modality_codes for row in rows])[flat],
        "segment": np.concatenate([row.labels.segment_codes for row in rows])[flat],
        "position": position,
        "position_t": rotary[0],
        "position_h": rotary[1],
        "position_w": rotary[2],
        "image_index": image_index,
        "grid_row": np.concatenate([row.labels.grid_row for row in rows])[flat],
        "grid_column": np.concatenate([row.labels.grid_column for row in rows])[flat],
        "token_id": np.concatenate([row.input_ids for row in rows])[flat],
        "sink": sinks,
    }
    return {name: columns[name].astype(kind) for name, kind in COLUMNS.items()}


def joined(parts: Sequence[Columns]) -> Columns:
    return {
        name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0, kind)
        for name, kind in COLUMNS.items()
    }


def prefix_hashes(rows: Sequence[Row]) -> np.ndarray:
    """Per token of all rows, one after the other, a hash of all ids and images up to it: equal hashes, equal context.

    A sum of hashes of (position, id) and (number, image), so that a batch takes a few array operations (Zobrist 1970).
    """
    sizes = [row.input_ids.size for row in rows]
    starts = np.cumsum([0, *sizes])[:-1]
    positions = np.arange(sum(sizes)) - np.repeat(starts, sizes)
    ids = np.concatenate([row.input_ids for row in rows])
    terms = mix64(mixed_positions(positions) + ids.astype(np.uint64))
    for row, start in zip(rows, starts, strict=True):
        for number, sha in enumerate(row.prompt.image_shas):
            begun = np.flatnonzero(row.labels.image_index >= number)[:1]
            terms[start + begun] += np.array([hash64(number, sha)], np.uint64)  # arrays wrap around without a warning
    sums = np.cumsum(terms)
    before = np.append(np.uint64(0), sums)[starts]
    return mix64(sums - np.repeat(before, sizes))
