"""Documents that name an image which they do not hold: a task's own code stops at them, and with it the whole run.

MMMU's code in lmms-eval, for one, calls `convert` on every column that a question names, also on an empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
from lmms_eval.protocol import ChatMessages
from PIL import Image


class _Absent(Image.Image):
    """Stands for an image that is not there while the task writes its messages; lmms-eval's code looks at its type."""

    def convert(self, *_: Any, **__: Any) -> _Absent:
        return self


def messages_of(document: Mapping[str, Any], dataset: Any, write: Callable[[Any], Any]) -> tuple[ChatMessages, int]:
    """The messages that the task writes of a document, and how many images were left out because they are not there.

    Args:
        document: the row.
        dataset: where the row is from; its features, if it has any, say which columns are images. They are asked for
            only where the task's code stops: `datasets` copies them for everybody who asks.
        write: the task's `doc_to_messages`.

    Raises:
        AttributeError: as the task's code raised it, for any reason but an empty image column.
    """
    try:
        return ChatMessages(messages=write(document)), 0
    except AttributeError as error:
        empty = [
            name
            for name, kind in (getattr(dataset, "features", None) or {}).items()
            if isinstance(kind, datasets.Image) and document[name] is None
        ]
        if error.obj is not None or not empty:
            raise
    written = write({**document, **dict.fromkeys(empty, _Absent())})
    kept = [
        message | {"content": [part for part in message["content"] if not isinstance(part.get("url"), _Absent)]}
        for message in written
    ]
    left_out = sum(len(old["content"]) - len(new["content"]) for old, new in zip(written, kept, strict=True))
    return ChatMessages(messages=kept), left_out
