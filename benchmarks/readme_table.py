"""The tables of the bundled model in README.md, from the runs of `make demo`: `python benchmarks/readme_table.py`.

They stand between two comment lines of README.md, which this rewrites; `--check` only says whether they are the same,
with exit status 1 where not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import METRICS, measure, not_valid
from lmms_keyspace.reports import Run, compare, load_runs

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/readme_table.py -->", "<!-- end of what it made -->"
TASK = "textbias_probe"
# Folders of the Makefile's demo -> what they are called; the first is the base.
ARMS = {
    "base": "base",
    "malora": "MaLoRA",
    "lora": "LoRA, equal parameters",
    "malora_no_mmd": "MaLoRA without MMD",
}
# Metric of the comparison -> column, and what to multiply by; shares are given in per cent.
COLUMNS = {
    "text_flip_rate": ("text flip rate, %", 100, 1),
    "conflict_acc": ("accuracy under conflict, %", 100, 1),
    "image_mass_all": ("attention to the image, %", 100, 1),
    "mmd2": ("MMD² of keys", 1, 3),
    "js": ("JS of keys, nats", 1, 3),
}
FAMILY_COLUMNS = ("clean_acc", "conflict_acc", "text_flip_rate", "text_only_lure", "blind_acc")


def tables(folders: Sequence[Path]) -> str:
    """Changes of the arms against the base, and the base by family, as Markdown."""
    runs = load_runs(folders)
    return f"{changes(compare(runs).table, [run.label for run in runs.runs])}\n\n{families(runs.runs[0])}"


def changes(table: pd.DataFrame, labels: Sequence[str]) -> str:
    """One line per run: the base's values, the others' changes with 95 % intervals."""
    lines = [f"| run | {' | '.join(column for column, _, _ in COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows = table[table["task"] == TASK].set_index(["run", "metric"])
    for name, label in zip(ARMS.values(), labels, strict=True):
        cells = [
            _cell(rows.loc[(label, metric)], label == labels[0], scale, digits)
            for metric, (_, scale, digits) in COLUMNS.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: pd.Series, is_base: bool, scale: float, digits: int) -> str:
    if is_base:
        return f"{scale * row['value']:.{digits}f}"
    delta, low, high = (_signed(scale * row[name], digits) for name in ("delta", "delta_low", "delta_high"))
    return f"{delta} [{low}, {high}]"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]  # a zero has no sign


def families(run: Run) -> str:
    """One line per family of the probe, and whether the probe is valid there."""
    outcomes = run.probes[TASK].outcomes
    samples = run.loaded.samples[TASK].drop_duplicates("group_id")
    family_of = pd.Series(samples["family"].to_numpy(), index=samples["group_id"].astype(str))
    labels = [METRICS[name].label.lower() for name in FAMILY_COLUMNS]
    lines = [f"| base, by family | {', % | '.join(labels)}, % | valid |", "|---" * (len(FAMILY_COLUMNS) + 2) + "|"]
    for family, groups in outcomes.groupby(family_of.reindex(outcomes.index), sort=False):
        measured = [measure(METRICS[name], groups) for name in FAMILY_COLUMNS]
        cells = ["N/A" if found is None else f"{100 * found.value:.1f}" for found in measured]
        lines.append(f"| {family} | {' | '.join(cells)} | {'no' if not_valid(groups) else 'yes'} |")
    return "\n".join(lines)


def replaced(text: str, made: str) -> str:
    """README's text with the tables between its two comment lines."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/demo"), help="folder of the demo's runs")
    parser.add_argument("--check", action="store_true", help="change nothing")
    given = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    try:
        new = replaced(text, tables([given.runs / arm for arm in ARMS]))
    except InputError as error:
        sys.exit(f"{error}; run `make demo` first")
    if new == text:
        print("README.md has these tables")
    elif given.check:
        sys.exit("README.md has other tables; run this without --check")
    else:
        README.write_text(new, encoding="utf-8")
        print("README.md rewritten")


if __name__ == "__main__":
    main()
