"""`lmms-keyspace train` on the bundled model: short runs, as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from lmms_keyspace import cli, embedded, scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.training import run
from lmms_keyspace.training.checkpoints import last_whole, saving
from lmms_keyspace.training.config import TrainingConfig, read_config
from lmms_keyspace.training.trainer import LAST_GOOD, AlignmentTrainer

SHORT = (
    "data.scenes={n: 24, hint: 0.5, misleading: 0.5}",
    "evaluation.every=0",
    "loss={lambda_mmd: 2, lambda_gram: 1, calibration_examples: 8}",
    "trainer={per_device_train_batch_size: 8, max_steps: 4, logging_steps: 1, save_strategy: no, disable_tqdm: true,"
    " lr_scheduler_type: constant, warmup_steps: 0}",
)


def short(folder: Path, *flags: str) -> TrainingConfig:
    return read_config(None, [f"output_dir={folder}", *SHORT, *flags])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def steps(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in json.loads((folder / run.RECORD).read_text())["log"] if "ce" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that saves a checkpoint on the way."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ("trainer.save_strategy=steps", "trainer.save_steps=2", "evaluation={every: 4, items: 1}")
    return run.train(short(folder, *flags))


def test_what_a_run_leaves(whole: Path) -> None:
    record = json.loads((whole / run.RECORD).read_text())
    assert record["config"]["loss"]["lambda_mmd"] == 2
    log = steps(whole)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert {"mmd2", "mmd2_layer_0", "gram", "gate_visual", "gate_text", "key_norm_ratio_visual"} <= log[0].keys()
    assert log[0]["gram"] == 0
    assert log[-1]["gram"] > 0
    evaluated = [entry for entry in record["log"] if "eval_flip_rate" in entry]
    assert [entry["step"] for entry in evaluated] == [4]
    assert 0 <= evaluated[0]["eval_clean_accuracy"] <= 1
    assert not list(whole.rglob("training_args.bin"))
    assert not (whole / "README.md").exists()
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(embedded.base_path()), str(whole))
    assert model.peft_config["default"].base_model_name_or_path == embedded.BASE_NAME


def test_interrupted_and_resumed_gives_the_same_adapter(whole: Path, tmp_path: Path) -> None:
    """The checkpoint of step 2 is what a run that was killed after it leaves."""
    (tmp_path / "checkpoint-2").symlink_to(whole / "checkpoint-2")
    flags = ("trainer.save_strategy=steps", "trainer.save_steps=100", "evaluation={every: 4, items: 1}")
    run.train(short(tmp_path, *flags), resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(tmp_path)[name], value), name
    assert [entry["mmd2"] for entry in steps(tmp_path)[2:]] == [entry["mmd2"] for entry in steps(whole)[2:]]


@pytest.mark.parametrize(
    ("name", "length"), [("optimizer.pt", None), ("trainer_state.json", None), ("trainer_state.json", 99)]
)
def test_a_checkpoint_that_was_not_saved_to_its_end_is_passed_over(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, length: int | None
) -> None:
    """transformers would go on from it, with an optimizer that knows nothing."""
    (tmp_path / "checkpoint-2").symlink_to(whole / "checkpoint-2")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / name).unlink(missing_ok=True)
    if length is not None:
        (tmp_path / "checkpoint-4" / name).write_bytes((whole / "checkpoint-4" / name).read_bytes()[:length])
    assert last_whole(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4 is passed over" in caplog.text


def test_a_run_that_was_stopped_after_its_last_step_takes_no_other(whole: Path, tmp_path: Path) -> None:
    """transformers takes one more step: what was killed between its last checkpoint and its end would differ."""
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    run.train(short(tmp_path, "trainer.save_strategy=steps", "trainer.save_steps=2"), resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(weights(tmp_path)[name], value), name
    assert len(steps(tmp_path)) == 4


def in_two_processes(*arguments: str) -> None:
    """`lmms-keyspace train` as torchrun starts it, on gloo; without torchrun, whose own start costs as much again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "lmms_keyspace.training", *arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]


def test_two_processes_are_one_with_twice_the_batch(whole: Path, tmp_path: Path) -> None:
    halves = ("trainer.per_device_train_batch_size=4", "trainer.max_steps=2")
    flags = [f"--set={flag}" for flag in (*SHORT, *halves)]
    in_two_processes(f"--output-dir={tmp_path / 'two'}", *flags)
    assert json.loads((tmp_path / "two" / run.RECORD).read_text())["processes"] == 2
    for one, two in zip(steps(whole), steps(tmp_path / "two"), strict=False):
        for name in ("ce", "mmd2", "gram", "loss", "key_norm_ratio_visual", "gate_visual"):
            assert two[name] == pytest.approx(one[name], abs=1e-5), (one["step"], name)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    for name, value in weights(whole / "checkpoint-2").items():
        assert torch.allclose(weights(tmp_path / "two")[name], value, atol=2e-4), name


def test_accumulated_batches_weigh_their_tokens(whole: Path, tmp_path: Path) -> None:
    """The cross-entropy is that of the whole batch; the terms are means over its halves."""
    halves = ("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2")
    run.train(short(tmp_path, "trainer.max_steps=1", *halves))
    (entry,) = steps(tmp_path)
    assert entry["ce"] == pytest.approx(steps(whole)[0]["ce"], abs=1e-5)
    assert entry["lambda_mmd"] == pytest.approx(2)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = AlignmentTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 2:
            inputs = inputs | {"pixel_values": inputs["pixel_values"] * torch.nan}
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AlignmentTrainer, "compute_loss", poisoned)
    with pytest.raises(InputError, match=rf"loss='not finite at step 3'.*{LAST_GOOD}"):
        run.train(short(tmp_path))
    kept = weights(tmp_path / LAST_GOOD)
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert any(value.any() for name, value in kept.items() if "malora_B" in name)  # two steps were taken


def rows(folder: Path, *images: str | None) -> str:
    scenes.blank().save(folder / "a.png")
    lines = [{"question": "What color is the object?", "answer": "red", "image": image} for image in images]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"data={{path: {folder / 'rows.jsonl'}}}"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights may be read."""

    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(run.AutoModelForImageTextToText, "from_pretrained", loaded)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("flags", "argument"),
    [
        (["adapter.malora.r=0"], "r"),
        (["adapter.lora={r: 0}"], "adapter.lora.r"),
        (["adapter.malora={target_modules: nothing}"], "target_modules"),
        (["adapter.malora={target_modules: '.*vision_tower.*k_proj'}"], "target_modules"),
        (["adapter.lora={target_modules: '.*k_proj'}"], "target_modules"),
        (["adapter.lora={target_modules: nothing}"], "target_modules"),
        (["data={path: ROWS}"], "rows.jsonl line 2"),
        (["data={path: ROWS, bad_images: skip}", "trainer.per_device_train_batch_size=1"], "data"),
        (["pretrained=/nowhere"], "pretrained"),
    ],
)
def test_bad_input_is_found_before_the_model_loads(tmp_path: Path, flags: list[str], argument: str) -> None:
    rows(tmp_path, "a.png", "absent.png", None)
    flags = [flag.replace("ROWS", str(tmp_path / "rows.jsonl")) for flag in flags]
    with pytest.raises(InputError) as caught:
        run.train(short(tmp_path / "out", *flags))
    assert caught.value.argument == argument


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("images", "batch", "message"),
    [
        ((None, None), 1, "no visual token"),
        (("a.png",), 2, "give more data"),
        (("a.png", "a.png", None, None), 2, "a batch of 2 could hold text alone"),
        (("a.png", "a.png", None), 2, "a batch of 1 could hold text alone"),  # the last one, which is not dropped here
    ],
)
def test_data_without_enough_images(tmp_path: Path, images: tuple[str | None, ...], batch: int, message: str) -> None:
    batches = f"trainer={{per_device_train_batch_size: {batch}, dataloader_drop_last: false}}"
    with pytest.raises(InputError, match=message):
        run.train(short(tmp_path / "out", rows(tmp_path, *images), batches))


def test_no_room_is_one_sentence(tmp_path: Path) -> None:
    for write in (lambda: torch.save([1], "/dev/full"), lambda: Path("/dev/full").write_text("x")):
        with (
            pytest.raises(InputError, match=rf"output_dir='{tmp_path}': it cannot be written .* --resume"),
            saving(tmp_path),
        ):
            write()


def test_results_already_made_are_not_lost(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="finished run"):
        run.train(short(whole))
    with pytest.raises(InputError, match="no checkpoint"):
        run.train(short(tmp_path), resume=True)
    (tmp_path / "checkpoint-2").symlink_to(whole / "checkpoint-2")
    with pytest.raises(InputError, match="--resume"):
        run.train(short(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output_dir=.*this is a file"):
        run.train(short(tmp_path / "file"))


def test_the_command_line_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lmms-keyspace", "train", "--output-dir", str(tmp_path), "--set", "seed=one"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith("lmms-keyspace: seed='one'")
