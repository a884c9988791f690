"""What the answers say: rows of the comparison from samples and results alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.outcomes import METRICS, Groups, Metric, measure
from lmms_keyspace.records import NOT_INTERPRETABLE
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.rows import N_RESAMPLES, SCORE, SHARE, Row, change, extended, interval, noted, paired_series

# The metrics a comparison tests. The others of the probe say the same in other words, and each test costs power.
COMPARED = (
    "clean_acc",
    "match_acc",
    "conflict_acc",
    "irrelevant_acc",
    "blind_acc",
    "text_flip_rate",
    "excess_flip",
    "vis_gain",
    "benefit",
    "order_gap",
    "authority_gap",
    "typo_flip_rate",
    "read_acc",
    "mismatched_drop",
    "follow_shown",
    "toll",
    "mismatch_drop",
    "g_acc",
)


def probe_rows(task: str, runs: Sequence[Run], names: Sequence[str] = COMPARED) -> Iterator[Row]:
    """The named metrics of a probe, as far as the outcomes allow."""
    for metric in (METRICS[name] for name in names):
        base: Groups | None = None
        for run in runs:
            groups = run.probes.get(task)
            if groups is None or (own := measure(metric, groups.outcomes, groups.clusters)) is None:
                continue
            row = Row(
                task, metric.name, metric.label, SHARE, metric.direction, run.label, own.n, own.value, own.low, own.high
            )
            yield row if base is None else extended(row, _paired_outcomes, metric, base, groups)
            base = groups if base is None else base


def _paired_outcomes(metric: Metric, base: Groups, run: Groups) -> dict[str, Any]:
    both = base.outcomes.index.intersection(run.outcomes.index)
    (num_a, den_a), (num_b, den_b) = (metric.counts(side.outcomes.loc[both]) for side in (base, run))
    clusters = base.clusters[both].tolist()
    result = stats.paired_cluster_difference(
        num_a, num_b, clusters, weights_a=den_a, weights_b=den_b, n_resamples=N_RESAMPLES
    )
    found: dict[str, Any] = change(result)
    if result.value == 0 and math.isnan(result.mde):
        # No group differs. How often could one, and still leave none of n? (exact binomial bound)
        bound = 1 - 0.025 ** (1 / result.n)
        found |= {
            "delta_low": -bound,
            "delta_high": bound,
            "mde": stats.mde_paired(bound, result.n),
            "note": "no group differs",
        }
    return found


def stock_rows(task: str, runs: Sequence[Run]) -> Iterator[Row]:
    """The metrics that lmms-eval itself reports, for tasks that are not probes."""
    if any(task in run.probes for run in runs):
        return
    first: dict[str, pd.Series] = {}
    values_of: dict[str, list[float]] = {}
    for run in runs:
        for metric, value in _aggregates(run, task).items():
            values_of.setdefault(metric, []).append(value)
    for run in runs:
        record = run.task_record(task)
        note = "" if record is None or record.interpretable else NOT_INTERPRETABLE
        documents = len(run.loaded.samples.get(task, ()))
        logged = logged_scores(run, task)
        for metric, value in _aggregates(run, task).items():
            unit = SHARE if all(0 <= other <= 1 for other in values_of[metric]) else SCORE
            row = Row(
                task, metric, metric, unit, direction_of(run, task, metric), run.label, documents, value, note=note
            )
            if metric not in logged:
                yield noted(row, "no score by document was logged, so no interval")
                continue
            scores, _ = logged[metric]
            if len(scores) < documents:
                row = noted(row, _without_score(run, task, metric))
            row = extended(row, interval, scores, pd.Series(scores.index))
            if metric in first:
                row = extended(row, paired_series, first[metric], scores)
            yield row
            first.setdefault(metric, scores)


def logged_scores(run: Run, task: str) -> dict[str, tuple[pd.Series, int]]:
    """Scores by document of the metrics that lmms-eval aggregated, each with its direction; without missing ones."""
    samples = run.loaded.samples.get(task, pd.DataFrame())
    return {
        metric: (
            pd.Series(samples[metric].to_numpy(dtype=float), index=samples["doc_id"].astype(str)).dropna(),
            direction_of(run, task, metric),
        )
        for metric in _aggregates(run, task)
        if metric in samples and pd.api.types.is_numeric_dtype(samples[metric])
    }


def direction_of(run: Run, task: str, metric: str) -> int:
    """+1 where lmms-eval says that higher is better or nothing, -1 where lower is."""
    return 1 if run.loaded.results.get("higher_is_better", {}).get(task, {}).get(metric, True) else -1


def _without_score(run: Run, task: str, metric: str) -> str:
    missing = run.loaded.samples[task][metric].isna().to_numpy()
    name = run.loaded.files.samples[task].name
    return f"{missing.sum()} documents have no number, the first in {name}, line {missing.argmax() + 1}"


def _aggregates(run: Run, task: str) -> dict[str, float]:
    """`{"acc,none": 0.5, "acc_stderr,none": ...}` -> `{"acc": 0.5}`."""
    return {
        name.split(",")[0]: float(value)
        for name, value in run.loaded.results["results"][task].items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }
