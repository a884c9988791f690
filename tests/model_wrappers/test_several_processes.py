"""Two processes on the CPU (gloo), as `accelerate launch` starts them: the same run as one process makes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation import answers, evaluate, run_of
from two_processes import ALONE, ARGUMENTS, MODEL, TASK, UNEVEN

from lmms_keyspace import harness
from lmms_keyspace.store import find_runs, load_run

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes filled, and what they said. They end in an error on purpose."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "alone.yaml").write_text(ALONE.format(folder=harness.tasks_folder()))
    launcher = Path(sys.executable).with_name("accelerate")
    command = f"{launcher} launch --multi_gpu --num_processes 2 --main_process_port 0 {TESTS}/two_processes.py {folder}"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command.split(), cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    return folder, done


def loaded(folder: Path):
    (files,) = find_runs(folder)
    return load_run(files)


def answers_of(samples: pd.DataFrame) -> list[str]:
    return samples.sort_values("doc_id")["filtered_resps"].tolist()


@pytest.mark.parametrize("batch_size", [1, 16])
def test_two_processes_make_the_run_of_one(two, tmp_path, batch_size):
    several = loaded(two[0] / "uneven")
    given = {"limit": UNEVEN, "batch_size": batch_size, "model_args": f"{ARGUMENTS},keys_dir={tmp_path}"}
    results = evaluate(MODEL, **given)
    one, run = run_of(tmp_path), several.data
    assert run.record.complete
    assert (run.record.processes, one.record.processes) == (2, 1)
    assert run.record.tasks == one.record.tasks
    assert answers_of(several.samples[TASK]) == [answer.strip() for answer in answers(results)]
    exact = [name for name in one.tokens if name != "key_norm"]
    assert len(one.tokens) > 100
    assert run.tokens[exact].equals(one.tokens[exact])
    np.testing.assert_allclose(run.tokens["key_norm"], one.tokens["key_norm"], rtol=1e-4)
    assert sorted(run.keys[TASK]) == sorted(one.keys[TASK]) == [f"k_pre/{layer}" for layer in (0, 3)]
    for name, keys in one.keys[TASK].items():
        assert np.abs(run.keys[TASK][name] - keys).max() < 1e-4
    same = ["task", "condition", "layer", "head", "space", "contrast", "estimator", "n_visual", "n_text", "n_clusters"]
    assert run.divergence[same].equals(one.divergence[same])
    assert one.divergence["value"].notna().sum() > 50
    np.testing.assert_allclose(run.divergence["value"], one.divergence["value"], rtol=0, atol=1e-4)
    masses = [name for name in one.attention if name.startswith("mass_")]
    np.testing.assert_allclose(run.attention[masses], one.attention[masses], atol=1e-5)


def test_a_process_without_a_document(two):
    run = loaded(two[0] / "nothing").data
    assert run.record.complete
    assert run.record.tasks[TASK].documents == run.record.tasks[TASK].rows_captured == 1
    assert set(run.tokens["doc_id"]) == {0}


def test_a_process_whose_documents_are_unselected_and_cached(two):
    filled, half = (loaded(two[0] / name).data for name in ("filled", "half_cached"))
    assert half.record.complete
    assert half.record.tasks == filled.record.tasks
    assert half.record.tasks["alone"].rows_captured == 4
    assert half.tokens["prefix_hash"].equals(filled.tokens["prefix_hash"])
    assert set(filled.attention["doc_id"]) == set(range(10))
    assert set(half.attention["doc_id"]) == {0, 2, 4, 6, 8}


def test_a_process_that_dies_ends_the_other_and_both_leave_what_they_captured(two):
    folder, done = two
    assert done.returncode != 0
    named = re.search(
        rf"RuntimeError: {TASK}, document ([\d, ]+): ValueError: the model broke", done.stdout + done.stderr
    )
    assert [int(number) % 2 for number in named[1].split(", ")] == [1, 1, 1, 1]
    records = sorted((folder / "died").glob("*_keyspace.json"))
    assert [path.name.split("_", 2)[2] for path in records] == ["keyspace.json", "rank1_keyspace.json"]
    for path in records:
        record = json.loads(path.read_text())
        assert record["complete"] is False
        tokens = pd.read_parquet(path.with_name(path.name.replace("keyspace.json", "tokens.parquet")))
        assert tokens["doc_id"].nunique() == record["tasks"][TASK]["rows_captured"] > 0
    assert list((folder / "died").glob("*_results.json")) == []
