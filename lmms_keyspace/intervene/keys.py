"""Interventions on keys: each visual key before RoPE is mapped by a fixed affine map of its layer and KV head.

- `mean_shift`: k + (mean of text keys - mean of visual keys). It closes the modality gap in the sense of Liang et al.
  (NeurIPS 2022, arXiv 2203.02053), the difference of the two means, and leaves the cloud's shape.
- `moment_matching`: mean_text + (k - mean_visual) sd_text / sd_visual, coordinate by coordinate: mean and spread of
  the text keys. (Of the covariance the diagonal alone; the whole matrix would need far more tokens than a run keeps.)
- `random_shift`: k + a vector as long as the mean shift of this layer and head, in a direction drawn uniformly: what a
  shift of this size does by itself. Matched random directions as a control follow arXiv 2606.20419.

That these maps are applied to keys at inference is this project's own choice. A shift of all keys alike would cancel in
the softmax; this one moves visual keys only, and RoPE turns it with each token's position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmms_keyspace.families import Decoder, KeySite
from lmms_keyspace.sampling import hash64

from .change import Change
from .moments import Moments


@dataclass(frozen=True)
class AffineMap:
    """k -> scale * k + offset; both `[KV heads, d]`."""

    scale: Tensor
    offset: Tensor


def affine_maps(kind: str, layers: Mapping[int, Moments], seed: int) -> dict[int, AffineMap]:
    """The map of every layer.

    Args:
        kind: mean_shift | moment_matching | random_shift.
        layers: layer -> moments of the base model's keys.
        seed: of the random directions.
    """
    return {layer: _affine_map(kind, moments, hash64(seed, "random_shift", layer)) for layer, moments in layers.items()}


def _affine_map(kind: str, moments: Moments, seed: int) -> AffineMap:
    shift = moments.mean_text - moments.mean_visual
    scale = torch.ones_like(shift)
    if kind == "moment_matching":
        varies = moments.sd_visual > 0  # a coordinate that never varies keeps its spread
        scale = torch.where(varies, moments.sd_text / moments.sd_visual.where(varies, scale), scale)
        shift = moments.mean_text - scale * moments.mean_visual
    elif kind == "random_shift":
        generator = torch.Generator().manual_seed(seed % 2**63)
        direction = torch.randn(shift.shape, generator=generator)
        shift = direction / direction.norm(dim=-1, keepdim=True) * shift.norm(dim=-1, keepdim=True)
    return AffineMap(scale, shift)


class KeyMaps(Change):
    """Hooks that apply the maps in a model, from now on.

    Args:
        decoder: of the model.
        maps: layer -> map, for every layer that makes keys.
    """

    def __init__(self, decoder: Decoder, maps: Mapping[int, AffineMap]) -> None:
        super().__init__(decoder)
        for site in decoder.sites:
            handle = site.key_module.register_forward_hook(self._hook(site, maps[site.layer]))
            self._installed.callback(handle.remove)

    def _hook(self, site: KeySite, mapping: AffineMap) -> Any:
        def change(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self._on:
                return None
            changed = output.clone()
            keys = site.keys(changed)  # a view: what is written into it is written into the output
            visual = self._modality.of(keys[:, :, 0])
            chosen = keys[visual].float()
            keys[visual] = (mapping.scale.to(chosen) * chosen + mapping.offset.to(chosen)).to(keys.dtype)
            return changed

        return change
