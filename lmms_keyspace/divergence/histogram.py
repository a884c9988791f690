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

    Bins are shared: `bins` of equal width from the smallest to the largest pooled value of each coordinate. A value
    counts in part for each of the two bins whose centers it lies between, in proportion to its nearness (linear
    binning: Wand, J. Comput. Graph. Stat. 3, 1994), and beyond the outermost centers for the outermost bin. So the
    divergence is continuous in the keys: with plain counts a key that crosses an edge by rounding moves it by 1e-4. To
    share out the weight is to blur, which can only lower the divergence (data processing): this stays a lower bound.

    The plain value of two samples of one distribution is not 0 but about (1/n + 1/m)/8 times the sum over bins of
    Var(w)/E w, with w a token's weight in the bin. That is taken off. (With whole counts the sum is b - 1 for b
    occupied bins: the G-test's chi-squared.) With groups it is the mean over block permutations instead, because tokens
    of one image fall into the same bins and the formula would be too small.

    It sees single coordinates: a gap that is small in each but large in all together is nearly invisible, and an
    outlier stretches the bins until everything else shares one. The value depends on the rotation of the key space.
    """

    name: str = "js_histogram"
    unit: str = "nats"
    version: str = "2"

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
        lower, share = _places(torch.cat([x, y], dim=-2), bins)
        if groups_x is None or groups_y is None:
            weights, squares = (
                _sums(lower, each, np.repeat([0, 1], [n, m]), 2, bins)
                for each in ((1 - share, share), ((1 - share) ** 2, share**2))
            )
            total, total_squares = weights.sum(axis=-2), squares.sum(axis=-2)
            ratios = np.divide(total_squares, total, out=np.zeros_like(total), where=total > 0)
            null = (ratios.sum(axis=-1) - 1) * (1 / n + 1 / m) / 8
            left, right = weights[..., 0, :], weights[..., 1, :]
        else:
            names, codes_x, codes_y = group_codes(x, y, groups_x, groups_y)
            d = len(names)
            weights = _sums(lower, (1 - share, share), np.concatenate([codes_x, codes_y + d]), 2 * d, bins)
            by_x, by_y = weights[..., :d, :], weights[..., d:, :]
            left, right = by_x.sum(axis=-2), by_y.sum(axis=-2)
            n_x, n_y = np.bincount(codes_x, minlength=d), np.bincount(codes_y, minlength=d)
            moved = stats.label_flips(n_x, n_y, n_permutations, seed) @ (by_x - by_y)
            both = (left + right)[..., None, :]
            null = _divergence((both + moved) / 2, (both - moved) / 2).mean(axis=-1)
        value: Floats = (_divergence(left, right) - null).mean(axis=-1)
        return value


def _places(pooled: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """[..., d, n + m] twice: the lower of the two bins that share each value, and the weight of the upper one."""
    low, high = pooled.amin(dim=-2, keepdim=True), pooled.amax(dim=-2, keepdim=True)
    width = torch.where(high > low, high - low, 1.0)
    # The first bin's center is 0, the last one's bins - 1.
    place = ((pooled - low).double() / width * bins - 0.5).clamp_(0, bins - 1).mT
    lower = place.long().clamp_(max=bins - 2)
    return lower, place - lower


def _sums(lower: Tensor, weights: tuple[Tensor, Tensor], codes: NDArray[np.int64], n_codes: int, bins: int) -> Floats:
    """[..., d, n_codes, bins]: by code, the sums of the weights in bin `lower` and in the one above it."""
    index = torch.from_numpy(codes).to(lower.device) * bins + lower
    sums = torch.zeros(*lower.shape[:-1], n_codes * bins, dtype=torch.float64, device=lower.device)
    for place, weight in enumerate(weights):
        sums.scatter_add_(-1, index + place, weight)
    return sums.cpu().numpy().reshape(*lower.shape[:-1], n_codes, bins)


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
