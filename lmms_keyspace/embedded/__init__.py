"""The bundled model: a really trained LLaVA of about one million parameters, with three adapters and its builder.

`base_path` and `adapter_path` return folders to load with transformers and PEFT; ``card.json`` beside the base model
holds every figure that was measured. ``python -m lmms_keyspace.embedded.build --out DIR`` builds all of it again.
"""

from __future__ import annotations

from pathlib import Path

from lmms_keyspace.errors import InputError

BASE_NAME = "lmms_keyspace.embedded base"  # what adapter_config.json names, since a path would name one machine
ADAPTERS = ("malora", "lora", "malora_no_mmd")

_WEIGHTS = Path(__file__).parent / "weights"


def base_path() -> Path:
    """Folder of the bundled base model: weights, tokenizer, processor and chat template."""
    return _WEIGHTS / "base"


def adapter_path(name: str) -> Path:
    """Folder of a bundled adapter in PEFT's format; raises InputError on a name that is not in `ADAPTERS`."""
    if name not in ADAPTERS:
        raise InputError("adapter", name, f"take one of {', '.join(ADAPTERS)}")
    return _WEIGHTS / name
