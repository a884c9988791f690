"""One small entry per model architecture: where its text decoder is and how an image enters it.

Everything else in the package is blind to the architecture. To add one, add a `Family` to `FAMILIES` under the
`model_type` of its config; the self-check of `capture` says at the first batch whether the entry is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
        connector: what joins vision and text: linear | mlp | resampler | q-former.
        image_grids: (config, processor output) -> one grid per image of the batch, in order, or None when the image
            tokens are no plain raster (tiles, line breaks between rows).
        decoder: dotted path from the model to the text decoder, which has `layers` and `rotary_emb`.
    """

    connector: str
    image_grids: Callable[[Any, Mapping[str, Any]], list[Grid] | None]
    decoder: str = "model.language_model"


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


FAMILIES: Mapping[str, Family] = {
    "llava": Family("mlp", _patch_raster),
    "llava_next": Family("mlp", _no_raster),
    "llava_onevision": Family("mlp", _no_raster),
    "qwen2_vl": Family("mlp", _merged_raster),
    "qwen2_5_vl": Family("mlp", _merged_raster),
    "qwen3_vl": Family("mlp", _merged_raster),
}

# Architectures that have no key space shared by image and text, with the reason.
NO_JOINT_KEYS: Mapping[str, str] = {
    "mllama": "images enter through cross-attention layers, so image and text keys never share a layer",
    "idefics": "images enter through gated cross-attention layers, so image and text keys never share a layer",
    "florence2": "it is an encoder-decoder; the decoder reaches the image through cross-attention",
    "blip": "the text decoder reaches the image through cross-attention",
    "git": "it has absolute positions, so there is no key that enters RoPE",
}


@dataclass(frozen=True, eq=False)
class KeySite:
    """A decoder layer that has keys of its own."""

    layer: int
    attention: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    layer_type: str  # full | sliding

    @property
    def key_module(self) -> nn.Module:
        """The module whose output is the key that enters RoPE: `k_norm` where there is one, else `k_proj`.

        Looked up on each use: loading an adapter puts a new module in its place.
        """
        name = "k_norm" if hasattr(self.attention, "k_norm") else "k_proj"
        module = getattr(self.attention, name)
        assert isinstance(module, nn.Module)
        return module

    @property
    def apply_rope(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The architecture's own rotation: (q, k `[B, H, T, d]`, cos, sin) -> rotated q and k."""
        rotate = vars(sys.modules[type(self.attention).__module__])["apply_rotary_pos_emb"]
        return rotate  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Decoder:
    """The text decoder of a vision-language model, as capture sees it."""

    architecture: str  # model_type of the config
    connector: str
    image_token_id: int
    sites: tuple[KeySite, ...]
    model: PreTrainedModel  # without the adapter's wrapper
    text_model: nn.Module

    @property
    def text_config(self) -> Any:
        """Config of the text decoder; its `_attn_implementation` is the one in force."""
        return self.text_model.config

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """Rows and columns of image tokens, per image of a batch.

        Args:
            inputs: the processor's output for the batch.

        Returns:
            One (rows, columns) per image in order, or None where image tokens form no plain raster.
        """
        return FAMILIES[self.architecture].image_grids(self.model.config, inputs)


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
        InputError: the architecture has no entry, or no key space that image and text share; or the model is compiled.
    """
    inner = base_model(model)
    config = inner.config
    architecture = config.model_type
    family = FAMILIES.get(architecture)
    if family is None:
        raise InputError("pretrained", architecture, _refusal(inner))
    text_model = inner.get_submodule(family.decoder)
    return Decoder(
        architecture=architecture,
        connector=family.connector,
        image_token_id=config.image_token_id,
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
        if attention is None:  # a layer without keys (linear attention) is absent, not zero
            continue
        sites.append(
            KeySite(
                layer=index,
                attention=attention,
                n_heads=config.num_attention_heads,
                n_kv_heads=config.num_key_value_heads,
                head_dim=attention.head_dim,
                layer_type="sliding" if kinds[index].startswith("sliding") else "full",
            )
        )
    return tuple(sites)


def _refusal(model: PreTrainedModel) -> str:
    architecture = model.config.model_type
    if architecture in NO_JOINT_KEYS:
        return f"this architecture cannot be analyzed: {NO_JOINT_KEYS[architecture]}; use one of {', '.join(FAMILIES)}"
    found = sorted({name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".k_proj")})
    seen = f"k_proj modules were found under {', '.join(found[:4])}" if found else "no k_proj module was found"
    return (
        f"this architecture has no entry ({seen}); use one of {', '.join(FAMILIES)}, or add a Family to FAMILIES in "
        "lmms_keyspace/families.py under this model_type"
    )
