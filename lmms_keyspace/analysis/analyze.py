"""The analysis of one run: which parts it has, whether they need keys, and the files it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lmms_keyspace import __version__
from lmms_keyspace.analysis.changes import changes
from lmms_keyspace.analysis.parts import Parts
from lmms_keyspace.analysis.saved_sums import from_sums
from lmms_keyspace.divergence import Measurement
from lmms_keyspace.errors import InputError
from lmms_keyspace.key_source import SavedKeys
from lmms_keyspace.measuring import Bandwidths, Measuring
from lmms_keyspace.records import CHANGE_COLUMNS, DIVERGENCE_COLUMNS, RunData, empty_table
from lmms_keyspace.store import RunFiles, find_runs, read_run
from lmms_keyspace.store.files import require_writable, write
from lmms_keyspace.store.tables import table_bytes

PROTOCOLS = ("robust", "paper", "both")
# What `from_sums` gives.
FROM_SUMS = (
    "mmd2 and js_classifier of visual against text and of text against text of other tasks, and the split halves of "
    "mmd2; not those of JS, nor other estimators, controls, spaces or bandwidths"
)


@dataclass(frozen=True)
class Analysis:
    """The divergence table, the changes from the reference run (None without one), and the files they are in."""

    divergence: pd.DataFrame
    changes: pd.DataFrame | None
    files: list[Path]


def analyze(
    run: Path,
    *,
    protocol: str = "robust",
    reference: Path | None = None,
    spaces: Sequence[str] | None = None,
    n_permutations: int = 1000,
    seed: int | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Analysis:
    """Compute tests, intervals, bands and changes of a finished run again.

    From the saved sums where they suffice, else from the keys: the paper's pipeline, spaces that were not measured, and
    bandwidths of a reference run that are not those of the run. From sums there are fewer rows, see `FROM_SUMS`; the
    run's own table keeps the others. What is finished is kept beside the output, so that the same call goes on after it
    was stopped. The result depends on the files, the arguments and the seed alone.

    Args:
        run: folder of a run; the newest in it is taken.
        protocol: `robust`, `paper`, or `both`.
        reference: folder of the base run. Its bandwidths are used, and changes from it are computed.
        spaces: which vectors; None takes those that were measured.
        n_permutations: of the block permutation tests.
        seed: of everything that is drawn; None takes the run's.
        out: folder for the files; None takes `analysis` beside the run's files.
        progress: called with the parts that are done and their number.

    Raises:
        InputError: no such run, a run without capture, keys that are needed and were not kept, a folder that cannot be
            written.
    """
    if protocol not in PROTOCOLS:
        raise InputError("protocol", protocol, f"choose one of {', '.join(PROTOCOLS)}")
    if n_permutations < 1:
        raise InputError("permutations", n_permutations, "give a positive number of permutations")
    job = _Job(run, protocol, reference, spaces, n_permutations, seed)
    folder = job.files.folder / "analysis" if out is None else out
    parts = Parts(require_writable("out", folder) / "parts", job.settings)
    if finished := sum(parts.has(*name) for name in job.names):
        logging.getLogger(__name__).warning("going on: %d of %d parts are there", finished, len(job.names))
    tables, changed = [empty_table(DIVERGENCE_COLUMNS)], [empty_table(CHANGE_COLUMNS)]
    for number, name in enumerate(job.names):
        progress(number, len(job.names))
        part = parts.load(*name) or parts.save(job.measure(*name), *name)
        tables.append(part.table[_of_protocol(part.table["estimator"], protocol)])
        if job.base is not None:
            changed.append(changes(job.base, part, *name, seed=job.seed))
    progress(len(job.names), len(job.names))
    found = {"divergence": _joined(tables)} | ({} if job.base is None else {"changes": _joined(changed)})
    written = [
        write(folder / f"{job.files.date}_{name}.parquet", table_bytes(name, frame)) for name, frame in found.items()
    ]
    parts.remove()
    return Analysis(found["divergence"], found.get("changes"), written)


class _Job:
    """One analysis: what it reads and how each part is measured."""

    def __init__(
        self,
        run: Path,
        protocol: str,
        reference: Path | None,
        spaces: Sequence[str] | None,
        n_permutations: int,
        seed: int | None,
    ) -> None:
        self.files, self.data = _captured("run", run)
        record = self.data.record
        measured = sorted({key.space for key in self.data.gram})
        self.base = None if reference is None else _captured("reference", reference)[1]
        self.spaces = list(spaces or measured)
        self.n_permutations = n_permutations
        self.seed = record.seed if seed is None else seed
        self.needs_keys = protocol != "robust" or not set(self.spaces) <= set(measured) or not self._bandwidths_agree()
        self.names = [
            (task, condition, space)
            for task, entry in record.tasks.items()
            for space in self.spaces
            for condition in entry.conditions
        ]
        self.settings: dict[str, Any] = {
            "version": __version__,
            "run": _fingerprint(self.data),
            "reference": _fingerprint(self.base) if self.base is not None else None,
            "from_keys": self.needs_keys,
            "permutations": n_permutations,
            "seed": self.seed,
        }
        if self.needs_keys:
            self._require_keys()

    def measure(self, task: str, condition: str, space: str) -> Measurement:
        if not self.needs_keys:
            return from_sums(
                self.data, task, condition, space, bandwidth_source=self._bandwidth_source,
                n_permutations=self.n_permutations, seed=self.seed,
            )  # fmt: skip
        if (task, space) not in self._found:
            self._found[task, space] = self._measuring.bandwidths(task, space)
        return self._measuring.part(task, condition, space, self._found[task, space])

    def _require_keys(self) -> None:
        """Keys that were not kept are an error before anything is computed."""
        try:
            SavedKeys(self.data)
        except InputError as error:
            way_out = f"{error.way_out}. Without keys there are {FROM_SUMS}"
            raise InputError(error.argument, error.value, way_out) from error
        kept = {name.split("/")[0] for names in self.data.keys.values() for name in names}
        for space in self.spaces:
            if space not in kept:
                way_out = f"this run kept {' + '.join(sorted(kept))}; run it again with keep_keys=on,spaces={space}"
                raise InputError("spaces", space, way_out)

    @cached_property
    def _found(self) -> dict[tuple[str, str], Any]:
        return {}

    @cached_property
    def _measuring(self) -> Measuring:
        record = self.data.record
        device = "cuda" if torch.cuda.is_available() else "cpu"
        has_base = any(name.endswith("/base") for names in self.data.keys.values() for name in names)
        return Measuring(
            source=SavedKeys(self.data, device),
            conditions={task: entry.conditions for task, entry in record.tasks.items()},
            reference=has_base,
            bandwidth_source=self._bandwidth_source,
            connector=record.connector,
            seed=self.seed,
            n_permutations=self.n_permutations,
            given=self._given,
        )

    @property
    def _given(self) -> Bandwidths | None:
        return None if self.base is None else self.base.record.bandwidths

    @property
    def _bandwidth_source(self) -> str:
        return "as in the run" if self.base is None else f"reference run {self.base.record.date}"

    def _bandwidths_agree(self) -> bool:
        """Whether the run's sums were made with the reference's bandwidths, wherever both have some."""
        own = self.data.record.bandwidths
        for task, by_space in (self._given or {}).items():
            for space in self.spaces:
                for layer, width2 in by_space.get(space, {}).items():
                    mine = own.get(task, {}).get(space, {}).get(layer, width2)
                    if len(mine) != len(width2) or not np.allclose(mine, width2, rtol=1e-3, atol=0):
                        return False
        return True


def _captured(argument: str, path: Path) -> tuple[RunFiles, RunData]:
    files = find_runs(path)[-1]
    if not files.captured:
        raise InputError(argument, str(path), "this run captured no keys; run it with one of this package's models")
    return files, read_run(files.folder, files.date)


def _fingerprint(data: RunData) -> str:
    return data.record.model_dump_json()


def _of_protocol(estimators: pd.Series, protocol: str) -> pd.Series:
    is_paper = estimators.str.startswith("paper_")
    return {"robust": ~is_paper, "paper": is_paper, "both": is_paper | True}[protocol]


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The parts that have rows, or an empty table."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
