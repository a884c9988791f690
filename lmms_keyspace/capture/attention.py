"""Watching the attention function that a decoder uses, or putting another in its place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import Decoder, KeySite

# (site, query, key, value, mask, keyword arguments), all as the attention function received them.
Observer = Callable[[KeySite, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]], None]
# The same after a function that attends as usual; gives (output `[B, T, H, d]`, weights or None) in its place.
Replacement = Callable[
    [Callable[[], Any], KeySite, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]], Any
]
_SUPPORTED = ("eager", "sdpa", "flash_attention")


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
    """Call `observe` after each attention call of the decoder's layers; other modules pass through untouched."""

    def attend(original: Callable[[], Any], *received: Any) -> Any:
        result = original()
        observe(*received)
        return result

    with replaced_attention(decoder, attend):
        yield


@contextmanager
def replaced_attention(decoder: Decoder, attend: Replacement) -> Iterator[None]:
    """Call `attend` in place of each attention call of the decoder's layers; other modules pass through untouched.

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

    def replaced(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        def as_usual() -> Any:
            return original(module, query, key, value, attention_mask, *args, **kwargs)

        site = sites.get(id(module))
        if site is None:
            return as_usual()
        return attend(as_usual, site, query, key, value, attention_mask, kwargs)

    table[entry] = replaced
    try:
        yield
    finally:
        if had_entry:
            table[entry] = original
        else:
            del table[entry]
