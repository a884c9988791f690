"""Speed of the bundled MaLoRA adapter."""

from __future__ import annotations

import torch
import workload
from peft import PeftModel
from timing import Measured, paired

from lmms_keyspace import embedded


def malora_prefill(device: torch.device, rounds: int) -> Measured:
    """A prefill with the bundled MaLoRA adapter over one with the plain LoRA of equal parameters."""
    malora, lora = (_adapted(name, device) for name in ("malora", "lora"))
    return paired(malora.prefill, lora.prefill, device, rounds)


def _adapted(name: str, device: torch.device) -> workload.Workload:
    base, made = workload.bundled()
    model = PeftModel.from_pretrained(base, str(embedded.adapter_path(name))).eval()
    return workload.Workload(model, made, device, documents=64, batch=16)
