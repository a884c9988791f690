"""The divergence table: which rows there are, what they hold, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lmms_keyspace import records, stats
from lmms_keyspace.divergence import js_classifier, kernel_sums, measure, mmd2, paper_protocol, reference_bandwidths
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import GramKey

LABELS = {
    "task": "probe",
    "condition": "conflict",
    "space": "k_pre",
    "bandwidth_source": "self",
    "connector": "mlp",
    "token_filter": "none",
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
BANDWIDTHS = reference_bandwidths(VISUAL, TEXT)


def run(visual=VISUAL, text=TEXT, seed=0, **change):
    return measure(visual, text, **(LABELS | CLUSTERS | {"bandwidth2": BANDWIDTHS} | change), seed=seed)


def test_every_layer_head_contrast_and_estimator_has_one_row():
    table, gram = run()
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == dict(records.DIVERGENCE_COLUMNS)
    assert len(table) == 2 * 3 * (3 * 2 + 2)  # layers, contrasts, heads with `all` x estimators, paper's estimators
    assert not table.duplicated(["layer", "head", "contrast", "estimator"]).any()
    assert set(table["head"]) == {"all", "0", "1"}
    assert table["value"].notna().all()
    is_paper = table["estimator"].str.startswith("paper_")
    assert set(table.loc[is_paper, "head"]) == {"all"}
    assert table.loc[is_paper, ["ci_low", "ci_high"]].isna().all(axis=None)
    table = table[~is_paper]
    assert table[["ci_low", "ci_high"]].notna().all(axis=None)
    assert ((table["ci_low"] <= table["value"]) & (table["value"] <= table["ci_high"])).mean() > 0.9
    assert set(gram) == {GramKey("probe", "conflict", "k_pre", layer) for layer in (0, 3)}


def test_values_are_the_estimators_on_that_head():
    table, gram = run(seed=4)
    table = table.set_index(["layer", "head", "contrast", "estimator"])["value"]
    x, y = VISUAL[3].transpose(0, 1), TEXT[3].transpose(0, 1)
    groups = {"groups_x": CLUSTERS["clusters_visual"], "groups_y": CLUSTERS["clusters_text"]}
    by_head = mmd2(x, y, bandwidth2=BANDWIDTHS[3], **groups)
    js = js_classifier(x, y, seed=4, **groups).value
    for h in range(2):
        assert table[3, str(h), "visual-text", "mmd2"] == pytest.approx(by_head[h], abs=1e-9)
        assert table[3, str(h), "visual-text", "js_classifier"] == pytest.approx(js[h], abs=1e-6)
    assert table[3, "all", "visual-text", "mmd2"] == pytest.approx(by_head.mean(), abs=1e-9)
    assert table[3, "all", "visual-text", "js_classifier"] == pytest.approx(js.mean(), abs=1e-6)
    sums = gram[GramKey("probe", "conflict", "k_pre", 3)]
    np.testing.assert_allclose(sums.vt, kernel_sums(x, y, bandwidth2=BANDWIDTHS[3], **groups).vt)
    for contrast, half in zip(("visual-visual", "text-text"), stats.split_half_mmd2(sums, 4), strict=True):
        assert table[3, "1", contrast, "mmd2"] == pytest.approx(half.value[1])


def test_the_interval_of_all_heads_is_that_of_their_mean():
    """Heads err independently here, so the mean's interval is narrower than the mean of the intervals."""
    visual, text = keys(30, 5, 0, heads=8), keys(30, 5, 1, heads=8, shift=0.5)
    names = {"clusters_visual": clusters(30, 5), "clusters_text": clusters(30, 5)}
    table, _ = run(visual, text, bandwidth2=reference_bandwidths(visual, text), **names)
    table = table.query("contrast == 'visual-text'").assign(width=table["ci_high"] - table["ci_low"])
    for _, rows in table.dropna(subset="width").groupby(["layer", "estimator"]):
        is_all = rows["head"] == "all"
        assert rows.loc[is_all, "width"].item() < 0.6 * rows.loc[~is_all, "width"].mean()


def test_a_shift_shows_in_the_contrast_and_not_in_the_baselines():
    visual, text = keys(24, 8, 0), keys(24, 8, 1, shift=0.5)
    names = {"clusters_visual": clusters(24, 8), "clusters_text": clusters(24, 8)}
    table, _ = run(visual, text, bandwidth2=reference_bandwidths(visual, text), **names)
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
    table, gram = run(visual, text, bandwidth2=reference_bandwidths(visual, text), seed=3)
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
    table, _ = run(seed=2)
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
    table, _ = run(visual=gray)
    rows = table.groupby(["estimator", "contrast"]).size()
    assert ("paper_mmd", "visual-visual") not in rows.index
    assert rows["paper_mmd", "text-text"] == 2
    assert rows["mmd2", "visual-visual"] == rows["mmd2", "visual-text"] == 2 * 3
    assert np.isfinite(table["value"]).all()


def test_counts_are_those_of_the_two_sides():
    table, _ = run()
    counts = table.drop_duplicates("contrast").set_index("contrast")[["n_visual", "n_text", "n_clusters"]]
    assert counts.loc["visual-text"].tolist() == [60, 48, 12]
    assert counts.loc["visual-visual"].tolist() == [30, 30, 12]
    assert counts.loc["text-text"].tolist() == [24, 24, 12]


@pytest.mark.parametrize("empty", [{}, {0: VISUAL[0][:0], 3: VISUAL[3][:0]}])
def test_without_an_image_only_the_text_baseline_is_measured(empty):
    table, gram = run(empty, clusters_visual=[])
    assert set(table["contrast"]) == {"text-text"}
    assert set(table["estimator"]) == {"mmd2", "js_classifier", "paper_mmd", "paper_js_histogram"}
    assert all(not sums.n_visual.any() for sums in gram.values())


@pytest.mark.parametrize(("images", "contrasts"), [(3, set()), (5, {"visual-text"}), (6, set(records.CONTRASTS))])
def test_too_few_images_have_no_row(images, contrasts):
    visual, text = keys(images, 5, 0), keys(images, 4, 1)
    table, gram = run(visual, text, clusters_visual=clusters(images, 5), clusters_text=clusters(images, 4))
    for estimator in ("mmd2", "js_classifier", "paper_mmd", "paper_js_histogram"):
        assert set(table.loc[table["estimator"] == estimator, "contrast"]) == contrasts
    assert list(table.columns) == list(records.DIVERGENCE_COLUMNS)
    assert len(gram) == 2


def test_the_order_of_tokens_does_not_matter():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = {layer: k[order] for layer, k in VISUAL.items()}
    table, _ = run()
    again, _ = run(shuffled, clusters_visual=[CLUSTERS["clusters_visual"][i] for i in order])
    robust = ~table["estimator"].str.startswith("paper_")  # the paper's pipeline draws tokens by their position
    np.testing.assert_allclose(again["value"][robust], table["value"][robust], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"visual": VISUAL | {3: VISUAL[3].index_fill(0, torch.tensor([1, 2]), torch.nan)}},
            "layer 3, x='4 vectors",
        ),
        ({"bandwidth2": {0: BANDWIDTHS[0]}}, "layer 3"),
        ({"text": TEXT | {3: TEXT[3][..., :2]}}, "layer 3"),
        ({"clusters_text": clusters(11, 4)}, "44 groups"),
        ({"bandwidth2": BANDWIDTHS | {3: np.zeros(2)}}, "bandwidth2"),
    ],
)
def test_bad_input_is_named(change, named):
    with pytest.raises(InputError, match=named):
        run(**change)


def test_constant_keys_have_no_bandwidth():
    constant = {layer: torch.ones_like(k) for layer, k in VISUAL.items()}
    with pytest.raises(InputError, match=r"layer 0.*constant"):
        reference_bandwidths(constant, constant)


def test_bandwidths_are_per_layer_and_head():
    wide = {layer: k * torch.tensor([1.0, 3.0])[:, None] for layer, k in VISUAL.items()}
    bandwidths = reference_bandwidths(wide, wide)
    assert {layer: b.shape for layer, b in bandwidths.items()} == {0: (2,), 3: (2,)}
    assert bandwidths[0][1] / bandwidths[0][0] == pytest.approx(9, rel=0.2)
    assert {layer: b.shape for layer, b in reference_bandwidths({}, TEXT).items()} == {0: (2,), 3: (2,)}
