"""The next batch is encoded in a thread while the model answers the one before: reading and resizing images is work of
the processor alone, during which a GPU would wait."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lmms_keyspace.model_wrappers.encoding import Encoded, encode_requests
from lmms_keyspace.model_wrappers.prompts import Request


class EncodingAhead:
    """Encodes batches, one of them ahead of time.

    Args:
        processor: the model's own.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._thread = ThreadPoolExecutor(1, "encoding")
        self._ahead: dict[tuple[int, ...], Future[Encoded]] = {}  # at most one, by the ids of its requests

    def begin(self, requests: Sequence[Request]) -> None:
        """Encode a batch now that will be taken later; an error is raised when it is taken."""
        if _name(requests) not in self._ahead:
            self._ahead = {_name(requests): self._thread.submit(self._encode, requests)}

    def take(self, requests: Sequence[Request]) -> Encoded:
        """A batch, whether it was begun or not."""
        encoded = self._ahead.pop(_name(requests), None)
        if encoded is not None:
            return encoded.result()
        if not self._ahead:
            return self._encode(requests)
        return self._thread.submit(self._encode, requests).result()  # the pictures are shared: one batch at a time

    def _encode(self, requests: Sequence[Request]) -> Encoded:
        return encode_requests(self._processor, requests, [request.text for request in requests])


def _name(requests: Sequence[Request]) -> tuple[int, ...]:
    return tuple(map(id, requests))
