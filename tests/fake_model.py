"""Models with known answers, run through lmms-eval's own evaluator on our tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager

import lmms_keyspace.tasks

FOLDER = Path(lmms_keyspace.tasks.__file__).parent

Reply = Callable[[dict[str, Any]], str]


class Fake(lmms):
    """Answers by a function of the document; keeps the messages it was sent."""

    is_simple = False
    # What the tasks must ask for.
    settings: ClassVar[dict[str, Any]] = {
        "max_new_tokens": 8,
        "temperature": 0.0,
        "do_sample": False,
        "until": ["<|never|>"],
    }

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply
        self.turns: dict[str, list[dict[str, Any]]] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        replies = []
        for request in requests:
            _, doc_to_messages, settings, doc_id, task, split = request.args
            assert self.settings.items() <= settings.items()
            doc = self.task_dict[task][split][doc_id]
            (turn,) = doc_to_messages(doc)
            assert turn["role"] == "user"
            self.turns[doc.get("item_id", doc_id)] = turn["content"]
            replies.append(self.reply(doc))
        return replies

    def clean(self) -> None:
        """Nothing to free; the harness would collect garbage twice."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


def run(
    reply: Reply, task: str = "textbias_probe_quick", limit: int | None = None, fake: type[Fake] = Fake
) -> tuple[dict[str, Any], list[dict[str, Any]], Fake]:
    """The results of one task without the filter suffix, its samples, and the model."""
    model = fake(reply)
    out = evaluator.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=_tasks(),
        limit=limit,
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    results = {key.removesuffix(",none"): value for key, value in out["results"][task].items()}
    json.dumps(results, allow_nan=False)
    return results, out["samples"][task], model


@lru_cache(maxsize=1)
def _tasks() -> TaskManager:
    return TaskManager(include_path=str(FOLDER), include_defaults=False)


def said(doc: dict[str, Any], word: str) -> str:
    """A word in the form the task asks for."""
    return "ABCD"[doc["options"].index(word)] if doc["options"] else word


def expect(results: dict[str, Any], **values: Any) -> None:
    assert {key: results[key] for key in values} == {
        key: value if isinstance(value, str) or value is None else pytest.approx(value) for key, value in values.items()
    }
