"""Where the last prompt token looks: by layer, and by what was answered under misleading text."""

from __future__ import annotations

from collections.abc import Sequence

from lmms_keyspace.outcomes import GOLD, LURE
from lmms_keyspace.reports import figures, wording
from lmms_keyspace.reports.curves import attention_by_layer, attention_when_misled
from lmms_keyspace.reports.load import Run
from lmms_keyspace.reports.sections.parts import MAX_PANELS, Panel, Part, drawn, percent, table_of
from lmms_keyspace.reports.theme import FIRST_OTHER


def attention(runs: Sequence[Run], task: str) -> Part | None:
    """Attention mass on the image by layer."""
    layers = attention_by_layer(runs, task)
    if layers.empty:
        return None
    order, left_out = drawn([run.label for run in runs])
    title = f"Attention to the image by layer, {task}"
    drawing = figures.by_layer(percent(layers), order=order, ylabel="% of attention", title=title)
    caption = (
        "Share of the attention of the last prompt token that goes to image tokens, mean over query heads. Attention "
        f"is not reliance: more of it need not change an answer.{left_out}"
    )
    return Part(
        "Where it looks",
        "In the undisturbed condition, with its image.",
        (Panel("attention", "Attention to the image by layer", drawing, caption),),
        frames={"attention": layers},
    )


def fooled(runs: Sequence[Run], task: str) -> Part | None:
    """Attention to image, hint and question under conflict, by what was answered."""
    table = attention_when_misled(runs, task)
    if table.empty:
        return None
    order, left_out = drawn(list(dict.fromkeys(table["run"])), MAX_PANELS)
    panels = []
    for number, label in enumerate(order):
        rows = table[table["run"] == label]
        documents = rows.drop_duplicates("outcome").set_index("outcome")["documents"]
        panels.append(
            Panel(
                f"fooled_{number}",
                label,
                figures.intervals(
                    percent(rows.assign(outcome=rows["outcome"].map(wording.ANSWERED))),
                    category="segment",
                    series="outcome",
                    order=tuple(wording.ANSWERED.values()),
                    xlabel="% of attention",
                    title=f"Attention when misled, {task}, {label}",
                    limit=100 * table["ci_high"].max(),
                    first=FIRST_OTHER,
                ),
                f"{documents.get(GOLD, 0)} answers by the image, {documents.get(LURE, 0)} by the text.",
            )
        )
    return Part(
        "Where it looked when fooled",
        "Attention of the last prompt token to the image, the misleading sentence (hint) and the question under "
        f"conflict, mean over layers, by what was answered.{left_out}",
        tuple(panels),
        (table_of(wording.printed_looks(table), "% of attention [95 %]"),),
        legend=tuple(wording.ANSWERED.values()),
        warning="The two groups of answers differ in their scenes too: this is a description, not a cause.",
        frames={"attention_when_misled": table},
    )
