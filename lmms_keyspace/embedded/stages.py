"""The stages that train the bundled base model, each a number of steps and never a time, so a seed repeats them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from lmms_keyspace.embedded.architecture import IMAGE_ID, VISION_WIDTH
from lmms_keyspace.embedded.data import Mixture, Sample, batches, encode
from lmms_keyspace.scenes import COLORS, COUNTS, POSITIONS, SHAPES, Item

Log = Callable[..., None]


@dataclass(frozen=True)
class Stage:
    """Steps, batch size and peak learning rate of one stage."""

    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class LanguageStage(Stage):
    """A stage of the decoder: what it trains on, and the weight of the loss on the prompt's own tokens."""

    mixture: Mixture
    context_weight: float = 0.0


def patch_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """What the projector reads: the last vision layer without the class token, [n, 16, 96]."""
    hidden: Tensor = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]
    return hidden[:, 1:]


@torch.no_grad()
def cached_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """`patch_features` of many pictures, for the stages in which the vision encoder is frozen."""
    return torch.cat([patch_features(model, chunk) for chunk in pixel_values.split(256)])


def train_vision(
    model: LlavaForConditionalGeneration,
    pictures: tuple[Tensor, dict[str, Tensor]],
    check: tuple[Tensor, dict[str, Tensor]],
    stage: Stage,
    seed: int,
    log: Log,
) -> dict[str, float]:
    """Train the vision encoder on dense targets of every patch.

    ``pictures`` and ``check`` are pixels and targets (see `data.patch_targets`); the accuracy on ``check`` is logged
    along the way and returned, by target.
    """
    torch.manual_seed(seed)
    pixel_values, targets = pictures
    sizes = {"color": len(COLORS) + 1, "shape": len(SHAPES), "size": 4, "count": len(COUNTS), "edge": len(POSITIONS)}
    heads = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, sizes[name]) for name in targets})
    tower = model.model.vision_tower
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], weight_decay=0.01)
    accuracy: dict[str, float] = {}
    for step in range(stage.steps):
        _set_rate(optimizer, stage, step)
        chosen = torch.randint(0, len(pixel_values), (stage.batch,))
        features = patch_features(model, pixel_values[chosen])
        losses = [
            F.cross_entropy(head(features).flatten(0, 1), targets[name][chosen].flatten())
            for name, head in heads.items()
            if (targets[name][chosen] >= 0).any()  # the mean over nothing is not a number
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 500 == 0 or step == stage.steps - 1:
            accuracy = _patch_accuracy(model, heads, *check)
            log("vision", step + 1, round(loss.item(), 3), accuracy)
    return accuracy


@torch.no_grad()
def _patch_accuracy(
    model: LlavaForConditionalGeneration, heads: nn.ModuleDict, pixel_values: Tensor, targets: dict[str, Tensor]
) -> dict[str, float]:
    features = cached_features(model, pixel_values)
    rates = {}
    for name, head in heads.items():
        known = targets[name] != -100
        rates[name] = round((head(features).argmax(-1) == targets[name])[known].float().mean().item(), 4)
    return rates


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    items: list[Item],
    features: Tensor,
    stage: LanguageStage,
    seed: int,
    log: Log,
) -> None:
    """Train decoder and projector to answer; the vision encoder stays as it is (its ``features`` are given)."""
    source = batches(items, stage.mixture, stage.batch, random.Random(seed))
    trained = [*model.model.language_model.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    recent = 0.0
    for step in range(stage.steps):
        _set_rate(optimizer, stage, step)
        answer_loss, context_loss = _losses(
            model, tokenizer, next(source), features, with_context=stage.context_weight > 0
        )
        optimizer.zero_grad()
        (answer_loss + stage.context_weight * context_loss).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent = answer_loss.item() if step == 0 else 0.97 * recent + 0.03 * answer_loss.item()
        if step % 100 == 0 or step == stage.steps - 1:
            log("language", step, "answer", round(recent, 4), "context", round(context_loss.item(), 3))
    model.eval()


def _losses(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    samples: list[Sample],
    features: Tensor,
    *,
    with_context: bool,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answer tokens, and of the words before them."""
    ids, real, answer = encode(samples, tokenizer)
    embedded = model.get_input_embeddings()(ids)
    if samples[0].picture is not None:
        projected = model.model.multi_modal_projector(features[[sample.picture for sample in samples]])
        at = (ids == IMAGE_ID)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(at, projected.reshape(-1, projected.shape[-1]))
    # Right padding under a causal mask: no real token sees a padded one, so no attention mask is needed.
    hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state[:, :-1]
    answer, target = answer[:, 1:], ids[:, 1:]
    answer_loss = F.cross_entropy(model.lm_head(hidden[answer]), target[answer])
    if not with_context:
        return answer_loss, torch.zeros(())
    context = real[:, 1:] & ~answer & (target != IMAGE_ID)
    return answer_loss, F.cross_entropy(model.lm_head(hidden[context]), target[context])


def _set_rate(optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> None:
    """Linear warm-up over 4 % of the steps, then half a cosine down to 4 % of the peak."""
    done = (step + 1) / stage.steps
    rate = stage.learning_rate * min(1.0, done / 0.04) * (0.48 * (1 + math.cos(math.pi * done)) + 0.04)
    for group in optimizer.param_groups:
        group["lr"] = rate
