"""The comparison as a table in the terminal, or as plain aligned text in a pipe."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmms_keyspace.reports.compare import Comparison
from lmms_keyspace.reports.wording import printed

_LEGEND = (
    "Change: this run minus the base, on the groups both have, in the unit of the row (% rows: points). "
    "Detectable: the change that would be found with 80 % probability. p: paired, adjusted by Holm over the table."
)


def render_comparison(comparison: Comparison, console: Console) -> None:
    """Print one table per task, the warnings and how to read it."""
    table = printed(comparison.table)
    console.print(Text(f"Base: {comparison.runs[0]}"), soft_wrap=True)
    for task, rows in table.groupby("Task", sort=False):
        shown = _without_repetition(rows.drop(columns="Task"))
        if console.is_terminal:
            console.print(_rich(str(task), shown))
        else:
            console.print(Text(f"\n{task}\n{_plain(shown)}"), soft_wrap=True)
    for warning in comparison.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    console.print(Text(_LEGEND, style="dim"), soft_wrap=True)


def _without_repetition(rows: pd.DataFrame) -> pd.DataFrame:
    """A metric is named in its first row only; columns with nothing in them are left out."""
    shown = rows.assign(Metric=rows["Metric"].where(rows["Metric"] != rows["Metric"].shift(), ""))
    return shown if rows["Note"].any() else shown.drop(columns="Note")


def _rich(title: str, rows: pd.DataFrame) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in rows:
        table.add_column(str(column), overflow="fold")
    for row in rows.itertuples(index=False):
        table.add_row(*(Text(cell) for cell in row))
    return table


def _plain(rows: pd.DataFrame) -> str:
    cells = [list(rows.columns), *rows.values.tolist()]
    widths = [max(len(row[column]) for row in cells) for column in range(len(rows.columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
