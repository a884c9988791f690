"""Configuration of a MaLoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from lmms_keyspace.errors import InputError

GATES = ("none", "modality", "token", "head")
SHARING = ("none", "A", "B")
PROJECTIONS = ("q", "k", "v", "o")  # of an attention layer, in the order in which fused layers stack the first three


@dataclass
class MaloraConfig(PeftConfig):
    """Configuration of Gated Modality LoRA, the adapter of MaLoRA (arXiv 2510.26721).

    The paper's abstract names the parts; the formula is this project's own reading of it (see `layer.py`). With the
    defaults the keys of all decoder layers are adapted, by one gated product of rank 8 per modality.

    Args:
        r: rank of each modality's update.
        alpha: a modality's update is scaled by alpha / rank.
        gate: what the update is multiplied by. `none`: 1. `modality`: sigmoid(c_m), one learned number per modality.
            `token`: sigmoid(w_m . x / sqrt(d) + c_m). `head`: as `token`, with a w and c of its own for every
            attention head of the projection's output. All start at 0.5.
        projections: which of q, k, v, o to adapt. They choose the layers where `target_modules` is None, and the rows
            of a fused `qkv_proj` in any case.
        sharing: what the modalities have in common: `none`; `A`, one A and a B per modality; `B`, an A per modality
            and one B, as in MokA (arXiv 2506.05191).
        r_visual, r_text: rank of one modality; None takes r. Sharing needs equal ranks.
        alpha_visual, alpha_text: alpha of one modality; None takes alpha.
        shared_r: rank of a further branch that adapts every token alike, without a gate; 0 for none.
        shared_alpha: the shared branch is scaled by shared_alpha / shared_r; None takes alpha.
        cross_attention: weight w of MokA's attention from visual to question tokens in rank space; 0 for none. Needs
            sharing B and no gate. It is not causal: see `layer.py`.
        target_modules: regex over full module names, or a list of name endings; None takes the `projections` of the
            decoder, found in the model, and writes the pattern here. Linear layers of the decoder only: a match
            outside it is an error.
        exclude_modules: regex or list of name endings to leave out.
        layers_to_transform: indices of the decoder layers to adapt; None adapts all.
        init_weights: True starts as the identity (A Kaiming, B zero, gates at 0.5); False draws every weight at
            random, for tests.
        modules_to_save: further modules to train and to save with the adapter.

    Raises:
        InputError: a value outside these rules.
    """

    r: int = field(default=8, metadata={"help": "Rank of each modality's update."})
    alpha: float = field(default=16.0, metadata={"help": "The update is scaled by alpha / r."})
    gate: str = field(default="token", metadata={"help": f"One of {GATES}."})
    projections: list[str] = field(
        default_factory=lambda: ["k"], metadata={"help": f"Projections to adapt, of {PROJECTIONS}."}
    )
    sharing: str = field(default="none", metadata={"help": f"Matrix that the modalities share, one of {SHARING}."})
    r_visual: int | None = field(default=None, metadata={"help": "Rank of the visual update; None takes r."})
    r_text: int | None = field(default=None, metadata={"help": "Rank of the text update; None takes r."})
    alpha_visual: float | None = field(default=None, metadata={"help": "Alpha of visual tokens; None takes alpha."})
    alpha_text: float | None = field(default=None, metadata={"help": "Alpha of text tokens; None takes alpha."})
    shared_r: int = field(default=0, metadata={"help": "Rank of an update of all tokens alike; 0 for none."})
    shared_alpha: float | None = field(default=None, metadata={"help": "Alpha of that update; None takes alpha."})
    cross_attention: float = field(
        default=0.0, metadata={"help": "Weight of attention from visual to question tokens in rank space (MokA)."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Regex or list of name endings; None takes the projections of the decoder."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Regex or list of name endings to leave out."}
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers to adapt; None adapts all."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False draws every weight at random, for tests."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and to save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MALORA")
        _whole("r", self.r, 1)
        for name in ("r_visual", "r_text"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("shared_r", self.shared_r, 0)
        _number("alpha", self.alpha, above=0)
        for name in ("alpha_visual", "alpha_text", "shared_alpha"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), above=0)
        _number("cross_attention", self.cross_attention, least=0)
        _choice("gate", self.gate, GATES)
        _choice("sharing", self.sharing, SHARING)
        if self.sharing != "none" and len(set(self.ranks)) > 1:
            raise InputError("r_visual", self.ranks, f"sharing={self.sharing} needs equal ranks; give r alone.")
        if self.cross_attention and (self.sharing != "B" or self.gate != "none"):
            raise InputError("cross_attention", self.cross_attention, "it needs sharing='B' and gate='none'.")
        if self.shared_alpha is not None and not self.shared_r:
            raise InputError("shared_alpha", self.shared_alpha, "there is no shared branch; give shared_r too.")
        if not isinstance(self.projections, list) or not self.projections:
            raise InputError("projections", self.projections, f"give a list of names of {', '.join(PROJECTIONS)}.")
        for projection in self.projections:
            _choice("projections", projection, PROJECTIONS)
        if self.target_modules is not None and not self.target_modules:
            raise InputError("target_modules", self.target_modules, "name layers, or leave it out for the keys.")
        layers = self.layers_to_transform
        if layers is not None and not (
            isinstance(layers, list) and layers and all(isinstance(i, int) and i >= 0 for i in layers)
        ):
            raise InputError("layers_to_transform", layers, "give a list of layer indices from 0, or None for all.")

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank of the visual and of the text update."""
        return self.r_visual or self.r, self.r_text or self.r

    @property
    def scalings(self) -> tuple[float, float, float]:
        """alpha / rank of the visual, the text and the shared update (0 without one)."""
        visual, text = self.ranks
        shared = (self.shared_alpha or self.alpha) / self.shared_r if self.shared_r else 0.0
        return (self.alpha_visual or self.alpha) / visual, (self.alpha_text or self.alpha) / text, shared

    @property
    def down_rows(self) -> int:
        """Rows of A: visual, text, shared; the first two are one under sharing A."""
        return (self.ranks[0] if self.sharing == "A" else sum(self.ranks)) + self.shared_r

    @property
    def up_columns(self) -> int:
        """Columns of B: visual, text, shared; the first two are one under sharing B."""
        return (self.ranks[0] if self.sharing == "B" else sum(self.ranks)) + self.shared_r

    def gate_outputs(self, heads: int = 0) -> int:
        """Numbers that the gates make of one token, both modalities together; `heads` of the projection's output."""
        return {"none": 0, "modality": 2, "token": 2, "head": 2 * heads}[self.gate]

    def parameter_count(self, in_features: int, out_features: int, heads: int = 0) -> int:
        """Trainable parameters that the adapter adds to one linear layer.

        Args:
            in_features, out_features: widths of the layer; of a fused layer the rows of `projections` alone.
            heads: attention heads of the output; the gate `head` needs them.
        """
        gates = self.gate_outputs(heads) * (1 if self.gate == "modality" else in_features + 1)
        return self.down_rows * in_features + self.up_columns * out_features + gates


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        way_out = "give a rank of at least 1." if least else "give a whole number of at least 0."
        raise InputError(name, value, way_out)


def _number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (above is not None and value <= above) or (least is not None and value < least):
        raise InputError(name, value, "give a positive number." if least is None else "give a number of at least 0.")


def _choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(name, value, f"choose one of {', '.join(choices)}.")
