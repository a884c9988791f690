"""Build the bundled model: ``python -m lmms_keyspace.embedded.build --out DIR``.

One seeded script. It writes ``DIR/base`` (bfloat16 weights, tokenizer, processor, chat template), one folder for each
adapter, ``card.json`` with every figure and ``CARD.md``, the same for people. A seed repeats the training bit by bit
on one machine with the same number of threads; elsewhere rounding differs and the figures move slightly.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_keyspace import scenes
from lmms_keyspace.embedded import card, data, stages
from lmms_keyspace.embedded.adapters import AdapterRecipe, build_adapters
from lmms_keyspace.embedded.architecture import IMAGE, make_model, make_processor, make_tokenizer
from lmms_keyspace.embedded.data import Mixture
from lmms_keyspace.embedded.evaluate import evaluate
from lmms_keyspace.embedded.stages import LanguageStage, Log, Stage


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, next to the seed; `RECIPE` built the bundled weights."""

    scenes: int
    vocabulary: int
    vision: Stage
    decoder: tuple[LanguageStage, ...]  # in order; the adapters train on the mixture of the last
    adapters: AdapterRecipe
    checked: int  # `dev` pictures of each family on which the vision encoder is checked
    measured: tuple[tuple[str, int], ...]  # space, items a family


TEXT = Mixture(
    text=1.0, hint=0.0, irrelevant=0.0, picture_last=0.0, letters=0.5, wrong_picture=0.0, drill=0.3, blank=0.0
)
PICTURES = {"text": 0.1, "irrelevant": 0.1, "picture_last": 0.1, "letters": 0.25, "drill": 0.0}

RECIPE = Recipe(
    scenes=60_000,
    vocabulary=700,
    vision=Stage(5000, 64, 1.5e-3),
    decoder=(
        LanguageStage(*(1600, 64, 2e-3), TEXT, context_weight=0.3),
        LanguageStage(*(1400, 64, 1.5e-3), Mixture(**PICTURES, hint=0.3, wrong_picture=0.012, blank=0.0)),
        LanguageStage(*(200, 64, 6e-4), Mixture(**PICTURES, hint=0.5, wrong_picture=0.0, blank=0.0)),
        LanguageStage(*(200, 64, 6e-4), Mixture(**PICTURES, hint=0.5, wrong_picture=0.03, blank=0.05)),
        LanguageStage(*(100, 64, 3e-4), Mixture(**PICTURES, hint=0.5, wrong_picture=0.0, blank=0.05)),
    ),
    adapters=AdapterRecipe(),
    checked=100,
    measured=(("dev", 200), ("heldout", 200), ("probe", 60)),
)


def build(out: Path, recipe: Recipe, seed: int, log: Log, *, keep_base: bool = False) -> dict[str, Any]:
    """Train and measure everything, write it under ``out`` and return the card.

    With ``keep_base`` the base model already in ``out`` is not trained again, only measured; the card keeps the seed
    and the recipe it was trained with.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    base = out / "base"
    trained = json.loads((out / "card.json").read_text()) if keep_base else _train_base(base, recipe, seed, log)
    record: dict[str, Any] = {
        "generator_version": scenes.GENERATOR_VERSION,
        "seed": trained["seed"],
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "peft", "pillow")},
        "threads": torch.get_num_threads(),
        "recipe": trained["recipe"] | {"adapters": asdict(recipe.adapters), "measured": recipe.measured},
        "training_minutes": trained["training_minutes"],
        "vision_accuracy": trained["vision_accuracy"],
        "base": _measure_base(base, recipe, log),
        "adapters": {},
    }
    _write(out, record)  # the base stands on its own, should an adapter fail
    record["adapters"] = build_adapters(base, out, recipe.adapters, recipe.decoder[-1].mixture, seed, log)
    record["minutes"] = round(record["training_minutes"] + (time.perf_counter() - started) / 60, 1)
    _write(out, record)
    return record


def _write(out: Path, record: dict[str, Any]) -> None:
    (out / "card.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "CARD.md").write_text(card.page(record))


def _train_base(folder: Path, recipe: Recipe, seed: int, log: Log) -> dict[str, Any]:
    started = time.perf_counter()
    items = data.train_items(recipe.scenes, seed)
    tokenizer = make_tokenizer(_tokenizer_texts(items, recipe.decoder[-1].mixture, seed), vocabulary=recipe.vocabulary)
    processor = make_processor(tokenizer)
    seen = items + data.nameless_copies(items, seed)
    pixel_values = data.pixels(seen, processor)
    unseen = [
        scenes.draw_item(family, scenes.rng("dev", "vision", family, i), space="dev")
        for family in scenes.CORE_FAMILIES
        for i in range(recipe.checked)
    ]
    log(f"{len(seen)} pictures drawn, {len(tokenizer)} tokens")

    model = make_model(len(tokenizer), seed)
    vision_accuracy = stages.train_vision(
        model,
        (pixel_values, data.patch_targets(seen, named_shapes=False)),
        (data.pixels(unseen, processor), data.patch_targets(unseen, named_shapes=True)),
        recipe.vision,
        seed,
        log,
    )
    # The encoder is rounded to what will be saved before its features are cached for the stages that build on them.
    model.model.vision_tower.to(torch.bfloat16).float()
    features = stages.cached_features(model, data.with_blank(pixel_values[: len(items)], processor))
    for i, stage in enumerate(recipe.decoder):
        stages.train_language(model, tokenizer, items, features, stage, seed + i, log)

    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    return {
        "seed": seed,
        "recipe": asdict(recipe),
        "training_minutes": round((time.perf_counter() - started) / 60, 1),
        "vision_accuracy": vision_accuracy,
    }


def _measure_base(folder: Path, recipe: Recipe, log: Log) -> dict[str, Any]:
    saved = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    figures = {}
    missed = {}
    for space, n in recipe.measured:
        result = evaluate(saved, processor, space, n, key="card")
        figures[space], missed[space] = asdict(result), card.shortfalls(result)
        log(space, result.accuracy["all"], missed[space] or "holds every bound")
    return {
        "parameters": sum(parameter.numel() for parameter in saved.parameters()),
        "vocabulary": len(processor.tokenizer),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "figures": figures,
        "missed": missed,
    }


def _tokenizer_texts(items: list[data.Item], mixture: Mixture, seed: int) -> Iterator[str]:
    mixture = replace(mixture, blank=0.0)  # a blank picture brings no words of its own
    r = random.Random(seed)
    for item in items[:20_000]:
        for sample in (data.text_sample(item, mixture, r), data.picture_sample([item], 0, mixture, r)):
            yield sample.prompt.replace(IMAGE, "") + sample.answer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lmms_keyspace.embedded.build", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep-base", action="store_true", help="keep the base model in DIR; measure it and train the adapters again"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()

    def log(*words: object) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s]", *words, flush=True)

    record = build(arguments.out, RECIPE, arguments.seed, log, keep_base=arguments.keep_base)
    missed = [line for lines in record["base"]["missed"].values() for line in lines]
    if missed:
        raise SystemExit("The model was written but misses what it must hold:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
