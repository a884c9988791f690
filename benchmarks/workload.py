"""Models and documents that the cases share; needs no lmms-eval, so that it runs wherever a GPU is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
)

from lmms_keyspace import embedded, scenes
from lmms_keyspace.capture import Capture, Row
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.sampling import TEMPLATE_TOKENS, Sampler
from lmms_keyspace.tokens import Labeler, Prompt

NEW_TOKENS = 4


def bundled() -> tuple[PreTrainedModel, ProcessorMixin]:
    """The bundled model and its processor."""
    folder = embedded.base_path()
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), processor()


def processor(side: int | None = None, patch: int | None = None) -> ProcessorMixin:
    """The bundled processor, where given for pictures of `side` by `side` pixels in patches of `patch`."""
    made = AutoProcessor.from_pretrained(embedded.base_path())
    made.tokenizer.padding_side = "left"
    if side is not None:
        made.image_processor.size = {"height": side, "width": side}
        made.patch_size = patch
    return made


def random_llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Random weights: width 512, 8 layers of 8 heads, 196 image tokens (14 by 14 patches).

    The weights are larger than the usual start, so that greedy answers are diverse.
    """
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    torch.manual_seed(0)
    config = _llava_config(vision | {"image_size": 196, "patch_size": 14}, text | {"initializer_range": 0.08})
    return LlavaForConditionalGeneration(config).eval(), processor(196, 14)


def llava_7b_shape() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Random weights in the shape of LLaVA-1.5-7B, bfloat16: width 4096, 32 layers of 32 heads, 576 image tokens."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = _llava_config(vision | {"image_size": 336, "patch_size": 14}, text | {"vocab_size": 32064})
    with torch.device("cuda"):
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    return model.eval(), processor(336, 14)


def _llava_config(vision: dict[str, Any], text: dict[str, Any]) -> LlavaConfig:
    base = LlavaConfig.from_pretrained(embedded.base_path())
    shared = {name: getattr(base.text_config, name) for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**shared | {"pad_token_id": base.text_config.pad_token_id} | text),
        image_token_index=base.image_token_index,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )


def save(model: PreTrainedModel, made: ProcessorMixin, folder: Path) -> Path:
    """A checkpoint that wrappers can load."""
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


class Workload:
    """Documents of the probe's generator in batches ready for `generate`, with and without capture."""

    def __init__(
        self, model: PreTrainedModel, made: ProcessorMixin, device: torch.device, *, documents: int, batch: int
    ) -> None:
        self.model, self.processor = model.to(device), made
        pictures, self.prompts = [], []
        for index in range(documents):
            item = scenes.draw_item(
                scenes.CORE_FAMILIES[index % len(scenes.CORE_FAMILIES)],
                scenes.rng("dev", "benchmark", index),
                space="dev",
            )
            text = scenes.prompt(item.question, context=scenes.hint(item, item.gold, index % scenes.N_TEMPLATES))
            content = [{"type": "image"}, {"type": "text", "text": text}]
            chat = made.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            self.prompts.append(Prompt("benchmark", index, str(index), "match", chat, content=(text,)))
            pictures.append(scenes.render(item.spec))
        self.batches = []
        for start in range(0, documents, batch):
            chosen = slice(start, start + batch)
            texts = [prompt.text for prompt in self.prompts[chosen]]
            inputs = made(text=texts, images=pictures[chosen], padding=True, return_tensors="pt")
            self.batches.append((self.prompts[chosen], inputs.to(device, model.dtype)))

    def warm_up(self) -> None:
        """Capture the batch with the longest prompts: libraries are loaded then, and working memory is found again."""
        longest = max(self.batches, key=lambda batch: batch[1]["input_ids"].numel())
        self._capture([longest])

    def samplable(self) -> int:
        """Tokens that can be sampled, as the wrapper counts them before the run."""
        decoder = decoder_sites(self.model)
        labeler = Labeler(self.processor.tokenizer, decoder.image_token_id).fit(self.prompts)
        prompts, inputs = self.batches[0]
        image_tokens = int((inputs["input_ids"] == decoder.image_token_id).sum()) // len(prompts)
        return sum(labeler.samplable(prompt, 32, TEMPLATE_TOKENS, image_tokens) for prompt in self.prompts)

    def plain(self) -> Callable[[], None]:
        """Generation alone."""
        return self._generate

    def captured(self) -> Callable[[], Capture]:
        """The same with every document captured: labels, sample, keys, attention and the tables."""
        return lambda: self._capture(self.batches)

    def prefill(self) -> Callable[[], None]:
        """One forward pass over every batch."""
        return self._prefill

    @torch.inference_mode()
    def _prefill(self) -> None:
        for _, inputs in self.batches:
            self.model(**inputs, use_cache=False)

    @torch.inference_mode()
    def _generate(self) -> None:
        for _, inputs in self.batches:
            self._answer(inputs)

    def _answer(self, inputs: Any) -> None:
        self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    @torch.inference_mode()
    def _capture(self, batches: Sequence[tuple[Sequence[Prompt], Any]]) -> Capture:
        """Generate with every document captured, and make the tables."""
        decoder = decoder_sites(self.model)
        labeler = Labeler(self.processor.tokenizer, decoder.image_token_id).fit(self.prompts)
        sampler = Sampler(seed=0, clusters=len(self.prompts))
        capture = Capture(self.model, decoder)
        for prompts, inputs in batches:
            grids = decoder.image_grids(inputs)
            ids, own = inputs["input_ids"].cpu().numpy(), inputs["attention_mask"].cpu().numpy()
            rows = []
            for index, prompt in enumerate(prompts):
                row_ids = ids[index][own[index] != 0]
                labels = labeler.label(prompt, row_ids, None if grids is None else grids[index : index + 1])
                positions = sampler.choose_positions(prompt.task, prompt.cluster, labels)
                rows.append(Row(prompt, row_ids, labels, positions))
            with capture.batch(rows):
                self._answer(inputs)
        capture.token_table()
        capture.attention_table()
        return capture
