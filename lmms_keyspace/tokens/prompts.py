"""One document's prompt, and where in its text the parts are that a task or a chat template names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmms_keyspace.errors import InputError
from lmms_keyspace.tokens.boilerplate import TEXT_SEGMENTS


@dataclass(frozen=True)
class Prompt:
    """One document's prompt, as the processor gets it.

    Attributes:
        doc_id: the harness's number of the document in its task.
        cluster: documents that belong together (conditions of one question); sampled and resampled as one.
        text: chat-template output with one placeholder token per image; none where the processor puts the image in
            front of the text by itself.
        segments: hint | question | options -> its words, which occur in `text`; an empty string means absent.
        image_shas: one per image, in order; may be empty when unknown.
        content: the user's words as they went into the chat template, in order; what lies outside is template.
    """

    task: str
    doc_id: int
    cluster: str
    condition: str
    text: str
    segments: Mapping[str, str] = field(default_factory=dict)
    image_shas: tuple[str, ...] = ()
    content: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.task} document {self.doc_id}"


def segment_spans(prompt: Prompt) -> dict[str, tuple[int, int]]:
    """Where the words of each declared segment are in the text.

    Raises:
        InputError: a declared segment does not occur in the text, or has an unknown name.
    """
    spans: dict[str, tuple[int, int]] = {}
    # Longest first: a short option must not be taken for the same word inside the question.
    for name, words in sorted(prompt.segments.items(), key=lambda item: (-len(item[1]), item[0])):
        if name not in TEXT_SEGMENTS:
            raise InputError("segments", name, f"segments are named {', '.join(TEXT_SEGMENTS)}")
        words = words.strip()
        if not words:
            continue
        start = prompt.text.find(words)
        while start >= 0 and any(start < end and start + len(words) > begin for begin, end in spans.values()):
            start = prompt.text.find(words, start + 1)
        if start < 0:
            raise InputError(
                f"segments.{name}",
                words,
                f"it does not occur in the prompt of {prompt.name}; name a field whose words are in the prompt",
            )
        spans[name] = (start, start + len(words))
    return spans


def content_spans(prompt: Prompt) -> list[tuple[int, int]] | None:
    """Where the user's words are; empty when none were given, None when they are not in the text."""
    spans, position = [], 0
    for part in prompt.content:
        words = part.strip()  # chat templates trim
        start = prompt.text.find(words, position)
        if start < 0:
            return None
        position = start + len(words)
        spans.append((start, position))
    return spans
