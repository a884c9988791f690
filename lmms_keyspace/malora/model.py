"""The MaLoRA tuner: puts `MaloraLinear` layers into a vision-language model."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from lmms_keyspace.errors import InputError

from .config import MaloraConfig
from .layer import WHY_NO_MERGE, MaloraLayer, MaloraLinear
from .modality import ModalityMask


class MaloraModel(BaseTuner):
    """Tuner of PEFT type MALORA; made by `peft.get_peft_model` and `PeftModel.from_pretrained`.

    The tuner hangs the hooks of the modality mask on the model, so that they are there however it was made, and takes
    them off again in `unload`.

    Raises:
        InputError: the model is not a vision-language model with a decoder of its own, a target lies outside the
            decoder (a vision tower has a `k_proj` too), a target is not linear, or a layer index does not exist.
    """

    prefix: str = "malora_"
    tuner_layer_cls = MaloraLayer

    def _pre_injection_hook(  # type: ignore[override]  # the config is always ours
        self, model: PreTrainedModel, config: MaloraConfig, adapter_name: str
    ) -> None:
        decoder = decoder_name(model)
        n_layers = model.config.get_text_config().num_hidden_layers
        missing = [layer for layer in config.layers_to_transform or () if layer >= n_layers]
        if missing:
            raise InputError("layers_to_transform", missing, f"the decoder has layers 0 to {n_layers - 1}.")
        outside = [
            name
            for name, _ in model.named_modules()
            if self._check_target_module_exists(config, name) is True and not name.startswith(decoder + ".")
        ]
        if outside:
            raise InputError(
                "target_modules",
                config.target_modules,
                f"it matches {outside[0]!r} outside the decoder {decoder!r}; MaLoRA tells visual from text tokens "
                "there only. Put the decoder's name into the pattern.",
            )
        if "modality" not in self.__dict__:
            self.modality, self._hooks = ModalityMask.attach(model)

    @staticmethod
    def _check_target_module_exists(config: MaloraConfig, key: str) -> Any:  # type: ignore[override]
        found = check_target_module_exists(config, key)
        if not found or config.layers_to_transform is None:
            # A match object says no more than True; PEFT's mark of an excluded module is falsy and must stay itself.
            return True if found else found
        index = re.search(r"\.layers\.(\d+)\.", key)
        return index is not None and int(index[1]) in config.layers_to_transform

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: MaloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MaloraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = MaloraLinear(target, adapter_name, peft_config, self.modality)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not automatically trainable
        self._replace_module(parent, target_name, layer, target)
        self._hooks.append(parent.register_forward_pre_hook(self.modality.before_attention, with_kwargs=True))

    def _check_merge_allowed(self) -> None:
        raise InputError("merge", self.active_adapters, WHY_NO_MERGE)

    def unload(self) -> nn.Module:
        """The base model without adapters and without hooks."""
        model = super().unload()
        for hook in self._hooks:
            hook.remove()
        return model


def decoder_name(model: PreTrainedModel) -> str:
    """Full module name of the text decoder inside a vision-language model.

    Raises:
        InputError: the model has no decoder apart from its vision tower.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for name, module in model.named_modules():
        if name and module is decoder:
            return str(name)
    raise InputError(
        "model", type(model).__name__, "MaLoRA needs a transformers vision-language model with a decoder of its own."
    )
