"""What this package relies on inside lmms-eval, PEFT and transformers, so that an upgrade fails with a sentence.

Each entry names a thing, the parameters that we pass or override, and what breaks without it. A new import of these
two, or of an inner module of transformers, needs an entry. None of them is imported at the top of this file: collecting
it would fail, and no sentence be said.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lmms_keyspace import harness

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


_TRAINER = "transformers.Trainer"
TRANSFORMERS = [
    Contract("transformers.PreTrainedConfig._attn_implementation", (), "the attention in force is not known"),
    Contract(
        f"{_TRAINER}.compute_loss",
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "the alignment terms do not reach the loss",
    ),
    Contract(f"{_TRAINER}.evaluate", ("metric_key_prefix",), "accuracy and flip rate are not followed in training"),
    Contract(f"{_TRAINER}.log", ("logs", "start_time"), "divergence is not in the training log"),
    Contract(f"{_TRAINER}._run_epoch", (), "a run that was stopped at its end takes a step too many on resuming"),
    Contract(f"{_TRAINER}._save_checkpoint", ("model", "trial"), "a checkpoint cut short is taken for whole"),
    Contract(f"{_TRAINER}._save", ("output_dir", "state_dict"), "a pickle is written beside the adapter"),
    Contract(
        "transformers.TrainerCallback.on_pre_optimizer_step",
        ("args", "state", "control"),
        "a gradient that is not finite reaches the weights",
    ),
    Contract(
        "transformers.integrations.get_reporting_integration_callbacks",
        ("report_to",),
        "a logger without its package is found after the model was loaded",
    ),
    Contract("transformers.trainer_utils.PREFIX_CHECKPOINT_DIR", (), "a training run cannot go on"),
    Contract("transformers.trainer.TRAINER_STATE_NAME", (), "a checkpoint that was cut short is taken for whole"),
    Contract("transformers.utils.is_bitsandbytes_available", (), "a missing bitsandbytes is found after the download"),
    Contract("transformers.utils.is_flash_attn_2_available", (), "a missing flash-attn is found after the download"),
    Contract("transformers.DynamicCache", ("config",), "the cache has no room behind its tokens"),
    Contract(
        "transformers.cache_utils.DynamicLayer.update",
        ("key_states", "value_states"),
        "the cache has no room behind its tokens",
    ),
    Contract(
        "transformers.modeling_outputs.BaseModelOutputWithPooling",
        ("pooler_output",),
        "a picture passes through the vision tower for every question about it",
    ),
    Contract(
        "transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil",
        (),
        "the bundled model cannot be built again as it was",
    ),
]
DECODERS = ("llama", "mistral", "qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "phi3")
ALL = LMMS_EVAL + PEFT + TRANSFORMERS


def resolved(where: str, breaks: str) -> Any:
    try:
        return pkgutil.resolve_name(where)
    except (ImportError, AttributeError):
        pytest.fail(f"{where} is gone: {breaks}", pytrace=False)


def check(contract: Contract) -> None:
    thing = resolved(contract.where, contract.breaks)
    taken = inspect.signature(thing).parameters if contract.parameters else {}
    missing = set(contract.parameters) - set(taken)
    if missing:
        sentence = f"{contract.where} no longer takes {', '.join(sorted(missing))}: {contract.breaks}"
        pytest.fail(sentence, pytrace=False)


@pytest.mark.parametrize("contract", ALL, ids=lambda one: one.where)
def test_what_we_rely_on_is_there(contract):
    check(contract)


@pytest.mark.parametrize(
    ("contract", "sentence"),
    [
        (Contract("peft.PeftModel.no_more", (), "it breaks"), "peft.PeftModel.no_more is gone: it breaks"),
        (Contract("peft.no_more.x", (), "it breaks"), "peft.no_more.x is gone: it breaks"),
        (
            Contract("peft.PeftModel", ("model", "other"), "it breaks"),
            "peft.PeftModel no longer takes other: it breaks",
        ),
    ],
)
def test_a_broken_contract_is_a_sentence(contract, sentence):
    with pytest.raises(pytest.fail.Exception) as caught:
        check(contract)
    assert str(caught.value) == sentence


def test_every_import_has_its_sentence():
    known = {contract.where for contract in ALL}
    used = {
        f"{node.module}.{name.name}"
        for folder in ("lmms_keyspace", "model_wrappers", "tasks", "reports")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("lmms_eval", "peft", "transformers."))
        for name in node.names
    }
    assert len(used) > 20
    assert {name for name in used if not any(f"{one}.".startswith(f"{name}.") for one in known)} == set()


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_module_is_where_attention_is_watched(name):
    module = f"transformers.models.{name}.modeling_{name}"
    resolved(f"{module}.apply_rotary_pos_emb", "the first batch cannot be checked: its rotation is not found")
    chosen = resolved(f"{module}.ALL_ATTENTION_FUNCTIONS._local_mapping", "capture/attention.py cannot wrap sdpa")
    assert isinstance(chosen, dict), "capture/attention.py cannot wrap sdpa"
    attention = resolved(f"{module}.eager_attention_forward", "capture has nothing to wrap")
    received = list(inspect.signature(attention).parameters)[:5]
    assert received == ["module", "query", "key", "value", "attention_mask"], (
        "capture reads other things than it thinks"
    )


def test_an_image_processor_says_what_it_takes():
    breaks = "min_pixels is refused for every model"
    taken = resolved("transformers.Qwen2VLImageProcessor.valid_kwargs", breaks)
    assert "min_pixels" in taken.__annotations__, breaks


def test_an_adapter_type_of_ours_is_a_full_member_of_pefts_enum():
    from peft.utils import PeftType

    from lmms_keyspace import malora

    assert malora.MaloraConfig().peft_type is PeftType.MALORA is PeftType("MALORA") is PeftType["MALORA"]
    assert list(PeftType).count("MALORA") == 1, "PEFT's enum changed: MALORA must be registered in another way"


def test_a_chat_request_holds_what_the_wrapper_reads():
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(harness.tasks_folder()), include_defaults=False)
    task = get_task_dict(["textbias_probe_quick"], manager, "chat")["textbias_probe_quick"]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    (request,) = task.instances
    assert len(request.args) == 6, "a chat request changed: model_wrappers/prompts.py cannot read it"
    _, messages, generation, document, name, split = request.args
    assert messages(task.dataset[split][document])[0]["content"][0]["type"] == "image"
    assert (generation["max_new_tokens"], document, name, split) == (8, 0, "textbias_probe_quick", "test")
    assert request.metadata["keyspace"]["cluster"] == "group_id", "a task's metadata no longer reaches the wrapper"
