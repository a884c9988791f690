"""What this package relies on inside lmms-eval and PEFT, so that an upgrade fails with a sentence, and a neighbor.

Each entry names a thing, the parameters that we pass or override, and what breaks without it. A new import of either
package needs an entry.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from lmms_eval.tasks import TaskManager, get_task_dict
from peft.utils import PeftType

from lmms_keyspace import harness, malora

ROOT = Path(__file__).parents[1]


class Contract(NamedTuple):
    where: str  # dotted name
    parameters: tuple[str, ...]
    breaks: str


LMMS_EVAL = [
    Contract("lmms_eval.models.list_available_models", (), "doctor cannot say whether our models are registered"),
    Contract("lmms_eval.models.get_model", ("model_name",), "doctor cannot load our models by name"),
    Contract(
        "lmms_eval.models.registry_v2.ModelManifest",
        ("model_id", "chat_class_path"),
        "the entry point cannot name our models: none is found",
    ),
    Contract(
        "lmms_eval.tasks.TaskManager.initialize_tasks",
        ("include_path", "include_defaults"),
        "our tasks are found with --include_path only",
    ),
    Contract(
        "lmms_eval.tasks.get_task_dict",
        ("task_name_list", "task_manager", "task_type"),
        "doctor cannot build our tasks",
    ),
    Contract("lmms_eval.utils.load_yaml_config", ("yaml_path",), "doctor cannot check a task's file"),
    Contract("lmms_eval.tasks.mmmu.utils", (), "mmmu_val_keyspace has no stock prompts"),
    Contract("lmms_eval.tasks.mmmu.utils.mmmu_doc_to_text", (), "mmmu_val_keyspace has no stock prompts"),
    Contract("lmms_eval.tasks.mmmu.utils.mmmu_doc_to_visual", (), "mmmu_val_keyspace has no pictures"),
    Contract("lmms_eval.tasks.mmmu.utils.mmmu_doc_to_messages", (), "pictures of mmmu_val_keyspace lose their places"),
    Contract("lmms_eval.tasks.mmmu.utils.mmmu_process_results", (), "mmmu_val_keyspace has no stock_acc"),
    Contract("lmms_eval.tasks.mmbench.cn_utils", (), "mmbench_cn_dev_keyspace has no stock prompts"),
    Contract("lmms_eval.tasks.mmbench.cn_utils.mmbench_doc_to_text", (), "mmbench_cn_dev_keyspace has no prompts"),
    Contract("lmms_eval.tasks.mmbench.cn_utils.mmbench_doc_to_visual", (), "mmbench_cn_dev_keyspace has no pictures"),
    Contract("lmms_eval.tasks.mmbench.cn_utils.mmbench_process_results", (), "mmbench_cn_dev_static has no score"),
    Contract("lmms_eval.evaluator", (), "nothing is saved beside the results: name keys_dir="),
    Contract(
        "lmms_eval.evaluator.simple_evaluate",
        ("model", "model_args", "evaluation_tracker", "log_samples", "datetime_str", "cli_args"),
        "nothing is saved beside the results: name keys_dir=",
    ),
    Contract(
        "lmms_eval.loggers.evaluation_tracker.EvaluationTracker.save_results_aggregated",
        ("results", "samples", "datetime_str"),
        "key-space files are not saved beside the results: name keys_dir=",
    ),
    Contract(
        "lmms_eval.loggers.evaluation_tracker.EvaluationTracker.save_results_samples",
        ("task_name", "samples"),
        "samples of a run whose answers all came from the cache are lost",
    ),
    Contract(
        "lmms_eval.loggers.evaluation_tracker.EvaluationTracker", ("output_path",), "a run has no default output folder"
    ),
    Contract(
        "lmms_eval.loggers.evaluation_tracker.GeneralConfigTracker.model_name_sanitized",
        (),
        "key-space files go to another folder than the results",
    ),
    Contract(
        "lmms_eval.caching.response_cache.ResponseCache.execute",
        ("lm", "reqtype", "requests"),
        "answers from lmms-eval's cache leave holes in the capture unseen",
    ),
    Contract("lmms_eval.utils.make_table", ("result_dict",), "the printed table holds every metric of a probe"),
    Contract("lmms_eval.__main__.make_table", ("result_dict",), "the printed table holds every metric of a probe"),
    Contract("lmms_eval.utils.get_datetime_str", (), "our files and lmms-eval's have other dates"),
    Contract(
        "lmms_eval.api.instance.Instance", ("arguments", "metadata", "doc_id"), "requests cannot be read by the wrapper"
    ),
    Contract("lmms_eval.api.instance.GenerationResult", ("text", "token_counts"), "answers cannot be given back"),
    Contract("lmms_eval.api.instance.TokenCounts", ("input_tokens", "output_tokens"), "answers cannot be given back"),
    Contract("lmms_eval.api.model.lmms", (), "there is no base class of the wrapper"),
    Contract("lmms_eval.protocol.ChatMessages", ("messages",), "messages of a document cannot be read"),
    Contract("lmms_eval.protocol.ChatMessages.extract_media", (), "pictures of a document cannot be read"),
]
_TUNER, _LAYER = "peft.tuners.tuners_utils.BaseTuner", "peft.tuners.tuners_utils.BaseTunerLayer"
PEFT = [
    Contract(
        f"{_TUNER}._create_and_replace",
        ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"),
        "MaLoRA's layers are not put into the model",
    ),
    Contract(f"{_TUNER}._prepare_adapter_config", ("peft_config", "model_config"), "MaLoRA does not find its layers"),
    Contract(f"{_TUNER}._check_target_module_exists", ("peft_config", "key"), "MaLoRA's choice of layers is not asked"),
    Contract(f"{_TUNER}._check_merge_allowed", (), "MaLoRA would be merged although its update depends on the token"),
    Contract(f"{_TUNER}._replace_module", ("parent", "child_name", "new_module", "child"), "layers are not replaced"),
    Contract(f"{_TUNER}.unload", (), "the base model does not come back without hooks"),
    Contract(_TUNER, ("model",), "there is no base class of the tuner"),
    Contract(_LAYER, (), "there is no base class of the adapter's layer"),
    Contract(f"{_LAYER}.set_adapter", ("adapter_names", "inference_mode"), "adapters cannot be chosen"),
    Contract(f"{_LAYER}._move_adapter_to_device_of_base_layer", ("adapter_name",), "adapters stay on the CPU"),
    Contract(f"{_LAYER}.disable_adapters", (), "the reference pass would keep the adapter"),
    Contract(f"{_LAYER}.active_adapters", (), "the layer does not know which update to add"),
    Contract("peft.PeftModel", ("model", "peft_config"), "adapters cannot be loaded or told from base models"),
    Contract("peft.PeftModel._enable_peft_forward_hooks", (), "a batch of mixed adapters is not refused"),
    Contract("peft.PeftModel.disable_adapter", (), "there is no reference pass of the base model"),
    Contract("peft.PeftModel.get_base_model", (), "the model inside an adapter is not found"),
    Contract("peft.get_peft_model", ("model", "peft_config"), "an adapter cannot be trained"),
    Contract("peft.PeftConfig", ("peft_type",), "there is no base class of MaloraConfig"),
    Contract("peft.LoraConfig", ("r", "target_modules", "rank_pattern"), "the LoRA controls cannot be made or checked"),
    Contract("peft.utils.PeftType", (), "the type MALORA cannot be registered"),
    Contract("peft.utils.register_peft_method", ("name", "config_cls", "model_cls"), "PEFT does not know MaLoRA"),
    Contract("peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING", (), "PEFT does not know MaLoRA"),
    Contract(
        "peft.tuners.tuners_utils.check_target_module_exists", ("config", "key"), "MaLoRA does not find its layers"
    ),
    Contract("peft.utils.other.get_pattern_key", ("pattern_keys", "key_to_match"), "ranks by pattern are not checked"),
    Contract("peft.utils.CONFIG_NAME", (), "an adapter's folder is not recognized before loading"),
    Contract("peft.utils.SAFETENSORS_WEIGHTS_NAME", (), "an adapter's folder is not recognized before loading"),
    Contract("peft.utils.WEIGHTS_NAME", (), "weights as a pickle are not refused"),
]


@pytest.mark.parametrize("contract", LMMS_EVAL + PEFT, ids=lambda one: one.where)
def test_what_we_rely_on_is_there(contract):
    try:
        thing = pkgutil.resolve_name(contract.where)
    except (ImportError, AttributeError):
        pytest.fail(f"{contract.where} is gone: {contract.breaks}")
    taken = inspect.signature(thing).parameters if contract.parameters else {}
    missing = set(contract.parameters) - set(taken)
    assert not missing, f"{contract.where} no longer takes {', '.join(sorted(missing))}: {contract.breaks}"


def test_every_import_from_lmms_eval_and_peft_has_its_sentence():
    known = {contract.where for contract in LMMS_EVAL + PEFT}
    used = {
        f"{node.module}.{name.name}"
        for folder in ("lmms_keyspace", "model_wrappers", "tasks", "reports")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lmms_eval", "peft")
        for name in node.names
    }
    assert len(used) > 20
    assert {name for name in used if not any(f"{one}.".startswith(f"{name}.") for one in known)} == set()


def test_an_adapter_type_of_ours_is_a_full_member_of_pefts_enum():
    assert malora.MaloraConfig().peft_type is PeftType.MALORA is PeftType("MALORA") is PeftType["MALORA"]
    assert list(PeftType).count("MALORA") == 1, "PEFT's enum changed: MALORA must be registered in another way"


def test_a_chat_request_holds_what_the_wrapper_reads():
    manager = TaskManager(include_path=str(harness.tasks_folder()), include_defaults=False)
    task = get_task_dict(["textbias_probe_quick"], manager, "chat")["textbias_probe_quick"]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    (request,) = task.instances
    assert len(request.args) == 6, "a chat request changed: model_wrappers/prompts.py cannot read it"
    _, messages, generation, document, name, split = request.args
    assert messages(task.dataset[split][document])[0]["content"][0]["type"] == "image"
    assert (generation["max_new_tokens"], document, name, split) == (8, 0, "textbias_probe_quick", "test")
    assert request.metadata["keyspace"]["cluster"] == "group_id", "a task's metadata no longer reaches the wrapper"


# A plugin of somebody else: a model, and a wrapper around the same method of lmms-eval that our tasks come in by.
NEIGHBOR = """
import functools
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

calls = []

def manifests():
    from lmms_eval.tasks import TaskManager
    original = TaskManager.initialize_tasks

    @functools.wraps(original)
    def initialize_tasks(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

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
from lmms_eval.cli.dispatch import main

def said(*arguments):
    sys.argv, out = ["lmms-eval", *arguments], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    return out.getvalue().split()

listed = said("--tasks", "list")
said(*"--model neighbor --tasks textbias_probe_quick --limit 6 --output_path theirs --log_samples".split())
said(*"--model keyspace_llava --tasks textbias_probe_quick --limit 6 --output_path ours --log_samples".split())
import neighbor
json.dump({"listed": listed, "calls": len(neighbor.calls)}, open("seen.json", "w"))
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Path:
    """A folder in which lmms-eval listed its tasks, ran a neighbor's model and then ours."""
    work = tmp_path_factory.mktemp("beside")
    site = work / "site"
    info = site / "neighbor-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "neighbor.py").write_text(NEIGHBOR)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: neighbor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\nneighbor = neighbor:manifests\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def names(folder: Path) -> set[str]:
    """Names of the files of a run, without the date."""
    return {path.name.split("_", 2)[2] for path in folder.rglob("*") if path.is_file()}


def test_tasks_are_listed_and_a_second_plugin_is_asked(beside):
    seen = json.loads((beside / "seen.json").read_text())
    assert {"textbias_probe", "visreliance_pairs", "mmmu_val"} <= set(seen["listed"])
    assert seen["calls"] >= 3


def test_a_neighbors_model_leaves_lmms_evals_files_and_none_of_ours(beside):
    assert names(beside / "theirs") == {"results.json", "samples_textbias_probe_quick.jsonl"}
    (path,) = (beside / "theirs").rglob("*_results.json")
    assert "keyspace" not in json.loads(path.read_text())


def test_our_model_runs_in_the_same_process(beside):
    assert names(beside / "ours") >= {"results.json", "samples_textbias_probe_quick.jsonl", "keyspace.json"}
