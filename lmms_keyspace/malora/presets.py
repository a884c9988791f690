"""MaLoRA, what it is to be compared with, and MaLoRA with one part taken away: arms of a study, by name.

All arms hold the parameters of the same MaLoRA adapter as nearly as whole ranks allow, and the same scale alpha / rank.
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig

from lmms_keyspace.errors import InputError
from lmms_keyspace.families import decoder_sites

from .config import PROJECTIONS, MaloraConfig
from .targets import find_targets, pattern, skeleton, slots

Build = Callable[[MaloraConfig, Any], PeftConfig]


@dataclass(frozen=True)
class Preset:
    """One arm.

    Attributes:
        purpose: what the arm is for.
        mmd, gram: whether its training has that term; where not, the weight of the term is 0.
        build: (the MaLoRA adapter to match, transformers config of the model) -> the arm's PEFT config.
    """

    purpose: str
    mmd: bool
    gram: bool
    build: Build

    def peft_config(self, config: MaloraConfig, model_config: Any) -> PeftConfig:
        """The arm's PEFT config.

        Args:
            config: the MaLoRA adapter whose layers, rank and alpha the arm is to match.
            model_config: transformers config of the model.

        Raises:
            InputError: no rank of the arm comes near the adapter's number of parameters.
        """
        return self.build(config, model_config)


def preset(name: str) -> Preset:
    """The arm of this name.

    Raises:
        InputError: there is none.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        way_out = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PRESETS)}."
        raise InputError("preset", name, way_out)
    return PRESETS[name]


def matched_lora_config(
    config: MaloraConfig, model_config: Any, tolerance: float = 0.02, projections: tuple[str, ...] | None = None
) -> LoraConfig:
    """The plain LoRA (Hu et al., arXiv 2106.09685) with as many parameters as a MaLoRA adapter, and its alpha / r.

    With a token gate on the keys of a multi-head model, rank 2 r + 1 is equal to 2 parameters a layer. Over several
    projections the ranks may differ by one.

    Args:
        config: the MaLoRA adapter.
        model_config: transformers config of the model.
        tolerance: largest relative difference of the parameter counts.
        projections: of q, k, v, o, for the LoRA; None takes the MaLoRA adapter's own layers.

    Raises:
        InputError: no rank comes within the tolerance; the model has no such projection, or makes it in a fused layer,
            of which a plain LoRA cannot adapt a part.
    """
    model = skeleton(model_config)
    mine = copy.deepcopy(config)
    targets = find_targets(mine, model)
    wanted = sum(
        config.parameter_count(target.in_features, target.out_features, target.heads) for target in targets.values()
    )
    decoder = decoder_sites(model)
    plain = MaloraConfig(
        target_modules=mine.target_modules if projections is None else pattern(decoder, projections),
        projections=list(PROJECTIONS),
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
    )
    fused = [name for name, parts in slots(decoder).items() if len(parts) > 1]
    cost: dict[str, int] = {}  # name of a projection -> parameters of rank 1, over all layers
    for name, target in find_targets(plain, model).items():
        if name in fused and len(target.rows) > len(projections or config.projections):
            raise InputError("projections", name, "it is a fused layer; a plain LoRA adapts all of it or nothing.")
        ending = name.rpartition(".")[2]
        cost[ending] = cost.get(ending, 0) + target.in_features + target.out_features
    ranks = _nearest_ranks(cost, wanted)
    count = sum(rank * cost[ending] for ending, rank in ranks.items())
    gap = abs(count / wanted - 1)
    if gap > tolerance:
        raise InputError(
            "r", config.r, f"the nearest plain LoRA (rank {ranks}) differs by {gap:.1%} in parameters; take a larger r."
        )
    scale = config.alpha / config.r
    rank = min(ranks.values())
    odd = {ending: value for ending, value in ranks.items() if value != rank}
    layers, target_modules = config.layers_to_transform, plain.target_modules
    if layers is not None and isinstance(target_modules, str):  # LoRA takes no layer list beside a regex
        target_modules = rf"(?=.*\.layers\.({'|'.join(map(str, layers))})\.){target_modules}"
        layers = None
    return LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]  # a float works; alpha / r is what counts
        rank_pattern=odd,
        alpha_pattern={ending: scale * value for ending, value in odd.items()},
        target_modules=target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=layers,
        lora_dropout=0.0,
    )


def _nearest_ranks(cost: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Ranks of at least 1 that differ by one at most and cost as near to `wanted` as can be."""
    base = max(1, wanted // sum(cost.values()))

    def miss(raised: tuple[str, ...]) -> int:
        return abs(sum((base + (ending in raised)) * each for ending, each in cost.items()) - wanted)

    choices = itertools.chain.from_iterable(itertools.combinations(cost, n) for n in range(len(cost) + 1))
    raised = min(choices, key=miss)
    return {ending: base + (ending in raised) for ending in cost}


def _changed(**settings: Any) -> Build:
    """The adapter itself with other settings, written down without its rank: gates cost too little to change it."""

    def build(config: MaloraConfig, model_config: Any) -> PeftConfig:
        return _with(config, **settings)

    return build


def _moka(config: MaloraConfig, model_config: Any) -> PeftConfig:
    """MokA-style with the rank that comes nearest in parameters: its one B makes room for a larger rank."""
    model = skeleton(model_config)
    targets = find_targets(copy.deepcopy(config), model).values()

    def count(candidate: MaloraConfig) -> int:
        return sum(candidate.parameter_count(t.in_features, t.out_features, t.heads) for t in targets)

    wanted, alpha_per_rank = count(config), config.alpha / config.r
    candidates = (
        _with(config, gate="none", sharing="B", r=r, alpha=alpha_per_rank * r, cross_attention=1.0)
        for r in range(1, 4 * config.r + 1)
    )
    return min(candidates, key=lambda candidate: abs(count(candidate) - wanted))


def _with(config: MaloraConfig, **settings: Any) -> MaloraConfig:
    changed = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    changed.__post_init__()
    return changed


def _lora_of(*projections: str) -> Build:
    def build(config: MaloraConfig, model_config: Any) -> PeftConfig:
        return matched_lora_config(config, model_config, projections=projections, tolerance=0.05)

    return build


PRESETS: Mapping[str, Preset] = {
    "malora": Preset("the adapter as configured, with both terms", True, True, _changed()),
    "malora_no_gate": Preset("MaLoRA minus its gate", True, True, _changed(gate="none")),
    "malora_no_mmd": Preset("MaLoRA minus its MMD term", False, True, _changed()),
    "malora_no_gram": Preset("MaLoRA minus its Gram term", True, False, _changed()),
    "modality_lora": Preset("one LoRA per modality: no gate and no terms", False, False, _changed(gate="none")),
    "lora_k": Preset("plain LoRA on the keys, equal parameters", False, False, _lora_of("k")),
    "lora_qkvo": Preset(
        "plain LoRA on queries, keys, values, outputs, equal parameters", False, False, _lora_of(*PROJECTIONS)
    ),
    "moka": Preset(
        "MokA-style (arXiv 2506.05191): an A per modality, one B, visual tokens attend to the question in rank space. "
        "On the same layers as the adapter; MokA's own adapts all linear layers",
        False,
        False,
        _moka,
    ),
}
