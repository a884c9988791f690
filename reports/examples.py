"""A few questions on which the base followed the text, with what every run answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lmms_keyspace.outcomes import CLEAN, CONFLICT, GOLD, LURE
from lmms_keyspace.reports.load import Run

_LONGEST = 200  # characters of an answer or a sentence that a page shows


@dataclass(frozen=True)
class Answer:
    """What a run said to the question alone and under the misleading sentence."""

    run: str
    clean: str
    conflict: str
    outcome: str


@dataclass(frozen=True)
class Example:
    """One group: the question, the misleading sentence, and the answers by run."""

    group: str
    family: str
    question: str
    context: str
    gold: str
    lure: str
    answers: tuple[Answer, ...]


def misled(runs: Sequence[Run], task: str, limit: int = 5) -> list[Example]:
    """Groups that the base answers right alone and with the lure under misleading text, spread over the families."""
    if task not in runs[0].probes:
        return []
    outcomes = runs[0].probes[task].outcomes
    if not {CLEAN, CONFLICT} <= set(outcomes.columns):
        return []
    rows = {run.label: _rows(run.loaded.samples[task]) for run in runs if task in run.probes}
    base = rows[runs[0].label]
    fooled = outcomes.index[(outcomes[CLEAN] == GOLD) & (outcomes[CONFLICT] == LURE)]
    families = pd.Series([_text(base.loc[(group, CONFLICT)], "family") for group in fooled], index=fooled, dtype=object)
    turn = families.groupby(families).cumcount()
    chosen = turn.sort_values(kind="stable").index[:limit]
    return [_example(str(group), rows) for group in chosen]


def _rows(samples: pd.DataFrame) -> pd.DataFrame:
    keyed = samples.assign(group_id=samples["group_id"].astype(str), condition=samples["condition"].astype(str))
    return keyed.set_index(["group_id", "condition"]).sort_index()


def _example(group: str, rows: dict[str, pd.DataFrame]) -> Example:
    asked = next(iter(rows.values())).loc[(group, CONFLICT)]
    answers = tuple(
        Answer(
            run,
            _text(table.loc[(group, CLEAN)], "response"),
            _text(table.loc[(group, CONFLICT)], "response"),
            _text(table.loc[(group, CONFLICT)], "outcome"),
        )
        for run, table in rows.items()
        if (group, CLEAN) in table.index and (group, CONFLICT) in table.index
    )
    family, question, context, gold, lure = (
        _text(asked, field) for field in ("family", "question", "context", "gold", "lure")
    )
    return Example(group, family, question, context, gold, lure, answers)


def _text(row: pd.Series, field: str) -> str:
    text = str(row.get(field, ""))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
