"""All that a report says, before it has a form."""

from __future__ import annotations

from dataclasses import dataclass

from lmms_keyspace import __version__
from lmms_keyspace.reports.compare import Comparison
from lmms_keyspace.reports.labels import BUNDLED
from lmms_keyspace.reports.load import Runs
from lmms_keyspace.reports.methods import BUNDLED_NOTICE
from lmms_keyspace.reports.sections import Panel, Section
from lmms_keyspace.reports.verdict import NOT_COMPARED, NOT_MEASURED, Finding, Verdict

VERDICT_COLUMNS = (
    "Run",
    "Task",
    "Divergence of image and text keys",
    "Reliance on the image",
    "Plain questions",
    "In short",
)


@dataclass(frozen=True)
class Report:
    """What the page and the Markdown are made of; `key` are the panels of the first screen."""

    runs: Runs
    comparison: Comparison
    verdicts: tuple[Verdict, ...]
    key: tuple[Panel, ...]
    sections: tuple[Section, ...]

    title = "Does the model look at the image?"

    @property
    def summary(self) -> str:
        """One line: which runs, which tasks."""
        others = len(self.runs.runs) - 1
        against = f" and {others} more run{'s' if others > 1 else ''} compared with it" if others else ""
        return (
            f"{self.runs.base.label} (base){against}; tasks: {', '.join(self.runs.tasks)}; lmms-keyspace {__version__}"
        )

    @property
    def notices(self) -> list[str]:
        """What a reader must know before anything else."""
        bundled = any(run.record and run.record.pretrained == BUNDLED for run in self.runs.runs)
        return [BUNDLED_NOTICE] if bundled else []


def verdict_rows(report: Report) -> list[list[str]]:
    """The verdicts as a table of text with the columns of VERDICT_COLUMNS."""
    return [
        [one.run, one.task, *map(_cell, (one.divergence, one.reliance, one.harm)), one.conclusion]
        for one in report.verdicts
    ]


def _cell(finding: Finding) -> str:
    if finding.answer in (NOT_COMPARED, NOT_MEASURED) or not finding.change:
        return finding.answer
    return f"{finding.answer} ({finding.change} {finding.limits})"
