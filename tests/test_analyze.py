"""`lmms-keyspace analyze` on runs of the bundled model: from sums, from keys, against a reference, stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation import evaluate
from typer.testing import CliRunner

from lmms_keyspace.analysis import analyze
from lmms_keyspace.analysis.parts import Parts
from lmms_keyspace.cli import app
from lmms_keyspace.divergence import Measurement
from lmms_keyspace.errors import InputError
from lmms_keyspace.measuring import Measuring
from lmms_keyspace.records import DIVERGENCE_COLUMNS, empty_table
from lmms_keyspace.store import find_runs, read_run, write_run

TASK = "textbias_probe_quick"
MAIN_CELL = (TASK, "clean", "k_pre", "visual-text")
PLACE = ["task", "condition", "space", "contrast", "estimator", "layer", "head"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders: the base with kept keys, the adapter with kept keys, and the adapter without."""
    folder = tmp_path_factory.mktemp("runs")
    for model, name, more in (
        ("keyspace_llava", "base", "keep_keys=on,spaces=k_pre+k_post"),
        ("malora_llava", "adapted", "keep_keys=on"),
    ):
        evaluate(
            model, limit=48, batch_size=16, model_args=f"{more},layers=1+2,capture_clusters=8,keys_dir={folder / name}"
        )
    data = only(folder / "adapted")
    settings = data.record.capture_settings | {"keep_keys": False}
    tokens = data.tokens.assign(keys_row=-1)
    bare = replace(data, record=data.record.model_copy(update={"capture_settings": settings}), tokens=tokens, keys={})
    write_run(folder / "bare", data.record.date, bare)
    return {name: folder / name for name in ("base", "adapted", "bare")}


def only(folder: Path):
    (files,) = find_runs(folder)
    return read_run(files.folder, files.date)


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["analyze", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_saved_sums_give_the_rows_of_the_run_again(runs, tmp_path):
    output = command(runs["bare"], "--out", tmp_path)
    data = only(runs["bare"])
    again = pd.read_parquet(tmp_path / f"{data.record.date}_divergence.parquet")
    assert f"{data.record.date}_divergence.parquet" in output.replace("\n", "")
    both = again.merge(data.divergence, on=PLACE, suffixes=("", "_run"))
    assert len(both) == len(again) > 0
    assert set(again["estimator"]) == {"mmd2", "js_classifier"}
    for column in ("value", "ci_low", "ci_high", "null_mean", "p", "p_adjusted"):
        np.testing.assert_allclose(both[column], both[f"{column}_run"], atol=2e-5)
    assert not (tmp_path / "parts").exists()


def test_kept_keys_give_the_whole_table_again_and_other_permutations(runs, tmp_path):
    command(runs["base"], "--protocol", "both", "--permutations", 50, "--out", tmp_path)
    data = only(runs["base"])
    again = pd.read_parquet(next(tmp_path.glob("*_divergence.parquet")))
    assert len(again) == len(data.divergence)
    both = again.merge(data.divergence, on=PLACE, suffixes=("", "_run"))
    np.testing.assert_allclose(both["value"], both["value_run"], atol=1e-4, rtol=1e-4)
    assert set(again.loc[again["p"].notna(), "n_permutations"]) == {50}
    assert again["p"].min() == pytest.approx(1 / 51)


def test_the_change_from_the_reference_run(runs, tmp_path):
    output = command(runs["adapted"], "--reference", runs["base"], "--out", tmp_path)
    assert "change from the reference run" in output
    changes = pd.read_parquet(next(tmp_path.glob("*_changes.parquet")))
    base, adapted = only(runs["base"]), only(runs["adapted"])
    chosen = (changes["condition"] == "clean") & (changes["head"] == "all")
    for estimator in ("mmd2", "js_classifier"):
        for row in changes[chosen & (changes["estimator"] == estimator)].itertuples():
            values = [
                data.divergence.set_index(PLACE)["value"][
                    TASK, "clean", "k_pre", "visual-text", estimator, row.layer, "all"
                ]
                for data in (base, adapted)
            ]
            assert row.delta == pytest.approx(values[1] - values[0], abs=1e-5)
            assert row.band_low <= row.ci_low <= row.delta <= row.ci_high <= row.band_high
            assert row.p <= row.p_adjusted <= 1
            assert row.n_clusters == 8
    heads = changes[(changes["condition"] == "clean") & (changes["estimator"] == "mmd2")]
    assert set(heads["head"]) == {"all", "0", "1"}
    assert set(heads["test_family"]) == {"max-T, 2 tests: layers", "max-T, 4 tests: layers and KV heads"}
    missing = changes[changes["delta"].isna()]
    assert set(missing["condition"]) == {"text_only_conflict"}
    assert missing["note"].str.startswith("not computable").all()


def test_a_stopped_analysis_goes_on_where_it_was_and_ends_the_same(runs, tmp_path, monkeypatch, caplog):
    settings = {"protocol": "both", "n_permutations": 20}
    whole = analyze(runs["adapted"], **settings, out=tmp_path / "whole")
    measured = []
    part = Measuring.part

    def stopped(self, *name):
        measured.append(name[:3])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return part(self, *name)

    monkeypatch.setattr(Measuring, "part", stopped)
    with pytest.raises(KeyboardInterrupt):
        analyze(runs["adapted"], **settings, out=tmp_path / "stopped")
    assert not list((tmp_path / "stopped").glob("*.parquet"))
    steps = []
    again = analyze(
        runs["adapted"], **settings, out=tmp_path / "stopped", progress=lambda done, of: steps.append((done, of))
    )
    assert "going on: 2 of 6 parts are there" in caplog.text
    assert steps == [(number, 6) for number in range(7)]
    assert len(measured) == 3 + 4  # two of the six parts were there
    pd.testing.assert_frame_equal(again.divergence, whole.divergence)
    assert [path.read_bytes() for path in again.files] == [path.read_bytes() for path in whole.files]


@pytest.mark.parametrize("suffix", [".parquet", ".gram.safetensors", ".losses.safetensors"])
def test_a_part_that_was_half_removed_is_measured_again(tmp_path, suffix):
    parts = Parts(tmp_path, {})
    assert parts.save(Measurement(empty_table(DIVERGENCE_COLUMNS), {}, {}), "task").table.empty
    next(tmp_path.rglob(f"*{suffix}")).unlink()
    assert not parts.has("task")
    assert parts.load("task") is None


def test_no_room_for_a_folder_of_parts_is_one_error(tmp_path):
    root = tmp_path / "parts"
    root.touch()
    with pytest.raises(InputError, match=rf"out='{root}/\w+': the folder cannot be written"):
        Parts(root, {}).save(Measurement(empty_table(DIVERGENCE_COLUMNS), {}, {}), "a part")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(runs, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Measuring, "part", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"out=.*this is a file"):
        analyze(runs["adapted"], protocol="paper", out=tmp_path / "file")


def test_a_reference_with_other_bandwidths_needs_keys_and_uses_its_own(runs, tmp_path):
    base = only(runs["base"])
    doubled = {
        TASK: {"k_pre": {layer: [2 * w for w in ws] for layer, ws in base.record.bandwidths[TASK]["k_pre"].items()}}
    }
    other = replace(base, record=base.record.model_copy(update={"bandwidths": doubled}))
    write_run(tmp_path / "other", base.record.date, other)
    with pytest.raises(InputError, match=r"keep_keys=on\. Without keys there are mmd2 and js_classifier"):
        analyze(runs["bare"], reference=tmp_path / "other", out=tmp_path / "out")
    result = analyze(runs["adapted"], reference=tmp_path / "other", out=tmp_path / "out")
    rows = result.divergence[(result.divergence["head"] == "all") & (result.divergence["condition"] == "clean")]
    by_scale = rows[rows["contrast"] == "visual-text"].pivot_table(index="layer", columns="estimator", values="value")
    own = only(runs["adapted"]).divergence
    own = own[(own["head"] == "all") & (own["condition"] == "clean") & (own["contrast"] == "visual-text")]
    own = own.pivot_table(index="layer", columns="estimator", values="value")
    np.testing.assert_allclose(by_scale["mmd2_scale_0.5"], own["mmd2_scale_1"], atol=1e-5)


def test_a_reference_run_with_other_layers_leaves_those_rows_without_a_value(runs, tmp_path):
    base = only(runs["base"])
    few = {key: base.gram[key] for key in base.gram if key.layer != 2}
    widths = {
        TASK: {space: {k: v for k, v in by.items() if k != 2} for space, by in base.record.bandwidths[TASK].items()}
    }
    other = replace(
        base, gram=few, losses={}, record=base.record.model_copy(update={"layers": [1], "bandwidths": widths})
    )
    write_run(tmp_path / "other", base.record.date, other)
    changes = analyze(runs["bare"], reference=tmp_path / "other", out=tmp_path / "out").changes
    mmd2 = changes[(changes["estimator"] == "mmd2") & (changes["condition"] == "clean")]
    assert set(mmd2.loc[mmd2["delta"].notna(), "layer"]) == {1}
    assert "only the run has this layer" in mmd2.loc[mmd2["layer"] == 2, "note"].item()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--protocol", "paper"), "keep_keys=on"),
        (("--protocol", "both"), "keep_keys=on"),
        (("--spaces", "q"), "keep_keys=on"),
        (("--protocol", "papers"), "protocol='papers'"),
        (("--permutations", 0), "permutations=0"),
        (("--reference", "/nonexistent"), "there is no run here"),
    ],
)
def test_one_error_says_what_is_missing(runs, tmp_path, arguments, named):
    with pytest.raises(InputError, match=named):
        command(runs["bare"], *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_space_that_was_not_captured_is_named(runs, tmp_path):
    with pytest.raises(InputError, match=r"spaces='q'.*kept k_post \+ k_pre"):
        analyze(runs["base"], spaces=["q"], out=tmp_path / "out")


def test_a_run_without_capture_is_refused(runs, tmp_path):
    (files,) = find_runs(runs["bare"])
    (tmp_path / "20260101_000000_results.json").write_text("{}")
    shutil.copy(files.folder / f"{files.date}_keyspace.json", tmp_path / "note.txt")
    with pytest.raises(InputError, match="captured no keys"):
        analyze(tmp_path)
