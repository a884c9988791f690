"""The argument `intervene=`, read without loading anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmms_keyspace.errors import InputError

FROM_A_RUN = ("mean_shift", "moment_matching", "random_shift")
VISUAL_BOOST = "visual_boost"
KINDS = (*FROM_A_RUN, VISUAL_BOOST)
# PAI's strength for LLaVA-1.5 in its own commands (Liu et al., ECCV 2024, arXiv 2407.21771).
DEFAULT_BOOST = 0.2
_FORMS = "mean_shift:RUN, moment_matching:RUN, random_shift:RUN, visual_boost or visual_boost:ALPHA"


@dataclass(frozen=True)
class Spec:
    """Which intervention.

    Attributes:
        kind: of `KINDS`.
        run: where the saved run lies that the statistics come from; None for `visual_boost`.
        alpha: strength of `visual_boost`; None for the others.
    """

    kind: str
    run: str | None
    alpha: float | None


def parse(text: str) -> Spec:
    """Read `mean_shift:RUN`, `moment_matching:RUN`, `random_shift:RUN`, `visual_boost` or `visual_boost:ALPHA`.

    Raises:
        InputError: another form, or an alpha that is not positive.
    """
    kind, colon, value = text.partition(":")
    if kind not in KINDS:
        raise InputError("intervene", text, f"choose one of {_FORMS}")
    if kind in FROM_A_RUN:
        if not value:
            raise InputError(
                "intervene",
                text,
                f"{kind} takes its statistics from a saved run of the base model with keep_keys=on: {kind}:RUN",
            )
        return Spec(kind, value, None)
    try:
        alpha = float(value) if colon else DEFAULT_BOOST
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise InputError("intervene", text, "give visual_boost:ALPHA with a positive number, such as visual_boost:0.2")
    return Spec(kind, None, alpha)
