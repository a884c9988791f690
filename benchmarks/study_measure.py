"""What is measured of every unit, on the same documents: answers, margins, attention, divergence, text perplexity."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lmms_keyspace import scenes
from lmms_keyspace.capture import Capture, Row
from lmms_keyspace.divergence import js_classifier, median_bandwidth2, mmd2, mmd2_laplace
from lmms_keyspace.embedded import data
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.model_wrappers.encoding import encode
from lmms_keyspace.outcomes import (
    CLEAN,
    CONFLICT,
    GOLD,
    IRRELEVANT,
    LURE,
    MATCH,
    METRICS,
    OTHER,
    PARSE_FAIL,
    measure,
    outcomes_by_group,
)
from lmms_keyspace.records import TEXT, VISUAL
from lmms_keyspace.sampling import Sampler
from lmms_keyspace.tokens import Labeler, Prompt

CONDITIONS = (CLEAN, MATCH, CONFLICT, IRRELEVANT)
CAPTURED = (CLEAN, CONFLICT)
CODES = {GOLD: "g", LURE: "l", OTHER: "o", PARSE_FAIL: "f"}
FIGURES = {"clean_acc": "clean accuracy", "text_flip_rate": "flip rate", "benefit": "match benefit"}
TASK, BATCH = "study", 100
CLUSTERS, TOKENS = 100, 16  # scenes and tokens of a modality in each whose keys enter the divergence
TEXT_TURNS = 200


class Evaluation:
    """The documents, encoded once: `n` scenes of each kind of question, asked under four conditions.

    Args:
        model: the base; says what its image tokens are.
        processor: its own.
        space: seed space of the scenes: `dev` for tuning, `probe` for the figures.
        n: scenes of each kind of question.
    """

    def __init__(self, model: Any, processor: Any, space: str, n: int) -> None:
        self._tokenizer = processor.tokenizer
        self._tokenizer.padding_side = "left"
        self.items: list[scenes.Item] = []
        self.lures: list[str] = []
        asked: dict[str, list[tuple[Prompt, Any]]] = {condition: [] for condition in CONDITIONS}
        for family in scenes.CORE_FAMILIES:
            pool = scenes.POOLS[family]
            for i in range(n):
                r = scenes.rng(space, "study", family, i)
                item = scenes.draw_item(family, r, space=space, gold=pool[i % len(pool)])
                lure, template = scenes.lure(item, r), i // len(pool) % scenes.N_TEMPLATES
                contexts = {
                    CLEAN: "",
                    MATCH: scenes.hint(item, item.gold, template),
                    CONFLICT: scenes.hint(item, lure, template),
                    IRRELEVANT: scenes.irrelevant(item, r, template, avoid=[lure]),
                }
                picture = scenes.render(item.spec)
                for place, condition in enumerate(CONDITIONS):
                    words = scenes.prompt(item.question, context=contexts[condition])
                    content = [{"type": "image"}, {"type": "text", "text": words}]
                    text = processor.apply_chat_template(
                        [{"role": "user", "content": content}], add_generation_prompt=True
                    )
                    prompt = Prompt(
                        task=TASK,
                        doc_id=len(self.items) * len(CONDITIONS) + place,
                        cluster=f"{family} {i}",
                        condition=condition,
                        text=text,
                        segments={"hint": contexts[condition], "question": item.question},
                        content=(words,),
                    )
                    asked[condition].append((prompt, picture))
                self.items.append(item)
                self.lures.append(lure)
        self._batches = self._encoded(model, processor, asked)
        self._first = [
            torch.tensor([self._tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words])
            for words in ([item.gold for item in self.items], self.lures)
        ]
        self._text = self._text_turns(space)

    def _encoded(
        self, model: Any, processor: Any, asked: dict[str, list[tuple[Prompt, Any]]]
    ) -> list[tuple[str, Any, list[Row]]]:
        decoder = decoder_sites(model)
        labeler = Labeler(self._tokenizer, decoder.image_token_id, placeholder_id=decoder.placeholder_id)
        labeler.fit([prompt for members in asked.values() for prompt, _ in members])
        sampler = Sampler(seed=0, clusters=CLUSTERS, tokens=TOKENS)
        chosen = sampler.choose_clusters(TASK, [prompt.cluster for prompt, _ in asked[CLEAN]])
        batches = []
        for condition, members in asked.items():
            for start in range(0, len(members), BATCH):
                part = members[start : start + BATCH]
                inputs = encode(processor, [prompt.text for prompt, _ in part], [[image] for _, image in part])
                rows = []
                for k, (prompt, _) in enumerate(part):
                    ids = inputs["input_ids"][k][inputs["attention_mask"][k] != 0].numpy()
                    labels = labeler.label(prompt, ids)
                    sampled = condition == CLEAN and prompt.cluster in chosen
                    positions = (
                        sampler.choose_positions(TASK, prompt.cluster, labels) if sampled else np.empty(0, np.int64)
                    )
                    rows.append(Row(prompt, ids, labels, positions))
                batches.append((condition, inputs, rows))
        return batches

    def _text_turns(self, space: str) -> tuple[Tensor, Tensor]:
        """Ids and mask of turns without a picture, answers included."""
        plain = data.Mixture(**{name: 0.0 for name in data.Mixture.__dataclass_fields__ if name != "text"}, text=1.0)
        r = random.Random(f"{space} text")
        families = scenes.CORE_FAMILIES
        items = [
            scenes.draw_item(families[i % len(families)], scenes.rng(space, "study text", i), space=space)
            for i in range(TEXT_TURNS)
        ]
        ids, real, _ = data.encode([data.text_sample(item, plain, r) for item in items], self._tokenizer)
        return ids, real

    @torch.no_grad()
    def __call__(self, model: Any, bandwidth2: dict[str, list[list[float]]] | None = None) -> dict[str, Any]:
        """All figures of a model.

        Args:
            model: in evaluation mode.
            bandwidth2: space -> layer -> [KV heads], of the base; None for the base itself, which makes them.
        """
        capture = Capture(model, decoder_sites(model), spaces=("k_pre", "k_post"))
        answers: dict[str, list[str]] = defaultdict(list)
        margins: dict[str, list[float]] = defaultdict(list)
        for condition, inputs, rows in self._batches:
            if condition in CAPTURED:
                with capture.batch(rows):
                    output = self._generated(model, inputs)
            else:
                output = self._generated(model, inputs)
            start = len(answers[condition])
            new = output.sequences[:, inputs["input_ids"].shape[1] :]
            answers[condition] += self._tokenizer.batch_decode(new, skip_special_tokens=True)
            gold, lure = (first[start : start + len(rows)] for first in self._first)
            score = output.logits[0].float()
            margin = (score.gather(1, gold[:, None]) - score.gather(1, lure[:, None]))[:, 0]
            # Where both words begin alike, the first token does not tell them apart.
            margins[condition] += margin.masked_fill(gold == lure, math.nan).tolist()
        found = self._answers(answers) | {"text_perplexity": self._perplexity(model)}
        found |= {f"margin_{c}": float(np.nanmean(margins[c])) for c in CAPTURED}
        widths = bandwidth2 if bandwidth2 is not None else _bandwidths(capture)
        attention, divergence = self._attention(capture), _divergence(capture, widths)
        figures = found | attention["figures"] | {name: float(each.mean()) for name, each in divergence.items()}
        codes = {c: "".join(CODES[outcome] for outcome in self._outcomes(answers[c])) for c in CONDITIONS}
        kept = [None if math.isnan(value) else round(value, 3) for value in margins[CONFLICT]]
        return {
            "figures": {name: round(value, 5) for name, value in figures.items()},
            "by_layer": {
                name: [round(float(value), 4) for value in each]
                for name, each in (divergence | attention["by_layer"]).items()
            },
            "documents": codes | {"margin_conflict": kept} | attention["documents"],
            "bandwidth2": widths,
        }

    def _generated(self, model: Any, inputs: Any) -> Any:
        return model.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )

    def _outcomes(self, answers: list[str]) -> list[str]:
        found = []
        for text, item, lure in zip(answers, self.items, self.lures, strict=True):
            word = text.strip()
            known = {item.gold: GOLD, lure: LURE}
            found.append(known.get(word, OTHER if word in item.pool else PARSE_FAIL))
        return found

    def _answers(self, answers: dict[str, list[str]]) -> dict[str, float]:
        rows = [
            {"group_id": str(i), "condition": condition, "outcome": outcome}
            for condition in CONDITIONS
            for i, outcome in enumerate(self._outcomes(answers[condition]))
        ]
        outcomes = outcomes_by_group(pd.DataFrame(rows)).outcomes
        measured = {name: measure(METRICS[name], outcomes) for name in FIGURES}
        return {name: result.value if result else math.nan for name, result in measured.items()}

    def _perplexity(self, model: Any) -> float:
        """exp of the mean negative log-likelihood of all tokens of turns without a picture."""
        ids, real = self._text
        loss = model(input_ids=ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100)).loss
        return float(loss.exp())

    def _attention(self, capture: Capture) -> dict[str, Any]:
        table = capture.attention_table()
        table = table[table["head_group"] == "all"]
        table = table.assign(advantage=table["qk_visual"] - table["qk_text"])
        names = {"mass_image": "attention_mass", "advantage": "visual_advantage"}
        result: dict[str, Any] = {"figures": {}, "by_layer": {}, "documents": {}}
        for column, name in names.items():
            for condition in CAPTURED:
                own = table[table["condition"] == condition].pivot_table(index="doc_id", columns="layer", values=column)
                result["figures"][f"{name}_{condition}"] = float(own.to_numpy().mean())
                result["by_layer"][f"{name}_{condition}"] = own.to_numpy().mean(axis=0)
                if condition == CONFLICT:
                    by_document = own.to_numpy(np.float64).mean(axis=1)
                    result["documents"][f"{name}_{condition}"] = by_document.round(4).tolist()
        return result


def _keys(capture: Capture, space: str, layer: int) -> tuple[Any, ...]:
    sides = [capture.keys(TASK, CLEAN, space, layer, modality) for modality in (VISUAL, TEXT)]
    return (*(keys.transpose(0, 1) for keys, _ in sides), *(clusters for _, clusters in sides))


def _bandwidths(capture: Capture) -> dict[str, list[list[float]]]:
    return {
        space: [median_bandwidth2(*_keys(capture, space, layer)[:2]).tolist() for layer in capture.layers]
        for space in ("k_pre", "k_post")
    }


def _divergence(capture: Capture, bandwidth2: dict[str, list[list[float]]]) -> dict[str, np.ndarray]:
    """By layer, means over KV heads. The kernel and space of the training term are the first; the others are not."""
    values: dict[str, list[float]] = defaultdict(list)
    for space in ("k_pre", "k_post"):
        for place, layer in enumerate(capture.layers):
            visual, text, images, prompts = _keys(capture, space, layer)
            groups: Any = {"groups_x": images, "groups_y": prompts}
            width = np.asarray(bandwidth2[space][place])
            values[f"mmd2_{space}"].append(mmd2(visual, text, bandwidth2=width, **groups).mean())
            values[f"mmd2_narrow_{space}"].append(
                mmd2(visual, text, bandwidth2=width, scales=(1 / 16, 1 / 8), **groups).mean()
            )
            values[f"mmd2_laplace_{space}"].append(mmd2_laplace(visual, text, bandwidth2=width, **groups).mean())
            values[f"js_{space}"].append(js_classifier(visual, text, **groups).value.mean())
    return {name: np.asarray(each) for name, each in values.items()}
