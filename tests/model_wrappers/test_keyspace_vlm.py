"""The wrapper on the bundled model, through lmms-eval's evaluator."""

import json
from collections import Counter
from functools import partial, wraps

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation import DATE, answers, evaluate, run_of
from safetensors.numpy import load_file
from transformers import GenerationMixin, LlavaModel

from lmms_keyspace import embedded, harness
from lmms_keyspace.errors import InputError
from lmms_keyspace.model_wrappers import prompts
from lmms_keyspace.model_wrappers.growing_cache import GrowingLayer
from lmms_keyspace.model_wrappers.pictures import Pictures
from lmms_keyspace.records import ALL_HEADS, SCHEMA_VERSION

LIMIT = 48


@pytest.fixture(scope="module")
def batch_of_8(tmp_path_factory):
    out = tmp_path_factory.mktemp("batch8")
    results = evaluate("keyspace_llava", limit=LIMIT, batch_size=8, model_args=f"keep_keys=on,keys_dir={out}")
    return results, run_of(out)


@pytest.fixture(scope="module")
def batch_of_1(tmp_path_factory):
    out = tmp_path_factory.mktemp("batch1")
    results = evaluate("keyspace_llava", limit=LIMIT, batch_size=1, model_args=f"keep_keys=on,keys_dir={out}")
    return results, run_of(out)


WITH_PICTURE = """
include: {folder}/textbias_probe/_textbias_probe_template
task: with_picture
dataset_kwargs:
  data_files:
    test: {folder}/textbias_probe/textbias_probe.jsonl
process_docs: !function utils.with_picture
"""
UTILS = """
from lmms_keyspace.tasks.documents import process_docs

def with_picture(dataset):
    return process_docs(dataset).filter(lambda doc: doc["condition"] != "text_only_conflict")
"""


def test_same_answers_as_the_stock_wrapper(tmp_path):
    """On documents with a picture: the stock chat wrapper cannot run a text-only document under transformers 5."""
    (tmp_path / "with_picture.yaml").write_text(WITH_PICTURE.format(folder=harness.tasks_folder()))
    (tmp_path / "utils.py").write_text(UTILS)
    ours, stock = (
        answers(
            evaluate(
                model, tasks=["with_picture"], include_path=tmp_path, limit=200, batch_size=size, model_args=model_args
            ),
            "with_picture",
        )
        for model, size, model_args in (
            ("keyspace_llava", 8, ""),
            ("llava_hf", 1, f"pretrained={embedded.base_path()},device=cpu,device_map=cpu,dtype=float32"),
        )
    )
    assert len(ours) == 200
    assert len(set(stock)) >= 8
    assert ours == stock


def test_capture_changes_no_answer(batch_of_8):
    results, _ = batch_of_8
    assert answers(evaluate("keyspace_llava", limit=LIMIT, batch_size=8, model_args="capture=off")) == answers(results)


def test_the_batch_size_changes_neither_answers_nor_the_sample(batch_of_1, batch_of_8):
    (results_1, run_1), (results_8, run_8) = batch_of_1, batch_of_8
    assert answers(results_1) == answers(results_8)
    # Values differ in the last digits with padding; what was sampled may not.
    identity = ["task", "doc_id", "position", "modality", "segment", "token_id", "keys_row", "prefix_hash", "image_sha"]
    assert run_1.tokens[identity].equals(run_8.tokens[identity])
    keys_1, keys_8 = (run.keys["textbias_probe_quick"] for run in (run_1, run_8))
    assert sorted(keys_1) == [f"k_pre/{layer}" for layer in range(4)]
    for name in keys_1:
        assert np.abs(keys_1[name] - keys_8[name]).max() < 1e-4
    merged = run_1.divergence.merge(
        run_8.divergence, on=["condition", "layer", "head", "contrast", "estimator"], suffixes=("_1", "_8")
    )
    assert len(merged) == len(run_1.divergence)
    np.testing.assert_allclose(merged["value_1"], merged["value_8"], rtol=0, atol=1e-4)


def test_the_record_is_whole_and_counts_what_was_captured(batch_of_8):
    record = batch_of_8[1].record
    task = record.tasks["textbias_probe_quick"]
    assert record.complete
    assert record.schema_version == SCHEMA_VERSION
    assert (record.pretrained, record.adapter, record.reference) == ("bundled", None, "self")
    assert (task.documents, task.clusters, task.rows_selected, task.rows_captured) == (LIMIT, 8, LIMIT, LIMIT)
    assert task.interpretable
    attention = batch_of_8[1].attention
    assert (attention["head_group"] == ALL_HEADS).sum() == LIMIT * 4
    masses = attention[[name for name in attention if name.startswith("mass_")]].sum(axis=1)
    assert np.allclose(masses, 1, atol=1e-5)


def test_the_block_in_the_results_holds_the_tables_estimates(batch_of_8):
    results, run = batch_of_8
    table = run.divergence
    row = table[
        (table["head"] == "all")
        & (table["layer"] == 2)
        & (table["condition"] == "clean")
        & (table["contrast"] == "visual-text")
        & (table["estimator"] == "mmd2")
    ]
    block = results["keyspace"]["divergence"]["textbias_probe_quick"]["clean"]["k_pre visual-text mmd2"]["2"]
    assert block == pytest.approx(row["value"].item())
    json.dumps(results["keyspace"])


def test_the_sample_is_bounded_and_takes_all_conditions_of_a_cluster(tmp_path):
    evaluate(
        "keyspace_llava",
        limit=LIMIT,
        batch_size=8,
        model_args=f"capture_clusters=5,capture_tokens=3,layers=1+3,spaces=k_pre+v,keys_dir={tmp_path}",
    )
    run = run_of(tmp_path)
    tokens = run.tokens
    assert tokens["cluster"].nunique() == 5
    assert tokens.groupby("cluster")["condition"].nunique().eq(6).all()
    assert tokens.groupby(["doc_id", "modality"]).size().max() == 3
    assert sorted(run.divergence["layer"].unique()) == [1, 3]
    assert set(run.divergence["space"]) == {"k_pre", "v"}
    assert run.record.tasks["textbias_probe_quick"].rows_captured == 30


def test_an_adapter_is_measured_at_the_base_models_bandwidths(tmp_path, batch_of_8):
    evaluate("malora_llava", limit=LIMIT, batch_size=8, model_args=f"keys_dir={tmp_path}")
    run = run_of(tmp_path)
    record, base = run.record, batch_of_8[1].record
    assert (record.adapter, record.adapter_method, record.reference) == ("bundled/malora", "MALORA", "self")
    for layer, values in base.bandwidths["textbias_probe_quick"]["k_pre"].items():
        assert record.bandwidths["textbias_probe_quick"]["k_pre"][layer] == pytest.approx(values, rel=1e-4)
    # The base keys saved beside the adapted ones are those of the base run at the same tokens.
    base_keys = batch_of_8[1].keys["textbias_probe_quick"]["k_pre/3"]
    ours = run.keys["textbias_probe_quick"]
    both = run.tokens.merge(
        batch_of_8[1].tokens, on=["doc_id", "position"], suffixes=("", "_base"), validate="one_to_one"
    )
    kept = both[both["keys_row"] >= 0]
    assert len(both) == len(run.tokens)
    assert np.abs(ours["k_pre/3/base"][kept["keys_row"]] - base_keys[kept["keys_row_base"]]).max() < 1e-4
    assert np.abs(ours["k_pre/3"] - ours["k_pre/3/base"]).max() > 0.01


def test_without_a_reference_an_adapted_run_says_so(tmp_path):
    results = evaluate("malora_llava", limit=LIMIT, batch_size=8, model_args=f"reference=none,keys_dir={tmp_path}")
    assert results["keyspace"]["reference"] == "not comparable across runs"
    assert run_of(tmp_path).record.reference == "none"


def test_capture_off_saves_the_record_and_no_tables(tmp_path):
    results = evaluate("keyspace_llava", limit=12, batch_size=8, model_args=f"capture=off,keys_dir={tmp_path}")
    data = run_of(tmp_path)
    assert data.record.complete
    assert not data.record.capture
    assert data.divergence.empty
    assert data.attention.empty
    assert not data.gram
    assert results["keyspace"]["divergence"] == {}


def test_repeats_are_answered_and_captured_once(tmp_path):
    results = evaluate("keyspace_llava", limit=24, batch_size=8, repeats=2, model_args=f"keys_dir={tmp_path}")
    samples = results["samples"]["textbias_probe_quick"]
    assert len(samples) == 24
    assert run_of(tmp_path).record.tasks["textbias_probe_quick"].rows_captured == 24


def test_half_precision_runs(tmp_path):
    evaluate("malora_llava", limit=24, batch_size=8, model_args=f"dtype=bfloat16,keys_dir={tmp_path}")
    data = run_of(tmp_path)
    assert data.record.dtype == "bfloat16"
    measured = data.divergence[data.divergence["note"] == ""]
    assert np.isfinite(measured["value"]).all()
    assert {"mmd2", "js_classifier", "linear_cka"} <= set(measured["estimator"])


@pytest.mark.parametrize(("gen_kwargs", "by_pixels"), [(None, False), ("num_beams=2", True)], ids=["greedy", "beams"])
def test_pictures_that_are_shown_again_reach_the_model_as_features(monkeypatch, gen_kwargs, by_pixels):
    """Not with beams; and with the cache that has room behind its tokens."""
    generate, passed = GenerationMixin.generate, []

    def watched(*args, **kwargs):
        passed.append(kwargs)
        return generate(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    evaluate("keyspace_llava", limit=6, batch_size=6, model_args="capture=off", gen_kwargs=gen_kwargs)
    assert ["pixel_values" in kwargs for kwargs in passed] == [by_pixels] * len(passed)
    assert [len(kwargs["input_ids"]) for kwargs in passed] == [6]
    assert all(isinstance(layer, GrowingLayer) for layer in passed[0]["past_key_values"].layers)


@pytest.mark.parametrize("model", ["keyspace_llava", "malora_llava"])
def test_an_error_of_generate_names_task_and_documents_and_leaves_what_was_captured(monkeypatch, tmp_path, model):
    generate = GenerationMixin.generate
    calls = []

    def broken(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 3:
            raise ValueError("the model broke")
        return generate(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", broken)
    said = r"textbias_probe_quick, document \d+, \d+: ValueError: the model broke"
    with pytest.raises(RuntimeError, match=said):
        evaluate(model, tmp_path, limit=12, batch_size=2, model_args="capture_clusters=4")
    assert calls == [2, 2, 2]
    with pytest.raises(InputError, match="complete is false"):  # no report is made of half a run
        run_of(tmp_path)
    record = json.loads((tmp_path / f"{DATE}_keyspace.json").read_text())
    tokens, attention = (pd.read_parquet(tmp_path / f"{DATE}_{name}.parquet") for name in ("tokens", "attention"))
    keys = load_file(tmp_path / f"{DATE}_keys_textbias_probe_quick.safetensors")
    assert record["tasks"]["textbias_probe_quick"]["rows_captured"] == 4
    assert attention["doc_id"].nunique() == tokens["doc_id"].nunique() == 4
    assert len(keys["k_pre/3"]) == tokens["modality"].isin(["visual", "text"]).sum() > 0


def test_without_room_for_all_pictures_questions_about_one_follow_each_other(monkeypatch, batch_of_8):
    """Each passes through the vision tower once, though its pixels are not kept; the answers are the same."""
    room = 2 * 16 * 128  # features of 2 pictures: tokens and width of the bundled model
    monkeypatch.setattr(prompts, "Pictures", partial(Pictures, pixels=0, values=room))
    get_image_features, passed = LlavaModel.get_image_features, Counter()

    @wraps(get_image_features)
    def counting(self, pixel_values, **kwargs):
        passed.update(one.numpy().tobytes() for one in pixel_values)
        return get_image_features(self, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(LlavaModel, "get_image_features", counting)
    results = evaluate("keyspace_llava", limit=LIMIT, batch_size=8, model_args="capture=off")
    assert answers(results) == answers(batch_of_8[0])
    assert sorted(passed.values()) == [1] * 9  # pictures of 8 groups, and the blank one


def test_pictures_that_the_processor_refuses_end_the_run_before_the_first_forward(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise OSError("image file is truncated")

    def generate(*args, **kwargs):
        raise AssertionError("the model was called")

    monkeypatch.setattr("lmms_keyspace.model_wrappers.encoding.encode", broken)
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    with pytest.raises(RuntimeError, match=r"textbias_probe_quick, document \d+: OSError: image file is truncated"):
        evaluate("keyspace_llava", tmp_path, limit=4, batch_size=2)


def short_of_memory(monkeypatch, most):
    """generate() has memory for `most` rows. Returns the list of the batches that it was given."""
    generate = GenerationMixin.generate
    sizes = []

    def limited(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", limited)
    return sizes


def test_an_automatic_batch_size_halves_until_memory_suffices(monkeypatch, tmp_path, batch_of_8):
    sizes = short_of_memory(monkeypatch, 10)
    results = evaluate("keyspace_llava", limit=LIMIT, batch_size="auto", model_args=f"keys_dir={tmp_path}")
    assert sizes == [48, 24, 12, 6, 6, 6, 6, 6, 6, 6, 6]
    assert answers(results) == answers(batch_of_8[0])
    run = run_of(tmp_path)
    assert run.record.batch_size == 6
    assert run.record.complete
    assert run.record.tasks == batch_of_8[1].record.tasks
    assert run.tokens["token_id"].equals(batch_of_8[1].tokens["token_id"])


@pytest.mark.parametrize(("size", "most"), [(4, 3), ("auto", 0)])
def test_too_little_memory_is_an_error_that_names_the_documents(monkeypatch, size, most):
    short_of_memory(monkeypatch, most)
    with pytest.raises(InputError, match=r"memory does not suffice for textbias_probe_quick, document \d.*batch_size"):
        evaluate("keyspace_llava", limit=12, batch_size=size)


def test_device_map(tmp_path, batch_of_8):
    results = evaluate(
        "keyspace_llava",
        limit=LIMIT,
        batch_size=8,
        device=None,
        model_args=f"device_map=auto,dtype=float32,keys_dir={tmp_path}",
    )
    assert answers(results) == answers(batch_of_8[0])


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights fails the test: these errors come before."""
    from transformers import AutoModelForImageTextToText

    def too_late(*args, **kwargs):
        pytest.fail("the model was loaded before the argument was refused")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", too_late)


@pytest.mark.parametrize(
    ("model", "model_args", "says"),
    [
        ("keyspace_vlm", "pretrained=/no/such/model", "pretrained='/no/such/model'.*neither a folder nor a hub id"),
        ("malora_llava", f"pretrained={embedded.base_path()}", "peft=None.*--model keyspace_vlm"),
        ("keyspace_vlm", "capture_cluster=9", "did you mean capture_clusters"),
        ("keyspace_vlm", "capture_clusters=-1", "capture_clusters=-1.*at least 4"),
        ("keyspace_vlm", "layers=0+9", "layers=9.*layers 0 to 3"),
        ("keyspace_vlm", "device=cuda:99", "device='cuda:99'"),
        ("keyspace_qwen2_5_vl", "", "pretrained=None.*needs a model"),
        ("keyspace_llava", "max_pixels=4096", "max_pixels=4096.*CLIPImageProcessor"),
        ("keyspace_llava", "attn_implementation=flash_attention_2", "'flash_attention_2'.*flash-attn.*or use sdpa"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_loads(no_weights, model, model_args, says):
    with pytest.raises(InputError, match=says):
        evaluate(model, limit=6, model_args=model_args)


def adapter(tmp_path, **changes):
    """A copy of the bundled MaLoRA adapter with another config or other tensors."""
    from safetensors.torch import load_file, save_file

    source = embedded.adapter_path("malora")
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    if "r" in changes:
        config["r"] = changes["r"]
    if "layer" in changes:
        tensors = {name.replace("layers.3.", f"layers.{changes['layer']}."): value for name, value in tensors.items()}
    if "width" in changes:
        tensors = {
            name: torch.zeros(value.shape[0], changes["width"]) if "malora_A" in name else value
            for name, value in tensors.items()
        }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize("changes", [{"r": 99}, {"layer": 31}, {"width": 4096}])
def test_an_adapter_of_another_model_or_rank_is_refused_before_the_model_loads(no_weights, tmp_path, changes):
    folder = adapter(tmp_path, **changes)
    with pytest.raises(InputError, match=f"peft='{folder}'|peft="):
        evaluate("malora_llava", limit=6, model_args=f"peft={folder}")
