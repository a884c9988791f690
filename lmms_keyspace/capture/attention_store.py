"""Attention of the last prompt token by document and layer, and the table made of it. Used by `capture` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lmms_keyspace.capture.last_query import LastQueries
from lmms_keyspace.capture.measures import MEASURES
from lmms_keyspace.capture.rows import Document, Row
from lmms_keyspace.capture.tables import (
    Gather,
    document_columns,
    document_ranks,
    gathered,
    gathered_json,
    taken,
    typed,
)
from lmms_keyspace.families import KeySite
from lmms_keyspace.records import ALL_HEADS, ATTENTION_COLUMNS, SEGMENTS

# Batches wait to be summed up together until their scores have this many entries: on a small model the number of
# operations is what counts, as long as their working memory is small enough to be used again.
_WAITING_ENTRIES = 1 << 16


class AttentionStore:
    """Attention of the last prompt token by document and layer; by KV head too for the documents with captured keys."""

    def __init__(self, sites: Sequence[KeySite]) -> None:
        self._sites = sites
        self._documents: list[Document] = []
        self._parts: list[_Attention] = []
        self._waiting: list[LastQueries] = []

    def add(self, batch: LastQueries) -> None:
        """Take a finished batch."""
        self._waiting.append(batch)
        if sum(waiting.entries for waiting in self._waiting) >= _WAITING_ENTRIES:
            self._settle()

    def _settle(self) -> None:
        """Sum up the batches that wait."""
        if not self._waiting:
            return
        rows = [row for batch in self._waiting for row in batch.rows]
        measures = LastQueries.measures(self._waiting, [site.layer for site in self._sites]).swapaxes(0, 1)
        self._waiting.clear()
        with_keys = np.flatnonzero([row.positions.size > 0 for row in rows])
        part = _Attention(_segment_counts(rows), measures[:, :, 0], measures[with_keys, :, 1:], with_keys)
        self._append([row.document for row in rows], part)

    def _append(self, documents: Sequence[Document], part: _Attention) -> None:
        self._parts.append(part._replace(with_keys=part.with_keys + len(self._documents)))
        self._documents.extend(documents)

    def gather(self, gather: Gather) -> None:
        """Take what the stores of all processes hold, or give this one's away."""
        self._settle()
        names = gathered_json(gather, self._documents)
        parts = [gathered(gather, values) for values in self._joined()]
        self._documents, self._parts = [], []
        for documents, *part in zip(names, *parts, strict=True):
            self._append([Document(*document) for document in documents], _Attention(*part))

    def table(self) -> pd.DataFrame:
        """`records.ATTENTION_COLUMNS`, ordered by task, condition, cluster, document, layer and head group."""
        self._settle()
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
        order = np.lexsort((group, layer, document_ranks(self._documents)[document]))
        document, layer, group = document[order], layer[order], group[order]
        values, counts = np.concatenate(blocks)[order], joined.counts[document]
        heads = max(site.n_kv_heads for site in self._sites)
        table = {
            **document_columns(self._documents, document),
            "layer": np.array([site.layer for site in self._sites])[layer],
            "layer_type": taken([site.layer_type for site in self._sites], layer),
            "head_group": taken([ALL_HEADS, *map(str, range(heads))], group),
            **{f"n_{name}": counts[:, number] for number, name in enumerate(SEGMENTS)},
            **{name: values[:, number] for number, name in enumerate(MEASURES)},
        }
        return typed(table, ATTENTION_COLUMNS)

    def _joined(self) -> _Attention:
        layers, heads = len(self._sites), self._sites[0].n_kv_heads
        nothing = _Attention(
            np.empty((0, len(SEGMENTS)), np.int64),
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


def _segment_counts(rows: Sequence[Row]) -> np.ndarray:
    """`[B, segments]` tokens of each segment of `SEGMENTS`."""
    owners = np.repeat(np.arange(len(rows)), [row.labels.size for row in rows])
    segments = np.concatenate([row.labels.segment_codes for row in rows])
    cells = np.bincount(owners * len(SEGMENTS) + segments, minlength=len(rows) * len(SEGMENTS))
    return cells.reshape(len(rows), len(SEGMENTS))
