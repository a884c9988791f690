"""The configuration: YAML, flags, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoConfig

from lmms_keyspace import embedded
from lmms_keyspace.errors import InputError
from lmms_keyspace.training.config import effective_loss, peft_config, read_config, training_arguments

OUT = "output_dir=somewhere"


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: here\nloss: {lambda_mmd: 2}\ntrainer: {learning_rate: 1e-4, save_strategy: no}\n")
    config = read_config(file, ["loss.anchor=symmetric", "trainer.max_steps=7", "data.scenes.misleading=0.5"])
    assert (config.loss.lambda_mmd, config.loss.anchor) == (2, "symmetric")
    assert config.data.scenes is not None
    assert config.data.scenes.misleading == 0.5
    arguments = training_arguments(config)
    assert (arguments.max_steps, arguments.learning_rate) == (7, 1e-4)
    assert arguments.save_strategy == "no"
    assert arguments.output_dir == "here"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("loss.lambda_mmd=-1", "loss.lambda_mmd"),
        ("loss.lambda_gram=.nan", "loss.lambda_gram"),
        ("loss.anchor=visual", "loss.anchor"),
        ("loss.max_tokens=1", "loss.max_tokens"),
        ("loss.warmup=1.5", "loss.warmup"),
        ("loss.lambda_mdm=1", "loss.lambda_mdm"),
        ("data.path=rows.json", "data"),  # beside the scenes
        ("data.scenes.hint=0.95", "data.scenes"),  # with a tenth of irrelevant sentences
        ("evaluation.items=0", "evaluation.items"),
        ("seed.x=1", "--set"),
        ("nonsense", "--set"),
    ],
)
def test_settings_out_of_range(setting: str, named: str) -> None:
    flags = [OUT, "seed=1", "data.scenes.n=10", setting]
    with pytest.raises(InputError) as caught:
        read_config(None, flags)
    assert caught.value.argument == named


def test_without_an_output_folder() -> None:
    with pytest.raises(InputError, match="output_dir"):
        read_config(None)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", None])
def test_files_that_are_no_settings(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match="CONFIG"):
        read_config(file)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("trainer.learning_rat=1", "trainer.learning_rat"),
        ("trainer.output_dir=x", "trainer.output_dir"),
        ("trainer.lr_scheduler_type=spiral", "trainer"),
        ("trainer={fsdp: true, fsdp_config: absent.json}", "trainer"),
        ("trainer.report_to=pigeon", "trainer"),
    ],
)
def test_arguments_of_transformers(setting: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        training_arguments(read_config(None, [OUT, setting]))
    assert caught.value.argument == named


def test_arguments_of_accelerate_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it, and it would stay
    fsdp = "{version: 2, transformer_layer_cls_to_wrap: [LlamaDecoderLayer], cpu_ram_efficient_loading: true}"
    arguments = training_arguments(read_config(None, [OUT, f"trainer={{fsdp: true, fsdp_config: {fsdp}, bf16: true}}"]))
    assert arguments.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"
    assert arguments.bf16


@pytest.mark.parametrize(
    ("package", "setting"),
    [("tensorboard", "trainer.report_to=[tensorboard]"), ("deepspeed", "trainer.deepspeed={train_batch_size: auto}")],
)
def test_a_package_that_is_missing_is_named(package: str, setting: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(InputError, match=package):
        training_arguments(read_config(None, [OUT, setting]))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("adapter.malora.r=0", "r"),
        ("adapter.malora.rank=8", "adapter.malora.rank"),
        ("adapter.lora={r: 0}", "adapter.lora.r"),
        ("adapter.lora={target_modules: '.*', layers_to_transform: [0]}", "adapter.lora"),
        ("adapter.preset=marola", "preset"),
    ],
)
def test_adapters_that_cannot_be(setting: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        peft_config(read_config(None, [OUT, setting]).adapter, AutoConfig.from_pretrained(embedded.base_path()))
    assert caught.value.argument == named


def test_a_preset_without_a_term_sets_its_weight_to_zero() -> None:
    def weights(*flags: str) -> tuple[float, float]:
        loss = effective_loss(read_config(None, [OUT, "loss.lambda_mmd=2", "loss.lambda_gram=1", *flags]))
        return loss.lambda_mmd, loss.lambda_gram

    assert weights() == (2, 1)
    assert weights("adapter.preset=malora_no_mmd") == (0, 1)
    assert weights("adapter.preset=lora_k") == (0, 0)
    assert weights("adapter.lora={r: 4}") == (2, 1)
