"""The two alignment terms of MaLoRA, per KV head, with gradients.

arXiv 2510.26721 names them (multi-kernel MMD, Gram reference regularization) without formulas in the text at hand; the
forms here are this project's own, with anchor, warm-up and frozen bandwidths. Precedents: several kernels in an MMD
loss, DAN (Long et al., arXiv 1502.02791); a loss on the difference of two Gram matrices, DINOv3's Gram anchoring (arXiv
2508.10104). `lmms_keyspace.divergence` measures the same MMD^2 for reports: it returns numpy, works tile by tile and
leaves out pairs of tokens of one image. Here the token U-statistic is differentiated on one small batch, where leaving
those pairs out would leave too few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmms_keyspace.errors import InputError

SCALES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
ANCHORS = ("text", "symmetric")


def mmd2_loss(
    visual: Tensor, text: Tensor, bandwidth2: Tensor, *, anchor: str = "text", scales: Sequence[float] = SCALES
) -> Tensor:
    """Multi-kernel MMD^2 between visual and text keys, the token U-statistic (Gretton et al., JMLR 13, 2012, Lemma 6).

    kappa(a, b) = mean over scales u of exp(-|a - b|^2 / (u * bandwidth2)), with bandwidth2 frozen from the base model,
    so that the loss cannot fall by spreading the keys of both modalities.

    Args:
        visual, text: adapted keys [heads, n, width] and [heads, m, width].
        bandwidth2: squared bandwidth of the base model [heads].
        anchor: `text` moves visual keys only (text keys are detached), `symmetric` moves both.
        scales: multiples of bandwidth2.

    Returns:
        [heads], unitless, in the dtype of the keys but at least float32; may be negative.

    Raises:
        InputError: fewer than 2 tokens on a side, or an unknown anchor.
    """
    if anchor not in ANCHORS:
        raise InputError("anchor", anchor, f"choose one of {', '.join(ANCHORS)}.")
    n, m = visual.shape[-2], text.shape[-2]
    if min(n, m) < 2:
        raise InputError("batches", (n, m), "the MMD term needs at least 2 visual and 2 text tokens.")
    visual, text = _at_least_float32(visual), _at_least_float32(text)
    if anchor == "text":
        text = text.detach()
    # Distances do not change under a shift, but a large common offset (the bias of some key projections) eats digits.
    offset = text.detach().mean(dim=-2, keepdim=True)
    visual, text = visual - offset, text - offset
    width2 = bandwidth2.to(visual)[..., None, None]
    return (
        _mean_off_diagonal(_mixture(visual, visual, width2, scales))
        + _mean_off_diagonal(_mixture(text, text, width2, scales))
        - 2 * _mixture(visual, text, width2, scales).mean(dim=(-2, -1))
    )


def gram_loss(keys: Tensor, reference: Tensor) -> Tensor:
    """Gram reference term: |K K^T - K0 K0^T|_F^2 / |K0 K0^T|_F^2 with K, K0 centered over the tokens.

    Zero under a common translation or rotation of the keys, so a modality may move as a whole; it grows when the cloud
    shrinks, spreads or tears. (The cosine form, 2 (1 - linear CKA), does not see a change of scale.)

    Args:
        keys: adapted keys of one modality [heads, n, width].
        reference: keys of the base projection for the same layer inputs, same shape; detached here.

    Returns:
        [heads], unitless, at least 0.

    Raises:
        InputError: fewer than 2 tokens.
    """
    if keys.shape[-2] < 2:
        raise InputError("batches", keys.shape[-2], "the Gram term needs at least 2 visual and 2 text tokens.")
    keys, reference = _at_least_float32(keys), _at_least_float32(reference.detach())
    keys = keys - keys.mean(dim=-2, keepdim=True)
    reference = reference - reference.mean(dim=-2, keepdim=True)
    target = reference @ reference.mT
    return (keys @ keys.mT - target).square().sum(dim=(-2, -1)) / target.square().sum(dim=(-2, -1))


def warmup(step: int, steps: int, share: float) -> float:
    """The share of the MMD weight that acts at a step: it rises linearly from 1 / w at the first to 1 at the w-th.

    That it rises, linearly and over a tenth of the steps as the trainers have it, is this project's own choice.

    Args:
        step: from 0.
        steps: of the whole training.
        share: w / steps, from 0 (no warm-up) to 1.
    """
    return min(1.0, (step + 1) / max(1, round(share * steps)))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mixture(x: Tensor, y: Tensor, width2: Tensor, scales: Sequence[float]) -> Tensor:
    """Mean kernel [heads, n, m]."""
    distance2 = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    exponent = distance2.clamp_min(0) / -width2  # rounding may leave a distance just below 0
    return torch.stack([torch.exp(exponent / scale) for scale in scales]).mean(dim=0)


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    n = kernel.shape[-1]
    return (kernel.sum(dim=(-2, -1)) - kernel.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))
