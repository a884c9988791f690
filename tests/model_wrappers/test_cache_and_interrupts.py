"""What lmms-eval's cache answers is no silent hole, and an interrupt loses nothing that was captured."""

import json
import os
import signal
import sqlite3

import pandas as pd
import pytest
import torch
from evaluation import DATE, evaluate, fix_cache_version, run_of
from loguru import logger
from transformers import GenerationMixin

from lmms_keyspace.errors import InputError
from lmms_keyspace.sampling import Sampler

TASK = "textbias_probe_quick"
LIMIT = 30  # five clusters of six documents, of which four are captured
FEW = "capture_clusters=4,layers=0"


def interrupted(monkeypatch, call, interrupt):
    """`interrupt()` in the midst of the given call of generate(), counted from 1."""
    generate, calls = GenerationMixin.generate, []

    def stopped(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == call:
            interrupt()
        return generate(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", stopped)
    return calls


def ctrl_c():
    raise KeyboardInterrupt


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("interrupt", "error"), [(ctrl_c, KeyboardInterrupt), (terminated, SystemExit)])
def test_an_interrupt_leaves_what_was_captured(monkeypatch, tmp_path, interrupt, error):
    interrupted(monkeypatch, 3, interrupt)
    said = []
    sink = logger.add(said.append, level="ERROR")
    with pytest.raises(error):
        evaluate("keyspace_llava", tmp_path, limit=12, batch_size=2)
    logger.remove(sink)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert f"stopped at {TASK}, document" in "".join(said)
    record = json.loads((tmp_path / f"{DATE}_keyspace.json").read_text())
    assert record["complete"] is False
    assert record["tasks"][TASK]["rows_captured"] == 4
    assert pd.read_parquet(tmp_path / f"{DATE}_tokens.parquet")["doc_id"].nunique() == 4


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_little_memory_leaves_what_was_captured(monkeypatch, tmp_path):
    interrupted(monkeypatch, 3, no_memory)
    with pytest.raises(InputError, match=rf"batch_size=2: memory does not suffice for {TASK}, document \d+, \d+;"):
        evaluate("keyspace_llava", tmp_path, limit=12, batch_size=2)
    record = json.loads((tmp_path / f"{DATE}_keyspace.json").read_text())
    assert record["complete"] is False
    assert record["tasks"][TASK]["rows_captured"] == 4
    assert pd.read_parquet(tmp_path / f"{DATE}_tokens.parquet")["doc_id"].nunique() == 4


def test_an_error_while_measuring_leaves_the_keys(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("cannot measure")

    monkeypatch.setattr("lmms_keyspace.model_wrappers.assembly.Measuring", broken)
    with pytest.raises(RuntimeError, match="cannot measure"):
        evaluate("keyspace_llava", tmp_path, limit=6)
    record = json.loads((tmp_path / f"{DATE}_keyspace.json").read_text())
    assert record["complete"] is False
    assert record["tasks"][TASK]["rows_captured"] == 6


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory):
    """A cache that holds every answer, the run that filled it, and what it was asked with."""
    fix_cache_version()
    cache = tmp_path_factory.mktemp("cache")
    out = tmp_path_factory.mktemp("first")
    results = evaluate("keyspace_llava", out, limit=LIMIT, batch_size=8, use_cache=str(cache), model_args=FEW)
    return cache, results, run_of(out)


def cache_without(full_cache, tmp_path, doc_ids):
    """A copy of the cache that lacks these documents."""
    folder = tmp_path / "cache"
    folder.mkdir()
    with sqlite3.connect(full_cache[0] / "cache.db") as source, sqlite3.connect(folder / "cache.db") as copy:
        source.backup(copy)
        copy.executemany("DELETE FROM responses WHERE doc_id = ?", [(doc_id,) for doc_id in doc_ids])
    return str(folder)


def captured_documents(full_cache):
    return sorted(set(full_cache[2].tokens["doc_id"]))


def test_a_cache_that_answers_nothing_changes_nothing(full_cache):
    _, _, run = full_cache
    assert run.record.complete
    assert run.record.tasks[TASK].rows_captured == 24
    assert set(run.tokens["cluster"]) == Sampler(0, clusters=4).choose_clusters(TASK, run.attention["cluster"])


def test_a_cached_answer_of_a_selected_document_is_an_error_before_the_first_forward(monkeypatch, full_cache, tmp_path):
    calls = interrupted(monkeypatch, 0, ctrl_c)
    first, *others = captured_documents(full_cache)
    cache = cache_without(full_cache, tmp_path, others)
    with pytest.raises(InputError, match=rf"use_cache='{TASK}, document {first}'.* of 1 documents .*capture=off"):
        evaluate("keyspace_llava", tmp_path / "out", limit=LIMIT, batch_size=8, use_cache=cache, model_args=FEW)
    assert calls == []
    assert list((tmp_path / "out").iterdir()) == []


def test_cached_answers_of_unselected_documents_are_no_matter(full_cache, tmp_path):
    _, _, first = full_cache
    cache = cache_without(full_cache, tmp_path, captured_documents(full_cache))
    out = tmp_path / "out"
    evaluate("keyspace_llava", out, limit=LIMIT, batch_size=8, use_cache=cache, model_args=FEW)
    run = run_of(out)
    assert run.record.complete
    assert run.record.tasks == first.record.tasks
    assert run.tokens["prefix_hash"].equals(first.tokens["prefix_hash"])


def test_where_the_cache_has_every_answer_results_are_saved_before_the_error(monkeypatch, full_cache, tmp_path):
    calls = interrupted(monkeypatch, 0, ctrl_c)
    cache = cache_without(full_cache, tmp_path, [])
    out = tmp_path / "out"
    with pytest.raises(InputError, match="of 24 documents that the model must see"):
        evaluate("keyspace_llava", out, limit=LIMIT, use_cache=cache, model_args=FEW)
    assert calls == []
    results = json.loads((out / f"{DATE}_results.json").read_text())
    assert results["results"][TASK]["vrs,none"] == full_cache[1]["results"][TASK]["vrs,none"]
    assert len((out / f"{DATE}_samples_{TASK}.jsonl").read_text().splitlines()) == LIMIT
    with pytest.raises(InputError, match="complete is false"):
        run_of(out)


def test_options_need_every_document(tmp_path):
    fix_cache_version()
    given = {"limit": 2, "use_cache": str(tmp_path / "cache"), "model_args": "capture=off,option_logprobs=on"}
    evaluate("keyspace_llava", **given)
    with pytest.raises(InputError, match=r"of 2 documents.*option_logprobs=off"):
        evaluate("keyspace_llava", **given)
