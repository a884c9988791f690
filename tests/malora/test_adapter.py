"""MaLoRA as a PEFT method: identity, formula, modality mask, save and load, adapter management."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import IMAGE, batch, prompt, tiny_llava
from models import family_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor

from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import MaloraConfig, MaloraLinear, matched_lora_config, modality_mask


def adapted(seed: int = 0, **settings: object) -> PeftModel:
    """A tiny model with a random, non-zero adapter of rank 4."""
    model = tiny_llava(seed)
    torch.manual_seed(seed + 100)
    return get_peft_model(model, MaloraConfig(**{"r": 4, "init_weights": False} | settings)).eval()


def mixed_batch() -> dict[str, Tensor]:
    """Three prompts of unequal length: image first, text around an image, two images."""
    return batch(prompt("image", 10, 11), prompt(20, 21, "image", 22, 23, 24), prompt("image", 30, "image", 31))


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, Tensor], **kwargs: object) -> Tensor:
    return model(**inputs, **kwargs).logits


def layers_of(model: torch.nn.Module) -> dict[str, MaloraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaloraLinear)}


def formula(layer: MaloraLinear, x: Tensor, visual: Tensor, gate: str) -> Tensor:
    """The docstring of layer.py, one token at a time in float64."""
    weights = {n: getattr(layer, n)["default"].double() for n in layer.adapter_layer_names if len(getattr(layer, n))}
    r, d = layer.malora_config["default"].r, x.shape[-1]
    base = layer.get_base_layer()
    out = torch.empty(*x.shape[:-1], base.out_features, dtype=torch.float64)
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            m = 0 if visual[row, i] else 1
            xi = x[row, i].double()
            down, up = weights["malora_A"][m * r : (m + 1) * r], weights["malora_B"][:, m * r : (m + 1) * r]
            g = torch.tensor(1.0, dtype=torch.float64)
            if gate == "token":
                g = torch.sigmoid(weights["malora_gate_weight"][m] @ xi / math.sqrt(d) + weights["malora_gate_bias"][m])
            elif gate == "modality":
                g = torch.sigmoid(weights["malora_gate_bias"][m])
            out[row, i] = base.weight.double() @ xi + layer.malora_scaling["default"][m] * g * (up @ (down @ xi))
    return out


def test_fresh_adapter_is_bit_equal_to_the_base() -> None:
    model, inputs = tiny_llava(), mixed_batch()
    before = logits(model, inputs)
    model = get_peft_model(model, MaloraConfig()).eval()
    assert torch.equal(logits(model, inputs), before)
    assert len(layers_of(model)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_base(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    model = tiny_llava().to(dtype)
    inputs = mixed_batch()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    before = logits(model, inputs)
    settings = {"autocast_adapter_dtype": autocast_adapter_dtype}
    fresh = get_peft_model(copy.deepcopy(model), MaloraConfig(r=4), **settings).eval()
    assert torch.equal(logits(fresh, inputs), before)
    torch.manual_seed(0)
    moved = get_peft_model(model, MaloraConfig(r=4, init_weights=False), **settings).eval()
    weights = next(iter(layers_of(moved).values()))
    assert weights.malora_A["default"].dtype == (torch.float32 if autocast_adapter_dtype else dtype)
    after = logits(moved, inputs)
    assert after.dtype == dtype
    assert not torch.equal(after, before)


@pytest.mark.parametrize("gate", ["none", "modality", "token"])
def test_layer_is_the_formula(gate: str) -> None:
    model, inputs = adapted(gate=gate), mixed_batch()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
        for name, layer in layers_of(model).items()
    ]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    for name, (x, out) in seen.items():
        expected = formula(layers_of(model)[name], x, inputs["input_ids"] == IMAGE, gate)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_adapter_acts_through_the_keys_only() -> None:
    """Replacing k_proj outputs of the bare model by the formula gives the adapted model's logits, and queries, values
    and everything before the first attention do not move."""
    model, inputs = adapted(), mixed_batch()
    visual = inputs["input_ids"] == IMAGE
    bare = tiny_llava()
    before = logits(bare, inputs)
    after = logits(model, inputs)
    assert (after - before).abs().max() > 1e-2

    first: dict[str, list[Tensor]] = {"q_proj": [], "v_proj": [], "input_layernorm": [], "k_proj": []}
    for source in (bare, model.get_base_model()):
        layer = source.model.language_model.layers[0]
        modules = {"input_layernorm": layer.input_layernorm} | {
            name: getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")
        }
        hooks = [
            module.register_forward_hook(lambda _m, _a, out, name=name: first[name].append(out))
            for name, module in modules.items()
        ]
        logits(source, inputs)
        for hook in hooks:
            hook.remove()
    for name, (base, tuned) in first.items():
        assert torch.equal(base, tuned) == (name != "k_proj"), name

    layers = {name.removeprefix("base_model.model."): layer for name, layer in layers_of(model).items()}
    for name, layer in layers.items():
        bare.get_submodule(name).register_forward_hook(
            lambda _m, args, _o, layer=layer: formula(layer, args[0], visual, "token").float()
        )
    torch.testing.assert_close(logits(bare, inputs), after, rtol=1e-4, atol=1e-4)


def test_save_and_load_in_this_and_in_a_new_process(tmp_path: Path) -> None:
    model, inputs = adapted(), mixed_batch()
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "MALORA"
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "adapter"), MaloraConfig)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, inputs), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.base_model.model is not model.base_model.model

    torch.save({"inputs": inputs, "expected": expected}, tmp_path / "case.pt")
    tiny_llava().save_pretrained(tmp_path / "base")
    script = f"""
import torch, lmms_keyspace.malora, lmms_keyspace.malora as again
from transformers import AutoModelForImageTextToText
from peft import PeftModel
case = torch.load({str(tmp_path / "case.pt")!r}, weights_only=True)
base = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    print("equal", torch.equal(model(**case["inputs"]).logits, case["expected"]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "equal True" in run.stdout, run.stderr


def test_a_process_without_the_plugin_refuses_the_adapter(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    script = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "KeyError: 'MALORA'" in run.stderr


def test_importing_twice_is_harmless() -> None:
    import importlib

    import lmms_keyspace.malora

    before = PeftConfig.from_peft_type(peft_type="MALORA")
    importlib.reload(lmms_keyspace.malora)
    assert type(PeftConfig.from_peft_type(peft_type="MALORA")) is type(before)


def test_state_dict_holds_the_adapter_only() -> None:
    model = adapted()
    state = get_peft_model_state_dict(model)
    names = {name.rpartition(".")[2] for name in state}
    assert names == {"malora_A", "malora_B", "malora_gate_weight", "malora_gate_bias"}
    assert len(state) == 4 * 3
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(v.numel() for v in state.values()) == 3 * MaloraConfig(r=4).parameter_count(32, 16)


def test_disable_adapter_is_the_base_and_needs_no_mask() -> None:
    model, inputs = adapted(), mixed_batch()
    expected = logits(tiny_llava(), inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        logits(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert not torch.equal(logits(model, inputs), expected)


def test_several_adapters(tmp_path: Path) -> None:
    model, inputs = adapted(), mixed_batch()
    first = logits(model, inputs)
    torch.manual_seed(7)
    model.add_adapter("other", MaloraConfig(r=2, gate="none", init_weights=False, layers_to_transform=[1]))
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("other")
    other = logits(model, inputs)
    assert not torch.equal(other, first)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.model.language_model.layers.1.self_attn.k_proj.{w}.other" for w in ("malora_A", "malora_B")
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path / "other").eval()
    assert torch.equal(logits(loaded, inputs), other)

    model.base_model.set_adapter(["default", "other"])  # both at once: the updates add up
    assert not torch.equal(logits(model, inputs), other)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model, inputs), other)
    assert all("default" not in n for n in model.state_dict())


def test_deepcopy_keeps_its_own_mask() -> None:
    model, inputs = adapted(), mixed_batch()
    twin = copy.deepcopy(model)
    assert twin.base_model.modality is not model.base_model.modality
    assert torch.equal(logits(twin, inputs), logits(model, inputs))


def test_merging_is_refused_with_the_reason_and_unload_gives_the_base() -> None:
    model, inputs = adapted(), mixed_batch()
    for attempt in (model.merge_and_unload, model.merge_adapter, next(iter(layers_of(model).values())).merge):
        with pytest.raises(InputError, match="depends on the token"):
            attempt()
    bare = model.unload()
    assert not layers_of(bare)
    never = tiny_llava()
    assert torch.equal(logits(bare, inputs), logits(never, inputs))  # transformers hangs hooks of its own at a forward
    hooks = [[len(m._forward_pre_hooks) + len(m._forward_hooks) for m in source.modules()] for source in (bare, never)]
    assert hooks[0] == hooks[1]


def test_modules_to_save(tmp_path: Path) -> None:
    model, inputs = adapted(modules_to_save=["linear_2"]), mixed_batch()
    projector = model.get_base_model().model.multi_modal_projector
    projector.linear_2.modules_to_save["default"].weight.data += 1
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llava(), tmp_path).eval(), inputs), expected)


# The modality mask


def test_rows_do_not_depend_on_their_batch() -> None:
    """Left padding and several images: each row of a batch gives the logits it gives alone."""
    model = adapted()
    prompts = [prompt("image", 10, 11), prompt(20, 21, "image", 22, 23, 24), prompt("image", 30, "image", 31)]
    together = mixed_batch()
    logits_together = logits(model, together)
    pictures = iter(together["pixel_values"].split([1, 1, 2]))
    for row, ids in enumerate(prompts):
        alone = {**batch(ids), "pixel_values": next(pictures)}
        torch.testing.assert_close(logits_together[row, -len(ids) :], logits(model, alone)[0], rtol=1e-4, atol=1e-5)


def test_cached_decoding_equals_teacher_forcing() -> None:
    model = adapted()
    inputs = mixed_batch()
    out = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert not (new == IMAGE).any()
    forced = {
        **inputs,
        "input_ids": out.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1),
    }
    expected = logits(model, forced)[:, -7:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [3, 7])
def test_a_prefill_in_chunks_is_the_whole(size: int) -> None:
    """Chunks that begin with text, cut an image in two, or hold none."""
    model, inputs = adapted(), batch(prompt(10, 11, 12, 13, "image", 14, "image", 15, 16, 17, 18))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}

    def in_parts_and_whole() -> list[torch.Tensor]:
        return [
            torch.stack(model.generate(**inputs, **settings, prefill_chunk_size=chunk).logits) for chunk in (size, None)
        ]

    with model.disable_adapter():
        if not torch.allclose(*in_parts_and_whole(), rtol=1e-4, atol=1e-4):
            pytest.skip("this transformers loses images in chunks, without an adapter, too")  # 5.20 does
    torch.testing.assert_close(*in_parts_and_whole(), rtol=1e-4, atol=1e-4)


def test_a_decoded_placeholder_is_text() -> None:
    """A model may emit the placeholder's id; without pixels it is an embedding like any other."""
    model, inputs = adapted(), mixed_batch()
    seen: list[Tensor] = []
    layer = next(iter(layers_of(model).values()))
    layer.register_forward_hook(lambda m, args, _o: seen.append(m.modality.of(args[0])))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        model(input_ids=torch.full((3, 1), IMAGE), attention_mask=mask, past_key_values=cache)
    assert torch.equal(seen[0], inputs["input_ids"] == IMAGE)
    assert not seen[1].any()


def test_beam_search_with_the_mask() -> None:
    """The best beam's score, recomputed by teacher forcing without a cache, is the score that beam search reports."""
    model, inputs = adapted(), batch(prompt("image", 10, 11))
    out = model.generate(
        **inputs,
        num_beams=3,
        max_new_tokens=4,
        min_new_tokens=4,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    forced = {**inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    log_p = logits(model, forced)[:, -5:-1].log_softmax(-1)
    log_p[..., 2] = -math.inf  # EOS is barred by min_new_tokens; beam search does not renormalize after it
    new = out.sequences[:, -4:, None]
    torch.testing.assert_close(log_p.gather(-1, new).sum(), out.sequences_scores[0], rtol=1e-4, atol=1e-4)


def test_inputs_embeds_need_the_mask_given() -> None:
    model, inputs = adapted(), mixed_batch()
    expected = logits(model, inputs)
    with torch.no_grad():
        inner = model.get_base_model().model
        embeds = inner.get_input_embeddings()(inputs["input_ids"])
        features = torch.cat(list(inner.get_image_features(inputs["pixel_values"]).pooler_output))
    visual = inputs["input_ids"] == IMAGE
    embeds = embeds.masked_scatter(visual[..., None].expand_as(embeds), features)
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with pytest.raises(InputError, match=r"inputs_embeds.*modality_mask"):
        logits(model, call)
    with modality_mask(model, visual):
        torch.testing.assert_close(logits(model, call), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="inputs_embeds"):  # the mask ended with its context
        logits(model, call)
    with modality_mask(model, visual[:, 1:]), pytest.raises(InputError, match="modality_mask"):
        logits(model, call)
    with pytest.raises(InputError, match="bool"), modality_mask(model, visual.long()):
        pass
    with pytest.raises(InputError, match="no MaLoRA layer"), modality_mask(tiny_llava(), visual):
        pass


def test_images_without_placeholders_are_an_error() -> None:
    model, inputs = adapted(), mixed_batch()
    inputs["input_ids"] = torch.where(inputs["input_ids"] == IMAGE, 40, inputs["input_ids"])
    with pytest.raises(InputError, match="no token is a visual placeholder"):
        logits(model, inputs)
    with pytest.raises(InputError, match="no token is a visual placeholder"):
        model.generate(**inputs, max_new_tokens=2)


def test_text_only_prompts_run() -> None:
    model, inputs = adapted(), batch(prompt(10, 11, 12), prompt(13))
    assert torch.isfinite(logits(model, inputs)).all()
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape == (2, 6)


def test_positional_arguments_are_read() -> None:
    model, inputs = adapted(), mixed_batch()
    with torch.no_grad():
        out = model(inputs["input_ids"], inputs["pixel_values"], attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(out, logits(model, inputs))


def test_an_error_in_the_forward_leaves_no_stale_mask() -> None:
    model, inputs = adapted(), mixed_batch()
    with pytest.raises(ValueError, match="token"):
        logits(model, {**inputs, "pixel_values": inputs["pixel_values"][:1]})  # fewer pictures than placeholders
    x = torch.zeros(*inputs["input_ids"].shape, 32)
    with pytest.raises(InputError, match="inputs_embeds"):
        next(iter(layers_of(model).values()))(x)


# Training


def gradients(model: PeftModel, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the summed loss; all forward passes come before the backward pass."""
    model.zero_grad()
    sum(model(**inputs).loss for inputs in batches).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_a_and_the_gate_once_b_has_moved() -> None:
    model = get_peft_model(tiny_llava(), MaloraConfig(r=4)).train()
    inputs = batch(prompt("image", 10, 11), prompt(20, "image", 22), labels=True)
    at_start = gradients(model, inputs)
    assert all(torch.count_nonzero(g) for n, g in at_start.items() if "malora_B" in n)
    assert all(not torch.count_nonzero(g) for n, g in at_start.items() if "malora_B" not in n)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.malora_B["default"].normal_()
    moved = gradients(model, inputs)
    assert set(moved) == {n for n, p in model.named_parameters() if "malora_" in n}
    assert all(torch.count_nonzero(g) for g in moved.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_mask(reentrant: bool) -> None:
    """Two forward passes with other image positions before one backward pass."""
    inputs = [
        batch(prompt("image", 10, 11, 12), labels=True),
        batch(prompt(13, 14, 15, "image"), seed=1, labels=True),
    ]
    model = adapted().train()
    expected = gradients(model, *inputs)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients(model, *inputs)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


def test_gates_report_what_the_layer_uses() -> None:
    x = torch.randn(2, 5, 32)
    for gate in ("none", "modality", "token"):
        layer = next(iter(layers_of(adapted(gate=gate)).values()))
        values = layer.gates(x, "default")
        assert values.shape == (2, 5, 2)
        visual = torch.tensor([[True, True, False, False, False]] * 2)
        ungated = layer.get_base_layer()(x).double()
        r = layer.malora_config["default"].r
        low = x @ layer.malora_A["default"].T
        up = layer.malora_B["default"]
        by_side = torch.stack([low[..., :r] @ up[:, :r].T, low[..., r:] @ up[:, r:].T], dim=-1) * values[..., None, :]
        delta = torch.where(visual[..., None], by_side[..., 0], by_side[..., 1]) * layer.malora_scaling["default"][0]
        torch.testing.assert_close(ungated + delta.double(), formula(layer, x, visual, gate), rtol=1e-4, atol=1e-4)
    fresh = get_peft_model(tiny_llava(), MaloraConfig())
    assert torch.equal(next(iter(layers_of(fresh).values())).gates(x, "default"), torch.full((2, 5, 2), 0.5))


# Settings


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"r": 0}, "r"),
        ({"r": 2.5}, "r"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"gate": "layer"}, "gate"),
        ({"target_modules": []}, "target_modules"),
        ({"layers_to_transform": []}, "layers_to_transform"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"layers_to_transform": 1}, "layers_to_transform"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], argument: str) -> None:
    with pytest.raises(InputError) as caught:
        MaloraConfig(**settings)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"target_modules": ["k_proj"]}, "target_modules"),  # the vision tower has one, too
        ({"target_modules": r".*vision_tower.*k_proj"}, "target_modules"),
        ({"target_modules": r".*language_model\..*\.self_attn"}, "target_modules"),  # not a linear layer
        ({"layers_to_transform": [0, 3]}, "layers_to_transform"),
    ],
)
def test_targets_that_do_not_fit_the_model(settings: dict[str, object], argument: str) -> None:
    with pytest.raises(InputError) as caught:
        get_peft_model(tiny_llava(), MaloraConfig(**settings))
    assert caught.value.argument == argument


def test_a_model_without_images_is_refused() -> None:
    with pytest.raises(InputError, match="image_token_id in the config"):
        get_peft_model(tiny_llava().model.language_model, MaloraConfig(target_modules=["k_proj"]))


def test_other_projections_and_chosen_layers() -> None:
    pattern = r".*language_model\..*self_attn\.(q|k|v|o)_proj"
    model = adapted(target_modules=pattern, layers_to_transform=[0, 2])
    names = {name.removeprefix("base_model.model.model.language_model.layers.") for name in layers_of(model)}
    assert names == {f"{i}.self_attn.{p}_proj" for i in (0, 2) for p in "qkvo"}
    assert torch.isfinite(logits(model, mixed_batch())).all()


@pytest.mark.parametrize(("kv_heads", "r"), [(4, 8), (4, 4), (2, 8), (1, 16)])
def test_matched_lora_has_equal_parameters_and_scale(kv_heads: int, r: int) -> None:
    model = tiny_llava(num_key_value_heads=kv_heads, hidden_size=128)
    config = MaloraConfig(r=r)
    control = matched_lora_config(config, model.config)
    assert isinstance(control, LoraConfig)
    assert control.lora_alpha / control.r == pytest.approx(config.alpha / config.r)
    counts = [get_peft_model(copy.deepcopy(model), c).get_nb_trainable_parameters()[0] for c in (config, control)]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


def test_matched_lora_takes_the_chosen_layers_and_refuses_a_poor_match() -> None:
    model = tiny_llava()
    control = matched_lora_config(MaloraConfig(layers_to_transform=[1]), model.config, tolerance=1.0)
    names = [n for n, p in get_peft_model(model, control).named_parameters() if p.requires_grad]
    assert names
    assert all(".layers.1.self_attn.k_proj." in n for n in names)
    with pytest.raises(InputError, match="larger r"):
        matched_lora_config(MaloraConfig(r=1), tiny_llava(num_key_value_heads=1).config)


# Another family: three-axis RoPE, a vision tower with fused projections, packed pixels


def qwen_batch(config: Any) -> dict[str, Tensor]:
    """Two prompts with an image of 4 x 4 patches, which merge into 4 tokens; the second is padded."""
    start, end = config.vision_start_token_id, config.vision_end_token_id
    inputs = batch(prompt(start, "image", end, 10, 11), prompt(start, "image", end, 12), labels=True)
    generator = torch.Generator().manual_seed(0)
    inputs["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def test_qwen_identity_decoding_and_checkpointing() -> None:
    base = family_model("qwen2_5_vl")
    inputs = qwen_batch(base.config)
    before = logits(base, inputs)
    fresh = get_peft_model(family_model("qwen2_5_vl"), MaloraConfig()).eval()
    assert len(layers_of(fresh)) == 2
    assert torch.equal(logits(fresh, inputs), before)

    torch.manual_seed(0)
    model = get_peft_model(family_model("qwen2_5_vl"), MaloraConfig(r=4, init_weights=False)).eval()
    assert not torch.equal(logits(model, inputs), before)
    call = {name: value for name, value in inputs.items() if name != "labels"}
    out = model.generate(
        **call,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        suppress_tokens=[IMAGE, model.config.video_token_id],  # teacher forcing would take them for visual
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    forced = call | {
        "input_ids": out.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new)], dim=1),
    }
    expected = logits(model, forced)[:, -5:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, rtol=1e-4, atol=1e-4)

    plain = gradients(model.train(), inputs)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)
