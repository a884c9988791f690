"""Which clusters and tokens are captured: decided by a seeded hash, smallest first (bottom-k).

A choice depends on the seed and on the thing's own name, never on batch size, order or rank, so all conditions of a
cluster stay together and two models with one tokenizer are sampled at the same tokens. A smaller k takes a subset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import BOILERPLATE, MODALITIES, TEMPLATE, TEXT, VISUAL
from lmms_keyspace.tokens import TokenLabels

# Most template and special tokens of a document; they serve one control of the divergence table.
TEMPLATE_TOKENS = 8
_IS_TEMPLATE = np.isin(MODALITIES, TEMPLATE)  # by modality code


def hash64(*parts: object) -> int:
    """64-bit hash of the parts as text, the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)  # length first: ("ab", "c") is not ("a", "bc")
    return int.from_bytes(digest.digest(), "little")


def mix64(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), elementwise on uint64; wraps around."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mixed_positions(positions: np.ndarray) -> np.ndarray:
    """`mix64` of positions, looked up."""
    if not positions.size:
        return np.empty(0, np.uint64)
    return np.asarray(_mixed(1 << int(positions.max()).bit_length())[positions])


@lru_cache(maxsize=32)
def _mixed(size: int) -> np.ndarray:
    return mix64(np.arange(size, dtype=np.uint64))


class Sampler:
    """Bottom-k sampling of clusters in a task and of tokens in a document.

    Args:
        seed: any integer; one seed, one sample.
        clusters: clusters taken per task, all their conditions included.
        tokens: visual and text tokens taken of a document, each; of template and special tokens together as many, but
            at most `TEMPLATE_TOKENS`.

    Raises:
        InputError: `clusters` or `tokens` is below 1.
    """

    def __init__(self, seed: int, clusters: int = 128, tokens: int = 32) -> None:
        for argument, value in (("capture_clusters", clusters), ("capture_tokens", tokens)):
            if value < 1:
                raise InputError(argument, value, "give a whole number of at least 1, or capture=off")
        self.seed = seed
        self.clusters = clusters
        self.tokens = tokens
        self.template_tokens = min(tokens, TEMPLATE_TOKENS)
        self._patches: dict[tuple[str, str, int], np.ndarray] = {}  # conditions of a cluster show equal images

    def choose_clusters(self, task: str, clusters: Iterable[str]) -> frozenset[str]:
        """The clusters of a task to capture; names may repeat and come in any order."""
        ranked = sorted(set(clusters), key=lambda name: (hash64(self.seed, task, name), name))
        return frozenset(ranked[: self.clusters])

    def choose_tokens(
        self, task: str, cluster: str, modality: str, positions: np.ndarray, limit: int | None = None
    ) -> np.ndarray:
        """The positions with the smallest hash, in ascending order.

        Args:
            task, cluster, modality: which hash; conditions of a cluster share it.
            positions: candidate positions, distinct and not negative.
            limit: how many; None takes `tokens`.
        """
        limit = self.tokens if limit is None else limit
        positions = np.sort(np.asarray(positions, dtype=np.int64))
        if positions.size <= limit:
            return positions
        base = np.uint64(hash64(self.seed, task, cluster, modality))
        order = np.argsort(mix64(mixed_positions(positions) ^ base), kind="stable")
        return np.sort(positions[order[:limit]])

    def choose_positions(self, task: str, cluster: str, labels: TokenLabels) -> np.ndarray:
        """Positions in the unpadded prompt of the tokens to capture, ascending.

        Visual tokens are drawn by their rank among the prompt's visual tokens, text and template tokens by their place
        among the others. So a condition that puts words before the image is captured at the same patches, and models
        that spend unequal numbers of tokens on an image at the same words.
        """
        is_visual = labels.modality_codes == MODALITIES.index(VISUAL)
        visual, others = np.flatnonzero(is_visual), np.flatnonzero(~is_visual)
        codes = labels.modality_codes[others]
        text, template = np.flatnonzero(codes == MODALITIES.index(TEXT)), np.flatnonzero(_IS_TEMPLATE[codes])
        name = (task, cluster, visual.size)
        if name not in self._patches:
            self._patches[name] = self.choose_tokens(task, cluster, VISUAL, np.arange(visual.size))
        patches = self._patches[name]
        words = self.choose_tokens(task, cluster, TEXT, text)
        around = self.choose_tokens(task, cluster, BOILERPLATE, template, self.template_tokens)
        return np.sort(np.concatenate([visual[patches], others[words], others[around]]))
