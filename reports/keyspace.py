"""What the keys and the attention say: rows of the comparison from the captured files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.outcomes import CLEAN
from lmms_keyspace.records import (
    ALL_HEADS,
    NOT_COMPARABLE,
    VISUAL_TEXT,
    GramKey,
    HeldOutLoss,
    KernelSums,
    RunData,
)
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.rows import MMD2, NATS, SHARE, Row, extended, interval, noted, paired

KEY_SPACE = "k_pre"
ALL_LAYERS, *LAYER_BANDS = BANDS = ("all", "early", "middle", "late")


def attention_rows(task: str, runs: Sequence[Run], bands: Collection[str] = BANDS) -> Iterator[Row]:
    """Attention mass of the last prompt token on image tokens, over all layers and by thirds of the depth."""
    captured = [(run, image_mass(run.loaded.data, task)) for run in runs if run.loaded.data]
    captured = [(run, mass) for run, mass in captured if len(mass)]
    if not captured:
        return
    layers = sorted(set.intersection(*(set(mass["layer"]) for _, mass in captured)))
    for band, members in layer_bands(layers, bands).items():
        label = "Attention to image" + _of_band(band)
        base: pd.DataFrame | None = None
        for run, mass in captured:
            chosen = mass[mass["layer"].isin(members)]
            rows = chosen.groupby(["doc_id", "cluster"], as_index=False)["mass_image"].mean()
            row = Row(
                task, f"image_mass_{band}", label, SHARE, 0, run.label, len(rows), float(rows["mass_image"].mean())
            )
            row = extended(row, interval, rows["mass_image"], rows["cluster"])
            yield row if base is None else extended(row, paired, base, rows, "mass_image", "cluster")
            base = rows if base is None else base


def layer_bands(layers: Sequence[int], wanted: Collection[str] = BANDS) -> dict[str, list[int]]:
    """All layers, and thirds of the depth where there are three layers or more; of these the wanted."""
    bands = {ALL_LAYERS: list(layers)}
    if len(layers) >= len(LAYER_BANDS):
        bands |= dict(zip(LAYER_BANDS, (list(part) for part in np.array_split(layers, len(LAYER_BANDS))), strict=True))
    return {band: members for band, members in bands.items() if band in wanted}


def image_mass_by_cluster(data: RunData, task: str) -> dict[str, pd.Series]:
    """Attention mass on image tokens, mean by cluster, under the names of `attention_rows`."""
    mass = image_mass(data, task)
    bands = layer_bands(sorted(set(mass["layer"]))) if len(mass) else {}
    return {
        f"image_mass_{band}": mass[mass["layer"].isin(members)].groupby("cluster")["mass_image"].mean()
        for band, members in bands.items()
    }


def _of_band(band: str) -> str:
    return "" if band == ALL_LAYERS else f", {band} layers"


def _banded(name: str, label: str, band: str) -> tuple[str, str]:
    """Name and label of a divergence over a band of layers; that over all has the plain ones."""
    return name if band == ALL_LAYERS else f"{name}_{band}", label + _of_band(band)


def image_mass(data: RunData, task: str) -> pd.DataFrame:
    table = data.attention
    chosen = (
        (table["task"] == task)
        & (table["condition"] == main_condition(data, task))
        & (table["head_group"] == ALL_HEADS)
        & (table["n_image"] > 0)
    )
    return table.loc[chosen, ["doc_id", "cluster", "layer", "mass_image"]].astype({"mass_image": float})


def main_condition(data: RunData, task: str) -> str | None:
    """The condition in which attention and divergence are reported: the undisturbed one; None: nothing captured."""
    record = data.record.tasks.get(task)
    if record is None or not record.conditions:
        return None
    return CLEAN if CLEAN in record.conditions else record.conditions[0]


def mmd2_rows(task: str, runs: Sequence[Run], bands: Collection[str] = BANDS) -> Iterator[Row]:
    """MMD^2 between visual and text keys, mean over KV heads and over all or a band of layers, from the kernel sums."""
    captured = [(run, _sums_by_layer(run.loaded.data, task)) for run in runs if run.loaded.data]
    captured = [(run, sums) for run, sums in captured if sums]
    if not captured:
        return
    shared = sorted(set.intersection(*(set(sums) for _, sums in captured)))
    for band, layers in layer_bands(shared, bands).items():
        first: tuple[Run, KernelSums] | None = None
        for run, by_layer in captured:
            assert run.loaded.data is not None
            sums = _mean_over_layers([by_layer[layer] for layer in layers])
            value = float(stats.mmd2_from_sums(sums))
            name, label = _banded("mmd2", "MMD² of keys", band)
            row = Row(task, name, label, MMD2, 0, run.label, len(sums.clusters), value)
            row = extended(row, _jackknife, sums)
            if first is None:
                yield row
                first = run, sums
            elif _same_bandwidths(first[0].loaded.data, run.loaded.data, task, layers):
                yield extended(row, _mmd2_change, first[1], sums)
            else:
                reference = run.loaded.data.record.reference
                yield noted(row, f"{NOT_COMPARABLE}: the kernel bandwidths differ (reference={reference})")


def _sums_by_layer(data: RunData, task: str) -> dict[int, KernelSums]:
    """Layer -> sums in the undisturbed condition, mean over KV heads; each is read once."""
    condition = main_condition(data, task) or ""
    return {
        key.layer: stats.mean_over_heads(data.gram[key])
        for key in data.gram
        if key == GramKey(task, condition, KEY_SPACE, key.layer)
    }


def _mean_over_layers(by_layer: Sequence[KernelSums]) -> KernelSums:
    """Sums whose MMD^2 is the mean over layers; the statistic is linear in the sums."""
    vv, tt, vt = (np.mean([getattr(sums, name) for sums in by_layer], axis=0) for name in ("vv", "tt", "vt"))
    return replace(by_layer[0], vv=vv, tt=tt, vt=vt)


def _same_bandwidths(a: RunData | None, b: RunData | None, task: str, layers: Sequence[int]) -> bool:
    assert a is not None
    assert b is not None
    tables = [data.record.bandwidths.get(task, {}).get(KEY_SPACE, {}) for data in (a, b)]
    return all(
        layer in tables[0]
        and layer in tables[1]
        and len(tables[0][layer]) == len(tables[1][layer])
        and np.allclose(tables[0][layer], tables[1][layer], rtol=1e-3, atol=0)
        for layer in layers
    )


def _jackknife(sums: KernelSums) -> dict[str, Any]:
    result = stats.mmd2_jackknife(sums)
    return {"low": float(result.low), "high": float(result.high)}


def _mmd2_change(base: KernelSums, run: KernelSums) -> dict[str, Any]:
    return _change(stats.paired_mmd2_difference(base, run))


def _change(result: stats.PairedChange) -> dict[str, Any]:
    return {
        "delta": float(result.delta),
        "delta_low": float(result.low),
        "delta_high": float(result.high),
        "p": float(result.p),
        "mde": float(result.mde),
    }


def js_rows(task: str, runs: Sequence[Run], bands: Collection[str] = BANDS) -> Iterator[Row]:
    """The classifier bound on the Jensen-Shannon divergence, mean over KV heads and over all or a band of layers, from
    the saved losses."""
    captured = [(run, _losses_of(run.loaded.data, task)) for run in runs if run.loaded.data]
    captured = [(run, losses) for run, losses in captured if losses]
    if not captured:
        return
    shared = sorted(set.intersection(*(set(losses) for _, losses in captured)))
    for band, layers in layer_bands(shared, bands).items():
        first: HeldOutLoss | None = None
        for run, losses in captured:
            assert run.loaded.data is not None
            loss = stats.mean_losses([losses[layer] for layer in layers])
            value, low, high = (float(number) for number in stats.js_bootstrap(loss))
            table = js_by_layer(run.loaded.data, task)
            ceiling = int(table.loc[table["layer"].isin(layers), "at_ceiling"].sum())
            name, label = _banded("js", "JS of keys", band)
            row = Row(task, name, label, NATS, 0, run.label, len(loss.clusters), value, low, high)
            if ceiling:
                row = noted(row, f"at the ln 2 ceiling in {ceiling} of {len(layers)} layers")
            if first is None:
                yield row
                first = loss
            else:
                yield extended(row, _js_change, first, loss)


def _losses_of(data: RunData, task: str) -> dict[int, HeldOutLoss]:
    """Layer -> losses of visual against text in the undisturbed condition."""
    wanted = (task, main_condition(data, task), KEY_SPACE, VISUAL_TEXT)
    return {
        key.layer: data.losses[key]
        for key in data.losses
        if (key.task, key.condition, key.space, key.contrast) == wanted
    }


def _js_change(base: HeldOutLoss, run: HeldOutLoss) -> dict[str, Any]:
    return _change(stats.paired_js_difference(base, run))


def js_by_layer(data: RunData, task: str) -> pd.DataFrame:
    """The rows of the divergence table with the JS bound of visual against text, one per layer."""
    table = data.divergence
    chosen = (
        (table["task"] == task)
        & (table["condition"] == main_condition(data, task))
        & (table["space"] == KEY_SPACE)
        & (table["contrast"] == VISUAL_TEXT)
        & (table["estimator"] == "js_classifier")
        & (table["head"] == ALL_HEADS)
    )
    return table[chosen].sort_values("layer")
