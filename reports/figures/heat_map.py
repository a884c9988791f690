"""A value for every layer and head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lmms_keyspace.reports.figures.style import INK, MUTED, Drawing, axes_of, color_of, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = 5  # patches of the key


def heat_map(frame: pd.DataFrame, *, highest: float, printed: str, xlabel: str, title: str) -> Drawing:
    """Squares of one color, the denser the higher; values below 0 are blank.

    Args:
        frame: columns layer, head (as a number) and value.
        highest: the value of the densest color; give figures that are to be compared the same.
        printed: `highest` as text.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    layers, heads = sorted(frame["layer"].unique()), sorted(frame["head"].unique())
    axes = axes_of(min(6.0, 1.4 + max(1.2, 0.16 * len(layers))))
    color = to_rgba(color_of(1))[:3]
    density = np.clip(frame["value"].to_numpy() / highest, 0, 1) if highest > 0 else np.zeros(len(frame))
    squares = [
        Rectangle((heads.index(head) - 0.5, layers.index(layer) - 0.5), 1, 1)
        for head, layer in zip(frame["head"], frame["layer"], strict=True)
    ]
    axes.add_collection(PatchCollection(squares, facecolor=[(*color, float(one)) for one in density], edgecolor="none"))
    axes.set_xlim(-0.5, len(heads) - 0.5)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    every_head, every_layer = (max(1, len(names) // 12) for names in (heads, layers))
    axes.set_xticks(range(0, len(heads), every_head), [str(head) for head in heads[::every_head]])
    axes.set_yticks(range(0, len(layers), every_layer), [str(layer) for layer in layers[::every_layer]])
    axes.set(xlabel=xlabel, ylabel="Layer")
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(True)
    _key(axes, printed, color)
    return drawing(axes, title)


def _key(axes: Axes, highest: str, color: tuple[float, ...]) -> None:
    """A strip above the map that says which density is which value."""
    from matplotlib.patches import Rectangle

    for step in range(_STEPS + 1):
        patch = Rectangle(
            (0.36 + 0.06 * step, 1.05),
            0.06,
            0.05,
            facecolor=(*color, step / _STEPS),
            edgecolor=MUTED,
            linewidth=0.5,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.add_artist(patch)
    axes.text(0.34, 1.075, "0", transform=axes.transAxes, ha="right", va="center", color=INK, fontsize=9)
    right = 0.36 + 0.06 * (_STEPS + 1) + 0.02
    axes.text(right, 1.075, highest, transform=axes.transAxes, ha="left", va="center", color=INK, fontsize=9)
