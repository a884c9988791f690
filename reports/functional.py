"""The functional link: do the documents on which a model looks more at the image come out better?

A divergence between modalities says nothing about use: MMD is symmetric and blind to queries. Three measures of use are
joined with the outcome, document by document, at each layer:

- attention mass of the last prompt token on the image;
- the visual logit advantage q.(mean visual key - mean text key) * scaling, which is `qk_visual - qk_text`, since the
  captured means are of scaled products and a product is linear in the key;
- the log-sum-exp gap between the logits of image and text tokens, the log of the ratio of their attention, where the
  run saved it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import CONFLICT
from lmms_keyspace.records import ALL_HEADS
from lmms_keyspace.reports.load import Run

MASS, ADVANTAGE, LSE_GAP = PREDICTORS = ("attention mass", "logit advantage", "log-sum-exp gap")
WITHIN, CHANGE = LINKS = ("within a run", "change from the base")
EVERY = "every condition with an image"
COLUMNS = (
    "run", "link", "condition", "predictor", "heads", "layer", "documents", "clusters", "mean", "spread",
    "value", "ci_low", "ci_high", "p", "p_adjusted", "note",
)  # fmt: skip
_KEYS = ["doc_id", "cluster", "condition", "head_group", "layer"]


def functional_link(runs: Sequence[Run], task: str) -> pd.DataFrame:
    """Slope of the outcome on each measure, per run, layer and group of heads.

    Two links: `within a run`, outcome (1 for the right answer) on the measure; and `change from the base`, change of
    the outcome of a document (-1, 0, 1) on the change of its measure between the first run and this one. Each in the
    misleading condition, where there is one, and over all conditions with an image, each with an intercept of its own.
    Slopes are per standard deviation of the measure within conditions, clustered by group (`stats.cluster_slopes`), p
    adjusted by Holm over the layers of one run, link, condition and measure; single KV heads, where saved, are
    regressed too and adjusted over layers and heads.

    Returns:
        COLUMNS; `mean` and `spread` of the measure (or of its change), in its own unit; value, ci_low and ci_high are
        shares. A link that cannot be computed has one row with its reason in `note`. Empty where nothing was captured.
    """
    measured = [(run, _measures(run, task)) for run in runs]
    measured = [(run, table) for run, table in measured if len(table)]
    rows: list[pd.DataFrame] = []
    for run, table in measured:
        rows += _slopes(run.label, WITHIN, table)
        base_run, base = measured[0]
        if run is not base_run and base_run is runs[0]:
            rows += _slopes(run.label, CHANGE, _change(base, table))
    return pd.concat(rows, ignore_index=True)[list(COLUMNS)] if rows else pd.DataFrame(columns=list(COLUMNS))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run, link, condition and measure: in how many layers there is a slope, and the steepest.

    Columns run, link, condition, predictor, layers, positive, negative (adjusted p below .05), layer, value, ci_low,
    ci_high, p_adjusted of the steepest slope by its test, detectable (median over layers; found with 80 %
    probability), documents, note. Heads taken together only.
    """
    rows = []
    for keys, group in table[table["heads"] == ALL_HEADS].groupby(
        ["run", "link", "condition", "predictor"], sort=False
    ):
        tested = group[group["p"].notna()]
        row = dict(zip(("run", "link", "condition", "predictor"), keys, strict=True))
        row |= {"layers": len(tested), "documents": int(group["documents"].max()), "note": group["note"].iloc[0]}
        if len(tested):
            found = tested["p_adjusted"] < 0.05
            steepest = tested.loc[tested["p"].idxmin(), ["layer", "value", "ci_low", "ci_high", "p_adjusted"]]
            half = float(((tested["ci_high"] - tested["ci_low"]) / 2).median())
            row |= {
                "positive": int((found & (tested["value"] > 0)).sum()),
                "negative": int((found & (tested["value"] < 0)).sum()),
                "detectable": float(stats.mde_from_se(half / 1.96)),
                **steepest.to_dict(),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _measures(run: Run, task: str) -> pd.DataFrame:
    """Per document, layer and head group: `_KEYS`, correct, and a column per measure."""
    samples = run.loaded.samples.get(task)
    if run.loaded.data is None or samples is None or not pd.api.types.is_numeric_dtype(samples.get("correct")):
        return pd.DataFrame()
    attention = run.loaded.data.attention
    shown = attention[(attention["task"] == task) & (attention["n_image"] > 0)]
    table = shown[_KEYS].assign(
        **{
            MASS: shown["mass_image"].astype(float),
            ADVANTAGE: shown["qk_visual"].astype(float) - shown["qk_text"].astype(float),
        }
    )
    if {"lse_visual", "lse_text"} <= set(shown.columns):
        table[LSE_GAP] = shown["lse_visual"].astype(float) - shown["lse_text"].astype(float)
    return table.merge(samples[["doc_id", "correct"]].astype({"correct": float}), on="doc_id", validate="many_to_one")


def _change(base: pd.DataFrame, run: pd.DataFrame) -> pd.DataFrame:
    joined = base.merge(run, on=_KEYS, suffixes=("_base", ""), validate="one_to_one")
    columns = [name for name in ("correct", *PREDICTORS) if name in base and name in run]
    return joined[_KEYS].assign(**{name: joined[name] - joined[f"{name}_base"] for name in columns})


def _slopes(label: str, link: str, table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """One frame per condition, measure and kind of heads (all together, each by itself), over layers and heads."""
    misled, together = table["condition"] == CONFLICT, table["head_group"] == ALL_HEADS
    conditions = {CONFLICT: misled} if misled.all() else {CONFLICT: misled, EVERY: misled | True}
    # Single heads are saved for fewer documents: they are a table of their own.
    for (condition, chosen), heads in product(conditions.items(), (together, ~together)):
        rows = table[chosen & heads]
        if rows.empty:
            continue
        for predictor in (name for name in PREDICTORS if name in rows):
            index = ["doc_id", "cluster", "condition", "correct", "head_group", "layer"]
            wide = rows.set_index(index)[predictor].unstack(["head_group", "layer"]).dropna()  # noqa: PD010
            frame = _regressed(wide)
            tested = frame["p"].notna()
            frame["p_adjusted"] = np.nan
            frame.loc[tested, "p_adjusted"] = stats.holm(frame.loc[tested, "p"])
            yield frame.assign(run=label, link=link, condition=condition, predictor=predictor)


def _regressed(wide: pd.DataFrame) -> pd.DataFrame:
    """Slopes of `correct` on each column of `wide`, which is indexed by document, cluster, condition and outcome."""
    outcome, cluster, condition = (
        wide.index.get_level_values(name).to_numpy() for name in ("correct", "cluster", "condition")
    )
    x = wide.to_numpy(dtype=np.float64).T
    places = {"heads": wide.columns.get_level_values(0), "layer": wide.columns.get_level_values(1)}
    counts = {"documents": len(wide), "clusters": len(set(cluster))}
    within = wide - wide.groupby(level="condition").transform("mean")
    spread = np.sqrt((within.to_numpy() ** 2).mean(axis=0)) if len(wide) else np.full(len(x), np.nan)
    described = {**places, **counts, "mean": x.mean(axis=1) if len(wide) else np.nan, "spread": spread}
    try:
        found = stats.cluster_slopes(outcome, x, list(cluster), strata=list(condition))
    except InputError as error:
        nothing = dict.fromkeys(("value", "ci_low", "ci_high", "p"), np.nan)
        return pd.DataFrame({**described, **nothing, "note": str(error)})
    limits = {"value": found.slope * spread, "ci_low": found.low * spread, "ci_high": found.high * spread}
    note = "" if len(set(outcome)) > 1 else "every document has the same outcome"
    return pd.DataFrame({**described, **limits, "p": found.p, "note": note})
