"""One-sided bounds of a paired change: exact where few differ, consistent with their p values, covering."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from lmms_keyspace.errors import InputError
from lmms_keyspace.stats.multiplicity import holm, holm_levels
from lmms_keyspace.stats.noninferiority import BOOTSTRAP, EXACT, NONE_DIFFERS, oriented_change, share_at_most

N = 300


def of_counts(losses: int, gains: int, n: int = N, direction: int = 1, n_resamples: int = 2000):
    """Binary outcomes of n clusters of which `losses` turn wrong and `gains` turn right."""
    base, run = np.zeros(n), np.zeros(n)
    base[:losses] = 1
    run[losses : losses + gains] = 1
    if direction < 0:
        base, run = 1 - base, 1 - run
    ones = np.ones(n)
    return oriented_change((base, ones), (run, ones), direction, n_resamples=n_resamples)


def test_equal_runs_have_the_exact_bound():
    change = of_counts(0, 0)
    assert (change.value, change.differing, change.binary) == (0.0, 0, True)
    assert change.lower(0.05).value == pytest.approx(-(1 - 0.05 ** (1 / N)))  # none of 300 with probability .05
    assert change.lower(0.05).source == change.upper(0.05).source == NONE_DIFFERS
    assert change.upper(0.05).value == -change.lower(0.05).value > 0
    assert change.p_of_loss == 1
    assert 0 < change.mde(0.05) < 0.02


def test_one_gain_does_not_make_the_bound_vanish():
    change = of_counts(0, 1)
    assert change.lower(0.05) == (-(share_at_most(0, N, 0.05)), EXACT)
    assert change.lower(0.05).value < 0 < change.value


@given(k=st.integers(0, 40), extra=st.integers(1, 200), level=st.floats(0.001, 0.3))
def test_the_exact_limit_is_clopper_pearson(k, extra, level):
    n = k + extra
    expected = scipy_stats.binomtest(k, n).proportion_ci(1 - 2 * level, method="exact").high
    assert share_at_most(k, n, level) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(losses=st.integers(0, 60), gains=st.integers(0, 60), direction=st.sampled_from([-1, 1]))
def test_bounds_and_p_values_say_the_same(losses, gains, direction):
    change = of_counts(losses, gains, direction=direction)
    assert change.value == pytest.approx((gains - losses) / N)
    assert (change.losses, change.gains) == (losses, gains)
    for level in (0.005, 0.05):
        low = change.lower(level)
        assert low.value < change.value
        assert low.source == (BOOTSTRAP if losses + gains >= 10 else EXACT if losses + gains else NONE_DIFFERS)
        # The p of "the change is at or below -margin" is the level at which the bound reaches -margin.
        margin = -low.value
        assert change.p_of_excess_loss(margin + 1e-9) <= level
        assert margin <= 0 or change.p_of_excess_loss(margin - 1e-9) > level
    discordant = losses + gains
    mcnemar = scipy_stats.binomtest(losses, discordant, alternative="greater").pvalue if discordant else 1.0
    assert change.p_of_loss >= mcnemar - 1e-12


@settings(max_examples=20, deadline=None)
@given(losses=st.integers(0, 60), gains=st.integers(0, 60))
def test_swapping_the_runs_turns_the_sign(losses, gains):
    forth, back = of_counts(losses, gains), of_counts(gains, losses)
    assert back.value == pytest.approx(-forth.value)
    assert (back.losses, back.gains) == (forth.gains, forth.losses)


def test_a_rate_with_its_own_denominator():
    """Of 100 clusters 80 count in the base and 79 in the run; lower is better."""
    counted_a, counted_b = np.r_[np.ones(80), np.zeros(20)], np.r_[np.zeros(1), np.ones(79), np.zeros(20)]
    flips_a, flips_b = counted_a * (np.arange(100) < 20), counted_b * (np.arange(100) < 40)
    change = oriented_change((flips_a, counted_a), (flips_b, counted_b), -1, n_resamples=2000)
    assert change.value == pytest.approx(20 / 80 - 39 / 79)
    assert not change.binary
    assert change.reach == pytest.approx(100 / 79)
    assert change.upper(0.05).value < 0
    assert change.p_of_loss < 0.01
    assert change.losses == 20  # the cluster that left lowers the rate: a gain
    assert change.gains == 1


def test_the_lower_bound_covers():
    """800 paired samples of 60 clusters with .2 discordance: a 5 % bound fails to cover in about 5 %."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(800):
        kind = rng.choice(3, size=60, p=[0.1, 0.1, 0.8])
        missed += of_counts(int((kind == 0).sum()), int((kind == 1).sum()), 60, n_resamples=1000).lower(0.05).value > 0
    assert 0.02 < missed / 800 < 0.08


@settings(max_examples=200)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=8), alpha=st.floats(0.001, 0.2))
def test_holm_levels_decide_as_the_adjusted_p(p, alpha):
    decided = [one <= level for one, level in zip(p, holm_levels(p, alpha), strict=True)]
    adjusted = holm(p)
    for own, rejected in zip(adjusted, decided, strict=True):
        assert rejected == (own <= alpha) or own == pytest.approx(alpha)


def test_bad_input_is_refused():
    ones = np.ones(5)
    with pytest.raises(InputError, match="direction"):
        oriented_change((ones, ones), (ones, ones), 0)
    with pytest.raises(InputError, match="finite"):
        oriented_change((ones, ones), (ones * np.nan, ones), 1)
    with pytest.raises(InputError, match="sum to zero"):
        oriented_change((ones, 0 * ones), (ones, ones), 1)
