"""The features of pictures that a run shows several times: the vision tower passes over each of them once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lmms_keyspace.families import base_model
from lmms_keyspace.model_wrappers.pictures import Pictures

_FEATURES = "mm_encoder_outputs"  # what `generate` of transformers takes in place of pixels
_PIXELS = {"pixel_values"}


class VisualFeatures:
    """Features of a model: what its vision tower and connector make of a picture.

    Used where a model takes features in place of pixels, makes them of the pixels alone, and makes one entry of each
    picture; where not, the model gets the pixels.

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

    def inputs(self, inputs: Mapping[str, Any], images: Sequence[Sequence[Any]], pictures: Pictures) -> dict[str, Any]:
        """What `generate` takes: `inputs`, with features in place of pixels where a picture of them is shown again.

        Args:
            inputs: the processor's output for a batch.
            images: per row of the batch, in order.
            pictures: of the run; keeps the features of those that later batches show.
        """
        shown, pixels = [image for row in images for image in row], inputs.get("pixel_values")
        by_picture = self._needs & set(inputs) == _PIXELS and len(pixels) == len(shown)
        if not by_picture or not pictures.features.repeated(shown):
            return dict(inputs)
        first = {id(image): place for place, image in reversed(list(enumerate(shown)))}

        def make(new: list[Any]) -> Sequence[torch.Tensor] | None:
            made = self._encode(pixel_values=pixels[[first[id(image)] for image in new]], return_dict=True)
            self._one_tensor = isinstance(made.pooler_output, torch.Tensor)
            return made.pooler_output if len(made.pooler_output) == len(new) else None

        features = pictures.features.of(shown, make)
        if features is None:
            self._needs = set()
            return dict(inputs)
        pooled = torch.stack(features) if self._one_tensor else features
        others = {name: value for name, value in inputs.items() if name not in _PIXELS}
        return others | {_FEATURES: {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}
