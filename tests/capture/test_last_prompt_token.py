"""Attention of the last prompt token, its scores and key norms, against eager attention weights."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
from adapter_models import IMAGE
from models import family_model, left_padded
from toy_captures import (
    LAYERS,
    SAMPLER,
    TOKENIZER,
    expanded_ids,
    llava_inputs,
    make_prompts,
    make_rows,
    of_all_heads,
    run,
    tiny_llava,
)

from lmms_keyspace.capture import Capture, Row, attention_store, last_query, measures
from lmms_keyspace.families import FAMILIES, decoder_sites
from lmms_keyspace.records import ALL_HEADS, ATTENTION_COLUMNS, SEGMENTS, TEXT, VISUAL
from lmms_keyspace.tokens import Labeler
from lmms_keyspace.tokens.labels import TokenLabels


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_mass_is_that_of_eager_attention(rows, implementation):
    eager = tiny_llava("eager")
    with torch.inference_mode():
        weights = eager(**llava_inputs(rows), output_attentions=True).attentions
    capture, _ = run(tiny_llava(implementation), rows)
    table = of_all_heads(capture).set_index(["doc_id", "layer"])
    assert list(capture.attention_table()) == list(ATTENTION_COLUMNS)
    width = max(row.input_ids.size for row in rows)
    for line, row in enumerate(rows):
        pad = width - row.input_ids.size
        for layer in LAYERS:
            last = weights[layer][line, :, -1, pad:].mean(0).numpy()
            got = table.loc[row.prompt.doc_id, layer]
            for segment in SEGMENTS:
                inside = row.labels.segment == segment
                assert got[f"mass_{segment}"] == pytest.approx(last[inside].sum(), abs=1e-5)
                assert got[f"n_{segment}"] == inside.sum()
            assert sum(got[f"mass_{segment}"] for segment in SEGMENTS) == pytest.approx(1, abs=1e-5)
            n_image = (row.labels.segment == "image").sum()
            if n_image:
                uniform = n_image / row.input_ids.size
                assert got["image_over_uniform"] == pytest.approx(got["mass_image"] / uniform, rel=1e-4)
            else:
                assert np.isnan(got["image_over_uniform"])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"instructblip"}))
def test_chunked_prefill_of_every_family_agrees_with_eager_attention(family):
    """Text alone, left padded (InstructBLIP always shows an image). A sliding layer's cache hands over the newest keys
    only. With images: test_family_prompts.py."""
    rows = make_rows([prompt for prompt in make_prompts(40) if not prompt.image_shas])
    inputs = llava_inputs(rows)
    with torch.inference_mode():
        weights = family_model(family, "eager")(**inputs, output_attentions=True).attentions
    model = family_model(family)
    capture = Capture(model, decoder_sites(model), spaces=("k_pre", "k_post", "v"))
    with capture.batch(rows), torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=5)
    table = of_all_heads(capture).set_index(["doc_id", "layer"])
    width = inputs["input_ids"].shape[1]
    weights = [layer for layer in weights if layer is not None]
    for line, row in enumerate(rows):
        for layer, weight in zip(capture.layers, weights, strict=True):
            last = weight[line, :, -1, width - row.input_ids.size :].mean(0).numpy()
            for segment in SEGMENTS:
                expected = last[row.labels.segment == segment].sum()
                assert table.loc[(row.prompt.doc_id, layer), f"mass_{segment}"] == pytest.approx(expected, abs=1e-5)
    assert len(capture.keys("toy", space="k_post", layer=1)[0]) == len(capture.token_table()) > 0


def test_scores_and_key_norms_are_means_over_tokens_and_heads(llava, rows):
    capture, _ = run(llava, rows[:1], spaces=("k_post", "q"))
    row = rows[0]
    seen = {}

    def keep(module, args, kwargs):
        seen["states"], seen["cos"], seen["sin"] = kwargs["hidden_states"], *kwargs["position_embeddings"]

    site = decoder_sites(llava).sites[1]
    handle = site.attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        llava(**llava_inputs([row]))
        handle.remove()
        query = site.attention.q_proj(seen["states"]).unflatten(-1, (4, 8)).transpose(1, 2)
        keys = site.attention.k_proj(seen["states"]).unflatten(-1, (2, 8)).transpose(1, 2)
        query, rotated = site.apply_rope(query, keys, seen["cos"], seen["sin"])
        scores = query[0, :, -1:] @ rotated[0].repeat_interleave(2, 0).transpose(1, 2) / 8**0.5
    table = capture.attention_table().query("layer == 1").set_index("head_group")
    assert table.index.tolist() == [ALL_HEADS, "0", "1"]
    for group, heads, kv_heads in ((ALL_HEADS, [0, 1, 2, 3], [0, 1]), ("0", [0, 1], [0]), ("1", [2, 3], [1])):
        got, seen_by, norms = table.loc[group], scores[heads, 0], keys[0, kv_heads].norm(dim=-1)
        for name, modality in (("visual", VISUAL), ("text", TEXT)):
            inside = torch.as_tensor(row.labels.modality == modality)
            assert got[f"qk_{name}"] == pytest.approx(seen_by[:, inside].mean().item(), abs=1e-4)
            assert got[f"lse_{name}"] == pytest.approx(seen_by[:, inside].logsumexp(-1).mean().item(), abs=1e-4)
            assert got[f"key_norm_{name}"] == pytest.approx(norms[:, inside].mean().item(), rel=1e-4)
    at = torch.as_tensor(row.positions)
    torch.testing.assert_close(capture.keys("toy", space="q", layer=1)[0], query[0][:, at].transpose(0, 1))
    torch.testing.assert_close(capture.keys("toy", space="k_post", layer=1)[0], rotated[0][:, at].transpose(0, 1))


def test_mrope_positions_and_attention_of_qwen2_5_vl():
    model = family_model("qwen2_5_vl")
    grid = torch.tensor([[1, 4, 8]])  # patches: 2 by 4 image tokens after merging
    prompts = [prompt for prompt in make_prompts(4) if prompt.image_shas]
    labeler = Labeler(TOKENIZER, IMAGE).fit(make_prompts(40))
    decoder = decoder_sites(model)
    inputs = left_padded([expanded_ids(prompt, 8) for prompt in prompts])
    inputs["image_grid_thw"] = grid.repeat(len(prompts), 1)
    inputs["pixel_values"] = torch.randn(len(prompts) * 32, 3 * 2 * 4 * 4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    assert decoder.image_grids(inputs) == [(2, 4)] * len(prompts)
    rows = []
    for prompt in prompts:
        labels = labeler.label(prompt, expanded_ids(prompt, 8), [(2, 4)])
        picked = SAMPLER.choose_positions("toy", prompt.cluster, labels)
        rows.append(Row(prompt, expanded_ids(prompt, 8), labels, picked))
    capture = Capture(model, decoder, spaces=("k_pre", "k_post"))
    with capture.batch(rows), torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    visual = capture.token_table().query("modality == 'visual'")
    assert (visual.position_h - visual.grid_row == visual.position_t).all()
    assert (visual.position_w - visual.grid_column == visual.position_t).all()
    eager = family_model("qwen2_5_vl", "eager")
    with torch.inference_mode():
        weights = eager(**inputs, output_attentions=True).attentions
    table = of_all_heads(capture).set_index(["doc_id", "layer"])
    width = inputs["input_ids"].shape[1]
    for line, row in enumerate(rows):
        image = np.flatnonzero(row.labels.segment == "image") + width - row.input_ids.size
        for layer in (0, 1):
            expected = weights[layer][line, :, -1].mean(0)[torch.as_tensor(image)].sum().item()
            assert table.loc[(row.prompt.doc_id, layer), "mass_image"] == pytest.approx(expected, abs=1e-5)


def test_layers_summed_up_one_by_one_or_together_give_the_same(llava, rows, monkeypatch):
    together, _ = run(llava, rows, batch_size=5)
    monkeypatch.setattr(last_query, "_HELD", 1)
    alone, _ = run(llava, rows, batch_size=5)
    assert len(of_all_heads(alone)) == len(LAYERS) * len(rows) > 5 * len(LAYERS)
    pd.testing.assert_frame_equal(alone.attention_table(), together.attention_table(), rtol=1e-5, atol=1e-6)


def test_the_mask_that_layers_share_is_read_once_a_batch(llava, rows, monkeypatch):
    read, given = last_query.last_query_bias, []

    def watched(mask, **kwargs):
        given.append(mask)
        return read(mask, **kwargs)

    monkeypatch.setattr(last_query, "last_query_bias", watched)
    run(llava, rows, batch_size=5)
    assert len(LAYERS) > 1
    assert len(given) == -(-len(rows) // 5)
    assert any(mask is not None for mask in given)


def test_segments_are_counted_in_prompts_that_lack_the_last_one():
    row = make_rows(make_prompts(1))[0]
    at = np.flatnonzero(row.labels.segment != SEGMENTS[-1])[:2]
    labels = TokenLabels(*(getattr(row.labels, field.name)[at] for field in fields(TokenLabels)))
    short = Row(row.prompt, row.input_ids[at], labels, np.arange(0))
    counts = attention_store._segment_counts([row, short])
    expected = [[int((one.labels.segment == name).sum()) for name in SEGMENTS] for one in (row, short)]
    assert counts.tolist() == expected
    assert counts[1, -1] == 0


@pytest.mark.parametrize("gap", [0.0, 50.0, 80.0, 200.0, 1e4])
def test_log_sum_exps_hold_however_faint_a_side_is(gap):
    """Against torch.logsumexp of each side alone; one row has no image, one side of another is out of sight."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, 3, 12, generator=generator)
    scores[..., 4:8] -= gap  # the text
    kinds = torch.zeros(4, 12, len(SEGMENTS) + 2)
    kinds[:, :, SEGMENTS.index("special")] = 1
    kinds[1:, :4, -2], kinds[:, 4:8, -1] = 1, 1
    bias = torch.zeros(1, 4, 1, 12)
    bias[0, 2, 0, :4] = float("-inf")
    got = measures.last_query_measures(scores, bias, torch.ones(2, 4, 12, 3), kinds)
    for name, place in (("visual", slice(0, 4)), ("text", slice(4, 8))):
        expected = (scores + bias)[..., place].double().logsumexp(-1)
        expected[:, 0 if name == "visual" else []] = float("nan")
        expected[expected == float("-inf")] = float("nan")
        column = got[:, :, 1:, measures.MEASURES.index(f"lse_{name}")]
        torch.testing.assert_close(column.double(), expected, rtol=1e-6, atol=1e-5, equal_nan=True)
