"""Ten kills of the four stages; `benchmarks/faults.py kills` makes two hundred. And that a fault would be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_modules import BENCHMARKS, benchmark_module

from lmms_keyspace.store.files import UNFINISHED


def test_ten_kills_lose_nothing_and_nothing_half_written_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "kills", "--n", "10", "--log", str(log)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = [json.loads(line) for line in log.read_text().splitlines()]
    killed = [one for one in rounds if one["killed"]]
    assert len(killed) == 10
    assert {one["stage"] for one in killed} == {"run", "analyze", "train", "report"}
    assert "0 faults in 10 kills" in done.stdout


def test_a_process_does_not_wait_for_one_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "ranks"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    return benchmark_module("fault_checks")


def test_half_a_file_in_its_place_and_a_lost_one_would_be_found(checks: ModuleType, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    for folder, content in ((whole, "all of it"), (out, "all")):
        folder.mkdir()
        (folder / "report.html").write_text(content)
        (folder / ".report.html.temporary").write_text(content)
    laid = checks.Laid(runs=tmp_path / "runs", results={"report": whole})
    check = checks.CHECKS["report"]
    assert check(laid, out, False) == "strange: ['report.html']; missing: []"
    (out / "report.html").unlink()
    assert check(laid, out, False) == ""
    assert check(laid, out, True) == "strange: []; missing: ['report.html']"
    before = checks.fingerprint(whole)
    assert checks.unfinished(tmp_path) == []
    (out / f".report.html.12345678{UNFINISHED}").touch()
    assert checks.unfinished(tmp_path) == [f"out/.report.html.12345678{UNFINISHED}"]
    (whole / "report.html").write_text("")
    assert "report.html" in checks.lost(before, checks.fingerprint(whole))
