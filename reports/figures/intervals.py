"""Dots with intervals along one axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lmms_keyspace.reports.figures.style import GRID, INK, MUTED, Drawing, axes_of, drawing, marks, short


def intervals(
    frame: pd.DataFrame,
    *,
    category: str,
    series: str,
    order: Sequence[str],
    xlabel: str,
    title: str,
    limit: float = 0,
    first: int = 0,
) -> Drawing:
    """Horizontal dots with intervals, one line per category and one mark per series.

    Args:
        frame: columns `category`, `series`, value, ci_low, ci_high, in the unit of the axis.
        order: the series in the order of their colors.
        limit: the axis reaches from 0 at least to here.
        first: color and mark of the first series.
    """
    categories = list(dict.fromkeys(frame[category]))
    axes = axes_of(0.9 + len(categories) * (0.22 + 0.13 * len(order)))
    step = 0.7 / max(len(order), 1)
    for index, name in enumerate(order):
        rows = frame[frame[series] == name]
        at = np.array([categories.index(value) for value in rows[category]]) + step * (index - (len(order) - 1) / 2)
        marks(axes, rows["value"], at, rows, index + first, horizontal=True)
    axes.set_yticks(range(len(categories)), categories)
    axes.set_ylim(len(categories) - 0.5, -0.5)
    axes.set_xlim(min(0.0, axes.get_xlim()[0]), max(axes.get_xlim()[1], limit))
    axes.set_xlabel(xlabel)
    axes.grid(axis="x")
    for edge in range(1, len(categories)):
        axes.axhline(edge - 0.5, color=GRID, linewidth=0.8)
    return drawing(axes, title)


def by_run(frame: pd.DataFrame, *, printed: Sequence[str], xlabel: str, title: str) -> Drawing:
    """One line per run, with its number beside it; a dashed line marks the first run, the base.

    Args:
        frame: columns run, value, ci_low, ci_high, one row per run; NaN where a run has none.
        printed: what stands beside each mark.
    """
    axes = axes_of(0.75 + 0.34 * len(frame))
    for index in range(len(frame)):
        row = frame.iloc[[index]]
        marks(axes, row["value"], [index], row, index, horizontal=True)
        ends = row[["value", "ci_high"]].max(axis=None)
        if pd.notna(ends):
            axes.annotate(
                printed[index], (ends, index), (7, 0), textcoords="offset points", va="center", color=INK, fontsize=9
            )
    axes.axvline(frame["value"].iloc[0], color=MUTED, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(frame)), short(frame["run"].tolist()))
    axes.set_ylim(len(frame) - 0.5, -0.5)
    right = frame[["value", "ci_high"]].max(axis=None)
    axes.set_xlim(min(0.0, frame[["value", "ci_low"]].min(axis=None)), right * 1.22 if right > 0 else None)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x")
    return drawing(axes, title)
