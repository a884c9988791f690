"""What `lmms-keyspace gate` does: judge or freeze, and write what was asked for."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lmms_keyspace.errors import InputError
from lmms_keyspace.reports.gate import gate
from lmms_keyspace.reports.gate_output import gate_json, gate_junit, gate_markdown, render_gate
from lmms_keyspace.reports.items import load_items, write_baseline


def run_gate(
    baseline: Path | None,
    candidate: Path | None,
    policy: str,
    *,
    allow_mismatch: bool,
    out: Path | None,
    json: bool,
    junit: Path | None,
    summary: Path | None,
    console: Console,
) -> int:
    """Judge, print and write; returns the exit code. Nothing is written for input that is refused.

    The summary is appended, as a job's summary file of a CI is shared by its steps.
    """
    if baseline is None or candidate is None:
        given = {"--baseline": baseline, "--candidate": candidate}
        missing = [name for name, value in given.items() if value is None]
        raise InputError("gate", " and ".join(missing), "name both runs, or freeze one with --freeze RUN --out FILE")
    for option, path, is_wrong in (
        ("--out", out, Path.is_file),
        ("--junit", junit, Path.is_dir),
        ("--summary", summary, Path.is_dir),
    ):
        if path is not None and is_wrong(path):
            raise InputError(option, str(path), f"there is a {'file' if path.is_file() else 'folder'} of this name")
    result = gate(baseline, candidate, policy, allow_mismatch=allow_mismatch)
    as_json, as_junit, as_markdown = gate_json(result), gate_junit(result), gate_markdown(result)
    if out is not None:
        for name, text in (("gate.json", as_json + "\n"), ("gate.xml", as_junit), ("gate.md", as_markdown)):
            _write(out / name, text)
    if junit is not None:
        _write(junit, as_junit)
    if summary is not None:
        _write(summary, as_markdown, append=True)
    if json:
        console.file.write(as_json + "\n")
    else:
        render_gate(result, console)
    return result.exit_code


def freeze_run(run: Path, out: Path | None, *, judging: Path | None) -> Path:
    """Write the run's items as a baseline file; returns it."""
    if judging is not None:
        raise InputError("--freeze", str(run), "freeze a run or judge one, not both at once")
    if out is None or out.suffix != ".parquet":
        raise InputError("--out", str(out), "name the baseline file, *.parquet")
    write_baseline(load_items(run), out)
    return out


def _write(path: Path, text: str, *, append: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
