"""One batch under observation: the hooks, and what they saw. Used by `capture` alone.

A column is an index into the left-padded prompt of P tokens, which is the cache index of its key. Each layer's key
module counts the columns that went through it, so chunks of a prefill are told from decoding steps without the cache.

The hooks do little, because they are paid for at every layer of every batch: they keep what a layer handed over. They
are gone once the prompt is through: decoding runs without them (but for the wrapped attention function, which then
passes everything on).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lmms_keyspace.capture.attention import observed_attention
from lmms_keyspace.capture.last_query import LastQueries
from lmms_keyspace.capture.layer_calls import LayerCall, LayerCalls, Span
from lmms_keyspace.capture.recorded_tokens import RecordedTokens
from lmms_keyspace.capture.rope_check import RopeCheck
from lmms_keyspace.capture.rows import CaptureError, Padded, Row
from lmms_keyspace.capture.sinks import can_have_sinks, is_sink
from lmms_keyspace.families import Decoder, KeySite
from lmms_keyspace.random_keys import projection_of, random_keys


class Recording:
    """Hooks of one batch.

    Args:
        sites: layers to record.
        spaces: vectors to record.
        rows: of the batch, with N tokens to record in all.
        last_queries: takes what the last prompt token sees; None: attention and sinks are not looked at.
        self_check: whether to compare the rotated key with the one that attention gets.
    """

    def __init__(
        self,
        decoder: Decoder,
        sites: Sequence[KeySite],
        spaces: Sequence[str],
        rows: Sequence[Row],
        *,
        last_queries: LastQueries | None,
        self_check: bool,
    ) -> None:
        self._decoder = decoder
        self._sites = sites
        self._layers = {site.layer for site in sites}
        self._spaces = spaces
        self._last_queries = last_queries
        self._rope_check = RopeCheck(decoder) if self_check else None
        self._padded = Padded(rows)
        self._width = self._padded.width
        self._tokens = RecordedTokens(rows, self._padded)
        self._calls = LayerCalls(self._tokens, self._width, spaces, last_queries, self._rope_check)
        self._handles: list[Any] = []
        self._seen: dict[int, int] = dict.fromkeys(self._layers, 0)
        self._attended: set[int] = set()  # layers whose attention got the last column
        self._span: dict[int, Span | None] = {}
        self._keys: dict[int, torch.Tensor] = {}
        self._sinks: list[tuple[np.ndarray, torch.Tensor]] = []
        self._rotary: dict[int, torch.Tensor] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks are in place inside, and nowhere else."""
        look_for_sinks = self._last_queries is not None and self._tokens.columns.size
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
                if self._rope_check is not None:
                    hook = self._rope_check.hook(site)
                    self._handles.append(site.attention.register_forward_pre_hook(hook, with_kwargs=True))
                if look_for_sinks and can_have_sinks(self._decoder, site.layer):
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
        blind = sorted(self._layers - self._attended)
        if blind:
            raise CaptureError(f"the attention function of layers {blind} was not called with the last prompt token")
        if self._last_queries is not None:
            self._last_queries.complete()

    def vectors(self) -> dict[tuple[str, int], torch.Tensor]:
        """(space, layer) -> `[N, heads, d]`, ordered by row and position."""
        return self._tokens.vectors()

    def rotary_positions(self) -> np.ndarray:
        """`[3, N]` rotary position ids (time, height, width) of the recorded tokens; equal where RoPE has one axis."""
        parts = [self._rotary[start] for start in sorted(self._rotary)]
        ids = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        lines = ids.cpu().numpy()
        # A model may give one line of positions for all its rows.
        return np.asarray(lines[:, self._tokens.rows if lines.shape[1] > 1 else 0, self._tokens.columns])

    def sinks(self) -> np.ndarray:
        """`[N]` whether a recorded token is an attention sink, see `sinks`."""
        found = np.zeros(self._tokens.rows.size, bool)
        for places, flags in self._sinks:
            found[places] |= flags.cpu().numpy()
        return found

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first call: the inputs are the rows that were announced."""
        if self._tokens.copies:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs["inputs_embeds"] if ids is None else ids
        expected = self._padded.input_ids
        if given.shape[0] % len(expected):
            raise CaptureError(f"{given.shape[0]} rows reached the model and {len(expected)} were announced")
        copies = self._tokens.copies = given.shape[0] // len(expected)
        if ids is None:
            return
        length = min(ids.shape[1], self._width)
        got = ids[::copies, :length].cpu().numpy()
        wrong = (got != expected[:, :length]) & self._padded.own[:, :length]
        if ids.shape[1] > self._width or wrong.any():
            at = int(wrong.any(1).argmax())
            raise CaptureError(
                f"row {at} of the model's inputs is not the row announced to capture, or is not padded on the left"
            )

    def _on_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = self._seen[self._sites[0].layer]
        if start < self._width:
            ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            self._rotary[start] = ids.expand(3, *ids.shape[-2:])[:, :: self._tokens.copies]

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
        places, rows, columns = self._tokens.within(start, min(start + inputs.shape[1], self._width), inputs.device)
        if places.size:
            self._tokens.add("k_rand", site.layer, places, random_keys(site, inputs[rows, columns - start]))

    @torch.no_grad()
    def _on_hidden(self, site: KeySite, hidden: torch.Tensor) -> None:
        """The input of a decoder layer, before its keys are made."""
        start = self._seen[site.layer]
        places, rows, columns = self._tokens.within(start, min(start + hidden.shape[1], self._width), hidden.device)
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
        self._span[site.layer] = Span(start, min(start + length, self._width), length)
        self._keys[site.layer] = keys

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
        scaling = kwargs.get("scaling")
        scaling = site.head_dim**-0.5 if scaling is None else scaling
        keys, window = self._keys.pop(site.layer), kwargs.get("sliding_window")
        self._calls.add(LayerCall(site, span, keys, query, key, value, mask, scaling, window))
        if span.stop == self._width:
            self._attended.add(site.layer)
        if site is self._sites[-1]:
            self._calls.look()
            if span.stop == self._width:
                self._remove_hooks()
