"""The real command lines in processes of their own; lmms-eval exits 0 on failure, so the files are what counts."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_files import ROWS, write_mmbench_cn, write_mmmu
from evaluation import TIMES

from lmms_keyspace import embedded
from lmms_keyspace.store import find_runs, load_run

BIN = Path(sys.executable).parent
# design.md's table of files, less the options table that needs option log-probabilities.
SUFFIXES = (
    "keyspace.json",
    "gram.safetensors",
    "losses.safetensors",
    "divergence.parquet",
    "attention.parquet",
    "tokens.parquet",
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Standard output and error of a command that must exit 0."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def lmms_eval(arguments: str, cwd: Path) -> str:
    return run(str(BIN / "lmms-eval"), *shlex.split(arguments), cwd=cwd)


def files_of(folder: Path) -> dict[str, Path]:
    """Files of the one run in `folder`, by name without the date; all of one date."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    dates = {"_".join(path.name.split("_")[:2]) for path in paths}
    assert len(dates) == 1, sorted(paths)
    return {path.name.split("_", 2)[2]: path for path in paths}


@pytest.fixture(scope="module")
def malora_run(tmp_path_factory):
    work = tmp_path_factory.mktemp("malora")
    lmms_eval("--model malora_llava --tasks textbias_probe --limit 48 --output_path OUT --log_samples", cwd=work)
    return work / "OUT"


@pytest.fixture(scope="module")
def card_run(tmp_path_factory):
    """The design card's own command, exactly as written, beside a local folder of MMMU-shaped files."""
    work = tmp_path_factory.mktemp("card")
    write_mmmu(work)
    printed = lmms_eval("--model malora_llava --tasks mmmu,textbias_probe", cwd=work)
    return work, printed


def test_no_arguments_any_folder_offline_writes_every_file(malora_run):
    files = files_of(malora_run)
    assert set(files) == {
        "results.json",
        "samples_textbias_probe.jsonl",
        "keys_textbias_probe.safetensors",
        *SUFFIXES,
    }
    record = json.loads(files["keyspace.json"].read_text())
    assert record["complete"] is True
    assert record["adapter"] == "bundled/malora"
    results = json.loads(files["results.json"].read_text())
    assert results["keyspace"]["divergence"]["textbias_probe"]["clean"]
    assert len(files["samples_textbias_probe.jsonl"].read_text().splitlines()) == 48


def test_the_run_reads_back(malora_run):
    (found,) = find_runs(malora_run)
    loaded = load_run(found)
    assert loaded.data.record.date == found.date
    assert set(loaded.samples) == {"textbias_probe"}
    assert not loaded.data.divergence.empty


def test_the_design_cards_command_leaves_every_file_in_the_default_folder(card_run):
    work, printed = card_run
    (folder,) = (work / "lmms_keyspace_runs").iterdir()
    files = files_of(folder)
    tasks = ("mmmu_val", "textbias_probe")
    assert set(files) >= {"results.json", *SUFFIXES}
    assert set(files) >= {f"samples_{task}.jsonl" for task in tasks} | {f"keys_{task}.safetensors" for task in tasks}
    assert "lmms_keyspace_runs" in printed.split("Loading weights")[0]


def test_the_design_cards_command_marks_mmmu_not_interpretable(card_run):
    work, _ = card_run
    (found,) = find_runs(work / "lmms_keyspace_runs")
    loaded = load_run(found)
    record = loaded.data.record
    assert record.complete
    assert not record.tasks["mmmu_val"].interpretable
    assert record.tasks["mmmu_val"].documents == ROWS
    assert record.tasks["textbias_probe"].interpretable
    assert record.tasks["textbias_probe"].documents == 1800
    assert "mmmu_val" in loaded.results["keyspace"]["not_interpretable"]


def test_benchmarks_run_on_a_local_copy_stock_and_wrapped(tmp_path):
    """With awkward rows: several images, a missing one, open questions, Chinese, RGBA, palette and 1 x 1 images."""
    write_mmmu(tmp_path, awkward=True)  # where the stock task finds it, and ours by the variable
    write_mmbench_cn(tmp_path)
    wrapped = ("mmmu_val_keyspace_mismatch", "mmbench_cn_dev_keyspace_hint_wrong", "mmbench_cn_dev_static")
    printed = run(
        str(BIN / "lmms-eval"),
        *shlex.split(f"--model malora_llava --tasks mmmu,{','.join(wrapped)} --output_path OUT --log_samples"),
        cwd=tmp_path,
        LMMS_KEYSPACE_DATA=str(tmp_path),
    )
    assert "9 of 13 rows are asked" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"OUT", "lmms-lab-encoder"}
    (found,) = find_runs(tmp_path / "OUT")
    loaded = load_run(found)
    rows = {"mmmu_val": 13, "mmmu_test": 13} | dict(zip(wrapped, (9, 5, 7), strict=True))
    assert {task: len(samples) for task, samples in loaded.samples.items()} == rows
    assert set(loaded.samples[wrapped[1]]["condition"]) == {"conflict"}
    assert "mmmu_val: 1 documents name an image that they do not hold" in printed
    assert loaded.results["keyspace"]["images_absent"] == {"mmmu_test": [12], "mmmu_val": [12]}
    assert loaded.results["keyspace"]["not_interpretable"] == sorted(rows)  # the bundled model reads no benchmark


WITHOUT_PLUGIN = """
import importlib.metadata as metadata, sys
everything = metadata.entry_points
def others(points):
    return metadata.EntryPoints(point for point in points if not point.value.startswith("lmms_keyspace"))
def entry_points(**given):
    found = everything(**given)
    # Before Python 3.12 a call without a group gives a mapping from group to entry points.
    return type(found)((name, others(found[name])) for name in found) if isinstance(found, dict) else others(found)
metadata.entry_points = entry_points
sys.argv[0] = "lmms-eval"
from lmms_eval.cli.dispatch import main
main()
assert not any(name.startswith("lmms_keyspace") for name in sys.modules)
"""


def test_a_stock_model_writes_the_same_files_with_and_without_the_plugin(tmp_path):
    model_args = f"pretrained={embedded.base_path()},device=cpu,device_map=cpu,dtype=float32"
    arguments = ["--model", "llava_hf", "--model_args", model_args, "--tasks", "mmmu_val"]
    arguments += ["--output_path", "out", "--log_samples", "--batch_size", "1"]
    seen = {}
    for name, command in {"with": [str(BIN / "lmms-eval")], "without": [sys.executable, "-c", WITHOUT_PLUGIN]}.items():
        work = tmp_path / name
        work.mkdir()
        write_mmmu(work)
        run(*command, *arguments, cwd=work)
        seen[name] = files_of(work / "out")
    assert set(seen["with"]) == set(seen["without"]) == {"results.json", "samples_mmmu_val.jsonl"}
    assert seen["with"]["samples_mmmu_val.jsonl"].read_text() == seen["without"]["samples_mmmu_val.jsonl"].read_text()
    # The harness writes functions of the task's config with their addresses.
    texts = {name: re.sub(r"0x[0-9a-f]+", "0x", files["results.json"].read_text()) for name, files in seen.items()}
    results = {name: json.loads(text) for name, text in texts.items()}
    for result in results.values():
        for key in TIMES:
            result.pop(key, None)
    assert results["with"] == results["without"]


def test_compare_and_report_from_the_command_line(malora_run, tmp_path):
    keyspace = str(BIN / "lmms-keyspace")
    lmms_eval(
        "--model keyspace_llava --tasks textbias_probe --limit 48 --output_path BASE --log_samples",
        cwd=tmp_path,
    )
    table = run(keyspace, "compare", "BASE", str(malora_run), cwd=tmp_path)
    assert "text_flip_rate" in table or "flip rate" in table
    as_json = json.loads(run(keyspace, "compare", "--json", "BASE", str(malora_run), cwd=tmp_path))
    assert as_json
    run(keyspace, "report", "BASE", str(malora_run), "--out", "page", cwd=tmp_path)
    pages = list((tmp_path / "page").glob("*.html"))
    assert len(pages) == 1
    assert "MMD" in pages[0].read_text()


@pytest.mark.parametrize("command", [["compare"], ["report", "--out", "page"]])
def test_a_folder_without_runs_is_one_line(command, tmp_path):
    done = subprocess.run(
        [str(BIN / "lmms-keyspace"), *command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(tmp_path) in done.stderr


def test_the_doctor_finds_nothing_wrong(tmp_path):
    printed = run(str(BIN / "lmms-keyspace"), "doctor", cwd=tmp_path)
    assert "FAIL" not in printed
    assert "textbias_probe_letter" in printed
