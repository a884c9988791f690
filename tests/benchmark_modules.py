"""The scripts of `benchmarks/`, which are no package, as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark_module(name: str) -> ModuleType:
    """Import `benchmarks/<name>.py`; the folder is on the path while that goes on, for its neighbors."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
