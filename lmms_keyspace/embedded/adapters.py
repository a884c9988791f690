"""Train and measure the three bundled adapters: MaLoRA, plain key-only LoRA, and MaLoRA without its MMD term."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback

from lmms_keyspace import embedded, scenes
from lmms_keyspace.divergence import median_bandwidth2, mmd2
from lmms_keyspace.embedded import data
from lmms_keyspace.embedded.architecture import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID
from lmms_keyspace.embedded.data import Mixture
from lmms_keyspace.embedded.evaluate import evaluate
from lmms_keyspace.embedded.stages import Log
from lmms_keyspace.malora import MaloraConfig, matched_lora_config
from lmms_keyspace.training.config import EvaluationSettings, LossConfig, TrainingConfig, training_arguments
from lmms_keyspace.training.encoding import EXAMPLE_ID, IGNORED
from lmms_keyspace.training.trainer import AlignmentTrainer

SPECIAL_IDS = (PAD_ID, BOS_ID, EOS_ID)


@dataclass(frozen=True)
class AdapterRecipe:
    """Settings shared by all three adapters; the weights of the terms differ (see `ARMS`)."""

    steps: int = 120
    batch: int = 32
    learning_rate: float = 4e-3
    rank: int = 8
    alpha: float = 16.0
    scenes: int = 5000
    measured: tuple[tuple[str, int], ...] = (("dev", 100), ("probe", 60))  # space, items a family
    measured_keys: int = 100  # clean items whose keys enter MMD^2


@dataclass(frozen=True)
class Arm:
    """One adapter: its method and the weights of its terms."""

    method: str
    lambda_mmd: float
    lambda_gram: float


ARMS = {
    "malora": Arm("malora", 2.0, 1.0),
    "malora_no_mmd": Arm("malora", 0.0, 1.0),
    "lora": Arm("lora", 0.0, 0.0),
}


def build_adapters(
    base: Path, out: Path, recipe: AdapterRecipe, mixture: Mixture, seed: int, log: Log
) -> dict[str, dict[str, Any]]:
    """Train every adapter of `ARMS` on ``base``, save it under ``out`` and return the entries of the card.

    ``mixture`` is that of the base's last stage; only its turns with pictures are used, as the terms need both
    modalities. The first entry is the base itself, measured in the same way.
    """
    processor = AutoProcessor.from_pretrained(base)
    items = data.train_items(recipe.scenes, seed)
    pixel_values = data.with_blank(data.pixels(items, processor), processor)
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    bandwidths = [median_bandwidth2(*keys[:2]) for keys in _clean_keys(plain, processor, recipe.measured_keys)]
    entries = {"base": _measure(plain, processor, recipe, bandwidths)}
    for name, arm in ARMS.items():
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, _config(arm, recipe, model.config))
        source = data.batches(items, replace(mixture, text=0.0), recipe.batch, random.Random(seed))
        trainer = AlignmentTrainer(
            adapted,
            training_arguments(_settings(out / name, recipe, seed)),
            loss=LossConfig(lambda_mmd=arm.lambda_mmd, lambda_gram=arm.lambda_gram),
            processor=processor,
            examples=_examples(islice(source, recipe.steps), pixel_values, processor.tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "ce" in entry]
        adapted.eval()
        _save(adapted, out / name)
        entry = _measure(adapted, processor, recipe, bandwidths)
        entry |= {"arm": asdict(arm), "first_step": history[0], "last_step": history[-1]}
        entries[name] = entry
        log(name, entry["figures"][recipe.measured[0][0]]["accuracy"]["all"], entry["mmd2_by_layer"])
    return entries


def _config(arm: Arm, recipe: AdapterRecipe, model_config: Any) -> PeftConfig:
    config = MaloraConfig(r=recipe.rank, alpha=recipe.alpha)
    return config if arm.method == "malora" else matched_lora_config(config, model_config)


def _settings(folder: Path, recipe: AdapterRecipe, seed: int) -> TrainingConfig:
    """The batches come in the order in which they were drawn; nothing is saved or evaluated on the way."""
    return TrainingConfig(
        output_dir=folder,
        seed=seed,
        evaluation=EvaluationSettings(every=0),
        trainer={
            "max_steps": recipe.steps,
            "per_device_train_batch_size": recipe.batch,
            "learning_rate": recipe.learning_rate,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    )


def _examples(source: Iterator[list[data.Sample]], pixel_values: Tensor, tokenizer: Any) -> list[dict[str, Tensor]]:
    """The samples of the batches, one after the other, each without padding."""
    examples: list[dict[str, Tensor]] = []
    for samples in source:
        for sample, ids, real, answer in zip(samples, *data.encode(samples, tokenizer), strict=True):
            labels = ids.masked_fill(~answer, IGNORED)
            examples.append(
                {
                    "input_ids": ids[real],
                    "labels": labels[real],
                    "pixel_values": pixel_values[[sample.picture]],
                    EXAMPLE_ID: torch.tensor(len(examples)),
                }
            )
    return examples


def _save(adapted: PeftModel, folder: Path) -> None:
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = embedded.BASE_NAME
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; CARD.md speaks for all adapters


def _measure(model: Any, processor: Any, recipe: AdapterRecipe, bandwidths: list[Any]) -> dict[str, Any]:
    keys = _clean_keys(model, processor, recipe.measured_keys)
    by_layer = [
        mmd2(visual, text, groups_x=images, groups_y=prompts, bandwidth2=bandwidth).mean()
        for (visual, text, images, prompts), bandwidth in zip(keys, bandwidths, strict=True)
    ]
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)
        if isinstance(model, PeftModel)
        else 0,
        "figures": {space: asdict(evaluate(model, processor, space, n, key="card")) for space, n in recipe.measured},
        "mmd2_by_layer": [round(float(value), 4) for value in by_layer],
    }


_Keys = tuple[Tensor, Tensor, list[int], list[int]]  # visual and text keys [heads, n, width], the item of each token


@torch.no_grad()
def _clean_keys(model: Any, processor: Any, n: int) -> list[_Keys]:
    """Keys before rotation of the prompts of ``n`` clean ``dev`` items, by layer; no special token is among them."""
    families = scenes.CORE_FAMILIES
    items = [scenes.draw_item(families[i % len(families)], scenes.rng("dev", "keys", i), space="dev") for i in range(n)]
    content = [[{"type": "image"}, {"type": "text", "text": scenes.prompt(item.question)}] for item in items]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        for parts in content
    ]
    pictures = [scenes.render(item.spec) for item in items]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for name, module in model.named_modules()
        if "language_model" in name and name.endswith("self_attn.k_proj")
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    ids = inputs["input_ids"]
    text = ~torch.isin(ids, torch.tensor([*SPECIAL_IDS, IMAGE_ID]))
    width = model.config.get_text_config().hidden_size // model.config.get_text_config().num_attention_heads
    picked = []
    for output in outputs:
        heads = output.unflatten(-1, (-1, width))  # [items, tokens, heads, width]
        sides = [heads[mask].transpose(0, 1) for mask in (ids == IMAGE_ID, text)]
        groups = [mask.nonzero()[:, 0].tolist() for mask in (ids == IMAGE_ID, text)]
        picked.append((sides[0], sides[1], groups[0], groups[1]))
    return picked
