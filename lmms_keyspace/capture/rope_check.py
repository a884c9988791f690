"""The self-check of capture: the key that is captured, rotated, is the key that attention used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lmms_keyspace.capture.rows import CaptureError
from lmms_keyspace.families import Decoder, KeySite

# Largest difference between a rotated key and the one that attention got, relative to the largest key entry.
_ROPE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class RopeCheck:
    """Rotates keys with the cos and sin that a layer's attention got itself."""

    def __init__(self, decoder: Decoder) -> None:
        self._architecture = decoder.architecture
        self._cos_sin: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(self, site: KeySite) -> Any:
        """A forward pre-hook of the layer's attention that keeps cos and sin."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._cos_sin[site.layer] = kwargs["position_embeddings"]

        return keep

    def compare(self, site: KeySite, keys: torch.Tensor, received: torch.Tensor) -> None:
        """Rotate `keys` `[B, n, KV, d]` and compare them with those that attention got, `[B, KV, n, d]`.

        Raises:
            CaptureError: they differ; names the layer.
        """
        unrotated = keys.transpose(1, 2)
        _, rotated = site.apply_rope(unrotated, unrotated, *self._cos_sin.pop(site.layer))
        if rotated.shape == received.shape:
            scale = received.abs().amax().float()
            difference = float((rotated.float() - received.float()).abs().amax() / scale.clamp(min=1e-30))
            if difference <= _ROPE_TOLERANCE[received.dtype]:
                return
            found = f"they differ by {difference:.1e} of the largest entry"
        else:
            found = f"their shapes are {tuple(rotated.shape)} and {tuple(received.shape)}"
        raise CaptureError(
            f"layer {site.layer}: the captured key, rotated with the layer's own cos and sin, is not the key that its "
            f"attention received ({found}); a Family for {self._architecture!r} in lmms_keyspace/families.py "
            "that fits this model is needed"
        )
