"""Short and distinct names of runs, for tables and figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from lmms_keyspace.reports.text import one_line
from lmms_keyspace.store import LoadedRun

BUNDLED = "bundled"  # RunRecord.pretrained of the model that comes with the package


def labels(loaded: Sequence[LoadedRun]) -> list[str]:
    """The adapter, or the model where there is none; with date, folder or number where that is not enough."""
    found = [_label(run) for run in loaded]
    for detail in (lambda run: run.files.date, lambda run: one_line(run.files.folder.name)):
        repeated = {label for label, count in Counter(found).items() if count > 1}
        found = [
            f"{label} ({detail(run)})" if label in repeated else label for label, run in zip(found, loaded, strict=True)
        ]
    seen: Counter[str] = Counter()
    for index, label in enumerate(found):
        seen[label] += 1
        found[index] = label if seen[label] == 1 else f"{label} #{seen[label]}"
    return found


def model_name(run: LoadedRun) -> str:
    """The model without its adapter: the last part of its folder or hub id, or lmms-eval's name for it."""
    if run.data is not None:
        pretrained = run.data.record.pretrained
        return "bundled base" if pretrained == BUNDLED else last_part(pretrained)
    config = run.results.get("config") or {}
    found = re.search(r"pretrained=([^,]+)", str(config.get("model_args")))
    return last_part(found[1] if found else str(config.get("model", run.files.folder.name)))


def last_part(name: str) -> str:
    """`org/model`, `/data/model/` -> `model`, fit to be shown."""
    return one_line(re.split(r"[/\\:]", name.rstrip("/\\"))[-1] or name)


def _label(run: LoadedRun) -> str:
    record = run.data.record if run.data else None
    name = last_part(record.adapter) if record and record.adapter else model_name(run)
    return f"{name} + {one_line(record.intervention)}" if record and record.intervention else name
