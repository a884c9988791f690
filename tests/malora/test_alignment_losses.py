"""The MMD and Gram terms against float64 oracles, their invariances and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor

from lmms_keyspace import divergence
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora.losses import SCALES, gram_loss, mmd2_loss, warmup


def clouds(seed: int, heads: int = 3, n: int = 7, m: int = 9, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(heads, n, width, generator=generator, dtype=torch.float64) + 1.5
    text = torch.randn(heads, m, width, generator=generator, dtype=torch.float64)
    return visual, text, torch.rand(heads, generator=generator, dtype=torch.float64) * 10 + 1


def oracle_mmd2(x: np.ndarray, y: np.ndarray, width2: float) -> float:
    """Lemma 6 of Gretton et al. 2012, pair by pair from scipy's distances."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.mean([np.exp(-cdist(a, b, "sqeuclidean") / (u * width2)) for u in (0.25, 0.5, 1, 2, 4)], axis=0)

    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    return float(
        (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * kernel(x, y).mean()
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 12))
def test_mmd2_equals_the_oracle(seed: int, n: int, m: int) -> None:
    visual, text, width2 = clouds(seed, n=n, m=m)
    expected = [oracle_mmd2(x, y, w) for x, y, w in zip(visual.numpy(), text.numpy(), width2.tolist(), strict=True)]
    for anchor in ("text", "symmetric"):
        np.testing.assert_allclose(mmd2_loss(visual, text, width2, anchor=anchor), expected, atol=1e-12)


def test_mmd2_equals_the_divergence_that_reports_use() -> None:
    visual, text, width2 = clouds(0)
    assert SCALES == divergence.SCALES
    np.testing.assert_allclose(
        mmd2_loss(visual, text, width2), divergence.mmd2(visual, text, bandwidth2=width2.numpy()), atol=1e-12
    )


def test_mmd2_in_half_precision_with_a_large_common_offset() -> None:
    """A key bias of hundreds, as some models have, must not eat the digits: computed from the same rounded keys."""
    visual, text, width2 = clouds(1)
    shifted = [(x + 600).to(torch.float32) for x in (visual, text)]
    expected = mmd2_loss(shifted[0].double(), shifted[1].double(), width2)
    torch.testing.assert_close(mmd2_loss(*shifted, width2).double(), expected, atol=1e-4, rtol=0)
    halves = [x.to(torch.bfloat16) for x in (visual, text)]
    result = mmd2_loss(*halves, width2)
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result.double(), mmd2_loss(halves[0].double(), halves[1].double(), width2), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("anchor", ["text", "symmetric"])
def test_gradient_of_mmd2(anchor: str) -> None:
    visual, text, width2 = (x.requires_grad_() for x in clouds(2, heads=2, n=4, m=5, width=3))
    width2 = width2.detach()
    if anchor == "symmetric":
        assert torch.autograd.gradcheck(lambda v, t: mmd2_loss(v, t, width2, anchor="symmetric"), (visual, text))
    assert torch.autograd.gradcheck(lambda v: mmd2_loss(v, text.detach(), width2, anchor=anchor), (visual,))
    mmd2_loss(visual, text, width2, anchor=anchor).sum().backward()
    assert (text.grad is None) == (anchor == "text")


def test_gradient_of_gram() -> None:
    keys, reference, _ = clouds(3, heads=2, n=4, m=4, width=3)
    keys.requires_grad_()
    reference.requires_grad_()
    assert torch.autograd.gradcheck(lambda k: gram_loss(k, reference), (keys,))
    gram_loss(keys, reference).sum().backward()
    assert reference.grad is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_gram_sees_scale_and_shape_but_not_translation_and_rotation(seed: int) -> None:
    keys, other, _ = clouds(seed, n=8, m=8)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(gram_loss(keys @ rotation + 7, keys), zero, atol=1e-20, rtol=0)
    for scale in (0.5, 1.3, 2.0):  # |s^2 G - G|^2 / |G|^2 = (s^2 - 1)^2
        torch.testing.assert_close(gram_loss(scale * keys, keys), zero + (scale**2 - 1) ** 2)
    expected = []
    for k, k0 in zip(keys.numpy(), other.numpy(), strict=True):
        g, g0 = (np.einsum("id,jd->ij", c, c) for c in (k - k.mean(0), k0 - k0.mean(0)))
        expected.append(((g - g0) ** 2).sum() / (g0**2).sum())
    np.testing.assert_allclose(gram_loss(keys, other), expected, rtol=1e-10)


def test_the_weight_of_the_mmd_rises_linearly_and_stays() -> None:
    assert [warmup(step, 20, 0.2) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warmup(step, 20, 0.0) for step in range(2)] == [1.0, 1.0]
    assert warmup(19, 20, 1.0) == 1.0


def test_bad_input() -> None:
    visual, text, width2 = clouds(4)
    with pytest.raises(InputError, match="2 visual and 2 text"):
        mmd2_loss(visual[:, :1], text, width2)
    with pytest.raises(InputError, match="symmetric"):
        mmd2_loss(visual, text, width2, anchor="visual")
    with pytest.raises(InputError, match="Gram"):
        gram_loss(visual[:, :1], visual[:, :1])
