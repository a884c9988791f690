"""Pictures of the keys of one layer: PCA and t-SNE."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lmms_keyspace.records import TEXT, VISUAL
from lmms_keyspace.reports import figures, wording
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.projection import Projection, project, saved_layers
from lmms_keyspace.reports.rows import SHARE
from lmms_keyspace.reports.sections.parts import Panel, Part, drawn


def planes(runs: Sequence[Run], task: str, most: int) -> Part | None:
    """Principal components and t-SNE of the kept keys of the middle layer, for each of the first `most` runs."""
    kept = [run for run in runs if saved_layers(run, task)]
    shared = sorted(set.intersection(*(set(saved_layers(run, task)) for run in kept))) if kept else []
    if not shared:
        return None
    layer = shared[len(shared) // 2]
    order, left_out = drawn([run.label for run in kept], most)
    found = [projection for run in kept if run.label in order and (projection := project(run, task, layer))]
    if not found:
        return None
    panels = [
        panel
        for number, projection in enumerate(found)
        for panel in (_components(projection, task, number), _neighbors(projection, task, number))
    ]
    points = [one.points.assign(run=one.run, layer=one.layer) for one in found]
    return Part(
        f"Keys of layer {layer} in the plane",
        "Standardized, PCA, t-SNE (seed 0), each run by itself.",
        tuple(panels),
        legend=(VISUAL, TEXT),
        warning="Pictures, not evidence: t-SNE keeps neighborhoods, so whether clusters exist can be seen and how far "
        f"apart they are cannot; two components hold only their share of the variance.{left_out}",
        frames={"planes": pd.concat(points, ignore_index=True)},
    )


def _components(one: Projection, task: str, number: int) -> Panel:
    first, second = (wording.number(share, SHARE) for share in one.components)
    drawing = figures.plane(
        one.points.rename(columns={"pc1": "x", "pc2": "y"})[["x", "y", "modality"]],
        order=(VISUAL, TEXT),
        title=f"Principal components of keys, {task}, {one.run}",
        labels=(f"PC 1 ({first} %)", f"PC 2 ({second} %)"),
    )
    return Panel(f"pca_{number}", f"PCA, {one.run}", drawing, f"{_counts(one)}, the first two components.")


def _neighbors(one: Projection, task: str, number: int) -> Panel:
    drawing = figures.plane(
        one.points.rename(columns={"tsne1": "x", "tsne2": "y"})[["x", "y", "modality"]],
        order=(VISUAL, TEXT),
        title=f"t-SNE of keys, {task}, {one.run}",
    )
    explained = wording.number(one.explained, SHARE)
    caption = f"{_counts(one)}; PCA to {one.dimensions} dimensions keeps {explained} % of the variance."
    return Panel(f"tsne_{number}", f"t-SNE, {one.run}", drawing, caption)


def _counts(one: Projection) -> str:
    counts = one.points["modality"].value_counts()
    return f"{counts.get(VISUAL, 0)} image and {counts.get(TEXT, 0)} text tokens"
