"""docs/study.md is what its raw files say, and says so itself when it no longer is."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RAW = ROOT / "benchmarks" / "study"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import study
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return study


@pytest.fixture(scope="module")
def prints(study: ModuleType) -> dict[str, str]:
    return study.fingerprints(study.base_folder("bundled", {}))


def test_the_page_is_made_of_the_raw_files(study, prints, tmp_path):
    """Fails where weights or generator changed and the study was not run again, or the page not written."""
    page = study.study_page.write_page(RAW, prints, tmp_path)
    assert page.read_text() == (ROOT / "docs" / "study.md").read_text()


def test_other_weights_make_the_page_stale(study, prints, tmp_path):
    text = study.study_page.write_page(RAW, prints | {"base_sha256": "0" * 64}, tmp_path).read_text()
    assert "**Stale**: 142 of 174 units" in text
    assert "## In short" not in text
