"""Time two pieces of code against each other in one process, in alternating rounds.

Absolute times of a shared machine say little. Ratios of neighboring runs do, and the same code run twice says how much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Side = Callable[[], object]
Prepare = Callable[[], Side]  # makes a side ready to run; not timed


@dataclass(frozen=True)
class Measured:
    """Ratios by round, those of the same code run twice, and what a reader must know of the case."""

    ratios: list[float]
    noise: list[float]
    note: str = ""

    @property
    def ratio(self) -> float:
        """Median over rounds."""
        return statistics.median(self.ratios)


def paired(one: Prepare, other: Prepare, device: torch.device, rounds: int) -> Measured:
    """Time of `one` over time of `other`, round by round, after a round that does not count.

    Every round runs `other`, `one`, `other`: the ratio is to the mean of the two, which also give the noise.
    """
    for prepare in (one, other):
        _seconds(prepare, device)
    ratios, noise = [], []
    for _ in range(rounds):
        before, between, after = (_seconds(prepare, device) for prepare in (other, one, other))
        ratios.append(2 * between / (before + after))
        noise.append(after / before)
    return Measured(ratios, noise)


def _seconds(prepare: Prepare, device: torch.device) -> float:
    side = prepare()
    _synchronize(device)
    start = time.perf_counter()
    side()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
