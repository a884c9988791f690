"""The table that lmms-eval prints, for our tasks: the headline metrics, each with its interval in its own cell.

The files of a run hold every key; a person at a terminal wants a dozen lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = "shown"  # of an entry of a task's metric_list


def shortened(results: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of lmms-eval's results whose tables hold, of tasks that say what is shown, only that.

    A metric with the keys `<metric>_ci_lo` and `<metric>_ci_hi` is shown as `value [low, high]`, with its
    minimum detectable effect `<metric>_mde` as `(mde ...)`. Tasks that do not say what is shown stay as they are.
    """
    tables = {
        task: _shown(table, names) if (names := _names(results.get("configs", {}).get(task) or {})) else table
        for task, table in results.get("results", {}).items()
    }
    return {**results, "results": tables}


def _names(config: Mapping[str, Any]) -> set[str]:
    return {str(entry["metric"]) for entry in config.get("metric_list") or [] if entry.get(SHOWN)}


def _shown(table: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    kept = {}
    for key, value in table.items():
        name, _, rest = key.partition(",")
        if name in names:
            kept[key] = _with_interval(
                value, *(table.get(f"{name}{end},{rest}") for end in ("_ci_lo", "_ci_hi", "_mde"))
            )
        elif name.partition("_stderr")[0] in names or not rest:  # `alias` and the like have no filter
            kept[key] = value
    return kept


def _with_interval(value: Any, low: Any, high: Any, mde: Any) -> Any:
    if not all(isinstance(number, (int, float)) for number in (value, low, high)):
        return value
    found = f" (mde {mde:.3f})" if isinstance(mde, (int, float)) else ""
    return f"{value:.4f} [{low:.4f}, {high:.4f}]{found}"
