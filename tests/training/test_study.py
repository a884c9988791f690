"""The study's page: what it concludes from raw files, and when it says that it is stale."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmark_modules import benchmark_module

from lmms_keyspace import embedded

ROOT = Path(__file__).parent.parent.parent
PRINTS = {"base_sha256": "b" * 64, "generator_sha256": "a" * 64}


@pytest.fixture(scope="module")
def study():
    return SimpleNamespace(page=benchmark_module("study_page"), units=benchmark_module("study_units"))


def write_grid(study, raw: Path, prints: dict[str, str] = PRINTS) -> None:
    """Raw files of a world in which MaLoRA moves the divergence down and the flip rate up, and nothing else differs."""
    units, page = study.units, study.page
    rng = np.random.default_rng(0)
    for unit in units.final_units(["bundled", "other"], dict.fromkeys((*units.CORE, *units.OTHERS), 4e-3)):
        moved = unit.arm in ("malora_0.1", "malora_1")
        figures = {name: 0.5 + 0.001 * rng.normal() for name in page.OUTCOMES}
        if moved:
            figures |= {page.INDEPENDENT: 0.1 + 0.001 * rng.normal(), "text_flip_rate": 0.7 + 0.001 * rng.normal()}
        codes = "".join("l" if rng.random() < (0.8 if moved else 0.4) else "g" for _ in range(40))
        mass, advantage = rng.normal(size=(2, 40))
        record = {
            "unit": asdict(unit),
            "seconds": {"train": 1.0, "measure": 1.0},
            "figures": figures,
            "by_layer": {page.INDEPENDENT: (figures[page.INDEPENDENT] + 0.01 * rng.normal(size=4)).tolist()},
            "documents": {
                "conflict": codes,
                "margin_conflict": [*(mass[:-1] + 0.1 * rng.normal(size=39)).tolist(), None],
                "attention_mass_conflict": mass.tolist(),
                "visual_advantage_conflict": advantage.tolist(),
            },
        } | prints
        file = raw / f"{unit.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record))


def test_the_page_says_what_the_intervals_show(study, tmp_path: Path) -> None:
    write_grid(study, tmp_path / "raw")
    text = study.page.write_page(tmp_path / "raw", PRINTS, tmp_path).read_text()
    assert "Stale" not in text
    assert "Incomplete" not in text
    assert "Against plain LoRA of equal parameters, the divergence is lower in 8, higher in 0" in text
    assert "the flip rate is lower in 0, higher in 8, not shown to differ in 4" in text
    bias = text.split("### Does the text bias fall more")[1].split("###")[0]
    assert "- malora_1: lower in 0, higher in 4, nothing shown in 0 of 4 data settings." in bias
    assert "- malora_no_mmd: lower in 0, higher in 0, nothing shown in 4 of 4 data settings." in bias
    assert re.search(r"\| no_hints .*\| \*\*\+0\.2\d\d \[.*?\], p < 0\.001\*\* \|\n", bias)
    assert re.search(r"\| MaLoRA \| \+0\.10\d \[\+0\.\d+, \+0\.\d+\] \|", text)  # the margin follows the mass alone
    assert re.search(r"\| other \| 0\.\d+ \| malora_0\.1 \| \+0\.(19|20)", text)
    assert (tmp_path / "study" / "flip.svg").stat().st_size > 1000


@pytest.mark.parametrize("changed", ["base_sha256", "generator_sha256"])
def test_a_page_on_another_base_or_generator_is_stale_and_concludes_nothing(
    study, tmp_path: Path, changed: str
) -> None:
    write_grid(study, tmp_path / "raw")
    text = study.page.write_page(tmp_path / "raw", PRINTS | {changed: "c" * 64}, tmp_path).read_text()
    assert "**Stale**" in text
    assert "## Answers" not in text


def test_an_incomplete_grid_concludes_nothing(study, tmp_path: Path) -> None:
    write_grid(study, tmp_path / "raw")
    next((tmp_path / "raw").rglob("malora_1-no_hints-3.json")).unlink()
    text = study.page.write_page(tmp_path / "raw", PRINTS, tmp_path).read_text()
    assert "**Incomplete**: 1 units" in text
    assert "## Answers" not in text


def test_a_difference_that_does_not_vary_has_no_interval_around_it(study) -> None:
    assert study.page.contrast(np.zeros(5)) == (0, 0, 0, 1)
    found = study.page.contrast(np.array([0.1, 0.2, 0.3, 0.2, 0.2]))
    assert found.difference == pytest.approx(0.2)
    assert found.low < 0.2 < found.high
    assert found.p < 0.01


def test_the_published_page_is_made_of_the_raw_files(study, tmp_path: Path) -> None:
    """Fails where weights or generator changed and the study was not run again, or its page not written."""
    prints = study.units.fingerprints(embedded.base_path())
    page = study.page.write_page(ROOT / "benchmarks" / "study", prints, tmp_path)
    assert page.read_text() == (ROOT / "docs" / "study.md").read_text(), "run `python benchmarks/study.py page`"
