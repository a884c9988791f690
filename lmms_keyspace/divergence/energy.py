"""The energy distance: a discrepancy without a bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmms_keyspace.divergence.arrays import Cloud, Floats, Groups
from lmms_keyspace.divergence.pairs import u_statistic


def minus_distance(minus_distance2: Tensor) -> Tensor:
    """The kernel of the energy distance; empty slots add nothing."""
    return -torch.where(torch.isinf(minus_distance2), 0.0, minus_distance2.neg_().sqrt_())


@dataclass(frozen=True)
class EnergyDistance:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| with Euclidean distances (Szekely and Rizzo 2013).

    J. Stat. Plan. Inference 143, 1249-1272.

    It is MMD^2 with the kernel -|a - b| (Sejdinovic et al., Ann. Stat. 41, 2013), so the estimator is the same
    U-statistic; there is no bandwidth to choose, but the value carries the unit of the keys, and a few keys of great
    norm rule it.
    """

    name: str = "energy"
    unit: str = "unit of the keys"
    version: str = "1"

    def __call__(self, x: Cloud, y: Cloud, *, groups_x: Groups | None = None, groups_y: Groups | None = None) -> Floats:
        """The energy distance of each leading index.

        Args:
            x, y: [..., n, d] and [..., m, d].
            groups_x, groups_y: [n], [m] names of the groups, whose pairs are left out; both or neither.

        Returns:
            [...]; may be negative, as an unbiased estimate of 0 must. Not its square root.

        Raises:
            InputError: shapes that do not agree, entries that are not finite, fewer than 2 groups or tokens a side.
        """
        return u_statistic(x, y, groups_x, groups_y, 1.0, minus_distance)


energy_distance = EnergyDistance()
