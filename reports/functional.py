"""The functional link: do the documents on which a model looks more at the image come out better?

A divergence between modalities says nothing about use: MMD is symmetric and blind to queries. Three measures of use are
joined with the outcome, document by document, at each layer:

- attention mass of the last prompt token on the image;
- the visual logit advantage q.(mean visual key - mean text key) * scaling, which is `qk_visual - qk_text`, since the
  captured means are of scaled products and a product is linear in the key;
- the log-sum-exp gap between the logits of image and text tokens, the log of the ratio of their attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Measured:
    """`documents`: columns cluster, condition, correct, indexed by doc_id. `wide`: for each measure and kind of heads
    (all together or not) a frame of documents by (heads, layer)."""

    documents: pd.DataFrame
    wide: Mapping[tuple[str, bool], pd.DataFrame]


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
    rows: list[pd.DataFrame] = []
    base: _Measured | None = None
    for run in runs:
        measured = _measured(run, task)
        if measured is None:
            continue
        rows += _slopes(run.label, WITHIN, measured)
        if run is runs[0]:
            base = measured
        elif base is not None:
            rows += _slopes(run.label, CHANGE, _change(base, measured))
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


def _measured(run: Run, task: str) -> _Measured | None:
    samples = run.loaded.samples.get(task)
    if run.loaded.data is None or samples is None or not pd.api.types.is_numeric_dtype(samples.get("correct")):
        return None
    attention = run.loaded.data.attention
    table = attention[(attention["task"] == task) & (attention["n_image"] > 0)]
    if table.empty:
        return None
    documents = table[["doc_id", "cluster", "condition"]].drop_duplicates("doc_id").set_index("doc_id")
    documents = documents.join(samples.set_index("doc_id")["correct"].astype(float), how="inner", validate="one_to_one")
    values = {
        MASS: table["mass_image"].to_numpy(float),
        ADVANTAGE: table["qk_visual"].to_numpy(float) - table["qk_text"].to_numpy(float),
        LSE_GAP: table["lse_visual"].to_numpy(float) - table["lse_text"].to_numpy(float),
    }
    is_all = (table["head_group"] == ALL_HEADS).to_numpy()
    # Single heads are saved for fewer documents: they are a table of their own.
    return _Measured(
        documents,
        {
            (name, together): _wide(table[is_all == together], column[is_all == together])
            for name, column in values.items()
            for together in (True, False)
            if (is_all == together).any()
        },
    )


def _wide(table: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    """Values of the rows as documents by (heads, layer); a document that lacks one is left out."""
    documents, row = np.unique(table["doc_id"].to_numpy(), return_inverse=True)
    head, heads = pd.factorize(table["head_group"])
    layers, layer = np.unique(table["layer"].to_numpy(), return_inverse=True)
    matrix = np.full((len(documents), len(heads) * len(layers)), np.nan)
    matrix[row, head * len(layers) + layer] = values
    columns = pd.MultiIndex.from_product([heads, layers], names=["heads", "layer"])
    return pd.DataFrame(matrix, pd.Index(documents, name="doc_id"), columns).dropna()


def _change(base: _Measured, run: _Measured) -> _Measured:
    shared = run.documents.join(base.documents["correct"], rsuffix="_base", how="inner")
    documents = shared.assign(correct=shared["correct"] - shared["correct_base"]).drop(columns="correct_base")
    changes = {
        key: (run.wide[key] - base.wide[key]).dropna(axis="columns", how="all") for key in run.wide.keys() & base.wide
    }
    return _Measured(documents, {key: changes[key].dropna() for key in run.wide if key in changes})


def _slopes(label: str, link: str, measured: _Measured) -> Iterator[pd.DataFrame]:
    """One frame per condition, measure and kind of heads (all together, each by itself), over layers and heads."""
    misled = measured.documents["condition"] == CONFLICT
    conditions = {CONFLICT: misled} if misled.all() else {CONFLICT: misled, EVERY: misled | True}
    for (condition, chosen), ((predictor, _), wide) in product(conditions.items(), measured.wide.items()):
        shared = measured.documents.index[chosen].intersection(wide.index)
        if shared.empty:
            continue
        frame = _regressed(measured.documents.loc[shared], wide.loc[shared])
        tested = frame["p"].notna()
        frame["p_adjusted"] = np.nan
        frame.loc[tested, "p_adjusted"] = stats.holm(frame.loc[tested, "p"])
        yield frame.assign(run=label, link=link, condition=condition, predictor=predictor)


def _regressed(documents: pd.DataFrame, wide: pd.DataFrame) -> pd.DataFrame:
    """Slopes of `correct` on each column of `wide`; both have one row per document."""
    x = wide.to_numpy(dtype=np.float64)
    within = wide - wide.groupby(documents["condition"]).transform("mean")
    spread = np.sqrt((within.to_numpy() ** 2).mean(axis=0))
    described = {
        "heads": wide.columns.get_level_values("heads"),
        "layer": wide.columns.get_level_values("layer"),
        "documents": len(documents),
        "clusters": documents["cluster"].nunique(),
        "mean": x.mean(axis=0),
        "spread": spread,
    }
    try:
        found = stats.cluster_slopes(
            documents["correct"].to_numpy(),
            x.T,
            documents["cluster"].tolist(),
            strata=documents["condition"].tolist(),
        )
    except InputError as error:
        nothing = dict.fromkeys(("value", "ci_low", "ci_high", "p"), np.nan)
        return pd.DataFrame({**described, **nothing, "note": str(error)})
    limits = {"value": found.slope * spread, "ci_low": found.low * spread, "ci_high": found.high * spread}
    outcome = documents["correct"].to_numpy()
    note = "every document has the same outcome" if (outcome == outcome[0]).all() else ""
    return pd.DataFrame({**described, **limits, "p": found.p, "note": note})
