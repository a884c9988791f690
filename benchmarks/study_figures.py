"""The figures of docs/study.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from study_contrasts import BASE
from study_units import CORE, DATA

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(table: pd.DataFrame, divergence: str, label: str, folder: Path) -> None:
    """`flip.svg`: flip rate by arm and data, points are seeds. `change.svg`: fall of the divergence against change.

    Args:
        table: a row for every unit of the bundled base, with its figures.
        divergence: the column of `change.svg`.
        label: its name for a reader.
        folder: where the files go.
    """
    base = table[table["arm"] == BASE].iloc[0]
    plt.rcParams["svg.hashsalt"] = "study"  # the same figures give the same file
    figure, axes = plt.subplots(1, len(DATA), sharey=True, figsize=(11, 3.2))
    for axis, data in zip(axes, DATA, strict=True):
        for place, arm in enumerate(CORE):
            values = table[(table["arm"] == arm) & (table["data"] == data)]["text_flip_rate"]
            axis.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
            axis.plot([place - 0.3, place + 0.3], [values.mean()] * 2, color=f"C{place}")
        axis.axhline(base["text_flip_rate"], color="gray", linestyle=":")
        axis.set_xticks(range(len(CORE)), CORE, rotation=60, ha="right")
        axis.set_title(data)
    axes[0].set_ylabel("flip rate (dotted: base)")
    _save(figure, folder / "flip.svg")
    figure, axis = plt.subplots(figsize=(7, 4))
    for place, arm in enumerate(CORE):
        own = table[table["arm"] == arm]
        fall, change = base[divergence] - own[divergence], own["text_flip_rate"] - base["text_flip_rate"]
        axis.plot(fall, change, "o", color=f"C{place}", alpha=0.6, label=arm)
    axis.axhline(0, color="gray", linewidth=0.5)
    axis.set_xlabel(f"fall of {label}")
    axis.set_ylabel("change of the flip rate")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _save(figure, folder / "change.svg")


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
