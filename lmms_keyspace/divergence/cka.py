"""Linear centered kernel alignment: are the keys of two models alike, token by token, up to rotation and scale?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmms_keyspace.divergence.arrays import Cloud, Floats, as_cloud
from lmms_keyspace.errors import InputError


@dataclass(frozen=True)
class LinearCKA:
    """|Y'X|_F^2 / (|X'X|_F |Y'Y|_F) of centered keys (Kornblith et al., arXiv 1905.00414, equation 1 with linear HSIC).

    Not a divergence: it compares two models at the same tokens, 1 for equal up to rotation, scale and translation. It
    is biased upwards when tokens are few for the width, and ruled by the directions of greatest variance, so a few
    massive dimensions can hold it near 1 while the rest changes.
    """

    name: str = "linear_cka"
    unit: str = ""
    version: str = "1"

    def __call__(self, x: Cloud, y: Cloud) -> Floats:
        """CKA of each leading index.

        Args:
            x, y: [..., n, d] and [..., n, e], keys of two models at the same n tokens; d and e may differ.

        Returns:
            [...] in [0, 1].

        Raises:
            InputError: other leading shapes or numbers of tokens, entries that are not finite, constant keys.
        """
        a, b = as_cloud("x", x), as_cloud("y", y)
        if a.shape[:-1] != b.shape[:-1]:
            raise InputError("y", tuple(b.shape), f"CKA needs the tokens of x, shape {tuple(a.shape[:-1])} and a width")
        a, b = (cloud.double() - cloud.double().mean(dim=-2, keepdim=True) for cloud in (a, b.to(a.device)))
        scale = _norm(a.mT @ a) * _norm(b.mT @ b)
        if not bool((scale > 0).all()):
            raise InputError("x", "constant keys", "keys that do not vary have no similarity structure")
        cka: Floats = (_norm(b.mT @ a) ** 2 / scale).cpu().numpy()
        return cka


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm


linear_cka = LinearCKA()
