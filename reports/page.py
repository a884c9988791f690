"""A report as one HTML file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmms_keyspace.outcomes import GOLD, LURE, OTHER, PARSE_FAIL
from lmms_keyspace.reports.content import Report
from lmms_keyspace.reports.methods import METHODS, UNKNOWN
from lmms_keyspace.reports.provenance import RUN_COLUMNS, run_row, settings
from lmms_keyspace.reports.sections import Table
from lmms_keyspace.reports.sections.parts import table_of
from lmms_keyspace.reports.templating import rendered
from lmms_keyspace.reports.verdict import FELL, IMPROVED, MIXED, ROSE, UNCHANGED, WORSENED, same_change
from lmms_keyspace.reports.wording import printed

_SIGNS = {FELL: "↓", ROSE: "↑", IMPROVED: "▲", WORSENED: "▼", MIXED: "±", UNCHANGED: "="}
_OUTCOME_NAMES = {
    GOLD: "followed the image",
    LURE: "followed the text",
    OTHER: "another answer",
    PARSE_FAIL: "not readable",
}


def html(report: Report) -> str:
    """The page of a report."""
    return rendered(
        "report.html.j2",
        report=report,
        signs=_SIGNS,
        outcome_names=_OUTCOME_NAMES,
        run_names=[run.label for run in report.runs.runs],
        verdicts=[{"verdict": one, "controls": same_change(one, report.verdicts)} for one in report.verdicts],
        runs=Table(RUN_COLUMNS, tuple(run_row(run) for run in report.runs.runs)),
        comparison=list(_comparison(report)),
        methods=METHODS,
        unknown=UNKNOWN,
        settings=[{"name": run.label, "table": Table(("Setting", "Value"), settings(run))} for run in report.runs.runs],
    )


def _comparison(report: Report) -> Iterator[dict[str, Any]]:
    table = printed(report.comparison.table)
    for task, rows in table.groupby("Task", sort=False):
        yield {"name": task, "table": table_of(rows.drop(columns="Task"))}
