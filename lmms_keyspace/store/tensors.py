"""safetensors files: kernel sums and held-out losses by document, and keys. Read on access, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import quote, unquote

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import SCHEMA_VERSION, GramKey, HeldOutLoss, KernelSums
from lmms_keyspace.store.files import VERSION_KEY, check_version, require, rerun

K = TypeVar("K")
V = TypeVar("V")
ByDocument = TypeVar("ByDocument", KernelSums, HeldOutLoss)


class _OnAccess(Mapping[K, V], Generic[K, V]):
    """A mapping whose values are read from disk each time they are asked for; `check` runs before the first."""

    def __init__(self, loaders: Mapping[K, Callable[[], V]], check: Callable[[], None] | None = None) -> None:
        self._loaders = loaders
        self._check = check

    def __getitem__(self, key: K) -> V:
        loader = self._loaders[key]
        if self._check is not None:
            self._check()
            self._check = None
        return loader()

    def __iter__(self) -> Iterator[K]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def by_document_bytes(entries: Mapping[GramKey, KernelSums] | Mapping[GramKey, HeldOutLoss]) -> bytes:
    """The content of a file of kernel sums or of losses.

    Raises:
        InputError: clusters or token counts that differ between the layers of a condition.
    """
    tensors: dict[str, np.ndarray] = {}
    clusters: dict[str, list[str]] = {}
    for key, value in entries.items():
        # Names of tasks and conditions may hold a slash: the parts of a tensor's name are percent-encoded.
        group = "/".join(quote(part, safe="") for part in (key.task, key.condition, key.contrast))
        entry = f"{group}/{quote(key.space, safe='')}/{key.layer}/{quote(key.scale, safe='')}"
        counts = {name: np.asarray(getattr(value, name), np.int64) for name in ("n_visual", "n_text")}
        if clusters.setdefault(group, list(value.clusters)) != list(value.clusters) or any(
            not np.array_equal(tensors.setdefault(f"{group}/{name}", count), count) for name, count in counts.items()
        ):
            raise InputError("gram", key, "clusters and token counts must be the same in every layer of a condition")
        for name in value.ARRAYS:
            tensors[f"{entry}/{name}"] = np.ascontiguousarray(getattr(value, name), dtype=np.float32)
    return _ordered(safetensors_bytes(tensors, {**_metadata(), "clusters": json.dumps(clusters)}))


def _ordered(content: bytes) -> bytes:
    """The same safetensors file, its metadata in order: safetensors writes them in a random one."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors begin at a multiple of 8
    return len(encoded).to_bytes(8, "little") + encoded + content[start:]


def read_by_document(
    path: Path, kind: type[ByDocument], check: Callable[[], None] | None = None
) -> Mapping[GramKey, ByDocument]:
    """What `by_document_bytes` wrote, float64, each entry read when it is asked for; `check` runs before the first."""
    names, metadata = _open_safetensors(path)
    if "clusters" not in metadata:
        raise InputError("file", path.name, rerun("no cluster names in its header"))
    try:
        loaders = _loaders(path, kind, names, json.loads(metadata["clusters"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("file", path.name, rerun(f"its header says what no run writes ({error})")) from error
    return _OnAccess(loaders, check)


def _loaders(
    path: Path, kind: type[ByDocument], names: Sequence[str], clusters: Mapping[str, Sequence[str]]
) -> dict[GramKey, Callable[[], ByDocument]]:
    """How to read each entry that the names of the tensors show."""
    loaders: dict[GramKey, Callable[[], ByDocument]] = {}
    known, first = set(names), f"/{kind.ARRAYS[0]}"
    for name in names:
        if not name.endswith(first):
            continue
        entry = name.removesuffix(first)
        missing = [array for array in kind.ARRAYS if f"{entry}/{array}" not in known]
        if missing:
            raise KeyError(f"{entry} without {', '.join(missing)}")
        task, condition, contrast, space, layer, scale = entry.split("/")
        key = GramKey(unquote(task), unquote(condition), unquote(space), int(layer), unquote(scale), unquote(contrast))
        group = f"{task}/{condition}/{contrast}"
        loaders[key] = partial(_load_entry, path, kind, entry, group, tuple(clusters[group]))
    return loaders


def _load_entry(path: Path, kind: type[ByDocument], entry: str, group: str, clusters: tuple[str, ...]) -> ByDocument:
    names = {name: f"{entry}/{name}" for name in kind.ARRAYS}
    counts = {name: f"{group}/{name}" for name in ("n_visual", "n_text")}
    with safe_open(path, framework="np") as file:
        parts = {field: file.get_tensor(name) for field, name in (names | counts).items()}
    parts |= {field: parts[field].astype(np.float64) for field in names}
    return kind(**parts, clusters=clusters)


def keys_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of a file of keys."""
    tensors = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    return safetensors_bytes(tensors, _metadata())


def read_keys(path: Path, check: Callable[[], None]) -> Mapping[str, np.ndarray]:
    """What `keys_bytes` wrote, each array read when it is asked for; `check` runs before the first."""
    names, _ = _open_safetensors(path)
    return _OnAccess({name: partial(_load_array, path, name) for name in names}, check)


def _load_array(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        array: np.ndarray = file.get_tensor(name)
    return array


def _open_safetensors(path: Path) -> tuple[list[str], dict[str, str]]:
    """Tensor names and metadata; the header check of safetensors also catches a truncated file."""
    require(path)
    try:
        with safe_open(path, framework="np") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise InputError("file", path.name, rerun(f"not a whole safetensors file ({error})")) from error
    check_version(path, metadata.get(VERSION_KEY))
    return names, metadata


def _metadata() -> dict[str, str]:
    return {VERSION_KEY: str(SCHEMA_VERSION)}
