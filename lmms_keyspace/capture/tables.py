"""From arrays to the tables of `records`, and bringing arrays of several processes together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.capture.rows import Document

# Brings the tensors `[n, ...]` of all processes, n unequal, to one of them, in order; the others get an empty list.
Gather = Callable[[torch.Tensor], list[torch.Tensor]]


def gathered(gather: Gather, values: np.ndarray) -> list[np.ndarray]:
    """The arrays `[n, ...]` of all processes."""
    return [part.cpu().numpy() for part in gather(torch.from_numpy(np.ascontiguousarray(values)))]


def gathered_json(gather: Gather, value: Any) -> list[Any]:
    """What JSON can hold, of all processes."""
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    return [json.loads(part.tobytes()) for part in gathered(gather, encoded.copy())]


def document_ranks(documents: Sequence[Document]) -> np.ndarray:
    """Place of each document in the order of the tables."""
    ranks = np.empty(len(documents), np.int64)
    ranks[sorted(range(len(documents)), key=documents.__getitem__)] = np.arange(len(documents))
    return ranks


def document_columns(documents: Sequence[Document], places: np.ndarray) -> dict[str, object]:
    """The columns that name a document, for the documents at the given places."""
    names = ("task", "condition", "cluster")
    strings = {name: taken([getattr(document, name) for document in documents], places) for name in names}
    return {**strings, "doc_id": np.array([document.doc_id for document in documents], np.int64)[places]}


def taken(values: Sequence[str], places: np.ndarray) -> pd.api.extensions.ExtensionArray:
    """A column of the strings at the given places."""
    return pd.array(list(values), dtype="string").take(places)


def typed(columns: Mapping[str, object], schema: Mapping[str, str]) -> pd.DataFrame:
    """The table with the schema's columns."""
    return pd.DataFrame({name: pd.Series(columns[name], dtype=kind) for name, kind in schema.items()})
