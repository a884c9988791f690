"""What MaLoRA costs beside PEFT's plain LoRA with as many parameters: one layer, and a whole training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import workload
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from timing import Measured, Prepare, paired
from torch import Tensor, nn

from lmms_keyspace.divergence import median_bandwidth2
from lmms_keyspace.malora import MaloraConfig, MaloraLinear, ModalityMask, matched_lora_config
from lmms_keyspace.malora.losses import gram_loss, mmd2_loss
from lmms_keyspace.malora.taps import KeyTap, key_taps, tapped
from lmms_keyspace.malora.targets import Target

WIDTH, TOKENS, RANK = 4096, 2048, 8  # a key projection of LLaVA-1.5-7B
VISUAL = 576  # tokens of one image there
IN_TERMS = 128  # tokens a side that enter the losses


def gated_layer(device: torch.device, rounds: int) -> Measured:
    """Forward and backward of one layer on 2,048 tokens, token gate, rank 8 per modality, over LoRA of rank 16."""
    return paired(_layer_step(_malora_layer(device), device), _layer_step(_lora_layer(device), device), device, rounds)


def training_step_bundled(device: torch.device, rounds: int) -> Measured:
    """Forward and backward of the bundled model, batch 32, MaLoRA with both terms over plain LoRA without."""
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
    config = MaloraConfig(r=RANK)
    sides = []
    for terms in (True, False):
        model, made = make()
        work = workload.Workload(model, made, device, documents=batch, batch=batch)
        adapter = config if terms else matched_lora_config(config, model.config)
        adapted = get_peft_model(work.model, adapter).train()
        sides.append(_training_step(adapted, work.batches[0][1], terms=terms))
    return paired(sides[0], sides[1], device, rounds)


def _training_step(model: PeftModel, inputs: Any, *, terms: bool) -> Prepare:
    call = dict(inputs)
    is_visual = call["input_ids"] == model.config.image_token_id
    real = call["attention_mask"].bool()
    call["labels"] = call["input_ids"].masked_fill(is_visual | ~real, -100)
    tokens = [side.flatten().nonzero()[:IN_TERMS, 0] for side in (is_visual, real & ~is_visual)]
    taps = key_taps(model) if terms else []
    bandwidths: dict[int, Tensor] = {}
    with torch.no_grad(), tapped(taps):
        model(**call)
    for tap in taps:
        visual, text = (_pick(tap.base, side) for side in tokens)
        bandwidths[tap.layer] = torch.as_tensor(median_bandwidth2(visual.float(), text.float()), device=visual.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with tapped(taps):
            loss = model(**call).loss
        for tap in taps:
            loss = loss + _terms(tap, tokens, bandwidths[tap.layer]) / len(taps)
            tap.clear()
        loss.backward()

    return lambda: step


def _terms(tap: KeyTap, tokens: list[Tensor], bandwidth2: Tensor) -> Tensor:
    keys, base = ([_pick(side, rows) for rows in tokens] for side in (tap.keys, tap.base))
    gram = (gram_loss(keys[0], base[0]) + gram_loss(keys[1], base[1])).mean() / 2
    return 0.1 * mmd2_loss(keys[0], keys[1], bandwidth2).mean() + 0.1 * gram


def _pick(keys: Tensor | None, tokens: Tensor) -> Tensor:
    """`[heads, n, width]` at flat places among `[batch * tokens]`."""
    assert keys is not None
    return keys.flatten(0, 1)[tokens].transpose(0, 1)
