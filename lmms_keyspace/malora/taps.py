"""The keys of adapted decoder layers during a forward pass, with gradients, beside those of the frozen layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import KeySite, decoder_sites

KEY_SPACES = ("k_pre", "k_post")  # the key that enters RoPE, and the key after it: `records.SPACES`


@dataclass(eq=False)
class KeyTap:
    """One adapted key projection, and what it saw in the forward pass run under `tapped`.

    Attributes:
        site: the attention layer.
        module: the adapted linear layer that makes its keys.
        space: k_pre, the key that enters RoPE, or k_post, the key after it.
        inputs: `[batch, tokens, in]`, of the linear layer, detached.
        keys: `[batch, tokens, KV heads, width]`, adapted, with gradient.
        base: the same from the frozen layer and the same inputs, detached. Layers below it may be adapted: this is what
            the frozen layer makes of their outputs, not the base model's key.
    """

    site: KeySite
    module: nn.Module
    space: str
    inputs: Tensor | None = None
    keys: Tensor | None = None
    base: Tensor | None = None
    _rotation: tuple[Tensor, Tensor] | None = None

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return self.site.layer

    def clear(self) -> None:
        """Let go of the tensors of the last forward pass."""
        self.inputs = self.keys = self.base = self._rotation = None

    def _on_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rotation = kwargs["position_embeddings"]

    def _on_linear(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.inputs = args[0].detach()

    @torch.no_grad()
    def _on_base(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.site.key_module is not self.module:  # a norm follows; its hooks are ours and not for this
            output = output.unflatten(-1, (self.site.n_kv_heads, self.site.head_dim))
            output = self.site.key_module.forward(output.transpose(1, 2) if self.site.heads_first else output)
        self.base = self._in_space(self.site.keys(output))

    def _on_keys(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.keys = self._in_space(self.site.keys(output))

    def _in_space(self, keys: Tensor) -> Tensor:
        if self.space == "k_pre":
            return keys
        assert self._rotation is not None
        keys = keys.transpose(1, 2)
        return self.site.apply_rope(keys, keys, *self._rotation)[1].transpose(1, 2)


def key_taps(model: PeftModel, space: str = "k_pre") -> list[KeyTap]:
    """One tap per adapted key projection of the decoder, by layer.

    Args:
        model: with an adapter of any of PEFT's methods that wrap linear layers.
        space: of `KEY_SPACES`.

    Raises:
        InputError: no key projection of the decoder has an adapter, or an unknown space.
    """
    if space not in KEY_SPACES:
        raise InputError("space", space, f"choose one of {', '.join(KEY_SPACES)}.")
    taps = []
    for site in decoder_sites(model).sites:
        linear = getattr(site.attention, "k_proj" if hasattr(site.attention, "k_proj") else "qkv_proj")
        if isinstance(linear, BaseTunerLayer):
            taps.append(KeyTap(site, linear, space))  # type: ignore[arg-type]  # tuner layers are modules, too
    if not taps:
        raise InputError("target_modules", type(model).__name__, "no key projection of the decoder has an adapter.")
    return taps


@contextmanager
def tapped(taps: Sequence[KeyTap]) -> Iterator[None]:
    """Fill the taps during the forward passes inside."""
    handles = []
    for tap in taps:
        handles += [
            tap.module.register_forward_hook(tap._on_linear),
            tap.module.get_submodule("base_layer").register_forward_hook(tap._on_base),
            tap.site.key_module.register_forward_hook(tap._on_keys),
        ]
        if tap.space == "k_post":
            handles.append(tap.site.attention.register_forward_pre_hook(tap._on_attention, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
