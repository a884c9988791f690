"""However a run is cut, into batches, chunks, beams or processes, the same is captured."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from toy_captures import llava_inputs, make_prompts, make_rows, run, tiny_llava

from lmms_keyspace.capture import Capture
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.records import TOKEN_COLUMNS


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
