"""Writes and reads the files of a run, beside those of lmms-eval and with the same `<date>_` prefix.

A run is a folder and a date. lmms-eval writes `<date>_results.json` and `<date>_samples_<task>.jsonl`; this module adds
`<date>_gram.safetensors`, `<date>_divergence.parquet`, `<date>_attention.parquet`, `<date>_tokens.parquet`,
`<date>_options.parquet` (only with option log-probabilities), `<date>_keys_<task>.safetensors` and, last because it
says that the run is whole, `<date>_keyspace.json`. Every file is written under a temporary name, synced and renamed.

Kernel sums and keys are stored as float32. A sum of kernel values carries a relative rounding of 6e-8, which moves
MMD^2 by less than 1e-6, and float64 would double the largest file of a run. Reading returns float64 sums and float32
keys, both loaded on access: a run of a large model does not fit in memory whole.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import (
    ATTENTION_COLUMNS,
    DIVERGENCE_COLUMNS,
    OPTION_COLUMNS,
    SCHEMA_VERSION,
    TOKEN_COLUMNS,
    GramKey,
    KernelSums,
    RunData,
    RunRecord,
)

_VERSION_KEY = "lmms_keyspace_schema"
_TABLES: Mapping[str, Mapping[str, str]] = {
    "divergence": DIVERGENCE_COLUMNS,
    "attention": ATTENTION_COLUMNS,
    "tokens": TOKEN_COLUMNS,
    "options": OPTION_COLUMNS,
}
_ARROW = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
# lmms-eval's date, e.g. 20261121_104102. Tasks write files called `<something>_results.json` too: those are not runs.
_RUN_FILE = re.compile(r"(?P<date>\d[\dT_.\-]*)_(results|keyspace)\.json")
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class RunFiles:
    """Where one run lies: the folder and the date that all its file names begin with."""

    folder: Path
    date: str

    @property
    def results(self) -> Path:
        """`<date>_results.json` of lmms-eval; may be absent after a crash."""
        return self.folder / f"{self.date}_results.json"

    @property
    def samples(self) -> dict[str, Path]:
        """Task name -> `<date>_samples_<task>.jsonl`; empty without `--log_samples`."""
        prefix = f"{self.date}_samples_"
        return {path.stem.removeprefix(prefix): path for path in _with_prefix(self.folder, prefix, ".jsonl")}

    @property
    def keyspace(self) -> Path | None:
        """`<date>_keyspace.json`, or None for a run of a model that captures nothing."""
        path = self.folder / f"{self.date}_keyspace.json"
        return path if path.is_file() else None


@dataclass(frozen=True)
class LoadedRun:
    """One run in memory: lmms-eval's results and samples, and what was captured (None for a stock model)."""

    files: RunFiles
    results: dict[str, Any]
    samples: dict[str, pd.DataFrame]
    data: RunData | None


class _OnAccess(Mapping[K, V], Generic[K, V]):
    """A mapping whose values are read from disk each time they are asked for."""

    def __init__(self, loaders: Mapping[K, Callable[[], V]]) -> None:
        self._loaders = loaders

    def __getitem__(self, key: K) -> V:
        return self._loaders[key]()

    def __iter__(self) -> Iterator[K]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def write_run(folder: Path, date: str, data: RunData) -> list[Path]:
    """Write every file of a run; `<date>_keyspace.json` comes last.

    Returns the paths in the order written. Raises InputError when a table has a missing, an extra or a mistyped
    column, or when kernel sums of one task and condition disagree about their clusters; nothing is written then.
    """
    tables = {name: _to_arrow(name, frame) for name, frame in _frames(data).items()}
    gram = _gram_bytes(data.gram)
    folder.mkdir(parents=True, exist_ok=True)
    written = [_write(folder / f"{date}_gram.safetensors", gram)]
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        written.append(_write(folder / f"{date}_{name}.parquet", sink.getvalue().to_pybytes()))
    for task, arrays in data.keys.items():
        tensors = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
        written.append(_write(_keys_path(folder, date, task), safetensors_bytes(tensors, _metadata())))
    record = data.record.model_dump_json(indent=2).encode()
    written.append(_write(folder / f"{date}_keyspace.json", record))
    return written


def read_run(folder: Path, date: str) -> RunData:
    """Read what `write_run` wrote. Raises InputError for an incomplete run, a newer schema or a corrupt file.

    `gram` and the arrays of `keys` are read from disk when accessed.
    """
    record = _read_record(folder / f"{date}_keyspace.json")
    frames = {name: _read_table(folder / f"{date}_{name}.parquet", name) for name in _TABLES if name != "options"}
    options_path = folder / f"{date}_options.parquet"
    options = _read_table(options_path, "options") if options_path.exists() else None
    tokens = frames["tokens"]
    for task in tokens.loc[tokens["keys_row"] >= 0, "task"].unique():
        _require(_keys_path(folder, date, task))
    prefix = f"{date}_keys_"
    keys = {
        unquote(path.stem.removeprefix(prefix)): _read_keys(path)
        for path in _with_prefix(folder, prefix, ".safetensors")
    }
    return RunData(
        record=record,
        gram=_read_gram(folder / f"{date}_gram.safetensors"),
        divergence=frames["divergence"],
        attention=frames["attention"],
        tokens=tokens,
        keys=keys,
        options=options,
    )


def find_runs(path: Path) -> list[RunFiles]:
    """The runs at `path`, newest last: a run's or a model's folder, a whole output folder, or one `*_results.json`.

    Folders that are symbolic links are not entered. Raises InputError when there is no run.
    """
    if path.is_file():
        match = _RUN_FILE.fullmatch(path.name)
        found = {RunFiles(path.parent, match["date"])} if match else set()
    else:
        candidates = (file for file in path.rglob("*.json") if not file.name.startswith("."))
        matches = ((file, _RUN_FILE.fullmatch(file.name)) for file in candidates)
        found = {RunFiles(file.parent, match["date"]) for file, match in matches if match}
    if not found:
        raise InputError(
            "run",
            str(path),
            "there is no run here: looked in it and in every folder below it for <date>_results.json, which lmms-eval "
            "writes under --output_path",
        )
    return sorted(found, key=lambda files: (files.date, files.folder))


def load_run(files: RunFiles) -> LoadedRun:
    """Load lmms-eval's results and samples and, where there is one, the capture.

    Raises InputError when a file is missing, truncated, incomplete or of a newer schema; the message names it.
    """
    _require(files.results)
    results = _read_json(files.results)
    return LoadedRun(
        files=files,
        results=results,
        samples={task: read_samples(path) for task, path in files.samples.items()},
        data=read_run(files.folder, files.date) if files.keyspace else None,
    )


def read_samples(path: Path) -> pd.DataFrame:
    """A samples file of lmms-eval, one row per line; invalid UTF-8 becomes U+FFFD, half a surrogate pair `?`.

    Raises InputError naming the file and the line when a line is not a JSON object.
    """
    rows = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path.name}, line {number}", _short(line), _rerun(f"not JSON: {error}")) from error
            if not isinstance(row, dict):
                raise InputError(f"{path.name}, line {number}", _short(line), _rerun("not a JSON object"))
            rows.append({key: _encodable(value) for key, value in row.items()})
    return pd.DataFrame(rows)


def _encodable(value: object) -> object:
    """JSON may name half a surrogate pair, as a cut answer does; a frame of strings cannot hold it."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _frames(data: RunData) -> dict[str, pd.DataFrame]:
    frames = {"divergence": data.divergence, "attention": data.attention, "tokens": data.tokens}
    return frames if data.options is None else {**frames, "options": data.options}


def _to_arrow(name: str, frame: pd.DataFrame) -> pa.Table:
    """The frame with exactly the declared columns, in the declared order and types."""
    columns = _TABLES[name]
    missing = [column for column in columns if column not in frame]
    extra = [str(column) for column in frame if column not in columns]
    if missing or extra:
        found = f"missing {missing}" if missing else f"extra {extra}"
        raise InputError(name, found, f"a {name} table has the columns {list(columns)}")
    arrays = [_to_array(name, column, frame[column], kind) for column, kind in columns.items()]
    fields = [pa.field(column, _ARROW[kind]) for column, kind in columns.items()]
    metadata = {_VERSION_KEY: str(SCHEMA_VERSION)}
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=metadata))


def _to_array(table: str, column: str, series: pd.Series, kind: str) -> pa.Array:
    target = _ARROW[kind]
    if series.empty:
        return pa.array([], type=target)
    natural = {
        "string": pd.api.types.is_object_dtype(series) or pd.api.types.is_string_dtype(series),
        "bool": pd.api.types.is_bool_dtype(series),
        "int32": pd.api.types.is_integer_dtype(series),
        "int64": pd.api.types.is_integer_dtype(series),
        "float32": pd.api.types.is_float_dtype(series),
        "float64": pd.api.types.is_float_dtype(series),
    }[kind]
    way_out = f"column {column!r} must hold {kind}"
    if not natural:
        raise InputError(f"{table}.{column}", str(series.dtype), way_out)
    try:
        if kind == "string":
            return pa.array(series.astype(object), type=target, from_pandas=True)
        return pa.array(series.to_numpy(), from_pandas=False).cast(target)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{table}.{column}", str(error), way_out) from error


def _gram_bytes(gram: Mapping[GramKey, KernelSums]) -> bytes:
    tensors: dict[str, np.ndarray] = {}
    clusters: dict[str, list[str]] = {}
    for key, sums in gram.items():
        # Names of tasks and conditions may hold a slash: the parts of a tensor's name are percent-encoded.
        pair = f"{quote(key.task, safe='')}/{quote(key.condition, safe='')}"
        entry = f"{pair}/{quote(key.space, safe='')}/{key.layer}/{quote(key.scale, safe='')}"
        counts = {"n_visual": np.asarray(sums.n_visual, np.int64), "n_text": np.asarray(sums.n_text, np.int64)}
        if clusters.setdefault(pair, list(sums.clusters)) != list(sums.clusters) or any(
            not np.array_equal(tensors.setdefault(f"{pair}/{name}", count), count) for name, count in counts.items()
        ):
            raise InputError("gram", key, "clusters and token counts must be the same in every layer of a condition")
        for name in ("vv", "tt", "vt"):
            tensors[f"{entry}/{name}"] = np.ascontiguousarray(getattr(sums, name), dtype=np.float32)
    return safetensors_bytes(tensors, {**_metadata(), "clusters": json.dumps(clusters)})


def _read_gram(path: Path) -> Mapping[GramKey, KernelSums]:
    names, metadata = _open_safetensors(path)
    if "clusters" not in metadata:
        raise InputError("file", path.name, _rerun("no cluster names in its header"))
    clusters = json.loads(metadata["clusters"])
    loaders = {}
    for name in names:
        parts = name.split("/")
        if parts[-1] != "vv":
            continue
        task, condition, space, layer, scale = parts[:-1]
        key = GramKey(unquote(task), unquote(condition), unquote(space), int(layer), unquote(scale))
        pair = f"{task}/{condition}"
        loaders[key] = partial(_load_sums, path, name.removesuffix("/vv"), pair, tuple(clusters[pair]))
    return _OnAccess(loaders)


def _load_sums(path: Path, entry: str, pair: str, clusters: tuple[str, ...]) -> KernelSums:
    with safe_open(path, framework="np") as file:
        vv, tt, vt = (file.get_tensor(f"{entry}/{name}").astype(np.float64) for name in ("vv", "tt", "vt"))
        n_visual, n_text = (file.get_tensor(f"{pair}/{name}") for name in ("n_visual", "n_text"))
    return KernelSums(vv, tt, vt, n_visual, n_text, clusters)


def _read_keys(path: Path) -> Mapping[str, np.ndarray]:
    names, _ = _open_safetensors(path)
    return _OnAccess({name: partial(_load_array, path, name) for name in names})


def _load_array(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        array: np.ndarray = file.get_tensor(name)
    return array


def _open_safetensors(path: Path) -> tuple[list[str], dict[str, str]]:
    """Tensor names and metadata; the header check of safetensors also catches a truncated file."""
    _require(path)
    try:
        with safe_open(path, framework="np") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise InputError("file", path.name, _rerun(f"not a whole safetensors file ({error})")) from error
    _check_version(path, metadata.get(_VERSION_KEY))
    return names, metadata


def _read_table(path: Path, name: str) -> pd.DataFrame:
    _require(path)
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError("file", path.name, _rerun(f"not a whole parquet file ({error})")) from error
    metadata = table.schema.metadata or {}
    version = metadata.get(_VERSION_KEY.encode())
    _check_version(path, version.decode() if version else None)
    found = {field.name: field.type for field in table.schema}
    expected = {column: _ARROW[kind] for column, kind in _TABLES[name].items()}
    wrong = sorted(column for column in found.keys() | expected.keys() if found.get(column) != expected.get(column))
    if wrong:
        raise InputError("file", path.name, _rerun(f"missing, extra or mistyped columns {wrong}"))
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame


def _read_record(path: Path) -> RunRecord:
    _require(path)
    content = _read_json(path)
    _check_version(path, content.get("schema_version"))
    try:
        record = RunRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError("file", path.name, _rerun(f"field {field}: {first['msg']}")) from error
    if not record.complete:
        raise InputError("run", str(path), "this run did not end (complete is false): run it again")
    return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise InputError("file", path.name, _rerun(f"not JSON: {error}")) from error
    if not isinstance(content, dict):
        raise InputError("file", path.name, _rerun("not a JSON object"))
    return content


def _check_version(path: Path, version: object) -> None:
    if not str(version).isdigit():
        raise InputError("file", path.name, _rerun("it carries no schema version"))
    if int(str(version)) > SCHEMA_VERSION:
        raise InputError(
            "file", path.name, f"says {version}, this version reads {SCHEMA_VERSION}: upgrade lmms_keyspace"
        )


def _require(path: Path) -> None:
    if not path.is_file():
        raise InputError("file", str(path), "this run is incomplete, the file is missing: run it again")


def _write(path: Path, content: bytes) -> Path:
    """Write under a temporary name in the same folder, sync, rename: a reader sees all of the file or none."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; these are shared like any output, as the umask says.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _keys_path(folder: Path, date: str, task: str) -> Path:
    return folder / f"{date}_keys_{quote(task, safe='')}.safetensors"


def _with_prefix(folder: Path, prefix: str, suffix: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith(prefix) and path.name.endswith(suffix))


def _metadata() -> dict[str, str]:
    return {_VERSION_KEY: str(SCHEMA_VERSION)}


def _rerun(problem: str) -> str:
    return f"{problem}; the file is damaged or not of this program: run the evaluation again"


def _short(text: str) -> str:
    return text[:60].rstrip("\n")
