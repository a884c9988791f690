"""A disk without room, and a folder that cannot be written: one clear error, and what was done before is still there.

No file of the stage may grow beyond some bytes (RLIMIT_FSIZE): any user may set that, and it fails as a full disk does,
in the midst of a write. A file in place of the output folder cannot be written by root either.
"""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fault_stages as stages
from fault_checks import CHECKS, fingerprint, lost
from fault_kills import STAGES, command_of, lay

ROOM = (0, 2_000, 20_000)  # bytes of the largest file
# One sentence that names the folder; lmms-eval prints the error of a model in a line of its own.
_SAID = re.compile(r"cannot be written \(|: name a folder: this is a file")


@dataclass(frozen=True)
class Tried:
    """One stage with too little room, None: no folder at all. `fault` is empty when all was well."""

    stage: str
    room: int | None
    fault: str


def try_all(folder: Path) -> list[Tried]:
    laid, _ = lay(folder / "laid")
    tried = []
    for stage in STAGES:
        for room in (*ROOM, None):
            scratch = folder / f"{stage} {room}"
            runs = scratch / "runs"
            shutil.copytree(laid.runs, runs)
            out = runs / "base" if stage == "run" else scratch / stage
            if room is None:
                out = scratch / "file"
                out.touch()
            before = fingerprint(scratch)
            command = command_of(stage, runs, out)
            ended = stages.start(command, scratch, prepare=_nothing if room is None else partial(_limit, room))
            fault = lost(before, fingerprint(scratch))
            if not _SAID.search(ended.said) and not _whole(stage, laid, out, room):
                fault = fault or f"no clear error: {ended.said[-2000:]}"
            if stage != "run" and (ended.code == 0) != _whole(stage, laid, out, room):
                fault = fault or f"exit {ended.code}"
            if stage != "run" and "Traceback" in ended.said:
                fault = fault or f"a traceback: {ended.said[-2000:]}"
            if room is not None:
                fault = fault or CHECKS[stage](laid, out, False)
            tried.append(Tried(stage, room, fault))
    return tried


def _nothing() -> None:
    pass


def _limit(room: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def _whole(stage: str, laid: object, out: Path, room: int | None) -> bool:
    """Whether there was room enough."""
    check: Callable[..., str] = CHECKS[stage]
    return room is not None and check(laid, out, True) == ""
