"""One batch under observation: the hooks, and what they saw. Used by `capture` alone.

A column is an index into the left-padded prompt of P tokens, which is the cache index of its key. Each layer's key
module counts the columns that went through it, so chunks of a prefill are told from decoding steps without the cache.

The hooks do little, because they are paid for at every layer of every batch, and they are gone once the prompt is
through: decoding runs without them (but for the wrapped attention function, which then passes everything on).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lmms_keyspace.capture.attention import observed_attention
from lmms_keyspace.capture.last_query import LastQueries
from lmms_keyspace.capture.sinks import can_have_sinks, is_sink
from lmms_keyspace.families import Decoder, KeySite
from lmms_keyspace.random_keys import projection_of, random_keys

# Largest difference between a rotated key and the one that attention got, relative to the largest key entry.
_ROPE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class CaptureError(RuntimeError):
    """What the hooks saw is not what was announced; nothing of the batch can be trusted."""


class Padded:
    """Rows of a batch as the model gets them: left padded to the P columns of the longest.

    Attributes:
        width: P.
        padding: `[B]` columns of padding.
        own: `[B, P]` False on padding.
        input_ids: `[B, P]`, -1 on padding.
    """

    def __init__(self, input_ids: Sequence[np.ndarray]) -> None:
        sizes = np.array([ids.size for ids in input_ids])
        self.width = int(sizes.max())
        self.padding = self.width - sizes
        self.own = np.arange(self.width) >= self.padding[:, None]
        self.input_ids = self.place(input_ids, -1)

    def place(self, rows: Sequence[np.ndarray], padding: int) -> np.ndarray:
        """`[B, P]` from one array per row."""
        joined = np.concatenate(rows)
        table = np.full(self.own.shape, padding, joined.dtype)
        table[self.own] = joined
        return table


class _Span(NamedTuple):
    """Columns [start, stop) of a layer's current call, which has `length` tokens."""

    start: int
    stop: int
    length: int


class Recording:
    """Hooks of one batch.

    Args:
        sites: layers to record.
        spaces: vectors to record.
        padded: the rows.
        positions: per row, ascending positions of the tokens to record, N in all.
        last_queries: takes what the last prompt token sees; None: attention and sinks are not looked at.
        self_check: whether to compare the rotated key with the one that attention gets.
    """

    def __init__(
        self,
        decoder: Decoder,
        sites: Sequence[KeySite],
        spaces: Sequence[str],
        padded: Padded,
        positions: Sequence[np.ndarray],
        *,
        last_queries: LastQueries | None,
        self_check: bool,
    ) -> None:
        self._decoder = decoder
        self._sites = sites
        self._layers = {site.layer for site in sites}
        self._spaces = spaces
        self._last_queries = last_queries
        self._self_check = self_check
        self._padded = padded
        self._width = padded.width
        self._copies = 0  # model rows per row, known at the first call
        self.rows = np.repeat(np.arange(len(positions)), [picked.size for picked in positions])  # [N]
        self.columns = np.concatenate(positions) + padded.padding[self.rows]  # [N]
        self._handles: list[Any] = []
        self._seen: dict[int, int] = dict.fromkeys(self._layers, 0)
        self._unfinished = len(sites)
        self._span: dict[int, _Span | None] = {}
        self._places: dict[tuple[int, int, torch.device], tuple[np.ndarray, torch.Tensor, torch.Tensor]] = {}
        self._vectors: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        self._order: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        self._norms: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._sinks: list[tuple[np.ndarray, torch.Tensor]] = []
        self._rotary: dict[int, torch.Tensor] = {}
        self._unrotated: dict[int, torch.Tensor] = {}
        self._cos_sin: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks are in place inside, and nowhere else."""
        try:
            # InstructBLIP generates with its language model, past its own `forward`.
            for module in (self._decoder.model, self._decoder.text_model):
                self._handles.append(module.register_forward_pre_hook(self._on_model, with_kwargs=True))
            rotary = self._decoder.text_model.get_submodule("rotary_emb")
            self._handles.append(rotary.register_forward_pre_hook(self._on_rotary, with_kwargs=True))
            for site in self._sites:
                self._handles.append(site.key_module.register_forward_hook(self._key_hook(site)))
                if "k_rand" in self._spaces:
                    projection = projection_of(site)
                    self._handles.append(projection.register_forward_pre_hook(self._projection_hook(site)))
                if self._self_check:
                    hook = self._cos_sin_hook(site)
                    self._handles.append(site.attention.register_forward_pre_hook(hook, with_kwargs=True))
                if self.columns.size and self._last_queries is not None and can_have_sinks(self._decoder, site.layer):
                    hook = self._hidden_hook(site)
                    self._handles.append(site.block.register_forward_pre_hook(hook, with_kwargs=True))
            with observed_attention(self._decoder, self._on_attention):
                yield
        finally:
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def finish(self) -> None:
        """Check that every layer saw the whole prompt.

        Raises:
            CaptureError: names the layers that did not.
        """
        short = [site.layer for site in self._sites if self._seen[site.layer] < self._width]
        if short:
            raise CaptureError(f"layers {short} gave keys for less than the prompt of {self._width} tokens")
        blind = sorted(self._layers - self._last_queries.layers()) if self._last_queries is not None else []
        if blind:
            raise CaptureError(f"the attention function of layers {blind} was not called with the last prompt token")

    def vectors(self) -> dict[tuple[str, int], torch.Tensor]:
        """(space, layer) -> `[N, heads, d]`, ordered by row and position."""
        gathered = {}
        for key, parts in self._vectors.items():
            gathered[key] = parts[0]
            if len(parts) > 1:
                order = torch.as_tensor(np.argsort(np.concatenate(self._order[key])), device=parts[0].device)
                gathered[key] = torch.cat(parts)[order]
        return gathered

    def rotary_positions(self) -> np.ndarray:
        """`[3, N]` rotary position ids (time, height, width) of the recorded tokens; equal where RoPE has one axis."""
        parts = [self._rotary[start] for start in sorted(self._rotary)]
        ids = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        # A model may give one line of positions for all its rows.
        lines = np.broadcast_to(ids.cpu().numpy()[..., : self._width], (3, *self._padded.own.shape))
        return np.asarray(lines[:, self.rows, self.columns])

    def sinks(self) -> np.ndarray:
        """`[N]` whether a recorded token is an attention sink, see `sinks`."""
        found = np.zeros(self.rows.size, bool)
        for places, flags in self._sinks:
            found[places] |= flags.cpu().numpy()
        return found

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first call: the inputs are the rows that were announced."""
        if self._copies:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if ids is None else ids
        expected = self._padded.input_ids
        if given.shape[0] % len(expected):
            raise CaptureError(f"{given.shape[0]} rows reached the model and {len(expected)} were announced")
        self._copies = given.shape[0] // len(expected)
        if ids is None:
            return
        length = min(ids.shape[1], self._width)
        got = ids[:: self._copies, :length].cpu().numpy()
        wrong = np.flatnonzero(((got != expected[:, :length]) & self._padded.own[:, :length]).any(1))
        if wrong.size or ids.shape[1] > self._width:
            at = int(wrong[0]) if wrong.size else 0
            raise CaptureError(
                f"row {at} of the model's inputs is not the row announced to capture, or is not padded on the left"
            )

    def _on_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = self._seen[self._sites[0].layer]
        if start < self._width:
            ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            self._rotary[start] = ids.expand(3, *ids.shape[-2:])[:, :: self._copies]

    def _cos_sin_hook(self, site: KeySite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._cos_sin[site.layer] = kwargs["position_embeddings"]

        return hook

    def _hidden_hook(self, site: KeySite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._on_hidden(site, args[0] if args else kwargs["hidden_states"])

        return hook

    def _key_hook(self, site: KeySite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._on_key(site, output.detach())

        return hook

    def _projection_hook(self, site: KeySite) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._on_projection(site, args[0].detach())

        return hook

    def _on_projection(self, site: KeySite, inputs: torch.Tensor) -> None:
        """The input of the key projection, before its keys are counted."""
        start = self._seen[site.layer]
        places, rows, columns = self._within(start, min(start + inputs.shape[1], self._width), inputs.device)
        if places.size:
            self._order["k_rand", site.layer].append(places)
            self._vectors["k_rand", site.layer].append(random_keys(site, inputs[rows, columns - start]))

    @torch.no_grad()
    def _on_hidden(self, site: KeySite, hidden: torch.Tensor) -> None:
        """The input of a decoder layer, before its keys are made."""
        start = self._seen[site.layer]
        places, rows, columns = self._within(start, min(start + hidden.shape[1], self._width), hidden.device)
        if places.size:
            self._sinks.append((places, is_sink(hidden[rows, columns - start])))

    @torch.no_grad()
    def _on_key(self, site: KeySite, output: torch.Tensor) -> None:
        keys = site.keys(output)
        start, length = self._seen[site.layer], keys.shape[1]
        self._seen[site.layer] += length
        if start >= self._width:
            self._span[site.layer] = None
            return
        span = self._span[site.layer] = _Span(start, min(start + length, self._width), length)
        self._take("k_pre", site, keys, span, start)
        if self._last_queries is not None:
            own = keys[:: self._copies, : span.stop - start]
            self._norms[site.layer].append(torch.linalg.vector_norm(own, dim=-1, dtype=torch.float32))
        if self._self_check:
            self._unrotated[site.layer] = keys.transpose(1, 2)

    @torch.no_grad()
    def _on_attention(
        self,
        site: KeySite,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        span = self._span.pop(site.layer, None)
        if span is None:
            return
        # A sliding cache gives the newest keys only; a static one gives empty places after them.
        first = max(0, span.start + span.length - key.shape[2])
        if self._self_check:
            self._check_rope(site, key[:, :, span.start - first :][:, :, : span.length])
        for space, vectors, offset in (("k_post", key, first), ("q", query, span.start), ("v", value, first)):
            if space in self._spaces:
                self._take(space, site, vectors.transpose(1, 2), span, offset)
        if span.stop < self._width:
            return
        if self._last_queries is not None:
            norms = self._norms.pop(site.layer)
            row = self._width - 1 - span.start
            scaling = kwargs.get("scaling")
            self._last_queries.add(
                site.layer,
                query[:: self._copies, :, row],
                key[:: self._copies, :, : self._width - first],
                mask if mask is None or mask.shape[0] == 1 else mask[:: self._copies],
                norms[0] if len(norms) == 1 else torch.cat(norms, dim=1),
                row=row,
                scaling=site.head_dim**-0.5 if scaling is None else scaling,
                sliding_window=kwargs.get("sliding_window"),
            )
        self._unfinished -= 1
        if not self._unfinished:
            self._remove_hooks()

    def _take(self, space: str, site: KeySite, vectors: torch.Tensor, span: _Span, offset: int) -> None:
        """Keep the recorded tokens of a span from `[B, n, heads, d]`, whose first entry is column `offset`."""
        places, rows, columns = self._within(span.start, span.stop, vectors.device)
        if places.size:
            self._order[space, site.layer].append(places)
            self._vectors[space, site.layer].append(vectors[rows, columns - offset if offset else columns])

    def _within(self, start: int, stop: int, device: torch.device) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """Recorded tokens in the columns [start, stop): their places among the N, model rows and columns."""
        known = self._places.get((start, stop, device))
        if known is None:
            places = np.flatnonzero((self.columns >= start) & (self.columns < stop))
            rows = torch.as_tensor(self.rows[places] * self._copies, device=device)
            known = (places, rows, torch.as_tensor(self.columns[places], device=device))
            self._places[start, stop, device] = known
        return known

    def _check_rope(self, site: KeySite, received: torch.Tensor) -> None:
        """The captured key, rotated as the architecture rotates, is the key that attention got."""
        keys = self._unrotated.pop(site.layer)
        _, rotated = site.apply_rope(keys, keys, *self._cos_sin.pop(site.layer))
        if rotated.shape == received.shape:
            scale = received.abs().amax().float()
            difference = float((rotated.float() - received.float()).abs().amax() / scale.clamp(min=1e-30))
            if difference <= _ROPE_TOLERANCE[received.dtype]:
                return
            found = f"they differ by {difference:.1e} of the largest entry"
        else:
            found = f"their shapes are {tuple(rotated.shape)} and {tuple(received.shape)}"
        raise CaptureError(
            f"layer {site.layer}: the captured key, rotated with the layer's own cos and sin, is not the key that its "
            f"attention received ({found}); a Family for {self._decoder.architecture!r} in lmms_keyspace/families.py "
            "that fits this model is needed"
        )
