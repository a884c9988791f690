"""Linear CKA against its Gram form, and what it does not see."""

from __future__ import annotations

import numpy as np
import pytest

from lmms_keyspace.divergence import linear_cka
from lmms_keyspace.errors import InputError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 50, 6)), RNG.normal(size=(2, 50, 4))


def test_it_is_the_normalized_inner_product_of_centered_gram_matrices():
    for h in range(2):
        centering = np.eye(50) - 1 / 50
        k, q = (centering @ cloud[h] @ cloud[h].T @ centering for cloud in (X, Y))
        expected = (k * q).sum() / np.sqrt((k * k).sum() * (q * q).sum())
        assert linear_cka(X, Y)[h] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(linear_cka(Y, X), linear_cka(X, Y))


def test_one_for_keys_equal_up_to_rotation_scale_and_translation():
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    np.testing.assert_allclose(linear_cka(X, 3 * X @ rotation + 100), 1)
    noisy = [linear_cka(X, X + s * RNG.normal(size=X.shape))[0] for s in (0.1, 0.5, 2.0)]
    assert 1 > noisy[0] > noisy[1] > noisy[2]


def test_it_is_of_tokens_in_their_order():
    assert (linear_cka(X, X[:, ::-1]) < 0.5).all()


@pytest.mark.parametrize(
    ("x", "y", "argument"),
    [(X, Y[:, :49], "y"), (X, Y[:1], "y"), (X, np.ones_like(Y), "x"), (X * np.nan, Y, "x"), (X, Y[0, 0], "y")],
)
def test_bad_input_is_named(x, y, argument):
    with pytest.raises(InputError) as error:
        linear_cka(x, y)
    assert error.value.argument == argument
