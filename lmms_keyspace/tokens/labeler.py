"""What each token of a prompt is: an image token, a word of the document, or boilerplate that says nothing of it.

Labels are fixed before anything is sampled, from the prompts of a whole task, so they do not depend on batches, order
or ranks. Boilerplate is what the chat template adds around the user's words, and fixed instructions: the same token id
at the same offset from an anchor in at least 90 % of a task's documents. Anchors are the prompt's start and end, its
images, and the edges of the segments that the task declares. Documents of one cluster share the weight of one, because
conditions of one question would otherwise turn the question itself into boilerplate.

A processor replaces each image's placeholder by image tokens and, in some architectures, writes special tokens and
white space around and between them (start and end of the image, breaks between rows, names of tiles). Those are
special. All words of the prompt must be found again, in order, or the prompt is refused.

Attention sinks are not labeled here: which tokens they are depends on the layer, and labels come before any forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import BOILERPLATE, BOS, MODALITIES, SEGMENTS, SPECIAL, TEXT, VISUAL
from lmms_keyspace.tokens.boilerplate import MIN_CLUSTERS, TEXT_SEGMENTS, EncodedPrompts, Fixed, find_fixed, mark_fixed
from lmms_keyspace.tokens.image_tokens import ImageRun, common, gaps, image_places, image_runs, run_starts

_DEFAULT_SEGMENT = "question"
_CODE = {name: code for code, name in enumerate(MODALITIES)}
_IMAGE_SEGMENT, _SPECIAL_SEGMENT = SEGMENTS.index("image"), SEGMENTS.index("special")
_UNKNOWN, _OUTSIDE, _INSIDE = range(3)  # where a letter is with regard to the user's words
_WHITE_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # none beyond


@dataclass(frozen=True)
class Prompt:
    """One document's prompt, as the processor gets it.

    Attributes:
        doc_id: the harness's number of the document in its task.
        cluster: documents that belong together (conditions of one question); sampled and resampled as one.
        text: chat-template output with one placeholder token per image; none where the processor puts the image in
            front of the text by itself.
        segments: hint | question | options -> its words, which occur in `text`; an empty string means absent.
        image_shas: one per image, in order; may be empty when unknown.
        content: the user's words as they went into the chat template, in order; what lies outside is template.
    """

    task: str
    doc_id: int
    cluster: str
    condition: str
    text: str
    segments: Mapping[str, str] = field(default_factory=dict)
    image_shas: tuple[str, ...] = ()
    content: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TokenLabels:
    """Labels of an unpadded prompt of T tokens; every array is `[T]`.

    Attributes:
        modality_codes: places in `records.MODALITIES`: visual, text, boilerplate, special or bos.
        segment_codes: places in `records.SEGMENTS`. The fixed words inside a declared segment belong to it, so that
            attention to a hint is attention to the whole hint.
        image_index: which image of the prompt, -1 for other tokens. Images side by side whose sizes are unknown all
            carry the first one's index.
        grid_row, grid_column: place in the image's raster of tokens, -1 where unknown.
    """

    modality_codes: np.ndarray
    segment_codes: np.ndarray
    image_index: np.ndarray
    grid_row: np.ndarray
    grid_column: np.ndarray

    @property
    def size(self) -> int:
        """T."""
        return int(self.modality_codes.size)

    @property
    def modality(self) -> np.ndarray:
        """Names of the modalities."""
        return np.asarray(np.array(MODALITIES)[self.modality_codes])

    @property
    def segment(self) -> np.ndarray:
        """Names of the segments."""
        return np.asarray(np.array(SEGMENTS)[self.segment_codes])

    def counts(self) -> dict[str, int]:
        """Tokens by modality."""
        counts = np.bincount(self.modality_codes, minlength=len(MODALITIES)).tolist()
        return {name: count for name, count in zip(MODALITIES, counts, strict=True) if count}


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
        self._is_word = {index: False for index in tokenizer.added_tokens_decoder}
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
        if prompt.task not in self._fitted:
            raise InputError("task", prompt.task, "its prompts were not fitted; pass them to Labeler.fit first")
        input_ids = np.asarray(input_ids, dtype=np.int64)
        tokens = self._fitted[prompt.task].find(prompt) or self._fit_one(prompt)
        source, images = self._copied(input_ids, tokens) or self._aligned(prompt, input_ids, tokens)
        modality, segment = tokens.modality[source], tokens.segment[source]
        added = source < 0  # by the processor, with the image
        modality[added], segment[added] = _CODE[SPECIAL], _SPECIAL_SEGMENT
        modality[input_ids == self._tokenizer.bos_token_id] = _CODE[BOS]
        for run in images:
            modality[run.columns], segment[run.columns] = _CODE[VISUAL], _IMAGE_SEGMENT
        places = image_places(_name(prompt), input_ids.size, images, image_grids)
        return TokenLabels(modality, segment, *places)

    def samplable(self, prompt: Prompt, tokens: int, template: int) -> int:
        """How many tokens of a prompt can be sampled, as far as its text tells: an image is taken to have `tokens`.

        Args:
            prompt: of a task that was fitted.
            tokens: most visual tokens, and most text tokens.
            template: most of all others.
        """
        found = self._fitted[prompt.task].find(prompt) or self._fit_one(prompt)
        shows = found.placeholders > 0
        is_word = found.modality == _CODE[TEXT]
        words, others = (int(np.count_nonzero(kind & ~shows)) for kind in (is_word, ~is_word))
        return min(words, tokens) + min(others, template) + (tokens if shows.any() else 0)

    def _copied(self, ids: np.ndarray, tokens: _Tokens) -> tuple[np.ndarray, list[ImageRun]] | None:
        """As `_aligned` where the processor only repeated image tokens; None where it did more."""
        image = ids == self._image_token_id
        starts = run_starts(image)
        placeholder = tokens.placeholders > 0
        if starts.size != placeholder.size or not np.array_equal(image[starts], placeholder):
            return None
        if (ids[starts] != tokens.ids)[~placeholder].any():
            return None
        ends = np.append(starts[1:], ids.size)
        runs, first = [], 0
        for place in np.flatnonzero(placeholder).tolist():
            images = int(tokens.placeholders[place])
            runs.append(ImageRun(np.arange(starts[place], ends[place]), first, images))
            first += images
        return np.repeat(np.arange(starts.size), ends - starts), runs

    def _aligned(self, prompt: Prompt, ids: np.ndarray, encoded: _Tokens) -> tuple[np.ndarray, list[ImageRun]]:
        """Per token of the model's input the token of the text that it is, -1 where the processor added it; and the
        image tokens.

        Words must agree one by one. Between two words without an image everything else must agree too; where there is
        an image, what agrees at both ends is the text's and the rest is the processor's.
        """
        image = ids == self._image_token_id
        model_words = np.flatnonzero(~image & self._words(ids))
        text_words = np.flatnonzero((encoded.placeholders == 0) & self._words(encoded.ids))
        if not np.array_equal(ids[model_words], encoded.ids[text_words]):
            raise _other_tokens(prompt, ids[model_words], encoded.ids[text_words])
        source = np.full(ids.size, -1)
        source[model_words] = text_words
        runs: list[ImageRun] = []
        n_images = 0
        for begin, end, text_begin, text_end in gaps(model_words, ids.size, text_words, encoded.ids.size):
            inside, text = ids[begin:end], encoded.ids[text_begin:text_end]
            shown = encoded.placeholders[text_begin:text_end]
            columns = np.flatnonzero(image[begin:end])
            count = int(shown.sum())
            if count == 0 and columns.size and begin == 0:
                count = 1  # the processor puts the image before the first word
            if (count == 0) != (columns.size == 0) or (count == 0 and not np.array_equal(inside, text)):
                raise _other_tokens(prompt, inside, text)
            if count == 0:
                source[begin:end] = np.arange(text_begin, text_end)
                continue
            places = np.flatnonzero(shown)
            head = common(inside[: columns[0]], text[: places[0]] if places.size else text)
            rest = text[places[-1] + 1 :] if places.size else text[head:]
            tail = common(inside[columns[-1] + 1 :][::-1], rest[::-1])
            source[begin : begin + head] = text_begin + np.arange(head)
            source[end - tail : end] = text_end - tail + np.arange(tail)
            runs.extend(image_runs(begin + columns, n_images, count, shown[places]))
            n_images += count
        return source, runs

    def _words(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are neither special tokens nor white space."""
        known = self._is_word
        for index in set(ids.tolist()) - known.keys():
            known[index] = bool(self._tokenizer.decode([index]).strip())
        return np.array([known[index] for index in ids.tolist()], bool)

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
        astray = sum(_content_spans(prompt) is None for prompt in prompts)
        if astray:
            remarks.append(f"the user's words were not found in {astray} prompts: their chat template counts as text")
        self._fitted[task] = _Fitted(prompts, encoded, fixed)
        self.notes.pop(task, None)
        if remarks:
            self.notes[task] = "; ".join(remarks)

    def _fit_one(self, prompt: Prompt) -> _Tokens:
        """Tokens of a prompt that was not among those fitted."""
        fitted = _Fitted([prompt], self._encode([prompt]), self._fitted[prompt.task].fixed)
        return fitted.tokens(0)

    def _encode(self, prompts: Sequence[Prompt]) -> EncodedPrompts:
        texts = [prompt.text for prompt in prompts]
        encoding = self._tokenizer(
            texts, add_special_tokens=self._add_special_tokens, return_offsets_mapping=True, truncation=False
        )
        sizes = np.array([len(ids) for ids in encoding["input_ids"]])
        ids = np.fromiter(chain.from_iterable(encoding["input_ids"]), np.int64, sizes.sum())
        flat = chain.from_iterable(chain.from_iterable(encoding["offset_mapping"]))
        offsets = np.fromiter(flat, np.int64, 2 * ids.size).reshape(-1, 2)
        begins = np.cumsum([0, *map(len, texts)])  # of each text in all of them
        owners = np.repeat(np.arange(len(texts)), sizes)
        starts = run_starts(ids == self._placeholder_id, owners)
        placeholders = np.diff(np.append(starts, ids.size)) * (ids[starts] == self._placeholder_id)
        ids, offsets, owners = ids[starts], offsets[starts], owners[starts]
        shown = np.bincount(owners, placeholders, minlength=len(prompts))
        for prompt, count in zip(prompts, shown.tolist(), strict=True):
            if prompt.image_shas and len(prompt.image_shas) != count:
                raise InputError(
                    "image_shas",
                    _name(prompt),
                    f"{len(prompt.image_shas)} images were named and the text has {count:.0f} placeholders",
                )
        segments, contents = _painted(prompts, begins)
        letters = _first_letters("".join(texts), offsets + begins[owners][:, None])
        segment = segments[letters]
        template = (contents[letters] == _OUTSIDE) & (segment < 0)
        special = np.isin(ids, self._special_ids) | (offsets[:, 0] == offsets[:, 1])
        bounds = np.append(0, np.cumsum(np.bincount(owners, minlength=len(prompts))))
        return EncodedPrompts(bounds, ids, placeholders, special, template, segment)


class _Tokens(NamedTuple):
    """Of one prompt's text; every array is `[n]`."""

    ids: np.ndarray
    placeholders: np.ndarray
    modality: np.ndarray
    segment: np.ndarray


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

    def find(self, prompt: Prompt) -> _Tokens | None:
        """Tokens of a prompt if it is one of these."""
        place, known = self._places.get(prompt.doc_id, (0, None))
        if known is None or (known.text, known.segments, known.content) != (
            prompt.text,
            prompt.segments,
            prompt.content,
        ):
            return None
        return self.tokens(place)

    def tokens(self, place: int) -> _Tokens:
        """Tokens of the prompt at a place."""
        span = self._encoded.span(place)
        return _Tokens(
            self._encoded.ids[span], self._encoded.placeholders[span], self._modality[span], self._segment[span]
        )


def _other_tokens(prompt: Prompt, ids: np.ndarray, expected: np.ndarray) -> InputError:
    common = min(ids.size, expected.size)
    unequal = np.flatnonzero(ids[:common] != expected[:common])
    difference = f"{ids.size} tokens, not {expected.size}"
    if unequal.size:
        difference = f"token {ids[unequal[0]]}, not {expected[unequal[0]]}"
    return InputError("prompt", _name(prompt), f"the model gets other tokens than the prompt's text has: {difference}")


def _name(prompt: Prompt) -> str:
    return f"{prompt.task} document {prompt.doc_id}"


def _painted(prompts: Sequence[Prompt], begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per letter of all texts together: its segment, -1 for none, and whether it is outside the user's words.

    Args:
        begins: where each text begins, and the end of the last.
    """
    segments = np.full(begins[-1] + 1, -1, np.int8)
    contents = np.full(begins[-1] + 1, _UNKNOWN, np.int8)
    for prompt, begin, end in zip(prompts, begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        for name, (start, stop) in _segment_spans(prompt).items():
            segments[begin + start : begin + stop] = SEGMENTS.index(name)
        content = _content_spans(prompt)
        if content:
            contents[begin:end] = _OUTSIDE
            for start, stop in content:
                contents[begin + start : begin + stop] = _INSIDE
    return segments, contents


def _first_letters(text: str, offsets: np.ndarray) -> np.ndarray:
    """The letter that decides where a token belongs: its first that is no white space, else its first."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    following = np.arange(letters.size + 1)
    following[:-1][_WHITE_SPACE[np.minimum(letters, _WHITE_SPACE.size - 1)]] = letters.size
    following = np.minimum.accumulate(following[::-1])[::-1]
    starts, ends = offsets[:, 0], offsets[:, 1]
    first = following[starts]
    return np.where(first < ends, first, starts)


def _segment_spans(prompt: Prompt) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    # Longest first: a short option must not be taken for the same word inside the question.
    for name, words in sorted(prompt.segments.items(), key=lambda item: (-len(item[1]), item[0])):
        if name not in TEXT_SEGMENTS:
            raise InputError("segments", name, f"segments are named {', '.join(TEXT_SEGMENTS)}")
        words = words.strip()
        if not words:
            continue
        start = prompt.text.find(words)
        while start >= 0 and any(start < end and start + len(words) > begin for begin, end in spans.values()):
            start = prompt.text.find(words, start + 1)
        if start < 0:
            raise InputError(
                f"segments.{name}",
                words,
                f"it does not occur in the prompt of {_name(prompt)}; name a field whose words are in the prompt",
            )
        spans[name] = (start, start + len(words))
    return spans


def _content_spans(prompt: Prompt) -> list[tuple[int, int]] | None:
    """Where the user's words are; empty when none were given, None when they are not in the text."""
    spans, position = [], 0
    for part in prompt.content:
        words = part.strip()  # chat templates trim
        start = prompt.text.find(words, position)
        if start < 0:
            return None
        position = start + len(words)
        spans.append((start, position))
    return spans
