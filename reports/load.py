"""Opens the runs that a report is about and decides whether they may be compared."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import Groups, outcomes_by_group
from lmms_keyspace.records import RunRecord, TaskRecord
from lmms_keyspace.store import LoadedRun, RunFiles, find_runs, load_run

BUNDLED = "bundled"  # RunRecord.pretrained of the model that comes with the package
_PROBE_COLUMNS = {"group_id", "condition", "outcome"}


@dataclass(frozen=True)
class Run:
    """One run under the short name that tables and figures use."""

    label: str
    loaded: LoadedRun

    @property
    def record(self) -> RunRecord | None:
        """What the plugin recorded; None for a run of a stock model."""
        return self.loaded.data.record if self.loaded.data else None

    @property
    def config(self) -> dict[str, Any]:
        """lmms-eval's own record of how it was called."""
        return dict(self.loaded.results.get("config") or {})

    @property
    def tasks(self) -> list[str]:
        """Tasks with results, in the order lmms-eval ran them; groups of tasks are left out."""
        results = self.loaded.results
        return [task for task in results.get("results", {}) if task in results.get("configs", {task: None})]

    @cached_property
    def probes(self) -> dict[str, Groups]:
        """Outcomes by group of every probe task that logged its samples."""
        return {
            task: outcomes_by_group(samples)
            for task, samples in self.loaded.samples.items()
            if set(samples.columns) >= _PROBE_COLUMNS
        }

    def task_record(self, task: str) -> TaskRecord | None:
        """What was captured of a task, or None."""
        return self.record.tasks.get(task) if self.record else None


@dataclass(frozen=True)
class Runs:
    """Runs that are compared with the first, and the reasons why they should not be (empty unless allowed)."""

    runs: tuple[Run, ...]
    mismatches: tuple[str, ...]

    @property
    def base(self) -> Run:
        """The first run."""
        return self.runs[0]

    @property
    def tasks(self) -> list[str]:
        """Tasks of the base that at least one other run has too (all of them when there is one run)."""
        others = self.runs[1:]
        return [task for task in self.base.tasks if not others or any(task in run.tasks for run in others)]


def open_runs(paths: Sequence[Path], *, allow_mismatch: bool = False) -> Runs:
    """Load runs. A path stands for the newest run of every model and adapter in it; the first run is the base.

    Raises InputError when a path has no run, a run is damaged or incomplete, no task is shared with the base, or runs
    differ in what makes them comparable (task version, generator, prompts, image tokens, pixels, batch size, attention
    implementation) and `allow_mismatch` is not set.
    """
    if not paths:
        raise InputError("runs", [], "name at least one run folder")
    files = list(dict.fromkeys(file for path in paths for file in _newest_of_each_model(Path(path))))
    loaded = [load_run(file) for file in files]
    runs = tuple(Run(label, run) for label, run in zip(_labels(loaded), loaded, strict=True))
    for run in runs[1:]:
        if not set(run.tasks) & set(runs[0].tasks):
            raise InputError(
                "runs", run.label, f"it shares no task with {runs[0].label}: {run.tasks} against {runs[0].tasks}"
            )
    mismatches = tuple(reason for run in runs[1:] for reason in _mismatches(runs[0], run))
    if mismatches and not allow_mismatch:
        raise InputError(
            "runs", "; ".join(mismatches), "these runs must not be compared; --allow-mismatch does it and says so"
        )
    return Runs(runs, mismatches)


def _newest_of_each_model(path: Path) -> list[RunFiles]:
    newest: dict[str, RunFiles] = {}
    for files in find_runs(path):
        newest[_identity(files)] = files
    return sorted(newest.values(), key=lambda files: (files.date, files.folder))


def _identity(files: RunFiles) -> str:
    """Folder, model and arguments: runs that agree in them are repetitions. A damaged file is reported on loading."""
    try:
        config = json.loads(files.results.read_text(encoding="utf-8", errors="replace"))["config"]
        return f"{files.folder}\0{config['model']}\0{config['model_args']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{files.folder}\0{files.date}"


def _labels(loaded: Sequence[LoadedRun]) -> list[str]:
    """Short and distinct: the adapter, or the model where there is none; the date where that is not enough."""
    labels = [_label(run) for run in loaded]
    for detail in (lambda run: run.files.date, lambda run: run.files.folder.name):
        repeated = {label for label, count in Counter(labels).items() if count > 1}
        labels = [
            f"{label} ({detail(run)})" if label in repeated else label
            for label, run in zip(labels, loaded, strict=True)
        ]
    seen: Counter[str] = Counter()
    for index, label in enumerate(labels):
        seen[label] += 1
        labels[index] = label if seen[label] == 1 else f"{label} #{seen[label]}"
    return labels


def _label(run: LoadedRun) -> str:
    if run.data is None:
        config = run.results.get("config") or {}
        found = re.search(r"pretrained=([^,]+)", str(config.get("model_args")))
        return _last_part(found[1]) if found else str(config.get("model", run.files.folder.name))
    record = run.data.record
    bundled = "bundled base" if record.pretrained == BUNDLED else _last_part(record.pretrained)
    name = _last_part(record.adapter) if record.adapter else bundled
    return f"{name} + {record.intervention}" if record.intervention else name


def _last_part(name: str) -> str:
    return re.split(r"[/\\:]", name.rstrip("/\\"))[-1] or name


def _mismatches(base: Run, run: Run) -> list[str]:
    """Every reason why `run` must not be compared with `base`, in words."""
    found = []

    def check(what: str, of_base: object, of_run: object) -> None:
        if of_base != of_run:
            found.append(f"{run.label}: {what} is {of_run}, {base.label} has {of_base}")

    for task in (task for task in base.tasks if task in run.tasks):
        versions = [one.loaded.results.get("versions", {}).get(task) for one in (base, run)]
        check(f"{task} version", *versions)
        first, second = base.task_record(task), run.task_record(task)
        if first and second:
            check(f"{task} generator", first.generator, second.generator)
            check(f"{task} prompt hash (wording, order or --limit)", first.prompt_hash[:12], second.prompt_hash[:12])
            check(f"{task} image tokens", first.image_tokens, second.image_tokens)
        else:
            documents = [len(one.loaded.samples.get(task, pd.DataFrame())) for one in (base, run)]
            if all(documents):
                check(f"{task} documents", *documents)
    if base.record and run.record:
        check("batch size", base.record.batch_size, run.record.batch_size)
        check("attention implementation", base.record.attn_implementation, run.record.attn_implementation)
        check("processor", base.record.processor_hash[:12], run.record.processor_hash[:12])
    else:
        check("batch size", str(base.config.get("batch_size")), str(run.config.get("batch_size")))
    return found
