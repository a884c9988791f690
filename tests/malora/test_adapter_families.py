"""MaLoRA in every architecture that families.py knows: targets, identity, which tokens are visual, taps, cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import IMAGE
from models import family_model, family_processor, placeholder
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import FAMILIES, decoder_sites
from lmms_keyspace.malora import MaloraConfig, MaloraLinear, check_targets
from lmms_keyspace.malora.taps import key_taps, tapped
from lmms_keyspace.malora.targets import find_targets, skeleton

ARCHITECTURES = (*FAMILIES, "llava_phi3", "vipllava", "aya_vision")
WITH_PROCESSOR = (*FAMILIES, "llava_phi3")


def pictured(family: str) -> dict[str, Tensor]:
    """Two prompts of unequal length with a picture each, by the architecture's own processor."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)) for _ in range(2)]
    sign = "" if family == "instructblip" else placeholder(family)  # its processor puts the tokens in front by itself
    texts = [f"{sign} What color is the circle ?", f"{sign} Hint says red . What color ?"]
    processor = family_processor(family)
    processor.tokenizer.padding_side = "left"
    images = pictures if family == "instructblip" else [[picture] for picture in pictures]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


def adapted(family: str, **settings: Any) -> PeftModel:
    base = family_model(family)
    torch.manual_seed(0)
    return get_peft_model(base, MaloraConfig(**{"r": 4, "init_weights": False} | settings)).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_keys_of_every_decoder_are_found(family: str) -> None:
    base = family_model(family)
    expected = {
        id(getattr(site.attention, "k_proj", getattr(site.attention, "qkv_proj", None)))
        for site in decoder_sites(base).sites
    }
    names = {id(module): name for name, module in base.named_modules()}
    config = MaloraConfig()
    assert set(find_targets(config, base)) == {names[module] for module in expected}
    assert isinstance(config.target_modules, str)
    model = get_peft_model(base, config)
    assert sum(isinstance(module, MaloraLinear) for module in model.modules()) == len(expected)
    assert [tap.layer for tap in key_taps(model)] == [site.layer for site in decoder_sites(model).sites]


@pytest.mark.parametrize("family", WITH_PROCESSOR)
def test_identity_and_visual_tokens_with_real_inputs(family: str) -> None:
    inputs = pictured(family)
    base = family_model(family)
    expected = logits(base, inputs)
    fresh = get_peft_model(base, MaloraConfig(r=4)).eval()
    assert torch.equal(logits(fresh, inputs), expected)
    model = adapted(family)
    seen: list[Tensor] = []
    for layer in (module for module in model.modules() if isinstance(module, MaloraLinear)):
        layer.register_forward_hook(lambda m, args, _o: seen.append(m.modality.of(args[0])))
    assert not torch.equal(logits(model, inputs), expected)
    assert seen
    assert all(torch.equal(mask, inputs["input_ids"] == IMAGE) for mask in seen)
    assert seen[0].any(dim=1).all()


def test_generate_of_instructblip_is_refused() -> None:
    """Its `generate` embeds the prompt itself and calls the language model alone, which sees no ids."""
    with pytest.raises(InputError, match="inputs_embeds"):
        adapted("instructblip").generate(**pictured("instructblip"), max_new_tokens=2)


@pytest.mark.parametrize("family", sorted(set(WITH_PROCESSOR) - {"instructblip"}))
def test_decoding_is_teacher_forcing(family: str) -> None:
    model, inputs = adapted(family), pictured(family)
    barred = sorted({IMAGE, *(getattr(model.config, f"{kind}_token_id", None) or IMAGE for kind in ("image", "video"))})
    out = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=barred,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    new = out.sequences[:, -3:]
    forced = dict(inputs)
    forced["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
    forced["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    for kinds in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
        forced[kinds] = torch.cat([inputs[kinds], torch.zeros_like(new)], dim=1)
    expected = logits(model, forced)[:, -4:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1).float(), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["k_pre", "k_post"])
@pytest.mark.parametrize("kind", ["malora", "lora"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_phi3", "mistral3"])
def test_taps_see_the_keys_that_attention_uses(family: str, kind: str, space: str) -> None:
    """The base keys of the first layer are those of the untouched model; the adapted ones are what capture reads."""
    inputs, plain = pictured(family), family_model(family)
    if kind == "malora":
        model = adapted(family)
    else:
        config = MaloraConfig()
        find_targets(config, plain)
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=config.target_modules, init_lora_weights=False)
        model = get_peft_model(family_model(family), lora).eval()

    def keys_of(source: torch.nn.Module) -> Tensor:
        site, seen = decoder_sites(source).sites[0], {}
        hooks = [
            site.key_module.register_forward_hook(lambda _m, _a, out: seen.__setitem__("keys", site.keys(out))),
            site.attention.register_forward_pre_hook(
                lambda _m, _a, kwargs: seen.__setitem__("rotation", kwargs["position_embeddings"]), with_kwargs=True
            ),
        ]
        logits(source, inputs)
        for hook in hooks:
            hook.remove()
        keys = seen["keys"].transpose(1, 2)
        if space == "k_post":
            keys = site.apply_rope(keys, keys, *seen["rotation"])[1]
        return keys.transpose(1, 2)

    taps = key_taps(model, space)
    with tapped(taps):
        model(**inputs)
    assert taps[0].keys is not None
    assert taps[0].base is not None
    assert taps[0].inputs is not None
    assert taps[0].keys.requires_grad
    assert not taps[0].base.requires_grad
    torch.testing.assert_close(taps[0].base, keys_of(plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taps[0].keys.detach(), keys_of(model), rtol=1e-5, atol=1e-5)
    assert (taps[0].keys - taps[0].base).abs().max() > 1e-3
    taps[0].clear()
    assert taps[0].keys is None


def test_taps_need_adapted_keys_and_a_known_space() -> None:
    model = adapted("llava", projections=["q"])
    with pytest.raises(InputError, match="no key projection"):
        key_taps(model)
    with pytest.raises(InputError, match="k_pre, k_post"):
        key_taps(adapted("llava"), "q")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MaloraConfig(target_modules=["k_proj"]), "outside the decoder"),
        (MaloraConfig(target_modules=["keys"]), "matches no module"),
        (MaloraConfig(layers_to_transform=[7]), "layers 0 to 2"),
        (MaloraConfig(target_modules=r".*language_model.*self_attn"), "linear layers only"),
        (LoraConfig(target_modules=["k_proj"]), "outside the decoder"),
        (LoraConfig(target_modules=["keys"]), "matches no module"),
    ],
)
def test_targets_are_checked_before_a_model_is_loaded(config: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_targets(config, family_model("llava").config)


def test_a_fused_layer_needs_a_projection_of_its_own() -> None:
    config = MaloraConfig(target_modules=r".*qkv_proj", projections=["o"])
    with pytest.raises(InputError, match="q, k, v"):
        check_targets(config, family_model("llava_phi3").config)


def test_checking_leaves_the_config_as_it_is() -> None:
    config = MaloraConfig()
    check_targets(config, family_model("idefics3").config)
    assert config.target_modules is None


def test_a_skeleton_has_no_weights() -> None:
    assert {parameter.device.type for parameter in skeleton(family_model("llava").config).parameters()} == {"meta"}
