"""The trainer on a tiny random model: the terms, the controls, and what it does not touch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapter_models import EOS, IMAGE, PAD, SPECIAL_IDS, batch, prompt, tiny_llava
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PrinterCallback

from lmms_keyspace import divergence
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import MaloraConfig, matched_lora_config
from lmms_keyspace.malora.taps import key_taps, tapped
from lmms_keyspace.training.config import EvaluationSettings, LossConfig, TrainingConfig, training_arguments
from lmms_keyspace.training.encoding import Collator
from lmms_keyspace.training.trainer import LAST_GOOD, AlignmentTrainer

PROCESSOR = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=PAD, all_special_ids=list(SPECIAL_IDS)))


def examples(n: int = 18) -> list[dict[str, Tensor]]:
    """Rows with unequal prompts and answers that end in EOS."""
    generator = torch.Generator().manual_seed(0)

    def words(k: int) -> list[int]:
        return torch.randint(10, 60, (k,), generator=generator).tolist()

    rows = []
    for i in range(n):
        row = batch(prompt(*words(i % 3), "image", *words(3), EOS), seed=i, labels=True)
        one = {name: value if name == "pixel_values" else value[0] for name, value in row.items()}
        del one["attention_mask"]
        rows.append(one | {"example_id": torch.tensor(i)})
    return rows


def model_of(kind: str, seed: int = 0) -> PeftModel:
    """A model whose image features share an offset, so that its visual and text keys lie apart as in a real one."""
    base = tiny_llava(seed)
    base.model.multi_modal_projector.linear_2.bias.data += 1
    config = MaloraConfig(r=4)
    torch.manual_seed(seed)
    return get_peft_model(base, config if kind == "malora" else matched_lora_config(config, base.config, tolerance=0.1))


@pytest.fixture
def train(tmp_path: Path) -> Iterator[object]:
    def run(model: PeftModel, *, steps: int, seed: int = 0, rows=None, **settings) -> list[dict[str, float]]:
        trainer_settings = {name: settings.pop(name) for name in list(settings) if name not in LossConfig.model_fields}
        config = TrainingConfig(
            output_dir=tmp_path,
            seed=seed,
            evaluation=EvaluationSettings(every=0),
            trainer={
                "max_steps": steps,
                "per_device_train_batch_size": 6,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
            }
            | trainer_settings,
        )
        arguments, loss = training_arguments(config), LossConfig(calibration_examples=18, **settings)
        trainer = AlignmentTrainer(
            model, arguments, loss=loss, processor=PROCESSOR, examples=examples() if rows is None else rows
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "ce" in entry]

    return run


def state(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def mean(log: list[dict[str, float]], name: str) -> float:
    return sum(entry[name] for entry in log) / len(log)


@pytest.mark.parametrize("kind", ["malora", "lora"])
def test_all_terms_fall_and_only_the_adapter_moves(train, kind: str) -> None:
    model = model_of(kind)
    before = state(model)
    log = train(model, steps=40, lambda_mmd=2.0)
    assert log[0]["gram"] == 0.0  # keys are the base's before the first step
    assert mean(log[-3:], "ce") < mean(log[:3], "ce")
    assert mean(log[-3:], "mmd2") < 0.5 * mean(log[:3], "mmd2")
    assert ("gate_visual" in log[0]) == (kind == "malora")
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("k_proj" in name for name in moved)


def test_without_the_mmd_term_the_divergence_stays(train) -> None:
    """The two arms differ in lambda_mmd alone; the divergence is measured the same way in both, with other code."""

    def key_divergence(model: PeftModel) -> float:
        inputs = Collator(PAD)(examples())
        del inputs["example_id"]
        taps, values = key_taps(model), []
        with torch.no_grad(), tapped(taps):
            model.eval()(**inputs)
        for tap in taps:
            visual, text, base_visual, base_text = (
                keys[where].transpose(0, 1)
                for keys in (tap.keys, tap.base)
                for where in (inputs["input_ids"] == IMAGE, inputs["input_ids"] > IMAGE)
            )
            width2 = divergence.median_bandwidth2(base_visual, base_text)
            values.append(divergence.mmd2(visual, text, bandwidth2=width2).mean())
        return sum(values) / len(values)

    def trained(lambda_mmd: float) -> PeftModel:
        model = model_of("malora")
        train(model, steps=30, lambda_mmd=lambda_mmd)
        return model

    base = key_divergence(model_of("malora"))
    assert key_divergence(trained(2.0)) < 0.5 * base
    assert key_divergence(trained(0.0)) > 0.8 * base


def test_a_run_is_repeatable(train) -> None:
    runs = []
    for seed in (3, 3, 4):
        model = model_of("malora")
        log = train(model, steps=4, max_tokens=8, seed=seed)
        runs.append(([entry["mmd2"] for entry in log], state(model)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_the_weight_of_the_mmd_term_rises(train) -> None:
    log = train(model_of("malora"), steps=8, lambda_mmd=0.4, warmup=0.5)
    assert [entry["lambda_mmd"] for entry in log] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_keys_after_rope(train) -> None:
    """Before the first step only the space differs, and positions move keys apart."""
    before, after = (train(model_of("malora"), steps=1, space=space)[0]["mmd2"] for space in ("k_pre", "k_post"))
    assert before != after


def test_gradient_checkpointing_gives_the_same_training(train) -> None:
    plain, checkpointed = (
        train(
            model_of("malora"),
            steps=3,
            lambda_mmd=1.0,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        for checkpointing in (False, True)
    )
    for one, other in zip(plain, checkpointed, strict=True):
        assert other["ce"] == pytest.approx(one["ce"], rel=1e-4)
        assert other["mmd2"] == pytest.approx(one["mmd2"], rel=1e-3, abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_reentrant_checkpointing_with_a_term_is_refused(train) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(InputError, match="use_reentrant=False"):
        train(model_of("malora"), steps=1, **reentrant)


def test_bfloat16_base(train) -> None:
    model = get_peft_model(tiny_llava().to(torch.bfloat16), MaloraConfig(r=4))
    assert all(math.isfinite(entry[name]) for entry in train(model, steps=2) for name in ("ce", "mmd2", "gram"))


def test_a_model_without_an_adapted_key(train) -> None:
    queries = get_peft_model(tiny_llava(), LoraConfig(target_modules=r".*language_model\..*\.q_proj"))
    with pytest.raises(InputError, match="key projection"):
        train(queries, steps=1)


def text_alone(row: dict[str, Tensor]) -> dict[str, Tensor]:
    words = row["input_ids"] != IMAGE
    return {name: row[name][words] if name != "example_id" else row[name] for name in row if name != "pixel_values"}


def test_a_batch_of_text_alone(train) -> None:
    rows = [row if i < 6 else text_alone(row) for i, row in enumerate(examples())]
    with pytest.raises(InputError, match="visual and text"):
        train(model_of("malora"), steps=3, rows=rows, per_device_train_batch_size=1)


def test_a_batch_of_text_alone_trains_where_no_term_acts(train) -> None:
    """The bandwidths are those of the rows with an image, and the logged terms means over the batches that have one."""
    rows = [row if i % 3 == 0 else text_alone(row) for i, row in enumerate(examples())]
    settings = {"lambda_mmd": 0.0, "lambda_gram": 0.0, "per_device_train_batch_size": 1, "seed": 1}
    log = train(model_of("malora"), steps=9, rows=rows, **settings)
    measured = [entry["mmd2"] for entry in log if "mmd2" in entry]
    assert 0 < len(measured) < 9
    assert all(math.isfinite(entry["ce"]) for entry in log)
    (together,) = train(model_of("malora"), steps=9, rows=rows, logging_steps=9, **settings)
    assert together["mmd2"] == pytest.approx(sum(measured) / len(measured), rel=1e-5)
    assert together["ce"] == pytest.approx(mean(log, "ce"), rel=1e-5)
    assert 0 < together["gate_visual"] < 1


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(train, tmp_path: Path) -> None:
    model = model_of("malora")
    weights = next(p for p in model.parameters() if p.requires_grad)
    weights.register_hook(lambda gradient: gradient * math.inf)
    before = state(model)
    with pytest.raises(InputError, match=r"gradient='not finite at step 1'"):
        train(model, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert (tmp_path / LAST_GOOD / "adapter_model.safetensors").is_file()
