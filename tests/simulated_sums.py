"""Simulated clouds with an image effect, their sums by document, and the truth: shared by the tests of statistics."""

import numpy as np

from lmms_keyspace.records import KernelSums


def kernel_matrix(a, b, bandwidth2=4.0):
    return np.exp(-((a[..., :, None, :] - b[..., None, :, :]) ** 2).sum(-1) / bandwidth2)


def sums_of(x, y, names=None, bandwidth2=4.0):
    """Sums by document of x, y [..., D, tokens, d] with equal tokens per document."""
    d = x.shape[-3]

    def by_document(a, b):
        tokens_a, tokens_b = a.shape[-2], b.shape[-2]
        flat = kernel_matrix(
            a.reshape(*a.shape[:-3], -1, a.shape[-1]), b.reshape(*b.shape[:-3], -1, b.shape[-1]), bandwidth2
        )
        return flat.reshape(*a.shape[:-3], d, tokens_a, d, tokens_b).sum(axis=(-3, -1))

    counts = [np.full(d, cloud.shape[-2]) for cloud in (x, y)]
    names = names or tuple(f"doc{i:03d}" for i in range(d))
    return KernelSums(by_document(x, x), by_document(y, y), by_document(x, y), *counts, names)


def clouds(rng, heads, documents, tokens=4, width=3, image_effect=1.0, shift=0.0):
    """Visual and text tokens of documents, each modality with its own effect of the document."""
    x, y = (
        rng.normal(size=(heads, documents, tokens, width))
        + image_effect * rng.normal(size=(heads, documents, 1, width))
        for _ in range(2)
    )
    return x + shift, y


def truth(shift, width=3, image_effect=1.0, bandwidth2=4.0):
    """MMD^2 of N(shift, s2 I) and N(0, s2 I): a Gaussian integral of the kernel."""
    s2 = 1 + image_effect**2
    return 2 * (1 + 4 * s2 / bandwidth2) ** (-width / 2) * (1 - np.exp(-width * shift**2 / (bandwidth2 + 4 * s2)))
