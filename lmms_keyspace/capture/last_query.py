"""What the last prompt tokens of a batch look at: their scores and what the mask adds to them.

No T x T matrix is made. Layers, and batches, are summed up together: on a small model the number of operations is what
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from lmms_keyspace.capture.measures import key_kinds, last_query_measures
from lmms_keyspace.capture.rows import Row

# Scores of a batch wait for its other layers, and for other batches, while they have fewer entries than this (64 MB).
_HELD = 1 << 24


class _Scores(NamedTuple):
    """Of some layers."""

    layers: tuple[int, ...]
    scores: torch.Tensor  # [L, B, H, P]
    bias: torch.Tensor  # [L or 1, B or 1, H or 1, P]
    key_norms: torch.Tensor  # [L, B, P, KV]

    def together(self) -> tuple[object, ...]:
        """Equal for scores that can be summed up together."""
        return self.scores.device, self.scores.shape[2], self.key_norms.shape[3]

    def widened(self, columns: int) -> _Scores:
        """The same left padded to the columns of a longer batch, which are not looked at."""
        more = (columns - self.scores.shape[3], 0)
        bias = self.bias.expand(-1, self.scores.shape[1], -1, -1)
        return self._replace(
            scores=pad(self.scores, more),
            bias=pad(bias, more, value=float("-inf")),
            key_norms=pad(self.key_norms, (0, 0, *more)),
        )


class LastQueries:
    """Collects the last prompt tokens' scores of one batch, some layers at a time.

    Args:
        rows: the batch's; P is the length of its longest prompt.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._columns = max(row.input_ids.size for row in rows)
        self._waiting: list[_Scores] = []
        self._biases: dict[tuple[object, ...], tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._measured: list[tuple[tuple[int, ...], torch.Tensor]] = []

    @property
    def entries(self) -> int:
        """Scores that wait."""
        return sum(waiting.scores.numel() for waiting in self._waiting)

    def add(
        self,
        layers: Sequence[int],
        query: torch.Tensor,
        key: torch.Tensor,
        masks: Sequence[torch.Tensor | None],
        key_norms: torch.Tensor,
        *,
        row: int,
        scaling: float,
        sliding_windows: Sequence[int | None],
    ) -> None:
        """Take L layers: `query` `[L, B, H, d]`, `key` `[L, B, KV, n, d]`, the newest n of the P columns, `key_norms`
        `[L, B, P, KV]`; the rest as in `last_query_bias`, by layer."""
        n = key.shape[3]
        scores = last_query_scores(query, key, scaling)
        given = zip(masks, sliding_windows, strict=True)
        biases = [self._bias(mask, row, n, window, key.device) for mask, window in given]
        bias = biases[0] if all(other is biases[0] for other in biases) else _joined(biases, 0)
        if n < self._columns:
            scores = pad(scores, (self._columns - n, 0))
        self._waiting.append(_Scores(tuple(layers), scores, bias, key_norms))
        if self.entries >= _HELD:
            self._sum_up()

    def _bias(
        self, mask: torch.Tensor | None, row: int, n: int, sliding_window: int | None, device: torch.device
    ) -> torch.Tensor:
        """`[1, B or 1, H or 1, P]`. Layers share a mask, each through a view of its own; a mask is kept so that its
        memory stays its own."""
        where = None if mask is None else (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype)
        name = (where, row, n, sliding_window, device)
        if name not in self._biases:
            bias = last_query_bias(mask, row=row, n=n, sliding_window=sliding_window, device=device)
            bias = torch.zeros(1, 1, n, device=device) if bias is None else bias
            self._biases[name] = mask, pad(bias[None], (self._columns - n, 0), value=float("-inf"))
        return self._biases[name][1]

    def complete(self) -> None:
        """No layer will be added: let go of the masks."""
        self._biases.clear()

    @staticmethod
    def measures(batches: Sequence[LastQueries], layers: Sequence[int]) -> np.ndarray:
        """`[L, B, 1 + KV, len(MEASURES)]` float32 of the rows of all batches, see `last_query_measures`."""
        kinds = {tuple((scores.layers, scores.together()) for scores in batch._waiting) for batch in batches}
        if len(batches) > 1 and len(kinds) == 1 and not any(batch._measured for batch in batches):
            batches = [_one_batch(batches)]
        return np.concatenate([batch._of_layers(layers) for batch in batches], axis=1)

    def _of_layers(self, layers: Sequence[int]) -> np.ndarray:
        self._sum_up()
        order = [layer for group, _ in self._measured for layer in group]
        measured = np.concatenate([measures.cpu().numpy() for _, measures in self._measured])
        return np.asarray(measured[[order.index(layer) for layer in layers]])

    def _sum_up(self) -> None:
        kinds = torch.from_numpy(key_kinds(self.rows))
        groups: dict[tuple[object, ...], list[_Scores]] = {}
        for scores in self._waiting:
            groups.setdefault(scores.together(), []).append(scores)
        self._waiting.clear()
        for group in groups.values():
            biases = [part.bias for part in group]
            same = len(biases[0]) == 1 and all(bias is biases[0] for bias in biases)
            by_layer = [part.bias.expand(len(part.layers), -1, -1, -1) for part in group]
            summed = last_query_measures(
                torch.cat([part.scores for part in group]),
                biases[0] if same else _joined(by_layer, 0),
                torch.cat([part.key_norms for part in group]),
                kinds.to(biases[0].device),
            )
            self._measured.append((tuple(layer for part in group for layer in part.layers), summed))


def _one_batch(batches: Sequence[LastQueries]) -> LastQueries:
    """The batches as one, padded to the longest prompt of all."""
    whole = LastQueries([row for batch in batches for row in batch.rows])
    for parts in zip(*(batch._waiting for batch in batches), strict=True):
        layers, scores, biases, norms = zip(*(part.widened(whole._columns) for part in parts), strict=True)
        whole._waiting.append(_Scores(layers[0], torch.cat(scores, 1), _joined(biases, 1), torch.cat(norms, 1)))
    return whole


def _joined(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Concatenated along an axis; the other axes are broadcast."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.cat(list(tensors), axis)
    shape = list(torch.broadcast_shapes(*(tensor.narrow(axis, 0, 1).shape for tensor in tensors)))
    wide = []
    for tensor in tensors:
        shape[axis] = tensor.shape[axis]
        wide.append(tensor.expand(shape))
    return torch.cat(wide, axis)


def last_query_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled q.k of one query against all keys, in float32.

    Args:
        query: `[..., H, d]`.
        key: `[..., KV, n, d]`; H is a multiple of KV.

    Returns:
        `[..., H, n]`.
    """
    *leading, heads, width = query.shape
    grouped = query.reshape(*leading, key.shape[-3], -1, width).float() * scaling
    return (grouped @ key.transpose(-2, -1).float()).reshape(*leading, heads, -1)


def last_query_bias(
    mask: torch.Tensor | None, *, row: int, n: int, sliding_window: int | None, device: torch.device
) -> torch.Tensor | None:
    """What the mask adds to the scores of one query: -inf where it may not look.

    Args:
        mask: as the attention function got it: None (causal), `[B or 1, 1 or H, T, >= n]` boolean or additive, or
            `[B, >= n]` of ones and zeros (flash attention).
        row: which of the mask's T rows is the query's.
        n: key columns, up to and including the query's own.
        sliding_window: columns that the query reaches back to, its own included, where the mask does not say it.

    Returns:
        `[B or 1, 1 or H, n]` float32, or None when every column is visible.
    """
    if mask is not None and mask.dim() == 4:
        last = mask[:, :, row, :n]
        if last.dtype == torch.bool:
            return _minus_infinity(~last)
        return last.float().masked_fill(last <= torch.finfo(last.dtype).min / 2, float("-inf"))
    hidden = None if mask is None else ~mask[:, None, :n].bool()
    if sliding_window is not None and sliding_window < n:
        out_of_reach = torch.arange(n, device=device) < n - sliding_window
        hidden = out_of_reach[None, None] if hidden is None else hidden | out_of_reach
    return None if hidden is None else _minus_infinity(hidden)


def _minus_infinity(where: torch.Tensor) -> torch.Tensor:
    return torch.zeros(where.shape, device=where.device).masked_fill(where, float("-inf"))
