"""The groups of the generated probes: one scene with its question, its true and its wrong answer, and its sentences.

All probes but the pairs ask of the same groups, so that their answers can be joined by `group_id`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, permutations
from typing import Any

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import CONDITIONS, CONFLICT, IRRELEVANT, MATCH, TEXT_ONLY_CONFLICT

LETTERS = tuple("ABCDEFGHIJ")
N_OPTIONS = 4


@dataclass(frozen=True)
class Group:
    """One scene with its question, both registered answers, four options that hold them, and its sentences."""

    group_id: str
    item: scenes.Item
    lure: str
    options: tuple[str, ...]
    template: int
    contexts: dict[str, str]  # condition -> context sentence, empty where there is none


def build_groups(n: int, space: str = "probe") -> list[Group]:
    """The first `n` groups of a seed space, the families in turn.

    Within a family gold runs through its pool and the lure through the other words (in `size` the lure is the color of
    the smaller object); templates and the letters of gold and lure are balanced in shuffled blocks. So every prefix is
    close to balanced and 300 groups are balanced.

    Raises:
        InputError: `n` below 1 or an unknown space.
    """
    if n < 1:
        raise InputError("groups", n, "give a positive number of groups")
    families = scenes.CORE_FAMILIES
    per_family = -(-n // len(families))
    drawn = {family: _family_groups(family, per_family, space) for family in families}
    return [drawn[families[i % len(families)]][i // len(families)] for i in range(n)]


def _family_groups(family: str, n: int, space: str) -> list[Group]:
    pool = scenes.POOLS[family]
    letters = blocks(list(permutations(range(N_OPTIONS), 2)), n, scenes.rng(space, "textbias", "letters", family))
    templates = blocks(list(range(scenes.N_TEMPLATES)), n, scenes.rng(space, "textbias", "templates", family))
    groups = []
    for i in range(n):
        item = _item_with(pool[i % len(pool)], family, i, space)
        r = scenes.rng(space, "textbias", "text", family, i)
        lure = _lure(item, i)
        fillers = r.sample([word for word in pool if word not in (item.gold, lure)], N_OPTIONS - 2)
        options = placed(dict(zip(letters[i], (item.gold, lure), strict=True)), fillers)
        told = {value: scenes.hint(item, value, templates[i]) for value in (item.gold, lure)}
        contexts = dict.fromkeys(CONDITIONS, "") | {
            MATCH: told[item.gold],
            CONFLICT: told[lure],
            IRRELEVANT: scenes.irrelevant(item, r, templates[i], avoid=options),
            TEXT_ONLY_CONFLICT: told[lure],
        }
        groups.append(Group(f"{family}-{i:03d}", item, lure, options, templates[i], contexts))
    return groups


def _item_with(gold: str, family: str, index: int, space: str) -> scenes.Item:
    """The first item of the group's own seeds whose answer is `gold`."""
    for attempt in count():
        item = scenes.draw_item(family, scenes.rng(space, "textbias", family, index, attempt), space=space)
        if item.gold == gold:
            return item
    raise AssertionError("unreachable: every answer of a pool is drawn with equal probability")


def _lure(item: scenes.Item, index: int) -> str:
    if item.family == "size":
        smaller: dict[str, Any] = min(item.spec["objects"], key=lambda thing: int(thing["radius"]))
        return str(smaller["color"])
    # Steps of index through n golds and n - 1 offsets meet every (gold, lure) pair, since n and n - 1 are coprime.
    n = len(item.pool)
    return item.pool[(item.pool.index(item.gold) + 1 + index % (n - 1)) % n]


def blocks(values: list[Any], n: int, r: random.Random) -> list[Any]:
    """`n` values: shuffled copies of the list one after the other, so that every prefix is close to balanced."""
    out: list[Any] = []
    while len(out) < n:
        out += r.sample(values, len(values))
    return out[:n]


def placed(fixed: dict[int, str], fillers: Sequence[str]) -> tuple[str, ...]:
    """`N_OPTIONS` options: those with a place of their own, and fillers in order around them."""
    rest = iter(fillers)
    return tuple(fixed[place] if place in fixed else next(rest) for place in range(N_OPTIONS))
