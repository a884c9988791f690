"""When a probe says something about a model: it must see the scenes, and use what it should read."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from lmms_keyspace.outcomes.catalog import METRICS
from lmms_keyspace.outcomes.conditions import CAPTION_ORACLE, READ, TEXT_ONLY_CONFLICT
from lmms_keyspace.outcomes.measuring import measure

# Below this the probe says nothing about the model: it cannot see the scenes, or does not use what it should read.
# Applied where a condition shows that the scenes are ours: of a benchmark nobody expects as much.
MIN_VALID = 0.8
_GATE = {TEXT_ONLY_CONFLICT: "text_only_lure", READ: "read_acc", CAPTION_ORACLE: "clean_acc"}


def gate_of(conditions: Collection[str]) -> list[str]:
    """The metrics that must reach `MIN_VALID` in a probe with these conditions; none for a benchmark."""
    names = [name for condition, name in _GATE.items() if condition in conditions]
    return list(dict.fromkeys(["clean_acc", *names])) if names else []


def not_valid(outcomes: pd.DataFrame) -> list[str]:
    """Why the probe says nothing about this model; empty when it does."""
    measured = ((METRICS[name], measure(METRICS[name], outcomes)) for name in gate_of(outcomes.columns))
    return [
        f"{metric.label} is {100 * result.value:.1f} %, below {100 * MIN_VALID:.0f} %"
        for metric, result in measured
        if result is not None and result.value < MIN_VALID
    ]
