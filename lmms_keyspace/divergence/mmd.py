"""Squared maximum mean discrepancy with a mixture of Gaussian kernels.

kappa(a, b) = mean over scales u of exp(-|a - b|^2 / (u * bandwidth2)), as in the MaLoRA loss of this package and in
DAN (Long et al., arXiv 1502.02791). Estimator: Gretton et al., JMLR 13, 2012. MMD^2 has no unit and is at most 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lmms_keyspace import stats
from lmms_keyspace.divergence.arrays import Cloud, Floats, Groups, as_clouds, center, group_codes
from lmms_keyspace.divergence.bandwidth import median_bandwidth2
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums

SCALES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
ESTIMATOR_VERSION = "1"

# Tokens per side of a kernel tile: about the second-level cache of a CPU core; large enough to fill a GPU.
_TILE_CPU, _TILE_CUDA = 512, 4096
# Tokens of one group that are summed together in the kernel's dtype; everything beyond adds up in float64.
_BLOCK = 32


def kernel_sums(
    x: Cloud,
    y: Cloud,
    *,
    groups_x: Groups,
    groups_y: Groups,
    bandwidth2: ArrayLike | Tensor,
    scales: Sequence[float] = SCALES,
) -> KernelSums:
    """Group-by-group sums of the kernel, within x, within y and between them.

    Memory holds a tile of the kernel matrix at a time. Blocks of at most 32 x 32 tokens are summed in the dtype of the
    keys (float32, or float64 if given), the rest in float64. A side may be empty: its sums are 0.

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
    x, y = center(*as_clouds(x, y))
    names, codes_x, codes_y = group_codes(x, y, groups_x, groups_y)
    lead, d = x.shape[:-2], len(names)
    width2 = _positive("bandwidth2", bandwidth2, lead)
    descending = np.sort(_positive("scales", scales, (len(scales),)))[::-1]
    if not len(descending):
        raise InputError("scales", scales, "give at least one scale")

    # In units of the widest kernel the exponent is minus the squared distance, which one matrix product gives.
    unit = torch.as_tensor(1 / np.sqrt(width2 * descending[0])).to(x)[..., None, None]
    heads_x, heads_y = ((c * unit).reshape(prod(lead), *c.shape[-2:]) for c in (x, y))
    block = min(_BLOCK, max(np.bincount(codes_x, minlength=1).max(), np.bincount(codes_y, minlength=1).max()))
    order_x, owner_x = _blocks(codes_x, d, int(block))
    order_y, owner_y = _blocks(codes_y, d, int(block))
    sums = {name: np.zeros((len(heads_x), d, d)) for name in ("vv", "tt", "vt")}
    for h in range(len(heads_x)):
        left_x, right_x = _factors(heads_x[h], order_x)
        left_y, right_y = _factors(heads_y[h], order_y)
        for name, left, right, rows, columns in (
            ("vv", left_x, right_x, owner_x, owner_x),
            ("tt", left_y, right_y, owner_y, owner_y),
            ("vt", left_x, right_y, owner_x, owner_y),
        ):
            between = _block_sums(left, right, int(block), descending, symmetric=name != "vt")
            np.add.at(sums[name][h], (rows[:, None], columns), between)
    return KernelSums(
        **{name: value.reshape(*lead, d, d) for name, value in sums.items()},
        n_visual=np.bincount(codes_x, minlength=d),
        n_text=np.bincount(codes_y, minlength=d),
        clusters=names,
    )


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
    if (groups_x is None) != (groups_y is None):
        missing = "groups_x" if groups_x is None else "groups_y"
        raise InputError(missing, None, "name the groups of both sides or of neither")
    if bandwidth2 is None:
        bandwidth2 = median_bandwidth2(x, y)
    if groups_x is not None and groups_y is not None:
        return stats.mmd2_from_sums(
            kernel_sums(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=bandwidth2, scales=scales)
        )
    n, m = (torch.as_tensor(cloud).shape[-2] for cloud in (x, y))
    for name, size in (("x", n), ("y", m)):
        if size < 2:
            raise InputError(name, f"{size} vectors", "the U-statistic needs at least 2 a side")
    sums = kernel_sums(x, y, groups_x=[""] * n, groups_y=[""] * m, bandwidth2=bandwidth2, scales=scales)
    vv, tt, vt = (matrix[..., 0, 0] for matrix in (sums.vv, sums.tt, sums.vt))
    # Each token's kernel with itself is 1.
    return (vv - n) / (n * (n - 1)) + (tt - m) / (m * (m - 1)) - 2 * vt / (n * m)


def _positive(name: str, value: ArrayLike | Tensor, shape: tuple[int, ...]) -> Floats:
    array = np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
    if not (np.isfinite(array) & (array > 0)).all():
        raise InputError(name, array.tolist(), "give positive finite numbers")
    if array.shape not in ((), shape):
        raise InputError(name, array.shape, f"give one number, or one per head: shape {tuple(shape)}")
    return np.broadcast_to(array, shape)


def _blocks(codes: NDArray[np.int64], n_groups: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens cut into blocks of `block` tokens of one group: indices [n_blocks * block], -1 where a block is short,
    and the group that owns each block."""
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=n_groups)
    per_group = -(-counts // block)
    owner = np.repeat(np.arange(n_groups), per_group)
    slots = np.full(len(owner) * block, -1, dtype=np.int64)
    first_slot = (np.cumsum(per_group) - per_group) * block
    first_token = np.cumsum(counts) - counts
    slots[first_slot[codes[order]] + np.arange(len(codes)) - first_token[codes[order]]] = order
    return slots, owner


def _factors(x: Tensor, slots: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Matrices whose product left @ right.T is minus the squared distance; empty slots are infinitely far away."""
    index = torch.from_numpy(np.maximum(slots, 0)).to(x.device)
    empty = torch.from_numpy(slots < 0).to(x.device)[:, None]
    tokens = x[index].masked_fill(empty, 0) if len(slots) else x.new_zeros(0, x.shape[-1])
    norm2 = (tokens * tokens).sum(dim=-1, keepdim=True).masked_fill(empty, torch.inf)
    one = torch.ones_like(norm2)
    return torch.cat([2 * tokens, -norm2, -one], dim=1), torch.cat([tokens, one, norm2], dim=1)


def _block_sums(left: Tensor, right: Tensor, block: int, descending: Floats, symmetric: bool) -> Floats:
    """[blocks, blocks] sums of the kernel, tile by tile; of a symmetric matrix the upper triangle is computed."""
    step = max(1, (_TILE_CUDA if left.is_cuda else _TILE_CPU) // block)
    rows, columns = len(left) // block, len(right) // block
    result = np.zeros((rows, columns))
    for i in range(0, rows, step):
        for j in range(i if symmetric else 0, columns, step):
            kernel = _mixture(
                left[i * block : (i + step) * block] @ right[j * block : (j + step) * block].T, descending
            )
            cells = kernel.view(kernel.shape[0] // block, block, kernel.shape[1] // block, block).sum(dim=(1, 3))
            result[i : i + step, j : j + step] = cells.double().cpu().numpy()
            if symmetric and j > i:
                result[j : j + step, i : i + step] = result[i : i + step, j : j + step].T
    return result


def _mixture(exponent: Tensor, descending: Floats) -> Tensor:
    """Mean over scales of exp(exponent * widest / scale). Halving a scale squares its kernel: one exp for all five."""
    kernel = torch.exp(exponent.clamp_(max=0))  # rounding may leave a distance just below 0
    total = kernel.clone()
    for wider, scale in pairwise(descending):
        kernel = kernel.square_() if wider == 2 * scale else torch.exp(exponent * (descending[0] / scale))
        total += kernel
    return total / len(descending)
