"""All metrics again from the samples files: equal to what the harness wrote, with nothing but those files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from fake_model import Fake, run
from typer.testing import CliRunner

from lmms_keyspace.cli import app
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import OPTION_COLUMNS
from lmms_keyspace.store.tables import table_bytes
from lmms_keyspace.tasks import reported
from lmms_keyspace.tasks.rescore import probe_of, rescore


def samples_file(folder: Path, task: str) -> tuple[Path, dict]:
    """A run of a model that cannot be read in every fifth document, written as the harness does."""

    class Sometimes(Fake):
        def generate_until(self, requests):
            replies = super().generate_until(requests)
            return [reply if i % 5 else "neither" for i, reply in enumerate(replies)]

    results, samples, _ = run(lambda doc: doc["lure"], task, fake=Sometimes)
    path = folder / f"20260101_000000_samples_{task}.jsonl"
    lines = ({k: v for k, v in sample.items() if k not in ("doc", "arguments")} for sample in samples)
    path.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))
    return path, results


@pytest.mark.parametrize("task", ["textbias_probe_quick", "visreliance_probe_quick", "visreliance_pairs_quick"])
def test_the_metrics_are_those_of_the_harness(task: str, tmp_path: Path) -> None:
    path, results = samples_file(tmp_path, task)
    (tmp_path / "20260101_000000_samples_mmmu_val.jsonl").write_text('{"doc_id": 0, "mmmu_acc": {}}\n')
    (found,) = rescore(tmp_path)
    assert (found.path, found.task, found.probe) == (path, task, task.removesuffix("_quick"))
    assert found.results() == {key: results[key] for key in found.results()}
    assert found.results()["groups"] in (48, 32)
    as_json = CliRunner().invoke(app, ["rescore", str(path), "--json"])
    assert json.loads(as_json.stdout) == {str(path): found.results()}
    text = CliRunner().invoke(app, ["rescore", str(tmp_path)]).stdout
    assert f"parse_fail                {results['parse_fail']:.4f}  [" in text
    assert results["parse_fail"] == pytest.approx(1 / 5, abs=0.01)
    if task != "visreliance_pairs_quick":
        assert "not valid for this model in color" in text


def test_every_probe_is_known_by_its_columns() -> None:
    for name, probe in reported.PROBES.items():
        assert probe_of(["doc_id", "group_id", *probe.keys]) == name
    assert probe_of(["doc_id", "mmmu_acc"]) is None


def test_without_samples_there_is_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--log_samples"):
        rescore(tmp_path)


def test_neither_torch_nor_the_harness_is_needed() -> None:
    code = "import sys, lmms_keyspace.tasks.rescore; print({'torch', 'lmms_eval', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("task", ["textbias_probe_quick", "textbias_probe_letter"])
def test_what_the_picture_adds_to_the_options(task: str, tmp_path: Path) -> None:
    """The true answer is e times as probable with the picture, the lure half as probable, in nats 1 and -ln 2."""
    _, samples, _ = run(lambda doc: "red", task, limit=288)
    path = tmp_path / f"20260101_000000_samples_{task}.jsonl"
    lines = ({k: v for k, v in sample.items() if k not in ("doc", "arguments")} for sample in samples)
    path.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))
    shift = {"gold": 1.0, "lure": -math.log(2)}
    table = [
        (task, s["doc_id"], s["condition"], option, 0.0, -3.0 + shift.get(role, 0.0) * (s["condition"] == "clean"))
        for s in samples
        for option in s["doc"]["answers"]
        for role in [{s["gold_option"]: "gold", s["lure_option"]: "lure"}.get(option)]
    ]
    options = pd.DataFrame(table, columns=list(OPTION_COLUMNS))
    (tmp_path / "20260101_000000_options.parquet").write_bytes(table_bytes("options", options))
    (found,) = rescore(tmp_path)
    results = found.results()
    assert results["pmi_gold"] == pytest.approx(1)
    assert results["pmi_lure"] == pytest.approx(-math.log(2))
    assert results["kl_blank"] > 0
    assert results["pmi_gold_n"] == 48
    assert "pmi_gold" in "\n".join(found.lines())
