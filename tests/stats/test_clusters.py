"""Bootstrap and permutation over clusters: against scipy, by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError


def test_bootstrap_of_single_rows_is_scipys():
    values = np.random.default_rng(0).normal(size=200)
    ours = stats.cluster_bootstrap(values, range(200), n_resamples=9999)
    scipys = scipy.stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0)
    assert ours == pytest.approx(tuple(scipys.confidence_interval), abs=0.01)


def test_bootstrap_does_not_count_copies_of_a_row_as_evidence():
    values = np.random.default_rng(0).normal(size=50)
    assert stats.cluster_bootstrap(np.repeat(values, 5), np.repeat(range(50), 5)) == pytest.approx(
        stats.cluster_bootstrap(values, range(50))
    )


def test_bootstrap_of_a_ratio_covers_it():
    """Ratio of sums with a random denominator, rows of a cluster sharing their rate."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        rate = rng.beta(4, 6, size=(60, 1))
        asked = rng.random((60, 5)) < 0.5
        hit = asked & (rng.random((60, 5)) < rate)
        low, high = stats.cluster_bootstrap(
            hit.ravel(), np.repeat(range(60), 5), weights=asked.ravel(), n_resamples=500
        )
        covered += low <= 0.4 <= high
    assert covered >= 180


def test_bootstrap_of_a_function_of_sums():
    """With a ratio as the function it is the bootstrap of the ratio; an undefined function has no interval."""
    rng = np.random.default_rng(0)
    totals = rng.integers(1, 9, size=(30, 2)).astype(float)
    names = [f"c{i:02d}" for i in range(30)]
    ratio = stats.cluster_bootstrap(totals[:, 0], names, weights=totals[:, 1])
    assert stats.cluster_bootstrap_function(lambda sums: sums[:, 0] / sums[:, 1], totals) == ratio
    with pytest.raises(InputError, match="statistic='undefined in 100%"):
        stats.cluster_bootstrap_function(lambda sums: sums[:, 0] * np.nan, totals)


def test_paired_difference_uses_the_pairing_and_the_shared_clusters():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 3))
    changed = base + 0.2 + 0.05 * rng.normal(size=base.shape)
    clusters = np.repeat([f"c{i}" for i in range(40)], 3)
    result = stats.paired_cluster_difference(base.ravel(), changed.ravel(), clusters)
    assert result.low < 0.2 < result.high
    assert result.high - result.low < 0.05
    assert result.p == pytest.approx(1 / 2001)
    assert result.n == 40
    assert result.mde == pytest.approx(2.8 * (result.high - result.low) / 3.92, rel=0.1)

    # The other order of rows and a cluster that only one side has change nothing.
    order = rng.permutation(len(clusters))
    again = stats.paired_cluster_difference(
        np.append(base.ravel(), 99.0), changed.ravel()[order], [*clusters, "only in a"], list(clusters[order])
    )
    assert again == pytest.approx(result)


def test_paired_p_is_the_share_of_sign_flips():
    """Six clusters that all change alike: 2 of the 64 labellings are as extreme."""
    result = stats.paired_cluster_difference(np.zeros(6), np.ones(6), range(6), n_resamples=20_000)
    assert result.p == pytest.approx(2 / 64, abs=0.005)


def test_paired_difference_of_equal_runs_claims_nothing():
    result = stats.paired_cluster_difference([0, 1, 1, 0], [0, 1, 1, 0], range(4))
    assert result[:4] == (0.0, 0.0, 0.0, 1.0)
    assert np.isnan(result.mde)


def test_paired_p_has_its_size():
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        effect = rng.normal(size=(20, 1))
        a, b = (effect + rng.normal(size=(20, 1)) + 0.2 * rng.normal(size=(20, 4)) for _ in range(2))
        p = stats.paired_cluster_difference(a.ravel(), b.ravel(), np.repeat(range(20), 4), n_resamples=199).p
        rejected += p <= 0.05
    assert 4 <= rejected <= 28  # 15 expected
