"""The loss that a gate would show, and the bounds where the level leaves no draw or no cluster differs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from lmms_keyspace.errors import InputError
from lmms_keyspace.stats.noninferiority import oriented_change


def turned(losses: int, gains: int, n: int = 200, n_resamples: int = 999):
    """Binary outcomes of n clusters, of which some turn wrong and some turn right."""
    base, run = np.zeros(n), np.zeros(n)
    base[:losses], run[losses : losses + gains] = 1, 1
    ones = np.ones(n)
    return oriented_change((base, ones), (run, ones), 1, n_resamples=n_resamples)


@pytest.mark.parametrize("power", [0.8, 0.95])
def test_many_clusters_that_differ_have_the_normal_formula(power):
    change = turned(20, 16)
    expected = (norm.ppf(0.95) + norm.ppf(power)) * change.draws.std(ddof=1)
    assert change.mde(0.05, power) == pytest.approx(expected)
    assert change.mde(0.05) == change.mde(0.05, 0.8)
    # The paired difference of shares has the variance ((losses + gains) - (gains - losses)^2 / n) / n^2.
    assert change.mde(0.05) == pytest.approx((norm.ppf(0.95) + norm.ppf(0.8)) * (36 - 16 / 200) ** 0.5 / 200, rel=0.1)


def test_few_clusters_that_differ_have_the_error_of_the_most_that_could():
    change = turned(2, 1)
    most = binomtest(3, 200).proportion_ci(0.9, method="exact").high
    assert change.mde(0.05) == pytest.approx((norm.ppf(0.95) + norm.ppf(0.8)) * (most / 200) ** 0.5)


def test_a_level_that_leaves_no_draw_has_the_widest_bound():
    change = turned(20, 16, n_resamples=99)
    assert change.lower(0.001).value == -change.reach == -1
    assert change.upper(0.001).value == 1


@pytest.mark.parametrize(("n_resamples", "place"), [(999, 50), (998, 49), (1018, 50), (1019, 51)])
def test_the_bound_is_the_draw_at_the_level(n_resamples, place):
    """The last of the sorted draws whose p, (1 + those before it) / (1 + all), is at most the level."""
    change = turned(20, 16, n_resamples=n_resamples)
    draws = np.sort(change.draws)
    assert place / (1 + n_resamples) <= 0.05 < (place + 1) / (1 + n_resamples)
    assert change.lower(0.05).value == draws[place - 1]
    assert change.upper(0.05).value == draws[-place]
    beyond = np.sum(draws <= draws[place - 1] + 1e-12)
    assert change.p_of_excess_loss(-draws[place - 1]) == pytest.approx((1 + beyond) / (1 + n_resamples))


def test_clusters_that_turned_are_those_of_the_outcome_and_not_all():
    change = turned(3, 2)
    assert (change.losses, change.gains, change.clusters) == (3, 2, 200)
    assert change.exact_p == pytest.approx(binomtest(3, 5, alternative="greater").pvalue)


def test_a_ratio_that_few_clusters_carry_is_refused():
    ones, rare = np.ones(40), np.r_[1.0, np.zeros(39)]
    with pytest.raises(InputError, match="too few clusters"):
        oriented_change((rare, rare), (rare, rare), 1)
    assert oriented_change((ones, ones), (ones, ones), 1).value == 0
