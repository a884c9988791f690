"""`report`: everything that the runs say, as one page, as Markdown and as CSV."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from lmms_keyspace.errors import InputError
from lmms_keyspace.reports.compare import compare
from lmms_keyspace.reports.load import Runs
from lmms_keyspace.reports.page import Report, html, markdown
from lmms_keyspace.reports.sections import section
from lmms_keyspace.reports.verdict import verdicts
from lmms_keyspace.reports.wording import printed


def write_report(runs: Runs, out: Path) -> list[Path]:
    """Write `report.html`, `report.md` and the CSV tables behind them into `out`; returns the files, the page first.

    The first run is the base. Raises InputError for an `out` that is no folder; nothing is written then.
    """
    if out.exists() and not out.is_dir():
        raise InputError("out", str(out), "name a folder: this is a file")
    comparison = compare(runs)
    sections = tuple(section([run for run in runs.runs if task in run.tasks], task) for task in runs.tasks)
    report = Report(runs, comparison, tuple(verdicts(comparison.table)), sections)
    tables = {"comparison": pd.concat([comparison.table, printed(comparison.table).add_prefix("printed ")], axis=1)}
    for one in sections:
        tables |= {f"{_file_name(one.name)}_{name}": frame for name, frame in one.frames.items()}
    files = {"report.html": html(report), "report.md": markdown(report)}
    files |= {f"{name}.csv": table.to_csv(index=False) for name, table in tables.items()}
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in files.items():
        path = out / name
        # Answers of a model may hold lone surrogates, which UTF-8 cannot.
        path.write_text(text, encoding="utf-8", errors="replace")
        written.append(path)
    return written


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]+", "_", task).strip(".") or "task"
