"""README's tables of the bundled model are those that the command makes, in form; it makes the figures from runs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import fake_runs
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "readme_table.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(script, tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("demo")
    arms = [fake_runs.BASE, fake_runs.MALORA, fake_runs.LORA, replace(fake_runs.LORA, name="malora_no_mmd", flips=20)]
    for run in arms:
        fake_runs.write(run, root)
    return script.tables([root / arm for arm in script.ARMS])


def test_the_figures_are_those_of_the_runs(made: str) -> None:
    changes, families = made.split("\n\n")
    base, _, lora, control = changes.splitlines()[2:]
    assert base.startswith("| base | 43.5 | 54.2 | ")  # 20 of 46 right in clean; 26 of 48
    assert lora.startswith("| LoRA, equal parameters | -26.1 [")  # 12 flips fewer
    assert control.startswith("| MaLoRA without MMD | 0.0 [")
    assert [line.split(" | ")[0] for line in families.splitlines()[2:]] == [f"| {name}" for name in fake_runs.FAMILIES]
    assert families.count("| yes |") == len(fake_runs.FAMILIES)


def test_readme_has_the_tables_of_the_command(script, made: str) -> None:
    text = script.README.read_text(encoding="utf-8")
    block = text.split(script.BEGIN)[1].split(script.END)[0].strip()
    ours, theirs = (tables.split("\n\n") for tables in (block, made))
    assert [table.splitlines()[:2] for table in ours] == [table.splitlines()[:2] for table in theirs]
    assert [line.split(" | ")[0] for line in ours[0].splitlines()] == [
        line.split(" | ")[0] for line in theirs[0].splitlines()
    ]
    assert script.replaced(text, block) == text
    with pytest.raises(SystemExit, match="lacks the lines"):
        script.replaced("no marks", made)
