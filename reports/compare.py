"""The paired table: what each run measures and how it differs from the first, the base."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.outcomes import not_valid
from lmms_keyspace.records import NOT_INTERPRETABLE
from lmms_keyspace.reports.accuracy import probe_rows, stock_rows
from lmms_keyspace.reports.curves import attention_when_misled
from lmms_keyspace.reports.keyspace import attention_rows, js_rows, mmd2_rows
from lmms_keyspace.reports.load import Runs
from lmms_keyspace.reports.rows import Row
from lmms_keyspace.reports.text import LONGEST_SENTENCE, one_line
from lmms_keyspace.reports.verdict import JUDGED


@dataclass(frozen=True)
class Comparison:
    """The paired table of runs against the first.

    `table` has one row per task, metric and run with the columns of `Row`. `looked` says by task and run where the last
    prompt token looked when it answered with the image or with the misleading text (`curves.attention_when_misled`): a
    description, not tested, as the two kinds of answers differ in their scenes, too. `warnings` says what limits the
    comparison.
    """

    runs: tuple[str, ...]
    table: pd.DataFrame
    looked: pd.DataFrame
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """The whole comparison; numbers that do not exist are null."""
        content = {
            "base": self.runs[0],
            "runs": self.runs,
            "warnings": self.warnings,
            "rows": _records(self.table),
            "where_it_looked": _records(self.looked),
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def compare(runs: Runs) -> Comparison:
    """The paired table of loaded runs. p values are adjusted by Holm, over the metrics of the verdict
    and over all others apart."""
    rows = [
        row
        for task in runs.tasks
        for rows_of in (probe_rows, stock_rows, attention_rows, mmd2_rows, js_rows)
        for row in rows_of(task, [run for run in runs.runs if task in run.tasks])
    ]
    table = pd.DataFrame([asdict(row) for row in rows], columns=list(Row.__dataclass_fields__))
    table["p_adjusted"] = float("nan")
    judged = table["metric"].isin(JUDGED)
    for family in (judged, ~judged):
        table.loc[family, "p_adjusted"] = stats.holm(table.loc[family, "p"].to_numpy(dtype=float))
    looks = [attention_when_misled(runs.runs, task).assign(task=task) for task in runs.tasks]
    looked = pd.concat(
        [frame for frame in looks if len(frame) and "run" in frame] or [pd.DataFrame()], ignore_index=True
    )
    return Comparison(
        tuple(run.label for run in runs.runs),
        table,
        looked,
        tuple(one_line(warning, LONGEST_SENTENCE) for warning in _warnings(runs)),
    )


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows for JSON, which knows neither NaN nor infinity."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in table.to_dict("records")
    ]


def _warnings(runs: Runs) -> Iterator[str]:
    yield from (f"left out: {reason}" for reason in runs.left_out)
    yield from runs.mismatches
    yield from runs.remarks
    for run in runs.runs:
        if run.record is None:
            yield f"{run.label}: no keys were captured (not a model of this plugin); its accuracy only"
        elif not run.record.capture:
            yield f"{run.label}: no keys were captured (capture=off); its accuracy only"
        for task in run.tasks:
            record = run.task_record(task)
            if record and not record.interpretable:
                yield f"{run.label}: {task} is {NOT_INTERPRETABLE} for this model"
            for names in record.same_prompts if record else ():
                yield f"{run.label}: {task}: {' and '.join(names)} are one prompt for this model and differ in nothing"
            if task in run.probes:
                groups = run.probes[task]
                if groups.dropped:
                    yield f"{run.label}: {task} lost {groups.dropped} incomplete groups (an evaluation cut by --limit?)"
                if reasons := not_valid(groups.outcomes):
                    yield f"{run.label}: {task} says nothing about this model: {'; '.join(reasons)}"
