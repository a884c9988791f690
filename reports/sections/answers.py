"""What the model answered: accuracy by condition, flips and text preference beside their controls, families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from lmms_keyspace.outcomes import METRICS
from lmms_keyspace.reports import figures, wording
from lmms_keyspace.reports.curves import metrics_by_family, metrics_by_run
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.rows import SHARE
from lmms_keyspace.reports.sections.parts import Panel, Part, Table, drawn, percent

ACCURACIES = tuple(name for name in METRICS if name.endswith("_acc"))
# How often the text wins, and beside it what any text does, and whether the text is understood at all.
PREFERENCES = (
    "text_flip_rate",
    "spurious_flip",
    "excess_flip",
    "tpr_label",
    "text_only_lure",
    "before_lure",
    "opinion_lure",
    "authority_lure",
    "typo_flip_rate",
    "follow_shown",
)
FAMILY_METRICS = ("clean_acc", "conflict_acc", "text_flip_rate")
_ON_AXIS = {
    "Text flip rate": "flip by\nfalse text",
    "Flip rate, irrelevant text": "flip by\nirrelevant text",
    "Flips beyond irrelevant text": "flip beyond\nirrelevant text",
    "Text preference ratio": "text\npreference",
    "Follows the text without an image": "text only:\nfollows text",
    "Follows misleading text before the image": "follows text\nbefore image",
    "Follows the user's false opinion": "follows\nopinion",
    "Follows a false expert": "follows\nexpert",
    "Flip rate, written lure": "flip by\nwritten lure",
    "Answers for the image that is shown": "follows other\nimage",
}


def answers(runs: Sequence[Run], task: str) -> Part | None:
    """Accuracy by condition and what the text does to it."""
    accuracy, preference = (metrics_by_run(runs, task, names) for names in (ACCURACIES, PREFERENCES))
    if accuracy.empty:
        return None
    accuracy = accuracy.assign(label=accuracy["label"].str.removeprefix("Accuracy, "))
    order, left_out = drawn([run.label for run in runs])
    panels = [
        Panel(
            "accuracy",
            "Accuracy by condition",
            figures.intervals(
                percent(accuracy),
                category="label",
                series="run",
                order=order,
                xlabel="% of groups",
                title=f"Accuracy by condition, {task}",
                limit=100,
            ),
            f"95 % intervals.{left_out}",
        )
    ]
    tables = [_wide(accuracy, {"run": "Run"}, "Accuracy (%) [95 %]")]
    if len(preference):
        panels.append(
            Panel(
                "text_preference",
                "Flips and text preference, with controls",
                figures.intervals(
                    percent(preference.assign(label=preference["label"].map(_ON_AXIS))),
                    category="label",
                    series="run",
                    order=order,
                    xlabel="%",
                    title=f"Flips and text preference, {task}",
                ),
                "Flip: right alone, and then the answer that the misleading text names. Control: irrelevant text, that "
                "is any added sentence. Preference: lure / (lure + gold) under conflict. Lower is better. Text only: "
                f"the sentence without an image, the check that it was understood.{left_out}",
            )
        )
        tables.append(_wide(preference, {"run": "Run"}, "Text against image (%) [95 %], with the controls"))
    return Part(
        "What it answered",
        "The same question about the same scene: alone (clean), with a true sentence (match), with a false one "
        "(conflict), with one about something else (irrelevant), and with a gray image (blank).",
        tuple(panels),
        tuple(tables),
        frames={"answers": pd.concat([accuracy, preference], ignore_index=True)},
    )


def families(runs: Sequence[Run], task: str) -> Part | None:
    """The main metrics by family of questions."""
    table = metrics_by_family(runs, task, FAMILY_METRICS)
    if table.empty:
        return None
    table = table.sort_values("family", kind="stable")
    shown = _wide(table, {"family": "Family", "run": "Run"}, "By family of questions (%) [95 %]")
    return Part(
        "By family of questions",
        "A mean over families can hide that one of them turned around.",
        tables=(shown,),
        legend=None,
        frames={"families": table},
    )


def _wide(table: pd.DataFrame, keys: Mapping[str, str], caption: str) -> Table:
    """One line per combination of `keys` (column -> its heading), one column per metric, in the order of the table."""
    metrics = list(dict.fromkeys(table["label"]))
    lines = list(dict.fromkeys(zip(*(table[key] for key in keys), strict=True)))
    cells = {
        (*(getattr(row, key) for key in keys), row.label): wording.estimate(row.value, row.ci_low, row.ci_high, SHARE)
        for row in table.itertuples()
    }
    rows = tuple((*map(str, line), *(cells.get((*line, name), wording.NOTHING) for name in metrics)) for line in lines)
    return Table((*keys.values(), *(name[:1].upper() + name[1:] for name in metrics)), rows, caption)
