"""Run lmms-eval inside the test process: the same evaluator as the command line, without indexing its own tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmms_eval.utils
from lmms_eval import evaluator
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.tasks import TaskManager

from lmms_keyspace import harness
from lmms_keyspace.records import RunData
from lmms_keyspace.store import read_run

DATE = "20260101_000000"
# What lmms-eval's results hold of the clock.
TIMES = ("date", "start_time", "end_time", "total_evaluation_time_seconds", "throughput", "efficiency")


def evaluate(model: str, out: Path | None = None, **given: Any) -> Any:
    """`simple_evaluate` on our tasks, saving to `out` as the command line does.

    Args:
        model: lmms-eval model name.
        out: output folder; None saves nothing.
        given: arguments of `simple_evaluate`; `tasks` is `["textbias_probe_quick"]` unless named. `include_path` names
            a folder with further tasks.
    """
    folders = [str(harness.tasks_folder()), *([str(given.pop("include_path"))] if "include_path" in given else [])]
    manager = TaskManager(include_path=folders, include_defaults=False, model_name=model)
    tracker = EvaluationTracker(output_path=str(out)) if out is not None else None
    given.setdefault("tasks", ["textbias_probe_quick"])
    given.setdefault("datetime_str", DATE)
    # The evaluator's attribute is the hooked one, as the command line sees it.
    results = evaluator.simple_evaluate(model=model, task_manager=manager, evaluation_tracker=tracker, **given)
    if tracker is not None and results is not None:  # None: another process than the first of several
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples, datetime_str=given["datetime_str"])
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
    return results


def fix_cache_version() -> None:
    """lmms-eval's cache keys hold the commit of the repository around it, which may move between two runs of a test."""
    lmms_eval.utils.get_lmms_eval_cache_version = lambda: "fixed"


def run_of(folder: Path) -> RunData:
    """The key-space files that `evaluate` left in `folder` (its `keys_dir`)."""
    return read_run(folder, DATE)


def answers(results: dict[str, Any], task: str = "textbias_probe_quick") -> list[str]:
    """What the model said, in document order."""
    return [sample["filtered_resps"][0] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]
