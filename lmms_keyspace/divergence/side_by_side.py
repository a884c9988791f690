"""Kernel sums of every kernel that is set beside the main one, from one pass over the distances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lmms_keyspace.divergence.arrays import Floats, Groups, center, group_codes
from lmms_keyspace.divergence.centroid import mmd2_linear
from lmms_keyspace.divergence.energy import energy_distance, minus_distance
from lmms_keyspace.divergence.laplace import laplace_kernel, mmd2_laplace
from lmms_keyspace.divergence.mmd import SCALES
from lmms_keyspace.divergence.pairs import pair_sums_each
from lmms_keyspace.records import KernelSums

MMD2 = "mmd2"


def scale_name(scale: float) -> str:
    """The estimator of one Gaussian whose squared bandwidth is `scale` times the layer's."""
    return f"{MMD2}_scale_{scale:g}"


_BY_TILE = (mmd2_laplace.name, energy_distance.name, *(scale_name(scale) for scale in SCALES[::-1]))
# Estimators whose statistic is `stats.mmd2_from_sums` of their own kernel sums.
KERNEL_ESTIMATORS = (MMD2, *_BY_TILE, mmd2_linear.name)


def kernel_sums_by_estimator(
    x: Tensor, y: Tensor, *, groups_x: Groups, groups_y: Groups, bandwidth2: Floats
) -> dict[str, KernelSums]:
    """Sums of the kernel mixture (`mmd2`), of each of its scales, of the Laplace kernel and of the energy distance.

    Halving a scale squares its Gaussian, so all scales cost one exponential; the other two kernels cost one more.

    Args:
        x, y: [..., n, d] and [..., m, d].
        groups_x, groups_y: [n], [m] names of the groups.
        bandwidth2: squared bandwidth [...].

    Returns:
        Estimator -> sums [..., D, D]. The statistic of each estimator is `stats.mmd2_from_sums` of its sums.

    Raises:
        InputError: as `kernel_sums`.
    """
    widest = max(SCALES)

    def kernels(exponent: Tensor) -> Iterator[Tensor]:
        """From minus the squared distance in units of the widest scale."""
        yield laplace_kernel(exponent * widest)
        yield minus_distance(exponent.clone())
        exponent.exp_()
        for _ in SCALES:
            yield exponent
            exponent.square_()

    each = pair_sums_each(
        x,
        y,
        groups_x=groups_x,
        groups_y=groups_y,
        bandwidth2=bandwidth2 * widest,
        kernels=kernels,
        n_kernels=len(_BY_TILE),
    )
    sums = {name: _part(each, k) for k, name in enumerate(_BY_TILE)}
    energy = sums[energy_distance.name]
    unit = np.sqrt(bandwidth2 * widest)[..., None, None]
    sums[energy_distance.name] = replace(energy, vv=energy.vv * unit, tt=energy.tt * unit, vt=energy.vt * unit)
    sums[MMD2] = _part(each, slice(2, None))
    return sums


def linear_sums(x: Tensor, y: Tensor, *, groups_x: Groups, groups_y: Groups) -> KernelSums:
    """Sums of the kernel a.b, from the sum of the vectors of each group."""
    x, y = center(x, y)
    names, *codes = group_codes(x, y, groups_x, groups_y)
    totals = []
    for cloud, code in zip((x, y), codes, strict=True):
        empty = cloud.new_zeros(*cloud.shape[:-2], len(names), cloud.shape[-1], dtype=torch.float64)
        totals.append(empty.index_add_(-2, torch.from_numpy(code).to(cloud.device), cloud.double()))
    a, b = totals
    vv, tt, vt = ((left @ right.mT).cpu().numpy() for left, right in ((a, a), (b, b), (a, b)))
    n_x, n_y = (np.bincount(code, minlength=len(names)) for code in codes)
    return KernelSums(vv, tt, vt, n_x, n_y, names)


def _part(each: KernelSums, which: int | slice) -> KernelSums:
    """One kernel's sums, or the mean over several."""
    parts = (m[which] if isinstance(which, int) else m[which].mean(axis=0) for m in (each.vv, each.tt, each.vt))
    vv, tt, vt = parts
    return replace(each, vv=vv, tt=tt, vt=vt)
