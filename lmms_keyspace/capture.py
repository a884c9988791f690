"""Capture: keys at the sampled tokens and attention of the last prompt token, while a model generates.

The key is what enters RoPE. Hooks observe and return nothing; they are in place only inside `Capture.batch`, so a model
is untouched outside it and generates the same text inside it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import nn

from lmms_keyspace.attention import check_implementation
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import Decoder, KeySite, refuse_compiled
from lmms_keyspace.recording import CaptureError, Recording
from lmms_keyspace.records import ATTENTION_COLUMNS, SEGMENTS, SPACES, TEXT, TOKEN_COLUMNS, VISUAL
from lmms_keyspace.tokens import Prompt, TokenLabels

_TOKEN_ORDER = ["task", "condition", "cluster", "doc_id", "position"]
_SAME_TOKEN = ["task", "doc_id", "position"]


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


class _TokenStore:
    """Captured vectors in order of arrival, and what each belongs to."""

    def __init__(self) -> None:
        self.documents: set[tuple[str, int]] = set()
        self._tables: list[pd.DataFrame] = []
        self._vectors: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)

    def refuse_repeats(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if (row.prompt.task, row.prompt.doc_id) in self.documents:
                raise CaptureError(f"{row.prompt.task} document {row.prompt.doc_id} was captured already")

    def add(self, rows: Sequence[Row], table: pd.DataFrame, vectors: Mapping[tuple[str, int], torch.Tensor]) -> None:
        self.documents.update((row.prompt.task, row.prompt.doc_id) for row in rows)
        if len(table):
            self._tables.append(table)
            for key, values in vectors.items():
                self._vectors[key].append(values)

    def table(self) -> pd.DataFrame:
        """Tokens in canonical order; `stored` is the place among the vectors."""
        if len(self._tables) > 1:
            self._tables = [pd.concat(self._tables, ignore_index=True)]
        if not self._tables:
            return pd.DataFrame({name: [] for name in (*TOKEN_COLUMNS, "stored")})
        table = self._tables[0]
        return table.assign(stored=np.arange(len(table))).sort_values(_TOKEN_ORDER, ignore_index=True)

    def vectors(self, space: str, layer: int, stored: np.ndarray) -> torch.Tensor:
        parts = self._vectors[space, layer]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts)]
        return parts[0][torch.as_tensor(stored, device=parts[0].device)]


class Capture:
    """Captures keys of sampled tokens and attention of the last prompt token, batch by batch.

    What is held is bounded by the sampler: per selected document at most `tokens` visual and `tokens` text vectors per
    layer, KV head and space, in the model's dtype on the layer's device, and 16 float32 per document and layer for
    attention.

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
        self._tokens = _TokenStore()
        self._reference = _TokenStore()
        self._attention: list[pd.DataFrame] = []
        self._checked = False

    @property
    def layers(self) -> list[int]:
        """The layers captured, ascending."""
        return [site.layer for site in self._sites]

    @property
    def captured(self) -> set[tuple[str, int]]:
        """(task, doc_id) of every row that went through `batch`."""
        return set(self._tokens.documents)

    def memory_estimate(self, selected: int, documents: int = 0, *, tokens: int = 32, reference: bool = False) -> int:
        """Upper bound of the bytes held at the end of a run.

        Args:
            selected: documents whose keys are captured.
            documents: documents whose attention is captured.
            tokens: captured tokens per modality and document.
            reference: whether the base model's keys are held too.
        """
        width = 0
        for site in self._sites:
            for space in self._spaces:
                width += (site.n_heads if space == "q" else site.n_kv_heads) * site.head_dim
        itemsize = torch.empty(0, dtype=self._decoder.model.dtype).element_size()
        keys = selected * 2 * tokens * width * itemsize * (2 if reference else 1)
        return keys + documents * len(self._sites) * 16 * 4

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
        recording = Recording(
            self._decoder,
            self._sites,
            self._spaces,
            [row.input_ids for row in rows],
            [row.positions for row in rows],
            attention=True,
            self_check=not self._checked,
        )
        with recording.installed():
            yield
        recording.finish()
        self._checked = True
        self._tokens.add(rows, _token_rows(rows, recording), recording.vectors())
        self._attention.append(_attention_rows(rows, recording, self._sites))

    @contextmanager
    def reference_batch(self, rows: Sequence[Row]) -> Iterator[None]:
        """As `batch`, with the adapter disabled inside: the base model's vectors at the same tokens.

        Raises:
            InputError: the model has no adapter.
            CaptureError: as `batch`.
        """
        if not isinstance(self._model, PeftModel):
            raise InputError("reference", "self", "the model has no adapter to disable; use reference=none")
        self._reference.refuse_repeats(rows)
        recording = Recording(
            self._decoder,
            self._sites,
            self._spaces,
            [row.input_ids for row in rows],
            [row.positions for row in rows],
            attention=False,
            self_check=False,
        )
        with ExitStack() as stack:
            stack.enter_context(self._model.disable_adapter())
            stack.enter_context(recording.installed())
            yield
        recording.finish()
        self._reference.add(rows, _token_rows(rows, recording), recording.vectors())

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
            site = next(site for site in self._sites if site.layer == layer)
            heads = site.n_heads if space == "q" else site.n_kv_heads
            return torch.empty(0, heads, site.head_dim, dtype=self._decoder.model.dtype), []
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

    def token_table(self) -> pd.DataFrame:
        """Captured tokens with `records.TOKEN_COLUMNS`, ordered by task, condition, cluster, document, position.

        `keys_row` is -1 throughout: who writes the keys numbers them.
        """
        return self._tokens.table()[list(TOKEN_COLUMNS)].astype(dict(TOKEN_COLUMNS))

    def attention_table(self) -> pd.DataFrame:
        """Attention of the last prompt token with `records.ATTENTION_COLUMNS`, one row per document and layer."""
        empty = pd.DataFrame({name: [] for name in ATTENTION_COLUMNS})
        table = pd.concat(self._attention, ignore_index=True) if self._attention else empty
        table = table.sort_values(["task", "condition", "cluster", "doc_id", "layer"], ignore_index=True)
        return table[list(ATTENTION_COLUMNS)].astype(dict(ATTENTION_COLUMNS))


def _chosen_sites(decoder: Decoder, layers: str | Sequence[int]) -> tuple[KeySite, ...]:
    if layers == "all":
        return decoder.sites
    available = {site.layer: site for site in decoder.sites}
    missing = [layer for layer in layers if layer not in available]
    if missing or not layers:
        value = missing[0] if missing else layers
        raise InputError("layers", value, f"layers with keys of their own are {sorted(available)}; or use layers=all")
    return tuple(available[layer] for layer in sorted(set(map(int, layers))))


def _token_rows(rows: Sequence[Row], recording: Recording) -> pd.DataFrame:
    """`TOKEN_COLUMNS` of the captured tokens of a batch, in the order of its vectors."""
    parts = []
    for row in rows:
        if not row.positions.size:
            continue
        at, labels, shas = row.positions, row.labels, row.prompt.image_shas
        image = labels.image_index[at]
        parts.append(
            pd.DataFrame(
                {
                    "task": row.prompt.task,
                    "doc_id": row.prompt.doc_id,
                    "cluster": row.prompt.cluster,
                    "condition": row.prompt.condition,
                    # A text token carries the first image of its prompt.
                    "image_sha": [shas[max(index, 0)] if shas else "" for index in image],
                    "prefix_hash": _prefix_hashes(row),
                    "modality": labels.modality[at],
                    "segment": labels.segment[at],
                    "position": at,
                    "image_index": image,
                    "grid_row": labels.grid_row[at],
                    "grid_column": labels.grid_column[at],
                    "token_id": row.input_ids[at],
                }
            )
        )
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True)
    rotary = recording.rotary_positions()
    return table.assign(
        position_t=rotary[0],
        position_h=rotary[1],
        position_w=rotary[2],
        key_norm=recording.token_norms(),
        keys_row=-1,
    )


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


def _attention_rows(rows: Sequence[Row], recording: Recording, sites: Sequence[KeySite]) -> pd.DataFrame:
    """`ATTENTION_COLUMNS` of a batch, one row per document and layer."""
    modality = recording.padded([row.labels.modality for row in rows])
    segment = recording.padded([row.labels.segment for row in rows])
    inside = (segment[:, :, None] == np.array(SEGMENTS)).astype(np.float32)  # [B, P, segments]
    visual, text = (modality == VISUAL).astype(np.float32), (modality == TEXT).astype(np.float32)
    prompts = pd.DataFrame(
        {
            "task": [row.prompt.task for row in rows],
            "doc_id": [row.prompt.doc_id for row in rows],
            "cluster": [row.prompt.cluster for row in rows],
            "condition": [row.prompt.condition for row in rows],
            "head_group": "all",
            **dict(zip((f"n_{name}" for name in SEGMENTS), inside.sum(1).T.astype(np.int32), strict=True)),
        }
    )
    tables = []
    for site, seen in zip(sites, recording.last_queries(), strict=True):
        mass = np.einsum("bp,bps->bs", seen.mass, inside)
        image_share = _mean(visual, seen.visible)
        tables.append(
            prompts.assign(
                layer=site.layer,
                layer_type=site.layer_type,
                **dict(zip((f"mass_{name}" for name in SEGMENTS), mass.T, strict=True)),
                image_over_uniform=_ratio(mass[:, SEGMENTS.index("image")], image_share),
                qk_visual=_mean(seen.scores, visual),
                qk_text=_mean(seen.scores, text),
                key_norm_visual=_mean(seen.key_norms, visual),
                key_norm_text=_mean(seen.key_norms, text),
            )
        )
    return pd.concat(tables, ignore_index=True)


def _ratio(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(values, by, out=np.full(values.shape, np.nan, np.float32), where=by > 0))


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over columns `[B, P] -> [B]`, NaN where the weights are zero."""
    return _ratio((values * weights).sum(1), weights.sum(1))
