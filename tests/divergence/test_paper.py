"""The published pipeline against scikit-learn's, and the two ways in which it misleads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from lmms_keyspace.divergence import PaperProtocol, js_classifier, js_histogram, mmd_biased, paper_protocol
from lmms_keyspace.errors import InputError


def clouds(seed=0, n=300, m=260, width=80):
    """Correlated coordinates of unlike scale, so that 50 components are well separated from the rest."""
    rng = np.random.default_rng(seed)
    spectrum = np.geomspace(1, 0.05, width)
    mixing = np.linalg.qr(rng.normal(size=(width, width)))[0] * spectrum[:, None]
    x, y = rng.normal(size=(n, width)) @ mixing, rng.normal(size=(m, width)) @ mixing
    y[:, 0] += 0.3
    return x, y


def test_it_is_standardize_pca_mmd_and_histogram():
    x, y = clouds()
    oracle = PCA(n_components=50, svd_solver="full")
    scores = oracle.fit_transform(StandardScaler().fit_transform(np.concatenate([x, y])))
    projected = paper_protocol.project(x, y)
    assert projected.explained_variance == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-3)
    signs = np.sign((np.concatenate([projected.x, projected.y]) * scores).sum(axis=0))
    np.testing.assert_allclose(np.concatenate([projected.x, projected.y])[:, :20], (scores * signs)[:, :20], atol=2e-2)
    result = paper_protocol(x, y)
    distance = np.linalg.norm(scores[:, None] - scores, axis=-1)
    bandwidth2 = np.median(distance[np.triu_indices(560, 1)]) ** 2
    everything = PaperProtocol(tokens=10**6).compare(projected.x[:260], projected.y)
    assert everything.tokens == result.tokens == 260
    assert everything.mmd == pytest.approx(
        mmd_biased(scores[:260], scores[300:], bandwidth2=bandwidth2, scales=(1.0,)).item(), rel=0.02
    )
    assert everything.js == pytest.approx(
        js_histogram((scores * signs)[:260], (scores * signs)[300:], bins=30).item(), abs=2e-3
    )


def test_the_same_seed_gives_the_same_value_and_leaves_the_generator_alone():
    x, y = clouds()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert paper_protocol(x, y, seed=3) == paper_protocol(x, y, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_components_where_there_are_few():
    x, y = clouds(width=5)
    projected = paper_protocol.project(x, y)
    assert projected.x.shape == (300, 5)
    assert projected.explained_variance == pytest.approx(1, abs=1e-5)


def test_equal_distributions_have_a_floor_that_falls_with_the_number_of_tokens():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2000, 60))
    floors = [PaperProtocol(tokens=tokens)(x, y).mmd for tokens in (100, 1000)]
    assert floors[0] / floors[1] == pytest.approx(10**0.5, rel=0.15)


def test_it_is_almost_blind_to_a_gap_along_one_direction_of_many():
    """Separable keys: the classifier's bound is at its ceiling, the pipeline's JS near 0."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1500, 400))
    y[:, 0] += 8
    groups = np.repeat(range(30), 50)
    assert js_classifier(x, y, groups_x=groups, groups_y=groups).at_ceiling
    assert paper_protocol(x, y).js < 0.05


@pytest.mark.parametrize("broken", [np.full((300, 80), np.nan), np.ones((300, 79))])
def test_bad_input_is_named(broken):
    _, y = clouds()
    with pytest.raises(InputError):
        paper_protocol(broken, y)


def test_constant_keys_are_refused():
    with pytest.raises(InputError, match="constant"):
        paper_protocol(np.ones((300, 8)), np.ones((200, 8)))


def test_rounding_errors_of_few_distinct_keys_do_not_matter():
    """A picture of one color: many equal keys, up to how the batch was cut."""
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(20, 64)).astype(np.float32)
    x, y = distinct[rng.integers(0, 12, 80)], distinct[rng.integers(8, 20, 60)]
    noisy = [cloud + 1e-6 * rng.normal(size=cloud.shape).astype(np.float32) for cloud in (x, y)]
    assert paper_protocol(*noisy).js == pytest.approx(paper_protocol(x, y).js, abs=1e-4)
    assert paper_protocol.project(x, y).x.shape[1] < 20
