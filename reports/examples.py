"""Questions with their picture, the text that came with them and what every run answered, for each kind of outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import CLEAN, CONFLICT, LURE_WORD, MISMATCHED, OUTCOMES
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.scene_pictures import data_uri

MAX_RUNS = 4
PER_OUTCOME = 3  # groups for each run and outcome
_LONGEST = 200  # characters of an answer or a sentence that a page shows
# The condition that examples show, the first that a probe has.
_SHOWN = (CONFLICT, LURE_WORD, MISMATCHED, CLEAN)

NO_RECIPE = "The samples file does not hold the recipe of the picture."
NOT_EMBEDDED = "The picture belongs to the benchmark and is not embedded: its license need not allow it."


@dataclass(frozen=True)
class Answer:
    """What a run said to the question alone (empty where that was not asked) and in the shown condition."""

    run: str
    clean: str
    response: str
    outcome: str


@dataclass(frozen=True)
class Example:
    """One group in the shown condition; `picture` is a data: URI, or empty with the reason in `missing`."""

    group: str
    family: str
    question: str
    context: str
    gold: str
    lure: str
    picture: str
    missing: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Examples:
    """The chosen groups, the condition they show, and the runs whose answers they hold."""

    condition: str
    runs: tuple[str, ...]
    groups: tuple[Example, ...]


def examples(runs: Sequence[Run], task: str) -> Examples | None:
    """Up to three groups for each outcome of each of the first four runs, spread over the families; None: no probe."""
    asked = [run for run in runs if task in run.probes][:MAX_RUNS]
    if not asked:
        return None
    outcomes = {run.label: run.probes[task].outcomes for run in asked}
    shared = set.intersection(*(set(table.columns) for table in outcomes.values()))
    condition = next((name for name in (*_SHOWN, *sorted(shared)) if name in shared), None)
    if condition is None:
        return None
    rows = {run.label: _rows(run.loaded.samples[task]) for run in asked}
    chosen = sorted({group for label in outcomes for group in _chosen(outcomes[label], rows[label], condition)})
    groups = tuple(_example(group, rows, condition) for group in chosen)
    return Examples(condition, tuple(rows), groups)


def _chosen(outcomes: pd.DataFrame, rows: pd.DataFrame, condition: str) -> Iterator[str]:
    """Groups of every outcome, one family after the other."""
    for outcome in OUTCOMES:
        groups = outcomes.index[outcomes[condition] == outcome]
        families = pd.Series([_text(rows.loc[(group, condition)], "family") for group in groups], groups, dtype=object)
        turn = families.groupby(families).cumcount()
        yield from map(str, turn.sort_values(kind="stable").index[:PER_OUTCOME])


def _rows(samples: pd.DataFrame) -> pd.DataFrame:
    keyed = samples.assign(group_id=samples["group_id"].astype(str), condition=samples["condition"].astype(str))
    return keyed.set_index(["group_id", "condition"]).sort_index()


def _example(group: str, rows: dict[str, pd.DataFrame], condition: str) -> Example:
    answers = tuple(
        Answer(
            run,
            _text(table.loc[(group, CLEAN)], "response") if (group, CLEAN) in table.index else "",
            _text(table.loc[(group, condition)], "response"),
            _text(table.loc[(group, condition)], "outcome"),
        )
        for run, table in rows.items()
        if (group, condition) in table.index
    )
    row = next(table.loc[(group, condition)] for table in rows.values() if (group, condition) in table.index)
    family, question, context, gold, lure = (
        _text(row, field) for field in ("family", "question", "context", "gold", "lure")
    )
    return Example(group, family, question, context, gold, lure, *_picture(row), answers)


def _picture(row: pd.Series) -> tuple[str, str]:
    """The picture, or why there is none. Benchmarks name a row where the generator has a checksum."""
    kind, spec = row.get("image"), row.get("spec")
    if not isinstance(kind, str) or not isinstance(spec, str):
        return "", NOT_EMBEDDED if "#" in str(row.get("image_sha", "")) else NO_RECIPE
    try:
        picture = data_uri(kind, spec)
    except InputError as error:
        return "", str(error)
    return picture, "" if picture else "No picture is shown in this condition."


def _text(row: pd.Series, field: str) -> str:
    text = str(row.get(field, ""))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
