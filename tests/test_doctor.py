"""The doctor sees what is wrong and says it, where lmms-eval would only say that a task was not found."""

import pytest
from typer.testing import CliRunner

from lmms_keyspace import doctor, embedded, harness
from lmms_keyspace.cli import app

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


def test_a_version_out_of_range_is_named(monkeypatch, only_tasks_in):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "lmms-eval" else real(name))
    found = finding("versions")
    assert not found.ok
    assert "lmms-eval 0.1 is outside" in found.detail


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
