"""Clouds of vectors whose divergence is known."""

from __future__ import annotations

import numpy as np
from scipy import integrate
from scipy.stats import norm


def true_js(shift):
    """JSD in nats of N(0, I) and N(shift e1, I): one-dimensional, along the shift."""

    def integrand(z):
        p, q = norm.pdf(z), norm.pdf(z, shift)
        return sum(0.5 * a * np.log(2 * a / (p + q)) for a in (p, q) if a > 0)

    return integrate.quad(integrand, -12, 12 + shift, limit=300)[0]


def clouds(seed, heads, images, tokens, width, shift=0.0, image_effect=0.0):
    rng = np.random.default_rng(seed)
    x, y = (
        rng.normal(size=(heads, images, tokens, width)) + image_effect * rng.normal(size=(heads, images, 1, width))
        for _ in range(2)
    )
    y[..., 0] += shift
    groups = np.repeat(np.arange(images), tokens)
    return x.reshape(heads, -1, width), y.reshape(heads, -1, width), groups
