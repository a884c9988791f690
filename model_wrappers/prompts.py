"""What lmms-eval asks for, read once: the prompt's text, and how to get its images when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.protocol import ChatMessages

from lmms_keyspace.errors import InputError
from lmms_keyspace.model_wrappers.absent_images import messages_of
from lmms_keyspace.model_wrappers.pictures import Pictures
from lmms_keyspace.records import DEFAULT_CONDITION


@dataclass(frozen=True)
class Asked:
    """What a request asks of the model. Of a large benchmark only the first images are kept, the others `images()` asks
    the task for again: memory stays bounded."""

    task: str
    doc_id: int
    text: str  # the chat template's output, one placeholder per image
    shown: tuple[Hashable, ...]  # names of its pictures
    messages: Callable[[], ChatMessages]
    pictures: Pictures  # of all requests that were read together

    @property
    def images_shown(self) -> int:
        return len(self.shown)

    def images(self) -> list[Any]:
        return list(self.messages().extract_media()[0])


@dataclass(frozen=True)
class ContinuationRequest(Asked):
    """One log-likelihood request: how probable `continuation` is after the prompt."""

    continuation: str


@dataclass(frozen=True)
class Request(Asked):
    """One request to generate an answer."""

    cluster: str
    condition: str
    generator: str | None  # of the probe that made the document, else None
    cluster_field: str | None
    segments: Mapping[str, str]
    content: tuple[str, ...]  # the messages' own text parts, in order
    options: tuple[str, ...]  # answers whose log-probability may be asked for
    image_sha: str  # of the picture, where the document names it; else empty
    images_absent: int  # that the document names and does not hold; the prompt goes without them
    generation_kwargs: Mapping[str, Any]
    counted: bool  # False for the harness's padding clones and for repeats of a request

    def ask_options(self) -> Iterator[ContinuationRequest]:
        """How probable each option is as the answer."""
        for option in self.options:
            self.pictures.expect(self.shown)
            yield ContinuationRequest(
                self.task, self.doc_id, self.text, self.shown, self.messages, self.pictures, option
            )


def read_requests(instances: Sequence[Instance], datasets: Mapping[str, Any], processor: Any) -> list[Request]:
    """Read chat requests of lmms-eval, in order; see `_read`."""
    seen: set[tuple[str, int]] = set()
    requests = []
    pictures = Pictures()
    for instance in instances:
        request = _read(instance, datasets, processor, pictures)
        name = (request.task, request.doc_id)
        requests.append(replace(request, counted=request.counted and name not in seen))
        if request.counted:
            seen.add(name)
    return requests


def _read(instance: Instance, datasets: Mapping[str, Any], processor: Any, pictures: Pictures) -> Request:
    """Read one chat request of lmms-eval; `pictures` keeps what it shows, as far as there is room.

    A task's metadata may hold a `keyspace` block that names document fields: `cluster`, `condition`, `options` (a list
    of answers), and `segments` (segment -> field); see docs/probes.md. Without one every document is a cluster of its
    own, and `options` is the field of that name if it holds a list. With one, the field `image_sha`, if there is one,
    is taken for the hash of the document's picture.

    Raises:
        InputError: the task shows videos or audio, or its `keyspace` block names a field that documents lack.
    """
    _, doc_to_messages, generation_kwargs, doc_id, task, split = instance.args
    dataset = datasets[task][split]
    doc = dataset[doc_id]
    declared = (instance.metadata or {}).get("keyspace") or {}

    first, absent = messages_of(doc, dataset, doc_to_messages)
    shown, messages = _kept(pictures, first, lambda: messages_of(dataset[doc_id], dataset, doc_to_messages)[0])
    text, content = _prompt_text(first, processor, task, doc_id)

    def field(name: str, where: str) -> str:
        if name not in doc:
            raise InputError("tasks", task, f"its metadata names {where}: {name}, a field that document {doc_id} lacks")
        return str(doc[name])

    if "options" in declared:
        field(declared["options"], "options")
    options = doc.get(declared.get("options", "options"))
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
        options=tuple(map(str, options)) if isinstance(options, list) else (),
        image_sha=str(doc.get("image_sha") or "") if declared else "",
        shown=shown,
        images_absent=absent,
        generation_kwargs=generation_kwargs,
        counted="__padding_only__" not in (instance.metadata or {}),
        messages=messages,
        pictures=pictures,
    )


def _kept(
    pictures: Pictures, first: ChatMessages, again: Callable[[], ChatMessages]
) -> tuple[tuple[Hashable, ...], Callable[[], ChatMessages]]:
    """Names of a request's pictures, and how to get its messages later: those read `first` where there is room for
    their pictures, else `again` from the task."""
    shown, whole = pictures.read(first)
    return shown, (lambda: first) if whole else again


def read_continuations(
    instances: Sequence[Instance], datasets: Mapping[str, Any], processor: Any
) -> list[ContinuationRequest]:
    """Read log-likelihood requests, in order.

    The arguments are (context, continuation, visuals, doc_id, task, split). The continuation is a string or a function
    of the document; `visuals` is a function of the document that gives its images (simple tasks; they are put before
    the context) or its messages (chat tasks). The pair (context, continuation), which asks without a document, shows
    no image.

    Raises:
        InputError: the task shows videos or audio.
    """
    pictures = Pictures()
    return [_read_continuation(instance, datasets, processor, pictures) for instance in instances]


def _read_continuation(
    instance: Instance, datasets: Mapping[str, Any], processor: Any, pictures: Pictures
) -> ContinuationRequest:
    context, target, *where = instance.args
    to_visuals, doc_id, task, split = where or (None, instance.doc_id, instance.task_name, None)

    def document() -> Any:
        return datasets[task][split][doc_id]

    def read() -> ChatMessages:
        visuals = to_visuals(document()) if to_visuals is not None else []
        if visuals and isinstance(visuals[0], dict) and "role" in visuals[0]:
            return ChatMessages(messages=visuals)
        content = [*({"type": "image", "url": image} for image in visuals or ()), {"type": "text", "text": context}]
        return ChatMessages(messages=[{"role": "user", "content": content}])

    first = read()
    shown, messages = _kept(pictures, first, read)
    text, _ = _prompt_text(first, processor, task, doc_id)
    continuation = target(document()) if callable(target) else target
    return ContinuationRequest(task, doc_id, text, shown, messages, pictures, str(continuation))


def _prompt_text(messages: ChatMessages, processor: Any, task: str, doc_id: int) -> tuple[str, tuple[str, ...]]:
    """The prompt as the processor takes it, and the messages' own text parts, in order."""
    images, videos, audios = messages.extract_media()
    if videos or audios:
        raise InputError("tasks", task, f"document {doc_id} holds video or audio; these wrappers take images and text")
    content = tuple(part.text for message in messages.messages for part in message.content if part.type == "text")
    if hasattr(processor, "qformer_tokenizer"):  # InstructBLIP has no chat template and puts the image in front
        if len(images) != 1:
            raise InputError("tasks", task, f"document {doc_id} shows {len(images)} images; this model takes one")
        return "\n".join(content), content
    if not processor.chat_template:
        name = type(processor).__name__
        raise InputError("pretrained", name, "its processor has no chat template; use a checkpoint that has one")
    text = processor.apply_chat_template(messages.to_hf_messages(), add_generation_prompt=True, tokenize=False)
    return text, content
