"""Bad input is named, seeded orders stay, and nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from simulated_sums import clouds, sums_of

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError

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


def test_hash_ranks_do_not_depend_on_the_order_given():
    names = [f"doc{i}" for i in range(50)]
    ranks = dict(zip(names, stats.hash_ranks(names, 3), strict=True))
    assert sorted(ranks.values()) == list(range(50))
    assert dict(zip(names[::-1], stats.hash_ranks(names[::-1], 3), strict=True)) == ranks
    assert dict(zip(names, stats.hash_ranks(names, 4), strict=True)) != ranks
