"""The checks that PEFT's own methods must pass (`tests/testing_common.py` there), for MaLoRA on a tiny model.

What is not here is in `test_adapter.py` (merging is refused, deepcopy, unload, modules to save, embeddings as input,
reentrant and other checkpointing) or `test_variants.py` (the layer itself), or does not apply: prompt learning,
adapters with biases, weighted combinations; saving as a pickle, which this project does not do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import batch, prompt, tiny_llava
from peft import (
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import MaloraConfig, MaloraLinear

Make = Callable[..., PeftModel]
CONFIGS: dict[str, dict[str, Any]] = {
    "keys": {},
    "all parts": {"gate": "head", "sharing": "A", "shared_r": 2, "projections": ["q", "k", "v"]},
    "moka": {"gate": "none", "sharing": "B", "cross_attention": 1.0},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> MaloraConfig:
    return MaloraConfig(**{"r": 4, "init_weights": False} | request.param)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return batch(prompt("image", 10, 11), prompt(20, 21, "image", 22, 23, 24))


def adapted(config: MaloraConfig, name: str = "default", seed: int = 0) -> PeftModel:
    base = tiny_llava()
    torch.manual_seed(seed)
    return get_peft_model(base, copy.deepcopy(config), adapter_name=name).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def test_model_attributes_and_adapter_name(config: MaloraConfig) -> None:
    model = adapted(config, name="test-adapter")
    for method in ("save_pretrained", "from_pretrained", "push_to_hub"):
        assert hasattr(model, method)
    mine = {name for name, _ in model.named_parameters() if "malora_" in name}
    assert mine == {name for name, _ in model.named_parameters() if name.endswith(".test-adapter")}


def test_layer_and_model_status(config: MaloraConfig) -> None:
    model = adapted(config)
    statuses = model.get_layer_status()
    assert len(statuses) == 3 * len(config.projections)
    assert all(status.enabled and status.active_adapters == ["default"] for status in statuses)
    status = model.get_model_status()
    assert (status.peft_types, status.merged_adapters, status.available_adapters) == (
        {"default": "MALORA"},
        [],
        ["default"],
    )
    assert status.trainable_params == model.get_nb_trainable_parameters()[0] > 0


def test_preparing_for_training(config: MaloraConfig, inputs: dict[str, Tensor]) -> None:
    assert not adapted(config).get_input_embeddings()(inputs["input_ids"]).requires_grad
    base = prepare_model_for_kbit_training(tiny_llava())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    model = get_peft_model(base, config)
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(inputs["input_ids"]).requires_grad


def test_loading_with_low_memory(config: MaloraConfig, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model = adapted(config)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    injected = inject_adapter_in_model(copy.deepcopy(config), tiny_llava(), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in injected.named_parameters() if "malora_" in name} == {"meta"}


def test_saving_and_loading(config: MaloraConfig, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model = adapted(config)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    saved, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    read, written = PeftConfig.from_pretrained(tmp_path).to_dict(), model.peft_config["default"].to_dict()
    added = {"inference_mode": True, "auto_mapping": read["auto_mapping"]}  # what `save_pretrained` writes of its own
    assert read == written | added
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    trainable = PeftModel.from_pretrained(tiny_llava(), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]


def test_state_dict_round_trip(config: MaloraConfig, inputs: dict[str, Tensor]) -> None:
    model, other = adapted(config), adapted(config, seed=1)
    assert not torch.equal(logits(other, inputs), logits(model, inputs))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(other, inputs), logits(model, inputs))


def test_a_config_given_by_hand_is_the_one_used(config: MaloraConfig, tmp_path: Path) -> None:
    adapted(config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path, is_trainable=False, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode


def test_saving_selected_adapters(config: MaloraConfig, tmp_path: Path) -> None:
    """Also where the name of one is part of the name of another."""
    model = adapted(config)
    expected = len(get_peft_model_state_dict(model))
    for name in ("default2", "other_default", "efaul"):
        model.add_adapter(name, copy.deepcopy(config))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert not (tmp_path / "default2").exists()
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == expected


def test_loading_several_adapters(config: MaloraConfig, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    first, second = adapted(config, seed=1), adapted(config, seed=2)
    first.save_pretrained(tmp_path / "1")
    second.save_pretrained(tmp_path / "2")
    model = PeftModel.from_pretrained(tiny_llava(), tmp_path / "1").eval()
    assert model.load_adapter(tmp_path / "2", adapter_name="second").missing_keys == []
    assert torch.equal(logits(model, inputs), logits(first, inputs))
    model.set_adapter("second")
    assert torch.equal(logits(model, inputs), logits(second, inputs))
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), logits(first, inputs))


def test_a_batch_of_mixed_adapters_is_refused(config: MaloraConfig, inputs: dict[str, Tensor]) -> None:
    """PEFT would drop the names and answer with the active adapter."""
    model = adapted(config)
    for call in (model, model.generate):
        with pytest.raises(InputError, match="set_adapter"):
            call(**inputs, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generating(config: MaloraConfig, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    model = get_peft_model(tiny_llava().to(dtype), config).eval()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (2, inputs["input_ids"].shape[1] + 3)


def test_generating_from_ids_given_by_position(config: MaloraConfig) -> None:
    assert adapted(config).generate(torch.tensor([prompt(10, 11)]), max_new_tokens=2, min_new_tokens=2).shape == (1, 5)


def test_a_conversion_to_lora_is_refused(config: MaloraConfig) -> None:
    """An update that depends on the token is no difference of two matrices."""
    model = adapted(config)
    assert not model.supports_lora_conversion()
    with pytest.raises((TypeError, ValueError), match=r"(?i)convert|support"):
        convert_to_lora(model, rank=4)


def test_training_moves_the_adapter_alone(config: MaloraConfig, inputs: dict[str, Tensor]) -> None:
    model = adapted(config).train()
    model(**inputs).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("malora_" in name), name


def test_training_of_chosen_layers(config: MaloraConfig, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    config.layers_to_transform = [0]
    model = adapted(config).train()
    model(**inputs).logits.sum().backward()
    assert all(".layers.0." in name for name, p in model.named_parameters() if p.grad is not None)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    names = [name for name, module in loaded.named_modules() if isinstance(module, MaloraLinear)]
    assert len(names) == len(config.projections)


def test_training_with_checkpointing(config: MaloraConfig, inputs: dict[str, Tensor]) -> None:
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = adapted(config).train()
    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_device_map(config: MaloraConfig, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model = adapted(config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("active", [True, False])
def test_deleting_an_adapter(config: MaloraConfig, inputs: dict[str, Tensor], active: bool) -> None:
    model = adapted(config)
    before = logits(model, inputs)
    model.add_adapter("second", copy.deepcopy(config))
    if active:
        model.set_adapter("second")
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    for layer in (module for module in model.modules() if isinstance(module, MaloraLinear)):
        for holder in layer.adapter_layer_names + layer.other_param_names:
            assert "second" not in getattr(layer, holder)
    assert torch.equal(logits(model, inputs), before)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("unknown")


def test_deleting_the_only_adapter_leaves_the_base(config: MaloraConfig, inputs: dict[str, Tensor]) -> None:
    model = adapted(config)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model, inputs), logits(tiny_llava(), inputs))


def test_disabling_and_unloading(config: MaloraConfig, inputs: dict[str, Tensor]) -> None:
    model, base = adapted(config), logits(tiny_llava(), inputs)
    on = logits(model, inputs)
    assert not torch.equal(on, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, inputs), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, inputs), on)
    assert torch.equal(logits(model.unload(), inputs), base)


def test_the_base_state_dict_comes_out_and_goes_in(config: MaloraConfig) -> None:
    original = {name: value.clone() for name, value in tiny_llava().state_dict().items()}
    model = adapted(config)
    assert get_base_model_state_dict(model).keys() == original.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    result = set_base_model_state_dict(model, original, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    restored = get_base_model_state_dict(model)
    assert all(torch.equal(restored[name], original[name]) for name in original)


def test_scaling_a_layer_scales_its_update(config: MaloraConfig) -> None:
    model = adapted(config)
    layer = next(module for module in model.modules() if isinstance(module, MaloraLinear))
    x = torch.randn(1, 4, layer.in_features)
    mask = torch.tensor([[True, True, False, False]])
    layer.modality.give(mask)
    base, once = layer.get_base_layer()(x), layer(x)
    layer.scale_layer(3.0)
    torch.testing.assert_close(layer(x) - base, 3 * (once - base))


def test_one_copy_of_the_mask_per_device(inputs: dict[str, Tensor]) -> None:
    """Layers under device_map=auto lie on several devices; torch's meta device stands in for the second."""
    modality = adapted(MaloraConfig()).base_model.modality
    modality.give(torch.tensor([[True, False]]))
    here, there = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, device="meta")
    assert modality.of(here).device.type == "cpu"
    assert modality.of(there).device.type == "meta"
    assert modality.of(there) is modality.of(there)
    assert modality.of(here) is modality.of(here)


def test_a_failed_second_adapter_leaves_the_first(config: MaloraConfig, inputs: dict[str, Tensor]) -> None:
    model = adapted(config)
    before = logits(model, inputs)
    with pytest.raises(InputError, match="matches no module"):
        model.add_adapter("second", MaloraConfig(target_modules=["nothing"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, inputs), before)
