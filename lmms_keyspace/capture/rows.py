"""The rows of a batch: what is announced to capture, and how the model gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmms_keyspace.errors import InputError
from lmms_keyspace.tokens import Prompt, TokenLabels


class CaptureError(RuntimeError):
    """What the hooks saw is not what was announced; nothing of the batch can be trusted."""


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
        length, at = self.input_ids.size, self.positions
        if self.labels.size != length:
            raise InputError("labels", self._name, f"{self.labels.size} labels for {length} tokens; label these ids")
        if at.size and (at[0] < 0 or at[-1] >= length or (at[1:] <= at[:-1]).any()):
            raise InputError("positions", self._name, f"they must ascend and lie below the prompt's length {length}")

    @property
    def _name(self) -> str:
        return f"{self.prompt.task} document {self.prompt.doc_id}"

    @property
    def document(self) -> Document:
        """The row's name."""
        return Document(self.prompt.task, self.prompt.condition, self.prompt.cluster, self.prompt.doc_id)


class Padded:
    """Rows of a batch as the model gets them: left padded to the P columns of the longest.

    Attributes:
        width: P.
        padding: `[B]` columns of padding.
        own: `[B, P]` False on padding.
        input_ids: `[B, P]`, -1 on padding.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        sizes = np.array([row.input_ids.size for row in rows])
        self.width = int(sizes.max())
        self.padding = self.width - sizes
        self.own = np.arange(self.width) >= self.padding[:, None]
        self.input_ids = self.place([row.input_ids for row in rows], -1)

    def place(self, rows: Sequence[np.ndarray], padding: int) -> np.ndarray:
        """`[B, P]` from one array per row."""
        joined = np.concatenate(rows)
        table = np.full(self.own.shape, padding, joined.dtype)
        table[self.own] = joined
        return table
