"""What the comparison means, in words: divergence and reliance on the image are judged apart, each on its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lmms_keyspace.reports.rows import MMD2, NATS
from lmms_keyspace.reports.wording import interval, p_value, relative, with_unit

ALPHA = 0.05
RELIANCE = ("text_flip_rate", "conflict_acc", "vis_gain")
DIVERGENCE = ("mmd2", "js")
HARM = ("clean_acc",)
JUDGED = (*DIVERGENCE, *RELIANCE, *HARM)  # their tests are one family, chosen before any result

FELL, ROSE, IMPROVED, WORSENED, MIXED = "fell", "rose", "improved", "worsened", "mixed"
UNCHANGED = "no change detected"
NOT_COMPARED = "not compared"  # measured in both runs, but not in a way that allows a difference
NOT_MEASURED = "not measured"
OPEN = (UNCHANGED, NOT_COMPARED, NOT_MEASURED)


@dataclass(frozen=True)
class Finding:
    """One question, its answer in a word or two, the headline change, and the numbers it rests on.

    `limits` holds the interval of the headline change and the change that could have been detected.
    """

    question: str
    answer: str
    change: str
    limits: str
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What a run did compared with the base on one task."""

    task: str
    run: str
    divergence: Finding
    reliance: Finding
    harm: Finding
    conclusion: str


def verdicts(table: pd.DataFrame) -> list[Verdict]:
    """Judge every run of a comparison's table that has a change to judge, in the order of the table."""
    return [
        _judge(str(task), str(run), rows.set_index("metric"))
        for (task, run), rows in table.groupby(["task", "run"], sort=False)
        if set(rows.loc[rows["delta"].notna(), "metric"]) & {*RELIANCE, *DIVERGENCE, *HARM}
    ]


def same_change(verdict: Verdict, all_verdicts: Sequence[Verdict]) -> list[str]:
    """What the other runs, the controls, did where this one changed something.

    A change that a control shows too is not specific to this run; the headline changes say how far they differ.
    """
    others = [other for other in all_verdicts if other.task == verdict.task and other.run != verdict.run]
    sentences = []
    for name, finding_of in (
        ("The divergence", lambda one: one.divergence),
        ("The reliance on the image", lambda one: one.reliance),
    ):
        own = finding_of(verdict)
        if own.answer in OPEN or not others:
            continue
        same = [other for other in others if finding_of(other).answer == own.answer]
        rest = [other for other in others if other not in same]
        if same:
            theirs = ", ".join(f"{other.run} ({finding_of(other).change})" for other in same)
            sentences.append(
                f"{name} {own.answer} ({own.change}), and it {own.answer} in {theirs} too: "
                f"that much of the change is not specific to {verdict.run}."
            )
        if rest:
            theirs = "; ".join(
                f"{other.run}: {finding_of(other).answer} ({finding_of(other).change})" for other in rest
            )
            sentences.append(f"{name} in the other runs: {theirs}.")
    return sentences


def _judge(task: str, run: str, rows: pd.DataFrame) -> Verdict:
    questions = (
        ("Did the divergence between visual and text keys fall?", DIVERGENCE, _movement(rows, DIVERGENCE[0])),
        ("Did the model rely more on the image?", RELIANCE, _improvement(rows, RELIANCE)),
        ("Did it answer plain questions as well as before?", HARM, _improvement(rows, HARM)),
    )
    divergence, reliance, harm = (
        Finding(question, answer, *_headline(rows, metrics), _evidence(rows, metrics))
        for question, metrics, answer in questions
    )
    return Verdict(task, run, divergence, reliance, harm, _conclusion(divergence.answer, reliance.answer))


def _headline(rows: pd.DataFrame, metrics: Sequence[str]) -> tuple[str, str]:
    """The change of the first metric that was compared, e.g. `Text flip rate -3.1 points`, and its limits."""
    compared = [rows.loc[metric] for metric in metrics if metric in rows.index and pd.notna(rows.loc[metric, "delta"])]
    if not compared:
        return "", ""
    row = compared[0]
    limits = interval(row["delta_low"], row["delta_high"], row["unit"], signed=True)
    detectable = f"detectable: {with_unit(row['mde'], row['unit'])}" if pd.notna(row["mde"]) else ""
    change = f"{row['label']} {with_unit(row['delta'], row['unit'], signed=True)}{_of_the_base(row)}"
    return change, "; ".join(part for part in (limits, detectable) if part)


def _of_the_base(row: pd.Series) -> str:
    """`, -62.5 %` of the base's value: the scale of a divergence says little by itself. Empty for other units."""
    if row["unit"] not in (MMD2, NATS):
        return ""
    base = row["value"] - row["delta"]
    return f", {relative(row['delta'], base)}" if base > 0 else ""


def _conclusive(row: pd.Series) -> bool:
    return bool(row["p_adjusted"] < ALPHA)


def _movement(rows: pd.DataFrame, metric: str) -> str:
    if metric not in rows.index:
        return NOT_MEASURED
    row = rows.loc[metric]
    if pd.isna(row["delta"]):
        return NOT_COMPARED
    if not _conclusive(row):
        return UNCHANGED
    return FELL if row["delta"] < 0 else ROSE


def _improvement(rows: pd.DataFrame, metrics: Sequence[str]) -> str:
    known = [rows.loc[metric] for metric in metrics if metric in rows.index]
    if not known:
        return NOT_MEASURED
    if all(pd.isna(row["delta"]) for row in known):
        return NOT_COMPARED
    signs = {1 if row["delta"] * row["direction"] > 0 else -1 for row in known if _conclusive(row)}
    return {frozenset(): UNCHANGED, frozenset({1}): IMPROVED, frozenset({-1}): WORSENED}.get(frozenset(signs), MIXED)


def _evidence(rows: pd.DataFrame, metrics: Sequence[str]) -> tuple[str, ...]:
    return tuple(_sentence(rows.loc[metric]) for metric in metrics if metric in rows.index)


def _sentence(row: pd.Series) -> str:
    if pd.isna(row["delta"]):
        return f"{row['label']}: {row['note']}."
    unit = row["unit"]
    limits = interval(row["delta_low"], row["delta_high"], unit, signed=True)
    start = f"{row['label']}: {with_unit(row['delta'], unit, signed=True)} {limits}{_of_the_base(row)}"
    end = f" ({row['note']})." if row["note"] else "."
    if _conclusive(row):
        return f"{start}, adjusted p {p_value(row['p_adjusted'])}{end}"
    if pd.isna(row["mde"]):
        return f"{start}: no change detected; nothing varied, so what could be detected cannot be said{end}"
    detectable = f"{with_unit(row['mde'], unit)} or more would be found 4 times in 5"
    if row["delta_low"] > 0 or row["delta_high"] < 0:
        p = p_value(row["p_adjusted"])
        return f"{start}: not significant as one of many tests (adjusted p {p}); {detectable}{end}"
    return f"{start}: no change detected; {detectable}{end}"


def _conclusion(divergence: str, reliance: str) -> str:
    if {divergence, reliance} & {NOT_MEASURED, NOT_COMPARED}:
        return "Only one of the two could be compared, and neither implies the other."
    if divergence == FELL and reliance == IMPROVED:
        return "Both moved the hoped-for way. That they moved together does not show that one caused the other."
    if divergence == FELL and reliance == WORSENED:
        return "The keys of the two modalities came closer, and the model relies less on the image than before."
    if divergence == FELL:
        return "The keys of the two modalities came closer, and the answers did not follow."
    if reliance == WORSENED:
        return "The model relies less on the image than before."
    if reliance == IMPROVED:
        return "The answers rely more on the image although no fall of the divergence was detected."
    return "Neither a fall of the divergence nor a gain in reliance on the image was detected."
