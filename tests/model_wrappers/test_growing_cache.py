"""The cache that has room behind its tokens holds what transformers' own would hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import family_model, family_processor, left_padded
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lmms_keyspace.families import FAMILIES
from lmms_keyspace.model_wrappers.encoding import encode
from lmms_keyspace.model_wrappers.growing_cache import GrowingLayer, growing_cache

NEW_TOKENS = 50  # more than there is room for at first

STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("crop"), st.integers(1, 3)),
    st.tuples(st.just("reorder"), st.permutations(range(3))),
    st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    st.tuples(st.just("reset"), st.none()),
)


@given(steps=st.lists(STEPS, max_size=12), seed=st.integers(0, 1000))
def test_it_holds_what_the_plain_layer_holds(steps, seed):
    random = torch.Generator().manual_seed(seed)
    layers = (DynamicLayer(), GrowingLayer())
    handed: list[tuple[torch.Tensor, torch.Tensor]] = []  # views, and what they showed
    for step, value in [("append", 4), *steps]:
        keys, values = (torch.randn(3, 2, value if step == "append" else 0, 4, generator=random) for _ in range(2))
        for layer in layers:
            if step == "append":
                result = layer.update(keys, values)
                if layer is layers[1]:
                    handed += [(part, part.clone()) for part in result]
            elif step == "reset":
                layer.reset()
            elif layer.get_seq_length() > 3:
                match step:
                    case "crop":
                        layer.crop(-value)
                    case "reorder":
                        layer.reorder_cache(torch.tensor(value))
                    case "select":
                        layer.batch_select_indices(torch.tensor(value))
        plain, growing = layers
        assert growing.get_seq_length() == plain.get_seq_length()
        if plain.get_seq_length():
            assert torch.equal(growing.keys, plain.keys)
            assert torch.equal(growing.values, plain.values)
    assert all(torch.equal(view, shown) for view, shown in handed)  # nobody's keys change under him


def test_later_tokens_are_written_behind_the_earlier_ones():
    layer = GrowingLayer()
    one, places = torch.ones(1, 1, 1, 4), set()
    layer.update(torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 200, 4))
    for _ in range(100):
        layer.update(one, one)
        places.add(layer.keys.data_ptr())
        assert layer.keys.untyped_storage().nbytes() <= 4 * 4 * (layer.get_seq_length() * 9 / 8 + 33)
    assert len(places) <= 5  # room for 32 tokens at the least, so at most one copy for each 32


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_plain_cache(family, settings):
    model, processor = family_model(family), family_processor(family)
    processor.tokenizer.padding_side = "left"
    if family == "instructblip":
        inputs = left_padded([torch.arange(4, n).numpy() for n in (9, 12)])  # its words alone
        model = model.language_model
    else:
        texts = [f"USER: {words} ?" for words in ("What color is it", "red", "blue circle")]
        inputs = encode(processor, texts, [[], [], []])
    given_cache = growing_cache(model)
    assert any(type(layer) is GrowingLayer for layer in given_cache["past_key_values"].layers) or family in (
        "llava_next",
        "mistral3",
        "idefics2",
    )
    settings = settings | {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = model.generate(**inputs, **settings, pad_token_id=0)
    found = model.generate(**inputs, **given_cache, **settings, pad_token_id=0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_a_checkpoint_that_names_its_cache_keeps_it(setting, monkeypatch):
    model = family_model("llava")
    for name, value in setting.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert growing_cache(model) == {}


def test_other_kinds_of_layers_stay_as_they_are():
    model = family_model("gemma3")
    plain = DynamicCache(config=model.config.get_text_config(decoder=True))
    grown = growing_cache(model)["past_key_values"]
    for own, other in zip(plain.layers, grown.layers, strict=True):
        assert type(other) is (GrowingLayer if type(own) is DynamicLayer else type(own))
