"""The model arguments: parsed and checked before anything heavy is imported or loaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lmms_keyspace import embedded
from lmms_keyspace.errors import InputError
from lmms_keyspace.intervene import spec as intervention
from lmms_keyspace.records import SPACES
from lmms_keyspace.store.files import require_writable

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
# A name on the hub: `organisation/name` or a bare name, no path separators at its ends.
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
# What the harness adds by itself and this wrapper has no use for.
_FROM_HARNESS = ("max_batch_size",)
# The first size that `batch_size=auto` tries.
AUTO_BATCH_SIZE = 64


@dataclass(frozen=True)
class Arguments:
    """Arguments of every wrapper, as `--model_args name=value,...`; lists are joined with `+`.

    Attributes:
        pretrained: folder or hub id of the model; None takes the bundled model.
        peft: folder or hub id of an adapter (MaLoRA or LoRA in PEFT's layout); None for none.
        revision: branch, tag or commit on the hub.
        dtype: float32 | bfloat16 | float16; None is float32 on the CPU, bfloat16 elsewhere.
        quantization: 4bit | 8bit, weights by bitsandbytes (nf4, LLM.int8()); None loads them as they are stored.
        device: torch device; None is cuda when there is one, else cpu.
        device_map: auto spreads the weights over the devices that there are; None puts all of them on `device`.
        attn_implementation: sdpa | eager | flash_attention_2.
        min_pixels, max_pixels: pixels of an image after the processor resized it, where it has such limits (Qwen-VL).
        batch_size: requests per forward pass (lmms-eval's `--batch_size`); None, given as auto, begins with
            `AUTO_BATCH_SIZE` and halves when memory is short.
        capture: on | off. Off leaves the forward pass untouched and saves no key-space tables.
        spaces: which vectors to capture, of k_pre, k_post, q, v.
        layers: decoder layers to capture; None is all.
        capture_clusters: clusters sampled per task, at least 4.
        capture_tokens: tokens sampled per modality and document, at least 1.
        keep_keys: save every sampled key instead of a small sample for pictures.
        option_logprobs: save the log-probability of each answer option of a document.
        reference: self takes bandwidths from the base model by a second pass with adapter or intervention off;
            none takes them from the run itself, whose divergences then do not compare with other runs.
        intervene: a change of the base model without training, see `intervene.spec.parse`: mean_shift:RUN,
            moment_matching:RUN, random_shift:RUN or visual_boost:ALPHA; None for none.
        intervene_documents: held_out refuses a RUN on the documents that are evaluated, any allows it.
        keys_dir: write the key-space files here, at once, whatever lmms-eval saves.
        seed: seed of the samples and of the classifier folds.
    """

    pretrained: str | None = None
    peft: str | None = None
    revision: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str = "sdpa"
    min_pixels: int | None = None
    max_pixels: int | None = None
    batch_size: int | None = 1
    capture: bool = True
    spaces: tuple[str, ...] = ("k_pre",)
    layers: tuple[int, ...] | None = None
    capture_clusters: int = 128
    capture_tokens: int = 32
    keep_keys: bool = False
    option_logprobs: bool = False
    reference: str = "self"
    intervene: intervention.Spec | None = None
    intervene_documents: str = "held_out"
    keys_dir: Path | None = None
    seed: int = 0


def parse(given: Mapping[str, Any], *, model: str, needs_adapter: bool, has_bundled: bool) -> Arguments:
    """Check the arguments as lmms-eval passes them (strings, numbers and booleans).

    Args:
        given: keyword arguments of the wrapper.
        model: the lmms-eval model name, for messages.
        needs_adapter: the name promises an adapter (`malora_*`).
        has_bundled: without `pretrained` the name takes the bundled model.

    Raises:
        InputError: names the argument, its value and the way out.
    """
    values = {name: value for name, value in given.items() if name not in _FROM_HARNESS and value is not None}
    known = [field.name for field in fields(Arguments)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known arguments are {', '.join(known)}"
            raise InputError(name, values[name], f"{model} has no such argument; {hint}")
    parsed = {name: _PARSERS[name](name, value) for name, value in values.items()}
    arguments = Arguments(**parsed)
    if arguments.device_map is not None and arguments.device is not None:
        raise InputError("device", arguments.device, "device_map=auto chooses the devices; give one of the two")
    _check_intervention(arguments, given, model=model, needs_adapter=needs_adapter)
    if arguments.pretrained is None:
        if not has_bundled:
            raise InputError("pretrained", None, f"{model} needs a model: pretrained=FOLDER or a hub id")
        if needs_adapter and arguments.peft is None:
            parsed["peft"] = str(embedded.adapter_path("malora"))
        parsed["pretrained"] = str(embedded.base_path())
        arguments = Arguments(**parsed)
    elif needs_adapter and arguments.peft is None:
        raise InputError(
            "peft",
            None,
            f"{model} with pretrained={arguments.pretrained} needs an adapter: peft=FOLDER or a hub id; "
            "to run the model without one use --model keyspace_vlm",
        )
    return arguments


def _check_intervention(arguments: Arguments, given: Mapping[str, Any], *, model: str, needs_adapter: bool) -> None:
    """Raise InputError for an intervention that does not go with the rest."""
    if arguments.intervene is None:
        return
    if needs_adapter or arguments.peft is not None:
        raise InputError(
            "intervene", given["intervene"], f"it changes a model without an adapter, and {model} runs one; use one of "
            "the keyspace_* models without peft"
        )  # fmt: skip
    if arguments.option_logprobs and arguments.intervene.kind == intervention.VISUAL_BOOST:
        raise InputError(
            "option_logprobs", "on", "visual_boost acts on the token being generated, not on options read at once"
        )


def _folder_or_hub_id(name: str, value: object) -> str:
    text = str(value)
    if Path(text).is_dir() or (_HUB_ID.match(text) and not Path(text).exists()):
        return text
    raise InputError(name, value, "this is neither a folder nor a hub id such as llava-hf/llava-1.5-7b-hf")


def _text(name: str, value: object) -> str:
    return str(value)


def _one_of(*choices: str) -> Any:
    def parse_choice(name: str, value: object) -> str:
        if value not in choices:
            raise InputError(name, value, f"choose one of {', '.join(choices)}")
        return str(value)

    return parse_choice


def _at_least(minimum: int) -> Any:
    def parse_number(name: str, value: object) -> int:
        try:
            number = int(str(value))
        except ValueError:
            number = None
        if number is None or number < minimum:
            raise InputError(name, value, f"give a whole number of at least {minimum}")
        return number

    return parse_number


def _batch_size(name: str, value: object) -> int | None:
    if value == "auto":
        return None
    try:
        return int(_at_least(1)(name, value))
    except InputError:
        raise InputError(name, value, "give a whole number of at least 1, or auto") from None


def _switch(name: str, value: object) -> bool:
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise InputError(name, value, "choose on or off") from None


def _spaces(name: str, value: object) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(str(value).split("+")))
    if not set(chosen) <= set(SPACES):
        raise InputError(name, value, f"join names of {', '.join(SPACES)} with +, such as k_pre+q")
    return chosen if "k_pre" in chosen else ("k_pre", *chosen)


def _layers(name: str, value: object) -> tuple[int, ...] | None:
    if str(value) == "all":
        return None
    try:
        layers = tuple(sorted({int(part) for part in str(value).split("+")}))
    except ValueError:
        layers = ()
    if not layers or layers[0] < 0:
        raise InputError(name, value, "join layer numbers with +, such as 0+16+31, or say all")
    return layers


def _intervention(name: str, value: object) -> intervention.Spec:
    return intervention.parse(str(value))


def _writable_folder(name: str, value: object) -> Path:
    return require_writable(name, str(value))


_PARSERS: Mapping[str, Any] = {
    "pretrained": _folder_or_hub_id,
    "peft": _folder_or_hub_id,
    "revision": _text,
    "dtype": _one_of(*DTYPES),
    "quantization": _one_of(*QUANTIZATIONS),
    "device": _text,
    "attn_implementation": _one_of(*ATTENTION),
    "device_map": _one_of("auto"),
    "min_pixels": _at_least(1),
    "max_pixels": _at_least(1),
    "batch_size": _batch_size,
    "capture": _switch,
    "spaces": _spaces,
    "layers": _layers,
    "capture_clusters": _at_least(4),
    "capture_tokens": _at_least(1),
    "keep_keys": _switch,
    "option_logprobs": _switch,
    "reference": _one_of("self", "none"),
    "intervene": _intervention,
    "intervene_documents": _one_of("held_out", "any"),
    "keys_dir": _writable_folder,
    "seed": _at_least(0),
}
