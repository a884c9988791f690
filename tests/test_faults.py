"""A hundred damaged files and what the commands make of them; `benchmarks/faults.py` runs more on real runs."""

from __future__ import annotations

import fake_runs
import pytest
from benchmark_modules import benchmark_module

from lmms_keyspace.reports import load_runs


@pytest.fixture(scope="module")
def faults():
    return benchmark_module("fault_corruptions")


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


def test_a_log_goes_on_where_it_was(faults, runs, tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    first = faults.rounds(runs, range(2), log)
    tried = []
    monkeypatch.setattr(faults, "try_corruption", lambda runs, names, seed: tried.append(seed) or first[0])
    assert faults.rounds(runs, range(3), log) == {**first, 2: first[0]}
    assert tried == [2]
    assert len(log.read_text().splitlines()) == 3
