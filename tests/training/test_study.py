"""The study's page: what it concludes from raw files, and when it says that it is stale."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lmms_keyspace import embedded

ROOT = Path(__file__).parent.parent.parent
PRINTS = {"base_sha256": "b" * 64, "generator_sha256": "a" * 64}


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import study_page
        import study_units

        yield SimpleNamespace(page=study_page, units=study_units)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


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
            "unit": {"phase": "final", "base": unit.base, "arm": unit.arm, "data": unit.data, "seed": unit.seed},
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
    bias = re.search(r"flip rate\) fall more.*?\n\n- no_hints: (.*?)\n", text, re.DOTALL)
    assert bias is not None
    assert re.search(r"malora_1 \+0\.2\d\d \[.*?\], higher", bias[1])
    assert re.search(r"malora_no_mmd [+-]0\.00\d \[.*?\], no difference shown", bias[1])
    assert re.search(r"\| MaLoRA \| \+0\.10\d \[\+0\.\d+, \+0\.\d+\] \|", text)  # the margin follows the mass alone
    assert re.search(r"\| other \| malora_0\.1 \| \+0\.(19|20)", text)
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


def test_the_published_page_rests_on_this_base_and_generator_or_says_that_it_is_stale(study) -> None:
    text = (ROOT / "docs" / "study.md").read_text()
    prints = study.units.fingerprints(embedded.base_path())
    assert all(value in text for value in prints.values()) or "**Stale**" in text, (
        "run `python benchmarks/study.py page`"
    )
