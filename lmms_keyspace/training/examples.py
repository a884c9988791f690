"""What a model is trained on: conversations about images, read from a file or a `datasets` data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from lmms_keyspace.errors import InputError
from lmms_keyspace.training.config import DataSettings

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. `text` has `IMAGE_MARK` where an image stands."""

    role: str  # user | assistant | system
    text: str


@dataclass(frozen=True)
class Example:
    """A conversation about images.

    Attributes:
        name: of the row, for messages: its file and number, or its id.
        images: how to open each image, in the order of their marks; a call gives RGB.
        turns: the last one is the assistant's.
    """

    name: str
    images: tuple[Callable[[], Image.Image], ...]
    turns: tuple[Turn, ...]


def read_examples(data: DataSettings) -> Sequence[Example]:
    """The examples of a file or of a `datasets` data set; every image is opened once.

    Raises:
        InputError: nothing can be read there, a row has neither form, or an image does not open and may not be skipped.
    """
    rows = _file_rows(data.path) if data.path is not None else _dataset_rows(data)
    folder = data.image_folder or (data.path.parent if data.path is not None else Path())
    examples = [_example(name, row, data, folder) for name, row in rows]
    with _whole_images_only(), ThreadPoolExecutor() as pool:
        reasons = list(pool.map(_why_not, examples))
    if data.bad_images == "error":
        for example, reason in zip(examples, reasons, strict=True):
            if reason:
                raise InputError(example.name, reason, "mend the row, or leave such rows out with bad_images: skip.")
    return [example for example, reason in zip(examples, reasons, strict=True) if reason is None]


@contextmanager
def _whole_images_only() -> Iterator[None]:
    """Pillow fills up truncated images once any package asked for that; lmms-eval does."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _why_not(example: Example) -> str | None:
    for image in example.images:
        try:
            image()
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            return f"an image does not open ({error})"
    return None


def _file_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("data.path", str(path), f"it cannot be read: {error}") from error
    try:
        if text.lstrip().startswith("["):
            yield from ((f"{path.name} row {i}", row) for i, row in enumerate(json.loads(text)))
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{path.name} line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError("data.path", str(path), f"it is neither a JSON list nor JSON lines: {error}") from error


def _dataset_rows(data: DataSettings) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    assert data.dataset is not None
    try:
        if (Path(data.dataset) / "dataset_info.json").is_file() or (Path(data.dataset) / "dataset_dict.json").is_file():
            rows: Any = datasets.load_from_disk(data.dataset)
            rows = rows[data.split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(data.dataset, data.subset, split=data.split)
    except (OSError, ValueError, KeyError) as error:
        raise InputError("data.dataset", data.dataset, f"it cannot be loaded: {error}") from error
    plain = rows.cast_column(data.image_column, datasets.Image(decode=False)) if _has_images(rows, data) else rows
    for number in range(len(plain)):
        yield f"{data.dataset} row {number}", plain[number]


def _has_images(rows: Any, data: DataSettings) -> bool:
    import datasets

    return isinstance(rows.features.get(data.image_column), datasets.Image)


def _example(name: str, row: Mapping[str, Any], data: DataSettings, folder: Path) -> Example:
    if not isinstance(row, Mapping):
        raise InputError(name, row, "a row must be an object with names.")
    images = tuple(partial(_open, source, folder) for source in _sources(row.get(data.image_column)))
    if "conversations" in row:
        turns = tuple(_turn(name, turn) for turn in row["conversations"])
    elif data.question_column in row and data.answer_column in row:
        question, answer = str(row[data.question_column]), str(row[data.answer_column])
        turns = (Turn("user", question), Turn("assistant", answer))
    else:
        raise InputError(
            name,
            sorted(row),
            f"a row needs 'conversations', or the columns {data.question_column!r} and {data.answer_column!r}.",
        )
    if not turns or turns[-1].role != "assistant":
        raise InputError(name, [turn.role for turn in turns], "a conversation must end with an answer.")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks == 0 and images:
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        marked = Turn("user", f"{IMAGE_MARK}\n" * len(images) + turns[first].text)
        turns = (*turns[:first], marked, *turns[first + 1 :])
    elif marks != len(images):
        raise InputError(name, f"{marks} {IMAGE_MARK} marks, {len(images)} images", "give one mark for every image.")
    return Example(name, images, turns)


def _turn(name: str, turn: Any) -> Turn:
    if isinstance(turn, Mapping):
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role in _ROLES and isinstance(text, str):
            return Turn(_ROLES[role], text)
    raise InputError(name, turn, f"a turn needs 'from' (one of {', '.join(_ROLES)}) and 'value' (text).")


def _sources(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _open(source: Any, folder: Path) -> Image.Image:
    """An image in RGB from a path, the bytes that `datasets` stores, or an image."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Mapping):
        import io

        if source.get("bytes") is not None:
            with Image.open(io.BytesIO(source["bytes"])) as image:
                return image.convert("RGB")
        source = source["path"]
    with Image.open(folder / str(source)) as image:
        return image.convert("RGB")
