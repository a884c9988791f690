"""The change between two runs: of the classifier bound, and adjusted for all layers and heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp
from simulated_sums import clouds, sums_of

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import HeldOutLoss
from lmms_keyspace.stats.paired import change_from_jackknife

NAMES = tuple(f"c{i:02d}" for i in range(24))


def losses(rng, shape=(), ease=None, gain=0.0, noise=0.02, names=NAMES):
    """Mean log-losses near .4 nats a token; `ease` is what makes a cluster easy in every run."""
    d = len(names)
    counts = [np.asarray(rng.integers(2, 9, d)) for _ in range(2)]
    ease = np.zeros(d) if ease is None else ease
    visual, text = ((0.4 + ease - gain + noise * rng.standard_normal((*shape, d))) * n for n in counts)
    return HeldOutLoss(visual, text, np.zeros_like(visual), *counts, names)


def test_the_bound_is_ln_2_less_the_balanced_mean_loss():
    loss = losses(np.random.default_rng(0), (2,))
    expected = (
        np.log(2) - (loss.loss_visual.sum(-1) / loss.n_visual.sum() + loss.loss_text.sum(-1) / loss.n_text.sum()) / 2
    )
    np.testing.assert_allclose(stats.js_from_losses(loss), expected)
    assert stats.js_from_losses(stats.mean_losses([loss, loss])) == pytest.approx(expected.mean())
    low, high = stats.js_bootstrap(loss)[1:]
    assert (low < expected).all()
    assert (expected < high).all()


def test_a_change_that_all_clusters_share_is_found_where_unpaired_intervals_overlap():
    rng = np.random.default_rng(0)
    ease = 0.15 * rng.standard_normal(len(NAMES))
    a, b = losses(np.random.default_rng(1), ease=ease), losses(np.random.default_rng(1), ease=ease, gain=0.03)
    change = stats.paired_js_difference(a, b)
    assert change.delta == pytest.approx(0.03)
    assert change.p < 1e-3
    assert change.n == len(NAMES)
    intervals = [stats.js_bootstrap(loss) for loss in (a, b)]
    assert intervals[0].high > intervals[1].low


def test_the_change_of_the_bound_matches_clusters_by_name_and_has_its_size():
    rejected = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        ease = 0.15 * rng.standard_normal(len(NAMES))
        rejected += float(stats.paired_js_difference(losses(rng, ease=ease), losses(rng, ease=ease)).p) <= 0.05
    assert 5 <= rejected <= 30
    a, b = losses(np.random.default_rng(0)), losses(np.random.default_rng(1))
    order = np.random.default_rng(2).permutation(len(NAMES))
    a, b = (replace(loss, fit_influence=0.01 * rng.standard_normal(len(NAMES))) for loss in (a, b))
    mixed = HeldOutLoss(
        **{name: getattr(b, name)[order] for name in b.ARRAYS},
        n_visual=b.n_visual[order],
        n_text=b.n_text[order],
        clusters=tuple(np.asarray(NAMES)[order]),
    )
    np.testing.assert_allclose(stats.paired_js_difference(a, mixed)[:5], stats.paired_js_difference(a, b)[:5])


def test_what_a_cluster_does_to_the_fits_widens_the_intervals():
    """Of the change: jackknife of losses and fits together. Of the bound: the spread of drawn sums of influences."""
    rng = np.random.default_rng(0)
    a, b = losses(rng), losses(rng)
    moved = replace(b, fit_influence=rng.normal(scale=0.01, size=len(NAMES)))
    given, counted = (stats.paired_js_difference(a, loss) for loss in (b, moved))
    assert counted.delta == given.delta
    d = len(NAMES)
    deleted = np.empty(d)
    for g in range(d):
        kept = np.arange(d) != g
        bounds = [
            -(loss.loss_visual[kept].sum() / loss.n_visual[kept].sum()
              + loss.loss_text[kept].sum() / loss.n_text[kept].sum()) / 2
            for loss in (a, b)
        ]  # fmt: skip
        deleted[g] = bounds[1] - bounds[0] + moved.fit_influence[g]
    se = np.sqrt((d - 1) / d * np.square(deleted - deleted.mean()).sum())
    assert counted.high - counted.delta == pytest.approx(se * student_t.ppf(0.975, d - 1))

    exact = replace(b, loss_visual=0.4 * b.n_visual, loss_text=0.4 * b.n_text, fit_influence=moved.fit_influence)
    value, low, high = stats.js_bootstrap(exact, n_resamples=20_000)
    spread = np.sqrt(np.square(exact.fit_influence - exact.fit_influence.mean()).sum())
    assert value == pytest.approx(np.log(2) - 0.4)
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.05)


def test_adjusted_for_layers_and_heads():
    """No p or interval gets narrower, and over many equal tests some p falls below .05 but no adjusted one."""
    rng = np.random.default_rng(0)
    x, y = clouds(rng, heads=40, documents=16, shift=1.0)
    a, b = (sums_of(x + 0.3 * rng.normal(size=x.shape), y) for _ in range(2))
    change = stats.paired_mmd2_difference(a, b)
    assert (change.p_adjusted >= change.p).all()
    assert (change.band_low <= change.low).all()
    assert (change.band_high >= change.high).all()
    assert change.p.min() < 0.05 < change.p_adjusted.min()
    alone = stats.paired_mmd2_difference(
        *(replace(s, vv=s.vv[:1], tt=s.tt[:1], vt=s.vt[:1]) for s in (a, b)), n_resamples=20_000
    )
    assert alone.p_adjusted == pytest.approx(alone.p, abs=0.02)


def test_p_and_band_are_those_of_t_tests_whose_values_change_sign():
    """Against scipy, for a statistic that is a mean: its pseudo-values are the values."""
    values = np.random.default_rng(0).normal(size=(3, 12)) * [[1], [2], [3]] + 0.8
    deleted = (values.sum(axis=-1, keepdims=True) - values) / 11
    change = change_from_jackknife(values.mean(axis=-1), deleted, level=0.9, n_resamples=400, seed=4)
    signs = 2 * np.random.default_rng([4, 3]).integers(0, 2, size=(400, 1, 12)) - 1
    largest = abs(ttest_1samp((values - values.mean(axis=-1, keepdims=True)) * signs, 0, axis=-1).statistic).max(
        axis=-1
    )
    single = ttest_1samp(values, 0, axis=-1)
    np.testing.assert_allclose(change.p, single.pvalue)
    exceeded = (largest >= abs(single.statistic)[:, None]).sum(axis=-1)
    np.testing.assert_allclose(change.p_adjusted, np.maximum((1 + exceeded) / 401, single.pvalue))
    wide = np.quantile(largest, 0.9)
    np.testing.assert_allclose(change.band_high - change.delta, wide * change.delta / single.statistic)


def test_adjusted_p_keeps_the_rate_of_any_false_alarm():
    """12 equal tests, 200 pairs of runs of equal law: some adjusted p is at most .05 in about 5 % of them."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(200):
        x, y = clouds(rng, heads=12, documents=20, shift=1.0, tokens=2)
        a, b = (sums_of(x + 0.3 * rng.normal(size=x.shape), y) for _ in range(2))
        alarms += stats.paired_mmd2_difference(a, b, n_resamples=499).p_adjusted.min() <= 0.05
    assert 2 <= alarms <= 20


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"clusters": tuple(f"x{i}" for i in range(24))}, "clusters"),
        ({"n_visual": np.zeros(24, int)}, "n_visual"),
        (dict.fromkeys(HeldOutLoss.ARRAYS, np.zeros((2, 24))), "b"),
    ],
)
def test_losses_that_cannot_be_compared_are_named(change, argument):
    a = losses(np.random.default_rng(0))
    with pytest.raises(InputError) as error:
        stats.paired_js_difference(a, replace(a, **change))
    assert error.value.argument == argument
