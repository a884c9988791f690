"""What two runs must have in common before their numbers may be put side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from lmms_keyspace.records import RunRecord, TaskRecord
from lmms_keyspace.reports.text import one_line

# Settings of a task that its version does not cover: the number of examples, the sampling of answers, the words around
# a question, and the model that judges (tasks name it in their metadata under different keys).
_TASK_SETTINGS = ("num_fewshot", "generation_kwargs", "lmms_eval_specific_kwargs", "repeats")
_JUDGE_WORDS = ("judge", "eval_model")


class TaskFingerprint(BaseModel):
    """What moves the answers to a task by itself. None: not recorded, and then not compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str | None
    documents: int | None
    settings: dict[str, str]
    generator: str | None = None
    prompt_hash: str | None = None
    image_tokens: dict[str, int] | None = None


class Fingerprint(BaseModel):
    """What moves the answers or the keys of a run by itself. None: not recorded, and then not compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: dict[str, TaskFingerprint]
    batch_size: str | None
    attn_implementation: str | None = None
    processor_hash: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    device: str | None = None
    transformers: str | None = None


def fingerprint(results: Mapping[str, Any], documents: Mapping[str, int], record: RunRecord | None) -> Fingerprint:
    """The fingerprint of a run from lmms-eval's results, the number of logged samples by task and our record."""
    tasks = {
        task: _task(task, results, documents.get(task), record.tasks.get(task) if record else None)
        for task in _mapping(results.get("results"))
    }
    if record is None:
        return Fingerprint(tasks=tasks, batch_size=_text(_mapping(results.get("config")).get("batch_size")))
    return Fingerprint(
        tasks=tasks,
        batch_size=str(record.batch_size),
        attn_implementation=record.attn_implementation,
        processor_hash=record.processor_hash,
        dtype=record.dtype,
        quantization=str(record.quantization),
        device=record.device,
        transformers=record.versions.get("transformers"),
    )


def mismatches(base: Fingerprint, run: Fingerprint) -> list[str]:
    """Every reason why two runs must not be compared, in words; only what both recorded counts."""
    found: list[str] = []
    for task in (task for task in base.tasks if task in run.tasks):
        found += _differing_tasks(task, base.tasks[task], run.tasks[task])
    found += _differing("batch size", base.batch_size, run.batch_size)
    found += _differing("attention implementation", base.attn_implementation, run.attn_implementation)
    found += _differing("processor", _short(base.processor_hash), _short(run.processor_hash))
    return found


def other_benchmark(task: str, base: TaskFingerprint, run: TaskFingerprint) -> list[str]:
    """Every reason why two models were not asked the same; prompts and image tokens are each model's own."""
    found = [*_differing(f"{task} version", base.version, run.version)]
    found += _differing(f"{task} generator", base.generator, run.generator)
    found += _differing(f"{task} documents", base.documents, run.documents)
    for name in sorted(base.settings.keys() & run.settings.keys()):
        found += _differing(f"{task} {name}", base.settings[name], run.settings[name])
    return found


def remarks(base: Fingerprint, run: Fingerprint) -> list[str]:
    """What may move values slightly, or is the very thing that a user compares: said, not refused."""
    return [
        *_differing("dtype", base.dtype, run.dtype),
        *_differing("quantization", base.quantization, run.quantization),
        *_differing("device", base.device, run.device),
        *_differing("transformers", base.transformers, run.transformers),
    ]


def _task(task: str, results: Mapping[str, Any], documents: int | None, record: TaskRecord | None) -> TaskFingerprint:
    config = _mapping(_mapping(results.get("configs")).get(task))
    settings = {name: str(config[name]) for name in _TASK_SETTINGS if config.get(name) is not None}
    for name, value in _mapping(config.get("metadata")).items():
        if any(word in str(name).lower() for word in _JUDGE_WORDS):
            settings[f"judge ({name})"] = str(value)
    return TaskFingerprint(
        version=_text(_mapping(results.get("versions")).get(task)),
        documents=documents,
        settings=settings,
        generator=record.generator if record else None,
        prompt_hash=record.prompt_hash if record else None,
        image_tokens=record.image_tokens if record else None,
    )


def _differing_tasks(task: str, base: TaskFingerprint, run: TaskFingerprint) -> Iterator[str]:
    prompts = _short(base.prompt_hash), _short(run.prompt_hash)
    yield from _differing(f"{task} prompt hash (wording, order or --limit)", *prompts)
    yield from _differing(f"{task} image tokens", base.image_tokens, run.image_tokens)
    # Where the prompts are known to agree, so does their number; samples may not have been logged.
    documents = base.documents if None in prompts else None
    yield from other_benchmark(task, base.model_copy(update={"documents": documents}), run)


def _differing(what: str, of_base: object, of_run: object) -> list[str]:
    known = of_base is not None and of_run is not None
    if not known or of_base == of_run:
        return []
    return [f"{one_line(what)} is {one_line(str(of_run))}, the base has {one_line(str(of_base))}"]


def _short(digest: str | None) -> str | None:
    return digest[:12] if digest else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
