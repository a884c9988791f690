"""What the tokens that are left out would change: attention sinks, and template and special tokens as text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmms_keyspace.divergence import LayerKeys, measure, median_bandwidth2, mmd2
from lmms_keyspace.divergence.contrasts import position_null_sums
from lmms_keyspace.errors import InputError

HEADS, WIDTH = 2, 6


def cloud(clusters: int, tokens: int, seed: int, shift: float = 0.0) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"c{i}" for i in range(clusters) for _ in range(tokens)]
    return torch.randn(clusters * tokens, HEADS, WIDTH, generator=generator) + shift, names


VISUAL, TEXT, SINKS, TEMPLATE = cloud(6, 4, 0, 1.0), cloud(6, 3, 1), cloud(6, 1, 2, 20.0), cloud(6, 2, 3, 5.0)
KEYS = LayerKeys(
    0, VISUAL[0], TEXT[0], VISUAL[1], TEXT[1], median_bandwidth2(*(one[0].transpose(0, 1) for one in (VISUAL, TEXT)))
)


def together(*parts: tuple[torch.Tensor, list[str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.cat([keys for keys, _ in parts]), [name for _, names in parts for name in names]


def rows(keys: LayerKeys, contrast: str) -> list[dict]:
    table = measure([keys], task="a", condition="b", space="k_pre", bandwidth_source="", connector="", seed=0).table
    return table[table["contrast"] == contrast].to_dict("records")


def check(found: list[dict], visual: tuple[torch.Tensor, list[str]], text: tuple[torch.Tensor, list[str]]) -> None:
    """The rows are MMD^2 of these clouds at the layer's own bandwidths, for all heads first."""
    x, y = (keys.transpose(0, 1) for keys, _ in (visual, text))
    value = mmd2(x, y, groups_x=visual[1], groups_y=text[1], bandwidth2=KEYS.width2)
    assert [row["head"] for row in found] == ["all", "0", "1"]
    np.testing.assert_allclose([row["value"] for row in found], [value.mean(), *value], atol=1e-6)
    for row in found:
        assert (row["n_visual"], row["n_text"], row["n_clusters"]) == (len(visual[1]), len(text[1]), 6)
        assert row["ci_low"] < row["value"] < row["ci_high"]
        assert np.isnan(row["p"])


def test_sinks_left_in():
    visual = together(VISUAL, SINKS)
    keys = LayerKeys(**(vars(KEYS) | {"with_sinks": (visual, TEXT)}))
    found = rows(keys, "visual-text:with-sinks")
    check(found, visual, TEXT)
    assert {row["token_filter"] for row in found} == {"attention sinks left in"}
    assert rows(KEYS, "visual-text:with-sinks") == []


def test_template_and_special_tokens_as_text():
    found = rows(LayerKeys(**(vars(KEYS) | {"template": TEMPLATE})), "visual-text:with-template")
    check(found, VISUAL, together(TEXT, TEMPLATE))
    assert {row["token_filter"] for row in found} == {"template and special tokens count as text"}
    assert rows(KEYS, "visual-text:with-template") == []


def test_keys_that_no_position_turned_have_no_position_null():
    with pytest.raises(InputError, match="only rotated keys"):
        position_null_sums(KEYS, 0)
