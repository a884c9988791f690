"""Configuration of a MaLoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from lmms_keyspace.errors import InputError

GATES = ("none", "modality", "token")
# Key projections of the decoder in the layouts that transformers 5 uses. A vision tower has a `k_proj` too, hence
# `language_model`; the tuner checks the match against the module tree as well.
DECODER_KEYS = r".*language_model\..*self_attn\.k_proj"


@dataclass
class MaloraConfig(PeftConfig):
    """Configuration of Gated Modality LoRA, the adapter of MaLoRA (arXiv 2510.26721).

    The paper's abstract names the parts; the formula is this project's own reading of it (see `layer.py`).

    Args:
        r: rank of each modality's update, so a layer has two products of rank r.
        alpha: the update is scaled by alpha / r.
        gate: what the update is multiplied by. `none`: 1. `modality`: sigmoid(c_m), one learned number per modality.
            `token`: sigmoid(w_m . x / sqrt(d) + c_m). Both start at 0.5.
        target_modules: regex over full module names, or a list of name endings. Linear layers of the decoder only:
            a match outside it is an error.
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
    target_modules: list[str] | str | None = field(
        default=DECODER_KEYS, metadata={"help": "Regex or list of name endings; keys of the decoder by default."}
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
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise InputError("r", self.r, "give a rank of at least 1.")
        if not isinstance(self.alpha, int | float) or isinstance(self.alpha, bool) or not 0 < self.alpha < float("inf"):
            raise InputError("alpha", self.alpha, "give a positive number.")
        if self.gate not in GATES:
            raise InputError("gate", self.gate, f"choose one of {', '.join(GATES)}.")
        if not self.target_modules:
            raise InputError("target_modules", self.target_modules, f"name the layers, e.g. {DECODER_KEYS!r}.")
        layers = self.layers_to_transform
        if layers is not None and not (
            isinstance(layers, list) and layers and all(isinstance(i, int) and i >= 0 for i in layers)
        ):
            raise InputError("layers_to_transform", layers, "give a list of layer indices from 0, or None for all.")

    def parameter_count(self, in_features: int, out_features: int) -> int:
        """Trainable parameters that the adapter adds to one linear layer."""
        gates = {"none": 0, "modality": 2, "token": 2 * (in_features + 1)}[self.gate]
        return 2 * self.r * (in_features + out_features) + gates


def matched_lora_config(config: MaloraConfig, model_config: Any, tolerance: float = 0.02) -> LoraConfig:
    """The plain LoRA control of a key-only MaLoRA adapter: same layers, same scale alpha / r, equal parameters.

    With a token gate on a multi-head model (as many KV heads as heads) rank 2 r + 1 is equal to 2 parameters a layer.

    Args:
        config: the MaLoRA adapter; its target must be key projections.
        model_config: transformers config of the model.
        tolerance: largest relative difference of the parameter counts.

    Raises:
        InputError: no rank comes within the tolerance.
    """
    in_features, out_features = key_widths(model_config)
    wanted = config.parameter_count(in_features, out_features)
    rank = max(1, round(wanted / (in_features + out_features)))
    gap = abs(rank * (in_features + out_features) / wanted - 1)
    if gap > tolerance:
        raise InputError(
            "r", config.r, f"the nearest plain LoRA (rank {rank}) differs by {gap:.1%} in parameters; take a larger r."
        )
    layers = config.layers_to_transform
    target = config.target_modules
    if layers is not None and isinstance(target, str):  # LoRA takes no layer list beside a regex
        target = rf"(?=.*\.layers\.({'|'.join(map(str, layers))})\.){target}"
        layers = None
    return LoraConfig(
        r=rank,
        lora_alpha=config.alpha / config.r * rank,  # type: ignore[arg-type]  # a float works; alpha / r is what counts
        target_modules=target,
        exclude_modules=config.exclude_modules,
        layers_to_transform=layers,
        lora_dropout=0.0,
    )


def key_widths(model_config: Any) -> tuple[int, int]:
    """Input and output width of a decoder's key projection: hidden size, KV heads times head width."""
    text = model_config.get_text_config()
    return int(text.hidden_size), kv_heads(text) * head_width(text)


def kv_heads(text_config: Any) -> int:
    """Number of KV heads of a decoder; equal to the query heads where the config does not say."""
    return int(getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads)


def head_width(text_config: Any) -> int:
    """Width of one attention head of a decoder."""
    return int(getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads)
