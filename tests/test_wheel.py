"""The built wheel, installed alone in an empty folder, brings models, tasks, templates and weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("lmms_keyspace", "model_wrappers", "tasks", "reports", "pyproject.toml", "README.md", "LICENSE")

LOOK = """
import json
from pathlib import Path
import lmms_keyspace, lmms_keyspace.reports
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_keyspace import embedded, harness
import sys
tasks = TaskManager(include_defaults=False)
model = get_model("malora_llava")
print(json.dumps({
    "package": lmms_keyspace.__file__,
    "reports": lmms_keyspace.reports.__file__,
    "model": sys.modules[model.__module__].__file__,
    "tasks": {name: tasks.task_index[name]["yaml_path"] for name in tasks.all_tasks},
    "weights": [str(p) for p in (embedded.base_path(), *map(embedded.adapter_path, embedded.ADAPTERS)) if p.is_dir()],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel built from a copy of the sources (a build writes into its folder) and installed in a target folder."""
    work = tmp_path_factory.mktemp("wheel")
    source, target = work / "source", work / "target"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(work), str(source)],
        check=True,
    )
    (wheel,) = work.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    return target


def test_models_tasks_and_weights_come_from_the_wheel(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    everything = [seen["package"], seen["reports"], seen["model"], *seen["tasks"].values(), *seen["weights"]]
    assert [path for path in everything if not Path(path).is_relative_to(installed)] == []
    assert {"textbias_probe", "textbias_probe_quick", "textbias_probe_letter", "visreliance"} <= set(seen["tasks"])
    assert len(seen["weights"]) == 4


def test_one_import_root_and_no_code_outside_it(installed):
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top - {"bin"} == {"lmms_keyspace"}


def test_every_file_of_the_sources_is_in_the_wheel(installed):
    folders = {"lmms_keyspace": "", **{name: name for name in ("model_wrappers", "tasks", "reports")}}
    data = (".py", ".yaml", ".jsonl", ".toml", ".j2", ".css", ".js", ".safetensors", ".json", ".jinja", ".md")
    for folder, name in folders.items():
        files = {
            path.relative_to(ROOT / folder)
            for path in (ROOT / folder).rglob("*")
            if path.suffix in data or path.name.endswith("_template")
        }
        missing = [str(path) for path in files if not (installed / "lmms_keyspace" / name / path).is_file()]
        assert missing == []
