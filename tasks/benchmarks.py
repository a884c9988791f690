"""MMMU and MMBench-CN under the conditions of the probes: the benchmark's own rows and prompts, with a hint before the
question or another picture.

The prompts are made by lmms-eval's own task code from a changed row, so that `clean` is what the stock task asks. Only
multiple-choice rows are used. Documents hold no picture: it is read from the benchmark again when it is needed.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import BLANK, MISMATCH, NO_IMAGE
from lmms_keyspace.tasks.groups import LETTERS
from lmms_keyspace.tasks.hints import IMAGE_MARK, hints
from lmms_keyspace.tasks.reported import probe_named

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

DATA = "LMMS_KEYSPACE_DATA"  # environment variable: a folder that holds the data sets under their names on the hub

_GRAY = (128, 128, 128)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies and what its rows mean; the stock task of lmms-eval is named `stock`."""

    stock: str
    path: str
    name: str | None
    split: str
    lang: str
    id_field: str
    family_field: str | None  # None: the subject within the id


BENCHMARKS = {
    "mmmu_val": Benchmark("mmmu_val", "lmms-lab-encoder/MMMU", None, "validation", "en", "id", None),
    "mmbench_cn_dev": Benchmark("mmbench_cn_dev", "lmms-lab-encoder/MMBench", "cn", "dev", "zh", "index", "category"),
}


def process_docs(dataset: Dataset) -> Dataset:
    """Turn a task's one-line settings file (columns benchmark, probe) into its documents.

    Raises:
        InputError: the benchmark's data cannot be found.
    """
    from datasets import Dataset

    settings = dataset[0]
    return Dataset.from_list(list(documents(settings["benchmark"], probe_named(settings["probe"]).conditions)))


def stock_rows(dataset: Dataset) -> Dataset:
    """The rows of a benchmark as they are, for a task with the settings column benchmark."""
    return _rows(dataset[0]["benchmark"])


def documents(benchmark: str, conditions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The documents of every usable row, those of a row together.

    A row is left out, with a warning that counts, when it is no multiple-choice row with a known answer, when a picture
    that it names is missing, and for `mismatch` when no other row has as many pictures that are not the same. MMBench's
    circular copies of a row (index of a million and more) are left out too.
    """
    about = BENCHMARKS[benchmark]
    rows = _rows(benchmark)
    present = {name: rows.data.column(name).is_valid().to_pylist() for name in rows.column_names if "image" in name}
    texts = rows.remove_columns(list(present))
    found = [(place, row, _options(row)) for place, row in enumerate(texts)]
    usable = [
        (place, row, options)
        for place, row, options in found
        if len(options) > 1
        and row["answer"] in options
        and all(name in present and present[name][place] for name in _images_of(row, options))
        and not (about.id_field == "index" and int(row["index"]) >= 1_000_000)
    ]
    pictures = _picture_hashes(rows.select_columns(list(present)))
    clusters = {place: _cluster(pictures, place, _images_of(row, options)) for place, row, options in usable}
    others = _others(benchmark, about, usable, clusters) if MISMATCH in conditions else {}
    kept = [entry for entry in usable if not others or entry[0] in others]
    if len(kept) < len(found):
        logger.warning(
            "%s: %d of %d rows are asked; the others are open questions, circular copies, or lack a picture",
            benchmark,
            len(kept),
            len(found),
        )
    for place, row, options in kept:
        other = others.get(place, place)
        for document in _row_documents(benchmark, about, place, row, options, other, conditions):
            yield document | {"cluster": clusters[place]}


def _picture_hashes(pictures: Dataset) -> dict[str, list[str]]:
    """sha256 of every picture's file by column, empty where there is none; no picture is decoded."""
    from datasets import Image as Picture

    for name in pictures.column_names:
        pictures = pictures.cast_column(name, Picture(decode=False))

    def sha(cell: dict[str, Any] | None) -> str:
        content = (cell or {}).get("bytes") or str((cell or {}).get("path") or "").encode()
        return hashlib.sha256(content).hexdigest() if content else ""

    return {name: [sha(cell) for cell in pictures[name]] for name in pictures.column_names}


def _row_documents(
    benchmark: str,
    about: Benchmark,
    place: int,
    row: Mapping[str, Any],
    options: Mapping[str, str],
    other: int,
    conditions: Sequence[str],
) -> Iterator[dict[str, Any]]:
    r = random.Random(f"{benchmark}/{row[about.id_field]}")
    gold = row["answer"]
    lure = r.choice([letter for letter in options if letter != gold])
    contexts = hints(about.lang, options, gold, lure, r)
    for condition in conditions:
        shown = {BLANK: "gray", NO_IMAGE: "none", MISMATCH: f"{benchmark}#{other}"}.get(
            condition, f"{benchmark}#{place}"
        )
        yield {
            "benchmark": benchmark,
            "row": place,
            "image_row": other if condition == MISMATCH else place,
            "group_id": str(row[about.id_field]),
            "item_id": f"{row[about.id_field]}/{condition}",
            "family": _family(about, row),
            "condition": condition,
            "image_sha": shown,
            "context": contexts.get(condition, ""),
            "question": row["question"],
            "options": list(options),
            "gold": gold,
            "lure": lure,
            "target": gold,
            "pool": list(options),
            "lang": about.lang,
        }


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a document in the order of the stock task, RGB; none where the condition takes them away."""
    return _stock(doc["benchmark"], "doc_to_visual")(_changed_row(doc)) if doc["condition"] != NO_IMAGE else []


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The stock task's prompt of the changed row."""
    text: str = _stock(doc["benchmark"], "doc_to_text")(_changed_row(doc), lmms_eval_specific_kwargs)
    return text


def doc_to_messages(
    doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One user turn as the stock task builds it (MMMU puts its pictures between the words) from the changed row."""
    if doc["benchmark"] == "mmmu_val":
        turns: list[dict[str, Any]] = _stock("mmmu_val", "doc_to_messages")(
            _changed_row(doc), lmms_eval_specific_kwargs
        )
        return turns
    content: list[dict[str, Any]] = [{"type": "image", "url": picture} for picture in doc_to_visual(doc)]
    content.append({"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)})
    return [{"role": "user", "content": content}]


def stock_correct(doc: Mapping[str, Any], reply: str) -> float:
    """1.0 where lmms-eval's own scoring takes the reply for right (MMBench: its scoring without a judge), else 0.0.

    Where MMMU's cannot read a reply it draws an option at random.
    """
    row = _row(doc["benchmark"], doc["row"])
    scored = _stock(doc["benchmark"], "process_results")(row, [reply])
    if doc["benchmark"] == "mmmu_val":
        return float(_module("mmmu_val").evaluate_mmmu([scored["mmmu_acc"]])[1]["acc"])
    return static_accuracy([scored["gpt_eval_score"]])


def static_process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One reply to a stock MMBench-CN row, for `static_acc`."""
    return {"static_acc": _stock("mmbench_cn_dev", "process_results")(doc, results)["gpt_eval_score"]}


def static_accuracy(items: Sequence[dict[str, Any]]) -> float:
    """MMBench's circular accuracy as its evaluator counts it, without a judge: what it cannot read is wrong.

    A question counts when all of its circular copies among the items are answered right.
    """
    import pandas as pd

    judge = _module("mmbench_cn_dev").mmbench_evaluator
    frame = pd.DataFrame(items)
    answers = dict(zip(frame["index"], frame["answer"], strict=True))
    copies = frame.groupby(frame["index"] % 1_000_000)
    hits = [judge.eval_sub_data(group.reset_index(), answers, static_only=True) for _, group in copies]
    return sum(hits) / len(hits)


def _module(benchmark: str) -> Any:
    if benchmark == "mmmu_val":
        from lmms_eval.tasks.mmmu import utils

        return utils
    from lmms_eval.tasks.mmbench import cn_utils

    return cn_utils


def _stock(benchmark: str, function: str) -> Any:
    return getattr(_module(benchmark), f"{benchmark.split('_')[0]}_{function}")


@lru_cache(maxsize=4)
def _load(benchmark: str, root: str | None) -> Dataset:
    from datasets import Dataset, load_dataset, load_dataset_builder

    about = BENCHMARKS[benchmark]
    try:
        if root is None:
            return load_dataset(about.path, about.name, split=about.split)
        # Read by its files: for a folder `datasets` would take any other copy of that name from its cache.
        builder = load_dataset_builder(str(Path(root) / about.path), about.name)
        return Dataset.from_parquet(builder.config.data_files[about.split], features=builder.info.features)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            DATA,
            root,
            f"{about.path} cannot be read there or downloaded ({error}); name the folder that holds {about.path}",
        ) from error


def _rows(benchmark: str) -> Dataset:
    return _load(benchmark, os.environ.get(DATA))


def _row(benchmark: str, place: int) -> dict[str, Any]:
    row: dict[str, Any] = _rows(benchmark)[place]
    return row


def _changed_row(doc: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmark's row as the condition changes it: its question after the hint, its pictures replaced."""
    row = _row(doc["benchmark"], doc["row"])
    condition = doc["condition"]
    if condition == NO_IMAGE:
        row |= {field: IMAGE_MARK.sub("[image]", row[field]) for field in ("question", "options") if field in row}
    names = _images_of(row, _options(row)) if condition in (BLANK, MISMATCH) else []
    if condition == BLANK:
        row |= {name: Image.new("RGB", row[name].size, _GRAY) for name in names}
    elif condition == MISMATCH:
        other = _row(doc["benchmark"], doc["image_row"])
        row |= dict(zip(names, (other[name] for name in _images_of(other, _options(other))), strict=True))
    if doc["context"]:
        row["question"] = f"{doc['context']} {row['question']}"
    return row


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> text of a row's options; none for an open question."""
    if "options" in row:  # MMMU writes a Python list
        texts = ast.literal_eval(row["options"]) if row["question_type"] == "multiple-choice" else []
        return dict(zip(LETTERS, map(str, texts), strict=False))
    return {letter: row[letter] for letter in LETTERS[:5] if row.get(letter) not in (None, "", "nan")}


def _images_of(row: Mapping[str, Any], options: Mapping[str, str]) -> list[str]:
    """Columns of the pictures that a row shows, in the stock task's order."""
    if "options" not in row:
        return ["image"]
    marks = IMAGE_MARK.findall(" ".join((row["question"], *options.values())))
    return sorted({f"image_{mark}" for mark in marks})


def _family(about: Benchmark, row: Mapping[str, Any]) -> str:
    if about.family_field:
        return str(row[about.family_field])
    return str(row["id"]).split("_", 1)[-1].rsplit("_", 1)[0]


def _cluster(hashes: Mapping[str, Sequence[str]], place: int, names: Sequence[str]) -> str:
    """What rows that show the same pictures have in common."""
    return hashlib.sha256("".join(hashes[name][place] for name in names).encode()).hexdigest()[:16]


def _others(
    benchmark: str, about: Benchmark, usable: Sequence[tuple[int, Any, Any]], clusters: Mapping[int, str]
) -> dict[int, int]:
    """Row -> the row whose pictures `mismatch` shows: the next with as many, but other, pictures, by subject."""
    r = random.Random(f"{benchmark}/mismatch")
    ordered = sorted(r.sample(usable, len(usable)), key=lambda entry: _family(about, entry[1]))
    by_number: dict[int, list[int]] = {}
    for place, row, options in ordered:
        by_number.setdefault(len(_images_of(row, options)), []).append(place)
    found = {}
    for number, places in by_number.items():
        for i, place in enumerate(places) if number else ():
            following = places[i + 1 :] + places[:i]
            other = next((other for other in following if clusters[other] != clusters[place]), None)
            if other is not None:
                found[place] = other
    return found
