"""The classifier bound against scikit-learn's fits and against divergences known by quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_clouds import clouds, true_js
from sklearn.linear_model import LogisticRegression

from lmms_keyspace.divergence import JSClassifier, js_classifier
from lmms_keyspace.divergence.js import LN2
from lmms_keyspace.divergence.logistic import fit
from lmms_keyspace.errors import InputError


@pytest.mark.parametrize("n_text", [400, 130])
def test_the_fit_is_scikit_learns(n_text):
    """Balanced classes, L2 on standardized features, intercept free; all heads at once."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 400, 6)) * 5 + 20, rng.normal(size=(3, n_text, 6)) * 4 + 21
    features = np.concatenate([x, y], axis=1)
    is_x = np.arange(400 + n_text) < 400
    classifier = JSClassifier(tolerance=1e-10)
    start = (torch.from_numpy(rng.normal(size=(3, 6)) / 5), torch.ones(3, 1, dtype=torch.float64))  # any will do
    settings = {"l2": classifier.l2, "tolerance": classifier.tolerance, "max_iterations": 50}
    weight, bias, *_ = fit(torch.from_numpy(features), torch.from_numpy(is_x), *start, **settings)
    for h in range(3):
        mean, deviation = features[h].mean(0), features[h].std(0)
        sample_weight = np.where(is_x, 0.5 / 400, 0.5 / n_text)
        oracle = LogisticRegression(C=1 / classifier.l2, tol=1e-10, max_iter=1000)
        oracle.fit((features[h] - mean) / deviation, is_x, sample_weight=sample_weight)
        np.testing.assert_allclose(weight[h] * deviation, oracle.coef_[0], atol=1e-5)
        logit = features[h] @ weight[h].numpy() + bias[h].item()
        np.testing.assert_allclose(logit, oracle.decision_function((features[h] - mean) / deviation), atol=1e-5)


def test_the_bound_is_the_balanced_log_loss_of_images_not_fitted():
    """Unequal sides; each fold's loss from scikit-learn fitted on the other folds, for the folds the code dealt."""
    x, y, groups = clouds(0, 1, 12, 10, 3, shift=1.0)
    y, groups_y = y[:, :70], groups[:70]
    classifier = JSClassifier(folds=3, tolerance=1e-10, shrinkage=(1.0,))
    names = sorted(set(groups))
    fold = classifier._deal(tuple(names), np.ones(12, bool), np.isin(names, groups_y), seed=5)
    fold_x, fold_y = (np.array([fold[names.index(g)] for g in side]) for side in (groups, groups_y))
    losses_x, losses_y = np.empty(120), np.empty(70)
    for k in range(3):
        train = np.concatenate([x[0][fold_x != k], y[0][fold_y != k]])
        label = np.r_[np.ones((fold_x != k).sum()), np.zeros((fold_y != k).sum())]
        weight = np.where(label == 1, 0.5 / label.sum(), 0.5 / (1 - label).sum())
        mean, deviation = train.mean(0), train.std(0)
        oracle = LogisticRegression(C=1 / classifier.l2, tol=1e-10, max_iter=1000)
        oracle.fit((train - mean) / deviation, label, sample_weight=weight)
        losses_x[fold_x == k] = -oracle.predict_log_proba((x[0][fold_x == k] - mean) / deviation)[:, 1]
        losses_y[fold_y == k] = -oracle.predict_log_proba((y[0][fold_y == k] - mean) / deviation)[:, 0]
    expected = LN2 - (losses_x.mean() + losses_y.mean()) / 2
    value = classifier(x, y, groups_x=groups, groups_y=groups_y, seed=5).value[0]
    assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("width", "shift"), [(4, 1.0), (8, 1.5)])
def test_the_influence_of_an_image_on_the_fits_is_that_of_leaving_it_out(width, shift):
    """Scikit-learn's fits without each image in turn, the standardization held fixed; unequal sides."""
    x, y, groups = clouds(9, 1, 60, 6, width, shift=shift, image_effect=0.7)
    groups = groups.astype(str)
    y, groups_y = y[:, :300], groups[:300]
    factor = 0.7
    classifier = JSClassifier(tolerance=1e-10, shrinkage=(factor,))
    loss = classifier.held_out(x, y, groups_x=groups, groups_y=groups_y)
    fold = classifier._deal(loss.clusters, loss.n_visual > 0, loss.n_text > 0, seed=0)
    tokens, names = np.concatenate([x[0], y[0]]), np.concatenate([groups, groups_y])
    fold_of = np.array([fold[loss.clusters.index(name)] for name in names])
    label = np.arange(len(tokens)) < x.shape[1]

    def bound(left_out):
        total = 0.0
        for k in range(5):
            fitted, judged = (fold_of != k) & (names != left_out), fold_of == k
            mean, deviation = tokens[fold_of != k].mean(0), tokens[fold_of != k].std(0)
            oracle = LogisticRegression(C=1 / classifier.l2, tol=1e-10, max_iter=1000)
            sample_weight = np.where(label[fitted], 0.5 / label[fitted].sum(), 0.5 / (~label[fitted]).sum())
            oracle.fit((tokens[fitted] - mean) / deviation, label[fitted], sample_weight=sample_weight)
            logit = factor * oracle.decision_function((tokens[judged] - mean) / deviation)
            side = np.where(label[judged], 0.5 / label.sum(), 0.5 / (~label).sum())
            total += side @ np.logaddexp(0, np.where(label[judged], -logit, logit))
        return LN2 - total

    left_out = np.array([bound(name) for name in loss.clusters]) - bound(None)
    influence = loss.fit_influence[0]
    assert np.corrcoef(influence, left_out)[0, 1] > 0.98
    assert left_out @ influence / (influence @ influence) == pytest.approx(1, abs=0.1)


def test_no_image_is_fitted_and_judged_and_no_fold_takes_a_side():
    names = tuple(f"image{i}" for i in range(23))
    in_x, in_y = np.arange(23) < 15, np.arange(23) >= 9
    fold = js_classifier._deal(names, in_x, in_y, seed=0)
    assert fold.shape == (23,)
    for side in (in_x, in_y):
        assert np.bincount(fold[side], minlength=5).max() < side.sum() / 2


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 4.0])
def test_approaches_the_known_divergence_from_below(shift):
    x, y, groups = clouds(1, 8, 60, 32, 8, shift)
    value = js_classifier(x, y, groups_x=groups, groups_y=groups).value
    truth = true_js(shift)
    assert value.mean() < truth + 3 * value.std() / np.sqrt(8)
    assert value.mean() > truth - 0.03


def test_null_is_about_zero_and_not_clipped():
    x, y, groups = clouds(2, 20, 40, 16, 8)
    value = js_classifier(x, y, groups_x=groups, groups_y=groups).value
    assert abs(value.mean()) < 0.002
    assert value.min() < 0


def test_image_effects_do_not_fake_a_divergence():
    """8 images a side, each with its own offset: held out by token, a classifier recognizes the images."""
    x, y, groups = clouds(3, 10, 8, 32, 8, image_effect=1.0)
    by_image = js_classifier(x, y, groups_x=groups, groups_y=np.char.add("text-", groups.astype(str))).value
    by_token = js_classifier(x, y, groups_x=range(256), groups_y=range(256, 512)).value
    assert by_image.mean() < 0
    assert by_token.mean() > 4 * by_token.std() / np.sqrt(10)


def test_separable_clouds_are_at_the_ceiling():
    x, y, groups = clouds(4, 2, 30, 16, 32, shift=12.0)
    result = js_classifier(x, y, groups_x=groups, groups_y=groups)
    assert result.at_ceiling.all()
    assert (result.value < LN2).all()
    overlapping, y, groups = clouds(4, 2, 30, 16, 32, shift=2.0)
    assert not js_classifier(overlapping, y, groups_x=groups, groups_y=groups).at_ceiling.any()


def test_interval_covers_and_shrinks_with_images():
    widths = []
    for images in (20, 80):
        x, y, groups = clouds(5, 60, images, 4, 2, shift=1.0, image_effect=0.3)
        result = js_classifier(x, y, groups_x=groups, groups_y=groups)
        assert ((result.low < result.value) & (result.value < result.high)).all()
        # Heads are independent draws here, so their mean stands in for the bound's expectation.
        mean = result.value.mean()
        assert np.mean((result.low <= mean) & (mean <= result.high)) >= 0.8
        widths.append((result.high - result.low).mean())
    assert widths[1] < 0.65 * widths[0]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_outliers_constant_features_and_single_precision(offset):
    """Massive values in one dimension, a constant one, far from the origin: as in double precision."""
    x, y, groups = clouds(6, 2, 20, 16, 6, shift=1.0)
    x[:, 5, 3], x[..., 4], y[..., 4] = 500.0, 1.0, 1.0
    double = js_classifier(x, y, groups_x=groups, groups_y=groups).value
    single = js_classifier(
        (x + offset).astype(np.float32), (y + offset).astype(np.float32), groups_x=groups, groups_y=groups
    ).value
    np.testing.assert_allclose(single, double, atol=2e-3)


def test_a_fit_that_single_precision_cannot_finish_is_repeated_in_double():
    x, y, groups = clouds(6, 2, 20, 16, 6, shift=1.0)
    strict = JSClassifier(tolerance=1e-12)
    single = strict(x.astype(np.float32), y.astype(np.float32), groups_x=groups, groups_y=groups).value
    np.testing.assert_allclose(single, strict(x, y, groups_x=groups, groups_y=groups).value, atol=1e-6)
    with pytest.raises(RuntimeError, match="did not converge in 1 Newton"):
        JSClassifier(max_iterations=1)(x, y, groups_x=groups, groups_y=groups)


def test_constant_keys_of_one_kind_tell_nothing():
    keys = np.ones((2, 40, 4))
    groups = np.repeat(range(10), 4)
    result = js_classifier(keys, keys, groups_x=groups, groups_y=groups)
    np.testing.assert_allclose(result.value, 0, atol=1e-6)


def test_the_seed_decides_the_folds():
    x, y, groups = clouds(7, 1, 12, 8, 4)
    runs = [js_classifier(x, y, groups_x=groups, groups_y=groups, seed=seed).value[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("groups_x", "argument"), [(["a"] * 8, "groups_x"), (["a", "b"], "groups_x"), (["a"] * 7, "groups_x")]
)
def test_bad_input_is_named(groups_x, argument):
    x, y, groups = clouds(8, 1, 4, 2, 3)
    with pytest.raises(InputError) as error:
        js_classifier(x, y, groups_x=groups_x, groups_y=groups)
    assert error.value.argument == argument


def test_an_overconfident_classifier_does_not_drive_the_bound_far_below_zero():
    """Few images with effects of their own and many dimensions: the raw log-loss is that of a confident fool."""
    rng = np.random.default_rng(11)
    groups = np.repeat([f"image{g}" for g in range(16)], 16)
    x, y = (np.repeat(rng.normal(size=(16, 64)), 16, axis=0) + rng.normal(size=(256, 64)) for _ in range(2))
    other = np.array([f"other {name}" for name in groups])
    raw = JSClassifier(shrinkage=(1.0,))(x, y, groups_x=groups, groups_y=other).value
    shrunk = JSClassifier()(x, y, groups_x=groups, groups_y=other).value
    assert raw < -0.5
    assert -0.05 < shrunk < 0.1
