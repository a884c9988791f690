"""Frames to inline SVG. The only module that knows seaborn and matplotlib; both are loaded on use.

Colors are written as CSS variables, so one figure serves the light and the dark page. Every panel is a figure of its
own, narrow enough for a phone, and the page lays panels out side by side where there is room.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib wants colors, the page wants variables: each placeholder is replaced in the SVG.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"}
N_COLORS = 8
_SERIES = [f"#0a0a{index:02x}" for index in range(1, N_COLORS + 1)]
_VARIABLES |= {color: f"--series-{index}" for index, color in enumerate(_SERIES)}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "o")  # as drawn; the page's legend shows the same shapes
_WIDTH = 4.3  # inches at 72 points: about the width of a phone


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
) -> Markup:
    """Horizontal dots with intervals, one line per category and one mark per series.

    Args:
        frame: columns `category`, `series`, value, ci_low, ci_high, as shares.
        order: the series in the order of their colors.
        limit: the axis reaches from 0 at least to here.
        first: color and mark of the first series.
    """
    categories = list(dict.fromkeys(frame[category]))
    axes = _axes(0.9 + len(categories) * (0.22 + 0.13 * len(order)))
    step = 0.7 / max(len(order), 1)
    for index, name in enumerate(order):
        rows = frame[frame[series] == name]
        at = np.array([categories.index(value) for value in rows[category]]) + step * (index - (len(order) - 1) / 2)
        _marks(axes, rows["value"] * 100, at, rows, index + first, horizontal=True)
    axes.set_yticks(range(len(categories)), categories)
    axes.set_ylim(len(categories) - 0.5, -0.5)
    axes.set_xlim(min(0.0, axes.get_xlim()[0]), max(axes.get_xlim()[1], limit))
    axes.set_xlabel(xlabel)
    axes.grid(axis="x")
    for edge in range(1, len(categories)):
        axes.axhline(edge - 0.5, color=_GRID, linewidth=0.8)
    return _svg(axes, title)


def by_layer(
    frame: pd.DataFrame,
    *,
    order: Sequence[str],
    ylabel: str,
    title: str,
    scale: float = 1.0,
    baseline: pd.DataFrame | None = None,
    ceiling: tuple[float, str] | None = None,
) -> Markup:
    """Curves over layers with intervals, one per run.

    Args:
        frame: columns run, layer, value, ci_low, ci_high.
        baseline: the same columns; drawn as one gray band from its lowest to its highest limit at each layer.
        ceiling: a value that cannot be passed, and its name; the axis then reaches from just below 0 to just above it.
    """
    from matplotlib.ticker import MaxNLocator

    axes = _axes(3.1)
    if baseline is not None and len(baseline):
        band = baseline.groupby("layer").agg(low=("ci_low", "min"), high=("ci_high", "max"))
        axes.fill_between(band.index, band["low"], band["high"], color=_MUTED, alpha=0.25, linewidth=0)
    if ceiling is not None:
        axes.axhline(ceiling[0], color=_MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            ceiling[1], (1, ceiling[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=_MUTED
        )
    shift = 0.04 if len(order) > 1 else 0.0
    for index, name in enumerate(order):
        rows = frame[frame["run"] == name].sort_values("layer")
        at = rows["layer"].to_numpy(dtype=float) + shift * (index - (len(order) - 1) / 2)
        axes.plot(at, rows["value"] * scale, color=_series(index), linewidth=1.4)
        _marks(axes, rows["value"] * scale, at, rows, index, horizontal=False, scale=scale)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ceiling is None:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    else:
        axes.set_ylim(-0.12 * ceiling[0], 1.12 * ceiling[0])
    axes.set(xlabel="Layer", ylabel=ylabel)
    axes.grid(axis="y")
    return _svg(axes, title)


def scatter(points: pd.DataFrame, *, order: Sequence[str], title: str, first: int = 0) -> Markup:
    """Points in the plane, columns x, y, modality; the axes carry no meaning. `first`: as for `intervals`."""
    import seaborn as sns

    axes = _axes(3.1)
    sns.scatterplot(
        points,
        x="x",
        y="y",
        hue="modality",
        style="modality",
        hue_order=order,
        style_order=order,
        markers=dict(zip(order, MARKERS[first:], strict=False)),
        palette=[_series(first + index) for index in range(len(order))],
        s=18,
        alpha=0.75,
        linewidth=0,
        legend=False,
        ax=axes,
    )
    axes.set(xlabel="", ylabel="", xticks=[], yticks=[])
    return _svg(axes, title)


def _marks(
    axes: Axes, values: pd.Series, at: Any, rows: pd.DataFrame, index: int, *, horizontal: bool, scale: float = 100.0
) -> None:
    """Markers with intervals. Limits are clipped at the value: rounding may leave them a hair inside."""
    low = np.clip(values - rows["ci_low"] * scale, 0, None)
    high = np.clip(rows["ci_high"] * scale - values, 0, None)
    style: dict[str, Any] = {
        "color": _series(index),
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "linestyle": "none",
        "elinewidth": 1.2,
    }
    if horizontal:
        axes.errorbar(values, at, xerr=[low, high], **style)
    else:
        axes.errorbar(at, values, yerr=[low, high], **style)


def _series(index: int) -> str:
    return _SERIES[index % N_COLORS]


def _axes(height: float) -> Axes:
    import seaborn as sns
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = sns.axes_style(
        "ticks",
        {
            "axes.edgecolor": _MUTED,
            "axes.labelcolor": _INK,
            "text.color": _INK,
            "xtick.color": _MUTED,
            "ytick.color": _MUTED,
            "xtick.labelcolor": _INK,
            "ytick.labelcolor": _INK,
            "grid.color": _GRID,
            "grid.linestyle": "-",
            "axes.facecolor": "none",
            "figure.facecolor": "none",
        },
    )
    with rc_context({**style, "font.size": 10, "text.parse_math": False, "font.family": ["DejaVu Sans"]}):
        axes: Axes = Figure((_WIDTH, height), layout="constrained").subplots()
        sns.despine(ax=axes)
        axes.tick_params(labelcolor=_INK)
    return axes


def _svg(axes: Axes, title: str) -> Markup:
    """The figure as an SVG element that scales with the page and is named for screen readers."""
    from matplotlib import rc_context

    figure = axes.get_figure(root=True)
    assert figure is not None
    buffer = io.StringIO()
    # The salt makes the ids of a figure its own and the same in every run; text stays text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(title)}">'
    text = opening + text[text.index(">") + 1 :]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return Markup(text)
