"""Measure the divergence of a run: every task, condition, space and layer of a source of keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from lmms_keyspace import divergence
from lmms_keyspace.key_source import KeySource
from lmms_keyspace.records import DIVERGENCE_COLUMNS, TEXT, VISUAL, GramKey, KernelSums, empty_table

Bandwidths = dict[str, dict[str, dict[int, list[float]]]]  # task -> space -> layer -> squared, per KV head


@dataclass(frozen=True)
class Measured:
    """The divergence table of a run, the kernel sums it rests on, and the bandwidths of its kernels."""

    table: pd.DataFrame
    gram: dict[GramKey, KernelSums]
    bandwidths: Bandwidths


NOTHING_MEASURED = Measured(empty_table(DIVERGENCE_COLUMNS), {}, {})


def measure_run(
    source: KeySource,
    *,
    conditions: Mapping[str, Sequence[str]],
    spaces: Sequence[str],
    reference: bool,
    bandwidth_source: str,
    connector: str,
    seed: int,
) -> Measured:
    """Divergence of visual from text keys for every task, condition and space.

    Args:
        source: the captured keys.
        conditions: task -> its conditions.
        spaces: which vectors.
        reference: take the bandwidths from the source's reference keys, those of the base model.
        bandwidth_source, connector: written into the rows.
        seed: of everything that is drawn.

    Raises:
        InputError: keys that are not finite or that have no bandwidth.
    """
    bandwidths: Bandwidths = {}
    tables: list[pd.DataFrame] = []
    gram: dict[GramKey, KernelSums] = {}
    for task, names in conditions.items():
        for space in spaces:
            found = _bandwidths(source, task, space, reference=reference, seed=seed)
            bandwidths.setdefault(task, {})[space] = {layer: values.tolist() for layer, values in found.items()}
            for condition in names if found else ():
                visual, clusters_visual, text, clusters_text = _sides(source, task, condition, space)
                table, sums = divergence.measure(
                    visual,
                    text,
                    clusters_visual=clusters_visual,
                    clusters_text=clusters_text,
                    task=task,
                    condition=condition,
                    space=space,
                    bandwidth2=found,
                    bandwidth_source=bandwidth_source,
                    connector=connector,
                    token_filter=f"{VISUAL} against {TEXT}",
                    seed=seed,
                )
                tables.append(table)
                gram.update(sums)
    table = pd.concat(tables, ignore_index=True) if tables else empty_table(DIVERGENCE_COLUMNS)
    return Measured(table, gram, bandwidths)


def _sides(
    source: KeySource, task: str, condition: str | None, space: str, *, reference: bool = False
) -> tuple[dict[int, torch.Tensor], list[str], dict[int, torch.Tensor], list[str]]:
    """Visual and text keys by layer, each with the cluster of every row."""
    keys: dict[str, dict[int, torch.Tensor]] = {VISUAL: {}, TEXT: {}}
    clusters: dict[str, list[str]] = {VISUAL: [], TEXT: []}
    for modality in (VISUAL, TEXT):
        for layer in source.layers:
            keys[modality][layer], clusters[modality] = source.keys(
                task, condition, space, layer, modality, reference=reference
            )
    return keys[VISUAL], clusters[VISUAL], keys[TEXT], clusters[TEXT]


def _bandwidths(source: KeySource, task: str, space: str, *, reference: bool, seed: int) -> dict[int, np.ndarray]:
    """Squared bandwidths per layer and KV head; empty when the task shows no image or no text."""
    visual, _, text, _ = _sides(source, task, None, space, reference=reference)
    if not any(len(side) for keys in (visual, text) for side in keys.values()):
        return {}
    return divergence.reference_bandwidths(visual, text, seed=seed)
