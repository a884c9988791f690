"""Finished parts of an analysis on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_keyspace.divergence import Measurement
from lmms_keyspace.records import HeldOutLoss, KernelSums
from lmms_keyspace.store.files import require_writable, write
from lmms_keyspace.store.tables import read_table, table_bytes
from lmms_keyspace.store.tensors import by_document_bytes, read_by_document

_SUFFIXES = (".parquet", ".gram.safetensors", ".losses.safetensors")  # divergence, kernel sums, held-out losses


class Parts:
    """A folder of parts that belong to one set of settings; other settings, another folder.

    Args:
        folder: where parts of all settings lie.
        settings: everything that the parts depend on, JSON-ready.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._root = folder
        self._folder = folder / _digest(json.dumps(settings, sort_keys=True))

    def has(self, *name: str) -> bool:
        """Whether the part of that name was finished, and all of it is there: removing parts may be stopped, too."""
        return all(self._stem(name).with_suffix(suffix).exists() for suffix in _SUFFIXES)

    def load(self, *name: str) -> Measurement | None:
        """The part of that name, if it was finished; sums and losses are read when they are asked for."""
        if not self.has(*name):
            return None
        table, gram, losses = map(self._stem(name).with_suffix, _SUFFIXES)
        return Measurement(
            read_table(table, "divergence"), read_by_document(gram, KernelSums), read_by_document(losses, HeldOutLoss)
        )

    def save(self, part: Measurement, *name: str) -> Measurement:
        """Write it, and give it back as it will be read."""
        require_writable("out", self._folder)
        table, gram, losses = map(self._stem(name).with_suffix, _SUFFIXES)
        write(gram, by_document_bytes(part.gram))
        write(losses, by_document_bytes(part.losses))
        write(table, table_bytes("divergence", part.table))
        saved = self.load(*name)
        assert saved is not None
        return saved

    def remove(self) -> None:
        """Forget the parts of these settings."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._root.exists() and not any(self._root.iterdir()):
            self._root.rmdir()

    def _stem(self, name: tuple[str, ...]) -> Path:
        return self._folder / _digest("\0".join(name))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
