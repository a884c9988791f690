"""What the picture adds to the probability of an answer: pointwise mutual information from option log-probabilities.

Nothing is asked of the model's wording here: an answer may be likelier by the picture and still not be given.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.outcomes.conditions import BLANK, CLEAN
from lmms_keyspace.outcomes.measuring import Measured

INFORMATION = {
    "pmi_gold": "Information of the image on the true answer, nats",
    "pmi_lure": "Information of the image on the lure, nats",
    "kl_blank": "Divergence of the options from those with a blank image, nats",
}


def information_by_group(logprobs: pd.DataFrame) -> pd.DataFrame:
    """`INFORMATION` in nats per group that was asked with and without the picture.

    PMI(y; v | x) = log p(y | v, x) - log p(y | v0, x) of the answer y, the picture v, the question x and the blank
    picture v0; the probabilities are the model's own over all texts. `kl_blank` is sum_y p(y | v, x) PMI(y; v | x) with
    both probabilities normalized over the options.

    Args:
        logprobs: one row per document and option; columns group_id, condition, option, logprob (nats, of the whole
            option), gold_option and lure_option (the option that is the true answer, and the one that misleads).

    Returns:
        [groups] with the columns of `INFORMATION`; groups that lack a condition or an option are left out.
    """
    kept = logprobs[logprobs["condition"].isin([CLEAN, BLANK])]
    found = {}
    for group, rows in kept.groupby("group_id"):
        wide = rows.pivot_table(index="option", columns="condition", values="logprob")
        gold, lure = rows.iloc[0][["gold_option", "lure_option"]]
        if not {CLEAN, BLANK} <= set(wide.columns) or not {gold, lure} <= set(wide.index) or wide.isna().any(axis=None):
            continue
        pmi = wide[CLEAN] - wide[BLANK]
        with_image, without = (wide[name] - np.logaddexp.reduce(wide[name]) for name in (CLEAN, BLANK))
        kl = float((np.exp(with_image) * (with_image - without)).sum())
        found[group] = dict(zip(INFORMATION, (pmi[gold], pmi[lure], kl), strict=True))
    return pd.DataFrame.from_dict(found, orient="index", columns=list(INFORMATION))


def measure_information(by_group: pd.DataFrame) -> dict[str, Measured]:
    """Means over groups with their bootstrap intervals; nothing below two groups."""
    if len(by_group) < 2:
        return {}
    return {
        name: Measured(
            float(by_group[name].mean()), *stats.cluster_bootstrap(by_group[name], list(by_group.index)), len(by_group)
        )
        for name in INFORMATION
    }
