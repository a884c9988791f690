"""Points in the plane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lmms_keyspace.reports.figures.style import Drawing, axes_of, color_of, drawing, marker_of
from lmms_keyspace.reports.theme import FIRST_OTHER


def plane(points: pd.DataFrame, *, order: Sequence[str], title: str, labels: tuple[str, str] = ("", "")) -> Drawing:
    """Points with the columns x, y, modality; without `labels` the axes carry no meaning."""
    import seaborn as sns

    axes = axes_of(3.1)
    sns.scatterplot(
        points,
        x="x",
        y="y",
        hue="modality",
        style="modality",
        hue_order=order,
        style_order=order,
        markers={name: marker_of(FIRST_OTHER + index) for index, name in enumerate(order)},
        palette=[color_of(FIRST_OTHER + index) for index in range(len(order))],
        s=18,
        alpha=0.75,
        linewidth=0,
        legend=False,
        ax=axes,
    )
    axes.set(xlabel=labels[0], ylabel=labels[1], xticks=[], yticks=[])
    return drawing(axes, title)


def relation(
    frame: pd.DataFrame, *, order: Sequence[str], xlabel: str, ylabel: str, title: str, ylim: tuple[float, float]
) -> Drawing:
    """One thing against another, a mark per row in the color of its run.

    Args:
        frame: columns run, x, x_low, x_high, y, y_low, y_high; limits may be NaN.
        order: the runs in the order of their colors.
        ylim: the least range of the second axis.
    """
    axes = axes_of(3.1)
    for index, name in enumerate(order):
        rows = frame[frame["run"] == name]
        spread = {
            f"{axis}err": np.clip([rows[axis] - rows[f"{axis}_low"], rows[f"{axis}_high"] - rows[axis]], 0, None)
            for axis in "xy"
            if rows[[f"{axis}_low", f"{axis}_high"]].notna().all(axis=None)
        }
        axes.errorbar(
            rows["x"],
            rows["y"],
            **spread,
            color=color_of(index),
            marker=marker_of(index),
            markersize=5.5,
            linestyle="none",
            elinewidth=1.0,
        )
    low, high = axes.get_ylim()
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(min(low, ylim[0]), max(high, ylim[1])))
    axes.grid()
    return drawing(axes, title)
