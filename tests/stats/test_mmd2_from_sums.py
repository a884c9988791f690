"""MMD^2 from saved sums: by brute force, by simulation against the truth, and between runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from simulated_sums import clouds, kernel_matrix, sums_of, truth

from lmms_keyspace import stats
from lmms_keyspace.records import KernelSums
from lmms_keyspace.stats.clusters import resample


def delete(sums, i):
    keep = np.delete(np.arange(len(sums.clusters)), i)
    block = np.ix_(range(len(sums.vv)), keep, keep)
    return KernelSums(
        sums.vv[block], sums.tt[block], sums.vt[block], sums.n_visual[keep], sums.n_text[keep],
        tuple(sums.clusters[j] for j in keep),
    )  # fmt: skip


def uneven(rng, heads=2, documents=9):
    """Sums with uneven token counts; one document lacks visual tokens, one lacks both."""
    n_v, n_t = rng.integers(1, 6, documents), rng.integers(1, 6, documents)
    n_v[[3, 5]] = 0
    n_t[5] = 0
    x, y = rng.normal(size=(heads, n_v.sum(), 3)) + 0.5, rng.normal(size=(heads, n_t.sum(), 3))
    own_v, own_t = (np.eye(documents)[np.repeat(np.arange(documents), n)] for n in (n_v, n_t))
    vv, tt, vt = kernel_matrix(x, x), kernel_matrix(y, y), kernel_matrix(x, y)
    names = tuple(f"doc{i}" for i in range(documents))
    sums = KernelSums(own_v.T @ vv @ own_v, own_t.T @ tt @ own_t, own_v.T @ vt @ own_t, n_v, n_t, names)
    return sums, (vv, tt, vt), (own_v.argmax(1), own_t.argmax(1))


def test_mmd2_leaves_out_every_pair_of_one_document():
    sums, (vv, tt, vt), (doc_v, doc_t) = uneven(np.random.default_rng(0))

    def mean_over_pairs(kernel, left, right):
        other = left[:, None] != right[None]
        return kernel[..., other].mean(-1)

    expected = (
        mean_over_pairs(vv, doc_v, doc_v) + mean_over_pairs(tt, doc_t, doc_t) - 2 * mean_over_pairs(vt, doc_v, doc_t)
    )
    np.testing.assert_allclose(stats.mmd2_from_sums(sums), expected, rtol=1e-12)


def test_jackknife_deletes_whole_documents():
    sums, _, _ = uneven(np.random.default_rng(0))
    occupied = [i for i in range(9) if i != 5]
    deleted = np.stack([stats.mmd2_from_sums(delete(sums, i)) for i in occupied])
    se = np.sqrt((8 - 1) / 8 * ((deleted - deleted.mean(0)) ** 2).sum(0))
    result = stats.mmd2_jackknife(sums)
    np.testing.assert_allclose(result.value, stats.mmd2_from_sums(sums))
    np.testing.assert_allclose(result.high - result.value, scipy.stats.t.ppf(0.975, 7) * se, rtol=1e-10)
    np.testing.assert_allclose(result.value - result.low, result.high - result.value)


def test_head_all_is_the_mean_of_the_heads():
    sums, _, _ = uneven(np.random.default_rng(0), heads=5)
    assert stats.mmd2_from_sums(stats.mean_over_heads(sums)) == pytest.approx(stats.mmd2_from_sums(sums).mean())


def test_split_half_compares_disjoint_halves_of_the_documents():
    rng = np.random.default_rng(0)
    x, y = clouds(rng, heads=1, documents=10)
    sums = sums_of(x, y)
    expected = []
    for split in range(3):
        first = stats.first_half(sums.clusters, 7, split)
        assert first.sum() == 5
        expected.append(stats.mmd2_from_sums(sums_of_halves(x, first)))
    visual, text = stats.split_half_mmd2(sums, seed=7, n_splits=3)
    np.testing.assert_allclose(visual.value, np.mean(expected, axis=0))
    assert text.value != pytest.approx(visual.value)
    few = sums_of(x[:, :5], y[:, :5])
    assert stats.split_half_mmd2(few) == (None, None)


def sums_of_halves(x, first):
    """The halves as two modalities that share no document: a far-away empty document holds each one's place."""
    documents, tokens = x.shape[1:3]
    own = np.eye(documents)[np.repeat(np.arange(documents), tokens)]
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    kernel = own.T @ kernel_matrix(flat, flat) @ own
    a, b = first.astype(float), (~first).astype(float)
    return KernelSums(
        kernel * np.outer(a, a), kernel * np.outer(b, b), kernel * np.outer(a, b),
        tokens * first, tokens * ~first, tuple(map(str, range(documents))),
    )  # fmt: skip


def test_cluster_statistic_is_unbiased_where_the_token_statistic_is_not():
    x, y = clouds(np.random.default_rng(0), heads=1500, documents=12)
    sums = sums_of(x, y)
    values = stats.mmd2_from_sums(sums)
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))

    n = sums.n_visual.sum()
    vv, tt, vt = (m.sum(axis=(-2, -1)) for m in (sums.vv, sums.tt, sums.vt))
    token = (vv - n) / (n * (n - 1)) + (tt - n) / (n * (n - 1)) - 2 * vt / n**2
    assert token.mean() > 20 * token.std() / np.sqrt(len(token))


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_jackknife_covers_at_24_documents(shift):
    x, y = clouds(np.random.default_rng(0), heads=400, documents=24, shift=shift)
    value, low, high = stats.mmd2_jackknife(sums_of(x, y))
    assert abs(value.mean() - truth(shift)) < 3 * value.std() / np.sqrt(400)
    assert np.mean((low <= truth(shift)) & (truth(shift) <= high)) >= 0.9


def test_naive_bootstrap_would_not_cover():
    """Why there is a jackknife: a resample that holds a document twice counts its copies as independent evidence."""
    rng = np.random.default_rng(0)
    sums = sums_of(*clouds(rng, heads=100, documents=24, width=16), bandwidth2=60.0)
    draws = []
    for _ in range(200):
        drawn = rng.integers(0, 24, 24)
        block = np.ix_(range(100), drawn, drawn)
        draws.append(stats.mmd2_from_sums(replace(sums, vv=sums.vv[block], tt=sums.tt[block], vt=sums.vt[block])))
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    assert np.mean((low <= 0) & (high >= 0)) < 0.25
    _, low, high = stats.mmd2_jackknife(sums)
    assert np.mean((low <= 0) & (high >= 0)) >= 0.9


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_bootstrap_that_leaves_copies_out_covers_at_24_documents(shift):
    rng = np.random.default_rng(0)
    sums = sums_of(*clouds(rng, heads=300, documents=24, shift=shift))
    value, low, high = stats.mmd2_bootstrap(sums, n_resamples=300)
    np.testing.assert_allclose(value, stats.mmd2_from_sums(sums))
    assert np.mean((low <= truth(shift)) & (truth(shift) <= high)) >= 0.89


def test_bootstrap_draws_leave_out_pairs_of_a_document_with_its_copy():
    """Every draw by hand: weights of document pairs, none on the diagonal."""
    sums, _, _ = uneven(np.random.default_rng(0))
    kept = np.flatnonzero(sums.n_visual + sums.n_text)
    draws = []
    for counts in resample(len(kept), 50, 3):
        weight = np.zeros(9)
        weight[kept] = counts
        weight = np.outer(weight, weight) * (1 - np.eye(9))
        means = [
            (weight * matrix).sum(axis=(-2, -1)) / (weight * np.outer(a, b)).sum()
            for matrix, a, b in (
                (sums.vv, sums.n_visual, sums.n_visual),
                (sums.tt, sums.n_text, sums.n_text),
                (sums.vt, sums.n_visual, sums.n_text),
            )
        ]
        draws.append(means[0] + means[1] - 2 * means[2])
    _, low, high = stats.mmd2_bootstrap(sums, n_resamples=50, seed=3)
    np.testing.assert_allclose((low, high), np.quantile(draws, (0.025, 0.975), axis=0), rtol=1e-10)


def test_paired_difference_between_runs():
    """A common change of all documents: nominal coverage, and far tighter than comparing unpaired runs."""
    rng = np.random.default_rng(0)
    x, y = clouds(rng, heads=300, documents=24, shift=1.0)
    a = sums_of(x, y)
    b = sums_of(x + 0.1, y)
    result = stats.paired_mmd2_difference(a, b)
    expected = truth(1.1) - truth(1.0)
    assert np.mean((result.low <= expected) & (expected <= result.high)) >= 0.9
    _, low, high = stats.mmd2_jackknife(a)
    assert np.median((high - low) / (result.high - result.low)) > 5
    np.testing.assert_allclose(result.delta, stats.mmd2_from_sums(b) - stats.mmd2_from_sums(a), atol=1e-12)
    assert result.n == 24


def test_paired_difference_has_its_size():
    """Two runs that differ by noise of equal law: rejected at 5 % about 5 % of the time."""
    rng = np.random.default_rng(1)
    x, y = clouds(rng, heads=400, documents=24, shift=1.0)
    a, b = (sums_of(x + 0.3 * rng.normal(size=x.shape), y) for _ in range(2))
    assert 0.02 <= np.mean(stats.paired_mmd2_difference(a, b).p < 0.05) <= 0.09


def test_paired_difference_matches_documents_by_name():
    x, y = clouds(np.random.default_rng(0), heads=2, documents=8)
    a = sums_of(x, y)
    order = [5, 2, 7, 1, 0]
    b = sums_of(x[:, order] + 0.3, y[:, order], tuple(a.clusters[i] for i in order))
    kept = sorted(order)
    direct = stats.paired_mmd2_difference(sums_of(x[:, kept], y[:, kept]), sums_of(x[:, kept] + 0.3, y[:, kept]))
    result = stats.paired_mmd2_difference(a, b)
    assert result.n == 5
    np.testing.assert_allclose(np.stack(result[:5]), np.stack(direct[:5]), rtol=1e-9)


def test_paired_difference_of_a_run_with_itself():
    x, y = clouds(np.random.default_rng(0), heads=1, documents=8)
    result = stats.paired_mmd2_difference(sums_of(x, y), sums_of(x, y))
    assert (result.delta, result.low, result.high, result.p) == (0, 0, 0, 1)
    assert np.isnan(result.mde).all()
