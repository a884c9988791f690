"""The fake runs are written once for all tests that only read them."""

from __future__ import annotations

from pathlib import Path

import fake_runs
import pytest


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory) -> list[Path]:
    """Base, MaLoRA (divergence falls, answers equal) and plain LoRA (divergence stays, flips fall)."""
    root = tmp_path_factory.mktemp("runs")
    return [fake_runs.write(run, root) for run in (fake_runs.BASE, fake_runs.MALORA, fake_runs.LORA)]
