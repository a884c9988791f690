"""Two runs of one command on one machine leave the same bytes; on another processor, the same rows and 1e-4."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation import evaluate
from safetensors.numpy import load

# Code paths of a processor without AVX, which add up in another order.
OLD_INSTRUCTIONS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX",
}
RUN = """
import sys, torch
from evaluation import evaluate
evaluate("malora_llava", limit=30, batch_size=8, model_args=sys.argv[1])
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
"""

ARGUMENTS = "spaces=k_pre+k_post,option_logprobs=on,capture_tokens=8,keys_dir={}"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The files of two runs of an adapted model, by name."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        evaluate("malora_llava", limit=30, batch_size=8, model_args=ARGUMENTS.format(folder))
    return [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]


def test_every_file_is_equal_byte_by_byte(two):
    first, second = two
    assert {name.rpartition(".")[2] for name in first} == {"parquet", "safetensors", "json"}
    assert sum(name.endswith(".parquet") for name in first) == 4
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this processor has no newer code path"
)
def test_rows_are_equal_and_numbers_agree_on_a_processor_without_newer_instructions(two, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", RUN, ARGUMENTS.format(tmp_path)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | OLD_INSTRUCTIONS | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    other = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    first = two[0]
    assert other.keys() == first.keys()
    unequal = [name for name in first if name.endswith((".parquet", ".safetensors")) and first[name] != other[name]]
    assert unequal  # the other code paths were taken
    for name in unequal:
        if name.endswith(".safetensors"):
            here, there = load(first[name]), load(other[name])
            assert here.keys() == there.keys()
        else:
            here, there = (pd.read_parquet(io.BytesIO(files[name])) for files in (first, other))
            exact = [column for column in here if not pd.api.types.is_float_dtype(here[column])]
            pd.testing.assert_frame_equal(here[exact], there[exact])
            here, there = here.drop(columns=exact), there.drop(columns=exact)
        for column in here:
            np.testing.assert_allclose(here[column], there[column], rtol=1e-4, atol=1e-4, err_msg=f"{name}, {column}")
