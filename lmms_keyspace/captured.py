"""What a run captured: the rows, their tokens with the vectors, and the tables made of them. Used by `capture` alone.

Batches are kept as plain columns and become tables once, at the end: a table per batch would cost more than the
forward pass of a small model.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import KeySite
from lmms_keyspace.recording import CaptureError, Recording
from lmms_keyspace.records import ALL_HEADS, ATTENTION_COLUMNS, SEGMENTS, TEXT, TOKEN_COLUMNS, VISUAL
from lmms_keyspace.tokens import Prompt, TokenLabels

Columns = dict[str, np.ndarray]
# Brings the tensors `[n, ...]` of all processes, n unequal, to one of them, in order; the others get an empty list.
Gather = Callable[[torch.Tensor], list[torch.Tensor]]
_TOKEN_ORDER = ["task", "condition", "cluster", "doc_id", "position"]
_DOCUMENT_ORDER = ["task", "condition", "cluster", "doc_id", "layer"]


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
        if self.labels.modality.size != length:
            raise InputError("labels", name, f"{self.labels.modality.size} labels for {length} tokens; label these ids")
        inside = np.all(np.diff(self.positions, prepend=-1, append=length) > 0)
        if not inside:
            raise InputError("positions", name, f"they must ascend and lie below the prompt's length {length}")


class TokenStore:
    """Captured vectors in order of arrival, and what each belongs to."""

    def __init__(self) -> None:
        self.documents: set[tuple[str, int]] = set()
        self._columns: list[Columns] = []
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
        if not any(row.positions.size for row in rows):
            return
        self._table = None
        self._columns.append(_token_columns(rows, recording))
        for key, values in recording.vectors().items():
            self._vectors[key].append(values)

    def table(self) -> pd.DataFrame:
        """`records.TOKEN_COLUMNS`, ordered by task, condition, cluster, document and position; the extra column
        `stored` is the place among the vectors."""
        if self._table is None:
            table = _frame(self._columns, TOKEN_COLUMNS)
            self._table = table.assign(stored=np.arange(len(table))).sort_values(_TOKEN_ORDER, ignore_index=True)
        return self._table

    def vectors(self, space: str, layer: int, stored: np.ndarray) -> torch.Tensor:
        """`[N, heads, d]` at the given places."""
        parts = self._vectors[space, layer]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        return parts[0][torch.as_tensor(stored, device=parts[0].device)]

    def gather(self, gather: Gather, none: Mapping[tuple[str, int], torch.Tensor]) -> None:
        """Bring together what all processes hold; see `Capture.gather`.

        Args:
            none: `[0, heads, d]` per space and layer: no vectors, with the dtype and device of those that may be here.
        """
        self._columns, self._table = _gathered(self._columns, TOKEN_COLUMNS, gather), None
        for key, empty in none.items():
            self._vectors[key] = gather(torch.cat([empty, *self._vectors[key]]))


class AttentionStore:
    """Attention of the last prompt token, by document and layer."""

    def __init__(self) -> None:
        self._columns: list[Columns] = []

    def add(self, rows: Sequence[Row], recording: Recording, sites: Sequence[KeySite]) -> None:
        """Take a finished batch."""
        self._columns.append(_attention_columns(rows, recording, sites))

    def table(self) -> pd.DataFrame:
        """`records.ATTENTION_COLUMNS`, ordered by task, condition, cluster, document and layer."""
        return _frame(self._columns, ATTENTION_COLUMNS).sort_values(_DOCUMENT_ORDER, ignore_index=True)

    def gather(self, gather: Gather) -> None:
        """Bring together what all processes hold; see `Capture.gather`."""
        self._columns = _gathered(self._columns, ATTENTION_COLUMNS, gather)


def _frame(batches: Sequence[Columns], schema: Mapping[str, str]) -> pd.DataFrame:
    parts = {name: [batch[name] for batch in batches] for name in schema}
    joined: Columns = {name: np.concatenate(values) if values else np.empty(0) for name, values in parts.items()}
    return pd.DataFrame(joined).astype(dict(schema))


def _gathered(batches: Sequence[Columns], schema: Mapping[str, str], gather: Gather) -> list[Columns]:
    """The columns of all processes, as parquet on the way."""
    content = bytearray(_frame(batches, schema).to_parquet())
    parts = gather(torch.frombuffer(content, dtype=torch.uint8))
    tables = (pd.read_parquet(io.BytesIO(part.numpy().tobytes())) for part in parts)
    return [{name: table[name].to_numpy() for name in schema} for table in tables]


def _document_columns(rows: Sequence[Row], repeats: np.ndarray | int) -> Columns:
    values = {
        "task": [row.prompt.task for row in rows],
        "doc_id": [row.prompt.doc_id for row in rows],
        "cluster": [row.prompt.cluster for row in rows],
        "condition": [row.prompt.condition for row in rows],
    }
    return {
        name: np.repeat(np.array(column, dtype=np.int64 if name == "doc_id" else object), repeats)
        for name, column in values.items()
    }


def _token_columns(rows: Sequence[Row], recording: Recording) -> Columns:
    """`TOKEN_COLUMNS` of the captured tokens of a batch, in the order of its vectors."""

    def picked(name: str) -> np.ndarray:
        return np.concatenate([getattr(row.labels, name)[row.positions] for row in rows])

    rotary = recording.rotary_positions()
    return {
        **_document_columns(rows, np.array([row.positions.size for row in rows])),
        "image_sha": np.array([sha for row in rows for sha in _image_shas(row)], dtype=object),
        "prefix_hash": np.array([value for row in rows for value in _prefix_hashes(row)], dtype=object),
        "modality": picked("modality").astype(object),
        "segment": picked("segment").astype(object),
        "position": np.concatenate([row.positions for row in rows]),
        "position_t": rotary[0],
        "position_h": rotary[1],
        "position_w": rotary[2],
        "image_index": picked("image_index"),
        "grid_row": picked("grid_row"),
        "grid_column": picked("grid_column"),
        "token_id": np.concatenate([row.input_ids[row.positions] for row in rows]),
        "key_norm": recording.token_norms(),
        "keys_row": np.full(rotary.shape[1], -1),
    }


def _image_shas(row: Row) -> list[str]:
    """Per captured token, the sha of its image; a text token carries the first image of its prompt."""
    shas = row.prompt.image_shas
    return [shas[max(index, 0)] if shas else "" for index in row.labels.image_index[row.positions]]


def _prefix_hashes(row: Row) -> list[str]:
    """Per captured token, a hash of all ids and images up to it: equal hashes, equal context."""
    digest = hashlib.blake2b(digest_size=8)
    begun = np.maximum.accumulate(row.labels.image_index)
    hashes, done = [], 0
    for position in row.positions:
        digest.update(row.input_ids[done : position + 1].astype("<i8").tobytes())
        done = position + 1
        here = digest.copy()
        here.update(" ".join(row.prompt.image_shas[: begun[position] + 1]).encode())
        hashes.append(here.hexdigest())
    return hashes


def _attention_columns(rows: Sequence[Row], recording: Recording, sites: Sequence[KeySite]) -> Columns:
    """`ATTENTION_COLUMNS` of a batch, B documents of one layer after the other."""
    modality = recording.padded([row.labels.modality for row in rows])
    segment = recording.padded([row.labels.segment for row in rows])
    inside = (segment[:, :, None] == np.array(SEGMENTS)).astype(np.float32)  # [B, P, segments]
    visual, text = (modality == VISUAL).astype(np.float32), (modality == TEXT).astype(np.float32)
    seen = recording.last_queries()
    mass = np.einsum("lbp,bps->lbs", seen.mass, inside)
    counts = np.broadcast_to(inside.sum(1), mass.shape)
    image_share = _mean(np.broadcast_to(visual, seen.visible.shape), seen.visible)
    by_layer = {
        **{f"n_{name}": counts[..., number] for number, name in enumerate(SEGMENTS)},
        **{f"mass_{name}": mass[..., number] for number, name in enumerate(SEGMENTS)},
        "image_over_uniform": _ratio(mass[..., SEGMENTS.index("image")], image_share),
        "qk_visual": _mean(seen.scores, visual),
        "qk_text": _mean(seen.scores, text),
        "key_norm_visual": _mean(seen.key_norms, visual),
        "key_norm_text": _mean(seen.key_norms, text),
    }
    documents = _document_columns(rows, 1)
    return {
        **{name: np.tile(values, len(sites)) for name, values in documents.items()},
        "layer": np.repeat([site.layer for site in sites], len(rows)),
        "layer_type": np.repeat(np.array([site.layer_type for site in sites], dtype=object), len(rows)),
        "head_group": np.full(len(sites) * len(rows), ALL_HEADS, dtype=object),
        **{name: values.ravel() for name, values in by_layer.items()},
    }


def _ratio(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    by = np.broadcast_to(by, values.shape)
    return np.asarray(np.divide(values, by, out=np.full(values.shape, np.nan, np.float32), where=by > 0))


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over the last axis, NaN where the weights are zero."""
    return _ratio((values * weights).sum(-1), weights.sum(-1))
