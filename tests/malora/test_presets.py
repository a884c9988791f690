"""The arms of a study: which terms they have, what they change, and that their parameters are equal."""

from __future__ import annotations

import pytest
import torch
from adapter_models import batch, prompt, tiny_llava
from models import family_model
from peft import LoraConfig, PeftConfig, get_peft_model

from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import PRESETS, MaloraConfig, matched_lora_config, preset

MODEL = tiny_llava(num_key_value_heads=4, hidden_size=128)
CONFIG = MaloraConfig(r=4, alpha=6.0)


def trainable(config: PeftConfig) -> int:
    return get_peft_model(tiny_llava(num_key_value_heads=4, hidden_size=128), config).get_nb_trainable_parameters()[0]


def test_terms() -> None:
    assert {name: (arm.mmd, arm.gram) for name, arm in PRESETS.items()} == {
        "malora": (True, True),
        "malora_no_gate": (True, True),
        "malora_no_mmd": (False, True),
        "malora_no_gram": (True, False),
        "modality_lora": (False, False),
        "lora_k": (False, False),
        "lora_qkvo": (False, False),
        "moka": (False, False),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_arm_trains_with_equal_parameters_and_scale(name: str) -> None:
    config = preset(name).peft_config(CONFIG, MODEL.config)
    assert trainable(config) == pytest.approx(trainable(MaloraConfig(r=4, alpha=6.0)), rel=0.12)
    if isinstance(config, LoraConfig):
        assert trainable(config) == pytest.approx(trainable(MaloraConfig(r=4, alpha=6.0)), rel=0.02)
        assert config.lora_alpha / config.r == pytest.approx(1.5)
        assert [config.alpha_pattern[key] / rank for key, rank in config.rank_pattern.items()] == [1.5] * len(
            config.rank_pattern
        )
    else:
        assert config.scalings == (1.5, 1.5, 0.0)
    model = get_peft_model(tiny_llava(num_key_value_heads=4, hidden_size=128), config)
    loss = model(**batch(prompt("image", 10, 11), labels=True)).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_what_the_arms_change() -> None:
    made = {name: arm.peft_config(CONFIG, MODEL.config) for name, arm in PRESETS.items()}
    assert made["malora"] == made["malora_no_mmd"] == made["malora_no_gram"] == CONFIG
    assert made["malora_no_gate"] == made["modality_lora"] != CONFIG
    assert made["modality_lora"].gate == "none"
    assert (made["moka"].sharing, made["moka"].cross_attention) == ("B", 1.0)
    assert made["moka"].r > CONFIG.r
    assert MaloraConfig(r=4, alpha=6.0) == CONFIG


def test_loras_sit_in_the_decoder_alone() -> None:
    for name, projections in (("lora_k", "k"), ("lora_qkvo", "qkvo")):
        config = preset(name).peft_config(CONFIG, MODEL.config)
        model = get_peft_model(tiny_llava(num_key_value_heads=4, hidden_size=128), config)
        adapted = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
        decoder = "base_model.model.model.language_model.layers"
        assert adapted == {f"{decoder}.{i}.self_attn.{p}_proj" for i in range(3) for p in projections}


def test_an_unknown_arm() -> None:
    with pytest.raises(InputError, match="did you mean malora_no_gate"):
        preset("malora_nogate")
    with pytest.raises(InputError, match="choose one of malora, "):
        preset("ia3")


def test_a_plain_lora_cannot_take_the_keys_of_a_fused_layer() -> None:
    config = family_model("llava_phi3").config
    with pytest.raises(InputError, match="all of it or nothing"):
        matched_lora_config(MaloraConfig(), config)
    everything = matched_lora_config(MaloraConfig(), config, tolerance=0.5, projections=("q", "k", "v", "o"))
    model = get_peft_model(family_model("llava_phi3"), everything)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4
