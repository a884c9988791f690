"""Which linear layers of a model an adapter goes into, found in the model itself and not by a pattern of names.

`families.decoder_sites` knows where a decoder makes its keys; the projections beside them are the places for adapters.
All of it works on a `skeleton` too, a model without weights, so that bad settings are found before a model is loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import Decoder, decoder_sites

from .config import MaloraConfig


@dataclass(frozen=True)
class Slot:
    """The rows `start` to `stop` of a linear layer's output that make one projection, and the attention heads in them.

    The output of `o` has no heads, which is 0 here.
    """

    start: int
    stop: int
    heads: int


@dataclass(frozen=True)
class Target:
    """One linear layer that a MaLoRA adapter goes into.

    Attributes:
        in_features: width of its input.
        rows: ranges (start, stop) of its output that get an update: all of it, except in a fused layer.
        heads: attention heads in these rows; 0 where there are none.
    """

    in_features: int
    rows: tuple[tuple[int, int], ...]
    heads: int

    @property
    def out_features(self) -> int:
        """Number of rows that get an update."""
        return sum(stop - start for start, stop in self.rows)


def skeleton(model_config: Any) -> PreTrainedModel:
    """The model of a config on torch's meta device: modules, names and shapes, no weights.

    Raises:
        InputError: transformers knows no vision-language model for this config.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(copy.deepcopy(model_config))
    except ValueError as error:
        raise InputError(
            "model", type(model_config).__name__, "give the config of a vision-language model of transformers."
        ) from error
    return model


def slots(decoder: Decoder) -> dict[str, dict[str, Slot]]:
    """Full module name -> projection -> rows, for every linear layer of the decoder's attention."""
    names = {id(module): name for name, module in decoder.model.named_modules()}
    found: dict[str, dict[str, Slot]] = {}
    for site in decoder.sites:
        attention = names[id(site.attention)]
        heads = {"q": site.n_heads, "k": site.n_kv_heads, "v": site.n_kv_heads, "o": 0}
        for projection, count in heads.items():
            layer = getattr(site.attention, f"{projection}_proj", None)
            if layer is not None:
                found[f"{attention}.{projection}_proj"] = {projection: Slot(0, int(layer.out_features), count)}
        if hasattr(site.attention, "qkv_proj"):
            fused, start = {}, 0
            for projection in ("q", "k", "v"):
                stop = start + heads[projection] * site.head_dim
                fused[projection] = Slot(start, stop, heads[projection])
                start = stop
            found[f"{attention}.qkv_proj"] = fused
    return found


def pattern(decoder: Decoder, projections: Sequence[str]) -> str:
    """Regex over full module names that matches these projections of the decoder and nothing else.

    Raises:
        InputError: no layer of the decoder makes one of them.
    """
    endings = set()
    for projection in projections:
        mine = {name.rpartition(".")[2] for name, parts in slots(decoder).items() if projection in parts}
        if not mine:
            raise InputError("projections", projection, f"the decoder of {decoder.architecture} has no such layer.")
        endings |= mine
    names = "|".join(sorted(endings))
    return rf"{re.escape(decoder.family.decoder)}\.layers\.\d+\.self_attn\.({names})"


def matches(config: Any, name: str) -> Any:
    """Whether the adapter of a config goes into the module of this name; PEFT's own mark for an excluded one."""
    found = check_target_module_exists(config, name)
    if not isinstance(config, MaloraConfig) or not found or config.layers_to_transform is None:
        # A match object says no more than True; PEFT's mark of an excluded module is falsy and must stay itself.
        return True if found else found
    index = re.search(r"\.layers\.(\d+)\.", name)
    return index is not None and int(index[1]) in config.layers_to_transform


def find_targets(config: MaloraConfig, model: PreTrainedModel) -> dict[str, Target]:
    """Full module name -> layer that the adapter goes into. Writes the pattern into a config that names no layers.

    Args:
        config: the adapter.
        model: a vision-language model, or its `skeleton`.

    Raises:
        InputError: the model has no decoder that `families` knows, a layer index does not exist, nothing matches, a
            match is no linear layer of the decoder (a vision tower has a `k_proj` too), or the gate `head` is asked
            for where the output has no heads.
    """
    decoder = decoder_sites(model)
    n_layers = decoder.text_config.num_hidden_layers
    missing = [layer for layer in config.layers_to_transform or () if layer >= n_layers]
    if missing:
        raise InputError("layers_to_transform", missing, f"the decoder has layers 0 to {n_layers - 1}.")
    if config.target_modules is None:
        config.target_modules = pattern(decoder, config.projections)
    known = slots(decoder)
    found = {}
    for name, module in model.named_modules():
        if matches(config, name) is not True:
            continue
        if not name.startswith(decoder.family.decoder + "."):
            raise InputError(
                "target_modules",
                config.target_modules,
                f"it matches {name!r} outside the decoder {decoder.family.decoder!r}; MaLoRA tells visual from text "
                "tokens there only. Leave target_modules out, or put the decoder's name into the pattern.",
            )
        found[name] = _target(config, name, module, known.get(name, {}))
    if not found:
        where = "" if config.layers_to_transform is None else f" in the layers {config.layers_to_transform}"
        raise InputError(
            "target_modules",
            config.target_modules,
            f"it matches no module of this model{where}; leave it out for the {' and '.join(config.projections)} "
            "projections of the decoder.",
        )
    return found


def _target(config: MaloraConfig, name: str, module: nn.Module, parts: Mapping[str, Slot]) -> Target:
    inner: Any = getattr(module, "base_layer", module)  # of a layer that an earlier adapter has wrapped
    if not (hasattr(inner, "in_features") and hasattr(inner, "out_features")):
        raise InputError("target_modules", name, f"MaLoRA adapts linear layers only; this is a {type(inner).__name__}.")
    chosen = list(parts.values())
    if len(parts) > 1:
        chosen = [slot for projection, slot in parts.items() if projection in config.projections]
        if not chosen:
            raise InputError(
                "projections", config.projections, f"{name} makes {', '.join(parts)}; name at least one of them."
            )
    heads = sum(slot.heads for slot in chosen)
    if config.gate == "head" and not heads:
        raise InputError("gate", "head", f"the output of {name} has no heads; take the gate 'token' for it.")
    rows = tuple((slot.start, slot.stop) for slot in chosen) or ((0, int(inner.out_features)),)
    return Target(int(inner.in_features), rows, heads)


def check_targets(config: PeftConfig, model_config: Any) -> None:
    """Check an adapter's targets against a model that is not loaded.

    Args:
        config: of MaLoRA, or of a plain LoRA, which is refused outside the decoder as well.
        model_config: transformers config of the model.

    Raises:
        InputError: as `find_targets`; or MaLoRA on a checkpoint that is quantized otherwise than by bitsandbytes.
    """
    model = skeleton(model_config)
    if isinstance(config, MaloraConfig):
        quantization = getattr(model_config, "quantization_config", None) or {"quant_method": "bitsandbytes"}
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method.value
        if method != "bitsandbytes":
            raise InputError(
                "pretrained",
                f"quantized by {method}",
                "MaLoRA adapts layers that are not quantized, or by bitsandbytes.",
            )
        find_targets(copy.deepcopy(config), model)
        return
    decoder = decoder_sites(model).family.decoder
    found = [name for name, _ in model.named_modules() if matches(config, name)]
    outside = [name for name in found if not name.startswith(decoder + ".")]
    if outside or not found:
        way_out = f"it matches {outside[0]!r} outside the decoder" if outside else "it matches no module of this model"
        raise InputError("target_modules", getattr(config, "target_modules", None), f"{way_out} {decoder!r}.")
