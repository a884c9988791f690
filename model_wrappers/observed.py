"""What is known of a run while it goes on: filled by the recorder, read at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lmms_keyspace.capture import Capture
from lmms_keyspace.families import Decoder
from lmms_keyspace.model_wrappers.arguments import Arguments
from lmms_keyspace.model_wrappers.loading import Loaded
from lmms_keyspace.tokens import Prompt


@dataclass
class ObservedTask:
    """One task: its prompts in document order, the sampled clusters, and counts over the captured rows."""

    prompts: dict[int, Prompt]  # of all processes of the run
    generator: str | None
    cluster_field: str | None
    chosen: frozenset[str] = frozenset()
    same_prompts: list[list[str]] = field(default_factory=list)  # conditions that are one prompt, as this process sees
    images_absent: list[int] = field(default_factory=list)  # documents asked without an image that they name
    rows_captured: int = 0
    token_counts: Counter[str] = field(default_factory=Counter)  # prompt tokens by label
    image_tokens: Counter[str] = field(default_factory=Counter)  # image tokens of a prompt -> prompts

    def rows_selected(self) -> int:
        return sum(prompt.cluster in self.chosen for prompt in self.prompts.values())

    def conditions(self) -> list[str]:
        return sorted({prompt.condition for prompt in self.prompts.values()})


@dataclass
class Observed:
    """One run."""

    loaded: Loaded
    arguments: Arguments
    model_name: str
    decoder: Decoder
    capture: Capture | None
    batch_size: int  # the smallest that was used
    tasks: dict[str, ObservedTask] = field(default_factory=dict)
    options: list[dict[str, Any]] = field(default_factory=list)  # rows of the options table
    processes: int = 1
    whole: bool = True  # no document that must be seen was answered from a cache
    images_of_intervention: set[str] = field(default_factory=set)  # evaluated ones that its statistics rest on

    @property
    def second_pass(self) -> bool:
        """Whether sampled documents pass once more unchanged; a base model is its own reference."""
        return self.loaded.changed and self.arguments.reference == "self"
