"""The part of a report about one task: figures with their captions, and the frames they were drawn from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd
from markupsafe import Markup

from lmms_keyspace.outcomes import GOLD, LURE
from lmms_keyspace.records import TEXT, VISUAL, VISUAL_TEXT
from lmms_keyspace.reports import figures, wording
from lmms_keyspace.reports.curves import (
    attention_by_layer,
    attention_when_misled,
    divergence_by_layer,
    metrics_by_family,
    metrics_by_run,
)
from lmms_keyspace.reports.examples import Example, misled
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.projection import project, saved_layers
from lmms_keyspace.reports.rows import SHARE

ACCURACIES = ("clean_acc", "match_acc", "conflict_acc", "irrelevant_acc", "blind_acc", "text_only_lure")
FLIPS = ("text_flip_rate", "spurious_flip", "excess_flip", "tpr_label")
FAMILY_METRICS = ("clean_acc", "conflict_acc", "text_flip_rate")
FIRST_OTHER_MARK = 6  # what is not a run gets the last two colors
MAX_PROJECTIONS = 4  # t-SNE takes seconds a run


@dataclass(frozen=True)
class Panel:
    """One figure."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Group:
    """Figures that answer one question; `legend` names their marks (from `first_mark` on) where these are not runs."""

    title: str
    text: str
    figures: tuple[Panel, ...]
    legend: tuple[str, ...] = ()
    first_mark: int = 0


@dataclass(frozen=True)
class Section:
    """Everything about one task. `frames` are the data behind the figures, by file name."""

    name: str
    anchor: str
    groups: tuple[Group, ...]
    families: pd.DataFrame
    examples: tuple[Example, ...]
    not_interpretable: tuple[str, ...]
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)


def section(runs: Sequence[Run], task: str) -> Section:
    """Draw everything that the runs of one task allow."""
    frames: dict[str, pd.DataFrame] = {}
    groups = [draw(runs, task, frames) for draw in _GROUPS]
    families = metrics_by_family(runs, task, FAMILY_METRICS)
    frames["families"] = families
    unread = [run.label for run in runs if (record := run.task_record(task)) and not record.interpretable]
    return Section(
        name=task,
        anchor="task-" + re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-"),
        groups=tuple(group for group in groups if group is not None),
        families=_printed_families(families, [run.label for run in runs]),
        examples=tuple(misled(runs, task)),
        not_interpretable=tuple(unread),
        frames={name: frame for name, frame in frames.items() if len(frame)},
    )


def _answers(runs: Sequence[Run], task: str, frames: dict[str, pd.DataFrame]) -> Group | None:
    accuracy, flips = (metrics_by_run(runs, task, names) for names in (ACCURACIES, FLIPS))
    if accuracy.empty:
        return None
    frames["answers"] = pd.concat([accuracy, flips], ignore_index=True)
    order = [run.label for run in runs]
    short = (
        accuracy["label"]
        .str.removeprefix("Accuracy, ")
        .str.replace("Follows the text without an image", "text only:\nfollows text")
    )
    panels = [
        Panel(
            "Accuracy by condition",
            figures.intervals(
                accuracy.assign(label=short),
                category="label",
                series="run",
                order=order,
                xlabel="% of groups",
                title=f"Accuracy by condition, {task}",
                limit=100,
            ),
            "95 % intervals. Text only: how often the misleading sentence is followed when there is no image, the "
            "check that the text was understood.",
        )
    ]
    if len(flips):
        panels.append(
            Panel(
                "Flips and text preference",
                figures.intervals(
                    flips.assign(label=flips["label"].map(_FLIP_NAMES)),
                    category="label",
                    series="run",
                    order=order,
                    xlabel="%",
                    title=f"Flips and text preference, {task}",
                ),
                "Flip: right alone, and then the answer that the misleading text names. Control: irrelevant "
                "text, that is any added sentence. Preference: lure / (lure + gold) under conflict. Lower is better.",
            )
        )
    return Group(
        "What it answered",
        "The same question about the same scene: alone (clean), with a true sentence (match), with a false one "
        "(conflict), with one about something else (irrelevant), and with a gray image (blank).",
        tuple(panels),
    )


_FLIP_NAMES = {
    "Text flip rate": "flip by\nfalse text",
    "Flip rate, irrelevant text": "flip by\nirrelevant text",
    "Flips beyond irrelevant text": "flip beyond\nirrelevant text",
    "Text preference ratio": "text\npreference",
}


def _divergence(runs: Sequence[Run], task: str, frames: dict[str, pd.DataFrame]) -> Group | None:
    table = divergence_by_layer(runs, task)
    if table.empty:
        return None
    frames["divergence"] = table
    panels = []
    for estimator, ylabel, ceiling, caption in (
        ("mmd2", "MMD²", None, "0 for equal distributions; has no unit and depends on the kernel bandwidths."),
        (
            "js_classifier",
            "JS (nats)",
            (math.log(2), "ln 2: fully separable"),
            "A lower bound from a held-out classifier; below 0 the classifier did worse than guessing. Near ln 2 it "
            "says only that the modalities can be told apart: layers and runs are not to be ranked there.",
        ),
    ):
        rows = table[table["estimator"] == estimator]
        between = rows[rows["contrast"] == VISUAL_TEXT]
        if between.empty:
            continue
        name = {"mmd2": "MMD² by layer", "js_classifier": "Jensen-Shannon divergence by layer"}[estimator]
        panels.append(
            Panel(
                name,
                figures.by_layer(
                    between,
                    order=[run.label for run in runs],
                    ylabel=ylabel,
                    title=f"{name}, {task}",
                    baseline=rows[rows["contrast"] != VISUAL_TEXT],
                    ceiling=ceiling,
                ),
                f"Keys before RoPE, mean over KV heads, {int(between['n_clusters'].max())} clusters. {caption} "
                "Gray band: split halves of one modality, all runs.",
            )
        )
    return Group(
        "How far apart the keys of image and text are",
        "Divergence between the keys of image tokens and of text tokens, layer by layer.",
        tuple(panels),
    )


def _attention(runs: Sequence[Run], task: str, frames: dict[str, pd.DataFrame]) -> Group | None:
    layers = attention_by_layer(runs, task)
    if layers.empty:
        return None
    frames["attention"] = layers
    title = f"Attention to the image by layer, {task}"
    panel = Panel(
        "Attention to the image by layer",
        figures.by_layer(layers, order=[run.label for run in runs], ylabel="% of attention", title=title, scale=100),
        "Share of the attention of the last prompt token that goes to image tokens, mean over query heads. "
        "Attention is not reliance: more of it need not change an answer.",
    )
    return Group("Where it looks", "In the undisturbed condition, with its image.", (panel,))


def _misled(runs: Sequence[Run], task: str, frames: dict[str, pd.DataFrame]) -> Group | None:
    table = attention_when_misled(runs, task)
    if table.empty:
        return None
    frames["attention_when_misled"] = table
    names = {GOLD: "answered what the image shows", LURE: "answered what the text says"}
    order = tuple(names.values())
    panels = []
    for run in runs:
        rows = table[table["run"] == run.label]
        if rows.empty:
            continue
        documents = rows.drop_duplicates("outcome").set_index("outcome")["documents"]
        panels.append(
            Panel(
                run.label,
                figures.intervals(
                    rows.assign(outcome=rows["outcome"].map(names)),
                    category="segment",
                    series="outcome",
                    order=order,
                    xlabel="% of attention",
                    title=f"Attention when misled, {task}, {run.label}",
                    limit=100 * table["ci_high"].max(),
                    first=FIRST_OTHER_MARK,
                ),
                f"{documents.get(GOLD, 0)} answers by the image, {documents.get(LURE, 0)} by the text.",
            )
        )
    return Group(
        "Where it looked when fooled",
        "Attention of the last prompt token to the image, the misleading sentence (hint) and the question under "
        "conflict, mean over layers, by what was answered. The groups differ in their scenes too: this is a "
        "description, not a cause.",
        tuple(panels),
        order,
        FIRST_OTHER_MARK,
    )


def _projections(runs: Sequence[Run], task: str, frames: dict[str, pd.DataFrame]) -> Group | None:
    kept = [run for run in runs if saved_layers(run, task)]
    shared = sorted(set.intersection(*(set(saved_layers(run, task)) for run in kept))) if kept else []
    if not shared:
        return None
    layer = shared[len(shared) // 2]
    panels, points = [], []
    for run in kept[:MAX_PROJECTIONS]:
        found = project(run, task, layer)
        if found is None:
            continue
        points.append(found.points.assign(run=run.label, layer=layer))
        counts = found.points["modality"].value_counts()
        panels.append(
            Panel(
                run.label,
                figures.scatter(
                    found.points,
                    order=(VISUAL, TEXT),
                    title=f"t-SNE of keys, {task}, {run.label}",
                    first=FIRST_OTHER_MARK,
                ),
                f"{counts.get(VISUAL, 0)} image and {counts.get(TEXT, 0)} text tokens; PCA to {found.dimensions} "
                f"dimensions keeps {100 * found.explained:.1f} % of the variance.",
            )
        )
    if not panels:
        return None
    frames["tsne"] = pd.concat(points, ignore_index=True)
    left_out = f" The first {MAX_PROJECTIONS} runs are drawn." if len(kept) > MAX_PROJECTIONS else ""
    return Group(
        f"Keys of layer {layer} in the plane",
        "Standardized, PCA, t-SNE (seed 0), each run by itself. t-SNE keeps neighborhoods: whether clusters exist can "
        f"be seen, how far apart they are cannot.{left_out}",
        tuple(panels),
        (VISUAL, TEXT),
        FIRST_OTHER_MARK,
    )


_GROUPS: tuple[Callable[[Sequence[Run], str, dict[str, pd.DataFrame]], Group | None], ...] = (
    _answers,
    _divergence,
    _attention,
    _misled,
    _projections,
)


def _printed_families(table: pd.DataFrame, runs: Sequence[str]) -> pd.DataFrame:
    """One line per family and metric, one column per run, as text."""
    if table.empty:
        return pd.DataFrame()
    cells = [wording.estimate(row.value, row.ci_low, row.ci_high, SHARE) for row in table.itertuples()]
    wide = table.assign(cell=cells).pivot_table(
        index=["family", "label"], columns="run", values="cell", aggfunc="first", sort=False
    )
    shown = wide.reindex(columns=list(runs)).fillna(wording.NOTHING).reset_index()
    return shown.assign(label=shown["label"] + " (%)").rename(columns={"family": "Family", "label": "Metric"})
