"""Gated Modality LoRA (GML) on a linear layer.

For token i with layer input x_i of width d and modality m_i in {visual, text}:

    y_i = W x_i + b + s_{m_i} g_i B_{m_i} A_{m_i} x_i + s_0 B_0 A_0 x_i
    g_i = sigmoid(w_{m_i} . x_i / sqrt(d) + c_{m_i})

with s = alpha / rank. W and b are frozen. A is Kaiming, B, w and c are zero at the start, so a fresh adapter is exactly
the base layer. The abstract of arXiv 2510.26721 says "modality-conditioned key adaptation" with a gate; this formula is
this project's reading of it. Also this project's own: the form of the gate, its version per attention head
(g_{i,h} multiplies the rows of head h), the shared branch (index 0, off by default), a rank and a scale per modality.
All of it uses x_i and m_i only, so it is causal and safe with a key-value cache.

Sharing A is one A for both modalities (the transpose of what follows; AsymLoRA, arXiv 2502.20035, shares A over
tasks); sharing B is one B for both, as in MokA (Wei et al., arXiv 2506.05191). With a cross-attention weight w > 0,
visual tokens also gather from the question in rank space, as MokA's do:

    z_i = A_{m_i} x_i;    z_i <- z_i + w softmax_j(z_i . z_j / sqrt(r)) z_j  for visual i, over the question tokens j

This is not causal: an image's keys then depend on the question that follows it, so they cannot be reused for another
question, and answers are kept out of the question (tokens with a label in training) because they are not there yet
when the image is read at inference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lmms_keyspace.errors import InputError

from .config import MaloraConfig
from .modality import ModalityMask
from .targets import Target

WHY_NO_MERGE = (
    "a MaLoRA update depends on the token (its modality and its gate), so no single weight matrix equals it; "
    "keep the adapter separate, or drop it with `unload()`."
)
_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


class MaloraLayer(BaseTunerLayer):
    """Adapter weights of one linear layer. Products are stacked: visual, then text, then the shared branch.

    Shapes, with R the sum of their ranks (one rank for both modalities where they share the matrix), n the adapted
    rows of the output, G the gates of one modality (1, or the attention heads for the gate `head`): `malora_A`
    [R, in]; `malora_B` [n, R]; `malora_gate_weight` [2 G, in] (gates `token` and `head`); `malora_gate_bias` [2 G]
    (all gates but `none`).
    """

    adapter_layer_names = ("malora_A", "malora_B", "malora_gate_weight", "malora_gate_bias")
    other_param_names = ("malora_config", "malora_target", "malora_scaling")

    def __init__(self, base_layer: nn.Module, modality: ModalityMask) -> None:
        self.base_layer = base_layer
        self.modality = modality
        self.malora_A = nn.ParameterDict()
        self.malora_B = nn.ParameterDict()
        self.malora_gate_weight = nn.ParameterDict()
        self.malora_gate_bias = nn.ParameterDict()
        self.malora_config: dict[str, MaloraConfig] = {}
        self.malora_target: dict[str, Target] = {}
        self.malora_scaling: dict[str, tuple[float, float, float]] = {}  # visual, text, shared
        self._disable_adapters = False
        self.merged_adapters = []
        base = self.get_base_layer()
        _refuse_unknown(base)
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]

    def update_layer(self, adapter_name: str, config: MaloraConfig, target: Target) -> None:
        """Add the weights of one adapter."""
        self.malora_config[adapter_name] = config
        self.malora_target[adapter_name] = target
        self.malora_scaling[adapter_name] = config.scalings
        self.malora_A[adapter_name] = nn.Parameter(torch.empty(config.down_rows, self.in_features))
        self.malora_B[adapter_name] = nn.Parameter(torch.empty(target.out_features, config.up_columns))
        gates = config.gate_outputs(target.heads)
        if config.gate in ("token", "head"):
            self.malora_gate_weight[adapter_name] = nn.Parameter(torch.empty(gates, self.in_features))
        if gates:
            self.malora_gate_bias[adapter_name] = nn.Parameter(torch.empty(gates))
        self.reset_malora_parameters(adapter_name, identity=config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_malora_parameters(self, adapter_name: str, identity: bool) -> None:
        """Initialize one adapter: as the identity, or with every weight random."""
        nn.init.kaiming_uniform_(self.malora_A[adapter_name], a=math.sqrt(5))
        for name in ("malora_B", "malora_gate_weight", "malora_gate_bias"):
            weights = getattr(self, name)
            if adapter_name in weights:
                if identity:
                    nn.init.zeros_(weights[adapter_name])
                else:
                    nn.init.normal_(weights[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible; raises InputError with the reason."""
        raise InputError("merge", adapter_names or self.active_adapters, WHY_NO_MERGE)

    def scale_layer(self, scale: float) -> None:
        """Multiply the update of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.malora_scaling:
                visual, text, shared = self.malora_scaling[name]
                self.malora_scaling[name] = (scale * visual, scale * text, scale * shared)

    def gates(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Gate of every token under each modality's parameters, visual first.

        Args:
            x: layer inputs `[..., in]` in any float dtype; the result has the adapter's dtype.

        Returns:
            `[..., 2]`; with the gate `head` `[..., 2, heads]`.
        """
        x = x.to(self.malora_A[adapter_name].dtype)
        gate = self.malora_config[adapter_name].gate
        if gate == "none":
            return x.new_ones(*x.shape[:-1], 2)
        bias = self.malora_gate_bias[adapter_name]
        if gate == "modality":
            return torch.sigmoid(bias).expand(*x.shape[:-1], 2)
        logits = F.linear(x, self.malora_gate_weight[adapter_name]) / math.sqrt(self.in_features)
        values = torch.sigmoid(logits + bias)
        return values if gate == "token" else values.unflatten(-1, (2, -1))


class MaloraLinear(nn.Module, MaloraLayer):
    """A linear layer with MaLoRA adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MaloraConfig, target: Target, modality: ModalityMask
    ) -> None:
        super().__init__()
        MaloraLayer.__init__(self, base_layer, modality)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, target)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base output plus the update of every active adapter; `x` is [batch, tokens, in]."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.malora_A:
                # PEFT keeps the adapter in float32 beside a half precision base: sum there and round once.
                result = result + self._in_place_of(self._update(x, name), self.malora_target[name])
        return result.to(dtype)

    def _in_place_of(self, update: torch.Tensor, target: Target) -> torch.Tensor:
        """The update of the adapted rows, with zeros for the other rows of a fused layer."""
        if target.out_features == self.out_features:
            return update
        parts, end = [], 0
        pieces = update.split([stop - start for start, stop in target.rows], dim=-1)
        for (start, stop), piece in zip(target.rows, pieces, strict=True):
            parts += [update.new_zeros(*update.shape[:-1], start - end), piece]
            end = stop
        return torch.cat([*parts, update.new_zeros(*update.shape[:-1], self.out_features - end)], dim=-1)

    def _update(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The sum of the stacked products `[batch, tokens, rows]`; one product reads x and one writes the rows."""
        config, (scale_visual, scale_text, scale_shared) = self.malora_config[name], self.malora_scaling[name]
        down, up = self.malora_A[name], self.malora_B[name]
        stacked = down
        if name in self.malora_gate_weight:  # the gate logits ride along in the one product that reads x
            stacked = torch.cat((down, self.malora_gate_weight[name]))
        low = F.linear(x.to(down.dtype), stacked)
        low, logits = low[..., : down.shape[0]], low[..., down.shape[0] :]
        is_visual = self.modality.of(x)
        if config.gate in ("token", "head"):
            gate = torch.sigmoid(logits / math.sqrt(self.in_features) + self.malora_gate_bias[name])
        elif config.gate == "modality":
            gate = torch.sigmoid(self.malora_gate_bias[name])
        side = torch.stack((is_visual, ~is_visual), dim=-1).to(low.dtype)  # [batch, tokens, 2], one-hot
        factor = torch.stack((side[..., 0] * scale_visual, side[..., 1] * scale_text), dim=-1)
        if config.gate in ("modality", "token"):
            factor = factor * gate
        selected = self._select(low, factor, config)
        if config.shared_r:
            shared = scale_shared * low[..., -config.shared_r :]
            if config.gate != "head":
                return F.linear(torch.cat((selected, shared), dim=-1), up)
            up, up_shared = up[:, : -config.shared_r], up[:, -config.shared_r :]
        update = F.linear(selected, up)
        if config.gate == "head":
            of_head = (gate.unflatten(-1, (2, -1)) * side.unsqueeze(-1)).sum(-2)
            update = (update.unflatten(-1, (of_head.shape[-1], -1)) * of_head.unsqueeze(-1)).flatten(-2)
            if config.shared_r:
                update = update + F.linear(shared, up_shared)
        return update

    def _select(self, low: torch.Tensor, factor: torch.Tensor, config: MaloraConfig) -> torch.Tensor:
        """Rank space of both modalities, each token's own side scaled and the other zero; one side if B is shared."""
        visual_rank, text_rank = config.ranks
        if config.sharing == "none" and visual_rank == text_rank:  # the same in one product
            sides: torch.Tensor = low[..., : 2 * text_rank].unflatten(-1, (2, text_rank))
            return (sides * factor.unsqueeze(-1)).flatten(-2)
        visual = low[..., :visual_rank]
        text = visual if config.sharing == "A" else low[..., visual_rank : visual_rank + text_rank]
        if config.cross_attention:
            visual = visual + config.cross_attention * self._from_question(visual, text)
        visual, text = visual * factor[..., :1], text * factor[..., 1:]
        return visual + text if config.sharing == "B" else torch.cat((visual, text), dim=-1)

    def _from_question(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """What each token gathers from the question in rank space `[batch, tokens, rank]`; 0 without a question."""
        question = self.modality.question(visual)
        there = question.any(dim=-1, keepdim=True)
        # A row without a question attends anywhere, so that no softmax is empty, and is zeroed after.
        gathered = F.scaled_dot_product_attention(visual, text, text, attn_mask=(question | ~there).unsqueeze(-2))
        return gathered * there.unsqueeze(-1)


def _refuse_unknown(layer: nn.Module) -> None:
    """Raise InputError for anything but a plain linear layer and bitsandbytes' two quantized ones."""
    kind = type(layer)
    if kind.__module__.startswith("bitsandbytes.") and kind.__name__ in _BITSANDBYTES:
        return
    weight: Any = getattr(layer, "weight", None)
    # Quantized layers of other libraries are classes of their own, or hold integers, 8-bit floats or tensor subclasses.
    plain = isinstance(weight, nn.Parameter) and type(weight.data) is torch.Tensor
    if not isinstance(layer, nn.Linear):
        raise InputError(
            "target_modules",
            kind.__name__,
            "MaLoRA adapts torch.nn.Linear and bitsandbytes' Linear4bit and Linear8bitLt layers only; "
            "load the model without quantization, or with bitsandbytes.",
        )
    if not plain or weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        what = weight.dtype if plain else type(getattr(weight, "data", weight)).__name__
        raise InputError(
            "target_modules",
            f"{kind.__name__} with weights of {what}",
            "MaLoRA knows no quantized layers but bitsandbytes' Linear4bit and Linear8bitLt; load the model without "
            "quantization, or with bitsandbytes.",
        )
