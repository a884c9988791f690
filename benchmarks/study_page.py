"""docs/study.md and its figures, from the raw files of the study.

Every interval says what its unit is. Contrasts are paired: an arm and its control share scenes, order and start of one
seed. Nothing is concluded that an interval does not show, and nothing at all while the grid is incomplete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from study_contrasts import (
    BASE,
    CONTROL,
    INDEPENDENT,
    SHOWN_BELOW,
    Contrast,
    contrast,
    direction,
    document_slopes,
    family,
    follows_text,
    layer_slopes,
    name_of,
    paired,
)
from study_figures import draw
from study_summary import in_short
from study_units import CORE, DATA, HEADLINE, LEARNING_RATES, OTHERS, OTHERS_DATA, TRAINING_FREE, final_units

from lmms_keyspace import stats

DOCS = Path(__file__).parent.parent / "docs"
OUTCOMES = {
    "clean_acc": "clean accuracy",
    "text_flip_rate": "flip rate",
    "benefit": "match benefit",
    "text_perplexity": "text perplexity",
    "mmd2_k_pre": "MMD^2 (trained kernel)",
    "mmd2_narrow_k_pre": "MMD^2, narrow",
    "mmd2_laplace_k_pre": "MMD^2, Laplace",
    "mmd2_laplace_k_post": "MMD^2, Laplace, after RoPE",
    "js_k_pre": "JS, nats",
    "js_k_post": "JS after RoPE, nats",
    "attention_mass_conflict": "attention mass on the image, conflict",
    "visual_advantage_conflict": "visual logit advantage, conflict",
}
QUESTIONS = (
    ("Does the divergence fall?", BASE, INDEPENDENT),
    ("Does the divergence fall more than with plain LoRA of equal parameters?", CONTROL, INDEPENDENT),
    ("Does the text bias fall?", BASE, "text_flip_rate"),
    ("Does the text bias fall more than with plain LoRA of equal parameters?", CONTROL, "text_flip_rate"),
    ("Does clean accuracy change against plain LoRA?", CONTROL, "clean_acc"),
)
DOCUMENT_OUTCOMES = {"right": "being right, 0 or 1", "margin": "the margin of gold over the lure, in nats"}
GROUPS = {"LoRA on keys": CORE[:1], "MaLoRA without MMD": CORE[1:2], "MaLoRA": CORE[2:]}


def write_page(raw: Path, prints: dict[str, str], docs: Path = DOCS) -> Path:
    """Write `study.md` and its figures under `docs`; returns the page.

    Args:
        raw: folder of the raw files.
        prints: fingerprints of the bundled base and the generator as they are now.
        docs: folder of the page.
    """
    records = [json.loads(file.read_text()) for file in sorted((raw / "final").rglob("*.json"))]
    table = pd.DataFrame([record["unit"] | record["figures"] for record in records])
    stale = stale_files(records, prints)
    bases = ["bundled", *sorted({str(record["unit"]["base"]) for record in records} - {"bundled"})]
    rates = dict.fromkeys((*CORE, *OTHERS), 0.0)  # which units there should be does not depend on the rates
    missing = {unit.name for unit in final_units(bases, rates)} - {name_of(record) for record in records}
    lines = [_INTRODUCTION, *_state(records, prints, stale, missing)]
    if not missing and not stale:
        figures = docs / "study"
        figures.mkdir(exist_ok=True)
        bundled = [record for record in records if record["unit"]["base"] == "bundled"]
        own = table[table["base"] == "bundled"]
        by_layer = layer_slopes(bundled, INDEPENDENT)
        by_document = {
            outcome: {label: document_slopes(bundled, arms, outcome) for label, arms in GROUPS.items()}
            for outcome in DOCUMENT_OUTCOMES
        }
        lines += in_short(own, bundled, by_layer, by_document, OUTCOMES[INDEPENDENT])
        draw(own, INDEPENDENT, OUTCOMES[INDEPENDENT], figures)
        lines += [
            "![Flip rate of every adapter by arm and data setting, the base dotted](study/flip.svg)",
            "",
            "![Fall of the divergence against change of the flip rate, a point for every adapter](study/change.svg)",
            "",
        ]
        lines += [*_answers(own, bundled), *_tables(own), *_by_layer(by_layer), *_training_free(own, bundled)]
        lines += [*_by_document(by_document), *_bases(table, bases)]
    page = docs / "study.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page


def stale_files(records: Iterable[dict[str, Any]], prints: dict[str, str]) -> list[str]:
    """Names of units that rest on another generator, or on other weights of the bundled base."""
    return [
        name_of(record)
        for record in records
        if record["generator_sha256"] != prints["generator_sha256"]
        or (record["unit"]["base"] == "bundled" and record["base_sha256"] != prints["base_sha256"])
    ]


_INTRODUCTION = """# Study: does aligning visual with text keys make the model rely on the image?

The bundled model of one million parameters is fine-tuned on generated scenes in several ways that differ in the method
alone, and measured on scenes it has not seen. What holds for it need not hold for a large model.

- **Arms**: the base; plain LoRA on the keys with equal parameters; MaLoRA without its MMD term; MaLoRA with the weights
  0.01, 0.1 and 1 of that term (Gram 0.1 in all MaLoRA arms); and on one data setting MaLoRA without gate, without Gram,
  one LoRA per modality, LoRA on q, k, v and o, MokA-style, and four changes of the base without training.
- **Data**: questions without hints; half of them with true hints; with one hint in ten, or every second, misleading.
  The answer to learn is always what the picture shows.
- **Seeds**: five, each with its own scenes, order and start, shared by all arms. Learning rates were chosen before, on
  two other seeds, from the same three values for every arm, by the margin of the right answer to plain questions.
- **Measured** on 200 scenes of the seed space `probe` under four conditions. The trained quantity is MMD^2 of keys
  before RoPE with one kernel; every claim about divergence rests on another kernel, the classifier's bound of the
  Jensen-Shannon divergence, or the keys after RoPE.

Raw files: `benchmarks/study/`, one for every adapter. `python benchmarks/study.py` says how they are made.
"""


def _state(records: list[dict[str, Any]], prints: dict[str, str], stale: list[str], missing: set[str]) -> list[str]:
    lines = ["## State", ""]
    if stale:
        lines += [
            f"**Stale**: {len(stale)} of {len(records)} units rest on another base or generator. Run it again.",
            "",
        ]
    if missing:
        lines += [f"**Incomplete**: {len(missing)} units are missing, so nothing is concluded here.", ""]
    lines += [
        f"- sha256 of the base (weights and tokenizer): `{prints['base_sha256']}`",
        f"- sha256 of the generator (`lmms_keyspace/scenes.py`): `{prints['generator_sha256']}`",
    ]
    if records:
        seconds = [record["seconds"]["train"] + record["seconds"]["measure"] for record in records]
        chosen = {record["unit"]["arm"]: record["unit"]["learning_rate"] for record in records}
        offered = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
        rates = ", ".join(f"{arm} {rate:g}" for arm, rate in sorted(chosen.items()) if rate is not None)
        lines.append(f"- learning rates chosen from {offered}: {rates}")
        lines.append(f"- {len(records)} units; median {np.median(seconds):.0f} s each by the clock of a shared machine")
    return [*lines, ""]


def _answers(table: pd.DataFrame, records: list[dict[str, Any]]) -> list[str]:
    """Every question with its table, and in words only what the adjusted intervals show."""
    lines = ["## Answers", ""]
    for question, control, outcome in QUESTIONS:
        arms = [arm for arm in CORE if arm != control]
        found = {data: family(table, arms, control, data, outcome) for data in DATA}
        lines += [f"### {question}", "", *_in_words(found), "", f"{OUTCOMES[outcome]}, less {control}:", ""]
        lines += [f"| data | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
        for data, members in found.items():
            lines.append(f"| {data} | {' | '.join(_shown(each, p) for _, each, p in members)} |")
        lines.append("")
    lines += [
        "Means of 5 seeds with 95 % t intervals over the seeds; p adjusted by Holm over the arms of a row; bold where "
        "it is below 0.05. The base is one model, so against it an interval holds for this base.",
        "",
        "### The same by documents",
        "",
        f"Share of documents that follow the misleading text, less {CONTROL}:",
        "",
        f"| data | {' | '.join(CORE[1:])} |",
        "|---" * len(CORE) + "|",
    ]
    for data in DATA:
        of = {arm: [r for r in records if r["unit"]["arm"] == arm and r["unit"]["data"] == data] for arm in CORE}
        lines.append(f"| {data} | {' | '.join(str(follows_text(of[arm], of[CONTROL])) for arm in CORE[1:])} |")
    return [*lines, "", "Intervals: 200 documents, bootstrap, means over the seeds; not adjusted.", ""]


def _in_words(found: dict[str, list[tuple[str, Contrast, float]]]) -> list[str]:
    """For each arm, in how many data settings it is lower, higher, or neither is shown."""
    directions: dict[str, list[int]] = {}
    for members in found.values():
        for arm, each, p in members:
            directions.setdefault(arm, []).append(direction(each, p))
    return [
        f"- {arm}: lower in {own.count(-1)}, higher in {own.count(1)}, nothing shown in {own.count(0)} of {len(found)} "
        "data settings."
        for arm, own in directions.items()
    ]


def _shown(found: Contrast, p: float) -> str:
    text = f"{found}, p {_p(p)}"
    return f"**{text}**" if p < SHOWN_BELOW else text


def _tables(table: pd.DataFrame) -> list[str]:
    lines = ["## All outcomes", "", "Means over five seeds; the base is one model.", ""]
    base = table[table["arm"] == "base"].iloc[0]
    for data in DATA:
        arms = CORE + (OTHERS if data == OTHERS_DATA else ())
        lines += [f"### {data}", "", f"| | base | {' | '.join(arms)} |", "|---" * (len(arms) + 2) + "|"]
        own = table[table["data"] == data]
        for outcome, label in OUTCOMES.items():
            cells = [f"{own[own['arm'] == arm][outcome].mean():.3f}" for arm in arms]
            lines.append(f"| {label} | {base[outcome]:.3f} | {' | '.join(cells)} |")
        lines += ["", f"Less {CONTROL}, with 95 % intervals over seeds and p adjusted over the arms:", ""]
        rest = [arm for arm in arms if arm != CONTROL]
        lines += [f"| | {' | '.join(rest)} |", "|---" * (len(rest) + 1) + "|"]
        for outcome, label in OUTCOMES.items():
            cells = [f"{found}, p {_p(p)}" for _, found, p in family(table, rest, CONTROL, data, outcome)]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _by_layer(slopes: stats.Slopes) -> list[str]:
    lines = ["## Does the fall by layer predict the change of the flip rate?", ""]
    lines += ["| layer | change of the flip rate for a fall of 0.1 | adjusted p |", "|---|---|---|"]
    for layer, p in enumerate(stats.holm(slopes.p)):
        found = [0.1 * float(each[layer]) for each in (slopes.slope, slopes.low, slopes.high)]
        lines.append(f"| {layer} | {found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}] | {_p(p)} |")
    unit = (
        f"{slopes.n} adapters of the core arms in {slopes.clusters} clusters (data and seed), one level for each data"
    )
    return [
        *lines,
        "",
        f"Divergence: {OUTCOMES[INDEPENDENT]}. Least squares, {unit}. Arms differ in more than this.",
        "",
    ]


def _training_free(table: pd.DataFrame, records: list[dict[str, Any]]) -> list[str]:
    base = next(record for record in records if record["unit"]["arm"] == "base")
    figures = table.groupby("arm")[list(OUTCOMES)].mean()
    lines = ["## Does a change without training do the same?", ""]
    lines += [f"| | base | {' | '.join(TRAINING_FREE)} |", "|---" * (len(TRAINING_FREE) + 2) + "|"]
    for outcome, label in OUTCOMES.items():
        cells = [f"{figures.loc[arm, outcome]:.3f}" for arm in ("base", *TRAINING_FREE)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    changes = [follows_text([r for r in records if r["unit"]["arm"] == arm], [base]) for arm in TRAINING_FREE]
    lines.append(f"| follows the misleading text, less base | | {' | '.join(map(str, changes))} |")
    return [*lines, "", "Means over draws of the statistics or the direction; intervals by documents.", ""]


def _by_document(slopes: dict[str, dict[str, stats.Slopes]]) -> list[str]:
    """Document by document: does more attention to the image go with a better outcome?"""
    lines = [
        "## Document by document",
        "",
        "Change (adapted less base, same document, conflict) of an outcome for:",
        "",
    ]
    lines += [
        "| outcome | arms | 0.1 more attention mass on the image | 1 more visual logit advantage | documents |",
        "|---" * 5 + "|",
    ]
    for outcome, by_group in slopes.items():
        for label, found in by_group.items():
            cells = []
            for place, step in ((0, 0.1), (1, 1.0)):
                value, low, high = (step * float(each[place]) for each in (found.slope, found.low, found.high))
                cells.append(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]")
            lines.append(f"| {DOCUMENT_OUTCOMES[outcome]} | {label} | {' | '.join(cells)} | {found.clusters} |")
    return [*lines, "", "95 % intervals by documents (cluster-robust), one level for each adapter.", ""]


def _bases(table: pd.DataFrame, bases: list[str]) -> list[str]:
    lines = ["## On other bases", ""]
    if len(bases) == 1:
        return [*lines, "Not run: `--base NAME=FOLDER` adds a base that the builder made from another seed.", ""]
    lines += [
        f"{OTHERS_DATA}, less {CONTROL}, 95 % intervals over seeds of a base. The builder's seeds were fixed before. "
        "A base that hardly follows misleading text leaves little to change.",
        "",
    ]
    lines += ["| base | its own flip rate | arm | flip rate | clean accuracy | " + OUTCOMES[INDEPENDENT] + " |"]
    lines.append("|---" * 6 + "|")
    for base in bases:
        own = table[table["base"] == base]
        (before,) = own[own["arm"] == BASE]["text_flip_rate"]
        for arm in HEADLINE[1:]:
            cells = [
                str(paired(own, arm, CONTROL, OTHERS_DATA, outcome))
                for outcome in ("text_flip_rate", "clean_acc", INDEPENDENT)
            ]
            lines.append(f"| {base} | {before:.3f} | {arm} | {' | '.join(cells)} |")
    for arm in HEADLINE[1:]:
        each = [
            paired(table[table["base"] == base], arm, CONTROL, OTHERS_DATA, "text_flip_rate").difference
            for base in bases
        ]
        lines += ["", f"{arm}, flip rate, unit base ({len(bases)}): {contrast(np.array(each))!s}."]
    return [*lines, ""]


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
