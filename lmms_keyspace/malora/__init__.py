"""MaLoRA as a PEFT method: importing this package registers the PEFT type MALORA.

`peft.get_peft_model(model, MaloraConfig())`, `save_pretrained` and `PeftModel.from_pretrained` then work as for any
method of PEFT. A process that has not imported it does not know the type and refuses the adapter.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .check import AdapterInfo, check_adapter
from .config import MaloraConfig
from .layer import MaloraLayer, MaloraLinear
from .modality import ModalityMask, modality_mask, visual_token_ids
from .model import MaloraModel
from .presets import PRESETS, Preset, matched_lora_config, preset
from .targets import check_targets

__all__ = [
    "PRESETS",
    "AdapterInfo",
    "MaloraConfig",
    "MaloraLayer",
    "MaloraLinear",
    "MaloraModel",
    "ModalityMask",
    "Preset",
    "check_adapter",
    "check_targets",
    "matched_lora_config",
    "modality_mask",
    "preset",
    "visual_token_ids",
]


def _register() -> None:
    """Make PEFT know the type; PEFT's enum of types has no interface for methods that live outside PEFT."""
    name = "MALORA"
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)  # Python 3.12 looks members up on the class
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=MaloraConfig, model_cls=MaloraModel)


_register()
