"""A training run from its configuration to the adapter on disk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from lmms_keyspace import embedded, scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import check_adapter, check_targets, visual_token_ids
from lmms_keyspace.redaction import publishable
from lmms_keyspace.store.files import require_writable, write
from lmms_keyspace.training.checkpoints import last_whole, saving
from lmms_keyspace.training.config import LossConfig, TrainingConfig, effective_loss, peft_config, training_arguments
from lmms_keyspace.training.encoding import EncodedExamples
from lmms_keyspace.training.evaluation import HeldOutScenes
from lmms_keyspace.training.examples import Example, read_examples
from lmms_keyspace.training.scene_examples import scene_examples
from lmms_keyspace.training.trainer import AlignmentTrainer

RECORD = "training.json"


def train(config: TrainingConfig, *, resume: bool = False) -> Path:
    """Train an adapter and save it in `config.output_dir`, in PEFT's form, beside the record `training.json`.

    Args:
        config: what to do.
        resume: go on from the last checkpoint in the folder; the result is that of a run without a break.

    Returns:
        The folder.

    Raises:
        InputError: a setting, the data or the folder cannot be used, found before any weights are read; or the loss or
            its gradient is not finite, and the last good adapter is kept.
    """
    started = time.perf_counter()
    arguments = training_arguments(config)
    checkpoint = _checkpoint(config.output_dir, resume)
    pretrained = config.pretrained or str(embedded.base_path())
    try:
        model_config = AutoConfig.from_pretrained(pretrained, revision=config.revision)
    except (OSError, ValueError) as error:
        raise InputError("pretrained", pretrained, f"no model config can be read there: {error}") from error
    adapter = peft_config(config.adapter, model_config)
    check_targets(adapter, model_config)
    examples = _examples(config)
    loss = effective_loss(config)
    _check_modalities(examples, loss, arguments)
    processor = AutoProcessor.from_pretrained(pretrained, revision=config.revision)
    encoded = EncodedExamples(examples, processor, visual_token_ids(model_config))
    with_image = next((i for i, example in enumerate(examples) if example.images), 0)
    _ = encoded[0], encoded[with_image]  # a template or an answer that cannot be encoded is found here

    model = AutoModelForImageTextToText.from_pretrained(
        pretrained,
        revision=config.revision,
        dtype=_dtype(config, arguments),
        attn_implementation=config.attn_implementation,
    )
    torch.manual_seed(config.seed)  # of the adapter's random start
    adapted: Any = get_peft_model(model, adapter)
    for each in adapted.peft_config.values():
        each.base_model_name_or_path = publishable(config.pretrained) or embedded.BASE_NAME
    evaluation = config.evaluation
    trainer = AlignmentTrainer(
        adapted,
        arguments,
        loss=loss,
        processor=processor,
        examples=encoded,
        held_out=HeldOutScenes(evaluation.items, evaluation.batch_size) if evaluation.every else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    with saving(config.output_dir):
        trainer.save_model(str(config.output_dir))
    if arguments.should_save:
        _write_record(config, trainer, adapted, len(examples), time.perf_counter() - started)
    return config.output_dir


def _checkpoint(folder: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, or None for a new run in a folder that holds no other."""
    if (folder / RECORD).is_file():
        raise InputError("output_dir", str(folder), "it holds a finished run; give another folder.")
    last = last_whole(folder)
    if resume and last is None:
        raise InputError("--resume", str(folder), "there is no checkpoint in it; start the run without --resume.")
    if not resume and last is not None:
        raise InputError("output_dir", str(folder), "it holds checkpoints; go on with --resume or give another folder.")
    require_writable("output_dir", folder)
    if last is None:
        return None
    logging.getLogger(__name__).warning("going on from %s", last)
    return str(last)


def _examples(config: TrainingConfig) -> Sequence[Example]:
    if config.data.scenes is not None:
        return scene_examples(config.data.scenes, config.seed)
    return read_examples(config.data)


def _check_modalities(examples: Sequence[Example], loss: LossConfig, arguments: TrainingArguments) -> None:
    """Refuse data in which a batch could lack a modality, or that is too little for one batch."""
    batch = arguments.train_batch_size * arguments.world_size
    if not any(example.images for example in examples):
        raise InputError("data", f"{len(examples)} rows", "no row has an image, so there is no visual token to align.")
    if len(examples) < batch:
        raise InputError(
            "data", f"{len(examples)} rows", f"one batch over all processes takes {batch}; give more data."
        )
    without = sum(not example.images for example in examples)
    smallest = batch if arguments.dataloader_drop_last else len(examples) % batch or batch
    if (loss.lambda_mmd or loss.lambda_gram) and without >= smallest:
        raise InputError(
            "data",
            f"{without} of {len(examples)} rows have no image",
            f"a batch of {smallest} could hold text alone, and the MMD and Gram terms compare both modalities; leave "
            "such rows out, take larger batches, or set lambda_mmd and lambda_gram to 0.",
        )


def _dtype(config: TrainingConfig, arguments: TrainingArguments) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    return torch.float32 if arguments.device.type == "cpu" else torch.bfloat16


def _write_record(
    config: TrainingConfig, trainer: AlignmentTrainer, model: PeftModel, n_examples: int, seconds: float
) -> None:
    parameters, _ = model.get_nb_trainable_parameters()
    record = {
        "config": publishable(config.model_dump(mode="json")),
        "examples": n_examples,
        "trainable_parameters": parameters,
        "adapter_sha256": check_adapter(config.output_dir, model.config).sha256,
        "bandwidth2": {layer: value.tolist() for layer, value in trainer.bandwidth2.items()},
        "log": trainer.state.log_history,
        "seconds": round(seconds, 1),
        "processes": trainer.args.world_size,
        "generator_version": scenes.GENERATOR_VERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "lmms-keyspace")},
    }
    write(config.output_dir / RECORD, (json.dumps(record, indent=1) + "\n").encode())
