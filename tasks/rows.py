"""What the metrics need of a scored reply, and what a metric is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pandas as pd


class Metric(NamedTuple):
    """A value with its 95 % interval and the number of groups (documents, for `parse_fail`) in its denominator.

    None: undefined for these rows (no group counts, or fewer than `MIN_DISCRIMINATIVE`), or a fact without interval.
    `mde`: of a difference, the smallest one that these groups would find with 80 % power; else None.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    mde: float | None = None


@dataclass(frozen=True, order=True)
class Row:
    """What the metrics need of one scored reply."""

    group_id: str
    family: str
    condition: str
    outcome: str
    answer: str | None
    n_answers: int
    # Of a benchmark's row:
    stock_correct: float | None = None  # what the stock task's scoring makes of the reply
    cluster: str | None = None  # the pictures that it shows; rows that share them are not independent

    def __str__(self) -> str:
        # The harness writes every metric's item into the samples file, which holds these fields already.
        return ""

    def fields(self) -> dict[str, Any]:
        """The fields as a dictionary; without those of a benchmark where there are none."""
        return {name: value for name, value in vars(self).items() if name not in _OF_BENCHMARKS or value is not None}


_OF_BENCHMARKS = ("stock_correct", "cluster")


def row_of(sample: Mapping[str, Any]) -> Row:
    """The row of a line of a samples file, or of any mapping with the fields of `Row`."""
    values = {field.name: sample[field.name] for field in fields(Row) if field.name not in _OF_BENCHMARKS}
    values |= {name: sample.get(name) for name in _OF_BENCHMARKS}
    # pandas reads a missing answer as NaN.
    answer = values["answer"] if isinstance(values["answer"], str) else None
    return Row(**values | {"answer": answer})


class Replies(NamedTuple):
    """The complete groups of a task as tables [groups x conditions]: their outcomes, the answers (None: not parsed),
    and whether the stock scoring takes the reply for right (None: there is no stock task); and the cluster of each."""

    outcomes: pd.DataFrame
    answers: pd.DataFrame
    stock: pd.DataFrame
    clusters: list[str]
