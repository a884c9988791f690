"""Speed of the MMD part of the divergence table."""

from __future__ import annotations

import numpy as np
import torch
from timing import Measured, paired

from lmms_keyspace import divergence, stats


def robust_mmd(tokens: int, device: torch.device, rounds: int) -> Measured:
    """The MMD part of the table over its floor, for two heads of width 128 with `tokens` tokens a side.

    The part: bandwidths, kernel sums at five scales, 1,000 block permutations, 1,000 bootstrap draws. The floor: one
    float32 product that makes the kernel matrix of both sides together, and one exp over it, in memory that is reused.
    """
    heads, width = 2, 128
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(heads, tokens, width, generator=generator).to(device) for _ in range(2))
    groups = np.repeat(np.arange(tokens // 32), 32)
    scaled = torch.cat([x, y], dim=1) / width**0.5
    matrix = torch.empty(2 * tokens, 2 * tokens, device=device)

    def floor() -> None:
        for head in scaled:
            torch.mm(head, head.T, out=matrix)
            matrix.exp_()

    def part() -> None:
        bandwidth2 = divergence.median_bandwidth2(x, y)
        sums = divergence.kernel_sums(x, y, groups_x=groups, groups_y=groups, bandwidth2=bandwidth2)
        stats.permutation_test(sums)
        stats.mmd2_bootstrap(sums)

    return paired(lambda: part, lambda: floor, device, rounds)


def robust_mmd_2048(device: torch.device, rounds: int) -> Measured:
    return robust_mmd(2048, device, rounds)


def robust_mmd_4096(device: torch.device, rounds: int) -> Measured:
    return robust_mmd(4096, device, rounds)
