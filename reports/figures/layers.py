"""Curves over the layers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lmms_keyspace.reports.figures.style import MUTED, Drawing, axes_of, color_of, drawing, marks


def by_layer(
    frame: pd.DataFrame,
    *,
    order: Sequence[str],
    ylabel: str,
    title: str,
    baseline: pd.DataFrame | None = None,
    ceiling: tuple[float, str] | None = None,
    signed: bool = False,
) -> Drawing:
    """Curves over layers with intervals, one per run.

    Args:
        frame: columns run, layer, value, ci_low, ci_high, in the unit of the axis.
        order: the runs in the order of their colors.
        baseline: the same columns; drawn as one gray band from its lowest to its highest limit at each layer.
        ceiling: a value that cannot be passed, and its name; the axis then reaches from just below 0 to just above it.
        signed: draw a line at 0 and let the axis go below it.
    """
    from matplotlib.ticker import MaxNLocator

    axes = axes_of(3.1)
    if baseline is not None and len(baseline):
        band = baseline.groupby("layer").agg(low=("ci_low", "min"), high=("ci_high", "max"))
        axes.fill_between(band.index, band["low"], band["high"], color=MUTED, alpha=0.25, linewidth=0)
    if ceiling is not None:
        axes.axhline(ceiling[0], color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            ceiling[1], (1, ceiling[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=MUTED
        )
    if signed:
        axes.axhline(0, color=MUTED, linewidth=1)
    shift = 0.04 if len(order) > 1 else 0.0
    for index, name in enumerate(order):
        rows = frame[frame["run"] == name].sort_values("layer")
        at = rows["layer"].to_numpy(dtype=float) + shift * (index - (len(order) - 1) / 2)
        axes.plot(at, rows["value"], color=color_of(index), linewidth=1.4)
        marks(axes, rows["value"], at, rows, index, horizontal=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ceiling is not None:
        axes.set_ylim(-0.12 * ceiling[0], 1.12 * ceiling[0])
    elif not signed:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set(xlabel="Layer", ylabel=ylabel)
    axes.grid(axis="y")
    return drawing(axes, title)
