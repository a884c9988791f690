"""The wrapper: one chat model for lmms-eval with its own generate loop, under the names of `harness.MODEL_CLASSES`.

The loop carries (task, doc_id) with every row of a batch, so that what the recorder sees is known by document. The
subclasses only say what their name promises: an adapter, a bundled default.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from lmms_keyspace import harness
from lmms_keyspace.errors import InputError
from lmms_keyspace.intervene.spec import VISUAL_BOOST
from lmms_keyspace.model_wrappers import arguments as args
from lmms_keyspace.model_wrappers.assembly import assemble
from lmms_keyspace.model_wrappers.encoding import encode_requests, tokens_of_an_image
from lmms_keyspace.model_wrappers.encoding_ahead import EncodingAhead
from lmms_keyspace.model_wrappers.generation import Settings, batches, cut, longest_first
from lmms_keyspace.model_wrappers.growing_cache import growing_cache
from lmms_keyspace.model_wrappers.likelihood import Scored, first_distinguishing, joined, score
from lmms_keyspace.model_wrappers.loading import Loaded, load
from lmms_keyspace.model_wrappers.naming import names, naming
from lmms_keyspace.model_wrappers.prompts import Asked, ContinuationRequest, Request, read_continuations, read_requests
from lmms_keyspace.model_wrappers.recorder import Recorder
from lmms_keyspace.model_wrappers.visual_features import VisualFeatures
from lmms_keyspace.records import OPTION_COLUMNS

R = TypeVar("R", bound=Asked)
T = TypeVar("T")


class KeyspaceVLM(lmms):
    """Any vision-language model that `AutoModelForImageTextToText` loads, with its attention keys captured.

    Arguments are those of `arguments.Arguments`. The bundled model is taken where `pretrained` is not given.
    """

    is_simple = False
    keyspace_model_name: ClassVar[str] = "keyspace_vlm"
    needs_adapter: ClassVar[bool] = False
    has_bundled: ClassVar[bool] = True

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.arguments = args.parse(
            given, model=self.keyspace_model_name, needs_adapter=self.needs_adapter, has_bundled=self.has_bundled
        )
        self.loaded: Loaded = load(self.arguments)
        if self.loaded.bundled:
            adapter = f" with the adapter {self.loaded.adapter}" if self.loaded.adapter else ""
            logger.info(
                f"{self.keyspace_model_name}: no pretrained= given, running the bundled model{adapter} "
                "(one million parameters, for tests and demonstrations)"
            )
        if (intervention := self.loaded.intervention) is not None:
            statistics = intervention.statistics
            tokens = "" if statistics is None else f", from keys of {statistics.tokens}"
            logger.info(f"{self.keyspace_model_name}: intervention {intervention.name}{tokens}")
        self._recorder = Recorder(self.loaded, self.arguments, model_name=self.keyspace_model_name)
        self._encoding = EncodingAhead(self.loaded.processor)
        self._features = VisualFeatures(self.loaded.model)
        self._expecting = False

    @property
    def batch_size(self) -> int:
        return self._recorder.observed.batch_size

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in the order given.

        Args:
            requests: chat requests `(context, doc_to_messages, generation_kwargs, doc_id, task, split)`. A repeat or
                a padding clone of a request is answered too, but captured once at most.

        Raises:
            RuntimeError: the model failed; names the task and the documents. What was captured before is saved.
        """
        if self._expecting:
            return self._generate(read_requests(requests, self.task_dict, self.loaded.processor))
        with self.expecting(requests) as read:
            return self._generate(read)

    @contextlib.contextmanager
    def expecting(self, requests: list[Instance]) -> Iterator[list[Request]]:
        """Plan a run before its first request is answered, by the model or by lmms-eval's cache.

        `harness` opens this around lmms-eval's cache, else `generate_until` does. Every process of the run passes here
        once, so this is where they tell each other their prompts and wait for each other.

        Args:
            requests: all of this process, those included that the cache will answer.

        Raises:
            InputError: the cache answered documents that the model must see. Where it answered all documents, the
                error is left to `harness`, which raises it when lmms-eval's results are saved.
        """
        read = read_requests(requests, self.task_dict, self.loaded.processor)
        with self._kept():
            self._recorder.plan(read)
            self._expecting = True
            try:
                yield read
            finally:
                self._expecting = False
            self._recorder.wait()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Whatever ends the run inside, an interrupt too, what this process captured until then is saved."""
        try:
            yield
        except BaseException:
            observed = self._recorder.observed
            if observed.capture is not None and observed.capture.captured:
                with harness.uninterrupted():
                    partial = assemble(observed, finished=False)
                    harness.hand_over(partial, self.arguments.keys_dir, rank=self._recorder.ranks.rank)
            raise

    def _generate(self, requests: list[Request]) -> list[GenerationResult]:
        self._recorder.receive(requests)
        answers = self._answers(requests)
        if self.arguments.option_logprobs:
            self._score_options([request for request in requests if request.counted])
        return answers

    def _answers(self, requests: list[Request]) -> list[GenerationResult]:
        answers: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc=self.keyspace_model_name, unit="doc", disable=self.rank != 0) as progress:
            cut_up = list(batches(requests, self.batch_size, together=self._too_many_pictures(requests)))
            for (settings, indices), (_, following) in zip(cut_up, [*cut_up[1:], (None, [])], strict=True):
                then = [requests[index] for index in following]
                answer = functools.partial(self._answer, settings, then=then)
                texts = self._in_parts([requests[index] for index in indices], answer, progress)
                answers.update(zip(indices, texts, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _too_many_pictures(self, requests: Sequence[Asked]) -> bool:
        """Whether questions about one picture must follow each other, so that its features need to be made once."""
        showing = next((request for request in requests if request.shown), None)
        if showing is None:
            return False
        decoder = self._recorder.observed.decoder

        def numbers() -> int:
            tokens = tokens_of_an_image(self.loaded.processor, showing, decoder.image_token_id)
            return tokens * int(decoder.text_config.hidden_size)

        return self._features.crowded(showing.pictures, numbers)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether greedy decoding would write it; in order.

        Args:
            requests: `(context, continuation, doc_to_visual or doc_to_messages, doc_id, task, split)` or `(context,
                continuation)`; see `prompts.read_continuations`.
        """
        if self.arguments.intervene is not None and self.arguments.intervene.kind == VISUAL_BOOST:
            raise InputError(
                "intervene", VISUAL_BOOST, "it acts on the token being generated; this task scores given continuations"
            )
        read = read_continuations(requests, self.task_dict, self.loaded.processor)
        return [(scored.logprob, scored.greedy) for scored in self._score(read)]

    def _score_options(self, requests: list[Request]) -> None:
        """Fill the options table."""
        without = sorted({request.task for request in requests} - {r.task for r in requests if r.options})
        if without:
            logger.warning(f"option_logprobs: the documents of {', '.join(without)} name no options")
        scored = iter(self._score([asked for request in requests for asked in request.ask_options()]))
        for request in requests:
            options = list(itertools.islice(scored, len(request.options)))
            for option, whole, first in zip(request.options, options, first_distinguishing(options), strict=True):
                row = (request.task, request.doc_id, request.condition, option, first, whole.logprob)
                self._recorder.observed.options.append(dict(zip(OPTION_COLUMNS, row, strict=True)))

    def _score(self, requests: list[ContinuationRequest]) -> list[Scored]:
        order = longest_first(requests, together=self._too_many_pictures(requests))

        def work(part: Sequence[ContinuationRequest]) -> list[Scored]:
            texts, continuations = ([getattr(asked, name) for asked in part] for name in ("text", "continuation"))
            _, inputs = encode_requests(self.loaded.processor, part, list(map(joined, texts, continuations)))
            inputs = inputs.to(self.device, self.loaded.model.dtype)
            with torch.inference_mode():
                given = self._features.inputs(inputs, [asked.shown for asked in part], part[0].pictures)
                return score(self.loaded.model, self.loaded.processor.tokenizer, texts, continuations, given)

        with tqdm(total=len(requests), desc="log-likelihood", disable=self.rank != 0) as progress:
            scored = self._in_parts([requests[index] for index in order], work, progress)
        return [found for _, found in sorted(zip(order, scored, strict=True), key=lambda pair: pair[0])]

    def _in_parts(self, rows: Sequence[R], work: Callable[[Sequence[R]], list[T]], progress: tqdm[Any]) -> list[T]:
        """`work` on at most `batch_size` rows at a time; with batch_size=auto, half as many when memory is short.

        Raises:
            InputError: memory is short and the batch cannot be halved.
            RuntimeError: anything else went wrong; names the task and the documents.
        """
        observed = self._recorder.observed
        done: list[T] = []
        while len(done) < len(rows):
            part = rows[len(done) : len(done) + observed.batch_size]
            try:
                with naming(part):
                    done += work(part)
                progress.update(len(part))
            except torch.OutOfMemoryError as error:
                # What capture has taken of these rows cannot be taken again: the second pass was too much.
                begun = observed.capture is not None and (part[0].task, part[0].doc_id) in observed.capture.captured
                if self.arguments.batch_size is not None or len(part) == 1 or begun:
                    way_out = f"memory does not suffice for {names(part)}; give a smaller batch_size, or smaller images"
                    raise InputError("batch_size", len(part), way_out) from error
                observed.batch_size = len(part) // 2
                logger.warning(f"batch_size=auto: no memory for {len(part)} rows, going on with {observed.batch_size}")
        return done

    def _answer(
        self, settings: Settings, rows: Sequence[Request], *, then: Sequence[Request]
    ) -> list[GenerationResult]:
        """Answer a batch; where nothing is captured, the batch `then` is encoded meanwhile."""
        images, inputs = self._encoding.take(rows)
        # Python runs one thread at a time: capture's many small operations would wait for this one, and a batch of one
        # is encoded sooner than the threads change places.
        if len(then) > 1 and self._recorder.observed.capture is None:
            self._encoding.begin(then[: self.batch_size])
        inputs = inputs.to(self.device, self.loaded.model.dtype)
        with torch.inference_mode(), self._recorder.batch(rows, images, inputs):
            given = dict(inputs)
            if self._beams(settings) == 1:  # transformers 5.20 gives beams of one row the features of another
                given = self._features.inputs(inputs, [row.shown for row in rows], rows[0].pictures)
            given |= growing_cache(self.loaded.model)
            output = self.loaded.model.generate(**given, **settings.arguments, pad_token_id=self._pad_token_id())
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.loaded.processor.batch_decode(new, skip_special_tokens=True)
        input_lengths = inputs["attention_mask"].sum(1).tolist()
        output_lengths = (new != self._pad_token_id()).sum(1).tolist()
        return [
            GenerationResult(cut(text, settings.until), TokenCounts(input_tokens=n_in, output_tokens=n_out))
            for text, n_in, n_out in zip(texts, input_lengths, output_lengths, strict=True)
        ]

    def _beams(self, settings: Settings) -> int:
        beams = settings.arguments.get("num_beams", self.loaded.model.generation_config.num_beams)
        return int(beams or 1)

    def _pad_token_id(self) -> int:
        tokenizer = self.loaded.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def clean(self) -> None:
        """lmms-eval calls this after the last request: measure while the keys are held, hand over, free the model.

        Rank 0 measures what all processes captured.
        """
        if self._recorder.observed.tasks:
            with self._kept():
                self._recorder.merge()
                if self._recorder.ranks.rank == 0:
                    data = assemble(self._recorder.observed)
                    harness.hand_over(data, self.arguments.keys_dir, hole=self._recorder.hole)
        if self.loaded.intervention is not None:
            self.loaded.intervention.change.remove()
        del self._recorder, self._encoding, self._features, self.loaded
        super().clean()

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(f"{self.keyspace_model_name} answers one question a document, in one round")


class KeyspaceLlava(KeyspaceVLM):
    """`keyspace_llava`: the same, under the name of its family."""

    keyspace_model_name = "keyspace_llava"


class KeyspaceQwen25VL(KeyspaceVLM):
    """`keyspace_qwen2_5_vl`: the same; the bundled model is a LLaVA, so `pretrained` is needed."""

    keyspace_model_name = "keyspace_qwen2_5_vl"
    has_bundled = False


class MaloraVLM(KeyspaceVLM):
    """`malora_vlm`: a model with an adapter; the bundled model comes with its bundled MaLoRA adapter."""

    keyspace_model_name = "malora_vlm"
    needs_adapter = True


class MaloraLlava(MaloraVLM):
    """`malora_llava`: the same, under the name of its family."""

    keyspace_model_name = "malora_llava"


class MaloraQwen25VL(MaloraVLM):
    """`malora_qwen2_5_vl`: the same; the bundled model is a LLaVA, so `pretrained` is needed."""

    keyspace_model_name = "malora_qwen2_5_vl"
    has_bundled = False
