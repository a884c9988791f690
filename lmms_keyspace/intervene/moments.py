"""Mean and spread of the base model's visual and text keys in a saved run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import Decoder
from lmms_keyspace.key_source import SavedKeys
from lmms_keyspace.records import TEXT, VISUAL, RunData, RunRecord
from lmms_keyspace.store import find_runs, read_run

_HOW = "run the base model once with --log_samples and keep_keys=on, on other documents than those to be evaluated"


@dataclass(frozen=True)
class Moments:
    """Of the keys before RoPE of one layer, per KV head and coordinate: all `[KV heads, d]`, float32."""

    mean_visual: Tensor
    mean_text: Tensor
    sd_visual: Tensor
    sd_text: Tensor


@dataclass(frozen=True)
class Statistics:
    """What an intervention takes from a saved run.

    Attributes:
        date: of the run.
        layers: layer -> moments.
        tokens: how many visual and text tokens they rest on.
        images: sha256 of every image that they come from, as `records.TOKEN_COLUMNS` has it.
    """

    date: str
    layers: dict[int, Moments]
    tokens: dict[str, int]
    images: frozenset[str]


def read_statistics(path: str, decoder: Decoder, pretrained: str) -> Statistics:
    """Moments of the keys in a saved run, every sampled token counted once, all tasks and conditions together.

    Args:
        path: folder with the files of one run, or its `<date>_results.json`.
        decoder: of the model that is to be changed.
        pretrained: its name as runs record it.

    Raises:
        InputError: no such run or several, a run that did not keep its keys, of another model, of a changed model
            without the base model's keys, or that lacks layers or one of the modalities.
    """
    data = _one_run(path)
    record = data.record
    _check_model(record, decoder, pretrained, path)
    source = SavedKeys(data)
    changed = record.adapter is not None or record.intervention is not None
    table = data.tokens
    tasks = [task for task in record.tasks if (table["task"] == task).any()]
    missing = sorted({site.layer for site in decoder.sites} - set(source.layers))
    if missing:
        raise InputError("intervene", path, f"that run captured no keys of the layers {missing}; {_HOW}")
    layers = {}
    for site in decoder.sites:
        visual, text = (
            torch.cat([source.keys(task, None, "k_pre", site.layer, side, reference=changed)[0] for task in tasks])
            for side in (VISUAL, TEXT)
        )
        if min(len(visual), len(text)) < 2:
            found = f"that run holds {len(visual)} visual and {len(text)} text keys"
            raise InputError("intervene", path, f"{found}; {_HOW}")
        layers[site.layer] = Moments(
            mean_visual=visual.double().mean(0).float(),
            mean_text=text.double().mean(0).float(),
            sd_visual=visual.double().std(0).float(),
            sd_text=text.double().std(0).float(),
        )
    used = table[table["modality"].isin([VISUAL, TEXT])]
    return Statistics(
        date=record.date,
        layers=layers,
        tokens={side: int((used["modality"] == side).sum()) for side in (VISUAL, TEXT)},
        images=frozenset(used.loc[used["modality"] == VISUAL, "image_sha"].astype(str)),
    )


def _one_run(path: str) -> RunData:
    if not Path(path).exists():
        raise InputError("intervene", path, f"no run lies there; {_HOW}")
    runs = [files for files in find_runs(Path(path)) if files.captured]
    if len(runs) != 1:
        dates = ", ".join(files.date for files in runs)
        way_out = f"it holds several runs ({dates}); give a folder with one" if runs else f"no run lies there; {_HOW}"
        raise InputError("intervene", path, way_out)
    return read_run(runs[0].folder, runs[0].date)


def _check_model(record: RunRecord, decoder: Decoder, pretrained: str, path: str) -> None:
    if record.pretrained != pretrained or record.architecture != decoder.architecture:
        raise InputError("intervene", path, f"that run is of {record.pretrained}, not of {pretrained}; {_HOW}")
    heads = {site.layer: site.n_kv_heads for site in decoder.sites}
    if record.n_kv_heads != heads:
        raise InputError("intervene", path, f"that run's model has other layers or KV heads than this one; {_HOW}")
    changed = record.adapter is not None or record.intervention is not None
    if changed and record.reference != "self":
        raise InputError("intervene", path, f"that run holds no keys of the base model (reference=none); {_HOW}")
