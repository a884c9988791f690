"""Capture at its limits: rows that do not fit, one row with two beams, faint keys, masks with more in them, memory."""

from __future__ import annotations

from types import SimpleNamespace

import adapter_models
import numpy as np
import pytest
import torch
from adapter_models import EOS, IMAGE
from models import left_padded, tokenizer

from lmms_keyspace.capture import Capture, CaptureError, Row
from lmms_keyspace.capture.last_query import last_query_bias
from lmms_keyspace.capture.rope_check import RopeCheck
from lmms_keyspace.capture.sinks import THRESHOLD, can_have_sinks
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.tokens import Labeler, Prompt

TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def llava():
    return adapter_models.tiny_llava()


def text_rows(*texts: str) -> list[Row]:
    prompts = [Prompt("toy", number, f"c{number}", "default", text) for number, text in enumerate(texts)]
    labeler = Labeler(TOKENIZER, IMAGE).fit(prompts)
    rows = []
    for prompt in prompts:
        ids = np.asarray(TOKENIZER(prompt.text)["input_ids"])
        rows.append(Row(prompt, ids, labeler.label(prompt, ids), np.arange(ids.size)))
    return rows


(ROW,) = text_rows("USER: w1 w2 w3 w4 ? ASSISTANT:")


@pytest.mark.parametrize(
    ("ids", "positions", "argument"),
    [
        (ROW.input_ids[:-1], ROW.positions[:1], "labels"),
        (np.append(ROW.input_ids, 3), ROW.positions, "labels"),
        (ROW.input_ids, np.array([-1, 2]), "positions"),
        (ROW.input_ids, np.array([0, ROW.input_ids.size]), "positions"),
        (ROW.input_ids, np.array([0, ROW.input_ids.size + 3]), "positions"),
        (ROW.input_ids, np.array([1, 1]), "positions"),
        (ROW.input_ids, np.array([2, 1]), "positions"),
    ],
)
def test_labels_and_positions_must_be_those_of_the_ids(ids, positions, argument):
    with pytest.raises(InputError, match="toy document 0") as error:
        Row(ROW.prompt, ids, ROW.labels, positions)
    assert error.value.argument == argument


def keys_of(model, rows, **settings) -> torch.Tensor:
    capture = Capture(model, decoder_sites(model), spaces=("k_pre", "k_post", "q", "v"))
    with capture.batch(rows), torch.inference_mode():
        model.generate(**left_padded([row.input_ids for row in rows]), max_new_tokens=2, pad_token_id=EOS, **settings)
    vectors = [capture.keys("toy", space=space, layer=1)[0] for space in ("k_pre", "k_post", "v")]
    masses = torch.from_numpy(capture.attention_table()["mass_question"].to_numpy(np.float32, copy=True))
    return torch.cat([masses.flatten(), *(one.flatten() for one in vectors)])


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_two_copies_of_a_single_row_count_once(settings, implementation):
    model = adapter_models.tiny_llava()
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(keys_of(model, [ROW], **settings), keys_of(model, [ROW], do_sample=False))


def test_random_keys_of_a_prompt_in_chunks_are_those_of_the_whole(llava):
    """A chunk of 3 leaves a rest of 1 or 2; rows of unlike length start inside of a chunk."""
    rows = text_rows("USER: w1 w2 w3 w4 ? ASSISTANT:", "USER: w5 ?")
    found = []
    for settings in ({}, {"prefill_chunk_size": 3}):
        capture = Capture(llava, decoder_sites(llava), spaces=("k_rand",))
        with capture.batch(rows), torch.inference_mode():
            inputs = left_padded([row.input_ids for row in rows])
            llava.generate(**inputs, max_new_tokens=2, do_sample=False, **settings)
        found.append(capture.keys("toy", space="k_rand", layer=1)[0])
    assert len(found[0]) == sum(row.input_ids.size for row in rows)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("strength", [1.0, 1e-7])
def test_another_key_is_noticed_however_faint_keys_are(strength):
    """The self-check is relative to the keys."""
    model = adapter_models.tiny_llava()
    attention = model.model.language_model.layers[1].self_attn
    with torch.no_grad():
        attention.k_proj.weight *= strength
    keys_of(model, [ROW], do_sample=False)
    as_usual = attention.forward

    def turned_the_other_way(*args, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        return as_usual(*args, position_embeddings=(cos, -sin), **kwargs)

    attention.forward = turned_the_other_way
    with pytest.raises(CaptureError, match="layer 1"):
        keys_of(model, [ROW], do_sample=False)


def test_keys_of_another_shape_are_noticed(llava):
    """Attention that repeats its keys for all query heads before the rotation, say."""
    decoder = decoder_sites(llava)
    site, check = decoder.sites[1], RopeCheck(decoder)
    keys = torch.randn(1, 4, site.n_kv_heads, site.head_dim)
    cos_sin = llava.model.language_model.rotary_emb(keys, torch.arange(4)[None])
    check.hook(site)(site.attention, (), {"position_embeddings": cos_sin})
    with pytest.raises(CaptureError, match=r"layer 1: .*shapes are"):
        check.compare(site, keys, keys.transpose(1, 2).repeat(1, 2, 1, 1))


@pytest.mark.parametrize(("given", "argument"), [({"layer": 9}, "layer"), ({"space": "v"}, "space")])
def test_what_was_not_captured_is_named(llava, given, argument):
    with pytest.raises(InputError, match=r"captured .* are") as error:
        Capture(llava, decoder_sites(llava)).keys("toy", **given)
    assert error.value.argument == argument


def test_a_window_hides_what_lies_before_it():
    """Masks of flash attention say nothing of the window: ones and zeros per column, or None."""
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    device = torch.device("cpu")
    for mask, window, visible in ((None, 3, [5, 6, 7]), (padded, 7, [2, 3, 4, 5, 6, 7]), (padded, 3, [5, 6, 7])):
        bias = last_query_bias(mask, row=0, n=8, sliding_window=window, device=device)
        assert torch.nonzero(bias[0, 0] == 0).flatten().tolist() == visible
        assert torch.isinf(bias).sum() == 8 - len(visible)
    for window in (None, 8, 9):
        assert last_query_bias(None, row=0, n=8, sliding_window=window, device=device) is None


def test_an_additive_mask_hides_what_is_near_the_smallest_number():
    """Masks carry biases too: what a bias adds to the smallest number still hides, and a bias alone does not."""
    least = torch.finfo(torch.float32).min
    row = torch.tensor([0.0, -3.5, least, 0.9 * least, 0.55 * least, 0.45 * least, -float("inf"), 2.0])
    mask = torch.stack([torch.zeros(8), row])[None, None]
    bias = last_query_bias(mask, row=1, n=8, sliding_window=None, device=torch.device("cpu"))
    assert torch.isinf(bias[0, 0]).tolist() == [False, False, True, True, True, False, True, False]
    torch.testing.assert_close(bias[0, 0, [0, 1, 7]], row[[0, 1, 7]])


def test_a_width_of_four_hundred_is_too_narrow_for_a_sink():
    """The largest entry of a normalized vector of width d is sqrt(d)."""
    for width, can in ((int(THRESHOLD**2), False), (int(THRESHOLD**2) + 1, True)):
        decoder = SimpleNamespace(text_config=SimpleNamespace(hidden_size=width, num_hidden_layers=8))
        assert can_have_sinks(decoder, 4) is can


def bytes_of(model, *, spaces=("k_pre",), layers="all", **counts) -> int:
    counts = {"tokens": 0, "selected": 0, "documents": 0} | counts
    tokens = counts.pop("tokens")
    return Capture(model, decoder_sites(model), spaces=spaces, layers=layers).memory_estimate(tokens, **counts)


def test_memory_of_vectors_is_their_size(llava):
    """1,000 tokens of one more space cost exactly that space's vectors; the widest of a layer are there twice."""
    sites = decoder_sites(llava).sites
    plain = bytes_of(llava, tokens=1000)
    widest = {heads: max(getattr(site, heads) * site.head_dim for site in sites) for heads in ("n_kv_heads", "n_heads")}
    assert widest["n_kv_heads"] < widest["n_heads"]
    for space, heads in (("v", "n_kv_heads"), ("k_post", "n_kv_heads"), ("q", "n_heads")):
        more = bytes_of(llava, tokens=1000, spaces=("k_pre", space)) - plain
        twice = widest[heads] - widest["n_kv_heads"]
        assert more == 1000 * 4 * (sum(getattr(site, heads) * site.head_dim for site in sites) + twice)
    vectors = 1000 * 4 * sum(site.n_kv_heads * site.head_dim for site in sites)
    joined = 1000 * 4 * widest["n_kv_heads"]
    assert bytes_of(llava, tokens=2000) == 2 * plain
    assert bytes_of(llava, tokens=1000, reference=True) == 2 * plain - joined
    assert 300 * 1000 < plain - vectors - joined < 600 * 1000  # a row of the token table takes some 400 bytes


def test_memory_of_tables_adds_up(llava):
    """A document costs a row a layer, a selected one as many more as there are KV heads."""
    sites = decoder_sites(llava).sites
    per_row = bytes_of(llava, documents=1) / len(sites)
    assert 300 < per_row < 600
    assert bytes_of(llava, documents=700) == 700 * bytes_of(llava, documents=1)
    assert bytes_of(llava, selected=1) == sites[0].n_kv_heads * bytes_of(llava, documents=1)
    assert bytes_of(llava, documents=50, selected=20) == bytes_of(llava, documents=50) + bytes_of(llava, selected=20)
    # One of the tables is made at a time: the peak is that of the larger one, with the other already there.
    many, few = 10_000, 10
    for tokens, documents in ((many, few), (few, many)):
        both = bytes_of(llava, tokens=tokens, documents=documents)
        alone = bytes_of(llava, tokens=tokens), bytes_of(llava, documents=documents)
        assert max(alone) < both < sum(alone)
        if tokens == many:  # a row of the attention table that is there takes some 50 bytes
            assert 30 < (both - alone[0]) / (few * len(sites)) < 100
    assert bytes_of(llava, documents=3, layers=[1]) == bytes_of(llava, documents=3) / len(sites)
