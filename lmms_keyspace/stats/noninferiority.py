"""Is a run at least as good as another, up to a margin? One-sided bounds of a paired change, and what they rest on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lmms_keyspace.errors import InputError
from lmms_keyspace.stats.clusters import ratio, resample, swap_null, swap_p
from lmms_keyspace.stats.power import mde_from_se
from lmms_keyspace.stats.types import Floats, check_level

# With fewer clusters that differ, a resample often holds none of them and the bootstrap is too narrow: one cluster that
# differs for the better would have a lower bound of 0, above the one of none that differs.
MIN_DIFFERING = 10
ROUNDING = 1e-12  # sums of thirds and tenths must not decide
BOOTSTRAP = "paired cluster bootstrap"
EXACT = "exact binomial bound, fewer than 10 groups differ"
NONE_DIFFERS = "exact binomial bound, no group differs"


class Bound(NamedTuple):
    """A one-sided confidence bound and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class OrientedChange:
    """A change between two runs on shared clusters, oriented so that positive is better.

    `losses` and `gains` count the clusters that differ for the worse and for the better. A share q of clusters
    that differ moves the change by at most `reach` * q. `exact_p` is the one-sided p of a loss by an exact test: for
    binary outcomes (`binary`) McNemar's, else the permutation that swaps the runs within whole clusters.
    """

    value: float
    clusters: int
    losses: int
    gains: int
    reach: float
    binary: bool
    exact_p: float
    draws: Floats  # bootstrap distribution of the change

    @property
    def differing(self) -> int:
        """Clusters that differ."""
        return self.losses + self.gains

    def lower(self, level: float) -> Bound:
        """One-sided lower confidence bound: the change lies above it with confidence 1 - level.

        The percentile of the paired cluster bootstrap. Where fewer than `MIN_DIFFERING` clusters differ, minus the
        Clopper-Pearson upper limit of the share of losses, times `reach`: gains are not counted against losses.
        """
        if self.differing >= MIN_DIFFERING:
            return Bound(self._ordered(level), BOOTSTRAP)
        return Bound(-self.reach * share_at_most(self.losses, self.clusters, level), self._source)

    def upper(self, level: float) -> Bound:
        """One-sided upper confidence bound, by bootstrap; where no cluster differs, minus the lower one.

        Where few differ the bootstrap may lie too low. Whoever concludes a loss from it needs `p_of_loss` as well,
        which an exact test guards.
        """
        if self.differing:
            return Bound(-self._ordered(level, -1), BOOTSTRAP)
        return Bound(-self.lower(level).value, NONE_DIFFERS)

    def p_of_excess_loss(self, margin: float) -> float:
        """p of the hypothesis that the change is at or below -margin: the level at which `lower` reaches -margin."""
        if self.differing >= MIN_DIFFERING:
            return self._tail(-margin)
        return float(stats.binom.cdf(self.losses, self.clusters, min(1.0, margin / self.reach)))

    @property
    def p_of_loss(self) -> float:
        """p of the hypothesis that the change is 0 or better: the larger of the bootstrap's and the exact test's."""
        return max(self._tail(0.0, -1), self.exact_p)

    def mde(self, level: float, power: float = 0.8) -> float:
        """The loss whose one-sided bound would exclude 0 with probability `power`.

        Where too few clusters differ for a standard error, it is that of the largest share that could (exact bound).
        """
        if self.differing >= MIN_DIFFERING:
            error = float(np.std(self.draws, ddof=1))
        else:
            error = self.reach * float(np.sqrt(share_at_most(self.differing, self.clusters, level) / self.clusters))
        return float(mde_from_se(error, power, 2 * check_level(level)))

    def _tail(self, value: float, sign: int = 1) -> float:
        """Share of draws at or below `value` (at or above it for sign -1), the observed change counted among them."""
        beyond = np.count_nonzero(sign * self.draws <= sign * value + ROUNDING)
        return float((1 + beyond) / (1 + len(self.draws)))

    def _ordered(self, level: float, sign: int = 1) -> float:
        """The draw that lies beyond a value exactly when `_tail` of that value is at most `level`."""
        position = int(check_level(level) * (1 + len(self.draws)) + ROUNDING)
        return float(np.sort(sign * self.draws)[position - 1]) if position else -self.reach

    @property
    def _source(self) -> str:
        return EXACT if self.differing else NONE_DIFFERS


def oriented_change(
    base: tuple[ArrayLike, ArrayLike],
    run: tuple[ArrayLike, ArrayLike],
    direction: int,
    *,
    span: float = 1.0,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> OrientedChange:
    """The change of a ratio of sums from `base` to `run` on the same clusters.

    Args:
        base, run: numerators and denominators, each [D], row i of both being one cluster; all ones give a mean.
        direction: +1 where higher is better, -1 where lower is.
        span: largest difference that one cluster's ratio can have between two runs (1 for a share, 2 for a difference
            of shares).
        n_resamples: bootstrap draws, and permutations where the outcome is not binary.
        seed: of both.

    Raises:
        InputError: unequal shapes, a number that is not finite, fewer than 2 clusters, denominators that sum to zero,
            or a ratio that is undefined in more than 5 % of the resamples.
    """
    if direction not in (-1, 1):
        raise InputError("direction", direction, "give +1 where higher is better, -1 where lower is")
    num_a, den_a, num_b, den_b = (np.asarray(one, dtype=np.float64) for one in (*base, *run))
    for array in (num_a, den_a, num_b, den_b):
        if array.shape != (len(num_a),) or not np.isfinite(array).all():
            raise InputError("clusters", array.shape, f"give one finite number for each of the {len(num_a)} clusters")
    sides = (num_a, den_a, num_b, den_b)
    if min(den_a.sum(), den_b.sum()) <= 0:
        raise InputError("denominators", 0.0, "they must not sum to zero in either run")
    clusters = len(num_a)
    counts = resample(clusters, n_resamples, seed)
    draws = direction * (ratio(counts @ num_b, counts @ den_b) - ratio(counts @ num_a, counts @ den_a))
    draws = draws[np.isfinite(draws)]
    if len(draws) < 0.95 * n_resamples:
        raise InputError("denominators", "0 in many resamples", "the ratio rests on too few clusters")
    value_a, value_b = num_a.sum() / den_a.sum(), num_b.sum() / den_b.sum()
    # What a cluster adds to the change: its distance from the common ratio, in the run less in the base.
    common = (num_a.sum() + num_b.sum()) / (den_a.sum() + den_b.sum())
    moved = direction * ((num_b - common * den_b) - (num_a - common * den_a))
    differs = (num_a != num_b) | (den_a != den_b)
    losses, gains = int((differs & (moved < 0)).sum()), int((differs & (moved >= 0)).sum())
    binary = all(bool(np.isin(array, (0, 1)).all()) for array in (num_a, num_b)) and bool(
        (den_a == 1).all() and (den_b == 1).all()
    )
    exact_p = (
        float(stats.binom.cdf(gains, losses + gains, 0.5))
        if binary
        else swap_p(direction * swap_null(*sides, n_resamples, seed), direction * (value_b - value_a))
    )
    return OrientedChange(
        value=float(direction * (value_b - value_a)) + 0.0,
        clusters=clusters,
        losses=losses,
        gains=gains,
        reach=float(span * clusters / min(den_a.sum(), den_b.sum())),
        binary=binary,
        exact_p=exact_p,
        draws=draws,
    )


def share_at_most(k: int, n: int, level: float) -> float:
    """One-sided Clopper-Pearson upper limit of a proportion (Biometrika 26, 1934): 1 - level ** (1 / n) for k = 0."""
    return 1.0 if k >= n else float(stats.beta.ppf(1 - check_level(level), k + 1, n - k))
