"""The squared bandwidth of the kernels: the median heuristic, computed once on the base model and then kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lmms_keyspace.divergence.arrays import Cloud, Floats, as_clouds, center, layer_clouds
from lmms_keyspace.errors import InputError


def median_bandwidth2(x: Cloud, y: Cloud, *, seed: int = 0, max_tokens: int = 1000) -> Floats:
    """Median squared distance between pooled vectors (Gretton et al., JMLR 13, 2012, section 8).

    Both sides enter with the same number of vectors, at most `max_tokens` together, drawn without replacement and
    alike for all leading dimensions; if one side is empty the other is used alone. The median moves with the gap it is
    meant to measure, so adapted models must be given the base model's.

    Args:
        x, y: [..., n, d] and [..., m, d].
        seed: seed of the subsample.
        max_tokens: bound on the vectors that enter, which bounds memory at max_tokens^2 distances per head.

    Returns:
        [...], in squared units of x.

    Raises:
        InputError: fewer than 2 vectors, entries that are not finite, or a median of 0 (constant keys).
    """
    x, y = center(*as_clouds(x, y))
    sizes = [cloud.shape[-2] for cloud in (x, y)]
    if sum(sizes) < 2:
        raise InputError("x", f"{sum(sizes)} vectors", "a median distance needs at least 2 vectors")
    each = min(max_tokens // 2, *sizes) if min(sizes) else min(max_tokens, sum(sizes))
    rng = np.random.default_rng(seed)
    picked = [np.sort(rng.permutation(size)[:each]) for size in sizes]
    pooled = torch.cat(
        [cloud[..., torch.from_numpy(i).to(cloud.device), :] for cloud, i in zip((x, y), picked, strict=True)], dim=-2
    )
    lead = pooled.shape[:-2]
    medians = [
        float(np.median(torch.pdist(head).cpu().numpy())) ** 2
        for head in pooled.reshape(-1, *pooled.shape[-2:]).double()
    ]
    bandwidth2 = np.asarray(medians).reshape(lead)
    if (bandwidth2 <= 0).any():
        flat = np.flatnonzero(bandwidth2.reshape(-1) <= 0).tolist()
        raise InputError("x", f"constant keys at heads {flat}", "most vectors are equal, so no bandwidth can be chosen")
    return bandwidth2


def reference_bandwidths(
    keys_visual: Mapping[int, torch.Tensor], keys_text: Mapping[int, torch.Tensor], *, seed: int = 0
) -> dict[int, Floats]:
    """Squared bandwidth per KV head [H] of every layer that either modality has.

    Args:
        keys_visual, keys_text: layer -> [tokens, KV heads, head width], of the base model.
        seed: seed of the subsample of tokens.

    Raises:
        InputError: as `median_bandwidth2`, naming the layer.
    """
    result = {}
    for layer in sorted(keys_visual.keys() | keys_text.keys()):
        x, y = layer_clouds(layer, keys_visual, keys_text)
        try:
            result[layer] = median_bandwidth2(x, y, seed=seed)
        except InputError as error:
            raise InputError(f"keys of layer {layer}", error.value, error.way_out) from error
    return result
