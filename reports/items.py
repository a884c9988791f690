"""What a gate needs of a run, item by item: outcomes by group, scores by document, attention by cluster.

It comes from a run folder, or from a small parquet file that was frozen from one and can be committed beside the code,
so that no run folder has to be kept. The file holds one row per outcome or score; its header holds what decides whether
runs may be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import OUTCOMES, not_valid
from lmms_keyspace.records import NOT_INTERPRETABLE
from lmms_keyspace.reports.accuracy import logged_scores
from lmms_keyspace.reports.comparable import Fingerprint
from lmms_keyspace.reports.keyspace import image_mass_by_cluster
from lmms_keyspace.reports.load import Run, open_runs
from lmms_keyspace.store.files import require_writable, write

BASELINE_VERSION = 1
_HEADER = b"lmms_keyspace_baseline"
_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("metric", pa.string()),  # empty: an outcome
        ("item", pa.string()),  # group, document or cluster
        ("condition", pa.string()),  # of an outcome
        ("outcome", pa.dictionary(pa.int8(), pa.string())),
        ("value", pa.float64()),  # of a metric
    ]
)


@dataclass(frozen=True)
class TaskItems:
    """The items of one task. `refused` says why its numbers mean nothing; empty when they do.

    `outcomes` [groups x conditions] of a probe, else None; `scores` by metric, indexed by item; `directions` of the
    scores: +1 where higher is better, -1 where lower is, 0 when only a policy can say.
    """

    outcomes: pd.DataFrame | None
    scores: dict[str, pd.Series]
    directions: dict[str, int]
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Items:
    """The items of a run with its name and what makes it comparable."""

    label: str
    fingerprint: Fingerprint
    tasks: dict[str, TaskItems]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    label: str
    fingerprint: Fingerprint
    directions: dict[str, dict[str, int]]  # task -> metric -> direction
    refused: dict[str, tuple[str, ...]]  # task -> reasons


def load_items(path: str | Path) -> Items:
    """The items of the one run at `path`, or of a frozen baseline (`*.parquet`).

    Raises InputError for several runs, and for a run or file that cannot be used.
    """
    if Path(path).suffix == ".parquet":
        return read_baseline(Path(path))
    runs = open_runs([path])
    for run in runs:
        if isinstance(run, InputError):
            raise run
    if len(runs) > 1:
        names = ", ".join(run.label for run in runs if isinstance(run, Run))
        raise InputError("run", str(path), f"it holds several runs ({names}): name the folder of one")
    (run,) = runs
    assert isinstance(run, Run)
    return items_of(run)


def items_of(run: Run) -> Items:
    """The items of a loaded run."""
    return Items(label=run.label, fingerprint=run.fingerprint, tasks={task: _task(run, task) for task in run.tasks})


def write_baseline(items: Items, path: Path) -> None:
    """Freeze items into one parquet file; equal items give equal bytes."""
    rows = []
    for task, one in sorted(items.tasks.items()):
        if one.outcomes is not None:
            long = (
                one.outcomes.rename_axis(index="item")
                .reset_index()
                .melt("item", var_name="condition", value_name="outcome")
            )
            rows.append(long.assign(task=task, metric="", value=float("nan")))
        for metric, values in sorted(one.scores.items()):
            scores = pd.DataFrame({"item": values.index.astype(str), "value": values.to_numpy(dtype=float)})
            rows.append(scores.assign(task=task, metric=metric, condition="", outcome=None))
    frame = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=_SCHEMA.names)
    frame = frame.sort_values(["task", "metric", "item", "condition"], ignore_index=True)
    header = _Header(
        schema_version=BASELINE_VERSION,
        label=items.label,
        fingerprint=items.fingerprint,
        directions={task: one.directions for task, one in items.tasks.items()},
        refused={task: one.refused for task, one in items.tasks.items()},
    )
    table = pa.Table.from_pandas(frame[_SCHEMA.names], schema=_SCHEMA, preserve_index=False)
    table = table.replace_schema_metadata({_HEADER: header.model_dump_json().encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    require_writable("out", path.parent)
    write(path, sink.getvalue().to_pybytes())


def read_baseline(path: Path) -> Items:
    """Read what `write_baseline` wrote. Raises InputError, naming the file, for any other or a newer file."""
    if not path.is_file():
        raise InputError("baseline", str(path), "there is no such file: make it with gate --freeze RUN --out FILE")
    try:
        table = pq.read_table(path)
        header = _Header.model_validate_json((table.schema.metadata or {}).get(_HEADER, b""))
    except (pa.ArrowInvalid, OSError, ValidationError) as error:
        raise InputError("baseline", path.name, "not a baseline that gate --freeze wrote, or a newer one") from error
    if header.schema_version > BASELINE_VERSION:
        raise InputError("baseline", path.name, f"it has version {header.schema_version}: upgrade lmms_keyspace")
    if not table.schema.equals(_SCHEMA):
        raise InputError("baseline", path.name, f"its columns are {table.schema.names}: freeze the run again")
    frame = table.to_pandas().astype({"outcome": object})
    tasks = {
        task: TaskItems(
            outcomes=_wide(frame[(frame["task"] == task) & (frame["metric"] == "")], path),
            scores=_by_metric(frame[(frame["task"] == task) & (frame["metric"] != "")]),
            directions=directions,
            refused=header.refused.get(task, ()),
        )
        for task, directions in header.directions.items()
    }
    return Items(label=header.label, fingerprint=header.fingerprint, tasks=tasks)


def _wide(rows: pd.DataFrame, path: Path) -> pd.DataFrame | None:
    if rows.empty:
        return None
    if not rows["outcome"].isin(OUTCOMES).all() or rows.duplicated(["item", "condition"]).any():
        raise InputError("baseline", path.name, "unknown or repeated outcomes: freeze the run again")
    return rows.pivot_table(index="item", columns="condition", values="outcome", aggfunc="first").rename_axis(
        index="group_id"
    )


def _by_metric(rows: pd.DataFrame) -> dict[str, pd.Series]:
    return {str(metric): own.set_index("item")["value"] for metric, own in rows.groupby("metric")}


def _task(run: Run, task: str) -> TaskItems:
    probe = run.probes.get(task)
    record = run.task_record(task)
    refused = [NOT_INTERPRETABLE] if record and not record.interpretable else []
    if probe is not None:
        refused += not_valid(probe.outcomes)
    scores: Mapping[str, tuple[pd.Series, int]] = {} if probe is not None else logged_scores(run, task)
    if run.loaded.data:
        scores = {**scores, **{name: (mass, 0) for name, mass in image_mass_by_cluster(run.loaded.data, task).items()}}
    return TaskItems(
        outcomes=probe.outcomes if probe is not None else None,
        scores={name: values for name, (values, _) in scores.items()},
        directions={name: direction for name, (_, direction) in scores.items()},
        refused=tuple(refused),
    )
