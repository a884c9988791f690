"""Capture: keys at the sampled tokens and attention of the last prompt token, while a model generates.

The key is what enters RoPE. Hooks observe and return nothing; they are in place only inside `Capture.batch`, so a model
is untouched outside it and generates the same text inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import nn

from lmms_keyspace.capture.attention import check_implementation
from lmms_keyspace.capture.attention_store import AttentionStore
from lmms_keyspace.capture.last_query import LastQueries
from lmms_keyspace.capture.recording import Recording
from lmms_keyspace.capture.rows import CaptureError, Row
from lmms_keyspace.capture.tables import Gather
from lmms_keyspace.capture.token_store import TokenStore
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import Decoder, KeySite, refuse_compiled
from lmms_keyspace.records import SPACES, TOKEN_COLUMNS

# Bytes of tables, measured: of a row held, of a row while the table is made, and of an attention row before it is made.
_TOKEN_BYTES, _TOKEN_PEAK = 315, 430
_ATTENTION_BYTES, _ATTENTION_PEAK = 52, 450
_SAME_TOKEN = ["task", "doc_id", "position"]


class Capture:
    """Captures keys of sampled tokens and attention of the last prompt token, batch by batch.

    What is held is bounded by the sampler: per selected document at most `tokens` visual and `tokens` text vectors per
    layer, KV head and space, in the model's dtype on the layer's device, and one table row per document and layer for
    attention (see `memory_estimate`).

    Args:
        model: the model that will be called, a PeftModel if it has an adapter.
        decoder: `decoder_sites(model)`.
        spaces: of `k_pre`, `k_post`, `q`, `v`; `k_pre` is always captured. `q` is the query that attention gets.
        layers: "all", or layer numbers.

    Raises:
        InputError: an unknown space or layer, an attention implementation that cannot be read, or a compiled model.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        *,
        spaces: Sequence[str] = ("k_pre",),
        layers: str | Sequence[int] = "all",
    ) -> None:
        refuse_compiled(model)
        check_implementation(decoder)
        unknown = [space for space in spaces if space not in SPACES]
        if unknown:
            raise InputError("spaces", unknown[0], f"use {' + '.join(SPACES)}")
        self._model = model
        self._decoder = decoder
        self._spaces = tuple(space for space in SPACES if space == "k_pre" or space in spaces)
        self._sites = _chosen_sites(decoder, layers)
        self._tokens = TokenStore()
        self._reference = TokenStore()
        self._attention = AttentionStore(self._sites)
        self._checked = False

    @property
    def layers(self) -> list[int]:
        """The layers captured, ascending."""
        return [site.layer for site in self._sites]

    @property
    def captured(self) -> set[tuple[str, int]]:
        """(task, doc_id) of every row that went through `batch`."""
        return set(self._tokens.documents)

    def memory_estimate(self, tokens: int, *, selected: int, documents: int, reference: bool = False) -> int:
        """Bytes held at the peak, while the tables are made: vectors on the layers' devices, tables in host memory.

        Args:
            tokens: tokens that are sampled, in all.
            selected: documents whose keys are captured.
            documents: documents whose attention is captured.
            reference: whether the base model's vectors are held too.
        """
        widths = [
            (site.n_heads if space == "q" else site.n_kv_heads) * site.head_dim
            for space in self._spaces
            for site in self._sites
        ]
        itemsize = torch.empty(0, dtype=self._decoder.model.dtype).element_size()
        held = tokens * (2 if reference else 1)
        rows = sum(documents + selected * site.n_kv_heads for site in self._sites)
        making_tokens = held * _TOKEN_PEAK + rows * _ATTENTION_BYTES
        making_attention = held * _TOKEN_BYTES + rows * _ATTENTION_PEAK
        vectors = held * sum(widths) + tokens * max(widths)  # those of one layer twice, while they are joined
        return vectors * itemsize + max(making_tokens, making_attention)

    @contextmanager
    def batch(self, rows: Sequence[Row]) -> Iterator[None]:
        """Capture the model call made inside: one prefill of these rows, left padded, whole or in chunks.

        Row i of the call's inputs is `rows[i]`; with beams or several returns, the first copy of each row counts.
        Nothing is kept when the body raises.

        Raises:
            CaptureError: a row was captured before, the inputs are not these rows, a layer gave no keys for part of
                the prompt, or at the first batch a layer's attention used another key than the one captured.
        """
        self._tokens.refuse_repeats(rows)
        last_queries = LastQueries(rows)
        recording = self._recording(rows, last_queries, self_check=not self._checked)
        with recording.installed():
            yield
        recording.finish()
        self._checked = True
        self._tokens.add(rows, recording)
        self._attention.add(last_queries)

    @contextmanager
    def reference_batch(
        self, rows: Sequence[Row], unchanged: AbstractContextManager[None] | None = None
    ) -> Iterator[None]:
        """As `batch`, with the base model inside: its vectors at the same tokens.

        Args:
            rows: as `batch`.
            unchanged: makes the model its base model inside; None disables its adapter.

        Raises:
            InputError: the model has no adapter.
            CaptureError: as `batch`.
        """
        if unchanged is None:
            if not isinstance(self._model, PeftModel):
                raise InputError("reference", "self", "the model has no adapter to disable; use reference=none")
            unchanged = self._model.disable_adapter()
        self._reference.refuse_repeats(rows)
        recording = self._recording(rows, None, self_check=False)
        with unchanged, recording.installed():
            yield
        recording.finish()
        self._reference.add(rows, recording)

    def _recording(self, rows: Sequence[Row], last_queries: LastQueries | None, *, self_check: bool) -> Recording:
        return Recording(
            self._decoder, self._sites, self._spaces, rows, last_queries=last_queries, self_check=self_check
        )

    def keys(
        self,
        task: str,
        condition: str | None = None,
        space: str = "k_pre",
        layer: int = 0,
        modality: str | None = None,
        *,
        reference: bool = False,
    ) -> tuple[torch.Tensor, list[str]]:
        """Captured vectors, in the order of `token_table()`.

        Args:
            task, condition, modality: which tokens; None takes all.
            space, layer: which vectors.
            reference: the base model's vectors at the same tokens.

        Returns:
            `[N, heads, d]` in the model's dtype on the layer's device (heads are query heads for `q`, else KV heads),
            and the cluster of each of the N tokens.

        Raises:
            InputError: a layer or space that was not captured.
            CaptureError: the reference pass missed some of the tokens.
        """
        if layer not in self.layers:
            raise InputError("layer", layer, f"captured layers are {self.layers}")
        if space not in self._spaces:
            raise InputError("space", space, f"captured spaces are {' + '.join(self._spaces)}")
        table = self._tokens.table()
        chosen = table["task"] == task
        if condition is not None:
            chosen &= table["condition"] == condition
        if modality is not None:
            chosen &= table["modality"] == modality
        table = table[chosen]
        if table.empty:
            return self._no_vectors(space, layer), []
        store = self._tokens
        stored = table["stored"].to_numpy(copy=True)
        if reference:
            store = self._reference
            places = store.table().set_index(_SAME_TOKEN)["stored"]
            aligned = places.reindex(pd.MultiIndex.from_frame(table[_SAME_TOKEN]))
            if aligned.isna().any():
                raise CaptureError(f"the reference pass missed {int(aligned.isna().sum())} of the tokens of {task}")
            stored = aligned.to_numpy(np.int64, copy=True)
        return store.vectors(space, layer, stored), table["cluster"].tolist()

    def _no_vectors(self, space: str, layer: int) -> torch.Tensor:
        """`[0, heads, d]`."""
        site = next(site for site in self._sites if site.layer == layer)
        heads = site.n_heads if space == "q" else site.n_kv_heads
        device = next(site.attention.parameters()).device
        return torch.empty(0, heads, site.head_dim, dtype=self._decoder.model.dtype, device=device)

    def gather(self, gather: Gather) -> None:
        """Bring what several processes captured to one of them, which then holds the rows of all; the others hold none.

        All of them must call this, with the same spaces and layers.

        Args:
            gather: brings the tensors `[n, ...]` of all processes, n unequal, to one of them, in order; the others get
                an empty list.
        """
        none = {(space, layer): self._no_vectors(space, layer) for space in self._spaces for layer in self.layers}
        for store in (self._tokens, self._reference):
            store.gather(gather, none)
        self._attention.gather(gather)

    def token_table(self) -> pd.DataFrame:
        """Captured tokens with `records.TOKEN_COLUMNS`, ordered by task, condition, cluster, document, position.

        `keys_row` is -1 throughout: who writes the keys numbers them.
        """
        return self._tokens.table()[list(TOKEN_COLUMNS)]

    def attention_table(self) -> pd.DataFrame:
        """Attention of the last prompt token with `records.ATTENTION_COLUMNS`, per document, layer and head group."""
        return self._attention.table()


def _chosen_sites(decoder: Decoder, layers: str | Sequence[int]) -> tuple[KeySite, ...]:
    if layers == "all":
        return decoder.sites
    available = {site.layer: site for site in decoder.sites}
    missing = [layer for layer in layers if layer not in available]
    if missing or not layers:
        value = missing[0] if missing else layers
        raise InputError("layers", value, f"layers with keys of their own are {sorted(available)}; or use layers=all")
    return tuple(available[layer] for layer in sorted(set(map(int, layers))))
