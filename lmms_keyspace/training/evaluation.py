"""What is followed during training on held-out scenes: does the model see, and does it follow text that is wrong?"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from lmms_keyspace import scenes
from lmms_keyspace.embedded.evaluate import answer
from lmms_keyspace.outcomes import (
    CLEAN,
    CONFLICT,
    GOLD,
    LURE,
    MATCH,
    METRICS,
    OTHER,
    PARSE_FAIL,
    measure,
    outcomes_by_group,
)

_FOLLOWED = {"clean_acc": "clean_accuracy", "text_flip_rate": "flip_rate", "benefit": "match_benefit"}


class HeldOutScenes:
    """Scenes of the seed space `dev`, asked plainly, with a true and with a false sentence.

    Args:
        items: scenes of each kind of question.
        batch_size: of generation.
    """

    def __init__(self, items: int, batch_size: int) -> None:
        self._batch_size = batch_size
        self._answers: list[tuple[str, str, str, tuple[str, ...]]] = []  # group, gold, lure, pool
        self._turns: list[tuple[str, Any, str]] = []  # condition, picture, text
        for family in scenes.CORE_FAMILIES:
            pool = scenes.POOLS[family]
            for i in range(items):
                r = scenes.rng("dev", "training", family, i)
                item = scenes.draw_item(family, r, space="dev", gold=pool[i % len(pool)])
                lure, template = scenes.lure(item, r), i % scenes.N_TEMPLATES
                picture = scenes.render(item.spec)
                for condition, claim in ((CLEAN, None), (MATCH, item.gold), (CONFLICT, lure)):
                    context = scenes.hint(item, claim, template) if claim else ""
                    self._answers.append((f"{family} {i}", item.gold, lure, item.pool))
                    self._turns.append((condition, picture, scenes.prompt(item.question, context=context)))

    def __call__(self, model: Any, processor: Any) -> dict[str, float]:
        """`clean_accuracy`, `flip_rate` (NaN where nothing was right) and `match_benefit`, shares from 0 to 1.

        Args:
            model: in evaluation mode.
            processor: its own; answers are generated from left-padded prompts.
        """
        side, processor.tokenizer.padding_side = processor.tokenizer.padding_side, "left"
        try:
            texts = answer(model, processor, [(image, text) for _, image, text in self._turns], batch=self._batch_size)
        finally:
            processor.tokenizer.padding_side = side
        rows = [
            {"group_id": group, "condition": condition, "outcome": _outcome(text, gold, lure, pool)}
            for text, (condition, _, _), (group, gold, lure, pool) in zip(
                texts, self._turns, self._answers, strict=True
            )
        ]
        outcomes = outcomes_by_group(pd.DataFrame(rows)).outcomes
        measured = {name: measure(METRICS[metric], outcomes) for metric, name in _FOLLOWED.items()}
        return {name: result.value if result else float("nan") for name, result in measured.items()}


def _outcome(text: str, gold: str, lure: str, pool: tuple[str, ...]) -> str:
    """An answer counts when it holds exactly one word of the pool."""
    found = set(re.findall(r"[a-z]+", text.lower())) & set(pool)
    if len(found) != 1:
        return PARSE_FAIL
    word = found.pop()
    return GOLD if word == gold else LURE if word == lure else OTHER
