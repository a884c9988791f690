"""Frames behind the figures: divergence and attention by layer, attention by outcome, accuracy by family."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.outcomes import CONFLICT, GOLD, LURE, METRICS, Metric, measure
from lmms_keyspace.records import ALL_HEADS
from lmms_keyspace.reports.keyspace import KEY_SPACE, image_mass, main_condition
from lmms_keyspace.reports.load import Run

# Where a fooled model could have looked. The other segments hold template and special tokens.
SEGMENTS_SHOWN = ("image", "hint", "question")


def divergence_table(runs: Sequence[Run], task: str) -> pd.DataFrame:
    """Columns run, estimator, contrast, layer, head, value, ci_low, ci_high, at_ceiling, n_clusters of the keys."""
    frames = []
    for run in runs:
        if run.loaded.data is None:
            continue
        table = run.loaded.data.divergence
        chosen = (
            (table["task"] == task)
            & (table["condition"] == main_condition(run.loaded.data, task))
            & (table["space"] == KEY_SPACE)
            & table["value"].notna()
        )
        columns = ["estimator", "contrast", "layer", "head", "value", "ci_low", "ci_high", "at_ceiling", "n_clusters"]
        frames.append(table.loc[chosen, columns].assign(run=run.label))
    return _concatenated(frames, ["estimator", "contrast", "run", "layer"])


def attention_by_layer(runs: Sequence[Run], task: str) -> pd.DataFrame:
    """Columns run, layer, value, ci_low, ci_high: attention mass on the image, clustered interval."""
    frames = [
        image_mass(run.loaded.data, task)
        .groupby("layer")[["mass_image", "cluster"]]
        .apply(lambda rows: _mean(rows["mass_image"], rows["cluster"]))
        .reset_index()
        .assign(run=run.label)
        for run in runs
        if run.loaded.data is not None and len(image_mass(run.loaded.data, task))
    ]
    return _concatenated(frames, ["run", "layer"])


def attention_when_misled(runs: Sequence[Run], task: str) -> pd.DataFrame:
    """Attention in the conflict condition by what was answered; mean over layers.

    Columns run, outcome (gold or lure), segment, documents, value, ci_low, ci_high.
    """
    rows = []
    for run in runs:
        samples = run.loaded.samples.get(task)
        if run.loaded.data is None or samples is None or task not in run.probes:
            continue
        attention = run.loaded.data.attention
        chosen = attention[
            (attention["task"] == task)
            & (attention["condition"] == CONFLICT)
            & (attention["head_group"] == ALL_HEADS)
            & (attention["n_image"] > 0)
        ]
        masses = [f"mass_{segment}" for segment in SEGMENTS_SHOWN]
        documents = chosen.groupby(["doc_id", "cluster"], as_index=False)[masses].mean()
        joined = documents.merge(samples[["doc_id", "outcome"]], on="doc_id", validate="one_to_one")
        for outcome in (GOLD, LURE):
            answered = joined[joined["outcome"] == outcome]
            if answered.empty:
                continue
            for segment in SEGMENTS_SHOWN:
                value = _mean(answered[f"mass_{segment}"], answered["cluster"]).to_dict()
                rows.append(
                    {"run": run.label, "outcome": outcome, "segment": segment, "documents": len(answered), **value}
                )
    return pd.DataFrame(rows)


def metrics_by_run(runs: Sequence[Run], task: str, names: Sequence[str]) -> pd.DataFrame:
    """Probe metrics of every run: columns metric, label, run, value, ci_low, ci_high, n."""
    return pd.DataFrame(
        [
            row
            for name in names
            for run in runs
            if task in run.probes
            for row in _measured(METRICS[name], run, task, run.probes[task].outcomes)
        ]
    )


def metrics_by_family(runs: Sequence[Run], task: str, names: Sequence[str]) -> pd.DataFrame:
    """The same by question family, with a column family more."""
    rows = []
    for run in runs:
        samples = run.loaded.samples.get(task)
        if task not in run.probes or samples is None or "family" not in samples:
            continue
        family_of = samples.assign(group_id=samples["group_id"].astype(str)).groupby("group_id")["family"].first()
        outcomes = run.probes[task].outcomes
        for family, members in outcomes.groupby(family_of.reindex(outcomes.index)):
            rows += [
                {"family": str(family)} | row for name in names for row in _measured(METRICS[name], run, task, members)
            ]
    return pd.DataFrame(rows)


def _measured(metric: Metric, run: Run, task: str, outcomes: pd.DataFrame) -> list[dict[str, object]]:
    found = measure(metric, outcomes, run.probes[task].clusters[outcomes.index])
    if found is None:
        return []
    limits = {"value": found.value, "ci_low": found.low, "ci_high": found.high, "n": found.n}
    return [{"metric": metric.name, "label": metric.label, "run": run.label, **limits}]


def _mean(values: pd.Series, clusters: pd.Series) -> pd.Series:
    """Mean with its clustered interval; no interval for a single cluster."""
    if clusters.nunique() < 2:
        low = high = float("nan")
    else:
        low, high = stats.cluster_bootstrap(values.to_numpy(dtype=float), list(clusters))
    return pd.Series({"value": float(values.mean()), "ci_low": low, "ci_high": high})


def _concatenated(frames: Sequence[pd.DataFrame], order: Sequence[str]) -> pd.DataFrame:
    """Frames in the order of the runs, sorted within; an empty frame where there are none."""
    kept = [frame.sort_values([name for name in order if name != "run"]) for frame in frames if len(frame)]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()
