"""The features of pictures that a run shows several times: the vision tower passes over each of them once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lmms_keyspace.families import base_model
from lmms_keyspace.model_wrappers.kept import Made, by_picture, joined
from lmms_keyspace.model_wrappers.pictures import Pictures

_FEATURES = "mm_encoder_outputs"  # what `generate` of transformers takes in place of pixels


class VisualFeatures:
    """Features of a model: what its vision tower and connector make of a picture.

    Used where a model takes features in place of pixels and makes one tensor of each picture; where not, the model gets
    the pixels.

    Args:
        model: a vision-language model of transformers, or a PeftModel around one.
    """

    def __init__(self, model: Any) -> None:
        base = base_model(model)
        self._encode: Any = getattr(base.base_model, "get_image_features", None)
        self._needs: set[str] = set()  # inputs that make features
        if self._encode is not None and _FEATURES in inspect.signature(base.forward).parameters:
            self._needs = set(inspect.signature(self._encode).parameters)
        self._one_tensor = False  # the features of several pictures are `[n, tokens, width]`, not a list

    def crowded(self, pictures: Pictures, numbers: Callable[[], int]) -> bool:
        """Whether those of all pictures that are shown again do not find room together.

        Args:
            pictures: of the run.
            numbers: says how many the features of one are; asked only where some are shown again.
        """
        again = pictures.features.shown_again if self._needs else 0
        return again > 0 and again * numbers() > pictures.features.room

    def inputs(
        self, inputs: Mapping[str, Any], shown: Sequence[Sequence[Hashable]], pictures: Pictures
    ) -> dict[str, Any]:
        """What `generate` without beams takes: `inputs`, with features in place of pixels where a picture of them is
        shown again.

        Args:
            inputs: the processor's output for a batch.
            shown: names of the pictures, per row of the batch, in order.
            pictures: of the run; keeps the features of those that later batches show.
        """
        names = [name for row in shown for name in row]
        apart = by_picture({name: inputs[name] for name in self._needs if name in inputs}, len(names))
        if apart is None or not pictures.features.repeated(names):
            return dict(inputs)
        pixels = dict(zip(names, apart, strict=True))

        def make(new: list[Hashable]) -> list[Made] | None:
            together = joined([pixels[name] for name in new])
            made = self._encode(**together, return_dict=True) if together else {}
            features = made.get("pooler_output")
            # Qwen3-VL hands features of several layers to its decoder.
            if features is None or len(features) != len(new) or made.get("deepstack_features") is not None:
                return None
            self._one_tensor = isinstance(features, torch.Tensor)
            return [{"features": one} for one in features]

        made = pictures.features.of(names, make)
        if made is None:
            self._needs = set()
            return dict(inputs)
        in_order = [one["features"] for one in made]
        pooled = torch.stack(in_order) if self._one_tensor else in_order
        others = {name: value for name, value in inputs.items() if name != "pixel_values"}
        return others | {_FEATURES: {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}
