"""A key-value cache that is not copied for every token.

The cache that transformers makes by default joins the keys of each new token to a copy of all earlier ones, so that a
decoding step of a batch costs more for copying than for attending.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Free places after the tokens of a cache that has just been copied: so many, or this share of the tokens.
_PLACES, _SHARE = 32, 1 / 8


class GrowingLayer(DynamicLayer):
    """One layer: later tokens are written behind the earlier ones while there are free places.

    `keys` and `values` are `[B, KV heads, tokens, d]`, from the first new token on views of tensors with free places.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._room = (_Room(), _Room())

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, KV heads, n, d]` each; gives all."""
        if not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        for_keys, for_values = self._room
        self.keys = for_keys.appended(self.keys, key_states)
        self.values = for_values.appended(self.values, value_states)
        return self.keys, self.values


class _Room:
    """Free places behind a layer's keys, or behind its values."""

    def __init__(self) -> None:
        self._all = self._used = torch.empty(0)

    def appended(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        before, after = old.shape[-2], old.shape[-2] + new.shape[-2]
        # Beam search puts other tensors in place of those that were handed out.
        if old is not self._used or after > self._all.shape[-2]:
            places = after + max(_PLACES, int(after * _SHARE))
            self._all = old.new_empty(*old.shape[:-2], places, old.shape[-1])
            self._all[..., :before, :] = old
        self._all[..., before:after, :] = new
        self._used = self._all[..., :after, :]
        return self._used


def growing_cache(model: Any) -> dict[str, DynamicCache]:
    """Arguments of `generate`: the cache that transformers would make, with `GrowingLayer` for its plain layers.

    Empty where transformers makes another one: for an encoder-decoder, or where the checkpoint says which.

    Args:
        model: of transformers, or a PeftModel around one.
    """
    settings = model.generation_config
    if model.config.is_encoder_decoder or settings.cache_implementation is not None or settings.use_cache is False:
        return {}
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {"past_key_values": cache}
