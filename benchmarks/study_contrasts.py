"""The study's contrasts: an arm less its control, by seeds or by documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from study_units import CORE

from lmms_keyspace import stats

BASE, CONTROL = "base", "lora_k"
INDEPENDENT = "mmd2_laplace_k_pre"  # a divergence that is not the trained one, for questions that need one figure
SHOWN_BELOW = 0.05  # adjusted p


class Contrast(NamedTuple):
    """Mean difference over seeds with its 95 % t interval and p; the unit is the seed."""

    difference: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired(table: pd.DataFrame, arm: str, control: str, data: str, outcome: str) -> Contrast:
    """Arm less control, seed by seed; the base, which has no seeds, is the control of all of them."""

    def of(name: str) -> pd.Series:
        rows = table[(table["arm"] == name) & (table["data"] == data)]
        return rows.set_index("seed")[outcome].sort_index()

    if control == BASE:
        (before,) = table[table["arm"] == BASE][outcome]
        return contrast(of(arm).to_numpy() - before)
    return contrast((of(arm) - of(control)).to_numpy())


def contrast(differences: np.ndarray) -> Contrast:
    """Mean of paired differences with its t interval; a point with p = 1 where they are all 0."""
    mean, n = float(differences.mean()), len(differences)
    error = float(differences.std(ddof=1) / np.sqrt(n))
    if error == 0:
        return Contrast(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    half = float(student.ppf(0.975, n - 1)) * error
    return Contrast(mean, mean - half, mean + half, float(ttest_1samp(differences, 0).pvalue))


def direction(found: Contrast, p: float) -> int:
    """-1 where the arm is shown to be lower than its control, 1 for higher, 0 where neither is shown."""
    return int(np.sign(found.difference)) if p < SHOWN_BELOW else 0


def family(
    table: pd.DataFrame, arms: Sequence[str], control: str, data: str, outcome: str
) -> list[tuple[str, Contrast, float]]:
    """Every arm less the control, with p adjusted by Holm over the arms."""
    found = [paired(table, arm, control, data, outcome) for arm in arms]
    return list(zip(arms, found, stats.holm([each.p for each in found]), strict=True))


def follows_text(records: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]]) -> Contrast:
    """Share of documents answered with the lure under conflict, less that of the controls; the unit is the document."""
    shares = [
        np.mean([[code == "l" for code in record["documents"]["conflict"]] for record in side], axis=0)
        for side in (records, controls)
    ]
    difference = shares[0] - shares[1]
    low, high = stats.cluster_bootstrap(difference, list(range(len(difference))))
    return Contrast(float(difference.mean()), low, high, float("nan"))


def document_rows(record: dict[str, Any], base: dict[str, Any]) -> pd.DataFrame:
    """Adapted less base, document by document, under conflict: right answer, margin of gold over the lure, attention
    mass, visual logit advantage."""
    own = record["documents"]
    names = {"margin": "margin_conflict", "mass": "attention_mass_conflict", "advantage": "visual_advantage_conflict"}
    columns = {
        short: np.array(own[name], dtype=float) - np.array(base[name], dtype=float) for short, name in names.items()
    }
    columns["right"] = np.array(
        [(a == "g") - (b == "g") for a, b in zip(own["conflict"], base["conflict"], strict=True)]
    )
    return pd.DataFrame(columns | {"document": range(len(own["margin_conflict"])), "unit": name_of(record)})


def name_of(record: dict[str, Any]) -> str:
    """The unit's name, without the folder of the raw files."""
    unit = record["unit"]
    return f"{unit['phase']}/{unit['base']}/{unit['arm']}-{unit['data']}-{unit['seed']}"


def layer_slopes(records: Sequence[dict[str, Any]], divergence: str) -> stats.Slopes:
    """By layer, change of the flip rate for a fall of the divergence by 1, over the adapters of the core arms.

    Least squares with a level for each data setting; clusters are the pairs of data and seed.
    """
    base = next(record for record in records if record["unit"]["arm"] == BASE)
    trained = [record for record in records if record["unit"]["arm"] in CORE]
    falls = np.array([np.subtract(base["by_layer"][divergence], record["by_layer"][divergence]) for record in trained])
    change = [record["figures"]["text_flip_rate"] - base["figures"]["text_flip_rate"] for record in trained]
    data = [record["unit"]["data"] for record in trained]
    clusters = [f"{record['unit']['data']} {record['unit']['seed']}" for record in trained]
    return stats.cluster_slopes(change, falls.T, clusters, strata=data)


def document_slopes(records: Sequence[dict[str, Any]], arms: Sequence[str], outcome: str) -> stats.Slopes:
    """Change of an outcome for 1 more attention mass on the image, and for 1 more visual logit advantage.

    Each alone, over the documents and adapters of these arms with a level for each adapter; clusters are documents.
    `outcome` is `right` or `margin`, see `document_rows`.
    """
    base = next(record for record in records if record["unit"]["arm"] == BASE)["documents"]
    rows = [document_rows(record, base) for record in records if record["unit"]["arm"] in arms]
    table = pd.concat(rows, ignore_index=True).dropna()
    x = table[["mass", "advantage"]].to_numpy().T
    return stats.cluster_slopes(table[outcome], x, table["document"].tolist(), strata=table["unit"].tolist())
