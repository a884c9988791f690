"""JS by histogram and by nearest neighbors: against other libraries and divergences known by quadrature."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_clouds import clouds, true_js
from scipy.spatial.distance import jensenshannon
from sklearn.feature_selection import mutual_info_classif

from lmms_keyspace.divergence import js_histogram, js_knn
from lmms_keyspace.errors import InputError


def shared(values, low, high, bins):
    """[n, bins]: each value's weight in each bin, a tent over the bin's center (Wand 1994)."""
    place = np.clip((values - low) / (high - low) * bins - 0.5, 0, bins - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(bins)))


def test_histogram_is_scipys_less_its_null():
    x, y, _ = clouds(0, 2, 30, 10, 3, shift=1.0)
    y = y[:, :200]
    expected = np.zeros(2)
    for h in range(2):
        for j in range(3):
            both = np.concatenate([x[h, :, j], y[h, :, j]])
            weights = shared(both, both.min(), both.max(), 20)
            occupied = weights[:, weights.sum(axis=0) > 0]
            null = (occupied.var(axis=0) / occupied.mean(axis=0)).sum() * (1 / 300 + 1 / 200) / 8
            p, q = weights[:300].sum(axis=0), weights[300:].sum(axis=0)
            expected[h] += (jensenshannon(p, q) ** 2 - null) / 3
    np.testing.assert_allclose(js_histogram(x, y, bins=20), expected, atol=1e-12)


@given(seed=st.integers(0, 10**6), by_image=st.booleans())
def test_histogram_moves_little_when_the_keys_move_by_rounding(seed, by_image):
    """Keys on the very edges between bins, as the coordinates of a picture of one color can be."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 31, size=(2, 60, 4)) / 30
    x[0], x[1] = 0, 1  # so that the edges are multiples of 1/30
    groups = np.repeat(np.arange(12), 5) if by_image else None
    x_moved, y_moved = (side + rng.choice([-1e-6, 1e-6], size=side.shape) for side in (x, y))
    before = js_histogram(x, y, groups_x=groups, groups_y=groups)
    after = js_histogram(x_moved, y_moved, groups_x=groups, groups_y=groups)
    assert abs(after - before) < 1e-4


def test_histogram_of_equal_distributions_is_less_than_a_fifth_of_what_it_is_without_its_null():
    x, y = np.random.default_rng(0).normal(size=(2, 100, 1000, 1))
    plain = [
        jensenshannon(*(shared(side[:, 0], min(a.min(), b.min()), max(a.max(), b.max()), 30).sum(0) for side in (a, b)))
        for a, b in zip(x, y, strict=True)
    ]
    assert abs(js_histogram(x, y).mean()) < 0.2 * np.mean(np.square(plain))


def test_histogram_null_of_image_effects_needs_the_groups():
    """Tokens of an image share bins: the formula's null is far too small, that of block permutations is not."""
    x, y, groups = clouds(1, 150, 16, 16, 1, image_effect=2.0)
    by_token = js_histogram(x, y, bins=15)
    by_image = js_histogram(x, y, bins=15, groups_x=groups, groups_y=groups + 100)
    assert by_token.mean() > 10 * by_token.std() / np.sqrt(150)
    assert abs(by_image.mean()) < 3 * by_image.std() / np.sqrt(150)


def test_histogram_permutes_whole_groups():
    """The null mean by moving the tokens of exchanged groups and binning anew."""
    x, y, groups = clouds(2, 1, 6, 5, 2, shift=0.5)
    both = np.concatenate([x[0], y[0]])
    weights = [shared(column, column.min(), column.max(), 5) for column in both.T]  # of both sides, by coordinate
    total = np.zeros(2)
    rng = np.random.default_rng(0)
    for _ in range(4000):
        exchanged = np.tile(rng.integers(0, 2, 6).astype(bool)[groups], 2)
        on_left = exchanged ^ (np.arange(60) < 30)
        for j in range(2):
            p, q = weights[j][on_left].sum(axis=0), weights[j][~on_left].sum(axis=0)
            total[j] += jensenshannon(p, q) ** 2 / 4000
    plain = [jensenshannon(w[:30].sum(axis=0), w[30:].sum(axis=0)) ** 2 for w in weights]
    value = js_histogram(x, y, bins=5, groups_x=groups, groups_y=groups, n_permutations=4000)
    assert value == pytest.approx(np.mean(plain - total), abs=0.002)


def test_histogram_of_separated_and_of_constant_coordinates():
    x, y, _ = clouds(3, 1, 20, 20, 1)
    assert js_histogram(x, y + 100) == pytest.approx(np.log(2), abs=0.01)
    assert js_histogram(np.ones((1, 50, 2)), np.ones((1, 50, 2))) == 0


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0, 4.0])
def test_both_come_near_the_known_divergence(shift):
    x, y, _ = clouds(4, 1, 4000, 1, 4, shift)
    assert js_knn(x, y, k=5)[0] == pytest.approx(true_js(shift), abs=0.03)
    assert js_histogram(x[..., :1], y[..., :1])[0] == pytest.approx(true_js(shift), abs=0.03)


def test_neighbors_are_scikit_learns_mutual_information():
    """Ross's estimator of I(label; key), equal sides; scikit-learn has it for one dimension."""
    x, y, _ = clouds(5, 1, 200, 1, 1, shift=1.5)
    label = np.repeat([0, 1], 200)
    values = np.concatenate([x[0], y[0]])
    # scikit-learn scales the variable and adds noise of 1e-10 of it, which moves no neighbor here.
    expected = mutual_info_classif(values, label, n_neighbors=4, random_state=0)
    assert js_knn(x, y, k=4)[0] == pytest.approx(expected[0], abs=1e-6)


def test_neighbors_weigh_unequal_sides_alike():
    x, y, _ = clouds(6, 10, 1500, 1, 2, shift=1.5)
    few = js_knn(x[:, :500], y)
    assert few.mean() == pytest.approx(true_js(1.5), abs=0.02)
    np.testing.assert_allclose(few, js_knn(y, x[:, :500]), atol=1e-12)
    assert (few != js_knn(x[:, :500], y, seed=1)).any()


def test_neighbors_of_the_own_image_do_not_count():
    x, y, groups = clouds(7, 20, 24, 12, 4, image_effect=1.0)
    by_token = js_knn(x, y)
    by_image = js_knn(x, y, groups_x=groups, groups_y=groups + 100)
    assert by_token.mean() > 10 * by_token.std() / np.sqrt(20)
    assert -0.05 < by_image.mean() < 0.01


def test_neighbors_are_blind_to_common_motion():
    x, y, groups = clouds(8, 2, 20, 4, 3, shift=1.0)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    for given_groups in ({}, {"groups_x": groups, "groups_y": groups}):
        moved = js_knn(x @ rotation + 5, y @ rotation + 5, **given_groups)
        np.testing.assert_allclose(moved, js_knn(x, y, **given_groups), atol=1e-12)


X, Y, GROUPS = clouds(9, 1, 5, 3, 2)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: js_histogram(X, Y, bins=1), "bins"),
        (lambda: js_histogram(X[:, :0], Y), "x"),
        (lambda: js_histogram(X, Y, groups_x=GROUPS), "groups_y"),
        (lambda: js_knn(X, Y, k=0), "k"),
        (lambda: js_knn(X, Y, k=15), "k"),
        (lambda: js_knn(X, Y, k=13, groups_x=GROUPS, groups_y=GROUPS), "k"),
        (lambda: js_knn(X, Y[:, :0]), "k"),
        (lambda: js_knn(X * np.nan, Y), "x"),
    ],
)
def test_bad_input_is_named(call, argument):
    with pytest.raises(InputError) as error:
        call()
    assert error.value.argument == argument
