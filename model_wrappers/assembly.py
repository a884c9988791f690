"""From what was observed to a finished `RunData`: measure while the keys are held, then describe the run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch

from lmms_keyspace import __version__, divergence
from lmms_keyspace.capture import Capture
from lmms_keyspace.model_wrappers.observed import Observed
from lmms_keyspace.records import (
    ATTENTION_COLUMNS,
    DIVERGENCE_COLUMNS,
    OPTION_COLUMNS,
    TEXT,
    TOKEN_COLUMNS,
    VISUAL,
    GramKey,
    KernelSums,
    RunData,
    RunRecord,
    TaskRecord,
)
from lmms_keyspace.stats import hash_ranks

# The sample of keys that is always saved, for pictures.
PICTURE_TOKENS = 2000
PICTURE_LAYERS = 4
_VERSIONED = ("lmms-eval", "torch", "transformers", "peft", "numpy", "pandas", "scipy")

Bandwidths = dict[str, dict[str, dict[int, list[float]]]]  # task -> space -> layer -> per KV head


def assemble(run: Observed, *, finished: bool = True) -> RunData:
    """Measure divergence for every task, condition and space, and put the run together.

    Args:
        finished: False for a run that died: what was captured so far, unmeasured and without the reference pass; its
            record says that it is not complete.
    """
    capture = run.capture
    if capture is None:
        return RunData(
            record=_record(run, {}, finished),
            gram={},
            divergence=_empty(DIVERGENCE_COLUMNS),
            attention=_empty(ATTENTION_COLUMNS),
            tokens=_empty(TOKEN_COLUMNS),
            keys={},
            options=_options(run),
        )
    bandwidths: Bandwidths = {}
    tables: list[pd.DataFrame] = []
    gram: dict[GramKey, KernelSums] = {}
    for name, task in run.tasks.items() if finished else ():
        for space in run.arguments.spaces:
            found = _bandwidths(run, capture, name, space)
            bandwidths.setdefault(name, {})[space] = {layer: values.tolist() for layer, values in found.items()}
            for condition in task.conditions() if found else ():
                table, sums = _measure(run, capture, name, condition, space, found)
                tables.append(table)
                gram.update(sums)
    tokens = capture.token_table()
    tokens["keys_row"], keys = _kept_keys(run, capture, tokens, reference=run.second_pass and finished)
    return RunData(
        record=_record(run, bandwidths, finished),
        gram=gram,
        divergence=pd.concat(tables, ignore_index=True) if tables else _empty(DIVERGENCE_COLUMNS),
        attention=capture.attention_table(),
        tokens=tokens,
        keys=keys,
        options=_options(run),
    )


def _sides(
    capture: Capture, task: str, condition: str | None, space: str, *, reference: bool = False
) -> tuple[dict[int, torch.Tensor], list[str], dict[int, torch.Tensor], list[str]]:
    """Visual and text keys by layer, each with the cluster of every row."""
    keys: dict[str, dict[int, torch.Tensor]] = {VISUAL: {}, TEXT: {}}
    clusters: dict[str, list[str]] = {VISUAL: [], TEXT: []}
    for modality in (VISUAL, TEXT):
        for layer in capture.layers:
            keys[modality][layer], clusters[modality] = capture.keys(
                task, condition, space, layer, modality, reference=reference
            )
    return keys[VISUAL], clusters[VISUAL], keys[TEXT], clusters[TEXT]


def _bandwidths(run: Observed, capture: Capture, task: str, space: str) -> dict[int, np.ndarray]:
    """Squared bandwidths per layer and KV head; empty when the task shows no image or no text."""
    visual, _, text, _ = _sides(capture, task, None, space, reference=run.second_pass)
    if not any(len(side) for keys in (visual, text) for side in keys.values()):
        return {}
    return divergence.reference_bandwidths(visual, text, seed=run.arguments.seed)


def _measure(
    run: Observed, capture: Capture, task: str, condition: str, space: str, bandwidth2: Mapping[int, np.ndarray]
) -> tuple[pd.DataFrame, dict[GramKey, KernelSums]]:
    visual, clusters_visual, text, clusters_text = _sides(capture, task, condition, space)
    source = "base model, this run"
    if run.loaded.adapter is not None:
        source = "base model, adapter disabled" if run.second_pass else "this run, adapted"
    return divergence.measure(
        visual,
        text,
        clusters_visual=clusters_visual,
        clusters_text=clusters_text,
        task=task,
        condition=condition,
        space=space,
        bandwidth2=bandwidth2,
        bandwidth_source=source,
        connector=run.decoder.connector,
        token_filter=f"{VISUAL} against {TEXT}",
        seed=run.arguments.seed,
    )


def _kept_keys(
    run: Observed, capture: Capture, tokens: pd.DataFrame, *, reference: bool
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """The keys to save: everything with `keep_keys`, else a sample of tokens and layers.

    Returns:
        The column `keys_row` of the token table, and task -> `<space>/<layer>[/base]` -> float32 keys.
    """
    layers, limit = capture.layers, len(tokens)
    if not run.arguments.keep_keys:
        spread = np.linspace(0, len(layers) - 1, min(PICTURE_LAYERS, len(layers))).round().astype(int)
        layers, limit = [layers[index] for index in sorted(set(spread.tolist()))], PICTURE_TOKENS
    suffixes = {False: "", True: "/base"} if reference else {False: ""}
    keys_row = np.full(len(tokens), -1, np.int64)
    keys: dict[str, dict[str, np.ndarray]] = {}
    for task in run.tasks:
        rows = np.flatnonzero((tokens["task"] == task).to_numpy())
        if not len(rows):
            continue
        names = [f"{token.doc_id}/{token.position}" for token in tokens.iloc[rows].itertuples()]
        picked = np.flatnonzero(hash_ranks(names, run.arguments.seed, task) < limit)
        keys_row[rows[picked]] = np.arange(len(picked))
        keys[task] = {
            f"{space}/{layer}{suffix}": _picked(capture.keys(task, None, space, layer, reference=base)[0], picked)
            for space in run.arguments.spaces
            for layer in layers
            for base, suffix in suffixes.items()
        }
    return keys_row, keys


def _picked(keys: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    return np.asarray(keys[torch.from_numpy(rows).to(keys.device)].float().cpu())


def _options(run: Observed) -> pd.DataFrame | None:
    """The options table, by task, document and option; None where it was not asked for."""
    if not run.arguments.option_logprobs:
        return None
    table = pd.DataFrame(run.options, columns=list(OPTION_COLUMNS)).astype(dict(OPTION_COLUMNS))
    return table.sort_values(["task", "doc_id"], kind="stable", ignore_index=True)


def _record(run: Observed, bandwidths: Bandwidths, finished: bool) -> RunRecord:
    loaded, arguments, info = run.loaded, run.arguments, run.loaded.adapter_info
    tasks = {
        name: TaskRecord(
            documents=len(task.prompts),
            clusters=len({prompt.cluster for prompt in task.prompts.values()}),
            clusters_selected=len(task.chosen),
            rows_selected=task.rows_selected(),
            rows_captured=task.rows_captured,
            conditions=task.conditions(),
            cluster_field=task.cluster_field,
            generator=task.generator,
            token_counts=dict(task.token_counts),
            image_tokens=dict(task.image_tokens),
            prompt_hash=_sha(f"{doc_id}\0{prompt.text}" for doc_id, prompt in task.prompts.items()),
            interpretable=task.generator is not None or not loaded.bundled,
        )
        for name, task in run.tasks.items()
    }
    return RunRecord(
        date="",  # lmms-eval's, put in when the run is handed over
        model=run.model_name,
        pretrained=loaded.pretrained,
        revision=loaded.revision,
        architecture=run.decoder.architecture,
        connector=run.decoder.connector,
        adapter=loaded.adapter,
        adapter_method=info.method if info else None,
        adapter_sha256=info.sha256 if info else None,
        intervention=None,
        reference=arguments.reference if loaded.adapter else "self",
        capture=run.capture is not None,
        capture_settings={
            "spaces": list(arguments.spaces),
            "clusters": arguments.capture_clusters,
            "tokens": arguments.capture_tokens,
            "keep_keys": arguments.keep_keys,
        },
        seed=arguments.seed,
        versions={
            "lmms_keyspace": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _VERSIONED},
        },
        device=str(loaded.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        attn_implementation=arguments.attn_implementation,
        quantization=None,
        batch_size=run.batch_size,
        processor_hash=_sha([loaded.processor.to_json_string(), str(loaded.processor.chat_template)]),
        layers=run.capture.layers if run.capture is not None else [],
        n_kv_heads={site.layer: site.n_kv_heads for site in run.decoder.sites},
        bandwidths=bandwidths,
        tasks=tasks,
        complete=finished
        and (run.capture is None or all(task.rows_selected == task.rows_captured for task in tasks.values())),
    )


def _empty(columns: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})


def _sha(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()
