"""The functional link: slopes are those of a regression done by hand, and the words say what the numbers say."""

from dataclasses import replace

import fake_runs
import numpy as np
import pandas as pd
import pytest
from fake_runs import BASE, LAYERS, LORA, TASK

from lmms_keyspace.reports import load_runs
from lmms_keyspace.reports.functional import ADVANTAGE, CHANGE, EVERY, LSE_GAP, MASS, WITHIN, functional_link, summary
from lmms_keyspace.reports.sections.link import link


@pytest.fixture(scope="module")
def runs(three_runs):
    return load_runs(three_runs).runs


@pytest.fixture(scope="module")
def table(runs):
    return functional_link(runs, TASK)


def chosen(table, **where) -> pd.DataFrame:
    return table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]


def test_the_advantage_is_the_difference_of_the_scaled_means(runs, table):
    """By hand: the slope of the outcome on qk_visual - qk_text in the conflict condition, per standard deviation."""
    attention, samples = runs[0].loaded.data.attention, runs[0].loaded.samples[TASK]
    rows = attention[(attention["condition"] == "conflict") & (attention["layer"] == 3)].sort_values("doc_id")
    x = (rows["qk_visual"] - rows["qk_text"]).to_numpy(dtype=float)
    y = samples.set_index("doc_id").loc[rows["doc_id"], "correct"].to_numpy()
    slope = np.polyfit(x, y, 1)[0] * x.std()
    found = chosen(table, run="bundled base", link=WITHIN, condition="conflict", predictor=ADVANTAGE, layer=3)
    assert found["value"].item() == pytest.approx(slope)
    assert found["mean"].item() == pytest.approx(x.mean())
    assert found["ci_low"].item() < slope < found["ci_high"].item()


def test_a_change_is_that_of_the_same_document(runs, table):
    """lora answers 12 of the base's 20 flips by the image; its advantage rises on exactly those from layer 1 on."""
    found = chosen(table, run="lora", link=CHANGE, condition="conflict", predictor=ADVANTAGE).set_index("layer")
    assert found.loc[0, "spread"] == pytest.approx(0, abs=1e-6)
    assert found.loc[1:, "value"].tolist() == pytest.approx([np.sqrt(12 / 48 * 36 / 48)] * 3, rel=1e-3)
    assert (found["documents"] == 48).all()
    assert chosen(table, run="bundled base", link=CHANGE).empty


def test_links_conditions_and_measures_that_the_run_allows(table):
    assert set(table["predictor"]) == {MASS, ADVANTAGE, LSE_GAP}
    assert set(table["condition"]) == {"conflict", EVERY}
    assert sorted(set(table["layer"])) == list(LAYERS)
    tested = table[table["p"].notna()]
    assert (tested["p_adjusted"] >= tested["p"]).all()


def test_a_constant_measure_has_no_slope(table):
    gap = chosen(table, run="bundled base", link=WITHIN, predictor=LSE_GAP)
    assert gap["value"].isna().all()
    assert gap["p_adjusted"].isna().all()


def test_outcomes_that_do_not_vary_are_said_and_not_tested(tmp_path):
    paths = [fake_runs.write(replace(run, flips=0, clean_wrong=0), tmp_path) for run in (BASE, LORA)]
    table = functional_link(load_runs(paths).runs, TASK)
    conflict = chosen(table, condition="conflict")
    assert conflict["p"].isna().all()
    assert set(conflict["note"]) == {"every document has the same outcome"}
    part = link(load_runs(paths).runs, TASK)
    assert any("not computed (every document has the same outcome)" in point for point in part.points)


def test_too_few_clusters_are_said(tmp_path):
    path = fake_runs.write(replace(BASE, groups=8), tmp_path)
    table = functional_link(load_runs([path]).runs, TASK)
    assert table["value"].isna().all()
    assert table["note"].str.contains("10 clusters or more").all()


def test_the_summary_counts_layers_and_the_words_repeat_it(runs, table):
    short = summary(table)
    row = chosen(short, run="bundled base", link=WITHIN, condition="conflict", predictor=ADVANTAGE).iloc[0]
    slopes = chosen(table, run="bundled base", link=WITHIN, condition="conflict", predictor=ADVANTAGE)
    assert row["layers"] == len(LAYERS)
    assert row["positive"] == ((slopes["p_adjusted"] < 0.05) & (slopes["value"] > 0)).sum() > 0
    assert row["value"] == slopes.loc[slopes["p"].idxmin(), "value"]
    part = link(runs, TASK)
    (said,) = (point for point in part.points if point.startswith("bundled base") and ADVANTAGE in point)
    assert f"more often, in {row['positive']:.0f} of {row['layers']} layers" in said
    assert f"{100 * row['value']:+.1f} points" in said


def test_single_heads_do_not_take_documents_from_the_rest(runs):
    """Rows by KV head exist for the captured documents only."""
    data = runs[0].loaded.data
    few = data.attention[data.attention["doc_id"] < 72].assign(head_group="0")
    both = replace(data, attention=pd.concat([data.attention, few], ignore_index=True))
    run = replace(runs[0], loaded=replace(runs[0].loaded, data=both))
    table = functional_link([run], TASK)
    together, single = chosen(table, heads="all"), chosen(table, heads="0")
    assert set(chosen(together, condition="conflict")["documents"]) == {48}
    assert set(chosen(single, condition="conflict")["documents"]) == {12}
    pd.testing.assert_frame_equal(together.reset_index(drop=True), functional_link([runs[0]], TASK), check_dtype=False)


def test_a_run_without_capture_has_no_link(tmp_path):
    path = fake_runs.write(replace(BASE, capture=False), tmp_path)
    assert functional_link(load_runs([path]).runs, TASK).empty
