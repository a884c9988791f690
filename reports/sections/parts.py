"""What a report is made of, before it has a form: parts with figures, tables and the frames behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from lmms_keyspace.reports.figures import Drawing

MAX_RUNS = 8  # in one figure: as many as there are colors; tables hold all
MAX_PANELS = 4  # where every run has a panel of its own


@dataclass(frozen=True)
class Panel:
    """One figure; `name` is that of its files."""

    name: str
    title: str
    drawing: Drawing
    caption: str


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column naming the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Part:
    """What answers one question about a task.

    `legend` names the marks of the figures where these are not runs, and is None where no mark needs a name; `warning`
    says what the part cannot show; `frames` are the data behind the figures, by file name.
    """

    title: str
    text: str
    panels: tuple[Panel, ...] = ()
    tables: tuple[Table, ...] = ()
    legend: tuple[str, ...] | None = ()
    points: tuple[str, ...] = ()
    warning: str = ""
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def percent(frame: pd.DataFrame) -> pd.DataFrame:
    """Shares as percentages, for an axis: value, ci_low, ci_high."""
    columns = ["value", "ci_low", "ci_high"]
    return frame.assign(**{name: 100 * frame[name] for name in columns})


def table_of(frame: pd.DataFrame, caption: str = "") -> Table:
    """A frame of text as a table."""
    rows = tuple(tuple(map(str, row)) for row in frame.itertuples(index=False))
    return Table(tuple(map(str, frame.columns)), rows, caption)


def drawn(names: Sequence[str], most: int = MAX_RUNS) -> tuple[list[str], str]:
    """The runs that a figure shows, and what its caption says of the others."""
    left_out = len(names) - most
    return list(names[:most]), f" The first {most} of {len(names)} runs are drawn." if left_out > 0 else ""
