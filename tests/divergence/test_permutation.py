"""The block permutation test: against permuted keys, and its size with an image effect."""

from __future__ import annotations

import numpy as np
import pytest

from lmms_keyspace import stats
from lmms_keyspace.divergence import block_permutation_test, kernel_sums, mmd2
from lmms_keyspace.errors import InputError


def clouds(seed, heads, images, tokens, width=4, shift=0.0, image_effect=1.0):
    rng = np.random.default_rng(seed)
    x, y = (
        rng.normal(size=(heads, images, tokens, width)) + image_effect * rng.normal(size=(heads, images, 1, width))
        for _ in range(2)
    )
    return (x + shift).reshape(heads, -1, width), y.reshape(heads, -1, width), np.repeat(np.arange(images), tokens)


def test_a_permutation_from_sums_is_the_statistic_of_permuted_keys():
    """Shared groups, groups on one side only, unequal numbers of tokens."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30, 3)), rng.normal(size=(2, 22, 3)) + 0.5
    groups_x, groups_y = np.arange(30) % 7, 3 + np.arange(22) % 8
    sums = kernel_sums(x, y, groups_x=groups_x, groups_y=groups_y, bandwidth2=5.0)
    signs = stats.label_flips(sums.n_visual, sums.n_text, 20, seed=1)
    both = (sums.n_visual > 0) & (sums.n_text > 0)
    assert both.sum() == 4
    assert {-1.0, 1.0} == set(signs[:, both].ravel())
    null = stats.mmd2_permuted(sums, signs)
    for b, sign in enumerate(signs):
        sign_of = dict(zip(sums.clusters, sign, strict=True))
        flip_x, flip_y = (np.array([sign_of[str(g)] < 0 for g in groups]) for groups in (groups_x, groups_y))
        new_x = np.concatenate([x[:, ~flip_x], y[:, flip_y]], axis=1)
        new_y = np.concatenate([y[:, ~flip_y], x[:, flip_x]], axis=1)
        names_x = np.concatenate([groups_x[~flip_x], groups_y[flip_y]])
        names_y = np.concatenate([groups_y[~flip_y], groups_x[flip_x]])
        direct = mmd2(new_x, new_y, groups_x=names_x, groups_y=names_y, bandwidth2=5.0)
        np.testing.assert_allclose(null[:, b], direct, atol=1e-12)


def test_groups_of_one_side_keep_their_number():
    signs = stats.label_flips([3, 3, 3, 0, 0, 0, 0, 2], [0, 0, 0, 4, 4, 4, 4, 2], 500)
    visual = np.array([1, 1, 1, 0, 0, 0, 0]) * signs[:, :7] + np.array([0, 0, 0, 1, 1, 1, 1]) * -signs[:, :7] > 0
    assert (visual.sum(axis=1) == 3).all()
    np.testing.assert_allclose(visual.mean(axis=0), 3 / 7, atol=0.08)
    assert abs(signs[:, 7].mean()) < 0.15


@pytest.mark.parametrize("shared", [False, True])
def test_size_with_an_image_effect(shared):
    """400 draws of equal distributions as leading dimension: rejections at 0.05 within its binomial range."""
    x, y, groups = clouds(0, 400, 12, 8)
    result = block_permutation_test(x, y, groups_x=groups, groups_y=groups + (0 if shared else 100), n_permutations=199)
    assert 0.025 <= np.mean(result.p <= 0.05) <= 0.08
    assert abs(result.null_mean.mean()) < 1e-3


def test_token_permutation_fails_under_an_image_effect():
    x, y, _ = clouds(0, 25, 12, 8)
    by_token = block_permutation_test(x, y, groups_x=None, groups_y=None, n_permutations=99)
    assert np.mean(by_token.p <= 0.05) > 0.9


def test_token_permutation_is_right_without_one():
    x, y, _ = clouds(1, 150, 12, 3, image_effect=0.0)
    by_token = block_permutation_test(x, y, groups_x=None, groups_y=None, n_permutations=99)
    assert np.mean(by_token.p <= 0.05) < 0.12


def test_a_shift_is_found_and_max_t_pays_for_the_other_heads():
    x, y, groups = clouds(2, 40, 16, 8)
    x[0] += 1.5
    result = block_permutation_test(x, y, groups_x=groups, groups_y=groups, n_permutations=499)
    assert result.p[0] == result.p_adjusted[0] == 1 / 500
    assert (result.p_adjusted >= result.p).all()
    assert result.p[1:].min() < 0.1 < result.p_adjusted[1:].min()


def test_max_t_keeps_the_family_wise_error():
    """120 families of 8 null heads: at least one adjusted rejection in about 5 % of them."""
    x, y, groups = clouds(3, 960, 10, 4)
    sums = kernel_sums(x, y, groups_x=groups, groups_y=groups, bandwidth2=16.0)
    signs = stats.label_flips(sums.n_visual, sums.n_text, 199)
    null = stats.mmd2_permuted(sums, signs).reshape(120, 8, 199)
    value = stats.mmd2_from_sums(sums).reshape(120, 8)
    results = [stats.max_t(v, n) for v, n in zip(value, null, strict=True)]
    assert np.mean([(p <= 0.05).any() for p, _ in results]) > 0.2
    assert 0.01 <= np.mean([(adjusted <= 0.05).any() for _, adjusted in results]) <= 0.1


def test_equal_sides_and_few_images_are_not_significant():
    x, _, groups = clouds(4, 1, 4, 5)
    assert block_permutation_test(x, x, groups_x=groups, groups_y=groups).p == 1
    far = block_permutation_test(x, x + 50, groups_x=groups, groups_y=groups)
    assert far.p == pytest.approx(1 / 8, abs=0.05)  # 4 images have 8 distinct exchanges


def test_the_seed_decides():
    x, y, groups = clouds(5, 1, 8, 5)
    p = [block_permutation_test(x, y, groups_x=groups, groups_y=groups, seed=s, n_permutations=99).p for s in (1, 1, 2)]
    assert p[0] == p[1] != p[2]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"groups_y": None}, "groups_y"),
        ({"n_permutations": 0}, "n_permutations"),
        ({"groups_x": ["a"] * 40}, "n_visual"),
    ],
)
def test_bad_input_is_named(change, argument):
    x, y, groups = clouds(6, 1, 8, 5)
    with pytest.raises(InputError) as error:
        block_permutation_test(x, y, **({"groups_x": groups, "groups_y": groups} | change))
    assert error.value.argument == argument
