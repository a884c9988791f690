"""Every arm of a study, trained from a configuration as `lmms-keyspace train` does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from lmms_keyspace import embedded
from lmms_keyspace.malora import PRESETS, check_adapter
from lmms_keyspace.training import run
from lmms_keyspace.training.config import read_config

FLAGS = (
    "data.scenes={n: 8}",
    "evaluation.every=0",
    "loss={lambda_mmd: 2, lambda_gram: 1, calibration_examples: 4, warmup: 0}",
    "trainer={per_device_train_batch_size: 4, max_steps: 2, logging_steps: 1, save_strategy: no, disable_tqdm: true,"
    " lr_scheduler_type: constant, warmup_steps: 0}",
)


@pytest.mark.parametrize("name", PRESETS)
def test_an_arm_trains_and_its_adapter_is_one_that_the_wrappers_take(name: str, tmp_path: Path) -> None:
    arm = PRESETS[name]
    folder = run.train(read_config(None, [f"output_dir={tmp_path}", f"adapter.preset={name}", *FLAGS]))
    info = check_adapter(folder, AutoConfig.from_pretrained(embedded.base_path()))
    assert info.method == ("LORA" if name.startswith("lora") else "MALORA")
    ups = [value for key, value in load_file(folder / "adapter_model.safetensors").items() if "_B" in key]
    assert ups
    assert all(value.any() for value in ups)  # they start at zero
    log = [entry for entry in json.loads((folder / run.RECORD).read_text())["log"] if "ce" in entry]
    for entry, gram_acts in zip(log, (False, True), strict=True):  # keys are the base's before the first step
        weighted = 2 * arm.mmd * entry["mmd2"] + arm.gram * gram_acts * entry["gram"]
        assert entry["loss"] == pytest.approx(entry["ce"] + weighted, abs=1e-3)
