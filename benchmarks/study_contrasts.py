"""The study's contrasts: an arm less its control, by seeds or by documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from lmms_keyspace import stats

BASE, CONTROL = "base", "lora_k"


class Contrast(NamedTuple):
    """Mean difference over seeds with its 95 % t interval and p; the unit is the seed."""

    difference: float
    low: float
    high: float
    p: float


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
    """Adapted less base, document by document: margin of gold over the lure, attention mass, visual advantage."""
    own = record["documents"]
    names = {"margin": "margin_conflict", "mass": "attention_mass_conflict", "advantage": "visual_advantage_conflict"}
    columns = {
        short: np.array(own[name], dtype=float) - np.array(base[name], dtype=float) for short, name in names.items()
    }
    return pd.DataFrame(columns | {"document": range(len(own["margin_conflict"])), "unit": name_of(record)})


def name_of(record: dict[str, Any]) -> str:
    """The unit's name, without the folder of the raw files."""
    unit = record["unit"]
    return f"{unit['phase']}/{unit['base']}/{unit['arm']}-{unit['data']}-{unit['seed']}"
