"""The sections of a report: everything that the runs say about one task, as figures, tables and words.

One module per question. A builder takes the runs of a task and returns a `Part`, or None where they do not allow it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lmms_keyspace.reports.examples import Examples, examples
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.sections.answers import answers, families
from lmms_keyspace.reports.sections.attention import attention, fooled
from lmms_keyspace.reports.sections.divergence import divergence, heads, published
from lmms_keyspace.reports.sections.link import link
from lmms_keyspace.reports.sections.parts import Panel, Part, Table
from lmms_keyspace.reports.sections.planes import planes
from lmms_keyspace.reports.sections.relation import relation

__all__ = ["Notice", "Panel", "Part", "Section", "Table", "section"]


@dataclass(frozen=True)
class Notice:
    """What a reader must know of some runs before the figures of a task."""

    runs: tuple[str, ...]  # labels
    text: str


@dataclass(frozen=True)
class Section:
    """Everything about one task."""

    name: str
    anchor: str
    parts: tuple[Part, ...]
    examples: Examples | None
    notices: tuple[Notice, ...]


def section(runs: Sequence[Run], task: str, comparison: pd.DataFrame, *, tsne_runs: int) -> Section:
    """Draw everything that the runs of one task allow.

    `comparison` is the compared table of this task, `tsne_runs` the number of runs whose keys are drawn.
    """
    parts = (
        answers(runs, task),
        divergence(runs, task),
        heads(runs, task),
        attention(runs, task),
        fooled(runs, task),
        link(runs, task),
        relation(runs, task, comparison),
        planes(runs, task, tsne_runs),
        published(runs, task),
        families(runs, task),
    )
    return Section(
        name=task,
        anchor="task-" + re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-"),
        parts=tuple(part for part in parts if part is not None),
        examples=examples(runs, task),
        notices=_notices(runs, task),
    )


def _notices(runs: Sequence[Run], task: str) -> tuple[Notice, ...]:
    records = [(run.label, record) for run in runs if (record := run.task_record(task)) is not None]
    unread = tuple(label for label, record in records if not record.interpretable)
    text = "not interpretable. The model cannot read this benchmark; its accuracy says nothing."
    notices = [Notice(unread, text)] if unread else []
    for label, record in records:
        if record.images_absent:
            numbers = ", ".join(map(str, record.images_absent))
            text = f"asked without an image that the question names and the data set does not hold: document {numbers}."
            notices.append(Notice((label,), text))
    return tuple(notices)
