"""A lower bound on the Jensen-Shannon divergence, in nats, from a classifier judged on images it has not seen.

For every classifier D, JSD(P, Q) >= ln 2 + E_P[log D] / 2 + E_Q[log(1 - D)] / 2, that is ln 2 minus the balanced
log-loss (the variational form of f-GAN, Nowozin et al., arXiv 1606.00709; the held-out use of classifier two-sample
tests, Lopez-Paz and Oquab, arXiv 1610.06545). D is logistic regression, so the bound is tight only where the log
density ratio is linear (Gaussians of one covariance). Its maximum, ln 2, is reached by any two separable clouds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmms_keyspace.divergence.arrays import Cloud, Floats, Groups, as_clouds, center, group_codes
from lmms_keyspace.divergence.logistic import balance, fit
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import HeldOutLoss
from lmms_keyspace.stats import hash_ranks, js_bootstrap
from lmms_keyspace.stats.js import LN2


class JSEstimate(NamedTuple):
    """The bound in nats, its 95 % interval, and whether it is so near ln 2 that it ranks nothing; each [...]."""

    value: Floats
    low: Floats
    high: Floats
    at_ceiling: NDArray[np.bool_]


@dataclass(frozen=True)
class JSClassifier:
    """Cross-fitted, balanced logistic regression with an L2 penalty, fitted for all heads together.

    Groups are dealt to folds by a seeded hash, so all tokens of an image are either fitted or judged, never both, and
    features are standardized with the fitted groups' mean and deviation. The penalty keeps separable clouds finite
    and is charged to the bound, as everything that makes the classifier worse is. The logits judged in a fold are
    multiplied by the one factor of `shrinkage` that served the other folds' held-out tokens best: where there is
    nothing to tell apart, an overconfident classifier would drive the bound far below 0.

    Attributes:
        folds: number of folds; fewer when a side has fewer groups.
        l2: weight of |w|^2 / 2 beside the mean balanced log-loss; the intercept is free. Small enough that two clouds
            separable along a single axis reach the ceiling.
        shrinkage: factors of the logits; 0 is the classifier that knows nothing, whose bound is 0.
        ceiling: share of ln 2 above which `at_ceiling` is set.
        n_resamples: bootstrap draws of groups for the interval.
        tolerance: largest gradient entry at which Newton's iteration stops.
        max_iterations: of Newton's method. Without the tolerance by then, single precision is repeated in double, and
            double is an error, never a silent bad fit.
    """

    folds: int = 5
    l2: float = 0.003
    shrinkage: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
    ceiling: float = 0.95
    n_resamples: int = 1000
    tolerance: float = 1e-4
    max_iterations: int = 50
    version: str = "3"

    def __call__(self, x: Cloud, y: Cloud, *, groups_x: Groups, groups_y: Groups, seed: int = 0) -> JSEstimate:
        """The bound for each leading index.

        Not clipped: without a difference the value lies near 0, on either side. Read it against the split-half rows.

        Args:
            x, y: [..., n, d] and [..., m, d].
            groups_x, groups_y: [n], [m] names of the groups; a name on both sides is one group.
            seed: seed of the folds and of the bootstrap.

        Raises:
            InputError: shapes that do not agree, entries that are not finite, fewer than 2 groups a side.
        """
        return self.estimate(self.held_out(x, y, groups_x=groups_x, groups_y=groups_y, seed=seed), seed=seed)

    def held_out(self, x: Cloud, y: Cloud, *, groups_x: Groups, groups_y: Groups, seed: int = 0) -> HeldOutLoss:
        """The held-out log-losses from which the bound and its interval follow; x is the visual side.

        Arguments and errors as in the call.
        """
        x, y = center(*as_clouds(x, y))
        names, codes_x, codes_y = group_codes(x, y, groups_x, groups_y)
        lead, d = x.shape[:-2], len(names)
        n_x, n_y = np.bincount(codes_x, minlength=d), np.bincount(codes_y, minlength=d)
        for argument, counts in (("groups_x", n_x), ("groups_y", n_y)):
            if np.count_nonzero(counts) < 2:
                raise InputError(
                    argument, f"{np.count_nonzero(counts)} groups", "holding out images needs at least 2 a side"
                )
        fold = self._deal(names, n_x > 0, n_y > 0, seed)
        features = torch.cat([x, y], dim=-2).reshape(-1, x.shape[-2] + y.shape[-2], x.shape[-1])
        is_x = torch.arange(features.shape[1], device=x.device) < x.shape[-2]
        codes = torch.from_numpy(np.concatenate([codes_x, codes_y])).to(x.device)
        loss, rise = self._cross_fitted(features, is_x, torch.from_numpy(fold).to(x.device)[codes])

        def by_group(values: Tensor, codes: Tensor, n: int) -> Floats:
            sums = values.new_zeros(len(values), n, dtype=torch.float64).index_add_(1, codes, values.double())
            return sums.cpu().numpy().reshape(*lead, n)

        losses = by_group(loss, torch.where(is_x, codes, codes + d), 2 * d)
        return HeldOutLoss(losses[..., :d], losses[..., d:], -by_group(rise, codes, d), n_x, n_y, names)

    def estimate(self, loss: HeldOutLoss, *, seed: int = 0) -> JSEstimate:
        """The bound with its cluster bootstrap, see `stats.js_bootstrap`."""
        value, low, high = js_bootstrap(loss, n_resamples=self.n_resamples, seed=seed)
        return JSEstimate(value, low, high, value > self.ceiling * LN2)

    def _deal(
        self, names: tuple[str, ...], in_x: NDArray[np.bool_], in_y: NDArray[np.bool_], seed: int
    ) -> NDArray[np.int64]:
        """Fold of each group: dealt in a seeded order, separately to groups of x, of y and of both, so that no fold
        takes all groups of a side."""
        k = min(self.folds, int(in_x.sum()), int(in_y.sum()))
        ranks = hash_ranks(names, seed, "folds")
        order = np.lexsort((ranks, 2 * in_x.astype(int) + in_y))
        fold = np.empty(len(names), dtype=np.int64)
        fold[order] = np.arange(len(names)) % k
        return fold

    def _cross_fitted(self, features: Tensor, is_x: Tensor, fold_of: Tensor) -> tuple[Tensor, Tensor]:
        """Held-out log-loss [B, n] of every token, and [B, n] what the balanced mean loss would rise by, to first
        order, were the token not in the fits."""
        folds = [fold_of == k for k in range(int(fold_of.max()) + 1)]
        logit = features.new_zeros(features.shape[:2])
        weight, bias = features.new_zeros(len(features), features.shape[-1]), features.new_zeros(len(features), 1)
        fits = []
        for held in folds:
            # The folds share most of their images, so the last one's classifier is a start a few steps away.
            fitted = fit(
                features[:, ~held],
                is_x[~held],
                weight,
                bias,
                l2=self.l2,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
            )
            weight, bias = fitted.weight, fitted.bias
            logit[:, held] = fitted.logit(features[:, held])
            fits.append(fitted)
        margin = torch.where(is_x, -logit, logit)
        factor = self._shrinkage(margin, is_x, folds)
        loss = torch.nn.functional.softplus(factor * margin)
        slope = balance(is_x, logit.dtype) * factor * (torch.sigmoid(factor * logit) - is_x.to(logit.dtype))
        rise = torch.zeros_like(loss)
        for held, fitted in zip(folds, fits, strict=True):
            rise[:, ~held] += fitted.influence(features[:, ~held], is_x[~held], features[:, held], slope[:, held])
        return loss, rise

    def _shrinkage(self, margin: Tensor, is_x: Tensor, folds: Sequence[Tensor]) -> Tensor:
        """Factor [B, n] of the logits, from the other folds' held-out margins (minus the logit of the right side)."""
        factors = margin.new_tensor(self.shrinkage)
        by_factor = torch.nn.functional.softplus(factors[:, None, None] * margin)
        chosen = torch.empty_like(margin)
        for held in folds:
            best = (by_factor[..., ~held] @ balance(is_x[~held], margin.dtype)).argmin(dim=0)
            chosen[:, held] = factors[best].unsqueeze(-1)
        return chosen


js_classifier = JSClassifier()
