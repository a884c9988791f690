"""The contracts between the stages: names, column schemas and frozen types of every file that crosses one.

Nothing here computes. `store` writes and reads these types, `stats` and `reports` work on them; none of the three
imports torch, so every array is numpy and every saved float is float32 or float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1

# What a token of the prompt is. Divergence compares VISUAL with TEXT; the rest is counted and left out.
VISUAL, TEXT, BOILERPLATE, SPECIAL, BOS, SINK, PADDING = MODALITIES = (
    "visual",
    "text",
    "boilerplate",
    "special",
    "bos",
    "sink",
    "padding",
)
# What the model's input has around the document's own words; a few of these tokens are captured, as a control.
TEMPLATE = (BOILERPLATE, SPECIAL, BOS)
# Where attention of the last prompt token goes. Text of a task that declares no segments is `question`;
# `special` holds special, BOS and sink tokens.
SEGMENTS = ("image", "hint", "question", "options", "boilerplate", "special")
# Which vectors of the attention layer are captured: the key that enters RoPE, the key after it, query, value, and as a
# control the key that a random projection would make.
SPACES = ("k_pre", "k_post", "q", "v", "k_rand")
# Contrasts of the divergence table. The split-half baselines compare one modality with itself, split by cluster.
VISUAL_TEXT, VISUAL_VISUAL, TEXT_TEXT = CONTRASTS = ("visual-text", "visual-visual", "text-text")
# Controls: attention sinks left in; template and special tokens counted as text; as many visual as text tokens in
# every cluster; content shuffled over the places of rotated keys; text of a task against text of another one
# (`text-text:<other task>`); keys of base and adapted model at the same tokens.
WITH_SINKS, WITH_TEMPLATE = "visual-text:with-sinks", "visual-text:with-template"
EQUAL_COUNTS, POSITION_NULL = "visual-text:equal-counts", "position-null"
BASE_ADAPTED_VISUAL, BASE_ADAPTED_TEXT = "base-adapted:visual", "base-adapted:text"
# The estimators that reports read; the others of the table stand beside them as an ablation.
MAIN_ESTIMATORS = ("mmd2", "js_classifier", "paper_mmd", "paper_js_histogram")
ALL_HEADS = "all"
DEFAULT_CONDITION = "default"
# The kernel scale under which the mean over the five bandwidth scales is saved.
MULTI_SCALE = "multi"
NOT_COMPARABLE = "not comparable across runs"
NOT_INTERPRETABLE = "not interpretable"

DIVERGENCE_COLUMNS: Mapping[str, str] = {
    "task": "string",
    "condition": "string",
    "layer": "int32",
    "head": "string",  # KV head index, or `all` for the mean over KV heads
    "space": "string",
    "contrast": "string",
    "estimator": "string",  # one of MAIN_ESTIMATORS, or of the ablation in docs/divergence.md
    "value": "float64",  # mmd2*: unitless; js*: nats; energy, centroid_distance: unit of the keys; NaN: see note
    "null_mean": "float64",
    "ci_low": "float64",
    "ci_high": "float64",
    "p": "float64",
    "p_adjusted": "float64",
    "test_family": "string",
    "connector": "string",
    "token_filter": "string",
    "n_visual": "int64",  # tokens on the first side of the contrast
    "n_text": "int64",  # tokens on the second side of the contrast
    "n_clusters": "int64",
    "n_permutations": "int64",
    "bandwidth_source": "string",
    "at_ceiling": "bool",
    "estimator_version": "string",
    "note": "string",  # empty, or why the row could not be computed
}
CHANGE_COLUMNS: Mapping[str, str] = {
    "task": "string",
    "condition": "string",
    "layer": "int32",
    "head": "string",
    "space": "string",
    "estimator": "string",  # mmd2 | js_classifier, visual against text
    "delta": "float64",  # the run less the reference run, on the clusters that both have
    "ci_low": "float64",
    "ci_high": "float64",
    "band_low": "float64",  # simultaneous for the tests that test_family names
    "band_high": "float64",
    "p": "float64",
    "p_adjusted": "float64",
    "test_family": "string",
    "mde": "float64",  # minimum detectable change at 80 % power, single test
    "n_clusters": "int64",
    "note": "string",  # empty, or why the row could not be computed
}
ATTENTION_COLUMNS: Mapping[str, str] = {
    "task": "string",
    "doc_id": "int64",
    "cluster": "string",
    "condition": "string",
    "layer": "int32",
    # `all`: means over the query heads. A number: the same over the query heads of that KV head; such rows are written
    # for the documents whose keys are captured. Take one of the two kinds, never both together.
    "head_group": "string",
    "layer_type": "string",
    **{f"n_{segment}": "int32" for segment in SEGMENTS},
    **{f"mass_{segment}": "float32" for segment in SEGMENTS},  # attention mass of the last prompt token; sums to 1
    "image_over_uniform": "float32",  # mass_image / (n_image / tokens seen); NaN without image tokens
    "qk_visual": "float32",  # mean scaled q.k of the last prompt token to visual keys
    "qk_text": "float32",
    "lse_visual": "float32",  # log-sum-exp of scaled q.k over the visual keys that the mask allows, nats; NaN for none
    "lse_text": "float32",
    "key_norm_visual": "float32",  # mean Euclidean norm of k_pre
    "key_norm_text": "float32",
}
TOKEN_COLUMNS: Mapping[str, str] = {
    "task": "string",
    "doc_id": "int64",
    "cluster": "string",
    "condition": "string",
    "image_sha": "string",
    "prefix_hash": "string",
    "modality": "string",
    "segment": "string",
    "position": "int32",  # index in the unpadded prompt
    "position_t": "int32",  # rotary position ids; the three agree where RoPE is one-dimensional
    "position_h": "int32",
    "position_w": "int32",
    "image_index": "int32",  # which image of the prompt, -1 for text
    "grid_row": "int32",
    "grid_column": "int32",
    "token_id": "int64",
    "key_norm": "float32",  # k_pre, mean over layers and KV heads
    "sink": "bool",  # attention sink by the criterion of sinks.py
    "keys_row": "int64",  # row in keys_<task>.safetensors, -1 when the key was not kept
}
OPTION_COLUMNS: Mapping[str, str] = {
    "task": "string",
    "doc_id": "int64",
    "condition": "string",
    "option": "string",
    "logprob_first": "float64",
    "logprob": "float64",
}


def empty_table(columns: Mapping[str, str]) -> pd.DataFrame:
    """A table of one of the schemas above, without rows."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})


@dataclass(frozen=True)
class KernelSums:
    """Document-by-document kernel sums, the sufficient statistic of the cluster U-statistic of MMD^2.

    `vv[..., i, j]` is the sum of k(a, b) over visual tokens a of cluster i and b of cluster j; `tt` likewise for text;
    `vt[..., i, j]` takes a from the visual tokens of cluster i and b from the text tokens of cluster j.
    The diagonal holds within-cluster sums; the U-statistic leaves it out.

    Shapes: vv, tt, vt `[..., D, D]` (leading dims are usually KV heads); n_visual, n_text `[D]`; clusters has D names.
    """

    ARRAYS: ClassVar = ("vv", "tt", "vt")

    vv: np.ndarray
    tt: np.ndarray
    vt: np.ndarray
    n_visual: np.ndarray
    n_text: np.ndarray
    clusters: tuple[str, ...]


@dataclass(frozen=True)
class HeldOutLoss:
    """Held-out log-losses (nats) of the classifier that tells visual from text keys, summed by cluster.

    `fit_influence` is by how much the bound would change (nats, first order), were the cluster not in the fits.

    Shapes: loss_visual, loss_text, fit_influence `[..., D]` (leading dims are usually KV heads); n_visual, n_text `[D]`
    tokens; clusters has D names.
    """

    ARRAYS: ClassVar = ("loss_visual", "loss_text", "fit_influence")

    loss_visual: np.ndarray
    loss_text: np.ndarray
    fit_influence: np.ndarray
    n_visual: np.ndarray
    n_text: np.ndarray
    clusters: tuple[str, ...]


@dataclass(frozen=True, order=True)
class GramKey:
    """Which kernel sums: one entry of `<date>_gram.safetensors` (all KV heads of a layer together).

    In the contrast `text-text:<other task>` the other task's text stands in the places of the visual tokens.
    """

    task: str
    condition: str
    space: str
    layer: int
    scale: str = MULTI_SCALE
    contrast: str = VISUAL_TEXT


def text_against(other_task: str) -> str:
    """The contrast of a task's text with the text of another task."""
    return f"{TEXT_TEXT}:{other_task}"


class TaskRecord(BaseModel):
    """What was run and captured of one task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    clusters: int
    clusters_selected: int
    rows_selected: int
    rows_captured: int
    conditions: list[str]
    cluster_field: str | None  # None: every document is its own cluster
    generator: str | None  # version and sha of the probe's generator, from the task's metadata
    token_counts: dict[str, int]  # prompt tokens by label, over the captured rows
    image_tokens: dict[str, int]  # image tokens per prompt (as text) -> number of prompts
    prompt_hash: str  # sha256 over the prompts in document order
    interpretable: bool = True  # False: the model cannot read this benchmark; its accuracy says nothing
    same_prompts: list[list[str]] = []  # sets of conditions that are one prompt for this model: they differ in nothing
    images_absent: list[int] = []  # documents that name an image which they do not hold; they were asked without it


class RunRecord(BaseModel):
    """`<date>_keyspace.json`: everything needed to know what a run was, and whether it is whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    date: str
    model: str  # the lmms-eval model name, e.g. malora_llava
    pretrained: str
    revision: str | None
    architecture: str
    connector: str  # linear | mlp | resampler | q-former, as families.py says
    adapter: str | None
    adapter_method: str | None  # PEFT type, e.g. MALORA or LORA
    adapter_sha256: str | None
    intervention: str | None
    reference: str  # self | base | none: where the bandwidths come from
    capture: bool
    capture_settings: dict[str, Any]
    seed: int
    versions: dict[str, str]
    device: str
    dtype: str
    attn_implementation: str
    quantization: str | None
    batch_size: int  # of one process
    processes: int = 1
    processor_hash: str
    layers: list[int]
    n_kv_heads: dict[int, int]
    bandwidths: dict[str, dict[str, dict[int, list[float]]]]  # task -> space -> layer -> squared, per KV head
    tasks: dict[str, TaskRecord]
    complete: bool
    files: dict[str, str] = {}  # the run's other files, named without the date -> sha256; put in when they are written


@dataclass(frozen=True)
class RunData:
    """Everything the plugin saves of one run; `store` turns it into files and back."""

    record: RunRecord
    gram: Mapping[GramKey, KernelSums]
    divergence: pd.DataFrame
    attention: pd.DataFrame
    tokens: pd.DataFrame
    keys: Mapping[str, Mapping[str, np.ndarray]]  # task -> "<space>/<layer>[/base]" -> [tokens, KV heads, head width]
    options: pd.DataFrame | None = None
    losses: Mapping[GramKey, HeldOutLoss] = field(default_factory=dict)
