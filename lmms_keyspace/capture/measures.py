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
# A side whose weights, relative to the largest of all keys, sum to less is summed up with a largest of its own: float32
# rounds such weights to zero.
_FAINT = 1e-30
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
    sides = kinds[..., len(SEGMENTS) :]
    logits = scores + bias
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak).exp_()
    sums = weights @ kinds
    mass = sums[..., : len(SEGMENTS)] / weights.sum(-1, keepdim=True)
    visible = (bias[:, :, :1] > float("-inf")).float()
    seen = visible @ sides  # [L or 1, B, 1, 2]
    shares = seen[..., :1] / visible.sum(-1, keepdim=True)
    uniform = mass[..., :1] / shares  # 0 / 0 without an image
    counts = sides.sum(1)[:, None]
    lse = peak + sums[..., len(SEGMENTS) :].log()
    faint = (sums[..., len(SEGMENTS) :] < _FAINT) & (seen > 0)
    if faint.any():
        lse = torch.where(faint, _log_sum_exp(logits, sides), lse)
    lse = lse.masked_fill(lse == float("-inf"), float("nan"))
    by_head = torch.cat([mass, uniform, scores @ sides / counts, lse], dim=-1)
    by_kv_head = by_head.unflatten(2, (key_norms.shape[-1], -1)).mean(3)
    norms = key_norms.transpose(2, 3) @ sides / counts
    measures = torch.cat([by_kv_head, norms], dim=-1)
    return torch.cat([measures.mean(2, keepdim=True), measures], dim=2)


def _log_sum_exp(logits: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """`[L, B, H, 2]` over the keys of each side, `sides` `[B, P, 2]`."""
    one_side = torch.zeros_like(sides).masked_fill(sides == 0, float("-inf")).transpose(1, 2)[:, None]
    return (logits[..., None, :] + one_side).logsumexp(-1)


def key_kinds(rows: Sequence[Row]) -> np.ndarray:
    """`[B, P, segments + 2]`, 1 where a key is of a segment of `SEGMENTS`, visual, or text; 0 on padding."""
    padded = Padded(rows)
    segment = padded.place([row.labels.segment_codes for row in rows], -1)
    modality = padded.place([row.labels.modality_codes for row in rows], -1)
    kinds = np.empty((*segment.shape, len(SEGMENTS) + _SIDES.size), np.float32)
    np.equal(segment[..., None], np.arange(len(SEGMENTS)), out=kinds[..., : len(SEGMENTS)], casting="unsafe")
    np.equal(modality[..., None], _SIDES, out=kinds[..., len(SEGMENTS) :], casting="unsafe")
    return kinds
