"""What a run captured: the rows, their tokens with the vectors, and the tables made of them. Used by `capture` alone.

Batches are kept as plain arrays and become tables once, at the end: a table per batch would cost more than the
forward pass of a small model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import KeySite
from lmms_keyspace.last_query import MEASURES
from lmms_keyspace.recording import CaptureError, Padded, Recording
from lmms_keyspace.records import ALL_HEADS, ATTENTION_COLUMNS, MODALITIES, SEGMENTS, TEXT, TOKEN_COLUMNS, VISUAL
from lmms_keyspace.sampling import hash64, mix64
from lmms_keyspace.tokens import Prompt, TokenLabels

Columns = dict[str, np.ndarray]
_SIDES = np.array([MODALITIES.index(VISUAL), MODALITIES.index(TEXT)])


class Document(NamedTuple):
    """A document by name, in the order of the tables."""

    task: str
    condition: str
    cluster: str
    doc_id: int


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a batch.

    Attributes:
        input_ids: `[T]` the unpadded prompt as the model gets it.
        labels: of these T tokens.
        positions: ascending positions of the tokens to capture; empty when the row's cluster was not chosen.

    Raises:
        InputError: the labels or positions do not fit the ids.
    """

    prompt: Prompt
    input_ids: np.ndarray
    labels: TokenLabels
    positions: np.ndarray

    def __post_init__(self) -> None:
        name, length = f"{self.prompt.task} document {self.prompt.doc_id}", self.input_ids.size
        if self.labels.size != length:
            raise InputError("labels", name, f"{self.labels.size} labels for {length} tokens; label these ids")
        at = self.positions
        if at.size and (at[0] < 0 or at[-1] >= length or (at[1:] <= at[:-1]).any()):
            raise InputError("positions", name, f"they must ascend and lie below the prompt's length {length}")

    @property
    def document(self) -> Document:
        """The row's name."""
        return Document(self.prompt.task, self.prompt.condition, self.prompt.cluster, self.prompt.doc_id)


class TokenStore:
    """Captured vectors in order of arrival, and what each belongs to."""

    def __init__(self) -> None:
        self.documents: set[tuple[str, int]] = set()
        self._documents: list[Document] = []  # of the rows with captured tokens
        self._images: list[str] = [""]  # their image hashes
        self._columns: list[Columns] = []
        self._table: pd.DataFrame | None = None
        self._vectors: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)

    def refuse_repeats(self, rows: Sequence[Row]) -> None:
        """Raise CaptureError for a document that is here already."""
        for row in rows:
            if (row.prompt.task, row.prompt.doc_id) in self.documents:
                raise CaptureError(f"{row.prompt.task} document {row.prompt.doc_id} was captured already")

    def add(self, rows: Sequence[Row], padded: Padded, recording: Recording) -> None:
        """Take a finished batch."""
        self.documents.update((row.prompt.task, row.prompt.doc_id) for row in rows)
        if not recording.rows.size:
            return
        self._table = None
        columns = _token_columns(rows, padded, recording)
        columns["document"] += len(self._documents)
        columns["image"][columns["image"] > 0] += len(self._images) - 1
        self._documents.extend(row.document for row in rows)
        self._images.extend(sha for row in rows for sha in row.prompt.image_shas)
        self._columns.append(columns)
        for key, values in recording.vectors().items():
            self._vectors[key].append(values)

    def table(self) -> pd.DataFrame:
        """`records.TOKEN_COLUMNS`, ordered by task, condition, cluster, document and position; the extra column
        `stored` is the place among the vectors."""
        if self._table is None:
            columns = _joined(self._columns) or dict.fromkeys(_CAPTURED, np.empty(0, np.int64))
            order = np.lexsort((columns["position"], _ranks(self._documents)[columns["document"]]))
            columns = {name: values[order] for name, values in columns.items()}
            table: dict[str, object] = {
                **_document_columns(self._documents, columns["document"]),
                **columns,
                "image_sha": _taken(self._images, columns["image"]),
                "prefix_hash": pd.array([f"{value:016x}" for value in columns["prefix"].tolist()], dtype="string"),
                "modality": _taken(MODALITIES, columns["modality"]),
                "segment": _taken(SEGMENTS, columns["segment"]),
                "key_norm": self._key_norms()[order],
                "keys_row": np.full(order.size, -1),
            }
            self._table = _typed(table, TOKEN_COLUMNS).assign(stored=order)
        return self._table

    def vectors(self, space: str, layer: int, stored: np.ndarray) -> torch.Tensor:
        """`[N, heads, d]` at the given places."""
        vectors = self._joined_vectors(space, layer)
        return vectors[torch.as_tensor(stored, device=vectors.device)]

    def _joined_vectors(self, space: str, layer: int) -> torch.Tensor:
        parts = self._vectors[space, layer]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        return parts[0]

    def _key_norms(self) -> np.ndarray:
        """`[N]` Euclidean norm of k_pre, mean over layers and KV heads."""
        layers = [layer for space, layer in self._vectors if space == "k_pre"]
        norms = [
            torch.linalg.vector_norm(self._joined_vectors("k_pre", layer), dim=-1, dtype=torch.float32).mean(-1)
            for layer in layers
        ]
        return np.mean([norm.cpu().numpy() for norm in norms], axis=0) if norms else np.empty(0)


class AttentionStore:
    """Attention of the last prompt token, by document and layer; by KV head too where a document's keys are captured."""

    def __init__(self, sites: Sequence[KeySite]) -> None:
        self._sites = sites
        self._documents: list[Document] = []
        self._counts: list[np.ndarray] = []  # [B, segments]
        self._measures: list[np.ndarray] = []  # [L, B, 1, measures]
        self._by_head: list[np.ndarray] = []  # [L, documents with keys, KV, measures]
        self._with_heads: list[np.ndarray] = []  # places of these among the documents

    def add(self, rows: Sequence[Row], kinds: np.ndarray, measures: np.ndarray) -> None:
        """Take a finished batch: `kinds` as `attention_kinds` gives them, `measures` `[L, B, 1 + KV, measures]`."""
        with_heads = np.flatnonzero([row.positions.size > 0 for row in rows])
        self._with_heads.append(with_heads + len(self._documents))
        self._documents.extend(row.document for row in rows)
        self._counts.append(kinds[..., : len(SEGMENTS)].sum(1))
        self._measures.append(measures[:, :, :1])
        self._by_head.append(measures[:, with_heads, 1:])

    def table(self) -> pd.DataFrame:
        """`records.ATTENTION_COLUMNS`, ordered by task, condition, cluster, document, layer and head group."""
        if not self._documents:
            return _typed(dict.fromkeys(ATTENTION_COLUMNS, ()), ATTENTION_COLUMNS)
        everyone = np.arange(len(self._documents))
        blocks = [
            _Block(np.concatenate(self._measures, axis=1), everyone, first_group=0),
            _Block(np.concatenate(self._by_head, axis=1), np.concatenate(self._with_heads), first_group=1),
        ]
        layer, document, group = np.concatenate([block.places() for block in blocks], axis=1)
        order = np.lexsort((group, layer, _ranks(self._documents)[document]))
        layer, document, group = layer[order], document[order], group[order]
        values = np.concatenate([block.measures.reshape(-1, len(MEASURES)) for block in blocks])[order]
        counts = np.concatenate(self._counts)[document]
        heads = max(site.n_kv_heads for site in self._sites)
        table = {
            **_document_columns(self._documents, document),
            "layer": np.array([site.layer for site in self._sites])[layer],
            "layer_type": _taken([site.layer_type for site in self._sites], layer),
            "head_group": _taken([ALL_HEADS, *map(str, range(heads))], group),
            **{f"n_{name}": counts[:, number] for number, name in enumerate(SEGMENTS)},
            **{name: values[:, number] for number, name in enumerate(MEASURES)},
        }
        return _typed(table, ATTENTION_COLUMNS)


class _Block(NamedTuple):
    """Measures `[L, documents, groups, measures]` of the given documents."""

    measures: np.ndarray
    documents: np.ndarray
    first_group: int

    def places(self) -> np.ndarray:
        """`[3, rows]` layer, document and head group of each row."""
        layer, document, group = np.indices(self.measures.shape[:3]).reshape(3, -1)
        return np.stack([layer, self.documents[document], group + self.first_group])


def attention_kinds(rows: Sequence[Row], padded: Padded) -> np.ndarray:
    """`[B, P, segments + 2]`, 1 where a key is of a segment of `SEGMENTS`, visual, or text; 0 on padding."""
    segment = padded.place([row.labels.segment_codes for row in rows], -1)
    modality = padded.place([row.labels.modality_codes for row in rows], -1)
    kinds = np.empty((*segment.shape, len(SEGMENTS) + _SIDES.size), np.float32)
    np.equal(segment[..., None], np.arange(len(SEGMENTS)), out=kinds[..., : len(SEGMENTS)], casting="unsafe")
    np.equal(modality[..., None], _SIDES, out=kinds[..., len(SEGMENTS) :], casting="unsafe")
    return kinds


_CAPTURED = (
    "document",
    "image",
    "prefix",
    "modality",
    "segment",
    "position",
    "position_t",
    "position_h",
    "position_w",
    "image_index",
    "grid_row",
    "grid_column",
    "token_id",
    "sink",
)


def _token_columns(rows: Sequence[Row], padded: Padded, recording: Recording) -> Columns:
    """`_CAPTURED` of the captured tokens of a batch, in the order of its vectors.

    `document` is the place of the row in the batch; `image` counts the batch's images from 1, 0 is none, and a text
    token carries the first image of its prompt.
    """
    row, position = recording.rows, recording.columns - padded.padding[recording.rows]
    starts = np.cumsum([0, *(row.input_ids.size for row in rows)])[:-1]
    flat = starts[row] + position
    shown = np.array([len(row.prompt.image_shas) for row in rows])
    image_index = np.concatenate([row.labels.image_index for row in rows])[flat]
    first_image = np.cumsum(shown) - shown + 1
    rotary = recording.rotary_positions()
    return {
        "document": row.copy(),
        "image": np.where(shown[row] > 0, first_image[row] + np.maximum(image_index, 0), 0),
        "prefix": prefix_hashes(rows)[flat],
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
        "sink": recording.sinks(),
    }


def prefix_hashes(rows: Sequence[Row]) -> np.ndarray:
    """Per token of all rows, one after the other, a hash of all ids and images up to it: equal hashes, equal context.

    A sum of hashes of (position, id) and (number, image), so that a batch takes a few array operations (Zobrist 1970).
    """
    sizes = [row.input_ids.size for row in rows]
    starts = np.cumsum([0, *sizes])[:-1]
    positions = np.arange(sum(sizes)) - np.repeat(starts, sizes)
    ids = np.concatenate([row.input_ids for row in rows])
    terms = mix64(mix64(positions.astype(np.uint64)) + ids.astype(np.uint64))
    for row, start in zip(rows, starts, strict=True):
        for number, sha in enumerate(row.prompt.image_shas):
            begun = np.flatnonzero(row.labels.image_index >= number)
            if begun.size:
                terms[start + begun[0]] += np.uint64(hash64(number, sha))
    sums = np.cumsum(terms)
    before = np.append(np.uint64(0), sums)[starts]
    return mix64(sums - np.repeat(before, sizes))


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _ranks(documents: Sequence[Document]) -> np.ndarray:
    """Place of each document in the order of the tables."""
    ranks = np.empty(len(documents), np.int64)
    ranks[sorted(range(len(documents)), key=documents.__getitem__)] = np.arange(len(documents))
    return ranks


def _taken(values: Sequence[str], places: np.ndarray) -> pd.api.extensions.ExtensionArray:
    return pd.array(list(values), dtype="string").take(places)


def _document_columns(documents: Sequence[Document], places: np.ndarray) -> dict[str, object]:
    names = ("task", "condition", "cluster")
    strings = {name: _taken([getattr(document, name) for document in documents], places) for name in names}
    return {**strings, "doc_id": np.array([document.doc_id for document in documents], np.int64)[places]}


def _typed(columns: Mapping[str, object], schema: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(columns[name], dtype=kind) for name, kind in schema.items()})
