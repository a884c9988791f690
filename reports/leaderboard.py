"""One row per model and adapter, over any number of runs: values with intervals, and ranks that admit ties.

A rank is 1 + the number of rows whose 95 % interval lies wholly on the better side of a row's own. Rows whose intervals
overlap are not told apart. That two intervals overlap does not show that two models are equal: `compare` pairs their
answers and sees smaller differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import METRICS, not_valid
from lmms_keyspace.records import NOT_INTERPRETABLE
from lmms_keyspace.reports.accuracy import probe_rows, stock_rows
from lmms_keyspace.reports.comparable import TaskFingerprint, other_benchmark
from lmms_keyspace.reports.keyspace import BANDS, attention_rows, js_rows, mmd2_rows
from lmms_keyspace.reports.labels import last_part, model_name
from lmms_keyspace.reports.load import Run, each_run, why_left_out
from lmms_keyspace.reports.rows import SCORE, Row
from lmms_keyspace.reports.text import one_line
from lmms_keyspace.store import LoadedRun

# What a leaderboard shows unless columns are named, of tasks that are probes; of others, what lmms-eval reports.
DEFAULT_COLUMNS = ("clean_acc", "conflict_acc", "text_flip_rate", "vis_gain", "image_mass_all", "mmd2")
# Beginning of a column's name -> its rows, and the table that they need.
_KEY_SPACE = {
    "image_mass": (attention_rows, "attention"),
    "mmd2": (mmd2_rows, None),
    "js": (js_rows, "divergence"),
}


class Entry(NamedTuple):
    """What a row of the leaderboard stands for."""

    model: str
    adapter: str
    intervention: str
    connector: str


class Column(NamedTuple):
    """A metric of a task. `direction`: +1 where higher is better, -1 where lower is, 0: neither, and no ranks."""

    task: str
    metric: str
    label: str
    unit: str
    direction: int


class Cell(NamedTuple):
    """A value with its 95 % interval (NaN where there is none), its count and its rank (None where it has none)."""

    value: float
    low: float
    high: float
    n: int
    rank: int | None = None


@dataclass(frozen=True)
class Leaderboard:
    """Rows by entry, best first; `cells[row][column]` is None where a model was not measured.

    `left_out` says which runs or tasks do not enter and why.
    """

    columns: tuple[Column, ...]
    entries: tuple[Entry, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    left_out: tuple[str, ...]

    @property
    def table(self) -> pd.DataFrame:
        """One row per entry and column: the fields of both and of the cell, unrounded."""
        return pd.DataFrame(
            [
                {**entry._asdict(), **column._asdict(), **cell._asdict()}
                for entry, cells in zip(self.entries, self.cells, strict=True)
                for column, cell in zip(self.columns, cells, strict=True)
                if cell is not None
            ],
            columns=[*Entry._fields, *Column._fields, *Cell._fields],
        ).astype({"rank": "Int64"})


class _Measured(NamedTuple):
    """One task of one run, measured."""

    key: tuple[str, ...]  # what makes a model: full names, not the shortened ones that are shown
    entry: Entry
    date: str
    name: str  # of the run, for reasons
    task: str
    fingerprint: TaskFingerprint
    rows: tuple[Row, ...]


def leaderboard(paths: Sequence[Path | str], columns: Sequence[str] = ()) -> Leaderboard:
    """Rank the models of the runs at `paths`; of several runs of one model and task the newest counts.

    Args:
        paths: run folders, or folders above them.
        columns: names of metrics, each as `metric` (of every task that has it) or `task:metric`.

    Raises InputError for a column that no run has, and when no run remains. Runs that cannot be read, tasks that are
    not valid or not interpretable for a model, and runs that asked something else than most do not enter; they are
    named in `left_out`.
    """
    left_out: list[str] = []
    measured: list[_Measured] = []
    asked = [name.rpartition(":")[2] for name in columns] or DEFAULT_COLUMNS
    tables = {table for prefix, (_, table) in _KEY_SPACE.items() if any(name.startswith(prefix) for name in asked)}
    for loaded in each_run(paths, scores_only=True, tables=tables):
        if isinstance(loaded, InputError):
            left_out.append(why_left_out(loaded))
            continue
        for one in _measure(loaded, columns):
            if isinstance(one, str):
                left_out.append(one)
            else:
                measured.append(one)
    measured = _of_the_same_benchmark(_newest(measured, left_out), left_out)
    if not measured:
        raise InputError("runs", "; ".join(left_out), "no run can enter a leaderboard")
    shown = _columns(measured, columns)
    if not shown:
        raise InputError("runs", [one.name for one in measured], "none of them has a metric")
    entries = {one.key: one.entry for one in measured}
    found = {(one.key, one.task, row.metric): row for one in measured for row in one.rows}
    by_column = [
        _ranked([_cell(found.get((key, column.task, column.metric))) for key in entries], column.direction)
        for column in shown
    ]
    rows = list(zip(entries.values(), zip(*by_column, strict=True), strict=True))
    leading = next((index for index, column in enumerate(shown) if column.direction), 0)
    rows.sort(key=lambda row: _order(row[1][leading], shown[leading].direction, row[0]))
    kept = [(entry, cells) for entry, cells in rows if any(cells)]
    return Leaderboard(
        tuple(shown), tuple(entry for entry, _ in kept), tuple(cells for _, cells in kept), tuple(left_out)
    )


def _measure(loaded: LoadedRun, columns: Sequence[str]) -> Iterator[_Measured | str]:
    """Every task of a run that may enter, or why it may not."""
    run = Run(one_line(f"{loaded.files.folder.name}/{loaded.files.date}"), loaded)
    key, entry = _entry(run)
    for task in run.tasks:
        names = [name.removeprefix(f"{task}:") for name in columns]
        record = run.task_record(task)
        reasons = [NOT_INTERPRETABLE] if record and not record.interpretable else []
        reasons += (
            [f"not valid: {reason}" for reason in not_valid(run.probes[task].outcomes)] if task in run.probes else []
        )
        if reasons:
            yield f"{run.label}, {one_line(task)}: {'; '.join(reasons)}"
            continue
        rows = tuple(_rows(run, task, names or DEFAULT_COLUMNS, everything=not names))
        yield _Measured(key, entry, loaded.files.date, run.label, task, run.fingerprint.tasks[task], rows)


def _rows(run: Run, task: str, names: Sequence[str], *, everything: bool) -> Iterator[Row]:
    """The named metrics of a task; of one that is no probe all, where `everything` is asked for."""
    if task in run.probes:
        yield from probe_rows(task, [run], [name for name in names if name in METRICS])
    else:
        yield from (row for row in stock_rows(task, [run]) if everything or row.metric in names)
    for prefix, (rows_of, _) in _KEY_SPACE.items():
        bands = [band for band in BANDS if {prefix, f"{prefix}_{band}"} & set(names)]
        if bands:
            yield from (row for row in rows_of(task, [run], bands) if row.metric in names)


def _entry(run: Run) -> tuple[tuple[str, ...], Entry]:
    record = run.record
    if record is None:
        return (str(run.config.get("model")), str(run.config.get("model_args"))), Entry(
            model_name(run.loaded), "", "", "unknown"
        )
    revision = f"@{one_line(record.revision)[:12]}" if record.revision else ""
    key = (record.pretrained, str(record.revision), str(record.adapter), str(record.adapter_sha256))
    return (*key, str(record.intervention)), Entry(
        model_name(run.loaded) + revision,
        last_part(record.adapter) if record.adapter else "",
        one_line(record.intervention or ""),
        one_line(record.connector),
    )


def _newest(measured: Sequence[_Measured], left_out: list[str]) -> list[_Measured]:
    newest: dict[tuple[tuple[str, ...], str], _Measured] = {}
    for one in sorted(measured, key=lambda one: one.date):
        if (before := newest.get((one.key, one.task))) is not None:
            left_out.append(f"{before.name}, {one_line(one.task)}: {one.name} is a newer run of the same model")
        newest[one.key, one.task] = one
    return list(newest.values())


def _of_the_same_benchmark(measured: Sequence[_Measured], left_out: list[str]) -> list[_Measured]:
    """Those that were asked what most were asked; of a tie, what was asked first."""
    kept = []
    for task in dict.fromkeys(one.task for one in measured):
        of_task = [one for one in measured if one.task == task]
        asked = Counter(one.fingerprint.model_dump_json(exclude={"prompt_hash", "image_tokens"}) for one in of_task)
        most = TaskFingerprint.model_validate_json(asked.most_common(1)[0][0])
        for one in of_task:
            if reasons := other_benchmark(task, most, one.fingerprint):
                left_out.append(f"{one.name}: {'; '.join(reasons)}".replace("the base has", "most have"))
            else:
                kept.append(one)
    return kept


def _columns(measured: Sequence[_Measured], names: Sequence[str]) -> list[Column]:
    """The columns in the order of their names, or of the tasks; scores are shares only where all are."""
    found: dict[tuple[str, str], Column] = {}
    for one in measured:
        for row in one.rows:
            column = Column(one.task, row.metric, row.label, row.unit, row.direction)
            before = found.setdefault((one.task, row.metric), column)
            if row.unit == SCORE != before.unit:
                found[one.task, row.metric] = column
    if not names:
        return list(found.values())
    chosen = []
    for name in names:
        matching = [column for column in found.values() if name in (column.metric, f"{column.task}:{column.metric}")]
        if not matching:
            known = ", ".join(dict.fromkeys(metric for _, metric in found)) or "none of those asked for"
            raise InputError("columns", name, f"no run that enters has this metric; found: {known}")
        chosen += matching
    return list(dict.fromkeys(chosen))


def _cell(row: Row | None) -> Cell | None:
    return None if row is None or np.isnan(row.value) else Cell(row.value, row.low, row.high, row.n)


def _ranked(cells: Sequence[Cell | None], direction: int) -> list[Cell | None]:
    """The cells with their ranks; one without an interval has none and outranks none."""
    if direction == 0:
        return list(cells)
    with_interval = [cell for cell in cells if cell is not None and not np.isnan(cell.low)]
    worst = np.sort([min(direction * cell.low, direction * cell.high) for cell in with_interval])
    return [
        cell
        if cell is None or np.isnan(cell.low)
        else cell._replace(
            rank=1 + len(worst) - int(np.searchsorted(worst, max(direction * cell.low, direction * cell.high), "right"))
        )
        for cell in cells
    ]


def _order(cell: Cell | None, direction: int, entry: Entry) -> tuple[object, ...]:
    if cell is None:
        return (2, 0, 0.0, entry)
    return (1 if cell.rank is None else 0, cell.rank or 0, -(direction or 1) * cell.value, entry)
