"""One process as a user has it, with a home folder, a token and a second plugin: lmms-eval's commands, then ours.

lmms-eval exits 0 on failure, so the files are what counts. Nothing that this package writes may hold the token or the
path of the home folder.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import NamedTuple

import pytest
from evaluation import DATE, TIMES, evaluate
from lmms_eval import evaluator
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.models import registry_v2
from lmms_eval.tasks import TaskManager

from lmms_keyspace import embedded, harness
from lmms_keyspace.store import find_runs, read_run

TOKEN = "hf_" + "xY7" * 11
OF_THE_TEST = ("token.json", "seen.json", "neighbor.py")  # seen.json: lmms-eval 0.7.3 itself logs HF_TOKEN
# A plugin of somebody else: a model, and a task that comes in by the same method of lmms-eval as ours.
NEIGHBOR = """
import functools
from pathlib import Path
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

def manifests():
    from lmms_eval.tasks import TaskManager
    original = TaskManager.initialize_tasks

    @functools.wraps(original)
    def initialize_tasks(self, include_path=None, include_defaults=True):
        given = [include_path] if isinstance(include_path, str) else list(include_path or [])
        return original(self, include_path=[*given, str(Path(__file__).parent)], include_defaults=include_defaults)

    TaskManager.initialize_tasks = initialize_tasks
    return ModelManifest(model_id="neighbor", simple_class_path="neighbor.Neighbor")

class Neighbor(lmms):
    def __init__(self, **given):
        super().__init__()

    def generate_until(self, requests):
        return ["red"] * len(requests)

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError
"""
SESSION = """
import contextlib, io, json, sys
from pathlib import Path
import lmms_eval.cli.dispatch, lmms_keyspace.cli

def said(program, *arguments):
    sys.argv, out = [program, *arguments], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        {"lmms-eval": lmms_eval.cli.dispatch.main, "lmms-keyspace": lmms_keyspace.cli.main}[program]()
    return out.getvalue().split()

listed = said("lmms-eval", "--tasks", "list")
models = said("lmms-eval", "models")
home = Path.home()
local = f"pretrained={home}/models/base,peft={home}/adapters/mine,revision={json.load(open('token.json'))}"
every = "--tasks textbias_probe_quick --limit 12 --batch_size 8 --log_samples".split()
said("lmms-eval", "--model", "neighbor", *every, "--output_path", "theirs")
said("lmms-eval", "--model", "malora_vlm", "--model_args", local, *every, "--output_path", f"{home}/ours")
ours = f"{home}/ours"
others = ["theirs", f"{home}/nothing", "--allow-mismatch"]
said("lmms-keyspace", "report", ours, *others, "--out", "page", "--no-figures")
said("lmms-keyspace", "leaderboard", ours, f"{home}/nothing", "--out", "board")
said("lmms-keyspace", "gate", "--freeze", ours, "--out", f"{home}/baseline.parquet")
said("lmms-keyspace", "gate", "--baseline", f"{home}/baseline.parquet", "--candidate", ours, "--out", "gate")
said("lmms-keyspace", "analyze", ours, "--permutations", "9", "--out", "analysis")
settings = "trainer.max_steps=1 trainer.per_device_train_batch_size=4 data.scenes.n=16 evaluation.every=0".split()
settings += [f"trainer.hub_token={json.load(open('token.json'))}", f"trainer.run_name={home}/first"]
said("lmms-keyspace", "train", "--output-dir", f"{home}/trained", "--pretrained", f"{home}/models/base",
     *(word for setting in settings for word in ("--set", setting)))
json.dump({"listed": listed, "models": models}, open("seen.json", "w"))
"""


def write_neighbor(site: Path) -> None:
    site.mkdir(exist_ok=True)
    (site / "neighbor.py").write_text(NEIGHBOR)
    (site / "neighbor_task.yaml").write_text("task: neighbor_task\n")


class Session(NamedTuple):
    work: Path
    home: Path
    said: str


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    work = tmp_path_factory.mktemp("session")
    home, site = tmp_path_factory.mktemp("people") / "alice", work / "site"
    info = site / "neighbor-1.0.dist-info"
    info.mkdir(parents=True)
    write_neighbor(site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: neighbor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\nneighbor = neighbor:manifests\n")
    (work / "token.json").write_text(json.dumps(TOKEN))
    shutil.copytree(embedded.base_path(), home / "models" / "base")
    shutil.copytree(embedded.adapter_path("malora"), home / "adapters" / "mine")
    variables = {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "HOME": str(home), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        cwd=work,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Session(work, home, done.stdout + done.stderr)


def names(folder: Path) -> set[str]:
    """Names of the files of a run, without the date."""
    return {path.name.split("_", 2)[2] for path in folder.rglob("*") if path.is_file()}


def test_tasks_of_all_are_listed_and_lmms_evals_models(session):
    seen = json.loads((session.work / "seen.json").read_text())
    assert {"textbias_probe", "visreliance_pairs", "mmmu_val", "neighbor_task"} <= set(seen["listed"])
    assert "llava_hf" in seen["models"]


def test_a_neighbors_model_leaves_lmms_evals_files_and_none_of_ours(session):
    assert names(session.work / "theirs") == {"results.json", "samples_textbias_probe_quick.jsonl"}
    (path,) = (session.work / "theirs").rglob("*_results.json")
    assert "keyspace" not in json.loads(path.read_text())


def test_our_model_runs_in_the_same_process(session):
    assert names(session.home / "ours") >= {"results.json", "samples_textbias_probe_quick.jsonl", "keyspace.json"}
    (files,) = find_runs(session.home / "ours")
    record = read_run(files.folder, files.date).record
    assert (record.pretrained, record.adapter) == ("~/models/base", "~/adapters/mine")


def test_no_file_of_ours_holds_the_token_or_the_home_folder(session):
    lmms_evals = ("_results.json", "samples_textbias_probe_quick.jsonl")
    written = [
        path
        for folder in (session.work, session.home / "ours", session.home / "trained", session.home / "baseline.parquet")
        for path in ([folder] if folder.is_file() else folder.rglob("*"))
        if path.is_file() and not path.name.endswith(lmms_evals) and path.name not in OF_THE_TEST
    ]
    kinds = {path.suffix for path in written}
    assert kinds >= {".json", ".parquet", ".safetensors", ".html", ".md", ".csv", ".xml"}, session.said
    assert {"training.json", "adapter_config.json", "report.html", "gate.json"} <= {path.name for path in written}, (
        session.said
    )
    for path in written:
        content = path.read_bytes()
        assert TOKEN.encode() not in content, path
        assert str(session.home).encode() not in content, path


def test_the_keyspace_block_of_the_results_holds_neither(session):
    (files,) = find_runs(session.home / "ours")
    block = json.dumps(json.loads(files.results.read_text())["keyspace"])
    assert TOKEN not in block
    assert str(session.home) not in block


@pytest.mark.parametrize("order", [("lmms_keyspace", "neighbor"), ("neighbor", "lmms_keyspace")])
def test_two_plugins_work_in_either_order(order, tmp_path, monkeypatch):
    """Both name a model, and both wrap the method of lmms-eval that indexes tasks."""
    write_neighbor(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "neighbor", raising=False)
    before = TaskManager.initialize_tasks
    monkeypatch.setattr(TaskManager, "initialize_tasks", inspect.unwrap(before))
    values = {"lmms_keyspace": "lmms_keyspace.harness:model_manifests", "neighbor": "neighbor:manifests"}
    points = EntryPoints(EntryPoint(name, values[name], "lmms_eval.models") for name in order)
    monkeypatch.setattr(registry_v2, "entry_points", lambda: points)
    registry = registry_v2.ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert {"neighbor", *harness.MODEL_CLASSES} <= set(registry.list_model_names())
    assert {"neighbor_task", "textbias_probe"} <= set(TaskManager(include_defaults=False).all_tasks)


def test_a_stock_model_leaves_the_same_files_without_our_hooks(tmp_path, monkeypatch):
    """Through the Python API; `test_end_to_end.py` has the command line, with the whole plugin hidden."""
    hooked = [evaluator.simple_evaluate, EvaluationTracker.save_results_aggregated, ResponseCache.execute]
    evaluate("dummy", tmp_path / "with", limit=12)
    assert all(hasattr(function, harness._MARK) for function in hooked)
    monkeypatch.setattr(evaluator, "simple_evaluate", inspect.unwrap(hooked[0]))
    monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", inspect.unwrap(hooked[1]))
    monkeypatch.setattr(ResponseCache, "execute", inspect.unwrap(hooked[2]))
    evaluate("dummy", tmp_path / "without", limit=12)
    seen = {}
    for name in ("with", "without"):
        files = {path.name: path.read_text() for path in (tmp_path / name).rglob("*") if path.is_file()}
        # Functions of the task's config stand there with their addresses.
        results = json.loads(re.sub("0x[0-9a-f]+", "0x", files.pop(f"{DATE}_results.json")))
        seen[name] = files, {key: value for key, value in results.items() if key not in TIMES}
    assert len(seen["with"][1]["results"]["textbias_probe_quick"]) > 10
    assert seen["with"] == seen["without"]
