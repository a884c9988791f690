"""What `lmms-keyspace analyze` prints."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lmms_keyspace.analysis.analyze import Analysis, analyze
from lmms_keyspace.records import ALL_HEADS, MAIN_ESTIMATORS, VISUAL_TEXT


def show_analysis(run: Any, **settings: Any) -> None:
    """`analyze` with a progress bar on standard error; the result and its files on standard output."""
    bar = Progress(
        TextColumn("analyze"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with bar:
        task = bar.add_task("analyze", total=None)
        result = analyze(run, **settings, progress=lambda done, of: bar.update(task, completed=done, total=of))
    console = Console()
    console.width = max(console.width, 120)  # not cut where the output is no terminal
    console.print(_changes(result.changes) if result.changes is not None else _values(result))
    for path in result.files:
        console.print(Text(str(path)), soft_wrap=True)


def _values(result: Analysis) -> Table:
    table = result.divergence
    chosen = (table["contrast"] == VISUAL_TEXT) & table["estimator"].isin(MAIN_ESTIMATORS)
    return _table("visual against text, mean over KV heads", table[chosen], "value")


def _changes(table: pd.DataFrame) -> Table:
    return _table("change from the reference run, mean over KV heads", table, "delta")


def _table(title: str, rows: pd.DataFrame, number: str) -> Table:
    """One line per layer and estimator, without the rows that could not be computed, which the files hold."""
    places = ("task", "condition", "space", "estimator", "layer")
    shown = Table(title=title, box=None, pad_edge=False)
    for name in (*places, number, "95 % interval", "p adjusted"):
        shown.add_column(name, justify="left" if name in places else "right", no_wrap=True)
    rows = rows[(rows["head"] == ALL_HEADS) & rows[number].notna()]
    for row in rows.to_dict("records"):
        interval = "" if pd.isna(row["ci_low"]) else f"{row['ci_low']:.4f} to {row['ci_high']:.4f}"
        p = "" if pd.isna(row["p_adjusted"]) else f"{row['p_adjusted']:.3f}"
        # Names come from files: they are text, not markup.
        cells = (*(str(row[name]) for name in places), f"{row[number]:.4f}", interval, p)
        shown.add_row(*map(Text, cells))
    return shown
