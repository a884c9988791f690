"""The wrapper: one chat model for lmms-eval with its own generate loop, under the names of `harness.MODEL_CLASSES`.

The loop carries (task, doc_id) with every row of a batch, so that what the recorder sees is known by document. The
subclasses only say what their name promises: an adapter, a bundled default.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from lmms_keyspace import harness
from lmms_keyspace.errors import InputError
from lmms_keyspace.model_wrappers import arguments as args
from lmms_keyspace.model_wrappers.assembly import assemble
from lmms_keyspace.model_wrappers.encoding import encode
from lmms_keyspace.model_wrappers.generation import Settings, batches, cut
from lmms_keyspace.model_wrappers.loading import Loaded, load
from lmms_keyspace.model_wrappers.prompts import Request, read_requests
from lmms_keyspace.model_wrappers.recorder import Recorder


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
        self.batch_size_per_gpu = self.arguments.batch_size
        self.loaded: Loaded = load(self.arguments)
        if self.loaded.bundled:
            adapter = f" with the adapter {self.loaded.adapter}" if self.loaded.adapter else ""
            logger.info(
                f"{self.keyspace_model_name}: no pretrained= given, running the bundled model{adapter} "
                "(one million parameters, for tests and demonstrations)"
            )
        self._recorder = Recorder(self.loaded, self.arguments, model_name=self.keyspace_model_name)

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in the order given.

        Args:
            requests: chat requests `(context, doc_to_messages, generation_kwargs, doc_id, task, split)`. A repeat or
                a padding clone of a request is answered too, but captured once at most.
        """
        if self.world_size > 1 and self.arguments.capture:
            raise InputError(
                "capture", "on", f"capture works in one process, this run has {self.world_size}; give capture=off"
            )
        read = read_requests(requests, self.task_dict, self.loaded.processor)
        self._recorder.plan(read)
        answers: dict[int, GenerationResult] = {}
        with tqdm(total=len(read), desc=self.keyspace_model_name, unit="doc", disable=self.rank != 0) as progress:
            for settings, indices in batches(read, self.batch_size):
                texts = self._answer([read[index] for index in indices], settings)
                answers.update(zip(indices, texts, strict=True))
                progress.update(len(indices))
        return [answers[index] for index in range(len(read))]

    def _answer(self, rows: list[Request], settings: Settings) -> list[GenerationResult]:
        images = [row.images() for row in rows]
        inputs = encode(self.loaded.processor, [row.text for row in rows], images)
        inputs = inputs.to(self.device, self.loaded.model.dtype)
        with torch.inference_mode(), self._recorder.batch(rows, images, inputs):
            output = self.loaded.model.generate(**inputs, **settings.arguments, pad_token_id=self._pad_token_id())
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.loaded.processor.batch_decode(new, skip_special_tokens=True)
        input_lengths = inputs["attention_mask"].sum(1).tolist()
        output_lengths = (new != self._pad_token_id()).sum(1).tolist()
        return [
            GenerationResult(cut(text, settings.until), TokenCounts(input_tokens=n_in, output_tokens=n_out))
            for text, n_in, n_out in zip(texts, input_lengths, output_lengths, strict=True)
        ]

    def _pad_token_id(self) -> int:
        tokenizer = self.loaded.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def clean(self) -> None:
        """lmms-eval calls this after the last request: measure while the keys are held, hand over, free the model."""
        if self._recorder.observed.tasks:
            harness.hand_over(assemble(self._recorder.observed), self.arguments.keys_dir)
        del self._recorder, self.loaded
        super().clean()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"{self.keyspace_model_name} answers generate_until tasks only: "
            "lmms-eval 0.7.3 cannot deliver a log-likelihood task to a chat model"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(f"{self.keyspace_model_name} answers generate_until tasks only")


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
