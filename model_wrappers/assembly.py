"""From what was observed to a finished `RunData`: measure while the keys are held, then describe the run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch

from lmms_keyspace import __version__
from lmms_keyspace.capture import Capture
from lmms_keyspace.measuring import NOTHING_MEASURED, Bandwidths, Measured, Measuring
from lmms_keyspace.model_wrappers.observed import Observed
from lmms_keyspace.records import (
    ATTENTION_COLUMNS,
    OPTION_COLUMNS,
    TEXT,
    TOKEN_COLUMNS,
    VISUAL,
    RunData,
    RunRecord,
    TaskRecord,
    empty_table,
)
from lmms_keyspace.stats import hash_ranks

# The sample of keys that is always saved, for pictures.
PICTURE_TOKENS = 2000
PICTURE_LAYERS = 4
_VERSIONED = ("lmms-eval", "torch", "transformers", "peft", "numpy", "pandas", "scipy")


def assemble(run: Observed, *, finished: bool = True) -> RunData:
    """Measure divergence for every task, condition and space, and put the run together.

    Args:
        finished: False for a run that died: what this process captured so far, unmeasured and without the reference
            pass; its record says that it is not complete.
    """
    capture = run.capture
    if capture is None:
        return RunData(
            record=_record(run, {}, finished),
            gram={},
            divergence=NOTHING_MEASURED.table,
            attention=empty_table(ATTENTION_COLUMNS),
            tokens=empty_table(TOKEN_COLUMNS),
            keys={},
            options=_options(run),
        )
    measured = _measured(run, capture) if finished else NOTHING_MEASURED
    tokens = capture.token_table()
    keys_row, keys = _kept_keys(run, capture, tokens, reference=run.second_pass and finished)
    return RunData(
        record=_record(run, measured.bandwidths, finished),
        gram=measured.gram,
        losses=measured.losses,
        divergence=measured.table,
        attention=capture.attention_table(),
        tokens=tokens.assign(keys_row=keys_row),
        keys=keys,
        options=_options(run),
    )


def _measured(run: Observed, capture: Capture) -> Measured:
    source = "base model, this run"
    if run.loaded.adapter is not None:
        source = "base model, adapter disabled" if run.second_pass else "this run, adapted"
    elif run.loaded.intervention is not None:
        source = "base model, intervention off" if run.second_pass else "this run, with the intervention"
    return Measuring(
        source=capture,
        conditions={name: task.conditions() for name, task in run.tasks.items()},
        reference=run.second_pass,
        bandwidth_source=source,
        connector=run.decoder.connector,
        seed=run.arguments.seed,
    ).run(run.arguments.spaces)


def _kept_keys(
    run: Observed, capture: Capture, tokens: pd.DataFrame, *, reference: bool
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """The keys to save: everything with `keep_keys`, else a sample of visual and text tokens, and of layers.

    Returns:
        The column `keys_row` of the token table, and task -> `<space>/<layer>[/base]` -> float32 keys.
    """
    layers, limit, wanted = capture.layers, len(tokens), np.ones(len(tokens), bool)
    if not run.arguments.keep_keys:
        spread = np.linspace(0, len(layers) - 1, min(PICTURE_LAYERS, len(layers))).round().astype(int)
        layers, limit = [layers[index] for index in sorted(set(spread.tolist()))], PICTURE_TOKENS
        wanted = tokens["modality"].isin([VISUAL, TEXT]).to_numpy(bool)
    suffixes = {False: "", True: "/base"} if reference else {False: ""}
    keys_row = np.full(len(tokens), -1, np.int64)
    keys: dict[str, dict[str, np.ndarray]] = {}
    for task in run.tasks:
        rows = np.flatnonzero((tokens["task"] == task).to_numpy())
        if not len(rows):
            continue
        names = [f"{token.doc_id}/{token.position}" for token in tokens.iloc[rows[wanted[rows]]].itertuples()]
        picked = np.flatnonzero(wanted[rows])[hash_ranks(names, run.arguments.seed, task) < limit]
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


def _intervention(run: Observed) -> str | None:
    """Its name, and whether its statistics rest on images of this very run."""
    intervention = run.loaded.intervention
    if intervention is None:
        return None
    used = len(run.images_of_intervention)
    return f"{intervention.name}, {used} of its images evaluated" if used else intervention.name


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
            same_prompts=task.same_prompts,
            images_absent=task.images_absent,
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
        intervention=_intervention(run),
        reference=arguments.reference if loaded.changed else "self",
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
        quantization=loaded.quantization,
        batch_size=run.batch_size,
        processes=run.processes,
        processor_hash=_sha([loaded.processor.to_json_string(), str(loaded.processor.chat_template)]),
        layers=run.capture.layers if run.capture is not None else [],
        n_kv_heads={site.layer: site.n_kv_heads for site in run.decoder.sites},
        bandwidths=bandwidths,
        tasks=tasks,
        complete=finished
        and run.whole
        and (run.capture is None or all(task.rows_selected == task.rows_captured for task in tasks.values())),
    )


def _sha(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()
