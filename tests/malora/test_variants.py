"""Every variant of the layer: against a formula computed token by token, at its start, in batches, in decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adapter_models import IMAGE, batch, prompt, tiny_llava
from models import family_model
from peft import PeftModel, get_peft_model
from torch import Tensor

from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import MaloraConfig, MaloraLinear, modality_mask

QKVO = ["q", "k", "v", "o"]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "modality gate": {"gate": "modality"},
    "head gate": {"gate": "head", "projections": ["q", "k", "v"]},
    "no gate": {"gate": "none"},
    "A shared": {"sharing": "A"},
    "B shared": {"sharing": "B", "gate": "modality"},
    "ranks": {"r_visual": 5, "r_text": 2, "alpha_visual": 3.0, "alpha_text": 7.0},
    "branch": {"shared_r": 2, "shared_alpha": 5.0, "projections": QKVO},
    "branch, head gate, A shared": {"shared_r": 3, "gate": "head", "sharing": "A"},
    "branch, B shared": {"shared_r": 3, "sharing": "B"},
    "moka": {"sharing": "B", "gate": "none", "cross_attention": 0.7, "projections": QKVO},
}
CAUSAL = [name for name in VARIANTS if name != "moka"]
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
causal = pytest.mark.parametrize("settings", [VARIANTS[name] for name in CAUSAL], ids=CAUSAL)


def adapted(settings: dict[str, Any], base: torch.nn.Module | None = None, **others: Any) -> PeftModel:
    """A model with a random, non-zero adapter of rank 3 and alpha 2."""
    base = base or tiny_llava()
    torch.manual_seed(7)
    return get_peft_model(
        base, MaloraConfig(**{"r": 3, "alpha": 2.0, "init_weights": False} | settings | others)
    ).eval()


def prompts() -> list[list[int]]:
    """Unequal lengths: image first, text around an image, two images, text alone."""
    return [
        prompt("image", 10, 11),
        prompt(20, 21, "image", 22, 23, 24),
        prompt("image", 30, "image", 31),
        prompt(40, 41),
    ]


def layers_of(model: torch.nn.Module) -> dict[str, MaloraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaloraLinear)}


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def update(layer: MaloraLinear, x: Tensor, visual: Tensor, question: Tensor, heads: int) -> Tensor:
    """The docstring of layer.py for one sequence [tokens, in], one token at a time in float64, rows adapted only."""
    config, d = layer.malora_config["default"], x.shape[-1]
    weights = {n: getattr(layer, n)["default"].double() for n in layer.adapter_layer_names if len(getattr(layer, n))}
    ranks = (config.r_visual or config.r, config.r_text or config.r)
    alphas = (config.alpha_visual or config.alpha, config.alpha_text or config.alpha)
    down, up = weights["malora_A"], weights["malora_B"]
    modal = len(down) - config.shared_r, up.shape[1] - config.shared_r
    starts = (0, ranks[0])
    side_down = [down[: modal[0]] if config.sharing == "A" else down[starts[m] : starts[m] + ranks[m]] for m in (0, 1)]
    side_up = [up[:, : modal[1]] if config.sharing == "B" else up[:, starts[m] : starts[m] + ranks[m]] for m in (0, 1)]
    rows = []
    for i, xi in enumerate(x.double()):
        m = 0 if visual[i] else 1
        z = side_down[m] @ xi
        if config.cross_attention and visual[i] and question.any():
            others = torch.stack([side_down[1] @ xj for xj, asked in zip(x.double(), question, strict=True) if asked])
            z = z + config.cross_attention * torch.softmax(others @ z / math.sqrt(ranks[0]), 0) @ others
        row = alphas[m] / ranks[m] * (side_up[m] @ z)
        if config.gate == "modality":
            row = row * torch.sigmoid(weights["malora_gate_bias"][m])
        elif config.gate != "none":
            gates = 1 if config.gate == "token" else heads
            mine = slice(m * gates, (m + 1) * gates)
            logit = weights["malora_gate_weight"][mine] @ xi / math.sqrt(d) + weights["malora_gate_bias"][mine]
            row = row * torch.sigmoid(logit).repeat_interleave(len(row) // gates)
        if config.shared_r:
            shared = (config.shared_alpha or config.alpha) / config.shared_r
            row = row + shared * (up[:, modal[1] :] @ (down[modal[0] :] @ xi))
        rows.append(row)
    return torch.stack(rows)


def seen_by_layers(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every adapted layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
        for name, layer in layers_of(model).items()
    ]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen


@variants
def test_the_layer_is_the_formula(settings: dict[str, Any]) -> None:
    model, inputs = adapted(settings), batch(*prompts())
    inputs["labels"] = torch.where(inputs["input_ids"] == 24, 24, -100)  # an answer, which is no part of the question
    seen = seen_by_layers(model, inputs)
    assert len(seen) == 3 * len(settings.get("projections", ["k"]))
    visual = inputs["input_ids"] == IMAGE
    question = ~visual & inputs["attention_mask"].bool() & (inputs["input_ids"] != 24)
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    for name, (x, out) in seen.items():
        layer = layers_of(model)[name]
        for row in range(len(x)):
            expected = layer.get_base_layer()(x[row]).double()
            expected = expected + update(layer, x[row], visual[row], question[row], heads.get(name[-6:], 0))
            torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)


@variants
def test_the_start_is_the_base_bit_by_bit(settings: dict[str, Any]) -> None:
    inputs = batch(*prompts())
    fresh = adapted(settings, init_weights=True)
    assert torch.equal(logits(fresh, inputs), logits(tiny_llava(), inputs))
    assert not torch.equal(logits(adapted(settings), inputs), logits(tiny_llava(), inputs))


@variants
def test_rows_do_not_depend_on_their_batch(settings: dict[str, Any]) -> None:
    model, together = adapted(settings), batch(*prompts())
    all_logits = logits(model, together)
    pictures = [*together["pixel_values"].split([1, 1, 2]), None]
    for row, ids in enumerate(prompts()):
        alone = batch(ids)
        if pictures[row] is not None:
            alone["pixel_values"] = pictures[row]
        torch.testing.assert_close(all_logits[row, -len(ids) :], logits(model, alone)[0], rtol=1e-5, atol=1e-5)


@variants
def test_decoding_with_a_cache_is_teacher_forcing(settings: dict[str, Any]) -> None:
    """Of MokA, too, when the answer's tokens have labels, as they do in training."""
    model, inputs = adapted(settings), batch(*prompts())
    out = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    forced = inputs | {
        "input_ids": out.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1),
        "labels": torch.cat([torch.full_like(inputs["input_ids"], -100), new], dim=1),
    }
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits(model, forced)[:, -5:-1], rtol=1e-5, atol=1e-5)


def test_other_linears_of_the_decoder() -> None:
    """The two inner layers of the feed-forward part and the one that leads out of it."""
    model, inputs = adapted({"target_modules": r".*language_model\..*mlp\.(gate|up|down)_proj"}), batch(*prompts())
    seen = seen_by_layers(model, inputs)
    assert len(seen) == 9
    visual = inputs["input_ids"] == IMAGE
    for name, (x, out) in seen.items():
        layer = layers_of(model)[name]
        expected = layer.get_base_layer()(x[0]).double() + update(layer, x[0], visual[0], ~visual[0], 0)
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)


@variants
def test_one_stacked_product_reads_and_one_writes(settings: dict[str, Any]) -> None:
    """Not one pass for each modality; a branch beside a gate per head is outside that gate and has a product more."""
    model = adapted(settings)
    layer = next(layer for name, layer in layers_of(model).items() if name.endswith("k_proj"))
    x = torch.randn(1, 6, layer.in_features)
    calls: list[Tensor] = []
    original = torch.nn.functional.linear
    visual = torch.tensor([[True, True, True, False, False, False]])
    with modality_mask(model, visual), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(args[1]) or original(*args))
        layer(x)
    assert len(calls) == (4 if settings.get("shared_r") and settings.get("gate") == "head" else 3)  # the base's is one


@causal
def test_later_text_does_not_move_earlier_tokens(settings: dict[str, Any]) -> None:
    model = adapted(settings)
    first, second = (logits(model, batch(prompt("image", 10, last))) for last in (11, 12))
    torch.testing.assert_close(first[:, :-1], second[:, :-1], rtol=1e-6, atol=1e-6)


def test_moka_is_not_causal() -> None:
    """What its docstring says: the question after an image moves the image's keys."""
    model = adapted(VARIANTS["moka"])
    first, second = (logits(model, batch(prompt("image", 10, last))) for last in (11, 12))
    assert (first[:, 1:-2] - second[:, 1:-2]).abs().max() > 1e-3


@variants
def test_gradients_reach_every_weight(settings: dict[str, Any]) -> None:
    model = adapted(settings).train()
    model(**batch(*prompts(), labels=True) | {"labels": batch(*prompts())["input_ids"]}).loss.backward()
    for name, parameter in model.named_parameters():
        if "malora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@variants
def test_the_parameter_count_is_what_peft_counts(settings: dict[str, Any]) -> None:
    model = adapted(settings)
    config = model.peft_config["default"]
    expected = 0
    for name, layer in layers_of(model).items():
        heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2}.get(name[-6:], 0)
        expected += config.parameter_count(layer.in_features, layer.out_features, heads)
    assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("projections", [["k"], ["q", "v"], ["q", "k", "v", "o"]])
def test_a_fused_projection_moves_in_the_rows_asked_for(projections: list[str]) -> None:
    base = family_model("llava_phi3")
    model = adapted({"projections": projections, "gate": "none"}, base)
    inputs = batch(prompt("image", 10, 11))
    rows = {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128)}
    fused = {n: seen for n, seen in seen_by_layers(model, inputs).items() if n.endswith("qkv_proj")}
    assert len(fused) == 2
    visual = inputs["input_ids"][0] == IMAGE
    for name, (x, out) in fused.items():
        layer = layers_of(model)[name]
        moved = (out - layer.get_base_layer()(x))[0]
        expected = update(layer, x[0], visual, ~visual, 0)
        asked = [rows[projection] for projection in projections if projection != "o"]
        torch.testing.assert_close(
            torch.cat([moved[:, part] for part in asked], 1).double(), expected, rtol=1e-4, atol=1e-4
        )
        for projection in rows.keys() - set(projections):
            assert not moved[:, rows[projection]].any()
    names = {name.rpartition(".")[2] for name in layers_of(model)}
    assert names == ({"qkv_proj", "o_proj"} if "o" in projections else {"qkv_proj"})


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"r_visual": 0}, "r_visual"),
        ({"r_text": True}, "r_text"),
        ({"shared_r": -1}, "shared_r"),
        ({"shared_alpha": 2.0}, "shared_alpha"),
        ({"alpha_visual": 0}, "alpha_visual"),
        ({"sharing": "C"}, "sharing"),
        ({"sharing": "A", "r_visual": 4}, "r_visual"),
        ({"cross_attention": 1.0}, "cross_attention"),
        ({"cross_attention": -1.0, "sharing": "B", "gate": "none"}, "cross_attention"),
        ({"projections": []}, "projections"),
        ({"projections": ["k", "mlp"]}, "projections"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], argument: str) -> None:
    with pytest.raises(InputError) as caught:
        MaloraConfig(**settings)
    assert caught.value.argument == argument


@pytest.mark.parametrize("target", [["o_proj"], ["down_proj"]])
def test_a_gate_per_head_needs_heads(target: list[str]) -> None:
    pattern = rf".*language_model\..*{target[0]}"
    with pytest.raises(InputError, match="has no heads"):
        adapted({"gate": "head", "target_modules": pattern})
