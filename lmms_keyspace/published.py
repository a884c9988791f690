"""What the published diagnosis of attention keys (arXiv 2510.26721) leaves unknown, and what stands here instead.

The full text was not at hand: secondary sources report keys before RoPE, standardized, principal components to 50
dimensions, MMD and Jensen-Shannon divergence by layer, and the same within one modality. Nothing here reproduces the
paper's numbers.
"""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """One thing that is not known of the published pipeline, and the choice made for it."""

    unknown: str
    chosen: str


UNKNOWN: tuple[Choice, ...] = (
    Choice("numbers of images and of tokens", "at most 1,000 tokens a side, alike in all contrasts of a large sample"),
    Choice("MMD or MMD², biased or not", "the root of the biased MMD²"),
    Choice("kernel and bandwidth", "one Gaussian at the median distance of the tokens compared"),
    Choice("what the projection is fitted on", "visual and text tokens of the layer and condition together"),
    Choice(
        "estimator of the Jensen-Shannon divergence",
        "30 bins a component, a score counting in part for the two nearest, mean over components, less its null",
    ),
    Choice("its base, and whether its root is taken", "nats, no root"),
    Choice("which tokens count", "special tokens, template and attention sinks are left out"),
    Choice("which test was used", "none"),
)
