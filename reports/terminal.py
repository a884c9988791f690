"""The comparison as a table in the terminal, or as plain aligned text in a pipe."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmms_keyspace.reports.compare import Comparison
from lmms_keyspace.reports.text import one_line
from lmms_keyspace.reports.wording import printed, printed_looks

_LOOKED = "Where it looked under misleading text (% of attention), by what it answered; a description, not a test"
_LEGEND = (
    "Change: this run minus the base, on the groups both have, in the unit of the row (% rows: points). "
    "Detectable: the change that would be found with 80 % probability. p: paired, adjusted by Holm, over the metrics "
    "of the verdict and over the others apart."
)


def render_comparison(comparison: Comparison, console: Console) -> None:
    """Print one table per task with its notes below, the warnings and how to read it."""
    table = printed(comparison.table)
    console.print(Text(f"Base: {comparison.runs[0]}"), soft_wrap=True)
    for task, rows in table.groupby("Task", sort=False):
        shown, notes = _without_repetition(rows.drop(columns="Task"))
        if console.is_terminal:
            console.print(_rich(str(task), shown))
        else:
            console.print(Text(f"\n{task}\n{_plain(shown)}"), soft_wrap=True)
        for mark, note in notes.items():
            console.print(Text(f"  {mark}: {note}", style="dim"), soft_wrap=True)
        if len(looked := _of_task(comparison.looked, task)):
            console.print(Text(f"\n{_LOOKED}\n{_plain(printed_looks(looked))}"), soft_wrap=True)
    for warning in comparison.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    console.print(Text(_LEGEND, style="dim"), soft_wrap=True)


def _of_task(looked: pd.DataFrame, task: object) -> pd.DataFrame:
    return looked[looked["task"].map(one_line) == task] if len(looked) else looked


def _without_repetition(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """A metric becomes a line above its runs, and a note a letter that is explained below the table."""
    marks = {note: chr(ord("a") + index) for index, note in enumerate(dict.fromkeys(filter(None, rows["Note"])))}
    lines = []
    for metric, of_metric in rows.groupby("Metric", sort=False):
        lines.append([str(metric), *[""] * (len(rows.columns) - 2)])
        for row in of_metric.drop(columns="Metric").itertuples(index=False):
            lines.append([f"  {row[0]}", *row[1:-1], marks.get(row[-1], "")])
    columns = ["Metric, run", *rows.columns[2:-1], ""]
    return pd.DataFrame(lines, columns=columns), {mark: note for note, mark in marks.items()}


def _rich(title: str, rows: pd.DataFrame) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in rows:
        table.add_column(str(column), overflow="fold", no_wrap=column.endswith("[95 %]"))
    for row in rows.itertuples(index=False):
        table.add_row(*(Text(cell) for cell in row), style="" if any(row[1:]) else "bold")
    return table


def _plain(rows: pd.DataFrame) -> str:
    cells = [list(rows.columns), *rows.values.tolist()]
    widths = [max(len(row[column]) for row in cells) for column in range(len(rows.columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
