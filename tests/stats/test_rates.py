"""Proportions, matched pairs, many tests and power: against other libraries, hand calculations and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_is_scipys(n, share):
    k = round(share * n)
    expected = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert stats.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_matched_pairs_holds_the_difference_and_mirrors(b, c, same):
    n = b + c + same + 1
    low, high = stats.matched_pairs(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert stats.matched_pairs(c, b, n) == pytest.approx((-high, -low), abs=1e-12)
    assert stats.matched_pairs(b, c, 10 * n).high - stats.matched_pairs(b, c, 10 * n).low < high - low


def test_matched_pairs_by_hand():
    """b = 1, c = 0, n = 24: half a unit in each cell makes 1 / 26 with deviation sqrt(2 - 1 / 26) / 26."""
    half = 1.959964 * np.sqrt(2 - 1 / 26) / 26
    assert stats.matched_pairs(1, 0, 24) == pytest.approx((1 / 26 - half, 1 / 26 + half), abs=1e-6)
    assert stats.matched_pairs(1, 0, 24).low < 0  # one group that differs shows nothing, as McNemar's p of 1 says


@pytest.mark.parametrize(("b", "c", "n"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_matched_pairs_refuses_impossible_counts(b, c, n):
    with pytest.raises(InputError, match="units"):
        stats.matched_pairs(b, c, n)


@pytest.mark.parametrize(("p_b", "p_c"), [(0.2, 0.1), (0.05, 0.05), (0.3, 0.3), (0.1, 0.02)])
def test_matched_pairs_covers(p_b, p_c):
    draws = np.random.default_rng(1).multinomial(60, [p_b, p_c, 1 - p_b - p_c], size=1500)
    intervals = [stats.matched_pairs(int(b), int(c), 60) for b, c, _ in draws]
    assert np.mean([low <= p_b - p_c <= high for low, high in intervals]) > 0.93


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(b, c):
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert stats.mcnemar_exact(b, c) == pytest.approx(expected, abs=1e-12)


def test_holm_by_hand():
    adjusted = stats.holm([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, np.nan, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers(p):
    adjusted = stats.holm(p)
    assert (adjusted >= np.asarray(p)).all()
    assert adjusted.max() <= 1
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


@pytest.mark.parametrize(
    ("discordance", "n", "points"),
    [(0.05, 100, 6.3), (0.3, 100, 15.3), (0.1, 300, 5.1), (0.1, 900, 3.0), (0.3, 4329, 2.3)],
)
def test_minimum_detectable_effect(discordance, n, points):
    assert 100 * stats.mde_paired(discordance, n) == pytest.approx(points, abs=0.06)


def test_mde_from_se_has_the_power_it_promises():
    rng = np.random.default_rng(0)
    se = 0.7
    z = rng.normal(float(stats.mde_from_se(se)), se, size=200_000) / se
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.005)
