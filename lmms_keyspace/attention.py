"""Watching the attention function that a decoder uses, and what its last query attends to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import Decoder, KeySite

# (site, query, key, value, mask, keyword arguments), all as the attention function received them.
Observer = Callable[[KeySite, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]], None]
_SUPPORTED = ("eager", "sdpa", "flash_attention")


class LastQuery(NamedTuple):
    """The last prompt token of each row against n key columns, means over query heads; float32."""

    mass: torch.Tensor  # [B, n] attention weights, rows sum to 1
    scores: torch.Tensor  # [B, n] scaled q.k before the mask
    visible: torch.Tensor | None  # [B, n] which columns the mask allows; None: all of the row's own


def check_implementation(decoder: Decoder) -> str:
    """The name of the attention implementation in force.

    Raises:
        InputError: its masks cannot be read (flex attention, paged attention).
    """
    name = str(decoder.text_config._attn_implementation)
    if not name.startswith(_SUPPORTED):
        raise InputError(
            "attn_implementation", name, "capture reads sdpa, eager and flash_attention_2; use one of them"
        )
    return name


@contextmanager
def observed_attention(decoder: Decoder, observe: Observer) -> Iterator[None]:
    """Call `observe` after each attention call of the decoder's layers; other modules pass through untouched.

    The active function is wrapped under its own name, because transformers chooses masks by that name, and put back
    afterwards whatever happens.
    """
    name = check_implementation(decoder)
    sites = {id(site.attention): site for site in decoder.sites}
    # The module that defines the layers looks both names up on each call.
    namespace = vars(sys.modules[type(decoder.sites[0].attention).__module__])
    table: dict[str, Callable[..., Any]]
    if name == "eager":
        table, entry = namespace, "eager_attention_forward"
        original = namespace[entry]
    else:
        # Only this table's own layer is touched: what others register for all of transformers stays visible.
        table, entry = namespace["ALL_ATTENTION_FUNCTIONS"]._local_mapping, name
        original = namespace["ALL_ATTENTION_FUNCTIONS"][name]
    had_entry = entry in table

    def observed(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = original(module, query, key, value, attention_mask, *args, **kwargs)
        site = sites.get(id(module))
        if site is not None:
            observe(site, query, key, value, attention_mask, kwargs)
        return result

    table[entry] = observed
    try:
        yield
    finally:
        if had_entry:
            table[entry] = original
        else:
            del table[entry]


def last_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    row: int,
    scaling: float,
    sliding_window: int | None = None,
) -> LastQuery:
    """Exact softmax attention of one query against all keys up to it, in float32.

    Args:
        query: `[B, H, d]`, the query of the last prompt token.
        key: `[B, KV, n, d]`, columns up to and including the query's own.
        mask: as the attention function got it: None (causal), `[B or 1, 1 or H, T, >= n]` boolean or additive, or
            `[B, >= n]` of ones and zeros (flash attention).
        row: which of the mask's T rows is the query's.
        scaling: factor on q.k.
        sliding_window: columns that the query reaches back to, its own included, where the mask does not say it.

    Returns:
        Means over the H query heads.
    """
    batch, heads, width = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads, width)
    scores = (grouped @ key.float().transpose(2, 3) * scaling).reshape(batch, heads, n)
    visible = None
    masked = scores
    if mask is not None and mask.dim() == 4:
        last = mask[:, :, row, :n]
        if last.dtype == torch.bool:
            visible = last[:, 0]
            masked = scores.masked_fill(~last, float("-inf"))
        else:
            visible = last[:, 0] > torch.finfo(last.dtype).min / 2
            masked = scores + last.float()
    else:
        if mask is not None:
            visible = mask[:, :n].bool()
        if sliding_window is not None and sliding_window < n:
            reached = torch.arange(n, device=key.device) >= n - sliding_window
            visible = reached.expand(batch, n) if visible is None else visible & reached
        if visible is not None:
            masked = scores.masked_fill(~visible[:, None], float("-inf"))
    return LastQuery(
        mass=masked.softmax(-1).mean(1),
        scores=scores.mean(1),
        visible=None if visible is None else visible.expand(batch, n),
    )
