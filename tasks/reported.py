"""What each task reports: the conditions of its probe, and the keys of its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmms_keyspace import outcomes, scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import CLEAN, CONFLICT, MATCH, MISMATCHED, PAIR_CONDITIONS, TEXT_ONLY_CONFLICT
from lmms_keyspace.tasks.derived import DERIVED, DIFFERENCES
from lmms_keyspace.tasks.rich.drawing import RICH_FAMILIES

NOT_VALID_FOR = "not_valid_for"  # the only text among the results: the families that fail the gate
COMPANIONS = ("_ci_lo", "_ci_hi", "_n")
MDE = "_mde"  # and this, of differences


@dataclass(frozen=True)
class Probe:
    """What a task reports: all ratios that its conditions allow, and `derived`, names of `DERIVED`.

    `headline`: the metrics that lmms-eval's table shows, all by default; results files hold every one. `by_family`:
    also the clean accuracy of each family. A probe has a validity gate where `outcomes.gate_of` says so.
    """

    conditions: tuple[str, ...]
    derived: tuple[str, ...] = ("parse_fail",)
    headline: tuple[str, ...] = ()
    by_family: bool = False
    families: tuple[str, ...] = scenes.CORE_FAMILIES

    @property
    def ratios(self) -> dict[str, outcomes.Metric]:
        """The metrics of `outcomes` whose conditions the probe has."""
        return {k: metric for k, metric in outcomes.METRICS.items() if set(metric.conditions) <= set(self.conditions)}

    @property
    def gate(self) -> list[str]:
        """The metrics that must reach `outcomes.MIN_VALID`."""
        return outcomes.gate_of(self.conditions)

    @property
    def intervals(self) -> dict[str, bool | None]:
        """Metrics with an interval -> whether higher is better (None: neither)."""
        better = {1: True, 0: None, -1: False}
        families = self.families if self.by_family else ()
        return (
            {name: better[metric.direction] for name, metric in self.ratios.items()}
            | {name: DERIVED[name][1] for name in self.derived}
            | {f"clean_acc_{family}": True for family in families}
        )

    @property
    def facts(self) -> dict[str, bool | None]:
        """The facts of a run that have no sampling error, as `intervals`."""
        valid = ("valid", *(f"valid_{family}" for family in self.families)) if self.gate else ()
        return dict.fromkeys(("chance", "groups", "groups_dropped")) | dict.fromkeys(valid, True)

    @property
    def differences(self) -> set[str]:
        """Metrics that subtract one rate from another; they come with a minimum detectable effect."""
        return {name for name, metric in self.ratios.items() if metric.signed} | {*DIFFERENCES} & {*self.derived}

    @property
    def keys(self) -> dict[str, bool | None]:
        """Every key of the results, as `intervals`; denominators and detectable effects have no better side."""
        values = {
            name + suffix: None if suffix in ("_n", MDE) else better
            for name, better in self.intervals.items()
            for suffix in ("", *COMPANIONS, *([MDE] if name in self.differences else []))
        }
        return values | self.facts | ({NOT_VALID_FOR: None} if self.gate else {})

    @property
    def shown(self) -> set[str]:
        """The keys that lmms-eval's table shows: the headline, and the facts but those of single families."""
        facts = {name for name in self.facts if not name.startswith("valid_")}
        return {*(self.headline or self.intervals), *facts, *([NOT_VALID_FOR] if self.gate else [])}


def probe_named(name: str) -> Probe:
    """The probe of that name; raises InputError where there is none."""
    if name not in PROBES:
        raise InputError("probe", name, f"take one of {', '.join(PROBES)}")
    return PROBES[name]


_OF_TEXTBIAS = ("vrs", "tpr_model", "tpr_model_both", "tpr_model_neither", "discrimination", "parse_fail")
_TEXTBIAS_HEADLINE = (
    "clean_acc", "match_acc", "conflict_acc", "blind_acc", "text_flip_rate", "excess_flip", "benefit", "vis_gain",
    "text_only_lure", "parse_fail",
)  # fmt: skip
_OF_BENCHMARKS = ("stock_acc", "parse_fail")
_ORDER = (
    CLEAN, outcomes.FILLER, CONFLICT, outcomes.BEFORE, outcomes.OPINION, outcomes.AUTHORITY, TEXT_ONLY_CONFLICT,
)  # fmt: skip
_RELIANCE = (
    CLEAN, outcomes.BLANK, outcomes.NOISE, outcomes.SHUFFLED, MISMATCHED, outcomes.NO_IMAGE, outcomes.CAPTION_ORACLE,
)  # fmt: skip

PROBES: Mapping[str, Probe] = {
    "textbias_probe": Probe(outcomes.CONDITIONS, _OF_TEXTBIAS, _TEXTBIAS_HEADLINE, by_family=True),
    "textbias_rich": Probe(
        outcomes.CONDITIONS, _OF_TEXTBIAS, _TEXTBIAS_HEADLINE, by_family=True, families=RICH_FAMILIES
    ),
    "textbias_order": Probe(
        _ORDER,
        headline=(
            "clean_acc",
            "text_flip_rate",
            "conflict_lure",
            "order_gap",
            "opinion_gap",
            "authority_gap",
            "filler_drop",
            "text_only_lure",
            "parse_fail",
        ),
    ),
    "textbias_typographic": Probe(
        (CLEAN, outcomes.LURE_WORD, outcomes.GOLD_WORD, outcomes.RANDOM_WORD, outcomes.READ),
        headline=(
            "clean_acc",
            "typo_flip_rate",
            "typo_drop",
            "random_word_drop",
            "gold_word_benefit",
            "read_acc",
            "parse_fail",
        ),
    ),
    "visreliance_probe": Probe(
        _RELIANCE,
        ("perceptual_score", "parse_fail"),
        (
            "clean_acc",
            "vis_gain",
            "shuffled_drop",
            "mismatched_drop",
            "perceptual_score",
            "follow_shown",
            "caption_oracle_acc",
            "toll",
            "parse_fail",
        ),
    ),
    "visreliance_pairs": Probe(PAIR_CONDITIONS, ("acc", "q_acc", "i_acc", "constant_answer_rate", "parse_fail")),
    "benchmark": Probe(
        (CLEAN, CONFLICT, outcomes.BLANK),
        _OF_BENCHMARKS,
        ("clean_acc", "conflict_acc", "blind_acc", "text_flip_rate", "vis_gain", "stock_acc", "parse_fail"),
    ),
    "benchmark_full": Probe(
        (CLEAN, MATCH, CONFLICT, outcomes.IRRELEVANT, outcomes.BLANK, outcomes.MISMATCH, outcomes.NO_IMAGE),
        _OF_BENCHMARKS,
        (
            "clean_acc",
            "match_acc",
            "conflict_acc",
            "blind_acc",
            "mismatch_acc",
            "none_acc",
            "text_flip_rate",
            "excess_flip",
            "benefit",
            "vis_gain",
            "stock_acc",
            "parse_fail",
        ),
    ),
    # One condition by itself, under the name that it has for a benchmark
    "benchmark_clean": Probe((CLEAN,), _OF_BENCHMARKS),
    "benchmark_hint_right": Probe((MATCH,), _OF_BENCHMARKS),
    "benchmark_hint_wrong": Probe((CONFLICT,), _OF_BENCHMARKS),
    "benchmark_irrelevant": Probe((outcomes.IRRELEVANT,), _OF_BENCHMARKS),
    "benchmark_blank": Probe((outcomes.BLANK,), _OF_BENCHMARKS),
    "benchmark_mismatch": Probe((outcomes.MISMATCH,), _OF_BENCHMARKS),
    "benchmark_none": Probe((outcomes.NO_IMAGE,), _OF_BENCHMARKS),
}
