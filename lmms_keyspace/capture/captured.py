"""What a run captured: the rows, their tokens with the vectors, and the tables made of them. Used by `capture` alone.

Batches are kept as plain arrays and become tables once, at the end: a table per batch would cost more than the
forward pass of a small model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.capture.last_query import MEASURES
from lmms_keyspace.capture.recording import CaptureError, Padded, Recording
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import KeySite
from lmms_keyspace.records import ALL_HEADS, ATTENTION_COLUMNS, MODALITIES, SEGMENTS, TEXT, TOKEN_COLUMNS, VISUAL
from lmms_keyspace.sampling import hash64, mix64, mixed_positions
from lmms_keyspace.tokens import Prompt, TokenLabels

Columns = dict[str, np.ndarray]
# Brings the tensors `[n, ...]` of all processes, n unequal, to one of them, in order; the others get an empty list.
Gather = Callable[[torch.Tensor], list[torch.Tensor]]
# Rows wait with their labels until they have this many tokens together.
_PENDING_TOKENS = 1 << 18
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
        self._pending: list[_Batch] = []
        self._pending_tokens = 0
        self._table: pd.DataFrame | None = None
        self._vectors: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)

    def refuse_repeats(self, rows: Sequence[Row]) -> None:
        """Raise CaptureError for a document that is here already."""
        for row in rows:
            if (row.prompt.task, row.prompt.doc_id) in self.documents:
                raise CaptureError(f"{row.prompt.task} document {row.prompt.doc_id} was captured already")

    def add(self, rows: Sequence[Row], recording: Recording) -> None:
        """Take a finished batch."""
        self.documents.update((row.prompt.task, row.prompt.doc_id) for row in rows)
        chosen = [row for row in rows if row.positions.size]
        if not chosen:
            return
        self._table = None
        self._pending.append(_Batch(chosen, recording.rotary_positions(), recording.sinks()))
        self._pending_tokens += sum(row.labels.size for row in chosen)
        if self._pending_tokens > _PENDING_TOKENS:
            self._settle()
        for key, values in recording.vectors().items():
            self._vectors[key].append(values)

    def _settle(self) -> None:
        """Make columns of the batches that wait; many at once, because each array operation has a price."""
        if not self._pending:
            return
        rows = [row for batch in self._pending for row in batch.rows]
        rotary = np.concatenate([batch.rotary for batch in self._pending], axis=1)
        columns = _token_columns(rows, rotary, np.concatenate([batch.sinks for batch in self._pending]))
        self._pending.clear()
        self._pending_tokens = 0
        self._append([row.document for row in rows], [sha for row in rows for sha in row.prompt.image_shas], columns)

    def _append(self, documents: Sequence[Document], images: Sequence[str], columns: Columns) -> None:
        columns["document"] += len(self._documents)
        columns["image"][columns["image"] > 0] += len(self._images) - 1
        self._documents.extend(documents)
        self._images.extend(images)
        self._columns.append(columns)

    def gather(self, gather: Gather, none: Mapping[tuple[str, int], torch.Tensor]) -> None:
        """Take what the stores of all processes hold, or give this one's away.

        Args:
            none: (space, layer) -> vectors `[0, heads, d]`, for a process that captured nothing.
        """
        self._settle()
        names = _gathered_json(gather, [sorted(self.documents), self._documents, self._images[1:]])
        columns = {name: _gathered(gather, values) for name, values in _joined(self._columns).items()}
        vectors = {key: gather(self._joined_vectors(*key) if key in self._vectors else none[key]) for key in none}
        self.documents, self._documents, self._images, self._columns = set(), [], [""], []
        self._table = None
        self._vectors.clear()
        for place, (seen, documents, images) in enumerate(names):
            self.documents.update((task, doc_id) for task, doc_id in seen)
            part = {name: values[place] for name, values in columns.items()}
            self._append([Document(*document) for document in documents], images, part)
        for key, parts in vectors.items():
            if parts:
                self._vectors[key] = [torch.cat(parts)]

    def table(self) -> pd.DataFrame:
        """`records.TOKEN_COLUMNS`, ordered by task, condition, cluster, document and position; the extra column
        `stored` is the place among the vectors."""
        if self._table is None:
            self._settle()
            columns = _joined(self._columns)
            order = np.lexsort((columns["position"], _ranks(self._documents)[columns["document"]]))
            columns = {name: values[order] for name, values in columns.items()}
            table: dict[str, object] = {
                **_document_columns(self._documents, columns["document"]),
                **columns,
                "image_sha": _taken(self._images, columns["image"]),
                "prefix_hash": pd.array([f"{value:016x}" for value in columns["prefix"].view(np.uint64).tolist()]),
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


class _Batch(NamedTuple):
    """Rows with captured tokens, N in all, and what the model said of these."""

    rows: Sequence[Row]
    rotary: np.ndarray  # [3, N]
    sinks: np.ndarray  # [N]


class AttentionStore:
    """Attention of the last prompt token by document and layer; by KV head too for the documents with captured keys."""

    def __init__(self, sites: Sequence[KeySite]) -> None:
        self._sites = sites
        self._documents: list[Document] = []
        self._parts: list[_Attention] = []

    def add(self, rows: Sequence[Row], kinds: np.ndarray, measures: np.ndarray) -> None:
        """Take a finished batch: `kinds` as `attention_kinds` gives them, `measures` `[L, B, 1 + KV, measures]`."""
        with_keys = np.flatnonzero([row.positions.size > 0 for row in rows])
        measures = measures.swapaxes(0, 1)
        counts = kinds[..., : len(SEGMENTS)].sum(1)
        self._append(
            [row.document for row in rows], _Attention(counts, measures[:, :, 0], measures[with_keys, :, 1:], with_keys)
        )

    def _append(self, documents: Sequence[Document], part: _Attention) -> None:
        self._parts.append(part._replace(with_keys=part.with_keys + len(self._documents)))
        self._documents.extend(documents)

    def gather(self, gather: Gather) -> None:
        """As `TokenStore.gather`."""
        names = _gathered_json(gather, self._documents)
        parts = [_gathered(gather, values) for values in self._joined()]
        self._documents, self._parts = [], []
        for documents, *part in zip(names, *parts, strict=True):
            self._append([Document(*document) for document in documents], _Attention(*part))

    def table(self) -> pd.DataFrame:
        """`records.ATTENTION_COLUMNS`, ordered by task, condition, cluster, document, layer and head group."""
        joined, everyone = self._joined(), np.arange(len(self._documents))
        places, blocks = [], []  # [3, rows] document, layer, head group; [rows, measures]
        for measures, documents, first in (
            (joined.measures[:, :, None], everyone, 0),
            (joined.by_head, joined.with_keys, 1),
        ):
            document, layer, group = np.indices(measures.shape[:3]).reshape(3, -1)
            places.append(np.stack([documents[document], layer, group + first]))
            blocks.append(measures.reshape(-1, len(MEASURES)))
        document, layer, group = np.concatenate(places, axis=1)
        order = np.lexsort((group, layer, _ranks(self._documents)[document]))
        document, layer, group = document[order], layer[order], group[order]
        values, counts = np.concatenate(blocks)[order], joined.counts[document]
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

    def _joined(self) -> _Attention:
        layers, heads = len(self._sites), self._sites[0].n_kv_heads
        nothing = _Attention(
            np.empty((0, len(SEGMENTS)), np.float32),
            np.empty((0, layers, len(MEASURES)), np.float32),
            np.empty((0, layers, heads, len(MEASURES)), np.float32),
            np.empty(0, np.int64),
        )
        self._parts = [_Attention(*map(np.concatenate, zip(nothing, *self._parts, strict=True)))]
        return self._parts[0]


class _Attention(NamedTuple):
    """Of D documents."""

    counts: np.ndarray  # [D, segments]
    measures: np.ndarray  # [D, L, measures] means over all query heads
    by_head: np.ndarray  # [documents with keys, L, KV, measures]
    with_keys: np.ndarray  # places of these among the D


def attention_kinds(rows: Sequence[Row], padded: Padded) -> np.ndarray:
    """`[B, P, segments + 2]`, 1 where a key is of a segment of `SEGMENTS`, visual, or text; 0 on padding."""
    segment = padded.place([row.labels.segment_codes for row in rows], -1)
    modality = padded.place([row.labels.modality_codes for row in rows], -1)
    kinds = np.empty((*segment.shape, len(SEGMENTS) + _SIDES.size), np.float32)
    np.equal(segment[..., None], np.arange(len(SEGMENTS)), out=kinds[..., : len(SEGMENTS)], casting="unsafe")
    np.equal(modality[..., None], _SIDES, out=kinds[..., len(SEGMENTS) :], casting="unsafe")
    return kinds


_CAPTURED = {
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


def _token_columns(rows: Sequence[Row], rotary: np.ndarray, sinks: np.ndarray) -> Columns:
    """`_CAPTURED` of the captured tokens of some rows, in the order of their vectors.

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
    return {name: columns[name].astype(kind) for name, kind in _CAPTURED.items()}


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


def _joined(parts: Sequence[Columns]) -> Columns:
    return {
        name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0, kind)
        for name, kind in _CAPTURED.items()
    }


def _gathered(gather: Gather, values: np.ndarray) -> list[np.ndarray]:
    return [part.cpu().numpy() for part in gather(torch.from_numpy(np.ascontiguousarray(values)))]


def _gathered_json(gather: Gather, value: Any) -> list[Any]:
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    return [json.loads(part.tobytes()) for part in _gathered(gather, encoded.copy())]


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
