"""What the pictures of the rich families hold: a JSON spec for every item, drawn from a random stream.

The lure is always something that the picture could be mistaken for: another bar, slice, month or cell that is there, or
another value of the same kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from lmms_keyspace import scenes

RICH_VERSION = "1.0.0"

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FRUITS = ("apple", "banana", "cherry", "grape", "lemon", "melon", "peach", "plum")  # labels, as long as a bar is wide
MONTHS = ("March", "April", "May", "June", "July", "August")
COLUMNS = ("stock", "sold")

POOLS: dict[str, tuple[str, ...]] = {
    "digit": NUMBERS[:9],
    "letter": tuple("KMRSTVXZ"),  # none of them the letter of an option
    "bar": FRUITS,
    "line": MONTHS,
    "pie": scenes.COLORS,
    "clock": NUMBERS,
    "table": NUMBERS[:9],
    "arrow": ("up", "down", "left", "right"),
    "dice": NUMBERS[:6],
}
RICH_FAMILIES = tuple(POOLS)

_SHOWN = 4  # bars, months, slices, rows
_INKS = ((20, 20, 20), (20, 50, 140), (130, 25, 30), (20, 90, 50), (90, 30, 120))


def draw(family: str, gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    """The spec of a picture whose answer is `gold`: ints, strings and lists of them, all that `rendering` needs."""
    common = {
        "canvas": scenes.CANVAS,
        "rich": family,
        "version": RICH_VERSION,
        "background": r.randint(225, 250),  # gray level of the paper
        "ink": r.choice(_INKS),
    }
    return common | _DRAW[family](gold, lure, r)


def _others(pool: Sequence[str], gold: str, lure: str, r: random.Random) -> list[str]:
    """As many words of a pool as a picture shows beside gold and lure."""
    return r.sample([word for word in pool if word not in (gold, lure)], _SHOWN - 2)


def _glyph(text: str, r: random.Random) -> dict[str, Any]:
    size = r.randint(130, 210)  # of the font, pixels
    reach = scenes.CANVAS // 2 - size // 2 - 4
    return {"text": text, "size": size, "x": r.randint(-reach, reach), "y": r.randint(-reach, reach)}


def _digit(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    return _glyph(str(NUMBERS.index(gold) + 1), r)


def _letter(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    return _glyph(gold, r)


def _bar(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    top = r.randint(80, 100)  # per cent of the axis
    values = {gold: top, lure: top - r.randint(18, 30)}
    values |= {word: r.randint(15, top - 25) for word in _others(FRUITS, gold, lure, r)}
    labels = r.sample(list(values), _SHOWN)
    return {"labels": labels, "values": [values[label] for label in labels], "fill": r.choice(scenes.COLORS[:6])}


def _line(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    top = r.randint(80, 100)
    values = {gold: top, lure: top - r.randint(22, 40)}
    values |= {word: r.randint(10, top - 30) for word in _others(MONTHS, gold, lure, r)}
    labels = sorted(values, key=MONTHS.index)
    return {"labels": labels, "values": [values[label] for label in labels]}


def _pie(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    largest = r.randint(42, 52)  # per cent of the pie
    second = r.randint(20, 26)
    rest = 100 - largest - second
    third = r.randint(max(8, rest - second + 1), min(second - 1, rest - 8))  # both others are smaller than the lure
    shares = dict(zip((gold, lure), (largest, second), strict=True))
    shares |= dict(zip(_others(scenes.COLORS, gold, lure, r), (third, rest - third), strict=True))
    colors = r.sample(list(shares), _SHOWN)
    angles = {"shares": [shares[color] for color in colors], "start": r.randrange(360)}
    return {"colors": colors, **angles, "background": r.randint(140, 180)}  # a white slice must not look like paper


def _clock(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    return {"hour": NUMBERS.index(gold) + 1, "radius": r.randint(120, 155)}


def _table(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    """The lure is the other number of the row that is asked for."""
    fillers = [number for number in POOLS["table"] if number not in (gold, lure)]
    row, column = r.randrange(_SHOWN), r.randrange(len(COLUMNS))
    cells = [r.sample(fillers, len(COLUMNS)) for _ in range(_SHOWN)]
    cells[row] = [gold if at == column else lure for at in range(len(COLUMNS))]
    numerals = [[str(NUMBERS.index(cell) + 1) for cell in line] for line in cells]
    return {"rows": r.sample(FRUITS, _SHOWN), "cells": numerals, "row": row, "column": column}


def _arrow(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    length = r.randint(180, 270)
    reach = (scenes.CANVAS - length) // 2 - 4
    place = {"x": r.randint(-reach, reach), "y": r.randint(-reach, reach)}
    return {"direction": gold, "length": length, "width": r.randint(24, 44), **place}


def _dice(gold: str, lure: str, r: random.Random) -> dict[str, Any]:
    side = r.randint(160, 250)
    reach = (scenes.CANVAS - side) // 2 - 6
    return {
        "pips": NUMBERS.index(gold) + 1, "side": side, "x": r.randint(-reach, reach), "y": r.randint(-reach, reach),
        "turned": r.randrange(2),
    }  # fmt: skip


_DRAW: dict[str, Callable[[str, str, random.Random], dict[str, Any]]] = {
    "digit": _digit,
    "letter": _letter,
    "bar": _bar,
    "line": _line,
    "pie": _pie,
    "clock": _clock,
    "table": _table,
    "arrow": _arrow,
    "dice": _dice,
}
