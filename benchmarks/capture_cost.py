"""What capture costs: generation with every key, label and attention mass taken, over generation without."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import workload
from timing import Measured, paired


def capture_overhead(device: torch.device, rounds: int) -> Measured:
    """The library alone on the bundled model, batch 16, every document's keys taken; no reading, no pictures made."""
    work = workload.Workload(*workload.bundled(), device, documents=64, batch=16)
    return paired(work.captured, work.plain, device, rounds)


def capture_bundled(device: torch.device, rounds: int) -> Measured:
    """`keyspace_llava` on the 1,800 documents of the text bias probe, batch 8, capture=on over capture=off."""
    from wrapped import Requests, ours, quiet

    quiet()
    requests = Requests()
    measured = paired(
        lambda: ours(requests, batch=8, capture=True), lambda: ours(requests, batch=8, capture=False), device, rounds
    )
    return Measured(measured.ratios, measured.noise, "1,800 documents, 128 clusters of 300 captured")


def capture_random_llava(device: torch.device, rounds: int) -> Measured:
    """The same wrapper on a random LLaVA (width 512, 8 layers, 196 image tokens), 24 documents, batch 8."""
    from wrapped import Requests, ours, quiet

    quiet()
    requests = Requests(pictures=24, new_tokens=workload.NEW_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        path = workload.save(*workload.random_llava(), Path(folder))
        return paired(
            lambda: ours(requests, batch=8, capture=True, pretrained=path),
            lambda: ours(requests, batch=8, capture=False, pretrained=path),
            device,
            rounds,
        )


def capture_llava_7b(device: torch.device, rounds: int) -> Measured:
    """The library alone on random weights in the shape of LLaVA-1.5-7B, bfloat16, batch 8, on a GPU."""
    work = workload.Workload(*workload.llava_7b_shape(), device, documents=32, batch=8)
    return paired(work.captured, work.plain, device, rounds)
