"""The metric list that a task YAML names: `!function lmms_keyspace.tasks.aggregation.<probe>`.

The harness asks for each metric key by itself and hands over the same items every time, so one summary serves all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lmms_keyspace.outcomes import MIN_VALID
from lmms_keyspace.tasks import metrics
from lmms_keyspace.tasks.reported import COMPANIONS, MDE, NOT_VALID_FOR, PROBES
from lmms_keyspace.tasks.rows import Metric, Row, row_of

logger = logging.getLogger(__name__)

_FIELD = dict(zip((*COMPANIONS, MDE), ("low", "high", "n", "mde"), strict=True))


@dataclass(frozen=True)
class Aggregation:
    """Callable that computes one metric key; its text is the same in every process, as the harness writes it down."""

    probe: str
    key: str

    def __call__(self, items: Iterable[Row | Mapping[str, Any]]) -> float | int | str | None:
        """The value of the key over all items of a task; None (shown as N/A) where it is undefined."""
        rows = (item if isinstance(item, Row) else row_of(item) for item in items)
        return value_of(self.key, _summary(self.probe, tuple(sorted(rows, key=repr))))


def value_of(key: str, summary: Mapping[str, Metric]) -> float | int | str | None:
    """The value of a results key: a metric's, one of its companions', or the families that are not valid."""
    if key == NOT_VALID_FOR:
        return ", ".join(metrics.not_valid_for(summary)) or "none"
    if key in summary:
        return summary[key].value
    suffix = next(suffix for suffix in _FIELD if key.endswith(suffix))
    value: float | int | None = getattr(summary[key.removesuffix(suffix)], _FIELD[suffix])
    return value


def __getattr__(probe: str) -> list[dict[str, Any]]:
    """The entries of `metric_list` for a probe; `shown`: in the table that lmms-eval prints."""
    if probe not in PROBES:
        raise AttributeError(f"module {__name__!r} has no attribute {probe!r}")
    return [
        {
            "metric": key,
            "aggregation": Aggregation(probe, key),
            "higher_is_better": better,
            "shown": key in PROBES[probe].shown,
        }
        for key, better in PROBES[probe].keys.items()
    ]


@lru_cache(maxsize=4)
def _summary(probe: str, rows: tuple[Row, ...]) -> dict[str, Metric]:
    summary = metrics.summarize(rows, probe)
    failed = metrics.not_valid_for(summary)
    if failed:
        logger.warning(
            "not valid for this model in %s: it does not see these scenes or does not read what it should "
            "(%s must reach %g), so the metrics there do not describe it",
            ", ".join(failed),
            " and ".join(PROBES[probe].gate),
            MIN_VALID,
        )
    return summary
