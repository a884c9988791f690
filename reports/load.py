"""Opens the runs that a report is about and decides whether they may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import Groups, outcomes_by_group
from lmms_keyspace.records import RunRecord, TaskRecord
from lmms_keyspace.redaction import publishable
from lmms_keyspace.reports.check import PROBE_COLUMNS, check_run
from lmms_keyspace.reports.comparable import Fingerprint, fingerprint, mismatches, remarks
from lmms_keyspace.reports.labels import labels
from lmms_keyspace.reports.text import LONGEST_SENTENCE, one_line
from lmms_keyspace.store import LoadedRun, RunFiles, find_runs, load_run


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
        """lmms-eval's own record of how it was called, as it may be shown."""
        return dict(publishable(self.loaded.results.get("config", {})))

    @property
    def tasks(self) -> list[str]:
        """Tasks with results, in the order lmms-eval ran them; groups of tasks are left out."""
        results = self.loaded.results
        return [task for task in results["results"] if task in results.get("configs", {task: None})]

    @cached_property
    def probes(self) -> dict[str, Groups]:
        """Outcomes by group of every probe task that logged its samples."""
        return {
            task: outcomes_by_group(samples)
            for task, samples in self.loaded.samples.items()
            if set(samples.columns) >= PROBE_COLUMNS
        }

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What another run must share to be compared with this one."""
        documents = {task: len(samples) for task, samples in self.loaded.samples.items()}
        return fingerprint(self.loaded.results, documents, self.record)

    def task_record(self, task: str) -> TaskRecord | None:
        """What was captured of a task, or None."""
        return self.record.tasks.get(task) if self.record else None


@dataclass(frozen=True)
class Runs:
    """Runs that are compared with the first, and what was said against it.

    `mismatches` are the reasons why the runs should not be compared (empty unless allowed), `left_out` names the runs
    that are not among them and why.
    """

    runs: tuple[Run, ...]
    mismatches: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def base(self) -> Run:
        """The first run."""
        return self.runs[0]

    @property
    def tasks(self) -> list[str]:
        """Tasks of the base that at least one other run has too (all of them when there is one run)."""
        others = self.runs[1:]
        return [task for task in self.base.tasks if not others or any(task in run.tasks for run in others)]

    @property
    def remarks(self) -> list[str]:
        """Differences to the base that may move values slightly or are what is compared, such as the dtype."""
        return [
            f"{run.label}: {remark}"
            for run in self.runs[1:]
            for remark in remarks(self.base.fingerprint, run.fingerprint)
        ]


def load_runs(paths: Sequence[Path | str], *, allow_mismatch: bool = False) -> Runs:
    """Load runs. A path stands for the newest run of every model and adapter in it; the first run is the base.

    A run that is damaged or incomplete, has no task of the base, or differs from it in what makes runs comparable
    (`comparable.mismatches`; unless `allow_mismatch` is set) is left out with its reason, as long as another one
    remains to be compared.

    Raises InputError when no path is given, the base cannot be used, or nothing remains to be compared with it.
    """
    base, *others = open_runs(paths)
    if isinstance(base, InputError):
        raise base
    kept, said = [base], []
    refused: list[InputError] = []
    for run in others:
        if isinstance(run, InputError):
            refused.append(run)
            continue
        reasons = mismatches(base.fingerprint, run.fingerprint)
        if not set(run.tasks) & set(base.tasks):
            way_out = f"it shares no task with {base.label}, which has {base.tasks}"
            refused.append(InputError(f"tasks of {run.label}", run.tasks, way_out))
        elif reasons and not allow_mismatch:
            way_out = f"it must not be compared with {base.label}; --allow-mismatch does it and says so"
            refused.append(InputError(run.label, "; ".join(reasons), way_out))
        else:
            kept.append(run)
            said += [f"{run.label}: {reason}" for reason in reasons]
    if refused and len(kept) == 1:
        raise refused[0]
    return Runs(tuple(kept), tuple(said), tuple(map(why_left_out, refused)))


def why_left_out(error: InputError) -> str:
    """Why a run is left out, as pages may show it."""
    return one_line(publishable(str(error)), LONGEST_SENTENCE)


def open_runs(paths: Sequence[Path | str]) -> list[Run | InputError]:
    """The runs at `paths` in order under distinct labels, comparable or not; where one cannot be read, its error.

    Raises InputError when no path is given.
    """
    found = list(each_run(paths))
    names = iter(labels([run for run in found if isinstance(run, LoadedRun)]))
    return [run if isinstance(run, InputError) else Run(next(names), run) for run in found]


def each_run(paths: Sequence[Path | str], **parts: Any) -> Iterator[LoadedRun | InputError]:
    """The runs at `paths`, one after the other, so that not all must be held; where one cannot be read, its error.

    `parts` says what to read of each, as `store.load_run` does; everything by default.

    Raises InputError when no path is given.
    """
    if not paths:
        raise InputError("runs", [], "name at least one run folder")
    seen: set[RunFiles] = set()
    for path in map(Path, paths):
        try:
            found = [files for files in _newest_of_each_model(path) if files not in seen]
        except InputError as error:
            yield error
            continue
        seen.update(found)
        yield from (_loaded(files, **parts) for files in found)


def _loaded(files: RunFiles, **parts: Any) -> LoadedRun | InputError:
    try:
        run = load_run(files, **parts)
        check_run(run)
    except InputError as error:
        name = one_line(f"{files.folder.name}/{files.date}")
        return InputError(f"run {name}, {error.argument}", error.value, error.way_out)
    return run


def _newest_of_each_model(path: Path) -> list[RunFiles]:
    newest = {_identity(files): files for files in find_runs(path)}
    return sorted(newest.values(), key=lambda files: (files.date, files.folder))


def _identity(files: RunFiles) -> str:
    """Folder, model and arguments: runs that agree in them are repetitions. A damaged file is reported on loading."""
    try:
        config = json.loads(files.results.read_text(encoding="utf-8", errors="replace"))["config"]
        return f"{files.folder}\0{config['model']}\0{config['model_args']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{files.folder}\0{files.date}"
