"""One batch under observation: the hooks, and what they saw. Used by `capture` alone.

A column is an index into the left-padded prompt of P tokens, which is the cache index of its key. Each layer's key
module counts the columns that went through it, so chunks of a prefill are told from decoding steps without the cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lmms_keyspace.attention import LastQuery, last_query_attention, observed_attention
from lmms_keyspace.families import Decoder, KeySite

# Largest difference between a rotated key and the one that attention got, relative to the largest key entry.
_ROPE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class CaptureError(RuntimeError):
    """What the hooks saw is not what was announced; nothing of the batch can be trusted."""


class LastQueries(NamedTuple):
    """What the last prompt token sees, means over heads; every array is `[layers, B, P]` float32, zero on padding."""

    mass: np.ndarray  # attention weights
    scores: np.ndarray  # scaled q.k
    visible: np.ndarray  # 1 where the mask lets it look, else 0
    key_norms: np.ndarray  # Euclidean norm of k_pre


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
        input_ids: per row `[T]`, unpadded.
        positions: per row, ascending positions of the tokens to record.
        attention: whether to record the last prompt token's attention and all key norms.
        self_check: whether to compare the rotated key with the one that attention gets.
    """

    def __init__(
        self,
        decoder: Decoder,
        sites: Sequence[KeySite],
        spaces: Sequence[str],
        input_ids: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        *,
        attention: bool,
        self_check: bool,
    ) -> None:
        self._decoder = decoder
        self._sites = sites
        self._layers = {site.layer for site in sites}
        self._spaces = spaces
        self._attention = attention
        self._self_check = self_check
        self._input_ids = input_ids
        self._width = max(ids.size for ids in input_ids)
        self._copies = 0  # model rows per row, known at the first call
        padding = np.array([self._width - ids.size for ids in input_ids])
        counts = [picked.size for picked in positions]
        self._row = np.repeat(np.arange(len(counts)), counts)
        self._column = np.concatenate([picked + pad for picked, pad in zip(positions, padding, strict=True)])
        self._own = np.arange(self._width) >= padding[:, None]  # [B, P]: not padding
        self._seen: dict[int, int] = defaultdict(int)
        self._span: dict[int, _Span | None] = {}
        self._places: dict[tuple[int, int, torch.device], tuple[np.ndarray, torch.Tensor, torch.Tensor]] = {}
        self._vectors: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        self._order: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        self._norms: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._last: dict[int, LastQuery] = {}
        self._rotary: dict[int, torch.Tensor] = {}
        self._unrotated: dict[int, torch.Tensor] = {}
        self._cos_sin: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks are in place inside, and nowhere else."""
        with ExitStack() as stack:
            keep = stack.enter_context
            # InstructBLIP generates with its language model, past its own `forward`.
            for module in (self._decoder.model, self._decoder.text_model):
                keep(_removed(module.register_forward_pre_hook(self._on_model, with_kwargs=True)))
            rotary = self._decoder.text_model.get_submodule("rotary_emb")
            keep(_removed(rotary.register_forward_pre_hook(self._on_rotary, with_kwargs=True)))
            for site in self._sites:
                keep(_removed(site.key_module.register_forward_hook(self._key_hook(site))))
                if self._self_check:
                    hook = self._cos_sin_hook(site)
                    keep(_removed(site.attention.register_forward_pre_hook(hook, with_kwargs=True)))
            keep(observed_attention(self._decoder, self._on_attention))
            yield

    def finish(self) -> None:
        """Check that every layer saw the whole prompt.

        Raises:
            CaptureError: names the layers that did not.
        """
        short = [site.layer for site in self._sites if self._seen[site.layer] < self._width]
        blind = [site.layer for site in self._sites if site.layer not in self._last] if self._attention else []
        if short:
            raise CaptureError(f"layers {short} gave keys for less than the prompt of {self._width} tokens")
        if blind:
            raise CaptureError(f"the attention function of layers {blind} was not called with the last prompt token")

    def vectors(self) -> dict[tuple[str, int], torch.Tensor]:
        """(space, layer) -> `[N, heads, d]`, ordered by row and position."""
        gathered = {}
        for key, parts in self._vectors.items():
            places = np.concatenate(self._order[key])
            order = torch.as_tensor(np.argsort(places), device=parts[0].device)
            gathered[key] = parts[0] if len(parts) == 1 else torch.cat(parts)[order]
        return gathered

    def rotary_positions(self) -> np.ndarray:
        """`[3, N]` rotary position ids (time, height, width) of the recorded tokens; equal where RoPE has one axis."""
        ids = torch.cat([self._rotary[start] for start in sorted(self._rotary)], dim=-1)[..., : self._width]
        # A model may give one line of positions for all its rows.
        lines = np.broadcast_to(ids.cpu().numpy(), (3, *self._own.shape))
        return np.asarray(lines[:, self._row, self._column])

    def token_norms(self) -> np.ndarray:
        """`[N]` Euclidean norm of k_pre of the recorded tokens, mean over layers and KV heads."""
        mean = np.mean([self._layer_norms(site.layer) for site in self._sites], axis=0)
        return np.asarray(mean[self._row, self._column])

    def last_queries(self) -> LastQueries:
        """What the last prompt token of each row saw, by site."""
        seen = [self._last[site.layer] for site in self._sites]
        visible = [self._own if it.visible is None else self._aligned(it.visible) for it in seen]
        return LastQueries(
            mass=np.stack([self._aligned(it.mass) for it in seen]) * self._own,
            scores=np.stack([self._aligned(it.scores) for it in seen]) * self._own,
            visible=np.stack(visible).astype(np.float32) * self._own,
            key_norms=np.stack([self._layer_norms(site.layer) for site in self._sites]) * self._own,
        )

    def padded(self, labels: Sequence[np.ndarray]) -> np.ndarray:
        """Per-row labels `[T]` as one array `[B, P]`, empty strings on padding."""
        table = np.full(self._own.shape, "", dtype=labels[0].dtype)
        for line, own, values in zip(table, self._own, labels, strict=True):
            line[own] = values
        return table

    def _aligned(self, values: torch.Tensor) -> np.ndarray:
        """Key columns `[B, n]` as prompt columns `[B, P]`: a cache that drops old keys lacks the first."""
        array = values.cpu().numpy()
        return np.pad(array, ((0, 0), (self._width - array.shape[1], 0)))

    def _layer_norms(self, layer: int) -> np.ndarray:
        return np.asarray(torch.cat(self._norms[layer], dim=1).cpu())

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first call: the inputs are the rows that were announced."""
        if self._copies:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if ids is None else ids
        if given.shape[0] % len(self._input_ids):
            raise CaptureError(f"{given.shape[0]} rows reached the model and {len(self._input_ids)} were announced")
        self._copies = given.shape[0] // len(self._input_ids)
        if ids is None:
            return
        expected = np.full(self._own.shape, -1, np.int64)
        for line, own, values in zip(expected, self._own, self._input_ids, strict=True):
            line[own] = values
        length = min(ids.shape[1], self._width)
        got = ids[:: self._copies, :length].cpu().numpy()
        wrong = np.flatnonzero(((got != expected[:, :length]) & (expected[:, :length] >= 0)).any(1))
        if wrong.size or ids.shape[1] > self._width:
            at = int(wrong[0]) if wrong.size else 0
            raise CaptureError(
                f"row {at} of the model's inputs is not the row announced to capture, or is not padded on the left"
            )

    def _on_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = self._seen[self._sites[0].layer]
        if start >= self._width:
            return
        ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        self._rotary[start] = ids.expand(3, *ids.shape[-2:])[:, :: self._copies]

    def _cos_sin_hook(self, site: KeySite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._cos_sin[site.layer] = kwargs["position_embeddings"]

        return hook

    def _key_hook(self, site: KeySite) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._on_key(site, output.detach())

        return hook

    @torch.no_grad()
    def _on_key(self, site: KeySite, output: torch.Tensor) -> None:
        keys = site.keys(output)
        start, length = self._seen[site.layer], keys.shape[1]
        self._seen[site.layer] += length
        if start >= self._width:
            self._span[site.layer] = None
            return
        span = self._span[site.layer] = _Span(start, min(start + length, self._width), length)
        self._take("k_pre", site, keys.transpose(1, 2), span, start)
        own = keys[:: self._copies, : span.stop - start]
        self._norms[site.layer].append(torch.linalg.vector_norm(own, dim=-1, dtype=torch.float32).mean(-1))
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
        span = self._span.get(site.layer)
        if span is None or site.layer not in self._layers:
            return
        # A sliding cache gives the newest keys only; a static one gives empty places after them.
        first = max(0, span.start + span.length - key.shape[2])
        if self._self_check:
            self._check_rope(site, key[:, :, span.start - first :][:, :, : span.length])
        for space, vectors, offset in (("k_post", key, first), ("q", query, span.start), ("v", value, first)):
            if space in self._spaces:
                self._take(space, site, vectors, span, offset)
        if self._attention and span.stop == self._width:
            line = self._width - 1 - span.start
            scaling = kwargs.get("scaling")
            self._last[site.layer] = last_query_attention(
                query[:: self._copies, :, line],
                key[:: self._copies, :, : self._width - first],
                mask if mask is None or mask.shape[0] == 1 else mask[:: self._copies],
                row=line,
                scaling=site.head_dim**-0.5 if scaling is None else scaling,
                sliding_window=kwargs.get("sliding_window"),
            )

    def _take(self, space: str, site: KeySite, vectors: torch.Tensor, span: _Span, offset: int) -> None:
        """Keep the recorded tokens of a span from `[B, heads, n, d]`, whose first entry is column `offset`."""
        places, rows, columns = self._within(span, vectors.device)
        if places.size:
            self._order[space, site.layer].append(places)
            self._vectors[space, site.layer].append(vectors[rows, :, columns - offset])

    def _within(self, span: _Span, device: torch.device) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """Recorded tokens in a span: their places among the N, model rows and columns."""
        known = self._places.get((span.start, span.stop, device))
        if known is None:
            places = np.flatnonzero((self._column >= span.start) & (self._column < span.stop))
            rows = torch.as_tensor(self._row[places] * self._copies, device=device)
            known = (places, rows, torch.as_tensor(self._column[places], device=device))
            self._places[span.start, span.stop, device] = known
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


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
