"""Whether looking at the image goes with answering by it: the functional link, in figures and in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from lmms_keyspace.outcomes import CONFLICT
from lmms_keyspace.records import ALL_HEADS
from lmms_keyspace.reports import figures, wording
from lmms_keyspace.reports.functional import ADVANTAGE, CHANGE, MASS, PREDICTORS, WITHIN, functional_link, summary
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.rows import SHARE
from lmms_keyspace.reports.sections.parts import Panel, Part, Table, drawn, percent

_AXIS = {WITHIN: "points per SD", CHANGE: "points per SD of change"}
_TITLES = {WITHIN: "{} and the right answer", CHANGE: "Change of {} and of the answer"}
_COLUMNS = (
    "Run",
    "Link",
    "Condition",
    "Measure",
    "Layers for / against",
    "Steepest (points per SD) [95 %]",
    "p (Holm)",
    "In layer",
    "Detectable",
    "Documents",
    "Note",
)


def link(runs: Sequence[Run], task: str) -> Part | None:
    """Slopes of the outcome on attention mass, logit advantage and log-sum-exp gap, by layer."""
    table = functional_link(runs, task)
    if table.empty:
        return None
    condition = CONFLICT if CONFLICT in set(table["condition"]) else table["condition"].iloc[0]
    shown = table[(table["condition"] == condition) & (table["heads"] == ALL_HEADS) & table["value"].notna()]
    panels = [
        panel
        for of_link in (WITHIN, CHANGE)
        for predictor in PREDICTORS
        for panel in _panel(shown, of_link, predictor, [run.label for run in runs], task)
    ]
    short = summary(table)
    return Part(
        "Does looking at the image go with answering by it?",
        "For every document: was the answer right, and how much did the last prompt token look at the image? The slope "
        f"says how many points more often answers are right for each standard deviation of the measure; {condition} "
        "condition. The logit advantage is q·(mean image key - mean text key), scaled as in the model; the log-sum-exp "
        "gap is the log of the attention on image tokens over that on text tokens. Change: the same between the base "
        "and a run, document by document.",
        tuple(panels),
        (_table(short),),
        points=tuple(_sentences(short, condition)),
        warning="A slope within a run compares documents, and documents differ in more than attention: easy scenes may "
        "get both more attention and right answers. The change between two runs holds the document fixed and is the "
        "better evidence; neither is an experiment.",
        frames={"functional_link": table, "functional_link_summary": short},
    )


def _panel(table: pd.DataFrame, of_link: str, predictor: str, labels: Sequence[str], task: str) -> Iterator[Panel]:
    rows = table[(table["link"] == of_link) & (table["predictor"] == predictor)]
    if rows.empty:
        return
    order, left_out = drawn(labels)
    title = _TITLES[of_link].format(predictor)
    title = title[:1].upper() + title[1:]
    drawing = figures.by_layer(
        percent(rows), order=order, ylabel=_AXIS[of_link], title=f"{title}, by layer, {task}", signed=True
    )
    name = f"link_{of_link}_{predictor}".replace(" ", "_").replace("-", "_")
    documents = sorted(set(rows["documents"]))
    counts = f"{documents[0]}" if len(documents) == 1 else f"{documents[0]} to {documents[-1]}"
    caption = f"Slope by layer with 95 % cluster-robust interval, {counts} documents.{left_out}"
    yield Panel(name, title, drawing, caption)


def _table(short: pd.DataFrame) -> Table:
    rows = []
    for row in short.itertuples():
        known = row.layers > 0
        rows.append(
            (
                row.run,
                row.link,
                row.condition,
                row.predictor,
                f"{row.positive:.0f} / {row.negative:.0f} of {row.layers}" if known else wording.NOTHING,
                wording.estimate(row.value, row.ci_low, row.ci_high, SHARE, signed=True) if known else wording.NOTHING,
                wording.p_value(row.p_adjusted) if known else wording.NOTHING,
                f"{row.layer:.0f}" if known else wording.NOTHING,
                wording.number(row.detectable, SHARE) if known else wording.NOTHING,
                str(row.documents),
                row.note,
            )
        )
    caption = (
        "Layers for: in so many more of it goes with right answers (adjusted p below .05), against: with wrong ones. "
        "Detectable: the slope that one layer's test finds with 80 % probability"
    )
    return Table(_COLUMNS, tuple(rows), caption)


def _sentences(short: pd.DataFrame, condition: str) -> Iterator[str]:
    """In plain words, for attention mass and logit advantage."""
    chosen = short[(short["condition"] == condition) & short["predictor"].isin([MASS, ADVANTAGE])]
    for row in chosen.itertuples():
        subject = "Documents with more" if row.link == WITHIN else "Documents on which the run added"
        start = f"{row.run}: {subject.lower()} {row.predictor}"
        if row.layers == 0:
            yield f"{row.run}, {row.predictor}, {row.link}: not computed ({row.note})."
            continue
        slope = (
            f"{wording.with_unit(row.value, SHARE, signed=True)} per standard deviation "
            f"{wording.interval(row.ci_low, row.ci_high, SHARE, signed=True)} in layer {row.layer:.0f}, "
            f"adjusted p {wording.p_value(row.p_adjusted)}"
        )
        verb = "are answered right" if row.link == WITHIN else "came out right"
        if row.positive and row.negative:
            yield (
                f"{start} {verb} more often in {row.positive:.0f} and less often in {row.negative:.0f} of "
                f"{row.layers} layers; steepest {slope}."
            )
        elif row.positive or row.negative:
            which = "more" if row.positive else "less"
            count = row.positive or row.negative
            yield f"{start} {verb} {which} often, in {count:.0f} of {row.layers} layers; steepest {slope}."
        else:
            yield (
                f"{start}: no link with the answer detected in any of {row.layers} layers; "
                f"{wording.with_unit(row.detectable, SHARE)} per standard deviation would be found 4 times in 5."
            )
