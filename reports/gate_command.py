"""What `lmms-keyspace gate` does: judge or freeze, and write what was asked for."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lmms_keyspace.errors import InputError
from lmms_keyspace.reports.gate import gate
from lmms_keyspace.reports.gate_output import gate_json, gate_junit, gate_markdown, render_gate
from lmms_keyspace.reports.items import load_items, write_baseline
from lmms_keyspace.store.files import encoded, require_writable, write


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
    """Judge, print and write, each file whole or not at all; returns the exit code.

    Nothing is written for input that is refused. The summary goes to the end of its file, which others of a CI share.
    """
    if baseline is None or candidate is None:
        given = {"--baseline": baseline, "--candidate": candidate}
        missing = [name for name, value in given.items() if value is None]
        raise InputError("gate", " and ".join(missing), "name both runs, or freeze one with --freeze RUN --out FILE")
    result = gate(baseline, candidate, policy, allow_mismatch=allow_mismatch)
    as_json, as_junit, as_markdown = gate_json(result), gate_junit(result), gate_markdown(result)
    files: dict[Path, bytes] = {}
    if out is not None:
        require_writable("--out", out)
        files = {
            out / "gate.json": encoded(as_json + "\n"),
            out / "gate.xml": encoded(as_junit),
            out / "gate.md": encoded(as_markdown),
        }
    if junit is not None:
        files[_file("--junit", junit)] = encoded(as_junit)
    if summary is not None:
        files[summary] = _content("--summary", _file("--summary", summary)) + encoded(as_markdown)
    for path, content in files.items():
        write(path, content)
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


def _content(option: str, path: Path) -> bytes:
    """What a file holds that is written anew with more at its end."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(option, str(path), f"name a file that can be read ({error.strerror})") from error


def _file(option: str, path: Path) -> Path:
    """Writing replaces what has the name: right for a file alone, and never for /dev/stdout."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(option, str(path), "name a file: this is a folder, a link or a device")
    require_writable(option, path.parent)
    return path
