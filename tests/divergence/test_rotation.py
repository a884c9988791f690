"""The rotation read from keys, and the null of content shuffled over places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rotated_keys import angles, rotated

from lmms_keyspace.divergence.rotation import Rotation, shuffled_content
from lmms_keyspace.errors import InputError


def interleaved(keys, positions):
    pairs = torch.view_as_complex(keys.reshape(*keys.shape[:-1], -1, 2).contiguous())
    turned = pairs * torch.polar(torch.ones(()), angles(positions, pairs.shape[-1]))[:, None]
    return torch.view_as_real(turned).flatten(-2)


def partly(keys, positions):
    return torch.cat([rotated(keys[..., :8], positions), keys[..., 8:]], dim=-1)


@pytest.mark.parametrize("rope", [rotated, interleaved, partly, lambda k, p: 1.3 * rotated(k, p)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_keys_are_rotated_as_the_model_would(rope, dtype):
    generator = torch.Generator().manual_seed(0)
    keys, others = (torch.randn(30, 2, 16, generator=generator) for _ in range(2))
    positions = torch.arange(30) * 3.0
    rotation = Rotation.read(keys.to(dtype), rope(keys, positions).to(dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(rotation.apply(others), rope(others, positions), atol=tolerance, rtol=tolerance)


def test_keys_that_are_no_rotation_of_each_other_are_refused():
    keys = torch.randn(30, 2, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="rotated in pairs"):
        Rotation.read(keys, keys.flip(0) * 2)


def test_places_keep_their_rotation_and_content_is_dealt_anew():
    keys = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40).float()
    after = rotated(keys, positions)
    visual, text = shuffled_content((keys[:25], after[:25]), (keys[25:], after[25:]), seed=0)
    dealt = torch.cat([visual, text])
    back = rotated(dealt, -positions)
    order = (back[:, None] - keys[None]).abs().amax(dim=(2, 3)).argmin(dim=1)
    assert sorted(order.tolist()) == list(range(40))
    assert not np.array_equal(order, np.arange(40))
    torch.testing.assert_close(back, keys[order], atol=1e-4, rtol=1e-4)
