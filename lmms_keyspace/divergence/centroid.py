"""What the centers of two clouds say: linear-kernel MMD^2, centroid distance and centered cosine.

Their cost is linear in tokens. They see a difference of means only: two clouds of one mean
and unlike shapes are equal to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmms_keyspace.divergence.arrays import Cloud, Floats, Groups, as_clouds, center, group_codes, groups_or_tokens
from lmms_keyspace.errors import InputError


class _Totals(NamedTuple):
    """Sums of vectors by group [..., D, d] in float64, and the numbers of vectors [D]."""

    total: Tensor
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class LinearMMD2:
    """MMD^2 with the kernel a.b: the squared distance of the means, without bias (Gretton et al., JMLR 13, 2012).

    Pairs of vectors of one group are left out, as in `mmd2`.
    """

    name: str = "mmd2_linear"
    unit: str = "squared unit of the keys"
    version: str = "1"

    def __call__(self, x: Cloud, y: Cloud, *, groups_x: Groups | None = None, groups_y: Groups | None = None) -> Floats:
        """|E X - E Y|^2 of each leading index.

        Args:
            x, y: [..., n, d] and [..., m, d].
            groups_x, groups_y: [n], [m] names of the groups; both or neither.

        Returns:
            [...]; may be negative, as an unbiased estimate of 0 must.

        Raises:
            InputError: shapes that do not agree, entries that are not finite, fewer than 2 groups or tokens a side.
        """
        x, y = center(*as_clouds(x, y))
        a, b = _totals(x, y, groups_x, groups_y)
        return _mean_product(a, a) + _mean_product(b, b) - 2 * _mean_product(a, b)


@dataclass(frozen=True)
class CentroidDistance:
    """|mean x - mean y|, Euclidean: the modality gap of Liang et al. (arXiv 2203.02053), on keys.

    Never 0 in a sample: without a difference its square is about tr(covariance)(1/n + 1/m). `mmd2_linear` is the
    square without that bias.
    """

    name: str = "centroid_distance"
    unit: str = "unit of the keys"
    version: str = "1"

    def __call__(self, x: Cloud, y: Cloud) -> Floats:
        """The distance of the centroids of each leading index.

        Args:
            x, y: [..., n, d] and [..., m, d].

        Returns:
            [...], 0 or more.

        Raises:
            InputError: shapes that do not agree, entries that are not finite, no vector on a side.
        """
        x, y = _not_empty(*center(*as_clouds(x, y)))
        return _numpy((x.mean(dim=-2, dtype=torch.float64) - y.mean(dim=-2, dtype=torch.float64)).norm(dim=-1))


@dataclass(frozen=True)
class CentroidCosine:
    """Inner product of the centroids of the two clouds' directions: the mean cosine of a key of x with a key of y.

    Directions are taken from the midpoint of the two means: seen from the origin, an offset that all keys share (the
    bias of the key projection) makes every cosine 1. From the midpoint the cosine of the two means themselves would be
    -1 always, so directions are averaged, not means. 0 where x and y are alike, towards -1 where they lie apart, and
    not 0 but small in size where they differ in shape only. Pairs of vectors of one group are left out.
    """

    name: str = "centroid_cosine"
    unit: str = ""
    version: str = "1"

    def __call__(self, x: Cloud, y: Cloud, *, groups_x: Groups | None = None, groups_y: Groups | None = None) -> Floats:
        """The mean cosine of each leading index.

        Args:
            x, y: [..., n, d] and [..., m, d].
            groups_x, groups_y: [n], [m] names of the groups; both or neither.

        Returns:
            [...] in [-1, 1].

        Raises:
            InputError: shapes that do not agree, entries that are not finite, no pair of unlike groups.
        """
        x, y = _not_empty(*center(*as_clouds(x, y)))
        middle = (x.mean(dim=-2, keepdim=True) + y.mean(dim=-2, keepdim=True)) / 2
        directions = [torch.nn.functional.normalize(cloud - middle, dim=-1) for cloud in (x, y)]
        return _mean_product(*_totals(directions[0], directions[1], groups_x, groups_y))


def _totals(x: Tensor, y: Tensor, groups_x: Groups | None, groups_y: Groups | None) -> tuple[_Totals, _Totals]:
    names, *codes = group_codes(x, y, *groups_or_tokens(x, y, groups_x, groups_y))
    sides = []
    for cloud, code in zip((x, y), codes, strict=True):
        empty = cloud.new_zeros(*cloud.shape[:-2], len(names), cloud.shape[-1], dtype=torch.float64)
        total = empty.index_add_(-2, torch.from_numpy(code).to(cloud.device), cloud.double())
        sides.append(_Totals(total, np.bincount(code, minlength=len(names))))
    return sides[0], sides[1]


def _mean_product(a: _Totals, b: _Totals) -> Floats:
    """Mean inner product over the pairs of vectors of unlike groups, [...]."""
    pairs = a.sizes.sum() * b.sizes.sum() - (a.sizes * b.sizes).sum()
    if pairs == 0:
        raise InputError("groups_x", f"{np.count_nonzero(a.sizes)} groups", "give vectors of at least 2 groups a side")
    product = (a.total.sum(dim=-2) * b.total.sum(dim=-2)).sum(dim=-1) - (a.total * b.total).sum(dim=(-2, -1))
    return _numpy(product / float(pairs))


def _not_empty(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, cloud in (("x", x), ("y", y)):
        if cloud.shape[-2] == 0:
            raise InputError(name, "0 vectors", "a mean needs at least 1")
    return x, y


def _numpy(value: Tensor) -> Floats:
    array: Floats = value.double().cpu().numpy()
    return array


mmd2_linear = LinearMMD2()
centroid_distance = CentroidDistance()
centroid_cosine = CentroidCosine()
