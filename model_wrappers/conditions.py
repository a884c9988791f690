"""Conditions that a model cannot tell apart: a chat template may undo what a task changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from lmms_keyspace.model_wrappers.prompts import Request


def same_prompts(requests: Iterable[Request]) -> list[list[str]]:
    """Sets of conditions of one task that are one prompt in every cluster that has them.

    Compared are the chat template's output, white space aside, and the picture. A template that puts pictures first,
    as that of LLaVA-1.5 does, makes one prompt of a sentence before the picture and of one after it: whatever a task
    reports of the difference is 0 by construction.
    """
    conditions: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for request in requests:
        conditions[request.cluster, request.image_sha, "".join(request.text.split())].add(request.condition)
    clusters: dict[str, set[str]] = defaultdict(set)
    for (cluster, _, _), names in conditions.items():
        for name in names:
            clusters[name].add(cluster)
    together: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for (cluster, _, _), names in conditions.items():
        if len(names) > 1:
            together[tuple(sorted(names))].add(cluster)
    return [
        list(names) for names, shared in sorted(together.items()) if all(clusters[name] == shared for name in names)
    ]
