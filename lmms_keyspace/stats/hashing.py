"""Seeded orders that do not depend on the order in which things are given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def hash_ranks(names: Sequence[str], *salt: object) -> NDArray[np.int64]:
    """Rank of each name in a seeded order that does not depend on the order in which the names are given.

    Args:
        names: distinct names.
        salt: the seed and what the order is for.
    """
    prefix = "\x1f".join(map(str, salt))
    digests = [hashlib.blake2b(f"{prefix}\x1f{name}".encode(), digest_size=16).digest() for name in names]
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[sorted(range(len(names)), key=digests.__getitem__)] = np.arange(len(names))
    return ranks


def first_half(names: Sequence[str], seed: int, split: int = 0) -> NDArray[np.bool_]:
    """Which clusters belong to the first half of a seeded split; the halves differ by at most one cluster."""
    return hash_ranks(names, seed, "split-half", split) < len(names) // 2
