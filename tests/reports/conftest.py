"""The fake runs are written once for all tests that only read them."""

from __future__ import annotations

from pathlib import Path

import fake_runs
import pytest

from lmms_keyspace.reports import load_runs, write_report


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory) -> list[Path]:
    """Base, MaLoRA (divergence falls, answers equal) and plain LoRA (divergence stays, flips fall)."""
    root = tmp_path_factory.mktemp("runs")
    return [fake_runs.write(run, root) for run in (fake_runs.BASE, fake_runs.MALORA, fake_runs.LORA)]


@pytest.fixture(scope="session")
def report_folder(three_runs, tmp_path_factory) -> Path:
    """The report of these runs without figure files, in a folder that was not there before."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    written = write_report(load_runs(three_runs), out, figure_files=False)
    assert written[0].name == "report.html"
    assert set(written) == {path for path in out.rglob("*") if path.is_file()}
    return out
