"""The hooks into lmms-eval: in place when it is as we know it, one clear word and no traceback when it is not."""

import pytest
from lmms_eval import evaluator
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.models import list_available_models
from lmms_eval.tasks import TaskManager

from lmms_keyspace import harness
from lmms_keyspace.errors import InputError


def test_models_are_registered():
    assert set(harness.MODEL_CLASSES) <= set(list_available_models())


def test_tasks_are_found_by_name_with_no_flag():
    manager = TaskManager(include_defaults=False)
    assert "textbias_probe" in manager.all_tasks


def test_our_folder_is_not_indexed_twice(monkeypatch):
    seen = []
    monkeypatch.setattr(TaskManager, "_get_task_and_group", lambda self, folder: seen.append(folder) or {})
    TaskManager(include_path=str(harness.tasks_folder()), include_defaults=False)
    assert seen == [str(harness.tasks_folder())]


def test_placing_the_hooks_again_changes_nothing():
    assert harness.install_task_hook() is None
    assert harness.install_run_hooks() is None
    before = TaskManager.initialize_tasks, evaluator.simple_evaluate, EvaluationTracker.save_results_aggregated
    assert harness.install_task_hook() is None
    assert harness.install_run_hooks() is None
    after = TaskManager.initialize_tasks, evaluator.simple_evaluate, EvaluationTracker.save_results_aggregated
    assert before == after


def test_a_changed_task_manager_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(TaskManager, "initialize_tasks", lambda self, folders: {})
    assert "--include_path" in harness.install_task_hook()
    monkeypatch.delattr(TaskManager, "initialize_tasks")
    assert "is gone" in harness.install_task_hook()


def test_a_changed_evaluator_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(evaluator, "simple_evaluate", lambda model: None)
    assert "keys_dir=" in harness.install_run_hooks()


def test_a_changed_tracker_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", lambda self, everything: None)
    assert "keys_dir=" in harness.install_run_hooks()


def test_other_models_pass_through_untouched():
    given = []

    def simple_evaluate(
        model, model_args=None, evaluation_tracker=None, log_samples=False, datetime_str="", cli_args=None
    ):
        given.append((model, model_args, evaluation_tracker, log_samples, datetime_str, cli_args))
        return {"results": {}}

    tracker = EvaluationTracker(output_path=None)
    results = harness._hooked_evaluate(simple_evaluate)("dummy", evaluation_tracker=tracker, datetime_str="now")
    assert results == {"results": {}}
    assert given == [("dummy", None, tracker, False, "now", None)]
    assert tracker.output_path is None


def evaluated(**arguments):
    """What our hook passes on to an evaluator that does nothing."""
    given = {}

    def simple_evaluate(
        model,
        model_args=None,
        evaluation_tracker=None,
        log_samples=False,
        datetime_str="20260101_000000",
        cli_args=None,
    ):
        given.update(log_samples=log_samples, date=datetime_str)
        return {}

    harness._hooked_evaluate(simple_evaluate)("keyspace_vlm", **arguments)
    return given


def test_without_an_output_path_results_go_to_a_dated_folder_with_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = EvaluationTracker(output_path=None)
    given = evaluated(evaluation_tracker=tracker, datetime_str="20260102_030405")
    assert given == {"log_samples": True, "date": "20260102_030405"}
    assert tracker.output_path == "lmms_keyspace_runs/20260102_030405"
    assert (tmp_path / tracker.output_path).is_dir()


def test_keys_dir_leaves_the_output_alone():
    tracker = EvaluationTracker(output_path=None)
    given = evaluated(evaluation_tracker=tracker, model_args="keys_dir=somewhere")
    assert given["log_samples"] is False
    assert tracker.output_path is None


def test_an_unwritable_output_folder_is_an_error_before_the_model_loads():
    with pytest.raises(InputError, match=r"--output_path='/dev/null/out'.*cannot be written"):
        evaluated(evaluation_tracker=EvaluationTracker(output_path="/dev/null/out"))
