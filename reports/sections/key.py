"""The key figure of a report: how far apart the keys are, and how often the text wins, run by run."""

from __future__ import annotations

import pandas as pd

from lmms_keyspace.reports import figures, wording
from lmms_keyspace.reports.rows import SHARE
from lmms_keyspace.reports.sections.parts import Panel, drawn

# What stands for reliance on the image: the first that the task measures.
_RELIANCE = ("text_flip_rate", "typo_flip_rate", "follow_shown", "vis_gain", "mismatch_drop", "clean_acc")
_DIRECTIONS = {1: "Higher is better.", -1: "Lower is better.", 0: ""}


def key_panels(comparison: pd.DataFrame, task: str) -> tuple[Panel, ...]:
    """Two small panels from the compared table of the task, or as many of them as it allows."""
    measured = set(comparison["metric"])
    reliance = next((name for name in _RELIANCE if name in measured), None)
    return tuple(
        _panel(comparison[comparison["metric"] == metric], f"key_{name}", task)
        for name, metric in (("divergence", "mmd2"), ("reliance", reliance))
        if metric in measured
    )


def _panel(rows: pd.DataFrame, name: str, task: str) -> Panel:
    order, left_out = drawn(rows["run"].tolist())
    shown = rows[rows["run"].isin(order)].rename(columns={"low": "ci_low", "high": "ci_high"})
    label, unit = str(rows["label"].iloc[0]), str(rows["unit"].iloc[0])
    scale = 100 if unit == SHARE else 1
    drawing = figures.by_run(
        shown.assign(**{column: scale * shown[column] for column in ("value", "ci_low", "ci_high")}),
        printed=[wording.number(value, unit) for value in shown["value"]],
        xlabel=f"{label} (%)" if unit == SHARE else label,
        title=f"{label}, {task}",
    )
    meaning = "Far apart is normal in any model and no fault by itself." if name == "key_divergence" else ""
    direction = _DIRECTIONS[int(rows["direction"].iloc[0])]
    caption = " ".join(filter(None, (meaning, direction, "Dashed: the base. 95 % intervals.", left_out.strip())))
    return Panel(name, label, drawing, caption)
