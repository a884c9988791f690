"""Bring together what the processes of a run know: their prompts before the first forward pass, the rest at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lmms_keyspace.model_wrappers.observed import Observed, ObservedTask
from lmms_keyspace.model_wrappers.ranks import Ranks
from lmms_keyspace.tokens import Prompt


def shared(tasks: Mapping[str, ObservedTask], ranks: Ranks) -> dict[str, ObservedTask]:
    """The tasks with the prompts of all processes, in document order: the same on every one of them."""
    if ranks.size == 1:
        return dict(tasks)
    mine = {
        name: {
            "generator": task.generator,
            "cluster_field": task.cluster_field,
            "prompts": [asdict(prompt) for prompt in task.prompts.values()],
        }
        for name, task in tasks.items()
    }
    together: dict[str, ObservedTask] = {}
    for part in ranks.share(json.dumps(mine).encode()):
        for name, told in json.loads(part).items():
            task = together.setdefault(name, ObservedTask({}, told["generator"], told["cluster_field"]))
            task.prompts.update((prompt["doc_id"], _prompt(prompt)) for prompt in told["prompts"])
    for task in together.values():
        task.prompts = dict(sorted(task.prompts.items()))
    return together


def merge(observed: Observed, ranks: Ranks) -> None:
    """Bring keys, attention, counts and option rows of all processes to rank 0; those of the others are let go."""
    if ranks.size == 1:
        return
    if observed.capture is not None:
        observed.capture.gather(ranks.gather)
    mine = {
        "batch_size": observed.batch_size,
        "options": observed.options,
        "images_of_intervention": sorted(observed.images_of_intervention),
        "tasks": {
            name: {
                "rows": task.rows_captured,
                "tokens": task.token_counts,
                "images": task.image_tokens,
                "images_absent": task.images_absent,
            }
            for name, task in observed.tasks.items()
        },
    }
    for part in ranks.gather_bytes(json.dumps(mine).encode())[1:]:
        _add(observed, json.loads(part))


def _add(observed: Observed, other: Mapping[str, Any]) -> None:
    observed.batch_size = min(observed.batch_size, other["batch_size"])
    observed.options.extend(other["options"])
    observed.images_of_intervention.update(other["images_of_intervention"])
    for name, counts in other["tasks"].items():
        task = observed.tasks[name]
        task.rows_captured += counts["rows"]
        task.token_counts.update(counts["tokens"])
        task.image_tokens.update(counts["images"])
        task.images_absent = sorted({*task.images_absent, *counts["images_absent"]})


def _prompt(told: Mapping[str, Any]) -> Prompt:
    return Prompt(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})
