"""Two runs of one command on one machine leave the same bytes."""

from __future__ import annotations

import pytest
from evaluation import evaluate

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
