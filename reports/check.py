"""Refuses results and samples that lmms-eval would not have written, naming the file and the line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import OUTCOMES
from lmms_keyspace.store import LoadedRun

PROBE_COLUMNS = frozenset({"group_id", "condition", "outcome"})


def check_run(run: LoadedRun) -> None:
    """Raises InputError for results that are no table by task, and for samples as `check_samples` says."""
    for key, depth in (("results", 2), ("configs", 1), ("versions", 1), ("config", 1), ("higher_is_better", 2)):
        if not _nested(run.results.get(key, None if key == "results" else {}), depth):
            raise InputError("file", run.files.results.name, f"{key} is not what lmms-eval writes: evaluate again")
    for task, path in run.files.samples.items():
        check_samples(path, run.samples[task])


def _nested(value: object, depth: int) -> bool:
    """Whether a value is a mapping, of mappings for a depth of 2."""
    return isinstance(value, Mapping) and (depth == 1 or all(_nested(inner, depth - 1) for inner in value.values()))


def check_samples(path: Path, samples: pd.DataFrame) -> None:
    """Raises InputError, naming file and line, for a row without a document, for a document that is there twice, and
    in a probe for an unknown outcome or a second row of one group and condition. Row i of the frame is line i + 1.
    """
    if samples.empty:
        return
    documents = samples["doc_id"] if "doc_id" in samples else pd.Series([None] * len(samples), dtype=object)
    # One row without a number turns those of the others to floats.
    numbered = documents.map(lambda value: isinstance(value, int) or (isinstance(value, float) and value.is_integer()))
    _refuse(path, samples, ~numbered.to_numpy(dtype=bool), "doc_id", "a row without the number of its document")
    _refuse(path, samples, documents.duplicated().to_numpy(), "doc_id", "a document that an earlier line has, too")
    if set(samples.columns) >= PROBE_COLUMNS:
        known = samples["outcome"].map(lambda value: isinstance(value, str) and value in OUTCOMES)
        _refuse(path, samples, ~known.to_numpy(dtype=bool), "outcome", f"an outcome is one of {', '.join(OUTCOMES)}")
        repeated = samples[["group_id", "condition"]].astype(str).duplicated().to_numpy()
        _refuse(path, samples, repeated, "group_id", "a group and condition that an earlier line has, too")


def _refuse(path: Path, samples: pd.DataFrame, wrong: pd.Series, column: str, reason: str) -> None:
    if wrong.any():
        line = int(wrong.argmax())
        value = samples[column].iloc[line] if column in samples else None
        shown = value if isinstance(value, int | float | None) else str(value)[:60]
        raise InputError(f"{path.name}, line {line + 1}, {column}", shown, f"{reason}; run the evaluation again")
