"""The recorded tokens of one batch: where they are in what a model hands over, and what was taken at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from lmms_keyspace.capture.rows import Padded, Row


class RecordedTokens:
    """N tokens in all, ordered by row and position.

    Args:
        rows: of the batch.
        padded: the same as the model gets them.

    Attributes:
        copies: model rows per row, with beams or several returns; 0 until the model is called.
        rows, columns: `[N]` row of each token and its column in the left-padded prompt.
    """

    def __init__(self, rows: Sequence[Row], padded: Padded) -> None:
        self.copies = 0
        self.rows = np.repeat(np.arange(len(rows)), [row.positions.size for row in rows])
        self.columns = np.concatenate([row.positions for row in rows]) + padded.padding[self.rows]
        self._places: dict[tuple[int, int, torch.device], tuple[np.ndarray, torch.Tensor, torch.Tensor]] = {}
        self._vectors: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        self._order: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)

    def within(self, start: int, stop: int, device: torch.device) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """The tokens in the columns [start, stop): their places among the N, model rows and columns."""
        known = self._places.get((start, stop, device))
        if known is None:
            places = np.flatnonzero((self.columns >= start) & (self.columns < stop))
            rows = torch.as_tensor(self.rows[places] * self.copies, device=device)
            known = (places, rows, torch.as_tensor(self.columns[places], device=device))
            self._places[start, stop, device] = known
        return known

    def take(
        self, space: str, layers: Sequence[int], vectors: torch.Tensor, start: int, stop: int, *, offset: int
    ) -> None:
        """Keep the tokens in the columns [start, stop) of `[L, model rows, n, heads, d]`, whose first is column
        `offset`."""
        places, rows, columns = self.within(start, stop, vectors.device)
        if not places.size:
            return
        columns = columns - offset if offset else columns
        flat = rows * vectors.shape[2] + columns
        for layer, one in zip(layers, vectors, strict=True):
            # A tensor of its own for each layer: views of one tensor would all be held until the last is let go.
            # Of contiguous vectors, index_select takes them several times as fast.
            taken = one.flatten(0, 1).index_select(0, flat) if one.is_contiguous() else one[rows, columns]
            self.add(space, layer, places, taken)

    def add(self, space: str, layer: int, places: np.ndarray, vectors: torch.Tensor) -> None:
        """Keep `[n, heads, d]` at some places."""
        self._order[space, layer].append(places)
        self._vectors[space, layer].append(vectors)

    def vectors(self) -> dict[tuple[str, int], torch.Tensor]:
        """(space, layer) -> `[N, heads, d]`."""
        gathered = {}
        for key, parts in self._vectors.items():
            gathered[key] = parts[0]
            if len(parts) > 1:
                order = torch.as_tensor(np.argsort(np.concatenate(self._order[key])), device=parts[0].device)
                gathered[key] = torch.cat(parts)[order]
        return gathered
