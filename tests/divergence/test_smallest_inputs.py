"""The least that estimators work from, what they say of less, and the settings that their versions stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_clouds import clouds
from rotated_keys import rotated
from sklearn.decomposition import PCA
from sklearn.feature_selection import mutual_info_classif

from lmms_keyspace.divergence import (
    JSClassifier,
    LayerKeys,
    PaperProtocol,
    block_permutation_test,
    js_classifier,
    js_knn,
    linear_cka,
    measure,
    median_bandwidth2,
    mmd2_biased,
    mmd_biased,
    reference_bandwidths,
)
from lmms_keyspace.divergence import contrasts as contrasts_module
from lmms_keyspace.divergence.arrays import center, group_codes
from lmms_keyspace.divergence.contrasts import position_null_sums
from lmms_keyspace.divergence.knn import _ROWS
from lmms_keyspace.divergence.measure import N_PERMUTATIONS
from lmms_keyspace.divergence.rotation import Rotation
from lmms_keyspace.errors import InputError


def test_a_number_is_no_cloud_and_a_vector_is_none_either():
    for shape in ((), (5,)):
        with pytest.raises(InputError, match=r"\[\.\.\., n, d\]"):
            linear_cka(np.ones(shape), np.ones((4, 5)))


def test_groups_that_do_not_fit_say_how_many_are_needed():
    x, y, groups = clouds(0, 1, 3, 2, 4)
    with pytest.raises(InputError, match="of each of the 6 vectors"):
        group_codes(torch.from_numpy(x), torch.from_numpy(y), groups[:-1], groups)


def test_clouds_are_moved_to_the_mean_of_all_their_vectors():
    x, y, _ = clouds(1, 2, 5, 4, 3, shift=7.0)
    moved_x, moved_y = center(torch.from_numpy(x[:, :13] + 50), torch.from_numpy(y + 50))
    np.testing.assert_allclose(torch.cat([moved_x, moved_y], dim=1).mean(dim=1), 0, atol=1e-12)
    np.testing.assert_allclose(moved_x[:, 0] - moved_y[:, 0], x[:, 0] - y[:, 0])


def test_two_vectors_have_a_bandwidth_and_one_has_none():
    one, other = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])
    assert median_bandwidth2(one, other) == pytest.approx(25)
    with pytest.raises(InputError, match="1 vectors"):
        median_bandwidth2(one, other[:0])


def test_a_layer_that_only_one_modality_has_gets_a_bandwidth_too():
    keys = torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(0))
    bandwidths = reference_bandwidths({0: keys}, {0: keys + 1, 3: keys})
    assert sorted(bandwidths) == [0, 3]
    np.testing.assert_allclose(bandwidths[3], median_bandwidth2(keys.transpose(0, 1), keys.transpose(0, 1)[:, :0]))


def test_errors_name_the_layer():
    keys = torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError) as error:
        reference_bandwidths({4: keys}, {4: torch.full_like(keys, torch.nan)})
    assert error.value.argument == "keys of layer 4, y"
    with pytest.raises(InputError) as error:
        reference_bandwidths({4: torch.ones_like(keys)}, {4: torch.ones_like(keys)})
    assert error.value.argument == "keys of layer 4"
    assert "heads [0, 1]" in str(error.value)


def test_the_biased_estimate_takes_the_median_distance_where_no_bandwidth_is_given():
    x, y, _ = clouds(8, 2, 20, 1, 3, shift=1.0)
    np.testing.assert_allclose(mmd2_biased(x, y), mmd2_biased(x, y, bandwidth2=median_bandwidth2(x, y)))


def test_the_biased_estimate_needs_one_vector_a_side():
    one, other = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])
    assert mmd2_biased(one, other, bandwidth2=25.0, scales=(1.0,)) == pytest.approx(2 - 2 * np.exp(-1))
    assert mmd_biased(one, other, bandwidth2=25.0, scales=(1.0,)) == pytest.approx((2 - 2 * np.exp(-1)) ** 0.5)


def test_one_neighbor_is_enough():
    x, y, _ = clouds(2, 1, 120, 1, 1, shift=1.5)
    expected = mutual_info_classif(np.concatenate([x[0], y[0]]), np.repeat([0, 1], 120), n_neighbors=1, random_state=0)
    assert js_knn(x, y, k=1)[0] == pytest.approx(expected[0], abs=1e-6)


def test_neighbors_are_found_across_the_rows_of_distances_that_are_held_at_a_time():
    """Two copies of one cloud, far from each other: each finds its neighbors among its own."""
    size = _ROWS // 2 + 10
    x, y, _ = clouds(3, 1, size, 1, 2, shift=1.0)
    twice_x, twice_y = (np.concatenate([cloud, cloud + 1e3], axis=1) for cloud in (x, y))
    # All counts are those of one copy; only the number of vectors doubles.
    lost = js_knn(twice_x, twice_y)[0] - js_knn(x, y)[0]
    assert abs(lost) < 1e-3


def test_neighbors_of_the_table_are_those_on_scikit_learns_components():
    x, y, groups = clouds(4, 1, 20, 4, 9, shift=1.0)
    x, y = x * np.linspace(3, 0.5, 9), y * np.linspace(3, 0.5, 9)
    visual, text = (torch.from_numpy(cloud).transpose(0, 1) for cloud in (x, y))
    keys = LayerKeys(0, visual, text, groups.tolist(), groups.tolist(), median_bandwidth2(x, y))
    table = measure([keys], task="a", condition="b", space="k_pre", bandwidth_source="", connector="", seed=0).table
    (row,) = table[(table["estimator"] == "js_knn") & (table["head"] == "0")].to_dict("records")
    scores = PCA(4, svd_solver="full").fit_transform(np.concatenate([x[0], y[0]]))
    expected = js_knn(scores[None, : len(groups)], scores[None, len(groups) :], groups_x=groups, groups_y=groups)
    assert row["value"] == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.parametrize("share", [2, 4])
def test_a_rotation_of_the_first_half_or_quarter_is_read(share):
    generator = torch.Generator().manual_seed(0)
    keys, others = (torch.randn(30, 2, 40, generator=generator) for _ in range(2))
    positions, turned = torch.arange(30) * 3.0, 40 // share

    def rope(all_keys):
        return torch.cat([rotated(all_keys[..., :turned], positions), all_keys[..., turned:]], dim=-1)

    torch.testing.assert_close(Rotation.read(keys, rope(keys)).apply(others), rope(others), atol=1e-4, rtol=1e-4)


def test_every_deal_of_the_position_null_is_another(monkeypatch):
    seeds = []

    def recorded(visual, text, *, seed):
        seeds.append(seed)
        return visual[1], text[1]

    monkeypatch.setattr(contrasts_module, "shuffled_content", recorded)
    x, y, groups = clouds(5, 1, 6, 2, 3)
    visual, text = (torch.from_numpy(cloud).transpose(0, 1) for cloud in (x, y))
    keys = LayerKeys(0, visual, text, groups.tolist(), groups.tolist(), np.ones(1), unrotated=(visual, text))
    for seed in range(4):
        position_null_sums(keys, seed)
    assert len(set(seeds)) == len(seeds) == 4 * contrasts_module.N_DRAWS


def test_images_are_dealt_to_all_folds_alike():
    fold = js_classifier._deal(tuple(f"image{i}" for i in range(23)), np.ones(23, bool), np.ones(23, bool), seed=0)
    assert sorted(np.bincount(fold).tolist()) == [4, 4, 5, 5, 5]


def test_a_version_stands_for_its_settings():
    """Who changes one of these raises the version: values of two versions are not compared."""
    classifier = JSClassifier(folds=5, l2=0.003, ceiling=0.95, n_resamples=1000, tolerance=1e-4, max_iterations=50)
    assert JSClassifier() == classifier
    assert classifier.shrinkage == (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
    assert PaperProtocol() == PaperProtocol(components=50, bins=30, tokens=1000)
    assert N_PERMUTATIONS == 1000


def test_what_is_not_given_is_what_the_documentation_says():
    """1,000 permutations and seed 0."""
    x, y, groups = clouds(6, 1, 12, 4, 3, shift=3.0)
    by_default = block_permutation_test(x, y, groups_x=groups, groups_y=groups + 100)
    named = block_permutation_test(x, y, groups_x=groups, groups_y=groups + 100, n_permutations=1000, seed=0)
    assert by_default.p == named.p == 1 / 1001
    assert by_default.null_mean == named.null_mean
    protocol = PaperProtocol(tokens=20)
    x, y, _ = (torch.from_numpy(one) for one in clouds(7, 1, 60, 1, 3, shift=1.0))
    assert protocol.compare(x[0], y[0]) == protocol.compare(x[0], y[0], seed=0) != protocol.compare(x[0], y[0], seed=1)
    assert protocol(x[0], y[0]) == protocol(x[0], y[0], seed=0)
