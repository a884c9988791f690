"""Who may import whom: the library knows no plug, and what reads files needs neither torch nor lmms-eval."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "lmms_keyspace").rglob("*.py"))
PLUGS = ("lmms_keyspace.model_wrappers", "lmms_keyspace.tasks", "lmms_keyspace.reports")
# The command line is where a person meets the plugs: it imports them when a command asks for one.
MAY_IMPORT_LAZILY = {ROOT / "lmms_keyspace" / "cli.py"}


def imported(source: str) -> list[tuple[str, bool]]:
    """Modules that `source` imports, each with whether at module level."""
    tree = ast.parse(source)
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, id(node) in top)]
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def plug_imports(source: str, *, lazily_allowed: bool = False) -> list[str]:
    return [name for name, at_top in imported(source) if name.startswith(PLUGS) and (at_top or not lazily_allowed)]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_no_plug(path):
    assert plug_imports(path.read_text(), lazily_allowed=path in MAY_IMPORT_LAZILY) == []


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_harness_module_and_the_doctor_touch_lmms_eval(path):
    names = [name for name, _ in imported(path.read_text()) if name.split(".")[0] == "lmms_eval"]
    assert names == [] or path.name in ("harness.py", "doctor.py")


def test_training_stands_above_the_method():
    names = {path: [name for name, _ in imported(path.read_text())] for path in LIBRARY}
    users = {path for path, found in names.items() if any(name.startswith("lmms_keyspace.training") for name in found)}
    above = {path.relative_to(ROOT / "lmms_keyspace").parts[0] for path in users}
    assert above <= {"training", "embedded", "cli.py"}  # the builder of the bundled adapters trains like everybody


def test_these_tests_can_fail():
    assert plug_imports("def f():\n    from lmms_keyspace import reports") == ["lmms_keyspace.reports"]
    assert plug_imports("import lmms_keyspace.tasks.metrics", lazily_allowed=True) == ["lmms_keyspace.tasks.metrics"]
    assert plug_imports("def f():\n    import lmms_keyspace.reports", lazily_allowed=True) == []


def loaded_by(module: str, *unwanted: str) -> set[str]:
    code = f"import sys, {module}; print(*(name for name in {unwanted!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "lmms_keyspace.reports",
        "lmms_keyspace.store",
        "lmms_keyspace.stats",
        "lmms_keyspace.records",
        "lmms_keyspace.cli",
    ],
)
def test_reading_needs_neither_torch_nor_lmms_eval(module):
    assert loaded_by(module, "torch", "lmms_eval", "transformers") == set()


def test_the_entry_point_imports_nothing_heavy():
    assert loaded_by("lmms_keyspace.harness", "torch", "lmms_eval", "pandas", "numpy", "transformers") == set()


def test_the_import_probe_can_fail():
    assert loaded_by("json", "json", "torch") == {"json"}
