"""Measure the divergence of a run: every task, condition, space and layer of a source of keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.divergence import LayerKeys, Measurement, measure, median_bandwidth2
from lmms_keyspace.divergence.arrays import Floats
from lmms_keyspace.divergence.measure import N_PERMUTATIONS
from lmms_keyspace.errors import InputError
from lmms_keyspace.key_source import KeySource
from lmms_keyspace.records import (
    DIVERGENCE_COLUMNS,
    TEMPLATE,
    TEXT,
    VISUAL,
    GramKey,
    HeldOutLoss,
    KernelSums,
    empty_table,
)

Bandwidths = dict[str, dict[str, dict[int, list[float]]]]  # task -> space -> layer -> squared, per KV head


@dataclass(frozen=True)
class Measured:
    """The divergence table of a run, what it rests on, and the bandwidths of its kernels."""

    table: pd.DataFrame
    gram: Mapping[GramKey, KernelSums] = field(default_factory=dict)
    losses: Mapping[GramKey, HeldOutLoss] = field(default_factory=dict)
    bandwidths: Bandwidths = field(default_factory=dict)


NOTHING_MEASURED = Measured(empty_table(DIVERGENCE_COLUMNS))


@dataclass(frozen=True)
class Measuring:
    """What of a source is measured, and how.

    Attributes:
        conditions: task -> its conditions.
        reference: whether the source has the base model's keys, too. The bandwidths come from them.
        bandwidth_source, connector: written into the rows.
        seed: of everything that is drawn.
        given: bandwidths of another run, to be used instead of the source's own.
    """

    source: KeySource
    conditions: Mapping[str, Sequence[str]]
    reference: bool
    bandwidth_source: str
    connector: str
    seed: int
    n_permutations: int = N_PERMUTATIONS
    given: Bandwidths | None = None

    def run(self, spaces: Sequence[str]) -> Measured:
        """Every task, condition and space."""
        parts: list[Measurement] = []
        bandwidths: Bandwidths = {}
        for task, names in self.conditions.items():
            for space in spaces:
                found = self.bandwidths(task, space)
                bandwidths.setdefault(task, {})[space] = {
                    layer: width2.tolist() for layer, width2 in found.items() if not isinstance(width2, InputError)
                }
                parts += [self.part(task, condition, space, found) for condition in names]
        tables = [part.table for part in parts if len(part.table)]
        return Measured(
            table=pd.concat(tables, ignore_index=True) if tables else NOTHING_MEASURED.table,
            gram={key: sums for part in parts for key, sums in part.gram.items()},
            losses={key: loss for part in parts for key, loss in part.losses.items()},
            bandwidths=bandwidths,
        )

    def part(self, task: str, condition: str, space: str, bandwidths: Mapping[int, Floats | InputError]) -> Measurement:
        """One task, condition and space; a layer at a time is in memory."""
        return measure(
            self._layers(task, condition, space, bandwidths),
            task=task,
            condition=condition,
            space=space,
            bandwidth_source=self.bandwidth_source,
            connector=self.connector,
            seed=self.seed,
            n_permutations=self.n_permutations,
        )

    def bandwidths(self, task: str, space: str) -> dict[int, Floats | InputError]:
        """Squared bandwidth per KV head of every layer, from all conditions of the task, or why there is none."""
        return {layer: self._bandwidth(task, space, layer) for layer in self.source.layers}

    def _bandwidth(self, task: str, space: str, layer: int) -> Floats | InputError:
        if self.given is not None:
            given = self.given.get(task, {}).get(space, {})
            if layer in given:
                return np.asarray(given[layer])
            return InputError("reference", f"layer {layer} of {task}, {space}", "the reference run did not measure it")
        x, y = (
            self._keys(task, None, space, layer, modality, reference=self.reference)[0] for modality in (VISUAL, TEXT)
        )
        try:
            return median_bandwidth2(x.transpose(0, 1), y.transpose(0, 1), seed=self.seed)
        except InputError as error:
            return InputError(f"keys of layer {layer}, {error.argument}", error.value, error.way_out)

    def _layers(
        self, task: str, condition: str, space: str, bandwidths: Mapping[int, Floats | InputError]
    ) -> Iterator[LayerKeys]:
        sides = (VISUAL, TEXT)
        for layer in self.source.layers:
            (visual, clusters_visual), (text, clusters_text) = (
                self._keys(task, condition, space, layer, modality) for modality in sides
            )
            whole = [self.source.keys(task, condition, space, layer, modality) for modality in sides]
            has_sinks = any(len(keys) > len(kept) for (keys, _), kept in zip(whole, (visual, text), strict=True))
            template = [self._keys(task, condition, space, layer, modality) for modality in TEMPLATE]
            around = torch.cat([keys for keys, _ in template])
            unrotated = [self._keys(task, condition, "k_pre", layer, side)[0] for side in sides]
            base = [
                self._keys(task, condition, space, layer, side, reference=True)[0] for side in sides * self.reference
            ]
            yield LayerKeys(
                layer=layer,
                visual=visual,
                text=text,
                clusters_visual=clusters_visual,
                clusters_text=clusters_text,
                bandwidth2=bandwidths[layer],
                other_text={
                    other: self._keys(other, condition if condition in names else None, space, layer, TEXT)
                    for other, names in self.conditions.items()
                    if other != task
                },
                unrotated=(unrotated[0], unrotated[1]) if space == "k_post" else None,
                base=(base[0], base[1]) if base else None,
                with_sinks=(whole[0], whole[1]) if has_sinks else None,
                template=(around, [name for _, names in template for name in names]) if len(around) else None,
            )

    def _keys(
        self, task: str, condition: str | None, space: str, layer: int, modality: str, *, reference: bool = False
    ) -> tuple[torch.Tensor, list[str]]:
        """Keys of the source without attention sinks, and their clusters."""
        keys, clusters = self.source.keys(task, condition, space, layer, modality, reference=reference)
        table = self.source.token_table()
        chosen = (table["task"] == task) & (table["modality"] == modality)
        if condition is not None:
            chosen &= table["condition"] == condition
        kept = np.flatnonzero(~table.loc[chosen, "sink"].to_numpy(dtype=bool))
        return keys[torch.from_numpy(kept).to(keys.device)], [clusters[i] for i in kept]
