"""The pipeline of the published diagnosis, as far as it is known, to be read beside the robust estimators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmms_keyspace.divergence.arrays import Cloud, as_clouds, center
from lmms_keyspace.divergence.bandwidth import median_bandwidth2
from lmms_keyspace.divergence.histogram import js_histogram
from lmms_keyspace.divergence.mmd import mmd_biased

# Extra directions of the randomized decomposition, which make the ones that are kept exact enough.
_OVERSAMPLING, _ITERATIONS = 10, 4
# A component whose spread is less than this share of the first one's is rounding error. (A picture of one color gives
# many equal keys, so there are such components, and their histograms would look like any other.)
_ROUNDING = 1e-5


class PaperEstimate(NamedTuple):
    """MMD (root of the biased MMD^2, no unit) and JS (nats), from `tokens` tokens a side."""

    mmd: float
    js: float
    tokens: int


class Projected(NamedTuple):
    """Both clouds on the principal components [n, components], [m, components], and the share of variance there."""

    x: Tensor
    y: Tensor
    explained_variance: float


@dataclass(frozen=True)
class PaperProtocol:
    """Keys of all KV heads of a layer side by side, standardized, on 50 principal components; MMD and JS there.

    Follows what secondary sources report of arXiv 2510.26721, version 1: keys before RoPE, standardized, PCA to 50
    dimensions, MMD and Jensen-Shannon divergence by layer, and the same within one modality as a baseline.

    Unknown, and therefore chosen here (`lmms_keyspace.published.UNKNOWN`, which reports print): the numbers of tokens
    and images; whether the number reported is MMD or MMD^2, biased or not (here the root of the biased one); the kernel
    (one Gaussian) and its bandwidth (median heuristic on the tokens compared); on what the projection is fitted (visual
    and text tokens of the layer and condition); the estimator of JS (30 bins for each component, a score between two
    centers counting in part for both, mean over components, less its null), its base (nats) and whether its root is
    taken (no); which tokens count (special tokens, template and attention sinks are left out); the test (none here).

    What it hides: a gap along a direction of small variance is dropped by the projection, and the head of greatest
    variance rules; the bandwidth moves with the gap, so no two values are comparable; the biased MMD is never 0 and
    depends on the number of tokens, which is why all contrasts of a large sample get the same one. Nothing here
    reproduces the paper's numbers.

    Attributes:
        components: principal components that are kept; all that are more than rounding error where the keys have fewer.
        bins: bins of each component's histogram.
        tokens: tokens a side that are compared, drawn without replacement; fewer where a side has fewer.
    """

    components: int = 50
    bins: int = 30
    tokens: int = 1000
    version: str = "3"

    def __call__(self, x: Cloud, y: Cloud, *, seed: int = 0) -> PaperEstimate:
        """Both estimates of one layer.

        Args:
            x, y: [n, d] and [m, d], with the keys of all KV heads side by side in d.
            seed: seed of the randomized decomposition and of the draw of tokens.

        Raises:
            InputError: shapes that do not agree, entries that are not finite, constant keys.
        """
        projected = self.project(x, y, seed=seed)
        return self.compare(projected.x, projected.y, seed=seed)

    def project(self, x: Cloud, y: Cloud, *, seed: int = 0) -> Projected:
        """Standardized keys on the first principal components of both sides together, see `__call__`."""
        x, y = center(*as_clouds(x, y))
        pooled = torch.cat([x, y])
        deviation = pooled.std(dim=0, correction=0)
        pooled = pooled / torch.where(deviation > 0, deviation, 1.0)
        rank = min(pooled.shape)
        with torch.random.fork_rng(devices=[pooled.device] if pooled.is_cuda else []):
            torch.manual_seed(seed)
            _, singular, axes = torch.svd_lowrank(
                pooled, q=min(self.components + _OVERSAMPLING, rank), niter=_ITERATIONS
            )
        kept = min(self.components, max(1, int((singular > _ROUNDING * singular[0]).sum())))
        scores = pooled @ axes[:, :kept]
        variance = (pooled * pooled).sum().clamp(min=torch.finfo(pooled.dtype).tiny)
        explained = float((singular[:kept] ** 2).sum() / variance)
        return Projected(scores[: len(x)], scores[len(x) :], explained)

    def compare(self, x: Tensor, y: Tensor, *, seed: int = 0) -> PaperEstimate:
        """Both estimates of projected keys, for instance of halves of one modality.

        Raises:
            InputError: constant keys, no vector on a side.
        """
        n = min(self.tokens, len(x), len(y))
        rng = np.random.default_rng(seed)
        x, y = (cloud[torch.from_numpy(rng.permutation(len(cloud))[:n]).to(cloud.device)] for cloud in (x, y))
        mmd = mmd_biased(x, y, bandwidth2=median_bandwidth2(x, y), scales=(1.0,))
        return PaperEstimate(float(mmd), float(js_histogram(x, y, bins=self.bins)), n)


paper_protocol = PaperProtocol()
