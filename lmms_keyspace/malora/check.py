"""Is an adapter folder fit for a model? Answered from two small reads, before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from lmms_keyspace.errors import InputError

from .config import MaloraConfig
from .targets import Target, find_targets, matches, skeleton

# Tensors of a method: name ending -> what each axis is: a rank that the config gives, or a width of the linear layer.
_SHAPES = {
    "MALORA": {"malora_A": ("r of A", "in"), "malora_B": ("out", "r of B"), "malora_gate_weight": ("gates", "in")},
    "LORA": {"lora_A.weight": ("r", "in"), "lora_B.weight": ("out", "r")},
}
_CONFIGS: dict[str, Any] = {"MALORA": MaloraConfig, "LORA": LoraConfig}
_BASE = "base_model.model."  # in front of a module's name in a saved adapter
# Other towers of a vision-language model number their layers too; this check is about the decoder.
_OTHER_TOWERS = re.compile(r"\b(vision|visual|audio)")


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder holds."""

    method: str  # PEFT type, e.g. MALORA or LORA
    r: int
    base_model: str | None  # name or path of the model it was trained on, as saved
    sha256: str  # of adapter_model.safetensors


def check_adapter(folder: str | Path, model_config: Any) -> AdapterInfo:
    """Check that the adapter in `folder` fits a model of this config; reads the json and the safetensors header only.

    Args:
        folder: local folder with `adapter_config.json` and `adapter_model.safetensors`.
        model_config: transformers config of the base model.

    Raises:
        InputError: for the argument `peft`: no such folder or files, weights as a pickle, a PEFT type other than
            MALORA and LORA, tensors for other layers or of other widths than the model has, or of another rank than
            the config says.
    """
    path = Path(folder)
    weights = path / SAFETENSORS_WEIGHTS_NAME
    settings = _read_config(path)
    if not weights.is_file():
        pickled = (path / WEIGHTS_NAME).is_file()
        raise InputError(
            "peft",
            str(path),
            f"it holds {WEIGHTS_NAME}, a pickle, which can run code; save the adapter as safetensors."
            if pickled
            else f"{SAFETENSORS_WEIGHTS_NAME} is missing; give a folder that `save_pretrained` wrote.",
        )
    method = settings.get("peft_type")
    if method not in _SHAPES:
        raise InputError("peft", str(path), f"its PEFT type is {method!r}; known types: {', '.join(_SHAPES)}.")
    config = _parse(settings, method, path)
    shapes = _read_shapes(weights)
    _check_tensors(str(path), method, config, shapes, model_config)
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return AdapterInfo(method, config.r, settings.get("base_model_name_or_path"), digest.hexdigest())


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        raise InputError("peft", str(path), f"{CONFIG_NAME} is missing; give a folder that `save_pretrained` wrote.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("peft", str(file), f"it is not valid JSON ({error}); save the adapter again.") from error
    if not isinstance(settings, dict):
        raise InputError("peft", str(file), "it must hold a JSON object; save the adapter again.")
    return settings


def _parse(settings: dict[str, Any], method: str, path: Path) -> Any:
    known = {name: value for name, value in settings.items() if name in _CONFIGS[method].__dataclass_fields__}
    try:
        return _CONFIGS[method](**{name: value for name, value in known.items() if name != "peft_type"})
    except (TypeError, ValueError) as error:
        raise InputError("peft", str(path / CONFIG_NAME), f"PEFT refuses it ({error}); save it again.") from error


def _read_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(weights, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise InputError("peft", str(weights), f"it is not a safetensors file ({error}); save it again.") from error


def _check_tensors(
    folder: str, method: str, config: Any, shapes: dict[str, tuple[int, ...]], model_config: Any
) -> None:
    n_layers = model_config.get_text_config().num_hidden_layers
    model = skeleton(model_config)
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "out_features")}
    targets: dict[str, Target] = {}
    if isinstance(config, MaloraConfig):
        try:
            targets = find_targets(config, model)
        except InputError as error:
            raise InputError("peft", folder, f"{error.argument}: {error.way_out} {_WRONG_MODEL}") from error
    adapted: dict[str, set[str]] = {}  # module -> endings of its tensors
    for name, shape in shapes.items():
        module, ending = _split(name, method)
        layer = re.search(r"\.layers\.(\d+)\.", module)
        if ending is None or layer is None or _OTHER_TOWERS.search(module):
            continue
        if int(layer[1]) >= n_layers:
            raise InputError(
                "peft", folder, f"it adapts layer {layer[1]}, but this model has {n_layers} layers; {_WRONG_MODEL}"
            )
        if module not in linears:
            raise InputError("peft", folder, f"it adapts {module!r}, which this model lacks; {_WRONG_MODEL}")
        adapted.setdefault(module, set()).add(ending)
        widths, ranks = _sizes(config, module, linears[module], targets.get(module))
        for axis, (label, size) in enumerate(zip(_SHAPES[method][ending], shape, strict=True)):
            needed = (widths | ranks)[label]
            if needed != size:
                whose = "this model needs" if label in widths else f"its config has r {config.r}, which makes"
                raise InputError(
                    "peft",
                    folder,
                    f"{name} has shape {list(shape)}; axis {axis} must be {needed} ({whose} {needed}); {_WRONG_MODEL}",
                )
    if not adapted:
        raise InputError("peft", folder, f"it holds no {method} tensor of a decoder layer; {_WRONG_MODEL}")
    # PEFT would leave weights at random that the settings ask for and the file lacks, with no more than a warning.
    wanted = targets.keys() or {n for n in linears if not _OTHER_TOWERS.search(n) and matches(config, n)}
    unused = {"malora_gate_weight"} if method == "MALORA" and config.gate in ("none", "modality") else set()
    for module in sorted(wanted | adapted.keys()):
        missing = _SHAPES[method].keys() - unused - adapted.get(module, set())
        if missing:
            raise InputError("peft", folder, f"it has no {min(missing)} for {module!r} of this model; {_WRONG_MODEL}")


_WRONG_MODEL = "give the adapter that was trained on this model, or the model it was trained on."


def _split(name: str, method: str) -> tuple[str, str | None]:
    """Module name and tensor ending of a saved tensor; the ending is None for tensors this check does not know."""
    for ending in _SHAPES[method]:
        if name.endswith("." + ending):
            return name.removeprefix(_BASE).removesuffix("." + ending), ending
    return name, None


def _sizes(config: Any, module: str, linear: Any, target: Target | None) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the axes of `_SHAPES`: widths, which the layer gives, and ranks, which the config gives."""
    widths = {"in": int(linear.in_features), "out": int(linear.out_features)}
    if target is None:
        patterns = getattr(config, "rank_pattern", None) or {}
        return widths, {"r": int(patterns.get(get_pattern_key(list(patterns), module), config.r))}
    widths["out"] = target.out_features
    gates = config.gate_outputs(target.heads)
    return widths, {"r of A": config.down_rows, "r of B": config.up_columns, "gates": gates}
