"""Gated Modality LoRA (GML) on a linear layer.

For token i with layer input x_i and modality m_i in {visual, text}:

    y_i = W x_i + b + (alpha / r) * g_i * B_{m_i} A_{m_i} x_i,     g_i = sigmoid(w_{m_i} . x_i / sqrt(d) + c_{m_i})

W and b are frozen. A is Kaiming, B, w and c are zero at the start, so a fresh adapter is exactly the base layer. The
abstract of arXiv 2510.26721 says "modality-conditioned key adaptation" with a gate; this formula is this project's
reading of it and uses only x_i and m_i, so it is causal and safe with a key-value cache.
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

WHY_NO_MERGE = (
    "a MaLoRA update depends on the token (its modality and its gate), so no single weight matrix equals it; "
    "keep the adapter separate, or drop it with `unload()`."
)


class MaloraLayer(BaseTunerLayer):
    """Adapter weights of one linear layer. Both modalities are stacked, visual first, then text.

    Shapes: `malora_A` [2 r, in]; `malora_B` [out, 2 r]; `malora_gate_weight` [2, in] (gate `token` only);
    `malora_gate_bias` [2] (gates `token` and `modality`).
    """

    adapter_layer_names = ("malora_A", "malora_B", "malora_gate_weight", "malora_gate_bias")
    other_param_names = ("malora_r", "malora_scaling", "malora_gate")

    def __init__(self, base_layer: nn.Module, modality: ModalityMask) -> None:
        self.base_layer = base_layer
        self.modality = modality
        self.malora_A = nn.ParameterDict()
        self.malora_B = nn.ParameterDict()
        self.malora_gate_weight = nn.ParameterDict()
        self.malora_gate_bias = nn.ParameterDict()
        self.malora_r: dict[str, int] = {}
        self.malora_scaling: dict[str, float] = {}
        self.malora_gate: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise InputError("target_modules", type(base).__name__, "MaLoRA adapts torch.nn.Linear layers only.")
        self.in_features, self.out_features = base.in_features, base.out_features

    def update_layer(self, adapter_name: str, config: MaloraConfig) -> None:
        """Add the weights of one adapter."""
        rank = 2 * config.r
        self.malora_r[adapter_name] = config.r
        self.malora_scaling[adapter_name] = config.alpha / config.r
        self.malora_gate[adapter_name] = config.gate
        self.malora_A[adapter_name] = nn.Parameter(torch.empty(rank, self.in_features))
        self.malora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, rank))
        if config.gate == "token":
            self.malora_gate_weight[adapter_name] = nn.Parameter(torch.empty(2, self.in_features))
        if config.gate != "none":
            self.malora_gate_bias[adapter_name] = nn.Parameter(torch.empty(2))
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
                self.malora_scaling[name] *= scale

    def gates(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Gate of every token under each modality's parameters, `[..., 2]`, visual first.

        Args:
            x: layer inputs `[..., in]` in any float dtype; the result has the adapter's dtype.
        """
        x = x.to(self.malora_A[adapter_name].dtype)
        logits = x.new_zeros(*x.shape[:-1], 2)
        if self.malora_gate[adapter_name] == "none":
            return logits + 1
        if self.malora_gate[adapter_name] == "token":
            logits = F.linear(x, self.malora_gate_weight[adapter_name]) / math.sqrt(self.in_features)
        return torch.sigmoid(logits + self.malora_gate_bias[adapter_name])


class MaloraLinear(nn.Module, MaloraLayer):
    """A linear layer with MaLoRA adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaloraConfig, modality: ModalityMask) -> None:
        super().__init__()
        MaloraLayer.__init__(self, base_layer, modality)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base output plus the update of every active adapter; `x` is [batch, tokens, in]."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.malora_A:
                # PEFT keeps the adapter in float32 beside a half precision base: sum there and round once.
                result = result + self._update(x, name)
        return result.to(dtype)

    def _update(self, x: torch.Tensor, name: str) -> torch.Tensor:
        down = self.malora_A[name]
        rank, gate = self.malora_r[name], self.malora_gate[name]
        visual = self.modality.of(x)
        if gate == "token":  # the gate logits ride along in the one product that reads x
            down = torch.cat((down, self.malora_gate_weight[name]))
        low = F.linear(x.to(down.dtype), down)
        factor = torch.stack((visual, ~visual), dim=-1).to(low.dtype) * self.malora_scaling[name]
        if gate == "token":
            factor = factor * torch.sigmoid(
                low[..., 2 * rank :] / math.sqrt(self.in_features) + self.malora_gate_bias[name]
            )
        elif gate == "modality":
            factor = factor * torch.sigmoid(self.malora_gate_bias[name])
        selected = low[..., : 2 * rank].unflatten(-1, (2, rank)) * factor.unsqueeze(-1)
        return F.linear(selected.flatten(-2), self.malora_B[name])

    def __repr__(self) -> str:
        return "malora." + super().__repr__()
