"""What each probe shows of a group: the documents' pictures, sentences, questions and answers, condition by condition.

`textbias_probe` has the conditions of "Words or Vision" (Deng et al., CVPR 2025, arXiv 2503.02199) with generated
scenes and sentences in place of collected ones; `visreliance_pairs` the layout of NaturalBench (Li et al., NeurIPS
2024, arXiv 2410.14669). The conditions are described in `lmms_keyspace.outcomes` and docs/probes.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from lmms_keyspace import outcomes, scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.tasks import chinese
from lmms_keyspace.tasks.captions import caption
from lmms_keyspace.tasks.groups import N_OPTIONS, Group, build_groups, placed
from lmms_keyspace.tasks.pictures import GRAY, NO_IMAGE, NOISE, SCENE, SHUFFLED
from lmms_keyspace.tasks.rich.groups import build_groups as build_rich_groups

# Words of no family, written in the picture as a control; and sentences of as many words as a claim, about nothing.
RANDOM_WORDS = ("table", "river", "music", "paper", "garden", "winter")
FILLERS: dict[int, tuple[str, ...]] = {
    4: ("the shop opens early", "the train runs late"),
    5: ("the shop opens before lunch", "the train runs very late"),
    7: ("the shop opens early on most mornings", "the train to the coast runs late"),
    8: ("the shop opens early on most summer mornings", "the train to the north coast runs late"),
}
READ_QUESTION = "Which word is written in the picture?"
COLOR_QUESTION = "What color is the object?"
PAIRS, RICH = "visreliance_pairs", "textbias_rich"

_OPINIONS = ("I think that {claim}.", "In my opinion, {claim}.", "I am quite sure that {claim}.")
_EXPERTS = (
    "An expert confirmed that {claim}.",
    "The official report states that {claim}.",
    "The professor explained that {claim}.",
)


@dataclass(frozen=True)
class Case:
    """What one document shows and asks; `gold` is its true answer, `lure` the answer that misleads in its group."""

    group_id: str
    family: str
    template: int
    condition: str
    image: str  # one of pictures.KINDS
    spec: dict[str, Any]
    context: str
    question: str
    gold: str
    lure: str
    options: tuple[str, ...]
    pool: tuple[str, ...]


def cases(probe: str, n_groups: int, space: str, lang: str = "en") -> Iterator[Case]:
    """The documents of a probe's first groups, those of a group together and in the order of its conditions.

    Raises:
        InputError: an unknown probe or space, fewer than one group, or a probe that is not translated.
    """
    if probe == RICH:
        for group in build_rich_groups(n_groups, space, lang):
            yield from _textbias(group, space)
        return
    found = _core_cases(probe, n_groups, space)
    yield from map(chinese.translated, found) if lang == "zh" else found


def _core_cases(probe: str, n_groups: int, space: str) -> Iterator[Case]:
    if probe == PAIRS:
        for index in range(n_groups):
            yield from _pair(index, space)
        return
    if probe not in _CASES:
        raise InputError("probe", probe, f"take one of {', '.join(NAMES)}")
    for group in build_groups(n_groups, space):
        yield from _CASES[probe](group, space)


def _clean(group: Group) -> Case:
    item = group.item
    return Case(
        group.group_id, item.family, group.template, outcomes.CLEAN, SCENE, item.spec, "", item.question, item.gold,
        group.lure, group.options, item.pool,
    )  # fmt: skip


def _textbias(group: Group, space: str) -> Iterator[Case]:
    images = {outcomes.BLANK: GRAY, outcomes.TEXT_ONLY_CONFLICT: NO_IMAGE}
    for condition, context in group.contexts.items():
        yield replace(_clean(group), condition=condition, image=images.get(condition, SCENE), context=context)


def _order(group: Group, space: str) -> Iterator[Case]:
    clean = _clean(group)
    template, note = group.template, group.contexts[outcomes.CONFLICT]
    claim = scenes.claim(group.item, group.lure, template)
    fillers = FILLERS[len(claim.split())]
    yield clean
    filler = scenes.framed(fillers[template // 2 % len(fillers)], template)
    yield replace(clean, condition=outcomes.FILLER, context=filler)
    yield replace(clean, condition=outcomes.CONFLICT, context=note)
    yield replace(clean, condition=outcomes.BEFORE, context=note)
    for condition, frames in ((outcomes.OPINION, _OPINIONS), (outcomes.AUTHORITY, _EXPERTS)):
        yield replace(clean, condition=condition, context=frames[template // 2].format(claim=claim))
    yield replace(clean, condition=outcomes.TEXT_ONLY_CONFLICT, image=NO_IMAGE, context=note)


def _typographic(group: Group, space: str) -> Iterator[Case]:
    clean = _clean(group)
    control = scenes.rng(space, "typographic", group.group_id).choice(RANDOM_WORDS)
    yield clean
    for condition, word in (
        (outcomes.LURE_WORD, clean.lure),
        (outcomes.GOLD_WORD, clean.gold),
        (outcomes.RANDOM_WORD, control),
    ):
        yield replace(clean, condition=condition, spec={**clean.spec, "written": word})
    yield replace(
        clean,
        condition=outcomes.READ,
        spec={**clean.spec, "written": clean.lure},
        question=READ_QUESTION,
        gold=clean.lure,
        lure=clean.gold,
    )


def _visreliance(group: Group, space: str) -> Iterator[Case]:
    clean = _clean(group)
    r = scenes.rng(space, "visreliance", group.group_id)
    seeded = {**clean.spec, "seed": r.getrandbits(32)}
    yield clean
    yield replace(clean, condition=outcomes.BLANK, image=GRAY)
    yield replace(clean, condition=outcomes.NOISE, image=NOISE, spec=seeded)
    yield replace(clean, condition=outcomes.SHUFFLED, image=SHUFFLED, spec=seeded)
    yield replace(clean, condition=outcomes.MISMATCHED, spec=_other_scene(group, r, space))
    yield replace(clean, condition=outcomes.NO_IMAGE, image=NO_IMAGE)
    yield replace(clean, condition=outcomes.CAPTION_ORACLE, image=NO_IMAGE, context=caption(clean.spec))


def _other_scene(group: Group, r: random.Random, space: str) -> dict[str, Any]:
    """A scene of which the group's question has the lure for an answer."""
    while True:  # the question names one shape of six at most
        item = scenes.draw_item(group.item.family, r, space=space, gold=group.lure)
        if item.question == group.item.question:
            return item.spec


def _pair(index: int, space: str) -> Iterator[Case]:
    """Two pictures with both answers different, and two questions: what is right of one picture is wrong of the other.

    The questions ask for color and shape, or (of two objects of one shape) for color and nearest edge, in turn.
    """
    r = scenes.rng(space, "pairs", index)
    second = ("shape", "position")[index % 2]
    while True:
        items = [scenes.draw_item(second, r, space=space) for _ in range(2)]
        colors, answers = [item.spec["objects"][0]["color"] for item in items], [item.gold for item in items]
        if colors[0] != colors[1] and answers[0] != answers[1] and items[0].question == items[1].question:
            break
    questions = (
        (COLOR_QUESTION, colors, scenes.POOLS["color"]),
        (items[0].question, answers, items[0].pool),
    )
    options = [_pair_options(index, place, golds, pool, space) for place, (_, golds, pool) in enumerate(questions)]
    for place, condition in enumerate(outcomes.PAIR_CONDITIONS):
        image, (question, golds, pool) = place // 2, questions[place % 2]
        yield Case(
            f"pair-{index:03d}", f"color_{second}", 0, condition, SCENE, items[image].spec, "", question, golds[image],
            golds[1 - image], options[place % 2], pool,
        )  # fmt: skip


def _pair_options(index: int, question: int, golds: Sequence[str], pool: Sequence[str], space: str) -> tuple[str, ...]:
    """Four options of a question, the same for both pictures; in every twelve pairs each place of both answers once."""
    places = list(permutations(range(N_OPTIONS), 2))
    block, at = divmod(index, len(places))
    scenes.rng(space, "pairs", "letters", block, question).shuffle(places)
    r = scenes.rng(space, "pairs", "options", index, question)
    fillers = r.sample([word for word in pool if word not in golds], N_OPTIONS - 2)
    return placed(dict(zip(places[at], golds, strict=True)), fillers)


_CASES: dict[str, Callable[[Group, str], Iterator[Case]]] = {
    "textbias_probe": _textbias,
    "textbias_order": _order,
    "textbias_typographic": _typographic,
    "visreliance_probe": _visreliance,
}
NAMES = (*_CASES, RICH, PAIRS)
