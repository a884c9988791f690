"""A hundred damaged files and what the commands make of them; `benchmarks/faults.py` runs more on real runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import fake_runs
import pytest

from lmms_keyspace.reports import load_runs

_FILE = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", _FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [fake_runs.write(run, root) for run in (fake_runs.BASE, fake_runs.MALORA)]


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_damaged_files_end_in_one_line_or_a_whole_answer(faults, runs, first):
    names = [run.label for run in load_runs(runs).runs]
    rounds = [faults.try_corruption(runs, names, seed) for seed in range(first, first + 25)]
    assert [one for one in rounds if one.fault] == []
    assert {one.exit_code for one in rounds} <= {0, 1, 2, 3}
    assert any(one.exit_code == 2 for one in rounds), "nothing was found to be damaged"


def test_a_fault_would_be_found(faults, runs, monkeypatch):
    def broken(arguments):
        raise KeyError("a")

    monkeypatch.setattr(faults.cli, "main", lambda: broken([]))
    assert "KeyError" in faults.try_corruption(runs, ["a", "b"], 0).fault
