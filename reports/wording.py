"""The only place where a number becomes text: terminal, page, Markdown and CSV print what is written here."""

from __future__ import annotations

import math

import pandas as pd

from lmms_keyspace.outcomes import GOLD, LURE
from lmms_keyspace.reports.rows import MMD2, NATS, SCORE, SHARE
from lmms_keyspace.reports.text import LONGEST_SENTENCE, one_line

_DECIMALS = {SHARE: 1, MMD2: 4, NATS: 3, SCORE: 3}
_SCALE = {SHARE: 100.0, MMD2: 1.0, NATS: 1.0, SCORE: 1.0}
NOTHING = "-"
ANSWERED = {GOLD: "answered what the image shows", LURE: "answered what the text says"}

COLUMNS = ("Task", "Metric", "Run", "Value [95 %]", "Change [95 %]", "p (Holm)", "Detectable", "Note")


def number(value: float, unit: str, *, signed: bool = False) -> str:
    """`0.123` of unit "%" -> `12.3`; NaN -> `-`. A rounded zero carries no sign."""
    if math.isnan(value):
        return NOTHING
    scaled = round(value * _SCALE[unit], _DECIMALS[unit]) + 0.0
    return f"{scaled:{'+' if signed and scaled else ''}.{_DECIMALS[unit]}f}"


def level(value: float, low: float, high: float, unit: str) -> str:
    """For sentences about one run: `12.3 % [10.0, 14.6]`."""
    suffix = {SHARE: " %", MMD2: "", NATS: " nats", SCORE: ""}[unit]
    return f"{number(value, unit)}{suffix} {interval(low, high, unit)}".strip()


def relative(change: float, of: float) -> str:
    """`-62.5 %` of the value before."""
    return f"{number(change / of, SHARE, signed=True)} %"


def with_unit(value: float, unit: str, *, signed: bool = False) -> str:
    """For sentences: `12.3 points` of a share, `0.0123` of MMD^2, `0.123 nats`."""
    suffix = {SHARE: " points", MMD2: "", NATS: " nats", SCORE: ""}[unit]
    return number(value, unit, signed=signed) + suffix


def interval(low: float, high: float, unit: str, *, signed: bool = False) -> str:
    """`[1.2, 3.4]`, or nothing where there is no interval."""
    if math.isnan(low):
        return ""
    return f"[{number(low, unit, signed=signed)}, {number(high, unit, signed=signed)}]"


def estimate(value: float, low: float, high: float, unit: str, *, signed: bool = False) -> str:
    """A value with its interval."""
    return f"{number(value, unit, signed=signed)} {interval(low, high, unit, signed=signed)}".strip()


def p_value(p: float) -> str:
    """Three decimals, as is usual; NaN -> `-`."""
    if math.isnan(p):
        return NOTHING
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 0.9995 else "1"


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """The comparison's table as text, with the columns of `COLUMNS`."""
    rows = [
        (
            one_line(row.task),
            one_line(row.label) + (" (%)" if row.unit == SHARE else " (nats)" if row.unit == NATS else ""),
            row.run,
            estimate(row.value, row.low, row.high, row.unit),
            estimate(row.delta, row.delta_low, row.delta_high, row.unit, signed=True),
            p_value(row.p_adjusted),
            number(row.mde, row.unit),
            one_line(row.note, LONGEST_SENTENCE),
        )
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def printed_looks(looked: pd.DataFrame) -> pd.DataFrame:
    """Where runs looked under misleading text, one row per run and answer, from `curves.attention_when_misled`."""
    segments = list(dict.fromkeys(looked["segment"]))
    cells = {
        (row.run, row.outcome, row.segment): estimate(row.value, row.ci_low, row.ci_high, SHARE)
        for row in looked.itertuples()
    }
    rows = [
        (run, ANSWERED[outcome], str(documents), *(cells.get((run, outcome, segment), NOTHING) for segment in segments))
        for run, outcome, documents in looked[["run", "outcome", "documents"]].drop_duplicates().itertuples(index=False)
    ]
    return pd.DataFrame(rows, columns=["Run", "Answer", "Documents", *(f"To the {segment}" for segment in segments)])
