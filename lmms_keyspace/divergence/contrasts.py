"""What is compared with what: the two clouds of every contrast, from the keys of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lmms_keyspace import records, stats
from lmms_keyspace.divergence.arrays import Floats, as_clouds
from lmms_keyspace.divergence.mmd import kernel_sums
from lmms_keyspace.divergence.rotation import shuffled_content
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import KernelSums

# Draws over which the contrasts with chance in them are averaged: split halves, equal counts, shuffled content.
N_DRAWS = 5

Names = NDArray[np.str_]


@dataclass(frozen=True)
class LayerKeys:
    """Captured keys of one layer: tensors [tokens, KV heads, head width], and the cluster of every token.

    Attributes:
        bandwidth2: squared bandwidth per KV head, or why there is none.
        other_text: task -> text keys of that task, and their clusters.
        unrotated: for `k_post`, `k_pre` of the visual and of the text tokens.
        base: keys of the base model at the same visual and text tokens.
        with_sinks: the visual and the text tokens with attention sinks among them, keys and clusters; None without any.
        template: template and special tokens, keys and clusters; None without any.
    """

    layer: int
    visual: Tensor
    text: Tensor
    clusters_visual: Sequence[str]
    clusters_text: Sequence[str]
    bandwidth2: Floats | InputError
    other_text: Mapping[str, tuple[Tensor, Sequence[str]]] = field(default_factory=dict)
    unrotated: tuple[Tensor, Tensor] | None = None
    base: tuple[Tensor, Tensor] | None = None
    with_sinks: tuple[tuple[Tensor, Sequence[str]], tuple[Tensor, Sequence[str]]] | None = None
    template: tuple[Tensor, Sequence[str]] | None = None

    @property
    def width2(self) -> Floats:
        """The squared bandwidths.

        Raises:
            InputError: there are none.
        """
        if isinstance(self.bandwidth2, InputError):
            raise self.bandwidth2
        return self.bandwidth2


@dataclass(frozen=True)
class Clouds:
    """Two clouds [KV heads, tokens, head width] and the cluster of every token."""

    x: Tensor
    y: Tensor
    groups_x: Names
    groups_y: Names

    @staticmethod
    def of(x: Tensor, y: Tensor, clusters_x: Sequence[str], clusters_y: Sequence[str]) -> Clouds:
        """From keys [tokens, KV heads, head width], checked.

        Raises:
            InputError: shapes that do not agree, entries that are not finite.
        """
        clouds = as_clouds(x.transpose(0, 1), y.transpose(0, 1))
        return Clouds(*clouds, *(np.asarray([str(c) for c in side], dtype=str) for side in (clusters_x, clusters_y)))

    def require(self, clusters: int) -> Clouds:
        """Itself, if both sides have tokens of as many clusters.

        Raises:
            InputError: they have not.
        """
        for name, groups in (("visual or first side", self.groups_x), ("text or second side", self.groups_y)):
            found = len(np.unique(groups))
            if found < clusters:
                raise InputError(name, f"tokens in {found} clusters", f"this contrast needs at least {clusters}")
        return self

    def sums(self, bandwidth2: Floats) -> KernelSums:
        """Their kernel sums, x as visual and y as text."""
        return kernel_sums(self.x, self.y, groups_x=self.groups_x, groups_y=self.groups_y, bandwidth2=bandwidth2)


def halves(cloud: Tensor, groups: Names, seed: int) -> Clouds:
    """One modality split by cluster, for its divergence from itself."""
    names = np.unique(groups)
    first = np.isin(groups, names[stats.first_half(names.tolist(), seed)])
    return Clouds(cloud[..., first, :], cloud[..., ~first, :], groups[first], groups[~first])


def baseline_contrasts(clouds: Clouds, seed: int) -> dict[str, Clouds]:
    """Visual against text, and each modality against itself between halves of the clusters."""
    return {
        records.VISUAL_TEXT: clouds,
        records.VISUAL_VISUAL: halves(clouds.x, clouds.groups_x, seed),
        records.TEXT_TEXT: halves(clouds.y, clouds.groups_y, seed),
    }


def fewest_clusters(contrast: str) -> int:
    """Clusters a side that a contrast needs."""
    within_one = contrast in (records.VISUAL_VISUAL, records.TEXT_TEXT)
    return stats.MIN_SPLIT_CLUSTERS // 2 if within_one else stats.MIN_CLUSTERS


def equal_counts_sums(clouds: Clouds, bandwidth2: Floats, seed: int) -> KernelSums:
    """Kernel sums with as many visual as text tokens in every cluster, mean over seeded draws.

    The statistic is linear in the sums, and every draw has the same numbers of tokens, so the mean of the sums gives
    the mean of the values.

    Raises:
        InputError: fewer than 4 clusters with tokens of both sides.
    """
    shared = [name for name in np.unique(clouds.groups_x) if name in clouds.groups_y]
    rng = np.random.default_rng([seed, 4])

    def drawn(groups: Names, numbers: Mapping[str, int]) -> NDArray[np.int64]:
        picked = [rng.permutation(np.flatnonzero(groups == name))[:number] for name, number in numbers.items()]
        return np.concatenate(picked) if picked else np.empty(0, np.int64)

    smaller = {
        name: int(min(np.count_nonzero(clouds.groups_x == name), np.count_nonzero(clouds.groups_y == name)))
        for name in shared
    }
    draws = []
    for _ in range(N_DRAWS):
        in_x, in_y = drawn(clouds.groups_x, smaller), drawn(clouds.groups_y, smaller)
        part = Clouds(clouds.x[:, in_x], clouds.y[:, in_y], clouds.groups_x[in_x], clouds.groups_y[in_y])
        draws.append(part.require(stats.MIN_CLUSTERS).sums(bandwidth2))
    return _mean(draws)


def position_null_sums(keys: LayerKeys, seed: int) -> KernelSums:
    """Kernel sums of rotated keys whose content was dealt at random over all places, mean over seeded deals.

    What is left between the places of image and text is due to rotary positions (and to the bias of the keys, which
    they rotate): a gap after RoPE is to be read against it.

    Raises:
        InputError: keys that are not rotated k_pre, fewer than 4 clusters a side.
    """
    if keys.unrotated is None:
        raise InputError("space", "k_pre", "only rotated keys have positions")
    draws = []
    for draw in range(N_DRAWS):
        visual, text = shuffled_content(
            (keys.unrotated[0], keys.visual), (keys.unrotated[1], keys.text), seed=N_DRAWS * seed + draw
        )
        dealt = Clouds.of(visual, text, keys.clusters_visual, keys.clusters_text)
        draws.append(dealt.require(stats.MIN_CLUSTERS).sums(keys.width2))
    return _mean(draws)


def _mean(draws: Sequence[KernelSums]) -> KernelSums:
    vv, tt, vt = (np.mean([getattr(sums, name) for sums in draws], axis=0) for name in ("vv", "tt", "vt"))
    return replace(draws[0], vv=vv, tt=tt, vt=vt)
