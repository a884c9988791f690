"""Every metric of every probe from its scored replies, the same for the harness and for a samples file.

The ratios over groups are those of `lmms_keyspace.outcomes`, those of `derived` what they cannot express; this module
adds the accuracy of each family and the validity gate. Neither torch nor the harness is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import pandas as pd

from lmms_keyspace import outcomes
from lmms_keyspace.tasks.derived import DERIVED
from lmms_keyspace.tasks.reported import probe_named
from lmms_keyspace.tasks.rows import Metric, Replies, Row, row_of

logger = logging.getLogger(__name__)


def summarize(rows: Iterable[Row | Mapping[str, Any]], probe: str = "textbias_probe") -> dict[str, Metric]:
    """All metrics of one task.

    Groups that lack a condition are dropped and their number is logged. The order of the rows does not matter. Rows of
    a benchmark that show the same pictures are one draw: their intervals resample pictures.

    Args:
        rows: scored replies; lines of a samples file (`frame.to_dict("records")`) will do.
        probe: name of the probe, one of `PROBES`.

    Returns:
        One `Metric` per name of the probe's `intervals` and `facts`.

    Raises:
        InputError: an unknown probe or outcome, or two rows for one group and condition.
    """
    kind = probe_named(probe)
    frame = pd.DataFrame(
        [vars(row if isinstance(row, Row) else row_of(row)) for row in rows], columns=[f.name for f in fields(Row)]
    )
    found = outcomes.outcomes_by_group(frame)
    groups, dropped, clusters = found.outcomes, found.dropped, found.clusters.tolist()
    if not set(kind.conditions) <= set(groups.columns):  # too short for a single whole group
        groups, dropped, clusters = pd.DataFrame(columns=list(kind.conditions)), frame["group_id"].nunique(), []
    if dropped:
        logger.warning("%d incomplete group(s) left out of the metrics, %d kept", dropped, len(groups))
    first = frame.drop_duplicates("group_id").set_index("group_id").loc[groups.index]
    whole = frame[frame["group_id"].isin(groups.index)]
    parts = {name: part.set_index("group_id") for name, part in whole.groupby("condition")}
    answers, stock = (
        pd.DataFrame(
            {name: part[field] for name, part in parts.items()},
            index=groups.index,
            columns=list(kind.conditions),
            dtype=object,
        )
        for field in ("answer", "stock_correct")
    )
    replies = Replies(groups, answers, stock, clusters)

    summary = {name: _metric(outcomes.measure(metric, groups, clusters)) for name, metric in kind.ratios.items()}
    summary |= {name: DERIVED[name][0](replies) for name in kind.derived}
    # Each document's own number of possible answers: the two questions of a pair differ in it.
    chances = (1 / whole["n_answers"]).groupby(whole["group_id"]).mean()
    summary["chance"] = _fact(float(chances.mean()) if len(first) else None, len(first))
    summary |= {"groups": _fact(len(groups), len(groups)), "groups_dropped": _fact(dropped, dropped)}
    if kind.gate:
        summary["valid"] = _validity(groups)
    for family in kind.families:
        mine = groups[first["family"] == family]
        if kind.by_family:
            summary[f"clean_acc_{family}"] = _metric(outcomes.measure(outcomes.METRICS["clean_acc"], mine))
        if kind.gate:
            summary[f"valid_{family}"] = _validity(mine)
    return summary


def not_valid_for(summary: Mapping[str, Metric]) -> list[str]:
    """The families for which the probe is not valid: what it reports there is not the model's text bias."""
    return [
        name.removeprefix("valid_") for name, fact in summary.items() if name.startswith("valid_") and fact.value == 0
    ]


def _validity(groups: pd.DataFrame) -> Metric:
    """1 when the model sees these scenes and understands these sentences, 0 when not, None without groups."""
    return _fact(float(not outcomes.not_valid(groups)) if len(groups) else None, len(groups))


def _metric(measured: outcomes.Measured | None) -> Metric:
    return Metric(None, None, None, 0) if measured is None else Metric(*measured)


def _fact(value: float | None, n: int) -> Metric:
    return Metric(value, None, None, n)
