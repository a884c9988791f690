"""Fixed instructions: the same token id at the same offset from an anchor in at least 90 % of a task's documents.

Anchors are the prompt's start and end, its images, and the edges of the segments that the task declares. Documents of
one cluster share the weight of one, because conditions of one question would otherwise turn the question itself into
boilerplate. All documents of a task are counted together, one anchor at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmms_keyspace.records import SEGMENTS

# Share of documents at which a repeated token is boilerplate.
BOILERPLATE_SHARE = 0.9
# With fewer clusters than this behind an anchor, words of the documents repeat by chance: nothing is searched.
MIN_CLUSTERS = 8
# Images that serve as anchors, counted from the prompt's start (the last image always does).
MAX_IMAGE_ANCHORS = 8
# Segments that a task may declare; the others are found by the labeler.
TEXT_SEGMENTS = ("hint", "question", "options")

Fixed = Mapping[tuple[str, int, bool], np.ndarray]  # anchor's name, number, forward -> id by offset, -1: none


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """D tokenized prompts, one after the other, every run of image placeholders collapsed to one token.

    Attributes:
        bounds: `[D + 1]` where each prompt begins and the last ends; the other arrays are `[N]`.
        ids: token ids.
        placeholders: images in the run, 0 for other tokens.
        special: special tokens.
        template: outside the user's words.
        segment: declared segment as a place in `records.SEGMENTS`, -1 for none.
    """

    bounds: np.ndarray
    ids: np.ndarray
    placeholders: np.ndarray
    special: np.ndarray
    template: np.ndarray
    segment: np.ndarray

    @property
    def free(self) -> np.ndarray:
        """Tokens that are text unless they are boilerplate."""
        return np.asarray(~(self.special | self.template | (self.placeholders > 0)))

    def span(self, place: int) -> slice:
        """The tokens of one prompt."""
        return slice(int(self.bounds[place]), int(self.bounds[place + 1]))


def find_fixed(encoded: EncodedPrompts, clusters: Sequence[str]) -> Fixed:
    """The fixed ids of a task.

    Args:
        clusters: of the D prompts.
    """
    sizes = Counter(clusters)
    weights = np.array([1 / sizes[cluster] for cluster in clusters])
    place = {cluster: place for place, cluster in enumerate(sizes)}
    places = np.array([place[cluster] for cluster in clusters])
    table = _table(encoded)
    fixed: dict[tuple[str, int, bool], np.ndarray] = {}
    for name, number, documents, positions in _anchors(encoded):
        if np.unique(places[documents]).size < MIN_CLUSTERS:
            continue
        weight = weights[documents]
        # The margin keeps a share of exactly 90 % independent of the order of summation.
        needed = (BOILERPLATE_SHARE - 1e-9) * weight.sum()
        for forward in (True, False):
            reach = encoded.bounds[documents + 1] - encoded.bounds[documents] - positions if forward else positions
            # Further from the anchor too few documents have a token.
            order = np.argsort(-reach, kind="stable")
            enough = np.searchsorted(np.cumsum(weight[order]), needed)
            length = int(reach[order[min(enough, order.size - 1)]])
            if length == 0:
                continue
            ids = _from_anchor(table, documents, positions, forward, np.arange(length))
            candidates = _majority(ids, weight)
            hits = weight @ (ids == candidates)
            found = np.where((hits >= needed) & (candidates >= 0), candidates, -1)
            if (found >= 0).any():
                fixed[name, number, forward] = found
    return fixed


def mark_fixed(encoded: EncodedPrompts, fixed: Fixed) -> np.ndarray:
    """`[N]` which tokens are fixed ones."""
    table = _table(encoded)
    marked = np.zeros(table.shape, bool)
    for name, number, documents, positions in _anchors(encoded):
        for forward in (True, False):
            known = fixed.get((name, number, forward))
            if known is None:
                continue
            offsets = np.flatnonzero(known >= 0)
            same = _from_anchor(table, documents, positions, forward, offsets) == known[offsets]
            rows, columns = np.nonzero(same)
            shift = offsets[columns] if forward else -1 - offsets[columns]
            marked[documents[rows], positions[rows] + shift] = True
    return np.asarray(marked[table >= 0])


def _table(encoded: EncodedPrompts) -> np.ndarray:
    """`[D, longest + 1]` ids by prompt, -1 behind the end; the last column is always -1."""
    sizes = np.diff(encoded.bounds)
    table = np.full((sizes.size, int(sizes.max(initial=0)) + 1), -1, np.int32)
    table[np.arange(table.shape[1]) < sizes[:, None]] = encoded.ids
    return table


def _from_anchor(
    table: np.ndarray, documents: np.ndarray, positions: np.ndarray, forward: bool, offsets: np.ndarray
) -> np.ndarray:
    """`[S, offsets]` ids at the offsets from the anchors of S prompts, -1 outside of a prompt.

    Forward from the token at the anchor's position, backward from the one before it.
    """
    nothing = table.shape[1] - 1
    columns = positions[:, None] + (offsets if forward else -1 - offsets)
    columns = np.where((columns < 0) | (columns > nothing), nothing, columns)
    return np.asarray(table[documents[:, None], columns])


def _majority(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Per column the only id that may hold more than half of the weight (Boyer and Moore's vote, merged pairwise)."""
    lead = np.repeat(weights[:, None], ids.shape[1], axis=1)
    while len(ids) > 1:
        half = len(ids) // 2
        left, right, ours, theirs = ids[:half], ids[half : 2 * half], lead[:half], lead[half : 2 * half]
        rest_ids, rest_lead = ids[2 * half :], lead[2 * half :]
        ids = np.concatenate([np.where(ours >= theirs, left, right), rest_ids])
        lead = np.concatenate([np.where(left == right, ours + theirs, np.abs(ours - theirs)), rest_lead])
    return np.asarray(ids[0])


def _anchors(encoded: EncodedPrompts) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """Name and number of each anchor, the prompts that have it, and the index of its token in each of them."""
    everyone = np.arange(encoded.bounds.size - 1)
    yield "prompt", 0, everyone, np.zeros_like(everyone)
    yield "prompt", 1, everyone, np.diff(encoded.bounds)
    owners, positions, first, last = _places(encoded, encoded.placeholders > 0)
    number_in_prompt = np.arange(owners.size) - np.repeat(first, last - first + 1)
    for number in range(min(MAX_IMAGE_ANCHORS, int(number_in_prompt.max(initial=-1)) + 1)):
        chosen = number_in_prompt == number
        yield "image", number, owners[chosen], positions[chosen]
    yield "image", -1, owners[last], positions[last]
    for name in TEXT_SEGMENTS:
        owners, positions, first, last = _places(encoded, encoded.segment == SEGMENTS.index(name))
        if owners.size:
            yield name, 0, owners[first], positions[first]
            yield name, 1, owners[last], positions[last] + 1


def _places(encoded: EncodedPrompts, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompt and index of the chosen tokens, and which of them are the first and the last of their prompt."""
    tokens = np.flatnonzero(chosen)
    owners = np.searchsorted(encoded.bounds, tokens, side="right") - 1
    _, first, counts = np.unique(owners, return_index=True, return_counts=True)
    return owners, tokens - encoded.bounds[owners], first, first + counts - 1
