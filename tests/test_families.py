"""Where the decoders of the supported architectures make their keys."""

from __future__ import annotations

import adapter_models
import pytest
import torch
from models import tiny_qwen
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    MllamaConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import decoder_sites

TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def made(name: str):
    if name == "llava":
        return adapter_models.tiny_llava()
    if name == "qwen2_5_vl":
        return tiny_qwen()
    if name == "llava_next":
        text = MistralConfig(**TEXT, sliding_window=4)
        config = LlavaNextConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=3)
    elif name == "llava_onevision":
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**VISION), text_config=Qwen2Config(**TEXT), image_token_index=3
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
        config = Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, image_token_id=3)
    return AutoModelForImageTextToText.from_config(config).eval()


FAMILY_NAMES = ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl"]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_sites_are_the_k_proj_of_the_decoder(name):
    model = made(name)
    decoder = decoder_sites(model)
    assert decoder.architecture == name
    assert decoder.connector == "mlp"
    assert decoder.image_token_id == 3
    names = {id(module): path for path, module in model.named_modules()}
    assert [names[id(site.key_module)] for site in decoder.sites] == [
        f"model.language_model.layers.{layer}.self_attn.k_proj" for layer in range(len(decoder.sites))
    ]
    assert [site.layer for site in decoder.sites] == list(range(model.config.get_text_config().num_hidden_layers))
    for site in decoder.sites:
        assert (site.n_heads, site.n_kv_heads) == (4, 2)
        assert site.key_module.out_features == site.n_kv_heads * site.head_dim
        assert site.layer_type == ("sliding" if name == "llava_next" else "full")


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_apply_rope_is_the_rotation_of_the_architecture(name):
    site = decoder_sites(made(name)).sites[0]
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


def test_a_decoder_with_key_norms_is_read_after_the_norm():
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION), text_config=Qwen3Config(**TEXT, head_dim=16), image_token_index=3
    )
    decoder = decoder_sites(AutoModelForImageTextToText.from_config(config))
    assert decoder.sites[0].key_module is decoder.sites[0].attention.k_norm


def test_grids_of_image_tokens():
    llava = decoder_sites(adapter_models.tiny_llava())
    assert llava.image_grids({"pixel_values": torch.zeros(3, 3, 8, 8)}) == [(2, 2)] * 3
    assert llava.image_grids({}) == []
    llava.model.config.vision_feature_select_strategy = "full"
    assert llava.image_grids({"pixel_values": torch.zeros(3, 3, 8, 8)}) is None
    qwen = decoder_sites(tiny_qwen())
    assert qwen.image_grids({"image_grid_thw": torch.tensor([[1, 4, 8], [1, 2, 2]])}) == [(2, 4), (1, 1)]
    assert qwen.image_grids({}) == []
    assert decoder_sites(made("llava_next")).image_grids({"pixel_values": torch.zeros(1, 3, 3, 8, 8)}) is None


def test_cross_attention_is_refused_with_the_reason():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1], "rope_parameters": rope},
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
    with pytest.raises(InputError, match="pretrained='llama'"):
        decoder_sites(LlamaForCausalLM(LlamaConfig(**TEXT)))
