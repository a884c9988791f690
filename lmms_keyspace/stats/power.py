"""What effect a comparison could have found."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lmms_keyspace.errors import InputError
from lmms_keyspace.stats.types import Floats


def mde_paired(discordance: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest paired change of a proportion that a two-sided test finds with the given power.

    (z_{1-alpha/2} + z_power) * sqrt(discordance / n): the paired formula of Miller (arXiv 2411.00640) with the
    variance of a paired binary difference bounded by its discordance rate. The exact McNemar test has about two to
    four points less power than `power` at this effect.

    Args:
        discordance: share of pairs in which the two outcomes differ.
        n: number of pairs (clusters, when pairs share one).

    Raises:
        InputError: discordance outside 0..1 or n below 1.
    """
    if not 0 <= discordance <= 1:
        raise InputError("discordance", discordance, "give the share of discordant pairs, between 0 and 1")
    if n < 1:
        raise InputError("n", n, "give at least one pair")
    return float(mde_from_se(np.sqrt(discordance / n), power, alpha))


def mde_from_se(se: ArrayLike, power: float = 0.8, alpha: float = 0.05) -> Floats:
    """Minimum detectable effect of a two-sided normal test from the standard error of a difference, in its unit.

    Raises:
        InputError: alpha or power outside (0, 1).
    """
    for name, value in (("power", power), ("alpha", alpha)):
        if not 0 < value < 1:
            raise InputError(name, value, "give a probability between 0 and 1")
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power))
    return np.asarray(se, dtype=np.float64) * z
