"""Two-dimensional pictures of keys: standardize, PCA to at most 50 dimensions, t-SNE. scikit-learn is loaded on use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lmms_keyspace.records import TEXT, VISUAL
from lmms_keyspace.reports.keyspace import KEY_SPACE, main_condition
from lmms_keyspace.reports.load import Run

MAX_TOKENS = 600  # per run: beyond it the page grows and the picture does not
PCA_DIMENSIONS = 50
MIN_TOKENS = 10


@dataclass(frozen=True)
class Projection:
    """Keys of one layer in the plane.

    `points` has the columns tsne1, tsne2, pc1, pc2, modality; `explained` is the share of variance that PCA keeps in
    all its `dimensions`, `components` that of the first two.
    """

    run: str
    layer: int
    points: pd.DataFrame
    dimensions: int
    explained: float
    components: tuple[float, float]


def saved_layers(run: Run, task: str) -> list[int]:
    """The layers whose keys were kept."""
    if run.loaded.data is None:
        return []
    names = run.loaded.data.keys.get(task, {})
    return sorted(
        int(name.split("/")[1]) for name in names if name.startswith(f"{KEY_SPACE}/") and name.count("/") == 1
    )


def project(run: Run, task: str, layer: int, *, seed: int = 0) -> Projection | None:
    """Project the kept keys of one layer (all KV heads of a token are one vector); None where fewer than 10 were kept.

    t-SNE: van der Maaten and Hinton (JMLR 9, 2008), PCA start, perplexity 30 or a third of the tokens.
    """
    if run.loaded.data is None:
        return None
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    tokens = run.loaded.data.tokens
    kept = tokens[
        (tokens["task"] == task)
        & (tokens["condition"] == main_condition(run.loaded.data, task))
        & (tokens["keys_row"] >= 0)
        & tokens["modality"].isin([VISUAL, TEXT])
    ]
    if len(kept) > MAX_TOKENS:
        kept = kept.iloc[np.sort(np.random.default_rng(seed).choice(len(kept), MAX_TOKENS, replace=False))]
    if len(kept) < MIN_TOKENS:
        return None
    keys = run.loaded.data.keys[task][f"{KEY_SPACE}/{layer}"][kept["keys_row"].to_numpy()]
    standardized = StandardScaler().fit_transform(keys.reshape(len(keys), -1).astype(np.float64))
    pca = PCA(min(PCA_DIMENSIONS, *standardized.shape), svd_solver="full")
    reduced = pca.fit_transform(standardized)
    perplexity = min(30.0, (len(keys) - 1) / 3)
    with threadpool_limits(1):  # threads that wait for one another are slower than one, and may round differently
        plane = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(reduced)
    points = pd.DataFrame(
        {
            "tsne1": plane[:, 0],
            "tsne2": plane[:, 1],
            "pc1": reduced[:, 0],
            "pc2": reduced[:, 1],
            "modality": kept["modality"].to_numpy(),
        }
    )
    shares = pca.explained_variance_ratio_
    first_two = float(shares[0]), float(shares[1])
    return Projection(run.label, layer, points, reduced.shape[1], float(shares.sum()), first_two)
