"""What MaLoRA costs beside PEFT's plain LoRA with as many parameters: one layer, and a whole training step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workload
from peft import get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from timing import Measured, Prepare, paired
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from lmms_keyspace.malora import MaloraConfig, MaloraLinear, ModalityMask, matched_lora_config, visual_token_ids
from lmms_keyspace.malora.targets import Target
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

WIDTH, TOKENS, RANK = 4096, 2048, 8  # a key projection of LLaVA-1.5-7B
VISUAL = 576  # tokens of one image there
IN_TERMS = 128  # tokens a side that enter the losses


def gated_layer(device: torch.device, rounds: int) -> Measured:
    """Forward and backward of one layer on 2,048 tokens, token gate, rank 8 per modality, over LoRA of rank 16."""
    return paired(_layer_step(_malora_layer(device), device), _layer_step(_lora_layer(device), device), device, rounds)


def training_step_bundled(device: torch.device, rounds: int) -> Measured:
    """An optimizer step on the bundled model, batch 32: MaLoRA with both terms in this package's trainer, all that it
    chooses and logs included, over plain LoRA in transformers' own."""
    return _training_steps(workload.bundled, 32, device, rounds)


def training_step_llava_7b(device: torch.device, rounds: int) -> Measured:
    """The same in the shape of LLaVA-1.5-7B, batch 4, bfloat16 base."""
    return _training_steps(workload.llava_7b_shape, 4, device, rounds)


def _malora_layer(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    mask = ModalityMask((0,), ())
    mask.give(torch.arange(TOKENS, device=device)[None] < VISUAL)
    config = MaloraConfig(r=RANK, init_weights=False)
    return MaloraLinear(_linear(device), "default", config, Target(WIDTH, ((0, WIDTH),), 0), mask).to(device)


def _lora_layer(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2 * RANK, lora_alpha=32, init_lora_weights=False)
    return LoraLinear(_linear(device), "default", config, r=2 * RANK, lora_alpha=32).to(device)


def _linear(device: torch.device) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False, device=device).requires_grad_(False)


def _layer_step(layer: nn.Module, device: torch.device) -> Prepare:
    """Forward and backward as inside a model, where the inputs carry a gradient too."""
    x = torch.randn(1, TOKENS, WIDTH, device=device, requires_grad=True)
    upstream = torch.randn(1, TOKENS, WIDTH, device=device)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(upstream)

    return lambda: step


def _training_steps(make: Callable[[], Any], batch: int, device: torch.device, rounds: int) -> Measured:
    sides = []
    for terms in (True, False):
        model, processor = make()
        visual_ids = visual_token_ids(model.config)
        scenes = scene_examples(SceneSettings(n=batch), 0)
        examples = EncodedExamples(scenes, processor, visual_ids)
        adapter = MaloraConfig(r=RANK) if terms else matched_lora_config(MaloraConfig(r=RANK), model.config)
        adapted: Any = get_peft_model(model.to(device), adapter)
        sides.append(_training_step(adapted, processor, [examples[i] for i in range(batch)], terms=terms))
    return paired(sides[0], sides[1], device, rounds)


def _training_step(model: Any, processor: Any, examples: list[dict[str, Tensor]], *, terms: bool) -> Prepare:
    """One optimizer step: this package's trainer with both terms and all that it logs, or transformers' own."""
    collate = Collator(processor.tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"max_steps": 1, "per_device_train_batch_size": len(examples), "save_strategy": "no"}
        config = TrainingConfig(
            output_dir=Path(scratch),
            evaluation=EvaluationSettings(every=0),
            trainer=settings | {"disable_tqdm": True, "use_cpu": model.device.type == "cpu"},
        )
        arguments = training_arguments(config)
        trainer: Trainer
        if terms:
            loss = LossConfig(lambda_mmd=0.1, lambda_gram=0.1, max_tokens=IN_TERMS, warmup=0)
            trainer = AlignmentTrainer(model, arguments, loss=loss, processor=processor, examples=examples)
        else:
            trainer = Trainer(
                model,
                arguments,
                train_dataset=examples,
                data_collator=lambda rows: {k: v for k, v in collate(rows).items() if k != EXAMPLE_ID},
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()  # one step: the bandwidths, the optimizer and the wrapped model are there after it
    inputs = trainer.data_collator(examples)

    def step() -> None:
        trainer.training_step(trainer.model_wrapped, dict(inputs))
        trainer.optimizer.step()
        trainer.model_wrapped.zero_grad()

    return lambda: step
