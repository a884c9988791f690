"""MaLoRA on quantized bases: bitsandbytes' 4- and 8-bit layers work, every other kind is refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import batch, prompt, tiny_llava
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import FineGrainedFP8Config

from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import MaloraConfig, check_targets


def with_layers(make: Any) -> nn.Module:
    """A tiny model whose key projections in the decoder are replaced by what `make` makes of them."""
    model = tiny_llava(hidden_size=64)
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj = make(layer.self_attn.k_proj)
    return model


def quantized(bits: int) -> nn.Module:
    """The same with bitsandbytes' layers."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")

    def make(linear: nn.Linear) -> nn.Module:
        shape = (linear.in_features, linear.out_features)
        if bits == 4:
            layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": linear.weight.data}, strict=False)
        return layer.to("cpu")

    return with_layers(make)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_layers(bits: int, tmp_path: Path) -> None:
    base, inputs = quantized(bits).eval(), batch(prompt("image", 10, 11), prompt(12, "image", 13, 14), labels=True)
    weight = base.model.language_model.layers[0].self_attn.k_proj.weight
    assert weight.dtype == {4: torch.uint8, 8: torch.int8}[bits]
    before = logits(base, inputs)
    fresh = get_peft_model(copy.deepcopy(base), MaloraConfig(r=4)).eval()
    assert torch.equal(logits(fresh, inputs), before)

    torch.manual_seed(0)
    model = get_peft_model(prepare_model_for_kbit_training(base), MaloraConfig(r=4, init_weights=False)).eval()
    adapted = logits(model, inputs)
    assert (adapted - before).abs().max() > 1e-3
    model(**inputs).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    assert all("malora_" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())
    assert {p.dtype for name, p in model.named_parameters() if "malora_" in name} == {torch.float32}

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(bits), tmp_path).eval()
    torch.testing.assert_close(logits(again, inputs), adapted, rtol=1e-4, atol=1e-4)


def test_other_quantized_checkpoints_are_refused_before_loading() -> None:
    config = tiny_llava().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    check_targets(MaloraConfig(), config)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(InputError, match="quantized by gptq"):
        check_targets(MaloraConfig(), config)
    config.quantization_config = FineGrainedFP8Config()
    with pytest.raises(InputError, match=r"quantized by .*fp8"):
        check_targets(MaloraConfig(), config)


class OtherLinear(nn.Module):
    """As GPTQ and AWQ have them: linear, but no `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))


def float8(linear: nn.Linear) -> nn.Module:
    """As fine-grained FP8 has them: an `nn.Linear` with 8-bit floats."""
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def subclassed(linear: nn.Linear) -> nn.Module:
    """As torchao has them: an `nn.Linear` whose weight is a tensor of another class."""

    class Packed(torch.Tensor):
        pass

    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Packed), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("make", "says"), [(OtherLinear, "OtherLinear"), (float8, "float8_e4m3fn"), (subclassed, "Packed")]
)
def test_other_quantized_layers_are_refused(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"{says}.*bitsandbytes") as caught:
        get_peft_model(with_layers(make), MaloraConfig())
    assert caught.value.argument == "target_modules"
