"""The controls beside visual against text: equal counts, other text, positions, other kernels, another model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rotated_keys import rotated

from lmms_keyspace import divergence as d
from lmms_keyspace import stats
from lmms_keyspace.divergence import LayerKeys, measure, median_bandwidth2
from lmms_keyspace.divergence.contrasts import Clouds, equal_counts_sums
from lmms_keyspace.divergence.side_by_side import KERNEL_ESTIMATORS, kernel_sums_by_estimator, linear_sums
from lmms_keyspace.records import GramKey

HEADS, WIDTH = 2, 8


def cloud(clusters, tokens, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    names = [f"c{i:02d}" for i in range(clusters) for _ in range(tokens)]
    return torch.randn(clusters * tokens, HEADS, WIDTH, generator=generator) + shift, names


VISUAL, CLUSTERS_VISUAL = cloud(16, 6, seed=0, shift=0.8)
TEXT, CLUSTERS_TEXT = cloud(16, 3, seed=1)
BANDWIDTH2 = median_bandwidth2(VISUAL.transpose(0, 1), TEXT.transpose(0, 1))


def rows_of(space="k_pre", seed=0, **more):
    keys = LayerKeys(0, VISUAL, TEXT, CLUSTERS_VISUAL, CLUSTERS_TEXT, BANDWIDTH2, **more)
    return measure([keys], task="a", condition="clean", space=space, bandwidth_source="", connector="mlp", seed=seed)


def one(table, contrast, estimator="mmd2", head="all"):
    chosen = (table["contrast"] == contrast) & (table["estimator"] == estimator) & (table["head"] == head)
    (row,) = table[chosen].to_dict("records")
    return row


def test_other_kernels_are_those_of_the_public_functions():
    x, y = VISUAL.transpose(0, 1), TEXT.transpose(0, 1)
    groups = {"groups_x": CLUSTERS_VISUAL, "groups_y": CLUSTERS_TEXT}
    sums = kernel_sums_by_estimator(x, y, **groups, bandwidth2=BANDWIDTH2) | {
        "mmd2_linear": linear_sums(x, y, **groups)
    }
    assert set(sums) == set(KERNEL_ESTIMATORS)
    expected = {
        "mmd2": d.mmd2(x, y, **groups, bandwidth2=BANDWIDTH2),
        "mmd2_laplace": d.mmd2_laplace(x, y, **groups, bandwidth2=BANDWIDTH2),
        "energy": d.energy_distance(x, y, **groups),
        "mmd2_linear": d.mmd2_linear(x, y, **groups),
    } | {f"mmd2_scale_{u:g}": d.mmd2(x, y, **groups, bandwidth2=BANDWIDTH2, scales=(u,)) for u in d.SCALES}
    for name, value in expected.items():
        np.testing.assert_allclose(stats.mmd2_from_sums(sums[name]), value, atol=2e-5)
    table = rows_of().table
    for name, value in expected.items():
        assert one(table, "visual-text", name, "1")["value"] == pytest.approx(value[1], abs=2e-5)


def test_point_estimates_are_those_of_the_public_functions():
    x, y = VISUAL.transpose(0, 1), TEXT.transpose(0, 1)
    table, groups = rows_of().table, {"groups_x": CLUSTERS_VISUAL, "groups_y": CLUSTERS_TEXT}
    for name, value in (
        ("centroid_distance", d.centroid_distance(x, y)),
        ("centroid_cosine", d.centroid_cosine(x, y, **groups)),
        ("js_histogram", d.js_histogram(x, y, **groups)),
    ):
        assert one(table, "visual-text", name)["value"] == pytest.approx(value.mean())
    knn = one(table, "visual-text", "js_knn")
    assert 0.02 < knn["value"] < np.log(2)
    assert "principal components" in knn["token_filter"]


def test_text_of_another_task_is_compared_with_the_same_kernel_and_tested():
    near, near_names = cloud(16, 3, seed=2)
    far, far_names = cloud(16, 3, seed=3, shift=0.8)
    found = rows_of(other_text={"near": (near, near_names), "far": (far, far_names)})
    alike, apart = (one(found.table, f"text-text:{name}") for name in ("near", "far"))
    assert alike["ci_low"] < 0 < alike["ci_high"]
    assert alike["p"] > 0.05
    assert apart["ci_low"] > 0
    assert apart["p_adjusted"] == pytest.approx(1 / 1001)
    assert apart["test_family"] == "max-T, 1 tests: layers"
    assert apart["value"] == pytest.approx(one(found.table, "visual-text")["value"], rel=0.3)
    assert (apart["n_visual"], apart["n_text"], apart["n_clusters"]) == (48, 48, 16)
    assert one(found.table, "text-text:far", "js_classifier")["value"] > 0.1
    sums = found.gram[GramKey("a", "clean", "k_pre", 0, contrast="text-text:far")]
    assert stats.mmd2_from_sums(sums).mean() == pytest.approx(apart["value"])


def test_equal_counts_draw_as_many_of_both_in_every_cluster():
    whole = Clouds.of(VISUAL, TEXT, CLUSTERS_VISUAL, CLUSTERS_TEXT)
    sums = equal_counts_sums(whole, BANDWIDTH2, seed=0)
    np.testing.assert_array_equal(sums.n_visual, np.full(16, 3))
    np.testing.assert_array_equal(sums.n_visual, sums.n_text)
    row, main = (one(rows_of().table, contrast) for contrast in ("visual-text:equal-counts", "visual-text"))
    assert (row["n_visual"], row["n_text"]) == (48, 48)
    assert row["ci_low"] < main["value"] < row["ci_high"]
    again = equal_counts_sums(whole, BANDWIDTH2, seed=1)
    assert stats.mmd2_from_sums(again) == pytest.approx(stats.mmd2_from_sums(sums), abs=0.05)
    assert not np.array_equal(again.vv, sums.vv)


def test_positions_alone_part_rotated_keys_of_equal_content_as_much_as_the_null_says():
    """Equal content with an offset that all keys share; image places and text places do not overlap."""
    (visual, names_visual), (text, names_text) = (cloud(16, n, seed, shift=3.0) for n, seed in ((6, 0), (3, 1)))
    places_visual = torch.arange(6).repeat(16).float()
    places_text = torch.arange(6, 9).repeat(16).float()
    after = rotated(visual, places_visual), rotated(text, places_text)
    keys = LayerKeys(
        0,
        *after,
        names_visual,
        names_text,
        median_bandwidth2(*(cloud.transpose(0, 1) for cloud in after)),
        unrotated=(visual, text),
    )
    table = measure(
        [keys], task="a", condition="clean", space="k_post", bandwidth_source="", connector="mlp", seed=0
    ).table
    gap, null = one(table, "visual-text"), one(table, "position-null")
    assert gap["ci_low"] > 0.1
    assert null["value"] == pytest.approx(gap["value"], rel=0.1)
    unrotated = rows_of(unrotated=(VISUAL, TEXT)).table  # keys after RoPE that RoPE did not turn: places say nothing
    assert abs(one(unrotated, "position-null")["value"]) < 0.02
    assert one(unrotated, "visual-text")["value"] > 0.1


def test_keys_of_the_base_model_at_the_same_tokens():
    turned = (-VISUAL.flip(-1) * 2 + 1, TEXT @ torch.diag(torch.linspace(0.1, 3, WIDTH)))
    table = rows_of(base=turned).table
    assert one(table, "base-adapted:visual", "linear_cka")["value"] == pytest.approx(1, abs=1e-6)
    assert 0.3 < one(table, "base-adapted:text", "linear_cka")["value"] < 0.99
