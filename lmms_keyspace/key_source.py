"""Where captured keys come from: a capture that is still held in memory, or the files of a run with `keep_keys`."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
import torch

from lmms_keyspace.errors import InputError
from lmms_keyspace.records import RunData


class KeySource(Protocol):
    """Captured vectors of a run; `capture.Capture` is one."""

    @property
    def layers(self) -> list[int]:
        """The layers captured, ascending."""
        ...

    def token_table(self) -> pd.DataFrame:
        """Captured tokens with `records.TOKEN_COLUMNS`, ordered by task, condition, cluster, document, position."""
        ...

    def keys(
        self,
        task: str,
        condition: str | None = None,
        space: str = "k_pre",
        layer: int = 0,
        modality: str | None = None,
        *,
        reference: bool = False,
    ) -> tuple[torch.Tensor, list[str]]:
        """Vectors `[N, heads, d]` of the chosen tokens in the order of the table, and the cluster of each.

        Args:
            task, condition, modality: which tokens; None takes all.
            space, layer: which vectors.
            reference: those of the base model at the same tokens.

        Raises:
            InputError: vectors that the source does not have.
        """
        ...


class SavedKeys:
    """The keys in the files of a run.

    Args:
        data: a run that saved all keys it sampled.
        device: where the vectors are put.

    Raises:
        InputError: the run kept only the sample of keys that is for pictures.
    """

    def __init__(self, data: RunData, device: torch.device | str = "cpu") -> None:
        if (data.tokens["keys_row"] < 0).any() or not data.record.capture_settings.get("keep_keys"):
            raise InputError(
                "run", data.record.date, "the keys of this run were not kept; run it again with keep_keys=on"
            )
        self._data = data
        self._device = torch.device(device)

    @property
    def layers(self) -> list[int]:
        """The layers captured, ascending."""
        return sorted(self._data.record.layers)

    def token_table(self) -> pd.DataFrame:
        """The token table of the run."""
        return self._data.tokens

    def keys(
        self,
        task: str,
        condition: str | None = None,
        space: str = "k_pre",
        layer: int = 0,
        modality: str | None = None,
        *,
        reference: bool = False,
    ) -> tuple[torch.Tensor, list[str]]:
        """See `KeySource.keys`; one layer is read from disk at a time, float32."""
        name = f"{space}/{layer}/base" if reference else f"{space}/{layer}"
        saved = self._data.keys.get(task, {})
        if name not in saved:
            raise InputError("keys", name, f"{task} of this run has {', '.join(sorted(saved)) or 'none'}")
        table = self._data.tokens
        chosen = (table["task"] == task).to_numpy(copy=True)
        for column, wanted in (("condition", condition), ("modality", modality)):
            if wanted is not None:
                chosen &= (table[column] == wanted).to_numpy()
        picked = table[chosen]
        vectors = saved[name][picked["keys_row"].to_numpy(np.int64)]
        return torch.from_numpy(vectors).to(self._device), picked["cluster"].tolist()
