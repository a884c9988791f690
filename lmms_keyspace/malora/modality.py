"""Which token of a batch is visual: read once per forward pass and shared by all MaLoRA layers of a model.

A MaLoRA layer adapts the key of a visual and of a text token differently, but an attention layer only sees hidden
states. One `ModalityMask` per tuned model closes that gap: a forward pre-hook on the model reads `input_ids`, the
layers look the mask up.

Rules:
- A token is visual when its id is an image (or video) placeholder of the model's config. Padding is text; attention
  ignores it.
- A call that continues a key-value cache without bringing images is a decoding step: its tokens are text, even if the
  model emitted the placeholder's id.
- A call that brings images but has no placeholder is an error, as is a call by `inputs_embeds` alone, where nothing
  says which token is visual; `modality_mask` gives the mask by hand there.
- The question, which MokA's cross-attention reads, is all text of the call that is neither padding nor an answer to be
  learned (a token with a label).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from lmms_keyspace.errors import InputError

# Placeholder ids in a model's config, and the arguments of `forward` that bring images for them. `generate` encodes
# the pixels once and passes `mm_encoder_outputs`, which is empty for a text-only prompt.
PLACEHOLDER_IDS = ("image_token_id", "video_token_id")
PIXEL_ARGUMENTS = ("pixel_values", "pixel_values_videos")
ENCODED_IMAGES = "mm_encoder_outputs"
IGNORED_LABEL = -100


def visual_token_ids(config: Any) -> tuple[int, ...]:
    """Ids of the placeholder tokens that stand for image features in `input_ids`.

    Args:
        config: a transformers config of a vision-language model.

    Raises:
        InputError: the config names none, so the model is not a vision-language model of a known kind.
    """
    ids = tuple(int(value) for name in PLACEHOLDER_IDS if (value := getattr(config, name, None)) is not None)
    if not ids:
        raise InputError(
            "model",
            type(config).__name__,
            "MaLoRA needs a vision-language model whose config has `image_token_id`; pass the whole model, not its "
            "language model.",
        )
    return ids


class TokenMasks(NamedTuple):
    """What the tokens of one call are; both `[batch, tokens]`, bool."""

    visual: torch.Tensor
    question: torch.Tensor


class ModalityMask:
    """The token masks of the forward pass under way, above all which tokens are visual.

    Gradient checkpointing runs a decoder layer a second time during the backward pass, possibly after further forward
    passes with other images. The mask of a recomputation is therefore found by the rotary tables
    (`position_embeddings`), which the model makes anew in every forward pass and hands to each layer, and which a
    recomputation gets back as the same object.
    """

    def __init__(self, token_ids: tuple[int, ...], parameters: tuple[str, ...]) -> None:
        """`token_ids`: ids of visual tokens; `parameters`: argument names of the model's `forward`, in order."""
        self.token_ids = token_ids
        self.parameters = parameters
        self._given: torch.Tensor | None = None
        self._current: TokenMasks | None = None
        self._running = False
        self._copies: dict[torch.device, TokenMasks] = {}
        self._by_rotary_table = WeakIdKeyDictionary()

    @classmethod
    def attach(cls, model: PreTrainedModel) -> tuple[ModalityMask, list[Any]]:
        """Make a mask for `model` and register the hooks that keep it up to date; returns it and the hook handles."""
        mask = cls(visual_token_ids(model.config), tuple(inspect.signature(model.forward).parameters))
        handles = [
            model.register_forward_pre_hook(mask.before_model, with_kwargs=True),
            model.register_forward_hook(mask.after_model, always_call=True),
        ]
        return mask, handles

    def give(self, mask: torch.Tensor | None) -> None:
        """Set, or take back, the mask for calls by `inputs_embeds`."""
        self._given = mask
        self._copies = {}

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the tuned model: read the mask of this call."""
        call = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        self._set(self._read(call))
        self._running = True

    def after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the tuned model: the mask ends with the call it was made for."""
        self._set(None)
        self._running = False

    def before_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of an adapted attention module: restore the mask when this is a recomputation."""
        rotary = kwargs.get("position_embeddings")
        table = rotary[0] if isinstance(rotary, tuple) else None
        if self._running:
            if table is not None and self._current is not None:
                self._by_rotary_table[table] = self._current
        else:
            self._set(None if table is None else self._by_rotary_table.get(table))

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Which tokens are visual, for the hidden states `[batch, tokens, width]` of a layer, on their device.

        Raises:
            InputError: no mask is known for this call, or it has another shape than the hidden states.
        """
        return self._on_device_of(hidden).visual

    def question(self, hidden: torch.Tensor) -> torch.Tensor:
        """Which tokens are the question; as `of`."""
        return self._on_device_of(hidden).question

    def _on_device_of(self, hidden: torch.Tensor) -> TokenMasks:
        """One copy per device and call, for models whose layers are spread over several."""
        masks = self._current
        if masks is None and self._given is not None:  # the decoder was called by itself
            masks = TokenMasks(self._given, ~self._given)
        if masks is None:
            raise InputError(
                "inputs_embeds",
                tuple(hidden.shape),
                "MaLoRA cannot see which tokens are visual; call the whole model with `input_ids`, or give the mask: "
                "`with lmms_keyspace.malora.modality_mask(model, mask)`.",
            )
        if masks.visual.shape != hidden.shape[:-1]:
            raise InputError(
                "modality_mask",
                tuple(masks.visual.shape),
                f"the hidden states have shape {tuple(hidden.shape)}; the mask must be [batch, tokens] of the same "
                "call, with beams and repeats already expanded.",
            )
        if hidden.device not in self._copies:
            self._copies[hidden.device] = TokenMasks(*(mask.to(hidden.device) for mask in masks))
        return self._copies[hidden.device]

    def _set(self, masks: TokenMasks | None) -> None:
        self._current = masks
        self._copies = {}

    def _read(self, call: Mapping[str, Any]) -> TokenMasks | None:
        visual = self._visual(call)
        if visual is None:
            return None  # the first adapted layer says so, if one is switched on
        question = ~visual
        real = call.get("attention_mask")
        if isinstance(real, torch.Tensor) and real.dim() == 2:  # with a cache it covers the cached tokens, too
            question = question & real[:, -visual.shape[1] :].to(question)
        labels = call.get("labels")
        if labels is not None:
            question = question & (labels == IGNORED_LABEL).to(question.device)
        return TokenMasks(visual, question)

    def _visual(self, call: Mapping[str, Any]) -> torch.Tensor | None:
        input_ids = call.get("input_ids")
        if input_ids is None:
            return self._given
        brings_images = bool(call.get(ENCODED_IMAGES)) or any(call.get(name) is not None for name in PIXEL_ARGUMENTS)
        cache = call.get("past_key_values")
        if not brings_images and cache is not None and cache.get_seq_length() > 0:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        mask = torch.isin(input_ids, torch.tensor(self.token_ids, device=input_ids.device))
        if brings_images and not mask.any():
            raise InputError(
                "input_ids",
                tuple(input_ids.shape),
                f"the call brings images but no token is a visual placeholder (ids {self.token_ids}); build the "
                "prompt with the model's own processor.",
            )
        return mask


@contextmanager
def modality_mask(model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Give the mask of visual tokens by hand for calls by `inputs_embeds`.

    Args:
        model: a model with MaLoRA layers.
        mask: bool `[batch, tokens]`, True where visual. Calls that have `input_ids` still read theirs, so the
            decoding steps of `generate(inputs_embeds=...)` are text as they should be.

    Raises:
        InputError: the model has no MaLoRA layer, or the mask is not boolean.
    """
    if mask.dtype != torch.bool:
        raise InputError("modality_mask", mask.dtype, "give a bool tensor [batch, tokens], True where visual.")
    found = (getattr(module, "modality", None) for module in model.modules())
    holders = {holder for holder in found if isinstance(holder, ModalityMask)}
    if not holders:
        raise InputError("model", type(model).__name__, "it has no MaLoRA layer; load a MALORA adapter first.")
    for holder in holders:
        holder.give(mask)
    try:
        yield
    finally:
        for holder in holders:
            holder.give(None)
