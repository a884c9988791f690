"""All metrics of a run again, from its samples files: no model, no harness.

A results file beside them tells whether they are whole; none is needed.

Where the run also saved the log-probabilities of its options, what the picture adds to them is computed too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lmms_keyspace import outcomes
from lmms_keyspace.errors import InputError
from lmms_keyspace.store import logged_samples, read_samples
from lmms_keyspace.store.files import read_json
from lmms_keyspace.store.tables import read_table
from lmms_keyspace.tasks.aggregation import value_of
from lmms_keyspace.tasks.metrics import not_valid_for, summarize
from lmms_keyspace.tasks.reported import COMPANIONS, PROBES
from lmms_keyspace.tasks.rows import Metric

_SAMPLES = "_samples_"


@dataclass(frozen=True)
class Rescored:
    """The metrics of one samples file; `information` those of `outcomes.INFORMATION`, empty without the options."""

    path: Path
    task: str
    probe: str
    summary: Mapping[str, Metric]
    information: Mapping[str, outcomes.Measured]

    def results(self) -> dict[str, float | int | str | None]:
        """As results.json has them, by metric key, and what the options say."""
        fields = ("value", "low", "high", "n")
        said = {
            name + suffix: getattr(measured, field)
            for name, measured in self.information.items()
            for suffix, field in zip(("", *COMPANIONS), fields, strict=True)
        }
        return {key: value_of(key, self.summary) for key in PROBES[self.probe].keys} | said

    def lines(self) -> list[str]:
        """For a person: one line a metric, with its 95 % interval, denominator and detectable effect."""
        lines = [f"{self.task}  ({self.path})"]
        kind = PROBES[self.probe]
        for name, metric in {**self.summary, **self.information}.items():
            digits = "g" if name in kind.facts else ".4f"
            value = "N/A" if metric.value is None else format(metric.value, digits)
            interval = "" if metric.low is None else f"  [{metric.low:.4f}, {metric.high:.4f}]"
            n = "" if name in kind.facts else f"  n={metric.n}"
            mde = "" if metric.mde is None else f"  mde={metric.mde:.4f}"
            lines.append(f"  {name:<24}{value:>8}{interval}{n}{mde}")
        if failed := not_valid_for(self.summary):
            lines.append(f"  not valid for this model in {', '.join(failed)}")
        return lines


def rescore(path: Path) -> list[Rescored]:
    """The metrics of every samples file of a probe at `path`: one such file, or a folder at or above them.

    Raises:
        InputError: there is none, or one is damaged.
    """
    files = [path] if path.is_file() else sorted(path.rglob(f"*{_SAMPLES}*.jsonl"))
    found = []
    for file in files:
        date, _, task = file.stem.partition(_SAMPLES)
        results = file.with_name(f"{date}_results.json")
        logged = logged_samples(read_json(results)) if results.is_file() else {}
        rows = read_samples(file, sha256=logged.get(task))
        probe = probe_of(rows.columns)
        if probe is not None:
            summary = summarize(rows.to_dict("records"), probe)
            options = file.with_name(f"{date}_options.parquet")
            information = _information(task, rows, read_table(options, "options")) if options.exists() else {}
            found.append(Rescored(file, task, probe, summary, information))
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


def _information(task: str, samples: pd.DataFrame, options: pd.DataFrame) -> dict[str, outcomes.Measured]:
    asked = samples[["doc_id", "group_id", "gold_option", "lure_option"]]
    joined = options[options["task"] == task].merge(asked, on="doc_id")
    return outcomes.measure_information(outcomes.information_by_group(joined))
