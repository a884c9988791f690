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

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import BOILERPLATE, BOS, MODALITIES, SEGMENTS, SPECIAL, TEXT, VISUAL

# Share of documents at which a repeated token is boilerplate.
BOILERPLATE_SHARE = 0.9
# With fewer clusters than this behind an anchor, words of the documents repeat by chance: nothing is searched.
MIN_CLUSTERS = 8
# Images that serve as anchors, counted from the prompt's start (the last image always does).
MAX_IMAGE_ANCHORS = 8
# Segments that a task may declare; the others are found here.
TEXT_SEGMENTS = ("hint", "question", "options")
_DEFAULT_SEGMENT = "question"
_WIDTH = f"<U{max(map(len, SEGMENTS))}"
_CODE = {name: code for code, name in enumerate(MODALITIES)}
_IMAGE_SEGMENT, _SPECIAL_SEGMENT = SEGMENTS.index("image"), SEGMENTS.index("special")

_Anchor = tuple[str, int, bool]  # name, number, forward


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


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A tokenized prompt with every run of image placeholders collapsed to one token; arrays are `[n]`."""

    ids: np.ndarray
    placeholders: np.ndarray  # images in the run, 0 for other tokens
    special: np.ndarray
    template: np.ndarray  # outside the user's words
    segment: np.ndarray  # declared segment, empty where none

    @property
    def free(self) -> np.ndarray:
        """Tokens that are text unless they are boilerplate."""
        return np.asarray(~(self.special | self.template | (self.placeholders > 0)))


class _Majority:
    """The id that may hold the majority at each offset (Boyer and Moore's vote, weighted), and its true share."""

    def __init__(self) -> None:
        self.ids = np.empty(0, np.int64)
        self._vote = np.empty(0)
        self._hits = np.empty(0)
        self._total = 0.0
        self._clusters: set[str] = set()

    def vote(self, ids: np.ndarray, weight: float, cluster: str) -> None:
        grow = max(0, ids.size - self.ids.size)
        self.ids = np.pad(self.ids, (0, grow), constant_values=-1)
        self._vote = np.pad(self._vote, (0, grow))
        held, lead = self.ids[: ids.size], self._vote[: ids.size]
        lead += np.where(held == ids, weight, -weight)
        lost = lead < 0
        held[lost] = ids[lost]
        np.abs(lead, out=lead)
        self._total += weight
        self._clusters.add(cluster)

    def count(self, ids: np.ndarray, weight: float) -> None:
        self._hits = np.pad(self._hits, (0, self.ids.size - self._hits.size))
        self._hits[: ids.size] += weight * (self.ids[: ids.size] == ids)

    def fixed_ids(self) -> np.ndarray:
        """The boilerplate id at each offset, -1 where there is none."""
        # The margin keeps a share of exactly 90 % independent of the order of summation.
        fixed = self._hits >= (BOILERPLATE_SHARE - 1e-9) * self._total
        if len(self._clusters) < MIN_CLUSTERS:
            fixed[:] = False
        return np.where(fixed, self.ids, -1)


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
        self._fixed: dict[str, dict[_Anchor, np.ndarray]] = {}
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
        if prompt.task not in self._fixed:
            raise InputError("task", prompt.task, "its prompts were not fitted; pass them to Labeler.fit first")
        input_ids = np.asarray(input_ids, dtype=np.int64)
        encoded = self._encode(prompt)
        source, images = self._aligned(prompt, input_ids, encoded)
        modality, segment = (values[source] for values in self._collapsed_labels(prompt.task, encoded))
        added = source < 0  # by the processor, with the image
        modality[added], segment[added] = _CODE[SPECIAL], _SPECIAL_SEGMENT
        modality[input_ids == self._tokenizer.bos_token_id] = _CODE[BOS]
        for run in images:
            modality[run.columns], segment[run.columns] = _CODE[VISUAL], _IMAGE_SEGMENT
        image_index, grid_row, grid_column = _image_places(prompt, input_ids.size, images, image_grids)
        return TokenLabels(modality, segment, image_index, grid_row, grid_column)

    def _aligned(self, prompt: Prompt, ids: np.ndarray, encoded: _Encoded) -> tuple[np.ndarray, list[_ImageRun]]:
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
        runs: list[_ImageRun] = []
        n_images = 0
        for begin, end, text_begin, text_end in _gaps(model_words, ids.size, text_words, encoded.ids.size):
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
            head = _common(inside[: columns[0]], text[: places[0]] if places.size else text)
            rest = text[places[-1] + 1 :] if places.size else text[head:]
            tail = _common(inside[columns[-1] + 1 :][::-1], rest[::-1])
            source[begin : begin + head] = text_begin + np.arange(head)
            source[end - tail : end] = text_end - tail + np.arange(tail)
            runs.extend(_image_runs(begin + columns, n_images, count, shown[places]))
            n_images += count
        return source, runs

    def _words(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are neither special tokens nor white space."""
        known = self._is_word
        for index in set(ids.tolist()) - known.keys():
            known[index] = bool(self._tokenizer.decode([index]).strip())
        return np.array([known[index] for index in ids.tolist()], bool)

    def _fit_task(self, task: str, prompts: Sequence[Prompt]) -> None:
        encoded = [self._encode(prompt) for prompt in prompts]
        sizes = Counter(prompt.cluster for prompt in prompts)
        votes: dict[_Anchor, _Majority] = defaultdict(_Majority)
        for prompt, tokens in zip(prompts, encoded, strict=True):
            for anchor, ids in _from_anchors(tokens):
                votes[anchor].vote(ids, 1 / sizes[prompt.cluster], prompt.cluster)
        for prompt, tokens in zip(prompts, encoded, strict=True):
            for anchor, ids in _from_anchors(tokens):
                votes[anchor].count(ids, 1 / sizes[prompt.cluster])
        fixed = {anchor: majority.fixed_ids() for anchor, majority in votes.items()}
        remarks = []
        if not any(tokens.free.any() for tokens in encoded):
            remarks.append("no prompt has a text token: image cannot be compared with text")
        elif len(sizes) < MIN_CLUSTERS:
            remarks.append(
                f"only {len(sizes)} clusters of documents, fewer than {MIN_CLUSTERS}: fixed instructions could not be "
                "told from the documents' words and count as text"
            )
        elif not any((tokens.free & ~_is_fixed(tokens, fixed)).any() for tokens in encoded):
            fixed = {}
            remarks.append("the words are the same in every document: they count as text")
        astray = sum(_content_spans(prompt) is None for prompt in prompts)
        if astray:
            remarks.append(f"the user's words were not found in {astray} prompts: their chat template counts as text")
        self._fixed[task] = fixed
        self.notes.pop(task, None)
        if remarks:
            self.notes[task] = "; ".join(remarks)

    def _encode(self, prompt: Prompt) -> _Encoded:
        encoding = self._tokenizer(
            prompt.text, add_special_tokens=self._add_special_tokens, return_offsets_mapping=True, truncation=False
        )
        ids = np.array(encoding["input_ids"], np.int64)
        offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        starts = _run_starts(ids == self._placeholder_id)
        placeholders = np.diff(np.append(starts, ids.size)) * (ids[starts] == self._placeholder_id)
        if prompt.image_shas and len(prompt.image_shas) != placeholders.sum():
            raise InputError(
                "image_shas",
                _name(prompt),
                f"{len(prompt.image_shas)} images were named and the text has {placeholders.sum()} placeholders",
            )
        ids, offsets = ids[starts], offsets[starts]
        words = _first_letters(prompt.text, offsets)
        segment = np.full(ids.size, "", _WIDTH)
        for name, (start, end) in _segment_spans(prompt).items():
            segment[(words >= start) & (words < end)] = name
        content = _content_spans(prompt)
        template = np.zeros(ids.size, bool)
        if content:
            template[:] = segment == ""
            for start, end in content:
                template[(words >= start) & (words < end)] = False
        special = np.isin(ids, self._special_ids) | (offsets[:, 0] == offsets[:, 1])
        return _Encoded(ids, placeholders, special, template, segment)

    def _collapsed_labels(self, task: str, encoded: _Encoded) -> tuple[np.ndarray, np.ndarray]:
        boilerplate = encoded.template | _is_fixed(encoded, self._fixed[task])
        undeclared = encoded.segment == ""
        segment = np.array([SEGMENTS.index(name or _DEFAULT_SEGMENT) for name in encoded.segment], np.int8)
        modality = np.where(boilerplate, _CODE[BOILERPLATE], _CODE[TEXT]).astype(np.int8)
        segment[boilerplate & undeclared] = SEGMENTS.index("boilerplate")
        modality[encoded.special], segment[encoded.special] = _CODE[SPECIAL], _SPECIAL_SEGMENT
        return modality, segment


class _ImageRun(NamedTuple):
    """Image tokens that belong together: `images` images from number `first` on."""

    columns: np.ndarray
    first: int
    images: int


def _gaps(words: np.ndarray, size: int, text_words: np.ndarray, text_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Where there is something between two words or at an end: begin and end in the model's input and in the text."""
    edges = np.concatenate([[-1], words, [size]])
    text_edges = np.concatenate([[-1], text_words, [text_size]])
    for gap in np.flatnonzero((np.diff(edges) > 1) | (np.diff(text_edges) > 1)):
        yield edges[gap] + 1, edges[gap + 1], text_edges[gap] + 1, text_edges[gap + 1]


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the common beginning."""
    size = min(left.size, right.size)
    return int(np.append(np.flatnonzero(left[:size] != right[:size]), size)[0])


def _image_runs(columns: np.ndarray, first: int, count: int, placeholders: np.ndarray) -> list[_ImageRun]:
    """Split the image tokens between two words by image where their runs tell, else keep them together."""
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    counts = placeholders if len(runs) == placeholders.size else np.ones(count, np.int64)
    if len(runs) != len(counts):
        return [_ImageRun(columns, first, count)]
    starts = first + np.cumsum(counts) - counts
    return [_ImageRun(*run) for run in zip(runs, starts.tolist(), counts.tolist(), strict=True)]


def _other_tokens(prompt: Prompt, ids: np.ndarray, expected: np.ndarray) -> InputError:
    common = min(ids.size, expected.size)
    unequal = np.flatnonzero(ids[:common] != expected[:common])
    difference = f"{ids.size} tokens, not {expected.size}"
    if unequal.size:
        difference = f"token {ids[unequal[0]]}, not {expected[unequal[0]]}"
    return InputError("prompt", _name(prompt), f"the model gets other tokens than the prompt's text has: {difference}")


def _name(prompt: Prompt) -> str:
    return f"{prompt.task} document {prompt.doc_id}"


def _run_starts(is_image: np.ndarray) -> np.ndarray:
    """Indices that remain when each run of image tokens is collapsed to its first one."""
    inside = np.zeros(is_image.size, bool)
    inside[1:] = is_image[1:] & is_image[:-1]
    return np.flatnonzero(~inside)


def _first_letters(text: str, offsets: np.ndarray) -> np.ndarray:
    """The character that decides where a token belongs: its first that is no white space, else its first."""
    following = np.arange(len(text) + 1)
    blank = np.array([letter.isspace() for letter in text] + [False])
    following[blank] = len(text)
    following = np.minimum.accumulate(following[::-1])[::-1]
    starts, ends = offsets[:, 0], offsets[:, 1]
    letters = following[starts]
    return np.where(letters < ends, letters, starts)


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


def _anchor_positions(encoded: _Encoded) -> Iterator[tuple[str, int, int]]:
    """Name, number and token index of each anchor."""
    yield "prompt", 0, 0
    yield "prompt", 1, encoded.ids.size
    images = np.flatnonzero(encoded.placeholders)
    for number, position in enumerate(images[:MAX_IMAGE_ANCHORS]):
        yield "image", number, position
    if images.size:
        yield "image", -1, images[-1]
    for name in TEXT_SEGMENTS:
        inside = np.flatnonzero(encoded.segment == name)
        if inside.size:
            yield name, 0, inside[0]
            yield name, 1, inside[-1] + 1


def _from_anchors(encoded: _Encoded) -> Iterator[tuple[_Anchor, np.ndarray]]:
    """Token ids from each anchor to the end, and from each anchor back to the start."""
    for name, number, position in _anchor_positions(encoded):
        yield (name, number, True), encoded.ids[position:]
        yield (name, number, False), encoded.ids[:position][::-1]


def _is_fixed(encoded: _Encoded, fixed: Mapping[_Anchor, np.ndarray]) -> np.ndarray:
    found = np.zeros(encoded.ids.size, bool)
    for name, number, position in _anchor_positions(encoded):
        for forward, ids, flags in (
            (True, encoded.ids[position:], found[position:]),
            (False, encoded.ids[:position][::-1], found[:position][::-1]),
        ):
            known = fixed.get((name, number, forward), ids[:0])[: ids.size]
            flags[: known.size] |= known == ids[: known.size]
    return found


def _image_places(
    prompt: Prompt, size: int, runs: Sequence[_ImageRun], grids: Sequence[tuple[int, int]] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image index, grid row and grid column of each of the T tokens; -1 where there is none."""
    images = sum(run.images for run in runs)
    if grids is not None and len(grids) != images:
        raise InputError("image_grids", _name(prompt), f"{len(grids)} grids for {images} images; give one per image")
    index, row, column = (np.full(size, -1, np.int32) for _ in range(3))
    for columns, first, count in runs:
        index[columns] = first
        if grids is None:
            continue
        shapes = grids[first : first + count]
        areas = [rows * width for rows, width in shapes]
        if sum(areas) != columns.size:
            raise InputError(
                "image_grids", _name(prompt), f"grids {list(shapes)} do not make the {columns.size} image tokens"
            )
        index[columns] = np.repeat(np.arange(first, first + count), areas)
        row[columns] = np.concatenate([np.repeat(np.arange(rows), width) for rows, width in shapes])
        column[columns] = np.concatenate([np.tile(np.arange(width), rows) for rows, width in shapes])
    return index, row, column
