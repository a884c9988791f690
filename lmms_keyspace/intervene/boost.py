"""Raise attention to the image while a token is generated, as PAI does (Liu et al., ECCV 2024, arXiv 2407.21771).

Before the softmax, the scores a of the newest query against image tokens become a + alpha |a|, in every layer from the
third on. PAI's second part, contrasting the logits with those of a prompt without the image, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmms_keyspace.capture.attention import replaced_attention
from lmms_keyspace.capture.last_query import last_query_bias, last_query_scores
from lmms_keyspace.families import Decoder, KeySite

from .change import Change

FIRST_LAYER = 2  # PAI's own commands boost layers 2 to 31 of LLaVA-1.5-7B


class VisualBoost(Change):
    """The boost in a model, from now on.

    Args:
        decoder: of the model.
        alpha: strength; 0 changes nothing.
    """

    def __init__(self, decoder: Decoder, alpha: float) -> None:
        super().__init__(decoder)
        self._alpha = alpha
        self._visual: dict[int, Tensor] = {}  # layer -> [batch, columns so far]
        # After the mask's own hook: a call without a cache, or with an empty one, begins a new sequence.
        handle = decoder.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self._installed.callback(handle.remove)
        self._installed.enter_context(replaced_attention(decoder, self._attend))

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self._visual.clear()

    def _attend(
        self,
        original: Callable[[], Any],
        site: KeySite,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        output, weights = original()
        if not self._on or site.layer < FIRST_LAYER:
            return output, weights
        now = self._modality.of(query[:, 0])
        seen = self._visual.get(site.layer)
        visual = self._visual[site.layer] = now if seen is None else torch.cat([seen, now], dim=1)
        n = min(visual.shape[1], key.shape[2])  # a sliding cache has fewer columns, a static one more
        key, value, visual = key[:, :, :n], value[:, :, :n], visual[:, visual.shape[1] - n :]
        scaling = kwargs.get("scaling")
        scores = last_query_scores(query[:, :, -1], key, site.head_dim**-0.5 if scaling is None else scaling)
        scores = torch.where(visual[:, None], scores + self._alpha * scores.abs(), scores)
        bias = last_query_bias(
            mask,
            row=query.shape[2] - 1,
            n=n,
            sliding_window=kwargs.get("sliding_window"),
            device=key.device,
        )
        attention = (scores if bias is None else scores + bias).softmax(-1)
        grouped = attention.unflatten(1, (value.shape[1], -1)) @ value.float()  # [batch, KV heads, group, d]
        newest = grouped.flatten(1, 2).to(output.dtype)
        return torch.cat([output[:, :-1], newest[:, None]], dim=1), weights
