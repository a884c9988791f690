"""All metrics of a run again, from its samples files alone: no model, no harness, no results file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lmms_keyspace.errors import InputError
from lmms_keyspace.store import read_samples
from lmms_keyspace.tasks.aggregation import value_of
from lmms_keyspace.tasks.metrics import not_valid_for, summarize
from lmms_keyspace.tasks.reported import PROBES
from lmms_keyspace.tasks.rows import Metric


@dataclass(frozen=True)
class Rescored:
    """The metrics of one samples file."""

    path: Path
    task: str
    probe: str
    summary: Mapping[str, Metric]

    def results(self) -> dict[str, float | int | str | None]:
        """As results.json has them, by metric key."""
        return {key: value_of(key, self.summary) for key in PROBES[self.probe].keys}

    def lines(self) -> list[str]:
        """For a person: one line a metric, with its 95 % interval and denominator."""
        lines = [f"{self.task}  ({self.path})"]
        for name, metric in self.summary.items():
            digits = "g" if name in PROBES[self.probe].facts else ".4f"
            value = "N/A" if metric.value is None else format(metric.value, digits)
            interval = "" if metric.low is None else f"  [{metric.low:.4f}, {metric.high:.4f}]"
            n = f"  n={metric.n}" if name in PROBES[self.probe].intervals else ""
            lines.append(f"  {name:<24}{value:>8}{interval}{n}")
        if failed := not_valid_for(self.summary):
            lines.append(f"  not valid for this model in {', '.join(failed)}")
        return lines


def rescore(path: Path) -> list[Rescored]:
    """The metrics of every samples file of a probe at `path`: one such file, or a folder at or above them.

    Raises:
        InputError: there is none, or one is damaged.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*_samples_*.jsonl"))
    found = []
    for file in files:
        rows = read_samples(file)
        probe = probe_of(rows.columns)
        if probe is not None:
            task = file.stem.split("_samples_", 1)[-1]
            found.append(Rescored(file, task, probe, summarize(rows.to_dict("records"), probe)))
    if not found:
        raise InputError(
            "run",
            str(path),
            f"no samples of our tasks among {len(files)} samples files; lmms-eval writes them with --log_samples",
        )
    return found


def probe_of(columns: Collection[str]) -> str | None:
    """The probe whose samples have these columns, one of them per metric key; None: of another task."""
    known = {key for probe in PROBES.values() for key in probe.keys} & set(columns)
    return next((name for name, probe in PROBES.items() if known == set(probe.keys)), None)
