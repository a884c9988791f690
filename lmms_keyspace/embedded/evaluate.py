"""Measure the bundled model as its users will: saved processor, chat template, left-padded batches, generate()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from lmms_keyspace import scenes
from lmms_keyspace.scenes import Item

CONDITIONS = ("clean", "match", "conflict", "irrelevant", "text_only_conflict", "blank")


@dataclass(frozen=True)
class Figures:
    """Rates in percent, by family and under ``"all"`` (the mean over families), then by condition.

    ``lure`` is how often the answer was the wrong value that the conflict hint names; ``chance`` the accuracy of the
    best constant answer by family; ``flip`` the share of clean-correct items whose answer becomes the lure under the
    misleading hint; ``letters`` the accuracy on clean pictures when four options are offered and a letter is wanted;
    ``one_word`` the share of all other answers that are exactly one word of the pool.
    """

    n_per_family: int
    accuracy: dict[str, dict[str, float]]
    lure: dict[str, dict[str, float]]
    chance: dict[str, float]
    flip: dict[str, float]
    letters: dict[str, float]
    one_word: float

    def cost(self, condition: str) -> dict[str, float]:
        """Points of clean accuracy lost in ``condition``, by family and under ``"all"``."""
        return {name: round(row["clean"] - row[condition], 2) for name, row in self.accuracy.items()}


def evaluate(model: Any, processor: Any, space: str, n_per_family: int, *, key: str, batch: int = 100) -> Figures:
    """Answers to ``n_per_family`` items of every family in every condition, by greedy generation.

    Every answer of a family is gold equally often, so the best constant answer is right at chance and no better.
    """
    items: list[Item] = []
    turns: list[tuple[Image.Image | None, str]] = []  # one per item and condition, then one with options
    lures: list[str] = []
    letters: list[str] = []
    for family in scenes.CORE_FAMILIES:
        for i in range(n_per_family):
            r = scenes.rng(space, key, family, i)
            pool = scenes.POOLS[family]
            item = scenes.draw_item(family, r, space=space, gold=pool[i % len(pool)])
            lure = scenes.lure(item, r)
            template = i // len(pool) % scenes.N_TEMPLATES
            picture = scenes.render(item.spec)
            misleading = scenes.hint(item, lure, template)
            contexts = {
                "match": scenes.hint(item, item.gold, template),
                "conflict": misleading,
                "irrelevant": scenes.irrelevant(item, r, template, avoid=[lure]),
                "text_only_conflict": misleading,
            }
            pictures = {"text_only_conflict": None, "blank": scenes.blank()}
            turns += [
                (pictures.get(condition, picture), scenes.prompt(item.question, context=contexts.get(condition, "")))
                for condition in CONDITIONS
            ]
            options = [item.gold, lure, *r.sample([word for word in pool if word not in (item.gold, lure)], 2)]
            r.shuffle(options)
            turns.append((picture, scenes.prompt(item.question, options=options)))
            letters.append("ABCD"[options.index(item.gold)])
            items.append(item)
            lures.append(lure)
    answers = answer(model, processor, turns, batch=batch)
    width = len(CONDITIONS) + 1
    rows = [answers[i : i + width] for i in range(0, len(answers), width)]
    by_item = [dict(zip(CONDITIONS, row, strict=False)) for row in rows]
    right = {
        family: _percent(
            row[-1] == letter for row, letter, item in zip(rows, letters, items, strict=True) if item.family == family
        )
        for family in scenes.CORE_FAMILIES
    }
    right["all"] = _mean(list(right.values()))
    return _figures(items, lures, by_item, right, n_per_family)


@torch.no_grad()
def answer(model: Any, processor: Any, turns: list[tuple[Image.Image | None, str]], *, batch: int) -> list[str]:
    """Generated answers, stripped of surrounding space, to (picture or None, text) user turns."""
    answers = [""] * len(turns)
    for with_picture in (True, False):
        chosen = [i for i, (image, _) in enumerate(turns) if (image is not None) == with_picture]
        for start in range(0, len(chosen), batch):
            rows = chosen[start : start + batch]
            texts = [_chat(processor, turns[i][1], with_picture) for i in rows]
            images = [turns[i][0] for i in rows] if with_picture else None
            inputs = processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.device)
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(rows, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    return answers


def _chat(processor: Any, text: str, with_picture: bool) -> str:
    content = [{"type": "image"}] * with_picture + [{"type": "text", "text": text}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def _figures(
    items: list[Item], lures: list[str], answers: list[dict[str, str]], letters: dict[str, float], n_per_family: int
) -> Figures:
    accuracy: dict[str, dict[str, float]] = {}
    lured: dict[str, dict[str, float]] = {}
    chance: dict[str, float] = {}
    flip: dict[str, float] = {}
    for family in scenes.CORE_FAMILIES:
        rows = [i for i, item in enumerate(items) if item.family == family]
        golds = [items[i].gold for i in rows]
        accuracy[family] = {c: _percent(answers[i][c] == items[i].gold for i in rows) for c in CONDITIONS}
        lured[family] = {c: _percent(answers[i][c] == lures[i] for i in rows) for c in CONDITIONS}
        chance[family] = max(_percent(gold == word for gold in golds) for word in set(golds))
        right = [i for i in rows if answers[i]["clean"] == items[i].gold]
        flip[family] = _percent(answers[i]["conflict"] == lures[i] for i in right)
    for table in (accuracy, lured):
        table["all"] = {c: _mean([table[family][c] for family in scenes.CORE_FAMILIES]) for c in CONDITIONS}
    for row in (chance, flip):
        row["all"] = _mean([row[family] for family in scenes.CORE_FAMILIES])
    one_word = _percent(text in items[i].pool for i, row in enumerate(answers) for text in row.values())
    return Figures(n_per_family, accuracy, lured, chance, flip, letters, one_word)


def _percent(hits: Any) -> float:
    hits = list(hits)
    return round(100 * sum(hits) / len(hits), 2) if hits else 0.0


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 2)
