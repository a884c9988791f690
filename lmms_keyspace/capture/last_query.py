"""What the last prompt token attends to: exact softmax attention of one query, summed by kind of key.

No T x T matrix is made, and layers are summed up together: on a small model the number of operations is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lmms_keyspace.records import SEGMENTS

# What `last_query_measures` gives, in order; columns of the attention table.
MEASURES = (
    *(f"mass_{segment}" for segment in SEGMENTS),
    "image_over_uniform",
    "qk_visual",
    "qk_text",
    "lse_visual",
    "lse_text",
    "key_norm_visual",
    "key_norm_text",
)
# Layers are summed up together while their scores have fewer entries than this (64 MB).
_HELD = 1 << 24


class LastQueries:
    """Collects the last prompt token's scores layer by layer.

    Args:
        kinds: `[B, P, segments + 2]`, 1 where a key is of a segment of `SEGMENTS`, visual, or text; 0 on padding.
    """

    def __init__(self, kinds: np.ndarray) -> None:
        self._kinds = torch.from_numpy(kinds)
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor]] = []
        self._biases: dict[tuple[int, int, int, int | None], tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._measures: dict[int, torch.Tensor] = {}

    def add(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        key_norms: torch.Tensor,
        *,
        row: int,
        scaling: float,
        sliding_window: int | None,
    ) -> None:
        """Take one layer: `query` `[B, H, d]`, `key` `[B, KV, n, d]`, the newest n of the P columns, `key_norms`
        `[B, P, KV]`; the rest as in `last_query_bias`."""
        columns, n = self._kinds.shape[1], key.shape[2]
        scores = last_query_scores(query, key, scaling)
        name = (id(mask), row, n, sliding_window)
        if name not in self._biases:  # layers share masks; the mask is kept so that its id stays its own
            bias = last_query_bias(mask, row=row, n=n, sliding_window=sliding_window, device=key.device)
            if n < columns:
                bias = torch.zeros(1, 1, n, device=key.device) if bias is None else bias
                bias = torch.nn.functional.pad(bias, (columns - n, 0), value=float("-inf"))
            self._biases[name] = (mask, bias)
        if n < columns:
            scores = torch.nn.functional.pad(scores, (columns - n, 0))
        self._pending.append((layer, scores, self._biases[name][1], key_norms))
        if len(self._pending) * scores.numel() >= _HELD:
            self._sum_up()

    def layers(self) -> set[int]:
        """The layers taken."""
        return {*self._measures, *(pending[0] for pending in self._pending)}

    def measures(self, layers: Sequence[int]) -> np.ndarray:
        """`[L, B, 1 + KV, len(MEASURES)]` float32, see `last_query_measures`."""
        self._sum_up()
        return torch.stack([self._measures[layer] for layer in layers]).cpu().numpy()

    def _sum_up(self) -> None:
        if not self._pending:
            return
        layers, scores, biases, norms = zip(*self._pending, strict=True)
        self._pending.clear()
        device = scores[-1].device
        same = all(bias is biases[0] for bias in biases)
        summed = last_query_measures(
            torch.stack([layer.to(device) for layer in scores]),
            _stacked(biases[:1] if same else biases, device),
            torch.stack([layer.to(device) for layer in norms]),
            self._kinds.to(device),
        )
        self._measures.update(zip(layers, summed, strict=True))


def _stacked(biases: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """`[L, B or 1, H or 1, P]`; None when there is nothing to add."""
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    filled = [torch.zeros_like(given[0]) if bias is None else bias for bias in biases]
    return torch.stack(torch.broadcast_tensors(*(bias.to(device) for bias in filled)))


def last_query_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled q.k of one query against all keys, in float32.

    Args:
        query: `[B, H, d]`.
        key: `[B, KV, n, d]`; H is a multiple of KV.

    Returns:
        `[B, H, n]`.
    """
    batch, heads, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width).float() * scaling
    return (grouped @ key.transpose(2, 3).float()).reshape(batch, heads, -1)


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


def last_query_measures(
    scores: torch.Tensor, bias: torch.Tensor | None, key_norms: torch.Tensor, kinds: torch.Tensor
) -> torch.Tensor:
    """Exact softmax attention of the last prompt token, summed by kind of key, for several layers at once.

    Args:
        scores: `[L, B, H, P]` scaled q.k, float32.
        bias: `[L or 1, B or 1, H or 1, P]` added by the mask, or None.
        key_norms: `[L, B, P, KV]` Euclidean norms of k_pre.
        kinds: `[B, P, segments + 2]`, 1 where a key is of a segment of `SEGMENTS`, visual, or text; 0 on padding.

    Returns:
        `[L, B, 1 + KV, len(MEASURES)]`: means over all query heads, then over the query heads of each KV head. Sums of
        kinds that a row lacks are 0, means and log-sum-exps over them NaN, as is a log-sum-exp over masked keys alone.
    """
    batch, columns = scores.shape[1], scores.shape[3]
    segments, sides = kinds[..., : len(SEGMENTS)], kinds[..., len(SEGMENTS) :]
    logits = scores if bias is None else scores + bias
    attention = logits.softmax(-1)
    mass = attention @ segments
    seen = segments.new_ones(1, 1, columns) if bias is None else (bias[:, :, 0] > float("-inf")).float()
    shares = (seen * sides[..., 0]).sum(-1) / seen.expand(-1, batch, -1).sum(-1)
    uniform = mass[..., :1] / shares[..., None, None]  # 0 / 0 without an image
    counts = sides.sum(1)[:, None]
    one_side = torch.zeros_like(sides).masked_fill(sides == 0, float("-inf")).transpose(1, 2)[:, None]
    lse = (logits[..., None, :] + one_side).logsumexp(-1)
    lse = lse.masked_fill(lse == float("-inf"), float("nan"))
    by_head = torch.cat([mass, uniform, scores @ sides / counts, lse], dim=-1)
    by_kv_head = by_head.unflatten(2, (key_norms.shape[-1], -1)).mean(3)
    norms = key_norms.transpose(2, 3) @ sides / counts
    measures = torch.cat([by_kv_head, norms], dim=-1)
    return torch.cat([measures.mean(2, keepdim=True), measures], dim=2)
