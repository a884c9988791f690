"""The documents of the generated probes: one dictionary per case, and what a model is shown of it.

Functions named in the task YAML files take the documents of one task, whose settings are a line of JSON beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import BEFORE
from lmms_keyspace.tasks import chinese, pictures
from lmms_keyspace.tasks.groups import LETTERS
from lmms_keyspace.tasks.probes import Case, cases

if TYPE_CHECKING:
    from datasets import Dataset

WORD, LETTER = ANSWER_FORMS = ("word", "letter")
LANGUAGES = ("en", "zh")


def build_documents(
    n_groups: int, answer: str = WORD, space: str = "probe", probe: str = "textbias_probe", lang: str = "en"
) -> list[dict[str, Any]]:
    """The documents of the first `n_groups` groups; those of a group are consecutive, in the order of its conditions.

    Args:
        n_groups: number of groups.
        answer: `word` (answers are the words of the family's pool) or `letter` (answers are four lettered options).
        space: seed space of the scene generator.
        probe: a probe of `lmms_keyspace.tasks.probes`.
        lang: `en`, or `zh` with one-word answers.

    Raises:
        InputError: an unknown answer form, space, probe or language, fewer than one group, or what is not translated.
    """
    if answer not in ANSWER_FORMS:
        raise InputError("answer", answer, f"take one of {', '.join(ANSWER_FORMS)}")
    if lang not in LANGUAGES or (lang == "zh" and answer != WORD):
        raise InputError("lang", lang, "take en, or zh with one-word answers")
    return [_document(case, answer, lang) for case in cases(probe, n_groups, space, lang)]


def generator_tag(documents: Sequence[dict[str, Any]]) -> str:
    """`<generator version>:<16 hex digits>`, the digits being the sha256 of all documents in canonical JSON."""
    text = json.dumps(documents, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{scenes.GENERATOR_VERSION}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def process_docs(dataset: Dataset) -> Dataset:
    """Turn a task's one-line settings file (columns probe, groups, answer, space, lang, generator) into its documents.

    Raises:
        InputError: the documents are not the ones the settings were published with.
    """
    from datasets import Dataset

    settings = dataset[0]
    documents = build_documents(
        settings["groups"], settings["answer"], settings["space"], settings["probe"], settings["lang"]
    )
    tag = generator_tag(documents)
    if tag != settings["generator"]:
        raise InputError(
            "generator",
            settings["generator"],
            f"the generator changed and now makes documents {tag}, whose results cannot be compared with earlier ones; "
            "install the version the task was published with, or publish the new tag in the task's jsonl and yaml",
        )
    # What a model should write is told to the wrapper, which gives its log-probabilities; it is not part of the tag.
    return Dataset.from_list([document | {"answers": _answers(document)} for document in documents])


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a document: one, or none where the condition takes it away."""
    picture = pictures.picture(doc["image"], doc["spec"])
    return [] if picture is None else [picture]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """One user turn: the picture, where there is one, then the text; in `before` the sentence precedes the picture."""
    images = [{"type": "image", "url": picture} for picture in doc_to_visual(doc)]
    text = doc["prompt"]
    if doc["condition"] == BEFORE:
        text = text.removeprefix(doc["context"]).lstrip()
        images.insert(0, {"type": "text", "text": doc["context"]})
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def _answers(document: dict[str, Any]) -> list[str]:
    """Every answer that could be right, as a model should write it: a word, or an option's letter."""
    options = document["options"]
    return list(LETTERS[: len(options)]) if options else document["pool"]


def _document(case: Case, answer: str, lang: str) -> dict[str, Any]:
    options = list(case.options) if answer == LETTER else []
    return {
        "group_id": case.group_id,
        "item_id": f"{case.group_id}/{case.condition}",
        "family": case.family,
        "condition": case.condition,
        "image": case.image,
        "spec": json.dumps(case.spec, sort_keys=True),
        "image_sha": pictures.sha(case.image, case.spec),
        "context": case.context,
        "question": case.question,
        "options": options,
        "options_text": "\n".join(f"{letter}. {word}" for letter, word in zip(LETTERS, options, strict=False)),
        "prompt": chinese.prompt(case.question, case.context)
        if lang == "zh"
        else scenes.prompt(case.question, context=case.context, options=options or None),
        "gold": case.gold,
        "lure": case.lure,
        "target": LETTERS[options.index(case.gold)] if options else case.gold,
        "pool": options or list(case.pool),  # every word that counts as an answer
        "template": case.template,
        "lang": lang,
    }
