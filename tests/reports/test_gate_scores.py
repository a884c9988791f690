"""The gate on a benchmark's own scale, at the very level of the policy, and on what was not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_runs import BASE, write
from typer.testing import CliRunner

from lmms_keyspace.cli import app
from lmms_keyspace.reports import gate
from lmms_keyspace.reports.gate_output import printed_verdicts
from lmms_keyspace.reports.policy import MetricRule, Policy

TASK = "scored"


def scored(folder: Path, scores: list[float]) -> Path:
    """A run of lmms-eval with one score per document."""
    folder.mkdir()
    results = {
        "results": {TASK: {"rating,none": sum(scores) / len(scores)}},
        "configs": {TASK: {}},
        "versions": {TASK: 1.0},
        "higher_is_better": {TASK: {"rating": True}},
    }
    (folder / "20260101_000000_results.json").write_text(json.dumps(results))
    lines = [json.dumps({"doc_id": index, "rating": score}) for index, score in enumerate(scores)]
    (folder / f"20260101_000000_samples_{TASK}.jsonl").write_text("\n".join(lines))
    return folder


def policy(margin: float, **more: object) -> Policy:
    return Policy(name="p", metric=(MetricRule(name="rating", margin=margin),), **more)


RATINGS = [float(1 + i % 5) for i in range(100)]


def test_a_scale_of_its_own_is_no_share(tmp_path):
    """Ratings from 1 to 5: margins and changes are in ratings, and a group can move by 4 of them."""
    run = scored(tmp_path / "a", RATINGS)
    (found,) = gate(run, scored(tmp_path / "same", RATINGS), policy(1.5)).verdicts
    assert (found.unit, found.n, found.clusters) == ("score", 100, 100)
    assert found.baseline == found.candidate == 3
    assert found.lower == pytest.approx(-4 * (1 - 0.05 ** (1 / 100)))
    assert found.verdict == "pass"
    assert "points" not in found.reason
    (lost,) = gate(run, scored(tmp_path / "b", [max(1.0, r - 2) for r in RATINGS]), policy(1.0)).verdicts
    assert (lost.verdict, lost.delta) == ("fail", pytest.approx(-1.4))


def test_a_scale_is_what_both_runs_say_together(tmp_path):
    """One run happens to lie within 0 and 1: that does not make the benchmark's score a share."""
    low = scored(tmp_path / "low", [float(i % 2) for i in range(100)])
    (found,) = gate(low, scored(tmp_path / "high", RATINGS), policy(1.5)).verdicts
    assert found.unit == "score"
    (back,) = gate(scored(tmp_path / "high2", RATINGS), low, policy(1.5)).verdicts
    assert (back.unit, back.delta) == ("score", pytest.approx(-2.5))
    (twos,) = gate(scored(tmp_path / "twos", [2.0 * (i % 2) for i in range(100)]), low, policy(0.5)).verdicts
    assert twos.unit == "score"


def test_p_at_the_level_decides(tmp_path):
    """`pass` and `fail` are p <= alpha, as the bound at alpha reaches the margin then."""
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, 100)
    paths = [
        scored(tmp_path / name, list(base + shift)) for name, shift in (("a", 0), ("b", rng.normal(-0.05, 0.4, 100)))
    ]
    (one,) = gate(*paths, policy(0.12)).verdicts
    assert 0.001 < one.p_pass < 0.4
    assert gate(*paths, policy(0.12, alpha=one.p_pass)).verdict == "pass"
    assert gate(*paths, policy(0.12, alpha=one.p_pass - 1e-9)).verdict == "inconclusive"
    assert 0.001 < one.p_fail < 0.4
    small = -one.delta / 2
    (loss,) = gate(*paths, policy(small, alpha=one.p_fail)).verdicts
    assert loss.verdict == "fail"
    (not_yet,) = gate(*paths, policy(small, alpha=one.p_fail - 1e-9)).verdicts
    assert not_yet.verdict == "inconclusive"
    (at_margin,) = gate(*paths, policy(-one.delta, alpha=one.p_fail)).verdicts
    assert at_margin.verdict == "fail"


def test_what_was_not_measured_counts_nothing(tmp_path):
    run = scored(tmp_path / "a", RATINGS)
    result = gate(run, run, Policy(name="p", metric=(MetricRule(name="read_acc", margin=0.05),)))
    (row,) = printed_verdicts(result).to_dict("records")
    assert (row["n"], row["Groups"], row["Change"], row["Bounds"]) == ("0", "0 (0, 0)", "-", "")


def test_n_is_what_the_candidates_value_is_a_share_of(tmp_path):
    """58 of 60 groups name the picture without the text; in 20 of them the text turns the answer."""
    run = write(replace(BASE, groups=60, flips=20, record={"capture": False}, capture=False), tmp_path)
    rule = MetricRule(name="text_flip_rate", margin=0.05)
    (found,) = gate(run, run, Policy(name="p", metric=(rule,))).verdicts
    assert (found.n, found.clusters, found.candidate) == (58, 58, pytest.approx(20 / 58))


@pytest.mark.parametrize("name", ["baseline.txt", "baseline.csv", "baseline"])
def test_a_baseline_is_a_parquet_file_whatever_else_it_is_called(tmp_path, name):
    run = scored(tmp_path / "a", RATINGS)
    done = CliRunner().invoke(app, ["gate", "--freeze", str(run), "--out", str(tmp_path / name)])
    assert done.exit_code == 3
    assert "*.parquet" in done.output
    assert not (tmp_path / name).exists()
