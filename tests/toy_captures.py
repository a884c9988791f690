"""Toy documents, a tiny LLaVA that answers them, and its capture; shared by the tests of capture."""

from __future__ import annotations

import adapter_models
import numpy as np
import pandas as pd
import torch
from adapter_models import EOS, IMAGE, IMAGE_SIZE, IMAGE_TOKENS
from models import expanded, left_padded, tokenizer

from lmms_keyspace.capture import Capture, Row
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.records import ALL_HEADS
from lmms_keyspace.sampling import Sampler
from lmms_keyspace.tokens import Labeler, Prompt

TOKENIZER = tokenizer()
SAMPLER = Sampler(seed=3, clusters=100, tokens=3)
LAYERS = (0, 1, 2)


def tiny_llava(attn_implementation: str = "sdpa"):
    model = adapter_models.tiny_llava()
    model.set_attn_implementation(attn_implementation)
    return model


def make_prompts(count: int = 8, task: str = "toy") -> list[Prompt]:
    """Documents of different length, two conditions a cluster; every fifth has no image."""
    prompts = []
    for number in range(count):
        words = " ".join(f"w{(7 * number + step) % 34}" for step in range(3 + number % 4))
        image = "" if number % 5 == 4 else "<image> \n "
        hint = "Hint says red . " if number % 2 else ""
        prompts.append(
            Prompt(
                task=task,
                doc_id=number,
                cluster=f"c{number // 2}",
                condition="conflict" if number % 2 else "clean",
                text=f"USER: {image}{hint}What color is the {words} ? \n Answer in one word . ASSISTANT:",
                segments={"hint": hint, "question": f"What color is the {words} ?"},
                image_shas=() if number % 5 == 4 else (f"sha{number}",),
            )
        )
    return prompts


def expanded_ids(prompt: Prompt, image_tokens: int = IMAGE_TOKENS) -> np.ndarray:
    return expanded(TOKENIZER(prompt.text)["input_ids"], image_tokens)


def make_rows(prompts: list[Prompt], sampler: Sampler = SAMPLER) -> list[Row]:
    labeler = Labeler(TOKENIZER, IMAGE).fit(make_prompts(40))
    rows = []
    for prompt in prompts:
        ids = expanded_ids(prompt)
        labels = labeler.label(prompt, ids, [(2, 2)] * len(prompt.image_shas))
        rows.append(Row(prompt, ids, labels, sampler.choose_positions(prompt.task, prompt.cluster, labels)))
    return rows


def pixels_of(rows: list[Row]) -> dict[str, torch.Tensor]:
    shown = [row for row in rows if row.prompt.image_shas]
    if not shown:
        return {}
    made = [
        torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(row.prompt.doc_id))
        for row in shown
    ]
    return {"pixel_values": torch.stack(made)}


def llava_inputs(rows: list[Row]) -> dict[str, torch.Tensor]:
    return left_padded([row.input_ids for row in rows]) | pixels_of(rows)


@torch.inference_mode()
def run(model, rows, batch_size=8, **settings):
    """Generate over the rows in batches; returns the capture and the generated ids per row."""
    capture = Capture(model, decoder_sites(model), **settings)
    answers = {}
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        inputs = llava_inputs(part)
        with capture.batch(part):
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for row, ids in zip(part, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            stop = ids.index(EOS) if EOS in ids else len(ids)
            answers[row.prompt.doc_id] = ids[:stop]
    return capture, answers


def of_all_heads(capture: Capture) -> pd.DataFrame:
    """The attention table without the rows by KV head."""
    return capture.attention_table().query(f"head_group == '{ALL_HEADS}'")
