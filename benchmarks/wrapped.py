"""Wrappers of lmms-eval on a task of this package, without the evaluator around them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger

from lmms_keyspace import harness
from lmms_keyspace.model_wrappers.assembly import assemble
from lmms_keyspace.model_wrappers.generation import batches
from lmms_keyspace.model_wrappers.keyspace_vlm import KeyspaceLlava
from lmms_keyspace.model_wrappers.prompts import Request, read_requests
from lmms_keyspace.store import write_run

TASK = "textbias_probe"


class Requests:
    """The requests of the text bias probe.

    Args:
        pictures: only the first so many documents that show a picture (the stock wrapper cannot run the others under
            transformers 5); None: all 1,800.
        new_tokens: tokens of an answer; None: as the task says.
    """

    def __init__(self, pictures: int | None = None, new_tokens: int | None = None) -> None:
        manager = TaskManager(
            include_path=str(harness.tasks_folder()), include_defaults=False, model_name="keyspace_llava"
        )
        task = get_task_dict([TASK], manager, "chat")[TASK]
        task.build_all_requests(
            limit=None,
            rank=0,
            world_size=1,
            cache_requests=False,
            rewrite_requests_cache=False,
            system_instruction=None,
            apply_chat_template=False,
            fewshot_as_multiturn=False,
            chat_template=None,
            tokenizer_name="",
        )
        self.dataset = task.dataset
        self.instances: list[Instance] = task.instances
        if pictures is not None:
            self.instances = [instance for instance in self.instances if self._shows_picture(instance)][:pictures]
        if new_tokens is not None:
            for instance in self.instances:
                context, messages, kwargs, *rest = instance.arguments
                more = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
                instance.arguments = (context, messages, kwargs | more, *rest)

    def _shows_picture(self, instance: Instance) -> bool:
        _, messages, _, doc_id, _, split = instance.arguments
        content = [part for message in messages(self.dataset[split][doc_id]) for part in message["content"]]
        return any(part["type"] == "image" for part in content)

    def answer(self, wrapper: Any) -> list[str]:
        """The wrapper's answers, in order."""
        wrapper.task_dict[TASK] = self.dataset
        for instance in self.instances:  # the stock wrapper writes into the settings of its requests
            context, messages, kwargs, *rest = instance.arguments
            kept = {name: value for name, value in kwargs.items() if name != "image_sizes"}
            instance.arguments = (context, messages, kept, *rest)
        return [result.text for result in wrapper.generate_until(self.instances)]


def ours(requests: Requests, *, batch: int, capture: bool, pretrained: Path | None = None) -> KeyspaceLlava:
    """`keyspace_llava`, loaded and ready to answer."""
    given = {} if pretrained is None else {"pretrained": str(pretrained)}
    wrapper = KeyspaceLlava(
        batch_size=batch, device="cpu", dtype="float32", capture="on" if capture else "off", **given
    )
    wrapper.task_dict[TASK] = requests.dataset
    return wrapper


class CutRun:
    """A run of `keyspace_llava` that can be timed piece by piece: `start`, each of `parts`, `end`.

    Args:
        per_part: documents of a part, whole batches in the order in which an uncut run answers them.
    """

    def __init__(self, wrapper: KeyspaceLlava, requests: Requests, per_part: int) -> None:
        self._wrapper, self._requests, self._per_part = wrapper, requests, per_part
        self._read: list[Request] = []

    def start(self) -> None:
        """Read every request; with capture, label all prompts and draw the sample."""
        read = read_requests(self._requests.instances, self._wrapper.task_dict, self._wrapper.loaded.processor)
        self._wrapper._recorder.plan(read)
        self._read = [read[index] for _, indices in batches(read, self._wrapper.batch_size) for index in indices]

    @property
    def parts(self) -> list[Callable[[], object]]:
        """Answer the documents of each part."""
        starts = range(0, len(self._read), self._per_part)
        return [partial(self._wrapper._answers, self._read[first : first + self._per_part]) for first in starts]

    def end(self) -> None:
        """Make the tables, measure the divergence, write the files."""
        with tempfile.TemporaryDirectory() as folder:
            write_run(Path(folder), "20260101_000000", assemble(self._wrapper._recorder.observed))


def stock(requests: Requests, pretrained: Path) -> Callable[[], object]:
    """lmms-eval's own `llava_hf`, loaded and ready to answer; it takes one document at a time."""
    from lmms_eval.models.chat.llava_hf import LlavaHf  # needs decord, which lmms-eval does not require

    wrapper = LlavaHf(pretrained=str(pretrained), device="cpu", device_map="cpu", dtype="float32", batch_size=1)
    return lambda: requests.answer(wrapper)


def quiet() -> None:
    """No log lines between the rows of a table."""
    logger.remove()
