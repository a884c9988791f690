"""Time two pieces of code against each other in one process, in alternating rounds.

Absolute times of a shared machine say little. Ratios of neighboring runs do, and the same code run twice says how much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Seconds of what is timed: of the wall, or of this process on all its cores, which a busy machine disturbs less.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]

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
        seconds(prepare(), device)
    ratios, noise = [], []
    for _ in range(rounds):
        before, between, after = (seconds(prepare(), device) for prepare in (other, one, other))
        ratios.append(2 * between / (before + after))
        noise.append(after / before)
    return Measured(ratios, noise)


Parts = Sequence[Side]  # one run, cut where the others are cut


def in_parts(
    one: Parts, other: Parts, again: Parts, device: torch.device
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each part of three runs; who goes first in a part takes turns."""
    runs = (one, other, again)
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for number in range(len(one)):
        for turn in range(3):
            chosen = (number + turn) % 3
            times[chosen].append(seconds(runs[chosen][number], device))
    return times


def use_clock(name: str) -> None:
    """Time with one of `CLOCKS` from now on."""
    global _clock
    _clock = CLOCKS[name]


def seconds(side: Side, device: torch.device) -> float:
    """How long a side takes."""
    _synchronize(device)
    start = _clock()
    side()
    _synchronize(device)
    return _clock() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
