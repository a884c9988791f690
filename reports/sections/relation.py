"""Accuracy against divergence, over runs and over layers, with what such a figure cannot show."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lmms_keyspace.records import ALL_HEADS, VISUAL_TEXT
from lmms_keyspace.reports import figures
from lmms_keyspace.reports.curves import divergence_table
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.rows import SHARE
from lmms_keyspace.reports.sections.parts import Panel, Part, drawn

# The accuracy that misleading text would move, or what the task has instead.
_OUTCOMES = ("conflict_acc", "clean_acc")


def relation(runs: Sequence[Run], task: str, comparison: pd.DataFrame) -> Part | None:
    """A mark per run, and a mark per layer of each run; `comparison` is the compared table of this task."""
    measured = {name: rows.set_index("run") for name, rows in comparison.groupby("metric", sort=False)}
    shares = [name for name, rows in measured.items() if (rows["unit"] == SHARE).all() and "mass" not in name]
    outcome = next((name for name in (*_OUTCOMES, *shares) if name in measured), None)
    if "mmd2" not in measured or outcome is None:
        return None
    divergence, accuracy = measured["mmd2"], measured[outcome]
    labels = [run.label for run in runs if run.label in divergence.index and run.label in accuracy.index]
    if not labels:
        return None
    order, left_out = drawn(labels)
    x, y = divergence.loc[labels], accuracy.loc[labels]
    over_runs = pd.DataFrame(
        {
            "run": labels,
            "x": x["value"],
            "x_low": x["low"],
            "x_high": x["high"],
            "y": 100 * y["value"],
            "y_low": 100 * y["low"],
            "y_high": 100 * y["high"],
        }
    )
    table = divergence_table(runs, task)
    chosen = (table["estimator"] == "mmd2") & (table["contrast"] == VISUAL_TEXT) & (table["head"] == ALL_HEADS)
    layers = table.loc[chosen & table["run"].isin(labels), ["run", "layer", "value"]]
    over_layers = layers.rename(columns={"value": "x"}).assign(
        y=layers["run"].map(dict(zip(labels, over_runs["y"], strict=True))).to_numpy(),
        x_low=float("nan"),
        x_high=float("nan"),
        y_low=float("nan"),
        y_high=float("nan"),
    )
    label = f"{accuracy['label'].iloc[0]} (%)"
    panels = (
        Panel(
            "relation_runs",
            "Over runs",
            figures.relation(
                over_runs,
                order=order,
                xlabel="MMD² of keys, mean over layers",
                ylabel=label,
                title=f"Runs, {task}",
                ylim=(0, 100),
            ),
            f"One mark per run, 95 % intervals.{left_out}",
        ),
        Panel(
            "relation_layers",
            "Over layers",
            figures.relation(
                over_layers,
                order=order,
                xlabel="MMD² of keys",
                ylabel=label,
                title=f"Layers, {task}",
                ylim=(0, 100),
            ),
            "One mark per layer and run. A run has one accuracy, so its layers stand in one row.",
        ),
    )
    return Part(
        "Accuracy against divergence",
        "Do the runs whose keys lie closer together also answer better?",
        panels,
        warning=f"A run is one point (here: {len(labels)}), and runs share documents, base model and often training "
        "data. Whatever line could be drawn through the points shows what moved together in these runs; it cannot show "
        "that one caused the other, nor that the next run will lie on it. Layers of one run are no further evidence. "
        "So no coefficient is printed: the paired changes above and the link document by document are the evidence.",
        frames={"accuracy_against_divergence": pd.concat([over_runs.assign(layer=-1), over_layers], ignore_index=True)},
    )
