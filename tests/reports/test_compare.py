"""compare: known differences come out, runs that must not be compared are refused, every output says the same."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace

import fake_runs
import numpy as np
import pytest
from fake_runs import BASE, LORA, MALORA, TASK
from rich.console import Console

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError
from lmms_keyspace.reports import compare, load_runs, render_comparison
from lmms_keyspace.reports.wording import number, p_value, printed, printed_looks


@pytest.fixture(scope="module")
def comparison(three_runs):
    return compare(load_runs(three_runs))


def row(comparison, metric: str, run: str):
    table = comparison.table
    (found,) = table[(table["metric"] == metric) & (table["run"] == run)].itertuples()
    return found


def test_runs_are_named_and_ordered_as_given(three_runs, comparison):
    assert comparison.runs == ("bundled base", "malora", "lora")
    turned = compare(load_runs([three_runs[2], three_runs[0]]))
    assert turned.runs == ("lora", "bundled base")
    assert row(turned, "text_flip_rate", "bundled base").delta == pytest.approx(12 / 46)


def test_shares_are_those_written(comparison):
    expected = {  # 48 groups, 2 of them wrong in clean
        "clean_acc": (46 / 48, 46 / 48),
        "match_acc": (1, 1),
        "conflict_acc": (26 / 48, 38 / 48),
        "irrelevant_acc": (43 / 48, 43 / 48),
        "blind_acc": (12 / 48, 12 / 48),
        "text_flip_rate": (20 / 46, 8 / 46),
        "vis_gain": (34 / 48, 34 / 48),
        "benefit": (2 / 48, 2 / 48),
    }
    for metric, (base, lora) in expected.items():
        assert row(comparison, metric, "bundled base").value == pytest.approx(base), metric
        found = row(comparison, metric, "lora")
        assert found.value == pytest.approx(lora), metric
        assert found.delta == pytest.approx(lora - base), metric
        assert found.delta_low <= found.delta <= found.delta_high


def test_a_real_change_is_found_and_its_interval_excludes_zero(comparison):
    found = row(comparison, "text_flip_rate", "lora")
    assert found.delta_high < 0
    assert found.p_adjusted < 0.05
    assert 0 < found.mde < 0.3


def test_equal_answers_get_a_bound_and_never_a_width_of_zero(comparison):
    found = row(comparison, "text_flip_rate", "malora")
    assert found.delta == 0
    assert found.p_adjusted == 1
    # None of 48 groups differs: a discordance of 7.4 % is still possible, (1 - .074) ** 48 = .025.
    assert found.delta_high == pytest.approx(0.0740, abs=5e-4)
    assert found.delta_low == -found.delta_high
    assert found.mde > found.delta_high


def test_attention_mass_is_the_mean_over_layers_and_bands(comparison):
    # mass + .02 * layer, layers 0 to 3, in clean; thirds of four layers are (0, 1), (2), (3).
    assert row(comparison, "image_mass_all", "bundled base").value == pytest.approx(0.33, abs=1e-6)
    assert row(comparison, "image_mass_early", "bundled base").value == pytest.approx(0.31, abs=1e-6)
    assert row(comparison, "image_mass_late", "malora").value == pytest.approx(0.42, abs=1e-6)
    assert row(comparison, "image_mass_all", "malora").delta == pytest.approx(0.06, abs=1e-6)


def test_mmd2_falls_where_the_gap_was_closed_and_the_paired_interval_is_narrow(comparison):
    base, malora = row(comparison, "mmd2", "bundled base"), row(comparison, "mmd2", "malora")
    assert malora.delta == pytest.approx(malora.value - base.value)
    assert malora.delta_high < 0
    assert malora.p_adjusted < 0.01
    assert malora.delta_high - malora.delta_low < (base.high - base.low) + (malora.high - malora.low)


def test_mmd2_is_the_mean_of_the_layers(three_runs, comparison):
    from lmms_keyspace.records import GramKey
    from lmms_keyspace.stats import mmd2_from_sums
    from lmms_keyspace.store import read_run

    data = read_run(three_runs[0], BASE.date)
    by_layer = [mmd2_from_sums(data.gram[GramKey(TASK, "clean", "k_pre", layer)]).mean() for layer in fake_runs.LAYERS]
    assert row(comparison, "mmd2", "bundled base").value == pytest.approx(np.mean(by_layer))


def test_divergence_by_band_is_the_mean_of_its_layers(comparison):
    """Layers 0 and 1 are early, 2 middle, 3 late."""
    for metric in ("mmd2", "js"):
        of_band = {band: row(comparison, f"{metric}_{band}", "malora") for band in ("early", "middle", "late")}
        mean = (2 * of_band["early"].value + of_band["middle"].value + of_band["late"].value) / 4
        assert row(comparison, metric, "malora").value == pytest.approx(mean)
        change = (2 * of_band["early"].delta + of_band["middle"].delta + of_band["late"].delta) / 4
        assert row(comparison, metric, "malora").delta == pytest.approx(change)
        assert all(band.p_adjusted < 0.05 and band.delta_high < 0 for band in of_band.values())


def test_where_it_looked_when_fooled(comparison):
    """The fake runs look 5 points less at the image and 5 more at the hint where they answer the lure."""
    looked = comparison.looked.set_index(["run", "outcome", "segment"])["value"]
    for run in comparison.runs:
        assert looked[run, "gold", "image"] - looked[run, "lure", "image"] == pytest.approx(0.05)
        assert looked[run, "lure", "hint"] - looked[run, "gold", "hint"] == pytest.approx(0.05)
        assert looked[run, "lure", "question"] == pytest.approx(0.2)
    rows = json.loads(comparison.to_json())["where_it_looked"]
    assert len(rows) == 3 * 2 * 3
    assert {one["task"] for one in rows} == {TASK}
    plain = io.StringIO()
    render_comparison(comparison, Console(file=plain))
    for cell in printed_looks(comparison.looked).iloc[:, 2:].to_numpy().ravel():
        assert cell in plain.getvalue()


def test_js_at_the_ceiling_is_said(comparison):
    assert "ln 2 ceiling in 4 of 4 layers" in row(comparison, "js", "bundled base").note
    assert "ceiling" not in row(comparison, "js", "malora").note
    assert row(comparison, "js", "malora").delta == pytest.approx(0.05 * -0.7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"generator": "2.0:def"}, "generator is 2.0:def"),
        ({"batch_size": 1}, "batch size is 1"),
        ({"task_record": {"prompt_hash": "0" * 64}}, "prompt hash"),
        ({"task_record": {"image_tokens": {"64": 288}}}, "image tokens"),
        ({"record": {"attn_implementation": "eager"}}, "attention implementation is eager"),
        ({"record": {"processor_hash": "1" * 64}}, "processor"),
    ],
)
def test_runs_that_must_not_be_compared(tmp_path, change, reason):
    paths = [fake_runs.write(BASE, tmp_path), fake_runs.write(replace(MALORA, **change), tmp_path)]
    with pytest.raises(InputError, match=reason) as error:
        compare(load_runs(paths))
    assert "--allow-mismatch" in str(error.value)
    allowed = compare(load_runs(paths, allow_mismatch=True))
    assert any(reason in warning for warning in allowed.warnings)


def test_another_task_version_is_refused(tmp_path):
    paths = [fake_runs.write(BASE, tmp_path), fake_runs.write(MALORA, tmp_path)]
    results = next(paths[1].glob("*_results.json"))
    content = json.loads(results.read_text())
    results.write_text(json.dumps(content | {"versions": {TASK: 2.0}}))
    with pytest.raises(InputError, match=r"version is 2\.0"):
        compare(load_runs(paths))


def test_other_bandwidths_leave_the_divergence_uncompared(tmp_path):
    other = replace(MALORA, bandwidth=20.0)
    result = compare(load_runs([fake_runs.write(BASE, tmp_path), fake_runs.write(other, tmp_path)]))
    found = row(result, "mmd2", "malora")
    assert "not comparable across runs" in found.note
    assert np.isnan(found.delta)


def test_no_shared_task_is_refused(tmp_path):
    paths = [fake_runs.write(BASE, tmp_path), fake_runs.write(MALORA, tmp_path)]
    for file in paths[1].glob("*_results.json"):
        file.write_text(file.read_text().replace(TASK, "another"))
    with pytest.raises(InputError, match="shares no task"):
        compare(load_runs(paths))


def test_stock_run_has_accuracy_only(tmp_path):
    paths = [fake_runs.write(replace(run, capture=False), tmp_path) for run in (BASE, LORA)]
    result = compare(load_runs(paths))
    assert set(result.table["unit"]) == {"%"}
    assert not result.table["metric"].str.startswith("image_mass").any()
    assert any("no keys were captured" in warning for warning in result.warnings)


def test_capture_off_is_said(tmp_path):
    folder = fake_runs.write(replace(BASE, record={"capture": False}), tmp_path)
    assert any("capture=off" in warning for warning in compare(load_runs([folder])).warnings)


def test_a_task_that_is_no_probe_is_compared_by_the_harness_metric(tmp_path):
    def rewrite(folder, scores):
        results = next(folder.glob("*_results.json"))
        table = {"alias": "mmmu_val", "acc,none": float(np.mean(scores)), "acc_stderr,none": 0.1, "judge,none": 1500.0}
        results.write_text(
            json.dumps({"results": {"mmmu_val": table, "group": {"alias": "g"}}, "configs": {"mmmu_val": {}}})
        )
        for old in folder.glob("*.jsonl"):
            old.unlink()
        lines = [json.dumps({"doc_id": index, "acc": score}) for index, score in enumerate(scores)]
        results.with_name(f"{BASE.date}_samples_mmmu_val.jsonl").write_text("\n".join(lines))
        return folder

    paths = [
        rewrite(fake_runs.write(replace(BASE, name=name, capture=False), tmp_path), scores)
        for name, scores in (("a", [1.0] * 10 + [0.0] * 10), ("b", [1.0] * 15 + [0.0] * 5))
    ]
    table = compare(load_runs(paths)).table
    assert set(table["metric"]) == {"acc", "judge"}
    found = table[(table["metric"] == "acc") & table["delta"].notna()].iloc[0]
    assert found["delta"] == pytest.approx(0.25)
    assert found["delta_low"] < 0.25 < found["delta_high"]
    judge = table[table["metric"] == "judge"].iloc[0]
    assert "no score by document" in judge["note"]
    assert printed(table)["Value [95 %]"].iloc[-1] == "1500.000"  # a scale of its own is not shown as a percentage


def test_an_output_root_stands_for_the_newest_run_of_each_model(tmp_path):
    for run in (replace(BASE, date="20260101_000000"), BASE, MALORA):
        fake_runs.write(run, tmp_path)
    assert compare(load_runs([tmp_path])).runs == ("bundled base", "malora")


def test_equal_names_get_their_dates(tmp_path):
    paths = [
        fake_runs.write(replace(BASE, name=name, date=date), tmp_path)
        for name, date in (("a", "20260101_000000"), ("b", "20260102_000000"))
    ]
    assert compare(load_runs(paths)).runs == ("bundled base (20260101_000000)", "bundled base (20260102_000000)")


def test_incomplete_groups_and_an_invalid_probe_are_warned_of(tmp_path):
    folder = fake_runs.write(replace(BASE, clean_wrong=20), tmp_path)
    samples = next(folder.glob("*.jsonl"))
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-1]))
    warnings = " ".join(compare(load_runs([folder])).warnings)
    assert "lost 1 incomplete groups" in warnings
    assert "says nothing about this model" in warnings


def test_not_interpretable_is_said(tmp_path):
    folder = fake_runs.write(replace(BASE, task_record={"interpretable": False}), tmp_path)
    assert any("not interpretable" in warning for warning in compare(load_runs([folder])).warnings)


def test_json_holds_the_table_without_nan(comparison):
    content = json.loads(comparison.to_json())
    assert content["runs"] == list(comparison.runs)
    assert len(content["rows"]) == len(comparison.table)
    base = content["rows"][0]
    assert base["delta"] is None
    assert base["value"] == comparison.table.iloc[0]["value"]


def test_terminal_and_pipe_show_the_printed_cells(comparison):
    plain, rich = io.StringIO(), io.StringIO()
    render_comparison(comparison, Console(file=plain))
    render_comparison(comparison, Console(file=rich, force_terminal=True, width=220))
    assert "\x1b" not in plain.getvalue()
    cells = printed(comparison.table)
    for output in (plain.getvalue(), rich.getvalue()):
        for column in ("Value [95 %]", "Change [95 %]"):
            assert all(cell in output for cell in cells[column])
    assert plain.getvalue().splitlines()[4].startswith("Accuracy, clean (%)")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.12345, "%", "12.3"), (float("nan"), "%", "-"), (-0.00001, "%", "0.0"), (0.02, "MMD^2", "0.0200")],
)
def test_numbers(value, unit, text):
    assert number(value, unit) == text


def test_signed_numbers_and_p_values():
    assert number(0.05, "%", signed=True) == "+5.0"
    assert number(0.0, "nats", signed=True) == "0.000"
    assert [p_value(p) for p in (0.0001, 0.0344, 1.0, float("nan"))] == ["<.001", ".034", "1", "-"]


def test_equal_input_gives_equal_output(three_runs, comparison):
    assert compare(load_runs(three_runs)).to_json() == comparison.to_json()


def test_importing_the_reports_loads_nothing_heavy():
    """Neither what the reports do not need, nor what they need for a figure only."""
    code = (
        "import sys, lmms_keyspace.reports; "
        "heavy = {'torch', 'lmms_eval', 'transformers', 'sklearn', 'seaborn', 'matplotlib'}; "
        "found = sorted({name.split('.')[0] for name in sys.modules} & heavy); "
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_p_is_adjusted_over_the_metrics_of_the_verdict_and_over_the_others_apart(comparison):
    table = comparison.table
    judged = table["metric"].isin({"mmd2", "js", "text_flip_rate", "conflict_acc", "vis_gain", "clean_acc"})
    assert 0 < judged.sum() < len(table)
    for family in (table[judged], table[~judged]):
        assert family["p_adjusted"].tolist() == pytest.approx(stats.holm(family["p"]).tolist(), nan_ok=True)


def test_groups_that_share_a_picture_are_drawn_together(tmp_path, comparison):
    """Eight groups to a picture, whose answers agree: the same change on fewer clusters has a wider interval."""
    folders = [fake_runs.write(run, tmp_path) for run in (BASE, LORA)]
    for folder in folders:
        (path,) = folder.glob("*_samples_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps(one | {"cluster": f"picture {int(one['group_id'][1:]) // 8}"}) for one in samples]
        path.write_text("\n".join(lines) + "\n")
    alone, shared = (row(one, "text_flip_rate", "lora") for one in (comparison, compare(load_runs(folders))))
    assert shared.delta == pytest.approx(alone.delta)
    assert shared.delta_high - shared.delta_low > 1.3 * (alone.delta_high - alone.delta_low)
    assert shared.high - shared.low > alone.high - alone.low


def test_conditions_that_are_one_prompt_are_named(tmp_path):
    runs = [replace(run, task_record={"same_prompts": [["after", "before"]]}) for run in (BASE, LORA)]
    found = compare(load_runs([fake_runs.write(run, tmp_path) for run in runs]))
    assert f"lora: {TASK}: after and before are one prompt for this model and differ in nothing" in found.warnings
