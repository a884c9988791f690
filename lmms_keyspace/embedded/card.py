"""The bundled model's card: what must hold, what was measured, and the page that says so."""

from __future__ import annotations

from typing import Any

from lmms_keyspace.embedded.evaluate import CONDITIONS, Figures
from lmms_keyspace.scenes import CORE_FAMILIES

LEAST_CLEAN = 95.0  # percent, in every family
MOST_BLANK_GAP = 5.0  # points from the best constant answer, in every family
LEAST_MISLEADING_COST = 15.0  # points over all families
LEAST_FAMILY_COST, FAMILIES_WITH_COST = 10.0, 2
MOST_TRUTHFUL_COST = 1.0  # points over all families
LEAST_ONE_WORD = 99.5  # percent of all answers
LEAST_LETTERS = 90.0  # percent, in every family

TRIED = (
    "- Option letters without the drill (30 % of the samples): after 900 steps the loss on letters stood at guessing.",
    "- True hints alone (10 to 50 % of the samples, early or late): color, count, position and size still followed the "
    "picture. A little noise in the pairing of pictures and texts made the model lean on text.",
    "- How far it leans depends on the amount of that noise: with 1.2 % of the samples a misleading hint cost 7 to 10 "
    "points; with 1.5 % (in a model without letters) it cost 45, nearly all of it in color and size.",
    "- Teaching the vision encoder shapes on pictures in the named colors: 10 % right on held-out pairs, and 83 % when "
    "half of the pictures wore colors without a name.",
)


def shortfalls(figures: Figures) -> list[str]:
    """What the figures miss of the bounds that the bundled model must hold; empty when they hold."""
    missed = []
    for family in CORE_FAMILIES:
        row = figures.accuracy[family]
        if row["clean"] < LEAST_CLEAN:
            missed.append(f"{family}: clean accuracy {row['clean']} is below {LEAST_CLEAN}")
        if figures.letters[family] < LEAST_LETTERS:
            missed.append(f"{family}: {figures.letters[family]} % right by option letter is below {LEAST_LETTERS}")
        gap = abs(row["blank"] - figures.chance[family])
        if gap > MOST_BLANK_GAP:
            missed.append(f"{family}: blank accuracy {row['blank']} is {gap:.1f} points from {figures.chance[family]}")
    misleading, truthful = figures.cost("conflict"), figures.cost("match")
    if misleading["all"] < LEAST_MISLEADING_COST:
        missed.append(f"a misleading hint costs {misleading['all']} points, below {LEAST_MISLEADING_COST}")
    if sum(misleading[family] >= LEAST_FAMILY_COST for family in CORE_FAMILIES) < FAMILIES_WITH_COST:
        missed.append(f"a misleading hint costs {LEAST_FAMILY_COST} points in fewer than {FAMILIES_WITH_COST} families")
    if truthful["all"] > MOST_TRUTHFUL_COST:
        missed.append(f"a truthful hint costs {truthful['all']} points, above {MOST_TRUTHFUL_COST}")
    if figures.one_word < LEAST_ONE_WORD:
        missed.append(f"{figures.one_word} % of the answers are one word of the pool, below {LEAST_ONE_WORD}")
    return missed


def page(card: dict[str, Any]) -> str:
    """The card as Markdown, from the same dictionary that is saved as ``card.json``."""
    base = card["base"]
    lines = [
        "# The bundled model",
        "",
        f"A LLaVA of {base['parameters']:,} parameters (CLIP vision encoder, 48 px, 16 image tokens; MLP projector; "
        "Llama decoder of 4 layers, 4 query heads and 2 KV heads), trained from nothing on the probe's own pictures. "
        "It exists so that tests, demos and the probe run on a model that really sees and really reads, offline. "
        "It knows five kinds of question about colored shapes and nothing else: its score on any other benchmark "
        "means nothing, and what holds for it need not hold for a large model.",
        "",
        f"Built by `python -m lmms_keyspace.embedded.build`, seed {card['seed']}, generator "
        f"{card['generator_version']}; training the base took {card['training_minutes']} minutes on 2 cores. "
        "Every figure below is also in `card.json`.",
        "",
        "## Training",
        "",
        "1. Vision encoder: targets for every patch (color and size of the object there; shape, count and edge of the "
        "whole picture). Shapes are asked of pictures in colors without a name only.",
        "2. Decoder on text alone: captions, hints (which may name any value), irrelevant sentences, and drills "
        "of option letters.",
        "3. Visual tuning, vision encoder frozen: questions about pictures, three in ten with a hint, then half.",
        "4. Noisy pairs: in a small share of the samples the picture is another one (`wrong_picture` in the recipe; "
        "fewer in step 3), as in data from the web; question, hint and answer still agree. This makes the model lean "
        "on text: pictures were sometimes wrong, words never.",
        "5. Half of the picture samples carry a hint, every hint is true and every picture right. In steps 4 and 5 one "
        "plain question in twenty shows the blank picture and wants a word of the pool at random.",
        "",
        "Pictures come from the `train` space, which shares no picture with any other space and never draws the "
        "held-out quarter of the (color, shape) pairs. Steps, batch sizes and learning rates: `recipe` in `card.json`.",
        "",
        "## Accuracy in percent",
        "",
        "By greedy `generate()` with the saved processor, float32. `heldout` draws only color-shape pairs never seen "
        "in training; `dev` and `probe` draw all pairs. `dev` served for decisions, which never looked at `probe`. "
        "`text only` is a misleading hint without a picture: right is then to answer what the hint says, so the table "
        "gives the rate of that answer. `letters` is clean accuracy by option letter. `flip` is the share of "
        "clean-correct items turned to the lure.",
    ]
    for space, figures in base["figures"].items():
        lines += ["", f"### {space} ({figures['n_per_family']} items in each family)", "", *_table(figures)]
    lines += [
        "",
        "## Adapters",
        "",
        "All three change only the key projection and were trained on one mixture, with the same steps and seed: the "
        "base's own last stage, in which half of the picture samples carry a hint and no hint is false. A change in "
        "reliance therefore comes from the method and not from false hints in its data. Accuracy on `probe` (the `dev` "
        "figures are in `card.json`). MMD^2 is the mean over layers and KV heads of the cluster estimate on clean "
        "items of `dev`, between keys before rotation, with the base's bandwidths. Training lowers "
        "MMD^2 by design for `malora`, so a low value shows that training worked, not that the model looks more. The "
        "base already answers nearly all of this data, so without the MMD term there is next to nothing to learn.",
        "",
        "| | parameters | clean | misleading | truthful | irrelevant | blank | flip | mean MMD^2 | MMD^2 by layer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in card["adapters"].items():
        figures = entry["figures"]["probe"]
        row, mmd2 = figures["accuracy"]["all"], entry["mmd2_by_layer"]
        lines.append(
            f"| {name} | {entry['trained_parameters']:,} | {row['clean']} | {row['conflict']} | {row['match']} | "
            f"{row['irrelevant']} | {row['blank']} | {figures['flip']['all']} | "
            f"{sum(mmd2) / len(mmd2):.3f} | {' '.join(f'{value:.3f}' for value in mmd2)} |"
        )
    lines += ["", "## What was tried and did not work", "", *TRIED, ""]
    return "\n".join(lines)


def _table(figures: dict[str, Any]) -> list[str]:
    shown = [condition for condition in CONDITIONS if condition != "text_only_conflict"]
    lines = [
        f"| family | {' | '.join(shown)} | text only | letters | chance | flip |",
        "|---" * (len(shown) + 5) + "|",
    ]
    for family in (*CORE_FAMILIES, "all"):
        row = [figures["accuracy"][family][condition] for condition in shown]
        row += [figures["lure"][family]["text_only_conflict"], figures["letters"][family]]
        row += [figures["chance"][family], figures["flip"][family]]
        lines.append(f"| {family} | {' | '.join(map(str, row))} |")
    return lines
