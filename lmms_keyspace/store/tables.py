"""Parquet tables with exactly the columns of their schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import (
    ATTENTION_COLUMNS,
    CHANGE_COLUMNS,
    DIVERGENCE_COLUMNS,
    OPTION_COLUMNS,
    SCHEMA_VERSION,
    TOKEN_COLUMNS,
)
from lmms_keyspace.store.files import VERSION_KEY, check_version, require, rerun

TABLES: Mapping[str, Mapping[str, str]] = {
    "divergence": DIVERGENCE_COLUMNS,
    "attention": ATTENTION_COLUMNS,
    "tokens": TOKEN_COLUMNS,
    "options": OPTION_COLUMNS,
    "changes": CHANGE_COLUMNS,
}
_ARROW = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}


def table_bytes(name: str, frame: pd.DataFrame) -> bytes:
    """The content of a parquet file.

    Raises:
        InputError: a missing, an extra or a mistyped column.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(_to_arrow(name, frame), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read_table(path: Path, name: str) -> pd.DataFrame:
    require(path)
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError("file", path.name, rerun(f"not a whole parquet file ({error})")) from error
    metadata = table.schema.metadata or {}
    version = metadata.get(VERSION_KEY.encode())
    check_version(path, version.decode() if version else None)
    found = {field.name: field.type for field in table.schema}
    expected = {column: _ARROW[kind] for column, kind in TABLES[name].items()}
    wrong = sorted(column for column in found.keys() | expected.keys() if found.get(column) != expected.get(column))
    if wrong:
        raise InputError("file", path.name, rerun(f"missing, extra or mistyped columns {wrong}"))
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame


def _to_arrow(name: str, frame: pd.DataFrame) -> pa.Table:
    """The frame with exactly the declared columns, in the declared order and types."""
    columns = TABLES[name]
    missing = [column for column in columns if column not in frame]
    extra = [str(column) for column in frame if column not in columns]
    if missing or extra:
        found = f"missing {missing}" if missing else f"extra {extra}"
        raise InputError(name, found, f"a {name} table has the columns {list(columns)}")
    arrays = [_to_array(name, column, frame[column], kind) for column, kind in columns.items()]
    fields = [pa.field(column, _ARROW[kind]) for column, kind in columns.items()]
    metadata = {VERSION_KEY: str(SCHEMA_VERSION)}
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
