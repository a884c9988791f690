"""What the keys and the attention say: rows of the comparison from the captured files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
ALL_LAYERS, *LAYER_BANDS = ("all", "early", "middle", "late")


def attention_rows(task: str, runs: Sequence[Run]) -> Iterator[Row]:
    """Attention mass of the last prompt token on image tokens, over all layers and by thirds of the depth."""
    captured = [(run, image_mass(run.loaded.data, task)) for run in runs if run.loaded.data]
    captured = [(run, mass) for run, mass in captured if len(mass)]
    if not captured:
        return
    layers = sorted(set.intersection(*(set(mass["layer"]) for _, mass in captured)))
    for band, members in layer_bands(layers).items():
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


def layer_bands(layers: Sequence[int]) -> dict[str, list[int]]:
    """All layers, and thirds of the depth where there are three layers or more."""
    bands = {ALL_LAYERS: list(layers)}
    if len(layers) >= len(LAYER_BANDS):
        bands |= dict(zip(LAYER_BANDS, (list(part) for part in np.array_split(layers, len(LAYER_BANDS))), strict=True))
    return bands


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


def mmd2_rows(task: str, runs: Sequence[Run]) -> Iterator[Row]:
    """MMD^2 between visual and text keys, mean over layers and KV heads, from the saved kernel sums."""
    captured = [(run, _layers_of(run.loaded.data, task)) for run in runs if run.loaded.data]
    captured = [(run, layers) for run, layers in captured if layers]
    if not captured:
        return
    shared = sorted(set.intersection(*(set(layers) for _, layers in captured)))
    first: tuple[Run, KernelSums] | None = None
    for run, _ in captured:
        assert run.loaded.data is not None
        sums = _mean_over_layers(run.loaded.data, task, shared)
        value = float(stats.mmd2_from_sums(sums))
        row = Row(task, "mmd2", "MMD² of keys", MMD2, 0, run.label, len(sums.clusters), value)
        row = extended(row, _jackknife, sums)
        if first is None:
            yield row
            first = run, sums
        elif _same_bandwidths(first[0].loaded.data, run.loaded.data, task, shared):
            yield extended(row, _mmd2_change, first[1], sums)
        else:
            yield noted(
                row, f"{NOT_COMPARABLE}: the kernel bandwidths differ (reference={run.loaded.data.record.reference})"
            )


def _layers_of(data: RunData, task: str) -> list[int]:
    condition = main_condition(data, task)
    return [key.layer for key in data.gram if key == GramKey(task, condition or "", KEY_SPACE, key.layer)]


def _mean_over_layers(data: RunData, task: str, layers: Sequence[int]) -> KernelSums:
    """Sums whose MMD^2 is the mean over layers and heads; the statistic is linear in the sums."""
    condition = main_condition(data, task) or ""
    total: list[np.ndarray] = []
    for layer in layers:
        sums = stats.mean_over_heads(data.gram[GramKey(task, condition, KEY_SPACE, layer)])
        parts = [sums.vv, sums.tt, sums.vt]
        total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
    vv, tt, vt = (part / len(layers) for part in total)
    return KernelSums(vv, tt, vt, sums.n_visual, sums.n_text, sums.clusters)


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


def js_rows(task: str, runs: Sequence[Run]) -> Iterator[Row]:
    """The classifier bound on the Jensen-Shannon divergence, mean over layers and KV heads, from the saved losses."""
    captured = [(run, _losses_of(run.loaded.data, task)) for run in runs if run.loaded.data]
    captured = [(run, losses) for run, losses in captured if losses]
    if not captured:
        return
    shared = sorted(set.intersection(*(set(losses) for _, losses in captured)))
    first: HeldOutLoss | None = None
    for run, losses in captured:
        assert run.loaded.data is not None
        loss = stats.mean_losses([losses[layer] for layer in shared])
        value, low, high = (float(number) for number in stats.js_bootstrap(loss))
        table = js_by_layer(run.loaded.data, task)
        ceiling = int(table["at_ceiling"].sum())
        row = Row(
            task,
            "js",
            "JS of keys",
            NATS,
            0,
            run.label,
            len(loss.clusters),
            value,
            low,
            high,
            note=f"at the ln 2 ceiling in {ceiling} of {len(table)} layers" if ceiling else "",
        )
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
