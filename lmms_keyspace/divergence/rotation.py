"""Content shuffled, positions kept: how far rotary positions alone drive rotated keys apart.

The rotation of every token is read from its keys before and after RoPE, so neither the model nor its frequencies are
needed, and saved keys do as well as live ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmms_keyspace.errors import InputError

# Largest relative error with which keys before RoPE, rotated, must give those after it: bfloat16 reaches 1e-2.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Rotation:
    """The rotation that RoPE gave each of N tokens.

    Attributes:
        turn: [N, 1, pairs] complex, of one size throughout (1, or the factor of a scaled RoPE).
        left, right: the coordinates of each pair.
    """

    turn: Tensor
    left: Tensor
    right: Tensor

    @staticmethod
    def read(before: Tensor, after: Tensor) -> Rotation:
        """From the keys [N, KV heads, d] of the same tokens before and after RoPE.

        Pairs are (j, j + r/2), as in most models, or (2j, 2j + 1), within the first r coordinates; r may be the width
        or a half or a quarter of it.

        Raises:
            InputError: no such rotation takes the ones to the others.
        """
        before, after = before.float(), after.float()
        width, errors = before.shape[-1], []
        for rotary in (width, width // 2, width // 4):
            index = torch.arange(rotary, device=before.device)
            for left, right in ((index[: rotary // 2], index[rotary // 2 :]), (index[::2], index[1::2])):
                rotation = Rotation._fit(before, after, left, right)
                error = float((rotation.apply(before) - after).norm() / after.norm().clamp(min=1e-30))
                if error <= _TOLERANCE:
                    return rotation
                errors.append(error)
        raise InputError("k_post", f"relative error {min(errors):.2g}", "these keys are not k_pre, rotated in pairs")

    @staticmethod
    def _fit(before: Tensor, after: Tensor, left: Tensor, right: Tensor) -> Rotation:
        a, b = (torch.complex(keys[..., left], keys[..., right]) for keys in (before, after))
        turn = (b * a.conj()).sum(dim=1, keepdim=True)  # least squares over KV heads
        size = (a.abs() * b.abs()).sum() / (a.abs() ** 2).sum().clamp(min=1e-30)
        return Rotation(size * turn / turn.abs().clamp(min=1e-30), left, right)

    def apply(self, keys: Tensor) -> Tensor:
        """Keys [N, KV heads, d] rotated as the tokens at their places."""
        turned = torch.complex(keys[..., self.left], keys[..., self.right]) * self.turn
        rotated = keys.clone()
        rotated[..., self.left], rotated[..., self.right] = turned.real, turned.imag
        return rotated


def shuffled_content(visual: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], *, seed: int) -> tuple[Tensor, Tensor]:
    """Rotated keys whose content is dealt at random over the places of both modalities.

    Args:
        visual, text: keys [n, KV heads, d] before and after RoPE.
        seed: of the deal.

    Returns:
        Keys after RoPE at the places of the visual tokens and at those of the text tokens.

    Raises:
        InputError: see `Rotation.read`.
    """
    before, after = torch.cat([visual[0], text[0]]), torch.cat([visual[1], text[1]])
    rotation = Rotation.read(before, after)
    deal = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed)).to(before.device)
    rotated = rotation.apply(before.float()[deal])
    return rotated[: len(visual[0])], rotated[len(visual[0]) :]
