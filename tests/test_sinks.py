"""Attention sinks: the criterion, and where capture looks for it."""

from __future__ import annotations

import adapter_models
import numpy as np
import torch
from adapter_models import IMAGE
from models import expanded, left_padded, tokenizer

from lmms_keyspace.capture import Capture, Row
from lmms_keyspace.capture.sinks import THRESHOLD, can_have_sinks, is_sink
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.tokens import Labeler, Prompt


def test_one_entry_above_twenty_after_normalization_makes_a_sink():
    width = 1024
    flat = torch.ones(width)
    # One entry x among ones: x / sqrt((x^2 + d - 1) / d) = 20.
    limit = THRESHOLD * ((width - 1) / (width - THRESHOLD**2)) ** 0.5
    below, above = flat.clone(), flat.clone()
    below[7], above[7] = 0.99 * limit, -1.01 * limit
    assert is_sink(torch.stack([flat, below, above])).tolist() == [False, False, True]
    assert is_sink(1000 * torch.stack([flat, below, above])).tolist() == [False, False, True]


def test_narrow_models_and_outer_layers_cannot_have_sinks():
    narrow = decoder_sites(adapter_models.tiny_llava(num_hidden_layers=5))
    wide = decoder_sites(adapter_models.tiny_llava(hidden_size=512, num_hidden_layers=5))
    assert [layer for layer in range(5) if can_have_sinks(wide, layer)] == [2, 3]
    assert not any(can_have_sinks(narrow, layer) for layer in range(5))


def test_capture_flags_the_token_with_a_massive_activation():
    words = tokenizer()
    model = adapter_models.tiny_llava(hidden_size=512, num_hidden_layers=4)
    sink = words.convert_tokens_to_ids("w3")
    with torch.no_grad():  # stays in the residual stream
        model.get_input_embeddings().weight[sink, 11] = 1e5
    prompts = [
        Prompt("toy", 0, "c0", "default", "USER: w1 w2 w3 <image> w4 ?"),
        Prompt("toy", 1, "c1", "default", "USER: w1 w2 w4 w5 w3 ?"),  # in the second chunk of three
    ]
    labeler = Labeler(words, IMAGE).fit(prompts)
    rows = []
    for prompt in prompts:
        ids = expanded(words(prompt.text)["input_ids"], 4)
        rows.append(Row(prompt, ids, labeler.label(prompt, ids), np.arange(ids.size)))
    for chunks in ({}, {"prefill_chunk_size": 3}):
        shown = rows[1:] if chunks else rows
        capture = Capture(model, decoder_sites(model))
        pixels = {} if chunks else {"pixel_values": torch.zeros(1, 3, 8, 8)}
        inputs = left_padded([row.input_ids for row in shown]) | pixels
        with capture.batch(shown), torch.inference_mode():
            model.generate(**inputs, max_new_tokens=2, do_sample=False, **chunks)
        table = capture.token_table()
        assert table["sink"].sum() == len(shown)
        assert (table.loc[table["sink"], "token_id"] == sink).all()
