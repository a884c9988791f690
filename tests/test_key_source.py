"""Sources of keys, and that attention sinks are left out of the keys that are measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.measuring import Measuring
from lmms_keyspace.records import BOILERPLATE, BOS, TEXT, VISUAL


class FewKeys:
    """8 clusters of 4 visual, 3 text and 2 template tokens and a BOS token; the first visual token of every cluster and
    every BOS token is a sink, far away, and template tokens lie apart from the others."""

    layers = (0,)

    def __init__(self) -> None:
        kinds = ((VISUAL, 4), (TEXT, 3), (BOILERPLATE, 2), (BOS, 1))
        rows = [(f"c{i}", m) for i in range(8) for m, n in kinds for _ in range(n)]
        self._table = pd.DataFrame(rows, columns=["cluster", "modality"]).assign(task="a", condition="clean")
        first = ~self._table.duplicated(["cluster", "modality"])
        self._table["sink"] = first & self._table["modality"].isin([VISUAL, BOS])
        noise = torch.randn(len(rows), 2, 4, generator=torch.Generator().manual_seed(0))
        noise += 2 * torch.from_numpy((self._table["modality"] == BOILERPLATE).to_numpy(copy=True))[:, None, None]
        self._keys = noise + 50 * torch.from_numpy(self._table["sink"].to_numpy(copy=True))[:, None, None]

    def token_table(self) -> pd.DataFrame:
        return self._table

    def keys(self, task, condition=None, space="k_pre", layer=0, modality=None, *, reference=False):
        rows = np.flatnonzero((self._table["modality"] == modality).to_numpy())
        return self._keys[rows], self._table["cluster"].iloc[rows].tolist()


def test_attention_sinks_and_the_template_are_left_out_and_their_effect_is_shown():
    measured = Measuring(
        source=FewKeys(), conditions={"a": ["clean"]}, reference=False, bandwidth_source="", connector="mlp", seed=0
    ).run(["k_pre"])
    table = measured.table[(measured.table["estimator"] == "mmd2") & (measured.table["head"] == "all")]
    table = table.set_index("contrast")
    assert table.loc["visual-text", ["n_visual", "n_text"]].tolist() == [24, 24]
    assert table.loc["visual-text:with-sinks", ["n_visual", "n_text"]].tolist() == [32, 24]
    assert table.loc["visual-text:with-template", ["n_visual", "n_text"]].tolist() == [24, 40]  # without BOS: a sink
    assert table.loc["visual-text", "ci_low"] < 0.05
    for included in ("visual-text:with-sinks", "visual-text:with-template"):
        row = table.loc[included]
        assert row["ci_low"] < row["value"] < row["ci_high"]
        assert row["value"] > table.loc["visual-text", "value"] + 0.02
