"""Sources of keys, and that attention sinks are left out of the keys that are measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.measuring import Measuring
from lmms_keyspace.records import TEXT, VISUAL


class FewKeys:
    """8 clusters of 4 visual and 3 text tokens; the first visual token of every cluster is a sink, far away."""

    layers = (0,)

    def __init__(self) -> None:
        rows = [(f"c{i}", m) for i in range(8) for m, n in ((VISUAL, 4), (TEXT, 3)) for _ in range(n)]
        self._table = pd.DataFrame(rows, columns=["cluster", "modality"]).assign(task="a", condition="clean")
        first = ~self._table.duplicated(["cluster", "modality"])
        self._table["sink"] = first & (self._table["modality"] == VISUAL)
        noise = torch.randn(len(rows), 2, 4, generator=torch.Generator().manual_seed(0))
        self._keys = noise + 50 * torch.from_numpy(self._table["sink"].to_numpy(copy=True))[:, None, None]

    def token_table(self) -> pd.DataFrame:
        return self._table

    def keys(self, task, condition=None, space="k_pre", layer=0, modality=None, *, reference=False):
        rows = np.flatnonzero((self._table["modality"] == modality).to_numpy())
        return self._keys[rows], self._table["cluster"].iloc[rows].tolist()


def test_attention_sinks_are_left_out_and_their_effect_is_shown():
    measured = Measuring(
        source=FewKeys(), conditions={"a": ["clean"]}, reference=False, bandwidth_source="", connector="mlp", seed=0
    ).run(["k_pre"])
    table = measured.table[(measured.table["estimator"] == "mmd2") & (measured.table["head"] == "all")]
    table = table.set_index("contrast")
    assert table.loc["visual-text", ["n_visual", "n_text"]].tolist() == [24, 24]
    assert table.loc["visual-text:with-sinks", ["n_visual", "n_text"]].tolist() == [32, 24]
    assert table.loc["visual-text", "ci_low"] < 0.05
    assert table.loc["visual-text:with-sinks", "value"] > table.loc["visual-text", "value"] + 0.02
