"""Where the decoders of the supported architectures make their keys."""

from __future__ import annotations

import adapter_models
import pytest
import torch
from models import family_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, MllamaConfig

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import FAMILIES, decoder_sites

KEY_MODULES = {"qwen3_vl": "k_norm"}


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_where_the_decoder_makes_its_keys(name):
    model = family_model(name)
    decoder = decoder_sites(model)
    assert decoder.architecture == name
    assert decoder.connector == "mlp"
    assert decoder.image_token_id == 3
    layers = model.config.get_text_config().num_hidden_layers
    names = {id(module): path for path, module in model.named_modules()}
    assert [names[id(site.key_module)] for site in decoder.sites] == [
        f"model.language_model.layers.{layer}.self_attn.{KEY_MODULES.get(name, 'k_proj')}" for layer in range(layers)
    ]
    for site in decoder.sites:
        assert (site.n_heads, site.n_kv_heads) == (4, 2)
        assert site.attention.k_proj.out_features == site.n_kv_heads * site.head_dim
        assert site.layer_type == ("sliding" if name == "llava_next" else "full")


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


def test_an_unknown_architecture_is_refused_with_what_was_found():
    model = adapter_models.tiny_llava()
    model.config.model_type = "newllava"
    with pytest.raises(InputError, match=r"'newllava'.*language_model\.layers\.0\.self_attn.*add a Family to FAMILIES"):
        decoder_sites(model)


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(InputError, match="model='Linear'"):
        decoder_sites(nn.Linear(1, 1))


def test_a_text_model_is_refused():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(InputError, match="pretrained='llama'"):
        decoder_sites(LlamaForCausalLM(config))
