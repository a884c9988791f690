"""The self-check: the captured key, rotated, is the one that attention used."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import family_model
from toy_captures import llava_inputs, make_prompts, make_rows, run, tiny_llava

from lmms_keyspace.capture import Capture, CaptureError
from lmms_keyspace.families import decoder_sites


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
