"""One small entry per model architecture: where its text decoder is and how an image enters it.

Everything else in the package is blind to the architecture. To add one, add a `Family` to `FAMILIES` under the
`model_type` of its config. An architecture without an entry is inspected. In both cases the self-check of `capture`
says at the first batch whether what was found is right.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lmms_keyspace.errors import InputError

Grid = tuple[int, int]  # rows and columns of image tokens


@dataclass(frozen=True)
class Family:
    """What the package must know of an architecture.

    Attributes:
        connector: what joins vision and text: linear | mlp | resampler | q-former, or unknown.
        image_grids: (config, processor output) -> one grid per image of the batch, in order, or None when the image
            tokens are no plain raster (tiles).
        decoder: dotted path from the model to the text decoder, which has `layers` and `rotary_emb`.
        placeholder: name in the config of the token that stands for an image in a prompt's text.
    """

    connector: str
    image_grids: Callable[[Any, Mapping[str, Any]], list[Grid] | None]
    decoder: str = "model.language_model"
    placeholder: str = "image_token_id"


def _no_raster(config: Any, inputs: Mapping[str, Any]) -> None:
    return None


def _patch_raster(config: Any, inputs: Mapping[str, Any]) -> list[Grid] | None:
    """LLaVA-1.5: one token per patch, the class token dropped."""
    vision = config.vision_config
    # Pixtral pads images of unequal size to one tensor, and `full` keeps the class token.
    if config.vision_feature_select_strategy != "default" or vision.model_type == "pixtral":
        return None
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return []
    return [(pixels.shape[-2] // vision.patch_size, pixels.shape[-1] // vision.patch_size)] * pixels.shape[0]


def _merged_raster(config: Any, inputs: Mapping[str, Any]) -> list[Grid]:
    """Qwen-VL: `image_grid_thw` counts patches; the merger joins `spatial_merge_size` of them per axis."""
    grids = inputs.get("image_grid_thw")
    if grids is None:
        return []
    merge = config.vision_config.spatial_merge_size
    return [(int(height) // merge, int(width) // merge) for _, height, width in grids.tolist()]


def _pooled_raster(config: Any, inputs: Mapping[str, Any]) -> list[Grid]:
    """Gemma 3: every image is pooled to one square of tokens."""
    pixels = inputs.get("pixel_values")
    side = math.isqrt(config.mm_tokens_per_image)
    return [] if pixels is None else [(side, side)] * pixels.shape[0]


def _sized_raster(config: Any, inputs: Mapping[str, Any]) -> list[Grid]:
    """Mistral 3: rows of merged patches, a break token after each."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return []
    side = config.vision_config.patch_size * config.spatial_merge_size
    return [(int(height) // side, int(width) // side) for height, width in sizes.tolist()]


FAMILIES: Mapping[str, Family] = {
    "llava": Family("mlp", _patch_raster),
    "llava_next": Family("mlp", _no_raster),
    "llava_onevision": Family("mlp", _no_raster),
    "qwen2_vl": Family("mlp", _merged_raster),
    "qwen2_5_vl": Family("mlp", _merged_raster),
    "qwen3_vl": Family("mlp", _merged_raster),
    "qwen3_5": Family("mlp", _merged_raster),
    "internvl": Family("mlp", _no_raster),
    "gemma3": Family("linear", _pooled_raster, placeholder="boi_token_index"),
    "mistral3": Family("mlp", _sized_raster),
    "idefics2": Family("resampler", _no_raster, decoder="model.text_model"),
    "idefics3": Family("linear", _no_raster, decoder="model.text_model"),
    "smolvlm": Family("linear", _no_raster, decoder="model.text_model"),
    "instructblip": Family("q-former", _no_raster, decoder="language_model.model"),
}

# Architectures that have no key space shared by image and text, with the reason.
NO_JOINT_KEYS: Mapping[str, str] = {
    "mllama": "images enter through cross-attention layers, so image and text keys never share a layer",
    "idefics": "images enter through gated cross-attention layers, so image and text keys never share a layer",
    "florence2": "it is an encoder-decoder; the decoder reaches the image through cross-attention",
    "vision-encoder-decoder": "it is an encoder-decoder; the decoder reaches the image through cross-attention",
    "pix2struct": "it is an encoder-decoder; the decoder reaches the image through cross-attention",
    "udop": "it is an encoder-decoder; the decoder reaches the image through cross-attention",
    "blip": "the text decoder reaches the image through cross-attention",
    "blip-2": "its decoders (OPT, T5) have no rotary positions, so there is no key that enters RoPE",
    "git": "it has absolute positions, so there is no key that enters RoPE",
    "kosmos-2": "it has absolute positions, so there is no key that enters RoPE",
    "mistral4": "latent attention has no key per head before RoPE",
    "mistral_large4": "latent attention has no key per head before RoPE",
}

# Text decoders whose `k_norm` works on `[B, KV heads, T, d]`; the others have `[B, T, KV heads, d]` there.
_HEADS_FIRST = frozenset({"gemma3_text"})


@dataclass(frozen=True, eq=False)
class KeySite:
    """A decoder layer that has keys of its own."""

    layer: int
    block: nn.Module  # the decoder layer
    attention: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    layer_type: str  # full | sliding
    heads_first: bool = False  # the key module gives `[B, KV heads, T, d]`

    @cached_property
    def _key_name(self) -> str:
        return _key_name(self.attention) or "k_proj"

    @property
    def key_module(self) -> nn.Module:
        """The module that makes the key that enters RoPE: `k_norm` where there is one, else `k_proj`, else the fused
        `qkv_proj`.

        Looked up on each use: loading an adapter puts a new module in its place.
        """
        module = getattr(self.attention, self._key_name)
        assert isinstance(module, nn.Module)
        return module

    def keys(self, output: torch.Tensor) -> torch.Tensor:
        """The keys `[B, T, KV heads, d]` in the key module's output."""
        if self.heads_first:
            return output.transpose(1, 2)
        if self._key_name == "qkv_proj":
            query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
            output = output[..., query : query + key]
        return output.reshape(*output.shape[:2], self.n_kv_heads, self.head_dim)

    @property
    def apply_rope(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The architecture's own rotation: (q, k `[B, H, T, d]`, cos, sin) -> rotated q and k."""
        rotate = vars(sys.modules[type(self.attention).__module__])["apply_rotary_pos_emb"]
        return rotate  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Decoder:
    """The text decoder of a vision-language model, as capture sees it."""

    architecture: str  # model_type of the config
    family: Family
    image_token_id: int  # stands for one visual token in the model's input
    placeholder_id: int  # stands for an image in a prompt's text
    sites: tuple[KeySite, ...]
    model: PreTrainedModel  # without the adapter's wrapper
    text_model: nn.Module

    @property
    def text_config(self) -> Any:
        """Config of the text decoder; its `_attn_implementation` is the one in force."""
        return self.text_model.config

    @property
    def connector(self) -> str:
        """What joins vision and text."""
        return self.family.connector

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """Rows and columns of image tokens, per image of a batch.

        Args:
            inputs: the processor's output for the batch.

        Returns:
            One (rows, columns) per image in order, or None where image tokens form no plain raster.
        """
        return self.family.image_grids(self.model.config, inputs)


def refuse_compiled(model: nn.Module) -> None:
    """Raise InputError for a model under torch.compile: its hooks may not fire."""
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise InputError(
            "model", "compiled", "hooks do not fire in a compiled model; load it without torch.compile, or capture=off"
        )


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself.

    Raises:
        InputError: it is compiled, or no model of transformers.
    """
    refuse_compiled(model)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise InputError("model", type(inner).__name__, "give a model of transformers, or a PeftModel around one")
    return inner


def decoder_sites(model: nn.Module) -> Decoder:
    """Find where the text decoder makes its keys. The vision tower is never among the sites.

    Args:
        model: a vision-language model of transformers, or a PeftModel around one.

    Raises:
        InputError: the architecture has no key space that image and text share, or has no entry and inspection did not
            find what capture needs; or the model is compiled.
    """
    inner = base_model(model)
    config = inner.config
    architecture = config.model_type
    if architecture in NO_JOINT_KEYS:
        reason = NO_JOINT_KEYS[architecture]
        known = ", ".join(FAMILIES)
        raise InputError(
            "pretrained", architecture, f"this architecture cannot be analyzed: {reason}; use one of {known}"
        )
    family = FAMILIES.get(architecture) or _inspected(inner)
    text_model = inner.get_submodule(family.decoder)
    return Decoder(
        architecture=architecture,
        family=family,
        image_token_id=config.image_token_id,
        placeholder_id=getattr(config, family.placeholder),
        sites=_sites(text_model),
        model=inner,
        text_model=text_model,
    )


def _sites(text_model: nn.Module) -> tuple[KeySite, ...]:
    config: Any = text_model.config
    layers: Any = text_model.layers
    window = "sliding" if getattr(config, "sliding_window", None) else "full"  # Mistral: one window for all layers
    kinds = getattr(config, "layer_types", None) or [window] * len(layers)
    sites = []
    for index, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None or _key_name(attention) is None:  # a layer without keys is absent, not zero
            continue
        sites.append(
            KeySite(
                layer=index,
                block=layer,
                attention=attention,
                n_heads=config.num_attention_heads,
                n_kv_heads=config.num_key_value_heads,
                head_dim=attention.head_dim,
                layer_type="sliding" if kinds[index].startswith("sliding") else "full",
                heads_first=config.model_type in _HEADS_FIRST,
            )
        )
    return tuple(sites)


def _key_name(attention: nn.Module) -> str | None:
    """Name of the module of an attention layer that makes the key."""
    return next((name for name in ("k_norm", "k_proj", "qkv_proj") if hasattr(attention, name)), None)


def _inspected(model: PreTrainedModel) -> Family:
    """A family for an architecture without an entry, from what the model says of itself.

    Raises:
        InputError: something is missing; says what was found and how to add an entry.
    """
    config = model.config
    decoder = None if config.is_encoder_decoder else model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    layers = list(getattr(decoder, "layers", ()))
    attentions = [layer.self_attn for layer in layers if _key_name(getattr(layer, "self_attn", layer))]
    found = {
        "a text decoder": bool(path) and decoder is not model,
        "decoder layers whose self_attn has k_norm, k_proj or qkv_proj and head_dim": bool(attentions)
        and all(hasattr(attention, "head_dim") for attention in attentions),
        "rotary_emb in the decoder": hasattr(decoder, "rotary_emb"),
        "apply_rotary_pos_emb and attention functions beside the attention class": bool(attentions)
        and {"apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"}
        <= vars(sys.modules[type(attentions[0]).__module__]).keys(),
        "image_token_id in the config": getattr(config, "image_token_id", None) is not None,
    }
    if all(found.values()):
        return Family("unknown", _no_raster, decoder=path)
    have = "; ".join(name for name, there in found.items() if there) or "nothing of use"
    missing = "; ".join(name for name, there in found.items() if not there)
    raise InputError(
        "pretrained",
        config.model_type,
        f"this architecture has no entry; found: {have}; not found: {missing}; use one of {', '.join(FAMILIES)}, or "
        "add a Family to FAMILIES in lmms_keyspace/families.py under this model_type",
    )
