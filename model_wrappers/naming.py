"""What goes wrong while documents are worked on says which they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from loguru import logger

from lmms_keyspace.errors import InputError
from lmms_keyspace.model_wrappers.prompts import Asked


def names(rows: Sequence[Asked]) -> str:
    """The documents of a batch, by task."""
    documents: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        documents[row.task].append(row.doc_id)
    return "; ".join(f"{task}, document {', '.join(map(str, ids))}" for task, ids in documents.items())


@contextmanager
def naming(rows: Sequence[Asked]) -> Iterator[None]:
    """An error inside names the documents.

    Raises:
        InputError, torch.OutOfMemoryError: as they were raised inside.
        RuntimeError: in place of any other error.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"{names(rows)}: {type(error).__name__}: {error}") from error
    except BaseException:
        logger.error(f"stopped at {names(rows)}")
        raise
