"""The divergence table: which rows there are, what they hold, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lmms_keyspace import records, stats
from lmms_keyspace.divergence import (
    LayerKeys,
    js_classifier,
    kernel_sums,
    measure,
    median_bandwidth2,
    mmd2,
    paper_protocol,
)
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import GramKey

LABELS = {
    "task": "probe",
    "condition": "conflict",
    "space": "k_pre",
    "bandwidth_source": "self",
    "connector": "mlp",
}


def keys(images, tokens, seed, shift=0.0, layers=(0, 3), heads=2, width=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(images * tokens, heads, width, generator=generator) + shift * (layer + 1) for layer in layers
    }


def clusters(images, tokens):
    return [f"image{i:02d}" for i in range(images) for _ in range(tokens)]


VISUAL, TEXT = keys(12, 5, seed=0), keys(12, 4, seed=1, shift=0.3)
CLUSTERS = {"clusters_visual": clusters(12, 5), "clusters_text": clusters(12, 4)}
POINTS = ("centroid_distance", "centroid_cosine", "js_histogram", "js_knn")


def bandwidths(visual, text):
    return {layer: median_bandwidth2(visual[layer].transpose(0, 1), text[layer].transpose(0, 1)) for layer in text}


BANDWIDTHS = bandwidths(VISUAL, TEXT)


def run(
    visual=VISUAL,
    text=TEXT,
    seed=0,
    clusters_visual=CLUSTERS["clusters_visual"],
    clusters_text=CLUSTERS["clusters_text"],
    bandwidth2=BANDWIDTHS,
    **more,
):
    layers = [
        LayerKeys(
            layer,
            visual[layer],
            text[layer],
            clusters_visual,
            clusters_text,
            bandwidth2[layer],
            **{name: by_layer[layer] for name, by_layer in more.items()},
        )
        for layer in sorted(text)
    ]
    return measure(layers, **LABELS, seed=seed)


def test_every_layer_head_contrast_and_estimator_has_one_row():
    table, gram, _ = run()
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == dict(records.DIVERGENCE_COLUMNS)
    assert (table["note"] == "").all()
    main = table[table["estimator"].isin(records.MAIN_ESTIMATORS) & table["contrast"].isin(records.CONTRASTS)]
    assert len(main) == 2 * 3 * (3 * 2 + 2)  # layers, contrasts, heads with `all` x estimators, paper's estimators
    assert not table.duplicated(["layer", "head", "contrast", "estimator"]).any()
    assert set(table["head"]) == {"all", "0", "1"}
    assert table["value"].notna().all()
    is_paper = table["estimator"].str.startswith("paper_")
    assert set(table.loc[is_paper, "head"]) == {"all"}
    assert table.loc[is_paper, ["ci_low", "ci_high"]].isna().all(axis=None)
    table = table[~is_paper & ~table["estimator"].isin(POINTS)]
    assert table[["ci_low", "ci_high"]].notna().all(axis=None)
    assert ((table["ci_low"] <= table["value"]) & (table["value"] <= table["ci_high"])).mean() > 0.9
    assert set(gram) == {GramKey("probe", "conflict", "k_pre", layer) for layer in (0, 3)}


def test_values_are_the_estimators_on_that_head():
    table, gram, _ = run(seed=4)
    table = table.set_index(["layer", "head", "contrast", "estimator"])["value"]
    x, y = VISUAL[3].transpose(0, 1), TEXT[3].transpose(0, 1)
    groups = {"groups_x": CLUSTERS["clusters_visual"], "groups_y": CLUSTERS["clusters_text"]}
    by_head = mmd2(x, y, bandwidth2=BANDWIDTHS[3], **groups)
    js = js_classifier(x, y, seed=4, **groups).value
    for h in range(2):
        assert table[3, str(h), "visual-text", "mmd2"] == pytest.approx(by_head[h], abs=1e-7)
        assert table[3, str(h), "visual-text", "js_classifier"] == pytest.approx(js[h], abs=1e-6)
    assert table[3, "all", "visual-text", "mmd2"] == pytest.approx(by_head.mean(), abs=1e-7)
    assert table[3, "all", "visual-text", "js_classifier"] == pytest.approx(js.mean(), abs=1e-6)
    sums = gram[GramKey("probe", "conflict", "k_pre", 3)]
    np.testing.assert_allclose(sums.vt, kernel_sums(x, y, bandwidth2=BANDWIDTHS[3], **groups).vt, rtol=1e-6)
    for contrast, half in zip(("visual-visual", "text-text"), stats.split_half_mmd2(sums, 4), strict=True):
        assert table[3, "1", contrast, "mmd2"] == pytest.approx(half.value[1])


def test_the_interval_of_all_heads_is_that_of_their_mean():
    """Heads err independently here, so the mean's interval is narrower than the mean of the intervals."""
    visual, text = keys(30, 5, 0, heads=8), keys(30, 5, 1, heads=8, shift=0.5)
    names = {"clusters_visual": clusters(30, 5), "clusters_text": clusters(30, 5)}
    table, _, _ = run(visual, text, bandwidth2=bandwidths(visual, text), **names)
    table = table.query("contrast == 'visual-text'").assign(width=table["ci_high"] - table["ci_low"])
    for _, rows in table.dropna(subset="width").groupby(["layer", "estimator"]):
        is_all = rows["head"] == "all"
        assert rows.loc[is_all, "width"].item() < 0.6 * rows.loc[~is_all, "width"].mean()


def test_a_shift_shows_in_the_contrast_and_not_in_the_baselines():
    visual, text = keys(24, 8, 0), keys(24, 8, 1, shift=0.5)
    names = {"clusters_visual": clusters(24, 8), "clusters_text": clusters(24, 8)}
    table, _, _ = run(visual, text, bandwidth2=bandwidths(visual, text), **names)
    table = table[table["head"] == "all"].set_index(["layer", "contrast", "estimator"])
    for layer in (0, 3):
        for estimator in ("mmd2", "js_classifier"):
            rows = table.xs((layer, estimator), level=("layer", "estimator"))
            assert rows.loc["visual-text", "ci_low"] > 0
            assert rows.loc["visual-text", "ci_low"] > rows.loc[["visual-visual", "text-text"], "value"].max()
            assert (rows.loc[["visual-visual", "text-text"], "ci_low"] < 0.002).all()
    assert table.loc[(0, "visual-text", "mmd2"), "value"] < table.loc[(3, "visual-text", "mmd2"), "value"]
    assert not table.xs("mmd2", level="estimator")["at_ceiling"].any()


def test_the_test_of_visual_against_text_is_the_permutation_test_of_the_saved_sums():
    """Of a null head between heads with a gap; max-T over layers and heads, and over layers for their mean."""
    visual, text = keys(12, 5, 0, heads=3), keys(12, 4, 1, heads=3)
    text[0] = text[0] + torch.tensor([0.0, 1.0, 1.0])[:, None]
    table, gram, _ = run(visual, text, bandwidth2=bandwidths(visual, text), seed=3)
    is_tested = (table["contrast"] == "visual-text") & (table["estimator"] == "mmd2")
    tested, other = table[is_tested], table[~is_tested]
    assert other[["null_mean", "p", "p_adjusted"]].isna().all(axis=None)
    assert (other["n_permutations"] == 0).all()
    assert (other["test_family"] == "").all()
    assert (tested["n_permutations"] == 1000).all()
    heads = tested[tested["head"] != "all"]
    assert set(heads["test_family"]) == {"max-T, 6 tests: layers and KV heads"}
    assert set(tested.loc[tested["head"] == "all", "test_family"]) == {"max-T, 2 tests: layers"}
    for layer in (0, 3):
        rows = heads[heads["layer"] == layer]
        alone = stats.permutation_test(gram[GramKey("probe", "conflict", "k_pre", layer)], seed=3)
        np.testing.assert_allclose(rows["p"], alone.p)
        np.testing.assert_allclose(rows["null_mean"], alone.null_mean)
    stacked = [gram[GramKey("probe", "conflict", "k_pre", layer)] for layer in (0, 3)]
    together = stats.permutation_test(
        replace(stacked[0], **{name: np.stack([getattr(s, name) for s in stacked]) for name in ("vv", "tt", "vt")}),
        seed=3,
    )
    np.testing.assert_allclose(heads["p_adjusted"], together.p_adjusted.ravel())
    assert tested.set_index(["layer", "head"]).loc[[(0, "1"), (0, "2"), (0, "all")], "p_adjusted"].max() < 0.004
    assert tested.set_index(["layer", "head"]).loc[(0, "0"), "p"] > 0.01


def test_the_papers_rows_are_its_pipeline_on_all_heads_together():
    table, _, _ = run(seed=2)
    rows = table.set_index(["layer", "contrast", "estimator"])
    x, y = (keys[3].flatten(start_dim=1) for keys in (VISUAL, TEXT))
    expected = paper_protocol(x, y, seed=2)
    assert rows.loc[(3, "visual-text", "paper_mmd"), "value"].item() == pytest.approx(expected.mmd)
    assert rows.loc[(3, "visual-text", "paper_js_histogram"), "value"].item() == pytest.approx(expected.js)
    counts = rows.xs("paper_mmd", level="estimator").loc[3, ["n_visual", "n_text", "n_clusters"]]
    assert counts.loc["visual-text"].tolist() == [48, 48, 12]
    assert counts.loc["text-text"].tolist() == [24, 24, 12]
    assert set(rows.xs("paper_mmd", level="estimator")["bandwidth_source"]) == {"median of the tokens compared"}


def test_equal_visual_tokens_leave_out_the_papers_baseline_and_nothing_else():
    """A gray picture may give every visual token one key; the run that was made must not be lost by it."""
    gray = {layer: torch.full_like(cloud, 0.5) for layer, cloud in VISUAL.items()}
    table, _, _ = run(visual=gray)
    rows = table.groupby(["estimator", "contrast"]).size()
    assert rows["paper_mmd", "text-text"] == 2
    assert rows["mmd2", "visual-visual"] == rows["mmd2", "visual-text"] == 2 * 3
    missing = table[table["value"].isna()]
    assert set(zip(missing["estimator"], missing["contrast"], strict=True)) == {
        ("paper_mmd", "visual-visual"),
        ("paper_js_histogram", "visual-visual"),
    }
    assert missing["note"].str.contains("constant keys").all()


def test_counts_are_those_of_the_two_sides():
    table, _, _ = run()
    counts = table.drop_duplicates("contrast").set_index("contrast")[["n_visual", "n_text", "n_clusters"]]
    assert counts.loc["visual-text"].tolist() == [60, 48, 12]
    assert counts.loc["visual-visual"].tolist() == [30, 30, 12]
    assert counts.loc["text-text"].tolist() == [24, 24, 12]


def reasons(table):
    """Contrast -> the notes of its rows without a value."""
    missing = table[table["value"].isna()]
    assert (missing["note"] != "").all()
    assert (missing["head"] == "all").all()
    assert (table.loc[table["value"].notna(), "note"] == "").all()
    return {contrast: " ".join(rows["note"]) for contrast, rows in missing.groupby("contrast")}


def test_without_an_image_only_the_text_baseline_is_measured_and_the_rest_says_why():
    empty = {layer: cloud[:0] for layer, cloud in VISUAL.items()}
    table, gram, _ = run(empty, clusters_visual=[])
    computed = table[table["value"].notna()]
    assert set(computed["contrast"]) == {"text-text"}
    assert set(records.MAIN_ESTIMATORS) <= set(computed["estimator"])
    notes = reasons(table)
    assert set(notes) == {"visual-text", "visual-visual", "visual-text:equal-counts"}
    assert all("tokens in 0 clusters" in note for note in notes.values())
    assert all(not sums.n_visual.any() for sums in gram.values())


@pytest.mark.parametrize(
    ("images", "contrasts"), [(1, set()), (3, set()), (5, {"visual-text"}), (6, set(records.CONTRASTS))]
)
def test_too_few_images_have_rows_that_say_so(images, contrasts):
    visual, text = keys(images, 5, 0), keys(images, 4, 1)
    table, gram, _ = run(visual, text, clusters_visual=clusters(images, 5), clusters_text=clusters(images, 4))
    for estimator in records.MAIN_ESTIMATORS:
        rows = table[(table["estimator"] == estimator) & table["contrast"].isin(records.CONTRASTS)]
        assert set(rows["contrast"]) == set(records.CONTRASTS)
        assert set(rows.loc[rows["value"].notna(), "contrast"]) == contrasts
    assert all("clusters" in note for note in reasons(table).values())
    assert len(gram) == 2


def test_the_order_of_tokens_does_not_matter():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = {layer: k[order] for layer, k in VISUAL.items()}
    table, _, _ = run()
    again, _, _ = run(shuffled, clusters_visual=[CLUSTERS["clusters_visual"][i] for i in order])
    # These draw tokens by their position: the paper's pipeline, equal counts, and neighbors of the larger side.
    drawn = table["estimator"].str.startswith("paper_") | table["contrast"].eq(records.EQUAL_COUNTS)
    robust = ~drawn & table["estimator"].ne("js_knn")
    np.testing.assert_allclose(again["value"][robust], table["value"][robust], atol=1e-5)


NAN = VISUAL | {3: VISUAL[3].index_fill(0, torch.tensor([1, 2]), torch.nan)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"visual": NAN}, "keys of layer 3, x='4 vectors with NaN or inf'"),
        ({"text": TEXT | {3: TEXT[3] * torch.inf}}, "keys of layer 3, y='96 vectors with NaN or inf'"),
        ({"text": TEXT | {3: TEXT[3][..., :2]}}, "keys of layer 3, y="),
        ({"text": TEXT | {3: TEXT[3][:, :1]}}, "keys of layer 3, y="),
        ({"bandwidth2": BANDWIDTHS | {3: InputError("reference", "layer 3", "it did not measure it")}}, "did not"),
    ],
)
def test_a_layer_that_cannot_be_measured_says_why_and_the_others_are(change, named):
    whole, _, _ = run()
    table, gram, _ = run(**change)
    bad, good = table[table["layer"] == 3], table[table["layer"] == 0]
    pd.testing.assert_frame_equal(
        good.drop(columns=["p_adjusted", "test_family"]).reset_index(drop=True),
        whole[whole["layer"] == 0].drop(columns=["p_adjusted", "test_family"]).reset_index(drop=True),
    )
    missing = bad[(bad["contrast"] == "visual-text") & (bad["estimator"] == "mmd2")]
    assert missing["value"].isna().all()
    assert named in missing["note"].item()
    assert {key.layer for key in gram} == {0}


def test_without_a_bandwidth_what_needs_none_is_computed():
    table, _, losses = run(bandwidth2=dict.fromkeys(TEXT, InputError("x", "constant keys", "no bandwidth")))
    computed = set(table.loc[table["value"].notna(), "estimator"])
    assert {"js_classifier", "paper_mmd", "centroid_distance", "js_histogram", "js_knn"} <= computed
    assert "mmd2" not in computed
    assert len(losses) == 2


def test_the_losses_give_the_classifier_rows_again():
    table, _, losses = run(seed=5)
    rows = table[(table["estimator"] == "js_classifier") & (table["contrast"] == "visual-text")]
    for layer in (0, 3):
        loss = losses[GramKey("probe", "conflict", "k_pre", layer)]
        by_head = rows[(rows["layer"] == layer) & (rows["head"] != "all")]
        np.testing.assert_allclose(stats.js_from_losses(loss), by_head["value"])
        again = stats.js_bootstrap(loss, seed=5)
        np.testing.assert_allclose((again.low, again.high), by_head[["ci_low", "ci_high"]].to_numpy().T)
