"""Attention sinks: tokens that draw attention whatever they say.

Criterion of Kang et al. 2025 (arXiv 2503.03321, visual attention sinks): a token is a sink when an entry of the input
of a decoder layer exceeds 20 after RMS normalization without weights, in layers from the third on and not in the last.
There only the entries known to be massive in LLaMA-2 are looked at (2533 and 1415 in the 7B model); here any entry
counts, because other models have others (Sun et al. 2024, arXiv 2402.17762).
"""

from __future__ import annotations

import torch

from lmms_keyspace.families import Decoder

THRESHOLD = 20.0
FIRST_LAYER = 2


def can_have_sinks(decoder: Decoder, layer: int) -> bool:
    """Whether the criterion can hold in a layer: RMS-normalized vectors of width d have no entry above sqrt(d)."""
    config = decoder.text_config
    wide = config.hidden_size > THRESHOLD**2
    return bool(wide and FIRST_LAYER <= layer < config.num_hidden_layers - 1)


def is_sink(hidden: torch.Tensor) -> torch.Tensor:
    """`[N]` from the inputs of a decoder layer `[N, d]`."""
    hidden = hidden.float()
    return hidden.abs().amax(-1) > THRESHOLD * hidden.square().mean(-1).sqrt()
