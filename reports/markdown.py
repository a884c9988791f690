"""A report as Markdown: everything but the figures."""

from __future__ import annotations

from collections.abc import Iterator

from lmms_keyspace.reports.content import VERDICT_COLUMNS, Report, verdict_rows
from lmms_keyspace.reports.markup import markdown_table, plain
from lmms_keyspace.reports.methods import METHODS, UNKNOWN
from lmms_keyspace.reports.provenance import RUN_COLUMNS, run_row
from lmms_keyspace.reports.sections import Section
from lmms_keyspace.reports.verdict import same_change
from lmms_keyspace.reports.wording import printed


def markdown(report: Report) -> str:
    """The whole text; what a run brought along is escaped."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield from (f"# {report.title}", "", plain(report.summary), "")
    yield from (f"> {plain(notice)}\n" for notice in report.notices)
    yield from (f"- {plain(warning)}" for warning in report.comparison.warnings)
    yield from ("", "## Verdict", "")
    if report.verdicts:
        yield from (markdown_table(VERDICT_COLUMNS, verdict_rows(report)), "")
    for one in report.verdicts:
        yield from (f"### {plain(one.run)} ({plain(one.task)})", "")
        for finding in (one.divergence, one.reliance, one.harm):
            yield from (f"**{finding.question}** {finding.answer}", "")
            yield from (f"- {plain(sentence)}" for sentence in finding.evidence)
            yield ""
        yield from (one.conclusion, "", *(f"{plain(sentence)}\n" for sentence in same_change(one, report.verdicts)))
    yield from ("## What was run", "", markdown_table(RUN_COLUMNS, [run_row(run) for run in report.runs.runs]))
    for section in report.sections:
        yield from _section(section)
    table = printed(report.comparison.table)
    yield from ("", "## Every number compared", "", markdown_table(list(table.columns), table.values.tolist()))
    yield from ("", "## What the published protocol leaves unknown", "", *(f"- {sentence}" for sentence in UNKNOWN))
    yield from ("", "## Methods", "", *(f"- {sentence}" for sentence in METHODS))


def _section(section: Section) -> Iterator[str]:
    yield from ("", f"## {plain(section.name)}")
    for part in section.parts:
        if not part.tables and not part.points:
            continue
        yield from ("", f"### {part.title}", "", plain(part.text), "")
        yield from (f"- {plain(point)}" for point in part.points)
        for table in part.tables:
            yield from ("", *([f"{plain(table.caption)}:", ""] if table.caption else []))
            yield markdown_table(table.columns, table.rows)
        if part.warning:
            yield from ("", f"> {plain(part.warning)}")
