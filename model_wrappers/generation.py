"""How requests are answered: generation settings and the order of batches."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_keyspace.model_wrappers.prompts import Asked, Request

# lmms-eval's stock wrappers generate at most this many tokens where a task says nothing.
DEFAULT_NEW_TOKENS = 1024
_PASSED_ON = ("max_new_tokens", "min_new_tokens", "num_beams", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class Settings:
    """Arguments of `generate` and the strings that end an answer."""

    arguments: Mapping[str, Any]
    until: tuple[str, ...]


def settings_of(kwargs: Mapping[str, Any]) -> Settings:
    """Translate a task's `generation_kwargs`: greedy unless a temperature above 0 or `do_sample` asks for more."""
    temperature = float(kwargs.get("temperature") or 0.0)
    sample = bool(kwargs.get("do_sample", temperature > 0)) and temperature > 0
    arguments = {name: kwargs[name] for name in _PASSED_ON if kwargs.get(name) is not None}
    arguments.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    arguments["do_sample"] = sample
    if sample:
        arguments["temperature"] = temperature
    else:
        arguments.update(top_p=None, top_k=None, temperature=None)  # silences transformers on greedy decoding
    until = kwargs.get("until") or ()
    return Settings(arguments, (until,) if isinstance(until, str) else tuple(text for text in until if text))


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the strings that end an answer."""
    ends = [index for mark in until if (index := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text


def longest_first(requests: Sequence[Asked], *, together: bool = False) -> list[int]:
    """The requests' indices, longest prompts first: padding is small, memory fails early.

    What makes a prompt long are its images first and its words second: an image is one word of the text here.

    Args:
        requests: in any order.
        together: questions about the same pictures follow the longest of them.
    """
    order = sorted(
        range(len(requests)), key=lambda index: (-requests[index].images_shown, -len(requests[index].text), index)
    )
    if not together:
        return order
    places: dict[Hashable, int] = {}
    for place, index in enumerate(order):
        places.setdefault(requests[index].shown or index, place)
    return sorted(order, key=lambda index: places[requests[index].shown or index])


def batches(requests: Sequence[Request], size: int, *, together: bool = False) -> Iterator[tuple[Settings, list[int]]]:
    """Cut requests into batches of like settings, among requests of like settings `longest_first`.

    Requests that are not counted come in batches of their own, so that capture can leave them out.

    Args:
        requests: in any order.
        size: most requests of a batch.
        together: questions about the same pictures follow each other, see `longest_first`.

    Yields:
        The settings and the indices of the batch's requests.
    """
    groups: dict[tuple[bool, str], list[int]] = {}
    for index, request in enumerate(requests):
        settings_text = json.dumps(request.generation_kwargs, sort_keys=True, default=str)
        groups.setdefault((request.counted, settings_text), []).append(index)
    for group in groups.values():
        order = longest_first([requests[index] for index in group], together=together)
        members = [group[place] for place in order]
        settings = settings_of(requests[members[0]].generation_kwargs)
        for start in range(0, len(members), size):
            yield settings, members[start : start + size]
