"""The groups of `textbias_rich`: one picture with its question, its true and its wrong answer, and its sentences."""

from __future__ import annotations

import random
from itertools import permutations

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import CONDITIONS, CONFLICT, IRRELEVANT, MATCH, TEXT_ONLY_CONFLICT
from lmms_keyspace.tasks.groups import N_OPTIONS, Group, blocks, placed
from lmms_keyspace.tasks.rich import wording
from lmms_keyspace.tasks.rich.drawing import POOLS, RICH_FAMILIES, RICH_VERSION, draw


def build_groups(n: int, space: str = "probe", lang: str = "en") -> list[Group]:
    """The first `n` groups of a seed space, the families in turn, balanced as the core families are.

    Gold runs through a family's pool and the lure through the other words; wordings and the letters of both are
    balanced in shuffled blocks. Pictures do not depend on the language.

    Raises:
        InputError: `n` below 1 or an unknown space.
    """
    if n < 1:
        raise InputError("groups", n, "give a positive number of groups")
    per_family = -(-n // len(RICH_FAMILIES))
    built = {family: _family_groups(family, per_family, space, lang) for family in RICH_FAMILIES}
    return [built[RICH_FAMILIES[i % len(RICH_FAMILIES)]][i // len(RICH_FAMILIES)] for i in range(n)]


def _family_groups(family: str, n: int, space: str, lang: str) -> list[Group]:
    pool = POOLS[family]

    def stream(*key: int | str) -> random.Random:
        return scenes.rng(space, "rich", RICH_VERSION, family, *key)

    letters = blocks(list(permutations(range(N_OPTIONS), 2)), n, stream("letters"))
    templates = blocks(list(range(scenes.N_TEMPLATES)), n, stream("templates"))
    return [_group(family, i, pool, letters[i], templates[i], stream("item", i), lang) for i in range(n)]


def _group(
    family: str, i: int, pool: tuple[str, ...], letters: tuple[int, int], template: int, r: random.Random,
    lang: str,
) -> Group:  # fmt: skip
    # Steps of i through n golds and n - 1 offsets meet every (gold, lure) pair, since n and n - 1 are coprime.
    n = len(pool)
    gold = pool[i % n]
    lure = pool[(i % n + 1 + i % (n - 1)) % n]
    spec = draw(family, gold, lure, r)
    fillers = r.sample([word for word in pool if word not in (gold, lure)], N_OPTIONS - 2)
    options = placed(dict(zip(letters, (gold, lure), strict=True)), fillers)

    def said(word: str) -> str:
        return wording.answer(word, family, lang)

    told = {word: wording.hint(spec, said(word), template, lang) for word in (gold, lure)}
    contexts = dict.fromkeys(CONDITIONS, "") | {
        MATCH: told[gold],
        CONFLICT: told[lure],
        IRRELEVANT: wording.irrelevant(family, r.randrange(2), template, lang),
        TEXT_ONLY_CONFLICT: told[lure],
    }
    item = scenes.Item(family, spec, wording.question(spec, lang), said(gold), tuple(map(said, pool)), family)
    return Group(f"{family}-{i:03d}", item, said(lure), tuple(map(said, options)), template, contexts)
