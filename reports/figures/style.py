"""How every figure looks, and the two forms it takes: an element of the page, and files."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from lmms_keyspace.reports.theme import LIGHT, MARKERS, N_SERIES
from lmms_keyspace.store.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.3  # inches at 72 points: about the width of a phone
INK, MUTED, GRID = (LIGHT[name] for name in ("ink", "muted", "grid"))
FORMATS = ("svg", "png", "pdf")
_DPI = 200
_LONGEST = 24  # characters of a run's name in a figure; the page shows it whole
# A figure is drawn in the light colors; in the page each becomes a variable, so that it follows light and dark.
_VARIABLES = {color: name for name, color in LIGHT.items()}


@dataclass(frozen=True)
class Drawing:
    """One figure with its title, which names it for screen readers."""

    figure: Figure
    title: str

    def inline(self) -> Markup:
        """The figure as an SVG element that scales with the page and takes its colors."""
        text = self._svg
        text = text[text.index("<svg") :]
        text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
        box = re.search(r'viewBox="([^"]*)"', text)
        assert box is not None
        text = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(self.title)}">' + text[text.index(">") + 1 :]
        text = re.sub(r"(?<=: )#[0-9a-f]{6}(?=[;\"])", lambda found: _variable(found[0]), text)
        return Markup(text)

    def save(self, stem: Path) -> list[Path]:
        """Write the figure beside itself as SVG, PNG and PDF, in light colors; equal figures give equal bytes."""
        from matplotlib import rc_context

        png, pdf = io.BytesIO(), io.BytesIO()
        with rc_context({"text.parse_math": False, "pdf.fonttype": 42}):
            self.figure.savefig(png, format="png", dpi=_DPI, facecolor=LIGHT["paper"], metadata={"Software": None})
            self.figure.savefig(pdf, format="pdf", facecolor=LIGHT["paper"], metadata={"CreationDate": None})
        contents = (self._svg.encode(), png.getvalue(), pdf.getvalue())
        return [
            write(stem.with_name(f"{stem.name}.{form}"), content)
            for form, content in zip(FORMATS, contents, strict=True)
        ]

    @cached_property
    def _svg(self) -> str:
        from matplotlib import rc_context

        buffer = io.StringIO()
        # The salt makes the ids of a figure its own and the same in every run; text stays text.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": self.title, "text.parse_math": False}):
            self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return buffer.getvalue()


def _variable(color: str) -> str:
    return f"var(--{_VARIABLES[color]})" if color in _VARIABLES else color


def axes_of(height: float) -> Axes:
    """Axes of a new figure of the width that all have; `height` in inches."""
    import seaborn as sns
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = sns.axes_style(
        "ticks",
        {
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "grid.color": GRID,
            "grid.linestyle": "-",
            "axes.facecolor": "none",
            "figure.facecolor": "none",
        },
    )
    with rc_context({**style, "font.size": 10, "text.parse_math": False, "font.family": ["DejaVu Sans"]}):
        axes: Axes = Figure((WIDTH, height), layout="constrained").subplots()
        sns.despine(ax=axes)
        axes.tick_params(labelcolor=INK)
        axes.set_axisbelow(True)
    return axes


def drawing(axes: Axes, title: str) -> Drawing:
    """The finished figure of these axes."""
    from matplotlib.figure import Figure

    figure = axes.figure  # get_figure(root=True) needs matplotlib 3.10
    assert isinstance(figure, Figure)
    # Laid out once: every form of the figure would do it again.
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return Drawing(figure, title)


def color_of(index: int) -> str:
    """Color of a run by its place, or of another series from `theme.FIRST_OTHER` on."""
    return LIGHT[f"series-{index % N_SERIES}"]


def marker_of(index: int) -> str:
    """The shape that goes with `color_of`."""
    return MARKERS[index % len(MARKERS)]


def short(names: Sequence[str]) -> list[str]:
    """Names cut for an axis."""
    return [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in names]


def marks(axes: Axes, values: pd.Series, at: Any, rows: pd.DataFrame, index: int, *, horizontal: bool) -> None:
    """Marks of one series at the places `at`, with the intervals ci_low to ci_high of `rows`.

    Limits are clipped at the value: rounding may leave them a hair inside.
    """
    low, high = (np.clip(values - rows["ci_low"], 0, None), np.clip(rows["ci_high"] - values, 0, None))
    style: dict[str, Any] = {
        "color": color_of(index),
        "marker": marker_of(index),
        "markersize": 5,
        "linestyle": "none",
        "elinewidth": 1.2,
    }
    if horizontal:
        axes.errorbar(values, at, xerr=[low, high], **style)
    else:
        axes.errorbar(at, values, yerr=[low, high], **style)
