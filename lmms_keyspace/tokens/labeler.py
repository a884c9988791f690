"""What each token of a prompt is: an image token, a word of the document, or boilerplate that says nothing of it.

Labels are fixed before anything is sampled, from the prompts of a whole task, so they do not depend on batches, order
or ranks. Boilerplate is what the chat template adds around the user's words, and fixed instructions: the same token id
at the same offset from an anchor in at least 90 % of a task's documents. Anchors are the prompt's start and end, its
images, and the edges of the segments that the task declares. Documents of one cluster share the weight of one, because
conditions of one question would otherwise turn the question itself into boilerplate.

What a processor writes around and between image tokens is special, see `alignment`.

Attention sinks are not labeled here: which tokens they are depends on the layer, and labels come before any forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import BOILERPLATE, BOS, MODALITIES, SEGMENTS, SPECIAL, TEXT, VISUAL
from lmms_keyspace.tokens.alignment import Aligner, TextTokens
from lmms_keyspace.tokens.boilerplate import MIN_CLUSTERS, EncodedPrompts, Fixed, find_fixed, mark_fixed
from lmms_keyspace.tokens.encoding import encode_prompts
from lmms_keyspace.tokens.image_tokens import place_images
from lmms_keyspace.tokens.labels import TokenLabels
from lmms_keyspace.tokens.prompts import Prompt, content_spans

_DEFAULT_SEGMENT = "question"
_CODE = {name: code for code, name in enumerate(MODALITIES)}
_IMAGE_SEGMENT, _SPECIAL_SEGMENT = SEGMENTS.index("image"), SEGMENTS.index("special")


class Labeler:
    """Labels the tokens of prompts, knowing all prompts of their tasks.

    Args:
        tokenizer: a fast tokenizer of transformers (character offsets are needed).
        image_token_id: the id of image tokens in the model's input.
        add_special_tokens: as the prompts are tokenized for the model.
        placeholder_id: the id that stands for an image in a prompt's text; None: `image_token_id`.

    Raises:
        InputError: the tokenizer gives no character offsets.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_token_id: int,
        add_special_tokens: bool = True,
        *,
        placeholder_id: int | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                "tokenizer", type(tokenizer).__name__, "it gives no character offsets; use the model's fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._placeholder_id = image_token_id if placeholder_id is None else placeholder_id
        self._add_special_tokens = add_special_tokens
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = np.array(sorted((added | set(tokenizer.all_special_ids)) - {image_token_id}), np.int64)
        self._aligner = Aligner(tokenizer, image_token_id)
        self._fitted: dict[str, _Fitted] = {}
        self.notes: dict[str, str] = {}
        """Per task, what a reader of its divergence must know of the labels; tasks without a remark are absent."""

    def fit(self, prompts: Iterable[Prompt]) -> Labeler:
        """Find the boilerplate of every task from all its prompts (of all ranks).

        A task with fewer than `MIN_CLUSTERS` clusters, or whose every text token would be boilerplate, keeps its fixed
        instructions as text: only the chat template is left out, and `notes` says so.

        Raises:
            InputError: a declared segment does not occur in its prompt.
        """
        tasks: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            tasks[prompt.task].append(prompt)
        for task, members in tasks.items():
            self._fit_task(task, members)
        return self

    def label(
        self, prompt: Prompt, input_ids: np.ndarray, image_grids: Sequence[tuple[int, int]] | None = None
    ) -> TokenLabels:
        """Label the tokens that the model gets.

        Args:
            prompt: of a task that was fitted.
            input_ids: `[T]`, without padding, image tokens expanded.
            image_grids: rows and columns of each image's tokens, where the model lays them out as a raster.

        Raises:
            InputError: the ids are not those of the prompt's text, the task was not fitted, or the grids do not
                account for the image tokens; names the task and the document.
        """
        return self.label_batch([prompt], [input_ids], [image_grids])[0]

    def label_batch(
        self,
        prompts: Sequence[Prompt],
        input_ids: Sequence[np.ndarray],
        image_grids: Sequence[Sequence[tuple[int, int]] | None],
    ) -> list[TokenLabels]:
        """`label` of several prompts, at little more than the price of one."""
        texts = [self._text_tokens(prompt) for prompt in prompts]
        input_ids = [np.asarray(ids, dtype=np.int64) for ids in input_ids]
        copied = self._aligner.copied(input_ids, texts)
        if copied is not None:
            source, images = copied
        elif len(prompts) > 1:
            return [self.label(*row) for row in zip(prompts, input_ids, image_grids, strict=True)]
        else:
            source, runs = self._aligner.aligned(prompts[0], input_ids[0], texts[0])
            images = [runs]
        ids = np.concatenate(input_ids)
        modality = np.concatenate([text.modality for text in texts])[source]
        segment = np.concatenate([text.segment for text in texts])[source]
        added = source < 0  # by the processor, with the image
        modality[added], segment[added] = _CODE[SPECIAL], _SPECIAL_SEGMENT
        modality[ids == self._tokenizer.bos_token_id] = _CODE[BOS]
        is_image = ids == self._image_token_id
        modality[is_image], segment[is_image] = _CODE[VISUAL], _IMAGE_SEGMENT
        places = np.full((3, ids.size), -1, np.int32)
        for prompt, runs, grids in zip(prompts, images, image_grids, strict=True):
            place_images(prompt.name, places, runs, grids)
        ends = np.cumsum([own.size for own in input_ids]).tolist()
        return [
            TokenLabels(modality[start:end], segment[start:end], *places[:, start:end])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]

    def _text_tokens(self, prompt: Prompt) -> TextTokens:
        if prompt.task not in self._fitted:
            raise InputError("task", prompt.task, "its prompts were not fitted; pass them to Labeler.fit first")
        return self._fitted[prompt.task].find(prompt) or self._fit_one(prompt)

    def samplable(self, prompt: Prompt, tokens: int, template: int, image_tokens: int) -> int:
        """How many tokens of a prompt can be sampled, as far as its text tells.

        Args:
            prompt: of a task that was fitted.
            tokens: most visual tokens, and most text tokens.
            template: most of all others.
            image_tokens: what an image is taken to have.
        """
        found = self._text_tokens(prompt)
        shows = found.placeholders > 0
        is_word = found.modality == _CODE[TEXT]
        words, others = (int(np.count_nonzero(kind & ~shows)) for kind in (is_word, ~is_word))
        visual = int(found.placeholders.sum()) * image_tokens
        return min(words, tokens) + min(others, template) + min(visual, tokens)

    def _fit_task(self, task: str, prompts: Sequence[Prompt]) -> None:
        encoded = self._encode(prompts)
        clusters = [prompt.cluster for prompt in prompts]
        fixed = find_fixed(encoded, clusters)
        remarks = []
        if not encoded.free.any():
            remarks.append("no prompt has a text token: image cannot be compared with text")
        elif len(set(clusters)) < MIN_CLUSTERS:
            remarks.append(
                f"only {len(set(clusters))} clusters of documents, fewer than {MIN_CLUSTERS}: fixed instructions could "
                "not be told from the documents' words and count as text"
            )
        elif not (encoded.free & ~mark_fixed(encoded, fixed)).any():
            fixed = {}
            remarks.append("the words are the same in every document: they count as text")
        astray = sum(content_spans(prompt) is None for prompt in prompts)
        if astray:
            remarks.append(f"the user's words were not found in {astray} prompts: their chat template counts as text")
        self._fitted[task] = _Fitted(prompts, encoded, fixed)
        self.notes.pop(task, None)
        if remarks:
            self.notes[task] = "; ".join(remarks)

    def _fit_one(self, prompt: Prompt) -> TextTokens:
        """Tokens of a prompt that was not among those fitted."""
        fitted = _Fitted([prompt], self._encode([prompt]), self._fitted[prompt.task].fixed)
        return fitted.tokens(0)

    def _encode(self, prompts: Sequence[Prompt]) -> EncodedPrompts:
        return encode_prompts(
            prompts,
            self._tokenizer,
            placeholder_id=self._placeholder_id,
            special_ids=self._special_ids,
            add_special_tokens=self._add_special_tokens,
        )


class _Fitted:
    """A task's prompts with their labels, before the processor puts the images in."""

    def __init__(self, prompts: Sequence[Prompt], encoded: EncodedPrompts, fixed: Fixed) -> None:
        self.fixed = fixed
        self._places = {prompt.doc_id: (place, prompt) for place, prompt in enumerate(prompts)}
        self._encoded = encoded
        boilerplate = encoded.template | mark_fixed(encoded, fixed)
        undeclared = np.where(boilerplate, SEGMENTS.index("boilerplate"), SEGMENTS.index(_DEFAULT_SEGMENT))
        self._segment = np.where(encoded.segment < 0, undeclared, encoded.segment).astype(np.int8)
        self._modality = np.where(boilerplate, _CODE[BOILERPLATE], _CODE[TEXT]).astype(np.int8)
        self._modality[encoded.special], self._segment[encoded.special] = _CODE[SPECIAL], _SPECIAL_SEGMENT

    def find(self, prompt: Prompt) -> TextTokens | None:
        """Tokens of a prompt if it is one of these."""
        place, known = self._places.get(prompt.doc_id, (0, None))
        if known is None or (known.text, known.segments, known.content) != (
            prompt.text,
            prompt.segments,
            prompt.content,
        ):
            return None
        return self.tokens(place)

    def tokens(self, place: int) -> TextTokens:
        """Tokens of the prompt at a place."""
        span = self._encoded.span(place)
        return TextTokens(
            self._encoded.ids[span], self._encoded.placeholders[span], self._modality[span], self._segment[span]
        )
