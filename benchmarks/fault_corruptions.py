"""What becomes of damaged files: run folders are corrupted at random and every command that reads them is tried.

Each round copies the runs, damages one file, and runs one command on the copies, in the same interpreter. A fault is an
exception that is not the one-line error of `lmms-keyspace`, a changed or new file outside the command's output folder,
or a run that an output neither shows nor names as left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from lmms_keyspace import cli
from lmms_keyspace.reports import load_runs

Corruption = Callable[[random.Random, Path, Path], None]  # draws, the file, a folder outside of the runs


@dataclass(frozen=True)
class Round:
    """One damaged file and what one command made of it; `fault` is empty when all was well."""

    corruption: str
    file: str
    command: str
    exit_code: int | None
    fault: str


def truncated(draw: random.Random, path: Path, outside: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])


def flipped(draw: random.Random, path: Path, outside: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8)):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def overwritten(draw: random.Random, path: Path, outside: Path) -> None:
    path.write_bytes(draw.randbytes(draw.choice((0, 1, 8, 100, 10_000))))


def swapped(draw: random.Random, path: Path, outside: Path) -> None:
    """The content of another file of any run."""
    others = [file for file in path.parents[1].rglob("*") if file.is_file() and file != path]
    shutil.copyfile(draw.choice(others), path)


def linked_outside(draw: random.Random, path: Path, outside: Path) -> None:
    target = outside / path.name
    shutil.copyfile(path, target)
    path.unlink()
    path.symlink_to(target)


def dangling(draw: random.Random, path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside / "nothing")


def removed(draw: random.Random, path: Path, outside: Path) -> None:
    path.unlink()


def turned_into_a_folder(draw: random.Random, path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def huge_header(draw: random.Random, path: Path, outside: Path) -> None:
    """Safetensors begin with the header's length: here a terabyte, or tensors that reach a terabyte."""
    if draw.random() < 0.5:
        path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    else:
        entry = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}
        header = json.dumps({"x": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)


def foreign_table(draw: random.Random, path: Path, outside: Path) -> None:
    """Parquet of another schema; under another name, a file that is no JSON."""
    pd.DataFrame({"task": ["a", None], "value": ["<script>", "1"], "layer": [float("nan"), 1e300]}).to_parquet(path)


def hostile_json(draw: random.Random, path: Path, outside: Path) -> None:
    path.write_text(
        draw.choice(
            (
                "[" * 100_000,
                "null",
                '{"results": {"textbias_probe": {"score,none": NaN}}, "config": null}',
                '{"schema_version": 1e999, "tasks": {"../../x": {}}}',
                '{"schema_version": 10}',
                '{"a": "\\ud800"}',
            )
        )
    )


CORRUPTIONS: tuple[Corruption, ...] = (
    truncated,
    flipped,
    overwritten,
    swapped,
    linked_outside,
    dangling,
    removed,
    turned_into_a_folder,
    huge_header,
    foreign_table,
    hostile_json,
)


OF_ONE_RUN = ("freeze", "rescore")  # what they print is that run


def commands(runs: Sequence[Path], out: Path) -> dict[str, list[str]]:
    """Every command that reads run folders, with an output folder of its own."""
    base, other = map(str, runs[:2])
    return {
        "compare": ["compare", base, other],
        "compare --json": ["compare", base, other, "--json"],
        "report": ["report", base, other, "--out", str(out)],
        "leaderboard": ["leaderboard", base, other, "--out", str(out)],
        "gate": ["gate", "--baseline", base, "--candidate", other, "--out", str(out)],
        "freeze": ["gate", "--freeze", other, "--out", str(out / "baseline.parquet")],
        "rescore": ["rescore", other],
    }


def try_corruption(runs: Sequence[Path], names: Sequence[str], seed: int) -> Round:
    """Damage one file of copies of two runs, called `names` in outputs, and run one command; `seed` gives the draws."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        root, outside, out = (Path(scratch) / name for name in ("runs", "outside", "out"))
        outside.mkdir()
        for number, run in enumerate(runs):
            shutil.copytree(run, root / f"run{number}")
        copies = sorted(root.iterdir())
        victim = draw.choice(sorted(file for file in draw.choice(copies).rglob("*") if file.is_file()))
        corruption = draw.choice(CORRUPTIONS)
        corruption(draw, victim, outside)
        before = _fingerprint(root, outside)
        name, arguments = draw.choice(list(commands(copies, out).items()))
        code, said, fault = _run(arguments)
        if not fault and _fingerprint(root, outside) != before:
            fault = "a file outside the output folder changed"
        if not fault and code == 0:
            said += "".join(file.read_text(errors="replace") for file in out.rglob("*.md"))
            fault = "" if name in OF_ONE_RUN else _missing(said, names)
        return Round(corruption.__name__, victim.name, name, code, fault)


def _run(arguments: list[str]) -> tuple[int | None, str, str]:
    """Exit status, what was printed, and the fault if the command let an exception through."""
    printed, given = io.StringIO(), sys.argv
    sys.argv = ["lmms-keyspace", *arguments]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            cli.main()
        return 0, printed.getvalue(), ""
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return code, printed.getvalue(), "" if code in (0, 1, 2, 3) else f"exit {code}"
    except BaseException:  # noqa: BLE001 - whatever comes through is what is looked for
        return None, printed.getvalue(), traceback.format_exc(limit=-4)
    finally:
        sys.argv = given


def _fingerprint(*folders: Path) -> dict[str, str]:
    return {
        str(file): str(file.readlink()) if file.is_symlink() else hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file() or file.is_symlink()
    }


def _missing(said: str, names: Sequence[str]) -> str:
    """A run that is neither shown nor said to be left out."""
    absent = [name for name in names if name not in said]
    told = "left out" in said or "Not in the table" in said
    return f"{absent} silently missing" if absent and not told else ""


def rounds(runs: Sequence[Path], seeds: Sequence[int], log: Path | None) -> dict[int, Round]:
    """By seed; those in the log are taken from it, and each new one is added to it."""
    names = [run.label for run in load_runs(runs).runs]
    lines = [json.loads(line) for line in log.open()] if log is not None and log.exists() else []
    found = {line.pop("seed"): Round(**line) for line in lines}
    for seed in seeds:
        if seed not in found:
            found[seed] = try_corruption(runs, names, seed)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps({"seed": seed} | asdict(found[seed])) + "\n")
    return {seed: found[seed] for seed in seeds}


def table(found: Iterable[Round]) -> str:
    """Rounds by corruption and exit status."""
    counts = Counter((one.corruption, one.exit_code) for one in found)
    return "\n".join(f"{name:24} exit {code!s:5} {count}" for (name, code), count in sorted(counts.items(), key=str))
