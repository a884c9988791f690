"""Wrappers of lmms-eval on a task of this package, without the evaluator around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger

from lmms_keyspace import harness
from lmms_keyspace.model_wrappers.keyspace_vlm import KeyspaceLlava

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
        self._dataset = task.dataset
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
        content = [part for message in messages(self._dataset[split][doc_id]) for part in message["content"]]
        return any(part["type"] == "image" for part in content)

    def answer(self, wrapper: Any) -> list[str]:
        """The wrapper's answers, in order."""
        wrapper.task_dict[TASK] = self._dataset
        for instance in self.instances:  # the stock wrapper writes into the settings of its requests
            context, messages, kwargs, *rest = instance.arguments
            kept = {name: value for name, value in kwargs.items() if name != "image_sizes"}
            instance.arguments = (context, messages, kept, *rest)
        return [result.text for result in wrapper.generate_until(self.instances)]


def ours(requests: Requests, *, batch: int, capture: bool, pretrained: Path | None = None) -> Callable[[], object]:
    """`keyspace_llava`, loaded and ready to answer; with capture the tables are made too."""
    given = {} if pretrained is None else {"pretrained": str(pretrained)}
    wrapper = KeyspaceLlava(
        batch_size=batch, device="cpu", dtype="float32", capture="on" if capture else "off", **given
    )

    def answer() -> list[str]:
        answers = requests.answer(wrapper)
        captured = wrapper._recorder.observed.capture
        if captured is not None:
            captured.token_table()
            captured.attention_table()
        return answers

    return answer


def stock(requests: Requests, pretrained: Path) -> Callable[[], object]:
    """lmms-eval's own `llava_hf`, loaded and ready to answer; it takes one document at a time."""
    from lmms_eval.models.chat.llava_hf import LlavaHf  # needs decord, which lmms-eval does not require

    wrapper = LlavaHf(pretrained=str(pretrained), device="cpu", device_map="cpu", dtype="float32", batch_size=1)
    return lambda: requests.answer(wrapper)


def quiet() -> None:
    """No log lines between the rows of a table."""
    logger.remove()
