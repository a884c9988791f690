"""What lmms-eval asks for, read once: the prompt's text, and how to get its images when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.protocol import ChatMessages

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import DEFAULT_CONDITION


@dataclass(frozen=True)
class Request:
    """One request. Images are not kept: `images()` asks the task for them again, so that memory stays bounded."""

    task: str
    doc_id: int
    cluster: str
    condition: str
    generator: str | None  # of the probe that made the document, else None
    cluster_field: str | None
    segments: Mapping[str, str]
    text: str  # the chat template's output, one placeholder per image
    content: tuple[str, ...]  # the messages' own text parts, in order
    generation_kwargs: Mapping[str, Any]
    counted: bool  # False for the harness's padding clones and for repeats of a request
    messages: Callable[[], ChatMessages]

    def images(self) -> list[Any]:
        return list(self.messages().extract_media()[0])


def read_requests(instances: Sequence[Instance], datasets: Mapping[str, Any], processor: Any) -> list[Request]:
    """Read chat requests of lmms-eval, in order; see `_read`."""
    seen: set[tuple[str, int]] = set()
    requests = []
    for instance in instances:
        request = _read(instance, datasets, processor)
        name = (request.task, request.doc_id)
        requests.append(replace(request, counted=request.counted and name not in seen))
        if request.counted:
            seen.add(name)
    return requests


def _read(instance: Instance, datasets: Mapping[str, Any], processor: Any) -> Request:
    """Read one chat request of lmms-eval.

    A task's metadata may hold a `keyspace` block that names document fields: `cluster`, `condition`, and `segments`
    (segment -> field); see docs/probes.md. Without one every document is a cluster of its own.

    Raises:
        InputError: the task shows videos or audio, or its `keyspace` block names a field that documents lack.
    """
    _, doc_to_messages, generation_kwargs, doc_id, task, split = instance.args
    doc = datasets[task][split][doc_id]
    declared = (instance.metadata or {}).get("keyspace") or {}

    def messages() -> ChatMessages:
        # Reads the document again: holding every document would hold every image of the benchmark.
        return ChatMessages(messages=doc_to_messages(datasets[task][split][doc_id]))

    first = ChatMessages(messages=doc_to_messages(doc))
    images, videos, audios = first.extract_media()
    if videos or audios:
        raise InputError("tasks", task, f"document {doc_id} holds video or audio; these wrappers take images and text")
    content = tuple(part.text for message in first.messages for part in message.content if part.type == "text")
    if hasattr(processor, "qformer_tokenizer"):  # InstructBLIP has no chat template and puts the image in front
        if len(images) != 1:
            raise InputError("tasks", task, f"document {doc_id} shows {len(images)} images; this model takes one")
        text = "\n".join(content)
    elif processor.chat_template:
        text = processor.apply_chat_template(first.to_hf_messages(), add_generation_prompt=True, tokenize=False)
    else:
        name = type(processor).__name__
        raise InputError("pretrained", name, "its processor has no chat template; use a checkpoint that has one")

    def field(name: str, where: str) -> str:
        if name not in doc:
            raise InputError("tasks", task, f"its metadata names {where}: {name}, a field that document {doc_id} lacks")
        return str(doc[name])

    cluster_field = declared.get("cluster")
    condition_field = declared.get("condition")
    return Request(
        task=task,
        doc_id=doc_id,
        cluster=field(cluster_field, "cluster") if cluster_field else str(doc_id),
        condition=field(condition_field, "condition") if condition_field else DEFAULT_CONDITION,
        generator=declared.get("generator"),
        cluster_field=cluster_field,
        segments={name: field(value, f"segment {name}") for name, value in (declared.get("segments") or {}).items()},
        text=text,
        content=content,
        generation_kwargs=generation_kwargs,
        counted="__padding_only__" not in (instance.metadata or {}),
        messages=messages,
    )
