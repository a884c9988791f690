"""`report`: everything that the runs say, as one page, as Markdown, as tables and as figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lmms_keyspace.reports.compare import compare
from lmms_keyspace.reports.content import Report
from lmms_keyspace.reports.load import Runs
from lmms_keyspace.reports.markdown import markdown
from lmms_keyspace.reports.page import html
from lmms_keyspace.reports.sections import Panel, section
from lmms_keyspace.reports.sections.key import key_panels
from lmms_keyspace.reports.sections.parts import MAX_PANELS
from lmms_keyspace.reports.verdict import verdicts
from lmms_keyspace.reports.wording import printed
from lmms_keyspace.store.files import encoded, require_writable, write


def write_report(runs: Runs, out: Path, *, figure_files: bool = True, tsne_runs: int = MAX_PANELS) -> list[Path]:
    """Write the report into `out`, each file whole or not at all and the page last; returns the files, the page first.

    `report.html` and `report.md`; `comparison.json`; in `tables/` every frame as CSV and Parquet, unrounded; in
    `figures/` every figure as SVG, PNG and PDF, unless `figure_files` is off: they take half the time. The keys of
    the first `tsne_runs` runs are drawn, which takes seconds each. The first run is the base. Raises InputError for an
    `out` that cannot be written, before anything is computed, and when there is no room in it.
    """
    require_writable("out", out)
    report = _assembled(runs, tsne_runs)
    texts = {
        "comparison.json": report.comparison.to_json() + "\n",
        "report.md": markdown(report),
        "report.html": html(report),
    }
    for folder in ("tables", *(["figures"] if figure_files else [])):
        require_writable("out", out / folder)
    written = []
    for name, frame in _frames(report):
        stem = out / "tables" / name
        written.append(write(stem.with_name(f"{name}.csv"), encoded(frame.to_csv(index=False))))
        written.append(write(stem.with_name(f"{name}.parquet"), frame.to_parquet(None, index=False)))
    for name, panel in _panels(report) if figure_files else ():
        written += panel.drawing.save(out / "figures" / name)
    written += [write(out / name, encoded(text)) for name, text in texts.items()]
    return written[::-1]


def _assembled(runs: Runs, tsne_runs: int) -> Report:
    comparison = compare(runs)
    tables = {task: rows for task, rows in comparison.table.groupby("task", sort=False)}
    sections = tuple(
        section(
            [run for run in runs.runs if task in run.tasks],
            task,
            tables.get(task, comparison.table.iloc[:0]),
            tsne_runs=tsne_runs,
        )
        for task in runs.tasks
    )
    first = next(iter(tables), None)
    key = () if first is None else key_panels(tables[first], str(first))
    return Report(runs, comparison, tuple(verdicts(comparison.table)), key, sections)


def _frames(report: Report) -> Iterator[tuple[str, pd.DataFrame]]:
    table = report.comparison.table
    yield "comparison", pd.concat([table, printed(table).add_prefix("printed ")], axis=1)
    for one in report.sections:
        for part in one.parts:
            for name, frame in part.frames.items():
                yield f"{_file_name(one.name)}_{name}", frame


def _panels(report: Report) -> Iterator[tuple[str, Panel]]:
    yield from ((panel.name, panel) for panel in report.key)
    for one in report.sections:
        for part in one.parts:
            yield from ((f"{_file_name(one.name)}_{panel.name}", panel) for panel in part.panels)


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]+", "_", task).strip(".")[:80] or "task"
