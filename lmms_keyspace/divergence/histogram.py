"""Jensen-Shannon divergence from histograms of single coordinates, in nats: what most papers report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmms_keyspace import stats
from lmms_keyspace.divergence.arrays import Cloud, Floats, Groups, as_clouds, check_groups, group_codes
from lmms_keyspace.errors import InputError


@dataclass(frozen=True)
class JSHistogram:
    """JS divergence of the marginal histograms, less what equal distributions would give, averaged over coordinates.

    Edges are shared: `bins` of equal width from the smallest to the largest pooled value of each coordinate. The plain
    value of two samples of one distribution is not 0 but about (b - 1)(1/n + 1/m)/8 with b occupied bins ((b - 1)/4n
    for equal sides: the G-test's chi-squared). That is taken off. With groups it is the mean over block permutations
    instead, because tokens of one image fall into the same bins and the formula would be too small.

    It sees single coordinates: a gap that is small in each but large in all together is nearly invisible, and an
    outlier stretches the bins until everything else shares one. The value depends on the rotation of the key space.
    """

    name: str = "js_histogram"
    unit: str = "nats"
    version: str = "1"

    def __call__(
        self,
        x: Cloud,
        y: Cloud,
        *,
        bins: int = 30,
        groups_x: Groups | None = None,
        groups_y: Groups | None = None,
        n_permutations: int = 100,
        seed: int = 0,
    ) -> Floats:
        """The bias-corrected divergence of each leading index, in nats; not clipped, at most ln 2.

        Args:
            x, y: [..., n, d] and [..., m, d].
            bins: bins of each coordinate.
            groups_x, groups_y: [n], [m] names of the groups; both or neither.
            n_permutations, seed: of the null with groups.

        Raises:
            InputError: shapes that do not agree, entries that are not finite, fewer than 2 bins, no vector on a side.
        """
        x, y = as_clouds(x, y)
        check_groups(groups_x, groups_y)
        if bins < 2:
            raise InputError("bins", bins, "a histogram needs at least 2 bins")
        n, m = x.shape[-2], y.shape[-2]
        if min(n, m) == 0:
            raise InputError("x" if n == 0 else "y", "0 vectors", "a histogram needs at least 1 vector a side")
        cells = _cells(torch.cat([x, y], dim=-2), bins)
        if groups_x is None or groups_y is None:
            counts = _count(cells, np.repeat([0, 1], [n, m]), 2, bins)
            null = ((counts.sum(axis=-2) > 0).sum(axis=-1) - 1) * (1 / n + 1 / m) / 8
            left, right = counts[..., 0, :], counts[..., 1, :]
        else:
            names, codes_x, codes_y = group_codes(x, y, groups_x, groups_y)
            d = len(names)
            counts = _count(cells, np.concatenate([codes_x, codes_y + d]), 2 * d, bins)
            by_x, by_y = counts[..., :d, :], counts[..., d:, :]
            left, right = by_x.sum(axis=-2), by_y.sum(axis=-2)
            n_x, n_y = np.bincount(codes_x, minlength=d), np.bincount(codes_y, minlength=d)
            moved = stats.label_flips(n_x, n_y, n_permutations, seed) @ (by_x - by_y)
            both = (left + right)[..., None, :]
            null = _divergence((both + moved) / 2, (both - moved) / 2).mean(axis=-1)
        value: Floats = (_divergence(left, right) - null).mean(axis=-1)
        return value


def _cells(pooled: Tensor, bins: int) -> Tensor:
    """[..., d, n + m]: the bin of every value."""
    low, high = pooled.amin(dim=-2, keepdim=True), pooled.amax(dim=-2, keepdim=True)
    width = torch.where(high > low, high - low, 1.0)
    return ((pooled - low) / width * bins).long().clamp_(max=bins - 1).mT


def _count(cells: Tensor, codes: NDArray[np.int64], n_codes: int, bins: int) -> Floats:
    """[..., d, n_codes, bins]: values of each code in each bin."""
    index = torch.from_numpy(codes).to(cells.device) * bins + cells
    counts = torch.zeros(*cells.shape[:-1], n_codes * bins, dtype=torch.float64, device=cells.device)
    counts.scatter_add_(-1, index, torch.ones_like(index, dtype=torch.float64))
    return counts.cpu().numpy().reshape(*cells.shape[:-1], n_codes, bins)


def _divergence(left: Floats, right: Floats) -> Floats:
    """JS divergence of two histograms [..., bins], both sides with weight one half."""
    p, q = (side / side.sum(axis=-1, keepdims=True) for side in (left, right))
    middle = (p + q) / 2
    terms = [
        np.divide(side, middle, out=np.ones_like(side), where=side > 0) for side in (p, q)
    ]  # 0 log 0 = 0: an empty bin has ratio 1
    divergence: Floats = (p * np.log(terms[0]) + q * np.log(terms[1])).sum(axis=-1) / 2
    return divergence


js_histogram = JSHistogram()
