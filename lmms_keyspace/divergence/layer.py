"""All rows of the divergence table of one layer: which contrasts are measured by which estimators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch

from lmms_keyspace.divergence.arrays import Floats
from lmms_keyspace.divergence.centroid import centroid_cosine, centroid_distance, mmd2_linear
from lmms_keyspace.divergence.cka import linear_cka
from lmms_keyspace.divergence.contrasts import (
    N_DRAWS,
    Clouds,
    LayerKeys,
    baseline_contrasts,
    equal_counts_sums,
    fewest_clusters,
    position_null_sums,
)
from lmms_keyspace.divergence.histogram import js_histogram
from lmms_keyspace.divergence.js import js_classifier
from lmms_keyspace.divergence.knn import js_knn
from lmms_keyspace.divergence.paper import Projected, paper_protocol
from lmms_keyspace.divergence.rows import (
    Row,
    clouds_row,
    computed_or_noted,
    head_rows,
    kernel_rows,
    loss_rows,
    with_mean,
)
from lmms_keyspace.divergence.side_by_side import KERNEL_ESTIMATORS, MMD2, kernel_sums_by_estimator, linear_sums
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import (
    BASE_ADAPTED_TEXT,
    BASE_ADAPTED_VISUAL,
    CONTRASTS,
    EQUAL_COUNTS,
    POSITION_NULL,
    TEXT_TEXT,
    VISUAL_TEXT,
    VISUAL_VISUAL,
    WITH_SINKS,
    WITH_TEMPLATE,
    HeldOutLoss,
    KernelSums,
    text_against,
)

JS = "js_classifier"
PAPER = ("paper_mmd", "paper_js_histogram")
# Nearest neighbors cost a distance matrix a head and find nothing in many dimensions.
KNN_TOKENS, KNN_COMPONENTS = 1000, 4


class LayerMeasurement:
    """One layer: `rows` gives its part of the table; `sums` and `losses` then hold what its tests rest on, by contrast.

    Args:
        keys: what was captured.
        seed: of the split halves, folds, bootstrap and draws.
    """

    def __init__(self, keys: LayerKeys, seed: int) -> None:
        self._keys = keys
        self._seed = seed
        self._points: dict[str, tuple[str, Callable[[Clouds], Floats]]] = {
            centroid_distance.name: (centroid_distance.version, lambda c: centroid_distance(c.x, c.y)),
            centroid_cosine.name: (
                centroid_cosine.version,
                lambda c: centroid_cosine(c.x, c.y, groups_x=c.groups_x, groups_y=c.groups_y),
            ),
            js_histogram.name: (
                js_histogram.version,
                lambda c: js_histogram(c.x, c.y, groups_x=c.groups_x, groups_y=c.groups_y, seed=seed),
            ),
            js_knn.name: (js_knn.version, lambda c: _knn(c, seed)),
        }
        self.sums: dict[str, KernelSums] = {}
        self.losses: dict[str, HeldOutLoss] = {}

    def rows(self) -> Iterator[Row]:
        """Rows without task, condition, space and layer; what cannot be computed has a row that says why."""
        for contrast in CONTRASTS:
            yield from computed_or_noted(contrast, KERNEL_ESTIMATORS, partial(self._kernel, contrast))
            yield from computed_or_noted(contrast, [JS], partial(self._classifier, contrast))
            yield from computed_or_noted(contrast, PAPER, partial(self._paper, contrast))
        for name in self._points:
            yield from computed_or_noted(VISUAL_TEXT, [name], partial(self._point, name))
        yield from computed_or_noted(EQUAL_COUNTS, [MMD2], self._equal_counts)
        if self._keys.with_sinks is not None:
            yield from computed_or_noted(WITH_SINKS, [MMD2], self._with_sinks)
        if self._keys.template is not None:
            yield from computed_or_noted(WITH_TEMPLATE, [MMD2], self._with_template)
        if self._keys.unrotated is not None:
            yield from computed_or_noted(POSITION_NULL, [MMD2], self._position_null)
        for other in self._keys.other_text:
            yield from computed_or_noted(text_against(other), [MMD2, JS], partial(self._other, other))
        if self._keys.base is not None:
            for side, contrast in enumerate((BASE_ADAPTED_VISUAL, BASE_ADAPTED_TEXT)):
                yield from computed_or_noted(contrast, [linear_cka.name], partial(self._base, contrast, side))

    @cached_property
    def _clouds(self) -> Clouds:
        keys = self._keys
        try:
            return Clouds.of(keys.visual, keys.text, keys.clusters_visual, keys.clusters_text)
        except InputError as error:
            raise InputError(f"keys of layer {keys.layer}, {error.argument}", error.value, error.way_out) from error

    @cached_property
    def _contrasts(self) -> dict[str, Clouds]:
        return baseline_contrasts(self._clouds, self._seed)

    @cached_property
    def _kernels(self) -> dict[str, KernelSums]:
        clouds = self._clouds
        groups = {"groups_x": clouds.groups_x, "groups_y": clouds.groups_y}
        by_estimator = kernel_sums_by_estimator(clouds.x, clouds.y, **groups, bandwidth2=self._keys.width2)
        self.sums[VISUAL_TEXT] = by_estimator[MMD2]
        return by_estimator | {mmd2_linear.name: linear_sums(clouds.x, clouds.y, **groups)}

    @cached_property
    def _projected(self) -> Projected:
        """Fitted once, on both modalities, for the baselines, too."""
        side_by_side = (cloud.transpose(0, 1).flatten(start_dim=1) for cloud in (self._clouds.x, self._clouds.y))
        return paper_protocol.project(*side_by_side, seed=self._seed)

    def _clouds_of(self, contrast: str) -> Clouds:
        return self._contrasts[contrast].require(fewest_clusters(contrast))

    def _kernel(self, contrast: str) -> Iterator[Row]:
        return kernel_rows(contrast, self._kernels, seed=self._seed)

    def _classifier(self, contrast: str) -> Iterator[Row]:
        return self._classifier_rows(contrast, self._clouds_of(contrast))

    def _classifier_rows(self, contrast: str, clouds: Clouds) -> Iterator[Row]:
        groups = {"groups_x": clouds.groups_x, "groups_y": clouds.groups_y}
        loss = js_classifier.held_out(clouds.x, clouds.y, **groups, seed=self._seed)
        if contrast not in (VISUAL_VISUAL, TEXT_TEXT):
            self.losses[contrast] = loss
        yield from loss_rows(contrast, loss, seed=self._seed)

    def _paper(self, contrast: str) -> Iterator[Row]:
        whole = self._clouds_of(contrast)
        x, y = self._projected.x, self._projected.y
        clouds = baseline_contrasts(replace(self._clouds, x=x, y=y), self._seed)[contrast]
        result = paper_protocol.compare(clouds.x, clouds.y, seed=self._seed)
        for estimator, value in zip(PAPER, (result.mmd, result.js), strict=True):
            yield clouds_row(contrast, estimator, whole) | {
                "estimator_version": paper_protocol.version,
                "value": value, "bandwidth_source": "median of the tokens compared",
                "n_visual": result.tokens, "n_text": result.tokens,
            }  # fmt: skip

    def _point(self, estimator: str) -> Iterator[Row]:
        """Estimators without an interval."""
        clouds = self._clouds_of(VISUAL_TEXT)
        version, compute = self._points[estimator]
        row = clouds_row(VISUAL_TEXT, estimator, clouds) | {"estimator_version": version}
        if estimator == js_knn.name:
            row["token_filter"] = f"at most {KNN_TOKENS} tokens a side, {KNN_COMPONENTS} principal components"
        return head_rows(row, value=with_mean(compute(clouds)))

    def _equal_counts(self) -> Iterator[Row]:
        sums = equal_counts_sums(self._clouds, self._keys.width2, self._seed)
        note = {"token_filter": f"equal counts in every cluster, mean of {N_DRAWS} draws"}
        return (row | note for row in kernel_rows(EQUAL_COUNTS, {MMD2: sums}, seed=self._seed))

    def _with_sinks(self) -> Iterator[Row]:
        assert self._keys.with_sinks is not None
        (visual, clusters_visual), (text, clusters_text) = self._keys.with_sinks
        sums = Clouds.of(visual, text, clusters_visual, clusters_text).sums(self._keys.width2)
        note = {"token_filter": "attention sinks left in"}
        return (row | note for row in kernel_rows(WITH_SINKS, {MMD2: sums}, seed=self._seed))

    def _with_template(self) -> Iterator[Row]:
        keys = self._keys
        assert keys.template is not None
        template, clusters = keys.template
        text, clusters_text = torch.cat([keys.text, template]), [*keys.clusters_text, *clusters]
        sums = Clouds.of(keys.visual, text, keys.clusters_visual, clusters_text).sums(keys.width2)
        note = {"token_filter": "template and special tokens count as text"}
        return (row | note for row in kernel_rows(WITH_TEMPLATE, {MMD2: sums}, seed=self._seed))

    def _position_null(self) -> Iterator[Row]:
        sums = position_null_sums(self._keys, self._seed)
        note = {"token_filter": f"content shuffled over places, mean of {N_DRAWS} shuffles"}
        return (row | note for row in kernel_rows(POSITION_NULL, {MMD2: sums}, seed=self._seed))

    def _other(self, other: str) -> Iterator[Row]:
        """Text of another task, in the place of the visual tokens, against text of this one."""
        keys, contrast = self._keys, text_against(other)
        text, clusters = keys.other_text[other]
        clouds = Clouds.of(text, keys.text, clusters, keys.clusters_text).require(fewest_clusters(contrast))
        self.sums[contrast] = clouds.sums(keys.width2)
        note = {"token_filter": f"text of {other} against text of this task"}
        yield from (row | note for row in kernel_rows(contrast, {MMD2: self.sums[contrast]}, seed=self._seed))
        yield from (row | note for row in self._classifier_rows(contrast, clouds))

    def _base(self, contrast: str, side: int) -> Iterator[Row]:
        """Keys of the base model and of this one at the same tokens."""
        keys = self._keys
        assert keys.base is not None
        adapted, clusters = ((keys.visual, keys.clusters_visual), (keys.text, keys.clusters_text))[side]
        clouds = Clouds.of(keys.base[side], adapted, clusters, clusters).require(1)
        row = clouds_row(contrast, linear_cka.name, clouds) | {"token_filter": "the same tokens in both models"}
        return head_rows(row, value=with_mean(linear_cka(clouds.x, clouds.y)))


def _knn(clouds: Clouds, seed: int) -> Floats:
    """Nearest neighbors on the first principal components of each head, of tokens drawn alike for all heads."""
    rng = np.random.default_rng([seed, 5])
    (x, groups_x), (y, groups_y) = (
        (cloud[:, picked], groups[picked])
        for cloud, groups in ((clouds.x, clouds.groups_x), (clouds.y, clouds.groups_y))
        for picked in (np.sort(rng.permutation(len(groups))[:KNN_TOKENS]),)
    )
    pooled = torch.cat([x, y], dim=1)
    pooled = pooled - pooled.mean(dim=1, keepdim=True)
    _, axes = torch.linalg.eigh(pooled.mT @ pooled)  # ascending
    scores = pooled @ axes[..., -KNN_COMPONENTS:]
    n = len(groups_x)
    return js_knn(scores[:, :n], scores[:, n:], groups_x=groups_x, groups_y=groups_y, seed=seed)
