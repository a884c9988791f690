"""The pictures of the rich families, drawn with Pillow and its own font from the specs of `drawing`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lmms_keyspace import scenes
from lmms_keyspace.tasks.rich.drawing import COLUMNS

_SCALE = 2  # everything is drawn twice as large and reduced, which smooths the edges
_MIDDLE = scenes.CANVAS / 2
_MARGIN = 20  # pixels between the canvas and a chart
_AXIS = 290  # y of a chart's horizontal axis
_HEIGHT = 250  # pixels that 100 % of a chart take
_LABEL = 21  # font size of labels, pixels
_TOWARD = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
# Places of the pips in a grid of -1, 0, 1; two and three lie on a diagonal, six in two columns.
_PIPS = {
    1: [(0, 0)],
    2: [(-1, -1), (1, 1)],
    3: [(-1, -1), (0, 0), (1, 1)],
    4: [(-1, -1), (1, -1), (-1, 1), (1, 1)],
    5: [(-1, -1), (1, -1), (0, 0), (-1, 1), (1, 1)],
    6: [(-1, -1), (-1, 0), (-1, 1), (1, -1), (1, 0), (1, 1)],
}


class _Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, spec: dict[str, Any]) -> None:
        side = spec["canvas"] * _SCALE
        self.image = Image.new("RGB", (side, side), (spec["background"],) * 3)
        self.ink = tuple(spec["ink"])
        self._draw = ImageDraw.Draw(self.image)

    def line(self, *points: tuple[float, float], width: float) -> None:
        self._draw.line(_scaled(points), fill=self.ink, width=round(width * _SCALE), joint="curve")

    def polygon(self, *points: tuple[float, float]) -> None:
        self._draw.polygon(_scaled(points), fill=self.ink)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Any, radius: float = 0) -> None:
        corners = _scaled([(left, top), (right, bottom)])
        self._draw.rounded_rectangle(corners, radius * _SCALE, fill=fill, outline=self.ink, width=2 * _SCALE)

    def disk(self, x: float, y: float, radius: float, fill: Any = None) -> None:
        corners = _scaled([(x - radius, y - radius), (x + radius, y + radius)])
        self._draw.ellipse(corners, fill=fill or self.ink, outline=self.ink, width=3 * _SCALE)

    def slice(self, radius: float, start: float, end: float, fill: Any) -> None:
        corners = _scaled([(_MIDDLE - radius, _MIDDLE - radius), (_MIDDLE + radius, _MIDDLE + radius)])
        self._draw.pieslice(corners, start, end, fill=fill, outline=self.ink, width=2 * _SCALE)

    def text(self, x: float, y: float, text: str, size: int) -> None:
        """Centered at (x, y) by the height of capital letters."""
        self._draw.text((x * _SCALE, y * _SCALE), text, font=_font(size * _SCALE), fill=self.ink, anchor="mm")


def render(spec: dict[str, Any]) -> Image.Image:
    """The RGB picture of a spec, as large as those of the core families; the same spec gives the same pixels."""
    pen = _Pen(spec)
    _RENDER[spec["rich"]](pen, spec)
    return pen.image.reduce(_SCALE)


@lru_cache(maxsize=256)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _scaled(points: Any) -> list[tuple[float, float]]:
    return [(x * _SCALE, y * _SCALE) for x, y in points]


def _glyph(pen: _Pen, spec: dict[str, Any]) -> None:
    pen.text(_MIDDLE + spec["x"], _MIDDLE + spec["y"], spec["text"], spec["size"])


def _columns(labels: list[str]) -> list[float]:
    """x of the middle of each column of a chart."""
    width = (scenes.CANVAS - 2 * _MARGIN) / len(labels)
    return [_MARGIN + (place + 0.5) * width for place in range(len(labels))]


def _axis(pen: _Pen, labels: list[str]) -> None:
    pen.line((_MARGIN / 2, _AXIS), (scenes.CANVAS - _MARGIN / 2, _AXIS), width=2)
    for x, label in zip(_columns(labels), labels, strict=True):
        pen.text(x, _AXIS + 20, label, _LABEL)


def _bar(pen: _Pen, spec: dict[str, Any]) -> None:
    for x, value in zip(_columns(spec["labels"]), spec["values"], strict=True):
        pen.box(x - 24, _AXIS - value / 100 * _HEIGHT, x + 24, _AXIS, scenes.PALETTE[spec["fill"]])
    _axis(pen, spec["labels"])


def _line(pen: _Pen, spec: dict[str, Any]) -> None:
    points = [
        (x, _AXIS - value / 100 * _HEIGHT) for x, value in zip(_columns(spec["labels"]), spec["values"], strict=True)
    ]
    pen.line(*points, width=4)
    for x, y in points:
        pen.disk(x, y, 7)
    _axis(pen, spec["labels"])


def _pie(pen: _Pen, spec: dict[str, Any]) -> None:
    angle = float(spec["start"])
    for color, share in zip(spec["colors"], spec["shares"], strict=True):
        pen.slice(140, angle, angle + 3.6 * share, scenes.PALETTE[color])
        angle += 3.6 * share


def _clock(pen: _Pen, spec: dict[str, Any]) -> None:
    radius = spec["radius"]
    pen.disk(_MIDDLE, _MIDDLE, radius, (255, 255, 255))

    def toward(hour: float, reach: float) -> tuple[float, float]:
        angle = math.radians(30 * hour - 90)
        return _MIDDLE + reach * radius * math.cos(angle), _MIDDLE + reach * radius * math.sin(angle)

    for hour in range(1, 13):
        pen.text(*toward(hour, 0.84), str(hour), round(radius / 6))
    center = (_MIDDLE, _MIDDLE)
    pen.line(center, toward(12, 0.7), width=4)
    pen.line(center, toward(spec["hour"], 0.48), width=11)
    pen.disk(*center, 8)


def _table(pen: _Pen, spec: dict[str, Any]) -> None:
    widths, height = (116, 90, 90), 54
    lefts = [_MARGIN + sum(widths[:place]) for place in range(len(widths))]
    rows = [["", *COLUMNS], *([name, *cells] for name, cells in zip(spec["rows"], spec["cells"], strict=True))]
    top = (scenes.CANVAS - height * len(rows)) / 2
    for down, row in enumerate(rows):
        for left, width, text in zip(lefts, widths, row, strict=True):
            y = top + down * height
            pen.box(left, y, left + width, y + height, (255, 255, 255))
            pen.text(left + width / 2, y + height / 2, text, 26)


def _arrow(pen: _Pen, spec: dict[str, Any]) -> None:
    (u, v), half, thick = _TOWARD[spec["direction"]], spec["length"] / 2, spec["width"] / 2
    neck = half - 2.2 * thick  # where the shaft meets the head
    outline = [(-half, thick), (neck, thick), (neck, 2.4 * thick), (half, 0)]
    outline += [(along, -across) for along, across in reversed(outline[:-1])]
    x, y = _MIDDLE + spec["x"], _MIDDLE + spec["y"]
    pen.polygon(*((x + along * u - across * v, y + along * v + across * u) for along, across in outline))


def _dice(pen: _Pen, spec: dict[str, Any]) -> None:
    x, y, half = _MIDDLE + spec["x"], _MIDDLE + spec["y"], spec["side"] / 2
    pen.box(x - half, y - half, x + half, y + half, (255, 255, 255), radius=half / 4)
    for across, down in _PIPS[spec["pips"]]:
        if spec["turned"]:
            across, down = -down, across
        pen.disk(x + across * half / 2, y + down * half / 2, half / 6)


_RENDER: dict[str, Callable[[_Pen, dict[str, Any]], None]] = {
    "digit": _glyph,
    "letter": _glyph,
    "bar": _bar,
    "line": _line,
    "pie": _pie,
    "clock": _clock,
    "table": _table,
    "arrow": _arrow,
    "dice": _dice,
}
