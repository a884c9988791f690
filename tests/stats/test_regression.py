"""Slopes with cluster-robust errors: against statsmodels, against the naive error, and in a simulation."""

import numpy as np
import pytest

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError


@pytest.fixture
def sample():
    """[120] outcome, predictor, cluster and stratum; both share an effect of the cluster."""
    rng = np.random.default_rng(0)
    cluster, stratum = np.repeat(np.arange(30), 4), np.tile([0, 1, 1, 2], 30)
    shared = rng.standard_normal(30)[cluster]
    x = rng.standard_normal(120) + 0.5 * shared
    y = 0.3 * x + shared + 0.4 * stratum + rng.standard_normal(120)
    return y, x, cluster, stratum


def test_slopes_equal_those_of_statsmodels(sample):
    """statsmodels 0.15.0, `OLS(y, [x, dummies]).fit(cov_type="cluster", use_t=True)` on this sample."""
    y, x, cluster, stratum = sample
    with_strata = stats.cluster_slopes(y, x, cluster, strata=stratum)
    plain = stats.cluster_slopes(y, x, cluster)
    reference = (0.38240177984759816, 0.11414421646354522, 0.6506593432316511, 0.006782524674968778)
    assert with_strata[:4] == pytest.approx(reference, rel=1e-10)
    reference = (0.42180741051997817, 0.1501488687541112, 0.6934659522858451, 0.0035310978130438484)
    assert plain[:4] == pytest.approx(reference, rel=1e-10)
    assert (plain.n, plain.clusters) == (120, 30)


def test_many_predictors_at_once_equal_one_at_a_time(sample):
    y, x, cluster, stratum = sample
    many = np.stack([x, x**2, -x]).reshape(3, 1, 120)
    together = stats.cluster_slopes(y, many, cluster, strata=stratum)
    assert together.slope.shape == (3, 1)
    for index in range(3):
        alone = stats.cluster_slopes(y, many[index, 0], cluster, strata=stratum)
        assert [field[index, 0] for field in together[:4]] == pytest.approx([float(field) for field in alone[:4]])
    assert together.slope[2, 0] == pytest.approx(-together.slope[0, 0])


def test_the_order_of_rows_does_not_matter(sample):
    shuffled = np.random.default_rng(1).permutation(120)
    y, x, cluster, stratum = sample
    expected = stats.cluster_slopes(y, x, cluster, strata=stratum)
    found = stats.cluster_slopes(y[shuffled], x[shuffled], cluster[shuffled], strata=stratum[shuffled])
    assert found[:4] == pytest.approx(expected[:4])


def test_nothing_that_varies_gives_no_slope(sample):
    y, x, cluster, stratum = sample
    constant = stats.cluster_slopes(y, 0.1 + 0.2 * stratum, cluster, strata=stratum)
    assert np.isnan(constant[:4]).all()
    equal = stats.cluster_slopes(np.ones(120), x, cluster)
    assert equal.slope == 0
    assert np.isnan(equal.p)
    assert np.isnan(stats.cluster_slopes(2 * x, x, cluster).p)


def test_the_test_keeps_its_level_under_cluster_effects_and_the_row_wise_one_does_not():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(40), 6)
    rejected = np.zeros(2)
    for _ in range(400):
        x = rng.standard_normal(40)[cluster] + 0.3 * rng.standard_normal(240)
        y = rng.standard_normal(40)[cluster] + rng.standard_normal(240)
        rejected += [stats.cluster_slopes(y, x, labels).p < 0.05 for labels in (cluster, np.arange(240))]
    clustered, by_row = rejected / 400
    assert 0.03 <= clustered <= 0.09  # 0.05 with a Monte Carlo error of 0.011, and CR1 is a little liberal
    assert by_row > 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clusters": ["a"] * 120}, "1 clusters"),
        ({"x": np.zeros(119)}, "one value per row"),
        ({"y": np.full(120, np.nan)}, "not finite"),
        ({"strata": range(120)}, "120 rows"),
    ],
)
def test_bad_input_is_refused(sample, change, message):
    y, x, cluster, _ = sample
    with pytest.raises(InputError, match=message):
        stats.cluster_slopes(**({"y": y, "x": x, "clusters": cluster} | change))
