"""The aggregations that the task YAML files name: `!function lmms_keyspace.tasks.aggregation.<metric key>`.

The harness asks for each metric key by itself and hands over the same items every time, so one summary serves all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lmms_keyspace.tasks import metrics
from lmms_keyspace.tasks.metrics import Metric, Row

logger = logging.getLogger(__name__)

_FIELD = dict(zip(metrics.COMPANIONS, ("low", "high", "n"), strict=True))


@dataclass(frozen=True)
class Aggregation:
    """Callable that computes one metric key; its text is the same in every process, as the harness writes it down."""

    key: str

    def __call__(self, items: Iterable[Row | Mapping[str, Any]]) -> float | int | str | None:
        """The value of the key over all items of a task; None (shown as N/A) where it is undefined."""
        rows = (item if isinstance(item, Row) else metrics.row_of(item) for item in items)
        summary = _summary(tuple(sorted(rows, key=repr)))
        if self.key == metrics.NOT_VALID_FOR:
            return ", ".join(metrics.not_valid_for(summary)) or "none"
        if self.key in summary:
            return summary[self.key].value
        suffix = next(suffix for suffix in metrics.COMPANIONS if self.key.endswith(suffix))
        value: float | int | None = getattr(summary[self.key.removesuffix(suffix)], _FIELD[suffix])
        return value


def __getattr__(key: str) -> Aggregation:
    if key in metrics.METRIC_KEYS:
        return Aggregation(key)
    raise AttributeError(f"module {__name__!r} has no attribute {key!r}")


@lru_cache(maxsize=4)
def _summary(rows: tuple[Row, ...]) -> dict[str, Metric]:
    summary = metrics.summarize(rows)
    failed = metrics.not_valid_for(summary)
    if failed:
        logger.warning(
            "not valid for this model in %s: it does not see these scenes or does not follow this text "
            "(clean accuracy and text_only_lure must both reach 0.8), so the metrics there are not its text bias",
            ", ".join(failed),
        )
    return summary
