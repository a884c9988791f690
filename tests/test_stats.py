"""Statistics against other libraries, hand calculations, brute force and simulation."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums


def kernel_matrix(a, b, bandwidth2=4.0):
    return np.exp(-((a[..., :, None, :] - b[..., None, :, :]) ** 2).sum(-1) / bandwidth2)


def sums_of(x, y, names=None, bandwidth2=4.0):
    """Sums by document of x, y [..., D, tokens, d] with equal tokens per document."""
    d = x.shape[-3]

    def by_document(a, b):
        tokens_a, tokens_b = a.shape[-2], b.shape[-2]
        flat = kernel_matrix(
            a.reshape(*a.shape[:-3], -1, a.shape[-1]), b.reshape(*b.shape[:-3], -1, b.shape[-1]), bandwidth2
        )
        return flat.reshape(*a.shape[:-3], d, tokens_a, d, tokens_b).sum(axis=(-3, -1))

    counts = [np.full(d, cloud.shape[-2]) for cloud in (x, y)]
    names = names or tuple(f"doc{i:03d}" for i in range(d))
    return KernelSums(by_document(x, x), by_document(y, y), by_document(x, y), *counts, names)


def clouds(rng, heads, documents, tokens=4, width=3, image_effect=1.0, shift=0.0):
    """Visual and text tokens of documents, each modality with its own effect of the document."""
    x, y = (
        rng.normal(size=(heads, documents, tokens, width))
        + image_effect * rng.normal(size=(heads, documents, 1, width))
        for _ in range(2)
    )
    return x + shift, y


def truth(shift, width=3, image_effect=1.0, bandwidth2=4.0):
    """MMD^2 of N(shift, s2 I) and N(0, s2 I): a Gaussian integral of the kernel."""
    s2 = 1 + image_effect**2
    return 2 * (1 + 4 * s2 / bandwidth2) ** (-width / 2) * (1 - np.exp(-width * shift**2 / (bandwidth2 + 4 * s2)))


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


def test_hash_ranks_do_not_depend_on_the_order_given():
    names = [f"doc{i}" for i in range(50)]
    ranks = dict(zip(names, stats.hash_ranks(names, 3), strict=True))
    assert sorted(ranks.values()) == list(range(50))
    assert dict(zip(names[::-1], stats.hash_ranks(names[::-1], 3), strict=True)) == ranks
    assert dict(zip(names, stats.hash_ranks(names, 4), strict=True)) != ranks


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
    for counts in stats._resample(len(kept), 50, 3):
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


X, Y = clouds(np.random.default_rng(0), heads=1, documents=3)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: stats.wilson(0, 0), "n"),
        (lambda: stats.wilson(3, 2), "k"),
        (lambda: stats.wilson(1, 2, level=95), "level"),
        (lambda: stats.mcnemar_exact(-1, 2), "b"),
        (lambda: stats.holm([0.5, 1.5]), "p_values"),
        (lambda: stats.mde_paired(1.2, 10), "discordance"),
        (lambda: stats.mde_from_se(1.0, power=80), "power"),
        (lambda: stats.cluster_bootstrap([], []), "clusters"),
        (lambda: stats.cluster_bootstrap([1.0, 2.0], ["a", "a"]), "clusters"),
        (lambda: stats.cluster_bootstrap([1.0, np.nan], ["a", "b"]), "values"),
        (lambda: stats.cluster_bootstrap([1.0], ["a", "b"]), "values"),
        (lambda: stats.cluster_bootstrap([1.0, 0.0], ["a", "b"], weights=[0, 0]), "weights"),
        (lambda: stats.cluster_bootstrap([1.0, 0.0], ["a", "b"], weights=[1, -1]), "weights"),
        (lambda: stats.cluster_bootstrap([1.0, 0.0], ["a", "b"], weights=[1, 0]), "weights"),
        (lambda: stats.paired_cluster_difference([1, 2], [1, 2], ["a", "b"], ["c", "d"]), "clusters"),
        (lambda: stats.mmd2_jackknife(sums_of(X, Y)), "n_visual"),
        (lambda: stats.mmd2_bootstrap(sums_of(X, Y)), "n_visual"),
        (lambda: stats.label_flips([1, 1], [1, 1], 0), "n_permutations"),
        (lambda: stats.mmd2_permuted(sums_of(X[:, :1], Y[:, :1]), [[1.0]]), "n_visual"),
        (lambda: stats.mmd2_from_sums(sums_of(X[:, :1], Y[:, :1])), "n_visual"),
        (lambda: stats.paired_mmd2_difference(sums_of(X, Y), sums_of(X, Y)), "clusters"),
    ],
)
def test_bad_input_is_named(call, argument):
    with pytest.raises(InputError) as error:
        call()
    assert error.value.argument == argument


def test_needs_neither_torch_nor_the_harness():
    code = "import sys, lmms_keyspace.stats; print(sorted({'torch', 'lmms_eval'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
