"""Capture against direct computation on tiny random models."""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from dataclasses import replace

import adapter_models
import numpy as np
import pandas as pd
import pytest
import torch
from adapter_models import EOS, IMAGE, IMAGE_SIZE, IMAGE_TOKENS
from models import expanded, family_model, left_padded, tokenizer
from peft import LoraConfig, get_peft_model

from lmms_keyspace.capture import Capture, CaptureError, Row, last_query
from lmms_keyspace.capture.token_columns import prefix_hashes
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import FAMILIES, decoder_sites
from lmms_keyspace.records import ALL_HEADS, ATTENTION_COLUMNS, SEGMENTS, TEXT, TOKEN_COLUMNS, VISUAL
from lmms_keyspace.sampling import Sampler
from lmms_keyspace.tokens import Labeler, Prompt

TOKENIZER = tokenizer()
SAMPLER = Sampler(seed=3, clusters=100, tokens=3)
LAYERS = (0, 1, 2)


def tiny_llava(attn_implementation: str = "sdpa"):
    model = adapter_models.tiny_llava()
    model.set_attn_implementation(attn_implementation)
    return model


def attention_namespace(model):
    return vars(sys.modules[type(decoder_sites(model).sites[0].attention).__module__])


def all_hooks(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


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


def direct_keys(model, row: Row) -> list[torch.Tensor]:
    """k_proj of the layer's own input, one row alone, through hidden states: `[T, KV heads, d]` per layer."""
    with torch.inference_mode():
        hidden = model(**llava_inputs([row]), output_hidden_states=True).hidden_states
        layers = model.model.language_model.layers
        return [
            layer.self_attn.k_proj(layer.input_layernorm(states[0])).unflatten(-1, (-1, layer.self_attn.head_dim))
            for layer, states in zip(layers, hidden, strict=False)
        ]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def rows():
    return make_rows(make_prompts())


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


def test_batch_size_changes_nothing(llava, rows):
    one, answers_one = run(llava, rows, batch_size=1)
    eight, answers_eight = run(llava, rows[::-1], batch_size=8)
    assert answers_one == answers_eight
    exact = [name for name in TOKEN_COLUMNS if name != "key_norm"]
    assert one.token_table()[exact].equals(eight.token_table()[exact])
    for layer in one.layers:
        torch.testing.assert_close(
            one.keys("toy", layer=layer)[0], eight.keys("toy", layer=layer)[0], atol=1e-4, rtol=0
        )
    np.testing.assert_allclose(
        one.attention_table().filter(like="mass_"), eight.attention_table().filter(like="mass_"), atol=1e-5
    )


def test_processes_together_hold_what_one_holds(adapted, rows):
    """Three of them, one without a row; what they send is kept until the first of them gathers."""
    one, several = run(adapted, rows)[0], [run(adapted, part)[0] for part in (rows[1::2], rows[::2], [])]
    for capture, part in ((one, rows), *zip(several, (rows[1::2], rows[::2]), strict=False)):
        with capture.reference_batch(part), torch.inference_mode():
            adapted(**llava_inputs(part))
    sent = [[], []]
    for capture, tensors in zip(several[1:], sent, strict=True):
        capture.gather(lambda tensor, tensors=tensors: tensors.append(tensor) or [])
    several[0].gather(lambda tensor: [tensor, *(tensors.pop(0) for tensors in sent)])
    assert sent == [[], []]
    exact = [name for name in TOKEN_COLUMNS if name != "key_norm"]
    assert several[0].token_table()[exact].equals(one.token_table()[exact])
    assert several[0].attention_table().dtypes.equals(one.attention_table().dtypes)
    for layer, reference in itertools.product(one.layers, (False, True)):
        keys, clusters = several[0].keys("toy", layer=layer, reference=reference)
        expected, expected_clusters = one.keys("toy", layer=layer, reference=reference)
        torch.testing.assert_close(keys, expected, atol=1e-4, rtol=0)
        assert clusters == expected_clusters
    assert several[1].token_table().empty
    assert several[1].attention_table().empty
    assert len(several[1].keys("toy")[0]) == 0


def test_observing_changes_neither_logits_nor_answers(llava, rows):
    inputs = llava_inputs(rows)
    capture = Capture(llava, decoder_sites(llava), spaces=("k_pre", "k_post", "q", "v"))
    results = []
    for context in (nullcontext(), capture.batch(rows), nullcontext()):
        with torch.inference_mode(), context:
            out = llava.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        results.append((out.sequences, torch.stack(out.logits)))
    for sequences, logits in results[1:]:
        assert torch.equal(sequences, results[0][0])
        assert torch.equal(logits, results[0][1])


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


def test_layers_summed_up_one_by_one_or_together_give_the_same(llava, rows, monkeypatch):
    together, _ = run(llava, rows)
    monkeypatch.setattr(last_query, "_HELD", 1)
    alone, _ = run(llava, rows)
    pd.testing.assert_frame_equal(alone.attention_table(), together.attention_table(), rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_after_an_exception(llava, rows):
    capture = Capture(llava, decoder_sites(llava))
    mapping = attention_namespace(llava)["ALL_ATTENTION_FUNCTIONS"]._local_mapping
    llava(**llava_inputs(rows))  # transformers places hooks of its own at the first call
    before = dict(mapping), all_hooks(llava)

    def fail(prefill: bool):
        with capture.batch(rows):
            assert len(all_hooks(llava)) > len(before[1])
            if prefill:
                llava.generate(**llava_inputs(rows), max_new_tokens=1)
                assert all_hooks(llava) == before[1]  # decoding needs none
            raise RuntimeError("boom")

    for prefill in (False, True):
        with pytest.raises(RuntimeError, match="boom"):
            fail(prefill)
        assert (dict(mapping), all_hooks(llava)) == before
        assert "sdpa" not in mapping  # what others register for all of transformers stays visible
        assert capture.captured == set()
    with capture.batch(rows):  # a failed batch may be tried again
        llava.generate(**llava_inputs(rows), max_new_tokens=1)
    assert len(capture.captured) == len(rows)


def test_eager_attention_function_is_put_back(rows):
    model = tiny_llava("eager")
    namespace = attention_namespace(model)
    before = namespace["eager_attention_forward"]
    run(model, rows)
    assert namespace["eager_attention_forward"] is before


@pytest.mark.parametrize("layer", [0, 1])
def test_self_check_names_the_layer_whose_attention_uses_another_key(rows, layer):
    model = tiny_llava()
    attention = model.model.language_model.layers[layer].self_attn
    plain = attention.forward

    def scaled(*args, **kwargs):
        cos, sin = kwargs.pop("position_embeddings")
        return plain(*args, position_embeddings=(1.01 * cos, sin), **kwargs)

    attention.forward = scaled
    with pytest.raises(CaptureError, match=f"layer {layer}: .*'llava'"):
        run(model, rows)


@pytest.mark.parametrize(("family", "layer"), [("vipllava", None), ("aya_vision", 1)])
def test_an_inspected_architecture_must_pass_the_self_check(family, layer):
    rows = make_rows([prompt for prompt in make_prompts(40) if not prompt.image_shas])
    model = family_model(family)
    capture = Capture(model, decoder_sites(model))
    refused = pytest.raises(CaptureError, match=f"layer {layer}: .*a Family for '{family}'") if layer else nullcontext()
    with refused, capture.batch(rows), torch.inference_mode():
        model.generate(**llava_inputs(rows), max_new_tokens=2, do_sample=False)
    assert bool(capture.captured) == (layer is None)


def test_a_layer_that_is_skipped_is_an_error(rows):
    model = tiny_llava()
    decoder = decoder_sites(model)
    capture = Capture(model, decoder)
    skipped = model.model.language_model.layers[1]
    skipped.forward = lambda hidden, **kwargs: hidden
    with pytest.raises(CaptureError, match=r"layers \[1\]"), capture.batch(rows), torch.inference_mode():
        model(**llava_inputs(rows))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_and_returns_are_not_counted_twice(llava, rows, settings):
    plain, _ = run(llava, rows)
    capture = Capture(llava, decoder_sites(llava))
    with capture.batch(rows), torch.inference_mode():
        llava.generate(**llava_inputs(rows), max_new_tokens=3, **settings)
    assert plain.token_table().drop(columns="key_norm").equals(capture.token_table().drop(columns="key_norm"))
    torch.testing.assert_close(plain.keys("toy", layer=1)[0], capture.keys("toy", layer=1)[0], atol=1e-5, rtol=0)
    masses = plain.attention_table().filter(like="mass_")
    np.testing.assert_allclose(masses, capture.attention_table().filter(like="mass_"), atol=1e-5)


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_decoding_steps_and_empty_cache_places_are_left_out(llava, rows, cache):
    plain, _ = run(llava, rows, spaces=("k_post",))
    capture = Capture(llava, decoder_sites(llava), spaces=("k_post",))
    with capture.batch(rows), torch.inference_mode():
        llava.generate(**llava_inputs(rows), max_new_tokens=3, do_sample=False, **cache)
    for space in ("k_pre", "k_post"):
        expected = plain.keys("toy", space=space, layer=1)[0]
        torch.testing.assert_close(capture.keys("toy", space=space, layer=1)[0], expected, atol=1e-5, rtol=0)
    masses = plain.attention_table().filter(like="mass_")
    np.testing.assert_allclose(masses, capture.attention_table().filter(like="mass_"), atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("spaces", [("k_pre",), ("k_pre", "k_post", "q", "v")])
def test_chunked_prefill_gives_the_same(implementation, spaces):
    model = tiny_llava(implementation)
    rows = make_rows([prompt for prompt in make_prompts(40) if not prompt.image_shas])
    plain, _ = run(model, rows, spaces=spaces)
    capture = Capture(model, decoder_sites(model), spaces=spaces)
    with capture.batch(rows), torch.inference_mode():
        model.generate(**llava_inputs(rows), max_new_tokens=2, do_sample=False, prefill_chunk_size=7)
    assert len(plain.token_table()) > 0
    assert plain.token_table().drop(columns="key_norm").equals(capture.token_table().drop(columns="key_norm"))
    for space in spaces:
        torch.testing.assert_close(
            plain.keys("toy", space=space, layer=1)[0], capture.keys("toy", space=space, layer=1)[0], atol=1e-5, rtol=0
        )
    for column in ("mass_question", "qk_text", "lse_text", "key_norm_text"):
        np.testing.assert_allclose(plain.attention_table()[column], capture.attention_table()[column], atol=1e-5)


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


@pytest.fixture
def adapted():
    model = get_peft_model(tiny_llava(), LoraConfig(r=2, target_modules=r".*language_model.*\.k_proj"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def test_reference_is_the_base_model_at_the_same_tokens(llava, adapted, rows):
    base, _ = run(llava, rows)
    capture, _ = run(adapted, rows)
    for part in (rows[6:], rows[2:6], rows[:2]):  # another cut and order than the first pass
        with capture.reference_batch(part), torch.inference_mode():
            adapted(**llava_inputs(part))
    for layer in capture.layers:
        reference, clusters = capture.keys("toy", layer=layer, reference=True)
        torch.testing.assert_close(reference, base.keys("toy", layer=layer)[0], atol=1e-5, rtol=0)
        assert clusters == capture.keys("toy", layer=layer)[1]
        assert (capture.keys("toy", layer=layer)[0] - reference).abs().max() > 0.1
    assert len(of_all_heads(capture)) == len(rows) * len(LAYERS)


def test_incomplete_reference_is_an_error(adapted, rows):
    capture, _ = run(adapted, rows)
    with capture.reference_batch(rows[:4]), torch.inference_mode():
        adapted(**llava_inputs(rows[:4]))
    with pytest.raises(CaptureError, match="missed"):
        capture.keys("toy", reference=True)


def test_reference_needs_an_adapter(llava, rows):
    capture = Capture(llava, decoder_sites(llava))
    with pytest.raises(InputError, match="reference='self'"), capture.reference_batch(rows):
        pass


def test_inputs_that_are_not_the_rows_are_an_error(llava, rows):
    capture = Capture(llava, decoder_sites(llava))
    with pytest.raises(CaptureError, match="row 0"), capture.batch(rows[:1]):
        llava(**llava_inputs(rows[1:2]))
    with pytest.raises(CaptureError, match="3 rows reached"), capture.batch(rows[:2]):
        llava(**llava_inputs(rows[:3]))
    inputs = llava_inputs(rows[:4])
    turned = inputs | {"input_ids": inputs["input_ids"].flip(1)}
    with pytest.raises(CaptureError, match="padded on the left"), capture.batch(rows[:4]):
        llava(**turned)
    with pytest.raises(CaptureError, match="less than the prompt"), capture.batch(rows[:1]):
        pass


def test_a_document_is_captured_once(llava, rows):
    capture, _ = run(llava, rows)
    with pytest.raises(CaptureError, match="toy document 0 was captured already"), capture.batch(rows[:1]):
        pass


def test_memory_estimate_is_what_is_held(adapted, rows):
    spaces = ("k_pre", "q")
    full = [row for row in rows if row.positions.size == 9]  # visual, text and template
    assert len(full) >= 4
    capture, _ = run(adapted, full, spaces=spaces)
    with capture.reference_batch(full), torch.inference_mode():
        adapted(**llava_inputs(full))
    held = sum(
        capture.keys("toy", space=space, layer=layer, reference=reference)[0].nbytes
        for space in spaces
        for layer in capture.layers
        for reference in (False, True)
    )
    documents = len(full)
    tables = [capture.token_table(), capture.attention_table()]
    held += sum(int(table.memory_usage(deep=True).sum()) for table in tables)
    estimate = capture.memory_estimate(9 * documents, selected=documents, documents=documents, reference=True)
    assert held < estimate < 3 * held  # tables take up to twice as much while they are made
    more = capture.memory_estimate(9 * documents, selected=documents, documents=100 + documents, reference=True)
    assert 100 * len(LAYERS) * 150 < more - estimate < 100 * len(LAYERS) * 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spaces": ("k_pre", "keys")}, "spaces='keys'"),
        ({"layers": [0, 9]}, "layers=9"),
        ({"layers": []}, r"layers=\[\]"),
    ],
)
def test_unknown_settings_are_refused(llava, settings, message):
    with pytest.raises(InputError, match=message):
        Capture(llava, decoder_sites(llava), **settings)


def test_compiled_models_and_unreadable_attention_are_refused():
    model = tiny_llava()
    decoder = decoder_sites(model)
    model.compile()
    with pytest.raises(InputError, match="compiled"):
        Capture(model, decoder)
    flex = tiny_llava("flex_attention")
    with pytest.raises(InputError, match="attn_implementation='flex_attention'"):
        Capture(flex, decoder_sites(flex))
