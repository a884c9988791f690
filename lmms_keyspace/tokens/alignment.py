"""Which token of a prompt's text each token of the model's input is.

A processor replaces each image's placeholder by image tokens and, in some architectures, writes special tokens and
white space around and between them (start and end of the image, breaks between rows, names of tiles). All words of the
text must be found again, in order, or the prompt is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lmms_keyspace.errors import InputError
from lmms_keyspace.tokens.image_tokens import ImageRun, common, gaps, image_runs, run_starts
from lmms_keyspace.tokens.prompts import Prompt


class TextTokens(NamedTuple):
    """Of one prompt's text, or of several, one after the other; every array is `[n]`."""

    ids: np.ndarray
    placeholders: np.ndarray  # images in the run that the token stands for, 0 for other tokens
    modality: np.ndarray
    segment: np.ndarray


class Aligner:
    """Aligns the model's input with the text.

    Args:
        tokenizer: of the model.
        image_token_id: the id of image tokens in the model's input.
    """

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._is_word = {index: False for index in tokenizer.added_tokens_decoder}

    def copied(
        self, ids: Sequence[np.ndarray], texts: Sequence[TextTokens]
    ) -> tuple[np.ndarray, list[list[ImageRun]]] | None:
        """Align several prompts where the processor only repeated image tokens.

        Returns:
            Per token of all inputs, one after the other, the token of all texts that it is; and the image tokens by
            prompt, their columns counted through all inputs. None where the processor did more in one of them.
        """
        everything, placeholder = np.concatenate(ids), np.concatenate([text.placeholders for text in texts]) > 0
        owners = np.repeat(np.arange(len(ids)), [own.size for own in ids])
        image = everything == self._image_token_id
        starts = run_starts(image, owners)
        if starts.size != placeholder.size or not np.array_equal(image[starts], placeholder):
            return None
        sizes = [text.ids.size for text in texts]
        text_owners = np.repeat(np.arange(len(texts)), sizes)
        same = (everything[starts] == np.concatenate([text.ids for text in texts])) | placeholder
        if not same.all() or not np.array_equal(owners[starts], text_owners):
            return None
        ends = np.append(starts[1:], everything.size)
        runs: list[list[ImageRun]] = [[] for _ in ids]
        shown = np.concatenate([text.placeholders for text in texts])
        for place in np.flatnonzero(placeholder).tolist():
            own = runs[text_owners[place]]
            first = own[-1].first + own[-1].images if own else 0
            own.append(ImageRun(np.arange(starts[place], ends[place]), first, int(shown[place])))
        return np.repeat(np.arange(starts.size), ends - starts), runs

    def aligned(self, prompt: Prompt, ids: np.ndarray, text: TextTokens) -> tuple[np.ndarray, list[ImageRun]]:
        """Per token of the model's input the token of the text that it is, -1 where the processor added it; and the
        image tokens.

        Words must agree one by one. Between two words without an image everything else must agree too; where there is
        an image, what agrees at both ends is the text's and the rest is the processor's.
        """
        image = ids == self._image_token_id
        model_words = np.flatnonzero(~image & self._words(ids))
        text_words = np.flatnonzero((text.placeholders == 0) & self._words(text.ids))
        if not np.array_equal(ids[model_words], text.ids[text_words]):
            raise _other_tokens(prompt, ids[model_words], text.ids[text_words])
        source = np.full(ids.size, -1)
        source[model_words] = text_words
        runs: list[ImageRun] = []
        n_images = 0
        for begin, end, text_begin, text_end in gaps(model_words, ids.size, text_words, text.ids.size):
            inside, written = ids[begin:end], text.ids[text_begin:text_end]
            shown = text.placeholders[text_begin:text_end]
            columns = np.flatnonzero(image[begin:end])
            count = int(shown.sum())
            if count == 0 and columns.size and begin == 0:
                count = 1  # the processor puts the image before the first word
            if (count == 0) != (columns.size == 0) or (count == 0 and not np.array_equal(inside, written)):
                raise _other_tokens(prompt, inside, written)
            if count == 0:
                source[begin:end] = np.arange(text_begin, text_end)
                continue
            places = np.flatnonzero(shown)
            head = common(inside[: columns[0]], written[: places[0]] if places.size else written)
            rest = written[places[-1] + 1 :] if places.size else written[head:]
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


def _other_tokens(prompt: Prompt, ids: np.ndarray, expected: np.ndarray) -> InputError:
    common = min(ids.size, expected.size)
    unequal = np.flatnonzero(ids[:common] != expected[:common])
    difference = f"{ids.size} tokens, not {expected.size}"
    if unequal.size:
        difference = f"token {ids[unequal[0]]}, not {expected[unequal[0]]}"
    return InputError("prompt", prompt.name, f"the model gets other tokens than the prompt's text has: {difference}")
