"""Does each test keep its size and each interval its coverage? `python benchmarks/calibration.py [TABLE ...]`.

Simulated keys: Gaussian tokens of width 8 with an image effect, drawn for each image and modality, as large as the
token noise unless a table says otherwise. Everything is drawn from seed 0, which was fixed before the first run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import integrate
from scipy.stats import norm

from lmms_keyspace import stats
from lmms_keyspace.divergence import (
    SCALES,
    block_permutation_test,
    js_classifier,
    js_histogram,
    js_knn,
    kernel_sums,
    mmd2,
)
from lmms_keyspace.records import KernelSums

WIDTH = 8
BANDWIDTH2 = 32.0  # the median squared distance of these keys, near enough; fixed, so that the truth is known
CHUNK = 50
Floats = NDArray[np.float64]


def clouds(
    rng: np.random.Generator,
    n: int,
    images: int,
    tokens: int,
    *,
    shift: float = 0.0,
    effect: float = 1.0,
    width: int = WIDTH,
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """n data sets [n, images * tokens, width] a side, x shifted in every coordinate, and the image of each token."""
    x, y = (
        rng.normal(size=(n, images, tokens, width)) + effect * rng.normal(size=(n, images, 1, width)) for _ in range(2)
    )
    return (x + shift).reshape(n, -1, width), y.reshape(n, -1, width), np.repeat(np.arange(images), tokens)


def chunks(n: int) -> Iterator[int]:
    """Numbers of data sets that are held at a time."""
    for start in range(0, n, CHUNK):
        yield min(CHUNK, n - start)


def true_mmd2(shift: float, variance: float = 2.0) -> float:
    """MMD^2 of N(shift, variance I) and N(0, variance I): Gaussian integrals of the kernels."""
    widths = np.asarray(SCALES) * BANDWIDTH2 + 4 * variance
    peak = (np.asarray(SCALES) * BANDWIDTH2 / widths) ** (WIDTH / 2)
    return float(np.mean(2 * peak * (1 - np.exp(-WIDTH * shift**2 / widths))))


def true_js(shift: float) -> float:
    """JSD in nats of N(0, I) and N(shift e1, I), by quadrature along the shift."""

    def integrand(z: float) -> float:
        p, q = norm.pdf(z), norm.pdf(z, shift)
        return sum(0.5 * a * np.log(2 * a / (p + q)) for a in (p, q) if a > 0)

    return float(integrate.quad(integrand, -12, 12 + shift, limit=300)[0])


def sums_of(x: Floats, y: Floats, images: NDArray[np.int64]) -> KernelSums:
    return kernel_sums(x, y, groups_x=images, groups_y=images, bandwidth2=BANDWIDTH2)


def size(rng: np.random.Generator, n: int) -> None:
    """Rejections at 0.05 of equal distributions, 12 images of 24 tokens a side, and of shifted ones."""
    print("\n| test at 0.05, 12 images of 24 tokens a side | image effect | shift | rejected |\n|---|---|---|---|")
    cases = [
        ("blocks, other images on the other side", 1.0, 0.0, n),
        ("blocks, the same images on both sides", 1.0, 0.0, n),
        ("tokens", 1.0, 0.0, n // 4),
        ("tokens", 0.0, 0.0, n // 4),
        *(("blocks, the same images on both sides", 1.0, shift, n // 2) for shift in (0.1, 0.2, 0.3, 0.5)),
    ]
    for name, effect, shift, simulations in cases:
        rejected = []
        for k in chunks(simulations):
            x, y, images = clouds(rng, k, 12, 24, shift=shift, effect=effect)
            groups_y = images + 100 if "other images" in name else images
            groups = (None, None) if name == "tokens" else (images, groups_y)
            test = block_permutation_test(x, y, groups_x=groups[0], groups_y=groups[1], n_permutations=499)
            rejected.append(test.p <= 0.05)
        share = np.concatenate(rejected).mean()
        print(f"| {name}, {simulations} simulations | {effect:g} | {shift:g} | {share:.3f} |", flush=True)


def bias(rng: np.random.Generator, n: int) -> None:
    """Mean of the U-statistics under equal distributions."""
    print("\n| MMD^2 of equal distributions, 8 tokens an image | by image: mean ± s.e. | by token: mean ± s.e. |")
    print("|---|---|---|")
    for images in (16, 32, 128):
        values: list[list[Floats]] = [[], []]
        simulations = min(n, 51200 // images**2 * 10)
        for k in chunks(simulations):
            x, y, groups = clouds(rng, k, images, 8)
            values[0].append(mmd2(x, y, groups_x=groups, groups_y=groups, bandwidth2=BANDWIDTH2))
            values[1].append(mmd2(x, y, bandwidth2=BANDWIDTH2))
        cells = [np.concatenate(v) for v in values]
        text = (f"{v.mean():.5f} ± {v.std() / np.sqrt(len(v)):.5f}" for v in cells)
        print(f"| {images} images, {simulations} simulations | {' | '.join(text)} |", flush=True)


def coverage(rng: np.random.Generator, n: int) -> None:
    """How often 95 % intervals hold the true MMD^2."""
    print(f"\n| 95 % intervals, 4 tokens an image, {n} simulations | shift | MMD^2 | jackknife | bootstrap |")
    print("|---|---|---|---|---|")
    for images in (24, 64, 128):
        for shift in (0.0, 0.5, 1.0):
            truth = true_mmd2(shift)
            hits: list[list[NDArray[np.bool_]]] = [[], []]
            for k in chunks(n):
                sums = sums_of(*clouds(rng, k, images, 4, shift=shift))
                for kept, (_, low, high) in zip(
                    hits, (stats.mmd2_jackknife(sums), stats.mmd2_bootstrap(sums)), strict=True
                ):
                    kept.append((low <= truth) & (truth <= high))
            shares = " | ".join(f"{np.concatenate(h).mean():.3f}" for h in hits)
            print(f"| {images} images | {shift:g} | {truth:.4f} | {shares} |", flush=True)


def paired(rng: np.random.Generator, n: int) -> None:
    """The change between two runs on the same images: size without a change, coverage and width with one."""
    print(f"\n| change between two runs, {n} simulations | rejected at 0.05, no change | covered | times tighter |")
    print("|---|---|---|---|")
    for images in (24, 64, 128):
        rejected, covered, tighter = [], [], []
        change = true_mmd2(1.1) - true_mmd2(1.0)
        for k in chunks(n):
            x, y, groups = clouds(rng, k, images, 4, shift=1.0)
            noisy = [sums_of(x + 0.3 * rng.normal(size=x.shape), y, groups) for _ in range(2)]
            rejected.append(stats.paired_mmd2_difference(*noisy).p <= 0.05)
            a, b = sums_of(x, y, groups), sums_of(x + 0.1, y, groups)
            result = stats.paired_mmd2_difference(a, b)
            covered.append((result.low <= change) & (change <= result.high))
            widths = [r.high - r.low for r in (stats.mmd2_jackknife(a), stats.mmd2_jackknife(b))]
            tighter.append(np.hypot(*widths) / (result.high - result.low))
        shares = [np.concatenate(v).mean() for v in (rejected, covered)]
        print(
            f"| {images} images | {shares[0]:.3f} | {shares[1]:.3f} | {np.median(np.concatenate(tighter)):.1f} |",
            flush=True,
        )


def js(rng: np.random.Generator, n: int) -> None:
    """Bias of the estimators of the Jensen-Shannon divergence, 4,000 tokens a side."""
    heads = max(2, n // 100)
    names = ("classifier", "nearest neighbors", "histogram")
    print(
        f"\n| JS in nats, 4,000 tokens a side, mean of {heads} | truth | {' | '.join(names)} |\n|---|---|---|---|---|"
    )
    groups = np.repeat(np.arange(125), 32)
    for width in (1, 4, 64):
        for shift in (0.0, 0.5, 1.0, 2.0, 4.0):
            values: list[list[float]] = [[], [], []]
            for _ in range(heads):
                x, y = rng.normal(size=(2, 4000, width))
                y[:, 0] += shift
                values[0].append(float(js_classifier(x, y, groups_x=groups, groups_y=groups).value))
                values[1].append(float(js_knn(x, y)))
                values[2].append(float(js_histogram(x, y)))
            cells = " | ".join(f"{np.mean(v):.3f}" for v in values)
            print(f"| width {width}, shift {shift:g} of one coordinate | {true_js(shift):.3f} | {cells} |", flush=True)


JS_CASES = (  # images, width, distance between the means
    (24, WIDTH, 1.4),
    (64, WIDTH, 1.4),
    (64, 64, 1.4),
    (128, 128, 2.8),
    (64, 64, 5.7),
    (24, 64, 5.7),
)


def js_intervals(rng: np.random.Generator, n: int) -> None:
    """Intervals of the classifier's bound, of one run and of the change between two that differ by noise of one law.

    What an interval is to hold is the mean of the bound over all simulations. "Fits as given" leaves out what an image
    does to the fitted classifiers.
    """
    print("\n| JS bound, 8 tokens an image | bound, nats | interval holds it | fits as given |", end="")
    print(" no change: rejected at 0.05 | fits as given |\n|---|---|---|---|---|---|")
    simulations = n // 2
    for images, width, distance in JS_CASES:
        values: list[Floats] = []
        ends: dict[bool, list[Floats]] = {True: [], False: []}
        p: dict[bool, list[Floats]] = {True: [], False: []}
        for k in chunks(simulations):
            x, y, groups = clouds(rng, k, images, 8, shift=distance / width**0.5, width=width)
            losses = [
                js_classifier.held_out(x + 0.5 * rng.normal(size=x.shape), y, groups_x=groups, groups_y=groups)
                for _ in range(2)
            ]
            values.append(stats.js_from_losses(losses[0]))
            for counted in (True, False):
                sides = losses if counted else [replace(loss, fit_influence=0 * loss.fit_influence) for loss in losses]
                result = stats.js_bootstrap(sides[0])
                ends[counted].append(np.stack([result.low, result.high]))
                p[counted].append(stats.paired_js_difference(*sides).p)
        mean = np.concatenate(values).mean()
        held = {key: np.concatenate(found, axis=1) for key, found in ends.items()}
        shares = [
            *(((low <= mean) & (mean <= high)).mean() for low, high in (held[True], held[False])),
            *((np.concatenate(p[counted]) <= 0.05).mean() for counted in (True, False)),
        ]
        cells = " | ".join(f"{share:.3f}" for share in shares)
        print(
            f"| {images} images, width {width}, means {distance} apart, {simulations} simulations | {mean:.3f} | "
            f"{cells} |",
            flush=True,
        )


def adjusted(rng: np.random.Generator, n: int) -> None:
    """Any false alarm among 16 layers and heads, two runs that differ by noise of one law."""
    tests = 16
    print(f"\n| some p of {tests} at most 0.05, no change | as they are | adjusted by max-T | band excludes 0 |")
    print("|---|---|---|---|")
    for images in (24, 64):
        alarms: list[list[bool]] = [[], [], []]
        simulations = n // 2
        for _ in range(simulations):
            x, y, groups = clouds(rng, tests, images, 4, shift=1.0)
            a, b = (sums_of(x + 0.3 * rng.normal(size=x.shape), y, groups) for _ in range(2))
            change = stats.paired_mmd2_difference(a, b, n_resamples=999)
            outside = (change.band_low > 0) | (change.band_high < 0)
            for kept, alarm in zip(
                alarms, (change.p.min() <= 0.05, change.p_adjusted.min() <= 0.05, outside.any()), strict=True
            ):
                kept.append(bool(alarm))
        shares = " | ".join(f"{np.mean(v):.3f}" for v in alarms)
        print(f"| {images} images, {simulations} simulations | {shares} |", flush=True)


def hyppo(rng: np.random.Generator, n: int) -> None:
    """Decisions at 0.05 beside those of hyppo's `MMD` (one Gaussian kernel), token permutation."""
    try:
        from hyppo.ksample import MMD
    except ImportError:
        print("\nhyppo: not run, hyppo is not installed")
        return

    print("\n| single tokens, 48 a side | shift | both reject | neither | only this | only hyppo |")
    print("|---|---|---|---|---|---|")
    simulations = n // 10
    for shift in (0.0, 0.3, 0.5, 0.8):
        x, y, _ = clouds(rng, simulations, 48, 1, shift=shift, effect=0.0)
        ours = block_permutation_test(x, y, groups_x=None, groups_y=None, n_permutations=199).p <= 0.05
        theirs = np.array(
            [
                MMD(compute_kernel="gaussian").test(a, b, reps=199, auto=False)[1] <= 0.05
                for a, b in zip(x, y, strict=True)
            ]
        )
        cells = (ours & theirs, ~ours & ~theirs, ours & ~theirs, ~ours & theirs)
        shares = " | ".join(f"{cell.mean():.2f}" for cell in cells)
        print(f"| {simulations} simulations | {shift:g} | {shares} |", flush=True)


TABLES = {table.__name__: table for table in (size, bias, coverage, paired, js, js_intervals, adjusted, hyppo)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default all")
    parser.add_argument("--simulations", type=int, default=1000)
    given = parser.parse_args()
    unknown = sorted(set(given.tables) - set(TABLES))
    if unknown:
        parser.error(f"no table {unknown[0]}; there are {', '.join(TABLES)}")
    for index, name in enumerate(TABLES):
        if name in (given.tables or TABLES):
            start = time.perf_counter()
            TABLES[name](np.random.default_rng([0, index]), given.simulations)
            print(f"\n({name}: {time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
