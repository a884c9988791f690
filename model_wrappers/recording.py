"""From prompts to a finished `RunData`: plan the sample, watch the batches, measure while the keys are held."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from loguru import logger

from lmms_keyspace import __version__, divergence
from lmms_keyspace.capture import Capture, Row
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.model_wrappers.arguments import Arguments
from lmms_keyspace.model_wrappers.loading import Loaded
from lmms_keyspace.model_wrappers.prompts import Request
from lmms_keyspace.records import TEXT, VISUAL, GramKey, KernelSums, RunData, RunRecord, TaskRecord
from lmms_keyspace.sampling import Sampler
from lmms_keyspace.stats import hash_ranks
from lmms_keyspace.tokens import Labeler, Prompt

# The sample of keys that is always saved, for pictures.
PICTURE_TOKENS = 2000
PICTURE_LAYERS = 4
_NO_POSITIONS = np.empty(0, np.int64)
_VERSIONED = ("lmms-eval", "torch", "transformers", "peft", "numpy", "pandas", "scipy")


@dataclass
class _Task:
    """What is known of one task; filled while the run goes on."""

    prompts: dict[int, Prompt]
    chosen: frozenset[str]
    generator: str | None
    cluster_field: str | None
    token_counts: Counter[str] = field(default_factory=Counter)
    image_tokens: Counter[str] = field(default_factory=Counter)

    def rows_selected(self) -> int:
        return sum(prompt.cluster in self.chosen for prompt in self.prompts.values())


class Recorder:
    """Watches one run of a wrapper.

    Call `plan` with all requests before the first forward pass, wrap every `generate` in `batch`, and call `finish`
    once at the end.
    """

    def __init__(self, loaded: Loaded, arguments: Arguments, *, model_name: str) -> None:
        self._loaded = loaded
        self._arguments = arguments
        self._model_name = model_name
        self._decoder = decoder_sites(loaded.model)
        self._sampler = Sampler(
            seed=arguments.seed, clusters=arguments.capture_clusters, tokens=arguments.capture_tokens
        )
        self._labeler = Labeler(loaded.processor.tokenizer, self._decoder.image_token_id)
        self._capture = (
            Capture(loaded.model, self._decoder, spaces=arguments.spaces, layers=arguments.layers or "all")
            if arguments.capture
            else None
        )
        # The adapter's own second pass; a base model is its own reference.
        self._second_pass = loaded.adapter is not None and arguments.reference == "self"
        self._tasks: dict[str, _Task] = {}

    def plan(self, requests: Sequence[Request]) -> None:
        """Label every prompt and draw the sample, from all requests at once, and say what memory it will take.

        Raises:
            InputError: a task's prompts come in pieces, so that labels would depend on how the run was cut.
        """
        by_task: dict[str, dict[int, Request]] = defaultdict(dict)
        for request in requests:
            if request.counted:
                by_task[request.task].setdefault(request.doc_id, request)
        again = sorted(self._tasks.keys() & by_task.keys())
        if again and self._capture is not None:
            raise InputError("capture", "on", f"the prompts of {again[0]} come in several calls; give capture=off")
        for name, members in by_task.items():
            prompts = {
                doc_id: Prompt(
                    task=name,
                    doc_id=doc_id,
                    cluster=request.cluster,
                    condition=request.condition,
                    text=request.text,
                    segments=request.segments,
                    content=request.content,
                )
                for doc_id, request in sorted(members.items())
            }
            first = next(iter(members.values()))
            self._tasks[name] = _Task(
                prompts=prompts,
                chosen=self._sampler.choose_clusters(name, [prompt.cluster for prompt in prompts.values()]),
                generator=first.generator,
                cluster_field=first.cluster_field,
            )
        if self._capture is None:
            return
        self._labeler.fit([prompt for task in self._tasks.values() for prompt in task.prompts.values()])
        for name, note in self._labeler.notes.items():
            logger.warning(f"{name}: {note}")
        selected = sum(task.rows_selected() for task in self._tasks.values())
        memory = self._capture.memory_estimate(
            selected,
            documents=sum(len(task.prompts) for task in self._tasks.values()),
            tokens=self._arguments.capture_tokens,
            reference=self._second_pass,
        )
        logger.info(
            f"capture: {selected} documents of {len(self._tasks)} task(s), layers {self._capture.layers}, "
            f"at most {memory / 1e6:.1f} MB on {self._loaded.device}"
        )

    @contextlib.contextmanager
    def batch(self, requests: Sequence[Request], inputs: Any) -> Iterator[None]:
        """Observe the `generate` call in the body; afterwards pass once more without the adapter where asked.

        Args:
            requests: row i of the batch answers `requests[i]`.
            inputs: the processor's output on the model's device, left padded.
        """
        if self._capture is None:
            yield
            return
        rows = self._rows(requests, inputs)
        with self._capture.batch(rows):
            yield
        if self._second_pass and any(len(row.positions) for row in rows):
            with self._capture.reference_batch(rows):
                self._loaded.model(**inputs, use_cache=False)

    def _rows(self, requests: Sequence[Request], inputs: Any) -> list[Row]:
        assert self._capture is not None
        grids = self._decoder.image_grids(inputs)
        next_image = 0
        rows = []
        for index, request in enumerate(requests):
            task = self._tasks[request.task]
            ids = inputs["input_ids"][index][inputs["attention_mask"][index].bool()].cpu().numpy()
            images = request.images()
            row_grids = grids[next_image : next_image + len(images)] if grids is not None else None
            next_image += len(images)
            prompt = task.prompts[request.doc_id]
            labels = self._labeler.label(prompt, ids, row_grids)
            new = request.counted and (request.task, request.doc_id) not in self._capture.captured
            positions = _NO_POSITIONS
            if new and prompt.cluster in task.chosen:
                positions = self._sampler.choose_positions(request.task, prompt.cluster, labels)
                prompt = replace(prompt, image_shas=tuple(_image_sha(image) for image in images))
                counts = labels.counts()
                task.token_counts.update(counts)
                task.image_tokens[str(counts.get(VISUAL, 0))] += 1
            rows.append(Row(prompt, ids, labels, positions))
        return rows

    def finish(self) -> RunData | None:
        """Measure divergence and put the run together; None when no request was planned."""
        if not self._tasks:
            return None
        if self._capture is None:
            return RunData(
                self._record({}, {}), {}, *(_empty(name) for name in ("divergence", "attention", "tokens")), {}
            )
        captured = Counter(task for task, _ in self._capture.captured)
        bandwidths: dict[str, dict[str, dict[int, list[float]]]] = {}
        tables: list[pd.DataFrame] = []
        gram: dict[GramKey, KernelSums] = {}
        for name in self._tasks:
            for space in self._arguments.spaces:
                found = self._bandwidths(name, space)
                bandwidths.setdefault(name, {})[space] = {layer: values.tolist() for layer, values in found.items()}
                for condition in self._conditions(name):
                    table, sums = self._measure(name, condition, space, found)
                    tables.append(table)
                    gram.update(sums)
        tokens = self._capture.token_table()
        tokens["keys_row"], keys = self._kept_keys(tokens)
        return RunData(
            record=self._record(bandwidths, captured),
            gram=gram,
            divergence=pd.concat(tables, ignore_index=True),
            attention=self._capture.attention_table(),
            tokens=tokens,
            keys=keys,
        )

    def _conditions(self, task: str) -> list[str]:
        return sorted({prompt.condition for prompt in self._tasks[task].prompts.values()})

    def _sides(
        self, task: str, condition: str | None, space: str, *, reference: bool = False
    ) -> tuple[dict[int, torch.Tensor], list[str], dict[int, torch.Tensor], list[str]]:
        """Visual and text keys by layer, each with the cluster of every row."""
        assert self._capture is not None
        keys: dict[str, dict[int, torch.Tensor]] = {VISUAL: {}, TEXT: {}}
        clusters: dict[str, list[str]] = {VISUAL: [], TEXT: []}
        for modality in (VISUAL, TEXT):
            for layer in self._capture.layers:
                keys[modality][layer], clusters[modality] = self._capture.keys(
                    task, condition, space, layer, modality, reference=reference
                )
        return keys[VISUAL], clusters[VISUAL], keys[TEXT], clusters[TEXT]

    def _bandwidths(self, task: str, space: str) -> dict[int, np.ndarray]:
        visual, _, text, _ = self._sides(task, None, space, reference=self._second_pass)
        if not all(len(side) for keys in (visual, text) for side in keys.values()):
            return {}
        return divergence.reference_bandwidths(visual, text, seed=self._arguments.seed)

    def _measure(
        self, task: str, condition: str, space: str, bandwidth2: dict[int, np.ndarray]
    ) -> tuple[pd.DataFrame, dict[GramKey, KernelSums]]:
        if not bandwidth2:
            return _empty("divergence"), {}
        visual, clusters_visual, text, clusters_text = self._sides(task, condition, space)
        return divergence.measure(
            visual,
            text,
            clusters_visual=clusters_visual,
            clusters_text=clusters_text,
            task=task,
            condition=condition,
            space=space,
            bandwidth2=bandwidth2,
            bandwidth_source=self._bandwidth_source(),
            connector=self._decoder.connector,
            token_filter=f"{VISUAL} against {TEXT}",
            seed=self._arguments.seed,
        )

    def _bandwidth_source(self) -> str:
        if self._loaded.adapter is None:
            return "base model, this run"
        return "base model, adapter disabled" if self._second_pass else "this run, adapted"

    def _kept_keys(self, tokens: pd.DataFrame) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
        """The keys to save: everything with `keep_keys`, else a sample of tokens and layers.

        Returns:
            The column `keys_row` of the token table, and task -> `<space>/<layer>[/base]` -> float32 keys.
        """
        assert self._capture is not None
        layers, limit = self._capture.layers, len(tokens)
        if not self._arguments.keep_keys:
            spread = np.linspace(0, len(layers) - 1, min(PICTURE_LAYERS, len(layers))).round().astype(int)
            layers, limit = [layers[index] for index in sorted(set(spread.tolist()))], PICTURE_TOKENS
        keys_row = np.full(len(tokens), -1, np.int64)
        keys: dict[str, dict[str, np.ndarray]] = {}
        for task in self._tasks:
            rows = np.flatnonzero((tokens["task"] == task).to_numpy())
            if not len(rows):
                continue
            names = [f"{t.doc_id}/{t.position}" for t in tokens.iloc[rows].itertuples()]
            picked = np.flatnonzero(hash_ranks(names, self._arguments.seed, task) < limit)
            keys_row[rows[picked]] = np.arange(len(picked))
            index = torch.from_numpy(picked).to(self._loaded.device)
            sources = [(False, ""), (True, "/base")] if self._second_pass else [(False, "")]
            keys[task] = {
                f"{space}/{layer}{suffix}": self._capture.keys(task, None, space, layer, reference=reference)[0][index]
                .float()
                .cpu()
                .numpy()
                for space in self._arguments.spaces
                for layer in layers
                for reference, suffix in sources
            }
        return keys_row, keys

    def _record(self, bandwidths: dict[str, Any], captured: dict[str, int]) -> RunRecord:
        loaded, arguments = self._loaded, self._arguments
        info = loaded.adapter_info
        tasks = {
            name: TaskRecord(
                documents=len(task.prompts),
                clusters=len({prompt.cluster for prompt in task.prompts.values()}),
                clusters_selected=len(task.chosen),
                rows_selected=task.rows_selected(),
                rows_captured=captured.get(name, 0),
                conditions=self._conditions(name),
                cluster_field=task.cluster_field,
                generator=task.generator,
                token_counts=dict(task.token_counts),
                image_tokens=dict(task.image_tokens),
                prompt_hash=_sha(f"{doc_id}\0{prompt.text}" for doc_id, prompt in task.prompts.items()),
                interpretable=task.generator is not None or not loaded.bundled,
            )
            for name, task in self._tasks.items()
        }
        sites = self._decoder.sites
        return RunRecord(
            date="",  # lmms-eval's, put in when the run is handed over
            model=self._model_name,
            pretrained=loaded.pretrained,
            revision=loaded.revision,
            architecture=self._decoder.architecture,
            connector=self._decoder.connector,
            adapter=loaded.adapter,
            adapter_method=info.method if info else None,
            adapter_sha256=info.sha256 if info else None,
            intervention=None,
            reference=arguments.reference if loaded.adapter else "self",
            capture=self._capture is not None,
            capture_settings={
                "spaces": list(arguments.spaces),
                "clusters": arguments.capture_clusters,
                "tokens": arguments.capture_tokens,
                "keep_keys": arguments.keep_keys,
            },
            seed=arguments.seed,
            versions={
                "lmms_keyspace": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in _VERSIONED},
            },
            device=str(loaded.device),
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            attn_implementation=arguments.attn_implementation,
            quantization=None,
            batch_size=arguments.batch_size,
            processor_hash=_sha([loaded.processor.to_json_string(), str(loaded.processor.chat_template)]),
            layers=self._capture.layers if self._capture is not None else [],
            n_kv_heads={site.layer: site.n_kv_heads for site in sites},
            bandwidths=bandwidths,
            tasks=tasks,
            complete=self._capture is None or all(task.rows_selected == task.rows_captured for task in tasks.values()),
        )


def _empty(table: str) -> pd.DataFrame:
    from lmms_keyspace import records

    columns = {"divergence": records.DIVERGENCE_COLUMNS, "attention": records.ATTENTION_COLUMNS}
    schema = columns.get(table, records.TOKEN_COLUMNS)
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in schema.items()})


def _image_sha(image: Any) -> str:
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()


def _sha(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()
