"""A run as a folder and a date: finding it, writing all its files, reading them, and lmms-eval's beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pandas as pd
from pydantic import ValidationError

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import HeldOutLoss, KernelSums, RunData, RunRecord, empty_table
from lmms_keyspace.store.files import (
    SURROGATE,
    check_digest,
    check_version,
    encodable,
    read_json,
    require,
    require_writable,
    rerun,
    with_prefix,
    write,
)
from lmms_keyspace.store.tables import TABLES, read_table, table_bytes
from lmms_keyspace.store.tensors import by_document_bytes, keys_bytes, read_by_document, read_keys

# lmms-eval's date, e.g. 20261121_104102. Tasks write files called `<something>_results.json` too: those are not runs.
_RUN_FILE = re.compile(r"(?P<date>\d[\dT_.\-]*)_(results|keyspace)\.json")
_SCORED = frozenset({"doc_id", "group_id", "condition", "outcome"})
_NUMBERS = frozenset({int, float, bool})
RUN_TABLES = ("divergence", "attention", "tokens")
_GRAM, _LOSSES, _KEYS = "gram.safetensors", "losses.safetensors", "keys_"
_ALWAYS = frozenset({_GRAM, _LOSSES, *(f"{name}.parquet" for name in RUN_TABLES)})


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
        return {path.stem.removeprefix(prefix): path for path in with_prefix(self.folder, prefix, ".jsonl")}

    @property
    def captured(self) -> bool:
        """Whether the plugin wrote files: all, or after a crash some; not for a model that captures nothing."""
        return any((self.folder / f"{self.date}_{name}").is_file() for name in ("keyspace.json", _GRAM))


@dataclass(frozen=True)
class LoadedRun:
    """One run in memory: lmms-eval's results and samples, and what was captured (None for a stock model)."""

    files: RunFiles
    results: dict[str, Any]
    samples: dict[str, pd.DataFrame]
    data: RunData | None


def write_run(folder: Path, date: str, data: RunData) -> list[Path]:
    """Write every file of a run; `<date>_keyspace.json` comes last.

    Returns the paths in the order written. Raises InputError when a table has a missing, an extra or a mistyped
    column, or when kernel sums of one task and condition disagree about their clusters; nothing is written then.
    """
    contents = {
        _GRAM: by_document_bytes(data.gram),
        _LOSSES: by_document_bytes(data.losses),
        **{f"{name}.parquet": table_bytes(name, frame) for name, frame in _frames(data).items()},
    }
    require_writable("folder", folder)
    written: list[Path] = []
    digests: dict[str, str] = {}
    keys = ((_keys_name(task), keys_bytes(arrays)) for task, arrays in data.keys.items())  # one in memory at a time
    for name, content in chain(contents.items(), keys):
        written.append(write(folder / f"{date}_{name}", content))
        digests[name] = hashlib.sha256(content).hexdigest()
    record = data.record.model_copy(update={"files": digests})
    written.append(write(folder / f"{date}_keyspace.json", record.model_dump_json(indent=2).encode()))
    return written


def read_run(folder: Path, date: str, *, tables: Collection[str] = RUN_TABLES) -> RunData:
    """Read what `write_run` wrote. Raises InputError for an incomplete run, a newer schema or a corrupt file.

    Every file is checked against the sha256 that the run recorded. `gram`, `losses` and the arrays of `keys` are read
    from disk when accessed, and checked then. Only the named `tables` are read; the others are
    empty, which saves most of the time where many runs are read for little of each.
    """
    record = _read_record(folder / f"{date}_keyspace.json")
    paths = {name: folder / f"{date}_{name}" for name in record.files}
    for path in paths.values():
        require(path)
    checks = {name: partial(check_digest, path, record.files[name]) for name, path in paths.items()}

    def table(name: str) -> pd.DataFrame:
        frame = read_table(paths[f"{name}.parquet"], name)
        checks[f"{name}.parquet"]()
        return frame

    frames = {name: table(name) if name in tables else empty_table(TABLES[name]) for name in RUN_TABLES}
    return RunData(
        record=record,
        gram=read_by_document(paths[_GRAM], KernelSums, checks[_GRAM]),
        losses=read_by_document(paths[_LOSSES], HeldOutLoss, checks[_LOSSES]),
        divergence=frames["divergence"],
        attention=frames["attention"],
        tokens=frames["tokens"],
        keys={_task_of(name): read_keys(paths[name], checks[name]) for name in paths if name.startswith(_KEYS)},
        options=table("options") if "options.parquet" in paths else None,
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


def load_run(files: RunFiles, *, scores_only: bool = False, tables: Collection[str] = RUN_TABLES) -> LoadedRun:
    """Load lmms-eval's results and samples and, where there is one, the capture.

    `scores_only` as in `read_samples`, `tables` as in `read_run`.

    Raises InputError when a file is missing, truncated, incomplete or of a newer schema; the message names it.
    """
    require(files.results)
    results = read_json(files.results)
    logged = logged_samples(results)
    if absent := sorted(logged.keys() - files.samples.keys()):
        raise InputError("file", f"{files.date}_samples_{absent[0]}.jsonl", rerun("it was logged and is missing"))
    return LoadedRun(
        files=files,
        results=results,
        samples={
            task: read_samples(path, scores_only=scores_only, sha256=logged.get(task))
            for task, path in files.samples.items()
        },
        # lmms-eval saves its results before the plugin its files.
        data=read_run(files.folder, files.date, tables=tables) if files.captured or "keyspace" in results else None,
    )


def logged_samples(results: Mapping[str, Any]) -> dict[str, str]:
    """Task -> sha256 of its documents in their order, for the tasks whose samples lmms-eval was to save."""
    hashes = results.get("task_hashes")
    return {task: str(sha256) for task, sha256 in hashes.items()} if isinstance(hashes, dict) else {}


def read_samples(path: Path, *, scores_only: bool = False, sha256: str | None = None) -> pd.DataFrame:
    """A samples file of lmms-eval, one row per line; invalid UTF-8 becomes U+FFFD, half a surrogate pair `?`.

    Args:
        path: the file, to which lmms-eval adds one line after the other.
        scores_only: only what names a row and its outcome, and numbers: lmms-eval gives every row a field for every
            metric of its task, most of them empty.
        sha256: of the documents, as `logged_samples` has it; None does not check.

    Raises:
        InputError: a line that is not a JSON object (names file and line), other rows than those of `sha256`, or a
            whole number that pandas cannot hold.
    """
    require(path)
    rows = []
    documents = hashlib.sha256()
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # the latter for lists in lists without end
                raise InputError(f"{path.name}, line {number}", _short(line), rerun(f"not JSON: {error}")) from error
            if not isinstance(row, dict):
                raise InputError(f"{path.name}, line {number}", _short(line), rerun("not a JSON object"))
            documents.update(f"sample_{number - 1}{row.get('doc_hash')}".encode(errors="replace"))
            if scores_only:
                row = {key: value for key, value in row.items() if type(value) in _NUMBERS or key in _SCORED}
            rows.append(encodable(row) if SURROGATE.search(line) else row)
    if sha256 is not None and documents.hexdigest() != sha256:
        way_out = rerun("not the documents of the run: it was stopped while it saved them, or the file was exchanged")
        raise InputError("file", f"{path.name}, {len(rows)} rows", way_out)
    try:
        return pd.DataFrame(rows)
    except OverflowError as error:  # pandas 2 makes floats of whole numbers that no column of integers holds
        raise InputError("file", path.name, rerun(f"a number out of range: {error}")) from error


def _frames(data: RunData) -> dict[str, pd.DataFrame]:
    frames = {"divergence": data.divergence, "attention": data.attention, "tokens": data.tokens}
    return frames if data.options is None else {**frames, "options": data.options}


def _read_record(path: Path) -> RunRecord:
    require(path)
    content = read_json(path)
    check_version(path, content.get("schema_version"))
    try:
        record = RunRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError("file", path.name, rerun(f"field {field}: {first['msg']}")) from error
    if not record.complete:
        raise InputError("run", str(path), "this run did not end (complete is false): run it again")
    if not record.files.keys() >= _ALWAYS or any(Path(name).name != name for name in record.files):
        raise InputError("file", path.name, rerun("field files: not what a run writes"))
    return record


def _keys_name(task: str) -> str:
    return f"{_KEYS}{quote(task, safe='')}.safetensors"


def _task_of(keys_name: str) -> str:
    return unquote(keys_name.removeprefix(_KEYS).removesuffix(".safetensors"))


def _short(text: str) -> str:
    return text[:60].rstrip("\n")
