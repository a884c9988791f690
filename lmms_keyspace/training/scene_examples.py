"""Examples made of the generator's scenes: questions about pictures, some with a sentence that is true, false or beside
the point. The answer to learn is always what the picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from PIL import Image

from lmms_keyspace import scenes
from lmms_keyspace.embedded.data import train_items
from lmms_keyspace.training.config import SceneSettings
from lmms_keyspace.training.examples import IMAGE_MARK, Example, Turn


def scene_examples(settings: SceneSettings, seed: int) -> Sequence[Example]:
    """`settings.n` examples, the kinds of question in turn.

    The scenes and their sentences' words are the same for all shares of hints and of false ones: a larger share gives a
    hint to more scenes, and makes more of the hints false.

    Args:
        settings: how many, and the shares.
        seed: used where the settings name none.
    """
    seed = seed if settings.seed is None else settings.seed
    return [_example(i, item, settings, seed) for i, item in enumerate(train_items(settings.n, seed))]


def _example(index: int, item: scenes.Item, settings: SceneSettings, seed: int) -> Example:
    r = scenes.rng("train", "sentence", seed, index)
    kind, lie, template = r.random(), r.random(), r.randrange(scenes.N_TEMPLATES)
    wrong, beside = scenes.lure(item, r), scenes.irrelevant(item, r, template)
    context = ""
    if kind < settings.hint:
        context = scenes.hint(item, wrong if lie < settings.misleading else item.gold, template)
    elif kind >= 1 - settings.irrelevant:
        context = beside
    question = scenes.prompt(item.question, context=context)
    turns = (Turn("user", f"{IMAGE_MARK}\n{question}"), Turn("assistant", item.gold))
    return Example(f"scene {index}", (partial(_render, item),), turns)


def _render(item: scenes.Item) -> Image.Image:
    return scenes.render(item.spec)
