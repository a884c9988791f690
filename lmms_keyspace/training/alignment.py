"""The alignment terms of a training step: which tokens enter them, and the terms of those tokens.

The tokens are chosen by a hash of step, example and place, smallest first, over the batches of all ranks together, and
their keys are exchanged with gradients. So two processes get the terms, and the gradient, that one process gets with
the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from lmms_keyspace.divergence import median_bandwidth2
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora.layer import MaloraLayer
from lmms_keyspace.malora.losses import gram_loss, mmd2_loss
from lmms_keyspace.malora.taps import KeyTap, tapped
from lmms_keyspace.sampling import hash64, mix64

if TYPE_CHECKING:
    from lmms_keyspace.training.config import LossConfig

Batch = Mapping[str, Tensor]
CALIBRATION_TOKENS = 8  # a modality and example
_NEVER = np.uint64(2**64 - 1)  # the hash of a place that no token fills


@dataclass(frozen=True)
class Side:
    """The chosen tokens of one modality, in an order that all ranks share.

    Attributes:
        tokens: [k] indices into the flattened [batch * tokens] of this rank.
        slots: [k] their places among the n chosen tokens of all ranks.
        n: how many all ranks chose together.
    """

    tokens: Tensor
    slots: Tensor
    n: int


class TokenChooser:
    """Equally many visual and text tokens of a batch, without replacement.

    Text is what is neither a visual placeholder nor special nor padding; the answer counts as text.

    Args:
        visual_ids: ids of the placeholders of image features.
        special_ids: ids that are no text: BOS, EOS, separators.
        max_tokens: tokens a side.
        seed: of the hash.
    """

    def __init__(self, visual_ids: Iterable[int], special_ids: Iterable[int], max_tokens: int, seed: int) -> None:
        self._visual_ids = torch.tensor(sorted(set(visual_ids)))
        self._special_ids = torch.tensor(sorted(set(special_ids) - set(visual_ids)), dtype=torch.long)
        self._max_tokens = max_tokens
        self._seed = seed

    def choose(self, batch: Batch, example_ids: Tensor, step: int, *, all_ranks: bool = True) -> tuple[Side, Side]:
        """The visual and the text side of a batch; both have n = 0 where one modality is missing.

        Args:
            batch: `input_ids` and `attention_mask`, both [batch, tokens].
            example_ids: [batch], distinct names of the rows.
            step: another step chooses other tokens.
            all_ranks: choose among the batches of all ranks; every rank must call.
        """
        ids = batch["input_ids"].cpu()
        real = batch["attention_mask"].cpu().bool()
        visual = torch.isin(ids, self._visual_ids) & real
        text = ~torch.isin(ids, self._visual_ids) & ~torch.isin(ids, self._special_ids) & real
        hashes = self._hashes(real.numpy(), example_ids.cpu().numpy(), step)
        mine = [self._smallest(side.numpy(), hashes) for side in (visual, text)]
        pooled = np.stack([own for own, _ in mine])[None]  # [ranks, 2, max_tokens]
        if all_ranks and _world_size() > 1:
            pooled = _from_all_ranks(pooled[0], batch["input_ids"].device)
        chosen = [np.sort(pooled[:, side].ravel()) for side in (0, 1)]
        n = min(self._max_tokens, *(int((side != _NEVER).sum()) for side in chosen))
        sides = []
        for (own, tokens), order in zip(mine, chosen, strict=True):
            slots = np.searchsorted(order[:n], own[: len(tokens)])
            kept = slots < n
            sides.append(Side(torch.from_numpy(tokens[kept]), torch.from_numpy(slots[kept]), n))
        return sides[0], sides[1]

    def _hashes(self, real: np.ndarray, example_ids: np.ndarray, step: int) -> np.ndarray:
        """uint64 [batch, tokens] of seed, step, example and place after the padding."""
        places = (np.cumsum(real, axis=1) - 1).clip(0).astype(np.uint64)
        rows = mix64(example_ids.astype(np.uint64) ^ np.uint64(hash64(self._seed, step)))
        return mix64(places ^ rows[:, None])

    def _smallest(self, side: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The smallest hashes of a side [max_tokens], ascending and filled up, and the tokens they belong to."""
        candidates = np.flatnonzero(side)
        own = hashes.ravel()[candidates]
        order = np.argsort(own)[: self._max_tokens]
        filled = np.full(self._max_tokens, _NEVER)
        filled[: len(order)] = own[order]
        return filled, candidates[order]


@dataclass(frozen=True)
class Terms:
    """The terms of one step by layer, each a scalar with gradient where its weight is not 0.

    MMD^2 is the mean over KV heads, Gram over KV heads and modalities. `key_norm_ratio` (visual, text) is the mean
    over layers of mean |k| / mean |k_base|.
    """

    mmd2: dict[int, Tensor]
    gram: dict[int, Tensor]
    key_norm_ratio: tuple[Tensor, Tensor]


def alignment_terms(
    taps: Sequence[KeyTap], sides: tuple[Side, Side], loss: LossConfig, bandwidth2: Mapping[int, Tensor]
) -> Terms:
    """MMD^2 and Gram of the tapped keys at the chosen tokens of all ranks.

    Args:
        taps: filled by a forward pass under `tapped`.
        sides: visual and text tokens.
        loss: weights and anchor; a term of weight 0 is computed without gradient.
        bandwidth2: layer -> [KV heads], of the base model.

    Raises:
        InputError: one modality has fewer than 2 tokens, or reentrant checkpointing hides the gradient.
    """
    n = sides[0].n
    if n < 2:
        raise InputError(
            "data",
            f"a batch with {n} tokens of one modality",
            "the MMD and Gram terms need visual and text tokens in every batch; drop rows without an image, or set "
            "lambda_mmd and lambda_gram to 0.",
        )
    mmd2: dict[int, Tensor] = {}
    gram: dict[int, Tensor] = {}
    ratios: list[Tensor] = []
    for tap, keys_of_sides in zip(taps, _keys_of_all_ranks(taps, sides), strict=True):
        assert tap.keys is not None
        if (loss.lambda_mmd or loss.lambda_gram) and not tap.keys.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "gradient_checkpointing",
                "use_reentrant=True",
                "it hides the keys from the MMD and Gram terms; use_reentrant=False keeps them.",
            )
        (visual, base_visual), (text, base_text) = keys_of_sides
        with torch.set_grad_enabled(torch.is_grad_enabled() and loss.lambda_mmd > 0):
            mmd2[tap.layer] = mmd2_loss(visual, text, bandwidth2[tap.layer], anchor=loss.anchor).mean()
        with torch.set_grad_enabled(torch.is_grad_enabled() and loss.lambda_gram > 0):
            gram[tap.layer] = (gram_loss(visual, base_visual) + gram_loss(text, base_text)).mean() / 2
        with torch.no_grad():
            norms = [keys.float().norm(dim=-1).mean() for keys in (visual, base_visual, text, base_text)]
            ratios.append(torch.stack([norms[0] / norms[1], norms[2] / norms[3]]).to(taps[0].keys.device))  # type: ignore[union-attr]
    visual_ratio, text_ratio = torch.stack(ratios).mean(dim=0)
    return Terms(mmd2, gram, (visual_ratio, text_ratio))


def mean_over_layers(by_layer: Mapping[int, Tensor]) -> Tensor:
    """Scalar mean of one value per layer; layers may lie on several devices."""
    device = next(iter(by_layer.values())).device
    return torch.stack([value.to(device) for value in by_layer.values()]).mean()


@torch.no_grad()
def summed_gates(taps: Sequence[KeyTap], sides: tuple[Side, Side]) -> Tensor | None:
    """Gates of the active adapter at this rank's chosen tokens; None for an adapter without gates.

    Returns:
        [2, 2]: for visual and for text tokens the sum over tokens of the mean over layers, and the number of tokens. A
        rank may have no chosen token of a modality, so only sums over ranks have a mean.
    """
    gates: list[Tensor] = []
    for tap in taps:
        module = tap.module
        if not isinstance(module, MaloraLayer) or tap.inputs is None:
            continue
        rows = tap.inputs.flatten(0, 1)
        for name in module.active_adapters:
            each = [
                module.gates(rows[side.tokens.to(rows.device)], name)[:, modality]
                .unsqueeze(-1)
                .flatten(1)
                .mean(-1)
                .sum()
                for modality, side in enumerate(sides)
            ]
            gates.append(torch.stack(each).float().cpu())
    if not gates:
        return None
    return torch.stack([torch.stack(gates).mean(dim=0), torch.tensor([float(len(side.tokens)) for side in sides])], 1)


@torch.no_grad()
def calibrate(
    model: PeftModel, taps: Sequence[KeyTap], batches: Iterable[tuple[Batch, Tensor]], chooser: TokenChooser
) -> dict[int, Tensor]:
    """Squared bandwidth per layer [KV heads]: the median over the base model's keys of the given examples.

    Tokens are chosen example by example, so the cut into batches does not matter.

    Args:
        model: its adapter is switched off inside.
        taps: of this model.
        batches: (batch, example ids); every rank gives the same ones and so gets the same bandwidths.
        chooser: which tokens of an example enter.

    Raises:
        InputError: no example has both modalities.
    """
    keys: dict[int, list[tuple[Tensor, Tensor]]] = {tap.layer: [] for tap in taps}
    was_training = model.training
    model.eval()
    with model.disable_adapter(), tapped(taps):
        for batch, example_ids in batches:
            model(**batch)
            width = batch["input_ids"].shape[1]
            chosen: list[list[Tensor]] = [[], []]
            for row in range(len(example_ids)):
                one = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
                sides = chooser.choose(one, example_ids[row : row + 1], 0, all_ranks=False)
                for tokens, side in zip(chosen, sides, strict=True):
                    tokens.append(side.tokens + row * width)
            visual, text = (torch.cat(tokens) for tokens in chosen)
            for tap in taps:
                assert tap.base is not None
                keys[tap.layer].append((_pick(tap.base, visual), _pick(tap.base, text)))
                tap.clear()
    model.train(was_training)
    bandwidth2 = {}
    for layer, pairs in keys.items():
        visual_keys, text_keys = (torch.cat(side, dim=1).float() for side in zip(*pairs, strict=True))
        if not visual_keys.shape[1]:
            raise InputError("data", "no example with visual and text tokens", "the terms compare both modalities.")
        bandwidth2[layer] = torch.as_tensor(median_bandwidth2(visual_keys, text_keys), device=visual_keys.device)
    return bandwidth2


def _pick(keys: Tensor, tokens: Tensor) -> Tensor:
    """[batch, tokens, heads, width] and flat indices [n] -> [heads, n, width]."""
    return keys.flatten(0, 1)[tokens.to(keys.device)].transpose(0, 1)


_Pair = tuple[Tensor, Tensor]  # adapted and base keys [heads, n, width]


def _keys_of_all_ranks(taps: Sequence[KeyTap], sides: tuple[Side, Side]) -> list[tuple[_Pair, _Pair]]:
    """Per tap the visual and the text keys at the chosen tokens of all ranks, in their common order.

    Each rank fills its own places and one sum over ranks fills the rest; the gradient of a sum reaches every rank, and
    the averaging of gradients over ranks that follows gives that of one process.
    """
    mine = []
    for tap in taps:
        assert tap.keys is not None
        assert tap.base is not None
        mine += [torch.stack([_pick(tap.keys, side.tokens), _pick(tap.base, side.tokens)]) for side in sides]
    if _world_size() > 1:  # with one process the tokens are in the order of their slots
        slots = [side.slots for _ in taps for side in sides]
        placed = [
            own.new_zeros(*own.shape[:2], sides[0].n, own.shape[-1]).index_copy(2, where.to(own.device), own)
            for own, where in zip(mine, slots, strict=True)
        ]
        whole = _SumOverRanks.apply(torch.cat([each.flatten() for each in placed]))
        parts = whole.split([each.numel() for each in placed])
        mine = [part.view_as(each) for part, each in zip(parts, placed, strict=True)]
    pairs = [(keys[0], keys[1].detach()) for keys in mine]
    return list(zip(pairs[::2], pairs[1::2], strict=True))


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        result = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        result = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result)
        return result


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _from_all_ranks(own: np.ndarray, device: torch.device) -> np.ndarray:
    """[2, max_tokens] of uint64 on each rank -> [ranks, 2, max_tokens]."""
    sent = torch.from_numpy(own.view(np.int64)).to(device)
    received = [torch.empty_like(sent) for _ in range(_world_size())]
    dist.all_gather(received, sent)
    return torch.stack(received).cpu().numpy().view(np.uint64)
