"""The space of a random key projection: seeded, as large as the real one, blind to what the projection learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation import evaluate, run_of
from torch import nn

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import KeySite
from lmms_keyspace.key_source import SavedKeys
from lmms_keyspace.random_keys import random_keys


def site(attention: nn.Module, layer: int = 3) -> KeySite:
    return KeySite(layer, nn.Identity(), attention, 4, 2, 8, "full")


HIDDEN = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))


def test_columns_weigh_as_much_as_in_the_real_projection_and_seeds_are_kept():
    real = nn.Linear(32, 16)
    with torch.no_grad():
        real.weight[:, 0] *= 30
    keys = random_keys(site(_Attention(k_proj=real)), torch.eye(32))
    torch.testing.assert_close(keys.flatten(1).norm(dim=1), real.weight.norm(dim=0))
    again = random_keys(site(_Attention(k_proj=real)), torch.eye(32))
    torch.testing.assert_close(again, keys, rtol=0, atol=0)
    other_layer = random_keys(site(_Attention(k_proj=real), layer=4), torch.eye(32))
    assert not torch.allclose(other_layer, keys)


def test_a_fused_projection_gives_its_key_columns_and_k_norm_is_applied():
    fused = nn.Linear(32, 64)
    keys = random_keys(site(_Attention(qkv_proj=fused)), torch.eye(32))
    torch.testing.assert_close(keys.flatten(1).norm(dim=1), fused.weight[32:48].norm(dim=0))
    normed = random_keys(site(_Attention(k_proj=nn.Linear(32, 16), k_norm=nn.RMSNorm(8))), HIDDEN)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(400, 2), atol=1e-3, rtol=1e-3)


def test_quantized_weights_are_refused():
    packed = nn.Linear(32, 16)
    packed.weight = nn.Parameter(torch.zeros(256, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="quantized"):
        random_keys(site(_Attention(k_proj=packed)), HIDDEN)


class _Attention(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def test_all_spaces_through_the_harness(tmp_path):
    """Query, value and random keys are captured, measured and kept beside the keys; the answers are not touched."""
    given = {"limit": 24, "batch_size": 8}
    spaces = "spaces=q+v+k_rand,layers=1,keep_keys=on"
    evaluate("malora_llava", **given, model_args=f"{spaces},keys_dir={tmp_path}")
    data = run_of(tmp_path)
    source = SavedKeys(data)
    shapes = {
        space: source.keys("textbias_probe_quick", "clean", space, 1)[0].shape
        for space in ("k_pre", "v", "q", "k_rand")
    }
    assert shapes["k_pre"] == shapes["v"] == shapes["k_rand"]
    assert shapes["q"][1] > shapes["k_pre"][1]
    random, base = (
        source.keys("textbias_probe_quick", "clean", "k_rand", 1, reference=reference)[0] for reference in (False, True)
    )
    real = source.keys("textbias_probe_quick", "clean", "k_pre", 1)[0]
    assert 0.3 < float(random.norm() / real.norm()) < 3
    assert random.shape == base.shape
    table = data.divergence[(data.divergence["contrast"] == "visual-text") & (data.divergence["estimator"] == "mmd2")]
    heads = table[table["condition"] == "clean"].groupby("space")["head"].nunique()
    assert heads.to_dict() == {"k_pre": 3, "k_rand": 3, "v": 3, "q": shapes["q"][1] + 1}
    assert np.isfinite(table.loc[table["note"] == "", "value"]).all()
