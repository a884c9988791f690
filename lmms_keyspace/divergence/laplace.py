"""Squared maximum mean discrepancy with a Laplace kernel, to see whether the Gaussian one decides the result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lmms_keyspace.divergence.arrays import Cloud, Floats, Groups
from lmms_keyspace.divergence.bandwidth import median_bandwidth2
from lmms_keyspace.divergence.pairs import positive, u_statistic


def laplace_kernel(minus_distance2: Tensor) -> Tensor:
    """exp(-distance)."""
    return torch.exp(minus_distance2.neg_().sqrt_().neg_())


@dataclass(frozen=True)
class LaplaceMMD2:
    """MMD^2 with exp(-|a - b| / bandwidth), |.| Euclidean (the Matern kernel of order 1/2).

    Euclidean, not the sum of absolute differences that other papers call Laplace: this one does not change with a
    rotation of the key space. Its tail is heavier than the Gaussian's, so it saturates later.
    """

    name: str = "mmd2_laplace"
    unit: str = ""
    version: str = "1"

    def __call__(
        self,
        x: Cloud,
        y: Cloud,
        *,
        groups_x: Groups | None = None,
        groups_y: Groups | None = None,
        bandwidth2: ArrayLike | Tensor | None = None,
    ) -> Floats:
        """MMD^2 of each leading index, unitless, at most 2.

        Args:
            x, y: [..., n, d] and [..., m, d].
            groups_x, groups_y: [n], [m] names of the groups, whose pairs are left out; both or neither.
            bandwidth2: squared bandwidth [...] or a scalar; None takes `median_bandwidth2(x, y)`.

        Returns:
            [...]; may be negative, as an unbiased estimate of 0 must.

        Raises:
            InputError: as `mmd2`.
        """
        width2 = median_bandwidth2(x, y) if bandwidth2 is None else positive("bandwidth2", bandwidth2)
        return u_statistic(x, y, groups_x, groups_y, width2, laplace_kernel)


mmd2_laplace = LaplaceMMD2()
