"""The captured vectors, what each belongs to, and the table made of them. Used by `capture` alone.

Batches are kept as plain arrays and become a table once, at the end: a table per batch would cost more than the
forward pass of a small model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.capture.recording import Recording
from lmms_keyspace.capture.rows import CaptureError, Document, Row
from lmms_keyspace.capture.tables import (
    Gather,
    document_columns,
    document_ranks,
    gathered,
    gathered_json,
    taken,
    typed,
)
from lmms_keyspace.capture.token_columns import Columns, joined, token_columns
from lmms_keyspace.records import MODALITIES, SEGMENTS, TOKEN_COLUMNS

# Rows wait with their labels until they have this many tokens together.
_PENDING_TOKENS = 1 << 18


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
        columns = token_columns(rows, rotary, np.concatenate([batch.sinks for batch in self._pending]))
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
        names = gathered_json(gather, [sorted(self.documents), self._documents, self._images[1:]])
        columns = {name: gathered(gather, values) for name, values in joined(self._columns).items()}
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
            columns = joined(self._columns)
            order = np.lexsort((columns["position"], document_ranks(self._documents)[columns["document"]]))
            columns = {name: values[order] for name, values in columns.items()}
            table: dict[str, object] = {
                **document_columns(self._documents, columns["document"]),
                **columns,
                "image_sha": taken(self._images, columns["image"]),
                "prefix_hash": pd.array([f"{value:016x}" for value in columns["prefix"].view(np.uint64).tolist()]),
                "modality": taken(MODALITIES, columns["modality"]),
                "segment": taken(SEGMENTS, columns["segment"]),
                "key_norm": self._key_norms()[order],
                "keys_row": np.full(order.size, -1),
            }
            self._table = typed(table, TOKEN_COLUMNS).assign(stored=order)
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
