"""From prompts and images to the inputs of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lmms_keyspace.model_wrappers.naming import naming
from lmms_keyspace.model_wrappers.prompts import Asked

# Inputs with one entry per token, after the mask that tells padding, and the end that padding belongs to.
_PADDED = (
    ("attention_mask", ("input_ids", "token_type_ids", "mm_token_type_ids"), "left"),
    ("qformer_attention_mask", ("qformer_input_ids",), "right"),
)


def encode(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
    """Run the processor on a batch.

    Args:
        processor: the model's own.
        texts: the prompts, with placeholders for the images.
        images: per prompt, in order; may be empty.

    Returns:
        The processor's output; `input_ids` and `attention_mask` are `[B, P]` with all padding on the left.
    """
    shown = [list(row) for row in images] if any(images) else None
    inputs = processor(text=list(texts), images=shown, padding=True, return_tensors="pt")
    # InstructBLIP's processor puts the image before the padding, and pads the instruction of its Q-Former, which has
    # absolute positions, as it pads the prompt.
    for mask, names, side in _PADDED:
        if mask in inputs:
            order = inputs[mask].argsort(dim=1, stable=True, descending=side == "right")
            for name in (mask, *names):
                if name in inputs:
                    inputs[name] = inputs[name].gather(1, order)
    return inputs


class Encoded(NamedTuple):
    """A batch as the model takes it."""

    images: list[list[Any]]  # per request
    inputs: Any  # the processor's output


def encode_requests(processor: Any, requests: Sequence[Asked], texts: Sequence[str]) -> Encoded:
    """`encode` with the images of requests that were read together, each made ready once.

    Args:
        texts: the requests' prompts, or longer ones that begin with them.
    """
    images = [request.images() for request in requests]
    with requests[0].pictures.reused(processor, images, [request.shown for request in requests]):
        return Encoded(images, encode(processor, texts, images))


def tokens_of_an_image(processor: Any, request: Asked, image_token_id: int) -> int:
    """How many tokens stand for an image of a request that shows some.

    Raises:
        RuntimeError: its images cannot be read; names the task and the document.
    """
    with naming([request]):
        images = request.images()
        ids = encode(processor, [request.text], [images])["input_ids"]
    return int((ids == image_token_id).sum()) // len(images)
