"""The attention of the last prompt token, summed by kind of key: exact softmax attention of one query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lmms_keyspace.capture.rows import Padded, Row
from lmms_keyspace.records import MODALITIES, SEGMENTS, TEXT, VISUAL

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
_SIDES = np.array([MODALITIES.index(VISUAL), MODALITIES.index(TEXT)])


def last_query_measures(
    scores: torch.Tensor, bias: torch.Tensor, key_norms: torch.Tensor, kinds: torch.Tensor
) -> torch.Tensor:
    """Exact softmax attention of the last prompt token, summed by kind of key, for several layers at once.

    Args:
        scores: `[L, B, H, P]` scaled q.k, float32.
        bias: `[L or 1, B or 1, H or 1, P]` added by the mask, -inf where the query may not look.
        key_norms: `[L, B, P, KV]` Euclidean norms of k_pre.
        kinds: `[B, P, segments + 2]`, 1 where a key is of a segment of `SEGMENTS`, visual, or text; 0 on padding.

    Returns:
        `[L, B, 1 + KV, len(MEASURES)]`: means over all query heads, then over the query heads of each KV head. Sums of
        kinds that a row lacks are 0, means and log-sum-exps over them NaN, as is a log-sum-exp over masked keys alone.
    """
    batch = scores.shape[1]
    segments, sides = kinds[..., : len(SEGMENTS)], kinds[..., len(SEGMENTS) :]
    logits = scores + bias
    attention = logits.softmax(-1)
    mass = attention @ segments
    seen = (bias[:, :, 0] > float("-inf")).float()
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


def key_kinds(rows: Sequence[Row]) -> np.ndarray:
    """`[B, P, segments + 2]`, 1 where a key is of a segment of `SEGMENTS`, visual, or text; 0 on padding."""
    padded = Padded(rows)
    segment = padded.place([row.labels.segment_codes for row in rows], -1)
    modality = padded.place([row.labels.modality_codes for row in rows], -1)
    kinds = np.empty((*segment.shape, len(SEGMENTS) + _SIDES.size), np.float32)
    np.equal(segment[..., None], np.arange(len(SEGMENTS)), out=kinds[..., : len(SEGMENTS)], casting="unsafe")
    np.equal(modality[..., None], _SIDES, out=kinds[..., len(SEGMENTS) :], casting="unsafe")
    return kinds
