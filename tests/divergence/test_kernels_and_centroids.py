"""Energy distance, Laplace, linear and biased MMD^2, centroids: against loops, scipy, scikit-learn, and in motion."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import normalize

from lmms_keyspace.divergence import (
    SCALES,
    centroid_cosine,
    centroid_distance,
    energy_distance,
    mmd2,
    mmd2_biased,
    mmd2_laplace,
    mmd2_linear,
    mmd_biased,
)
from lmms_keyspace.errors import InputError


def example(seed=0, n=41, m=37, width=5, shift=0.4):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, width)), rng.normal(size=(2, m, width)) + shift
    return x, y, [f"g{i}" for i in rng.integers(0, 6, n)], [f"g{i}" for i in rng.integers(3, 9, m)]


def laplace(x, y, **groups):
    return mmd2_laplace(x, y, bandwidth2=7.0, **groups)


def gaussian(x, y, **groups):
    return mmd2(x, y, bandwidth2=7.0, **groups)


KERNELS = {
    energy_distance: lambda a, b: -np.linalg.norm(a - b),
    laplace: lambda a, b: np.exp(-np.linalg.norm(a - b) / np.sqrt(7.0)),
    mmd2_linear: lambda a, b: a @ b,
    gaussian: lambda a, b: np.mean([np.exp(-((a - b) ** 2).sum() / (u * 7.0)) for u in SCALES]),
}
WITH_GROUPS = [*KERNELS, centroid_cosine]


def ids(value):
    return getattr(value, "name", getattr(value, "__name__", None))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("estimator", KERNELS, ids=ids)
def test_the_u_statistic_is_the_double_loop(estimator, grouped):
    """Pairs of one group are left out of all three means; without groups a token is left out with itself."""
    x, y, groups_x, groups_y = example()
    middle = np.concatenate([x, y], axis=1).mean(axis=1, keepdims=True)  # where a linear kernel has its origin
    x, y = x - middle, y - middle
    names_x, names_y = (groups_x, groups_y) if grouped else (list(range(41)), list(range(100, 137)))
    means = []
    for a, b, left, right in ((x, x, names_x, names_x), (y, y, names_y, names_y), (x, y, names_x, names_y)):
        pairs = [(p, q) for p in range(len(left)) for q in range(len(right)) if left[p] != right[q]]
        means.append(np.mean([KERNELS[estimator](a[1][p], b[1][q]) for p, q in pairs]))
    value = estimator(x, y, **({"groups_x": groups_x, "groups_y": groups_y} if grouped else {}))
    assert value.shape == (2,)
    assert value[1] == pytest.approx(means[0] + means[1] - 2 * means[2], abs=1e-7)


def test_energy_distance_is_scipys_in_one_dimension():
    """scipy pairs every value with itself and takes the root."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 1)), rng.normal(size=(70, 1)) + 0.5
    own = [np.abs(cloud - cloud.T).sum() * (1 / (s * (s - 1)) - 1 / s**2) for cloud, s in ((x, 50), (y, 70))]
    expected = scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    assert energy_distance(x, y) + sum(own) == pytest.approx(expected, abs=1e-7)


def test_biased_mmd2_is_the_mean_of_scikit_learns_kernel_matrices():
    x, y, _, _ = example()

    def mean(a, b):
        return np.mean([rbf_kernel(a, b, gamma=1 / (u * 6.0)).mean() for u in SCALES])

    expected = [mean(a, a) + mean(b, b) - 2 * mean(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(mmd2_biased(x, y, bandwidth2=6.0), expected, atol=1e-12)
    np.testing.assert_allclose(mmd_biased(x, y, bandwidth2=6.0), np.sqrt(expected), atol=1e-12)


def test_biased_mmd2_has_the_floor_its_docstring_states():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 10, 64, 128))
    floor = mmd2_biased(x, y, bandwidth2=256.0, scales=(1.0,)).mean()
    assert floor == pytest.approx(2 / 64 * (1 - np.exp(-1)), rel=0.1)
    assert abs(mmd2(x, y, bandwidth2=256.0, scales=(1.0,)).mean()) < floor / 20


def test_centroid_distance_and_cosine_are_their_definitions():
    x, y, groups_x, groups_y = example(shift=3.0)
    middle = (x.mean(1, keepdims=True) + y.mean(1, keepdims=True)) / 2
    for h in range(2):
        assert centroid_distance(x, y)[h] == pytest.approx(np.linalg.norm(x[h].mean(0) - y[h].mean(0)))
        cosine = normalize(x[h] - middle[h]) @ normalize(y[h] - middle[h]).T
        assert centroid_cosine(x, y)[h] == pytest.approx(cosine.mean())
        other = np.array(groups_x)[:, None] != np.array(groups_y)
        grouped = centroid_cosine(x, y, groups_x=groups_x, groups_y=groups_y)[h]
        assert grouped == pytest.approx(cosine[other].mean())


def test_cosine_is_not_moved_by_a_bias_that_all_keys_share():
    x, y, _, _ = example()
    bias = 600.0 * np.ones(5)
    assert np.cos(0) - np.min(normalize(x[0] + bias) @ normalize(y[0] + bias).T) < 1e-3
    np.testing.assert_allclose(centroid_cosine(x + bias, y + bias), centroid_cosine(x, y), atol=1e-9)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_symmetric_and_blind_to_common_motion(seed):
    x, y, groups_x, groups_y = example(seed)
    rng = np.random.default_rng(seed)
    rotation, translation = np.linalg.qr(rng.normal(size=(5, 5)))[0], rng.normal(size=5)
    moved = [cloud @ rotation + translation for cloud in (x, y)]
    for estimator in WITH_GROUPS:
        value = estimator(x, y, groups_x=groups_x, groups_y=groups_y)
        swapped = estimator(y, x, groups_x=groups_y, groups_y=groups_x)
        np.testing.assert_allclose(swapped, value, atol=1e-9)
        np.testing.assert_allclose(estimator(*moved, groups_x=groups_x, groups_y=groups_y), value, atol=1e-9)
    np.testing.assert_allclose(centroid_distance(*moved), centroid_distance(y, x), atol=1e-9)


@pytest.mark.parametrize("estimator", WITH_GROUPS, ids=ids)
def test_mean_zero_for_equal_distributions_with_an_image_effect(estimator):
    rng = np.random.default_rng(0)
    x, y = ((rng.normal(size=(200, 16, 8, 6)) + rng.normal(size=(200, 16, 1, 6))).reshape(200, 128, 6) for _ in "xy")
    groups = np.repeat(range(16), 8)
    clustered = estimator(x, y, groups_x=groups, groups_y=groups)
    if estimator is not centroid_cosine:  # its midpoint is estimated from the same tokens: of order 1 / images
        assert abs(clustered.mean()) < 2.5 * clustered.std() / np.sqrt(200)
        token = estimator(x, y)
        assert token.mean() > 10 * token.std() / np.sqrt(200)
    else:
        assert -0.1 < clustered.mean() < 0.01


@pytest.mark.parametrize("estimator", [*KERNELS, centroid_distance], ids=ids)
def test_grows_with_the_shift(estimator):
    x, y, _, _ = example(n=300, m=300, shift=0)
    assert (np.diff([estimator(x, y + s)[0] for s in (0, 0.5, 1, 2, 4, 8)]) > 0).all()
    cosines = [centroid_cosine(x, y + s)[0] for s in (0, 0.5, 1, 2, 4, 8)]
    assert (np.diff(cosines) < 0).all()
    assert cosines[-1] > -1


X, Y, GROUPS_X, GROUPS_Y = example()


@pytest.mark.parametrize("estimator", WITH_GROUPS, ids=ids)
@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"x": np.where(np.arange(5) == 2, np.inf, X)}, "x"),
        ({"y": Y[..., :4]}, "y"),
        ({"groups_x": None}, "groups_x"),
        ({"groups_y": GROUPS_Y[:-1]}, "groups_y"),
    ],
)
def test_bad_input_is_named(estimator, change, argument):
    arguments = {"x": X, "y": Y, "groups_x": GROUPS_X, "groups_y": GROUPS_Y} | change
    with pytest.raises(InputError) as error:
        estimator(arguments.pop("x"), arguments.pop("y"), **arguments)
    assert error.value.argument == argument


@pytest.mark.parametrize(
    "call",
    [
        lambda: energy_distance(X[:, :1], Y),
        lambda: mmd2_linear(X[:, :1], Y),
        lambda: mmd2_linear(X, Y, groups_x=["a"] * 41, groups_y=GROUPS_Y),
        lambda: centroid_distance(X[:, :0], Y),
        lambda: centroid_cosine(X, Y, groups_x=["a"] * 41, groups_y=["a"] * 37),
        lambda: mmd2_biased(X[:, :0], Y, bandwidth2=1.0),
        lambda: mmd2_laplace(X, Y, bandwidth2=-1.0),
    ],
)
def test_too_little_to_estimate_from_is_refused(call):
    with pytest.raises(InputError):
        call()
