"""MMD^2 against a float64 double loop, its invariances, and the bias that grouping removes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmms_keyspace.divergence import SCALES, kernel_sums, median_bandwidth2, mmd2
from lmms_keyspace.errors import InputError


def kernel(a, b, bandwidth2, scales=SCALES):
    return float(np.mean([np.exp(-((a - b) ** 2).sum() / (u * bandwidth2)) for u in scales]))


def double_loop(x, y, groups_x, groups_y, bandwidth2, scales=SCALES):
    """(vv, tt, vt) of one head by the definition."""
    names = sorted({str(g) for g in (*groups_x, *groups_y)})
    sums = []
    for left, right, groups_left, groups_right in (
        (x, x, groups_x, groups_x),
        (y, y, groups_y, groups_y),
        (x, y, groups_x, groups_y),
    ):
        total = np.zeros((len(names), len(names)))
        for a, group_a in zip(left, groups_left, strict=True):
            for b, group_b in zip(right, groups_right, strict=True):
                total[names.index(str(group_a)), names.index(str(group_b))] += kernel(a, b, bandwidth2, scales)
        sums.append(total)
    return sums


def example(seed=0, n=41, m=37, width=5):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, width)), rng.normal(size=(2, m, width)) + 0.4
    return x, y, [f"g{i}" for i in rng.integers(0, 6, n)], [f"g{i}" for i in rng.integers(3, 9, m)]


@pytest.mark.parametrize("scales", [SCALES, (1.0,), (0.3, 2.0, 1.0, 7.0)])
def test_kernel_sums_are_the_double_loop(scales):
    x, y, groups_x, groups_y = example()
    bandwidth2 = [3.0, 8.0]
    sums = kernel_sums(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=bandwidth2, scales=scales)
    assert sums.clusters == tuple(f"g{i}" for i in range(9))
    assert sums.n_visual.tolist() == [groups_x.count(name) for name in sums.clusters]
    assert sums.n_text.tolist() == [groups_y.count(name) for name in sums.clusters]
    for h in range(2):
        expected = double_loop(x[h], y[h], groups_x, groups_y, bandwidth2[h], scales)
        for matrix, oracle in zip((sums.vv[h], sums.tt[h], sums.vt[h]), expected, strict=True):
            np.testing.assert_allclose(matrix, oracle, rtol=1e-10)


def test_tiles_and_blocks_leave_no_seam():
    """More tokens than a tile, groups larger and smaller than a block: equal to one whole kernel matrix."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1300, 3)), rng.normal(size=(700, 3))
    groups_x, groups_y = rng.geometric(0.02, size=1300) % 40, rng.integers(0, 50, 700)
    sums = kernel_sums(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=5.0)
    one_hot_x, one_hot_y = (
        np.array([[str(g) == name for name in sums.clusters] for g in groups], dtype=float)
        for groups in (groups_x, groups_y)
    )
    for matrix, a, b, own_a, own_b in (
        (sums.vv, x, x, one_hot_x, one_hot_x),
        (sums.tt, y, y, one_hot_y, one_hot_y),
        (sums.vt, x, y, one_hot_x, one_hot_y),
    ):
        distance2 = ((a[:, None] - b[None]) ** 2).sum(-1)
        whole = np.mean([np.exp(-distance2 / (u * 5.0)) for u in SCALES], axis=0)
        np.testing.assert_allclose(matrix, own_a.T @ whole @ own_b, rtol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keys_lose_little(offset, dtype):
    x, y, groups_x, groups_y = example(n=200, m=200, width=64)
    low_x, low_y = (torch.from_numpy(cloud + offset).to(dtype) for cloud in (x, y))
    kwargs = {"groups_x": groups_x, "groups_y": groups_y, "bandwidth2": 128.0}
    rounded = kernel_sums(low_x, low_y, **kwargs)
    exact = kernel_sums(low_x.double(), low_y.double(), **kwargs)
    for name in ("vv", "tt", "vt"):
        np.testing.assert_allclose(getattr(rounded, name), getattr(exact, name), rtol=5e-5)
    np.testing.assert_allclose(mmd2(low_x, low_y, **kwargs), mmd2(low_x.double(), low_y.double(), **kwargs), atol=5e-5)


def test_the_token_statistic_is_grettons():
    x, y, _, _ = example()
    vv, tt, vt = double_loop(x[0], y[0], ["a"] * 41, ["a"] * 37, 6.0)
    expected = (vv[0, 0] - 41) / (41 * 40) + (tt[0, 0] - 37) / (37 * 36) - 2 * vt[0, 0] / (41 * 37)
    assert mmd2(x[0], y[0], bandwidth2=6.0) == pytest.approx(expected, abs=1e-12)


def test_the_cluster_statistic_leaves_out_pairs_of_one_group():
    x, y, groups_x, groups_y = example()
    means = []
    for a, b, left, right in ((x, x, groups_x, groups_x), (y, y, groups_y, groups_y), (x, y, groups_x, groups_y)):
        pairs = [(p, q) for p in range(len(left)) for q in range(len(right)) if left[p] != right[q]]
        means.append(np.mean([kernel(a[1][p], b[1][q], 6.0) for p, q in pairs]))
    value = mmd2(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=6.0)[1]
    assert value == pytest.approx(means[0] + means[1] - 2 * means[2], abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_symmetric_and_blind_to_common_motion(seed):
    x, y, groups_x, groups_y = example(seed)
    value = mmd2(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=7.0)
    swapped = mmd2(y, x, groups_x=groups_y, groups_y=groups_x, bandwidth2=7.0)
    np.testing.assert_allclose(swapped, value, atol=1e-12)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    translation = rng.normal(size=5)
    moved = [cloud @ rotation + translation for cloud in (x, y)]
    np.testing.assert_allclose(mmd2(*moved, groups_x=groups_x, groups_y=groups_y, bandwidth2=7.0), value, atol=1e-10)


def test_grows_with_the_shift():
    x, y, groups_x, groups_y = example(n=300, m=300)
    values = [mmd2(x, y + s, groups_x=groups_x, groups_y=groups_y, bandwidth2=10.0)[0] for s in (0, 0.5, 1, 2, 4, 8)]
    assert (np.diff(values) > 0).all()
    assert values[-1] < 2


def test_grouping_removes_the_bias_of_image_effects():
    """Equal distributions with a unit image effect, 16 images of 8 tokens a side, 150 draws as leading dimension."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(150, 16, 8, 8)) + rng.normal(size=(150, 16, 1, 8)) for _ in range(2))
    x, y = x.reshape(150, 128, 8), y.reshape(150, 128, 8)
    groups = np.repeat(range(16), 8)
    clustered = mmd2(x, y, groups_x=groups, groups_y=groups, bandwidth2=32.0)
    token = mmd2(x, y, bandwidth2=32.0)
    assert abs(clustered.mean()) < 2.5 * clustered.std() / np.sqrt(150)
    assert token.mean() > 10 * token.std() / np.sqrt(150)


def test_median_bandwidth_is_the_median_of_the_pooled_distances():
    x, y, _, _ = example(n=30, m=30)
    for h, value in enumerate(median_bandwidth2(x, y)):
        pooled = np.concatenate([x[h], y[h]])
        distances2 = ((pooled[:, None] - pooled[None]) ** 2).sum(-1)[np.triu_indices(60, 1)]
        # The squared median distance: equal to the median squared distance up to the two middle values' mean.
        middle = np.sort(distances2)[[884, 885]]
        assert middle[0] <= value <= middle[1]


def test_median_bandwidth_gives_both_modalities_the_same_say():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5000, 8)), 3 * rng.normal(size=(100, 8))
    balanced = median_bandwidth2(x[:100], y)
    assert median_bandwidth2(x, y) == pytest.approx(balanced, rel=0.1)
    assert median_bandwidth2(x, x[:0]) == pytest.approx(16, rel=0.1)
    assert median_bandwidth2(x, y, seed=1) == median_bandwidth2(x, y, seed=1)
    assert median_bandwidth2(x, y, seed=1) != median_bandwidth2(x, y, seed=2)


def test_an_empty_side_has_sums_of_zero():
    _, y, _, groups_y = example()
    sums = kernel_sums(y[:, :0], y, groups_x=[], groups_y=groups_y, bandwidth2=1.0)
    assert not sums.vv.any()
    assert not sums.vt.any()
    assert not sums.n_visual.any()
    assert (np.diagonal(sums.tt, axis1=-2, axis2=-1) >= sums.n_text).all()


X, Y, GROUPS_X, GROUPS_Y = example()
BROKEN = X.copy()
BROKEN[0, 3, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"x": BROKEN}, "x"),
        ({"x": X[0, 0]}, "x"),
        ({"y": Y[..., :4]}, "y"),
        ({"y": Y[:1]}, "y"),
        ({"groups_x": GROUPS_X[:-1]}, "groups_x"),
        ({"groups_x": None}, "groups_x"),
        ({"groups_y": None}, "groups_y"),
        ({"bandwidth2": 0.0}, "bandwidth2"),
        ({"bandwidth2": [1.0, np.nan]}, "bandwidth2"),
        ({"bandwidth2": [1.0, 1.0, 1.0]}, "bandwidth2"),
        ({"scales": (1.0, -1.0)}, "scales"),
        ({"scales": ()}, "scales"),
        ({"groups_x": ["a"] * 41}, "n_visual"),
        ({"x": np.ones((2, 41, 5)), "y": np.ones((2, 37, 5)), "bandwidth2": None}, "x"),
    ],
)
def test_bad_input_is_named(change, argument):
    arguments = {"x": X, "y": Y, "groups_x": GROUPS_X, "groups_y": GROUPS_Y, "bandwidth2": 1.0} | change
    with pytest.raises(InputError) as error:
        mmd2(arguments.pop("x"), arguments.pop("y"), **arguments)
    assert error.value.argument == argument
