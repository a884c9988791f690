"""Keys of a random projection: what a gap would be if the model's key projection had learned nothing.

The control of space `k_rand`. Inputs of the layer are the real ones; the projection is Gaussian noise whose columns
have the norms of the real columns, so that every input feature weighs as much as it does in the model.
"""

from __future__ import annotations

import torch
from torch import nn

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import KeySite

SEED = 0


def projection_of(site: KeySite) -> nn.Module:
    """The linear module that makes keys from the input of the attention layer, with or without an adapter."""
    name = "k_proj" if hasattr(site.attention, "k_proj") else "qkv_proj"
    module = getattr(site.attention, name)
    assert isinstance(module, nn.Module)
    return module


@torch.no_grad()
def random_keys(site: KeySite, hidden: torch.Tensor) -> torch.Tensor:
    """Random keys `[N, KV heads, head width]` of inputs `[N, width]`, without bias, through the layer's own `k_norm`.

    The noise depends on the layer and on the kind of device, never on batch or run.

    Raises:
        InputError: the weights of the projection are quantized, so their columns have no norm to read.
    """
    module = projection_of(site)
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    if weight is None or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or not weight.is_floating_point():
        raise InputError("spaces", "k_rand", "the key projection is quantized; load the model unquantized for k_rand")
    size = site.n_kv_heads * site.head_dim
    if not hasattr(site.attention, "k_proj"):
        queries = site.n_heads * site.head_dim
        weight = weight[queries : queries + size]
    generator = torch.Generator(device=hidden.device).manual_seed(SEED + site.layer)
    noise = torch.randn(size, hidden.shape[-1], generator=generator, device=hidden.device)
    noise *= weight.to(hidden.device).float().norm(dim=0) / noise.norm(dim=0)
    keys = (hidden.float() @ noise.T).to(hidden.dtype)
    norm = getattr(site.attention, "k_norm", None)
    if norm is not None:
        # Past the module's hooks, which count the model's own keys.
        keys = norm.forward(keys.reshape(len(keys), -1, norm.weight.numel()))
    return keys.reshape(len(keys), site.n_kv_heads, site.head_dim)
