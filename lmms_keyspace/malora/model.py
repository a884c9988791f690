"""The MaLoRA tuner: puts `MaloraLinear` layers into a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from lmms_keyspace.errors import InputError

from .config import MaloraConfig
from .layer import WHY_NO_MERGE, MaloraLayer, MaloraLinear
from .modality import ModalityMask
from .targets import Target, find_targets, matches


class MaloraModel(BaseTuner):
    """Tuner of PEFT type MALORA; made by `peft.get_peft_model` and `PeftModel.from_pretrained`.

    The tuner hangs the hooks of the modality mask on the model, so that they are there however it was made, and takes
    them off again in `unload`.

    Raises:
        InputError: the targets do not fit the model (see `targets.find_targets`), or a layer is quantized otherwise
            than by bitsandbytes.
    """

    prefix: str = "malora_"
    tuner_layer_cls = MaloraLayer
    _check_target_module_exists = staticmethod(matches)  # type: ignore[assignment]

    def _prepare_adapter_config(  # type: ignore[override]  # the config is always ours
        self, peft_config: MaloraConfig, model_config: dict[str, Any]
    ) -> MaloraConfig:
        """PEFT calls this once per adapter, before it looks for the layers."""
        model = cast(PreTrainedModel, self.model)
        self._targets: dict[str, Target] = find_targets(peft_config, model)
        if "modality" not in self.__dict__:
            self.modality, self._hooks = ModalityMask.attach(model)
        return peft_config

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
            target.update_layer(adapter_name, peft_config, self._targets[current_key])
            return
        layer = MaloraLinear(target, adapter_name, peft_config, self._targets[current_key], self.modality)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not automatically trainable
        self._replace_module(parent, target_name, layer, target)
        self._hooks.append(parent.register_forward_pre_hook(self.modality.before_attention, with_kwargs=True))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT asks here whether a call mixes adapters, and drops the names otherwise."""
        if kwargs.get("adapter_names") is not None:
            raise InputError(
                "adapter_names", kwargs["adapter_names"], "MaLoRA has one set of adapters a call; use `set_adapter`."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise InputError("merge", self.active_adapters, WHY_NO_MERGE)

    def unload(self) -> nn.Module:
        """The base model without adapters and without hooks."""
        model = super().unload()
        for hook in self._hooks:
            hook.remove()
        return model
