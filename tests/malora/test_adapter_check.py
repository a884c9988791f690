"""check_adapter: the right adapter passes, everything else is one clear error before any model loads."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_models import batch, prompt, tiny_llava
from models import family_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import AdapterInfo, MaloraConfig, check_adapter

KEY_LORA = LoraConfig(r=4, target_modules=r".*language_model\..*self_attn\.k_proj")


def saved(folder: Path, config: object, **text_settings: int) -> Path:
    get_peft_model(tiny_llava(**text_settings), config).save_pretrained(folder)
    return folder


def refused(folder: Path, **text_settings: int) -> str:
    with pytest.raises(InputError) as caught:
        check_adapter(folder, tiny_llava(**text_settings).config)
    assert caught.value.argument == "peft"
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (MaloraConfig(r=4), "MALORA"),
        (MaloraConfig(r=4, gate="none", layers_to_transform=[1]), "MALORA"),
        (MaloraConfig(r=4, target_modules=r".*language_model\..*self_attn\.(q|k|v|o)_proj"), "MALORA"),
        (MaloraConfig(r=4, gate="head", sharing="A", shared_r=3, projections=["q", "k", "v"]), "MALORA"),
        (MaloraConfig(r=4, r_visual=6, gate="modality"), "MALORA"),
        (MaloraConfig(r=4, gate="none", sharing="B", cross_attention=1.0), "MALORA"),
        (KEY_LORA, "LORA"),
        (LoraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"]), "LORA"),  # vision tower included
        (LoraConfig(r=4, target_modules=["k_proj", "v_proj"], rank_pattern={r".*v_proj": 2}), "LORA"),
        (LoraConfig(r=4, target_modules=["k_proj"], layers_to_transform=[0]), "LORA"),
    ],
)
def test_a_fitting_adapter(tmp_path: Path, config: object, method: str) -> None:
    model = tiny_llava()
    model.name_or_path = "no_such_folder"
    get_peft_model(model, config).save_pretrained(tmp_path)
    digest = hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert check_adapter(tmp_path, tiny_llava().config) == AdapterInfo(method, 4, "no_such_folder", digest)


@pytest.mark.parametrize("config", [MaloraConfig(r=4), KEY_LORA])
@pytest.mark.parametrize(
    ("text_settings", "words"),
    [
        ({"num_hidden_layers": 2}, "has 2 layers"),
        ({"num_hidden_layers": 5}, r"has no (malora|lora)_A.* for .*layers\.3\."),
        ({"hidden_size": 64}, "needs 64"),
        ({"num_key_value_heads": 4}, "needs 32"),
        ({"head_dim": 16}, "needs 32"),
    ],
)
def test_another_architecture(tmp_path: Path, config: object, text_settings: dict[str, int], words: str) -> None:
    assert re.search(words, refused(saved(tmp_path, config), **text_settings))


@pytest.mark.parametrize("config", [MaloraConfig(r=4), KEY_LORA])
def test_another_rank_than_the_config(tmp_path: Path, config: object) -> None:
    folder = saved(tmp_path, config)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))
    assert "its config has r 8" in refused(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sharing": "A"}, "malora_A.* axis 0"),
        ({"sharing": "B"}, "malora_B.* axis 1"),
        ({"gate": "head"}, "malora_gate_weight.* axis 0"),
        ({"shared_r": 2}, "malora_[AB]"),
        ({"target_modules": [], "r": 4}, "leave it out"),
        ({"target_modules": ["keys"]}, "matches no module"),
    ],
)
def test_another_form_than_the_config(tmp_path: Path, change: dict[str, object], words: str) -> None:
    folder = saved(tmp_path, MaloraConfig(r=4))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert re.search(words, refused(folder))


def test_an_adapter_of_a_fused_projection(tmp_path: Path) -> None:
    model = family_model("llava_phi3")
    get_peft_model(model, MaloraConfig(r=4)).save_pretrained(tmp_path)
    assert check_adapter(tmp_path, family_model("llava_phi3").config).method == "MALORA"
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projections": ["k", "v"]}))
    with pytest.raises(InputError, match=r"malora_B.*axis 0 must be 64"):
        check_adapter(tmp_path, family_model("llava_phi3").config)


def test_a_config_from_before_there_were_variants(tmp_path: Path) -> None:
    """Only the first version's fields, with its regex: the same adapter."""
    model = get_peft_model(tiny_llava(), MaloraConfig(r=4, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    first = ("r", "alpha", "gate", "peft_type", "layers_to_transform", "modules_to_save", "base_model_name_or_path")
    settings = {name: value for name, value in json.loads(file.read_text()).items() if name in first}
    file.write_text(json.dumps(settings | {"target_modules": r".*language_model\..*self_attn\.k_proj"}))
    inputs = batch(prompt("image", 10, 11))
    check_adapter(tmp_path, tiny_llava().config)
    with torch.no_grad():
        again = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()(**inputs).logits
        assert torch.equal(again, model(**inputs).logits)


def test_files_that_are_missing_or_wrong(tmp_path: Path) -> None:
    assert "adapter_config.json is missing" in refused(tmp_path / "nowhere")
    folder = saved(tmp_path / "adapter", MaloraConfig(r=4))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), config.read_text()

    weights.unlink()
    assert "adapter_model.safetensors is missing" in refused(folder)
    torch.save(tensors, folder / "adapter_model.bin")
    assert "pickle" in refused(folder)
    weights.write_bytes(b"not safetensors")
    assert "not a safetensors file" in refused(folder)
    save_file({"something.else": torch.zeros(1)}, weights)
    assert "no MALORA tensor" in refused(folder)
    del tensors["base_model.model.model.language_model.layers.1.self_attn.k_proj.malora_A"]
    save_file(tensors, weights)
    assert "malora_A" in refused(folder)

    config.write_text("{")
    assert "not valid JSON" in refused(folder)
    config.write_text("[]")
    assert "JSON object" in refused(folder)
    for method in ("IA3", "MYSTERY", None):
        config.write_text(json.dumps(json.loads(settings) | {"peft_type": method}))
        message = refused(folder)
        assert repr(method) in message
        assert "MALORA, LORA" in message
    config.write_text(json.dumps(json.loads(settings) | {"r": 0}))
    assert "rank of at least 1" in refused(folder)


def test_no_weights_are_read_into_torch(tmp_path: Path) -> None:

    folder = saved(tmp_path, MaloraConfig(r=4))
    script = f"""
import safetensors.torch, torch
def forbidden(*a, **k): raise AssertionError("weights were loaded")
safetensors.torch.load_file = torch.load = torch.nn.Module.load_state_dict = forbidden
from transformers import AutoConfig
from lmms_keyspace.malora import check_adapter
print(check_adapter({str(folder)!r}, AutoConfig.from_pretrained({str(folder)!r})).method)
"""
    tiny_llava().config.save_pretrained(folder)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "MALORA", run.stderr
