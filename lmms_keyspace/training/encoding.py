"""From conversations to tensors: the model's own chat template and processor, and a loss on the answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset

from lmms_keyspace.errors import InputError
from lmms_keyspace.training.examples import IMAGE_MARK, Example

IGNORED = -100  # the label of a token that is not learned
EXAMPLE_ID = "example_id"
_BY_TOKEN = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}


class EncodedExamples(Dataset[dict[str, Tensor]]):
    """Examples as the model takes them, encoded when asked for.

    An item holds `input_ids` and `labels` [T], the other per-token inputs of the model, its image inputs with one entry
    per image (or patch), and `example_id` [].

    Args:
        examples: the conversations.
        processor: the model's own, with a fast tokenizer and a chat template.
        visual_ids: ids of the placeholders of image features.

    Raises:
        InputError: (from an item) a row that the chat template or the processor refuses, a template that rewrites
            earlier turns, or images without visual tokens.
    """

    def __init__(self, examples: Sequence[Example], processor: Any, visual_ids: Sequence[int]) -> None:
        if not processor.tokenizer.is_fast:
            raise InputError("pretrained", type(processor.tokenizer).__name__, "training needs a fast tokenizer.")
        if not getattr(processor, "chat_template", None):
            raise InputError("pretrained", type(processor).__name__, "training needs a processor with a chat template.")
        self.examples = examples
        self._processor = processor
        self._visual_ids = torch.tensor(list(visual_ids))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[index]
        try:
            inputs = _encode(example, self._processor)
        except InputError:
            raise
        except (ValueError, TemplateError) as error:
            raise InputError(
                example.name,
                f"{len(example.images)} images",
                f"the processor of this model, or its chat template, refuses the row: {error}",
            ) from error
        if example.images and not torch.isin(inputs["input_ids"], self._visual_ids).any():
            raise InputError(
                example.name,
                f"{len(example.images)} images, no visual token",
                "the chat template of this model writes no placeholder for an image.",
            )
        return inputs | {EXAMPLE_ID: torch.tensor(index)}


class Collator:
    """Rows of `EncodedExamples` to a right-padded batch; `attention_mask` [B, T] tells padding.

    Args:
        pad_id: token id of padding.
    """

    def __init__(self, pad_id: int) -> None:
        self._fill = _BY_TOKEN | {"input_ids": pad_id}

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        real = [torch.ones_like(row["input_ids"]) for row in rows]
        batch = {"attention_mask": _padded(real, 0), EXAMPLE_ID: torch.stack([row[EXAMPLE_ID] for row in rows])}
        for name in dict.fromkeys(name for row in rows for name in row if name != EXAMPLE_ID):
            values = [row[name] for row in rows if name in row]
            batch[name] = _padded(values, self._fill[name]) if name in self._fill else _stacked(values)
        return batch


def _encode(example: Example, processor: Any) -> dict[str, Tensor]:
    messages = [{"role": turn.role, "content": _parts(turn.text)} for turn in example.turns]
    text = _render(processor, messages)
    images = [image() for image in example.images]
    inputs = _processed(processor, text, images)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    for place, turn in enumerate(example.turns):
        if turn.role != "assistant":
            continue
        prompt, upto = (_render(processor, messages[: place + k], answer=k == 0) for k in (0, 1))
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise InputError(
                example.name,
                f"answer {place}",
                "the chat template renders this turn otherwise once others follow; train on one turn a row.",
            )
        shown = sum(other.text.count(IMAGE_MARK) for other in example.turns[: place + 1] if other.role == "user")
        # Where images follow, what they expand to would move the count from the end: encode up to this answer.
        head = ids if shown == len(images) else _processed(processor, upto, images[:shown])["input_ids"]
        whole = text if shown == len(images) else upto
        start, stop = _answer(processor, head, whole, (len(prompt), len(upto)))
        labels[start:stop] = ids[start:stop]
    end = processor.tokenizer.eos_token_id
    if end is not None and not (labels == end).any():
        inputs = {name: _ended(name, value, end) for name, value in inputs.items()}
        labels = torch.cat([labels, torch.tensor([end])])
    return inputs | {"labels": labels}


def _parts(text: str) -> list[dict[str, str]]:
    """The content of a message; templates put their own line breaks around images."""
    parts: list[dict[str, str]] = []
    for number, words in enumerate(text.split(IMAGE_MARK)):
        parts += [{"type": "image"}] * (number > 0)
        parts += [{"type": "text", "text": words.strip()}] * bool(words.strip())
    return parts


def _render(processor: Any, messages: list[dict[str, Any]], *, answer: bool = False) -> str:
    return str(processor.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False))


def _processed(processor: Any, text: str, images: Sequence[Any]) -> dict[str, Tensor]:
    inputs = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt")
    kept = {name: value[0] if name in _BY_TOKEN else value for name, value in inputs.items()}
    del kept["attention_mask"]
    return kept


def _answer(processor: Any, ids: Tensor, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """Where in `ids` the characters `span` of `text` are.

    The processor replaces each placeholder in `text` by many tokens. None follows the answer, so its tokens are counted
    from the end, in `text` as it is written.
    """
    plain = processor.tokenizer(text, return_offsets_mapping=True)
    inside = [k for k, (start, stop) in enumerate(plain["offset_mapping"]) if stop > span[0] and start < span[1]]
    if not inside:
        raise InputError("data", text[span[0] : span[1]], "an answer must have at least one token.")
    written = plain["input_ids"][inside[0] :]
    start = len(ids) - len(written)
    assert ids[start:].tolist() == written, "the processor changes text after the last image"
    return start, start + len(inside)


def _ended(name: str, value: Tensor, end: int) -> Tensor:
    if name not in _BY_TOKEN:
        return value
    return torch.cat([value, value.new_tensor([end if name == "input_ids" else 0])])


def _padded(values: Sequence[Tensor], fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Image inputs of all rows, one after the other; images of fewer tiles are filled up with empty ones."""
    if len({value.shape[1:] for value in values}) > 1:
        most = max(value.shape[1] for value in values)
        values = [
            torch.cat([value, value.new_zeros(value.shape[0], most - value.shape[1], *value.shape[2:])], dim=1)
            for value in values
        ]
    return torch.cat(list(values))
