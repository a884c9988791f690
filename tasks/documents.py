"""The documents of the text bias probe: groups of one scene under six conditions, and what a model is shown of each.

A group is one generated scene with one question, a true answer (`gold`) and a wrong one (`lure`). All its documents
carry the same question, options and scene; only the context sentence, the picture, or both differ:

==================  =========  ==============================================
condition           picture    context sentence
==================  =========  ==============================================
clean               the scene  none
match               the scene  states the gold answer
conflict            the scene  states the lure
irrelevant          the scene  states another word of a thing not in the scene
text_only_conflict  none       states the lure
blank               plain gray none
==================  =========  ==============================================

The conditions are those of "Words or Vision" (Deng et al., CVPR 2025, arXiv 2503.02199) with generated scenes and
sentences in place of collected ones. Functions named in the task YAML files take the documents of one task.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, permutations
from typing import TYPE_CHECKING, Any

from PIL import Image

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import BLANK, CONDITIONS, CONFLICT, IRRELEVANT, MATCH, TEXT_ONLY_CONFLICT

if TYPE_CHECKING:
    from datasets import Dataset

WORD, LETTER = ANSWER_FORMS = ("word", "letter")
LETTERS = ("A", "B", "C", "D")

SCENE, GRAY, NO_IMAGE = "scene", "blank", "none"
_IMAGE_OF = {BLANK: GRAY, TEXT_ONLY_CONFLICT: NO_IMAGE}


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


def build_documents(n_groups: int, answer: str = WORD, space: str = "probe") -> list[dict[str, Any]]:
    """The documents of the first `n_groups` groups: six per group, consecutive, in the order of `CONDITIONS`.

    Args:
        n_groups: number of groups.
        answer: `word` (answers are the words of the family's pool) or `letter` (answers are four lettered options).
        space: seed space of the scene generator.

    Raises:
        InputError: an unknown answer form or space, or fewer than one group.
    """
    if answer not in ANSWER_FORMS:
        raise InputError("answer", answer, f"take one of {', '.join(ANSWER_FORMS)}")
    return [_document(group, condition, answer) for group in build_groups(n_groups, space) for condition in CONDITIONS]


def generator_tag(documents: Sequence[dict[str, Any]]) -> str:
    """`<generator version>:<16 hex digits>`, the digits being the sha256 of all documents in canonical JSON."""
    text = json.dumps(documents, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{scenes.GENERATOR_VERSION}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def process_docs(dataset: Dataset) -> Dataset:
    """Turn a task's one-line settings file (columns groups, answer, space, generator) into its documents.

    Raises:
        InputError: the documents are not the ones the settings were published with.
    """
    from datasets import Dataset

    settings = dataset[0]
    documents = build_documents(settings["groups"], settings["answer"], settings["space"])
    tag = generator_tag(documents)
    if tag != settings["generator"]:
        raise InputError(
            "generator",
            settings["generator"],
            f"the generator changed and now makes documents {tag}, whose results cannot be compared with earlier ones; "
            "install the version the task was published with, or publish the new tag in the task's jsonl and yaml",
        )
    return Dataset.from_list(documents)


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a document: one, or none where the condition takes it away."""
    if doc["image"] == NO_IMAGE:
        return []
    return [scenes.blank() if doc["image"] == GRAY else _rendered(doc["spec"]).copy()]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """One user turn: the picture, where there is one, then the text."""
    pictures = [{"type": "image", "url": picture} for picture in doc_to_visual(doc)]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["prompt"]}]}]


def _family_groups(family: str, n: int, space: str) -> list[Group]:
    pool = scenes.POOLS[family]
    letters = _blocks(list(permutations(range(len(LETTERS)), 2)), n, scenes.rng(space, "textbias", "letters", family))
    templates = _blocks(list(range(scenes.N_TEMPLATES)), n, scenes.rng(space, "textbias", "templates", family))
    groups = []
    for i in range(n):
        item = _item_with(pool[i % len(pool)], family, i, space)
        r = scenes.rng(space, "textbias", "text", family, i)
        lure = _lure(item, i)
        fillers = r.sample([word for word in pool if word not in (item.gold, lure)], len(LETTERS) - 2)
        options = _placed(dict(zip(letters[i], (item.gold, lure), strict=True)), fillers)
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


def _blocks(values: list[Any], n: int, r: random.Random) -> list[Any]:
    """`n` values: shuffled copies of the list one after the other."""
    out: list[Any] = []
    while len(out) < n:
        out += r.sample(values, len(values))
    return out[:n]


def _placed(fixed: dict[int, str], fillers: Sequence[str]) -> tuple[str, ...]:
    rest = iter(fillers)
    return tuple(fixed[place] if place in fixed else next(rest) for place in range(len(LETTERS)))


def _document(group: Group, condition: str, answer: str) -> dict[str, Any]:
    item, context = group.item, group.contexts[condition]
    options = list(group.options) if answer == LETTER else []
    image = _IMAGE_OF.get(condition, SCENE)
    return {
        "group_id": group.group_id,
        "item_id": f"{group.group_id}/{condition}",
        "family": item.family,
        "condition": condition,
        "image": image,
        "spec": json.dumps(item.spec, sort_keys=True),
        "image_sha": _image_sha(image, item.spec),
        "context": context,
        "question": item.question,
        "options": options,
        "options_text": "\n".join(f"{letter}. {word}" for letter, word in zip(LETTERS, options, strict=False)),
        "prompt": scenes.prompt(item.question, context=context, options=options or None),
        "gold": item.gold,
        "lure": group.lure,
        "target": LETTERS[group.options.index(item.gold)] if options else item.gold,
        "pool": options or list(item.pool),  # every word that counts as an answer
        "template": group.template,
        "lang": "en",
    }


def _image_sha(image: str, spec: dict[str, Any]) -> str:
    """sha256 of what is drawn: of the scene's spec, or of the plain picture's; empty without a picture."""
    if image == NO_IMAGE:
        return ""
    return scenes.spec_sha(spec if image == SCENE else {"canvas": scenes.CANVAS, "image": GRAY})


@lru_cache(maxsize=16)  # the conditions of a group follow one another and show the same scene
def _rendered(spec: str) -> Image.Image:
    return scenes.render(json.loads(spec))
