"""Where the decoders of the supported architectures make their keys."""

from __future__ import annotations

import adapter_models
import pytest
import torch
from models import family_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
)

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import FAMILIES, decoder_sites

KEY_MODULES = {"qwen3_vl": "k_norm", "qwen3_5": "k_norm", "gemma3": "k_norm"}
DECODERS = dict.fromkeys(("idefics2", "idefics3", "smolvlm"), "model.text_model") | {
    "instructblip": "language_model.model"
}
LAYER_TYPES = dict.fromkeys(("llava_next", "mistral3", "idefics2"), ["sliding"] * 2) | {
    "llava": ["full"] * 3,
    "gemma3": ["sliding", "full"],
    "qwen3_5": ["full"],
}
LAYERS = {"llava": [0, 1, 2], "qwen3_5": [1]}  # Qwen3.5: the first layer has linear attention and no keys
CONNECTORS = {"gemma3": "linear", "idefics3": "linear", "smolvlm": "linear"} | {
    "idefics2": "resampler",
    "instructblip": "q-former",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_where_the_decoder_makes_its_keys(name):
    model = family_model(name)
    decoder = decoder_sites(model)
    assert decoder.architecture == name
    assert decoder.connector == CONNECTORS.get(name, "mlp")
    assert decoder.image_token_id == 3
    names = {id(module): path for path, module in model.named_modules()}
    layers, path = LAYERS.get(name, [0, 1]), DECODERS.get(name, "model.language_model")
    assert [names[id(site.key_module)] for site in decoder.sites] == [
        f"{path}.layers.{layer}.self_attn.{KEY_MODULES.get(name, 'k_proj')}" for layer in layers
    ]
    assert [site.layer for site in decoder.sites] == layers
    assert [site.layer_type for site in decoder.sites] == LAYER_TYPES.get(name, ["full"] * 2)
    for site in decoder.sites:
        assert (site.n_heads, site.n_kv_heads) == (4, 2)
        assert site.attention.k_proj.out_features == site.n_kv_heads * site.head_dim


def test_keys_of_a_fused_projection_are_its_middle_slice():
    site = decoder_sites(family_model("llava_phi3")).sites[0]
    assert site.key_module is site.attention.qkv_proj
    output = torch.arange(4 * 16 + 2 * 16 + 2 * 16.0).expand(3, 5, -1)
    assert torch.equal(site.keys(output), torch.arange(64, 96.0).reshape(2, 16).expand(3, 5, 2, 16))


@pytest.mark.parametrize("name", FAMILIES)
def test_apply_rope_is_the_rotation_of_the_architecture(name):
    site = decoder_sites(family_model(name)).sites[0]
    keys = torch.randn(1, 2, 5, site.head_dim)
    still = torch.ones(1, 5, site.head_dim), torch.zeros(1, 5, site.head_dim)
    assert torch.equal(site.apply_rope(keys, keys, *still)[1], keys)


def test_the_key_module_is_what_an_adapter_put_there():
    base = adapter_models.tiny_llava()
    before = decoder_sites(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=r".*language_model.*\.k_proj"))
    decoder = decoder_sites(model)
    assert decoder.model is base
    assert hasattr(decoder.sites[0].key_module, "lora_A")
    assert before.sites[0].key_module is decoder.sites[0].key_module
    assert not any("vision" in name for name, module in model.named_modules() if hasattr(module, "lora_A"))


def test_grids_of_image_tokens():
    llava = decoder_sites(adapter_models.tiny_llava())
    assert llava.image_grids({"pixel_values": torch.zeros(3, 3, 8, 8)}) == [(2, 2)] * 3
    assert llava.image_grids({}) == []
    llava.model.config.vision_feature_select_strategy = "full"
    assert llava.image_grids({"pixel_values": torch.zeros(3, 3, 8, 8)}) is None
    qwen = decoder_sites(family_model("qwen2_5_vl"))
    assert qwen.image_grids({"image_grid_thw": torch.tensor([[1, 4, 8], [1, 2, 2]])}) == [(2, 4), (1, 1)]
    assert qwen.image_grids({}) == []
    assert decoder_sites(family_model("llava_next")).image_grids({"pixel_values": torch.zeros(1, 3, 3, 8, 8)}) is None


def test_cross_attention_is_refused_with_the_reason():
    config = MllamaConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 32,
            "image_size": 8,
            "patch_size": 4,
            "intermediate_layers_indices": [0],
        },
    )
    with pytest.raises(InputError, match=r"'mllama': .*cross-attention layers"):
        decoder_sites(AutoModelForImageTextToText.from_config(config))


def test_an_architecture_without_an_entry_is_inspected():
    model = family_model("smolvlm")
    model.config.model_type = "newvlm"
    decoder = decoder_sites(model)
    assert (decoder.architecture, decoder.connector, decoder.image_token_id) == ("newvlm", "unknown", 3)
    assert decoder.text_model is model.model.text_model
    assert [site.key_module for site in decoder.sites] == [
        layer.self_attn.k_proj for layer in model.model.text_model.layers
    ]


def test_an_unknown_architecture_is_refused_with_what_was_found():
    model = adapter_models.tiny_llava()
    model.config.model_type = "newllava"
    del model.model.language_model.rotary_emb
    said = r"'newllava'.*found: a text decoder; decoder layers.*not found: rotary_emb.*add a Family to FAMILIES"
    with pytest.raises(InputError, match=said):
        decoder_sites(model)


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(InputError, match="model='Linear'"):
        decoder_sites(nn.Linear(1, 1))


def test_a_text_model_is_refused():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(InputError, match="pretrained='llama'"):
        decoder_sites(LlamaForCausalLM(config))
