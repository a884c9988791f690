"""The doctor sees what is wrong and says it, where lmms-eval would only say that a task was not found."""

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from lmms_keyspace import doctor, embedded, harness
from lmms_keyspace.cli import app

ROOT = Path(__file__).parents[1]
BROKEN = """
task: broken
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: generate_until
process_docs: !function lmms_keyspace.tasks.no_such_module.build
doc_to_text: "x"
doc_to_target: "y"
metric_list: []
"""


def finding(subject):
    (found,) = (finding for finding in doctor.examine() if finding.subject == subject)
    return found


@pytest.fixture
def only_tasks_in(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "tasks_folder", lambda: tmp_path)
    return tmp_path


def test_a_broken_task_shows_its_true_error(only_tasks_in):
    (only_tasks_in / "broken.yaml").write_text(BROKEN)
    (only_tasks_in / "rows.jsonl").write_text('{"a": 1}\n')
    found = finding("task broken")
    assert not found.ok
    assert "no_such_module" in found.detail


def test_missing_weights_are_named_with_the_way_to_build_them(monkeypatch, only_tasks_in, tmp_path):
    monkeypatch.setattr(embedded, "_WEIGHTS", tmp_path / "nowhere")
    found = finding("bundled base")
    assert not found.ok
    assert "lmms_keyspace.embedded.build" in found.detail


@pytest.fixture
def installed(monkeypatch):
    """Replaces versions of packages; None takes a package away."""
    real, faked = doctor.version, {}

    def version(name):
        if faked.get(name, "") is None:
            raise doctor.PackageNotFoundError
        return faked.get(name) or real(name)

    monkeypatch.setattr(doctor, "version", version)
    return faked


def test_a_version_out_of_range_is_named(installed):
    installed["lmms-eval"] = "0.1"
    with pytest.raises(RuntimeError, match=r"^lmms-eval <0\.8,>=0\.7\.3, but 0\.1 is installed; install with"):
        doctor.versions()


def test_two_packages_that_do_not_fit_each_other_are_named(installed):
    """Each is in this package's range."""
    installed["tokenizers"] = "0.1"
    with pytest.raises(RuntimeError, match=r"^transformers needs tokenizers .*>=.*, but 0\.1 is installed"):
        doctor.versions()


def test_a_package_that_is_missing_is_named(installed):
    installed["peft"] = None
    with pytest.raises(RuntimeError, match=r"^peft, which is missing"):
        doctor.versions()


def test_builds_that_do_not_fit_are_told_once(monkeypatch, tmp_path):
    """Versions fit by their numbers: torch for the CPU beside torchvision for CUDA."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    versions, builds = doctor.examine()
    assert versions.ok
    assert not builds.ok
    assert "do not fit each other (operator torchvision::nms does not exist); install both anew" in builds.detail


def test_a_package_that_does_not_load_is_told_once_in_one_line(monkeypatch):
    def install_task_hook():
        raise ImportError("tokenizers>=2 is required,\nbut found 1")

    monkeypatch.setattr(harness, "install_task_hook", install_task_hook)
    assert doctor.examine()[2:] == [
        doctor.Finding("hooks", False, "ImportError: tokenizers>=2 is required, but found 1")
    ]


def test_missing_models_are_named(monkeypatch, only_tasks_in):
    monkeypatch.setitem(harness.MODEL_CLASSES, "no_such_model", "Nothing")
    found = finding("models")
    assert not found.ok
    assert "no_such_model" in found.detail


def test_something_wrong_is_exit_status_1(only_tasks_in):
    (only_tasks_in / "broken.yaml").write_text(BROKEN)
    (only_tasks_in / "rows.jsonl").write_text('{"a": 1}\n')
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAIL" in result.output


def test_the_lowest_leg_installs_what_pyproject_allows():
    """Every dependency has a lower bound, and `make lowest` installs just that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()[1:]
    pinned = dict(line.split("==") for line in lines)
    allowed = {
        requirement.name: Version(bound.version)
        for requirement in map(Requirement, project["dependencies"])
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert len(allowed) == len(project["dependencies"])
    assert {name: Version(number) for name, number in pinned.items()} == allowed
