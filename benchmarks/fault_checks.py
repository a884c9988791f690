"""What a stage that was killed may have left: what can be read is what a whole stage leaves, and nothing is lost."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from lmms_keyspace import embedded
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import check_adapter
from lmms_keyspace.store import LoadedRun, find_runs, load_run
from lmms_keyspace.store.files import UNFINISHED
from lmms_keyspace.training.checkpoints import last_whole
from lmms_keyspace.training.run import RECORD

_WEIGHTS = "adapter_model.safetensors"
_RUN_TABLES = ("divergence", "attention", "tokens")


@dataclass(frozen=True)
class Laid:
    """What a kill is measured against: the folder of the finished run, and the whole result of every other stage."""

    runs: Path
    results: dict[str, Path]


def fingerprint(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def lost(before: dict[str, str], after: dict[str, str]) -> str:
    """Which of the files of a fingerprint are not in the other as they were."""
    changed = [path for path, sha256 in before.items() if after.get(path) != sha256]
    return f"gone or changed: {changed}" if changed else ""


def unfinished(folder: Path) -> list[str]:
    """Files below a folder that were being written when their process was killed."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(f".*{UNFINISHED}"))


def _run_differs(laid: Laid, out: Path, whole: bool) -> str:
    """Every run in the folder is that of the reference, or refused; with `whole`, there is a second one."""
    expected, read = _reference(laid.runs / "base"), 0
    for files in find_runs(out):
        with contextlib.suppress(InputError):
            found = _named(load_run(files))
            if differing := [name for name, content in expected.items() if content != found.get(name)]:
                return f"{files.date}: {', '.join(differing)} differ from the whole run's"
            read += 1
    return "" if read >= 1 + whole else f"{read} of the runs can be read: {sorted(out.iterdir())}"


@functools.cache
def _reference(folder: Path) -> dict[str, str]:
    (files,) = find_runs(folder)
    return _named(load_run(files))


def _named(run: LoadedRun) -> dict[str, str]:
    """What a run says, by file; without its date and the paths and times in it."""
    data = run.data
    if data is None:
        return {"captured": "nothing"}
    sums = {key: [getattr(value, name).tolist() for name in ("vv", "tt", "vt")] for key, value in data.gram.items()}
    keys = {task: {name: arrays[name].tolist() for name in arrays} for task, arrays in data.keys.items()}
    samples = {task: frame.to_csv() for task, frame in run.samples.items()}
    tables = {name: getattr(data, name).to_csv() for name in _RUN_TABLES}
    named = {"captured": "all", "gram": sums, "keys": keys, "samples": samples, "results": run.results["results"]}
    return tables | {name: str(content) for name, content in named.items()}


def _files_differ(stage: str) -> Callable[[Laid, Path, bool], str]:
    """For a stage whose files depend on its input alone: each is the reference's, byte for byte, or is not there."""

    def check(laid: Laid, out: Path, whole: bool) -> str:
        expected, found = _visible(laid.results[stage]), _visible(out)
        strange = [name for name, sha256 in found.items() if expected.get(name) != sha256]
        missing = sorted(expected.keys() - found.keys()) if whole else []
        return f"strange: {strange}; missing: {missing}" if strange or missing else ""

    return check


def _visible(folder: Path) -> dict[str, str]:
    """As `fingerprint`, by path in the folder; not what is hidden, nor an analysis' unfinished parts."""
    own = {str(Path(path).relative_to(folder)): sha256 for path, sha256 in fingerprint(folder).items()}
    return {path: sha256 for path, sha256 in own.items() if not re.search(r"(^|/)(\.|parts/)", path)}


def _adapter_differs(laid: Laid, out: Path, whole: bool) -> str:
    """An adapter or checkpoint that can be read is the reference's."""
    expected = laid.results["train"]
    config = AutoConfig.from_pretrained(embedded.base_path())
    folders = [out, *(checkpoint for checkpoint in [last_whole(out)] if checkpoint is not None)]
    read = []
    for folder in folders:
        with contextlib.suppress(InputError):
            found = check_adapter(folder, config).sha256
            reference = expected / folder.relative_to(out) / _WEIGHTS
            if not reference.exists() or found != hashlib.sha256(reference.read_bytes()).hexdigest():
                return f"{folder.name} holds another adapter"
            read.append(folder)
    if len(folders) > 1 and folders[1] not in read:
        return f"{folders[1].name} is taken for whole and cannot be read"
    recorded = (out / RECORD).exists()
    if recorded:
        json.loads((out / RECORD).read_text())
    if recorded and out not in read:
        return "a record without its adapter"
    return "" if recorded or not whole else f"no record: {sorted(out.iterdir())}"


# Stage -> what is wrong with its folder; empty where nothing is. The last argument: it must be whole, too.
CHECKS: dict[str, Callable[[Laid, Path, bool], str]] = {
    "run": _run_differs,
    "analyze": _files_differ("analyze"),
    "train": _adapter_differs,
    "report": _files_differ("report"),
}
