"""Sums over pairs of vectors by group, tile by tile, and the U-statistic that follows from them.

Every statistic of the form E k(x, x') + E k(y, y') - 2 E k(x, y), with k a function of the distance, is computed here:
MMD^2 with any radial kernel, and the energy distance with k = -distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lmms_keyspace import stats
from lmms_keyspace.divergence.arrays import Cloud, Floats, Groups, as_clouds, center, check_groups, group_codes
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums

# Minus the squared distances of a tile -> the kernel. It may overwrite its argument; -inf (an empty slot) becomes 0.
Kernel = Callable[[Tensor], Tensor]
# The same for several kernels, one after the other: each tile is summed before the next is asked for.
Kernels = Callable[[Tensor], Iterator[Tensor]]

# Tokens per side of a kernel tile: about the second-level cache of a CPU core; large enough to fill a GPU.
_TILE_CPU, _TILE_CUDA = 512, 4096
# Tokens of one group that are summed together in the kernel's dtype; everything beyond adds up in float64.
_BLOCK = 32


def pair_sums(
    x: Cloud, y: Cloud, *, groups_x: Groups, groups_y: Groups, bandwidth2: ArrayLike | Tensor, kernel: Kernel
) -> KernelSums:
    """Group-by-group sums of kernel(-|a - b|^2 / bandwidth2), within x, within y and between them.

    Args and errors: as `pair_sums_each`, with one kernel.

    Returns:
        Sums [..., D, D] over the D groups of both sides, in sorted order, with each vector's pair with itself.
    """

    def alone(minus_distance2: Tensor) -> Iterator[Tensor]:
        yield kernel(minus_distance2)

    sums = pair_sums_each(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=bandwidth2, kernels=alone, n_kernels=1)
    return replace(sums, vv=sums.vv[0], tt=sums.tt[0], vt=sums.vt[0])


def pair_sums_each(
    x: Cloud,
    y: Cloud,
    *,
    groups_x: Groups,
    groups_y: Groups,
    bandwidth2: ArrayLike | Tensor,
    kernels: Kernels,
    n_kernels: int,
) -> KernelSums:
    """`pair_sums` for several kernels of the same distances.

    Memory holds a tile of the kernel matrix at a time. Blocks of at most 32 x 32 tokens are summed in the dtype of the
    keys (float32, or float64 if given), the rest in float64. A side may be empty: its sums are 0.

    Args:
        x, y: [..., n, d] and [..., m, d].
        groups_x, groups_y: [n], [m] names of the groups; shared names are the same group.
        bandwidth2: the unit of the squared distance, of the leading shape [...] or a scalar.
        kernels: see `Kernels`; it gives `n_kernels` tiles.

    Returns:
        Sums [n_kernels, ..., D, D], see `pair_sums`.

    Raises:
        InputError: shapes that do not agree, entries that are not finite, a bandwidth that is not positive.
    """
    x, y = center(*as_clouds(x, y))
    names, codes_x, codes_y = group_codes(x, y, groups_x, groups_y)
    lead, d = x.shape[:-2], len(names)
    unit = torch.as_tensor(1 / np.sqrt(positive("bandwidth2", bandwidth2, lead))).to(x)[..., None, None]
    heads_x, heads_y = ((c * unit).reshape(prod(lead), *c.shape[-2:]) for c in (x, y))
    block = int(min(_BLOCK, max(np.bincount(codes_x, minlength=1).max(), np.bincount(codes_y, minlength=1).max())))
    order_x, owner_x = _blocks(codes_x, d, block)
    order_y, owner_y = _blocks(codes_y, d, block)
    sums = {name: np.zeros((n_kernels, len(heads_x), d, d)) for name in ("vv", "tt", "vt")}
    for h in range(len(heads_x)):
        left_x, right_x = _factors(heads_x[h], order_x)
        left_y, right_y = _factors(heads_y[h], order_y)
        for name, left, right, rows, columns in (
            ("vv", left_x, right_x, owner_x, owner_x),
            ("tt", left_y, right_y, owner_y, owner_y),
            ("vt", left_x, right_y, owner_x, owner_y),
        ):
            between = _block_sums(left, right, block, kernels, n_kernels, symmetric=name != "vt")
            for k in range(n_kernels):
                np.add.at(sums[name][k, h], (rows[:, None], columns), between[k])
    return KernelSums(
        **{name: value.reshape(n_kernels, *lead, d, d) for name, value in sums.items()},
        n_visual=np.bincount(codes_x, minlength=d),
        n_text=np.bincount(codes_y, minlength=d),
        clusters=names,
    )


def u_statistic(
    x: Cloud, y: Cloud, groups_x: Groups | None, groups_y: Groups | None, bandwidth2: ArrayLike | Tensor, kernel: Kernel
) -> Floats:
    """E k(x, x') + E k(y, y') - 2 E k(x, y), shape [...], as a cluster U-statistic, or without groups over tokens.

    Raises:
        InputError: as `pair_sums`; groups on one side only; fewer than 2 groups, or without groups 2 tokens, a side.
    """
    check_groups(groups_x, groups_y)
    if groups_x is not None and groups_y is not None:
        sums = pair_sums(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=bandwidth2, kernel=kernel)
        return stats.mmd2_from_sums(sums)
    vv, tt, vt, n, m = token_sums(x, y, bandwidth2, kernel)
    for name, size in (("x", n), ("y", m)):
        if size < 2:
            raise InputError(name, f"{size} vectors", "the U-statistic needs at least 2 a side")
    self_pair = float(kernel(torch.zeros(1, dtype=torch.float64)))
    return (vv - n * self_pair) / (n * (n - 1)) + (tt - m * self_pair) / (m * (m - 1)) - 2 * vt / (n * m)


def token_sums(
    x: Cloud, y: Cloud, bandwidth2: ArrayLike | Tensor, kernel: Kernel
) -> tuple[Floats, Floats, Floats, int, int]:
    """Sums of the kernel over all pairs within x, within y and between, each [...], and the numbers of vectors."""
    n, m = (torch.as_tensor(cloud).shape[-2] for cloud in (x, y))
    sums = pair_sums(x, y, groups_x=[""] * n, groups_y=[""] * m, bandwidth2=bandwidth2, kernel=kernel)
    return sums.vv[..., 0, 0], sums.tt[..., 0, 0], sums.vt[..., 0, 0], n, m


def positive(name: str, value: ArrayLike | Tensor, shape: tuple[int, ...] | None = None) -> Floats:
    """Positive finite numbers, broadcast to `shape` where one is given.

    Raises:
        InputError: another shape, or a number that is not positive and finite.
    """
    array = np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
    if not (np.isfinite(array) & (array > 0)).all():
        raise InputError(name, array.tolist(), "give positive finite numbers")
    if shape is None:
        return array
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


def _block_sums(left: Tensor, right: Tensor, block: int, kernels: Kernels, n_kernels: int, symmetric: bool) -> Floats:
    """[n_kernels, blocks, blocks] sums of the kernels, tile by tile; of a symmetric matrix the upper triangle is
    computed."""
    step = max(1, (_TILE_CUDA if left.is_cuda else _TILE_CPU) // block)
    rows, columns = len(left) // block, len(right) // block
    result = np.zeros((n_kernels, rows, columns))
    for i in range(0, rows, step):
        for j in range(i if symmetric else 0, columns, step):
            # Rounding may leave a distance just below 0.
            distance = (left[i * block : (i + step) * block] @ right[j * block : (j + step) * block].T).clamp_(max=0)
            for k, tile in enumerate(kernels(distance)):
                cells = tile.view(tile.shape[0] // block, block, tile.shape[1] // block, block).sum(dim=(1, 3))
                result[k, i : i + step, j : j + step] = cells.double().cpu().numpy()
            if symmetric and j > i:
                result[:, j : j + step, i : i + step] = result[:, i : i + step, j : j + step].mT
    return result
