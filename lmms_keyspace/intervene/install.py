"""Put an intervention into a loaded model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lmms_keyspace.families import decoder_sites
from lmms_keyspace.malora.targets import skeleton

from .boost import VisualBoost
from .change import Change
from .keys import KeyMaps, affine_maps
from .moments import Statistics, read_statistics
from .spec import Spec


@dataclass(frozen=True)
class Intervention:
    """An intervention at work.

    Attributes:
        name: for records and reports, e.g. `mean_shift from 20261121_104102`.
        change: switches it off for a while, or for good.
        statistics: what it takes from a saved run; None where it takes nothing.
    """

    name: str
    change: Change
    statistics: Statistics | None = None

    def images_used(self, images: Iterable[str]) -> set[str]:
        """Those of these images (sha256) that its statistics come from."""
        return set() if self.statistics is None else set(self.statistics.images & set(images))


def prepare(spec: Spec, model_config: Any, pretrained: str) -> Statistics | None:
    """What the intervention needs from a saved run, read before the model's weights; None where it needs nothing.

    Args:
        spec: which intervention.
        model_config: transformers config of the model.
        pretrained: its name as runs record it.

    Raises:
        InputError: the run does not fit (see `moments.read_statistics`), or the architecture is unknown.
    """
    if spec.run is None:
        return None
    return read_statistics(spec.run, decoder_sites(skeleton(model_config)), pretrained)


def install(spec: Spec, statistics: Statistics | None, model: Any, *, seed: int) -> Intervention:
    """Change the forward pass of a model from now on.

    Args:
        spec: which intervention.
        statistics: what `prepare` returned.
        model: a vision-language model without an adapter.
        seed: of the random directions.
    """
    decoder = decoder_sites(model)
    if statistics is None:
        assert spec.alpha is not None
        return Intervention(f"{spec.kind}:{spec.alpha:g}", VisualBoost(decoder, spec.alpha))
    maps = affine_maps(spec.kind, statistics.layers, seed)
    name = f"{spec.kind} from {statistics.date}"
    return Intervention(name, KeyMaps(decoder, maps), statistics)
