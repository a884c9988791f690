"""A leaderboard as Markdown, CSV and one sortable HTML file."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lmms_keyspace import __version__
from lmms_keyspace.reports.leaderboard import Cell, Column, Leaderboard
from lmms_keyspace.reports.markup import markdown_table, plain
from lmms_keyspace.reports.rows import NATS, SHARE
from lmms_keyspace.reports.sections.parts import table_of
from lmms_keyspace.reports.templating import rendered
from lmms_keyspace.reports.text import one_line
from lmms_keyspace.reports.wording import estimate
from lmms_keyspace.store.files import encoded, require_writable, write

TITLE = "Leaderboard"
NOTES = (
    "Values with 95 % intervals; ↑ higher is better, ↓ lower is better, no arrow: neither by itself, and no rank.",
    "#, the rank: 1 + the number of models whose interval lies wholly on the better side. Models whose intervals "
    "overlap are not told apart and may share a rank. That intervals overlap does not show that two models are equal: "
    "lmms-keyspace compare pairs their answers and sees smaller differences.",
    "Rows are ordered by the first column with a direction. A divergence belongs to a model's own key space and says "
    "nothing across models.",
)
_ARROWS = {1: " ↑", -1: " ↓", 0: ""}
_UNITS = {SHARE: " (%)", NATS: " (nats)"}


def printed_leaderboard(board: Leaderboard) -> pd.DataFrame:
    """The leaderboard as text, one row per model; every output prints these cells."""
    descriptions = {"Model": "model", "Adapter": "adapter", "Intervention": "intervention", "Connector": "connector"}
    shown = {
        name: [getattr(entry, field) for entry in board.entries]
        for name, field in descriptions.items()
        if name != "Intervention" or any(entry.intervention for entry in board.entries)
    }
    several = len({column.task for column in board.columns}) > 1
    for index, column in enumerate(board.columns):
        shown[_heading(column, several)] = [_printed(cells[index], column.unit) for cells in board.cells]
    return pd.DataFrame(shown)


def leaderboard_markdown(board: Leaderboard) -> str:
    """For a README or a model card."""
    table = printed_leaderboard(board)
    lines = [markdown_table(list(table.columns), table.values.tolist()), "", *(f"- {plain(note)}" for note in NOTES)]
    if board.left_out:
        lines += ["", "Not in the table:", "", *(f"- {plain(reason)}" for reason in board.left_out)]
    return "\n".join(lines) + "\n"


def leaderboard_html(board: Leaderboard) -> str:
    """One file, no request; sorting works with the keyboard."""
    return rendered(
        "leaderboard.html.j2",
        title=TITLE,
        table=table_of(printed_leaderboard(board)),
        notes=NOTES,
        left_out=board.left_out,
        version=__version__,
    )


def write_leaderboard(board: Leaderboard, out: Path) -> list[Path]:
    """Write `leaderboard.html`, `leaderboard.md` and `leaderboard.csv` (unrounded, with the printed cells) into `out`.

    Raises InputError for an `out` that cannot be written.
    """
    require_writable("out", out)
    table = board.table
    table["printed"] = [
        _printed(cell, column.unit)
        for cells in board.cells
        for column, cell in zip(board.columns, cells, strict=True)
        if cell is not None
    ]
    texts = {
        "leaderboard.html": leaderboard_html(board),
        "leaderboard.md": leaderboard_markdown(board),
        "leaderboard.csv": table.to_csv(index=False),
    }
    return [write(out / name, encoded(text)) for name, text in texts.items()]


def _heading(column: Column, with_task: bool) -> str:
    task = f", {one_line(column.task)}" if with_task else ""
    return f"{one_line(column.label)}{_UNITS.get(column.unit, '')}{_ARROWS[column.direction]}{task}"


def _printed(cell: Cell | None, unit: str) -> str:
    if cell is None:
        return ""
    value = estimate(cell.value, cell.low, cell.high, unit)
    return value if cell.rank is None else f"{value} #{cell.rank}"
