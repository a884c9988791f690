"""The trainer on a tiny random model: the terms, their logs, the controls, and bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from adapter_models import EOS, IMAGE, SPECIAL_IDS, batch, prompt, tiny_llava
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from lmms_keyspace import divergence
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import MaloraConfig, matched_lora_config
from lmms_keyspace.malora.train import key_taps, tapped, train


def data(n: int = 3, rows: int = 6) -> list[dict[str, Tensor]]:
    """Batches with unequal prompts, padding and answers that end in EOS."""
    generator = torch.Generator().manual_seed(0)

    def words(k: int) -> list[int]:
        return torch.randint(10, 60, (k,), generator=generator).tolist()

    return [
        batch(*(prompt(*words(i % 3), "image", *words(3), EOS) for i in range(rows)), seed=b, labels=True)
        for b in range(n)
    ]


def model_of(kind: str, seed: int = 0) -> PeftModel:
    """A model whose image features share an offset, so that its visual and text keys lie apart as in a real one."""
    base = tiny_llava(seed)
    base.model.multi_modal_projector.linear_2.bias.data += 1
    config = MaloraConfig(r=4)
    torch.manual_seed(seed)
    return get_peft_model(base, config if kind == "malora" else matched_lora_config(config, base.config, tolerance=0.1))


def state(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["malora", "lora"])
def test_all_terms_fall_and_only_the_adapter_moves(kind: str) -> None:
    model = model_of(kind).eval()
    before = state(model)
    log = train(model, data(), steps=40, lr=1e-2, lambda_mmd=2.0, lambda_gram=0.1, special_token_ids=SPECIAL_IDS)
    assert not model.training
    assert [entry["step"] for entry in log] == list(range(40))
    assert log[0]["gram"] == 0.0  # keys are the base's before the first step
    ce = [entry["ce"] for entry in log]
    mmd2 = [entry["mmd2"] for entry in log]
    assert sum(ce[-3:]) < sum(ce[:3])
    assert sum(mmd2[-3:]) < 0.5 * sum(mmd2[:3])
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("k_proj" in name for name in moved)
    json.dumps(log)


def test_without_the_mmd_term_the_divergence_stays() -> None:
    """The two arms differ in lambda_mmd alone; the divergence is measured the same way in both."""

    def key_divergence(model: PeftModel) -> float:
        inputs = data(1, rows=12)[0]
        ids = inputs["input_ids"]
        taps = key_taps(model)
        with torch.no_grad(), tapped(taps):
            model(**inputs)
        values = []
        for tap in taps:
            visual, text, base_visual, base_text = (
                keys[where].transpose(0, 1) for keys in (tap.keys, tap.base) for where in (ids == IMAGE, ids > IMAGE)
            )
            width2 = divergence.median_bandwidth2(base_visual, base_text)
            values.append(divergence.mmd2(visual, text, bandwidth2=width2).mean())
        return sum(values) / len(values)

    def trained(lambda_mmd: float) -> PeftModel:
        model = model_of("malora")
        train(model, data(), steps=40, lr=1e-2, lambda_mmd=lambda_mmd, special_token_ids=SPECIAL_IDS)
        return model.eval()

    base = key_divergence(model_of("malora").eval())
    with_term, without = key_divergence(trained(2.0)), key_divergence(trained(0.0))
    assert with_term < 0.5 * base
    assert without > 0.8 * base


def test_terms_that_are_off_are_not_computed() -> None:
    entry = train(model_of("malora"), data(), steps=1, lambda_mmd=0, lambda_gram=0)[0]
    assert entry["mmd2"] is None
    assert entry["gram"] is None
    assert entry["mmd2_by_layer"] == entry["gram_by_layer"] == {}
    assert entry["gate_visual"] == entry["gate_text"] == {0: 0.5, 1: 0.5, 2: 0.5}
    control = train(model_of("lora"), data(), steps=1, lambda_mmd=0, lambda_gram=0)[0]
    assert control["gate_visual"] == {}


def test_the_logged_terms_are_those_of_the_captured_keys() -> None:
    """With every token drawn, the first step's MMD^2 is divergence.mmd2 on the base keys: the adapter is still zero."""
    inputs = batch(prompt("image", 10, 11, 12, 13), prompt("image", 20, 21, 22, 23), labels=True)
    model = model_of("malora")
    entry = train(model, [inputs], steps=1, lambda_gram=0, special_token_ids=SPECIAL_IDS, calibration_batches=1)[0]
    taps = key_taps(model)
    with torch.no_grad(), model.disable_adapter(), tapped(taps):
        model(**inputs)
    ids = inputs["input_ids"]
    for tap in taps:
        visual, text = (tap.base[where].transpose(0, 1) for where in (ids == IMAGE, ids > IMAGE))
        expected = divergence.mmd2(visual, text, bandwidth2=divergence.median_bandwidth2(visual, text)).mean()
        assert entry["mmd2_by_layer"][tap.layer] == pytest.approx(expected, abs=1e-6)


def test_a_run_is_repeatable_and_leaves_the_global_random_state_alone() -> None:
    runs = []
    for _ in range(2):
        model = model_of("malora")
        torch.manual_seed(99)
        runs.append((train(model, data(), steps=5, max_tokens=8, seed=3), state(model)))
        drawn = torch.rand(1)
        torch.manual_seed(99)
        assert torch.equal(drawn, torch.rand(1))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    other = train(model_of("malora"), data(), steps=5, max_tokens=8, seed=4)
    assert other[0]["mmd2"] != runs[0][0][0]["mmd2"]


def test_warm_up_and_cosine() -> None:
    log = train(model_of("malora"), data(), steps=20, lr=1e-3, lambda_mmd=0.4, warmup_fraction=0.25)
    assert [e["lambda_mmd"] for e in log[:6]] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4, 0.4])
    assert [e["lr"] for e in log[:5]] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert log[-1]["lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 14 / 15)))


def test_gradient_checkpointing_gives_the_same_training() -> None:
    results = []
    for checkpointing in (False, True):
        model = model_of("malora")
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        results.append(train(model, data(), steps=4, lr=1e-2, lambda_mmd=1.0, special_token_ids=SPECIAL_IDS))
    for plain, checkpointed in zip(*results, strict=True):
        assert checkpointed["ce"] == pytest.approx(plain["ce"], rel=1e-4)
        assert checkpointed["mmd2"] == pytest.approx(plain["mmd2"], rel=1e-3, abs=1e-5)
        assert checkpointed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


def test_reentrant_checkpointing_with_a_term_is_refused() -> None:
    model = model_of("malora")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(InputError, match="use_reentrant=False"):
        train(model, data(), steps=1)


def test_bfloat16_base() -> None:
    base = tiny_llava().to(torch.bfloat16)
    log = train(get_peft_model(base, MaloraConfig(r=4)), data(), steps=3, lambda_mmd=1.0, special_token_ids=SPECIAL_IDS)
    assert all(math.isfinite(entry["mmd2"]) and math.isfinite(entry["ce"]) for entry in log)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"lambda_mmd": -1.0}, "lambda_mmd"),
        ({"lambda_gram": math.nan}, "lambda_gram"),
        ({"warmup_fraction": 1.5}, "warmup_fraction"),
        ({"anchor": "visual"}, "anchor"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"calibration_batches": 0}, "calibration_batches"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], argument: str) -> None:
    with pytest.raises(InputError) as caught:
        train(model_of("malora"), data(), **{"steps": 1} | settings)
    assert caught.value.argument == argument


def test_data_that_cannot_train() -> None:
    text_only = [batch(prompt(10, 11), labels=True)]
    with pytest.raises(InputError, match="no batch has both"):
        train(model_of("malora"), text_only, steps=1)
    with pytest.raises(InputError, match="2 visual and 2 text"):
        train(model_of("malora"), text_only, steps=1, lambda_mmd=0)
    assert train(model_of("malora"), text_only, steps=1, lambda_mmd=0, lambda_gram=0)[0]["gate_text"] == {}
    with pytest.raises(InputError, match="more batches"):
        train(model_of("malora"), iter(data(2)), steps=5)
    with pytest.raises(InputError, match="labels"):
        train(model_of("malora"), [batch(prompt("image", 10))], steps=1)


def test_a_model_without_an_adapted_key_or_without_anything_to_train() -> None:
    queries = get_peft_model(tiny_llava(), LoraConfig(target_modules=r".*language_model\..*\.q_proj"))
    with pytest.raises(InputError, match="key projection"):
        train(queries, data(), steps=1)
    frozen = model_of("malora")
    frozen.requires_grad_(False)
    with pytest.raises(InputError, match="is_trainable=True"):
        train(frozen, data(), steps=1)


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = model_of("malora")
    before = state(model)
    poisoned = data()
    poisoned[0]["pixel_values"][0] = math.nan
    with pytest.raises(FloatingPointError, match="step 0"):
        train(model, poisoned, steps=2, lambda_mmd=0)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
