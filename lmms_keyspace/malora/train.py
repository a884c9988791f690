"""A small trainer for key adapters: cross-entropy plus the MMD and Gram terms of MaLoRA.

It trains any model of `peft.get_peft_model` whose adapter sits on the decoder's key projections: MaLoRA, and plain LoRA
as its control under the same data, steps and losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TypedDict

import torch
from peft import PeftModel
from torch import Tensor, nn

from lmms_keyspace.divergence import median_bandwidth2
from lmms_keyspace.errors import InputError

from .layer import MaloraLayer
from .losses import ANCHORS, gram_loss, mmd2_loss
from .modality import visual_token_ids
from .taps import KeyTap, key_taps, tapped

Batch = Mapping[str, Tensor]


class StepLog(TypedDict):
    """One training step. A term that is off, or a gate that is not there, is None or empty."""

    step: int
    lr: float
    ce: float  # cross-entropy, nats per label token
    lambda_mmd: float  # the weight of this step, after its warm-up
    mmd2: float | None  # mean over layers and KV heads
    gram: float | None  # mean over layers, KV heads and the two modalities
    mmd2_by_layer: dict[int, float]
    gram_by_layer: dict[int, float]
    gate_visual: dict[int, float]  # layer -> mean gate over the sampled tokens
    gate_text: dict[int, float]
    grad_norm: float  # before clipping


def train(
    model: PeftModel,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 2e-3,
    lambda_mmd: float = 0.1,
    lambda_gram: float = 0.1,
    warmup_fraction: float = 0.1,
    anchor: str = "text",
    max_tokens: int = 128,
    special_token_ids: Sequence[int] = (),
    calibration_batches: int = 4,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
) -> list[StepLog]:
    """Train the active adapter of `model` in place.

    The loss is CE + lambda_mmd(t) * MMD^2 + lambda_gram * Gram, the terms averaged over layers and KV heads. MMD^2
    compares pre-RoPE keys of equally many visual and text tokens of the batch, at most `max_tokens` each, drawn
    without replacement from tokens that are neither padding nor special; the answer and fixed instructions count as
    text. Bandwidths come from a calibration pass over the first `calibration_batches` batches with the adapter
    switched off, and stay. AdamW; the learning rate rises over the warm-up and then follows a cosine to 0.

    Args:
        model: from `get_peft_model`; its trainable parameters are trained. Create the adapter under a seed of your own:
            its random start is drawn there, not here.
        batches: dicts with `input_ids`, `attention_mask`, `labels` (-100: no loss) and the pixels as the model takes
            them. Iterated again when exhausted; an iterator that cannot must hold `steps` batches.
        steps: optimizer steps, one batch each.
        lr: peak learning rate.
        lambda_mmd, lambda_gram: weights of the terms; 0 switches a term off and costs nothing.
        warmup_fraction: share of the steps over which lr and lambda_mmd rise linearly.
        anchor: `text` (visual keys move to the text keys) or `symmetric`.
        max_tokens: tokens per modality and step in the terms.
        special_token_ids: ids that are no text: BOS, EOS, separators. Padding is known from `attention_mask`.
        calibration_batches: batches for the bandwidths.
        weight_decay, max_grad_norm: of AdamW and of the gradient clipping.
        seed: seed of the token sample and of dropout.

    Returns:
        One entry per step; plain numbers, ready for JSON.

    Raises:
        InputError: a setting out of range, no adapted key projection, a batch without visual tokens while a term is on,
            reentrant gradient checkpointing while a term is on, or too few batches.
        FloatingPointError: the loss is not finite; names the step. The parameters are those before that step.
    """
    _check_settings(steps, lr, lambda_mmd, lambda_gram, warmup_fraction, anchor, max_tokens, calibration_batches)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError(
            "model", type(model).__name__, "nothing is trainable; load the adapter with is_trainable=True."
        )
    terms = _Terms(lambda_mmd, lambda_gram, anchor)
    taps = key_taps(model)
    watched = taps if terms.on or any(isinstance(tap.module, MaloraLayer) for tap in taps) else []
    sampler = _TokenSampler(visual_token_ids(model.config), special_token_ids, max_tokens, seed)
    stream = _endless(batches, model)
    if lambda_mmd:
        first = list(islice(stream, calibration_batches))
        terms.bandwidth2 = _calibrate(model, taps, first, sampler)
        stream = chain(first, stream)

    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    warmup = max(1, round(warmup_fraction * steps))
    was_training = model.training
    model.train()
    log: list[StepLog] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step, batch in enumerate(islice(stream, steps)):
            rise = min(1.0, (step + 1) / warmup)
            rate = lr * (rise if step < warmup else _cosine((step - warmup) / max(1, steps - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with tapped(watched):
                ce = model(**batch).loss
            visual, text = sampler.draw(batch)
            mmd2, gram = terms(taps, visual, text) if terms.on else ({}, {})
            loss = ce
            if mmd2:
                loss = loss + lambda_mmd * rise * _mean(mmd2)
            if gram:
                loss = loss + lambda_gram * _mean(gram)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
                raise FloatingPointError(
                    f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}; lower lr or the lambdas."
                )
            optimizer.step()
            log.append(
                StepLog(
                    step=step,
                    lr=rate,
                    ce=ce.item(),
                    lambda_mmd=lambda_mmd * rise,
                    mmd2=_mean(mmd2).item() if mmd2 else None,
                    gram=_mean(gram).item() if gram else None,
                    mmd2_by_layer={layer: value.item() for layer, value in mmd2.items()},
                    gram_by_layer={layer: value.item() for layer, value in gram.items()},
                    gate_visual=_mean_gates(watched, visual, side=0),
                    gate_text=_mean_gates(watched, text, side=1),
                    grad_norm=grad_norm.item(),
                )
            )
            for tap in watched:
                tap.clear()
    if len(log) < steps:
        raise InputError("batches", len(log), f"{steps} steps need more batches; give a list or a DataLoader.")
    model.train(was_training)
    return log


@dataclass
class _Terms:
    """The alignment terms of one step, per layer."""

    lambda_mmd: float
    lambda_gram: float
    anchor: str
    bandwidth2: Mapping[int, Tensor] = field(default_factory=dict)  # layer -> [KV heads]

    @property
    def on(self) -> bool:
        return bool(self.lambda_mmd or self.lambda_gram)

    def __call__(
        self, taps: Sequence[KeyTap], visual: Tensor, text: Tensor
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        mmd2, gram = {}, {}
        for tap in taps:
            assert tap.keys is not None
            assert tap.base is not None
            if not tap.keys.requires_grad:
                raise InputError(
                    "gradient_checkpointing",
                    "use_reentrant=True",
                    "it hides the keys from the MMD and Gram terms; use_reentrant=False keeps them.",
                )
            keys = _pick(tap.keys, visual), _pick(tap.keys, text)
            if self.lambda_mmd:
                mmd2[tap.layer] = mmd2_loss(*keys, self.bandwidth2[tap.layer], anchor=self.anchor).mean()
            if self.lambda_gram:
                base = _pick(tap.base, visual), _pick(tap.base, text)
                gram[tap.layer] = (gram_loss(keys[0], base[0]) + gram_loss(keys[1], base[1])).mean() / 2
        return mmd2, gram


class _TokenSampler:
    """Equally many visual and text tokens of a batch, without replacement, from its own random stream."""

    def __init__(self, visual_ids: Sequence[int], special_ids: Sequence[int], max_tokens: int, seed: int) -> None:
        self.visual_ids = torch.tensor(visual_ids)
        self.special_ids = torch.tensor(sorted(set(special_ids) - set(visual_ids)), dtype=torch.long)
        self.max_tokens = max_tokens
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Indices [n] of visual and of text tokens in the flattened [batch * tokens]; n is 0 if one has none."""
        ids = batch["input_ids"].flatten().cpu()
        real = batch["attention_mask"].flatten().cpu().bool()
        visual = torch.isin(ids, self.visual_ids)
        text = ~visual & ~torch.isin(ids, self.special_ids)
        candidates = [torch.nonzero(side & real)[:, 0] for side in (visual, text)]
        n = min(self.max_tokens, *map(len, candidates))
        picked = [side[torch.randperm(len(side), generator=self.generator)[:n]] for side in candidates]
        return picked[0], picked[1]


def _calibrate(
    model: PeftModel, taps: Sequence[KeyTap], batches: Sequence[Batch], sampler: _TokenSampler
) -> dict[int, Tensor]:
    """Squared bandwidth per layer [KV heads]: the median over pooled base keys of the given batches."""
    keys: dict[int, list[tuple[Tensor, Tensor]]] = {tap.layer: [] for tap in taps}
    was_training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter(), tapped(taps):
        for batch in batches:
            model(**batch)
            visual, text = sampler.draw(batch)
            for tap in taps:
                assert tap.base is not None
                keys[tap.layer].append((_pick(tap.base, visual), _pick(tap.base, text)))
    model.train(was_training)
    bandwidth2 = {}
    for layer, pairs in keys.items():
        visual_keys, text_keys = (torch.cat(side, dim=1).float() for side in zip(*pairs, strict=True))
        if not visual_keys.shape[1]:
            raise InputError("batches", 0, "the MMD term needs visual and text tokens; no batch has both.")
        bandwidth2[layer] = torch.as_tensor(median_bandwidth2(visual_keys, text_keys), device=visual_keys.device)
    return bandwidth2


def _pick(keys: Tensor, tokens: Tensor) -> Tensor:
    """[batch, tokens, heads, width] and flat indices [n] -> [heads, n, width]."""
    return keys.flatten(0, 1)[tokens.to(keys.device)].transpose(0, 1)


def _mean(by_layer: Mapping[int, Tensor]) -> Tensor:
    device = next(iter(by_layer.values())).device  # layers may lie on several devices
    return torch.stack([value.to(device) for value in by_layer.values()]).mean()


@torch.no_grad()
def _mean_gates(taps: Sequence[KeyTap], tokens: Tensor, side: int) -> dict[int, float]:
    """Mean gate of the active adapter per layer; `side` 0 visual, 1 text. Layers without a gate are left out."""
    gates = {}
    for tap in taps:
        module = tap.module
        if not isinstance(module, MaloraLayer) or tap.inputs is None or not len(tokens):
            continue
        for name in module.active_adapters:
            if name in module.malora_config and module.malora_config[name].gate != "none":
                x = tap.inputs.flatten(0, 1)[tokens.to(tap.inputs.device)]
                gates[tap.layer] = module.gates(x, name)[:, side].mean().item()
    return gates


def _endless(batches: Iterable[Batch], model: PeftModel) -> Iterator[Batch]:
    """Batches on the model's device, pixels in its dtype; starts again at the end until nothing comes."""
    empty = False
    while not empty:
        empty = True
        for batch in batches:
            empty = False
            missing = {"input_ids", "attention_mask", "labels"} - set(batch)
            if missing:
                raise InputError("batches", sorted(batch), f"a batch must hold {', '.join(sorted(missing))}.")
            yield {
                name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for name, value in batch.items()
            }


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _check_settings(
    steps: int,
    lr: float,
    lambda_mmd: float,
    lambda_gram: float,
    warmup_fraction: float,
    anchor: str,
    max_tokens: int,
    calibration_batches: int,
) -> None:
    if steps < 1:
        raise InputError("steps", steps, "give at least 1.")
    if not 0 < lr < math.inf:
        raise InputError("lr", lr, "give a positive number.")
    for name, value in (("lambda_mmd", lambda_mmd), ("lambda_gram", lambda_gram)):
        if not 0 <= value < math.inf:
            raise InputError(name, value, "give 0 (off) or a positive number.")
    if not 0 <= warmup_fraction <= 1:
        raise InputError("warmup_fraction", warmup_fraction, "give a share of the steps, from 0 to 1.")
    if anchor not in ANCHORS:
        raise InputError("anchor", anchor, f"choose one of {', '.join(ANCHORS)}.")
    if max_tokens < 2:
        raise InputError("max_tokens", max_tokens, "the U-statistic needs at least 2 tokens a side.")
    if calibration_batches < 1:
        raise InputError("calibration_batches", calibration_batches, "give at least 1.")
