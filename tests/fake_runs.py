"""Run folders with known effects, as lmms-eval and the plugin write them. The numbers are plausible, not measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmms_keyspace.outcomes import CONDITIONS
from lmms_keyspace.records import (
    ATTENTION_COLUMNS,
    DIVERGENCE_COLUMNS,
    SEGMENTS,
    TOKEN_COLUMNS,
    GramKey,
    HeldOutLoss,
    KernelSums,
    RunData,
    RunRecord,
    TaskRecord,
)
from lmms_keyspace.scenes import CANVAS, PALETTE
from lmms_keyspace.store import write_run

TASK = "textbias_probe"
LAYERS = (0, 1, 2, 3)
HEADS, WIDTH = 2, 8
LN2 = float(np.log(2))
COLORS = ("red", "green", "blue", "yellow")
FAMILIES = ("color", "shape", "count", "position")


@dataclass(frozen=True)
class FakeRun:
    """What a run shows. Counts are groups; the first groups flip, so runs are nested and discordance is known."""

    name: str
    date: str = "20260102_030405"
    adapter: str | None = None
    method: str | None = None
    groups: int = 48
    captured: int = 12  # clusters with keys, at most
    clean_wrong: int = 2  # the last groups
    flips: int = 20  # the first groups answer the lure in conflict
    irrelevant_wrong: int = 3  # the first groups
    blank_right: int = 12  # the first groups
    gap: float = 1.0  # distance between the modalities, in standard deviations of a key
    mass: float = 0.30  # attention on the image in clean
    bandwidth: float = 8.0
    batch_size: int = 8
    generator: str = "1.0:abc"
    capture: bool = True
    answers: dict[int, str] = field(default_factory=dict)  # raw response by group, to inject text
    record: dict[str, Any] = field(default_factory=dict)  # fields of RunRecord to override
    task_record: dict[str, Any] = field(default_factory=dict)


BASE = FakeRun("base")
MALORA = FakeRun("malora", "20260102_040000", "bundled/malora", "MALORA", flips=20, gap=0.3, mass=0.36)
LORA = FakeRun("lora", "20260102_050000", "bundled/lora", "LORA", flips=8, gap=0.98, mass=0.31)


def write(run: FakeRun, root: Path) -> Path:
    """Write the run's folder under `root` and return it."""
    folder = root / run.name
    folder.mkdir(parents=True, exist_ok=True)
    samples = _samples(run)
    results = {
        "results": {TASK: {"alias": TASK, "score,none": float(samples["score"].mean()), "score_stderr,none": 0.01}},
        "configs": {TASK: {"metadata": {"version": 1.0}}},
        "versions": {TASK: 1.0},
        "config": {
            "model": "malora_llava" if run.adapter else "keyspace_llava",
            "model_args": "",
            "batch_size": run.batch_size,
        },
        "lmms_eval_version": "0.7.3",
        "date": run.date,
    }
    (folder / f"{run.date}_results.json").write_text(json.dumps(results))
    rows = samples.assign(answer=samples["answer"].astype(object).where(samples["answer"].notna(), None)).to_dict(
        "records"
    )
    lines = [json.dumps(row | {"response": run.answers.get(int(row["group_id"][1:]), row["response"])}) for row in rows]
    (folder / f"{run.date}_samples_{TASK}.jsonl").write_text("\n".join(lines) + "\n")
    if run.capture:
        write_run(folder, run.date, _data(run, samples))
    return folder


def captured_data(run: FakeRun) -> RunData:
    """What the plugin would save of the run."""
    return _data(run, _samples(run))


def _outcome(run: FakeRun, group: int, condition: str) -> str:
    wrong = group >= run.groups - run.clean_wrong
    return {
        "clean": "other" if wrong else "gold",
        "match": "gold",
        "conflict": "lure" if group < run.flips else "other" if wrong else "gold",
        "irrelevant": "other" if wrong or group < run.irrelevant_wrong else "gold",
        "text_only_conflict": "other" if group == 0 else "lure",
        "blank": "gold" if group < run.blank_right else "parse_fail" if wrong else "other",
    }[condition]


def _samples(run: FakeRun) -> pd.DataFrame:
    rows = []
    for group in range(run.groups):
        gold, lure, other = (COLORS[(group + step) % 4] for step in range(3))
        for condition in CONDITIONS:
            outcome = _outcome(run, group, condition)
            answer = {"gold": gold, "lure": lure, "other": other, "parse_fail": None}[outcome]
            context = {
                "match": f"A note says it is {gold}.",
                "conflict": f"A note says it is {lure}.",
                "text_only_conflict": f"A note says it is {lure}.",
                "irrelevant": "A note says the piano is large.",
            }.get(condition, "")
            rows.append(
                {
                    "doc_id": len(rows),
                    "group_id": f"g{group:03d}",
                    "family": FAMILIES[group % 4],
                    "condition": condition,
                    "image_sha": f"{group:064x}",
                    "gold": gold,
                    "lure": lure,
                    "answer": answer,
                    "response": answer or "?",
                    "outcome": outcome,
                    "correct": float(outcome == "gold"),
                    "score": float(outcome == "gold"),
                    "question": "What color is the circle?",
                    "context": context,
                    "image": {"blank": "blank", "text_only_conflict": "none"}.get(condition, "scene"),
                    "spec": _spec(gold),
                }
            )
    return pd.DataFrame(rows)


def _spec(color: str) -> str:
    """The recipe of a scene with one circle."""
    circle = {"color": color, "shape": "circle", "x": 168, "y": 168, "radius": 60, "rgb": PALETTE[color]}
    return json.dumps({"canvas": CANVAS, "background": 61, "objects": [circle]})


def _data(run: FakeRun, samples: pd.DataFrame) -> RunData:
    gram, losses, divergence = {}, {}, []
    for layer in LAYERS:
        visual, text, clusters = _keys(run, layer)
        for condition in ("clean", "conflict"):
            gram[GramKey(TASK, condition, "k_pre", layer)] = _sums(visual, text, clusters, run.bandwidth)
        losses[GramKey(TASK, "clean", "k_pre", layer)] = _losses(run, layer, clusters)
        divergence += _divergence_rows(run, layer)
    return RunData(
        record=_record(run, samples),
        gram=gram,
        divergence=pd.DataFrame(divergence, columns=list(DIVERGENCE_COLUMNS)),
        attention=_attention(run, samples),
        tokens=_tokens(run),
        keys={TASK: {f"k_pre/{layer}": _kept_keys(run, layer) for layer in LAYERS}},
        losses=losses,
    )


def _keys(run: FakeRun, layer: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """[clusters, tokens, heads, width] of both modalities; equal noise in every run, as on equal documents."""
    rng = np.random.default_rng(layer)
    clusters = [f"g{group:03d}" for group in range(min(run.groups, run.captured))]
    shape = (len(clusters), 6, HEADS, WIDTH)
    visual, text = rng.standard_normal(shape), rng.standard_normal(shape)
    return visual, text + run.gap * (1 - 0.1 * layer), clusters


def _sums(visual: np.ndarray, text: np.ndarray, clusters: list[str], bandwidth: float) -> KernelSums:
    def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        distance2 = ((x[:, None, :, None] - y[None, :, None, :]) ** 2).sum(-1)  # [D, D, n, m, heads]
        return np.moveaxis(np.exp(-distance2 / bandwidth).sum((2, 3)), -1, 0)

    counts = np.full(len(clusters), visual.shape[1])
    return KernelSums(cross(visual, visual), cross(text, text), cross(visual, text), counts, counts, tuple(clusters))


def _js(run: FakeRun) -> float:
    return min(0.66 + 0.05 * (run.gap - 1), LN2)


def _losses(run: FakeRun, layer: int, clusters: list[str]) -> HeldOutLoss:
    """Losses whose bound is `_js`, with equal noise in every run."""
    counts = np.full(len(clusters), 6)
    noise = np.random.default_rng([layer, 1]).standard_normal((2, HEADS, len(clusters))) * 0.01
    visual, text = (LN2 - _js(run) + noise - noise.mean(axis=-1, keepdims=True)) * counts
    return HeldOutLoss(visual, text, np.zeros_like(visual), counts, counts, tuple(clusters))


def _divergence_rows(run: FakeRun, layer: int) -> list[dict[str, Any]]:
    common = {
        "task": TASK,
        "condition": "clean",
        "layer": layer,
        "space": "k_pre",
        "null_mean": 0.0,
        "p": 0.01,
        "p_adjusted": 0.02,
        "test_family": "layers",
        "connector": "mlp",
        "token_filter": "robust",
        "n_visual": 72,
        "n_text": 72,
        "n_clusters": 12,
        "n_permutations": 0,
        "bandwidth_source": "base",
        "estimator_version": "1",
        "note": "",
    }
    values = {
        ("visual-text", "mmd2"): 0.3 * run.gap * (1 - 0.2 * layer),
        ("visual-text:with-template", "mmd2"): 0.2 * run.gap * (1 - 0.2 * layer),
        ("visual-visual", "mmd2"): 0.002,
        ("text-text", "mmd2"): 0.001,
        ("visual-text", "js_classifier"): _js(run),
        ("visual-visual", "js_classifier"): 0.01,
        ("text-text", "js_classifier"): 0.005,
    }
    return [
        common
        | {
            "head": head,
            "contrast": contrast,
            "estimator": estimator,
            "value": value,
            "ci_low": value - 0.01,
            "ci_high": value + 0.01,
            "at_ceiling": value >= 0.66,
        }
        for head in ("all", "0", "1")
        for (contrast, estimator), value in values.items()
    ]


def _attention(run: FakeRun, samples: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for doc in samples.itertuples():
        has_image = doc.condition != "text_only_conflict"
        has_hint = bool(doc.context)
        for layer in LAYERS:
            image = (run.mass + 0.02 * layer - (0.05 if doc.outcome == "lure" else 0)) * has_image
            hint = (0.2 + (0.05 if doc.outcome == "lure" else 0)) * has_hint
            masses = {"image": image, "hint": hint, "question": 0.2, "options": 0.0, "special": 0.1}
            masses["boilerplate"] = 1 - sum(masses.values())
            counts = {"image": 16 * has_image, "hint": 7 * has_hint, "question": 6, "boilerplate": 5, "special": 1}
            rows.append(
                {
                    "task": TASK,
                    "doc_id": doc.doc_id,
                    "cluster": doc.group_id,
                    "condition": doc.condition,
                    "layer": layer,
                    "head_group": "all",
                    "layer_type": "full",
                    **{f"n_{segment}": counts.get(segment, 0) for segment in SEGMENTS},
                    **{f"mass_{segment}": masses[segment] for segment in SEGMENTS},
                    "image_over_uniform": 1.0 if has_image else np.nan,
                    # From layer 1 on, right answers go with a higher advantage; the rest is equal in every run.
                    "qk_visual": 0.5 + 0.2 * layer * (doc.outcome == "gold") + 0.5 * np.sin(doc.doc_id * 7.0 + layer),
                    "qk_text": 0.7,
                    "lse_visual": 2.5,
                    "lse_text": 2.6,
                    "key_norm_visual": 3.0,
                    "key_norm_text": 3.5,
                }
            )
    return pd.DataFrame(rows, columns=list(ATTENTION_COLUMNS))


def _tokens(run: FakeRun) -> pd.DataFrame:
    clusters = _keys(run, 0)[2]
    rows = [
        {
            "task": TASK,
            "doc_id": index * 6,
            "cluster": cluster,
            "condition": "clean",
            "image_sha": "0",
            "prefix_hash": "0",
            "modality": modality,
            "segment": "image" if modality == "visual" else "question",
            **dict.fromkeys(("position", "position_t", "position_h", "position_w"), token),
            "image_index": 0 if modality == "visual" else -1,
            "grid_row": 0,
            "grid_column": token,
            "token_id": token,
            "key_norm": 3.0,
            "sink": False,
        }
        for index, cluster in enumerate(clusters)
        for modality in ("visual", "text")
        for token in range(6)
    ]
    return pd.DataFrame(rows).assign(keys_row=range(len(rows)))[list(TOKEN_COLUMNS)]


def _kept_keys(run: FakeRun, layer: int) -> np.ndarray:
    """[tokens, heads, width] in the order of `_tokens`."""
    visual, text, _ = _keys(run, layer)
    return np.concatenate([np.concatenate([v, t]) for v, t in zip(visual, text, strict=True)])


def _record(run: FakeRun, samples: pd.DataFrame) -> RunRecord:
    task = {
        "documents": len(samples),
        "clusters": run.groups,
        "clusters_selected": 12,
        "rows_selected": 72,
        "rows_captured": 72,
        "conditions": list(CONDITIONS),
        "cluster_field": "group_id",
        "generator": run.generator,
        "token_counts": {"visual": 1000, "text": 2000},
        "image_tokens": {"16": len(samples)},
        "prompt_hash": "f" * 64,
    }
    fields: dict[str, Any] = {
        "date": run.date,
        "model": "malora_llava" if run.adapter else "keyspace_llava",
        "pretrained": "bundled",
        "revision": None,
        "architecture": "llava",
        "connector": "mlp",
        "adapter": run.adapter,
        "adapter_method": run.method,
        "adapter_sha256": "a" * 64 if run.adapter else None,
        "intervention": None,
        "reference": "self",
        "capture": True,
        "capture_settings": {"clusters": 128, "tokens": 32, "spaces": ["k_pre"]},
        "seed": 0,
        "versions": {"lmms_eval": "0.7.3", "torch": "2.15.0"},
        "device": "cpu",
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "quantization": None,
        "batch_size": run.batch_size,
        "processor_hash": "0" * 64,
        "layers": list(LAYERS),
        "n_kv_heads": dict.fromkeys(LAYERS, HEADS),
        "bandwidths": {TASK: {"k_pre": {layer: [run.bandwidth] * HEADS for layer in LAYERS}}},
        "tasks": {TASK: TaskRecord(**(task | run.task_record))},
        "complete": True,
    }
    return RunRecord(**(fields | run.record))
