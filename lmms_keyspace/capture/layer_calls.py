"""What the layers hand over in one call of the model, and what is kept of it.

Layers are looked at together while they are small: on a small model the number of operations is what counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lmms_keyspace.capture.last_query import LastQueries
from lmms_keyspace.capture.recorded_tokens import RecordedTokens
from lmms_keyspace.capture.rope_check import RopeCheck
from lmms_keyspace.families import KeySite

# Layers are looked at together while their keys have fewer entries than this (2 MB): beyond it, copying them side by
# side costs more than it saves.
_TOGETHER = 1 << 19
_ATTENDED = {"k_post": "key", "q": "query", "v": "value"}  # spaces that are arguments of the attention function


class Span(NamedTuple):
    """Columns [start, stop) of a layer's current call, which has `length` tokens."""

    start: int
    stop: int
    length: int


class LayerCall(NamedTuple):
    """What one layer handed over in one call of the model."""

    site: KeySite
    span: Span
    keys: torch.Tensor  # [B, n, KV, d] that enter RoPE
    query: torch.Tensor  # this and the rest as the attention function received it
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    sliding_window: int | None

    def like(self) -> tuple[object, ...]:
        """Equal for layers that can be looked at together."""
        return self.span, self.keys.shape, self.query.shape, self.key.shape, self.key.device, self.scaling


class LayerCalls:
    """Keeps what is wanted of the calls of one batch.

    Args:
        tokens: takes the vectors at the recorded tokens.
        width: P, columns of the left-padded prompt.
        spaces: vectors to keep; `k_pre` always.
        last_queries: takes what the last prompt token sees; None: attention is not looked at.
        rope_check: compares the rotated key with the one that attention got; None: not looked at.
    """

    def __init__(
        self,
        tokens: RecordedTokens,
        width: int,
        spaces: Sequence[str],
        last_queries: LastQueries | None,
        rope_check: RopeCheck | None,
    ) -> None:
        self._tokens = tokens
        self._width = width
        self._spaces = [space for space in _ATTENDED if space in spaces]
        self._last_queries = last_queries
        self._rope_check = rope_check
        self._norms: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._waiting: list[LayerCall] = []

    def add(self, call: LayerCall) -> None:
        """Take a layer's call; it may wait for others."""
        waiting = self._waiting
        entries = call.keys.numel() + call.key.numel()
        if waiting and (waiting[0].like() != call.like() or (len(waiting) + 1) * entries >= _TOGETHER):
            self.look()
        waiting.append(call)

    def look(self) -> None:
        """Keep what is wanted of the layers that wait, which are alike."""
        waiting = self._waiting
        if not waiting:
            return
        layers, span = [call.site.layer for call in waiting], waiting[0].span
        keys = _stacked([call.keys for call in waiting])  # [L, B, n, KV, d]
        # A sliding cache gives the newest keys only; a static one gives empty places after them.
        first = max(0, span.start + span.length - waiting[0].key.shape[2])
        if self._rope_check is not None:
            for call in waiting:
                received = call.key[:, :, span.start - first :][:, :, : span.length]
                self._rope_check.compare(call.site, call.keys, received)
        self._tokens.take("k_pre", layers, keys, span.start, span.stop, offset=span.start)
        for space in self._spaces:
            vectors = _stacked([getattr(call, _ATTENDED[space]).transpose(1, 2) for call in waiting])
            offset = span.start if space == "q" else first
            self._tokens.take(space, layers, vectors, span.start, span.stop, offset=offset)
        if self._last_queries is not None:
            self._look_at_last_query(self._last_queries, keys, first)
        waiting.clear()

    def _look_at_last_query(self, last_queries: LastQueries, keys: torch.Tensor, first: int) -> None:
        waiting, copies = self._waiting, self._tokens.copies
        layers, span = [call.site.layer for call in waiting], waiting[0].span
        own = keys[:, ::copies, : span.stop - span.start]
        norms = torch.linalg.vector_norm(own, dim=-1, dtype=torch.float32)  # [L, B, n, KV]
        if span.start or span.stop < self._width:  # a chunk of the prompt
            for layer, part in zip(layers, norms, strict=True):
                self._norms[layer].append(part)
            if span.stop < self._width:
                return
            norms = torch.stack([torch.cat(self._norms.pop(layer), dim=1) for layer in layers])
        row = self._width - 1 - span.start
        masks = [call.mask for call in waiting]
        last_queries.add(
            layers,
            _stacked([call.query[::copies, :, row] for call in waiting]),
            _stacked([call.key[::copies, :, : self._width - first] for call in waiting]),
            [mask if mask is None or mask.shape[0] == 1 else mask[::copies] for mask in masks],
            norms,
            row=row,
            scaling=waiting[0].scaling,
            sliding_windows=[call.sliding_window for call in waiting],
        )


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along a new first axis; one tensor is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
