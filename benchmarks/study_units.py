"""The units of the study: which adapter is trained on what, and how one of them is made."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PrinterCallback

from lmms_keyspace import embedded, scenes
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.intervene.boost import VisualBoost
from lmms_keyspace.intervene.keys import KeyMaps, affine_maps
from lmms_keyspace.intervene.moments import Moments
from lmms_keyspace.malora import MaloraConfig, preset, visual_token_ids
from lmms_keyspace.training.alignment import TokenChooser
from lmms_keyspace.training.config import (
    EvaluationSettings,
    LossConfig,
    SceneSettings,
    TrainingConfig,
    training_arguments,
)
from lmms_keyspace.training.encoding import EXAMPLE_ID, Collator, EncodedExamples
from lmms_keyspace.training.scene_examples import scene_examples
from lmms_keyspace.training.trainer import AlignmentTrainer

STEPS, BATCH, SCENES = 120, 32, 2000
LAMBDA_GRAM = 0.1
FINAL_SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
TUNING_DATA = "true_hints"
BOOST = 0.2

DATA = {  # share of scenes with a hint, share of hints that are false
    "no_hints": (0.0, 0.0),
    "true_hints": (0.5, 0.0),
    "10_misleading": (0.5, 0.1),
    "50_misleading": (0.5, 0.5),
}


@dataclass(frozen=True)
class Arm:
    """A preset with a weight of its MMD term, or a change of the base model without training."""

    preset: str | None = None
    lambda_mmd: float = 0.0
    training_free: str | None = None


ARMS = {
    "base": Arm(),
    "lora_k": Arm("lora_k"),
    "malora_no_mmd": Arm("malora_no_mmd"),
    "malora_0.01": Arm("malora", 0.01),
    "malora_0.1": Arm("malora", 0.1),
    "malora_1": Arm("malora", 1.0),
    "malora_no_gate": Arm("malora_no_gate", 0.1),
    "malora_no_gram": Arm("malora_no_gram", 0.1),
    "modality_lora": Arm("modality_lora"),
    "lora_qkvo": Arm("lora_qkvo"),
    "moka": Arm("moka"),
    "mean_shift": Arm(training_free="mean_shift"),
    "moment_matching": Arm(training_free="moment_matching"),
    "random_shift": Arm(training_free="random_shift"),
    "visual_boost": Arm(training_free="visual_boost"),
}
CORE = ("lora_k", "malora_no_mmd", "malora_0.01", "malora_0.1", "malora_1")
OTHERS = ("malora_no_gate", "malora_no_gram", "modality_lora", "lora_qkvo", "moka")
TRAINING_FREE = ("mean_shift", "moment_matching", "random_shift", "visual_boost")
HEADLINE = ("lora_k", "malora_no_mmd", "malora_0.1")  # repeated on every base
OTHERS_DATA = "true_hints"


@dataclass(frozen=True)
class Unit:
    """One adapter, trained and measured.

    Attributes:
        phase: final | tuning.
        base: `bundled`, or the name of another build.
        arm: of `ARMS`.
        data: of `DATA`; `-` where nothing is trained.
        seed: of the scenes, the order, and the adapter's start.
        learning_rate: None where nothing is trained.
    """

    phase: str
    base: str
    arm: str
    data: str
    seed: int
    learning_rate: float | None

    @property
    def name(self) -> str:
        rate = f"-{self.learning_rate:g}" if self.phase == "tuning" else ""
        return f"{self.phase}/{self.base}/{self.arm}-{self.data}-{self.seed}{rate}"


def tuning_units() -> list[Unit]:
    """Every trained arm with every learning rate on every tuning seed: an equal budget."""
    return [
        Unit("tuning", "bundled", arm, TUNING_DATA, seed, rate)
        for arm, rate, seed in itertools.product((*CORE, *OTHERS), LEARNING_RATES, TUNING_SEEDS)
    ]


def final_units(bases: list[str], rates: dict[str, float]) -> list[Unit]:
    """The grid, the bases' own figures first; the data and the seed change slowest, so that scenes are made once.

    Args:
        bases: names, `bundled` first.
        rates: learning rate of each trained arm, from the tuning.
    """
    units = [Unit("final", base, "base", "-", 0, None) for base in bases]
    units += [
        Unit("final", "bundled", arm, "-", seed, None)
        for seed in FINAL_SEEDS
        for arm in TRAINING_FREE
        if seed == FINAL_SEEDS[0] or arm != "visual_boost"  # which draws nothing
    ]
    for base, data, seed in itertools.product(bases, DATA, FINAL_SEEDS):
        if base == "bundled":
            arms = CORE + (OTHERS if data == OTHERS_DATA else ())
        else:
            arms = HEADLINE if data == OTHERS_DATA else ()
        units += [Unit("final", base, arm, data, seed, rates[arm]) for arm in arms]
    return units


def fingerprints(base: Path) -> dict[str, str]:
    """sha256 of what the results rest on: the base's weights and tokenizer, and the generator of scenes."""
    weights = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer.json"):
        weights.update((base / name).read_bytes())
    generator = Path(scenes.__file__).read_bytes()
    return {"base_sha256": weights.hexdigest(), "generator_sha256": hashlib.sha256(generator).hexdigest()}


def base_folder(name: str, others: dict[str, Path]) -> Path:
    """Folder of a base by name."""
    return embedded.base_path() if name == "bundled" else others[name]


@lru_cache(maxsize=1)
def _encoded(folder: Path, data: str, seed: int, n: int = SCENES) -> list[dict[str, torch.Tensor]]:
    hint, misleading = DATA[data]
    examples = scene_examples(SceneSettings(n=n, hint=hint, misleading=misleading), seed)
    processor = AutoProcessor.from_pretrained(folder)
    items = EncodedExamples(examples, processor, _visual_ids(folder))
    return [items[i] for i in range(len(items))]


def _visual_ids(folder: Path) -> tuple[int, ...]:
    return visual_token_ids(AutoConfig.from_pretrained(folder))


def load_base(folder: Path) -> Any:
    """The base model in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@contextmanager
def made(unit: Unit, folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The unit's model in evaluation mode, and what is to be remembered of its making."""
    arm = ARMS[unit.arm]
    model = load_base(folder)
    if arm.preset is not None:
        yield _trained(unit, arm, model, folder)
    elif arm.training_free is None:
        yield model, {}
    else:
        change = _changed(unit, arm.training_free, model, folder)
        try:
            yield model, {}
        finally:
            change.remove()


def _trained(unit: Unit, arm: Arm, model: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    chosen = preset(str(arm.preset))
    torch.manual_seed(unit.seed)
    adapted: Any = get_peft_model(model, chosen.peft_config(MaloraConfig(), model.config))
    loss = LossConfig(lambda_mmd=arm.lambda_mmd if chosen.mmd else 0.0, lambda_gram=LAMBDA_GRAM * chosen.gram)
    with tempfile.TemporaryDirectory() as scratch:
        config = TrainingConfig(
            output_dir=Path(scratch),
            seed=unit.seed,
            evaluation=EvaluationSettings(every=0),
            trainer={
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH,
                "learning_rate": unit.learning_rate,
                "logging_steps": STEPS // 4,
                "save_strategy": "no",
                "disable_tqdm": True,
                "train_sampling_strategy": "group_by_length",
            },
        )
        trainer = AlignmentTrainer(
            adapted,
            training_arguments(config),
            loss=loss,
            processor=AutoProcessor.from_pretrained(folder),
            examples=_encoded(folder, unit.data, unit.seed),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    parameters, _ = adapted.get_nb_trainable_parameters()
    log = [{k: round(v, 6) for k, v in entry.items()} for entry in trainer.state.log_history if "ce" in entry]
    return adapted.eval(), {"loss": loss.model_dump(), "trainable_parameters": parameters, "log": log}


def _changed(unit: Unit, kind: str, model: Any, folder: Path) -> VisualBoost | KeyMaps:
    decoder = decoder_sites(model)
    if kind == "visual_boost":
        return VisualBoost(decoder, BOOST)
    return KeyMaps(decoder, affine_maps(kind, _moments(model, folder, unit.seed), unit.seed))


@torch.no_grad()
def _moments(model: Any, folder: Path, seed: int) -> dict[int, Moments]:
    """Mean and spread of the base's keys on 256 training scenes of this seed, 16 tokens a modality and scene."""
    rows = _encoded(folder, TUNING_DATA, seed, 256)
    processor = AutoProcessor.from_pretrained(folder)
    chooser = TokenChooser(_visual_ids(folder), processor.tokenizer.all_special_ids, 16 * len(rows), seed)
    batch = Collator(processor.tokenizer.pad_token_id)(rows)
    sides = chooser.choose(batch, batch.pop(EXAMPLE_ID), 0)
    keys: dict[int, Any] = {}
    decoder = decoder_sites(model)
    handles = [
        site.key_module.register_forward_hook(
            lambda _module, _args, output, site=site: keys.__setitem__(site.layer, site.keys(output).flatten(0, 1))
        )
        for site in decoder.sites
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    visual, text = (side.tokens for side in sides)
    return {
        layer: Moments(own[visual].mean(0), own[text].mean(0), own[visual].std(0), own[text].std(0))
        for layer, own in keys.items()
    }


def described(unit: Unit) -> dict[str, Any]:
    """The unit and its settings, for its file."""
    return asdict(unit) | {"steps": STEPS, "batch": BATCH, "scenes": SCENES}
