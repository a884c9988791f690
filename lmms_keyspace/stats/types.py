"""What the statistics return, and the one check that all intervals share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmms_keyspace.errors import InputError

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A difference with its interval, two-sided p, number of clusters and minimum detectable effect.

    `mde` is NaN when no cluster differs: without variation there is no standard error to plan with.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    mde: float


class ArrayInterval(NamedTuple):
    """Point estimates and confidence limits, each of shape [...]."""

    value: Floats
    low: Floats
    high: Floats


class PairedChange(NamedTuple):
    """Change of a divergence from run a to run b on the `n` clusters they share; arrays of shape [...].

    `p_adjusted` and the band are those of max-T over all of the leading dimensions.
    """

    delta: Floats
    low: Floats
    high: Floats
    p: Floats
    mde: Floats
    n: int
    p_adjusted: Floats
    band_low: Floats
    band_high: Floats


class PermutationTest(NamedTuple):
    """MMD^2, the mean of its permutation null, p and max-T adjusted p; arrays of shape [...]."""

    value: Floats
    null_mean: Floats
    p: Floats
    p_adjusted: Floats
    n_permutations: int


def check_level(level: float) -> float:
    if not 0 < level < 1:
        raise InputError("level", level, "give a coverage between 0 and 1, such as 0.95")
    return level
