"""What a training run is told: a YAML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from peft import LoraConfig, PeftConfig
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import MaloraConfig, preset

# Of transformers.TrainingArguments; the rest keeps its defaults. Chosen for the bundled model: a large one wants a
# learning rate about 20 times smaller.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 120,
    "per_device_train_batch_size": 32,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1 a share of the steps
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_steps": 0.25,
    "dataloader_drop_last": True,
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "use_cpu": not torch.accelerator.is_available(),  # or several processes on CPUs would not find each other
    "report_to": "none",
}
_OURS = ("output_dir", "seed", "data_seed", "eval_strategy", "eval_steps", "remove_unused_columns", "label_names")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterSettings(_Strict):
    """The adapter to train.

    Attributes:
        preset: of `malora.PRESETS`: MaLoRA, one of its parts taken away, or a baseline with as many parameters. One
            without the MMD or the Gram term sets that weight to 0.
        malora: fields of `MaloraConfig` by name: of the adapter, or of the one whose parameters a baseline matches.
        lora: instead of both, fields of PEFT's `LoraConfig` by name; the terms keep their weights.
    """

    preset: str = "malora"
    malora: dict[str, Any] = {}
    lora: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> AdapterSettings:
        if self.lora is not None and self.model_fields_set > {"lora"}:
            raise ValueError("lora stands alone; take preset and malora away")
        return self


class LossConfig(_Strict):
    """Cross-entropy + lambda_mmd(t) MMD^2 + lambda_gram Gram; see `malora.losses` for the terms.

    Attributes:
        lambda_mmd, lambda_gram: weights; a term of weight 0 is measured and does not act.
        warmup: share of the steps over which lambda_mmd rises linearly.
        anchor: `text` (visual keys move to the text keys) or `symmetric`.
        space: the keys compared: `k_pre`, before RoPE, or `k_post`, after it.
        max_tokens: tokens a modality and step that enter the terms, over all ranks.
        calibration_examples: examples from which the frozen bandwidths are taken.
    """

    lambda_mmd: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    lambda_gram: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    anchor: Literal["text", "symmetric"] = "text"
    space: Literal["k_pre", "k_post"] = "k_pre"
    max_tokens: Annotated[int, Field(ge=2)] = 128
    calibration_examples: PositiveInt = 128


class SceneSettings(_Strict):
    """Generated scenes of the seed space `train`, each with its question.

    Attributes:
        n: scenes.
        hint: share with a sentence that states an answer.
        misleading: share of these sentences that state a wrong one; the answer to learn is always the true one.
        irrelevant: share with a sentence about something else.
        seed: of the scenes and sentences; None takes the run's.
    """

    n: PositiveInt = 4000
    hint: Annotated[float, Field(ge=0, le=1)] = 0.5
    misleading: Annotated[float, Field(ge=0, le=1)] = 0.0
    irrelevant: Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: int | None = None

    @model_validator(mode="after")
    def _shares(self) -> SceneSettings:
        if self.hint + self.irrelevant > 1:
            raise ValueError("the shares hint and irrelevant add up to more than 1")
        return self


class DataSettings(_Strict):
    """Where the conversations come from: one of `path`, `dataset`, `scenes`.

    Attributes:
        path: a JSON list, or JSON lines; rows of LLaVA's form (`image`, `conversations`) or with the columns below.
        dataset: name or folder of a `datasets` data set; `subset` and `split` choose in it.
        image_column, question_column, answer_column: names of the columns.
        image_folder: where relative image paths start; None: the folder of `path`.
        bad_images: what to do about a row whose image does not open.
    """

    path: Path | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    scenes: SceneSettings | None = None
    image_column: str = "image"
    question_column: str = "question"
    answer_column: str = "answer"
    image_folder: Path | None = None
    bad_images: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _one(self) -> DataSettings:
        given = [name for name in ("path", "dataset", "scenes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, dataset, scenes, found {given or 'none'}")
        return self


class EvaluationSettings(_Strict):
    """The held-out set on which accuracy and text bias are followed: scenes of the seed space `dev`.

    Attributes:
        every: steps between two evaluations; 0 for none.
        items: scenes of each of the five kinds of question; each is asked plainly, with a true and with a false hint.
        batch_size: of generation.
    """

    every: Annotated[int, Field(ge=0)] = 40
    items: PositiveInt = 8
    batch_size: PositiveInt = 40


class TrainingConfig(_Strict):
    """A training run.

    Attributes:
        output_dir: gets the adapter, `training.json` and the checkpoints.
        pretrained: folder or hub id of a vision-language model; None is the bundled one.
        revision: branch, tag or commit on the hub.
        dtype: of the frozen weights; `auto` is float32 on the CPU and bfloat16 elsewhere.
        attn_implementation: of transformers.
        seed: of the adapter's start, the order of the data and the tokens in the terms.
        trainer: arguments of `transformers.TrainingArguments` by name.
    """

    output_dir: Path
    pretrained: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    seed: int = 0
    adapter: AdapterSettings = AdapterSettings()
    loss: LossConfig = LossConfig()
    data: DataSettings = DataSettings(scenes=SceneSettings())
    evaluation: EvaluationSettings = EvaluationSettings()
    trainer: dict[str, Any] = {}


def read_config(file: Path | None, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The configuration of a YAML file with single settings replaced.

    Args:
        file: None starts from the defaults.
        overrides: `name.of.setting=value`, the value in YAML.

    Raises:
        InputError: the file cannot be read, or a setting is unknown or out of range.
    """
    settings: Any = {}
    if file is not None:
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError("CONFIG", str(file), f"it cannot be read as YAML: {error}") from error
        if not isinstance(settings, dict):
            raise InputError("CONFIG", str(file), "it must hold settings by name; see docs/training.md.")
    for override in overrides:
        _override(settings, override)
    try:
        return TrainingConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "CONFIG"
        raise InputError(
            name, first["input"], f"{first['msg']}; the settings are listed in docs/training.md."
        ) from error


def _override(settings: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError("--set", override, "write name.of.setting=value, e.g. loss.lambda_mmd=1.")
    *folders, name = path.split(".")
    for folder in folders:
        settings = settings.setdefault(folder, {})
        if not isinstance(settings, dict):
            raise InputError("--set", override, f"{folder} is a single value, so nothing lies inside it.")
    settings[name] = yaml.safe_load(value)


def peft_config(adapter: AdapterSettings, model_config: Any) -> PeftConfig:
    """The PEFT configuration of the adapter for a model of this transformers config.

    Raises:
        InputError: an unknown preset or field, or a value that its method refuses.
    """
    if adapter.lora is not None:
        plain: LoraConfig = _made(LoraConfig, "adapter.lora", adapter.lora)
        if plain.r < 1:  # PEFT finds out when it builds the layers
            raise InputError("adapter.lora.r", plain.r, "give a rank of at least 1.")
        return plain
    arm = preset(adapter.preset)
    return arm.peft_config(_made(MaloraConfig, "adapter.malora", adapter.malora), model_config)


def effective_loss(config: TrainingConfig) -> LossConfig:
    """The loss with the weights of terms that the preset does not have at 0."""
    if config.adapter.lora is not None:
        return config.loss
    arm = preset(config.adapter.preset)
    has = {"lambda_mmd": arm.mmd, "lambda_gram": arm.gram}
    return config.loss.model_copy(update={name: 0.0 for name, wanted in has.items() if not wanted})


def _made(kind: type, name: str, fields: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise InputError(f"{name}.{unknown[0]}", fields[unknown[0]], f"{kind.__name__} has no such field.")
    try:
        return kind(**{key: _number(value) for key, value in fields.items()})
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(name, fields, f"{kind.__name__} refuses it: {error}") from error


def training_arguments(config: TrainingConfig) -> TrainingArguments:
    """The arguments of transformers' Trainer: our defaults, the user's, and what the run decides itself.

    Raises:
        InputError: an argument that transformers does not know or refuses, one that is set elsewhere, or one that needs
            a package or a file that is missing.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name, value in config.trainer.items():
        if name in _OURS:
            raise InputError(f"trainer.{name}", value, "it has a setting of its own; see docs/training.md.")
        if name not in known:
            raise InputError(f"trainer.{name}", value, "transformers.TrainingArguments has no such argument.")
    # YAML reads a bare `no` as false.
    named = {
        name: "no" if value is False and name.endswith("_strategy") else value for name, value in config.trainer.items()
    }
    given = TRAINER_DEFAULTS | {name: _number(value) for name, value in named.items()}
    if "num_train_epochs" in config.trainer and "max_steps" not in config.trainer:
        given["max_steps"] = -1
    evaluated = config.evaluation.every > 0
    try:
        arguments = TrainingArguments(
            output_dir=str(config.output_dir),
            seed=config.seed,
            eval_strategy="steps" if evaluated else "no",
            eval_steps=config.evaluation.every if evaluated else None,
            remove_unused_columns=False,
            label_names=["labels"],
            **given,
        )
        for reporter in get_reporting_integration_callbacks(arguments.report_to):
            reporter()  # the Trainer makes it after the model is loaded, and it may lack its package
    except (TypeError, ValueError, ImportError, OSError, RuntimeError) as error:
        raise InputError(
            "trainer", json.dumps(config.trainer, default=str), f"transformers refuses it: {error}"
        ) from error
    return arguments


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as a string; arguments named like numbers are numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
