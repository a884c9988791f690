"""Samples per second of `keyspace_llava` over those of lmms-eval's stock `llava_hf`, same checkpoint, same requests.

A case stops when the two do not give the same answers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import workload
from timing import Measured, paired
from transformers import AutoModelForImageTextToText, AutoProcessor
from wrapped import Requests, ours, quiet, stock

from lmms_keyspace import embedded


def throughput_bundled_16(device: torch.device, rounds: int) -> Measured:
    """The bundled model, batch 16, capture=off."""
    return _against_stock(Requests(pictures=192), Path(embedded.base_path()), 16, device, rounds)


def throughput_bundled_1(device: torch.device, rounds: int) -> Measured:
    """The bundled model, batch 1, capture=off."""
    return _against_stock(Requests(pictures=32), Path(embedded.base_path()), 1, device, rounds)


def throughput_random_16(device: torch.device, rounds: int) -> Measured:
    """A random LLaVA (width 512, 8 layers, 196 image tokens), batch 16, answers of 24 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = workload.save(*workload.random_llava(), Path(folder))
        requests = Requests(pictures=16, new_tokens=24)
        difference = left_padding_difference(path)
        if difference > 1e-4:
            raise AssertionError(f"logits of a left-padded batch differ by {difference:.1e} from single ones")
        measured = _against_stock(requests, path, 16, device, rounds)
        return Measured(measured.ratios, measured.noise, f"{measured.note}; left-padded logits within {difference:.0e}")


def throughput_random_1(device: torch.device, rounds: int) -> Measured:
    """The same at batch 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = workload.save(*workload.random_llava(), Path(folder))
        return _against_stock(Requests(pictures=4, new_tokens=24), path, 1, device, rounds)


def _against_stock(requests: Requests, path: Path, batch: int, device: torch.device, rounds: int) -> Measured:
    quiet()
    wrapper = ours(requests, batch=batch, capture=False, pretrained=path)
    mine = partial(requests.answer, wrapper)
    theirs = stock(requests, path)
    expected = theirs()
    if mine() != expected:
        raise AssertionError("the answers are not those of the stock wrapper")
    # Time of theirs over time of mine is samples per second of mine over theirs.
    measured = paired(lambda: theirs, lambda: mine, device, rounds)
    return Measured(
        measured.ratios, measured.noise, f"{len(set(expected))} different answers of {len(expected)}, equal"
    )


def left_padding_difference(path: Path) -> float:
    """Largest difference between the last logits of prompts of unequal length in a batch and alone."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    made = AutoProcessor.from_pretrained(path)
    made.tokenizer.padding_side = "left"
    work = workload.Workload(model, made, torch.device("cpu"), documents=8, batch=8)
    alone = workload.Workload(model, made, torch.device("cpu"), documents=8, batch=1)
    together = _last_logits(model, work.batches)
    return float((together - _last_logits(model, alone.batches)).abs().max())


@torch.inference_mode()
def _last_logits(model: torch.nn.Module, batches: Sequence[tuple[object, dict[str, torch.Tensor]]]) -> torch.Tensor:
    return torch.cat([model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1] for _, inputs in batches])
