"""Watch one run: label the prompts, draw the sample, observe every batch, bring the processes together."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from loguru import logger

from lmms_keyspace.capture import Capture, Row
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.model_wrappers.arguments import AUTO_BATCH_SIZE, Arguments
from lmms_keyspace.model_wrappers.conditions import same_prompts
from lmms_keyspace.model_wrappers.encoding import tokens_of_an_image
from lmms_keyspace.model_wrappers.loading import Loaded
from lmms_keyspace.model_wrappers.merging import merge, shared
from lmms_keyspace.model_wrappers.observed import Observed, ObservedTask
from lmms_keyspace.model_wrappers.prompts import Request
from lmms_keyspace.model_wrappers.ranks import Ranks
from lmms_keyspace.records import VISUAL
from lmms_keyspace.sampling import Sampler
from lmms_keyspace.tokens import Labeler, Prompt

_NO_POSITIONS = np.empty(0, np.int64)


class Recorder:
    """Fills `observed`: `plan` takes all requests before the first forward pass, `receive` those that are left to
    answer, `batch` wraps every `generate`, `merge` brings what all processes saw to rank 0.
    """

    def __init__(self, loaded: Loaded, arguments: Arguments, *, model_name: str) -> None:
        decoder = decoder_sites(loaded.model)
        capture = None
        if arguments.capture:
            layers = arguments.layers if arguments.layers is not None else "all"
            capture = Capture(loaded.model, decoder, spaces=arguments.spaces, layers=layers)
        batch_size = arguments.batch_size or AUTO_BATCH_SIZE
        self.observed = Observed(loaded, arguments, model_name, decoder, capture, batch_size)
        self.ranks = Ranks()
        self.hole: InputError | None = None  # what to say when lmms-eval's cache answered every document
        self._wanted: set[tuple[str, int]] = set()
        self._received = False
        self._sampler = Sampler(
            seed=arguments.seed, clusters=arguments.capture_clusters, tokens=arguments.capture_tokens
        )
        self._labeler = Labeler(
            loaded.processor.tokenizer, decoder.image_token_id, placeholder_id=decoder.placeholder_id
        )

    def plan(self, requests: Sequence[Request]) -> None:
        """Label every prompt and draw the sample, from the requests of all processes, and say what memory it will take.

        Args:
            requests: all of this process. The other processes must call this too.

        Raises:
            InputError: a task's prompts come in pieces, so that labels would depend on how the run was cut.
        """
        self.ranks = Ranks()  # lmms-eval may have started its processes after the model was loaded
        by_task: dict[str, dict[int, Request]] = defaultdict(dict)
        for request in requests:
            if request.counted:
                by_task[request.task][request.doc_id] = request
        tasks, capture = self.observed.tasks, self.observed.capture
        again = sorted(tasks.keys() & by_task.keys())
        if again and (capture is not None or self.ranks.size > 1):
            way_out = f"the prompts of {again[0]} come in several calls; give capture=off, and run in one process"
            raise InputError("capture", "on" if capture else "off", way_out)
        own: dict[str, ObservedTask] = {}
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
            own[name] = ObservedTask(prompts, first.generator, first.cluster_field)
        self.observed.processes = self.ranks.size
        for name, task in shared(own, self.ranks).items():
            task.chosen = self._sampler.choose_clusters(name, [prompt.cluster for prompt in task.prompts.values()])
            task.same_prompts = same_prompts(by_task[name].values())
            for conditions in task.same_prompts:
                logger.warning(
                    f"{name}: {' and '.join(conditions)} are the same prompt for this model (its chat template decides "
                    "where the picture stands); a difference between them is 0 by construction and not valid"
                )
            task.images_absent = [doc_id for doc_id, request in sorted(by_task[name].items()) if request.images_absent]
            if task.images_absent:
                logger.warning(
                    f"{name}: {len(task.images_absent)} documents name an image that they do not hold and are asked "
                    f"without it, the first is document {task.images_absent[0]}"
                )
            tasks[name] = task
        self._wanted = {
            (name, doc_id)
            for name, task in own.items()
            for doc_id, prompt in task.prompts.items()
            if self.observed.arguments.option_logprobs or (capture is not None and prompt.cluster in tasks[name].chosen)
        }
        self._check_intervention(requests)
        self._received = False
        if capture is None:
            return
        self._labeler.fit([prompt for task in tasks.values() for prompt in task.prompts.values()])
        if self.ranks.rank != 0:
            return
        for name, note in self._labeler.notes.items():
            logger.warning(f"{name}: {note}")
        limits = self._sampler.tokens, self._sampler.template_tokens, self._tokens_of_an_image(requests)
        selected = [p for task in tasks.values() for p in task.prompts.values() if p.cluster in task.chosen]
        memory = capture.memory_estimate(
            sum(self._labeler.samplable(prompt, *limits) for prompt in selected),
            selected=len(selected),
            documents=sum(len(task.prompts) for task in tasks.values()),
            reference=self.observed.second_pass,
        )
        logger.info(
            f"capture: {len(selected)} documents of {len(tasks)} task(s), layers {capture.layers}, "
            f"about {memory / 1e6:.1f} MB on {self.observed.loaded.device}"
        )

    def _tokens_of_an_image(self, requests: Sequence[Request]) -> int:
        """Of the first sampled document that shows one; without any, the most that are sampled."""
        for request in requests:
            if request.counted and request.shown and request.cluster in self.observed.tasks[request.task].chosen:
                return tokens_of_an_image(self.observed.loaded.processor, request, self.observed.decoder.image_token_id)
        return self._sampler.tokens

    def receive(self, requests: Sequence[Request]) -> None:
        """Look, before the first forward pass, for documents that must be seen and that lmms-eval's cache answered.

        Args:
            requests: all that the model will answer in this process.

        Raises:
            InputError: there are such documents, in this process or in another. Where the cache answered every document
                of the run, nothing is lost by going on: the error is kept as `hole`.
        """
        self._received = True
        received = {(request.task, request.doc_id) for request in requests if request.counted}
        mine = {"received": len(received), "missing": sorted(self._wanted - received)}
        found = [json.loads(part) for part in self.ranks.share(json.dumps(mine).encode())]
        missing = [document for part in found for document in part["missing"]]
        if not missing:
            return
        task, doc_id = missing[0]
        error = InputError(
            "use_cache",
            f"{task}, document {doc_id}",
            f"lmms-eval's cache holds the answers of {len(missing)} documents that the model must see, so nothing "
            "would be captured of them; leave out --use_cache, name a fresh cache folder, or give capture=off and "
            "option_logprobs=off",
        )
        if any(part["received"] for part in found):
            raise error
        self.observed.whole = False
        self.hole = error

    def wait(self) -> None:
        """Wait until all processes have answered their requests; an error where one of them ended before."""
        if not self._received:  # the model was not asked: lmms-eval's cache had every answer
            self.receive([])
        self.ranks.share(b"")

    def merge(self) -> None:
        """Bring what all processes saw to rank 0; all of them must call this."""
        merge(self.observed, self.ranks)

    def _check_intervention(self, requests: Sequence[Request]) -> None:
        """Count the images on which an intervention's statistics rest; refuse them unless they are allowed."""
        intervention = self.observed.loaded.intervention
        if intervention is None or intervention.statistics is None:
            return
        own: set[str] = set()
        for request in requests:
            # A picture of one color stands for no picture, and is no document's own.
            own.update(_image_shas(request, [im for im in request.images() if im.convert("RGB").getcolors(1) is None]))
        used = intervention.images_used(own)
        self.observed.images_of_intervention |= used
        if used and self.observed.arguments.intervene_documents == "held_out":
            raise InputError(
                "intervene",
                intervention.name,
                f"its statistics rest on {len(used)} of the {len(own)} images that are evaluated; take a run on other "
                "documents, or say intervene_documents=any",
            )

    @contextlib.contextmanager
    def batch(self, requests: Sequence[Request], images: Sequence[list[Any]], inputs: Any) -> Iterator[None]:
        """Observe the `generate` call in the body; afterwards pass once more unchanged where asked.

        Args:
            requests: row i of the batch answers `requests[i]`; all of them are counted or none is.
            images: and shows `images[i]`.
            inputs: the processor's output on the model's device, left padded.
        """
        capture = self.observed.capture
        if capture is None or not requests[0].counted:
            yield
            return
        rows = self._rows(requests, images, inputs)
        with capture.batch(rows):
            yield
        for row in rows:
            self._count(row)
        if self.observed.second_pass and any(len(row.positions) for row in rows):
            intervention = self.observed.loaded.intervention
            unchanged = None if intervention is None else intervention.change.disabled()
            with capture.reference_batch(rows, unchanged):
                self.observed.loaded.model(**inputs, use_cache=False, logits_to_keep=1)

    def _count(self, row: Row) -> None:
        task = self.observed.tasks[row.prompt.task]
        task.rows_captured += bool(len(row.positions))
        if row.prompt.cluster in task.chosen:
            counts = row.labels.counts()
            task.token_counts.update(counts)
            task.image_tokens[str(counts.get(VISUAL, 0))] += 1

    def _rows(self, requests: Sequence[Request], images: Sequence[list[Any]], inputs: Any) -> list[Row]:
        prompts = [self.observed.tasks[request.task].prompts[request.doc_id] for request in requests]
        ids, mask = (inputs[name].cpu().numpy() for name in ("input_ids", "attention_mask"))
        row_ids = [line[own] for line, own in zip(ids, mask != 0, strict=True)]
        grids = self.observed.decoder.image_grids(inputs)  # of all images of the batch, in order
        row_grids: list[list[tuple[int, int]] | None] = [None] * len(prompts)
        if grids is not None:
            ends = np.cumsum([len(shown) for shown in images]).tolist()
            row_grids = [grids[end - len(shown) : end] for end, shown in zip(ends, images, strict=True)]
        labeled = self._labeler.label_batch(prompts, row_ids, row_grids)
        rows = []
        for request, shown, prompt, own_ids, labels in zip(requests, images, prompts, row_ids, labeled, strict=True):
            positions = _NO_POSITIONS
            if prompt.cluster in self.observed.tasks[request.task].chosen:
                positions = self._sampler.choose_positions(request.task, prompt.cluster, labels)
                prompt = replace(prompt, image_shas=_image_shas(request, shown))
            rows.append(Row(prompt, own_ids, labels, positions))
        return rows


def _image_shas(request: Request, shown: Sequence[Any]) -> tuple[str, ...]:
    """Hashing a picture costs as much as all the rest, so a task may name the hash."""
    named = (request.image_sha,) if request.image_sha and len(shown) == 1 else None
    return named or tuple(_image_sha(image) for image in shown)


def _image_sha(image: Any) -> str:
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
