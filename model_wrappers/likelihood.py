"""Log-probabilities of given continuations of a prompt, and of the answer options of a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lmms_keyspace.errors import InputError


class Scored(NamedTuple):
    """A continuation of n tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, each given the prompt and the tokens before it
    greedy: bool  # every token is the most probable one

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation in nats."""
        return sum(self.logprobs)


def joined(text: str, continuation: str) -> str:
    """Prompt and continuation, with white space between them as the model writes it: none after a prompt that ends in
    white space, else one blank."""
    return text + ("" if text[-1:].isspace() else " ") + continuation.strip()


def score(
    model: Any, tokenizer: Any, texts: Sequence[str], continuations: Sequence[str], inputs: Mapping[str, Any]
) -> list[Scored]:
    """Score one continuation per prompt, all in one forward pass.

    A continuation's tokens are those after the longest beginning that the tokens of the prompt and of prompt plus
    continuation share.

    Args:
        texts: the prompts as the chat template makes them.
        inputs: what the model takes of each `joined` prompt and continuation, left padded.

    Raises:
        InputError: the processor does not leave the continuation at the end of the model's input.
    """
    tails = [_tail(tokenizer, *pair) for pair in zip(texts, continuations, strict=True)]
    for ids, tail, continuation in zip(inputs["input_ids"].tolist(), tails, continuations, strict=True):
        if ids[len(ids) - len(tail) :] != tail:
            raise InputError("continuation", continuation, "the processor does not leave it at the end of the input")
    kept = max(map(len, tails)) + 1
    with torch.inference_mode():
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits[:, -kept:].float()
    scored = []
    for row, tail in zip(logits, tails, strict=True):
        logprobs = row[kept - 1 - len(tail) : kept - 1].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(tail, dtype=torch.long, device=row.device)[:, None])[:, 0]
        scored.append(Scored(tuple(tail), tuple(chosen.tolist()), logprobs.argmax(-1).tolist() == tail))
    return scored


def first_distinguishing(options: Sequence[Scored]) -> list[float]:
    """Per option of one document, the log-probability (nats) of its first token that not all options share.

    NaN for an option that ends before such a token.
    """
    shared = 0
    if len(options) > 1:
        columns = zip(*(option.token_ids for option in options), strict=False)
        shared = next((place for place, ids in enumerate(columns) if len(set(ids)) > 1), min(map(_length, options)))
    return [option.logprobs[shared] if _length(option) > shared else float("nan") for option in options]


def _length(option: Scored) -> int:
    return len(option.token_ids)


def _tail(tokenizer: Any, text: str, continuation: str) -> list[int]:
    prompt, whole = tokenizer(text)["input_ids"], tokenizer(joined(text, continuation))["input_ids"]
    shared = next((at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return [int(index) for index in whole[shared:]]
