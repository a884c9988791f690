"""What capture costs the library alone: generation with every key, label and attention mass taken, over generation
without. Needs no lmms-eval. `capture_run` has what it costs a run."""

from __future__ import annotations

import torch
import workload
from timing import Measured, paired


def capture_overhead(device: torch.device, rounds: int) -> Measured:
    """The library alone on the bundled model, batch 16, every document's keys taken; no reading, no pictures made."""
    work = workload.Workload(*workload.bundled(), device, documents=64, batch=16)
    return paired(work.captured, work.plain, device, rounds)


def capture_llava_7b(device: torch.device, rounds: int) -> Measured:
    """The library alone on random weights in the shape of LLaVA-1.5-7B, bfloat16, batch 8, on a GPU."""
    work = workload.Workload(*workload.llava_7b_shape(), device, documents=32, batch=8)
    return paired(work.captured, work.plain, device, rounds)
