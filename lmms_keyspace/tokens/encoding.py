"""The text of prompts as tokens, each with what its letters say of it: declared segment, or chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import SEGMENTS
from lmms_keyspace.tokens.boilerplate import EncodedPrompts
from lmms_keyspace.tokens.image_tokens import run_starts
from lmms_keyspace.tokens.prompts import Prompt, content_spans, segment_spans

_UNKNOWN, _OUTSIDE, _INSIDE = range(3)  # where a letter is with regard to the user's words
_WHITE_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # none beyond


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    placeholder_id: int,
    special_ids: np.ndarray,
    add_special_tokens: bool,
) -> EncodedPrompts:
    """Tokenize the prompts.

    Args:
        tokenizer: gives character offsets.
        placeholder_id: stands for an image in the text.
        special_ids: ids of special tokens.

    Raises:
        InputError: a declared segment does not occur in its prompt, or its images are not those of its text.
    """
    texts = [prompt.text for prompt in prompts]
    encoding = tokenizer(texts, add_special_tokens=add_special_tokens, return_offsets_mapping=True, truncation=False)
    sizes = np.array([len(ids) for ids in encoding["input_ids"]])
    ids = np.fromiter(chain.from_iterable(encoding["input_ids"]), np.int64, sizes.sum())
    flat = chain.from_iterable(chain.from_iterable(encoding["offset_mapping"]))
    offsets = np.fromiter(flat, np.int64, 2 * ids.size).reshape(-1, 2)
    begins = np.cumsum([0, *map(len, texts)])  # of each text in all of them
    owners = np.repeat(np.arange(len(texts)), sizes)
    starts = run_starts(ids == placeholder_id, owners)
    placeholders = np.diff(np.append(starts, ids.size)) * (ids[starts] == placeholder_id)
    ids, offsets, owners = ids[starts], offsets[starts], owners[starts]
    shown = np.bincount(owners, placeholders, minlength=len(prompts))
    for prompt, count in zip(prompts, shown.tolist(), strict=True):
        if prompt.image_shas and len(prompt.image_shas) != count:
            raise InputError(
                "image_shas",
                prompt.name,
                f"{len(prompt.image_shas)} images were named and the text has {count:.0f} placeholders",
            )
    segments, contents = _painted(prompts, begins)
    letters = _first_letters("".join(texts), offsets + begins[owners][:, None])
    segment = segments[letters]
    template = (contents[letters] == _OUTSIDE) & (segment < 0)
    special = np.isin(ids, special_ids) | (offsets[:, 0] == offsets[:, 1])
    bounds = np.append(0, np.cumsum(np.bincount(owners, minlength=len(prompts))))
    return EncodedPrompts(bounds, ids, placeholders, special, template, segment)


def _painted(prompts: Sequence[Prompt], begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per letter of all texts together: its segment, -1 for none, and whether it is outside the user's words.

    Args:
        begins: where each text begins, and the end of the last.
    """
    segments = np.full(begins[-1] + 1, -1, np.int8)
    contents = np.full(begins[-1] + 1, _UNKNOWN, np.int8)
    for prompt, begin, end in zip(prompts, begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        for name, (start, stop) in segment_spans(prompt).items():
            segments[begin + start : begin + stop] = SEGMENTS.index(name)
        content = content_spans(prompt)
        if content:
            contents[begin:end] = _OUTSIDE
            for start, stop in content:
                contents[begin + start : begin + stop] = _INSIDE
    return segments, contents


def _first_letters(text: str, offsets: np.ndarray) -> np.ndarray:
    """The letter that decides where a token belongs: its first that is no white space, else its first."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    following = np.arange(letters.size + 1)
    following[:-1][_WHITE_SPACE[np.minimum(letters, _WHITE_SPACE.size - 1)]] = letters.size
    following = np.minimum.accumulate(following[::-1])[::-1]
    starts, ends = offsets[:, 0], offsets[:, 1]
    first = following[starts]
    return np.where(first < ends, first, starts)
