"""How far apart the keys are: curves over layers, layers by heads, and the published pipeline's own numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lmms_keyspace.published import UNKNOWN
from lmms_keyspace.records import (
    ALL_HEADS,
    CONTRASTS,
    TEXT_TEXT,
    VISUAL_TEXT,
    VISUAL_VISUAL,
    WITH_SINKS,
    WITH_TEMPLATE,
)
from lmms_keyspace.reports import figures, wording
from lmms_keyspace.reports.curves import divergence_table
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.rows import MMD2, NATS
from lmms_keyspace.reports.sections.parts import MAX_PANELS, Panel, Part, Table, drawn

_CURVES = {
    "mmd2": (
        "MMD² by layer",
        "MMD²",
        None,
        "0 for equal distributions; has no unit and depends on the kernel bandwidths.",
    ),
    "js_classifier": (
        "Jensen-Shannon divergence by layer",
        "JS (nats)",
        (math.log(2), "ln 2: fully separable"),
        "A lower bound from a held-out classifier; below 0 the classifier did worse than guessing. Near ln 2 it says "
        "only that the modalities can be told apart: layers and runs are not to be ranked there.",
    ),
}
_PUT_BACK = {WITH_TEMPLATE: "Template and special tokens counted as text", WITH_SINKS: "Attention sinks left in"}
_PUBLISHED = {"paper_mmd": ("MMD", MMD2), "paper_js_histogram": ("JS (nats)", NATS)}


def divergence(runs: Sequence[Run], task: str) -> Part | None:
    """MMD^2 and JS between visual and text keys by layer, with the split halves of one modality as a null band."""
    table = divergence_table(runs, task)
    table = table[table["head"] == ALL_HEADS] if len(table) else table
    if table.empty:
        return None
    order, left_out = drawn([run.label for run in runs])
    panels = []
    for estimator, (name, ylabel, ceiling, caption) in _CURVES.items():
        rows = table[table["estimator"] == estimator]
        between = rows[rows["contrast"] == VISUAL_TEXT]
        if between.empty:
            continue
        panels.append(
            Panel(
                f"divergence_{estimator}",
                name,
                figures.by_layer(
                    between,
                    order=order,
                    ylabel=ylabel,
                    title=f"{name}, {task}",
                    baseline=rows[rows["contrast"].isin([VISUAL_VISUAL, TEXT_TEXT])],
                    ceiling=ceiling,
                ),
                f"Keys before RoPE, mean over KV heads, {int(between['n_clusters'].max())} clusters. {caption} "
                f"Gray band: what two halves of one modality show, all runs.{left_out}",
            )
        )
    return Part(
        "How far apart the keys of image and text are",
        "Divergence between the keys of image tokens and of text tokens, layer by layer, in the base model and in the "
        "adapted ones.",
        tuple(panels),
        (_contrasts(table),),
        points=_put_back(table, order),
        frames={"divergence": table},
    )


def _put_back(table: pd.DataFrame, runs: Sequence[str]) -> tuple[str, ...]:
    """What changes when tokens are counted that all other rows leave out, a sentence for each run."""
    means = table[table["estimator"] == "mmd2"].groupby(["contrast", "run"])["value"].mean()
    return tuple(
        f"{what}, {run}: MMD² is {wording.number(means[contrast, run], MMD2)} instead of "
        f"{wording.number(means[VISUAL_TEXT, run], MMD2)}, mean over layers."
        for contrast, what in _PUT_BACK.items()
        for run in runs
        if {(contrast, run), (VISUAL_TEXT, run)} <= set(means.index)
    )


def _contrasts(table: pd.DataFrame) -> Table:
    """Visual against text beside every control of the run, mean over layers."""
    units = {"mmd2": MMD2, "js_classifier": NATS}
    rows = []
    place = {contrast: number for number, contrast in enumerate(CONTRASTS)}
    ordered = table.sort_values("contrast", key=lambda names: names.map(place).fillna(len(place)), kind="stable")
    for (contrast, run), members in ordered.groupby(["contrast", "run"], sort=False):
        cells = []
        for estimator, unit in units.items():
            values = members.loc[members["estimator"] == estimator, "value"].dropna()
            cells += [wording.number(float(value), unit) for value in (values.mean(), values.min(), values.max())]
        if any(cell != wording.NOTHING for cell in cells):
            rows.append((str(contrast), str(run), *cells))
    names = [f"{name}, {what}" for name in ("MMD²", "JS (nats)") for what in ("mean over layers", "lowest", "highest")]
    return Table(("Contrast", "Run", *names), tuple(rows), "Visual against text, and the controls")


def heads(runs: Sequence[Run], task: str) -> Part | None:
    """MMD^2 by layer and KV head, one panel per run."""
    table = divergence_table(runs, task)
    if len(table):
        mmd2 = (table["estimator"] == "mmd2") & (table["contrast"] == VISUAL_TEXT) & (table["head"] != ALL_HEADS)
        table = table[mmd2 & table["value"].notna()]
    if table.empty:
        return None
    table = table.assign(head=table["head"].astype(int))
    order, left_out = drawn(list(dict.fromkeys(table["run"])), MAX_PANELS)
    highest = float(table.loc[table["run"].isin(order), "value"].max())
    panels = [
        Panel(
            f"heads_{number}",
            label,
            figures.heat_map(
                table[table["run"] == label],
                highest=highest,
                printed=wording.number(highest, MMD2),
                xlabel="KV head",
                title=f"MMD² by layer and head, {task}, {label}",
            ),
            _strongest(table[table["run"] == label]),
        )
        for number, label in enumerate(order)
    ]
    return Part(
        "Which heads hold the keys apart",
        f"MMD² of every layer and KV head, all panels on one scale.{left_out} Every head has its own kernel bandwidth, "
        "that of the base model where the run has one.",
        tuple(panels),
        legend=None,
        frames={"heads": table},
    )


def _strongest(rows: pd.DataFrame) -> str:
    row = rows.loc[rows["value"].idxmax()]
    value = wording.estimate(row["value"], row["ci_low"], row["ci_high"], MMD2)
    return f"Highest: {value} in layer {row['layer']}, head {row['head']}."


def published(runs: Sequence[Run], task: str) -> Part | None:
    """What the pipeline of the published diagnosis reads on the same keys."""
    table = divergence_table(runs, task)
    if len(table):
        table = table[table["estimator"].isin(list(_PUBLISHED)) & table["contrast"].isin(CONTRASTS)]
    if table.empty:
        return None
    rows = []
    for (run, contrast), members in table.groupby(["run", "contrast"], sort=False):
        cells = []
        for estimator, (_, unit) in _PUBLISHED.items():
            values = members.loc[members["estimator"] == estimator, "value"]
            cells += [wording.number(float(value), unit) for value in (values.mean(), values.min(), values.max())]
        rows.append((str(run), str(contrast), *cells))
    names = [f"{name}, {what}" for name, _ in _PUBLISHED.values() for what in ("mean over layers", "lowest", "highest")]
    choices = tuple((choice.unknown, choice.chosen) for choice in UNKNOWN)
    return Part(
        "The published pipeline on the same keys",
        "All KV heads side by side, standardized, 50 principal components, then MMD (root of the biased MMD²) and "
        "Jensen-Shannon divergence by histogram. No intervals, and no two runs are comparable: bandwidth and "
        "projection move with what they measure. Read them against the rows of one modality: what a divergence of 0 "
        "would give.",
        tables=(
            Table(("Run", "Contrast", *names), tuple(rows)),
            Table(("Not known of the published pipeline", "Chosen here"), choices),
        ),
        legend=None,
        frames={"published": table},
    )
