"""Checks and conversions that the estimators share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lmms_keyspace.errors import InputError

Cloud = ArrayLike | Tensor
Floats = NDArray[np.float64]
Groups = Sequence[object] | NDArray[np.str_]  # the group of each vector, for instance its image


def as_clouds(x: Cloud, y: Cloud) -> tuple[Tensor, Tensor]:
    """Two checked tensors [..., n, d] and [..., m, d] on x's device, in one dtype: float64 if either is, else float32.

    Raises:
        InputError: fewer than 2 dimensions, other leading shapes or widths, NaN or infinite entries.
    """
    x, y = as_cloud("x", x), as_cloud("y", y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(device=x.device, dtype=dtype)
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise InputError("y", tuple(y.shape), f"leading shape and width must be those of x, {tuple(x.shape)}")
    return x, y


def as_cloud(name: str, x: Cloud) -> Tensor:
    """A checked tensor [..., n, d], float64 as it is and everything else as float32.

    Raises:
        InputError: fewer than 2 dimensions, NaN or infinite entries.
    """
    x = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
    if x.ndim < 2:
        raise InputError(name, tuple(x.shape), "give vectors of shape [..., n, d]")
    if x.dtype != torch.float64:
        x = x.float()
    bad = int((~torch.isfinite(x)).any(dim=-1).sum())
    if bad:
        raise InputError(name, f"{bad} vectors with NaN or inf", "find out where they come from; none can be used")
    return x


def center(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds minus the mean of all their vectors, which changes no distance but keeps the digits that carry it."""
    total = x.sum(dim=-2, dtype=torch.float64) + y.sum(dim=-2, dtype=torch.float64)
    mean = (total / max(x.shape[-2] + y.shape[-2], 1)).unsqueeze(-2)
    return (x - mean).to(x.dtype), (y - mean).to(y.dtype)


def group_codes(
    x: Tensor, y: Tensor, groups_x: Groups, groups_y: Groups
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64]]:
    """Sorted names of the groups of both sides, and the index into them for every vector of x and of y.

    Raises:
        InputError: not one group per vector.
    """
    for name, cloud, groups in (("groups_x", x, groups_x), ("groups_y", y, groups_y)):
        if len(groups) != cloud.shape[-2]:
            raise InputError(name, f"{len(groups)} groups", f"name the group of each of the {cloud.shape[-2]} vectors")
    labels = np.asarray([str(g) for g in (*groups_x, *groups_y)])
    names, codes = np.unique(labels, return_inverse=True)
    return tuple(names.tolist()), codes[: len(groups_x)], codes[len(groups_x) :]


def check_groups(groups_x: Groups | None, groups_y: Groups | None) -> None:
    """Groups of both sides or of neither.

    Raises:
        InputError: groups of one side only.
    """
    if (groups_x is None) != (groups_y is None):
        missing = "groups_x" if groups_x is None else "groups_y"
        raise InputError(missing, None, "name the groups of both sides or of neither")


def groups_or_tokens(x: Tensor, y: Tensor, groups_x: Groups | None, groups_y: Groups | None) -> tuple[Groups, Groups]:
    """The groups given, or a group of its own for every vector of x and of y.

    Raises:
        InputError: groups of one side only.
    """
    check_groups(groups_x, groups_y)
    if groups_x is not None and groups_y is not None:
        return groups_x, groups_y
    n, m = x.shape[-2], y.shape[-2]
    return range(n), range(n, n + m)


def layer_clouds(
    layer: int, keys_visual: Mapping[int, Tensor], keys_text: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Captured keys [tokens, KV heads, head width] of one layer as checked clouds [KV heads, tokens, head width].

    A modality without this layer gives an empty cloud.

    Raises:
        InputError: as `as_clouds`, naming the layer.
    """
    present = keys_visual[layer] if layer in keys_visual else keys_text[layer]
    x, y = (keys.get(layer, present[:0]).transpose(0, 1) for keys in (keys_visual, keys_text))
    try:
        return as_clouds(x, y)
    except InputError as error:
        raise InputError(f"keys of layer {layer}, {error.argument}", error.value, error.way_out) from error
