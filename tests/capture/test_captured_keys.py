"""Captured keys and the token table against direct computation on tiny random models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from adapter_models import IMAGE, IMAGE_SIZE
from models import left_padded
from toy_captures import LAYERS, TOKENIZER, expanded_ids, llava_inputs, make_prompts, make_rows, run

from lmms_keyspace.capture import Capture, CaptureError, Row
from lmms_keyspace.capture.token_columns import prefix_hashes
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.records import ALL_HEADS, TEXT, TOKEN_COLUMNS, VISUAL
from lmms_keyspace.sampling import Sampler
from lmms_keyspace.tokens import Labeler, Prompt


def direct_keys(model, row: Row) -> list[torch.Tensor]:
    """k_proj of the layer's own input, one row alone, through hidden states: `[T, KV heads, d]` per layer."""
    with torch.inference_mode():
        hidden = model(**llava_inputs([row]), output_hidden_states=True).hidden_states
        layers = model.model.language_model.layers
        return [
            layer.self_attn.k_proj(layer.input_layernorm(states[0])).unflatten(-1, (-1, layer.self_attn.head_dim))
            for layer, states in zip(layers, hidden, strict=False)
        ]


def test_keys_are_k_proj_of_the_sampled_tokens(llava, rows):
    capture, _ = run(llava, rows, batch_size=4)
    table = capture.token_table()
    direct = {row.prompt.doc_id: direct_keys(llava, row) for row in rows}
    assert capture.layers == list(LAYERS)
    for layer in capture.layers:
        keys, clusters = capture.keys("toy", layer=layer)
        expected = torch.stack([direct[doc][layer][at] for doc, at in zip(table.doc_id, table.position, strict=True)])
        torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-4)
        assert clusters == table["cluster"].tolist()
    picked = {row.prompt.doc_id: row.positions.tolist() for row in rows}
    assert {doc: group.position.tolist() for doc, group in table.groupby("doc_id")} == picked
    norms = [
        np.mean([direct[doc][layer][at].norm(dim=-1).mean().item() for layer in LAYERS])
        for doc, at in zip(table.doc_id, table.position, strict=True)
    ]
    np.testing.assert_allclose(table.key_norm, norms, rtol=1e-4)


def test_subsets_of_keys_follow_the_token_table(llava, rows):
    capture, _ = run(llava, rows, layers=[1])
    table = capture.token_table()
    everything, _ = capture.keys("toy", layer=1)
    for condition in ("clean", "conflict"):
        for modality in (VISUAL, TEXT):
            chosen = (table.condition == condition) & (table.modality == modality)
            keys, clusters = capture.keys("toy", condition, layer=1, modality=modality)
            assert torch.equal(keys, everything[torch.as_tensor(chosen.to_numpy())])
            assert clusters == table.cluster[chosen].tolist()
            assert len(keys) > 0
    nothing, clusters = capture.keys("another", layer=1)
    assert nothing.shape == (0, 2, 8)
    assert clusters == []


def test_token_table_describes_the_prompt(llava, rows):
    table = run(llava, rows)[0].token_table()
    assert list(table) == list(TOKEN_COLUMNS)
    ids = {row.prompt.doc_id: row.input_ids for row in rows}
    assert [ids[doc][at] for doc, at in zip(table.doc_id, table.position, strict=True)] == table.token_id.tolist()
    assert (table.token_id[table.modality == VISUAL] == IMAGE).all()
    visual = table[table.modality == VISUAL]
    start = [int(np.flatnonzero(ids[doc] == IMAGE)[0]) for doc in visual.doc_id]
    assert (visual.grid_row * 2 + visual.grid_column).tolist() == (visual.position - start).tolist()
    assert (visual.image_sha == "sha" + visual.doc_id.astype(str)).all()
    # Generation numbers the unpadded prompt from zero.
    assert table.position_t.tolist() == table.position_h.tolist() == table.position.tolist()
    # Two conditions share the template up to the first image token; from there on the image tells them apart.
    content = table[table.modality.isin([VISUAL, TEXT])]
    assert content.prefix_hash.nunique() == len(content) < len(table)


def test_tokens_of_several_images(llava):
    prompt = Prompt("toy", 0, "c", "default", "USER: w1 <image> w2 <image> w3 ASSISTANT:", image_shas=("a", "b"))
    ids = expanded_ids(prompt)
    labels = Labeler(TOKENIZER, IMAGE).fit([prompt]).label(prompt, ids, [(2, 2), (2, 2)])
    row = Row(prompt, ids, labels, np.arange(ids.size))
    capture = Capture(llava, decoder_sites(llava))
    with capture.batch([row]), torch.inference_mode():
        llava(**left_padded([ids]), pixel_values=torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    table = capture.token_table()
    assert table.image_index.tolist() == [-1] * 3 + [0] * 4 + [-1] + [1] * 4 + [-1] * 2
    assert table.image_sha.tolist() == ["a"] * 8 + ["b"] * 4 + ["a"] * 2
    other = Row(replace(prompt, image_shas=("a", "c")), ids, labels, np.arange(ids.size))
    hashes = prefix_hashes([other])
    same = [int(mine, 16) == theirs for mine, theirs in zip(table.prefix_hash, hashes, strict=True)]
    assert same == [True] * 8 + [False] * 6


def test_rows_of_clusters_not_chosen_give_attention_but_no_keys(llava):
    prompts = make_prompts()
    chosen = Sampler(seed=3, clusters=2).choose_clusters("toy", [prompt.cluster for prompt in prompts])
    rows = [
        row if row.prompt.cluster in chosen else Row(row.prompt, row.input_ids, row.labels, np.empty(0, np.int64))
        for row in make_rows(prompts)
    ]
    capture, _ = run(llava, rows, batch_size=2)
    assert set(capture.token_table()["cluster"]) == chosen
    assert len(chosen) == 2
    assert capture.attention_table()["doc_id"].nunique() == len(prompts)
    by_head = capture.attention_table().query(f"head_group != '{ALL_HEADS}'")
    assert set(by_head["cluster"]) == chosen
    assert len(by_head) == by_head["doc_id"].nunique() * len(LAYERS) * 2


def test_a_document_is_captured_once(llava, rows):
    capture, _ = run(llava, rows)
    with pytest.raises(CaptureError, match="toy document 0 was captured already"), capture.batch(rows[:1]):
        pass
