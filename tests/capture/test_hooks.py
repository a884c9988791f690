"""Hooks observe and change nothing, are gone afterwards, and notice what is not as announced."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from toy_captures import llava_inputs, run, tiny_llava

from lmms_keyspace.capture import Capture, CaptureError
from lmms_keyspace.families import decoder_sites


def attention_namespace(model):
    return vars(sys.modules[type(decoder_sites(model).sites[0].attention).__module__])


def all_hooks(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


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


def test_a_layer_that_is_skipped_is_an_error(rows):
    model = tiny_llava()
    decoder = decoder_sites(model)
    capture = Capture(model, decoder)
    skipped = model.model.language_model.layers[1]
    skipped.forward = lambda hidden, **kwargs: hidden
    with pytest.raises(CaptureError, match=r"layers \[1\]"), capture.batch(rows), torch.inference_mode():
        model(**llava_inputs(rows))


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
