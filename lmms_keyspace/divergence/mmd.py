"""Squared maximum mean discrepancy with a mixture of Gaussian kernels.

kappa(a, b) = mean over scales u of exp(-|a - b|^2 / (u * bandwidth2)), as in the MaLoRA loss of this package and in
DAN (Long et al., arXiv 1502.02791). Estimator: Gretton et al., JMLR 13, 2012. MMD^2 has no unit and is at most 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lmms_keyspace.divergence.arrays import Cloud, Floats, Groups
from lmms_keyspace.divergence.bandwidth import median_bandwidth2
from lmms_keyspace.divergence.pairs import pair_sums, positive, token_sums, u_statistic
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums

SCALES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
ESTIMATOR_VERSION = "1"


@dataclass(frozen=True)
class GaussianMixture:
    """Mean over scales of exp(-distance^2 / scale), from minus the squared distance in units of the widest scale.

    Halving a scale squares its kernel, so scales that are each half of the next cost one exponential together.

    Attributes:
        descending: the scales, widest first.
    """

    descending: tuple[float, ...]

    @staticmethod
    def of(scales: Sequence[float]) -> GaussianMixture:
        """The mixture over `scales`.

        Raises:
            InputError: no scale, or one that is not positive and finite.
        """
        if not len(scales):
            raise InputError("scales", scales, "give at least one scale")
        return GaussianMixture(tuple(np.sort(positive("scales", scales, (len(scales),)))[::-1].tolist()))

    def __call__(self, exponent: Tensor) -> Tensor:
        widest, *narrower = self.descending
        if any(wider != 2 * scale for wider, scale in pairwise(self.descending)):
            total = torch.exp(exponent)
            for scale in narrower:
                total += torch.exp(exponent * (widest / scale))
        else:
            kernel = exponent.exp_()
            total = kernel.clone()
            for _ in narrower:
                total.addcmul_(kernel, kernel)
                kernel.square_()
        return total.div_(len(self.descending))


def kernel_sums(
    x: Cloud,
    y: Cloud,
    *,
    groups_x: Groups,
    groups_y: Groups,
    bandwidth2: ArrayLike | Tensor,
    scales: Sequence[float] = SCALES,
) -> KernelSums:
    """Group-by-group sums of the kernel, within x, within y and between them: see `pairs.pair_sums`.

    Args:
        x, y: [..., n, d] ("visual") and [..., m, d] ("text").
        groups_x, groups_y: [n], [m] names of the groups, for instance the image of each token; shared names are the
            same group.
        bandwidth2: squared bandwidth, of the leading shape [...] or a scalar.
        scales: multiples of bandwidth2 over which the kernel is averaged.

    Returns:
        Sums [..., D, D] over the D groups of both sides, in sorted order. The diagonals of vv and tt hold each token's
        kernel with itself, too; the cluster U-statistic leaves the diagonals out.

    Raises:
        InputError: shapes that do not agree, entries that are not finite, a bandwidth or scale that is not positive.
    """
    kernel = GaussianMixture.of(scales)
    return pair_sums(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=_widest(bandwidth2, kernel), kernel=kernel)


def mmd2(
    x: Cloud,
    y: Cloud,
    *,
    groups_x: Groups | None = None,
    groups_y: Groups | None = None,
    bandwidth2: ArrayLike | Tensor | None = None,
    scales: Sequence[float] = SCALES,
) -> Floats:
    """Unbiased MMD^2 between x and y.

    With groups the cluster U-statistic: pairs of tokens of one group are left out of all three sums, between x and y
    too. Without groups the token U-statistic (Gretton et al. 2012, Lemma 6), which is biased upwards when tokens of
    one image share an effect.

    Args:
        x, y: [..., n, d] and [..., m, d].
        groups_x, groups_y: [n], [m] names of the groups; both or neither.
        bandwidth2: squared bandwidth [...] or a scalar; None takes `median_bandwidth2(x, y)`. Give the base model's
            to compare models.
        scales: multiples of bandwidth2 over which the kernel is averaged.

    Returns:
        [...]; may be negative, as an unbiased estimate of 0 must.

    Raises:
        InputError: as `kernel_sums`; groups on one side only; fewer than 2 groups, or without groups 2 tokens, a side.
    """
    kernel = GaussianMixture.of(scales)
    if bandwidth2 is None:
        bandwidth2 = median_bandwidth2(x, y)
    return u_statistic(x, y, groups_x, groups_y, _widest(bandwidth2, kernel), kernel)


def mmd2_biased(
    x: Cloud, y: Cloud, *, bandwidth2: ArrayLike | Tensor | None = None, scales: Sequence[float] = SCALES
) -> Floats:
    """The V-statistic of MMD^2 (Gretton et al. 2012, equation 5), for comparison with papers that report it.

    It pairs every vector with itself, so it is never negative and about (1/n + 1/m)(1 - E k) where there is no
    difference: .02 at 64 vectors a side of width 128, .001 at 1,024. Not a measure to compare across sample sizes.

    Args:
        x, y, bandwidth2, scales: as `mmd2`.

    Returns:
        [...], 0 or more.

    Raises:
        InputError: as `kernel_sums`; no vector on a side.
    """
    kernel = GaussianMixture.of(scales)
    if bandwidth2 is None:
        bandwidth2 = median_bandwidth2(x, y)
    vv, tt, vt, n, m = token_sums(x, y, _widest(bandwidth2, kernel), kernel)
    for name, size in (("x", n), ("y", m)):
        if size < 1:
            raise InputError(name, f"{size} vectors", "a mean needs at least 1")
    return np.maximum(vv / n**2 + tt / m**2 - 2 * vt / (n * m), 0)  # rounding may leave it just below 0


def mmd_biased(
    x: Cloud, y: Cloud, *, bandwidth2: ArrayLike | Tensor | None = None, scales: Sequence[float] = SCALES
) -> Floats:
    """The square root of `mmd2_biased`, which older papers call MMD. Its floor falls only as 1/sqrt(n)."""
    return np.sqrt(mmd2_biased(x, y, bandwidth2=bandwidth2, scales=scales))


def _widest(bandwidth2: ArrayLike | Tensor, kernel: GaussianMixture) -> Floats:
    """Squared bandwidth of the widest Gaussian, the unit in which `GaussianMixture` takes distances."""
    return positive("bandwidth2", bandwidth2) * kernel.descending[0]
