"""Run lmms-eval inside the test process: the same evaluator as the command line, without indexing its own tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmms_eval import evaluator
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.tasks import TaskManager

from lmms_keyspace import harness
from lmms_keyspace.store import LoadedRun, find_runs, load_run


def evaluate(model: str, out: Path | None = None, **given: Any) -> dict[str, Any]:
    """`simple_evaluate` on our tasks, saving to `out` as the command line does.

    Args:
        model: lmms-eval model name.
        out: output folder; None saves nothing.
        given: arguments of `simple_evaluate`; `tasks` is `["textbias_probe_quick"]` unless named.
    """
    manager = TaskManager(include_path=str(harness.tasks_folder()), include_defaults=False, model_name=model)
    tracker = EvaluationTracker(output_path=str(out)) if out is not None else None
    given.setdefault("tasks", ["textbias_probe_quick"])
    given.setdefault("datetime_str", "20260101_000000")
    # The evaluator's attribute is the hooked one, as the command line sees it.
    results = evaluator.simple_evaluate(model=model, task_manager=manager, evaluation_tracker=tracker, **given)
    if tracker is not None:
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples, datetime_str=given["datetime_str"])
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
    return results


def run_of(out: Path) -> LoadedRun:
    """The one run under `out`."""
    (files,) = find_runs(out)
    return load_run(files)


def answers(results: dict[str, Any], task: str = "textbias_probe_quick") -> list[str]:
    """What the model said, in document order."""
    return [sample["filtered_resps"][0] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]
