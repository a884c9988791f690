"""Speed and memory of the divergence table's estimators."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from timing import Measured, paired, seconds

from lmms_keyspace import divergence, stats
from lmms_keyspace.divergence.side_by_side import kernel_sums_by_estimator

HEADS, WIDTH, TOKENS_OF_AN_IMAGE = 2, 128, 32
LLAVA_7B_SECONDS = 60  # in which a GPU is to do all layers and heads


class Keys:
    """Two clouds of `tokens` Gaussian keys a side by head, of width 128, 32 tokens an image; y may be shifted."""

    def __init__(self, tokens: int, device: torch.device, shift: float = 0.0, heads: int = HEADS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(heads, tokens, WIDTH, generator=generator).to(device) for _ in range(2))
        self.y += shift
        self.groups = np.repeat(np.arange(tokens // TOKENS_OF_AN_IMAGE), TOKENS_OF_AN_IMAGE)

    def mmd_part(self) -> None:
        """Bandwidths, kernel sums at five scales, 1,000 block permutations, 1,000 bootstrap draws."""
        bandwidth2 = divergence.median_bandwidth2(self.x, self.y)
        sums = divergence.kernel_sums(self.x, self.y, groups_x=self.groups, groups_y=self.groups, bandwidth2=bandwidth2)
        stats.permutation_test(sums)
        stats.mmd2_bootstrap(sums)

    def classifier(self) -> None:
        """The held-out JS bound with its interval."""
        divergence.js_classifier(self.x, self.y, groups_x=self.groups, groups_y=self.groups)


def robust_mmd(tokens: int, device: torch.device, rounds: int) -> Measured:
    """The MMD part of the table over its floor: one float32 product that makes the kernel matrix of both sides
    together, and one exp over it, in memory that is reused."""
    keys = Keys(tokens, device)
    scaled = torch.cat([keys.x, keys.y], dim=1) / WIDTH**0.5
    matrix = torch.empty(2 * tokens, 2 * tokens, device=device)

    def floor() -> None:
        for head in scaled:
            torch.mm(head, head.T, out=matrix)
            matrix.exp_()

    return paired(lambda: keys.mmd_part, lambda: floor, device, rounds)


def robust_mmd_2048(device: torch.device, rounds: int) -> Measured:
    return robust_mmd(2048, device, rounds)


def robust_mmd_4096(device: torch.device, rounds: int) -> Measured:
    return robust_mmd(4096, device, rounds)


def classifier_2048(device: torch.device, rounds: int) -> Measured:
    """The classifier's bound over the MMD part, on clouds that it tells apart in part."""
    keys = Keys(2048, device, shift=0.1)
    return paired(lambda: keys.classifier, lambda: keys.mmd_part, device, rounds)


def classifier_apart_2048(device: torch.device, rounds: int) -> Measured:
    """The same on clouds that are apart, where the fit takes most steps."""
    keys = Keys(2048, device, shift=1.0)
    return paired(lambda: keys.classifier, lambda: keys.mmd_part, device, rounds)


def all_kernels_4096(device: torch.device, rounds: int) -> Measured:
    """Every kernel of the table over the kernel of `mmd2` alone."""
    keys = Keys(4096, device)
    groups = {
        "groups_x": keys.groups,
        "groups_y": keys.groups,
        "bandwidth2": divergence.median_bandwidth2(keys.x, keys.y),
    }
    return paired(
        lambda: lambda: kernel_sums_by_estimator(keys.x, keys.y, **groups),
        lambda: lambda: divergence.kernel_sums(keys.x, keys.y, **groups),
        device,
        rounds,
    )


def hyppo_mmd_4096(device: torch.device, rounds: int) -> Measured:
    """hyppo's `MMD` with `reps=0` over the value of `mmd2`, each with its own bandwidth: one head, single tokens. CPU.

    hyppo is called once on these keys, after a call on few that has numba compile it. Its `test` computes the statistic
    twice and holds several float64 matrices of 8,192 x 8,192.
    """
    from hyppo.ksample import MMD

    def theirs(tokens: int) -> float:
        x, y = keys.x[0, :tokens].numpy(), keys.y[0, :tokens].numpy()
        return seconds(lambda: MMD(compute_kernel="gaussian").test(x, y, reps=0), cpu)

    cpu = torch.device("cpu")
    keys = Keys(4096, cpu, heads=1)
    theirs(TOKENS_OF_AN_IMAGE)
    ours = [seconds(lambda: divergence.mmd2(keys.x, keys.y), cpu) for _ in range(rounds + 1)][1:]
    slow = theirs(4096)
    note = f"one call of hyppo, {slow:.1f} s; `mmd2` {float(np.median(ours)):.2f} s"
    return Measured([slow / fast for fast in ours], [after / before for before, after in pairwise(ours)], note)


def robust_llava_7b(
    device: torch.device, rounds: int, *, layers: int = 32, heads: int = 32, tokens: int = 2048
) -> Measured:
    """Seconds of the `robust` protocol over 60: MMD part and classifier of every layer of LLaVA-1.5-7B's shape."""
    totals = []
    for _ in range(rounds + 1):
        total = 0.0
        for _ in range(layers):
            keys = Keys(tokens, device, shift=0.1, heads=heads)
            total += seconds(keys.mmd_part, device) + seconds(keys.classifier, device)
        totals.append(total)
    timed = totals[1:]  # libraries are loaded in the first round
    note = f"{layers} layers x {heads} heads x ({tokens} + {tokens}) tokens: {float(np.median(timed)):.1f} s"
    return Measured(
        [total / LLAVA_7B_SECONDS for total in timed], [after / before for before, after in pairwise(timed)], note
    )


def kernel_memory_4096(device: torch.device, rounds: int) -> Measured:
    """Peak memory that the kernel sums take beyond the keys, over one float32 kernel matrix of both sides."""
    keys = Keys(4096, device)
    matrix = (2 * 4096) ** 2 * 4
    groups = {"groups_x": keys.groups, "groups_y": keys.groups, "bandwidth2": 2.0 * WIDTH}
    ratios = [_peak(lambda: kernel_sums_by_estimator(keys.x, keys.y, **groups), device) / matrix for _ in range(2)]
    return Measured(ratios, [], "peak of the allocator (CPU: of tensors and arrays alive, by torch's profiler)")


def _peak(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at once, less those before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    alive = np.cumsum(
        [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    )
    return arrays + int(alive.max(initial=0))
