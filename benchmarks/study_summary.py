"""The study in a few sentences, none of which says more than its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from study_contrasts import BASE, CONTROL, INDEPENDENT, direction, family, follows_text
from study_units import CORE, DATA, TRAINING_FREE

from lmms_keyspace import stats


def in_short(
    table: pd.DataFrame,
    records: list[dict[str, Any]],
    by_layer: stats.Slopes,
    by_document: dict[str, dict[str, stats.Slopes]],
    divergence: str,
) -> list[str]:
    """What the intervals of the page allow to say, in a few sentences that are put together from them.

    Args:
        table: a row for every unit of the bundled base, with its figures.
        records: the units' raw files.
        by_layer, by_document: see `layer_slopes` and `document_slopes`; the latter by outcome and group of arms.
        divergence: name of `INDEPENDENT` for a reader.
    """

    def shown(arms: Sequence[str], control: str, outcome: str) -> str:
        signs = [
            direction(found, p)
            for data in DATA
            for arm, found, p in family(table, [arm for arm in CORE if arm != control], control, data, outcome)
            if arm in arms
        ]
        return f"lower in {signs.count(-1)}, higher in {signs.count(1)}, not shown to differ in {signs.count(0)}"

    base = next(record for record in records if record["unit"]["arm"] == BASE)
    free = []
    for arm in TRAINING_FREE:
        own = [record for record in records if record["unit"]["arm"] == arm]
        now = float(np.mean([record["figures"][INDEPENDENT] for record in own]))
        free.append(f"{arm} {now / base['figures'][INDEPENDENT] - 1:+.0%} and {follows_text(own, [base])}")
    signs = _signs(by_layer.low, by_layer.high)
    masses, advantages = (
        [_signs(found.low, found.high)[place] for found in by_document["right"].values()] for place in (0, 1)
    )
    aligned, cells = CORE[2:], len(CORE[2:]) * len(DATA)
    return [
        "## In short",
        "",
        f"- The three MaLoRA arms with the MMD term in the four data settings are {cells} cells. Against the base, the "
        f"divergence is {shown(aligned, BASE, INDEPENDENT)}; the flip rate is "
        f"{shown(aligned, BASE, 'text_flip_rate')}.",
        f"- Against plain LoRA of equal parameters, the divergence is {shown(aligned, CONTROL, INDEPENDENT)}; the flip "
        f"rate is {shown(aligned, CONTROL, 'text_flip_rate')}.",
        f"- Over the adapters of the core arms, a larger fall of the divergence goes with a lower flip rate in "
        f"{signs.count(-1)}, with a higher one in {signs.count(1)} of {len(signs)} layers.",
        f"- Without training, change of the divergence and of the share that follows the misleading text: "
        f"{'; '.join(free)}.",
        f"- Document by document, being right more often goes with more attention to the image in {masses.count(1)} of "
        f"{len(masses)} groups of arms, with more visual logit advantage in {advantages.count(1)}, with less in "
        f"{advantages.count(-1)}.",
        f"- Divergence is {divergence}. All of this is one small architecture on drawn scenes; clean "
        "accuracy is near its ceiling, and a flip rate near 0 leaves nothing to differ.",
        "",
    ]


def _signs(low: Sequence[float], high: Sequence[float]) -> list[int]:
    return [1 if below > 0 else -1 if above < 0 else 0 for below, above in zip(low, high, strict=True)]
