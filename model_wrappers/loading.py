"""Load what the arguments name: cheap checks first, weights last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from lmms_keyspace import embedded
from lmms_keyspace.errors import InputError
from lmms_keyspace.intervene.install import Intervention, install, prepare
from lmms_keyspace.malora import AdapterInfo, check_adapter
from lmms_keyspace.model_wrappers.arguments import Arguments
from lmms_keyspace.redaction import publishable


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate, with what the run's record says of it."""

    model: Any  # PreTrainedModel, or PeftModel around it
    processor: Any
    device: torch.device
    # As recorded, `redaction.publishable`: hub id, folder, or `bundled`.
    pretrained: str
    revision: str | None
    adapter: str | None
    adapter_info: AdapterInfo | None
    quantization: str | None  # 4bit or 8bit as asked for, or how the checkpoint itself is quantized
    intervention: Intervention | None

    @property
    def bundled(self) -> bool:
        return self.pretrained == "bundled"

    @property
    def changed(self) -> bool:
        """Whether it is another model than the one it is built on: by an adapter or an intervention."""
        return self.adapter is not None or self.intervention is not None


def load(arguments: Arguments) -> Loaded:
    """Load processor, model and adapter, or put the intervention in.

    Raises:
        InputError: the model's config, the adapter's headers or an intervention's run do not fit, found before the
            weights are read.
    """
    device = _device(arguments.device)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else _default_dtype(device)
    _check_attention(arguments.attn_implementation, dtype)
    asked = _quantization(arguments.quantization, dtype)
    pretrained = str(arguments.pretrained)
    try:
        config = AutoConfig.from_pretrained(pretrained, revision=arguments.revision)
    except (OSError, ValueError) as error:
        raise InputError("pretrained", pretrained, f"no model config can be read there: {error}") from error
    stored = getattr(config, "quantization_config", None)
    if asked is not None and stored is not None:
        way_out = f"the checkpoint is quantized already ({_method(stored)}); leave out the argument"
        raise InputError("quantization", arguments.quantization, way_out)
    n_layers = config.get_text_config().num_hidden_layers
    if arguments.layers is not None and arguments.layers[-1] >= n_layers:
        raise InputError("layers", arguments.layers[-1], f"the decoder has layers 0 to {n_layers - 1}")
    folder = _adapter_folder(arguments.peft)
    info = check_adapter(folder, config) if folder is not None else None
    spec = arguments.intervene
    statistics = None if spec is None else prepare(spec, config, _recorded_name(pretrained))

    processor = _processor(arguments, pretrained)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        pretrained,
        revision=arguments.revision,
        dtype=dtype,
        attn_implementation=arguments.attn_implementation,
        quantization_config=asked,
        # Quantized weights cannot be moved to a device afterwards.
        device_map={"": device} if asked is not None and arguments.device_map is None else arguments.device_map,
    )
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    if arguments.device_map is None and asked is None:
        model = model.to(device)
    model.eval()
    return Loaded(
        model=model,
        processor=processor,
        device=model.device,  # of the first layer, where the inputs go
        pretrained=_recorded_name(pretrained),
        revision=publishable(arguments.revision or getattr(config, "_commit_hash", None)),
        adapter=_recorded_name(arguments.peft) if arguments.peft else None,
        adapter_info=info,
        quantization=arguments.quantization or (_method(stored) if stored is not None else None),
        intervention=None if spec is None else install(spec, statistics, model, seed=arguments.seed),
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", name, f"torch cannot use it here ({str(error).splitlines()[0]})") from error
    return device


def _check_attention(implementation: str, dtype: torch.dtype) -> None:
    if implementation != "flash_attention_2":
        return
    if not is_flash_attn_2_available():
        raise InputError(
            "attn_implementation",
            implementation,
            "it needs the package flash-attn (pip install flash-attn) and a GPU that it supports; or use sdpa",
        )
    if dtype == torch.float32:
        raise InputError("dtype", "float32", "flash_attention_2 works in half precision; give dtype=bfloat16")


def _quantization(bits: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if bits is None:
        return None
    if not is_bitsandbytes_available():
        raise InputError(
            "quantization", bits, "it needs the package bitsandbytes: pip install 'lmms-keyspace[quantization]'"
        )
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _method(stored: Any) -> str:
    """How a checkpoint says that it is quantized."""
    return str(stored["quant_method"] if isinstance(stored, dict) else stored.quant_method)


def _processor(arguments: Arguments, pretrained: str) -> Any:
    limits = {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}
    limits = {name: value for name, value in limits.items() if value is not None}
    processor = AutoProcessor.from_pretrained(pretrained, revision=arguments.revision, **limits)
    images = processor.image_processor
    for name, value in limits.items():
        if name not in images.valid_kwargs.__annotations__:  # it would be dropped without a word
            raise InputError(name, value, f"the image processor of this model ({type(images).__name__}) has no limit")
    # Decoding continues at the right end of every row, so prompts are padded on the left.
    processor.tokenizer.padding_side = "left"
    return processor


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _adapter_folder(peft: str | None) -> Path | None:
    if peft is None:
        return None
    if Path(peft).is_dir():
        return Path(peft)
    try:
        return Path(snapshot_download(peft, allow_patterns=["adapter_config.json", "adapter_model.safetensors"]))
    except (OSError, ValueError) as error:
        raise InputError("peft", peft, f"it is no folder here and cannot be had from the hub: {error}") from error


def _recorded_name(name: str) -> str:
    """As it may be written. Bundled folders have names: their path says where the package lies, not what they are."""
    path = Path(name)
    if path == embedded.base_path():
        return "bundled"
    if path.parent == embedded.base_path().parent:
        return f"bundled/{path.name}"
    return str(publishable(name))
