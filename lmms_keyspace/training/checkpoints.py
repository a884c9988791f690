"""Checkpoints of a training run that may have been killed while it saved one, or had no room for it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lmms_keyspace.errors import InputError

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint in `folder` that was saved to its end, or None; says which later ones are passed over."""
    steps = {path: int(match[1]) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        if _is_whole(path):
            return path
        logging.getLogger(__name__).warning("%s is passed over: the run was stopped while it saved it", path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """transformers writes the trainer's state last, and goes on without the optimizer's where that is missing."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict)


@contextlib.contextmanager
def saving(folder: Path | str) -> Iterator[None]:
    """Say which folder could not be written, whatever library wrote it.

    Raises:
        InputError: for `output_dir`; the checkpoints that were saved before are still there.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises the last
        reason = str(error).partition("\n")[0]
        way_out = f"it cannot be written ({reason}); make room in it and go on with --resume from the last checkpoint"
        raise InputError("output_dir", str(folder), way_out) from error
